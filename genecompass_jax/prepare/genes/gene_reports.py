"""What a gene table holds, and what another release changes."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np

from genecompass_jax import gene_table, vocabulary

_STABLE = re.compile(r'ENS[A-Z]*G\d{11}')
_KINDS = ('one2one', 'one2many', 'many2one', 'many2many')


def describe(table: gene_table.GeneTable) -> list[str]:
  """Genes, names and orthologues of a table, a line each."""
  lines = []
  for code, name in enumerate(table.species):
    rows = np.flatnonzero(table.species_G == code).tolist()
    counts = collections.Counter(table.biotypes[g] for g in rows)
    kinds = ', '.join(
      f'{n:,} {kind or "of no biotype"}' for kind, n in counts.most_common()
    )
    lines.append(f'{name}: {len(rows):,} genes: {kinds}')
    aliases = collections.Counter(a for g in rows for a in table.aliases[g])
    retired = sum(bool(_STABLE.fullmatch(alias)) for alias in aliases)
    ambiguous = sum(n > 1 for n in aliases.values())
    unnamed = sum(table.symbols[g] == table.gene_ids[g] for g in rows)
    entrez = sum(bool(table.entrez[g]) for g in rows)
    lines.append(
      f'  {len(aliases) - retired:,} other names, {ambiguous:,} of them of '
      f'several genes; {retired:,} retired ids; {entrez:,} genes with an '
      f'Entrez id; {unnamed:,} without a symbol'
    )
  vocab = vocabulary.Vocabulary.from_genes(table)
  tokens = [set(vocab.species_tokens(s)) for s in range(len(table.species))]
  for one, other in itertools.combinations(range(len(table.species)), 2):
    between = f'{table.species[one]}-{table.species[other]}'
    counts = [
      f'{number:,} {kind}'
      for kind in _KINDS
      if (number := int(table.header.get(f'{between} {kind}', 0)))
    ]
    groups = f'{", ".join(counts)}; ' if counts else ''
    lines.append(
      f'{between} orthologues: {groups}{len(tokens[one] & tokens[other]):,} '
      'tokens shared'
    )
  return [*lines, f'{vocab.size:,} tokens']


@dataclasses.dataclass(frozen=True)
class Change:
  """One difference between two tables.

  Attributes:
    species: of the gene.
    gene_id: of the gene.
    kind: 'added', 'removed', 'symbol', 'biotype' or 'orthologues'.
    before, after: what it was and is; '' for none.
  """

  species: str
  gene_id: str
  kind: str
  before: str
  after: str


def changes(
  old: gene_table.GeneTable, new: gene_table.GeneTable
) -> Iterator[Change]:
  """Differences of the genes of two tables, species by species.

  Species that only one table has are left out, and so are their genes as
  orthologues.
  """
  partners = [_partners(table, set(old.species) & set(new.species))
              for table in (old, new)]  # fmt: skip
  moved = {
    alias: gene_id
    for gene_id, names in zip(new.gene_ids, new.aliases)
    for alias in names
    if _STABLE.fullmatch(alias)
  }
  for name in new.species:
    if name not in old.species:
      continue
    before, after = (_rows(table, name) for table in (old, new))
    for gene_id in sorted(before.keys() | after.keys()):
      if gene_id not in before:
        symbol = new.symbols[after[gene_id]]
        yield Change(name, gene_id, 'added', '', symbol)
        continue
      was = before[gene_id]
      if gene_id not in after:
        symbol = old.symbols[was]
        yield Change(name, gene_id, 'removed', symbol, moved.get(gene_id, ''))
        continue
      now = after[gene_id]
      for kind, one, other in (
        ('symbol', old.symbols[was], new.symbols[now]),
        ('biotype', old.biotypes[was], new.biotypes[now]),
        ('orthologues', *(p.get(gene_id, '') for p in partners)),
      ):
        if one != other:
          yield Change(name, gene_id, kind, one, other)


def summarise(
  found: list[Change], old: gene_table.GeneTable, new: gene_table.GeneTable
) -> list[str]:
  """Differences in a few lines."""
  lines = []
  for name in new.species:
    if name not in old.species:
      lines.append(f'{name}: only here')
      continue
    mine = [change for change in found if change.species == name]
    counts = collections.Counter(change.kind for change in mine)
    kept = sum(c.kind == 'removed' and bool(c.after) for c in mine)
    lines.append(
      f'{name}: {counts["added"]:,} genes added, {counts["removed"]:,} removed '
      f'({kept:,} of their ids lead to another gene), {counts["symbol"]:,} '
      f'other symbols, {counts["biotype"]:,} other biotypes, '
      f'{counts["orthologues"]:,} other one-to-one orthologues'
    )
    for kind in ('symbol', 'removed'):
      examples = [
        f'{c.before} -> {c.after}' if c.after else c.before
        for c in mine
        if c.kind == kind and not _STABLE.fullmatch(c.before or c.after)
      ][:5]
      if examples:
        lines.append(f'  {kind}: {", ".join(examples)}')
  lines += [f'{name}: no longer here' for name in old.species
            if name not in new.species]  # fmt: skip
  return lines


def _rows(table: gene_table.GeneTable, name: str) -> dict[str, int]:
  code = table.species.index(name)
  rows = np.flatnonzero(table.species_G == code).tolist()
  return {table.gene_ids[g]: g for g in rows}


def _partners(table: gene_table.GeneTable, species: set[str]) -> dict[str, str]:
  """Gene -> its one-to-one orthologues in the other species, as text."""
  members = collections.defaultdict(list)
  for g, group in enumerate(table.orthologue_groups):
    if table.is_one_to_one(g) and table.species[table.species_G[g]] in species:
      members[group].append(table.gene_ids[g])
  return {
    gene_id: ' '.join(sorted(other for other in ids if other != gene_id))
    for ids in members.values()
    for gene_id in ids
  }
