"""Which cell goes into which row of which batch: the plan of an epoch.

A plan is a pure function of (encoded lengths, weights, seed, epoch): nothing
is read but one number a cell, nothing is remembered between epochs, and the
number of hosts does not come in. So batch e is a look-up, at any e.

The cells of a split are numbered over its stores (human first). Each store's
blocks are permuted and dealt round-robin to V virtual streams; what does not
divide by V (odd blocks, the short last block) is shared out cell by cell, so
that streams differ by one cell a store. It comes first in an epoch: the tail
that is dropped at the end is never always the same cells. In a stream the
stores are mixed in proportion, out of phase between streams, and a window of
a few blocks at a time is shuffled and laid out in rows:

  packed   several cells a row, best fit by falling length; a row is open for
           ties to the cell that finds it used last.
  buckets  one cell a row; each batch has the slots of one length bucket, the
           same in all streams. What is left of a bucket fills batches of the
           next one up; which cells a window drops to come out even (less than
           a batch) is drawn before lengths are looked at.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from genecompass_jax import errors, kernels

PACKED = 'packed'
BUCKETS = 'buckets'
LAYOUTS = (PACKED, BUCKETS)
# A row of L slots holds at most L / this many cells, so that the number of
# segments is static; below 31 genes a cell, rows fill up by number.
_SLOTS_PER_SEGMENT = 32
_MIN_STREAM_CELLS = 64

# What a hash is drawn for.
_DEAL, _CELLS, _ROWS, _WEIGHT = range(4)


def choose_buckets(
  lengths_C: np.ndarray, max_genes: int, count: int = 6, step: int = 64
) -> tuple[int, ...]:
  """The length buckets that pad a set of cells least, found exactly.

  Args:
    lengths_C: genes of each cell.
    max_genes: the cut; the last bucket holds a cell of so many and its CLS.
    count: most buckets.
    step: buckets are multiples of it.

  Returns:
    Slots of the buckets, ascending; fewer than `count` where more save nothing.
  """
  num_steps = -(-(max_genes + 1) // step)
  need_C = -(-(np.minimum(lengths_C, max_genes).astype(np.int64) + 1) // step)
  until_m = np.cumsum(np.bincount(need_C, minlength=num_steps + 1))
  # least[m]: padded slots of all cells of up to m steps, the last bucket at m.
  least_m = np.arange(num_steps + 1) * until_m
  chosen: list[np.ndarray] = []
  for _ in range(count - 1):
    before_mk = np.where(
      np.tri(num_steps + 1, k=-1, dtype=bool),
      least_m[None, :]
      + np.arange(num_steps + 1)[:, None] * (until_m[:, None] - until_m),
      np.iinfo(np.int64).max,
    )
    best_m = before_mk.argmin(1)
    better_m = np.minimum(before_mk.min(1), least_m)
    chosen.append(np.where(before_mk.min(1) < least_m, best_m, -1))
    least_m = better_m
  buckets, m = [num_steps], num_steps
  for best_m in reversed(chosen):
    if best_m[m] > 0:
      m = int(best_m[m])
      buckets.append(m)
  return tuple(step * b for b in sorted(buckets))


@dataclasses.dataclass(frozen=True)
class Cells:
  """What a plan knows of the C cells of a split.

  Attributes:
    first_T1: running number of the first cell of each store, and C.
    block_cells_T: cells in a block of each store.
    lengths_C: integer genes of every encoded cell; 0 is left out of training.
    weights_C: times that a cell is seen in an epoch, on average; None: once.
      A weight w gives a cell floor((e + 1) w + u) - floor(e w + u) copies in
      epoch e, with u hashed from (seed, cell): a thinned source is gone
      through evenly over epochs, no cell twice before all were seen.
  """

  first_T1: tuple[int, ...]
  block_cells_T: tuple[int, ...]
  lengths_C: np.ndarray
  weights_C: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
  """How cells are laid out in rows: see `data.DataConfig`."""

  kind: str
  rows_per_batch: int
  slots: tuple[int, ...]  # of the shapes, ascending; one shape when packed
  streams: int
  window_cells: int  # about; a window is whole blocks
  seed: int

  @property
  def segments(self) -> int:
    """Most cells of a row."""
    if self.kind == BUCKETS:
      return 1
    return max(self.slots[-1] // _SLOTS_PER_SEGMENT, 1)

  @property
  def rows_per_stream(self) -> int:
    """Rows that a stream gives to each batch."""
    return self.rows_per_batch // self.streams


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of one window of one stream, in the order of batches.

  Attributes:
    starts_R1: int64; row r holds cells starts[r]:starts[r + 1].
    places_N: int64 place of each cell among the window's cells as read.
    repeats_N: int64; 1, 2, ... for further copies of a cell in an epoch.
  """

  starts_R1: np.ndarray
  places_N: np.ndarray
  repeats_N: np.ndarray


def hashes(numbers_N: np.ndarray, *parts: int) -> np.ndarray:
  """uint64 hash of each number, given some integers to fold in."""
  x_N = np.asarray(numbers_N).astype(np.uint64) + np.uint64(1)
  return kernels.mix64_all(x_N * kernels.GOLDEN + kernels.fold(*parts))


def permutation(size: int, *parts: int) -> np.ndarray:
  """int64 permutation drawn from some integers."""
  return np.argsort(hashes(np.arange(size), *parts), kind='stable')


def fitting_streams(num_cells: int, streams: int, rows_per_batch: int) -> int:
  """Streams that a corpus can feed: fewer than asked where it is small.

  A power of two that divides `rows_per_batch`, at least 64 cells a stream
  where possible. The number of hosts has no say, or it would change batches.
  """
  if num_cells >= streams * _MIN_STREAM_CELLS:
    return streams
  fewer = 1
  while (
    2 * fewer < streams
    and rows_per_batch % (2 * fewer) == 0
    and num_cells >= 2 * fewer * _MIN_STREAM_CELLS
  ):
    fewer *= 2
  return fewer


def deal(
  cells: Cells, streams: int, seed: int, epoch: int, in_phase: bool = False
) -> list[list[list[tuple[int, int]]]]:
  """Deals the blocks of an epoch: pieces of each stream, as runs of cells.

  Args:
    cells: of the split.
    streams: V.
    seed: of the order of blocks.
    epoch: of the order of blocks.
    in_phase: give all streams the stores in the same order, so that their
      windows have equal numbers of cells; otherwise blocks of a small store
      come to the streams in turn.

  Returns:
    For each stream its pieces in order, the same number for all; a piece is
    a list of (first, stop) cell numbers, each run within one block.
  """
  keyed = [[] for _ in range(streams)]
  for store, block_cells in enumerate(cells.block_cells_T):
    first, stop = cells.first_T1[store : store + 2]
    num_blocks = -(-(stop - first) // block_cells)
    order = permutation(num_blocks, seed, epoch, _DEAL, store)
    is_whole = (order + 1) * block_cells <= stop - first
    whole = order[is_whole]
    each = len(whole) // streams
    odd = np.concatenate([whole[each * streams :], order[~is_whole]])
    odd_runs = [
      (first + b * block_cells, min(first + (b + 1) * block_cells, stop))
      for b in odd.tolist()
    ]
    num_odd = sum(b - a for a, b in odd_runs)
    dealt = first + whole[: each * streams].reshape(each, streams) * block_cells
    for v in range(streams):
      pieces = [[(a, a + block_cells)] for a in dealt[:, v].tolist()]
      if num_odd:
        share = v * num_odd // streams, (v + 1) * num_odd // streams
        pieces.insert(0, _cut(odd_runs, *share))
      phase = (v + 0.5) / streams if store and not in_phase else 0.5
      keyed[v] += [
        ((i + phase) / len(pieces), store, piece)
        for i, piece in enumerate(pieces)
      ]
  return [
    [piece for _, _, piece in sorted(pieces, key=lambda p: p[:2])]
    for pieces in keyed
  ]


def _cut(
  runs: Sequence[tuple[int, int]], start: int, stop: int
) -> list[tuple[int, int]]:
  """The runs of cells start:stop of some runs laid end to end."""
  cut = []
  for a, b in runs:
    if start < b - a and stop > 0:
      cut.append((a + max(start, 0), min(a + stop, b)))
    start -= b - a
    stop -= b - a
  return cut


@kernels.compiled
def best_fit(needs_N, row_slots, max_cells):
  """Packs needs into rows of `row_slots`, longest first, tightest fit.

  Args:
    needs_N: int64 slots that each cell takes, 1 to `row_slots`.
    row_slots: slots of a row.
    max_cells: most cells of a row.

  Returns:
    int64 row of every cell, and the number of rows. Equal needs are taken in
    the order given; equal fits by the row used last. A few steps a cell.
  """
  n = len(needs_N)
  begin = np.zeros(row_slots + 2, np.int64)
  for i in range(n):
    begin[row_slots - needs_N[i] + 1] += 1
  for need in range(1, row_slots + 2):
    begin[need] += begin[need - 1]
  order = np.empty(n, np.int64)
  for i in range(n):
    b = row_slots - needs_N[i]
    order[begin[b]] = i
    begin[b] += 1
  head = np.full(row_slots + 1, -1, np.int64)  # open rows by slots left
  busy = np.zeros(row_slots // 64 + 1, np.int64)  # non-empty heads of each 64
  following = np.empty(n, np.int64)
  held = np.zeros(n, np.int64)
  rows_N = np.empty(n, np.int64)
  num_rows = 0
  widest = np.int64(0)  # no open row has more slots left
  for i in order:
    need = needs_N[i]
    while widest >= need and head[widest] < 0:
      widest -= 1
    room = need
    if widest < need:
      row = np.int64(num_rows)
      room = np.int64(row_slots)
      num_rows += 1
    else:
      while head[room] < 0:  # there is one at or below `widest`
        room += 1
        while room % 64 == 0 and not busy[room // 64]:
          room += 64
      row = head[room]
      head[room] = following[row]
      busy[room // 64] -= head[room] < 0
    rows_N[i] = row
    held[row] += 1
    left = room - need
    if left > 0 and held[row] < max_cells:
      busy[left // 64] += head[left] < 0
      following[row] = head[left]
      head[left] = row
      widest = max(widest, left)
  return rows_N, num_rows


class EpochPlan:
  """Rows and batches of one epoch.

  Attributes:
    windows_VW: runs of cells of each window of each stream.
    num_batches: whole batches; the tail of every stream is dropped alike.
    num_cells: cells of the epoch, repeats counted, before the tail is dropped.
    dropped_cells: how many of them the tail takes (for packed rows an
      estimate by the share of rows).
    real_share: share of slots that hold a gene or a CLS.
  """

  def __init__(self, cells: Cells, layout: Layout, epoch: int):
    """Counts the rows of every window: one pass over the lengths."""
    self._cells, self._layout, self._epoch = cells, layout, epoch
    self.windows_VW = []
    in_phase = layout.kind == BUCKETS
    for pieces in deal(cells, layout.streams, layout.seed, epoch, in_phase):
      share = cells.first_T1[-1] / layout.streams
      num = min(max(1, round(share / layout.window_cells)), len(pieces))
      bounds = [w * len(pieces) // num for w in range(num + 1)]
      self.windows_VW.append(
        [sum(pieces[a:b], []) for a, b in zip(bounds[:-1], bounds[1:])]
      )
    if layout.kind == PACKED:
      self._count_packed()
    else:
      self._count_buckets()

  def _needs(self, stream, window):
    return self._places(self.windows_VW[stream][window])[2]

  def _count_packed(self):
    layout = self._layout
    rows_VW = np.zeros((layout.streams, len(self.windows_VW[0])), np.int64)
    self.num_cells = filled = 0
    for v, w in np.ndindex(*rows_VW.shape):
      needs = self._needs(v, w)
      rows_VW[v, w] = best_fit(needs, layout.slots[0], layout.segments)[1]
      self.num_cells += len(needs)
      filled += int(needs.sum())
    total = int(rows_VW.sum())
    self.real_share = filled / max(total * layout.slots[0], 1)
    self._set_rows(rows_VW)
    kept = self.num_batches * layout.rows_per_batch
    self.dropped_cells = round(self.num_cells * (1 - kept / max(total, 1)))

  def _count_buckets(self):
    layout = self._layout
    each = layout.rows_per_stream
    batches_Wk = []  # batches up to and with bucket k
    self.num_cells = filled = 0
    for w in range(len(self.windows_VW[0])):
      needs_V = [self._needs(v, w) for v in range(layout.streams)]
      self.num_cells += sum(map(len, needs_V))
      num = min(map(len, needs_V)) // each
      fitting_Vk = [
        np.searchsorted(np.sort(needs[: num * each]), layout.slots, 'right')
        for needs in needs_V
      ]
      batches_Wk.append(np.min(fitting_Vk, axis=0) // each)
      filled += sum(int(needs[: num * each].sum()) for needs in needs_V)
    self._batches_Wk = np.array(batches_Wk, np.int64)
    self._set_rows(np.tile(self._batches_Wk[:, -1] * each, (layout.streams, 1)))
    per_bucket_Wk = np.diff(self._batches_Wk, axis=1, prepend=0)
    slots = int((per_bucket_Wk @ np.array(layout.slots)).sum())
    self.real_share = filled / max(slots * layout.rows_per_batch, 1)
    kept = self.num_batches * layout.rows_per_batch
    self.dropped_cells = self.num_cells - kept

  def _set_rows(self, rows_VW):
    self._first_VW1 = np.concatenate(
      [np.zeros((len(rows_VW), 1), np.int64), np.cumsum(rows_VW, axis=1)],
      axis=1,
    )
    self.num_batches = int(
      self._first_VW1[:, -1].min() // self._layout.rows_per_stream
    )

  def _places(self, runs):
    """Shuffled cells of a window: (place, repeat, slots needed) of each."""
    number_N = np.concatenate(
      [np.arange(a, b) for a, b in runs] or [np.arange(0)]
    )
    copies_N = (self._cells.lengths_C[number_N] > 0).astype(np.int64)
    if self._cells.weights_C is not None:
      weight_N = self._cells.weights_C[number_N].astype(np.float64)
      draw_N = hashes(number_N, self._layout.seed, _WEIGHT) / 2.0**64
      epoch = self._epoch
      copies_N *= (
        np.floor((epoch + 1) * weight_N + draw_N)
        - np.floor(epoch * weight_N + draw_N)
      ).astype(np.int64)
    first_N = np.cumsum(copies_N) - copies_N
    place_N = np.repeat(np.arange(len(number_N)), copies_N)
    repeat_N = np.arange(len(place_N)) - first_N[place_N]
    number_N = number_N[place_N]
    key_N = hashes(
      number_N + (repeat_N << 48), self._layout.seed, self._epoch, _CELLS
    )
    order = np.argsort(key_N, kind='stable')
    needs_N = self._cells.lengths_C[number_N[order]].astype(np.int64) + 1
    return place_N[order], repeat_N[order], needs_N

  def locate(
    self, stream: int, batch: int, first: int = 0, stop: int | None = None
  ) -> list[tuple[int, int, int]]:
    """Where a batch's rows of a stream lie: (window, first row, stop row).

    Args:
      stream: number of the stream.
      batch: number in the epoch.
      first: the first row of those that the batch has of the stream.
      stop: where to stop; None: after all of them.
    """
    first_W1 = self._first_VW1[stream]
    each = self._layout.rows_per_stream
    start = batch * each + first
    stop = batch * each + (each if stop is None else stop)
    w = int(np.searchsorted(first_W1, start, 'right')) - 1
    parts = []
    while start < stop:
      until = min(stop, int(first_W1[w + 1]))
      if until > start:
        parts.append((w, start - int(first_W1[w]), until - int(first_W1[w])))
      start, w = until, w + 1
    return parts

  def num_rows(self, stream: int, window: int) -> int:
    """Rows of a window."""
    first_W1 = self._first_VW1[stream]
    return int(first_W1[window + 1] - first_W1[window])

  def slots(self, batch: int) -> int:
    """Slots in a row of a batch."""
    layout = self._layout
    if layout.kind == PACKED:
      return layout.slots[0]
    window, row, _ = self.locate(0, batch)[0]
    place = self._batch_order(window)[row // layout.rows_per_stream]
    bucket = np.searchsorted(self._batches_Wk[window], place, 'right')
    return layout.slots[int(bucket)]

  def _batch_order(self, window):
    num = int(self._batches_Wk[window, -1])
    return permutation(num, self._layout.seed, self._epoch, _ROWS, window)

  def rows(self, stream: int, window: int) -> Rows:
    """Lays out a window of a stream."""
    layout = self._layout
    place_N, repeat_N, needs_N = self._places(self.windows_VW[stream][window])
    if layout.kind == PACKED:
      row_N, num_rows = best_fit(needs_N, layout.slots[0], layout.segments)
      fold = layout.seed, self._epoch, _ROWS, window, stream
      row_N = permutation(num_rows, *fold)[row_N]
      order = np.argsort(row_N, kind='stable')
      sizes_R = np.bincount(row_N, minlength=num_rows)
    else:
      each = layout.rows_per_stream
      kept = self.num_rows(stream, window)
      by_length = np.argsort(needs_N[:kept], kind='stable')
      bounds = [0, *(self._batches_Wk[window] * each)]
      order = np.concatenate(
        [np.sort(by_length[a:b]) for a, b in zip(bounds[:-1], bounds[1:])]
      )
      order = order.reshape(-1, each)[self._batch_order(window)].ravel()
      sizes_R = np.ones(kept, np.int64)
    return Rows(
      np.concatenate([[0], np.cumsum(sizes_R)]), place_N[order], repeat_N[order]
    )


def one_cell_batches(
  lengths_C: np.ndarray, rows: int, buckets: Sequence[int], group: int
) -> list[tuple[int, np.ndarray]]:
  """Batches of whole cells in corpus order, for evaluation.

  Cells are taken `group` at a time; of a group, every bucket gives its full
  batches, what is left goes up a bucket, and what is left at the top waits
  for the next group. Every cell comes once.

  Args:
    lengths_C: genes of each cell.
    rows: rows of a batch.
    buckets: slots of the shapes, ascending.
    group: cells looked at together.

  Returns:
    (slots, places of cells) of each batch; the last may be short.

  Raises:
    UserError: a cell is longer than the last bucket.
  """
  if lengths_C.max(initial=0) + 1 > buckets[-1]:
    raise errors.UserError(
      f'cells of {lengths_C.max()} genes do not fit rows of {buckets[-1]} slots'
    )
  batches = []
  waiting = np.arange(0)
  for first in range(0, len(lengths_C), group):
    cells = np.arange(first, min(first + group, len(lengths_C)))
    cells = np.concatenate([waiting, cells])
    is_last = first + group >= len(lengths_C)
    num = len(cells) // rows
    kept, waiting = cells[: num * rows], cells[num * rows :]
    needs = lengths_C[kept].astype(np.int64) + 1
    by_length = kept[np.argsort(needs, kind='stable')]
    until_k = np.searchsorted(np.sort(needs), buckets, 'right') // rows
    for slots, a, b in zip(buckets, [0, *until_k[:-1]], until_k):
      chunk = np.sort(by_length[a * rows : b * rows])
      batches += [
        (slots, chunk[i : i + rows]) for i in range(0, len(chunk), rows)
      ]
    if is_last and len(waiting):
      longest = int(lengths_C[waiting].max()) + 1
      slots = buckets[int(np.searchsorted(buckets, longest))]
      batches.append((slots, waiting))
  return batches
