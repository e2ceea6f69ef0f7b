"""Writes an AnnData in every format that cells are read from.

As the official writers do it, where they can be used without Cell Ranger:
anndata for zarr, tiledbsoma for SOMA, datasets for Arrow (pyarrow writes the
same files where datasets is not installed). 10x files follow the layout of
Cell Ranger 2 and 3 (v3: `matrix/features`, gzip, int32 counts).
"""

import gzip
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import scipy.sparse

MAX_GENES = 2048


def write_zarr(adata: anndata.AnnData, path: str, version: int = 3) -> None:
  """A zarr store; a zip file where its name ends so."""
  anndata.settings.zarr_write_format = version
  folder = path.removesuffix('.zip')
  adata.write_zarr(folder)
  if folder != path:
    with zipfile.ZipFile(path, 'w') as file:
      for place, _, names in sorted(os.walk(folder)):
        for name in names:
          name = os.path.join(place, name)
          file.write(name, os.path.relpath(name, folder))
    shutil.rmtree(folder)


def write_10x(
  adata: anndata.AnnData,
  path: str,
  genome: str | Sequence[str] = 'GRCh38',
  kinds: Sequence[str] | None = None,
) -> None:
  """The layout of Cell Ranger 3 and later."""
  num_genes = adata.n_vars
  genomes = [genome] * num_genes if isinstance(genome, str) else genome
  counts = scipy.sparse.csr_matrix(adata.X)
  with h5py.File(path, 'w') as file:
    file.attrs['filetype'] = 'matrix'
    file.attrs['version'] = 2
    group = file.create_group('matrix')
    _write_matrix(group, counts, adata.obs_names)
    features = group.create_group('features')
    for name, values in (
      ('id', adata.var_names),
      ('name', _symbols(adata)),
      ('feature_type', kinds or ['Gene Expression'] * num_genes),
      ('genome', genomes),
    ):
      features[name] = np.array([str(v).encode() for v in values])
    features['_all_tag_keys'] = np.array([b'genome'])


def write_10x_v2(parts: dict[str, anndata.AnnData], path: str) -> None:
  """The layout of Cell Ranger 2: a group for each genome."""
  with h5py.File(path, 'w') as file:
    for genome, adata in parts.items():
      group = file.create_group(genome)
      counts = scipy.sparse.csr_matrix(adata.X)
      _write_matrix(group, counts, adata.obs_names)
      group['genes'] = np.array([v.encode() for v in adata.var_names])
      group['gene_names'] = np.array([v.encode() for v in _symbols(adata)])


def _write_matrix(group: h5py.Group, counts, barcodes) -> None:
  how = {'chunks': True, 'compression': 'gzip', 'compression_opts': 4}
  how = how if counts.nnz else {}
  group['barcodes'] = np.array([str(b).encode() for b in barcodes])
  group.create_dataset('data', data=counts.data.astype(np.int32), **how)
  group.create_dataset('indices', data=counts.indices.astype(np.int64), **how)
  group['indptr'] = counts.indptr.astype(np.int64)
  group['shape'] = np.array(counts.shape[::-1], np.int32)


def write_mtx(
  adata: anndata.AnnData,
  folder: str,
  prefix: str = '',
  packed: bool = True,
  version: int = 3,
  kinds: Sequence[str] | None = None,
) -> None:
  """Files of Cell Ranger (genes first, cell by cell), packed or not."""
  os.makedirs(folder, exist_ok=True)
  end = '.gz' if packed else ''
  opener = gzip.open if packed else open
  counts = scipy.sparse.csr_matrix(adata.X)
  cells = np.repeat(np.arange(adata.n_obs), np.diff(counts.indptr))
  entries = pd.DataFrame(
    {
      'gene': counts.indices + 1,
      'cell': cells + 1,
      'count': counts.data.astype(np.int64),
    }
  )
  name = os.path.join(folder, f'{prefix}matrix.mtx{end}')
  with opener(name, 'wt') as file:
    file.write(
      '%%MatrixMarket matrix coordinate integer general\n'
      '%metadata_json: {"software_version": "cellranger"}\n'
      f'{adata.n_vars} {adata.n_obs} {counts.nnz}\n'
    )
    entries.to_csv(file, sep=' ', header=False, index=False)
  with opener(os.path.join(folder, f'{prefix}barcodes.tsv{end}'), 'wt') as file:
    file.writelines(f'{name}\n' for name in adata.obs_names)
  table = 'features' if version == 3 else 'genes'
  with opener(os.path.join(folder, f'{prefix}{table}.tsv{end}'), 'wt') as file:
    kinds = kinds or ['Gene Expression'] * adata.n_vars
    for gene, symbol, kind in zip(adata.var_names, _symbols(adata), kinds):
      file.write(f'{gene}\t{symbol}' + f'\t{kind}\n' * (version == 3))
      file.write('\n' * (version != 3))


def _symbols(adata: anndata.AnnData) -> list[str]:
  for name in ('gene_name', 'feature_name'):
    if name in adata.var:
      return [str(v) for v in adata.var[name]]
  return [str(v) for v in adata.var_names]


def write_soma(adata: anndata.AnnData, path: str) -> None:
  """A SOMA experiment, by tiledbsoma's own writer."""
  import tiledbsoma.io

  tiledbsoma.io.from_anndata(path, adata, measurement_name='RNA')


def ranked_cells(
  counts: scipy.sparse.csr_matrix,
  tokens: np.ndarray,
  medians: np.ndarray,
  species: int,
  max_genes: int = MAX_GENES,
) -> dict[str, list]:
  """Columns of the released layout: highest quotients first, zeros after."""
  columns = {'input_ids': [], 'values': [], 'length': [], 'species': []}
  for cell in range(counts.shape[0]):
    part = slice(counts.indptr[cell], counts.indptr[cell + 1])
    genes = counts.indices[part]
    values = np.log2(1 + counts.data[part] / medians[genes])
    order = np.argsort(-values, kind='stable')[:max_genes]
    ids = np.zeros(max_genes, np.int32)
    padded = np.zeros(max_genes, np.float32)
    ids[: len(order)] = tokens[genes[order]]
    padded[: len(order)] = values[order]
    columns['input_ids'].append(ids)
    columns['values'].append(padded)
    columns['length'].append([len(order)])
    columns['species'].append([species])
  return columns


def write_arrow(
  columns: dict[str, list],
  folder: str,
  rows_each: int = 1000,
  shards: int = 2,
  parquet: bool = False,
) -> None:
  """A folder as `datasets.save_to_disk` writes it, or Parquet files."""
  os.makedirs(folder, exist_ok=True)
  fields = [
    ('input_ids', pa.list_(pa.int32())),
    ('values', pa.list_(pa.float32())),
    ('length', pa.list_(pa.int16())),
    ('species', pa.list_(pa.int16())),
  ]
  own = {'input_ids', 'values', 'length', 'species'}
  arrays = [pa.array(columns[name], kind) for name, kind in fields]
  names = [name for name, _ in fields]
  for name in columns.keys() - own:
    arrays.append(pa.array(columns[name]))
    names.append(name)
  table = pa.table(dict(zip(names, arrays)))
  size = -(-len(table) // shards)
  files = []
  for k in range(shards):
    part = table.slice(k * size, size)
    end = 'parquet' if parquet else 'arrow'
    files.append(f'data-{k:05d}-of-{shards:05d}.{end}')
    name = os.path.join(folder, files[-1])
    if parquet:
      pyarrow.parquet.write_table(part, name, row_group_size=rows_each)
      continue
    with pa.OSFile(name, 'wb') as sink:
      with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(part, max_chunksize=rows_each)
  if not parquet:
    state = {'_data_files': [{'filename': name} for name in files]}
    for name, content in (('state', state), ('dataset_info', {})):
      with open(os.path.join(folder, f'{name}.json'), 'w') as file:
        json.dump(content, file)


def save_to_disk(columns: dict[str, list], folder: str) -> None:
  """The same by `datasets` itself."""
  import datasets

  features = datasets.Features(
    {
      'input_ids': datasets.Sequence(datasets.Value('int32'), MAX_GENES),
      'values': datasets.Sequence(datasets.Value('float32'), MAX_GENES),
      'length': datasets.Sequence(datasets.Value('int16'), 1),
      'species': datasets.Sequence(datasets.Value('int16'), 1),
    }
  )
  data = datasets.Dataset.from_dict(columns, features=features)
  data.save_to_disk(folder, num_shards=2)


WRITERS: dict[str, Callable[[anndata.AnnData, str], None]] = {
  'h5ad': lambda a, p: a.write_h5ad(f'{p}.h5ad'),
  'zarr2': lambda a, p: write_zarr(a, f'{p}.2.zarr', 2),
  'zarr3': lambda a, p: write_zarr(a, f'{p}.3.zarr', 3),
  'zarr3 zip': lambda a, p: write_zarr(a, f'{p}.zarr.zip', 3),
  '10x 3': lambda a, p: write_10x(a, f'{p}.h5'),
  '10x 2': lambda a, p: write_10x_v2({'genome': a}, f'{p}.v2.h5'),
  'mtx.gz': lambda a, p: write_mtx(a, f'{p}.mtx3'),
  'mtx of GEO': lambda a, p: write_mtx(
    a, f'{p}.geo', 'GSM123_', packed=False, version=2
  ),
}
PATHS = {
  'h5ad': '.h5ad',
  'zarr2': '.2.zarr',
  'zarr3': '.3.zarr',
  'zarr3 zip': '.zarr.zip',
  '10x 3': '.h5',
  '10x 2': '.v2.h5',
  'mtx.gz': '.mtx3',
  'mtx of GEO': '.geo',
}
