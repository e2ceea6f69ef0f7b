"""Counts of a cell -> its genes by falling rank, with values: the one encoder.

Training, tasks and notebooks all come through `CellEncoder`. A cell becomes
the tokens of its expressed genes in falling order of a scaled count, with
log2(1 + scaled count) as value. Where scaled counts are exactly equal (92-97 %
of the positions of UMI cells in `released` mode) the order is that of a hash
of (gene token, cell key), the cell key being a hash of the cell's own (token,
count) pairs: deterministic, the same in every batch and for every order of
the columns, and nothing that a model could learn. Sorted by token instead, the
visible neighbours of a hidden gene give its identity away.

The kernels release the GIL and keep no state between calls: callers may give
chunks of cells to threads.
"""

import dataclasses

import numpy as np

from genecompass_jax import errors, kernels, ranking

RELEASED = 'released'
LIBRARY = 'library'
MODES = (RELEASED, LIBRARY)
TIES = ('hash', 'token')

# What a kernel found wrong with a cell.
FINE, BAD_COUNT, BAD_ROW, BAD_STARTS, BAD_TOTAL = range(5)


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
  """How counts become ranks and values.

  Attributes:
    mode: 'released': count / non-zero median of the gene, as the published
      code does; 'library': count / library size * target_sum / median.
    ties: 'hash', or 'token' (ascending token) to compare recorded orders and
      to measure what that order leaks; never for training.
    max_genes: genes that a cell keeps, the highest ranked.
    target_sum: library size that `library` scales to.
  """

  mode: str = RELEASED
  ties: str = 'hash'
  max_genes: int = 2048
  target_sum: float = 1e4

  def __post_init__(self):
    if self.mode not in MODES:
      raise errors.UserError(
        f'encoding mode {self.mode!r}: give one of {MODES}'
      )
    if self.ties not in TIES:
      raise errors.UserError(f'encoding ties {self.ties!r}: give one of {TIES}')
    if self.max_genes > 65_535:  # lengths of cells are uint16
      raise errors.UserError(
        f'encoding.max_genes={self.max_genes} must be at most 65,535, more '
        'than a cell can have'
      )
    if self.max_genes < 1:
      raise errors.UserError(
        f'encoding.max_genes={self.max_genes} must be at least 1'
      )
    if not 0 < self.target_sum < np.inf:
      raise errors.UserError(
        f'encoding.target_sum={self.target_sum} must be positive'
      )


@dataclasses.dataclass(frozen=True)
class RaggedCells:
  """Counts of C cells, expressed genes only; cell c is starts[c]:starts[c+1].

  Attributes:
    gene_rows_N: uint16 or int32 rows of ONE gene list, in any order; a row
      that comes twice in a cell is summed, a zero count is no expression.
    counts_N: any integer or float type, finite and not negative.
    starts_C1: int64 [C + 1].
    totals_C: float64 library size, read in `library` mode only.
  """

  gene_rows_N: np.ndarray
  counts_N: np.ndarray
  starts_C1: np.ndarray
  totals_C: np.ndarray

  @property
  def num_cells(self) -> int:
    """C."""
    return len(self.starts_C1) - 1


@dataclasses.dataclass(frozen=True)
class EncodedCells:
  """Ranked genes of C cells; cell c is starts[c]:starts[c+1].

  Attributes:
    gene_ids_N: int32 token, by falling scaled count.
    values_N: float32 log2(1 + scaled count).
    starts_C1: int64 [C + 1].
    keys_C: uint64 cell key, without seed and epoch; a perturbed variant of a
      cell is encoded with the key of the cell.
    num_genes_C: int32 distinct tokens before the cut at max_genes.
  """

  gene_ids_N: np.ndarray
  values_N: np.ndarray
  starts_C1: np.ndarray
  keys_C: np.ndarray
  num_genes_C: np.ndarray

  @property
  def num_cells(self) -> int:
    """C."""
    return len(self.starts_C1) - 1


def kernel_arrays(cells: RaggedCells) -> tuple[np.ndarray, ...]:
  """Rows, counts and starts as the kernels take them; copies rare dtypes.

  Raises:
    UserError: they are no numbers, or do not belong together.
  """
  rows, counts, starts = cells.gene_rows_N, cells.counts_N, cells.starts_C1
  if rows.dtype not in (np.uint16, np.int32):
    if rows.dtype.kind not in 'ui':
      raise errors.UserError(f'gene rows are {rows.dtype}: give integers')
    if rows.size and not 0 <= rows.min() <= rows.max() < 1 << 31:
      raise errors.UserError('gene rows lie outside the gene list')
    rows = rows.astype(np.int32)
  if counts.dtype not in (np.uint16, np.float32, np.float64):
    if counts.dtype.kind not in 'uifb':
      raise errors.UserError(f'counts are {counts.dtype}: give numbers')
    counts = counts.astype(np.float64)
  if len(rows) != len(counts):
    raise errors.UserError(f'{len(rows)} gene rows but {len(counts)} counts')
  if starts.ndim != 1 or not len(starts):
    raise errors.UserError('starts of cells must be one array of C + 1')
  return (
    kernels.read_only(rows),
    kernels.read_only(counts),
    kernels.read_only(starts.astype(np.int64, copy=False)),
  )


def longest(starts_C1: np.ndarray) -> int:
  """Most stored elements of one cell."""
  return int(np.diff(starts_C1).max(initial=0))


def raise_on(status: int, cell: int, num_rows: int) -> None:
  """Raises what a kernel found wrong, in one line."""
  if status == BAD_COUNT:
    raise errors.UserError(
      f'cell {cell} holds a negative, NaN or infinite count: give raw counts'
    )
  if status == BAD_ROW:
    raise errors.UserError(
      f'cell {cell} names a gene row outside the gene list of {num_rows} rows:'
      ' the counts belong to another gene list'
    )
  if status == BAD_STARTS:
    raise errors.UserError(
      f'cell {cell} lies outside the stored counts: starts must ascend to the'
      ' number of counts'
    )
  if status == BAD_TOTAL:
    raise errors.UserError(
      f'cell {cell} has no positive library size: drop cells without counts'
    )


@kernels.compiled
def merge_cell(
  rows_N, counts_N, start, stop, token_R, merges, slot_V, tokens_n, sums_n, lo_n
):
  """Tokens and summed counts of one cell -> (number of tokens, status).

  `merges` says that rows share tokens. The sums of a token are compensated,
  so that fractional counts do not depend on the order of the columns either.
  `slot_V` is -1 everywhere between calls.
  """
  if start < 0 or stop < start or stop > len(rows_N):
    return 0, BAD_STARTS
  rows_n = rows_N[start:stop]  # slices: no check for negative indices below
  counts_n = counts_N[start:stop]
  length = len(rows_n)
  highest = np.int64(0)
  lowest = np.int64(0)
  for i in range(length):
    highest = max(highest, np.int64(rows_n[i]))
    lowest = min(lowest, np.int64(rows_n[i]))
  if lowest < 0 or (length > 0 and highest >= len(token_R)):
    return 0, BAD_ROW
  falls = 0
  for i in range(length - 1):
    falls += rows_n[i + 1] <= rows_n[i]
  bad = 0
  empty = 0
  for i in range(length):
    bad += not (counts_n[i] >= 0 and counts_n[i] < np.inf)
    empty += counts_n[i] == 0
  if bad > 0:
    return 0, BAD_COUNT
  n = 0
  if falls == 0 and not merges:  # no token twice
    for i in range(length):
      token = token_R[rows_n[i]]
      tokens_n[i] = token
      empty += token < 0
    for i in range(length):
      sums_n[i] = counts_n[i]
    if empty == 0:
      return length, FINE
    for i in range(length):
      token = tokens_n[i]
      count = sums_n[i]
      tokens_n[n] = token
      sums_n[n] = count
      n += token >= 0 and count > 0
    return n, FINE
  for i in range(length):
    token = token_R[rows_n[i]]
    count = np.float64(counts_n[i])
    if token < 0 or count == 0.0:
      continue
    j = slot_V[token]
    if j < 0:
      slot_V[token] = n
      tokens_n[n] = token
      sums_n[n] = count
      lo_n[n] = 0.0
      n += 1
    else:
      total = sums_n[j] + count
      back = total - sums_n[j]
      lo_n[j] += (sums_n[j] - (total - back)) + (count - back)
      sums_n[j] = total
  for j in range(n):
    slot_V[tokens_n[j]] = -1
    sums_n[j] += lo_n[j]
  return n, FINE


@kernels.compiled
def _encode(
  rows_N, counts_N, starts_C1, totals_C, token_R, divisor_V, merges, library,
  target_sum, by_token, max_genes, salt, folds, given_C, longest_cell,
  gene_ids_N, values_N, out_C1, keys_C, num_genes_C,
):  # fmt: skip
  """Encodes all cells -> (status, cell)."""
  tokens_n = np.empty(longest_cell + 1, np.int32)
  sums_n = np.empty(longest_cell + 1, np.float64)
  quotient_n = np.empty(longest_cell + 1, np.float64)
  hash_n = np.empty(longest_cell + 1, np.uint64)
  near_n = np.empty(longest_cell + 1, np.float32)
  order_n = np.empty(longest_cell + 1, np.uint64)
  words_n = np.empty(longest_cell + 1, np.uint64)
  other_n = np.empty(longest_cell + 1, np.uint64)
  value_n = np.empty(longest_cell + 1, np.float32)
  hash_bins = np.empty(1 << ranking.HASH_BITS, np.uint32)
  bins = np.empty((2, 1 << ranking.DIGIT_BITS), np.uint32)
  slot_V = np.full(len(divisor_V), -1, np.int32)
  sum_bits_n = sums_n.view(np.uint64)
  out = 0
  out_C1[0] = 0
  for cell in range(len(starts_C1) - 1):
    n, status = merge_cell(
      rows_N, counts_N, starts_C1[cell], starts_C1[cell + 1], token_R, merges,
      slot_V, tokens_n, sums_n, quotient_n,
    )  # fmt: skip
    if status != FINE:
      return status, cell
    total = 1.0
    if library:
      total = totals_C[cell]
      if not (total > 0.0 and total < np.inf):
        if n > 0:
          return BAD_TOTAL, cell
        total = 1.0
    if len(given_C):
      key = given_C[cell]
    else:
      key = np.uint64(0)
      for i in range(n):
        key += kernels.mix64(
          (np.uint64(tokens_n[i]) * kernels.GOLDEN) ^ sum_bits_n[i]
        )
      key = kernels.mix64(key + np.uint64(n))
    keys_C[cell] = key
    num_genes_C[cell] = n
    if folds:
      key = kernels.mix64(key ^ salt)
    if library:
      for i in range(n):
        quotient_n[i] = sums_n[i] / total * target_sum / divisor_V[tokens_n[i]]
    else:
      for i in range(n):
        quotient_n[i] = sums_n[i] / divisor_V[tokens_n[i]]
    if by_token:
      for i in range(n):
        hash_n[i] = np.uint64(tokens_n[i]) << np.uint64(44)
    else:  # a bijection of the token: no two hashes of a cell are equal
      for i in range(n):
        hash_n[i] = kernels.mix64(key + np.uint64(tokens_n[i]) * kernels.GOLDEN)
    ranking.rank(
      n, quotient_n, hash_n, near_n, order_n, words_n, other_n, hash_bins, bins
    )  # fmt: skip
    ranking.log2_1p(n, quotient_n, words_n.view(np.float64), value_n)
    kept = min(n, max_genes)
    for k in range(kept):
      place = order_n[k]
      gene_ids_N[out + k] = tokens_n[place]
      values_N[out + k] = value_n[place]
    out += kept
    out_C1[cell + 1] = out
  return FINE, 0


@kernels.compiled
def _lengths(
  rows_N, counts_N, starts_C1, token_R, size, merges, max_genes, longest_cell,
  length_C,
):  # fmt: skip
  tokens_n = np.empty(longest_cell + 1, np.int32)
  sums_n = np.empty(longest_cell + 1, np.float64)
  lo_n = np.empty(longest_cell + 1, np.float64)
  slot_V = np.full(size, -1, np.int32)
  for cell in range(len(starts_C1) - 1):
    n, status = merge_cell(
      rows_N, counts_N, starts_C1[cell], starts_C1[cell + 1], token_R, merges,
      slot_V, tokens_n, sums_n, lo_n,
    )  # fmt: skip
    if status != FINE:
      return status, cell
    length_C[cell] = min(n, max_genes)
  return FINE, 0


def shares_tokens(token_R: np.ndarray) -> bool:
  """Whether two rows of a gene list have the same token."""
  known = token_R[token_R >= 0]
  return len(np.unique(known)) < len(known)


class CellEncoder:
  """Ranks the genes of cells that are counted over one gene list of R rows.

  Rows of token -1 are dropped; rows that share a token are summed as counts.
  """

  def __init__(
    self,
    config: EncodingConfig,
    token_R: np.ndarray,
    divisor_V: np.ndarray,
  ):
    """Checks the tables.

    Args:
      config: mode, ties, cut.
      token_R: int32 token of every row; -1 where the vocabulary has none.
      divisor_V: float64 divisor of every token's count (`Medians.divisor_V`).

    Raises:
      UserError: a token outside [-1, V), or a divisor that is not positive.
    """
    token_R = np.asarray(token_R, np.int32)
    divisor_V = np.asarray(divisor_V, np.float64)
    size = len(divisor_V)
    if size > ranking.MAX_TOKENS or len(token_R) > ranking.MAX_TOKENS:
      raise errors.UserError(
        f'a gene list may have {ranking.MAX_TOKENS} rows at most'
      )
    if len(token_R) and not -1 <= token_R.min() <= token_R.max() < size:
      raise errors.UserError(
        f'a token of the gene list lies outside the {size} divisors: medians'
        ' and vocabulary are not of one kind'
      )
    if not np.all((divisor_V > 0) & np.isfinite(divisor_V)):
      raise errors.UserError('a divisor of counts is not positive and finite')
    self.config = config
    self._token_R = kernels.read_only(token_R)
    self._divisor_V = kernels.read_only(divisor_V)
    self._merges = shares_tokens(token_R)

  def encode(
    self,
    cells: RaggedCells,
    *,
    seed: int = 0,
    epoch: int | None = None,
    keys_C: np.ndarray | None = None,
  ) -> EncodedCells:
    """Ranks the genes of every cell and cuts at max_genes.

    Args:
      cells: counts over the encoder's gene list.
      seed: folded into the order of ties, with the epoch.
      epoch: None for the fixed order of inference; a number in training.
      keys_C: uint64 keys to order ties by, in place of the cells' own: those
        of the unperturbed cells.

    Returns:
      Encoded cells; `keys_C` are the keys before seed and epoch.

    Raises:
      UserError: negative, NaN or infinite counts, rows outside the gene list,
        or, in `library` mode, no library size.
    """
    rows_N, counts_N, starts_C1 = kernel_arrays(cells)
    num_cells = cells.num_cells
    if len(cells.totals_C) != num_cells:
      raise errors.UserError(
        f'{num_cells} cells but {len(cells.totals_C)} library sizes'
      )
    if keys_C is None:
      given_C = np.empty(0, np.uint64)
    else:
      given_C = np.asarray(keys_C, np.uint64)
      if given_C.shape != (num_cells,):
        raise errors.UserError(f'{num_cells} cells but {given_C.shape} keys')
    room = int(np.clip(np.diff(starts_C1), 0, self.config.max_genes).sum())
    gene_ids_N = np.empty(room, np.int32)
    values_N = np.empty(room, np.float32)
    out_C1 = np.zeros(num_cells + 1, np.int64)
    out_keys_C = np.empty(num_cells, np.uint64)
    num_genes_C = np.empty(num_cells, np.int32)
    status, cell = _encode(
      rows_N,
      counts_N,
      starts_C1,
      kernels.read_only(np.asarray(cells.totals_C, np.float64)),
      self._token_R,
      self._divisor_V,
      self._merges,
      self.config.mode == LIBRARY,
      float(self.config.target_sum),
      self.config.ties == 'token',
      self.config.max_genes,
      kernels.fold(seed, epoch or 0),
      epoch is not None,
      kernels.read_only(given_C),
      min(longest(starts_C1), len(rows_N)),
      gene_ids_N,
      values_N,
      out_C1,
      out_keys_C,
      num_genes_C,
    )
    raise_on(status, cell, len(self._token_R))
    used = out_C1[-1]
    return EncodedCells(
      gene_ids_N[:used], values_N[:used], out_C1, out_keys_C, num_genes_C
    )

  def lengths(self, cells: RaggedCells) -> np.ndarray:
    """int32 [C] encoded length: distinct tokens, at most max_genes."""
    rows_N, counts_N, starts_C1 = kernel_arrays(cells)
    length_C = np.empty(cells.num_cells, np.int32)
    status, cell = _lengths(
      rows_N,
      counts_N,
      starts_C1,
      self._token_R,
      len(self._divisor_V),
      self._merges,
      self.config.max_genes,
      min(longest(starts_C1), len(rows_N)),
      length_C,
    )
    raise_on(status, cell, len(self._token_R))
    return length_C
