"""Sparse matrices of which ranges of rows are read, and what makes them safe."""

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse

from genecompass_jax import errors

_SAMPLED = 4096  # values in one place
_MOST_TIMES = 100  # that a column stands in a row


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
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
    return places(self.data, self.num_entries, _SAMPLED)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Sparse):
  """A sparse matrix by rows (CSR)."""

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix."""
    a, b = self.indptr[first], self.indptr[stop]
    indptr = self.indptr[first : stop + 1] - a
    return csr_of(self.data[a:b], self.indices[a:b], indptr, self.shape[1])

  def by_rows(self, folder: str | None = None) -> 'Rows':
    """As it is."""
    del folder
    return self


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
    check(numbers, np.array([0, len(numbers)]), size)
  return scipy.sparse.coo_matrix((values, (rows, columns)), shape).tocsr()


def csr_of(data, indices, indptr, num_columns) -> scipy.sparse.csr_matrix:
  """Rows of stored arrays, with ascending columns, each once.

  Raises:
    UserError: see `check`.
  """
  # without scipy's checks, which look at every entry; bounds matter below
  indices = np.asarray(indices)
  check(indices, indptr, num_columns)
  matrix = scipy.sparse.csr_matrix((len(indptr) - 1, num_columns))
  matrix.data, matrix.indices = np.asarray(data), indices
  matrix.indptr = np.asarray(indptr)
  if not matrix.has_canonical_format:  # genes out of order, or one twice
    matrix.data = matrix.data.astype(wide(matrix.dtype))  # a copy
    matrix.indices = matrix.indices.astype(np.int64)
    matrix.indptr = matrix.indptr.astype(np.int64)
    matrix.sum_duplicates()
  return matrix


def wide(dtype: np.dtype) -> np.dtype:
  """Of sums: two counts of one place may be more than a byte holds."""
  is_small = dtype.kind in 'biu' and dtype.itemsize < 4
  return np.dtype(np.int32) if is_small else np.dtype(dtype)


def check(
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


def check_rows(indptr: np.ndarray, num_columns: int) -> None:
  """Refuses rows of far more entries than there are columns.

  A column may stand in a row more than once; what stands there a hundred times
  is no matrix, and would be read into memory whole.

  Raises:
    UserError: there is such a row.
  """
  most = int(np.diff(indptr).max(initial=0))
  if most > _MOST_TIMES * max(num_columns, 1):
    raise errors.UserError(
      f'a sparse matrix has {most:,} entries in a line of {num_columns:,} '
      'places: the file is damaged'
    )


def places(values: Any, length: int, size: int) -> np.ndarray:
  """Slices of `size` from eight places, one after the other."""
  firsts = np.unique(np.linspace(0, max(length - size, 0), 8).astype(int))
  pieces = [np.asarray(values[a : a + size]).ravel() for a in firsts]
  return np.concatenate(pieces).astype(np.float64)
