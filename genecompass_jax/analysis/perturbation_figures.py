"""Figures of perturbations: genes by rank, and a volcano.

Both show z or the effect beyond matched nulls, never the bare shift: that one
is mostly the rank of the gene and the length of the cells.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from genecompass_jax import errors
from genecompass_jax.analysis import figures
from genecompass_jax.analysis.perturbation import (
  results as results_lib,
  statistics,
)

_DOT, _TOP, _EXPECTED = '#9A9A9A', figures.PALETTE[0], figures.PALETTE[4]
_BAND = '#E4E4E4'
_LINE = {'color': '#888888', 'lw': 0.6}


def rank_plot(
  results: results_lib.Results,
  *,
  title: str,
  group: str = '',
  expected: Sequence[str] = (),
  label: int = 10,
  note: str = '',
):
  """Targets by rank, the band of their nulls behind them.

  Args:
    results: of a screen.
    title: of the figure: what was done to which cells.
    group: one of several groups of cells.
    expected: symbols to point out, wherever they come.
    label: how many of the highest to name; of a step towards a goal, of the
      furthest on both sides.
    note: small print below; the header's statement always stands there.

  Returns:
    A matplotlib Figure.

  Raises:
    UserError: no such group, or nothing with a z to draw.
  """
  table = _lines(results, group)
  matplotlib = figures.optional('matplotlib')
  with matplotlib.rc_context(figures.STYLE):
    figure = figures.new_figure(6.2, 4.2)
    axes = figure.subplots()
    low, high = table[['null_z_low', 'null_z_high']].iloc[0]
    if np.isfinite(low):
      axes.axhspan(low, high, color=_BAND, lw=0, zorder=0)
    axes.axhline(0, **_LINE, zorder=1)
    x, y = np.arange(1, len(table) + 1), table['score'].to_numpy()
    named = _named(results, table, label)
    _dots(axes, x, y, table['symbol'], expected, named)
    # Half a rank at least, so that few targets have ranks for ticks.
    beyond = max(0.03 * len(table), 0.5)
    axes.set_xlim(1 - beyond, len(table) + beyond)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel(_ranked(results, group, len(table)))
    axes.set_ylabel(_z_label(results))
    axes.margins(y=0.1)
    if np.isfinite(low):
      axes.annotate(
        '95 % of\nmatched nulls',
        (1.01, (low + high) / 2),
        xycoords=('axes fraction', 'data'),
        va='center',
        fontsize=7.5,
        color='#777777',
        annotation_clip=False,
      )
    _name(axes, x, y, table['symbol'].tolist(), expected, named)
    _finish(figure, results, table, title, note)
  return figure


def volcano(
  results: results_lib.Results,
  *,
  title: str,
  group: str = '',
  expected: Sequence[str] = (),
  label: int = 10,
  note: str = '',
):
  """Effect beyond matched nulls against how sure it is.

  The height is -log10 q; with one unit there is none, and it is z, and the axis
  says so. Arguments as for `rank_plot`.

  Returns:
    A matplotlib Figure.

  Raises:
    UserError: no such group, or nothing with a z to draw.
  """
  table = _lines(results, group)
  measure = _measure(results)
  matplotlib = figures.optional('matplotlib')
  with matplotlib.rc_context(figures.STYLE):
    figure = figures.new_figure(6.2, 4.4)
    axes = figure.subplots()
    has_q = bool(np.isfinite(table['q']).any())
    if has_q:
      table = table[np.isfinite(table['q'])]
      y = -np.log10(table['q'].to_numpy())
      axes.axhline(-np.log10(statistics.ALPHA), ls=(0, (4, 3)), **_LINE)
      axes.annotate(
        f'q = {statistics.ALPHA:g}',
        (1.01, -np.log10(statistics.ALPHA)),
        xycoords=('axes fraction', 'data'),
        va='center',
        fontsize=7.5,
        color='#777777',
        annotation_clip=False,
      )
      axes.set_ylabel('$-\\log_{10}$ q')
    else:
      y = table['score'].to_numpy()
      axes.axhline(0, **_LINE)
      axes.set_ylabel('z among matched nulls\n(one unit: no p, no q)')
    x = (table[measure] - table['null_mean']).to_numpy()
    axes.axvline(0, **_LINE)
    named = _named(results, table, label)
    _dots(axes, x, y, table['symbol'], expected, named)
    axes.margins(0.1)
    axes.set_xlabel(
      f'{_in_words(results)} beyond matched nulls in the same cells'
    )
    _name(axes, x, y, table['symbol'].tolist(), expected, named)
    _finish(figure, results, table, title, note)
  return figure


def _measure(results: results_lib.Results) -> str:
  return results.header['measure'].partition(':')[0]


def _in_words(results: results_lib.Results) -> str:
  """What is tested, as an axis names it."""
  measure = _measure(results)
  goal = results.header.get('axis', '').partition(' -> ')[2]
  if measure == statistics.TOWARD:
    return f'step towards {goal or "the goal"}'
  return {'gene_shift': 'shift of other genes'}.get(measure, measure)


def _z_label(results: results_lib.Results) -> str:
  return f'z of the {_in_words(results)}\namong matched nulls'


def _ranked(results: results_lib.Results, group: str, drawn: int) -> str:
  """Which targets the ranks are among, and how many are not drawn."""
  table = results.table
  without = int(((table['group'] == group) | (not group)).sum()) - drawn
  among = f'rank among {drawn:,} target' + 's' * (drawn != 1)
  return f'{among} ({without:,} without z)' if without else among


def _lines(results: results_lib.Results, group: str) -> pd.DataFrame:
  """Lines that can be drawn, the highest first."""
  table = results.table
  groups = list(dict.fromkeys(table['group']))
  if group and group not in groups:
    raise errors.UserError(
      f'no group {group!r}; there are: {", ".join(groups)}'
    )
  if not group and len(groups) > 1:
    raise errors.UserError(
      f'name one group to draw; there are: {", ".join(groups)}'
    )
  table = table[table['group'] == (group or groups[0])]
  table = table[np.isfinite(table['score'])]
  if not len(table):
    raise errors.UserError(
      'no target has enough matched nulls for a z: nothing to draw; see n_null '
      'and flags in the table'
    )
  return table.sort_values('score', ascending=False, kind='stable')


def _named(results, table, label) -> np.ndarray:
  """Which lines to name: the highest, or where both sides count, the furthest."""
  score = table['score'].to_numpy()
  if results.header.get('alternative') == statistics.TWO_SIDED:
    score = np.abs(score)
  is_named = np.zeros(len(score), bool)
  is_named[np.argsort(-score, kind='stable')[:label]] = True
  return is_named


def _dots(axes, x, y, symbols, expected, is_top) -> None:
  is_expected = np.isin(symbols, list(expected))
  size = float(np.clip(6000 / len(x), 6, 22))
  style = {'linewidths': 0.3, 'edgecolors': 'white'}
  rest = ~is_expected & ~is_top
  axes.scatter(x[rest], y[rest], s=size, c=_DOT, **style, zorder=2)
  top = is_top & ~is_expected
  axes.scatter(x[top], y[top], s=1.3 * size, c=_TOP, **style, zorder=3)
  axes.scatter(
    x[is_expected], y[is_expected], s=2.4 * size, c=_EXPECTED, marker='D',
    **style, zorder=4,
  )  # fmt: skip


def _name(axes, x, y, symbols, expected, is_named) -> None:
  """Names beside their dots, where no other name and no dot is in the way."""
  wanted = [
    i for i, s in enumerate(symbols) if is_named[i] or s in set(expected)
  ]
  figure = axes.figure
  figure.draw_without_rendering()  # limits and places are known after this
  to_axes = axes.transData + axes.transAxes.inverted()
  dots = to_axes.transform(np.stack([x, y], 1))
  size = axes.get_window_extent()
  # Of a letter and a line of 7.5 points, and of a dot, as shares of the axes.
  letter, line = (
    5.2 * figure.dpi / 72 / size.width,
    9.5 * figure.dpi / 72 / (size.height),
  )
  gap = 1.3 * letter
  taken: list[tuple[float, float, float]] = []
  for i in sorted(wanted, key=lambda i: (-dots[i, 1], dots[i, 0])):
    name, is_expected = symbols[i], symbols[i] in set(expected)
    long = letter * len(name) * (1.1 if is_expected else 1.0)
    left, at = min(
      _places(dots[i], gap, long, line),
      key=lambda place: _in_the_way(place, dots, taken, gap, long, line),
    )
    taken.append((left, at, long))
    end = left - 0.2 * letter if left > dots[i, 0] else left + long
    if np.hypot(end - dots[i, 0], (at - dots[i, 1]) * 0.7) > 1.6 * gap:
      axes.plot(
        [dots[i, 0], end], [dots[i, 1], at], transform=axes.transAxes,
        lw=0.4, color='#999999', zorder=1.5, clip_on=False,
      )  # fmt: skip
    axes.text(
      left,
      at,
      name,
      transform=axes.transAxes,
      va='center',
      fontsize=7.5,
      color=_EXPECTED if is_expected else figures.INK,
      fontweight='bold' if is_expected else 'normal',
      zorder=5,
      parse_math=False,
    )


def _places(dot, gap, long, line):
  """Where a name may begin, the best first: beside, then further off."""
  x, y = dot
  for steps in range(8):
    for up in (1, -1) if steps else (1,):
      for out in (0.5, 2, 4) if steps else (1,):
        yield x + out * gap, y + up * steps * line
        yield x - out * gap - long, y + up * steps * line


def _in_the_way(place, dots, taken, gap, long, line) -> float:
  """Names and dots that a name would cover, or how far it leaves the axes."""
  left, at = place
  covered = sum(
    abs(other - at) < line and first < left + long and left < first + wide
    for first, other, wide in taken
  )
  beside = (dots[:, 0] > left - gap / 2) & (dots[:, 0] < left + long + gap / 2)
  covered += int((beside & (np.abs(dots[:, 1] - at) < 0.7 * line)).sum())
  outside = max(0.0, -left, left + long - 1.02, -at, at - 1.02)
  return covered + 5 * (outside > 0)


def _finish(figure, results, table, title, note) -> None:
  units = int(table['n_units'].max())
  said = f'{units} units' if units > 1 else 'one unit'
  if units < statistics.MIN_UNITS:
    said += f', fewer than {statistics.MIN_UNITS}: no verdict'
  parts = [note, f'{said}; {results_lib.STATEMENT}.']
  figures.set_title(figure, title)
  figures.small_print(figure, ' '.join(filter(None, parts)))
