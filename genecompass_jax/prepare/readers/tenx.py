"""10x Genomics h5 files, of Cell Ranger 2 and of 3 and later.

Matrices lie by barcodes (columns of features x barcodes, in the words of the
file), so that ranges of cells are read at once. Cell Ranger 2 has a group for
each genome; later ones have one group `matrix` with kinds of features.
"""

import h5py
import numpy as np
import pandas as pd

from genecompass_jax import errors
from genecompass_jax.prepare import (
  damage,
  heaps,
  source_config,
  sparse,
)
from genecompass_jax.prepare.readers import barcodes, opened

V3 = 'matrix'


def genomes(path: str) -> tuple[str, ...]:
  """The genomes of a file, of which one has to be chosen where they are many.

  Raises:
    UserError: it cannot be read.
  """
  file = _file(path)
  with damage.in_one_line(path, 'the list of genomes'):
    if V3 not in file:
      return groups(file)
    features = _features(file[V3])
    if 'feature_type' in features:
      features = features[features['feature_type'] == barcodes.GENES]
    found, _ = barcodes.genomes_of(features)
    return tuple(sorted(set(found) - {''}))


def groups(file: h5py.File) -> tuple[str, ...]:
  """Groups that hold a matrix, genomes in files of Cell Ranger 2."""
  return tuple(
    sorted(
      name
      for name, group in file.items()
      if isinstance(group, h5py.Group) and 'barcodes' in group
    )
  )


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Reads barcodes and features of a 10x h5 file; counts stay on disk.

  Raises:
    UserError: damaged, no gene expression, or several genomes and none named.
  """
  path = config.path
  file = _file(path)
  with damage.in_one_line(path, 'the list of genomes'):
    names = (V3,) if V3 in file else groups(file)
  if not names:
    raise errors.UserError(f'{path}: no 10x h5 file: no matrix in it')
  name = names[0]
  if config.genome and name != V3 and config.genome not in names:
    raise errors.UserError(
      f'{path}: no genome {config.genome!r}; there are: {", ".join(names)}'
    )
  if len(names) > 1:
    if not config.genome:
      raise errors.UserError(
        f'{path}: holds genomes {", ".join(names)}; read one with --genome '
        f'{name}'
      )
    name = config.genome
  group = file[name]
  with damage.in_one_line(path, f'{name}/barcodes'):
    if 'barcodes' not in group:
      raise errors.UserError(f'{path}: {name} has no barcodes: it is damaged')
    damage.check_stored(group, 'barcodes')
    cells = _text(group['barcodes'])
  with damage.in_one_line(path, f'{name}/features'):
    features = _features(group)
  with damage.in_one_line(path, name):
    shape = tuple(int(n) for n in group['shape'][:])
    damage.check_stored(group, 'indptr')
    indptr = np.asarray(group['indptr'][:], np.int64)
    if shape != (len(features), len(cells)) or len(indptr) != len(cells) + 1:
      raise errors.UserError(
        f'{path}: {name} is {shape} with {len(indptr)} offsets, but there are '
        f'{len(features)} features and {len(cells)} barcodes: the file is '
        'damaged'
      )
    data, indices = group['data'], group['indices']
    if data.shape != indices.shape or data.ndim != 1:
      raise errors.UserError(
        f'{path}: {name} has {data.shape} values in {indices.shape} places: '
        'the file is damaged'
      )
    matrix = sparse.Rows(data, indices, indptr, shape[::-1])
    if len(cells):
      num_entries = matrix.num_entries
      sparse.check(np.zeros(0), indptr, shape[0], num_entries)
      sparse.check_rows(indptr, shape[0])
    return barcodes.of_matrix(config, matrix, cells, features, (path,))


def _file(path: str) -> h5py.File:
  damage.check_no_pointer(path)
  heaps.check(path)
  try:
    return h5py.File(path, 'r')
  except OSError as error:
    raise errors.UserError(
      f'{path}: a damaged HDF5 file ({errors.first_line(error)}); copy it again'
    ) from None


def _features(group: h5py.Group) -> pd.DataFrame:
  if 'features' not in group:  # Cell Ranger 2
    columns = {'id': 'genes', 'gene_name': 'gene_names'}
  else:
    group = group['features']
    columns = {
      'id': 'id',
      'gene_name': 'name',
      'feature_type': 'feature_type',
      'genome': 'genome',
    }
  for stored in columns.values():
    damage.check_stored(group, stored)
  texts = {
    name: _text(group[stored])
    for name, stored in columns.items()
    if stored in group or name in ('id', 'gene_name')
  }
  lengths = {name: len(text) for name, text in texts.items()}
  if len(set(lengths.values())) > 1:
    raise errors.UserError(
      f'features are of different lengths ({lengths}): the file is damaged'
    )
  return pd.DataFrame(texts)


def _text(dataset: h5py.Dataset) -> np.ndarray:
  values = dataset[:]
  if values.dtype.kind == 'O':
    values = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    return np.array(values, object)
  if values.dtype.kind != 'S':
    raise errors.UserError(f'{dataset.name} holds no text: the file is damaged')
  return np.char.decode(values, 'utf-8').astype(object)
