"""An opened set of cells, and its counts over a gene list, chunk by chunk."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping

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
  assays,
  counting,
  damage,
  identifiers,
  matrices,
  perturbed,
  quality,
  source_config,
)


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
    files: what the source was read from; none for cells in memory.
    digest: of what came from no file, a release of a census.
    can_reopen: whether `sources.open_source` of the same configuration gives
      the same source again, in another process too.
    is_divided: whether the values are counts divided by medians already, so
      that 1 is the median of every gene.
    unit_members: of a unit that an earlier corpus has joined: what of.
  """

  config: source_config.SourceConfig
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
  files: tuple[str, ...] | None = None
  digest: str = ''
  can_reopen: bool = False
  is_divided: bool = False
  unit_members: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )

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

  @functools.cached_property
  def assay(self) -> str:
    """`umi`, `full_length`, `panel`, or `mixed`."""
    return assays.summary(np.unique(self.assay_C).tolist())

  @functools.cached_property
  def assay_C(self) -> np.ndarray:
    """Int8 place in `assays.KINDS` of every cell."""
    kind = self.config.assay
    if kind == 'auto' and self.num_columns < quality.PANEL_GENES:
      kind = assays.PANEL
    if kind == 'auto' and assays.COLUMN in self.obs:
      return assays.kinds_of(*self.codes(assays.COLUMN))
    kind = assays.UMI if kind == 'auto' else kind
    return np.full(self.num_cells, assays.KINDS.index(kind), np.int8)

  def perturbed(self) -> tuple[np.ndarray, str]:
    """Bool [C]: cells that something was done to; and which were kept, or ''.

    Raises:
      UserError: see `perturbed.perturbed`.
    """
    controls = self.config.controls
    column = perturbed.column_of(controls, [*self.obs.columns])
    if not column:
      return np.zeros(self.num_cells, bool), ''
    codes_C, values = self.codes(column)
    return perturbed.perturbed(self.name, column, controls, codes_C, values)

  @property
  def dataset(self) -> str:
    """Label of the study."""
    return self.config.dataset or self.name

  @functools.cached_property
  def sha256(self) -> str:
    """Digest of the file, or of all files; '' for cells that came from none.

    The genomes of a file of several are sources of their own.
    """
    if self.digest:
      return self.digest
    if self.config.genome:
      whole = dataclasses.replace(
        self, config=dataclasses.replace(self.config, genome='')
      )
      text = f'{self.config.genome} {whole.sha256}'
      return paths.sha256_bytes(text.encode())
    files = self.files
    if files is None:
      files = (self.config.path,) if self.config.path else ()
    if len(files) < 2:
      return paths.sha256_file(files[0]) if files else ''
    top = os.path.commonpath(files)
    lines = [
      f'{os.path.relpath(name, top)} {paths.sha256_file(name)}\n'
      for name in sorted(files)
    ]
    return paths.sha256_bytes(''.join(lines).encode())

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
    # text first: 1 and '1' are one category, and order is that of the text;
    # whole numbers become floats where another cell has none, and stay equal
    if pd.api.types.is_float_dtype(values.dtype):
      whole = values[values.notna()]
      if (whole % 1 == 0).all() and (whole.abs() < 2**53).all():
        values = values.astype('Int64')
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
    """Library sizes from the obs column `total`; None where none is named.

    Raises:
      UserError: there is no such column, or it holds no library sizes.
    """
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
    if not self.is_float and (totals_C >= 2**32).any():
      raise errors.UserError(
        f'{self.name}: obs column {self.config.total!r} holds a library size '
        'above 4,294,967,295'
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
    vocab.check_rows()
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
      (len(vocab.species), source.num_columns), np.float64
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
      self.vocabulary.species[species]: resolution.report(
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
    except Exception as error:  # readers raise whatever they stumble over
      if isinstance(error, OSError) and error.errno:  # of the system
        raise
      raise damage.damaged(place, self.source.layer, error) from error

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
