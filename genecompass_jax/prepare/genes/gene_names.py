"""Names of the genes of one species: who holds which, and how strongly.

A name belongs to the gene that holds it most strongly, and is an alias of
several genes only where they hold it equally; `gene_tables` says what is
strong.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from genecompass_jax.prepare.genes import gene_formats

Row = gene_formats.Row

# Strength of the claim to an alias, strongest first.
OLDER, FORMER, NICKNAME, BY_ORTHOLOGUE = range(4)


@dataclasses.dataclass
class Gene:
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


def add_official(
  genes: Mapping[str, Gene],
  committees: Sequence[Sequence[gene_formats.Name]],
  names: set[str],
  older: Sequence[Row],
) -> None:
  """Adds former symbols and nicknames; symbols of unknown genes to `names`."""
  by_name = {gene.name: gene for gene in genes.values() if gene.name}
  by_entrez = unique(
    (_whole(row['entrez']), genes[row['ensgene']])
    for row in older
    if row['ensgene'] in genes
  )
  by_entrez.pop('', None)
  for table in committees:
    has_ids = any(name.gene_id for name in table)
    for name in table:
      gene = genes.get(name.gene_id) or by_name.get(name.symbol)
      if gene is None and not has_ids and name.symbol not in names:
        gene = by_entrez.get(name.entrez)
        if gene is None:
          names.add(name.symbol)  # of a gene that the table lacks
      if gene is None:
        continue
      gene.add_aliases([name.symbol, *name.former], FORMER)
      gene.add_aliases(name.nicknames, NICKNAME)


def name_once(
  genes: Mapping[str, Gene],
  official: Mapping[str, str],
  with_entrez: set[str],
  biotypes: Sequence[str],
) -> None:
  """Leaves a symbol to one gene; the others go by their Ensembl id.

  The gene keeps it that the naming committee names; else one with an Entrez
  id; else the first by biotype and id.
  """

  def rank(gene):
    return (
      official.get(gene.gene_id) != gene.name,
      gene.gene_id not in with_entrez,
      biotypes.index(gene.biotype),
      gene.gene_id,
    )

  taken = set()
  for gene in sorted(genes.values(), key=rank):
    if gene.name in taken:
      gene.name = ''
    taken.add(gene.name)


def finish(
  genes: Mapping[str, Gene],
  ids: set[str],
  names: set[str],
  official_entrez: Mapping[str, str],
  older: Sequence[Row],
  retired: Iterable[tuple[str, str, str]],
) -> None:
  """Adds Entrez ids, former symbols and retired ids; sorts out the names."""
  for row in older:
    if row['ensgene'] in genes:
      genes[row['ensgene']].add_aliases([row['symbol']], OLDER)
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
  keep_own(genes, names)
  # Ids on alternative contigs and of older releases: same symbol or Entrez.
  by_name = by_any_name(genes)
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


def keep_own(genes: Mapping[str, Gene], names: set[str]) -> None:
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


def by_any_name(genes: Mapping[str, Gene]) -> dict[str, Gene]:
  """Genes by official name, present or former, and by Entrez id."""
  names = unique(
    (name, gene)
    for gene in genes.values()
    for name, strength in gene.aliases.items()
    if strength < NICKNAME
  )
  names |= {number: g for g in genes.values() for number in g.entrez}
  return names | {g.name: g for g in genes.values() if g.name}


def unique(pairs: Iterable[tuple[str, Gene]]) -> dict[str, Gene]:
  """Names that lead to one gene only."""
  found = {}
  for name, gene in pairs:
    if found.setdefault(name, gene) is not gene:
      found[name] = None
  return {name: gene for name, gene in found.items() if gene is not None}


def _whole(number: str) -> str:
  return number.removesuffix('.0')


def _is_name(name: str) -> bool:
  """Not empty, an Ensembl id, a bare number, or text with a bar or a tab."""
  return bool(name) and not re.fullmatch(r'ENS[A-Z]*G\d+|\d+|.*[|\t].*', name)
