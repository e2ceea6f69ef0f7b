"""Raw cells -> rows of a batch in one pass: encode, mask, place, label.

What `encoding`, `masking` and `rows` do one after the other for all cells of a
batch, done cell by cell while a cell is in the nearest cache, with no array in
between. They say what the result means, and tests hold this to the same bytes.
"""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from genecompass_jax import (
  encoding,
  errors,
  kernels,
  masking,
  medians as medians_lib,
  ranking,
  schemas,
  tie_ranking,
  vocabulary,
)

BAD_LENGTH = 100  # a status beside those of `encoding`


@dataclasses.dataclass(frozen=True)
class Places:
  """Which cells go where, in order of rows, and what their draws are.

  Attributes:
    place_n: int64 places in their windows.
    number_n: int64 numbers in the split.
    store_n: int64 store of each.
    row_n: int64 rows of the batch, ascending.
    needs_n: int64 slots that were planned for them.
    pool_n: int64 pools of random tokens, over all stores.
    tie_salt_n: uint64 of the order of ties.
    mask_salt_n: uint64 of the masks.
  """

  place_n: np.ndarray
  number_n: np.ndarray
  store_n: np.ndarray
  row_n: np.ndarray
  needs_n: np.ndarray
  pool_n: np.ndarray
  tie_salt_n: np.ndarray
  mask_salt_n: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
  """Cells in memory, as the kernel takes them: checked once."""

  arrays: tuple[np.ndarray, ...]
  longest: int

  @classmethod
  def of(cls, cells: encoding.RaggedCells) -> 'Source':
    """Of raw cells; counts of a rare dtype are copied."""
    arrays = (
      *encoding.kernel_arrays(cells),
      kernels.read_only(np.asarray(cells.totals_C, np.float64)),
    )
    return cls(arrays, encoding.longest(cells.starts_C1))


@kernels.compiled
def _fill(
  rows_N, counts_N, starts_C1, totals_C,
  begin, end, place_n, number_n, store_n, row_n, needs_n, pool_n, tie_salt_n,
  mask_salt_n,
  token_TR, size_T, species_T, merges_T, number_TV, divisor_d, pools_N,
  pool_P1,
  library, target_sum, by_token, folds, max_genes,
  below, mask_below, random_below, keeps_value,
  floats, words, near_value, bins, hash_bins, slot_V, tokens_n,
  tie_genes, tie_bins, tie_groups, tie_table,
  ids_BL, values_BL, positions_BL, segments_BL, species_BL, is_cls_BL,
  slots_BK, id_labels_BK, id_weights_BK, value_labels_BK, value_weights_BK,
  index_BS, used_3B,
):  # fmt: skip
  """Fills cells of one window in -> (status, cell, picks beyond K)."""
  sums_n = floats[0]
  quotient_n = floats[1]
  hash_n = words[0]
  order_n = words[1]
  words_n = words[2]
  other_n = words[3]
  near_n = near_value[0]
  value_n = near_value[1]
  sum_bits_n = sums_n.view(np.uint64)
  most = slots_BK.shape[1]
  dropped = 0
  for c in range(begin, end):
    store = store_n[c]
    token_R = token_TR[store, : size_T[store]]
    number_V = number_TV[store]
    cell = place_n[c]
    n, status = encoding.merge_cell(
      rows_N, counts_N, starts_C1[cell], starts_C1[cell + 1], token_R,
      merges_T[store], slot_V, tokens_n, sums_n, quotient_n,
    )  # fmt: skip
    if status != encoding.FINE:
      return status, c, dropped
    kept = min(n, max_genes)
    if kept + 1 != needs_n[c]:
      return BAD_LENGTH, c, dropped

    # The order: as in `encoding`.
    key = np.uint64(0)
    for i in range(n):
      key += kernels.mix64(
        (np.uint64(tokens_n[i]) * kernels.GOLDEN) ^ sum_bits_n[i]
      )
    key = kernels.mix64(key + np.uint64(n))
    if folds:
      key = kernels.mix64(key ^ tie_salt_n[c])
    if library:
      total = totals_C[cell]
      if not (total > 0.0 and total < np.inf):
        if n > 0:
          return encoding.BAD_TOTAL, c, dropped
        total = 1.0
      for i in range(n):
        quotient_n[i] = (
          sums_n[i] / total * target_sum / divisor_d[number_V[tokens_n[i]]]
        )
    else:
      for i in range(n):
        quotient_n[i] = sums_n[i] / divisor_d[number_V[tokens_n[i]]]
    if by_token:
      for i in range(n):
        hash_n[i] = np.uint64(tokens_n[i]) << np.uint64(44)
    else:
      for i in range(n):
        hash_n[i] = kernels.mix64(key + np.uint64(tokens_n[i]) * kernels.GOLDEN)

    # Into the row.
    row = row_n[c]
    first = used_3B[0, row]
    segment = used_3B[1, row]
    used_3B[0, row] += kept + 1
    used_3B[1, row] += 1
    index_BS[row, segment] = number_n[c]
    is_cls_BL[row, first] = True
    segments_BL[row, first : first + kept + 1] = segment + 1
    species_BL[row, first : first + kept + 1] = species_T[store]
    ids_BL[row, first] = 0
    values_BL[row, first] = 0.0
    positions_BL[row, first] = 0
    first += 1
    ids_n = ids_BL[row, first : first + kept]
    values_n = values_BL[row, first : first + kept]
    positions_n = positions_BL[row, first : first + kept]
    is_tied = False
    if not (library or by_token):  # continuous quotients are all distinct
      is_tied = tie_ranking.rank(
        n, quotient_n, hash_n, words_n, tie_genes, tie_bins, tie_groups,
        tie_table, value_n,
      )  # fmt: skip
    if is_tied:
      for k in range(kept):
        word = words_n[k]
        ids_n[k] = tokens_n[word & tie_ranking.PLACE_MASK]
        values_n[k] = value_n[word >> tie_ranking.GROUP_SHIFT]
    else:
      ranking.rank(
        n, quotient_n, hash_n, near_n, order_n, words_n, other_n, hash_bins,
        bins,
      )  # fmt: skip
      ranking.log2_1p(n, quotient_n, words_n.view(np.float64), value_n)
      for k in range(kept):
        place = order_n[k]
        ids_n[k] = tokens_n[place]
        values_n[k] = value_n[place]
    for k in range(kept):
      positions_n[k] = k

    # The masks and labels: as in `masking` and `rows`.
    key = kernels.mix64(mask_salt_n[c] ^ kernels.mix64(np.uint64(number_n[c])))
    for k in range(kept):
      hash_n[k] = kernels.mix64(key + np.uint64(ids_n[k]) * kernels.GOLDEN)
    num_picked = 0
    for k in range(kept):
      order_n[num_picked] = np.uint64(k)
      num_picked += hash_n[k] < below
    pool_n_ = pools_N[pool_P1[pool_n[c]] : pool_P1[pool_n[c] + 1]]
    label = used_3B[2, row]
    used_3B[2, row] += num_picked
    for p in range(num_picked):
      if label >= most:
        dropped += num_picked - p
        break
      k = np.int64(order_n[p])
      slots_BK[row, label] = first + k
      id_labels_BK[row, label] = ids_n[k]
      id_weights_BK[row, label] = 1.0
      value_labels_BK[row, label] = values_n[k]
      value_weights_BK[row, label] = 1.0
      label += 1
      draw = kernels.mix64(hash_n[k] ^ kernels.GOLDEN)
      if draw < mask_below:
        ids_n[k] = vocabulary.MASK
      elif draw < random_below:
        draw = kernels.mix64(draw ^ kernels.GOLDEN) >> np.uint64(32)
        ids_n[k] = pool_n_[(draw * np.uint64(len(pool_n_))) >> np.uint64(32)]
      elif keeps_value:
        continue
      values_n[k] = masking.HIDDEN_VALUE
  return encoding.FINE, 0, dropped


@kernels.compiled
def _pad(
  used_3B, ids_BL, values_BL, positions_BL, segments_BL, species_BL, slots_BK,
  id_labels_BK, id_weights_BK, value_labels_BK, value_weights_BK,
):  # fmt: skip
  """Zeros behind the cells and labels of every row."""
  for row in range(len(ids_BL)):
    used = used_3B[0, row]
    ids_BL[row, used:] = 0
    values_BL[row, used:] = 0.0
    positions_BL[row, used:] = 0
    segments_BL[row, used:] = 0
    species_BL[row, used:] = 0
    labels = min(used_3B[2, row], slots_BK.shape[1])
    slots_BK[row, labels:] = 0
    id_labels_BK[row, labels:] = 0
    id_weights_BK[row, labels:] = 0.0
    value_labels_BK[row, labels:] = 0.0
    value_weights_BK[row, labels:] = 0.0


class Filler:
  """Fills batches with cells of the stores of a split."""

  def __init__(
    self,
    config: encoding.EncodingConfig,
    tokens_T: Sequence[np.ndarray],
    species_T: np.ndarray,
    medians: medians_lib.Medians,
    pools_T: Sequence[masking.TokenPools],
  ):
    """Lays the tables of the stores side by side.

    Args:
      config: how counts become ranks and values.
      tokens_T: token of every row of the gene list of each store.
      species_T: species code of each store.
      medians: divisors of the counts.
      pools_T: pools of random tokens of each store.
    """
    self._config = config
    self._size_T = np.array([len(token_R) for token_R in tokens_T])
    self._token_TR = np.full((len(tokens_T), self._size_T.max()), -1, np.int32)
    for own, token_R in zip(self._token_TR, tokens_T):
      own[: len(token_R)] = token_R
    self._species_T = np.asarray(species_T, np.int32)
    self._merges_T = np.array([encoding.shares_tokens(t) for t in tokens_T])
    # By their number among the distinct: half the memory to look up in.
    divisor_TV = np.stack([medians.divisor_V(s) for s in species_T])
    self._divisor_d, number_N = np.unique(divisor_TV, return_inverse=True)
    self._number_TV = number_N.reshape(divisor_TV.shape).astype(np.int32)
    self._pools_N = np.concatenate([pools.tokens_N for pools in pools_T])
    sizes = [np.diff(pools.starts_P1) for pools in pools_T]
    self._pool_P1 = np.cumsum([0, *np.concatenate(sizes)])
    self._is_empty_P = np.diff(self._pool_P1) == 0
    self.first_pool_T = np.cumsum([0, *map(len, sizes[:-1])])
    self._held = threading.local()

  def fill(
    self,
    batch: schemas.PretrainingBatch,
    index_BS: np.ndarray,
    parts: Sequence[tuple[Source, int, int]],
    places: Places,
    mask: masking.MaskConfig,
    folds: bool,
  ) -> int:
    """Fills a batch.

    Args:
      batch: written to, all of it but `is_cls_BL`, which comes as False.
      index_BS: of -1; gets the numbers of cells.
      parts: windows, each with the (first, stop) of its cells in `places`.
      places: of all cells.
      mask: which genes are hidden, and how.
      folds: whether the order of ties depends on `tie_salt_n`.

    Returns:
      Picks beyond K, which are not hidden.

    Raises:
      UserError: a damaged cell, an empty pool, or a cell that does not have
        the length that was counted for it.
    """
    if mask.policy == 'released':
      whole = masking.whole_vocabulary(self._number_TV.shape[1])
      pools = whole.tokens_N, whole.starts_P1
      places = dataclasses.replace(places, pool_n=np.zeros_like(places.pool_n))
    else:
      pools = self._pools_N, self._pool_P1
      masking.check_pools(self._is_empty_P, places.pool_n)
    config, cells = self._config, batch.cells
    filled = (
      cells.gene_ids_BL,
      cells.values_BL,
      cells.positions_BL,
      cells.segments_BL,
      cells.species_BL,
    )
    labels = (
      batch.masked_slots_BK,
      batch.id_labels_BK,
      batch.id_weights_BK,
      batch.value_labels_BK,
      batch.value_weights_BK,
    )
    used_3B = np.zeros((3, len(index_BS)), np.int64)  # slots, segments, labels
    where = [getattr(places, f.name) for f in dataclasses.fields(places)]
    below = (
      masking.threshold(mask.rate),
      masking.threshold(mask.mask_share),
      masking.threshold(mask.mask_share + mask.random_share),
    )
    dropped = 0
    for source, first, stop in parts:
      status, cell, beyond = _fill(
        *source.arrays,
        first,
        stop,
        *where,
        self._token_TR,
        self._size_T,
        self._species_T,
        self._merges_T,
        self._number_TV,
        self._divisor_d,
        *pools,
        config.mode == encoding.LIBRARY,
        float(config.target_sum),
        config.ties == 'token',
        folds,
        config.max_genes,
        *below,
        mask.policy == 'released',
        *self._workspace(source.longest),
        *filled,
        cells.is_cls_BL,
        *labels,
        index_BS,
        used_3B,
      )
      if status == BAD_LENGTH:
        raise errors.UserError(
          'cells do not have the length that was counted for them: remove the'
          ' folder cache/ of the corpus'
        )
      if status != encoding.FINE:
        size = int(self._size_T[places.store_n[cell]])
        encoding.raise_on(status, int(places.number_n[cell]), size)
      dropped += beyond
    _pad(used_3B, *filled, *labels)
    return dropped

  def _workspace(self, longest: int) -> tuple[np.ndarray, ...]:
    """Scratch of this thread, made anew only for a longer cell."""
    if getattr(self._held, 'longest', -1) < longest:
      self._held.longest = longest = longest * 5 // 4
      self._held.arrays = (
        np.empty((2, longest + 1), np.float64),
        np.empty((4, longest + 1), np.uint64),
        np.empty((2, max(longest + 1, tie_ranking.MOST_DISTINCT)), np.float32),
        np.empty((2, 1 << ranking.DIGIT_BITS), np.uint32),
        np.empty(1 << ranking.HASH_BITS, np.uint32),
        np.full(self._number_TV.shape[1], -1, np.int32),
        np.empty(longest + 1, np.int32),
        *tie_ranking.workspace(longest),
      )
    return self._held.arrays
