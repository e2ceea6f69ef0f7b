"""Non-zero medians of the genes: the divisors of the encoding.

Medians are taken over training cells only, over the cells that express a
gene, after rows that share a token are summed, apart for each species and for
each mode of encoding. They come out of histograms that merge, so that a
corpus is counted in one pass, in any order, by any number of workers.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from genecompass_jax import (
  encoding,
  errors,
  gene_table,
  kernels,
  paths,
  vocabulary,
)

MIN_SUPPORT = 100  # expressing cells below which a median is not believed

NUM_BINS = 1024  # of a gene
_FEW = 64  # whole counts below have their bin looked up once a cell
_PIECE = 1 << 22  # elements that are put in order at a time
_EXACT = 512  # `released`: bin k < 512 holds the integer count k + 1
_RANGES = {  # of the logarithmic bins; values outside fall in the end bins
  encoding.RELEASED: (_EXACT, 1e-3, 1e7),
  encoding.LIBRARY: (0, 1e-3, 1e4),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Medians:
  """Non-zero medians of V tokens in S species.

  Attributes:
    mode: of the encoding: 'released' (of counts) or 'library' (of counts
      scaled to 10,000 a cell).
    median_SV: float64; NaN where no training cell expresses the token.
    support_SV: int64 training cells that express it.
    is_shared_V: bool; the token stands for genes of several species.
    naming_species_V: int8 species whose median a shared token has in
      `released` mode; None for the first, human.
  """

  mode: str
  median_SV: np.ndarray
  support_SV: np.ndarray
  is_shared_V: np.ndarray
  naming_species_V: np.ndarray | None = None

  def __post_init__(self):
    if self.mode not in encoding.MODES:
      raise ValueError(f'{self.mode=} must be one of {encoding.MODES}')
    shapes = self.median_SV.shape, self.support_SV.shape
    if shapes[0] != shapes[1] or shapes[0][1:] != self.is_shared_V.shape:
      raise ValueError(
        f'medians, supports and shared tokens are of {shapes[0]}, {shapes[1]} '
        f'and {self.is_shared_V.shape}'
      )

  def __repr__(self) -> str:
    supported = self.is_supported_SV().sum(1).tolist()
    return f'Medians({self.mode!r}, of {supported} tokens by species)'

  @classmethod
  def from_histograms(
    cls,
    vocab: vocabulary.Vocabulary,
    histograms: Mapping[int, 'MedianHistogram'],
  ) -> 'Medians':
    """Medians from the histogram of each species that was counted.

    Raises:
      ValueError: no histogram, or histograms of several modes.
    """
    modes = {h.mode for h in histograms.values()}
    if len(modes) != 1:
      raise ValueError(f'histograms of one mode are needed, not of {modes}')
    shape = len(vocab.species), vocab.size
    median_SV = np.full(shape, np.nan)
    support_SV = np.zeros(shape, np.int64)
    for species, histogram in histograms.items():
      median_SV[species] = histogram.median_V()
      support_SV[species] = histogram.support_V()
    return cls(
      modes.pop(),
      median_SV,
      support_SV,
      vocab.is_shared_V(),
      vocab.naming_species_V(),
    )

  @classmethod
  def ones(cls, vocab: vocabulary.Vocabulary, mode: str) -> 'Medians':
    """No medians at all: every divisor is 1."""
    shape = len(vocab.species), vocab.size
    return cls(
      mode,
      np.full(shape, np.nan),
      np.zeros(shape, np.int64),
      vocab.is_shared_V(),
      vocab.naming_species_V(),
    )

  def is_supported_SV(self) -> np.ndarray:
    """bool [S, V]: at least `MIN_SUPPORT` cells stand behind the median."""
    return self.support_SV >= MIN_SUPPORT

  @functools.cached_property
  def sha256(self) -> str:
    """Digest of what an encoding depends on: mode, medians and supports."""
    parts = (
      self.mode.encode(),
      self.median_SV.astype('<f8').tobytes(),
      self.support_SV.astype('<i8').tobytes(),
    )
    return paths.sha256_bytes(b''.join(parts))

  def divisor_V(self, species: int) -> np.ndarray:
    """float64 [V] that the counts of a species' cells are divided by.

    `released`: the human median of a shared token, whatever the species of
    the cell (measured on the published mouse corpus), the species' own of
    another; 1 where that is missing or not supported. Where no human cell was
    counted there is no human table: then shared tokens have the species' own.
    Of a token without a human gene, the first of its species is meant.
    `library`: the species' own, else the median of its medians, so that an
    unsupported gene ranks like an average one; 1 only if nothing was counted.
    """
    known_SV = np.where(self.is_supported_SV(), self.median_SV, np.nan)
    known_V = known_SV[species]
    if self.mode == encoding.RELEASED:
      naming_V = self.naming_species_V
      naming_V = np.zeros(known_V.shape, int) if naming_V is None else naming_V
      counted_S = self.support_SV.any(axis=1)
      of_namer_V = self.is_shared_V & counted_S[naming_V]
      named_V = known_SV[naming_V, np.arange(len(known_V))]
      known_V = np.where(of_namer_V, named_V, known_V)
      return np.where(np.isnan(known_V), 1.0, known_V)
    for medians_V in (known_V, self.median_SV[species]):
      if not np.isnan(medians_V).all():
        middle = np.nanmedian(medians_V)
        return np.where(np.isnan(known_V), middle, known_V)
    return np.ones_like(known_V)

  def save(self, path: paths.PathLike, vocab: vocabulary.Vocabulary) -> None:
    """Writes a text table keyed by the Ensembl id of each token."""
    if vocab.size != self.median_SV.shape[1]:
      raise ValueError(
        f'{vocab.size} tokens but medians of {self.median_SV.shape[1]}'
      )
    columns = {'gene_id': vocab.token_gene_ids()[vocabulary.NUM_SPECIAL :]}
    for species, name in enumerate(vocab.species):
      median_V = self.median_SV[species, vocabulary.NUM_SPECIAL :]
      support_V = self.support_SV[species, vocabulary.NUM_SPECIAL :]
      columns[f'{name}_median'] = [repr(float(x)) for x in median_V]
      columns[f'{name}_cells'] = [str(x) for x in support_V]
    gene_table.write_table(path, 'medians', {'mode': self.mode}, columns)

  @classmethod
  def load(
    cls, path: paths.PathLike, vocab: vocabulary.Vocabulary
  ) -> 'Medians':
    """Reads medians and lines them up with a vocabulary by gene id.

    Genes that the file does not name have no support; genes that the
    vocabulary does not name are left out.

    Raises:
      UserError: the file is missing, damaged, or holds impossible medians.
    """
    names = ['gene_id']
    for name in vocab.species:
      names += [f'{name}_median', f'{name}_cells']
    header, columns = gene_table.read_table(path, 'medians', names)
    row_of = {gene_id: row for row, gene_id in enumerate(columns['gene_id'])}
    row_V = np.array([row_of.get(i, -1) for i in vocab.token_gene_ids()])
    median_SV, support_SV = [], []
    for name in vocab.species:
      median = np.array([*columns[f'{name}_median'], 'nan'], np.float64)
      support = np.array([*columns[f'{name}_cells'], '0'], np.int64)
      if np.any((support > 0) != (median > 0)):
        raise errors.UserError(
          f'{path}: a median without cells, or not positive; make it again'
        )
      median_SV.append(median[row_V])
      support_SV.append(support[row_V])
    return cls(
      header['mode'],
      np.stack(median_SV),
      np.stack(support_SV),
      vocab.is_shared_V(),
      vocab.naming_species_V(),
    )


@kernels.compiled
def _count(
  rows_N, counts_N, starts_C1, totals_C, token_R, merges, library, target_sum,
  column_V, num_exact, low, per_octave, longest_cell, room, bins_TK,
):  # fmt: skip
  """Adds cells to the bins -> (status, cell).

  Bins of a token lie on a page of their own, so that counting cell by cell
  would wait for memory at every gene: bin numbers are put in order of their
  tokens first, and then counted token by token.
  """
  tokens_n = np.empty(longest_cell + 1, np.int32)
  sums_n = np.empty(longest_cell + 1, np.float64)
  lo_n = np.empty(longest_cell + 1, np.float64)
  slot_V = np.full(len(column_V), -1, np.int32)
  bin_of_count = np.empty(_FEW + 1, np.int64)
  num_bins = bins_TK.shape[1]
  offset = np.log2(low)
  column_N = np.empty(room, np.int32)
  bin_N = np.empty(room, np.uint16)
  start_T1 = np.zeros(len(bins_TK) + 1, np.uint32)
  size = 0
  for cell in range(len(starts_C1) - 1):
    n, status = encoding.merge_cell(
      rows_N, counts_N, starts_C1[cell], starts_C1[cell + 1], token_R, merges,
      slot_V, tokens_n, sums_n, lo_n,
    )  # fmt: skip
    if status != encoding.FINE:
      return status, cell
    total = 1.0
    if library and n > 0:
      total = totals_C[cell]
      if not (total > 0.0 and total < np.inf):
        return encoding.BAD_TOTAL, cell
    bin_of_count[:] = -1
    for i in range(n):
      value = sums_n[i]
      few = np.int64(min(value, _FEW))  # most counts are small and whole:
      if few != value:
        few = _FEW
      k = bin_of_count[few]  # one logarithm for all that are alike
      if k < 0:
        if library:
          value = value / total * target_sum
        if value <= num_exact and value == np.floor(value):
          k = np.int64(value) - 1
        else:
          k = num_exact + np.int64(
            max((np.log2(value) - offset) * per_octave, 0)
          )
          k = min(k, num_bins - 1)
        if few < _FEW:
          bin_of_count[few] = k
      column = column_V[tokens_n[i]]
      column_N[size + i] = column
      bin_N[size + i] = k
      start_T1[column] += np.uint32(1)
    size += n
  before = np.uint32(0)
  for column in range(len(start_T1)):
    number = start_T1[column]
    start_T1[column] = before
    before += number
  sorted_N = np.empty(size, np.uint16)
  for i in range(size):
    to = start_T1[column_N[i]]
    start_T1[column_N[i]] = to + 1
    sorted_N[to] = bin_N[i]
  first = 0
  for column in range(len(bins_TK)):
    bins_k = bins_TK[column]
    for i in range(first, start_T1[column]):
      bins_k[sorted_N[i]] += 1
    first = start_T1[column]
  return encoding.FINE, 0


@kernels.compiled
def _find_middle(bins_TK, order_K, place_T2, inside_T2):
  """Bin and place in it of the lower and the upper middle value of a token.

  Bins are walked in `order_K`; nothing is written for a token without values.
  """
  for t in range(len(bins_TK)):
    total = np.int64(0)
    for k in range(len(order_K)):
      total += bins_TK[t, k]
    for side in range(2):
      middle = (total - 1 + side) // 2
      upto = np.int64(0)
      for k in range(len(order_K) if total else 0):
        number = np.int64(bins_TK[t, order_K[k]])
        upto += number
        if upto > middle:
          place_T2[t, side] = k
          inside_T2[t, side] = (middle - upto + number + 0.5) / number
          break


class MedianHistogram:
  """Counts of values in `NUM_BINS` bins a token, for one species and mode.

  In `released` mode the integer counts 1 to 512 have a bin each, so medians of
  UMI counts are exact, the mean of the two middle ones included. Other counts,
  and all values of `library` mode, fall in logarithmic bins, 1.6 % wide in
  `library` mode; the median is interpolated within its bin. It is never off by
  more than a bin, typically by 4e-3 for 100 expressing cells, 6e-4 for 10,000
  and 2e-4 for 100,000: a twentieth of the sampling error of such a median.

  Takes 4 kB a distinct token.
  """

  def __init__(
    self,
    mode: str,
    token_R: np.ndarray,
    vocabulary_size: int,
    target_sum: float = 1e4,
  ):
    """An empty histogram over one gene list.

    Args:
      mode: 'released' or 'library'.
      token_R: int32 token of every row of the gene list, -1 for none.
      vocabulary_size: V.
      target_sum: library size that `library` scales to.
    """
    if mode not in encoding.MODES:
      raise errors.UserError(f'encoding mode {mode!r}: give {encoding.MODES}')
    self.mode = mode
    self.target_sum = float(target_sum)
    self._token_R = kernels.read_only(np.asarray(token_R, np.int32))
    self._merges = encoding.shares_tokens(self._token_R)
    self.tokens_T = np.unique(self._token_R[self._token_R >= 0])
    if len(self.tokens_T) and self.tokens_T[-1] >= vocabulary_size:
      raise errors.UserError(
        f'a token of the gene list lies outside the {vocabulary_size} tokens'
      )
    self._column_V = np.full(vocabulary_size, -1, np.int32)
    self._column_V[self.tokens_T] = np.arange(len(self.tokens_T))
    self._num_exact, self._low, high = _RANGES[mode]
    self._per_octave = (NUM_BINS - self._num_exact) / np.log2(high / self._low)
    self._bins_TK = np.zeros((len(self.tokens_T), NUM_BINS), np.uint32)

  def add(self, cells: encoding.RaggedCells) -> None:
    """Counts cells.

    Raises:
      UserError: as `encoding.CellEncoder.encode`; the histogram is then spoilt.
    """
    rows_N, counts_N, starts_C1 = encoding.kernel_arrays(cells)
    totals_C = kernels.read_only(np.asarray(cells.totals_C, np.float64))
    first = 0
    while first < cells.num_cells:
      reach = np.searchsorted(starts_C1, starts_C1[first] + _PIECE, 'right') - 1
      last = min(max(int(reach), first + 1), cells.num_cells)
      pieces_C1 = starts_C1[first : last + 1]
      status, cell = _count(
        rows_N,
        counts_N,
        pieces_C1,
        totals_C[first:last],
        self._token_R,
        self._merges,
        self.mode == encoding.LIBRARY,
        self.target_sum,
        self._column_V,
        self._num_exact,
        self._low,
        self._per_octave,
        min(encoding.longest(pieces_C1), len(rows_N)),
        min(int(np.maximum(np.diff(pieces_C1), 0).sum()), len(rows_N)),
        self._bins_TK,
      )
      encoding.raise_on(status, first + cell, len(self._token_R))
      first = last

  def merge(self, other: 'MedianHistogram') -> None:
    """Adds the counts of another histogram over the same tokens.

    Raises:
      ValueError: modes, scales or tokens differ.
    """
    if (self.mode, self.target_sum) != (other.mode, other.target_sum) or (
      not np.array_equal(self.tokens_T, other.tokens_T)
    ):
      raise ValueError('histograms of different modes or tokens do not merge')
    self._bins_TK += other._bins_TK

  def sparse(self) -> tuple[np.ndarray, np.ndarray]:
    """The counts that are not zero: uint32 flat bins, ascending, and counts."""
    bins = self._bins_TK.ravel()
    where = np.flatnonzero(bins)
    return where.astype(np.uint32), bins[where]

  def add_sparse(self, where: np.ndarray, counts: np.ndarray) -> None:
    """Adds what `sparse` of a histogram over the same tokens gave."""
    self._bins_TK.reshape(-1)[where] += counts

  def support_V(self) -> np.ndarray:
    """int64 [V] cells that express each token."""
    support_V = np.zeros(len(self._column_V), np.int64)
    support_V[self.tokens_T] = self._bins_TK.sum(axis=1, dtype=np.int64)
    return support_V

  def _ordered_bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bins by rising values, and the edges of each in that order."""
    edges = self._low * 2 ** (
      np.arange(NUM_BINS - self._num_exact + 1) / self._per_octave
    )
    exact = np.arange(1, self._num_exact + 1, dtype=np.float64)
    low_K = np.concatenate([exact, edges[:-1]])
    high_K = np.concatenate([exact, edges[1:]])
    order_K = np.argsort(np.sqrt(low_K * high_K), kind='stable')
    return order_K, low_K[order_K], high_K[order_K]

  def median_V(self) -> np.ndarray:
    """float64 [V] median over the expressing cells; NaN without any."""
    order_K, low_K, high_K = self._ordered_bins()
    place_T2 = np.zeros((len(self.tokens_T), 2), np.int64)
    inside_T2 = np.full((len(self.tokens_T), 2), np.nan)
    _find_middle(self._bins_TK, order_K, place_T2, inside_T2)
    low_T2, high_T2 = low_K[place_T2], high_K[place_T2]
    values_T2 = low_T2 * (high_T2 / low_T2) ** inside_T2
    median_V = np.full(len(self._column_V), np.nan)
    median_V[self.tokens_T] = values_T2.mean(axis=1)
    return median_V

  def brackets_V2(self) -> np.ndarray:
    """float64 [V, 2]: values between which both middle ones lie.

    NaN for tokens without values, and for those whose median is exact already:
    in `released` mode a count up to 512 that is alone in its bin.
    """
    order_K, low_K, high_K = self._ordered_bins()
    place_T2 = np.zeros((len(self.tokens_T), 2), np.int64)
    inside_T2 = np.full((len(self.tokens_T), 2), np.nan)
    _find_middle(self._bins_TK, order_K, place_T2, inside_T2)
    exact_T = (order_K[place_T2] < self._num_exact).all(axis=1)
    exact_T &= ~self._bins_TK[:, self._num_exact :].any(axis=1)
    step = 2 ** (1 / self._per_octave)  # bins of whole counts lie among others
    low_T = low_K[place_T2[:, 0]] / step
    high_T = high_K[place_T2[:, 1]] * step
    low_T = np.where(place_T2[:, 0] == 0, 0.0, low_T)
    high_T = np.where(place_T2[:, 1] == NUM_BINS - 1, np.inf, high_T)
    nothing_T = exact_T | np.isnan(inside_T2).any(axis=1)
    brackets_V2 = np.full((len(self._column_V), 2), np.nan)
    brackets_V2[self.tokens_T, 0] = np.where(nothing_T, np.nan, low_T)
    brackets_V2[self.tokens_T, 1] = np.where(nothing_T, np.nan, high_T)
    return brackets_V2
