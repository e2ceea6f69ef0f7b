"""Gene tables from the public annotation tables, of any release and species.

Genes are the protein-coding, lncRNA and miRNA genes of an annotation (GENCODE
or Ensembl); older releases, naming committees and the orthologue tables add
names, Entrez ids, retired ids and orthologues. Only facts are taken:
identifiers, names, biotypes, orthology.

A name belongs to the gene that holds it most strongly, and is an alias of
several genes only where they hold it equally. From strong to weak: the current
symbol of any gene of any biotype; the symbol of the gene's own Ensembl id in
an older release (count matrices carry the symbols of their release); a former
official symbol; a nickname; and for mouse genes, of which the sources hold few
former symbols, the former symbol of the one-to-one human orthologue (GNB2L1 ->
Gnb2l1), because the committees rename both together. Of 139 such names that
the sources do know as former mouse symbols, all 139 were right.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from genecompass_jax import errors, gene_table, paths
from genecompass_jax.prepare.genes import gene_formats, gene_names, orthology

Row = gene_formats.Row

MANY = gene_table.MANY_PREFIX


@dataclasses.dataclass(frozen=True)
class SpeciesSources:
  """Files of one species.

  Attributes:
    name: of the species, such as rat.
    annotation: the current one: a GTF, or a table of genes.
    older: annotations of older releases, newest first: their ids and symbols
      become aliases.
    names: naming tables, the most trusted first.
  """

  name: str
  annotation: str
  older: tuple[str, ...] = ()
  names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a gene table is made of.

  Attributes:
    species: in the order of the table; the first names shared tokens.
    orthologues: tables of orthologues, the most trusted first.
    biotypes: of the genes that are kept.
    one_to_one: `orthology.STRICT` or `orthology.CONFIDENT`.
  """

  species: tuple[SpeciesSources, ...]
  orthologues: tuple[str, ...] = ()
  biotypes: tuple[str, ...] = gene_table.BIOTYPES
  one_to_one: str = orthology.STRICT


@dataclasses.dataclass(frozen=True)
class Sources:
  """Paths of the tables of the shipped table; `.gz` or plain.

  Attributes:
    human_gencode, mouse_gencode: gene_id, gene_name, biotype, chromosome,
      start, end of the current annotation.
    human_ensembl, mouse_ensembl: older Ensembl tables, newest first: ensgene,
      entrez, symbol.
    hgnc: hgnc_id, symbol, locus_type, location, alias_symbol, prev_symbol,
      entrez_id, ensembl_gene_id, date_modified.
    mgi: the MGI human-mouse homology report.
    homologene: HID and symbol, entrez, ensembl of both species.
  """

  human_gencode: str
  mouse_gencode: str
  human_ensembl: tuple[str, ...]
  mouse_ensembl: tuple[str, ...]
  hgnc: str
  mgi: str
  homologene: str


# What each table is and what may be done with it. The GENCODE and Ensembl
# tables do not name their release; their sha256 does.
_SOURCES = {
  'human_gencode': 'GENCODE human; EMBL-EBI terms of use, unrestricted',
  'mouse_gencode': 'GENCODE mouse; EMBL-EBI terms of use, unrestricted',
  'human_ensembl': 'Ensembl, tabulated by annotables; unrestricted; '
  'identifiers and symbols only',
  'mouse_ensembl': 'Ensembl, tabulated by annotables; unrestricted; '
  'identifiers and symbols only',
  'hgnc': 'HGNC complete set; CC0 1.0',
  'mgi': 'MGI human-mouse homology classes; MGI terms of use, cite MGI',
  'homologene': 'NCBI HomoloGene, updated by the homologene R package; '
  'public domain',
}


@dataclasses.dataclass
class _Species:
  """The genes of one species while the table is built."""

  name: str
  genes: dict[str, gene_names.Gene]
  symbols: set[str]  # of the annotation, of genes of any biotype
  pseudogenes: set[str]
  accessions: dict[str, gene_names.Gene]
  notes: list[str]

  def lookup(self, pseudogenes: frozenset[str]) -> orthology.Lookup:
    keys = {('gene_id', gene_id): gene_id for gene_id in self.genes}
    for name, gene in gene_names.by_any_name(self.genes).items():
      keys['symbol', name] = keys['entrez', name] = gene.gene_id
    for gene in self.genes.values():
      keys |= {('retired', old): gene.gene_id for old in gene.retired}
    for accession, gene in self.accessions.items():
      keys['accession', accession] = gene.gene_id
    return orthology.Lookup(self.name, keys, pseudogenes)


def build(sources: Sources) -> gene_table.GeneTable:
  """The shipped table; the same sources give the same bytes."""
  human = SpeciesSources(
    'human', sources.human_gencode, sources.human_ensembl, (sources.hgnc,)
  )
  mouse = SpeciesSources(
    'mouse', sources.mouse_gencode, sources.mouse_ensembl, (sources.mgi,)
  )
  recipe = Recipe((human, mouse), (sources.mgi, sources.homologene))
  table, kinds, notes = _build(recipe)
  header = _shipped_header(sources, table, kinds)
  (changed,) = (n for n in notes if n.startswith('last change '))
  header['hgnc_last_change'] = changed.removeprefix('last change ')
  return dataclasses.replace(table, header=header)


def build_recipe(recipe: Recipe) -> gene_table.GeneTable:
  """A table of any release and species.

  Raises:
    UserError: a file is missing, damaged, or of no known format; or the
      species, biotypes or ids do not fit together.
  """
  names = [species.name for species in recipe.species]
  if not names or len(set(names)) != len(names):
    raise errors.UserError('give each species one annotation')
  if recipe.one_to_one not in orthology.RULES:
    raise errors.UserError(
      f'one-to-one rule {recipe.one_to_one!r}: give {orthology.RULES}'
    )
  table, kinds, notes = _build(recipe)
  header = {'built_by': 'genecompass prep genes'}
  for number, (role, path) in enumerate(_files(recipe), 1):
    name = re.split(r'[/\\]', str(path))[-1]
    header[f'source {number}'] = (
      f'{role}: {name}; sha256 {paths.sha256_file(path)}'
    )
  header |= {f'note {i}': note for i, note in enumerate(filter(None, notes), 1)}
  header['biotypes'] = ', '.join(recipe.biotypes)
  header['one-to-one rule'] = recipe.one_to_one
  for species, name in enumerate(table.species):
    counts = _biotype_counts(table, species)
    header |= {f'{name} {b}': str(counts[b]) for b in recipe.biotypes}
  for (one, other), counts in kinds.items():
    between = f'{table.species[one]}-{table.species[other]}'
    header |= {f'{between} {kind}': str(counts[kind]) for kind in _KINDS}
  return dataclasses.replace(table, header=header)


_KINDS = ('one2one', 'one2many', 'many2one', 'many2many')


def _files(recipe: Recipe) -> list[tuple[str, str]]:
  files = []
  for species in recipe.species:
    files.append((f'{species.name} annotation', species.annotation))
    files += [(f'{species.name} older release', path) for path in species.older]
    files += [(f'{species.name} names', path) for path in species.names]
  return files + [('orthologues', path) for path in recipe.orthologues]


def _build(
  recipe: Recipe,
) -> tuple[gene_table.GeneTable, dict, list[str]]:
  """The table without its header, orthologue counts, and notes."""
  former = [
    row
    for path in recipe.orthologues
    if _names_ids_and_symbols(path)
    for row in orthology.read(path, ()).rows
  ]
  every = [_genes_of(species, recipe, former) for species in recipe.species]
  _check_ids(every)
  pseudogenes = frozenset().union(*(species.pseudogenes for species in every))
  lookups = [species.lookup(pseudogenes) for species in every]
  tables = [orthology.read(path, lookups) for path in recipe.orthologues]
  for path, table in zip(recipe.orthologues, tables):
    _check_orthologues(path, table, lookups)
  groups, kinds = orthology.group(tables, lookups, recipe.one_to_one)
  for species in every:
    for gene in species.genes.values():
      gene.group = groups.get(gene.gene_id, '')
  for species in every[1:]:
    _name_by_orthologue(every[0], species)
  genes = [gene for species in every for gene in species.genes.values()]
  sizes = [len(species.genes) for species in every]
  return (
    gene_table.GeneTable(
      gene_ids=tuple(gene.gene_id for gene in genes),
      symbols=tuple(gene.name or gene.gene_id for gene in genes),
      aliases=tuple(
        tuple(sorted({*gene.aliases, *gene.retired})) for gene in genes
      ),
      entrez=tuple('|'.join(gene.entrez) for gene in genes),
      species_G=np.repeat(np.arange(len(every)), sizes),
      biotypes=tuple(gene.biotype for gene in genes),
      orthologue_groups=tuple(gene.group for gene in genes),
      species=tuple(species.name for species in every),
    ),
    kinds,
    [note for species in every for note in species.notes],
  )


def _names_ids_and_symbols(path: str) -> bool:
  first = next(gene_formats.rows(path), {})
  return 'HID' in first and any(name.endswith('_ensembl') for name in first)


def _check_ids(every: Sequence[_Species]) -> None:
  owner: dict[str, str] = {}
  for species in every:
    for gene_id in species.genes:
      if gene_id in owner:
        raise errors.UserError(
          f'{gene_id} is in the annotations of {owner[gene_id]} and of '
          f'{species.name}; give each species its own'
        )
      owner[gene_id] = species.name


def _check_orthologues(
  path: str, table: orthology.Table, lookups: Sequence[orthology.Lookup]
) -> None:
  classes, _ = orthology.classes_of_genes(table, lookups)
  known = [set(lookup.keys.values()) for lookup in lookups]
  if len(lookups) > 1 and not any(
    len({s for s, gene in keys if gene in known[s]}) > 1 for keys in classes
  ):
    raise errors.UserError(
      f'{path}: it relates no genes of {", ".join(x.name for x in lookups)}; '
      'give a table of these species (one of Entrez ids needs --names with '
      'Entrez ids)'
    )


def _genes_of(
  sources: SpeciesSources, recipe: Recipe, former: Sequence[tuple[str, str]]
) -> _Species:
  """Genes of one species with their names, without orthologues."""
  annotation = gene_formats.read_annotation(sources.annotation)
  rows = annotation.rows
  older = [
    row for path in sources.older for row in gene_formats.read_older(path)
  ]
  with_entrez = [
    {'ensgene': _id(row), 'symbol': _name(row), 'entrez': row['entrez']}
    for row in rows
    if row.get('entrez')
  ]
  alternates = [
    {
      'ensgene': _id(row),
      'symbol': _name(row),
      'entrez': row.get('entrez', ''),
    }
    for row in annotation.alternates
  ]
  older = with_entrez + alternates + older
  symbols = {_name(row) for row in rows}
  notes = (
    [f'{sources.name}: {annotation.release}'] if annotation.release else []
  )
  committees: list[list[gene_formats.Name]] = []
  for path in sources.names:
    names, note = gene_formats.read_names(path, symbols)
    committees.append(names)
    notes.append(note)
  every_name = [name for names in committees for name in names]
  official: dict[str, str] = {}
  entrez: dict[str, str] = {}
  for names in reversed(committees):  # the first table has the last word
    official |= {n.gene_id: n.symbol for n in names if n.gene_id}
    entrez |= {n.symbol: n.entrez for n in names if n.entrez}
    entrez |= {n.gene_id: n.entrez for n in names if n.entrez}
  entrez.pop('', None)  # a gene without a symbol has not that of another
  genes, ids = _current_genes(rows, official, recipe.biotypes)
  if not genes:
    raise errors.UserError(
      f'{sources.annotation}: no gene of the biotypes '
      f'{", ".join(recipe.biotypes)}; it has '
      f'{", ".join(sorted({row["biotype"] for row in rows})[:12])}'
    )
  for name in every_name if 'protein_coding' in recipe.biotypes else ():
    # GSTT1, CCL3L1, ...: no copy on a primary chromosome
    if name.on_alternate and name.gene_id and name.gene_id not in ids:
      genes[name.gene_id] = gene_names.Gene(
        name.gene_id, 'protein_coding', name.symbol
      )
      ids.add(name.gene_id)
  # Where the committee and the annotation name one gene differently, the
  # annotation's name is current.
  names = {_name(row) or official.get(_id(row), '') for row in rows}
  for table in committees:
    if any(name.gene_id for name in table):
      names |= {name.symbol for name in table if name.gene_id not in ids}
  names |= {gene.name for gene in genes.values()}
  genes = dict(sorted(genes.items()))
  numbered = {row['ensgene'] for row in older if row['entrez']}
  numbered = numbered or {n.gene_id for n in every_name if n.entrez}
  gene_names.name_once(genes, official, numbered, recipe.biotypes)
  gene_names.add_official(genes, committees, names, older)
  for gene_id, name in former:
    if gene_id in genes:
      genes[gene_id].add_aliases([name], gene_names.FORMER)
  retired = [(n.gene_id, n.symbol, n.entrez) for n in every_name]
  gene_names.finish(genes, ids, names, entrez, older, retired)
  pseudogenes = {
    name
    for row in rows
    if 'pseudogene' in row['biotype']
    for name in (_name(row), _id(row))
  }
  by_name = gene_names.by_any_name(genes)
  accessions = {}
  for name in every_name:
    gene = genes.get(name.gene_id) or by_name.get(name.symbol)
    if name.accession and gene is not None:
      accessions[name.accession] = gene
  return _Species(sources.name, genes, symbols, pseudogenes, accessions, notes)


def _current_genes(
  rows: Iterable[Row], official: Mapping[str, str], biotypes: Sequence[str]
) -> tuple[dict[str, gene_names.Gene], set[str]]:
  """Genes of the kept biotypes by id, and the ids of all biotypes.

  The pseudoautosomal genes of Y are the genes of X: their ids become aliases.
  """
  genes, ids, on_x = {}, set(), {}
  for row in sorted(rows, key=lambda row: row['gene_id']):
    gene_id = _id(row)
    ids.add(gene_id)
    if row['biotype'] not in biotypes:
      continue
    name = _name(row) or official.get(gene_id, '')
    genes[gene_id] = gene_names.Gene(gene_id, row['biotype'], name)
    if row.get('chromosome') == 'chrX':
      on_x[name, row.get('start'), row.get('end')] = gene_id
  for row in rows:
    if row.get('chromosome') != 'chrY':
      continue
    gene_id = _id(row)
    place = _name(row), row.get('start'), row.get('end')
    if place[0] and place in on_x and genes.pop(gene_id, None):
      genes[on_x[place]].retired.add(gene_id)
  return genes, ids


def _name_by_orthologue(human: _Species, species: _Species) -> None:
  """Gives genes the former symbols of their orthologues of the first species.

  Only where the committees name orthologues alike: `TP53` and `Tp53`.
  """
  partner = {
    gene.group: gene
    for gene in species.genes.values()
    if gene.group and not gene.group.startswith(MANY)
  }
  pairs = [
    (gene.name, partner[gene.group].name)
    for gene in human.genes.values()
    if gene.group in partner
  ]
  alike = sum(one.capitalize() == other for one, other in pairs)
  if alike <= 0.5 * len(pairs):
    return
  current = {name.casefold() for name in species.symbols}
  former = gene_names.unique(
    (name, gene)
    for gene in human.genes.values()
    for name, strength in gene.aliases.items()
    if strength <= gene_names.FORMER
  )
  for name, gene in former.items():
    if (
      gene.group in partner
      and name.casefold() not in current
      and re.fullmatch(
        r'(?!LOC|LINC|KIAA|RP\d)[A-Z][A-Z0-9]*(-[A-Z0-9]+)?', name
      )
    ):
      partner[gene.group].add_aliases(
        [name.capitalize()], gene_names.BY_ORTHOLOGUE
      )
  gene_names.keep_own(species.genes, set())


def _shipped_header(
  sources: Sources, table: gene_table.GeneTable, kinds: Mapping
) -> dict[str, str]:
  header = {'built_by': 'data_prep/make_gene_table.py'}
  for field in dataclasses.fields(sources):
    value = getattr(sources, field.name)
    files = value if isinstance(value, tuple) else (value,)
    for i, path in enumerate(files):
      name = re.split(r'[/\\]', str(path))[-1]
      header[f'source {field.name} {i + 1}'] = (
        f'{name}; {_SOURCES[field.name]}; sha256 {paths.sha256_file(path)}'
      )
  for species, name in enumerate(table.species):
    counts = _biotype_counts(table, species)
    for biotype in gene_table.BIOTYPES:
      header[f'{name} {biotype}'] = str(counts[biotype])
  counts = kinds[0, 1]
  header['one2one orthologues'] = str(counts['one2one'])
  header['other orthologue groups'] = str(counts.total() - counts['one2one'])
  return header


def _biotype_counts(
  table: gene_table.GeneTable, species: int
) -> collections.Counter:
  rows = np.flatnonzero(table.species_G == species)
  return collections.Counter(table.biotypes[g] for g in rows)


def _id(row: Row) -> str:
  return row['gene_id'].partition('.')[0]


def _name(row: Row) -> str:
  return '' if row['gene_name'] == _id(row) else row['gene_name']
