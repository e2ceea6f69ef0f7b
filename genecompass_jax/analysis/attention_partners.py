"""Whom a gene looks at, and who looks at it: attention to and from all genes.

`attention_summary` is among some genes. Here a gene, or the CLS slot, is asked
about all genes of the cells, in both directions:

  gives     weight that the asked gene gives to a partner
  receives  weight that the partner gives to the asked gene

Weights of a query sum to 1 over the slots of a cell, CLS included. So beside
the weight stands how many times the even share it is: weight x slots of the
cell, which can be compared between cells and groups of other lengths; 1 is even
attention. Means are over the cells of a unit (donor, sample) that have both,
then over units. Attention is no measure of regulation.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd

from genecompass_jax import errors, paths, pretrained
from genecompass_jax.analysis import (
  attention_sums,
  attention_weights,
  cell_choice,
  embeddings,
  model_cells,
  placed_model,
  unit_means,
)
from genecompass_jax.analysis.perturbation import (
  results as results_lib,
  statistics,
)
from genecompass_jax.prepare import sources

GIVES, RECEIVES = DIRECTIONS = ('gives', 'receives')
MIN_CELLS = 10
TOP = 20
MEMORY_GIB = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPartners:
  """Partners of genes by group; docs/embedding.md lists the columns.

  Attributes:
    table: a line a layer, head, asked gene, direction, group and partner, of
      the partners that are among the first of any group.
    units: the same of every unit.
    header: what the numbers mean and where they come from, in lines.
  """

  table: pd.DataFrame
  units: pd.DataFrame
  header: dict[str, str]

  def __repr__(self) -> str:
    return (
      f'AttentionPartners({", ".join(dict.fromkeys(self.table["gene"]))}: '
      f'{self.table["group"].nunique()} groups, {len(self.table):,} lines)'
    )


def attention_partners(
  cells: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  genes: Sequence[str] = (),
  *,
  group_by: str = '',
  groups: Sequence[str] = (),
  donor_key: str = '',
  max_cells: int = 0,
  min_cells: int = MIN_CELLS,
  seed: int = 0,
  layers: Sequence[int] = (-1,),
  heads: str | Sequence[int] = 'mean',
  top: int = TOP,
  dtype: str = '',
  batch_size: int = 32,
  memory_gib: float = MEMORY_GIB,
  reading: sources.SourceConfig = sources.SourceConfig(),
  **fields: str | bool,
) -> AttentionPartners:
  """The genes that some genes and CLS attend to most, and that attend to them.

  Args:
    cells: with counts; a file is streamed, cells run once.
    model: a restored model.
    genes: by any identifier; none asks the CLS slot alone.
    group_by: obs column of the groups; '' for one group of all cells.
    groups: only these values of it; empty: all.
    donor_key: obs column of donors or samples, the units; '' for one unit.
    max_cells: most cells of a group, drawn by the seed; 0: all.
    min_cells: fewest cells of a unit that have both genes.
    seed: of the cells that are drawn.
    layers: blocks, from 1; -1: the last.
    heads: 'mean', their mean; 'all'; or numbers from 0.
    top: partners of each gene, direction and group; what is among them in one
      group is in the table of all.
    dtype: 'float32' or 'bfloat16' to compute states in; '': as the model says.
      Weights are float32, sums float64.
    batch_size: rows that run together over all local devices.
    memory_gib: for sums of all groups and units.
    reading: what else a format needs.
    **fields: those of `reading` that are others.

  Raises:
    UserError: nothing is asked, no such gene, column, group, block or head,
      too few cells for any line, more than fits into `memory_gib`, or as `embeddings.embed_cells`.
  """
  choice = cell_choice.ChoiceConfig(
    group_by, groups, donor_key, max_cells, min_cells, seed
  )
  config = model.config
  errors.check_whole(top=top, batch_size=batch_size)
  layers = np.atleast_1d(layers).tolist()
  numbers = tuple(
    sorted({placed_model.block_number(config, b) for b in layers})
  )
  head_numbers = attention_weights.head_numbers(heads, config.num_heads)
  if isinstance(genes, str) or not numbers or batch_size < 1 or top < 1:
    raise errors.UserError(
      f'attention: give lists of genes and of layers, and {batch_size=} and '
      f'{top=} from 1 on'
    )
  if not genes and not config.use_cls:
    raise errors.UserError('this model has no CLS slot: name genes')
  stream = model_cells.open_cells(cells, model, reading, **fields)
  asked = attention_sums.Asked.of(stream, genes, config.use_cls)
  chosen = cell_choice.ChosenCells.of(stream, choice)
  placed = placed_model.place(model, dtype=dtype, block=numbers[-1])
  number = len(numbers) * (len(head_numbers) or 1)
  sums = attention_sums.Sums.empty(stream, chosen, asked, number, memory_gib)
  attention_sums.run(
    sums, stream, model, placed, asked, numbers, head_numbers, batch_size
  )
  table, units = _tables(
    sums, chosen, asked, numbers, head_numbers or ('mean',), top
  )
  if not len(table):
    raise errors.UserError(
      f'{stream.source.name}: no unit has {min_cells} cells that show two genes '
      'together; lower --min-cells (min_cells), or leave groups and donors out'
    )
  return AttentionPartners(
    table, units, _header(stream, model, choice, numbers, dtype, heads, top)
  )


@dataclasses.dataclass(frozen=True)
class _Group:
  """Means of one asked gene, layer and direction in one group, T partners.

  Attributes:
    pairs: places of the group's units among the sums.
    even: over units, of units with enough cells that have both.
    weight_T: likewise.
    place_T: from 1, by falling `even`; 0 where there is no mean.
    cells_T: cells that have both, in these units.
  """

  pairs: list[int]
  even: unit_means.UnitMeans
  weight_T: np.ndarray
  place_T: np.ndarray
  cells_T: np.ndarray

  @classmethod
  def of(cls, sums, pairs, where, is_other_T, min_cells) -> '_Group':
    d, n, a = where
    both_UT = sums.both_UAT[pairs, a]
    is_enough_UT = (both_UT >= min_cells) & is_other_T

    def mean(x_2UNAT):
      with np.errstate(invalid='ignore', divide='ignore'):
        mean_UT = x_2UNAT[d, pairs, n, a] / both_UT
      return unit_means.over(np.where(is_enough_UT, mean_UT, np.nan))

    even = mean(sums.even_2UNAT)
    order = np.argsort(-np.nan_to_num(even.mean, nan=-1.0), kind='stable')
    order = order[: int(np.isfinite(even.mean).sum())]
    place_T = np.zeros(len(even.mean), np.int64)
    place_T[order] = np.arange(1, len(order) + 1)
    cells_T = np.where(is_enough_UT, both_UT, 0).sum(0)
    return cls(pairs, even, mean(sums.weights_2UNAT).mean, place_T, cells_T)


def _tables(
  sums: attention_sums.Sums,
  chosen: cell_choice.ChosenCells,
  asked: attention_sums.Asked,
  numbers: Sequence[int],
  heads: Sequence[int | str],
  top: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
  """Lines of partners, and of their units."""
  frames, of_units = [], []
  pairs_of = {
    group: [u for u, pair in enumerate(sums.pairs) if pair[0] == group]
    for group in chosen.codes
  }
  layers = [(layer, head) for layer in numbers for head in heads]
  for n, a, d in itertools.product(
    range(len(layers)), range(len(asked)), range(len(DIRECTIONS))
  ):
    # A gene is no partner of its own.
    is_other_T = sums.table.token_T != asked.token_A[a]
    found = {
      group: _Group.of(
        sums, pairs, (d, n, a), is_other_T, chosen.config.min_cells
      )
      for group, pairs in pairs_of.items()
      if pairs
    }
    is_first_T = np.any(
      [(g.place_T > 0) & (g.place_T <= top) for g in found.values()], axis=0
    )
    for group, of_group in found.items():
      what = {
        **dict(zip(('layer', 'head'), layers[n])),
        'gene': asked.names[a],
        'direction': DIRECTIONS[d],
        'group': chosen.groups.names[group],
      }
      at = np.flatnonzero(is_first_T & (of_group.place_T > 0))
      at = at[np.argsort(of_group.place_T[at])]
      frames.append(_lines(sums, what, of_group, at))
      for pair in of_group.pairs:
        unit = chosen.units.names[sums.pairs[pair][1]]
        own = {**what, 'unit': unit}
        of_units.append(_unit_lines(sums, own, (d, n, a), pair, at))
  return (
    pd.concat(frames, ignore_index=True),
    pd.concat(of_units, ignore_index=True),
  )


def _lines(sums, what, group: _Group, at: np.ndarray) -> pd.DataFrame:
  ranks_T, cells_T = (
    x_UT[group.pairs].sum(0)[at] for x_UT in (sums.ranks_UT, sums.cells_UT)
  )
  return pd.DataFrame(
    {
      **{name: [value] * len(at) for name, value in what.items()},
      'place': group.place_T[at],
      **_partners(sums, at),
      'times_even': group.even.mean[at],
      'ci_low': group.even.low[at],
      'ci_high': group.even.high[at],
      'weight': group.weight_T[at],
      'partner_rank': ranks_T / cells_T,
      'n_cells': group.cells_T[at],
      'n_units': group.even.number[at],
    }
  )


def _unit_lines(sums, what, where, pair: int, at: np.ndarray) -> pd.DataFrame:
  d, n, a = where
  at = at[sums.both_UAT[pair, a][at] > 0]
  number_T = sums.both_UAT[pair, a][at]
  return pd.DataFrame(
    {
      **{name: [value] * len(at) for name, value in what.items()},
      **_partners(sums, at),
      'times_even': sums.even_2UNAT[d, pair, n, a][at] / number_T,
      'weight': sums.weights_2UNAT[d, pair, n, a][at] / number_T,
      'n_cells': number_T,
    }
  )


def _partners(sums, at: np.ndarray) -> dict[str, list[str]]:
  ids = [sums.table.gene_ids[t] for t in at]
  symbols = [sums.table.symbols[t] for t in at]
  return {
    'partner': [symbol or id_ for symbol, id_ in zip(symbols, ids)],
    'partner_id': ids,
  }


def _header(
  stream, model, choice, numbers, dtype, heads, top
) -> dict[str, str]:
  states = embeddings.StateConfig(block=numbers[-1], dtype=dtype)
  facts = embeddings.provenance(model, stream, states)
  for name in ('pooling', 'block'):
    del facts[name]
  return {
    'what': f'attention: {results_lib.STATEMENT}; no measure of regulation',
    'direction': f'{GIVES}: from the gene to the partner; {RECEIVES}: from the '
    'partner to the gene',
    'weight': 'softmax weight; those of a query sum to 1 over the slots of a '
    'cell, CLS included',
    'times_even': 'weight x slots of the cell: 1 is even attention; place is by '
    'it, 1 the highest of a group',
    'partner': f'genes that are among the first {top} of any group; the gene '
    'itself is none',
    'partner_rank': 'mean rank of the partner in the cells that have it, from 0: '
    'attention goes by rank too',
    'n_cells': 'cells that have both, in the units that count',
    **choice.header(),
    'few units': f'below {statistics.MIN_UNITS} units: every unit in the table '
    'of units, no interval',
    'layers': ', '.join(map(str, numbers)),
    'heads': heads if isinstance(heads, str) else ', '.join(map(str, heads)),
    'source': stream.source.name,
    'source_sha256': stream.source.sha256,
    'model': model.source,
    **{name: str(value) for name, value in facts.items()},
  }
