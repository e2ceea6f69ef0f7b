"""Genes <-> tokens.

Tokens 0 and 1 are `<pad>` and `<mask>`; genes follow in the order of the gene
table, human genes first. A gene with an orthologue in an earlier species takes
that gene's token (a mouse gene the human one's), so a token may stand for
several genes.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from genecompass_jax import errors, gene_table, paths

SPECIES = gene_table.SPECIES  # of the default; a vocabulary has its own
PAD = 0
MASK = 1
NUM_SPECIAL = 2
MAX_ROWS = 65_535  # genes of a species: a row of its list takes two bytes

LAYOUTS = ('compact', 'released')
ORTHOLOGUES = ('one2one', 'released', 'none')


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """G genes and their V tokens.

  Attributes:
    genes: the genes, human first; their table names the species.
    token_G: int32 token of every gene, NUM_SPECIAL <= token < size.
    size: number of tokens V, `<pad>` and `<mask>` included.
    layout: 'compact': a mouse gene that shares a token has no row of its own.
      'released': every gene has a row, as in the original's 50,558; the row
      of a mouse gene that shares a token is never used as input. Genes that
      share have the unused rows in their order.
    orthologues: 'one2one': a gene shares the token of its one-to-one
      orthologue in the first species of the table that has its group (human,
      if any). 'released': every gene of a group takes the token of the first
      gene of that species (many-to-one). 'none': nothing is shared.
  """

  genes: gene_table.GeneTable
  token_G: np.ndarray
  size: int
  layout: str
  orthologues: str

  def __post_init__(self):
    token_G = np.array(self.token_G, np.int32)
    token_G.flags.writeable = False
    object.__setattr__(self, 'token_G', token_G)
    _check_choice('layout', self.layout, LAYOUTS)
    _check_choice('orthologues', self.orthologues, ORTHOLOGUES)
    if len(token_G) != len(self.genes):
      raise ValueError(f'{len(token_G)} tokens for {len(self.genes)} genes')
    if len(token_G) and not (
      token_G.min() >= NUM_SPECIAL and token_G.max() < self.size
    ):
      raise ValueError(f'a token is outside [{NUM_SPECIAL}, {self.size})')

  @property
  def species(self) -> tuple[str, ...]:
    """Names of the species; a species code is an index in it."""
    return self.genes.species

  def __repr__(self) -> str:
    return (
      f'Vocabulary({len(self.genes):,} genes, {self.size:,} tokens, '
      f'{self.layout}, orthologues {self.orthologues})'
    )

  @classmethod
  def from_genes(
    cls,
    table: gene_table.GeneTable,
    orthologues: str = 'one2one',
    layout: str = 'compact',
  ) -> 'Vocabulary':
    """Numbers the genes of a table in its order; see the class for choices."""
    _check_choice('orthologues', orthologues, ORTHOLOGUES)
    # rows of the members of each orthologue group, by species
    groups: dict[str, dict[int, list[int]]] = {}
    for g, group in enumerate(table.orthologue_groups):
      if not group:
        continue
      if orthologues == 'released':
        group = group.removeprefix(gene_table.MANY_PREFIX)
      elif not table.is_one_to_one(g):
        continue
      members = groups.setdefault(group, {})
      members.setdefault(int(table.species_G[g]), []).append(g)
    namer_G = np.arange(len(table))  # the gene whose token a gene takes
    for members in groups.values() if orthologues != 'none' else ():
      first = min(members)
      for species, rows in members.items():
        pair = len(rows) == len(members[first]) == 1
        if species != first and (pair or orthologues == 'released'):
          namer_G[rows] = members[first][0]
    return cls._numbered(table, namer_G, orthologues, layout)

  @classmethod
  def _numbered(cls, table, namer_G, orthologues, layout) -> 'Vocabulary':
    has_row_G = namer_G == np.arange(len(table))
    if layout == 'released':
      has_row_G = np.ones_like(has_row_G)
    row_G = np.cumsum(has_row_G) - 1 + NUM_SPECIAL
    size = NUM_SPECIAL + int(has_row_G.sum())
    return cls(table, row_G[namer_G], size, layout, orthologues)

  @classmethod
  def default(cls) -> 'Vocabulary':
    """All genes of the default table, one-to-one orthologues shared."""
    return _default()

  @classmethod
  def from_lists(
    cls,
    human_ids: Sequence[str],
    mouse_ids: Sequence[str],
    mouse_to_human: Mapping[str, str],
  ) -> 'Vocabulary':
    """The original's layout from its lists of Ensembl ids, in their order.

    The original has 23,113 human and 27,443 mouse ids: 50,558 tokens. The map
    may be many-to-one. Symbols and biotypes come from the default table.

    Raises:
      UserError: an id stands twice, or the map names an unlisted gene.
    """
    ids = (*human_ids, *mouse_ids)
    if len(set(ids)) != len(ids):
      raise errors.UserError('a gene id stands twice in the vocabulary lists')
    human, mouse = set(human_ids), set(mouse_ids)
    for mouse_id, human_id in mouse_to_human.items():
      if mouse_id not in mouse or human_id not in human:
        raise errors.UserError(
          f'orthologue pair {mouse_id!r}: {human_id!r} is not in the lists'
        )
    table = _table_of_lists(human_ids, mouse_ids, mouse_to_human)
    return cls.from_genes(table, orthologues='released', layout='released')

  @classmethod
  def from_tokens(
    cls, token_of: Mapping[str, int], mouse_to_human: Mapping[str, str]
  ) -> 'Vocabulary':
    """The vocabulary of the original's dictionary {gene id: token}.

    Args:
      token_of: the genes, each with a token of its own; together they are
        NUM_SPECIAL, NUM_SPECIAL + 1, ... in any order.
      mouse_to_human: orthologues: such a mouse gene is read as the human one.

    Raises:
      UserError: tokens are missing or stand twice, an id is of neither
        species, or the map is of other genes.
    """
    by_token = sorted(token_of, key=token_of.__getitem__)
    wanted = range(NUM_SPECIAL, NUM_SPECIAL + len(by_token))
    for gene_id, token in zip(by_token, wanted):
      if token_of[gene_id] != token:
        raise errors.UserError(
          f'no gene, or several, have token {token}; every token from '
          f'{NUM_SPECIAL} up to the last must be that of one gene'
        )
    species = {i: _species_of_id(i) for i in by_token}
    if unknown := [i for i, code in species.items() if code is None]:
      raise errors.UserError(
        f'{len(unknown)} gene ids are neither human (ENSG...) nor mouse '
        f'(ENSMUSG...), {unknown[0]!r} for one'
      )
    for mouse_id, human_id in mouse_to_human.items():
      if (species.get(mouse_id), species.get(human_id)) != (1, 0):
        raise errors.UserError(
          f'{mouse_id!r}: {human_id!r} is no pair of a mouse and a human gene '
          'of the dictionary'
        )
    lists = [[i for i in by_token if species[i] == code] for code in (0, 1)]
    table = _table_of_lists(*lists, mouse_to_human)
    token_G = [token_of[mouse_to_human.get(i, i)] for i in table.gene_ids]
    size = NUM_SPECIAL + len(by_token)
    return cls(table, np.array(token_G), size, 'released', 'released')

  def restrict(self, gene_ids: Iterable[str]) -> 'Vocabulary':
    """The vocabulary of some genes, and of the genes that share their tokens.

    Tokens are numbered anew, without gaps, in the old order.

    Raises:
      UserError: a gene is not in this vocabulary.
    """
    gene_ids = list(gene_ids)
    kept = self.tokens(gene_ids)
    if np.any(kept < 0):
      unknown = gene_ids[int(np.argmin(kept))]
      raise errors.UserError(f'gene {unknown!r} is not in the vocabulary')
    keep_G = np.isin(self.token_G, kept)
    new_row_G = np.cumsum(keep_G) - 1
    namer_G = self._namer_V[self.token_G]
    return self._numbered(
      self.genes.subset(keep_G),
      new_row_G[namer_G[keep_G]],
      self.orthologues,
      self.layout,
    )

  @functools.cached_property
  def _namer_V(self) -> np.ndarray:
    """Row of the gene that gives a token its name; -1 for special tokens."""
    namer_V = np.full(self.size, -1, np.int32)
    namer_V[self.token_G[::-1]] = np.arange(len(self.genes))[::-1]
    if self.layout == 'released':
      shares_G = namer_V[self.token_G] != np.arange(len(self.genes))
      unused_V = namer_V < 0
      unused_V[:NUM_SPECIAL] = False
      namer_V[unused_V] = np.flatnonzero(shares_G)
    return namer_V

  def tokens(self, gene_ids: Sequence[str]) -> np.ndarray:
    """int32 tokens of Ensembl ids; -1 where a gene is unknown."""
    row_of = self.genes.row_of
    rows = np.array([row_of.get(i, -1) for i in gene_ids], np.int64)
    return np.where(rows < 0, -1, np.append(self.token_G, -1)[rows]).astype(
      np.int32
    )

  def gene_rows(self, species: int) -> np.ndarray:
    """Rows in the gene table of the genes of one species, in its order [R]."""
    return np.flatnonzero(self.genes.species_G == species)

  def check_rows(self) -> None:
    """Refuses gene lists that the rows of a cell cannot count.

    Raises:
      UserError: a species has more than `MAX_ROWS` genes.
    """
    for species, name in enumerate(self.species):
      number = int((self.genes.species_G == species).sum())
      if number > MAX_ROWS:
        raise errors.UserError(
          f'{number:,} {name} genes in the vocabulary, cells take '
          f'{MAX_ROWS:,}: leave biotypes out of its gene table'
        )

  def species_tokens(self, species: int) -> np.ndarray:
    """int32 sorted distinct tokens that a cell of a species can hold."""
    return np.unique(self.token_G[self.genes.species_G == species])

  def is_shared_V(self) -> np.ndarray:
    """bool [V]: the token stands for genes of several species."""
    species_V = np.zeros(self.size, np.int8)
    for species in range(len(self.species)):
      species_V[self.species_tokens(species)] += 1
    return species_V > 1

  def naming_species_V(self) -> np.ndarray:
    """int8 [V] species of the gene that gives a token its name, 0 if special."""
    return np.where(
      self._namer_V < 0, 0, self.genes.species_G[self._namer_V]
    ).astype(np.int8)

  def token_gene_ids(self) -> tuple[str, ...]:
    """[V] Ensembl id of every token; that of the first species, if shared."""
    return self._named(self.genes.gene_ids)

  def token_symbols(self) -> tuple[str, ...]:
    """[V] symbol of every token; that of the first species, if shared."""
    return self._named(self.genes.symbols)

  def _named(self, names: Sequence[str]) -> tuple[str, ...]:
    genes = (names[g] for g in self._namer_V[NUM_SPECIAL:].tolist())
    return ('<pad>', '<mask>', *genes)

  def prior_rows_SV(self) -> np.ndarray:
    """int32 row of the gene whose prior a token takes in a cell of a species.

    A shared token takes the mouse gene's prior in a mouse cell, the last one
    where several mouse genes share it; any other token the prior of the gene
    that names it, whatever the cell's species; special tokens have -1. This
    is the look-up of the original's released code, whose random replacement
    can put a token of the other species into a cell. Further species look up
    as mouse does.
    """
    rows_SV = np.tile(self._namer_V, (len(self.species), 1))
    for species in range(1, len(self.species)):
      rows = self.gene_rows(species)
      np.maximum.at(rows_SV[species], self.token_G[rows], rows.astype(np.int32))
    return rows_SV

  @functools.cached_property
  def sha256(self) -> str:
    """Digest of what a model depends on: genes, tokens and layout.

    Symbols and aliases are left out: better names do not change a model.
    """
    lines = [f'{self.size} {self.layout} {self.orthologues}']
    if self.species != SPECIES:
      lines[0] += f' {" ".join(self.species)}'
    lines += [
      f'{gene_id} {species} {token}'
      for gene_id, species, token in zip(
        self.genes.gene_ids, self.genes.species_G, self.token_G
      )
    ]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()

  def save(self, path: paths.PathLike) -> None:
    """Writes genes and tokens as text; the same content, the same bytes."""
    header = {
      'layout': self.layout,
      'orthologues': self.orthologues,
      'size': str(self.size),
    }
    of_genes = self.genes.file_header()
    header |= {f'genes.{key}': value for key, value in of_genes.items()}
    columns = {'token': list(map(str, self.token_G)), **self.genes.columns()}
    gene_table.write_table(path, 'vocabulary', header, columns)

  @classmethod
  def load(cls, path: paths.PathLike) -> 'Vocabulary':
    """Reads a vocabulary.

    Raises:
      UserError: the file is missing, damaged, or of another format version.
    """
    names = ('token', *gene_table.COLUMNS)
    header, columns = gene_table.read_table(path, 'vocabulary', names)
    of_genes = {
      key.removeprefix('genes.'): value
      for key, value in header.items()
      if key.startswith('genes.')
    }
    try:
      return cls(
        genes=gene_table.GeneTable.from_columns(columns, of_genes),
        token_G=np.array(columns['token'], np.int32),
        size=int(header['size']),
        layout=header['layout'],
        orthologues=header['orthologues'],
      )
    except ValueError as error:
      raise errors.UserError(f'{path}: {error}; build it again') from error


def _table_of_lists(
  human_ids: Sequence[str],
  mouse_ids: Sequence[str],
  mouse_to_human: Mapping[str, str],
) -> gene_table.GeneTable:
  """Lists of ids with what the default table knows about them."""
  ids = (*human_ids, *mouse_ids)
  mapped = set(mouse_to_human.values())
  group_of = {i: i for i in human_ids if i in mapped} | dict(mouse_to_human)
  known = gene_table.GeneTable.default()
  rows = [known.row_of.get(gene_id) for gene_id in ids]

  def column(values, default):
    return tuple(default if g is None else values[g] for g in rows)

  symbols = column(known.symbols, '')
  return gene_table.GeneTable(
    gene_ids=ids,
    symbols=tuple(name or i for name, i in zip(symbols, ids)),
    aliases=column(known.aliases, ()),
    entrez=column(known.entrez, ''),
    species_G=np.repeat([0, 1], [len(human_ids), len(mouse_ids)]),
    biotypes=column(known.biotypes, ''),
    orthologue_groups=tuple(group_of.get(i, '') for i in ids),
    header={'source': 'lists of gene ids'},
  )


def _species_of_id(gene_id: str) -> int | None:
  """Code of the species that an Ensembl id is of, None if of no other here."""
  found = re.match(r'ENS(MUS)?G\d', gene_id)
  return None if found is None else int(found[1] is not None)


@functools.cache
def _default() -> Vocabulary:
  return Vocabulary.from_genes(gene_table.GeneTable.default())


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(choices)}')
