"""Cells of h5ad files and AnnData objects, as counts over a gene list.

This is the owner of anndata: nothing else reads its files. A file is streamed
in chunks of cells whatever its matrix is (dense, CSR, CSC, integers or floats,
in X, raw or a layer), and never loaded whole. A CSC matrix is stored by genes:
one of up to `CSC_IN_MEMORY` entries is turned in memory, a larger one by way
of a scratch folder, in two passes.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse

from genecompass_jax import (
  encoding,
  errors,
  gene_ids,
  gene_table,
  paths,
  vocabulary,
)
from genecompass_jax.prepare import quality

ASSAYS = ('auto', 'umi', 'full_length', 'panel')
SPECIES_NAMES = {
  'human': 0,
  'homo sapiens': 0,
  'h. sapiens': 0,
  'ncbitaxon:9606': 0,
  'mouse': 1,
  'mus musculus': 1,
  'm. musculus': 1,
  'ncbitaxon:10090': 1,
}
CHUNK_CELLS = 1024  # read at a time: buffers below 32 MiB are reused
CHUNK_BYTES = 128 << 20  # of a dense chunk
CSC_IN_MEMORY = 300_000_000  # entries: 3.6 GB, twice that while turning
LOG_MAX = 20.0  # log1p and log2 of counts and TPM stay below
# the 24 mitochondrial rRNA and tRNA genes of each species (Ensembl), which no
# gene table here holds, but files of counts do
_HUMAN_MITO_RNA = (
  209082, 210049, 210077, 210082, 210100, 210107, 210112, 210117,
  210127, 210135, 210140, 210144, 210151, 210154, 210156, 210164,
  210174, 210176, 210184, 210191, 210194, 210195, 210196, 211459,
)  # fmt: skip
_MOUSE_MITO_RNA = (
  64336, 64337, 64338, 64339, 64340, 64342, 64343, 64344,
  64346, 64347, 64348, 64349, 64350, 64352, 64353, 64355,
  64359, 64361, 64364, 64365, 64366, 64369, 64371, 64372,
)  # fmt: skip
MITO_RNA = frozenset(
  [f'ENSG{n:011d}' for n in _HUMAN_MITO_RNA]
  + [f'ENSMUSG{n:011d}' for n in _MOUSE_MITO_RNA]
)
_CODING, _MITO = 1, 2  # flags of a column
_FINE, _NEGATIVE, _NOT_FINITE, _NOT_INTEGER, _TOO_LARGE = range(5)
_WRONG = {
  _NEGATIVE: 'a negative value',
  _NOT_FINITE: 'a value that is not finite',
  _NOT_INTEGER: 'a value that is not an integer (corrected counts are taken '
  'with --allow_noninteger, never rounded)',
  _TOO_LARGE: 'a count above 4,294,967,295',
}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """What to read from one file, and what its columns mean.

  Attributes:
    path: an h5ad file; '' for an AnnData in memory.
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
    if self.assay not in ASSAYS:
      raise errors.UserError(
        f'--assay {self.assay}: give one of {", ".join(ASSAYS)}'
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
  _matrix: object = dataclasses.field(repr=False)

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
    if _is_sparse(self._matrix):
      return int(_parts(self._matrix)[0].shape[0])
    return self.num_cells * self.num_columns // 10

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
    """Digest of the file; '' in memory."""
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
    row_of = self.table.row_of
    named_mito = [
      name.casefold().startswith('mt-') or name.partition('.')[0] in MITO_RNA
      for name in self.names
    ]
    flags = {}
    for species, resolution in self.resolutions.items():
      flag = np.array(named_mito, np.uint8) * _MITO
      for column, gene_id in enumerate(resolution.gene_ids):
        if gene_id is None:
          continue
        row = row_of[gene_id]
        if self.table.biotypes[row] in ('protein_coding', 'miRNA'):
          flag[column] |= _CODING
        if self.table.symbols[row].casefold().startswith('mt-'):
          flag[column] |= _MITO
      flags[species] = flag
    return flags

  def has_flag(self, species: int) -> tuple[bool, bool]:
    """Whether coding and mitochondrial genes are known among the columns."""
    flag = self.flags[species]
    return bool((flag & _CODING).any()), bool((flag & _MITO).any())

  def cell_names(self) -> np.ndarray:
    """Names of the cells, each on one line, as an object array."""
    names = self.obs.index.astype(str)
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

  def chunks(
    self, cells: int = CHUNK_CELLS, scratch: str | None = None
  ) -> Iterator[Chunk]:
    """Yields all cells in the order of the file, one chunk a species.

    Args:
      cells: cells read at a time.
      scratch: folder for a large CSC matrix to be turned in.

    Raises:
      UserError: a value that is no count, naming the cell.
    """
    source = self.source
    self._column_sums[:] = 0
    totals_all = source.totals()
    for first, matrix in _row_chunks(source._matrix, cells, scratch):
      starts_C1 = matrix.indptr.astype(np.int64)
      columns_N = matrix.indices.astype(np.int32, copy=False)
      values_N = matrix.data.astype(np.float64, copy=False)
      species_C = source.species_C[first : first + matrix.shape[0]]
      for species in self.species:
        index_C = np.flatnonzero(species_C == species)
        if len(index_C):
          yield self._chunk(
            species, first, index_C, columns_N, values_N, starts_C1, totals_all
          )

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
    status, cell = _measure(
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
    if status != _FINE:
      raise errors.UserError(
        f'{source.name}: {source.layer} holds {_WRONG[status]}, in cell '
        f'{source.obs.index[first + index_C[cell]]} (row '
        f'{first + index_C[cell]})'
      )
    room = int(statistics.genes_C.sum())
    rows_N = np.empty(room, np.uint16)
    counts_N = np.empty(room, np.float32 if is_float else np.uint32)
    out_C1 = np.zeros(num + 1, np.int64)
    _gather(
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


@encoding.compiled
def _measure(
  columns_N, values_N, starts_C1, index_C, flags, integers, genes_C, coding_C,
  mito_C, total_C, column_sums,
):  # fmt: skip
  """Checks the values of the cells index_C and counts what the filters ask."""
  for c in range(len(index_C)):
    for i in range(starts_C1[index_C[c]], starts_C1[index_C[c] + 1]):
      value = values_N[i]
      if value == 0.0:
        continue
      if value - value != 0.0:
        return _NOT_FINITE, c
      if value < 0.0:
        return _NEGATIVE, c
      if integers:
        if value != np.floor(value):
          return _NOT_INTEGER, c
        if value > 4294967295.0:
          return _TOO_LARGE, c
      column = columns_N[i]
      flag = flags[column]
      genes_C[c] += 1
      coding_C[c] += flag & _CODING
      if flag & _MITO:
        mito_C[c] += value
      total_C[c] += value
      column_sums[column] += value
  return _FINE, 0


# place of the only set bit, by a de Bruijn sequence
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_PLACE = np.zeros(64, np.int64)
for _i in range(64):
  _PLACE[((1 << _i) * int(_DE_BRUIJN) & (1 << 64) - 1) >> 58] = _i


@encoding.compiled
def _gather(
  columns_N, values_N, starts_C1, index_C, row_of_column, num_rows, rows_N,
  counts_N, out_C1,
):  # fmt: skip
  """Sums columns into rows; a bitmap of the rows gives them in order."""
  sum_R = np.zeros(num_rows, np.float64)
  words = np.zeros((num_rows + 63) // 64, np.uint64)
  out = 0
  for c in range(len(index_C)):
    for i in range(starts_C1[index_C[c]], starts_C1[index_C[c] + 1]):
      row = row_of_column[columns_N[i]]
      if row >= 0 and values_N[i] != 0.0:
        sum_R[row] += values_N[i]
        words[row >> 6] |= np.uint64(1) << np.uint64(row & 63)
    for w in range(len(words)):
      word = words[w]
      while word:
        bit = word & (~word + np.uint64(1))
        row = (w << 6) + _PLACE[(bit * _DE_BRUIJN) >> np.uint64(58)]
        rows_N[out] = row
        counts_N[out] = sum_R[row]
        sum_R[row] = 0.0
        out += 1
        word ^= bit
      words[w] = 0
    out_C1[c + 1] = out


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
  obs = anndata.io.read_elem(file['obs'])
  var = anndata.io.read_elem(file['var'])
  matrices = {}
  if 'X' in file:
    matrices['X'] = file['X'], var
  if 'raw' in file and 'X' in file['raw']:
    raw_var = file['raw/var'] if 'var' in file['raw'] else None
    matrices['raw'] = (
      file['raw/X'],
      var if raw_var is None else anndata.io.read_elem(raw_var),
    )
  for name in file.get('layers', ()):
    matrices[f'layers/{name}'] = file['layers'][name], var
  matrices = {
    name: (_wrapped(matrix), names)
    for name, (matrix, names) in matrices.items()
  }
  return _source(config, obs, matrices, table)


def from_anndata(
  adata: anndata.AnnData,
  config: SourceConfig | None = None,
  table: gene_table.GeneTable | None = None,
) -> Source:
  """The cells of an AnnData, in memory or backed, as `open_h5ad` gives them."""
  matrices = {}
  if adata.X is not None:
    matrices['X'] = _wrapped(adata.X), adata.var
  if adata.raw is not None:
    matrices['raw'] = _wrapped(adata.raw.X), adata.raw.var
  for name in adata.layers:
    matrices[f'layers/{name}'] = _wrapped(adata.layers[name]), adata.var
  config = config or SourceConfig()
  return _source(config, adata.obs, matrices, table)


def cells_of(
  data: anndata.AnnData | paths.PathLike,
  vocab: vocabulary.Vocabulary,
  config: SourceConfig | None = None,
) -> CellStream:
  """Cells of an AnnData or an h5ad file over a vocabulary's gene lists.

  No cell is left out: `embed` and the tasks read through this, `prepare` adds
  filters. Identifiers are looked up in the vocabulary's own genes.

  Args:
    data: AnnData (in memory or backed), or the name of an h5ad file.
    vocab: gene lists and tokens.
    config: species, layer and the like; its path is not read.

  Raises:
    UserError: as `open_h5ad`.
  """
  config = config or SourceConfig()
  if isinstance(data, anndata.AnnData):
    return from_anndata(data, config, vocab.genes).bind(vocab)
  config = dataclasses.replace(config, path=os.fspath(data))
  return open_h5ad(config, vocab.genes).bind(vocab)


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
  matrices: dict[str, tuple],
  table: gene_table.GeneTable | None,
) -> Source:
  table = table or gene_table.GeneTable.default()
  name = config.label
  if not len(obs):
    raise errors.UserError(f'{name}: no cells')
  layer, reason, is_float = _choose_layer(name, matrices, config)
  matrix, var = matrices[layer]
  if not len(var):
    raise errors.UserError(f'{name}: no genes')
  if tuple(matrix.shape) != (len(obs), len(var)):
    raise errors.UserError(
      f'{name}: {layer} is {matrix.shape}, but there are {len(obs)} cells and '
      f'{len(var)} genes: the file is damaged'
    )
  species_C = _species_of_cells(name, obs, config.species)
  names, resolutions, id_reason = _resolve(
    name, var, config, sorted(set(species_C.tolist()) - {-1}), table
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


def _species_of_cells(name: str, obs: pd.DataFrame, species: str) -> np.ndarray:
  """int8 code of every cell; -1 where the identifiers are to decide."""
  if species == 'auto':
    return np.full(len(obs), -1, np.int8)
  if species in vocabulary.SPECIES:
    code = vocabulary.SPECIES.index(species)
    return np.full(len(obs), code, np.int8)
  column = species.removeprefix('obs:')
  if column not in obs:
    raise errors.UserError(
      f'{name}: --species {species}, but there is no such obs column'
    )
  text = obs[column].astype(str).str.strip().str.casefold()
  codes = text.map(SPECIES_NAMES)
  if codes.isna().any():
    raise errors.UserError(
      f'{name}: obs column {column!r} holds {text[codes.isna()].iloc[0]!r}, '
      'which is neither human nor mouse'
    )
  return codes.to_numpy(np.int8)


def _resolve(
  name: str,
  var: pd.DataFrame,
  config: SourceConfig,
  species: Sequence[int],
  table: gene_table.GeneTable,
) -> tuple[tuple[str, ...], dict[int, gene_ids.Resolution], str]:
  """Chooses the identifiers, and where they lead for each species."""
  index = [str(v) for v in var.index]
  columns = {}
  for column in var.columns:
    values = var[column]
    if values.dtype == object or isinstance(
      values.dtype, pd.CategoricalDtype | pd.StringDtype
    ):
      text = ['' if pd.isna(v) else str(v) for v in values]
      if len(set(text)) > len(text) / 2:
        columns[str(column)] = text
  asked: int | None = None
  if config.ids_of:
    asked = vocabulary.SPECIES.index(config.ids_of)
  elif len(species) == 1:
    asked = species[0]
  resolutions, reasons, names = {}, [], ()
  try:
    if species and not config.ids_of:
      wanted = [(code, code) for code in species]
    else:
      choice = gene_ids.choose_identifiers(index, columns, table, asked)
      wanted = [(code, choice.species) for code in species or [choice.species]]
    for code, of in wanted:
      choice = gene_ids.choose_identifiers(index, columns, table, of)
      names = tuple(index if choice.column is None else columns[choice.column])
      resolution = gene_ids.resolve(names, code, table, of)
      # orthologues of the other species are fewer; what counts is that the
      # identifiers themselves are known
      known = resolution
      if of != code:
        known = gene_ids.resolve(names, of, table)
      gene_ids.check_share_known(known)
      resolutions[code] = resolution
      reasons.append(choice.reason)
  except errors.UserError as error:
    raise errors.UserError(f'{name}: {error}') from None
  return names, resolutions, '; '.join(dict.fromkeys(reasons))


# Matrices


@dataclasses.dataclass(frozen=True)
class _Backed:
  """A sparse matrix in a file: groups indptr, indices, data."""

  group: h5py.Group
  format: str
  shape: tuple[int, int]


def _wrapped(matrix: object) -> object:
  """Brings the kinds of matrices that anndata knows to four."""
  if isinstance(matrix, h5py.Group):
    matrix = anndata.io.sparse_dataset(matrix)
  if isinstance(matrix, h5py.Dataset | np.ndarray):
    return matrix
  if hasattr(matrix, 'group') and hasattr(matrix, 'format'):
    return _Backed(matrix.group, matrix.format, tuple(matrix.shape))
  if scipy.sparse.issparse(matrix):
    return matrix if matrix.format == 'csr' else matrix.tocsr()
  return np.asarray(matrix)


def _is_sparse(matrix: object) -> bool:
  return isinstance(matrix, _Backed) or scipy.sparse.issparse(matrix)


def _parts(matrix: object) -> tuple:
  """data, indices and indptr of a sparse matrix, where they lie."""
  if isinstance(matrix, _Backed):
    return tuple(matrix.group[k] for k in ('data', 'indices', 'indptr'))
  return matrix.data, matrix.indices, matrix.indptr


def _sample(matrix: object) -> np.ndarray:
  """Some values of a matrix, from several places."""
  if _is_sparse(matrix):
    data = _parts(matrix)[0]
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


def kind_of(matrix: object) -> str:
  """What a sample of the values looks like: counts, or what is wrong."""
  values = _sample(matrix)
  if not np.isfinite(values).all():
    return 'values that are not finite'
  if (values < 0).any():
    return 'negative values (scaled data?)'
  if (values % 1 == 0).all():
    return COUNTS
  if values.max(initial=0) < LOG_MAX:
    return 'log-transformed values'
  return NON_INTEGER


def _choose_layer(
  name: str, matrices: dict[str, tuple], config: SourceConfig
) -> tuple[str, str, bool]:
  """The matrix to read, why, and whether its values are no integers."""
  if not matrices:
    raise errors.UserError(f'{name}: no X, raw or layer')
  kinds = {key: kind_of(matrix) for key, (matrix, _) in matrices.items()}
  good = [key for key, kind in kinds.items() if kind == COUNTS]
  asked = config.layer
  if asked and asked not in matrices:
    if f'layers/{asked}' not in matrices:
      raise errors.UserError(
        f'{name}: no layer {asked!r}; there are: {", ".join(matrices)}'
      )
    asked = f'layers/{asked}'
  accepted = [COUNTS] + [NON_INTEGER] * config.allow_noninteger
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
    worth = NON_INTEGER if NON_INTEGER in kinds.values() else only
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
  return 'a file with the raw counts is needed'


def _row_chunks(
  matrix: object, cells: int, scratch: str | None
) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
  """Yields (first row, CSR) over all rows."""
  num_rows, num_columns = matrix.shape
  if isinstance(matrix, _Backed) and matrix.format == 'csc':
    yield from _csc_chunks(matrix, cells, scratch)
    return
  if _is_sparse(matrix):
    data, indices, indptr = _parts(matrix)
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
  if len(indices) and not (indices.min() >= 0 and indices.max() < num_columns):
    raise errors.UserError('a sparse matrix names columns that do not exist')
  if (np.diff(indptr) < 0).any() or indptr[-1] != len(indices):
    raise errors.UserError('a sparse matrix has broken row offsets')
  matrix = scipy.sparse.csr_matrix((len(indptr) - 1, num_columns))
  matrix.data, matrix.indices = np.asarray(data), indices
  matrix.indptr = np.asarray(indptr)
  return matrix


_ENTRY = np.dtype([('row', '<i4'), ('column', '<i4'), ('value', '<f8')])


def _csc_chunks(
  matrix: _Backed, cells: int, scratch: str | None
) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
  """Rows of a matrix that is stored by columns."""
  data, indices, indptr = _parts(matrix)
  indptr = np.asarray(indptr[:], np.int64)
  num_rows, num_columns = matrix.shape
  if data.shape[0] <= CSC_IN_MEMORY:
    turned = scipy.sparse.csc_matrix(
      (data[:], indices[:], indptr), shape=matrix.shape
    ).tocsr()
    yield from _row_chunks(turned, cells, scratch)
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
      for inner, chunk in _row_chunks(turned, cells, scratch):
        yield first + inner, chunk
      os.remove(name)
