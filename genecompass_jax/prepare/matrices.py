"""Matrices of counts, however they are stored, read by ranges of rows.

Dense, by rows (CSR) or by columns (CSC), in memory or in a file, integers or
floats: rows are read as they are asked for, a matrix is never loaded whole. One
stored by columns, that is by genes, has to be turned before its rows can be
read (`turning.py`).
"""

import dataclasses
import functools
from typing import Any, Protocol

import anndata
import h5py
import numpy as np
import scipy.sparse

from genecompass_jax import errors
from genecompass_jax.prepare import damage, sparse, turning

CHUNK_CELLS = 1024  # read at a time: buffers below 32 MiB are reused
CHUNK_BYTES = 128 << 20  # of a dense chunk
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
      parts.append(
        sparse.csr_of(dense[rows, columns], columns, indptr, num_columns)
      )
    if len(parts) == 1:
      return parts[0]
    return scipy.sparse.vstack(parts, format='csr')

  def sample(self) -> np.ndarray:
    """Values of whole rows."""
    num_rows, num_columns = self.shape
    size = max(1, _SAMPLED_DENSE // max(num_columns, 1))
    return sparse.places(self.array, num_rows, size)

  def by_rows(self, folder: str | None = None) -> 'Dense':
    """As it is."""
    del folder
    return self


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(sparse.Sparse):
  """A sparse matrix by columns (CSC), to be turned before it is read."""

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix, by turning all of it."""
    return self.by_rows().read(first, stop)

  def by_rows(self, folder: str | None = None) -> sparse.Rows:
    """The matrix by rows."""
    sparse.check(np.zeros(0), self.indptr, self.shape[0], self.num_entries)
    if folder is None and self.num_entries <= turning.TURN_IN_MEMORY:
      held = self.indices[:]
      sparse.check(held, self.indptr, self.shape[0])
      turned = scipy.sparse.csc_matrix(
        (self.data[:], held, self.indptr), shape=self.shape
      ).tocsr()  # entries of one place stay apart until they are read
      return sparse.Rows(turned.data, turned.indices, turned.indptr, self.shape)
    return turning.in_folder(
      functools.partial(turning.write_rows, self), folder
    )


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


def wrapped(matrix: object) -> Matrix:
  """A matrix of any kind that anndata knows.

  Raises:
    UserError: a sparse matrix in memory that contradicts itself.
  """
  if isinstance(matrix, Dense | sparse.Rows | Columns):
    return matrix
  if isinstance(matrix, h5py.Group) or _is_zarr(matrix, 'Group'):
    matrix = anndata.io.sparse_dataset(matrix)
  if hasattr(matrix, 'group') and hasattr(matrix, 'format'):
    group, shape = matrix.group, tuple(int(n) for n in matrix.shape)
    # offsets are small beside the entries and looked up at every read
    kind = Columns if matrix.format == 'csc' else sparse.Rows
    size, width = shape[::-1] if matrix.format == 'csc' else shape
    if group['indptr'].shape != (size + 1,):
      raise errors.UserError(
        'a sparse matrix has broken offsets: the file is damaged'
      )
    damage.check_stored(group, 'indptr')
    indptr = np.asarray(group['indptr'][:], np.int64)
    sparse.check_rows(indptr, width)
    return kind(group['data'], group['indices'], indptr, shape)
  if scipy.sparse.issparse(matrix):
    if matrix.format == 'csc':  # turning trusts its indices
      sparse.check(matrix.indices, matrix.indptr, matrix.shape[0])
    matrix = matrix.tocsr()
    return sparse.Rows(matrix.data, matrix.indices, matrix.indptr, matrix.shape)
  if isinstance(matrix, h5py.Dataset) or _is_zarr(matrix, 'Array'):
    return Dense(matrix)
  return Dense(np.asarray(matrix))


def _is_zarr(matrix: object, kind: str) -> bool:
  # by its name: zarr is imported by the one reader that needs it
  cls = type(matrix)
  return cls.__name__ == kind and cls.__module__.partition('.')[0] == 'zarr'
