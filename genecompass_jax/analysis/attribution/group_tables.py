"""Tables of attributions by group, made of records one unit at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from genecompass_jax.analysis import (
  cell_choice,
  gene_tokens,
  unfinished,
  unit_means,
)
from genecompass_jax.analysis.attribution import asked_cells, questions
from genecompass_jax.analysis.perturbation import statistics
from genecompass_jax.prepare import sources

ALL = 'all'  # in the column `part`: all parts together
FEW_CELLS, FEW_UNITS = 'few_cells', 'few_units'
NOT_CLOSE = 'not_close'

GENE_COLUMNS = [
  *('target', 'group', 'place', 'symbol', 'gene_id', 'part', 'score'),
  *('ci_low', 'ci_high', 'score_held', 'mean_rank', 'n_holding'),
  *('n_cells', 'n_units'),
]


@dataclasses.dataclass(frozen=True, eq=False)
class AttributionByGroup:
  """Scores by target, group and part; docs/attribution.md lists the columns.

  Attributes:
    parts: a line a target, group and part, and one for all parts together.
    units: the same of every unit.
    genes: a line a target, group, gene and part, of the genes of the highest
      absolute scores.
    cells: a line a target and cell that was asked.
    header: what the numbers mean and where they come from, in lines.
    num_before: cells that an earlier, interrupted call had finished.
  """

  parts: pd.DataFrame
  units: pd.DataFrame
  genes: pd.DataFrame
  cells: pd.DataFrame
  header: dict[str, str]
  num_before: int = 0

  def __repr__(self) -> str:
    return (
      f'AttributionByGroup({self.header.get("targets", "")}: '
      f'{self.parts["group"].nunique()} groups, {len(self.cells):,} cells)'
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _UnitSums:
  """Sums over the cells of one unit."""

  unit: str
  parts_P: np.ndarray
  sizes_P: np.ndarray
  tokens_T: np.ndarray  # of genes that any of the cells holds, ascending
  genes_TK: np.ndarray
  ranks_T: np.ndarray
  cells_T: np.ndarray
  cells: int
  not_close: int
  ends_2: np.ndarray  # at the input, at the baseline


class Tables:
  """Makes tables of records."""

  def __init__(
    self,
    question: questions.Question,
    labels: Sequence[str],
    stream: sources.CellStream,
    chosen: cell_choice.ChosenCells,
    cells: asked_cells.AskedCells,
    top: int,
  ):
    """Takes what records are of.

    Args:
      question: that was asked.
      labels: names of the targets.
      stream: the cells.
      chosen: their groups and units.
      cells: that were asked.
      top: genes of each target and group.
    """
    self._question, self._labels, self._stream = question, labels, stream
    self._chosen, self._cells, self._top = chosen, cells, top
    self._parts = (*question.chosen, ALL)
    is_shared_out = question.method != questions.OCCLUSION
    self._gene_parts = self._parts if is_shared_out else (ALL,)
    self._not_close = 0

  def made(self, records: unfinished.Records) -> AttributionByGroup:
    """All tables; the header is left to others."""
    runs: dict[tuple[int, int], dict[int, slice]] = {}
    for t, group, unit, cells in self._cells.runs():
      runs.setdefault((t, group), {})[unit] = cells
    parts, units, genes, of_cells = [], [], [], []
    for t in range(len(self._labels)):
      for group in self._chosen.codes:
        sums = [
          self._sums(records, unit, cells, of_cells)
          for unit, cells in runs.get((t, group), {}).items()
        ]
        what = {
          'target': self._labels[t],
          'group': self._chosen.groups.names[group],
        }
        parts += self._of_parts(what, t, group, sums)
        units += [line for one in sums for line in self._of_unit(what, one)]
        genes.append(self._of_genes(what, sums))
    questions.warn(
      self._not_close,
      len(self._cells.row_N),
      self._question.max_points,
      self._question.baseline,
    )
    return AttributionByGroup(
      parts=pd.DataFrame(parts),
      units=pd.DataFrame(units),
      genes=pd.concat(genes, ignore_index=True),
      cells=pd.concat(of_cells, ignore_index=True),
      header={},
    )

  def _sums(self, records, unit, cells, of_cells) -> _UnitSums:
    """Sums over the cells of one unit; their lines go to `of_cells`."""
    size = self._question.model.config.vocabulary_size
    K = len(self._gene_parts)
    genes_VK, ranks_V = np.zeros((size, K)), np.zeros(size)
    cells_V = np.zeros(size, np.int64)
    number, not_close, ends_2 = 0, 0, np.zeros(2)
    parts_P, sizes_P = np.zeros((2, len(self._parts)))
    for first, found in asked_cells.read(records, cells):
      change_C = found['at_input'].astype(float) - found['at_baseline']
      by_part_CP = np.concatenate(
        [found['by_part'].astype(float), change_C[:, None]], 1
      )
      number += len(found)
      not_close += int((~found['is_close']).sum())
      ends_2 += [found[name].sum() for name in ('at_input', 'at_baseline')]
      parts_P += by_part_CP.sum(0)
      sizes_P += np.abs(by_part_CP).sum(0)
      cell_N, rank_N = np.nonzero(found['tokens'] >= 0)
      tokens_N = found['tokens'][cell_N, rank_N]
      scores_NK = found['by_gene'][cell_N, rank_N][:, None]
      if K > 1:
        own_NK = found['scores'][cell_N, rank_N]
        scores_NK = np.concatenate([own_NK, scores_NK], 1)
      np.add.at(genes_VK, tokens_N, scores_NK)
      np.add.at(ranks_V, tokens_N, rank_N)
      np.add.at(cells_V, tokens_N, 1)
      of_cells.append(self._of_cells(slice(first, first + len(found)), found))
    self._not_close += not_close
    tokens_T = np.flatnonzero(cells_V)
    return _UnitSums(
      self._chosen.units.names[unit],
      parts_P,
      sizes_P,
      tokens_T,
      genes_VK[tokens_T],
      ranks_V[tokens_T],
      cells_V[tokens_T],
      number,
      not_close,
      ends_2,
    )

  def _of_cells(self, cells: slice, found: np.ndarray) -> pd.DataFrame:
    own, chosen = self._cells, self._chosen
    rows = own.row_N[cells]
    names = self._stream.source.obs.index[rows].astype(str)

    def named(codes, of):
      return np.array(of, object)[codes[cells]]

    return pd.DataFrame(
      {
        'target': named(own.target_N, self._labels),
        'cell': np.asarray(names, object),
        'row': rows,
        'group': named(own.group_N, chosen.groups.names),
        'unit': named(own.unit_N, chosen.units.names),
        'at_input': found['at_input'],
        'at_baseline': found['at_baseline'],
        **dict(zip(self._question.chosen, found['by_part'].T)),
        'error': found['error'],
        'points': found['points'],
      }
    )

  def _used(self, sums: Sequence[_UnitSums]) -> list[_UnitSums]:
    return [s for s in sums if s.cells >= self._chosen.config.min_cells]

  def _of_parts(self, what, t, group, sums) -> list[dict[str, Any]]:
    used = self._used(sums)
    empty = np.full((1, len(self._parts)), np.nan)
    means = unit_means.over([s.parts_P / s.cells for s in used] or empty)
    sizes_P = unit_means.over([s.sizes_P / s.cells for s in used] or empty).mean
    ends_2 = unit_means.over(
      [s.ends_2 / s.cells for s in used] or empty[:, :1].repeat(2, 1)
    ).mean
    flags = [FEW_CELLS] * (not used)
    flags += [FEW_UNITS] * (len(used) < statistics.MIN_UNITS)
    flags += [NOT_CLOSE] * any(s.not_close for s in used)
    with np.errstate(invalid='ignore', divide='ignore'):
      share_P = sizes_P / sizes_P[:-1].sum()
    share_P[-1] = np.nan
    return [
      {
        **what,
        'part': part,
        'score': means.mean[p],
        'ci_low': means.low[p],
        'ci_high': means.high[p],
        'size': sizes_P[p],
        'share': share_P[p],
        'at_input': ends_2[0],
        'at_baseline': ends_2[1],
        'n_cells': sum(s.cells for s in used),
        'n_units': len(used),
        'n_holding': int(self._cells.holding_TG[t, group]),
        'n_group': int((self._chosen.groups.code_C == group).sum()),
        'flags': ','.join(flags),
      }
      for p, part in enumerate(self._parts)
    ]

  def _of_unit(self, what, sums) -> list[dict[str, Any]]:
    return [
      {
        **what,
        'unit': sums.unit,
        'part': part,
        'score': sums.parts_P[p] / sums.cells,
        'size': sums.sizes_P[p] / sums.cells,
        'n_cells': sums.cells,
      }
      for p, part in enumerate(self._parts)
    ]

  def _of_genes(self, what, sums) -> pd.DataFrame:
    """The genes of the highest absolute scores of all parts together."""
    used = self._used(sums)
    if not used or not self._top:
      return pd.DataFrame(columns=GENE_COLUMNS)
    size, K = self._question.model.config.vocabulary_size, len(self._gene_parts)
    mean_V, cells_V = np.zeros(size), np.zeros(size, np.int64)
    for s in used:
      mean_V[s.tokens_T] += s.genes_TK[:, -1] / s.cells / len(used)
      cells_V[s.tokens_T] += s.cells_T
    tokens = np.flatnonzero(cells_V)
    order = np.argsort(-np.abs(mean_V[tokens]), kind='stable')[: self._top]
    tokens = tokens[order]
    # Of the first alone every unit is looked at.
    sums_UTK = np.zeros((len(used), len(tokens), K))
    ranks_T = np.zeros(len(tokens))
    for u, s in enumerate(used):
      _, here, there = np.intersect1d(
        tokens, s.tokens_T, assume_unique=True, return_indices=True
      )
      sums_UTK[u, here] = s.genes_TK[there]
      ranks_T[here] += s.ranks_T[there]
    cells_U11 = np.array([s.cells for s in used])[:, None, None]
    means = unit_means.over(sums_UTK / cells_U11)
    cells_T = cells_V[tokens]
    held_TK = sums_UTK.sum(0) / cells_T[:, None]
    species_N = self._species_of(what['group'], tokens)
    symbols, gene_ids = gene_tokens.names_of(
      self._question.model.vocabulary, tokens, species_N
    )
    number = len(tokens)
    return pd.DataFrame(
      {
        **{name: [value] * number * K for name, value in what.items()},
        'place': np.repeat(np.arange(1, number + 1), K),
        'symbol': np.repeat(symbols, K),
        'gene_id': np.repeat(gene_ids, K),
        'part': np.tile(self._gene_parts, number),
        'score': means.mean.ravel(),
        'ci_low': means.low.ravel(),
        'ci_high': means.high.ravel(),
        'score_held': held_TK.ravel(),
        'mean_rank': np.repeat(ranks_T / cells_T, K),
        'n_holding': np.repeat(cells_T, K),
        'n_cells': sum(s.cells for s in used),
        'n_units': len(used),
      }
    )[GENE_COLUMNS]

  def _species_of(self, group: str, tokens: np.ndarray) -> np.ndarray:
    """The first species of the group's cells that has the token."""
    code = self._chosen.groups.names.index(group)
    species_C = self._stream.source.species_C[
      self._chosen.groups.code_C == code
    ]
    found = np.full(len(tokens), int(species_C.min()))
    for species in sorted(set(species_C.tolist()), reverse=True):
      own = self._question.model.vocabulary.species_tokens(species)
      found[np.isin(tokens, own)] = species
    return found
