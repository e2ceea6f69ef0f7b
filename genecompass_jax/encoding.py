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
from collections.abc import Callable

import numba
import numpy as np

from genecompass_jax import errors

RELEASED = 'released'
LIBRARY = 'library'
MODES = (RELEASED, LIBRARY)
TIES = ('hash', 'token')

_MAX_TOKENS = 1 << 20  # `_PLACE_BITS` of a sort word hold a place
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

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
    if self.max_genes < 1:
      raise errors.UserError(f'encoding {self.max_genes=} must be at least 1')
    if not 0 < self.target_sum < np.inf:
      raise errors.UserError(f'encoding {self.target_sum=} must be positive')


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


def compiled(function: Callable) -> Callable:
  """Compiles a kernel without the GIL, kept on disk where that is possible.

  IEEE arithmetic as written: no fastmath, so orders and values do not change
  with the machine.
  """
  try:
    return numba.njit(nogil=True, cache=True)(function)
  except RuntimeError:  # no writable folder for the cache: compile each run
    return numba.njit(nogil=True)(function)


@compiled
def mix64(x: np.uint64) -> np.uint64:
  """The finaliser of splitmix64, a bijection of 64 bits."""
  x ^= x >> np.uint64(30)
  x *= _MIX_1
  x ^= x >> np.uint64(27)
  x *= _MIX_2
  return x ^ (x >> np.uint64(31))


def fold(*parts: int) -> np.uint64:
  """Hashes integers, in order, into 64 bits: fold(seed, epoch)."""
  bits = (1 << 64) - 1
  state = 0
  for part in parts:
    state = (state ^ (int(part) & bits)) + int(_GOLDEN) & bits
    state = (state ^ state >> 30) * int(_MIX_1) & bits
    state = (state ^ state >> 27) * int(_MIX_2) & bits
    state ^= state >> 31
  return np.uint64(state)


def read_only(array: np.ndarray) -> np.ndarray:
  """A contiguous read-only view, so that a kernel is compiled once a dtype."""
  view = np.ascontiguousarray(array).view()
  view.flags.writeable = False
  return view


def kernel_arrays(cells: RaggedCells) -> tuple[np.ndarray, ...]:
  """Rows, counts and starts as the kernels take them; copies rare dtypes."""
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
    read_only(rows),
    read_only(counts),
    read_only(starts.astype(np.int64, copy=False)),
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


@compiled
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


_LOG_BITS = 7


def _log_tables() -> tuple[np.ndarray, np.ndarray]:
  centre = 1 + np.arange((1 << _LOG_BITS) + 1) / (1 << _LOG_BITS)
  return 1 / centre, np.log2(centre)


_INVERSE, _LOG2 = _log_tables()
_1_LN2 = 1 / np.log(2)


@compiled
def log2_1p(n, quotient_n, one_n, value_n):
  """value_n[:n] = float32 of log2(1 + quotient), in a tenth of log1p's time.

  1 + q = 2^e c (1 + r), c the nearest of 129 centres in [1, 2] and
  |r| <= 2^-8: the series leaves 1e-13 relative, before rounding to float32.
  """
  bits_n = one_n.view(np.int64)
  for i in range(n):
    one_n[i] = 1.0 + quotient_n[i]
  for i in range(n):
    bits = bits_n[i]
    exponent = (bits >> 52) - 1023
    fraction = bits & 0x000FFFFFFFFFFFFF
    nearest = (fraction + (1 << (51 - _LOG_BITS))) >> (52 - _LOG_BITS)
    m = 1.0 + fraction * 2.0**-52
    r = (m - (1.0 + nearest * 2.0**-_LOG_BITS)) * _INVERSE[nearest]
    if quotient_n[i] < 2.0**-10:  # 1 + q has dropped the low bits of q
      r = quotient_n[i]
    series = 1 + r * (-1 / 2 + r * (1 / 3 + r * (-1 / 4 + r * (1 / 5))))
    value_n[i] = exponent + _LOG2[nearest] + r * series * _1_LN2


@compiled
def _before(a, b, quotient_n, hash_n):
  """Whether a ranks before b: by quotient, then by hash (all distinct)."""
  if quotient_n[a] != quotient_n[b]:
    return quotient_n[a] > quotient_n[b]
  return hash_n[a] < hash_n[b]


@compiled
def _merge_sort(order_n, other_n, n, quotient_n, hash_n):
  """Sorts places by `_before` in n log n, whatever the input."""
  width = 1
  while width < n:
    for low in range(0, n, 2 * width):
      middle = min(low + width, n)
      high = min(low + 2 * width, n)
      a = low
      b = middle
      for k in range(low, high):
        if a < middle and (
          b >= high or not _before(order_n[b], order_n[a], quotient_n, hash_n)
        ):
          other_n[k] = order_n[a]
          a += 1
        else:
          other_n[k] = order_n[b]
          b += 1
    order_n[:n] = other_n[:n]
    width *= 2


_BITS = 9  # of a digit of the quotient
_HASH_BITS = 13  # at most, of the one digit of the hash
_PLACE_BITS = 20
_SAMPLE = 64


@compiled
def _sum_before(bins, size):
  """Turns counts of bins into the first place of each."""
  total = np.uint32(0)
  for b in range(size):
    count = bins[b]
    bins[b] = total
    total += count


@compiled
def _rank(
  n, quotient_n, hash_n, near_n, order_n, words_n, other_n, hash_bins, bins
):  # fmt: skip
  """order_n[:n] = places by falling quotient, ties by rising hash.

  Counting passes on the top of the hash and on 18 bits of the quotient (its
  float32 bits, over the range in the cell) leave few neighbours out of order;
  an insertion pass over the exact float64 quotients and 64-bit hashes puts
  them right. The commonest quotient (half and more of a UMI cell) is set
  aside before the passes over the quotient: increments of one counter wait
  for each other.
  """
  if n == 0:
    return
  near_bits_n = near_n.view(np.int32)
  place_bits = np.uint64(_PLACE_BITS)
  place_mask = np.uint64((1 << _PLACE_BITS) - 1)
  low = np.int32(0x7FFFFFFF)
  high = np.int32(0)
  for i in range(n):
    near_n[i] = quotient_n[i]
  for i in range(n):
    low = min(low, near_bits_n[i])
    high = max(high, near_bits_n[i])
  shift = 0
  while (high - low) >> shift >= 1 << (2 * _BITS):
    shift += 1

  sample = min(n, _SAMPLE)  # majority vote: any outcome is correct
  votes = 0
  common_bits = np.int32(0)
  for i in range(sample):
    if votes == 0:
      common_bits = near_bits_n[i]
    votes += 1 if near_bits_n[i] == common_bits else -1
  votes = 0
  for i in range(sample):
    votes += near_bits_n[i] == common_bits
  common = np.uint64((high - common_bits) >> shift)

  hash_bits = 6
  while hash_bits < _HASH_BITS and (1 << hash_bits) < 2 * n:
    hash_bits += 1
  top = np.uint64(64 - hash_bits)
  hash_bins[: 1 << hash_bits] = 0
  for i in range(n):
    hash_bins[hash_n[i] >> top] += 1
  _sum_before(hash_bins, 1 << hash_bits)
  for i in range(n):
    b = hash_n[i] >> top
    to = hash_bins[b]
    hash_bins[b] = to + 1
    key = np.uint64((high - near_bits_n[i]) >> shift)
    other_n[to] = (key << place_bits) | np.uint64(i)

  num_common = 0
  num_above = n
  rest = n
  if 4 * votes < sample:  # nothing common enough to pay for the parting
    words_n, other_n = other_n, words_n
  else:
    rest = 0
    num_above = 0
    for i in range(n):
      key = other_n[i] >> place_bits
      words_n[rest] = other_n[i]
      order_n[num_common] = other_n[i] & place_mask
      num_above += key < common
      num_common += key == common
      rest += key != common

  mask = np.uint64((1 << _BITS) - 1)
  high_digit = np.uint64(_PLACE_BITS + _BITS)
  bins[:] = 0
  for i in range(rest):
    bins[0, (words_n[i] >> place_bits) & mask] += 1
    bins[1, words_n[i] >> high_digit] += 1
  _sum_before(bins[0], 1 << _BITS)
  _sum_before(bins[1], 1 << _BITS)
  for i in range(rest):
    b = (words_n[i] >> place_bits) & mask
    to = bins[0, b]
    bins[0, b] = to + 1
    other_n[to] = words_n[i]
  for i in range(num_common - 1, -1, -1):
    order_n[num_above + i] = order_n[i]
  for i in range(rest):
    b = other_n[i] >> high_digit
    to = bins[1, b]
    bins[1, b] = to + 1
    order_n[to if to < num_above else to + num_common] = other_n[i] & place_mask

  moves = 16 * n
  above_quotient = quotient_n[order_n[0]]
  above_hash = hash_n[order_n[0]]
  for i in range(1, n):
    place = order_n[i]
    quotient = quotient_n[place]
    hash_ = hash_n[place]
    if quotient < above_quotient or (
      quotient == above_quotient and hash_ > above_hash
    ):
      above_quotient = quotient
      above_hash = hash_
      continue
    j = i
    while j > 0 and _before(place, order_n[j - 1], quotient_n, hash_n):
      order_n[j] = order_n[j - 1]
      j -= 1
    order_n[j] = place
    moves -= i - j
    if moves < 0:  # many quotients that 18 bits do not tell apart
      _merge_sort(order_n, words_n, n, quotient_n, hash_n)
      return


@compiled
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
  hash_bins = np.empty(1 << _HASH_BITS, np.uint32)
  bins = np.empty((2, 1 << _BITS), np.uint32)
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
        key += mix64((np.uint64(tokens_n[i]) * _GOLDEN) ^ sum_bits_n[i])
      key = mix64(key + np.uint64(n))
    keys_C[cell] = key
    num_genes_C[cell] = n
    if folds:
      key = mix64(key ^ salt)
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
        hash_n[i] = mix64(key + np.uint64(tokens_n[i]) * _GOLDEN)
    _rank(
      n, quotient_n, hash_n, near_n, order_n, words_n, other_n, hash_bins, bins
    )  # fmt: skip
    log2_1p(n, quotient_n, words_n.view(np.float64), value_n)
    kept = min(n, max_genes)
    for k in range(kept):
      place = order_n[k]
      gene_ids_N[out + k] = tokens_n[place]
      values_N[out + k] = value_n[place]
    out += kept
    out_C1[cell + 1] = out
  return FINE, 0


@compiled
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
    if size > _MAX_TOKENS or len(token_R) > _MAX_TOKENS:
      raise errors.UserError(f'a gene list may have {_MAX_TOKENS} rows at most')
    if len(token_R) and not -1 <= token_R.min() <= token_R.max() < size:
      raise errors.UserError(
        f'a token of the gene list lies outside the {size} divisors: medians'
        ' and vocabulary are not of one kind'
      )
    if not np.all((divisor_V > 0) & np.isfinite(divisor_V)):
      raise errors.UserError('a divisor of counts is not positive and finite')
    self.config = config
    self._token_R = read_only(token_R)
    self._divisor_V = read_only(divisor_V)
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
      read_only(np.asarray(cells.totals_C, np.float64)),
      self._token_R,
      self._divisor_V,
      self._merges,
      self.config.mode == LIBRARY,
      float(self.config.target_sum),
      self.config.ties == 'token',
      self.config.max_genes,
      fold(seed, epoch or 0),
      epoch is not None,
      read_only(given_C),
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
