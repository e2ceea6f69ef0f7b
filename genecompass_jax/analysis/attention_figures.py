"""Figure of attention: partners of a gene by group, in both directions."""

import numpy as np

from genecompass_jax import errors
from genecompass_jax.analysis import attention_partners, figures
from genecompass_jax.analysis.perturbation import results as results_lib

_PARTNERS = 25
_GROUPS = 24
_TITLES = {
  attention_partners.GIVES: 'whom {} looks at',
  attention_partners.RECEIVES: 'who looks at {}',
}


def partners_plot(found: attention_partners.AttentionPartners, gene: str):
  """Partners by group, coloured by how many times even attention it is.

  Of the last layer, and of the mean over heads or the first head.

  Args:
    found: attention.
    gene: an asked gene as the table names it, or 'CLS'.

  Returns:
    A matplotlib Figure.

  Raises:
    UserError: no such gene, or no partner of enough cells.
  """
  table = found.table[found.table['gene'] == gene]
  if not len(table):
    raise errors.UserError(
      f'no partner of {gene} stands beside it in enough cells (min_cells)'
    )
  table = table[table['layer'] == table['layer'].max()]
  head = table['head'].iloc[0]
  table = table[table['head'] == head]
  matplotlib = figures.optional('matplotlib')
  wides = {
    direction: _wide(table[table['direction'] == direction])
    for direction in attention_partners.DIRECTIONS
  }
  most = max(
    np.nanmax(np.abs(wide.to_numpy()), initial=0.1) for wide in wides.values()
  )
  rows = max(map(len, wides.values()))
  columns = max(wide.shape[1] for wide in wides.values())
  with matplotlib.rc_context(figures.STYLE):
    figure = figures.new_figure(
      4.2 + 2 * 0.34 * max(columns, 3), 2.6 + 0.19 * rows
    )
    panels = figure.subplots(1, 2)
    for axes, (direction, wide) in zip(panels, wides.items()):
      drawn = axes.imshow(
        wide.to_numpy(), cmap='RdBu_r', vmin=-most, vmax=most, aspect='auto'
      )
      axes.set_xticks(
        range(wide.shape[1]),
        wide.columns,
        rotation=90,
        fontsize=7.5,
        parse_math=False,
      )
      axes.set_yticks(
        range(len(wide)), wide.index, fontsize=7.5, parse_math=False
      )
      axes.tick_params(length=0, labelcolor=figures.INK)
      axes.set_facecolor('#DDDDDD')  # where there is no mean
      for side in ('left', 'bottom'):
        axes.spines[side].set_visible(False)
      axes.set_title(_TITLES[direction].format(gene), fontsize=10, loc='left')
    ticks = [t for t in range(-8, 9) if abs(t) <= most]
    bar = figure.colorbar(
      drawn, ax=list(panels), shrink=0.5, aspect=14, ticks=ticks
    )
    bar.set_ticklabels([f'{2.0**t:g}' for t in ticks])
    bar.set_label('times even attention', fontsize=8)
    of = 'mean of the heads' if head == 'mean' else f'head {head}'
    figures.set_title(
      figure, f'Attention of {gene}, block {table["layer"].iloc[0]}, {of}'
    )
    units = int(table['n_units'].max())
    said = f'{units} units' if units > 1 else 'One unit'
    figures.small_print(
      figure,
      f'{said}; grey: too few cells have both. An '
      f'{results_lib.STATEMENT}; no measure of regulation.',
    )
  return figure


def _wide(table):
  """log2 of times even, partners x groups; the highest in any group first."""
  wide = np.log2(
    table.pivot(index='partner_id', columns='group', values='times_even')
  )
  cells = table.groupby('group')['n_cells'].max()
  groups = cells.sort_values(ascending=False, kind='stable').index[:_GROUPS]
  wide = wide[sorted(groups)]
  order = np.argsort(-wide.max(axis=1).to_numpy(), kind='stable')[:_PARTNERS]
  wide = wide.iloc[order]
  names = table.drop_duplicates('partner_id').set_index('partner_id')['partner']
  wide.index = names[wide.index]
  return wide
