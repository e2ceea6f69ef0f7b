"""Which format a place is of, and its reader.

The format is found from the first bytes of a file, or the files of a folder.
"""

import dataclasses
import gzip
import os
import zipfile
import zlib

import h5py

from genecompass_jax import errors
from genecompass_jax.prepare import source_config
from genecompass_jax.prepare.readers import (
  h5ad,
  hf,
  mtx,
  opened,
  soma,
  stored,
  tenx,
  zarr_anndata,
)

_READERS = {
  'h5ad': h5ad.read,
  'zarr': zarr_anndata.read,
  '10x': tenx.read,
  'mtx': mtx.read,
  'soma': soma.read,
  'hf': hf.read,
  'corpus': stored.read,
}
_TAR = 257  # where a tar archive says what it is
# What a folder of Cell Ranger holds of use here: called cells, newest first.
_OF_CELL_RANGER = tuple(
  os.path.join(folder, name)
  for folder in ('outs', '')
  for name in (
    *('filtered_feature_bc_matrix.h5', 'filtered_feature_bc_matrix'),
    *('filtered_gene_bc_matrices_h5.h5', 'filtered_gene_bc_matrices'),
  )
)


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Opens the cells of a place, whatever its format.

  Raises:
    UserError: nothing there, no format that is known, or a damaged file.
  """
  return _READERS[find_format(config)](config)


def find_format(config: source_config.SourceConfig) -> str:
  """One of `source_config.FORMATS`, by what is in a file or folder.

  Raises:
    UserError: nothing there, an archive, or a folder of something else.
  """
  path = config.path
  if path.startswith(soma.SCHEME) or (
    config.format in ('soma', 'census') and not os.path.exists(path)
  ):
    return 'soma'
  if '://' in path:
    raise errors.UserError(f'{path}: copy the file here first')
  if not os.path.exists(path):
    raise errors.UserError(f'{path}: no such file')
  if config.format:
    return 'soma' if config.format == 'census' else config.format
  return _of_folder(path) if os.path.isdir(path) else _of_file(path)


def _of_folder(path: str) -> str:
  names = os.listdir(path)
  if {'manifest.json', 'vocabulary.tsv.gz'} <= set(names):
    return 'corpus'
  if {'zarr.json', '.zgroup', '.zattrs', '.zmetadata'} & set(names):
    return 'zarr'
  if any(name.startswith('__tiledb') or name == '__group' for name in names):
    return 'soma'
  if mtx.files_of(path):
    return 'mtx'
  endings = {os.path.splitext(name)[1] for name in names}
  if {'.arrow', '.parquet'} & endings or (
    {'state.json', 'dataset_dict.json'} & set(names)
  ):
    return 'hf'
  inside = [n for n in sorted(names) if n.endswith(('.h5', '.h5ad', '.zarr'))]
  inside += [
    n for n in _OF_CELL_RANGER if os.path.exists(os.path.join(path, n))
  ]
  hint = (
    f'; name what is in it: {os.path.join(path, inside[0])}' if inside else ''
  )
  raise errors.UserError(
    f'{path}: a folder, not an h5ad file, and no zarr store, mtx, SOMA or '
    f'Arrow folder{hint}'
  )


def _of_file(path: str) -> str:
  with open(path, 'rb') as file:
    head = file.read(512)
  if head[_TAR : _TAR + 5] == b'ustar':
    raise errors.UserError(
      f'{path}: an archive; unpack it with tar -xf and name what is in it'
    )
  if head[:2] == b'\x1f\x8b':
    return _of_gzip(path)
  if head[:4] == b'PK\x03\x04':
    return _of_zip(path)
  if head[:14].lower() == b'%%matrixmarket' or path.endswith('.mtx'):
    return 'mtx'
  if head[:4] in (b'PAR1', b'ARRO', b'\xff\xff\xff\xff') or path.endswith(
    ('.arrow', '.parquet')
  ):
    return 'hf'
  if not h5py.is_hdf5(path):
    return 'h5ad'  # which says what is wrong
  try:
    with h5py.File(path, 'r') as file:
      if 'obs' in file and 'var' in file:
        return 'h5ad'
      if tenx.V3 in file or tenx.groups(file):
        return '10x'
  except Exception:  # damaged, as the reader will say
    return 'h5ad'
  return 'h5ad'


def _of_gzip(path: str) -> str:
  try:
    with gzip.open(path) as file:
      head = file.read(512)
  except (OSError, EOFError, zlib.error):
    head = b''
  if head[_TAR : _TAR + 5] == b'ustar':
    raise errors.UserError(
      f'{path}: an archive; unpack it with tar -xzf and name what is in it'
    )
  if head[:8] == b'\x89HDF\r\n\x1a\n':
    raise errors.UserError(f'{path}: compressed; unpack it with gunzip first')
  return 'mtx'


def _of_zip(path: str) -> str:
  try:
    with zipfile.ZipFile(path) as file:
      names = file.namelist()
  except (zipfile.BadZipFile, OSError) as error:
    raise errors.UserError(
      f'{path}: a damaged zip file ({errors.first_line(error)}); copy it again'
    ) from None
  if {'zarr.json', '.zgroup'} & set(names):
    return 'zarr'
  raise errors.UserError(
    f'{path}: an archive; unpack it with unzip and name what is in it'
  )


def named_files(config: source_config.SourceConfig) -> list[str]:
  """Files and folders that cells are read from; they need not be there."""
  named = [config.path, config.obs_table, config.tokens]
  named += config.medians.split(',')
  if mtx.is_matrix(config.path):
    named += mtx.files_beside(config.path)
  return [name for name in named if name]


def expand(
  config: source_config.SourceConfig,
) -> list[source_config.SourceConfig]:
  """One configuration for each set of cells that measured the same genes.

  A census becomes its datasets, a 10x file or folder of several genomes the
  genomes, a folder of several matrices the matrices, a corpus its sources;
  anything else stays.

  Raises:
    UserError: as `read`.
  """
  kind = find_format(config)
  if kind == 'soma':
    return soma.expand(config)
  if kind == 'corpus':
    return stored.expand(config)
  if kind == 'mtx' and os.path.isdir(config.path):
    files = mtx.files_of(config.path)
    if len(files) > 1:
      parts = [
        dataclasses.replace(config, path=path, format='mtx') for path in files
      ]
      return [one for part in parts for one in expand(part)]
  if kind in ('10x', 'mtx') and not config.genome:
    found = (tenx if kind == '10x' else mtx).genomes(config.path)
    if len(found) > 1:
      return [
        dataclasses.replace(
          config, genome=genome, name=f'{config.label}-{genome}'
        )
        for genome in found
      ]
  return [config]
