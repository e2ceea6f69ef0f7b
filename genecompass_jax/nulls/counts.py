"""What is counted in training cells, and the tables made of it.

The package says what the counts are for.
"""

import dataclasses
import functools

import numpy as np

from genecompass_jax import kernels
from genecompass_jax.nulls import compiled

_ATOMS = 4  # counts that stand for a bin of many
_GROUPS = 10


@dataclasses.dataclass(frozen=True)
class SpeciesCounts:
  """What was counted in the training cells of one species, over T tokens.

  Attributes:
    tokens_T: int32 tokens of the species, ascending.
    num_cells: training cells.
    measured_T: float64 cells that measured the token.
    pairs_TN: uint32 cells that hold the token with a count of bin N.
    ranks_TQ: uint32 cells that hold the token at relative rank bin Q.
    value_sum_T: float64 sum of the values of the token.
  """

  tokens_T: np.ndarray
  num_cells: int
  measured_T: np.ndarray
  pairs_TN: np.ndarray
  ranks_TQ: np.ndarray
  value_sum_T: np.ndarray


def no_counts(tokens: np.ndarray) -> SpeciesCounts:
  """Before any cell, over the tokens of a species."""
  size = len(tokens)
  return SpeciesCounts(
    tokens_T=np.asarray(tokens, np.int32),
    num_cells=0,
    measured_T=np.zeros(size),
    pairs_TN=np.zeros((size, compiled.NUM_BINS), np.uint32),
    ranks_TQ=np.zeros((size, compiled.NUM_RANK_BINS), np.uint32),
    value_sum_T=np.zeros(size),
  )


def gene_index(tokens: np.ndarray, size: int) -> np.ndarray:
  """int32 [V] place of a token among those of the species, -1 for others."""
  gene_V = np.full(size, -1, np.int32)
  gene_V[tokens] = np.arange(len(tokens))
  return gene_V


def tables(
  c: SpeciesCounts,
  divisor_V: np.ndarray,
  *,
  pseudo_cells: float,
  mask_rate: float,
  library: bool,
  mean_value: float,
) -> compiled.Tables:
  """The tables that the kernels score with.

  Args:
    c: what was counted.
    divisor_V: float64 divisor of the counts of every token.
    pseudo_cells: see `smoothed`.
    mask_rate: share of genes that are hidden.
    library: whether values are scaled to the library size.
    mean_value: for a gene without cells.
  """
  pairs_TN = smoothed(c.pairs_TN, pseudo_cells)
  expressed_T = c.pairs_TN.sum(1, dtype=np.float64)
  measured_T = np.maximum(c.measured_T, np.maximum(expressed_T, 1))
  seen_T = measured_T - (1 - mask_rate) * expressed_T
  seen_T = np.maximum(seen_T, 1e-9)  # every cell shows it, none hides it
  marginal_T = expressed_T + 0.5
  mean_T = np.full(len(c.tokens_T), mean_value)
  np.divide(c.value_sum_T, expressed_T, out=mean_T, where=expressed_T > 0)
  rank_TQ = c.ranks_TQ / seen_T[:, None]

  atom_count_M, atom_bin_M = _atoms()
  first_N1 = np.searchsorted(atom_bin_M, np.arange(compiled.NUM_BINS + 1))
  gene_P, bin_P = np.nonzero(pairs_TN)
  number_P = first_N1[bin_P + 1] - first_N1[bin_P]
  start_P1 = np.concatenate([[0], np.cumsum(number_P)])
  pair_A = np.repeat(np.arange(len(gene_P)), number_P)
  atom_A = np.arange(len(pair_A)) - start_P1[pair_A] + first_N1[bin_P[pair_A]]
  gene_A = gene_P[pair_A]
  key_A = atom_count_M[atom_A] / divisor_V[c.tokens_T[gene_A]]
  mass_P = pairs_TN[gene_P, bin_P] / seen_T[gene_P] / number_P
  mass_A = mass_P[pair_A]
  value_A = mass_A * np.log2(key_A + (0 if library else 1))
  order_A = np.lexsort((gene_A, key_A))
  return compiled.Tables(
    gene_V=gene_index(c.tokens_T, len(divisor_V)),
    divisor_V=kernels.read_only(divisor_V),
    marginal_T=marginal_T / marginal_T.sum(),
    mean_T=mean_T,
    rank_TQ=rank_TQ,
    rank_total_Q=rank_TQ.sum(0),
    first_T1=np.searchsorted(gene_A, np.arange(len(c.tokens_T) + 1)),
    gene_key_A=key_A,
    gene_mass_A1=_running(mass_A),
    gene_value_A1=_running(value_A),
    key_key_A=key_A[order_A],
    key_gene_A=gene_A[order_A],
    key_mass_A1=_running(mass_A[order_A]),
    key_value_A1=_running(value_A[order_A]),
  )


@functools.cache
def _atoms() -> tuple[np.ndarray, np.ndarray]:
  """Counts that stand for every bin, and of which bin they are."""
  whole = np.arange(1, 1 << 20)
  bin_of = whole - 1
  high = whole >= compiled.EXACT_COUNTS
  bin_of[high] = (
    compiled.EXACT_COUNTS
    - 1
    + np.floor(compiled.PER_OCTAVE * (np.log2(whole[high]) - 6))
  )
  first = np.searchsorted(bin_of, np.arange(compiled.NUM_BINS + 1))
  counts, bins = [], []
  for b, (low, stop) in enumerate(zip(first, first[1:])):
    number = min(_ATOMS, stop - low)
    places = low + (np.arange(number) + 0.5) * (stop - low) / number
    counts.append(whole[places.astype(np.int64)])
    bins.append(np.full(number, b))
  return np.concatenate(counts).astype(np.float64), np.concatenate(bins)


def _running(values: np.ndarray) -> np.ndarray:
  return np.concatenate([[0.0], np.cumsum(values)])


def smoothed(pairs_TN: np.ndarray, pseudo_cells: float) -> np.ndarray:
  """Cells per gene and count, drawn towards genes of like mean count.

  A gene keeps its number of cells; `pseudo_cells` more are spread as the
  counts of its tenth of the genes, before the sum is scaled back.
  """
  pairs_TN = pairs_TN.astype(np.float64)
  if not pseudo_cells:
    return pairs_TN
  counts_M, bins_M = _atoms()
  log_N = np.log2(
    counts_M[np.searchsorted(bins_M, np.arange(compiled.NUM_BINS))]
  )
  cells_T = pairs_TN.sum(1)
  seen = np.flatnonzero(cells_T)
  rank = np.argsort((pairs_TN[seen] @ log_N) / cells_T[seen], kind='stable')
  for genes in np.array_split(seen[rank], _GROUPS):
    shape_N = pairs_TN[genes].sum(0)
    shape_N[shape_N < 1e-4 * shape_N.sum()] = 0.0
    pairs_TN[genes] += pseudo_cells * shape_N / max(shape_N.sum(), 1.0)
  pairs_TN[seen] *= (cells_T[seen] / (cells_T[seen] + pseudo_cells))[:, None]
  return pairs_TN
