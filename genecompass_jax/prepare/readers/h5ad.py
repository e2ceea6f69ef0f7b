"""h5ad files: AnnData in HDF5."""

import os

import anndata
import h5py

from genecompass_jax import errors
from genecompass_jax.prepare import damage, heaps, matrices, source_config
from genecompass_jax.prepare.readers import opened


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Reads the labels of an h5ad file; counts stay on disk.

  Raises:
    UserError: not an h5ad file, or a damaged one.
  """
  path = config.path
  _check_file(path)
  heaps.check(path)
  try:
    file = h5py.File(path, 'r')
  except OSError as error:
    raise errors.UserError(
      f'{path}: a damaged HDF5 file ({error}); copy it again'
    ) from None
  if 'obs' not in file or 'var' not in file:
    what = 'a 10x h5 file' if 'matrix' in file else 'no AnnData'
    raise errors.UserError(
      f'{path}: {what}; read it with scanpy and write it with write_h5ad'
    )
  if isinstance(file['obs'], h5py.Dataset):
    raise errors.UserError(
      f'{path}: written by anndata before 0.7; read it with anndata and write '
      'it again'
    )
  return of_groups(config, file, (path,))


def of_groups(
  config: source_config.SourceConfig, file: object, files: tuple[str, ...]
) -> opened.Opened:
  """What an open HDF5 file or zarr group in the layout of AnnData holds."""
  path = config.path
  for part in ('obs', 'var', 'raw/var'):
    with damage.in_one_line(path, part):
      damage.check_stored(file, part)
      if isinstance(file, h5py.File):
        heaps.check_types(file, part)
  with damage.in_one_line(path, 'obs'):
    obs = anndata.io.read_elem(file['obs'])
  with damage.in_one_line(path, 'var'):
    var = anndata.io.read_elem(file['var'])
  layers = {}
  if 'X' in file:
    with damage.in_one_line(path, 'X'):
      layers['X'] = matrices.wrapped(file['X']), var
  if 'raw' in file and 'X' in file['raw']:
    with damage.in_one_line(path, 'raw'):
      raw_var = var
      if 'var' in file['raw']:
        raw_var = anndata.io.read_elem(file['raw/var'])
      layers['raw'] = matrices.wrapped(file['raw/X']), raw_var
  with damage.in_one_line(path, 'layers'):
    names = [str(name) for name in file.get('layers', ())]
  for name in names:
    try:
      layers[f'layers/{name}'] = matrices.wrapped(file['layers'][name]), var
    except Exception as error:  # one that is not asked for does no harm
      if config.layer in (name, f'layers/{name}'):
        raise damage.damaged(path, f'layers/{name}', error) from error
  return opened.Opened(obs, layers, files)


def _check_file(path: str) -> None:
  if '://' in path:
    raise errors.UserError(f'{path}: copy the file here first')
  if not os.path.exists(path):
    raise errors.UserError(f'{path}: no such file')
  if os.path.isdir(path):
    raise errors.UserError(f'{path}: a folder, not an h5ad file')
  if not h5py.is_hdf5(path):
    damage.check_no_pointer(path)
    if not os.path.getsize(path):
      raise errors.UserError(f'{path}: an empty file; copy it again')
    raise errors.UserError(
      f'{path}: not an h5ad (HDF5) file; read a table of text with scanpy and '
      'write it with write_h5ad, copy a damaged file again'
    )
