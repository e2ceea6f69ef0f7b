"""Matrix Market folders: matrix.mtx, barcodes.tsv, features.tsv or genes.tsv.

As Cell Ranger writes them, compressed or not, and as GEO has them, with a
prefix. Text cannot be read from the middle, so it is turned into files by rows
once, in blocks; entries may come in any order.
"""

import contextlib
import dataclasses
import functools
import gzip
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from genecompass_jax import errors
from genecompass_jax.prepare import (
  damage,
  source_config,
  sparse,
  turning,
)
from genecompass_jax.prepare.readers import barcodes, opened

_BLOCK = 8 << 20  # bytes of text at a time
_SLAB = 1 << 22  # entries that are turned at a time
_SAMPLED = 1 << 20  # bytes of which values are sampled
_COLUMNS = ('id', 'gene_name', 'feature_type', 'genome')
_TYPES = ('integer', 'real', 'pattern')


def is_matrix(name: str) -> bool:
  """Whether a name is that of a matrix."""
  return name.endswith(('.mtx', '.mtx.gz'))


def files_of(folder: str) -> list[str]:
  """The matrices of a folder: `matrix.mtx`, `GSM123_matrix.mtx.gz`, ..."""
  return sorted(
    os.path.join(folder, name) for name in os.listdir(folder) if is_matrix(name)
  )


def files_beside(path: str) -> list[str]:
  """Barcodes and features of a matrix, as far as they are there."""
  found = []
  for names in (('barcodes',), ('features', 'genes')):
    with contextlib.suppress(errors.UserError):
      found.append(_beside(path, names))
  return found


def genomes(path: str) -> tuple[str, ...]:
  """The genomes of a matrix, of which one has to be chosen.

  Raises:
    UserError: it cannot be read.
  """
  features = _features(_beside(_matrix_file(path), ('features', 'genes')))
  if 'feature_type' in features:
    features = features[features['feature_type'] == barcodes.GENES]
  found, _ = barcodes.genomes_of(features)
  return tuple(sorted(set(found) - {''}))


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Reads barcodes and features; the matrix is read when it is turned.

  Raises:
    UserError: files are missing, damaged or contradict each other.
  """
  path = _matrix_file(config.path)
  names = _beside(path, ('barcodes',)), _beside(path, ('features', 'genes'))
  cells = _table(names[0])[0].to_numpy(object)
  features = _features(names[1])
  matrix = Text.open(path, len(cells), len(features))
  return barcodes.of_matrix(config, matrix, cells, features, (path, *names))


def _matrix_file(path: str) -> str:
  if not os.path.isdir(path):
    return path
  found = files_of(path)
  if len(found) != 1:
    shown = ', '.join(map(os.path.basename, found[:3]))
    raise errors.UserError(
      f'{path}: holds {len(found)} matrices ({shown}, ...); name one of the '
      'files'
      if found
      else f'{path}: no matrix.mtx or matrix.mtx.gz in this folder'
    )
  return found[0]


def _beside(path: str, names: tuple[str, ...]) -> str:
  """The file of barcodes or features that goes with a matrix."""
  folder, own = os.path.split(path)
  stem = own.removesuffix('.gz').removesuffix('.mtx')
  prefix = stem.removesuffix('matrix')
  endings = [f'{n}.tsv{end}' for n in names for end in ('.gz', '')]
  prefixes = [prefix]
  if prefix == stem:  # SAMPLE.mtx has SAMPLE_barcodes.tsv or SAMPLE.barcodes...
    prefixes = [f'{stem}_', f'{stem}.', f'{stem}-', '']
  for name in (f'{p}{end}' for p in prefixes for end in endings):
    if os.path.exists(os.path.join(folder, name)):
      return os.path.join(folder, name)
  raise errors.UserError(
    f'{path}: no {prefixes[0]}{names[0]}.tsv or .tsv.gz beside it'
  )


def _table(path: str) -> pd.DataFrame:
  """Columns of text without a header."""
  damage.check_no_pointer(path)
  with damage.in_one_line(path, 'the table'):
    with _opened(path) as file:
      text = file.read().decode()
  lines = [line.rstrip('\r') for line in text.split('\n')]
  while lines and not lines[-1]:
    lines.pop()
  cells = [line.split('\t') for line in lines]
  widths = {len(row) for row in cells}
  if len(widths) > 1:
    raise errors.UserError(
      f'{path}: lines of {sorted(widths)} columns; it is damaged'
    )
  return pd.DataFrame(cells, dtype=object) if cells else pd.DataFrame({0: []})


def _features(path: str) -> pd.DataFrame:
  table = _table(path)
  table = table[table.columns[: len(_COLUMNS)]]
  names = _COLUMNS[: table.shape[1]]
  # a fourth column is a genome here or there, the chromosome mostly
  table = table.set_axis(names, axis=1).drop(columns='genome', errors='ignore')
  if 'gene_name' not in table:
    table['gene_name'] = table['id']
  return table


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """A matrix in text, to be turned before it is read.

  Attributes:
    path: of the file.
    shape: cells and genes.
    num_entries: lines that the file says it has.
    kind: `integer`, `real` or `pattern`.
    is_flipped: whether lines name genes first, as Cell Ranger does.
  """

  path: str
  shape: tuple[int, int]
  num_entries: int
  kind: str
  is_flipped: bool
  is_turned = True
  dtype = np.dtype(np.float64)

  @classmethod
  def open(cls, path: str, num_cells: int, num_genes: int) -> 'Text':
    """Reads the head of a file.

    Raises:
      UserError: no matrix of that many cells and genes.
    """
    damage.check_no_pointer(path)
    with damage.in_one_line(path, 'the matrix'), _opened(path) as file:
      kind, *sizes = _head(path, file)
    shape = tuple(sizes[:2])
    is_flipped = shape == (num_genes, num_cells)
    if not is_flipped and shape != (num_cells, num_genes):
      raise errors.UserError(
        f'{path}: {shape[0]} x {shape[1]}, but there are {num_genes} features '
        f'and {num_cells} barcodes: files of different sets, or a header line '
        'in a table'
      )
    return cls(path, (num_cells, num_genes), sizes[2], kind, is_flipped)

  def entries(self) -> Iterator[np.ndarray]:
    """All entries as arrays of `turning.ENTRY`, in the order of the file.

    Raises:
      UserError: the file is damaged or cut short.
    """
    seen = 0
    for entries in self._blocks(_BLOCK):
      seen += len(entries)
      yield entries
    if seen != self.num_entries:
      raise errors.UserError(
        f'{os.path.basename(self.path)} holds {seen} entries and says '
        f'{self.num_entries}: it is cut short or damaged; copy it again'
      )

  def _blocks(self, size: int) -> Iterator[np.ndarray]:
    rest = b''
    with _opened(self.path) as file:
      _head(self.path, file)
      while block := _read(self.path, file, size):
        cut = block.rfind(b'\n') + 1
        if not cut:
          rest += block
          if len(rest) > _BLOCK:
            raise errors.UserError(f'{self.path}: no lines in it')
          continue
        yield self._parsed(rest + block[:cut])
        rest = block[cut:]
    if rest.strip():
      yield self._parsed(rest + b'\n')

  def _parsed(self, text: bytes) -> np.ndarray:
    # one blank between numbers is what the parser takes, and what all write
    if b'\t' in text or b'  ' in text or b'\r' in text or b' \n' in text:
      lines = (b' '.join(line.split()) for line in text.splitlines())
      text = b'\n'.join(lines) + b'\n'
    if not text.strip():
      return np.zeros(0, turning.ENTRY)
    names = ['first', 'second', 'value'][: 2 if self.kind == 'pattern' else 3]
    types = [pa.int64(), pa.int64(), pa.float64()]
    try:
      table = pyarrow.csv.read_csv(
        pa.BufferReader(text),
        pyarrow.csv.ReadOptions(column_names=names),
        pyarrow.csv.ParseOptions(delimiter=' ', quote_char=False),
        pyarrow.csv.ConvertOptions(
          column_types=dict(zip(names, types)), null_values=[]
        ),
      )
    except pa.ArrowException as error:
      raise errors.UserError(
        f'{os.path.basename(self.path)} is damaged: {errors.first_line(error)}'
      ) from None
    entries = np.ones(len(table), turning.ENTRY)
    order = ('column', 'row') if self.is_flipped else ('row', 'column')
    for name, place, size in zip(
      names, order, self.shape[:: -1 if self.is_flipped else 1]
    ):
      numbers = table[name].to_numpy()
      if len(numbers) and not (numbers.min() >= 1 and numbers.max() <= size):
        raise errors.UserError(
          f'{os.path.basename(self.path)} has an entry outside of its shape: '
          'the file is damaged'
        )
      entries[place] = numbers - 1
    if 'value' in names:
      entries['value'] = table['value'].to_numpy()
    else:
      entries['value'] = 1
    return entries

  def read(self, first: int, stop: int):
    """Rows of the matrix, by turning all of it."""
    return self.by_rows().read(first, stop)

  def sample(self) -> np.ndarray:
    """Values at the beginning."""
    return next(self._blocks(_SAMPLED), np.zeros(0, turning.ENTRY))['value']

  def by_rows(self, folder: str | None = None) -> sparse.Rows:
    """The matrix by rows, in files."""
    write = functools.partial(
      turning.write_entries,
      self.entries,
      self.num_entries,
      self.shape,
      self.dtype,
      slab=_SLAB,
    )
    return turning.in_folder(write, folder)


def _opened(path: str) -> BinaryIO:
  return gzip.open(path) if path.endswith('.gz') else open(path, 'rb')


def _read(path: str, file: BinaryIO, size: int) -> bytes:
  try:
    return file.read(size)
  except (EOFError, OSError, zlib.error) as error:
    raise errors.UserError(
      f'{os.path.basename(path)} is cut short or damaged '
      f'({errors.first_line(error)}); copy it again'
    ) from None


def _head(path: str, file: BinaryIO) -> tuple[str, int, int, int]:
  """Kind, rows, columns and entries; the file stands at the first entry."""
  banner = file.readline(1 << 16).decode('latin-1').casefold().split()
  if banner[:1] != ['%%matrixmarket']:
    raise errors.UserError(f'{path}: no Matrix Market file')
  if banner[1:3] != ['matrix', 'coordinate'] or banner[4:] != ['general']:
    raise errors.UserError(
      f'{path}: a {" ".join(banner[1:])}; a coordinate matrix that is general '
      'is needed'
    )
  if banner[3] not in _TYPES:
    raise errors.UserError(f'{path}: holds {banner[3]} values, no counts')
  while (line := file.readline(1 << 16)) and (
    line.startswith(b'%') or not line.strip()
  ):
    pass
  sizes = line.split()
  if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
    raise errors.UserError(f'{path}: no line of sizes; the file is damaged')
  return banner[3], *map(int, sizes)
