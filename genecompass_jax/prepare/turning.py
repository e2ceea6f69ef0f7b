"""A matrix by columns, or of entries in any order, turned into one by rows.

In files, where it does not fit into memory, in two passes.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse

from genecompass_jax.prepare import sparse

TURN_IN_MEMORY = 300_000_000  # entries: 3.6 GB, twice that while turning


def in_folder(write: Any, folder: str | None) -> sparse.Rows:
  """What `write(folder)` gives; without one, in a folder that goes with it."""
  if folder is not None:
    return write(folder)
  place = tempfile.TemporaryDirectory(prefix='genecompass-turned-')
  rows = write(place.name)
  object.__setattr__(rows, '_place', place)  # goes when the matrix goes
  return rows


class RowsWriter:
  """Files of a matrix by rows, which grows at its end.

  The offsets are written last and under a temporary name first: where they are,
  the rest is whole.
  """

  _INDPTR = 'indptr.npy'

  def __init__(self, folder: str, dtype: np.dtype, num_columns: int):
    os.makedirs(folder, exist_ok=True)
    self._folder, self._num_columns = folder, num_columns
    self._dtype = np.dtype(dtype)
    self._data = open(os.path.join(folder, 'data.bin'), 'wb')  # noqa: SIM115
    self._indices = open(os.path.join(folder, 'indices.bin'), 'wb')  # noqa: SIM115
    self._counts: list[np.ndarray] = []

  @classmethod
  def finished(
    cls, folder: str, dtype: np.dtype, shape: tuple[int, int]
  ) -> sparse.Rows | None:
    """The matrix whose files are in a folder; None where they are not."""
    name = os.path.join(folder, cls._INDPTR)
    if not os.path.exists(name):
      return None
    indptr = np.load(name, allow_pickle=False)
    empty = not indptr[-1]
    data, indices = (
      np.zeros(0, kind)
      if empty
      else np.memmap(os.path.join(folder, part), kind, 'r')
      for part, kind in (('data.bin', dtype), ('indices.bin', np.int32))
    )
    if len(indptr) != shape[0] + 1 or len(data) != indptr[-1]:
      return None
    return sparse.Rows(data, indices, indptr, shape)

  def add(self, rows: scipy.sparse.csr_matrix) -> None:
    """Appends rows."""
    rows.data.astype(self._dtype, copy=False).tofile(self._data)
    rows.indices.astype(np.int32, copy=False).tofile(self._indices)
    self._counts.append(np.diff(rows.indptr))

  def close(self) -> sparse.Rows:
    """Writes the offsets and gives the matrix back."""
    self._data.close()
    self._indices.close()
    counts = np.concatenate([np.zeros(1, np.int64), *self._counts])
    indptr = np.cumsum(counts, dtype=np.int64)
    name = os.path.join(self._folder, self._INDPTR)
    with open(f'{name}.part', 'wb') as file:
      np.save(file, indptr)
    os.replace(f'{name}.part', name)
    shape = len(indptr) - 1, self._num_columns
    return self.finished(self._folder, self._dtype, shape)


ENTRY = np.dtype([('row', '<i4'), ('column', '<i4'), ('value', '<f8')])


def write_rows(matrix: Any, folder: str) -> sparse.Rows:
  """Turns a matrix into files in a folder, or finds it turned there."""
  slab = max(TURN_IN_MEMORY // 16, 1)  # entries held at a time
  return write_entries(
    lambda: _entries(matrix, slab),
    matrix.num_entries,
    matrix.shape,
    sparse.wide(matrix.dtype),
    folder,
    slab,
  )


def _entries(matrix: Any, slab: int) -> Iterator[np.ndarray]:
  for a in range(0, matrix.num_entries, slab):
    b = min(a + slab, matrix.num_entries)
    entries = np.empty(b - a, ENTRY)
    entries['row'], entries['value'] = matrix.indices[a:b], matrix.data[a:b]
    columns = np.searchsorted(matrix.indptr, np.arange(a, b), side='right') - 1
    entries['column'] = columns
    yield entries


def write_entries(
  entries_of: Any,
  num_entries: int,
  shape: tuple[int, int],
  dtype: np.dtype,
  folder: str,
  slab: int,
) -> sparse.Rows:
  """Entries in any order -> files by rows, or those found in the folder.

  One pass scatters the entries over files of row ranges, one turns each of
  those: memory holds about `slab` entries. Entries of one place are summed.

  Args:
    entries_of: gives an iterator over arrays of `ENTRY`.
    num_entries: of all of them.
    shape: rows and columns.
    dtype: of the values.
    folder: for the files.
    slab: entries of a row range, about.

  Raises:
    UserError: an entry outside of the shape.
  """
  found = RowsWriter.finished(folder, dtype, shape)
  if found is not None:
    return found
  num_rows, num_columns = shape
  num_parts = max(-(-num_entries // slab), 1)
  rows_each = max(-(-num_rows // num_parts), 1)
  names = [
    os.path.join(folder, f'part-{k}') for k in range(-(-num_rows // rows_each))
  ]
  shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
  os.makedirs(folder)
  for entries in entries_of():
    for column, size in (('row', num_rows), ('column', num_columns)):
      sparse.check(entries[column], np.array([0, len(entries)]), size)
    part = entries['row'] // rows_each
    if (np.diff(part) < 0).any():
      order = np.argsort(part, kind='stable')
      entries, part = entries[order], part[order]
    used, firsts = np.unique(part, return_index=True)
    for k, piece in zip(used, np.split(entries, firsts[1:])):
      with open(names[k], 'ab') as file:
        piece.tofile(file)
  writer = RowsWriter(folder, dtype, num_columns)
  for k, name in enumerate(names):
    entries = np.zeros(0, ENTRY)
    if os.path.exists(name):
      entries = np.fromfile(name, ENTRY)
      os.remove(name)
    first = k * rows_each
    size = min(rows_each, num_rows - first)
    writer.add(
      scipy.sparse.coo_matrix(
        (entries['value'], (entries['row'] - first, entries['column'])),
        shape=(size, num_columns),
      ).tocsr()
    )
  return writer.close()
