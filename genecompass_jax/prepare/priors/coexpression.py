"""Co-expressed pairs of genes, from the training cells of a corpus.

Of every count matrix up to 3,000 cells are drawn. Genes are correlated over
the cells in which BOTH have a count; a pair is kept where Pearson's r is 0.8
at least, as in the original, and, by the default rule, where at least 50 cells
stand behind it and a permutation test keeps the false ones below 5 %.

The test: the values of every gene are shuffled among the cells that express
it, and all pairs are correlated again. Supports stay exactly what they are, so
pairs of few cells, where one cell with two large counts makes an r near 1, are
measured against pairs of as few. In each range of support the limit is the
least r from 0.8 up at which (null pairs of all permutations + 1) / permutations
is at most 5 % of the pairs. The test asks whether two genes go together in a
matrix, not why: differences between cell types and in depth are in both the
rule and the original's.

Values are log2(1 + count). Counts are not divided by the library size: in two
genes with one count each, which is most pairs of cells, the divisor alone
would give r = 1.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from scipy import sparse

from genecompass_jax import (
  corpus as corpus_lib,
  errors,
  gene_table,
  kernels,
  progress,
)
from genecompass_jax.prepare.priors import pairs as pairs_lib

RULES = ('fdr', 'released')
VALUES = ('log', 'count', 'normalised')
SUPPORTS = (50, 100, 200, 400, 800)  # ranges of joint support of their own
_STEPS = 20  # of r between the least and 1
_ROWS = 256  # genes a block
_BLOCKS = 16  # of the corpus read at a time
_NEAR = 1e-3  # of the limit: r is computed again, in float64
_PASS = 200_000_000  # counts held at a time: about 2 GB


@dataclasses.dataclass(frozen=True)
class CoexpressionConfig:
  """Which pairs are co-expressed.

  Attributes:
    matrix: obs column of the corpus whose values are count matrices.
    max_cells: drawn from each.
    min_r: least correlation.
    min_cells: in which both genes have a count.
    rule: 'fdr', or 'released': r alone, from three cells on.
    fdr: most false pairs among those kept.
    permutations: of the test.
    value: what is correlated; see the top of the file.
    seed: of the draw and the test.
  """

  matrix: str = 'unit'
  max_cells: int = 3000
  min_r: float = 0.8
  min_cells: int = 50
  rule: str = 'fdr'
  fdr: float = 0.05
  permutations: int = 2
  value: str = 'log'
  seed: int = 0

  def __post_init__(self):
    for name, choices in (('rule', RULES), ('value', VALUES)):
      if getattr(self, name) not in choices:
        raise errors.UserError(
          f'coexpression.{name}={getattr(self, name)!r}: give one of '
          f'{", ".join(choices)}'
        )
    errors.check_at_least(
      'coexpression', self, max_cells=3, min_r=-1, min_cells=3, fdr=0,
      permutations=1, seed=0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
  """Counts of some cells of one count matrix.

  Attributes:
    name: of the matrix.
    species: code.
    counts_CR: over the species' genes in the order of the corpus.
    totals_C: library sizes.
  """

  name: str
  species: int
  counts_CR: sparse.csr_array
  totals_C: np.ndarray


def from_corpus(
  opened: corpus_lib.Corpus,
  genes: gene_table.GeneTable,
  config: CoexpressionConfig,
) -> tuple[pairs_lib.Pairs, dict]:
  """Pairs of all matrices; the weight is the number of matrices.

  Returns:
    Pairs over the gene table given, and facts of every matrix.

  Raises:
    UserError: the corpus has no such column, or no pair is kept.
  """
  row_of = genes.row_of
  a, b, seen = [], [], []
  for matrix in matrices(opened, config):
    rows = np.array(
      [row_of.get(i, -1) for i in opened.gene_ids(matrix.species)], np.int64
    )
    one, other, _, facts = correlated(matrix, config)
    known = (rows[one] >= 0) & (rows[other] >= 0)
    a.append(rows[one][known])
    b.append(rows[other][known])
    seen.append(facts)
  a_N = np.concatenate(a) if a else np.zeros(0, np.int64)
  b_N = np.concatenate(b) if b else np.zeros(0, np.int64)
  if not len(a_N):
    raise errors.UserError(
      f'{opened.path}: no pair of genes is co-expressed by the rule '
      f'{config.rule!r} in {len(seen)} matrices'
    )
  zeros = np.zeros(len(a_N))
  found = pairs_lib.collect(
    np.minimum(a_N, b_N), np.maximum(a_N, b_N), zeros + 1, zeros,
    zeros.astype(bool), ['corpus'], merge='sum',
  )  # fmt: skip
  return found, {'matrices': seen}


def matrices(
  opened: corpus_lib.Corpus, config: CoexpressionConfig
) -> Iterator[Matrix]:
  """The drawn cells of every matrix of the training split.

  Memory holds a few matrices: the corpus, which is shuffled, is read as often
  as that takes.
  """
  for species in range(len(gene_table.SPECIES)):
    store = opened.store('train', species)
    if store is None:
      continue
    codes = store.obs(config.matrix)
    categories = store.categories(config.matrix)
    drawn = {}
    for code in np.unique(codes).tolist():
      cells = np.flatnonzero(codes == code)
      key = int(kernels.fold(config.seed, species, code))
      number = min(config.max_cells, len(cells))
      rng = np.random.default_rng(key)
      drawn[code] = np.sort(rng.choice(cells, number, replace=False))
    for codes_here in _passes(store, drawn):
      cells = {code: drawn[code] for code in codes_here}
      for code, found in _read(store, cells, len(opened.gene_ids(species))):
        name = categories[code] if code >= 0 else '(none)'
        yield Matrix(name, species, *found)


def _passes(store, drawn) -> Iterator[list[int]]:
  held, here = 0, []
  for code, cells in drawn.items():
    size = int(store.length_N[cells].sum())
    if here and held + size > _PASS:
      yield here
      held, here = 0, []
    here.append(code)
    held += size
  if here:
    yield here


def _read(store, cells, num_genes):
  """(code, (counts, totals)) of the cells of some matrices."""
  owner_N = np.full(store.num_cells, -2, np.int64)
  for code, chosen in cells.items():
    owner_N[chosen] = code
  parts = {code: [] for code in cells}
  wanted = np.unique(np.flatnonzero(owner_N > -2) // store.block_cells)
  label = f'reading {gene_table.SPECIES[store.species]}'
  for first in progress.track(
    range(0, len(wanted), _BLOCKS), unit='groups of blocks', label=label
  ):
    numbers = wanted[first : first + _BLOCKS].tolist()
    for number, block in zip(numbers, store.read_blocks(numbers)):
      at = number * store.block_cells
      owner_C = owner_N[at : at + block.num_cells]
      counts = sparse.csr_array(
        (block.counts_N, block.gene_rows_N.astype(np.int32), block.starts_C1),
        (block.num_cells, num_genes),
      )
      for code in np.unique(owner_C[owner_C > -2]).tolist():
        mine = np.flatnonzero(owner_C == code)
        parts[code].append((counts[mine], block.totals_C[mine]))
  for code, found in parts.items():
    counts, totals = zip(*found)
    yield (
      code,
      (
        sparse.csr_array(sparse.vstack(counts)),
        np.concatenate(totals),
      ),
    )


def correlated(
  matrix: Matrix, config: CoexpressionConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
  """Pairs (i < j) of genes of a matrix that the rule keeps.

  Returns:
    Numbers of the two genes, r, and facts.
  """
  least = 3 if config.rule == 'released' else config.min_cells
  values_CR = sparse.csc_array(_values(matrix, config.value))
  support_R = np.diff(values_CR.indptr)
  genes = np.flatnonzero(support_R >= least)
  facts = {
    'matrix': matrix.name,
    'species': gene_table.SPECIES[matrix.species],
    'cells': matrix.counts_CR.shape[0],
    'genes': len(genes),
  }
  values_CG = values_CR[:, genes]
  i_N, j_N, r_N, n_N = _above(values_CG, config.min_r, least)
  facts['pairs_above_r'] = len(i_N)
  keep_N = np.ones(len(i_N), bool)
  if config.rule == 'fdr' and len(i_N):
    rng = np.random.default_rng(
      [config.seed, matrix.species, *matrix.name.encode()]
    )
    null = np.zeros((len(SUPPORTS) + 1, _STEPS), np.int64)
    for _ in range(config.permutations):
      _, _, r_M, n_M = _above(_permuted(values_CG, rng), config.min_r, least)
      null += _histogram(r_M, n_M, config.min_r)
    limit_B, counts = _limits(_histogram(r_N, n_N, config.min_r), null, config)
    keep_N = r_N >= limit_B[np.searchsorted(SUPPORTS, n_N, 'right')]
    facts['ranges'] = counts
  facts['pairs_kept'] = int(keep_N.sum())
  return genes[i_N[keep_N]], genes[j_N[keep_N]], r_N[keep_N], facts


def _values(matrix: Matrix, value: str) -> sparse.csr_array:
  counts = matrix.counts_CR.astype(np.float64)
  if value == 'normalised':
    scale_C = 1e4 / np.maximum(matrix.totals_C, 1)
    counts = sparse.csr_array(sparse.diags_array(scale_C) @ counts)
  if value != 'count':
    counts.data = np.log2(1 + counts.data)
  return counts


def _permuted(values_CG: sparse.csc_array, rng) -> sparse.csc_array:
  """The values of each gene shuffled among the cells that express it."""
  column = np.repeat(np.arange(values_CG.shape[1]), np.diff(values_CG.indptr))
  order = np.lexsort((rng.random(len(column)), column))
  shuffled = values_CG.copy()
  shuffled.data = values_CG.data[order]
  return shuffled


def _above(values_CG: sparse.csc_array, min_r: float, least: int):
  """Pairs i < j with r >= min_r over at least `least` shared cells.

  Sums over shared cells are products of matrices that are 0 where a gene has
  no count. Values are standardised first, so that float32 carries the sums;
  pairs near the limit are computed again in float64.
  """
  size = np.maximum(np.diff(values_CG.indptr), 1)
  column = np.repeat(np.arange(values_CG.shape[1]), size)
  column = column[: len(values_CG.data)]
  mean = np.bincount(column, values_CG.data, values_CG.shape[1]) / size
  centred = values_CG.data - mean[column]
  sd = np.sqrt(np.bincount(column, centred**2, values_CG.shape[1]) / size)
  is_varied = sd > 1e-9
  scaled = values_CG.copy()
  scaled.data = centred / np.where(is_varied, sd, 1)[column]
  x_CG = scaled.astype(np.float32).toarray()
  b_CG = values_CG.astype(bool).toarray().astype(np.float32)
  xx_CG = np.square(x_CG)
  found = []
  number = values_CG.shape[1]
  for first in range(0, number, _ROWS):
    here = slice(first, min(first + _ROWS, number))
    x_CI, b_CI, xx_CI = x_CG[:, here], b_CG[:, here], xx_CG[:, here]
    x_CJ, b_CJ, xx_CJ = x_CG[:, first:], b_CG[:, first:], xx_CG[:, first:]
    n_IJ = b_CI.T @ b_CJ
    sx_IJ, sy_IJ = x_CI.T @ b_CJ, b_CI.T @ x_CJ
    vx_IJ = n_IJ * (xx_CI.T @ b_CJ) - np.square(sx_IJ)
    vy_IJ = n_IJ * (b_CI.T @ xx_CJ) - np.square(sy_IJ)
    covariance_IJ = n_IJ * (x_CI.T @ x_CJ) - sx_IJ * sy_IJ
    # Below this a variance is rounding: a gene is constant over shared cells.
    floor_IJ = 1e-5 * np.square(n_IJ)
    ok_IJ = (n_IJ >= least) & (vx_IJ > floor_IJ) & (vy_IJ > floor_IJ)
    scale_IJ = np.sqrt(np.where(ok_IJ, vx_IJ, 1) * np.where(ok_IJ, vy_IJ, 1))
    r_IJ = np.where(ok_IJ, covariance_IJ / scale_IJ, -2)
    i_N, j_N = np.nonzero(r_IJ >= min_r - _NEAR)
    later = j_N > i_N
    i_N, j_N = i_N[later], j_N[later]
    found.append(
      (i_N + first, j_N + first, r_IJ[i_N, j_N], n_IJ[i_N, j_N].astype(int))
    )
  i_N, j_N, r_N, n_N = map(np.concatenate, zip(*found)) if found else (
    np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0, int)
  )  # fmt: skip
  r_N = np.minimum(r_N.astype(np.float64), 1)
  near = np.flatnonzero(r_N < min_r + _NEAR)
  r_N[near] = _exact(values_CG, i_N[near], j_N[near])
  keep = r_N >= min_r
  return i_N[keep], j_N[keep], r_N[keep], n_N[keep]


def _exact(values_CG, i_N, j_N) -> np.ndarray:
  """r over shared cells in float64, pair by pair."""
  r_N = np.zeros(len(i_N))
  for n, (i, j) in enumerate(zip(i_N, j_N)):
    one, other = (
      slice(values_CG.indptr[g], values_CG.indptr[g + 1]) for g in (i, j)
    )
    _, at, of = np.intersect1d(
      values_CG.indices[one],
      values_CG.indices[other],
      assume_unique=True,
      return_indices=True,
    )
    x, y = values_CG.data[one][at], values_CG.data[other][of]
    x, y = x - x.mean(), y - y.mean()
    r_N[n] = x @ y / max(np.sqrt((x @ x) * (y @ y)), 1e-300)
  return r_N


def _histogram(r_N, n_N, min_r) -> np.ndarray:
  """Pairs by range of support and step of r, [ranges, steps]."""
  step = (r_N - min_r) / max(1 - min_r, 1e-9) * _STEPS
  step = np.clip(step.astype(int), 0, _STEPS - 1)
  band = np.searchsorted(SUPPORTS, n_N, 'right')
  shape = (len(SUPPORTS) + 1, _STEPS)
  flat = np.bincount(band * _STEPS + step, minlength=shape[0] * shape[1])
  return flat.reshape(shape)


def _limits(observed, null, config) -> tuple[np.ndarray, list[dict]]:
  """Least r that keeps the false discoveries down, by range of support."""
  above = np.cumsum(observed[:, ::-1], 1)[:, ::-1]
  false = (np.cumsum(null[:, ::-1], 1)[:, ::-1] + 1) / config.permutations
  good = (above > 0) & (false <= config.fdr * above)
  grid = config.min_r + (1 - config.min_r) * np.arange(_STEPS) / _STEPS
  limit = np.full(len(good), np.inf)
  facts = []
  for band in range(len(good)):
    if good[band].any():
      limit[band] = grid[int(np.argmax(good[band]))]
    if above[band, 0]:
      facts.append(
        {
          'cells_from': (0, *SUPPORTS)[band],
          'pairs': int(above[band, 0]),
          'null_pairs': round(float(null[band].sum() / config.permutations), 1),
          'least_r': round(float(limit[band]), 3) if good[band].any() else None,
        }
      )
  return limit, facts
