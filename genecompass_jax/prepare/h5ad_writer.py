"""An h5ad file that is written chunk by chunk, larger than memory."""

import os
from types import TracebackType

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse

_CHUNK = 1 << 16  # elements


class H5adWriter:
  """Appends cells; the file appears under its name when it is whole.

  Use as a context.

  Args:
    name: of the file.
    var: genes; their index names them.
    dtype: of the counts.
    compression: of the counts, as h5py knows it; None for none.
  """

  def __init__(
    self,
    name: str,
    var: pd.DataFrame,
    dtype: np.dtype = np.float32,
    compression: str | None = 'gzip',
  ):
    self._name, self._var = name, var
    self._file = h5py.File(f'{name}.part', 'w')
    group = self._file.create_group('X')
    self._arrays = {
      part: group.create_dataset(
        part,
        (0,),
        kind,
        maxshape=(None,),
        chunks=(_CHUNK,),
        compression=compression,
      )
      for part, kind in (('data', dtype), ('indices', np.int32))
    }
    self._offsets = [np.zeros(1, np.int64)]
    self._obs: list[pd.DataFrame] = []
    self.num_cells = 0

  def __enter__(self) -> 'H5adWriter':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if kind is None:
      self._close()
    else:
      self._file.close()
      os.remove(f'{self._name}.part')

  def add(self, matrix: scipy.sparse.csr_matrix, obs: pd.DataFrame) -> None:
    """Appends cells and their labels."""
    at = self._arrays['data'].shape[0]
    for part, array in self._arrays.items():
      array.resize((at + matrix.nnz,))
      array[at:] = getattr(matrix, part)
    self._offsets.append(at + matrix.indptr[1:].astype(np.int64))
    self._obs.append(obs)
    self.num_cells += matrix.shape[0]

  def _close(self) -> None:
    group = self._file['X']
    group['indptr'] = np.concatenate(self._offsets)
    group.attrs['encoding-type'] = 'csr_matrix'
    group.attrs['encoding-version'] = '0.1.0'
    group.attrs['shape'] = np.array([self.num_cells, len(self._var)])
    obs = pd.concat(self._obs)
    for column in obs.select_dtypes(object).columns:
      obs[column] = obs[column].astype('category')
    anndata.io.write_elem(self._file, 'obs', obs)
    anndata.io.write_elem(self._file, 'var', self._var)
    self._file.attrs['encoding-type'] = 'anndata'
    self._file.attrs['encoding-version'] = '0.1.0'
    self._file.close()
    os.replace(f'{self._name}.part', self._name)
