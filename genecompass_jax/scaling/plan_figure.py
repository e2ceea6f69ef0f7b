"""A picture of a plan: memory against its limits, and assumed step times."""

import textwrap
from collections.abc import Sequence
from typing import Any

from genecompass_jax import errors
from genecompass_jax.scaling import plan

# Colours that colour-blind readers tell apart (Okabe and Ito).
_PARTS = {
  'arguments': ('#0072B2', 'state and batch'),
  'state': ('#0072B2', 'state and batch'),
  'tables': ('#56B4E9', 'prior tables'),
  'temporaries': ('#E69F00', 'temporaries'),
  'activations': ('#E69F00', 'temporaries'),
  'logits': ('#E69F00', 'temporaries'),
  'program': ('#8C6D1F', 'program'),
}
_TOO_MUCH = '#D55E00'
_GREY = '#BBBBBB'
# Words stand out from the limit that they may cross.
_WORDS = {
  'va': 'center',
  'size': 7,
  'zorder': 4,
  'bbox': {'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5},
}


def draw(rows: Sequence[plan.Row], question: plan.Question, path: str) -> None:
  """Writes the picture; the ending of `path` says its format.

  Raises:
    UserError: matplotlib is missing, or cannot write such a file.
  """
  try:
    import matplotlib

    matplotlib.use('Agg', force=False)
    from matplotlib import figure
  except ImportError as error:
    raise errors.UserError(
      '-o draws with matplotlib: pip install matplotlib'
    ) from error
  height = 1.7 + 0.42 * len(rows)
  canvas = figure.Figure(figsize=(10, height), layout='constrained')
  left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
  names = [
    f'{row.config}, {row.topology}{_shared(row)}\n'
    f'{row.rows / max(1, row.devices):.3g} rows a device, recomputed: {row.remat}'
    for row in rows
  ]
  _memory(left, rows)
  _time(right, rows, question)
  left.set_yticks(range(len(rows)), names)
  left.set_ylim(len(rows) - 0.4, -0.6)
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(labelsize=8)
  try:
    canvas.savefig(path, dpi=150)
  except ValueError as error:  # an ending that matplotlib does not know
    raise errors.UserError(
      f'-o {path}: {errors.first_line(error)}; give a name ending in .png'
    ) from error


def _memory(axes: Any, rows: Sequence[plan.Row]) -> None:
  """Bars of memory a device, a mark at each limit."""
  seen = set()
  for y, row in enumerate(rows):
    if row.limit is not None:
      limit = row.limit / plan.GIB
      axes.plot([limit] * 2, [y - 0.4, y + 0.4], color='#222222', lw=2)
    if not row.memory:
      axes.text(0.3, y, row.message or row.status, **_WORDS)
      continue
    parts = {k: v for k, v in row.memory.items() if k in _PARTS and v}
    over = row.limit is not None and row.memory['total'] > row.limit
    if over or not parts:
      colour, label = _TOO_MUCH if over else _GREY, 'too much'
      total = row.memory['total'] / plan.GIB
      axes.barh(y, total, 0.6, color=colour, label=_once(label, seen))
      axes.text(total, y, f' {total:.1f}', **_WORDS)
      continue
    start = 0.0
    for name, number in parts.items():
      colour, label = _PARTS[name]
      width = number / plan.GIB
      hatch = '///' if row.status == plan.ESTIMATED else None
      axes.barh(
        *(y, width, 0.6, start),
        color=colour,
        label=_once(label, seen),
        hatch=hatch,
        edgecolor='white',
      )
      start += width
    axes.text(start, y, f' {_figures(start)}', **_WORDS)
  label = 'GiB a device, compiled (hatched: estimated); line: limit'
  axes.set_xlabel(label, size=8)
  axes.margins(x=0.12)
  if seen:
    axes.legend(fontsize=7, frameon=False, ncols=4, loc='lower left',
                bbox_to_anchor=(0, 1))  # fmt: skip


def _shared(row: plan.Row) -> str:
  """The axes of the mesh but for data: plans may differ in these alone."""
  axes = [f'{a} {n}' for a, n in row.mesh.items() if a != 'data']
  return f', {" x ".join(axes)}' if axes else ''


def _figures(number: float) -> str:
  """One place behind the point, or two figures of what is small."""
  return f'{number:,.1f}' if number >= 1 else f'{number:.2g}'


def _once(label: str, seen: set[str]) -> str | None:
  if label in seen:
    return None
  seen.add(label)
  return label


def _time(axes: Any, rows: Sequence[plan.Row], question: plan.Question) -> None:
  """Bars of seconds a step, where they are assumed."""
  for y, row in enumerate(rows):
    if row.step_s is None:
      axes.text(0.002, y, 'no time: ' + row.status, **_WORDS)
      continue
    axes.barh(y, row.step_s, 0.6, color=_GREY)
    text = f' {row.cells_per_s:,.0f} cells/s, {_figures(row.days)} days'
    axes.text(row.step_s, y, text, **_WORDS)
  title = (
    f's a step, ASSUMING {question.utilisation:.0%} utilisation; days for '
    f'{question.cells:,} cells'
  )
  axes.set_xlabel('\n'.join(textwrap.wrap(title, 48)), size=8)
  axes.margins(x=0.6)
  axes.set_xlim(left=0)
  # A power of ten in the corner would lie on the title.
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:.3g}')
