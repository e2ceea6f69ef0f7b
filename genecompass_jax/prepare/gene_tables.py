"""The gene table from the public annotation tables.

Genes are the protein-coding, lncRNA and miRNA genes of GENCODE; older Ensembl
tables, HGNC and the orthologue tables add names, Entrez ids, retired ids and
orthologues. Only facts are taken: identifiers, names, biotypes, orthology.

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
import csv
import dataclasses
import gzip
import io
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from genecompass_jax import gene_table, paths

Row = Mapping[str, str]

MANY = gene_table.MANY_PREFIX

# Strength of the claim to an alias, strongest first.
_OLDER, _FORMER, _NICKNAME, _BY_ORTHOLOGUE = range(4)


@dataclasses.dataclass(frozen=True)
class Sources:
  """Paths of the tables; `.gz` or plain, tab- or comma-separated by name.

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
class _Gene:
  """What is known of one gene while the table is built."""

  gene_id: str
  biotype: str
  name: str = ''
  entrez: list[str] = dataclasses.field(default_factory=list)
  aliases: dict[str, int] = dataclasses.field(default_factory=dict)
  retired: set[str] = dataclasses.field(default_factory=set)
  group: str = ''

  def add_aliases(self, names: Iterable[str], strength: int) -> None:
    """Remembers the strongest claim to each name."""
    for name in names:
      held = self.aliases.get(name, strength)
      self.aliases[name] = min(strength, held)


def build(sources: Sources) -> gene_table.GeneTable:
  """The table of both species; the same sources give the same table."""
  hgnc = _read(sources.hgnc)
  mgi = _read(sources.mgi)
  homologene = _read(sources.homologene)
  human = _human_genes(sources, hgnc, homologene)
  mouse = _mouse_genes(sources, mgi, homologene)
  pseudogenes = {
    _name(row)
    for path in (sources.human_gencode, sources.mouse_gencode)
    for row in _read(path)
    if 'pseudogene' in row['biotype']
  }
  _group_orthologues(human, mouse, hgnc, mgi, homologene, pseudogenes)
  _name_by_orthologue(human, mouse, sources)
  genes = [*human.values(), *mouse.values()]
  header = _header(sources, human, mouse)
  header['hgnc_last_change'] = max(row['date_modified'] for row in hgnc)
  return gene_table.GeneTable(
    gene_ids=tuple(gene.gene_id for gene in genes),
    symbols=tuple(gene.name or gene.gene_id for gene in genes),
    aliases=tuple(
      tuple(sorted({*gene.aliases, *gene.retired})) for gene in genes
    ),
    entrez=tuple('|'.join(gene.entrez) for gene in genes),
    species_G=np.repeat([0, 1], [len(human), len(mouse)]),
    biotypes=tuple(gene.biotype for gene in genes),
    orthologue_groups=tuple(gene.group for gene in genes),
    header=header,
  )


def _human_genes(
  sources: Sources, hgnc: Sequence[Row], homologene: Sequence[Row]
) -> dict[str, _Gene]:
  gencode = _read(sources.human_gencode)
  older = [row for path in sources.human_ensembl for row in _read(path)]
  official = {row['ensembl_gene_id']: row['symbol'] for row in hgnc}
  entrez = {row['symbol']: row['entrez_id'] for row in hgnc}
  entrez |= {row['ensembl_gene_id']: row['entrez_id'] for row in hgnc}
  genes, ids = _current_genes(gencode, official)
  for row in hgnc:  # GSTT1, CCL3L1, ...: no copy on a primary chromosome
    gene_id = row['ensembl_gene_id']
    if (
      row['locus_type'] == 'gene with protein product'
      and row['location'].endswith('alternate reference locus')
      and gene_id
      and gene_id not in ids
    ):
      genes[gene_id] = _Gene(gene_id, 'protein_coding', row['symbol'])
      ids.add(gene_id)
  # Where HGNC and GENCODE name one gene differently, GENCODE's name is current.
  names = {_name(row) or official.get(_id(row), '') for row in gencode}
  names |= {r['symbol'] for r in hgnc if r['ensembl_gene_id'] not in ids}
  names |= {gene.name for gene in genes.values()}
  genes = dict(sorted(genes.items()))
  _name_once(genes, official, older)
  by_name = {gene.name: gene for gene in genes.values() if gene.name}
  for row in hgnc:
    gene = genes.get(row['ensembl_gene_id']) or by_name.get(row['symbol'])
    if gene is None:
      continue
    gene.add_aliases([row['symbol'], *_split(row['prev_symbol'])], _FORMER)
    gene.add_aliases(_split(row['alias_symbol']), _NICKNAME)
  retired = [
    (row['ensembl_gene_id'], row['symbol'], row['entrez_id']) for row in hgnc
  ]
  _add_names(genes, homologene, 'human_ensembl', 'human_symbol', _FORMER)
  _finish(genes, ids, names, entrez, older, retired)
  return genes


def _mouse_genes(
  sources: Sources, mgi: Sequence[Row], homologene: Sequence[Row]
) -> dict[str, _Gene]:
  gencode = _read(sources.mouse_gencode)
  older = [row for path in sources.mouse_ensembl for row in _read(path)]
  mgi = [row for row in mgi if row['NCBI Taxon ID'] == '10090']
  entrez = {row['Symbol']: row['EntrezGene ID'] for row in mgi}
  genes, ids = _current_genes(gencode, {})
  names = {_name(row) for row in gencode}
  _name_once(genes, {}, older)
  by_entrez = _unique(
    (_whole(row['entrez']), genes[row['ensgene']])
    for row in older
    if row['ensgene'] in genes
  )
  for row in mgi:
    if row['Symbol'] not in names:
      gene = by_entrez.get(row['EntrezGene ID'])
      if gene is None:
        names.add(row['Symbol'])  # of a gene that the table lacks
      else:
        gene.add_aliases([row['Symbol']], _FORMER)
  _add_names(genes, homologene, 'mouse_ensembl', 'mouse_symbol', _FORMER)
  _finish(genes, ids, names, entrez, older, [])
  return genes


def _current_genes(
  gencode: Iterable[Row], official: Mapping[str, str]
) -> tuple[dict[str, _Gene], set[str]]:
  """Genes of the kept biotypes by id, and the ids of all biotypes.

  The pseudoautosomal genes of Y are the genes of X: their ids become aliases.
  """
  genes, ids, on_x = {}, set(), {}
  for row in sorted(gencode, key=lambda row: row['gene_id']):
    gene_id = _id(row)
    ids.add(gene_id)
    if row['biotype'] not in gene_table.BIOTYPES:
      continue
    name = _name(row) or official.get(gene_id, '')
    genes[gene_id] = _Gene(gene_id, row['biotype'], name)
    if row['chromosome'] == 'chrX':
      on_x[name, row['start'], row['end']] = gene_id
  for row in gencode:
    gene_id = _id(row)
    place = _name(row), row['start'], row['end']
    on_y = row['chromosome'] == 'chrY' and place[0]
    if on_y and place in on_x and genes.pop(gene_id, None):
      genes[on_x[place]].retired.add(gene_id)
  return genes, ids


def _name_once(
  genes: Mapping[str, _Gene],
  official: Mapping[str, str],
  older: Sequence[Row],
) -> None:
  """Leaves a symbol to one gene; the others go by their Ensembl id.

  The gene keeps it that the naming committee names; else one with an Entrez
  id; else the first by biotype and id.
  """
  with_entrez = {row['ensgene'] for row in older if row['entrez']}

  def rank(gene):
    return (
      official.get(gene.gene_id) != gene.name,
      gene.gene_id not in with_entrez,
      gene_table.BIOTYPES.index(gene.biotype),
      gene.gene_id,
    )

  taken = set()
  for gene in sorted(genes.values(), key=rank):
    if gene.name in taken:
      gene.name = ''
    taken.add(gene.name)


def _add_names(
  genes: Mapping[str, _Gene],
  rows: Iterable[Row],
  id_key: str,
  name_key: str,
  strength: int,
) -> None:
  for row in rows:
    if row[id_key] in genes:
      genes[row[id_key]].add_aliases([row[name_key]], strength)


def _finish(
  genes: Mapping[str, _Gene],
  ids: set[str],
  names: set[str],
  official_entrez: Mapping[str, str],
  older: Sequence[Row],
  retired: Iterable[tuple[str, str, str]],
) -> None:
  """Adds Entrez ids, former symbols and retired ids; sorts out the names."""
  _add_names(genes, older, 'ensgene', 'symbol', _OLDER)
  # Entrez: the committee's first, then ids that no other gene has taken.
  owner = {}
  for gene in genes.values():
    number = official_entrez.get(gene.gene_id)
    number = number or official_entrez.get(gene.name)
    if number and number not in owner:
      owner[number] = gene
      gene.entrez.append(number)
  official_owned = {gene.gene_id for gene in owner.values()}
  reserved = set(official_entrez.values())
  for row in older:
    gene, number = genes.get(row['ensgene']), _whole(row['entrez'])
    if (
      gene is not None
      and gene.gene_id not in official_owned
      and number
      and number not in reserved
      and owner.setdefault(number, gene) is gene
      and number not in gene.entrez
    ):
      gene.entrez.append(number)
  _keep_own_aliases(genes, names)
  # Ids on alternative contigs and of older releases: same symbol or Entrez.
  by_name = _by_any_name(genes)
  old_ids = [
    (row['ensgene'], row['symbol'], _whole(row['entrez'])) for row in older
  ]
  found = collections.defaultdict(list)
  for old_id, name, number in [*retired, *old_ids]:
    if old_id and old_id not in ids:
      gene = by_name.get(name) or by_name.get(number)
      if gene is not None:
        found[old_id].append(gene)
  for old_id, owners in found.items():
    owners[0].retired.add(old_id)


def _keep_own_aliases(genes: Mapping[str, _Gene], names: set[str]) -> None:
  """Leaves an alias to the genes that hold it most strongly."""
  strongest = {}
  for gene in genes.values():
    for name, strength in gene.aliases.items():
      strongest[name] = min(strength, strongest.get(name, strength))
  for gene in genes.values():
    gene.aliases = {
      name: strength
      for name, strength in gene.aliases.items()
      if strength == strongest[name] and name not in names and _is_name(name)
    }


def _group_orthologues(
  human: Mapping[str, _Gene],
  mouse: Mapping[str, _Gene],
  hgnc: Sequence[Row],
  mgi: Sequence[Row],
  homologene: Sequence[Row],
  pseudogenes: set[str],
) -> None:
  """Names the group of every gene with an orthologue.

  A group is a connected component of the MGI classes. HomoloGene, which is
  older, adds groups of genes that MGI leaves alone. Pseudogenes are left out. Any
  other member that the table lacks still counts: its group is not one-to-one.
  """
  human_names, mouse_names = _by_any_name(human), _by_any_name(mouse)
  of_hgnc = {
    row['hgnc_id']: human.get(row['ensembl_gene_id'])
    or human_names.get(row['symbol'])
    for row in hgnc
  }
  classes = collections.defaultdict(set)
  for row in mgi:
    if row['NCBI Taxon ID'] == '9606':
      gene = of_hgnc.get(row['HGNC ID'])
      key = gene.gene_id if gene else f'human {row["HGNC ID"]}'
    else:
      gene = mouse_names.get(row['Symbol']) or mouse_names.get(
        row['EntrezGene ID']
      )
      key = gene.gene_id if gene else f'mouse {row["Symbol"]}'
    if gene or row['Symbol'] not in pseudogenes:
      classes[row['DB Class Key']].add(key)
  groups = _components(classes.values())
  grouped = {key for group in groups for key in group}
  classes = collections.defaultdict(set)
  for row in homologene:
    for species, genes, names in (
      ('human', human, human_names),
      ('mouse', mouse, mouse_names),
    ):
      gene = (
        genes.get(row[f'{species}_ensembl'])
        or names.get(row[f'{species}_entrez'])
        or names.get(row[f'{species}_symbol'])
      )
      key = f'{species} {row[f"{species}_entrez"]}'
      if gene or row[f'{species}_symbol'] not in pseudogenes:
        classes[row['HID']].add(gene.gene_id if gene else key)
  groups += [
    group for group in _components(classes.values()) if not group & grouped
  ]
  number = 0
  for group in sorted(groups, key=min):
    humans = [human[key] for key in group if key in human]
    mice = [mouse[key] for key in group if key in mouse]
    if humans and mice:
      number += 1
      name = str(number) if len(group) == 2 else f'{MANY}{number}'
      for gene in humans + mice:
        gene.group = name


def _name_by_orthologue(
  human: Mapping[str, _Gene], mouse: Mapping[str, _Gene], sources: Sources
) -> None:
  """Gives mouse genes the former symbols of their human orthologues."""
  current = {_name(row).casefold() for row in _read(sources.mouse_gencode)}
  partner = {gene.group: gene for gene in mouse.values()}
  former = _unique(
    (name, gene)
    for gene in human.values()
    for name, strength in gene.aliases.items()
    if strength <= _FORMER
  )
  for name, gene in former.items():
    if (
      gene.group
      and not gene.group.startswith(MANY)
      and name.casefold() not in current
      and re.fullmatch(
        r'(?!LOC|LINC|KIAA|RP\d)[A-Z][A-Z0-9]*(-[A-Z0-9]+)?', name
      )
    ):
      partner[gene.group].add_aliases([name.capitalize()], _BY_ORTHOLOGUE)
  _keep_own_aliases(mouse, set())


def _components(classes: Iterable[set[str]]) -> list[set[str]]:
  """Sets that share a member, joined."""
  joined = {}
  for members in classes:
    group = set(members).union(*(joined.get(key, ()) for key in members))
    for key in group:
      joined[key] = group
  return list({id(group): group for group in joined.values()}.values())


def _by_any_name(genes: Mapping[str, _Gene]) -> dict[str, _Gene]:
  """Genes by official name, present or former, and by Entrez id."""
  names = _unique(
    (name, gene)
    for gene in genes.values()
    for name, strength in gene.aliases.items()
    if strength < _NICKNAME
  )
  names |= {number: g for g in genes.values() for number in g.entrez}
  return names | {g.name: g for g in genes.values() if g.name}


def _unique(pairs: Iterable[tuple[str, _Gene]]) -> dict[str, _Gene]:
  found = {}
  for name, gene in pairs:
    if found.setdefault(name, gene) is not gene:
      found[name] = None
  return {name: gene for name, gene in found.items() if gene is not None}


def _header(
  sources: Sources, human: Mapping[str, _Gene], mouse: Mapping[str, _Gene]
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
  for species, genes in zip(gene_table.SPECIES, (human, mouse)):
    counts = collections.Counter(gene.biotype for gene in genes.values())
    for biotype in gene_table.BIOTYPES:
      header[f'{species} {biotype}'] = str(counts[biotype])
  groups = {gene.group for gene in human.values() if gene.group}
  many = sum(group.startswith(MANY) for group in groups)
  header['one2one orthologues'] = str(len(groups) - many)
  header['other orthologue groups'] = str(many)
  return header


def _read(path: str) -> list[dict[str, str]]:
  data = paths.read_bytes(path)
  if data[:2] == b'\x1f\x8b':
    data = gzip.decompress(data)
  comma = '.csv' in str(path).rsplit('/', 1)[-1]
  text = io.StringIO(data.decode(), newline='')
  return list(csv.DictReader(text, delimiter=',' if comma else '\t'))


def _id(row: Row) -> str:
  return row['gene_id'].partition('.')[0]


def _name(row: Row) -> str:
  return '' if row['gene_name'] == _id(row) else row['gene_name']


def _split(text: str) -> list[str]:
  return [name.strip() for name in text.split('|') if name.strip()]


def _whole(number: str) -> str:
  return number.removesuffix('.0')


def _is_name(name: str) -> bool:
  """Not empty, an Ensembl id, a bare number, or text with a bar or a tab."""
  return bool(name) and not re.fullmatch(r'ENS(MUS)?G\d+|\d+|.*[|\t].*', name)
