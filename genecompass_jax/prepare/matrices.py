"""Matrices of counts, however they are stored, in chunks of rows.

Dense, CSR or CSC, in memory or in a file, integers or floats: a matrix is
streamed, never loaded whole. A CSC matrix is stored by genes: one of up to
`CSC_IN_MEMORY` entries is turned in memory, a larger one by way of a scratch
folder, in two passes. Of several matrices the one that looks like counts is
read.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterator

import anndata
import h5py
import numpy as np
import scipy.sparse

from genecompass_jax import errors

CHUNK_CELLS = 1024  # read at a time: buffers below 32 MiB are reused
CHUNK_BYTES = 128 << 20  # of a dense chunk
CSC_IN_MEMORY = 300_000_000  # entries: 3.6 GB, twice that while turning
LOG_MAX = 20.0  # log1p and log2 of counts and TPM stay below
_SAMPLED_ROWS = 256
_BASES = (np.e, 2.0, 10.0)  # of logarithms in use


@dataclasses.dataclass(frozen=True)
class _Backed:
  """A sparse matrix in a file: groups indptr, indices, data."""

  group: h5py.Group
  format: str
  shape: tuple[int, int]


def wrapped(matrix: object) -> object:
  """Brings the kinds of matrices that anndata knows to four."""
  if isinstance(matrix, h5py.Group):
    matrix = anndata.io.sparse_dataset(matrix)
  if isinstance(matrix, h5py.Dataset | np.ndarray):
    return matrix
  if hasattr(matrix, 'group') and hasattr(matrix, 'format'):
    return _Backed(matrix.group, matrix.format, tuple(matrix.shape))
  if scipy.sparse.issparse(matrix):
    if matrix.format == 'csr':
      return matrix
    if matrix.format == 'csc':  # turning trusts its indices
      _check_sparse(matrix.indices, matrix.indptr, matrix.shape[0])
    return matrix.tocsr()
  return np.asarray(matrix)


def is_sparse(matrix: object) -> bool:
  """Whether `parts` can be asked for."""
  return isinstance(matrix, _Backed) or scipy.sparse.issparse(matrix)


def parts(matrix: object) -> tuple:
  """data, indices and indptr of a sparse matrix, where they lie."""
  if isinstance(matrix, _Backed):
    return tuple(matrix.group[k] for k in ('data', 'indices', 'indptr'))
  return matrix.data, matrix.indices, matrix.indptr


def _sample(matrix: object) -> np.ndarray:
  """Some values of a matrix, from several places."""
  if is_sparse(matrix):
    data = parts(matrix)[0]
    size, length = 4096, data.shape[0]
  else:
    data = matrix
    length = data.shape[0]
    size = max(1, 65_536 // max(data.shape[1], 1))
  firsts = np.unique(np.linspace(0, max(length - size, 0), 8).astype(int))
  pieces = [np.asarray(data[a : a + size]).ravel() for a in firsts]
  return np.concatenate(pieces).astype(np.float64)


COUNTS = 'counts'
NON_INTEGER = 'non-integer values'
LOG = 'log-transformed values'
# Taken for logarithms, unless the user says that they are corrected counts.
SMALL = 'small non-integer values, log-transformed or corrected counts'


def kind_of(matrix: object) -> str:
  """What a sample of the values looks like: counts, or what is wrong."""
  if is_sparse(matrix):
    dtype = parts(matrix)[0].dtype
  else:
    dtype = matrix.dtype
  if dtype.kind not in 'biuf' or len(matrix.shape) != 2:
    return f'values of type {dtype} in {len(matrix.shape)} dimensions'
  values = _sample(matrix)
  if not np.isfinite(values).all():
    return 'values that are not finite'
  if (values < 0).any():
    return 'negative values (scaled data?)'
  if (values % 1 == 0).all():
    return COUNTS
  if values.max(initial=0) >= LOG_MAX:
    return NON_INTEGER
  return LOG if _looks_log(matrix) else SMALL


def _looks_log(matrix: object) -> bool:
  """Whether values below `LOG_MAX` are logarithms, by a sample of rows.

  Logarithms of UMI counts show once they are undone: the values of a cell are whole
  multiples of its smallest one (also where genes were selected, and where they
  were rounded), or all cells have one sum. Corrected counts do neither.
  """
  rows = _sample_rows(matrix)
  for base in _BASES:
    undone = [np.power(base, row) - 1 for row in rows]
    sums = np.array([row.sum() for row in undone])
    if len(sums) > 9 and sums.std() < 0.02 * sums.mean():
      return True
    if rows and _whole_share(undone) > max(0.8, _whole_share(rows)):
      return True
  return False


def _whole_share(rows: list[np.ndarray]) -> float:
  """Share of values that are a whole multiple, from 2 to 20, of the least."""
  ratios = np.concatenate([row / row.min() for row in rows])
  ratios = ratios[(ratios > 1.5) & (ratios < 20.5)]
  if not len(ratios):
    return 0.0
  return float((np.abs(ratios - np.rint(ratios)) < 0.05).mean())


def _sample_rows(matrix: object) -> list[np.ndarray]:
  """Non-zero values of some rows, whole rows, from several places."""
  if isinstance(matrix, _Backed) and matrix.format == 'csc':
    if parts(matrix)[0].shape[0] > CSC_IN_MEMORY // 16:
      return []
    chunks = _csc_chunks(matrix, matrix.shape[0], None)
    matrix = scipy.sparse.vstack([chunk for _, chunk in chunks], format='csr')
  num = min(_SAMPLED_ROWS, matrix.shape[0])
  chosen = np.unique(np.linspace(0, matrix.shape[0] - 1, num).astype(int))
  if is_sparse(matrix):
    data, _, indptr = parts(matrix)
    indptr = np.asarray(indptr[:], np.int64)
    rows = [np.asarray(data[indptr[r] : indptr[r + 1]]) for r in chosen]
  else:
    rows = [np.asarray(matrix[r]) for r in chosen]
  rows = [row[row > 0].astype(np.float64) for row in rows]
  return [row for row in rows if len(row)]


def choose_layer(
  name: str, matrices: dict[str, tuple], asked: str, allow_noninteger: bool
) -> tuple[str, str, bool]:
  """The matrix to read, why, and whether its values are no integers."""
  if not matrices:
    raise errors.UserError(f'{name}: no X, raw or layer')
  kinds = {key: kind_of(matrix) for key, (matrix, _) in matrices.items()}
  good = [key for key, kind in kinds.items() if kind == COUNTS]
  if asked and asked not in matrices:
    if f'layers/{asked}' not in matrices:
      raise errors.UserError(
        f'{name}: no layer {asked!r}; there are: {", ".join(matrices)}'
      )
    asked = f'layers/{asked}'
  accepted = [COUNTS] + [NON_INTEGER, SMALL] * allow_noninteger
  if asked:
    if kinds[asked] in accepted:
      reason = f'{asked}, as asked: {kinds[asked]}'
      return asked, reason, kinds[asked] != COUNTS
    raise errors.UserError(
      f'{name}: {asked} holds {kinds[asked]}; {_advice(kinds[asked], good)}'
    )
  usable = good or [key for key, kind in kinds.items() if kind in accepted]
  if not usable:
    described = ', '.join(f'{key} holds {kind}' for key, kind in kinds.items())
    only = next(iter(kinds.values())) if len(kinds) == 1 else ''
    worth = next((k for k in (NON_INTEGER, SMALL) if k in kinds.values()), only)
    raise errors.UserError(
      f'{name}: no counts here: {described}; {_advice(worth, good)}'
    )
  best = max(
    usable, key=lambda key: matrices[key][0].shape[1]
  )  # first of equal
  others = ', '.join(f'{key} {kinds[key]}' for key in kinds if key != best)
  reason = f'{best} looks like {kinds[best]}'
  reason += f' (besides: {others})' if others else ''
  return best, reason, kinds[best] != COUNTS


def _advice(kind: str, good: list[str]) -> str:
  if good:
    return f'{" and ".join(good)} looks like counts: pass --layer {good[0]}'
  if kind == NON_INTEGER:
    return 'pass --allow_noninteger if they are corrected counts'
  if kind == SMALL:
    return (
      'a file with the raw counts is needed, or --allow_noninteger if they are '
      'corrected counts'
    )
  return 'a file with the raw counts is needed'


def row_chunks(
  matrix: object, cells: int, scratch: str | None
) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
  """Yields (first row, CSR) over all rows."""
  num_rows, num_columns = matrix.shape
  if isinstance(matrix, _Backed) and matrix.format == 'csc':
    yield from _csc_chunks(matrix, cells, scratch)
    return
  if is_sparse(matrix):
    data, indices, indptr = parts(matrix)
    indptr = np.asarray(indptr[:], np.int64)
    for first in range(0, num_rows, cells):
      last = min(first + cells, num_rows)
      a, b = indptr[first], indptr[last]
      yield (
        first,
        _csr(
          data[a:b], indices[a:b], indptr[first : last + 1] - a, num_columns
        ),
      )
    return
  width = max(num_columns * np.dtype(matrix.dtype).itemsize, 1)
  cells = int(np.clip(CHUNK_BYTES // width, 1, cells))
  for first in range(0, num_rows, cells):
    dense = np.asarray(matrix[first : first + cells])
    rows, columns = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(len(dense) + 1))
    yield first, _csr(dense[rows, columns], columns, indptr, num_columns)


def _csr(data, indices, indptr, num_columns) -> scipy.sparse.csr_matrix:
  # without scipy's checks, which look at every entry; bounds matter below
  indices = np.asarray(indices)
  _check_sparse(indices, indptr, num_columns)
  matrix = scipy.sparse.csr_matrix((len(indptr) - 1, num_columns))
  matrix.data, matrix.indices = np.asarray(data), indices
  matrix.indptr = np.asarray(indptr)
  if not matrix.has_canonical_format:  # genes out of order, or one twice
    matrix.data = matrix.data.copy()  # the caller's are not touched
    matrix.indices = matrix.indices.astype(np.int64)
    matrix.indptr = matrix.indptr.astype(np.int64)
    matrix.sum_duplicates()
  return matrix


def _check_sparse(
  indices: np.ndarray, indptr: np.ndarray, size: int, num_entries: int = -1
) -> None:
  """Refuses what would read or write beyond the end of an array."""
  if len(indices) and not (indices.min() >= 0 and indices.max() < size):
    raise errors.UserError(
      'a sparse matrix has indices outside of its shape: the file is damaged'
    )
  num_entries = len(indices) if num_entries < 0 else num_entries
  if indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] != num_entries:
    raise errors.UserError(
      'a sparse matrix has broken offsets: the file is damaged'
    )


_ENTRY = np.dtype([('row', '<i4'), ('column', '<i4'), ('value', '<f8')])


def _csc_chunks(
  matrix: _Backed, cells: int, scratch: str | None
) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
  """Rows of a matrix that is stored by columns."""
  data, indices, indptr = parts(matrix)
  indptr = np.asarray(indptr[:], np.int64)
  num_rows, num_columns = matrix.shape
  _check_sparse(np.zeros(0), indptr, num_rows, data.shape[0])
  if data.shape[0] <= CSC_IN_MEMORY:
    held = indices[:]
    _check_sparse(held, indptr, num_rows)
    turned = scipy.sparse.csc_matrix(
      (data[:], held, indptr), shape=matrix.shape
    ).tocsr()
    yield from row_chunks(turned, cells, scratch)
    return
  slab = max(CSC_IN_MEMORY // 16, 1)  # entries held at a time
  num_parts = -(-data.shape[0] // slab)
  rows_each = -(-num_rows // num_parts)
  rows_each = -(-rows_each // cells) * cells
  with tempfile.TemporaryDirectory(dir=scratch) as folder:
    names = [
      os.path.join(folder, str(k)) for k in range(-(-num_rows // rows_each))
    ]
    for a in range(0, data.shape[0], slab):
      b = min(a + slab, data.shape[0])
      entries = np.empty(b - a, _ENTRY)
      entries['row'], entries['value'] = indices[a:b], data[a:b]
      _check_sparse(entries['row'], np.array([0, b - a]), num_rows)
      columns = np.searchsorted(indptr, np.arange(a, b), side='right') - 1
      entries['column'] = columns
      part = entries['row'] // rows_each
      entries = entries[np.argsort(part, kind='stable')]
      ends = np.cumsum(np.bincount(part, minlength=len(names)))
      for name, piece in zip(names, np.split(entries, ends[:-1])):
        with open(name, 'ab') as file:
          piece.tofile(file)
    for k, name in enumerate(names):
      entries = np.fromfile(name, _ENTRY)
      first = k * rows_each
      size = min(rows_each, num_rows - first)
      turned = scipy.sparse.coo_matrix(
        (entries['value'], (entries['row'] - first, entries['column'])),
        shape=(size, num_columns),
      ).tocsr()
      for inner, chunk in row_chunks(turned, cells, scratch):
        yield first + inner, chunk
      os.remove(name)
