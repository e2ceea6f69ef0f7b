"""Curves in plain text, for terminals and logs."""

import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]
LABEL_WIDTH = 7


def plot(
  curves: Mapping[str, Points], levels: Mapping[str, float], *, width: int,
  height: int, is_log: bool = False,
) -> list[str]:  # fmt: skip
  """Draws curves over a common scale.

  Args:
    curves: mark -> (x, y) points in order of x; later ones lie on top. Points
      that share a column are averaged.
    levels: mark -> y of a line over the whole width, below the curves.
    width: columns, labels of the axis included.
    height: rows of the plot; one more holds the ends of the x axis.
    is_log: the scale is that of logarithms; what is not positive is left out.

  Returns:
    `height` + 1 lines, each `width` wide; all empty where there is no point.
  """
  curves = {
    mark: [
      (x, y) for x, y in points if math.isfinite(y) and (y > 0 or not is_log)
    ]
    for mark, points in curves.items()
  }
  levels = {
    mark: y
    for mark, y in levels.items()
    if math.isfinite(y) and (y > 0 or not is_log)
  }
  columns = max(width - LABEL_WIDTH - 1, 1)
  xs = [x for points in curves.values() for x, _ in points]
  if not xs:
    return [' ' * width] * (height + 1)
  left, right = min(xs), max(xs)

  def column(x: float) -> int:
    share = (x - left) / (right - left) if right > left else 0.0
    return min(int(share * columns), columns - 1)

  drawn = {mark: _averaged(points, column) for mark, points in curves.items()}
  ys = [y for points in drawn.values() for y in points.values()]
  ys += levels.values()
  low, high = min(ys), max(ys)
  rows = [[' '] * columns for _ in range(height)]

  def scale(y: float) -> float:
    return math.log(y) if is_log else y

  def row(y: float) -> int:
    span = scale(high) - scale(low)
    share = (scale(high) - scale(y)) / span if span > 0 else 0.5
    return min(int(share * height), height - 1)

  for mark, y in levels.items():
    rows[row(y)] = [mark] * columns
  for mark, points in drawn.items():
    for place, y in points.items():
      rows[row(y)][place] = mark
  labels = [''] * height
  labels[0], labels[-1] = f'{high:.4g}', f'{low:.4g}'
  lines = [
    f'{label[:LABEL_WIDTH]:>{LABEL_WIDTH}}|{"".join(marks)}'
    for label, marks in zip(labels, rows)
  ]
  begin, end = f'{left:,.0f}', f'{right:,.0f}'
  axis = begin + end.rjust(max(columns - len(begin), 0))
  return [*lines, f'{" " * (LABEL_WIDTH + 1)}{axis}'[:width].ljust(width)]


def _averaged(points: Points, column) -> dict[int, float]:
  """Column -> mean of its points."""
  found: dict[int, list[float]] = {}
  for x, y in points:
    found.setdefault(column(x), []).append(y)
  return {place: sum(ys) / len(ys) for place, ys in found.items()}
