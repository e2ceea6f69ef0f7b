"""Cells as GeneCompass released them: ranked tokens in Arrow or Parquet.

A row is a cell: `input_ids` and `values` of its 2,048 highest genes, padded
with zeros, `length` and `species` (0 human, 1 mouse). Values are
log2(1 + count / median). With the medians counts come back exactly, which is
asserted; without them the quotients 2^v - 1 are carried, and 1 is the median
of every gene then. A mouse gene that has a human orthologue stands there with
the human token; it becomes the mouse gene of a one-to-one pair again, and
other human genes of a mouse cell are lost, and counted in the report.

Folders are those of `datasets.save_to_disk`, read without `datasets`.
"""

import bisect
import dataclasses
import json
import os
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import scipy.sparse

from genecompass_jax import errors, gene_ids, gene_table, vocabulary
from genecompass_jax.prepare import (
  damage,
  source_config,
  sparse,
)
from genecompass_jax.prepare.readers import dictionaries, opened

MAX_GENES = 2048  # longer cells were cut by who released them
_FIELDS = ('input_ids', 'values', 'length', 'species')
_END = b'\xff\xff\xff\xff\0\0\0\0'  # of an Arrow stream
_ULPS = 4  # of float32, that a value may be off, for it to be of a whole count


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Maps released cells into memory; labels are read, rows stay on disk.

  Raises:
    UserError: damaged, of another layout, or no dictionary of tokens.
  """
  path = config.path
  if not config.tokens:
    raise errors.UserError(
      f'{path}: cells of tokens; name their dictionary with --tokens FILE '
      '(pickle, json or tsv: gene, token)'
    )
  files = _files(path)
  with damage.in_one_line(path, 'the table'):
    rows = Table.open(files)
    _check_number(path, rows.num_rows)
    lacks = [n for n in ('input_ids', 'values') if n not in rows.names]
    if lacks:
      raise errors.UserError(
        f'{path}: no column {lacks[0]}; there are: {", ".join(rows.names)}'
      )
    labels = _labels(rows)
  species_C = _species(config, labels.pop('species', None), rows.num_rows)
  lengths_C = labels.pop('length', None)
  tokens = _tokens(config.tokens, with_mouse=bool((species_C == 1).any()))
  ids = tuple(tokens)
  medians_R = _medians(config.medians, ids)
  matrix = Ranked(
    rows,
    np.fromiter(tokens.values(), np.int64, len(tokens)),
    ids,
    medians_R,
    None if lengths_C is None else np.asarray(lengths_C, np.int64),
  )
  notes = []
  if lengths_C is not None:
    full = int((np.asarray(lengths_C) >= MAX_GENES).sum())
    notes.append(
      f'{full:,} of {rows.num_rows:,} cells have {MAX_GENES} genes or more: '
      'their weaker genes were cut before release'
    )
  notes.append(
    'library sizes and measured genes are not known: totals are sums of the '
    'stored genes, and all genes with a token count as measured'
  )
  is_divided = medians_R is None
  kind = 'quotients count / median (2^v - 1), no medians were given'
  if not is_divided:
    kind = 'counts, (2^v - 1) * median, asserted to be whole'
  with damage.in_one_line(path, 'values'):
    matrix.sample()  # medians that do not fit are known at once
  return opened.Opened(
    pd.DataFrame(labels, index=pd.RangeIndex(rows.num_rows).astype(str)),
    {'values': (matrix, pd.DataFrame(index=list(ids)))},
    (
      *files,
      config.tokens,
      *(config.medians.split(',') if not is_divided else ()),
    ),
    notes=tuple(notes),
    layer=('values', f'values: {kind}', is_divided),
    species_C=species_C,
    identify=lambda table: identify(ids, species_C, table),
    is_divided=is_divided,
  )


def identify(
  ids: tuple[str, ...], species_C: np.ndarray, table: gene_table.GeneTable
) -> opened.Identified:
  """Where tokens lead: orthologues written as human genes become mouse genes.

  Raises:
    UserError: most of the dictionary are no known genes.
  """
  resolutions = {}
  is_mouse = np.array([name.upper().startswith('ENSMUSG') for name in ids])
  for of in range(len(vocabulary.SPECIES)):
    own = [name for name, mouse in zip(ids, is_mouse) if mouse == bool(of)]
    if own:
      gene_ids.check_share_known(gene_ids.resolve(own, of, table))
  for species in np.unique(species_C).tolist():
    found = gene_ids.resolve(ids, species, table)
    names, how = list(found.gene_ids), list(found.how)
    if species == 1:
      other = gene_ids.resolve(ids, 1, table, ids_of=0)
      for column in np.flatnonzero(~is_mouse):
        names[column], how[column] = other.gene_ids[column], other.how[column]
    resolutions[species] = gene_ids.Resolution(
      tuple(names), tuple(how), species, ids
    )
  reason = f'dictionary of {len(ids):,} tokens'
  if 1 in resolutions:
    reason += '; human tokens of mouse cells are one-to-one orthologues'
  return ids, resolutions, reason


def _files(path: str) -> tuple[str, ...]:
  """The Arrow or Parquet files of a data set, in its order."""
  if not os.path.isdir(path):
    damage.check_no_pointer(path)
    return (path,)
  state = os.path.join(path, 'state.json')
  if os.path.exists(os.path.join(path, 'dataset_dict.json')):
    inner = sorted(n for n in os.listdir(path) if _is_folder(path, n))
    raise errors.UserError(
      f'{path}: holds several data sets; name one of its folders: '
      + ', '.join(inner)
    )
  if os.path.exists(state):
    with damage.in_one_line(path, 'state.json'):
      with open(state, encoding='utf-8') as file:
        names = [f['filename'] for f in json.load(file)['_data_files']]
      if any(os.path.basename(n) != n for n in names):
        raise errors.UserError(f'{path}: state.json names files elsewhere')
  else:
    names = sorted(
      n for n in os.listdir(path) if n.endswith(('.arrow', '.parquet'))
    )
  files = tuple(os.path.join(path, name) for name in names)
  if not files:
    raise errors.UserError(f'{path}: no .arrow and no .parquet file in it')
  for name in files:
    if not os.path.exists(name):
      raise errors.UserError(
        f'{path}: {os.path.basename(name)} is missing; copy the folder again'
      )
    damage.check_no_pointer(name)
  return files


def _is_folder(path: str, name: str) -> bool:
  return os.path.isdir(os.path.join(path, name))


def _check_number(path: str, num_rows: int) -> None:
  """Refuses fewer rows than the data set says it has."""
  info = os.path.join(path, 'dataset_info.json')
  if not os.path.exists(info):
    return
  with open(info, encoding='utf-8') as file:
    splits = json.load(file).get('splits') or {}
  numbers = [s['num_examples'] for s in splits.values()]
  # a part of a set may carry the numbers of the whole, not the other way
  if len(numbers) == 1 and num_rows > numbers[0]:
    raise errors.UserError(
      f'{path}: {num_rows} rows, but dataset_info.json says {numbers[0]}'
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Rows of several files, one after the other; none of them in memory.

  Attributes:
    parts: an Arrow table mapped into memory, or a Parquet file.
    starts: number of the first row of every piece: Arrow files whole, Parquet
      files by row groups; one number more than pieces.
    pieces: (part, row group) of every piece.
    names: of the columns.
  """

  parts: tuple[Any, ...]
  starts: tuple[int, ...]
  pieces: tuple[tuple[int, int], ...]
  names: tuple[str, ...]

  @classmethod
  def open(cls, files: tuple[str, ...]) -> 'Table':
    """Opens Arrow and Parquet files of one schema.

    Raises:
      UserError: one is cut short, or of other columns than the first.
    """
    parts, starts, pieces, names = [], [0], [], []
    for name in files:
      with open(name, 'rb') as file:
        head = file.read(6)
      if head[:4] == b'PAR1':
        part = pyarrow.parquet.ParquetFile(name, memory_map=True)
        schema = part.schema_arrow
        sizes = [
          part.metadata.row_group(k).num_rows
          for k in range(part.num_row_groups)
        ]
      else:
        part = _mapped(name, head == b'ARROW1')
        schema, sizes = part.schema, [part.num_rows]
      if names and schema.names != names:
        raise errors.UserError(f'{name}: other columns than {files[0]}')
      names = schema.names
      for k, size in enumerate(sizes):
        if size:
          pieces.append((len(parts), k))
          starts.append(starts[-1] + size)
      parts.append(part)
    return cls(tuple(parts), tuple(starts), tuple(pieces), tuple(names))

  @property
  def num_rows(self) -> int:
    """Rows of all files."""
    return self.starts[-1]

  def read(self, first: int, stop: int, columns: list[str]) -> pa.Table:
    """Some columns of a range of rows."""
    tables = []
    while first < stop:
      k = bisect.bisect_right(self.starts, first) - 1
      end = min(stop, self.starts[k + 1])
      part, group = self.pieces[k]
      held = self.parts[part]
      if isinstance(held, pyarrow.parquet.ParquetFile):
        held = self._group(part, group, columns)
      else:
        held = held.select(columns)
      tables.append(held.slice(first - self.starts[k], end - first))
      first = end
    return pa.concat_tables(tables)

  def _group(self, part: int, group: int, columns: list[str]) -> pa.Table:
    """A row group; the last one is kept, as ranges follow each other."""
    key = part, group, tuple(columns)
    kept = getattr(self, '_kept', (None, None))
    if kept[0] != key:
      kept = key, self.parts[part].read_row_group(group, columns=columns)
      object.__setattr__(self, '_kept', kept)
    return kept[1]


def _mapped(name: str, is_file: bool) -> pa.Table:
  source = pa.memory_map(name)
  if is_file:
    return pa.ipc.open_file(source).read_all()
  # a stream that ends early reads as a shorter one
  with open(name, 'rb') as file:
    file.seek(max(os.path.getsize(name) - len(_END), 0))
    if file.read() != _END:
      raise errors.UserError(
        f'{name}: no Arrow file, or cut short; copy it again'
      )
  table = pa.ipc.open_stream(source).read_all()
  table.validate()
  return table


def _labels(rows: Table) -> dict[str, np.ndarray]:
  """All columns but the genes, in memory; one-element lists as numbers."""
  names = [n for n in rows.names if n not in ('input_ids', 'values')]
  if not names:
    return {}
  table = rows.read(0, rows.num_rows, names) if rows.num_rows else None
  labels = {}
  for name in names if table is not None else ():
    column = table[name]
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(
      column.type
    ):
      if pyarrow.compute.any(
        pyarrow.compute.not_equal(pyarrow.compute.list_value_length(column), 1)
      ).as_py():
        if name in _FIELDS:
          raise errors.UserError(f'{name} is a list of several numbers')
        continue  # some array of the cell, no label
      column = pyarrow.compute.list_flatten(column)
    if pa.types.is_nested(column.type) or len(column) != rows.num_rows:
      if name in _FIELDS:
        raise errors.UserError(f'{name} has other rows than the table')
      continue
    if name in _FIELDS and column.null_count:
      raise errors.UserError(f'{name} has rows without a number')
    labels[name] = column.to_pandas().to_numpy()
  return labels


def _species(
  config: source_config.SourceConfig, found: Any, num_rows: int
) -> np.ndarray:
  asked = None
  if config.species in vocabulary.SPECIES:
    asked = vocabulary.SPECIES.index(config.species)
  if found is None:
    if asked is None:
      raise errors.UserError(
        f'{config.path}: no column species; give --species human or mouse'
      )
    return np.full(num_rows, asked, np.int8)
  found = np.asarray(found)
  if found.dtype.kind not in 'iu' or not np.isin(found, (0, 1)).all():
    raise errors.UserError(
      f'{config.path}: column species holds other things than 0 and 1'
    )
  if asked is not None and (found != asked).any():
    raise errors.UserError(
      f'{config.path}: --species {config.species}, but column species says '
      f'otherwise of {(found != asked).sum()} cells'
    )
  return found.astype(np.int8)


def _tokens(path: str, with_mouse: bool) -> dict[str, int]:
  """Token of every gene that these cells can hold, human genes first."""
  table = dictionaries.load(path, ('token', 'tokens', 'id'))
  tokens = {
    gene: int(token)
    for gene, token in table.items()
    if not gene.startswith('<')
    and (with_mouse or not gene.upper().startswith('ENSMUSG'))
  }
  numbers = np.array(list(table.values()))
  if (numbers != np.floor(numbers)).any() or numbers.min() < 0:
    raise errors.UserError(f'{path}: a token is no whole number')
  if len(set(numbers.tolist())) != len(numbers):
    raise errors.UserError(f'{path}: a token stands for two genes')
  if 0 in tokens.values():
    raise errors.UserError(f'{path}: token 0 is the padding, and no gene')
  if numbers.max() > 1 << 24:
    raise errors.UserError(f'{path}: a token above {1 << 24}')
  return tokens


def _medians(paths: str, ids: tuple[str, ...]) -> np.ndarray | None:
  """Median of every gene; 1 where there is none, as in the release."""
  if not paths:
    return None
  table: dict[str, float] = {}
  for path in paths.split(','):
    table |= dictionaries.load(path, ('median', 'nonzero_median', 'medians'))
  medians_R = np.array([table.get(name, 1.0) for name in ids])
  if not (medians_R > 0).all():
    raise errors.UserError(f'{paths}: a median that is not positive')
  known = sum(name in table for name in ids)
  if known < 0.5 * len(ids):
    raise errors.UserError(
      f'{paths}: knows {known:,} of the {len(ids):,} genes with a token; are '
      'they medians of Ensembl ids?'
    )
  return medians_R


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
  """Cells x genes of ranked tokens and values.

  Attributes:
    rows: the table.
    tokens: token of every column.
    names: gene of every column, for errors.
    medians_R: by which counts were divided; None: quotients are the values.
    lengths_C: genes of every cell; None where that is not stored.
  """

  rows: Table
  tokens: np.ndarray
  names: tuple[str, ...]
  medians_R: np.ndarray | None
  lengths_C: np.ndarray | None

  def __post_init__(self):
    column_V = np.full(int(self.tokens.max(initial=0)) + 2, -1, np.int32)
    column_V[self.tokens] = np.arange(len(self.tokens))
    object.__setattr__(self, '_column_V', column_V)

  @property
  def shape(self) -> tuple[int, int]:
    """Cells and genes."""
    return self.rows.num_rows, len(self.tokens)

  @property
  def dtype(self) -> np.dtype:
    """Of the values."""
    return np.dtype(np.float64)

  @property
  def num_entries(self) -> int:
    """Genes of all cells, or a guess."""
    if self.lengths_C is not None:
      return int(self.lengths_C.sum())
    return self.rows.num_rows * MAX_GENES // 2

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix."""
    table = self.rows.read(first, stop, ['input_ids', 'values'])
    tokens_N, widths_C = _flat(table['input_ids'], 'input_ids')
    values_N, others_C = _flat(table['values'], 'values')
    if not np.array_equal(widths_C, others_C):
      cell = first + int(np.argmax(widths_C != others_C))
      raise errors.UserError(f'row {cell} has other numbers of ids and values')
    cell_N = np.repeat(np.arange(stop - first), widths_C)
    used_N = tokens_N != 0
    lengths_C = np.bincount(cell_N[used_N], minlength=stop - first)
    if self.lengths_C is not None:
      wrong = np.flatnonzero(lengths_C != self.lengths_C[first:stop])
      if len(wrong):
        raise errors.UserError(
          f'row {first + wrong[0]} has {lengths_C[wrong[0]]} genes and says '
          f'{self.lengths_C[first + wrong[0]]}: the file is damaged'
        )
    tokens_N, cell_N = tokens_N[used_N], cell_N[used_N]
    values_N = values_N[used_N].astype(np.float64)
    column_V = self._column_V
    known_N = (tokens_N >= 0) & (tokens_N < len(column_V))
    column_N = np.where(known_N, column_V[np.where(known_N, tokens_N, 0)], -1)
    if (column_N < 0).any():
      i = int(np.argmax(column_N < 0))
      raise errors.UserError(
        f'row {first + cell_N[i]} holds token {tokens_N[i]}, which the '
        'dictionary of tokens does not give to a gene of these species'
      )
    if not (np.isfinite(values_N) & (values_N > 0) & (values_N < 64)).all():
      raise errors.UserError(
        'a value that no count has: not log2(1 + count / median)'
      )
    counts_N = np.expm1(values_N * np.log(2))
    if self.medians_R is not None:
      counts_N = self._counts(first, cell_N, column_N, values_N, counts_N)
    return sparse.csr(
      cell_N, column_N, counts_N, (stop - first, len(self.tokens))
    )

  def _counts(self, first, cell_N, column_N, values_N, quotients_N):
    """Whole counts from quotients, where they leave no doubt."""
    median_N = self.medians_R[column_N]
    counts_N = quotients_N * median_N
    whole_N = np.rint(counts_N)
    ulp_N = np.spacing(values_N.astype(np.float32)).astype(np.float64)
    slack_N = _ULPS * ulp_N * np.log(2) * (counts_N + median_N)
    bad_N = slack_N > 1.5  # half of it may be true, and a quarter is let pass
    if bad_N.any():
      i = int(np.argmax(bad_N))
      raise errors.UserError(
        f'row {first + cell_N[i]}: {self.names[column_N[i]]} has some '
        f'{counts_N[i]:.3g} counts, too many to come back exactly from '
        'float32; do without --medians'
      )
    off_N = np.abs(counts_N - whole_N)
    bad_N = (off_N > np.minimum(slack_N + 1e-6, 0.25)) | (whole_N < 1)
    if bad_N.any():
      i = int(np.argmax(bad_N))
      raise errors.UserError(
        f'row {first + cell_N[i]}: {self.names[column_N[i]]} would have '
        f'{counts_N[i]:.6g} counts: these are not the medians that the values '
        'were divided by; find them, or do without --medians'
      )
    return whole_N

  def sample(self) -> np.ndarray:
    """Values of a few cells in several places."""
    num_rows = self.rows.num_rows
    firsts = np.unique(np.linspace(0, max(num_rows - 8, 0), 8).astype(int))
    parts = [self.read(a, min(a + 8, num_rows)).data for a in firsts]
    return np.concatenate(parts) if parts else np.zeros(0)

  def by_rows(self, folder: str | None = None) -> 'Ranked':
    """As it is."""
    del folder
    return self


def _flat(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Elements of lists, one after the other, and the length of each list."""
  kind = column.type
  is_list = (
    pa.types.is_list(kind)
    or pa.types.is_large_list(kind)
    or pa.types.is_fixed_size_list(kind)
  )
  if not is_list or not (
    pa.types.is_integer(kind.value_type)
    or pa.types.is_floating(kind.value_type)
  ):
    raise errors.UserError(f'{name} holds {kind}, no lists of numbers')
  flat = pyarrow.compute.list_flatten(column)
  if column.null_count or flat.null_count:
    raise errors.UserError(f'{name} has rows or elements without a number')
  lengths = pyarrow.compute.list_value_length(column)
  return flat.to_numpy(), lengths.to_numpy().astype(np.int64)
