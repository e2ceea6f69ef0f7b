"""Figures of attributions by group: which part, and which genes, mattered."""

import numpy as np
import pandas as pd

from genecompass_jax import errors
from genecompass_jax.analysis import figures
from genecompass_jax.analysis.attribution import group_tables
from genecompass_jax.analysis.perturbation import (
  results as results_lib,
  statistics,
)

_LINE = {'color': '#888888', 'lw': 0.6}
_WORD = '#9A9A9A'  # what every model has; priors are in colours
_PANELS = 12  # groups of the figure of genes
_GROUPS = 40  # of the figure of parts
_GENES = 10


def parts_plot(found: group_tables.AttributionByGroup, target: str):
  """Bars of the parts by group, those that lower the target to the left.

  A dot is the sum, with its 95 % interval over units where there is one.

  Args:
    found: attributions.
    target: one of them, as the table names it.

  Returns:
    A matplotlib Figure.

  Raises:
    UserError: no such target, or no group of enough cells.
  """
  table = _of(found.parts, target)
  table = table[np.isfinite(table['score'])]
  sums = table[table['part'] == group_tables.ALL].set_index('group')
  if not len(sums):
    raise errors.UserError(f'no group has enough cells asked about {target}')
  sums = sums.sort_values('score', kind='stable')
  left_out = max(0, len(sums) - _GROUPS)
  sums = sums.iloc[left_out:]
  parts = [p for p in dict.fromkeys(table['part']) if p != group_tables.ALL]
  score_GP = table.pivot(index='group', columns='part', values='score')
  score_GP = score_GP.loc[sums.index, parts].to_numpy()
  matplotlib = figures.optional('matplotlib')
  with matplotlib.rc_context(figures.STYLE):
    figure = figures.new_figure(6.8, 1.7 + 0.32 * len(sums))
    axes = figure.subplots()
    at_G = np.arange(len(sums))
    _stack(axes, at_G, score_GP, parts)
    error = None
    if np.isfinite(sums['ci_low']).any():
      low, high = (
        np.abs(sums[c] - sums['score']) for c in ('ci_low', 'ci_high')
      )
      error = np.stack([low, high])
    axes.errorbar(
      sums['score'], at_G, xerr=error, fmt='o', ms=4, color=figures.INK,
      elinewidth=1, label='sum', zorder=4,
    )  # fmt: skip
    axes.set_yticks(
      at_G, [_named(*line) for line in _facts(sums)], parse_math=False
    )
    axes.tick_params(axis='y', length=0, labelcolor=figures.INK)
    axes.set_xlabel(
      f'{_unit(found, target)} above the baseline, of a mean cell'
    )
    axes.axvline(0, **_LINE, zorder=3)
    axes.spines['left'].set_visible(False)
    figure.legend(
      loc='outside right center', frameon=False, fontsize=8.5,
      alignment='left',
    )  # fmt: skip
    figures.set_title(figure, f'Which part mattered: {target}')
    note = f'{left_out} more groups are in the table.' if left_out else ''
    figures.small_print(figure, _note(found, sums, note))
  return figure


def genes_plot(found: group_tables.AttributionByGroup, target: str):
  """Genes of the highest absolute scores, a panel a group; bars by part.

  Arguments, result and errors as for `parts_plot`.
  """
  table = _of(found.genes, target)
  if not len(table):
    raise errors.UserError(f'no genes of {target} in the table')
  of_parts = _of(found.parts, target).drop_duplicates('group')
  largest = of_parts.sort_values('n_cells', ascending=False, kind='stable')
  groups = [g for g in largest['group'] if g in set(table['group'])]
  shown = groups[:_PANELS]
  parts = [p for p in dict.fromkeys(table['part']) if p != group_tables.ALL]
  parts = parts or [group_tables.ALL]
  columns = min(len(shown), 3)
  rows = -(-len(shown) // columns)
  matplotlib = figures.optional('matplotlib')
  with matplotlib.rc_context(figures.STYLE):
    figure = figures.new_figure(2.9 * columns + 1.2, 2.3 * rows + 1.0)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in panels.ravel()[len(shown) :]:
      axes.set_visible(False)
    for axes, group in zip(panels.ravel(), shown):
      own = table[(table['group'] == group) & (table['place'] <= _GENES)]
      wide = own.pivot(index='place', columns='part', values='score')
      wide = wide.sort_index(ascending=False)
      names = own.drop_duplicates('place').set_index('place')['symbol']
      _stack(axes, np.arange(len(wide)), wide[parts].to_numpy(), parts)
      axes.axvline(0, **_LINE, zorder=3)
      axes.set_yticks(
        np.arange(len(wide)), names[wide.index], fontsize=7.5, parse_math=False
      )
      axes.tick_params(axis='y', length=0, labelcolor=figures.INK)
      axes.tick_params(axis='x', labelbottom=True, labelsize=7.5)
      axes.spines['left'].set_visible(False)
      axes.set_title(group, fontsize=9, loc='left', parse_math=False)
    for axes in panels.ravel()[max(0, len(shown) - columns) : len(shown)]:
      axes.set_xlabel(_unit(found, target), fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if len(parts) > 1:
      figure.legend(
        handles, labels, loc='outside right center', frameon=False,
        fontsize=8.5, alignment='left',
      )  # fmt: skip
    figures.set_title(figure, f'Which genes mattered: {target}')
    more = len(groups) - len(shown)
    note = f'{more} more groups are in the table.' if more else ''
    figures.small_print(figure, _note(found, of_parts, note))
  return figure


def _of(table: pd.DataFrame, target: str) -> pd.DataFrame:
  targets = list(dict.fromkeys(table['target']))
  if targets and target not in targets:
    raise errors.UserError(
      f'no target {target!r}; there are: {", ".join(targets)}'
    )
  return table[table['target'] == target]


def _stack(axes, at_G, score_GP, parts) -> None:
  """Stacked bars, positive ones to the right and negative ones to the left."""
  ends_2G = np.zeros((2, len(at_G)))
  others = iter(figures.PALETTE)
  for p, part in enumerate(parts):
    score_G = np.nan_to_num(score_GP[:, p])
    side_G = (score_G < 0).astype(int)
    colour = _WORD if part == 'word' else next(others, figures.GREY)
    axes.barh(
      at_G, score_G, left=ends_2G[side_G, np.arange(len(at_G))],
      height=0.7, color=colour, label=part, zorder=2,
    )  # fmt: skip
    ends_2G[side_G, np.arange(len(at_G))] += score_G


def _facts(sums: pd.DataFrame):
  return zip(sums.index, sums['n_cells'], sums['n_units'])


def _named(group: str, cells: int, units: int) -> str:
  units = f', {units} units' if units > 1 else ''
  return f'{group} ({cells:,} cells{units})'


def _unit(found: group_tables.AttributionByGroup, target: str) -> str:
  """Of 'id of LYZ (nats); ...' what stands behind the target."""
  for said in found.header['targets'].split('; '):
    if said.startswith(f'{target} ('):
      return said[len(target) + 2 : -1]
  return ''


def _note(found, sums, note: str) -> str:
  units = int(sums['n_units'].max())
  said = f'{units} units' if units > 1 else 'One unit'
  if units < statistics.MIN_UNITS:
    said += f', fewer than {statistics.MIN_UNITS}: no interval'
  baseline = f'Baseline: {found.header["baseline"]}'
  return ' '.join(
    filter(None, [note, f'{baseline}. {said}; {results_lib.STATEMENT}.'])
  )
