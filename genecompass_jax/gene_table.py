"""Genes of some species: identifiers, names, biotypes and orthologues.

The default table, of human and mouse, is package data, built by
`data_prep/make_gene_table.py`; `genecompass prep genes` builds others. Tables
are text with a checksum: `#key: value` lines, then tab-separated columns; a
name ending in `.gz` is compressed.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.resources
import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import errors, paths

SPECIES = ('human', 'mouse')  # of the default table; codes are indices
BIOTYPES = ('protein_coding', 'lncRNA', 'miRNA')
MANY_PREFIX = 'many'  # of orthologue groups that are not one-to-one

_NAME = '[a-z][a-z0-9_]*'  # of a species: a folder of a corpus is called so
_SPECIES_KEY = 'species'

COLUMNS = (
  'gene_id',
  'symbol',
  'aliases',
  'entrez',
  'species',
  'biotype',
  'orthologue_group',
)


@dataclasses.dataclass(frozen=True, eq=False)
class GeneTable:
  """Annotation of G genes, species by species.

  Attributes:
    gene_ids: Ensembl ids without version, all different.
    symbols: current symbol; the Ensembl id where a gene has none.
    aliases: former symbols, nicknames, and retired Ensembl ids.
    entrez: NCBI gene id; several are joined by `|`, '' where unknown.
    species_G: int8 species code: index in `species`.
    biotypes: `protein_coding`, `lncRNA` or `miRNA`; '' where unknown.
    orthologue_groups: members of one group are orthologous; '' for none. A
      name that begins with `many` is not one-to-one, even where a subset of
      the table holds only one gene of each species. `many7` is of the group
      `7` and leaves its other members one-to-one: of a human gene with one
      mouse and two rat orthologues, the rat genes alone are `many7`.
    header: what the table was made of: releases, licences, checksums.
    species: names of the species, in the order of their genes. Files name
      them where they are not human and mouse.

  Raises:
    ValueError: columns differ in length, an id stands twice, a species code
      has no name, or a gene comes before one of an earlier species.
  """

  gene_ids: tuple[str, ...]
  symbols: tuple[str, ...]
  aliases: tuple[tuple[str, ...], ...]
  entrez: tuple[str, ...]
  species_G: np.ndarray
  biotypes: tuple[str, ...]
  orthologue_groups: tuple[str, ...]
  header: dict[str, str] = dataclasses.field(default_factory=dict)
  species: tuple[str, ...] = SPECIES

  def __post_init__(self):
    species_G = np.array(self.species_G, np.int8)
    species_G.flags.writeable = False
    object.__setattr__(self, 'species_G', species_G)
    lengths = {
      len(getattr(self, field.name))
      for field in dataclasses.fields(self)
      if field.name not in ('header', 'species')
    }
    if lengths != {len(self.gene_ids)}:
      raise ValueError(f'columns of a gene table differ in length: {lengths}')
    if len(set(self.gene_ids)) != len(self.gene_ids):
      raise ValueError('a gene id stands twice in a gene table')
    object.__setattr__(self, 'species', tuple(self.species))
    if len(set(self.species)) != len(self.species) or not all(
      re.fullmatch(_NAME, name) for name in self.species
    ):
      raise ValueError(
        f'species={self.species!r} must be different names of small letters, '
        'digits and _'
      )
    if len(species_G) and not (
      species_G.min() >= 0 and species_G.max() < len(self.species)
    ):
      raise ValueError(f'a species code is outside {self.species}')
    if np.any(np.diff(species_G) < 0):
      raise ValueError(
        f'{" genes come before ".join(self.species)} genes in a gene table'
      )

  def __len__(self) -> int:
    return len(self.gene_ids)

  @functools.cached_property
  def row_of(self) -> dict[str, int]:
    """Row of each Ensembl id."""
    return {gene_id: g for g, gene_id in enumerate(self.gene_ids)}

  @classmethod
  def default(cls) -> 'GeneTable':
    """The table shipped with the package, read once."""
    return _default()

  @classmethod
  def load(cls, path: paths.PathLike) -> 'GeneTable':
    """Reads a table.

    Raises:
      UserError: the file is missing, damaged, or of another format version.
    """
    header, columns = read_table(path, 'gene_table', COLUMNS)
    try:
      return cls.from_columns(columns, header)
    except ValueError as error:
      raise errors.UserError(f'{path}: {error}; build it again') from error

  def save(self, path: paths.PathLike) -> None:
    """Writes the table; the same content gives the same bytes."""
    write_table(path, 'gene_table', self.file_header(), self.columns())

  def file_header(self) -> dict[str, str]:
    """The header as files hold it: with the species, but for the default."""
    if self.species == SPECIES:
      return dict(self.header)
    return {_SPECIES_KEY: ', '.join(self.species), **self.header}

  def columns(self) -> dict[str, Sequence[str]]:
    """The table as columns of text, in the order of the file."""
    pairs = zip(self.gene_ids, self.symbols)
    values = (
      self.gene_ids,
      ['' if name == gene_id else name for gene_id, name in pairs],
      ['|'.join(names) for names in self.aliases],
      self.entrez,
      [self.species[code] for code in self.species_G],
      self.biotypes,
      self.orthologue_groups,
    )
    return dict(zip(COLUMNS, values))

  @classmethod
  def from_columns(
    cls, columns: Mapping[str, Sequence[str]], header: Mapping[str, str]
  ) -> 'GeneTable':
    """The inverse of `columns` and `file_header`.

    Raises:
      ValueError: a gene is of a species that the header does not name.
    """
    header = dict(header)
    named = header.pop(_SPECIES_KEY, ', '.join(SPECIES))
    names = tuple(named.split(', ')) if named else ()
    ids, symbols, aliases, entrez, species, biotypes, groups = (
      columns[name] for name in COLUMNS
    )
    code = {name: i for i, name in enumerate(names)}
    if unknown := set(species) - code.keys():
      raise ValueError(
        f'genes of {min(unknown)!r}, but the species are {names}'
      )
    return cls(
      gene_ids=tuple(ids),
      symbols=tuple(name or gene_id for gene_id, name in zip(ids, symbols)),
      aliases=tuple(tuple(a.split('|')) if a else () for a in aliases),
      entrez=tuple(entrez),
      species_G=np.array([code[name] for name in species], np.int8),
      biotypes=tuple(biotypes),
      orthologue_groups=tuple(groups),
      header=header,
      species=names,
    )

  def subset(self, keep_G: np.ndarray) -> 'GeneTable':
    """The genes where `keep_G` (bool) is True, in the same order."""
    rows = np.flatnonzero(keep_G)

    def take(values):
      return tuple(values[g] for g in rows)

    return GeneTable(
      gene_ids=take(self.gene_ids),
      symbols=take(self.symbols),
      aliases=take(self.aliases),
      entrez=take(self.entrez),
      species_G=self.species_G[rows],
      biotypes=take(self.biotypes),
      orthologue_groups=take(self.orthologue_groups),
      header=dict(self.header),
      species=self.species,
    )

  def is_one_to_one(self, row: int) -> bool:
    """Whether a gene is in an orthologue group, and one-to-one there."""
    group = self.orthologue_groups[row]
    return bool(group) and not group.startswith(MANY_PREFIX)


@functools.cache
def _default() -> GeneTable:
  resources = importlib.resources.files('genecompass_jax') / 'resources'
  with importlib.resources.as_file(resources / 'genes.tsv.gz') as path:
    return GeneTable.load(path)


def write_table(
  path: paths.PathLike,
  kind: str,
  header: Mapping[str, str],
  columns: Mapping[str, Sequence[str]],
  version: int = 1,
) -> None:
  """Writes columns of text with a checksum over header and body.

  Args:
    path: a name ending in `.gz` is compressed, without a time stamp.
    kind: what the file holds; `read_table` asks for it.
    header: lines of text by key.
    columns: equally long, without tabs or line ends.
    version: of the format of this kind.

  Raises:
    ValueError: a value holds a tab or a line end.
  """
  head = [f'#format: genecompass_jax {kind} {version}']
  head += [f'#{key}: {value}' for key, value in header.items()]
  rows = ['\t'.join(columns), *map('\t'.join, zip(*columns.values()))]
  body = '\n'.join(rows) + '\n'
  if (
    any('\n' in line for line in head)
    or body.count('\n') != len(rows)
    or body.count('\t') != len(rows) * (len(columns) - 1)
  ):
    raise ValueError(f'a value of {kind} holds a tab or a line end')
  head.append(f'#sha256: {_digest(head, body)}')
  data = ('\n'.join(head) + '\n' + body).encode()
  if str(path).endswith('.gz'):
    data = gzip.compress(data, compresslevel=9, mtime=0)
  paths.write_bytes(path, data)


def read_table(
  path: paths.PathLike, kind: str, names: Sequence[str], version: int = 1
) -> tuple[dict[str, str], dict[str, list[str]]]:
  """Reads what `write_table` wrote: header and columns.

  Raises:
    UserError: the file is missing, damaged, of another kind or version.
  """
  try:
    data = paths.read_bytes(path)
    if data[:2] == b'\x1f\x8b':
      data = gzip.decompress(data)
    text = data.decode()
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such {kind} file') from None
  except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
    raise errors.UserError(
      f'{path}: damaged {kind} file ({error}); fetch or build it again'
    ) from None
  head, body = [], text
  while body.startswith('#'):
    line, _, body = body.partition('\n')
    head.append(line)
  wanted = f'#format: genecompass_jax {kind} {version}'
  if not head or head[0] != wanted:
    found = (head[0] if head else text[:40].partition('\n')[0]) or 'nothing'
    raise errors.UserError(
      f'{path}: not a {kind} file of format version {version} '
      f'(it begins with {found!r}); build it again with this release'
    )
  if head[-1] != f'#sha256: {_digest(head[:-1], body)}':
    raise errors.UserError(
      f'{path}: damaged {kind} file (sha256 differs); fetch or build it again'
    )
  header = dict(line[1:].split(': ', 1) for line in head[1:-1])
  lines = body.split('\n')[:-1]
  if lines[0].split('\t') != list(names):
    raise errors.UserError(f'{path}: a {kind} file has the columns {names}')
  columns = zip(*(line.split('\t') for line in lines[1:]))
  return header, dict(zip(names, map(list, columns))) or {n: [] for n in names}


def _digest(head: Sequence[str], body: str) -> str:
  return hashlib.sha256(('\n'.join(head) + '\n' + body).encode()).hexdigest()
