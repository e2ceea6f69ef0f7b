"""Cells of a finished corpus, source by source, as they were before it.

The cells of a source lie scattered over the blocks of its corpus; they come
back in the order of their rows in the source. What a corpus knows of a source,
the genes that it measured above all, comes with them.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy.sparse

from genecompass_jax import (
  corpus as corpus_lib,
  errors,
  gene_ids,
  gene_table,
  paths,
)
from genecompass_jax.prepare import (
  assays,
  matrices,
  source_config,
  sparse,
  turning,
)
from genecompass_jax.prepare.readers import opened

TOTAL = '_total'  # the obs column of library sizes
_OWN = ('source', 'unit', 'dataset', 'source_row')  # columns of any corpus
_BLOCKS = 16  # read at a time


def expand(
  config: source_config.SourceConfig,
) -> list[source_config.SourceConfig]:
  """One configuration for each source of the corpus that has cells in it."""
  if config.member:
    return [config]
  found = corpus_lib.Corpus.open(config.path)
  carried = next(stores_of(found)).obs_names
  carried = tuple(name for name in carried if name not in _OWN)
  return [
    dataclasses.replace(
      config,
      name=facts['name'],
      member=facts['name'],
      dataset=facts['dataset'],
      assay=_assay(facts['assay'], carried),
      licence=facts['licence'],
      unit='cell' if facts['unit'] == 'cell' else 'unit',
      total=TOTAL,
      obs=carried,
    )
    for facts in found.manifest['sources']
    if facts['kept']
  ]


def _assay(kind: str, carried: tuple[str, ...]) -> str:
  """What the cells of a source were; of a mixed one its column says it.

  Without the column they are kept apart from molecules, as some of them are.
  """
  if kind != assays.MIXED:
    return kind
  return 'auto' if assays.COLUMN in carried else assays.FULL_LENGTH


def stores_of(found: corpus_lib.Corpus) -> Iterator[corpus_lib.Store]:
  """The stores of a corpus, split by split."""
  for split in found.splits:
    yield from found.stores(split)


@dataclasses.dataclass(frozen=True, eq=False)
class Scattered:
  """Cells of one source, over the genes of all its species, by rows.

  Attributes:
    found: the corpus.
    places: for each store, the places of the source's cells in it.
    rows: for each store, the row that each of these cells becomes.
    column_R: for each store, the column of each row of its gene list.
    shape: cells and columns.
    dtype: of the counts.
    num_entries: counts that are not zero.
  """

  found: corpus_lib.Corpus
  places: tuple[np.ndarray, ...]
  rows: tuple[np.ndarray, ...]
  column_R: tuple[np.ndarray, ...]
  shape: tuple[int, int]
  dtype: np.dtype
  num_entries: int

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix: every block that holds one of them is read."""
    parts, order = [], []
    for number, store in enumerate(stores_of(self.found)):
      mine = (self.rows[number] >= first) & (self.rows[number] < stop)
      if mine.any():
        parts.append(self._of_store(number, store, self.places[number][mine]))
        order.append(self.rows[number][mine] - first)
    if not parts:
      return scipy.sparse.csr_matrix((stop - first, self.shape[1]))
    whole = scipy.sparse.vstack(parts, format='csr')
    return whole[np.argsort(np.concatenate(order))]

  def _of_store(self, number, store, places) -> scipy.sparse.csr_matrix:
    """Some cells of a store, in ascending places."""
    block_C = places // store.block_cells
    blocks = np.unique(block_C)
    parts = []
    for at in range(0, len(blocks), _BLOCKS):
      some = blocks[at : at + _BLOCKS].tolist()
      for block, cells in zip(some, store.read_blocks(some)):
        which = places[block_C == block] - block * store.block_cells
        matrix = scipy.sparse.csr_matrix(
          (
            cells.counts_N.astype(self.dtype),
            self.column_R[number][cells.gene_rows_N],
            cells.starts_C1,
          ),
          shape=(len(cells.starts_C1) - 1, self.shape[1]),
        )
        parts.append(matrix[which])
    whole = scipy.sparse.vstack(parts, format='csr')
    whole.sort_indices()
    return whole

  def sample(self) -> np.ndarray:
    """Values of the first rows."""
    return self.read(0, min(256, self.shape[0])).data.astype(np.float64)

  def by_rows(self, folder: str | None = None) -> matrices.Matrix:
    """Gathers the cells once, by ranges of rows that fit in memory."""
    if folder is None:
      whole = self.read(0, self.shape[0])
      return sparse.Rows(
        whole.data, whole.indices, whole.indptr.astype(np.int64), self.shape
      )
    made = turning.RowsWriter.finished(folder, self.dtype, self.shape)
    if made is not None:
      return made
    writer = turning.RowsWriter(folder, self.dtype, self.shape[1])
    slab = max(turning.TURN_IN_MEMORY // 16, 1)
    ranges = max(-(-self.num_entries // slab), 1)
    each = -(-self.shape[0] // ranges)
    for first in range(0, self.shape[0], each):
      writer.add(self.read(first, min(first + each, self.shape[0])))
    return writer.close()


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Opens the cells of one source of a corpus.

  Raises:
    UserError: no such source, none of its cells, or a damaged corpus.
  """
  found = corpus_lib.Corpus.open(config.path)
  names = [facts['name'] for facts in found.manifest['sources']]
  if config.member not in names:
    raise errors.UserError(
      f'{config.path}: {len(names)} sources; name one of them: '
      + ', '.join(names[:8])
    )
  facts = found.manifest['sources'][names.index(config.member)]
  species = found.vocabulary.species
  places, source_rows, tables = [], [], []
  lists: list[tuple[int, np.ndarray]] = []  # species and measured genes
  for store in stores_of(found):
    code = store.categories('source').index(config.member)
    mine = np.flatnonzero(store.obs('source') == code)
    places.append(mine)
    source_rows.append(store.obs('source_row')[mine])
    if store.species not in [of for of, _ in lists]:
      lists.append((store.species, store.measured_SrcR[code]))
    tables.append(_labels(store, mine))
  order = np.argsort(np.concatenate(source_rows), kind='stable')
  rank = np.empty(len(order), np.int64)
  rank[order] = np.arange(len(order))
  rows = np.split(rank, np.cumsum([len(p) for p in places])[:-1])
  obs = pd.concat(tables).iloc[order]
  ids: list[str] = []
  start_of = {}
  column_of = {}
  for of, measured_R in lists:
    genes = found.gene_ids(of)
    start_of[of] = len(ids)
    column_R = np.full(len(genes), -1, np.int64)
    column_R[measured_R] = len(ids) + np.arange(measured_R.sum())
    column_of[of] = column_R
    ids += [genes[r] for r in np.flatnonzero(measured_R)]
  is_float = found.manifest['value_dtype'] == 'float32'
  stores = list(stores_of(found))
  matrix = Scattered(
    found,
    tuple(places),
    tuple(rows),
    tuple(column_of[store.species] for store in stores),
    (len(obs), len(ids)),
    np.dtype(np.float32 if is_float else np.uint32),
    sum(int(store.length_N[mine].sum()) for store, mine in zip(stores, places)),
  )
  species_C = obs.pop('_species').to_numpy(np.int8)

  def identify(table: gene_table.GeneTable) -> opened.Identified:
    resolutions = {}
    for of in sorted(set(species_C.tolist())):
      own = set(found.gene_ids(of)) & table.row_of.keys()
      to = tuple(name if name in own else None for name in ids)
      how = tuple('ensembl' if name in own else 'lost' for name in ids)
      resolutions[of] = gene_ids.Resolution(
        to, how, of, tuple(ids), species[of]
      )
    return tuple(ids), resolutions, 'those of the corpus'

  return opened.Opened(
    obs,
    {'counts': (matrix, pd.DataFrame(index=ids))},
    digest=facts['sha256'] or _digest(found, config.member),
    layer=('counts', f'counts of {config.member} in a corpus', is_float),
    species_C=species_C,
    identify=identify,
    is_divided=found.manifest.get('medians_by') == 'source',
    unit_members={
      '+'.join(names): tuple(names)
      for names in found.manifest['split'].get('joined_units', ())
    },
  )


def _digest(found: corpus_lib.Corpus, member: str) -> str:
  """Of a source that came from no file: of the corpus that holds it."""
  text = json.dumps([found.manifest['files'], member], sort_keys=True)
  return paths.sha256_bytes(text.encode())


def _labels(store: corpus_lib.Store, mine: np.ndarray) -> pd.DataFrame:
  """Labels of some cells of a store, as text; None where there is none."""
  columns: dict[str, object] = {}
  for name in store.obs_names:
    if name not in ('source', 'dataset', 'source_row'):
      of = np.array([*store.categories(name), None], object)
      columns[name] = of[store.obs(name)[mine]]
  columns[TOTAL] = store.total_N[mine].astype(np.float64)
  columns['_species'] = np.full(len(mine), store.species)
  names = np.array(store.cell_names(), object)[mine]
  return pd.DataFrame(columns, index=names)
