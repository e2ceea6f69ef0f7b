"""Tables of orthologues -> groups of orthologous genes.

Tables of many sources are read as classes: sets of genes that the source
calls homologous. Between two species the connected components of the classes
decide: a component of one gene each is one-to-one, whatever else it may be
called. Tables are asked in their order; a later one adds components of genes
that the earlier ones leave alone.

With more than two species, each is compared with the first, so that adding a
species changes nothing between the others: a human gene with one mouse and
two rat orthologues stays one-to-one with the mouse gene. What has no gene of
the first species is compared among the rest, the second first.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from genecompass_jax import errors, gene_table
from genecompass_jax.prepare.genes import gene_formats

Row = gene_formats.Row

STRICT = 'strict'
CONFIDENT = 'confident'
RULES = (STRICT, CONFIDENT)


@dataclasses.dataclass(frozen=True)
class Member:
  """A gene as a table names it.

  Attributes:
    label: what the table calls its species.
    names: (kind, name) to look it up by, in this order; kinds are gene_id,
      entrez, symbol and accession.
    own: what it is called if no gene is found.
    symbol: by which a pseudogene is known.
  """

  label: str
  names: tuple[tuple[str, str], ...]
  own: str
  symbol: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of orthologues.

  Attributes:
    classes: each a list of members.
    doubted: indices of classes that the source itself holds in doubt.
    rows: of tables that name Ensembl ids and symbols together, for aliases:
      (Ensembl id, symbol).
  """

  classes: tuple[tuple[Member, ...], ...]
  doubted: frozenset[int] = frozenset()
  rows: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Lookup:
  """How the genes of one species are found.

  Attributes:
    name: of the species.
    keys: by kind and name: the id of a gene of the table.
    pseudogenes: names and ids that are no genes; they are left out.
  """

  name: str
  keys: Mapping[tuple[str, str], str]
  pseudogenes: frozenset[str]


def read(path: str, lookups: Sequence[Lookup]) -> Table:
  """Reads a table of orthologues of any known format.

  Rows of other species are left out at once: Compara and NCBI have millions.

  Known are the MGI homology report, HomoloGene (NCBI's, or the update with
  columns human_ensembl, mouse_ensembl, ...), Ensembl Compara homologies (TSV
  of the FTP server, or a BioMart export), NCBI gene_orthologs and
  RGD_ORTHOLOGS.

  Raises:
    UserError: the file is missing, damaged, or none of these.
  """
  with gene_formats.all_columns(path):
    return _read(path, lookups)


def _read(path: str, lookups: Sequence[Lookup]) -> Table:
  first = next(gene_formats.rows(path), {})
  columns = set(first)
  if {'DB Class Key', 'NCBI Taxon ID', 'HGNC ID'} <= columns:
    return _classes(
      (row['DB Class Key'], _of_mgi(row)) for row in gene_formats.rows(path)
    )
  if 'HID' in columns and any(c.endswith('_ensembl') for c in columns):
    return _of_homologene_table(list(gene_formats.rows(path)), columns)
  if {'HID', 'taxid', 'GeneID'} <= columns:
    return _classes(
      (
        row['HID'],
        Member(
          row['taxid'],
          (('entrez', row['GeneID']), ('symbol', row['Symbol'])),
          row['GeneID'],
          row['Symbol'],
        ),
      )
      for row in gene_formats.rows(path)
    )
  if {'gene_stable_id', 'homology_gene_stable_id'} <= columns:
    return _of_compara(path, lookups)
  if 'relationship' in columns and 'Other_GeneID' in columns:
    return _of_gene_orthologs(path, lookups)
  if 'RAT_GENE_SYMBOL' in columns:
    return _of_rgd(gene_formats.rows(path))
  if 'Gene stable ID' in columns:
    return _of_biomart(list(gene_formats.rows(path)), columns, path)
  raise errors.UserError(
    f'{path}: no table of orthologues that is known: give the MGI homology '
    'report, HomoloGene, Compara homologies, gene_orthologs or RGD_ORTHOLOGS'
  )


def _classes(rows: Iterable[tuple[str, Member]]) -> Table:
  classes = collections.defaultdict(list)
  for key, member in rows:
    classes[key].append(member)
  return Table(tuple(map(tuple, classes.values())))


def _of_mgi(row: Row) -> Member:
  label, symbol = row['NCBI Taxon ID'], row['Symbol']
  if row['HGNC ID']:  # a human gene: the accession is the surest
    accession = row['HGNC ID']
    return Member(label, (('accession', accession),), accession, symbol)
  by_entrez = ('entrez', row['EntrezGene ID'])
  return Member(label, (('symbol', symbol), by_entrez), symbol, symbol)


def _of_homologene_table(rows: Sequence[Row], columns: set[str]) -> Table:
  species = sorted(
    c.removesuffix('_ensembl') for c in columns if c.endswith('_ensembl')
  )
  kinds = (('gene_id', 'ensembl'), ('entrez', 'entrez'), ('symbol', 'symbol'))
  members = (
    (
      row['HID'],
      Member(
        name,
        tuple((kind, row[f'{name}_{column}']) for kind, column in kinds),
        row[f'{name}_entrez'],
        row[f'{name}_symbol'],
      ),
    )
    for row in rows
    for name in species
  )
  named = tuple(
    (row[f'{name}_ensembl'], row[f'{name}_symbol'])
    for name in species
    for row in rows
  )
  return dataclasses.replace(_classes(members), rows=named)


def _by_id(label: str, gene_id: str) -> Member:
  gene_id = gene_id.partition('.')[0]
  names = (('gene_id', gene_id), ('retired', gene_id))
  return Member(label, names, gene_id, gene_id)


def _by_entrez(label: str, entrez: str) -> Member:
  return Member(label, (('entrez', entrez),), entrez)


def _pairs(pairs: Sequence[tuple[Member, Member, bool]]) -> Table:
  return Table(
    tuple((one, other) for one, other, _ in pairs),
    frozenset(i for i, (*_, doubted) in enumerate(pairs) if doubted),
  )


def _of_compara(path: str, lookups: Sequence[Lookup]) -> Table:
  prefixes = {
    _prefix(name)
    for lookup in lookups
    for kind, name in lookup.keys
    if kind == 'gene_id'
  }
  return _pairs(
    [
      (
        _by_id(row['species'], row['gene_stable_id']),
        _by_id(row['homology_species'], row['homology_gene_stable_id']),
        row.get('is_high_confidence', '') == '0',
      )
      for row in gene_formats.rows(path)
      if row['homology_type'].startswith('ortholog')
      and _prefix(row['gene_stable_id']) in prefixes
      and _prefix(row['homology_gene_stable_id']) in prefixes
    ]
  )


def _prefix(gene_id: str) -> str:
  return gene_id.partition('.')[0].rstrip('0123456789')


def _of_biomart(rows: Sequence[Row], columns: set[str], path: str) -> Table:
  others = [
    match[1]
    for column in sorted(columns)
    if (match := re.fullmatch(r'(.+) gene stable ID', column))
  ]
  if not others:
    raise errors.UserError(
      f'{path}: a BioMart export without orthologues; choose the attribute '
      '"... gene stable ID" of Homologues'
    )
  pairs = []
  for other in others:
    doubt = next(
      (c for c in columns if c.startswith(f'{other} orthology c')), ''
    )
    pairs += [
      (
        _by_id('', row['Gene stable ID']),
        _by_id(other, row[f'{other} gene stable ID']),
        row.get(doubt, '') == '0',
      )
      for row in rows
      if row[f'{other} gene stable ID']
    ]
  return _pairs(pairs)


def _of_gene_orthologs(path: str, lookups: Sequence[Lookup]) -> Table:
  known = {
    name for lookup in lookups for kind, name in lookup.keys if kind == 'entrez'
  }
  taxa = set()
  for row in gene_formats.rows(path):
    if row['GeneID'] in known:
      taxa.add(row['tax_id'])
    if row['Other_GeneID'] in known:
      taxa.add(row['Other_tax_id'])
  return _pairs(
    [
      (
        _by_entrez(row['tax_id'], row['GeneID']),
        _by_entrez(row['Other_tax_id'], row['Other_GeneID']),
        False,
      )
      for row in gene_formats.rows(path)
      if row['relationship'] == 'Ortholog'
      and row['tax_id'] in taxa
      and row['Other_tax_id'] in taxa
    ]
  )


def _of_rgd(rows: Iterable[Row]) -> Table:
  return _pairs(
    [
      (
        _by_entrez('rat', row['RAT_GENE_NCBI_GENE_ID']),
        _by_entrez(name.lower(), entrez),
        False,
      )
      for row in rows
      if row['RAT_GENE_NCBI_GENE_ID']
      for name in ('HUMAN', 'MOUSE')
      for entrez in re.split('[|;]', row[f'{name}_ORTHOLOG_NCBI_GENE_ID'])
      if entrez
    ]
  )


Key = tuple[int, str]  # of a gene: species, and its id or what a table calls it


def classes_of_genes(
  table: Table, lookups: Sequence[Lookup]
) -> tuple[list[set[Key]], set[frozenset[Key]]]:
  """A table in terms of genes: its classes, and those that it doubts.

  The species that a label means is the one of which most of its names are
  known; labels of other species are left out with their genes. A member that
  is no gene of the table stays in, under its own name: its class is then not
  one-to-one. Pseudogenes are left out.
  """
  hits: dict[str, list[int]] = {}
  for members in table.classes:
    for member in members:
      counts = hits.setdefault(member.label, [0] * len(lookups))
      for s, lookup in enumerate(lookups):
        counts[s] += any(name in lookup.keys for name in member.names)
  species_of = {
    label: max(range(len(counts)), key=counts.__getitem__)
    for label, counts in hits.items()
    if max(counts)
  }
  classes, doubted = [], set()
  for number, members in enumerate(table.classes):
    keys = set()
    for member in members:
      if member.label not in species_of:
        continue
      species = species_of[member.label]
      lookup = lookups[species]
      found = (lookup.keys[n] for n in member.names if n in lookup.keys)
      gene = next(found, None)
      if gene is not None:
        keys.add((species, gene))
      elif member.symbol not in lookup.pseudogenes:
        keys.add((species, f'{lookup.name} {member.own}'))
    if number in table.doubted:
      doubted.add(frozenset(keys))
    classes.append(keys)
  return classes, doubted


def group(
  tables: Sequence[Table], lookups: Sequence[Lookup], rule: str = STRICT
) -> tuple[dict[str, str], dict[tuple[int, int], collections.Counter]]:
  """Names the orthologue group of every gene that has one.

  Args:
    tables: the most trusted first.
    lookups: of the species, the first first.
    rule: 'strict': one gene of each species and no other member; 'confident':
      and the source calls the pair one of high confidence, if it says.

  Returns:
    Group of each gene id, as `GeneTable.orthologue_groups` has them; and for
    each two species the number of groups that are one2one, one2many,
    many2one or many2many.
  """
  read_tables = [classes_of_genes(table, lookups) for table in tables]
  genes = [set(lookup.keys.values()) for lookup in lookups]
  kinds = {}
  components: dict[tuple[int, int], list[set[Key]]] = {}
  doubted = set().union(*(doubts for _, doubts in read_tables))
  for first in range(len(lookups)):
    for second in range(first + 1, len(lookups)):
      pair = first, second
      components[pair] = _of_pair(pair, read_tables, genes)
      kinds[pair] = collections.Counter(
        _kind(members, first) for members in components[pair]
      )

  def is_pair(members: set[Key]) -> bool:
    certain = rule == STRICT or frozenset(members) not in doubted
    return len(members) == 2 and certain

  known = _known(genes)
  named: list[tuple[set[Key], set[Key]]] = []  # one-to-one members, and others
  taken: set[Key] = set()
  for first in range(len(lookups)):
    around = []
    for second in range(first + 1, len(lookups)):
      for members in components[first, second]:
        free = members - taken if first else members
        if len({species for species, _ in free & known}) > 1:
          around.append((free, is_pair(members)))
    new = _around(first, around, known)
    named += new
    taken |= {key for ones, others in new for key in ones | others}
  groups = {}
  named.sort(key=lambda members: min(_ids(members[0] | members[1])))
  for number, (ones, others) in enumerate(named, 1):
    groups |= {gene: f'{number}' for _, gene in ones & known}
    many = f'{gene_table.MANY_PREFIX}{number}'
    groups |= {gene: many for _, gene in others & known}
  return groups, kinds


def _known(genes: Sequence[set[str]]) -> set[Key]:
  return {(s, gene) for s, known in enumerate(genes) for gene in known}


def _ids(keys: Iterable[Key]) -> list[str]:
  return [name for _, name in keys]


def _of_pair(
  pair: tuple[int, int],
  tables: Sequence[tuple[list[set[Key]], object]],
  genes: Sequence[set[str]],
) -> list[set[Key]]:
  """Components of two species, of the first table that has their genes."""
  found: list[set[Key]] = []
  seen: set[Key] = set()
  for classes, _ in tables:
    inside = ({key for key in keys if key[0] in pair} for keys in classes)
    new = [c for c in _components(filter(None, inside)) if not c & seen]
    found += new
    seen |= {key for members in new for key in members}
  return [
    members
    for members in found
    if all(
      any(s == species and gene in genes[s] for s, gene in members)
      for species in pair
    )
  ]


def _kind(members: set[Key], first: int) -> str:
  ours = sum(species == first for species, _ in members)
  names = ('one' if n == 1 else 'many' for n in (ours, len(members) - ours))
  return '2'.join(names)


def _around(
  first: int, components: Sequence[tuple[set[Key], bool]], known: set[Key]
) -> list[tuple[set[Key], set[Key]]]:
  """Groups around the genes of a species: one-to-one members, and others.

  A gene of the first species that is one-to-one with another species makes a
  group with its partners. A component that is not one-to-one joins the first
  group that it shares a gene with; those that share none with a group are
  groups together with the components they share genes with.
  """
  ones: dict[Key, set[Key]] = {}
  waiting = []
  for members, is_pair in components:
    if is_pair:
      (key,) = (key for key in members if key[0] == first)
      ones.setdefault(key, set()).update(members)
    else:
      waiting.append(members)
  others: dict[Key, set[Key]] = {key: set() for key in ones}
  home = {key: anchor for anchor, members in ones.items() for key in members}
  apart: list[set[Key]] = []
  while waiting:
    apart = []
    for members in waiting:
      anchor = min((home[key] for key in members if key in home), default=None)
      if anchor is None:
        apart.append(members)
        continue
      fresh = members - home.keys()
      others[anchor] |= fresh
      home |= dict.fromkeys(fresh, anchor)
    if len(apart) == len(waiting):
      break
    waiting = apart
  found = [(ones[key], others[key]) for key in sorted(ones)]
  found += [(set(), members) for members in _components(apart)]
  return [
    (pairs, rest)
    for pairs, rest in found
    if len({species for species, _ in (pairs | rest) & known}) > 1
  ]


def _components(classes: Iterable[set[Key]]) -> list[set[Key]]:
  """Sets that share a member, joined."""
  joined: dict[Key, set[Key]] = {}
  for members in classes:
    together = set(members).union(*(joined.get(key, ()) for key in members))
    for key in together:
      joined[key] = together
  return list({id(group): group for group in joined.values()}.values())
