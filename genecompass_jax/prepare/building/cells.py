"""Cells on their way through a build: counts, a record and a name for each."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np

from genecompass_jax import encoding, kernels

KINDS = ('rows', 'counts', 'records', 'names')  # the files of cells on disk


def record_dtype(num_columns: int) -> np.dtype:
  """Of what goes with a cell besides its counts.

  `key` is the hash that orders the corpus, `source_row` the row in the source,
  `total` the library size, `length` the number of expressed genes; `codes` are
  those of the label columns, source and unit first.
  """
  return np.dtype(
    [
      ('key', '<u8'),
      ('source_row', '<i8'),
      ('total', '<f8'),
      ('length', '<i4'),
      ('codes', '<i4', (num_columns,)),
    ]
  )


def small_counts(counts_N: np.ndarray) -> np.ndarray:
  """Whole counts in two bytes, where they all fit: half of what is moved."""
  if counts_N.dtype == np.uint32 and counts_N.max(initial=0) < 2**16:
    return counts_N.astype(np.uint16)
  return counts_N


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
  """Cells of one species.

  Attributes:
    rows_N: uint16 rows of the species' gene list, ascending in a cell.
    counts_N: uint16 counts, uint32 where some are large, float32 where they
      are corrected.
    records_C: what `record_dtype` says.
    names: of the cells, as objects.
  """

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

  def write(self, folder: str) -> None:
    """Writes one file of each of `KINDS`."""
    for kind, data in (
      ('rows', self.rows_N),
      ('counts', self.counts_N),
      ('records', self.records_C),
      ('names', np.frombuffer(encode_names(self.names), np.uint8)),
    ):
      np.save(os.path.join(folder, f'{kind}.npy'), data)

  def bounds(self, starts_K1: np.ndarray) -> np.ndarray:
    """int64 [K + 1, 3]: offsets in cells, elements and bytes of names.

    Args:
      starts_K1: first cell of each of K groups of cells, and the end.
    """
    sizes_C = [len(name.encode('utf-8')) + 1 for name in self.names]
    bytes_C1 = np.cumsum([0, *sizes_C], dtype=np.int64)
    return np.stack(
      [starts_K1, self.starts_C1[starts_K1], bytes_C1[starts_K1]], axis=1
    )


def mapped(folder: str, kind: str) -> np.ndarray:
  """A file of cells that `Cells.write` left, mapped into memory."""
  return np.load(
    os.path.join(folder, f'{kind}.npy'), mmap_mode='r', allow_pickle=False
  )


def read(folder: str, bounds_23: np.ndarray) -> Cells:
  """Reads some neighbouring cells of a folder that `Cells.write` filled.

  Args:
    folder: of the files.
    bounds_23: two rows of what `Cells.bounds` gave: from where to where.
  """
  place = {'rows': 1, 'counts': 1, 'records': 0, 'names': 2}
  found = []
  for kind in KINDS:
    first, stop = (int(n) for n in bounds_23[:, place[kind]])
    found.append(np.array(mapped(folder, kind)[first:stop]))
  return Cells(*found[:3], decode_names(found[3].tobytes()))


def concatenate(parts: Sequence[Cells]) -> Cells:
  """The cells of all parts, in order."""
  if len(parts) == 1:
    return parts[0]
  fields = [field.name for field in dataclasses.fields(Cells)]
  return Cells(
    *(np.concatenate([getattr(p, name) for p in parts]) for name in fields)
  )


def encode_names(names: np.ndarray) -> bytes:
  """Names as lines."""
  return ''.join(f'{name}\n' for name in names).encode('utf-8')


def decode_names(text: bytes) -> np.ndarray:
  """Lines as an object array of names."""
  return np.array(text.decode('utf-8').split('\n')[:-1], object)
