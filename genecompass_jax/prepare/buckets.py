"""Cells on disk between the two passes of `pipeline`, in buckets.

A bucket is a range of the hash that orders the corpus, so that reading the
buckets in turn, each sorted, gives a shuffle of the whole.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from genecompass_jax import encoding, kernels
from genecompass_jax.prepare import sources

FLUSH_ELEMENTS = 1 << 22  # gathered before the buckets are written to
FLUSH_EACH = 1 << 15  # and for each bucket, so that writes do not get tiny


@kernels.compiled
def _take(rows_N, counts_N, starts_C1, index_C, out_rows_N, out_counts_N):
  out = 0
  for c in range(len(index_C)):
    a, b = starts_C1[index_C[c]], starts_C1[index_C[c] + 1]
    out_rows_N[out : out + b - a] = rows_N[a:b]
    out_counts_N[out : out + b - a] = counts_N[a:b]
    out += b - a


@dataclasses.dataclass(frozen=True)
class Cells:
  """Cells on their way: counts, and a record and a name for each."""

  rows_N: np.ndarray
  counts_N: np.ndarray
  records_C: np.ndarray
  names: np.ndarray

  @functools.cached_property
  def starts_C1(self) -> np.ndarray:
    """int64 [C + 1] where each cell begins."""
    starts_C1 = np.zeros(len(self.records_C) + 1, np.int64)
    np.cumsum(self.records_C['length'], out=starts_C1[1:])
    return starts_C1

  def take(self, index_C: np.ndarray) -> 'Cells':
    """Some of the cells, in that order."""
    records_C = self.records_C[index_C]
    size = int(records_C['length'].sum(dtype=np.int64))
    rows_N = np.empty(size, self.rows_N.dtype)
    counts_N = np.empty(size, self.counts_N.dtype)
    _take(self.rows_N, self.counts_N, self.starts_C1, index_C, rows_N, counts_N)
    return Cells(rows_N, counts_N, records_C, self.names[index_C])

  def ragged(self) -> encoding.RaggedCells:
    """The counts alone."""
    totals_C = self.records_C['total']
    return encoding.RaggedCells(
      self.rows_N, self.counts_N, self.starts_C1, totals_C
    )


class Buckets:
  """Files of cells, one for each range of the hash that orders the corpus."""

  def __init__(
    self,
    opened: Sequence[sources.Source],
    codes: Sequence[np.ndarray],
    folder: str,
    *,
    is_float: bool,
    seed: int,
    bucket_bytes: int,
  ):
    """Empty buckets.

    Args:
      opened: the sources.
      codes: for each source, int32 [columns, cells] labels.
      folder: where the files go.
      is_float: whether counts are no whole numbers.
      seed: of the order.
      bucket_bytes: size of a bucket, about.
    """
    self.folder = folder
    self._counts_dtype = np.dtype('<f4' if is_float else '<u4')
    self._record = np.dtype(
      [
        ('key', '<u8'),
        ('source_row', '<i8'),
        ('total', '<f8'),
        ('length', '<i4'),
        ('codes', '<i4', (len(codes[0]),)),
      ]
    )
    self._seed = seed
    entries = sum(source.num_entries for source in opened)
    self._bits = max(0, int(np.ceil(np.log2(max(
      6 * entries / bucket_bytes, 1
    )))))  # fmt: skip
    self._codes = codes
    self._waiting: dict[int, list[Cells]] = {}

  def add(self, source: int, chunk: sources.Chunk, names: np.ndarray) -> None:
    """Takes the cells of a chunk.

    Args:
      source: number of the source.
      chunk: its cells; the caller has left out those without a known gene.
      names: of the cells.
    """
    records_C = np.zeros(len(chunk.index_C), self._record)
    base = kernels.fold(self._seed, source)
    records_C['key'] = kernels.mix64_all(
      base + chunk.index_C.astype(np.uint64) * kernels.GOLDEN
    )
    records_C['source_row'] = chunk.index_C
    records_C['total'] = chunk.cells.totals_C
    records_C['length'] = np.diff(chunk.cells.starts_C1)
    records_C['codes'] = self._codes[source][:, chunk.index_C].T
    cells = Cells(
      chunk.cells.gene_rows_N, chunk.cells.counts_N, records_C, names
    )
    waiting = self._waiting.setdefault(chunk.species, [])
    waiting.append(cells)
    enough = max(FLUSH_ELEMENTS, FLUSH_EACH << self._bits)
    if sum(len(c.rows_N) for c in waiting) >= enough:
      self._flush(chunk.species)

  def _flush(self, species: int) -> None:
    cells = _concatenate(self._waiting.pop(species, []))
    if cells is None:
      return
    bucket_C = self._bucket(cells.records_C['key'])
    if self._bits:
      order_C = np.argsort(bucket_C, kind='stable')
      cells, bucket_C = cells.take(order_C), bucket_C[order_C]
    starts_C1 = cells.starts_C1
    for bucket in np.unique(bucket_C):
      a, b = np.searchsorted(bucket_C, (bucket, bucket + 1))
      elements = slice(starts_C1[a], starts_C1[b])
      text = '\n'.join(cells.names[a:b]) + '\n'
      for kind, data in (
        ('rows', cells.rows_N[elements]),
        ('counts', cells.counts_N[elements]),
        ('records', cells.records_C[a:b]),
        ('names', np.frombuffer(text.encode('utf-8'), np.uint8)),
      ):
        with open(self._file(species, int(bucket), kind), 'ab') as file:
          data.tofile(file)

  def _bucket(self, key_C: np.ndarray) -> np.ndarray:
    if not self._bits:
      return np.zeros(len(key_C), np.int64)
    return (key_C >> np.uint64(64 - self._bits)).astype(np.int64)

  def _file(self, species: int, bucket: int, kind: str) -> str:
    return os.path.join(self.folder, f'{species}-{bucket}.{kind}')

  def read(self, species: int) -> Iterator[tuple[Cells, np.ndarray]]:
    """Yields the buckets in order, each with the order of its cells."""
    self._flush(species)
    for bucket in range(2**self._bits):
      if os.path.exists(self._file(species, bucket, 'records')):
        cells = self._load(species, bucket)
        yield cells, np.argsort(cells.records_C['key'], kind='stable')

  def _load(self, species: int, bucket: int) -> Cells:
    read = {}
    for kind, dtype in (
      ('rows', np.uint16),
      ('counts', self._counts_dtype),
      ('records', self._record),
    ):
      name = self._file(species, bucket, kind)
      read[kind] = np.fromfile(name, dtype)
      os.remove(name)
    name = self._file(species, bucket, 'names')
    with open(name, encoding='utf-8', newline='\n') as file:
      names = np.array(file.read().split('\n')[:-1], object)
    os.remove(name)
    return Cells(read['rows'], read['counts'], read['records'], names)


def _concatenate(parts: Sequence[Cells]) -> Cells | None:
  if len(parts) < 2:
    return parts[0] if parts else None
  fields = [field.name for field in dataclasses.fields(Cells)]
  return Cells(
    *(np.concatenate([getattr(p, name) for p in parts]) for name in fields)
  )
