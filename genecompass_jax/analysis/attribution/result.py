"""Attributions of cells, as arrays and as a tidy table."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd


@dataclasses.dataclass(frozen=True)
class Attribution:
  """What a number came from, for C cells, their N genes and K parts.

  Attributes:
    parts: K names: 'word', the priors, 'value'; of those that were varied.
    cell_C: int64 rows of the cells in the source; cells that the target does
      not apply to are left out.
    cell_names_C: their names.
    starts_C1: genes of cell c are starts[c]:starts[c+1], by falling rank.
    tokens_N: int32 tokens of the genes.
    symbols_N, gene_ids_N: their names; '' for a model without vocabulary.
    ranks_N: int32 rank in the cell, from 0, before anything was hidden.
    is_hidden_N: bool, True where the target hid the gene.
    by_part_CK: float32, units of the target. Sums over genes, or by occlusion
      the loss of one part in all genes at once.
    by_gene_N: float32. Sums over parts, or by occlusion the loss of one gene's
      parts all at once.
    scores_NK: float32 score of each part of each gene; None for occlusion,
      which does not share anything out.
    at_input_C: float32 the target of the cell as it is.
    at_baseline_C: float32 the target with all parts at their baselines.
    error_C: float64 what the sum of the scores exceeds at_input - at_baseline
      by: the error of the integral. It says nothing where the method does not
      add up (gradient, occlusion).
    points_C: int32 points of the path; 0 for other methods.
    facts: target, method, baseline and where the model comes from.
  """

  parts: tuple[str, ...]
  cell_C: np.ndarray
  cell_names_C: np.ndarray
  starts_C1: np.ndarray
  tokens_N: np.ndarray
  symbols_N: np.ndarray
  gene_ids_N: np.ndarray
  ranks_N: np.ndarray
  is_hidden_N: np.ndarray
  by_part_CK: np.ndarray
  by_gene_N: np.ndarray
  scores_NK: np.ndarray | None
  at_input_C: np.ndarray
  at_baseline_C: np.ndarray
  error_C: np.ndarray
  points_C: np.ndarray
  facts: dict[str, Any]

  def __repr__(self) -> str:
    return (
      f'Attribution({self.facts["target"]}, {self.facts["method"]} over '
      f'{", ".join(self.parts)}: {len(self.cell_C)} cells, '
      f'{len(self.tokens_N):,} genes)'
    )

  def part_table(self) -> pd.DataFrame:
    """One row a cell: the target, its baseline, and a column for every part."""
    return pd.DataFrame(
      {
        'at_input': self.at_input_C,
        'at_baseline': self.at_baseline_C,
        **dict(zip(self.parts, self.by_part_CK.T)),
        'error': self.error_C,
        'points': self.points_C,
      },
      index=pd.Index(self.cell_names_C, name='cell'),
    )

  def gene_table(self) -> pd.DataFrame:
    """Tidy: a row a gene of a cell; of parts too, where scores are of both.

    Columns: cell, row (in the source), gene, gene_id, rank, hidden, score, and
    part where the method shares scores out.
    """
    lengths_C = np.diff(self.starts_C1)
    genes = {
      'cell': np.repeat(self.cell_names_C, lengths_C),
      'row': np.repeat(self.cell_C, lengths_C),
      'gene': self.symbols_N,
      'gene_id': self.gene_ids_N,
      'rank': self.ranks_N,
      'hidden': self.is_hidden_N,
    }
    if self.scores_NK is None:
      return pd.DataFrame({**genes, 'score': self.by_gene_N})
    K = len(self.parts)
    table = {name: np.repeat(column, K) for name, column in genes.items()}
    table['part'] = np.tile(self.parts, len(self.tokens_N))
    return pd.DataFrame({**table, 'score': self.scores_NK.ravel()})

  def top_genes(self, number: int = 20, min_cells: int = 1) -> pd.DataFrame:
    """Genes by the mean of their scores over the cells that hold them.

    Args:
      number: of genes.
      min_cells: that must hold a gene: the mean of one cell may be anything.

    Returns:
      Rows by falling absolute mean: gene, gene_id, cells, mean, and the
      standard deviation over cells (0 of one cell).
    """
    table = pd.DataFrame(
      {
        'gene': self.symbols_N,
        'gene_id': self.gene_ids_N,
        'token': self.tokens_N,
        'score': self.by_gene_N,
      }
    )
    found = (
      table.groupby('token')
      .agg(
        gene=('gene', 'first'),
        gene_id=('gene_id', 'first'),
        cells=('score', 'size'),
        mean=('score', 'mean'),
        sd=('score', lambda x: x.std(ddof=0)),
      )
      .reset_index(drop=True)
    )
    found = found[found['cells'] >= min_cells]
    order = np.argsort(-found['mean'].abs().to_numpy(), kind='stable')
    return found.iloc[order[:number]].reset_index(drop=True)
