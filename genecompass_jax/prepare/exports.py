"""A corpus in formats of others: h5ad files, and the released Arrow layout."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from genecompass_jax import (
  corpus as corpus_lib,
  encoding,
  errors,
  paths,
  progress,
  staging,
  vocabulary,
)
from genecompass_jax.prepare import h5ad_writer, sources
from genecompass_jax.prepare.readers import stored

FORMATS = ('h5ad', 'arrow')
_CHUNK = 4096  # cells
_BLOCKS = 4  # read at a time
_FILE_CELLS = 100_000  # of an Arrow file
PADDED = 2048  # genes of a released row
_FIELDS = (
  ('input_ids', pa.list_(pa.int32()), 'int32'),
  ('values', pa.list_(pa.float32()), 'float32'),
  ('length', pa.list_(pa.int16()), 'int16'),
  ('species', pa.list_(pa.int16()), 'int16'),
)


def to_h5ad(
  path: paths.PathLike, folder: str, split: str = ''
) -> list[tuple[str, int]]:
  """Writes an h5ad file of counts for each source of a corpus.

  Args:
    path: of the corpus.
    folder: to write into, made if missing.
    split: whose cells; '' takes all, with a column that says which.

  Returns:
    Names of the files and the cells in each.

  Raises:
    UserError: no such split, no folder to write into, or a file is there
      already.
  """
  found = corpus_lib.Corpus.open(path)
  _check_split(found, split)
  _check_folder(found, folder)
  written = []
  configs = stored.expand(sources.SourceConfig(os.fspath(path)))
  total = sum(s['kept'] for s in found.manifest['sources'])
  dtype = _dtype(found)
  os.makedirs(folder, exist_ok=True)
  with progress.Progress(total, 'cells', 'h5ad') as bar:
    for config in configs:
      name = os.path.join(folder, f'{_plain(config.member)}.h5ad')
      if os.path.exists(name):
        raise errors.UserError(f'{name} is there already; name a new folder')
      source = sources.open_source(config)
      split_C = _splits(found, config.member)
      if split and not (split_C == split).any():
        continue
      obs = source.obs.rename(columns={stored.TOTAL: 'total'})
      obs = obs.assign(split=split_C)
      if 'species' not in obs:  # a source may have cells of several
        names = np.array(found.vocabulary.species, object)
        obs['species'] = names[source.species_C]
      matrix = source.matrix.by_rows()
      var = _genes(found, source)
      with h5ad_writer.H5adWriter(name, var, dtype) as writer:
        for first in range(0, source.num_cells, _CHUNK):
          stop = min(first + _CHUNK, source.num_cells)
          chosen = split_C[first:stop] == split if split else slice(None)
          writer.add(
            matrix.read(first, stop)[chosen], obs.iloc[first:stop][chosen]
          )
          bar.update(stop - first)
      written.append((name, writer.num_cells))
  return written


def _dtype(found: corpus_lib.Corpus) -> np.dtype:
  """float32, as h5ad files mostly have, where it holds all counts exactly."""
  largest = max(store.largest_count for store in stored.stores_of(found))
  return np.dtype(np.float32 if largest <= 1 << 24 else np.float64)


def _genes(found: corpus_lib.Corpus, source: sources.Source) -> pd.DataFrame:
  """The columns of a source as a table of genes."""
  genes = found.vocabulary.genes
  rows = [genes.row_of[name] for name in source.names]
  return pd.DataFrame(
    {
      'symbol': [genes.symbols[r] for r in rows],
      'species': [genes.species[genes.species_G[r]] for r in rows],
    },
    index=list(source.names),
  )


def _splits(found: corpus_lib.Corpus, member: str) -> np.ndarray:
  """The split of every cell of a source, in the order of its rows."""
  rows, names = [], []
  for store in stored.stores_of(found):
    code = store.categories('source').index(member)
    mine = store.obs('source') == code
    rows.append(store.obs('source_row')[mine])
    names.append(np.full(int(mine.sum()), store.split, object))
  order = np.argsort(np.concatenate(rows), kind='stable')
  return np.concatenate(names)[order]


def _plain(name: str) -> str:
  """A name that is one part of a path."""
  return ''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)


def _check_split(found: corpus_lib.Corpus, split: str) -> None:
  if split and split not in found.splits:
    raise errors.UserError(
      f'{found.path} has no split {split!r}; it has: {", ".join(found.splits)}'
    )


def _check_folder(found: corpus_lib.Corpus, folder: str) -> None:
  if not folder:
    raise errors.UserError('an empty name for the output; name a folder')
  if os.path.exists(folder) and not os.path.isdir(folder):
    raise errors.UserError(f'{folder} is a file; name a folder')
  if staging.is_local(found.path) and staging.overlap(found.path, folder):
    raise errors.UserError(
      f'{folder}: a corpus stays as it is; name a folder outside of '
      f'{found.path}'
    )


def to_arrow(
  path: paths.PathLike, folder: str, split: str = ''
) -> list[tuple[str, int]]:
  """Writes the released layout: ranked tokens and values, padded to 2,048.

  `datasets.load_from_disk` reads the folder. Beside it stand the dictionary of
  tokens and the medians, with which `prep hf` gives the counts back.

  Args:
    path: of the corpus.
    folder: to write, empty or not there.
    split: whose cells; '' takes all.

  Returns:
    Names of the files and the cells in each.

  Raises:
    UserError: no such split, no folder, or something is in it.
  """
  found = corpus_lib.Corpus.open(path)
  _check_split(found, split)
  _check_folder(found, folder)
  if paths.listdir(folder):
    raise errors.UserError(f'{folder} is not empty; name a new folder')
  # some whole files of a set would look like a set
  place = staging.folder(folder)
  try:
    written = _write_arrow(found, place, split)
    _write_facts(found, place, written)
    staging.swap(place, os.path.abspath(folder))
  finally:
    shutil.rmtree(place, ignore_errors=True)
  return [(os.path.join(folder, name), cells) for name, cells in written]


def _write_arrow(
  found: corpus_lib.Corpus, place: str, split: str
) -> list[tuple[str, int]]:
  """Writes the files of cells: their names, and the cells in each."""
  chosen = [split] if split else list(found.splits)
  total = sum(found.num_cells(name) for name in chosen)
  count = max(-(-total // _FILE_CELLS), 1)
  schema = pa.schema([(name, kind) for name, kind, _ in _FIELDS])
  written: list[tuple[str, int]] = []
  sink = stream = None
  with progress.Progress(total, 'cells', 'arrow') as bar:
    for batch in _batches(found, chosen, schema):
      done = sum(cells for _, cells in written)
      while len(batch):
        if stream is None:
          name = f'data-{len(written):05d}-of-{count:05d}.arrow'
          sink = pa.OSFile(os.path.join(place, name), 'wb')
          stream = pa.ipc.new_stream(sink, schema)
          written.append((name, 0))
        name, cells = written[-1]
        size = min(len(batch), _FILE_CELLS - cells)
        stream.write_batch(batch.slice(0, size))
        written[-1] = name, cells + size
        batch = batch.slice(size)
        if cells + size == _FILE_CELLS:
          stream.close()
          sink.close()
          stream = None
      bar.update(sum(cells for _, cells in written) - done)
  if stream is not None:
    stream.close()
    sink.close()
  return written


def _batches(
  found: corpus_lib.Corpus, splits: Sequence[str], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
  """Rows of all stores, a few blocks at a time."""
  config = encoding.EncodingConfig(max_genes=PADDED)
  values = found.medians(config.mode)
  for store in stored.stores_of(found):
    if store.split not in splits:
      continue
    encoder = encoding.CellEncoder(
      config, found.tokens(store.species), values.divisor_V(store.species)
    )
    for first in range(0, store.num_blocks, _BLOCKS):
      blocks = range(first, min(first + _BLOCKS, store.num_blocks))
      for cells in store.read_blocks(blocks):
        yield _rows(encoder.encode(cells, seed=0, epoch=None), store, schema)


def _rows(
  cells: encoding.EncodedCells, store: corpus_lib.Store, schema: pa.Schema
) -> pa.RecordBatch:
  """Padded rows of some encoded cells."""
  lengths_C = np.diff(cells.starts_C1)
  num = len(lengths_C)
  ids_CL = np.zeros((num, PADDED), np.int32)
  values_CL = np.zeros((num, PADDED), np.float32)
  is_gene_CL = np.arange(PADDED) < lengths_C[:, None]
  ids_CL[is_gene_CL] = cells.gene_ids_N
  values_CL[is_gene_CL] = cells.values_N
  offsets = np.arange(num + 1, dtype=np.int32)
  columns = (
    (ids_CL.ravel(), offsets * PADDED),
    (values_CL.ravel(), offsets * PADDED),
    (lengths_C.astype(np.int16), offsets),
    (np.full(num, store.species, np.int16), offsets),
  )
  return pa.record_batch(
    [
      pa.ListArray.from_arrays(pa.array(at), pa.array(data))
      for data, at in columns
    ],
    schema=schema,
  )


def _write_facts(
  found: corpus_lib.Corpus, folder: str, written: Sequence[tuple[str, int]]
) -> None:
  """What `datasets` asks for, the dictionary of tokens, the medians."""
  features = {
    name: {'feature': {'dtype': kind, '_type': 'Value'}, '_type': 'Sequence'}
    for name, _, kind in _FIELDS
  }
  info = {
    'description': 'cells of a genecompass_jax corpus, as GeneCompass has them',
    'citation': '',
    'homepage': '',
    'license': ', '.join(
      sorted({s['licence'] for s in found.manifest['sources']} - {''})
    ),
    'features': features,
  }
  state = {
    '_data_files': [{'filename': name} for name, _ in written],
    '_fingerprint': found.vocabulary.sha256[:16],
    '_format_columns': None,
    '_format_kwargs': {},
    '_format_type': None,
    '_output_all_columns': False,
    '_split': None,
  }
  for name, content in (('dataset_info', info), ('state', state)):
    with open(
      os.path.join(folder, f'{name}.json'), 'w', encoding='utf-8'
    ) as file:
      json.dump(content, file, indent=2)
  ids = found.vocabulary.token_gene_ids()
  special = vocabulary.NUM_SPECIAL
  lines = ['gene_id\ttoken'] + [
    f'{name}\t{token}' for token, name in enumerate(ids) if token >= special
  ]
  paths.write_text(os.path.join(folder, 'tokens.tsv'), '\n'.join(lines) + '\n')
  divisor_V = _divisors(found)
  lines = ['gene_id\tmedian'] + [
    f'{name}\t{divisor_V[token]!r}'
    for token, name in enumerate(ids)
    if token >= special
  ]
  paths.write_text(os.path.join(folder, 'medians.tsv'), '\n'.join(lines) + '\n')


def _divisors(found: corpus_lib.Corpus) -> list[float]:
  """What counts of each token were divided by, of the species that has it."""
  values = found.medians(encoding.RELEASED)
  divisor_V = np.ones(found.vocabulary.size)
  present = sorted({store.species for store in stored.stores_of(found)})
  for species in reversed(present):  # a shared token: the first of them
    token_R = found.tokens(species)
    divisor_V[token_R] = values.divisor_V(species)[token_R]
  return divisor_V.tolist()
