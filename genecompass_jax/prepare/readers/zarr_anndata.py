"""AnnData in zarr stores, of zarr 2 and 3, as folders and zip files.

A chunk that is missing reads as zeros, silently. Those of sparse matrices and
of all labels that hold numbers of cells are counted, so that a store of which
a part was not copied is refused.
"""

import os
import zipfile
from typing import Any

from genecompass_jax import errors
from genecompass_jax.prepare import damage, source_config
from genecompass_jax.prepare.readers import h5ad, opened


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Reads the labels of an AnnData in a zarr store; counts stay on disk.

  Raises:
    UserError: no AnnData, a damaged store, or one with missing chunks.
  """
  path = config.path
  try:
    import zarr
  except ImportError:
    raise errors.UserError(
      f'{path}: zarr stores need zarr: pip install zarr'
    ) from None
  is_zip = not os.path.isdir(path)
  with damage.in_one_line(path, 'the zarr store'):
    place = zarr.storage.ZipStore(path, mode='r') if is_zip else path
    group = zarr.open_group(place, mode='r')
  if is_zip:
    _check_zip(path)
  with damage.in_one_line(path, 'the zarr store'):
    lacks = [name for name in ('obs', 'var') if name not in group]
  if lacks:
    raise errors.UserError(
      f'{path}: a zarr store without {lacks[0]}, so no AnnData; write it with '
      'AnnData.write_zarr'
    )
  files = (path,) if is_zip else files_below(path)
  for name in files if not is_zip else ():
    if os.path.basename(name) in ('zarr.json', '.zgroup', '.zarray'):
      damage.check_no_pointer(name)
  for part in ('X', 'raw/X', *(f'layers/{n}' for n in _names(path, group))):
    with damage.in_one_line(path, part):
      if part in group:
        _check_chunks(path, part, group[part])
  return h5ad.of_groups(config, group, files)


def _names(path: str, group: Any) -> list[str]:
  with damage.in_one_line(path, 'layers'):
    return list(group['layers']) if 'layers' in group else []


def _check_chunks(path: str, part: str, matrix: Any) -> None:
  """Refuses a sparse matrix of which chunks are missing."""
  if not hasattr(matrix, 'group_keys'):  # dense: a chunk of zeros is not stored
    return
  for name in ('indptr', 'indices', 'data'):
    array = matrix[name]
    if not array.size:
      continue
    # zarr writes no chunk that is all zeros: offsets of empty cells, entries
    # of the first gene alone
    missing = array.nchunks - array.nchunks_initialized
    if missing and not (name == 'indptr' and not matrix['data'].size):
      raise errors.UserError(
        f'{path}: {missing} of {array.nchunks} chunks of {part}/{name} are '
        'missing, or are all zeros; copy the store again'
      )


def _check_zip(path: str) -> None:
  with damage.in_one_line(path, 'the zip file'):
    with zipfile.ZipFile(path) as file:
      broken = file.testzip()  # its checksums
  if broken:
    raise errors.UserError(f'{path}: {broken} is damaged; copy the file again')


def files_below(folder: str) -> tuple[str, ...]:
  """All files of a folder and of those in it, sorted."""
  return tuple(
    sorted(
      os.path.join(place, name)
      for place, _, names in os.walk(folder)
      for name in names
    )
  )
