"""Matrices of counts, however they are stored, read by ranges of rows.

Dense, by rows (CSR) or by columns (CSC), in memory or in a file, integers or
floats: rows are read as they are asked for, a matrix is never loaded whole. One
stored by columns, that is by genes, has to be turned before its rows can be
read: in memory up to `TURN_IN_MEMORY` entries, else by way of a folder, in two
passes.
"""

import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, Protocol

import anndata
import h5py
import numpy as np
import scipy.sparse

from genecompass_jax import errors

CHUNK_CELLS = 1024  # read at a time: buffers below 32 MiB are reused
CHUNK_BYTES = 128 << 20  # of a dense chunk
TURN_IN_MEMORY = 300_000_000  # entries: 3.6 GB, twice that while turning
_SAMPLED = 4096  # values in one place
_SAMPLED_DENSE = 65_536  # with the zeros


class Matrix(Protocol):
  """Cells x genes, read by ranges of rows.

  Attributes:
    shape: cells and genes.
    dtype: of the values.
    num_entries: stored entries; of a dense matrix a guess, a tenth of it.
  """

  shape: tuple[int, int]
  dtype: np.dtype
  num_entries: int

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix, each with ascending columns.

    Raises:
      UserError: the stored matrix contradicts itself.
    """

  def sample(self) -> np.ndarray:
    """Some of the values, zeros maybe among them, from several places."""

  def by_rows(self, folder: str | None = None) -> 'Matrix':
    """The same matrix, such that `read` is quick.

    Args:
      folder: for the files of one that has to be turned, made if missing; the
        files are used again when they are there and whole. None: in memory,
        or in a folder that goes with the process.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
  """A two-dimensional array in memory or in a file."""

  array: Any

  @property
  def shape(self) -> tuple[int, int]:
    """Cells and genes."""
    return tuple(self.array.shape)

  @property
  def dtype(self) -> np.dtype:
    """Of the values."""
    return np.dtype(self.array.dtype)

  @property
  def num_entries(self) -> int:
    """A guess: a tenth is not zero."""
    return int(np.prod(self.array.shape)) // 10

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix."""
    num_columns = self.shape[1]
    width = max(num_columns * self.dtype.itemsize, 1)
    step = int(np.clip(CHUNK_BYTES // width, 1, max(stop - first, 1)))
    parts = []
    for a in range(first, stop, step):
      dense = np.asarray(self.array[a : min(a + step, stop)])
      rows, columns = np.nonzero(dense)
      indptr = np.searchsorted(rows, np.arange(len(dense) + 1))
      parts.append(_csr(dense[rows, columns], columns, indptr, num_columns))
    if len(parts) == 1:
      return parts[0]
    return scipy.sparse.vstack(parts, format='csr')

  def sample(self) -> np.ndarray:
    """Values of whole rows."""
    num_rows, num_columns = self.shape
    size = max(1, _SAMPLED_DENSE // max(num_columns, 1))
    return _places(self.array, num_rows, size)

  def by_rows(self, folder: str | None = None) -> 'Dense':
    """As it is."""
    del folder
    return self


@dataclasses.dataclass(frozen=True, eq=False)
class _Sparse:
  """What both kinds of sparse matrices have; parts are anything with slices."""

  data: Any
  indices: Any
  indptr: np.ndarray
  shape: tuple[int, int]

  @property
  def dtype(self) -> np.dtype:
    """Of the values."""
    return np.dtype(self.data.dtype)

  @property
  def num_entries(self) -> int:
    """Stored entries."""
    return int(self.data.shape[0])

  def sample(self) -> np.ndarray:
    """Stored values."""
    return _places(self.data, self.num_entries, _SAMPLED)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(_Sparse):
  """A sparse matrix by rows (CSR)."""

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix."""
    a, b = self.indptr[first], self.indptr[stop]
    indptr = self.indptr[first : stop + 1] - a
    return _csr(self.data[a:b], self.indices[a:b], indptr, self.shape[1])

  def by_rows(self, folder: str | None = None) -> 'Rows':
    """As it is."""
    del folder
    return self


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(_Sparse):
  """A sparse matrix by columns (CSC), to be turned before it is read."""

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix, by turning all of it."""
    return self.by_rows().read(first, stop)

  def by_rows(self, folder: str | None = None) -> Rows:
    """The matrix by rows."""
    check_sparse(np.zeros(0), self.indptr, self.shape[0], self.num_entries)
    if folder is None and self.num_entries <= TURN_IN_MEMORY:
      held = self.indices[:]
      check_sparse(held, self.indptr, self.shape[0])
      turned = scipy.sparse.csc_matrix(
        (self.data[:], held, self.indptr), shape=self.shape
      ).tocsr()  # entries of one place stay apart until they are read
      return Rows(turned.data, turned.indices, turned.indptr, self.shape)
    return in_folder(functools.partial(write_rows, self), folder)


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
  """Some rows and columns of another matrix.

  Attributes:
    matrix: the other one.
    rows: ascending row numbers of it; None for all.
    columns: ascending column numbers of it; None for all.
  """

  matrix: Matrix
  rows: np.ndarray | None = None
  columns: np.ndarray | None = None

  @property
  def shape(self) -> tuple[int, int]:
    """Cells and genes that were selected."""
    rows, columns = self.matrix.shape
    return (
      rows if self.rows is None else len(self.rows),
      columns if self.columns is None else len(self.columns),
    )

  @property
  def dtype(self) -> np.dtype:
    """Of the values."""
    return self.matrix.dtype

  @property
  def num_entries(self) -> int:
    """A guess: entries are spread evenly over the other matrix."""
    whole = max(int(np.prod(self.matrix.shape)), 1)
    return int(self.matrix.num_entries * (np.prod(self.shape) / whole))

  @property
  def is_turned(self) -> bool:
    """Whether reading it turns all of the other matrix first."""
    return is_turned(self.matrix)

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix."""
    if self.rows is None:
      return self._columns_of(self.matrix.read(first, stop))
    rows = self.rows[first:stop]
    if not len(rows):
      return scipy.sparse.csr_matrix((0, self.shape[1]), dtype=self.dtype)
    # pieces of the other matrix, and never more of it than is asked for here
    size = max(CHUNK_CELLS, stop - first)
    parts = []
    for a in range(rows[0], rows[-1] + 1, size):
      inside = rows[(rows >= a) & (rows < a + size)]
      if len(inside):
        low, high = inside[0], inside[-1] + 1
        parts.append(
          self._columns_of(self.matrix.read(low, high)[inside - low])
        )
    return scipy.sparse.vstack(parts, format='csr')

  def _columns_of(self, rows) -> scipy.sparse.csr_matrix:
    return rows if self.columns is None else rows[:, self.columns]

  def sample(self) -> np.ndarray:
    """Values of the other matrix."""
    return self.matrix.sample()

  def by_rows(self, folder: str | None = None) -> 'Selected':
    """The same part of the other matrix by rows."""
    return dataclasses.replace(self, matrix=self.matrix.by_rows(folder))


def is_turned(matrix: Matrix) -> bool:
  """Whether `read` goes through all of a matrix, unless `by_rows` was first."""
  return isinstance(matrix, Columns) or getattr(matrix, 'is_turned', False)


def in_folder(write: Any, folder: str | None) -> Rows:
  """What `write(folder)` gives; without one, in a folder that goes with it."""
  if folder is not None:
    return write(folder)
  place = tempfile.TemporaryDirectory(prefix='genecompass-turned-')
  rows = write(place.name)
  object.__setattr__(rows, '_place', place)  # goes when the matrix goes
  return rows


def wrapped(matrix: object) -> Matrix:
  """A matrix of any kind that anndata knows.

  Raises:
    UserError: a sparse matrix in memory that contradicts itself.
  """
  if isinstance(matrix, Dense | Rows | Columns):
    return matrix
  if isinstance(matrix, h5py.Group) or _is_zarr(matrix, 'Group'):
    matrix = anndata.io.sparse_dataset(matrix)
  if hasattr(matrix, 'group') and hasattr(matrix, 'format'):
    group, shape = matrix.group, tuple(int(n) for n in matrix.shape)
    # offsets are small beside the entries and looked up at every read
    indptr = np.asarray(group['indptr'][:], np.int64)
    kind = Columns if matrix.format == 'csc' else Rows
    size = shape[1 if matrix.format == 'csc' else 0]
    if len(indptr) != size + 1:
      raise errors.UserError(
        'a sparse matrix has broken offsets: the file is damaged'
      )
    return kind(group['data'], group['indices'], indptr, shape)
  if scipy.sparse.issparse(matrix):
    if matrix.format == 'csc':  # turning trusts its indices
      check_sparse(matrix.indices, matrix.indptr, matrix.shape[0])
    matrix = matrix.tocsr()
    return Rows(matrix.data, matrix.indices, matrix.indptr, matrix.shape)
  if isinstance(matrix, h5py.Dataset) or _is_zarr(matrix, 'Array'):
    return Dense(matrix)
  return Dense(np.asarray(matrix))


def _is_zarr(matrix: object, kind: str) -> bool:
  # by its name: zarr is imported by the one reader that needs it
  cls = type(matrix)
  return cls.__name__ == kind and cls.__module__.partition('.')[0] == 'zarr'


def csr(
  rows: np.ndarray,
  columns: np.ndarray,
  values: np.ndarray,
  shape: tuple[int, int],
) -> scipy.sparse.csr_matrix:
  """Entries in any order -> rows with ascending columns, duplicates summed.

  Raises:
    UserError: an entry outside of the shape.
  """
  for numbers, size in ((rows, shape[0]), (columns, shape[1])):
    check_sparse(numbers, np.array([0, len(numbers)]), size)
  return scipy.sparse.coo_matrix((values, (rows, columns)), shape).tocsr()


def _places(values: Any, length: int, size: int) -> np.ndarray:
  """Slices of `size` from eight places, one after the other."""
  firsts = np.unique(np.linspace(0, max(length - size, 0), 8).astype(int))
  pieces = [np.asarray(values[a : a + size]).ravel() for a in firsts]
  return np.concatenate(pieces).astype(np.float64)


def _csr(data, indices, indptr, num_columns) -> scipy.sparse.csr_matrix:
  # without scipy's checks, which look at every entry; bounds matter below
  indices = np.asarray(indices)
  check_sparse(indices, indptr, num_columns)
  matrix = scipy.sparse.csr_matrix((len(indptr) - 1, num_columns))
  matrix.data, matrix.indices = np.asarray(data), indices
  matrix.indptr = np.asarray(indptr)
  if not matrix.has_canonical_format:  # genes out of order, or one twice
    matrix.data = matrix.data.astype(_wide(matrix.dtype))  # a copy
    matrix.indices = matrix.indices.astype(np.int64)
    matrix.indptr = matrix.indptr.astype(np.int64)
    matrix.sum_duplicates()
  return matrix


def _wide(dtype: np.dtype) -> np.dtype:
  """Of sums: two counts of one place may be more than a byte holds."""
  is_small = dtype.kind in 'biu' and dtype.itemsize < 4
  return np.dtype(np.int32) if is_small else np.dtype(dtype)


def check_sparse(
  indices: np.ndarray, indptr: np.ndarray, size: int, num_entries: int = -1
) -> None:
  """Refuses what would read or write beyond the end of an array.

  Raises:
    UserError: indices beyond `size`, or offsets that do not ascend from 0 to
      the number of entries (of `indices`, where it is -1).
  """
  if len(indices) and not (indices.min() >= 0 and indices.max() < size):
    raise errors.UserError(
      'a sparse matrix has indices outside of its shape: the file is damaged'
    )
  num_entries = len(indices) if num_entries < 0 else num_entries
  if indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] != num_entries:
    raise errors.UserError(
      'a sparse matrix has broken offsets: the file is damaged'
    )


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
  ) -> Rows | None:
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
    return Rows(data, indices, indptr, shape)

  def add(self, rows: scipy.sparse.csr_matrix) -> None:
    """Appends rows."""
    rows.data.astype(self._dtype, copy=False).tofile(self._data)
    rows.indices.astype(np.int32, copy=False).tofile(self._indices)
    self._counts.append(np.diff(rows.indptr))

  def close(self) -> Rows:
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


def write_rows(matrix: Columns, folder: str) -> Rows:
  """Turns a matrix into files in a folder, or finds it turned there."""
  slab = max(TURN_IN_MEMORY // 16, 1)  # entries held at a time
  return write_entries(
    lambda: _entries(matrix, slab),
    matrix.num_entries,
    matrix.shape,
    _wide(matrix.dtype),
    folder,
    slab,
  )


def _entries(matrix: Columns, slab: int) -> Iterator[np.ndarray]:
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
) -> Rows:
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
      check_sparse(entries[column], np.array([0, len(entries)]), size)
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
