"""Cells of h5ad files and AnnData objects, as counts over a gene list.

A source is opened (which matrix holds counts, which species, which genes its
columns are) and then streamed in chunks of cells, never loaded whole.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator

import anndata
import h5py
import numpy as np
import pandas as pd

from genecompass_jax import (
  encoding,
  errors,
  gene_ids,
  gene_table,
  paths,
  vocabulary,
)
from genecompass_jax.prepare import (
  counting,
  identifiers,
  layers as layers_lib,
  matrices,
  quality,
)

CELL = 'cell'  # the unit that makes a split leak


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """What to read from one file, and what its columns mean.

  Attributes:
    path: an h5ad file; of an AnnData in memory the file it came from, for the
      manifest, or ''.
    name: of the source, in the manifest; the file's stem where ''.
    species: `human`, `mouse`, `auto` or `obs:COLUMN`.
    ids_of: `human` or `mouse` where cells of the other species carry its
      identifiers; their genes become the one-to-one orthologues.
    layer: `X`, `raw` or `layers/NAME`; '' takes the one that looks like counts.
    unit: obs column that must not be split (donor, study); '' makes the whole
      source one unit; `cell` makes every cell one, and the split leaky.
    sample: obs column of samples for the filters; `unit` where ''.
    total: obs column with the library size over all genes, for a file whose
      genes were selected; '' takes the sum of its columns.
    assay: `umi`, `full_length`, `panel`, or `auto`: `panel` below 5,000
      measured genes, else `umi`. Medians of assays are not mixed.
    dataset: label of the study; units of equal name and dataset are one.
      `name` where ''.
    obs: obs columns to carry into the corpus.
    allow_noninteger: take corrected counts as they are.
    licence: of the data, for the manifest.
  """

  path: str = ''
  name: str = ''
  species: str = 'auto'
  ids_of: str = ''
  layer: str = ''
  unit: str = ''
  sample: str = ''
  total: str = ''
  assay: str = 'auto'
  dataset: str = ''
  obs: tuple[str, ...] = ()
  allow_noninteger: bool = False
  licence: str = ''

  def __post_init__(self):
    if self.assay not in quality.ASSAYS:
      raise errors.UserError(
        f'--assay {self.assay}: give one of {", ".join(quality.ASSAYS)}'
      )
    if self.ids_of not in ('', *vocabulary.SPECIES):
      raise errors.UserError(f'--ids-of {self.ids_of}: give human or mouse')
    known = ('auto', *vocabulary.SPECIES)
    if self.species not in known and not self.species.startswith('obs:'):
      raise errors.UserError(
        f'--species {self.species}: give human, mouse, auto or obs:COLUMN'
      )

  @property
  def label(self) -> str:
    """Name of the source."""
    stem = os.path.basename(self.path).removesuffix('.h5ad')
    return self.name or stem or 'cells'


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Some cells of one species.

  Attributes:
    species: species code.
    index_C: int64 rows of the cells in the source.
    cells: counts over the vocabulary's genes of that species, ascending rows,
      duplicates summed: uint32, or float32 where integers were not asked for;
      `totals_C` are library sizes over all columns of the source.
    statistics: over all columns of the source.
  """

  species: int
  index_C: np.ndarray
  cells: encoding.RaggedCells
  statistics: quality.CellStatistics


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """An opened set of cells: its labels in memory, its counts where they lie.

  Attributes:
    config: what was asked for.
    name: of the source.
    obs: columns of the cells, row order as in the file.
    layer: the matrix that is read.
    layer_reason: why, in one line.
    species_C: int8 species code of every cell.
    resolutions: for each species that occurs, where the columns lead.
    identifier_reason: which identifiers were used, in one line.
    names: the identifiers of the columns that were used.
    table: the genes they were looked up in.
    is_float: whether the values are corrected counts, not whole ones.
    matrix: the counts, where they lie.
  """

  config: SourceConfig
  name: str
  obs: pd.DataFrame
  layer: str
  layer_reason: str
  species_C: np.ndarray
  resolutions: dict[int, gene_ids.Resolution]
  identifier_reason: str
  names: tuple[str, ...]
  table: gene_table.GeneTable
  is_float: bool
  matrix: matrices.Matrix = dataclasses.field(repr=False)

  @property
  def num_cells(self) -> int:
    """Cells in the source."""
    return len(self.obs)

  @property
  def num_columns(self) -> int:
    """Genes that the source measured, known or not."""
    return len(self.names)

  @property
  def num_entries(self) -> int:
    """Stored entries, or a guess for a dense matrix: a tenth of it."""
    return self.matrix.num_entries

  @property
  def assay(self) -> str:
    """`umi`, `full_length` or `panel`."""
    if self.config.assay != 'auto':
      return self.config.assay
    return 'panel' if self.num_columns < quality.PANEL_GENES else 'umi'

  @property
  def dataset(self) -> str:
    """Label of the study."""
    return self.config.dataset or self.name

  @functools.cached_property
  def sha256(self) -> str:
    """Digest of the file; '' for cells that came from none."""
    return paths.sha256_file(self.config.path) if self.config.path else ''

  def gene_ids(self) -> set[str]:
    """Genes that the source measured in any of its species."""
    return {
      gene_id
      for resolution in self.resolutions.values()
      for gene_id in resolution.gene_ids
      if gene_id is not None
    }

  def codes(self, column: str) -> tuple[np.ndarray, list[str]]:
    """Codes (-1 for no value) and categories of an obs column, as text.

    Raises:
      UserError: there is no such column.
    """
    self._check_column(column)
    values = self.obs[column]
    # text first: 1 and '1' are one category, and order is that of the text
    text = values.astype(object).map(str).where(values.notna(), None)
    codes, names = pd.factorize(text, sort=True)
    return codes.astype(np.int32), [str(name) for name in names]

  def _check_column(self, column: str) -> None:
    if column not in self.obs:
      raise errors.UserError(
        f'{self.name}: no obs column {column!r}; there are: '
        + (', '.join(map(str, self.obs.columns)) or 'none')
      )

  @functools.cached_property
  def flags(self) -> dict[int, np.ndarray]:
    """For each species, uint8 flags of the columns: coding, mitochondrial."""
    return {
      species: identifiers.column_flags(self.names, resolution, self.table)
      for species, resolution in self.resolutions.items()
    }

  def has_flag(self, species: int) -> tuple[bool, bool]:
    """Whether coding and mitochondrial genes are known among the columns."""
    flag = self.flags[species]
    return bool((flag & counting.CODING).any()), bool(
      (flag & counting.MITO).any()
    )

  def cell_names(self, rows: slice = slice(None)) -> np.ndarray:
    """Names of some cells, each on one line, as an object array."""
    names = self.obs.index[rows].astype(str)
    return np.array([' '.join(name.split()) for name in names], object)

  def totals(self) -> np.ndarray | None:
    """Library sizes from the obs column `total`; None where none is named."""
    if not self.config.total:
      return None
    self._check_column(self.config.total)
    totals_C = pd.to_numeric(self.obs[self.config.total], errors='coerce')
    totals_C = totals_C.to_numpy(np.float64)
    if not (np.isfinite(totals_C) & (totals_C >= 0)).all():
      raise errors.UserError(
        f'{self.name}: obs column {self.config.total!r} is no library size'
      )
    if not self.is_float and (totals_C % 1 != 0).any():
      raise errors.UserError(
        f'{self.name}: obs column {self.config.total!r} holds broken numbers, '
        'but the counts are whole'
      )
    return totals_C

  def bind(self, vocab: vocabulary.Vocabulary) -> 'CellStream':
    """The counts over a vocabulary's genes."""
    return CellStream(self, vocab)


class CellStream:
  """The cells of a source as counts over the gene lists of a vocabulary.

  The gene list of a species is the vocabulary's genes of that species, in the
  order of its table: R rows.

  Attributes:
    source: where the cells come from.
    vocabulary: gene lists and tokens.
  """

  def __init__(self, source: Source, vocab: vocabulary.Vocabulary):
    self.source, self.vocabulary = source, vocab
    self._row_of_column: dict[int, np.ndarray] = {}
    self._num_rows: dict[int, int] = {}
    for species, resolution in source.resolutions.items():
      rows_R = vocab.gene_rows(species)
      row_of = {vocab.genes.gene_ids[g]: r for r, g in enumerate(rows_R)}
      self._num_rows[species] = len(rows_R)
      self._row_of_column[species] = np.array(
        [row_of.get(gene_id, -1) for gene_id in resolution.gene_ids], np.int32
      )
    self._column_sums = np.zeros(
      (len(vocabulary.SPECIES), source.num_columns), np.float64
    )

  @property
  def column_sums(self) -> np.ndarray:
    """float64 [species, columns]: counts in the cells read so far."""
    return self._column_sums.copy()

  def clear_sums(self) -> None:
    """Begins the counting of `column_sums` anew."""
    self._column_sums[:] = 0

  @property
  def species(self) -> tuple[int, ...]:
    """Species codes that occur."""
    return tuple(sorted(self._row_of_column))

  def tokens(self, species: int) -> np.ndarray:
    """int32 token of every row of a species' gene list [R]."""
    return self.vocabulary.token_G[self.vocabulary.gene_rows(species)]

  def measured(self, species: int) -> np.ndarray:
    """Bool [R]: the genes of the list that the source measured."""
    measured_R = np.zeros(len(self.vocabulary.gene_rows(species)), bool)
    if species in self._row_of_column:
      rows = self._row_of_column[species]
      measured_R[rows[rows >= 0]] = True
    return measured_R

  def report(self) -> dict[str, dict]:
    """The loss report of each species; with counts after `chunks` ran."""
    return {
      vocabulary.SPECIES[species]: resolution.report(
        self._column_sums[species] if self._column_sums.any() else None
      )
      for species, resolution in self.source.resolutions.items()
    }

  def chunks(self, cells: int = matrices.CHUNK_CELLS) -> Iterator[Chunk]:
    """Yields all cells in the order of the file, one chunk a species.

    Args:
      cells: cells read at a time.

    Raises:
      UserError: a value that is no count, naming the cell.
    """
    stream = self.by_rows()
    for first in range(0, stream.source.num_cells, cells):
      yield from stream.read(first, first + cells)
    self._column_sums[:] = stream._column_sums

  def by_rows(self, folder: str | None = None) -> 'CellStream':
    """The same cells, such that ranges of them are read quickly.

    Args:
      folder: for the files of a matrix that has to be turned; see
        `matrices.Matrix.by_rows`.

    Raises:
      UserError: the matrix is damaged.
    """
    with self._reading():
      matrix = self.source.matrix.by_rows(folder)
    source = dataclasses.replace(self.source, matrix=matrix)
    return CellStream(source, self.vocabulary)

  def read(self, first: int, stop: int) -> list[Chunk]:
    """The cells of a range of rows, one chunk a species.

    Raises:
      UserError: a value that is no count, naming the cell.
    """
    source = self.source
    stop = min(stop, source.num_cells)
    with self._reading():
      matrix = source.matrix.read(first, stop)
    starts_C1 = matrix.indptr.astype(np.int64)
    columns_N = matrix.indices.astype(np.int32, copy=False)
    values_N = matrix.data.astype(np.float64, copy=False)
    species_C = source.species_C[first:stop]
    chunks = []
    for species in self.species:
      index_C = np.flatnonzero(species_C == species)
      if len(index_C):
        chunks.append(
          self._chunk(
            species,
            first,
            index_C,
            columns_N,
            values_N,
            starts_C1,
            self._totals,
          )
        )
    return chunks

  @functools.cached_property
  def _totals(self) -> np.ndarray | None:
    return self.source.totals()

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    """What readers meet in a damaged file, in one line that names it."""
    place = self.source.config.path or self.source.name
    try:
      yield
    except errors.UserError as error:
      raise errors.UserError(f'{place}: {error}') from None
    except OSError as error:
      if error.errno:  # of the system, not a chunk that HDF5 cannot decode
        raise
      raise _damaged(place, self.source.layer, error) from error

  def _chunk(
    self, species, first, index_C, columns_N, values_N, starts_C1, totals_all
  ) -> Chunk:
    source = self.source
    num = len(index_C)
    statistics = quality.CellStatistics(
      np.zeros(num, np.int32),
      np.zeros(num, np.int32),
      np.zeros(num, np.float64),
      np.zeros(num, np.float64),
    )
    is_float = source.is_float
    status, cell = counting.measure(
      columns_N,
      values_N,
      starts_C1,
      index_C,
      source.flags[species],
      not is_float,
      statistics.genes_C,
      statistics.coding_C,
      statistics.mito_C,
      statistics.total_C,
      self._column_sums[species],
    )
    if status != counting.FINE:
      raise errors.UserError(
        f'{source.name}: {source.layer} holds {counting.WRONG[status]}, in cell '
        f'{source.obs.index[first + index_C[cell]]} (row '
        f'{first + index_C[cell]})'
      )
    room = int(statistics.genes_C.sum())
    rows_N = np.empty(room, np.uint16)
    counts_N = np.empty(room, np.float32 if is_float else np.uint32)
    out_C1 = np.zeros(num + 1, np.int64)
    counting.gather(
      columns_N,
      values_N,
      starts_C1,
      index_C,
      self._row_of_column[species],
      self._num_rows[species],
      rows_N,
      counts_N,
      out_C1,
    )
    used = out_C1[-1]
    totals_C = statistics.total_C
    if totals_all is not None:
      totals_C = totals_all[first + index_C]
      short = np.flatnonzero(totals_C < statistics.total_C * (1 - 1e-6))
      if len(short):
        raise errors.UserError(
          f'{source.name}: obs column {source.config.total!r} is less than the '
          f'counts of cell {source.obs.index[first + index_C[short[0]]]}'
        )
    return Chunk(
      species,
      index_C + first,
      encoding.RaggedCells(rows_N[:used], counts_N[:used], out_C1, totals_C),
      statistics,
    )


def open_source(
  config: SourceConfig, table: gene_table.GeneTable | None = None
) -> Source:
  """Opens a file of cells; see `open_h5ad`."""
  return open_h5ad(config, table)


def open_h5ad(
  config: SourceConfig, table: gene_table.GeneTable | None = None
) -> Source:
  """Opens an h5ad file: labels are read, counts stay on disk.

  Args:
    config: names the file and what is in it.
    table: genes to look identifiers up in; the default table where None.

  Raises:
    UserError: not an h5ad file, empty, no layer that looks like counts,
      identifiers or species in doubt, a column that is not there.
  """
  path = config.path
  _check_file(path)
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
  with _damage(path, 'obs'):
    obs = anndata.io.read_elem(file['obs'])
  with _damage(path, 'var'):
    var = anndata.io.read_elem(file['var'])
  layers = {}
  if 'X' in file:
    with _damage(path, 'X'):
      layers['X'] = matrices.wrapped(file['X']), var
  if 'raw' in file and 'X' in file['raw']:
    with _damage(path, 'raw'):
      raw_var = var
      if 'var' in file['raw']:
        raw_var = anndata.io.read_elem(file['raw/var'])
      layers['raw'] = matrices.wrapped(file['raw/X']), raw_var
  for name in file.get('layers', ()):
    try:
      layers[f'layers/{name}'] = matrices.wrapped(file['layers'][name]), var
    except Exception as error:  # one that is not asked for does no harm
      if config.layer in (name, f'layers/{name}'):
        raise _damaged(path, f'layers/{name}', error) from error
  return _source(config, obs, layers, table)


@contextlib.contextmanager
def _damage(path: str, part: str) -> Iterator[None]:
  """What h5py and anndata meet in a damaged file, in one line."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:  # they raise whatever they stumble over
    raise _damaged(path, part, error) from error


def _damaged(path: str, part: str, error: Exception) -> errors.UserError:
  line = errors.first_line(error)
  return errors.UserError(
    f'{path}: {part} cannot be read ({type(error).__name__}: {line}); copy the '
    'file again, or write it anew with anndata'
  )


def from_anndata(
  adata: anndata.AnnData,
  config: SourceConfig | None = None,
  table: gene_table.GeneTable | None = None,
) -> Source:
  """The cells of an AnnData, in memory or backed, as `open_h5ad` gives them."""
  layers = {}
  if adata.X is not None:
    layers['X'] = matrices.wrapped(adata.X), adata.var
  if adata.raw is not None:
    layers['raw'] = matrices.wrapped(adata.raw.X), adata.raw.var
  for name in adata.layers:
    layers[f'layers/{name}'] = matrices.wrapped(adata.layers[name]), adata.var
  config = config or SourceConfig()
  return _source(config, adata.obs, layers, table)


def table_of(vocab: vocabulary.Vocabulary | None) -> gene_table.GeneTable:
  """Genes to look identifiers up in, for cells over a vocabulary.

  The default table, where it holds the genes of the vocabulary: among a few
  genes only, a symbol of another gene could pass for an alias of one of them.
  """
  table = gene_table.GeneTable.default()
  if vocab is None or table.row_of.keys() >= set(vocab.genes.gene_ids):
    return table
  return vocab.genes


def cells_of(
  data: anndata.AnnData | paths.PathLike,
  vocab: vocabulary.Vocabulary,
  config: SourceConfig | None = None,
) -> CellStream:
  """Cells of an AnnData or an h5ad file over a vocabulary's gene lists.

  No cell is left out: `embed` and the tasks read through this, `prepare` adds
  filters. Identifiers are looked up among all genes of the default table, where
  it holds those of the vocabulary: among a few genes only, a symbol of another
  gene could pass for an alias of one of them.

  Args:
    data: AnnData (in memory or backed), or the name of an h5ad file.
    vocab: gene lists and tokens.
    config: species, layer and the like; its path is not read.

  Raises:
    UserError: as `open_h5ad`.
  """
  config = config or SourceConfig()
  table = table_of(vocab)
  if isinstance(data, anndata.AnnData):
    return from_anndata(data, config, table).bind(vocab)
  config = dataclasses.replace(config, path=os.fspath(data))
  return open_h5ad(config, table).bind(vocab)


def _check_file(path: str) -> None:
  if '://' in path:
    raise errors.UserError(f'{path}: copy the file here first')
  if not os.path.exists(path):
    raise errors.UserError(f'{path}: no such file')
  if os.path.isdir(path):
    raise errors.UserError(f'{path}: a folder, not an h5ad file')
  if not h5py.is_hdf5(path):
    with open(path, 'rb') as file:
      head = file.read(64)
    if head.startswith(b'version https://git-lfs'):
      raise errors.UserError(
        f'{path}: a Git LFS pointer, not the file; fetch it with git lfs pull'
      )
    raise errors.UserError(f'{path}: not an h5ad (HDF5) file')


def _source(
  config: SourceConfig,
  obs: pd.DataFrame,
  layers: dict[str, tuple],
  table: gene_table.GeneTable | None,
) -> Source:
  table = table or gene_table.GeneTable.default()
  name = config.label
  if not len(obs):
    raise errors.UserError(f'{name}: no cells')
  with _damage(config.path or name, 'a matrix'):
    layer, reason, is_float = layers_lib.choose_layer(
      name, layers, config.layer, config.allow_noninteger
    )
  matrix, var = layers[layer]
  if not len(var):
    raise errors.UserError(f'{name}: no genes')
  if tuple(matrix.shape) != (len(obs), len(var)):
    raise errors.UserError(
      f'{name}: {layer} is {matrix.shape}, but there are {len(obs)} cells and '
      f'{len(var)} genes: the file is damaged'
    )
  species_C = identifiers.species_of_cells(name, obs, config.species)
  names, resolutions, id_reason = identifiers.resolve(
    name, var, config.ids_of, sorted(set(species_C.tolist()) - {-1}), table
  )
  if (species_C < 0).any():  # auto: the identifiers have decided
    species_C[:] = next(iter(resolutions))
  return Source(
    config,
    name,
    obs,
    layer,
    reason,
    species_C,
    resolutions,
    id_reason,
    names,
    table,
    is_float,
    matrix,
  )
