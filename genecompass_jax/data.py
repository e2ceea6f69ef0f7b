"""Corpus -> shuffled, ranked, masked batches; the only module with grain.

Batch e is a pure function of (corpus, config, seed, e): `Loader.batch(e)` can
be called at any e, in any order, on any host, and `Loader.iterate(start)` is
the same batches in order, made ahead by Grain. What is held in memory (plans
of epochs, windows of raw counts) is a memo and never changes a batch.

`packing` plans which cell goes where, `reading` reads, encodes, masks and lays
out the cells of a batch. A host makes the rows that its devices hold, and
reads the streams that those are of: the global batch does not depend on the
number of hosts, nor on how devices share the rows.
"""

import collections
import dataclasses
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures

import grain
import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  encoding,
  errors,
  masking,
  medians as medians_lib,
  packing,
  reading,
  schemas,
  vocabulary as vocabulary_lib,
)

_GROUP_CELLS = 8192  # cells of an evaluation held at a time
_MAX_BUCKETS = 6
_MOST_SKIPPED = 1 << 40  # batches; so that their numbers stay within 64 bits


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """How batches are made; a batch depends on every field.

  Attributes:
    rows_per_batch: B of the global batch, a multiple of `streams`.
    slots: L of packed rows, a multiple of 128, at least max_genes + 1.
    layout: 'packed': several cells a row; 'buckets': one cell a row, every
      batch of the shape of one length bucket.
    buckets: slots of the length buckets, ascending, six at most, the last at
      least max_genes + 1; evaluation uses them in either layout. Empty: those
      that pad the training cells of the corpus least (`fit_buckets`).
    streams: virtual streams of cells that a batch takes its rows from; a host
      reads those of its rows. A corpus with less
      than 64 cells a stream gets fewer.
    window_blocks: blocks of 1,024 cells of a stream that are shuffled and
      packed together (the same number of cells where blocks are smaller).
    seed: of order, ties and masks.
    mask: which genes are hidden, and how.
    source_weights: (source, times a cell is seen in an epoch); 1 if not named.
    species_weights: the same by 'human' and 'mouse'; the two multiply.
    corpus_weights: multiply these by the weights that the corpus was built
      with (`genecompass prep --weigh-by COLUMNS`), by kind of cell.
  """

  rows_per_batch: int = 32
  slots: int = 2304
  layout: str = packing.PACKED
  buckets: tuple[int, ...] = (256, 512, 768, 1280, 1792, 2304)
  streams: int = 8
  window_blocks: int = 4
  seed: int = 0
  mask: masking.MaskConfig = masking.MaskConfig()
  source_weights: tuple[tuple[str, float], ...] = ()
  species_weights: tuple[tuple[str, float], ...] = ()
  corpus_weights: bool = False

  def __post_init__(self):
    if self.layout not in packing.LAYOUTS:
      raise errors.UserError(
        f'data layout {self.layout!r}: give one of {packing.LAYOUTS}'
      )
    if self.layout == packing.PACKED and (self.slots < 1 or self.slots % 128):
      raise errors.UserError(
        f'data.slots={self.slots} must be a multiple of 128'
      )
    ascends = all(type(size) is int and size > 0 for size in self.buckets)
    ascends = ascends and all(
      a < b for a, b in zip(self.buckets, self.buckets[1:])
    )
    if not ascends or len(self.buckets) > _MAX_BUCKETS:
      raise errors.UserError(
        f'data.buckets={self.buckets} must be up to {_MAX_BUCKETS} ascending '
        'whole numbers'
      )
    if self.streams < 1 or self.window_blocks < 1:
      raise errors.UserError('data streams and window_blocks must be positive')
    if self.rows_per_batch < 1 or self.rows_per_batch % self.streams:
      raise errors.UserError(
        f'data.rows_per_batch={self.rows_per_batch} must be a multiple of '
        f'data.streams={self.streams}'
      )
    for name, weight in (*self.source_weights, *self.species_weights):
      if not 0 <= weight < 1000:
        raise errors.UserError(
          f'data weight of {name!r}: {weight} is not in [0, 1000)'
        )

  def shapes(self, max_genes: int) -> tuple[int, ...]:
    """Slots of every shape of training batches, ascending."""
    if self.layout == packing.PACKED:
      return (self.slots,)
    return self.evaluation_shapes(max_genes)

  def evaluation_shapes(self, max_genes: int) -> tuple[int, ...]:
    """Slots of every shape of evaluation batches: the buckets in use."""
    used = int(np.searchsorted(self.buckets, max_genes + 1)) + 1
    return self.buckets[:used]

  def num_masked(self, slots: int) -> int:
    """K, the predictions of a row: expected number plus six deviations.

    Rounded up to 16: the heads see the predictions of all rows as one axis, so
    that more would be lost. Up to 16 devices that share a row (context x tensor)
    share its predictions; more of them each make all.
    Six deviations are passed by one row in a thousand million.
    """
    rate = self.mask.rate
    most = slots * rate + 6 * (slots * rate * (1 - rate)) ** 0.5
    return min(-(-int(np.ceil(most)) // 16) * 16, slots)


def fit_buckets(
  corpus: 'corpus_lib.Corpus',
  encoding_config: encoding.EncodingConfig,
  config: DataConfig,
  step: int = 64,
) -> DataConfig:
  """A configuration with buckets: its own, or those that pad least.

  Args:
    corpus: whose training cells are looked at.
    encoding_config: how many genes a cell keeps.
    config: what has buckets, or none.
    step: chosen buckets are multiples of it.
  """
  if config.buckets:
    return config
  lengths_C = np.concatenate([s.length_N for s in corpus.stores('train')])
  buckets = packing.choose_buckets(
    lengths_C, encoding_config.max_genes, _MAX_BUCKETS, step
  )
  return dataclasses.replace(config, buckets=buckets)


def _stream_rows(
  rows: Sequence[int], each: int
) -> dict[int, list[tuple[int, int]]]:
  """Rows of a batch -> stream: runs (first, stop) of its `each` rows."""
  rows_B = np.asarray(rows)
  if len(rows_B) == 0 or (np.diff(rows_B) <= 0).any():
    raise ValueError(f'{rows=} of a batch must ascend, one at least')
  found = {}
  for stream in np.unique(rows_B // each).tolist():
    mine = rows_B[rows_B // each == stream] - stream * each
    parts = np.split(mine, np.flatnonzero(np.diff(mine) > 1) + 1)
    found[stream] = [(int(part[0]), int(part[-1]) + 1) for part in parts]
  return found


class Loader:
  """Batches of a corpus, by number.

  Attributes:
    config: as given.
    streams: virtual streams in use, at most `config.streams`.
    shapes: (slots, masked slots) of every shape that batches have.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    encoding_config: encoding.EncodingConfig,
    config: DataConfig,
    split: str = 'train',
    *,
    rows: Sequence[int] | None = None,
    vocabulary: vocabulary_lib.Vocabulary | None = None,
    medians: medians_lib.Medians | None = None,
  ):
    """Plans the first epoch.

    Args:
      corpus: an open corpus.
      encoding_config: how counts become ranks and values.
      config: how batches are made.
      split: `train` in training.
      rows: ascending rows of the global batch to make, None for all.
      vocabulary: in place of the corpus' own, with medians for it.
      medians: in place of the corpus' own.

    Raises:
      UserError: the corpus has no such split, or too few cells for one batch;
        slots below the longest cell; unknown weights.
    """
    slots = config.shapes(encoding_config.max_genes)
    if slots[-1] < encoding_config.max_genes + 1:
      raise errors.UserError(
        f'rows of {slots[-1]} slots cannot hold a cell of'
        f' {encoding_config.max_genes} genes and its CLS: raise the slots or'
        ' lower max_genes'
      )
    self.config = config
    self.shapes = tuple((s, config.num_masked(s)) for s in slots)
    self._split = reading.Split(
      corpus, encoding_config, split, vocabulary, medians
    )
    self._cells = packing.Cells(
      self._split.first_T1,
      tuple(store.block_cells for store in self._split.stores),
      self._split.lengths_C,
      self._split.weights(
        config.source_weights, config.species_weights, config.corpus_weights
      ),
    )
    self.streams = packing.fitting_streams(
      self._split.num_cells, config.streams, config.rows_per_batch
    )
    self._layout = packing.Layout(
      config.layout,
      config.rows_per_batch,
      slots,
      self.streams,
      config.window_blocks * corpus_lib.MAX_BLOCK,
      config.seed,
    )
    self._local = _stream_rows(
      range(config.rows_per_batch) if rows is None else rows,
      self._layout.rows_per_stream,
    )
    self._plan_lock, self._lock = threading.Lock(), threading.Lock()
    self._first_batch = [0]  # of each epoch planned so far, and of the next
    self._plans = collections.OrderedDict()
    self._held = {stream: collections.OrderedDict() for stream in self._local}
    self._readers = futures.ThreadPoolExecutor(
      min(len(self._local), 8), thread_name_prefix='genecompass-read'
    )
    logging.info('%s', self.describe())

  @property
  def segments(self) -> int:
    """Most cells of a row: S of `cell_index_BS`."""
    return self._layout.segments

  def describe(self) -> str:
    """One line for the log: cells, batches, padding, streams, tail."""
    plan, config = self._plan(0), self.config
    fewer = f' (asked {config.streams})' * (self.streams != config.streams)
    unused = int((self._cells.lengths_C == 0).sum())
    return (
      f'{self._split.num_cells} cells, {unused} of them without a known gene;'
      f' an epoch: {plan.num_cells} cells, {plan.num_batches} batches of'
      f' {config.rows_per_batch} rows ({config.layout}, slots'
      f' {", ".join(str(s) for s, _ in self.shapes)}),'
      f' {plan.real_share:.1%} real tokens, {plan.dropped_cells} cells in the'
      f' dropped tail; {self.streams} streams{fewer} in windows of'
      f' {config.window_blocks} blocks'
    )

  def cells_per_epoch(self) -> int:
    """Cells of the first epoch, repeats counted, with the dropped tail."""
    return self._plan(0).num_cells

  def batches_per_epoch(self) -> int:
    """Batches of the first epoch; later ones differ by a few when packed."""
    return self._plan(0).num_batches

  def _plan(self, epoch: int) -> packing.EpochPlan:
    """The plan of an epoch; two are kept."""
    plan = self._plans.get(epoch)  # no lock: the next epoch may be planned now
    if plan is not None:
      return plan
    with self._plan_lock:
      if epoch not in self._plans:
        plan = packing.EpochPlan(self._cells, self._layout, epoch)
        if not plan.num_batches:
          raise errors.UserError(
            f'{plan.num_cells} cells in epoch {epoch} do not fill one batch of'
            f' {self.config.rows_per_batch} rows: lower data.rows_per_batch (of corpus bench: --rows)'
          )
        if epoch == len(self._first_batch) - 1:
          self._first_batch.append(self._first_batch[-1] + plan.num_batches)
        self._plans[epoch] = plan
        while len(self._plans) > 2:
          self._plans.popitem(last=False)
      return self._plans[epoch]

  def locate(self, index: int) -> tuple[int, int]:
    """(epoch, number in the epoch) of a batch; plans the epochs before it."""
    if index < 0:
      raise ValueError(f'{index=} of a batch must not be negative')
    while index >= self._first_batch[-1]:
      self._plan(len(self._first_batch) - 1)
    epoch = int(np.searchsorted(self._first_batch, index, 'right')) - 1
    return epoch, index - self._first_batch[epoch]

  def _load(self, epoch: int, stream: int, window: int) -> reading.Window:
    plan = self._plan(epoch)
    number_C = np.concatenate(
      [np.arange(a, b) for a, b in plan.windows_VW[stream][window]]
      or [np.arange(0)]
    )
    read = self._split.read(number_C)
    return dataclasses.replace(read, rows=plan.rows(stream, window))

  def _window(self, epoch, stream, window) -> futures.Future:
    """A window, being read or in memory; two of a stream are kept."""
    held = self._held[stream]
    key = epoch, window
    with self._lock:
      future = held.get(key)
      if future is None or (future.done() and future.exception()):
        held[key] = self._readers.submit(self._load, epoch, stream, window)
        while len(held) > 2:
          held.popitem(last=False)
      held.move_to_end(key)
      return held[key]

  def batch(self, index: int) -> schemas.HostBatch:
    """The asked rows of a batch.

    Raises:
      UserError: the corpus is damaged.
    """
    return self._batch(index, look_ahead=False)

  def _batch(self, index: int, look_ahead: bool = True) -> schemas.HostBatch:
    epoch, number = self.locate(index)
    plan = self._plan(epoch)
    where = [
      (stream, plan.locate(stream, number, *run))
      for stream, runs in self._local.items()
      for run in runs
    ]
    for stream, parts in where:  # all reads are asked for before one is waited
      for window, _, _ in parts:
        self._window(epoch, stream, window)
      window, _, stop = parts[-1]
      if look_ahead and 2 * stop > plan.num_rows(stream, window):
        if window + 1 < len(plan.windows_VW[stream]):
          self._window(epoch, stream, window + 1)
        else:
          self._window(epoch + 1, stream, 0)
    picks = []
    row = 0
    for stream, parts in where:
      for window, first, stop in parts:
        loaded = self._window(epoch, stream, window).result()
        rows = loaded.rows
        starts = rows.starts_R1[first : stop + 1]
        row_n = np.repeat(
          np.arange(row, row + stop - first), starts[1:] - starts[:-1]
        )
        a, b = starts[0], starts[-1]
        picks.append(
          reading.Picks(loaded, rows.places_N[a:b], rows.repeats_N[a:b], row_n)
        )
        row += stop - first
    slots = plan.slots(number)
    return self._split.batch(
      index,
      reading.Shape(row, slots, self.config.num_masked(slots), self.segments),
      picks,
      seed=self.config.seed,
      mask=self.config.mask,
      tie_epoch=epoch,
      mask_epoch=epoch,
    )

  def raw_windows(self, epoch: int = 0) -> Iterator[reading.Window]:
    """Raw counts of the cells of the rows, a window of a stream at a time."""
    for window in range(len(self._plan(epoch).windows_VW[0])):
      for stream in self._local:
        yield self._load(epoch, stream, window)

  def iterate(
    self,
    start: int = 0,
    *,
    skip: Sequence[range] = (),
    threads: int = 2,
    prefetch: int = 8,
  ) -> Iterator[schemas.HostBatch]:
    """Batches from `start` on, without end, made ahead in threads.

    Args:
      start: number of the first batch; nothing else is needed to resume.
      skip: batches that are left out, and not read.
      threads: that make batches; they hold the GIL little.
      prefetch: batches made ahead.

    Returns:
      An iterator; `close()` ends its threads.
    """
    runs = []
    for run in sorted(skip, key=lambda run: run.start):
      first = max(run.start, start, runs[-1].stop if runs else start)
      if first < run.stop:
        runs.append(range(first, run.stop))

    def number(place: int) -> int:
      for run in runs:
        if place >= run.start:
          place += len(run)
      return place

    return iter(
      grain.MapDataset.range(start, sys.maxsize - _MOST_SKIPPED)
      .map(lambda place: self._batch(number(place)))
      .to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
      )
    )


def evaluation_batches(
  corpus: corpus_lib.Corpus,
  encoding_config: encoding.EncodingConfig,
  config: DataConfig,
  split: str = 'validation',
  *,
  rows: Sequence[int] | None = None,
  max_cells: int | None = None,
  vocabulary: vocabulary_lib.Vocabulary | None = None,
  medians: medians_lib.Medians | None = None,
) -> Iterator[schemas.HostBatch]:
  """Every cell of a split once, the same masks each time.

  One cell a row in length buckets, nearly in the order of the corpus; ties in
  the order of inference. All batches have `rows_per_batch` rows; the last is
  filled up with rows of weight 0.

  Args:
    corpus: an open corpus.
    encoding_config: how counts become ranks and values.
    config: rows, buckets, masks, seed; weights and streams play no part.
    split: split to evaluate on.
    rows: ascending rows of the global batch to make, None for all.
    max_cells: an evenly spaced part of the split (all of it is read through).
    vocabulary: in place of the corpus' own.
    medians: in place of the corpus' own.

  Yields:
    The asked rows of each batch.

  Raises:
    UserError: as `Loader`.
  """
  buckets = config.evaluation_shapes(encoding_config.max_genes)
  cells = reading.Split(corpus, encoding_config, split, vocabulary, medians)
  number_C = np.arange(cells.num_cells)
  if max_cells is not None and max_cells < cells.num_cells:
    number_C = np.arange(max_cells) * cells.num_cells // max_cells
  batches = packing.one_cell_batches(
    cells.lengths_C[number_C], config.rows_per_batch, buckets, _GROUP_CELLS
  )
  rows_B = np.arange(config.rows_per_batch) if rows is None else rows
  rows_B = np.asarray(rows_B)
  mine = [
    (slots, number_C[places[rows_B[rows_B < len(places)]]])
    for slots, places in batches
  ]
  together = max(_GROUP_CELLS // len(rows_B), 1)
  for first in range(0, len(mine), together):
    some = mine[first : first + together]
    number_c = np.sort(np.concatenate([numbers for _, numbers in some]))
    window = cells.read(number_c)
    for i, (slots, numbers) in enumerate(some, first):
      place_n = np.searchsorted(number_c, numbers)
      pick = reading.Picks(
        window, place_n, np.zeros_like(place_n), np.arange(len(place_n))
      )
      yield cells.batch(
        i,
        reading.Shape(len(rows_B), slots, config.num_masked(slots), 1),
        [pick],
        seed=config.seed,
        mask=config.mask,
        tie_epoch=None,
        mask_epoch=masking.EVALUATION_EPOCH,
      )
