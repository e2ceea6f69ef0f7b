"""Any gene identifier -> Ensembl id of the gene table, with a loss report.

Symbols, former symbols and nicknames, Ensembl ids with or without version,
retired Ensembl ids, Entrez ids; human and mouse.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import errors, gene_table

SPECIES = gene_table.SPECIES
HOW = ('ensembl', 'symbol', 'alias', 'entrez', 'lost', 'ambiguous')

# Also inside TSPAN6_ENSG00000000003 or ENSG00000000003.14_PAR_Y.
_STABLE = re.compile(
  r'(?:.*[_|;: ])?(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:[_|;: ].*)?', re.IGNORECASE
)
_PREFIX = ('ENSG', 'ENSMUSG')  # of the stable ids of each species
_NUMBER = re.compile(r'(\d+)(\.0)?')  # 7105.0 is what a float column leaves
_AMBIGUOUS = -1


@dataclasses.dataclass(frozen=True)
class Resolution:
  """Where each input identifier leads.

  Attributes:
    gene_ids: one per input: Ensembl id in the table, or None.
    how: one of `HOW` per input. `ambiguous` names several genes, `lost` none,
      or a gene without a one-to-one orthologue where one was asked for.
    species: code of the species of `gene_ids`.
    identifiers: the inputs.
  """

  gene_ids: tuple[str | None, ...]
  how: tuple[str, ...]
  species: int
  identifiers: tuple[str, ...]

  @property
  def share_mapped(self) -> float:
    """Share of the inputs that lead to a gene; 0 where there are none."""
    known = sum(gene_id is not None for gene_id in self.gene_ids)
    return known / max(len(self.gene_ids), 1)

  def report(self, umis_per_input: Sequence[float] | None = None) -> dict:
    """What was mapped, how, and what was lost.

    Args:
      umis_per_input: total counts of each input; with them the report has
        `share_umis_lost`, and the examples are those with most counts.

    Returns:
      `inputs`; the number of inputs for each of `HOW`; `genes` that were
      reached; `duplicates`, inputs whose gene an earlier input reached (their
      counts are summed); `share_mapped` of the inputs; `examples_lost` and
      `examples_ambiguous`, ten at most.
    """
    lost = np.array([gene_id is None for gene_id in self.gene_ids], bool)
    genes = len(set(self.gene_ids) - {None})
    report = {'species': SPECIES[self.species], 'inputs': len(self.how)}
    report |= {how: self.how.count(how) for how in HOW}
    report['genes'] = genes
    report['duplicates'] = int((~lost).sum()) - genes
    report['share_mapped'] = self.share_mapped
    order = np.arange(len(self.how))
    if umis_per_input is not None:
      umis = np.asarray(umis_per_input, np.float64)
      if umis.shape != lost.shape:
        raise ValueError(f'{umis.shape=} for {len(lost)} identifiers')
      total = umis.sum()
      report['share_umis_lost'] = float(
        umis[lost].sum() / total if total else 0
      )
      order = np.argsort(-umis, kind='stable')
    for how in ('lost', 'ambiguous'):
      named = (
        self.identifiers[i]
        for i in order
        if self.how[i] == how and self.identifiers[i].strip()
      )
      report[f'examples_{how}'] = [n for n, _ in zip(named, range(10))]
    return report


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which identifiers of a file to use.

  Attributes:
    column: name of the column; None is the index.
    species: species code of the identifiers.
    reason: one line for the log.
    contradicts_index: the column names other genes than the index.
  """

  column: str | None
  species: int
  reason: str
  contradicts_index: bool


def resolve(
  identifiers: Sequence[str],
  species: int,
  table: gene_table.GeneTable,
  ids_of: int | None = None,
) -> Resolution:
  """Finds the gene of every identifier.

  In this order: a stable id, a current symbol, an alias, an Entrez id; then
  symbol and alias without regard to letter case where only one gene fits.

  Args:
    identifiers: names of rows, blanks around them ignored.
    species: species of the cells, and of the genes returned.
    table: the genes.
    ids_of: species of the identifiers where it is not that of the cells (mouse
      cells with human identifiers): genes are replaced by their one-to-one
      orthologues, and those without one are lost.
  """
  ids_of = species if ids_of is None else ids_of
  names = _names(table, ids_of)
  partner = _partners(table, species) if ids_of != species else None
  gene_ids, hows = [], []
  for identifier in identifiers:
    row, how = names.find(str(identifier).strip())
    if row is not None and partner is not None:
      row = partner.get(table.orthologue_groups[row])
      how = 'lost' if row is None else how
    gene_ids.append(None if row is None else table.gene_ids[row])
    hows.append(how)
  return Resolution(
    tuple(gene_ids), tuple(hows), species, tuple(map(str, identifiers))
  )


def check_share_known(resolution: Resolution, minimum: float = 0.5) -> None:
  """Refuses identifiers of which too few are known.

  Raises:
    UserError: less than `minimum` of the identifiers lead to a gene.
  """
  if resolution.share_mapped >= minimum:
    return
  unknown = [
    name
    for name, gene_id in zip(resolution.identifiers, resolution.gene_ids)
    if gene_id is None
  ]
  raise errors.UserError(
    f'only {resolution.share_mapped:.0%} of {len(resolution.how)} identifiers '
    f'are known {SPECIES[resolution.species]} genes (not known: '
    f'{", ".join(unknown[:3])}); check --species, --ids-of and which column '
    'holds the gene identifiers'
  )


def infer_species(
  identifiers: Sequence[str], table: gene_table.GeneTable
) -> int:
  """The species of identifiers, where they leave no doubt.

  Stable ids decide. Without them, names that only one species has, whatever
  their letter case, must outnumber the others' tenfold; letter case (`ACTB`,
  `Actb`) is a hint that may only support them. Entrez ids decide where 80 %
  are genes of one species and 5 % at most of the other: plain row numbers
  match both.

  Raises:
    UserError: in doubt, naming `--species`.
  """
  names = [str(name).strip() for name in identifiers]
  names = [name for name in names if name and name.lower() != 'nan']
  if not names:
    raise _in_doubt('there are no identifiers')
  stable = collections.Counter(
    match[1][:-11].upper() for name in names if (match := _stable(name))
  )
  if stable:
    (prefix, most), *_ = stable.most_common(1)
    if most < 0.95 * stable.total():
      kinds = ', '.join(f'{n:,} {kind}' for kind, n in stable.items())
      raise _in_doubt(f'stable ids of several species: {kinds}')
    if prefix not in _PREFIX:
      raise errors.UserError(
        f'the identifiers are {prefix} ids, neither human nor mouse; map them '
        'to human or mouse orthologues and name that species with --species'
      )
    return _PREFIX.index(prefix)
  numbers = [name for name in names if _NUMBER.fullmatch(name)]
  if len(numbers) > 0.5 * len(names):
    shares = [
      sum(_names(table, s).find(n)[1] == 'entrez' for n in numbers)
      / len(numbers)
      for s in range(len(SPECIES))
    ]
    best = int(np.argmax(shares))
    if shares[best] >= 0.8 and min(shares) <= 0.05 and len(numbers) >= 20:
      return best
    raise _in_doubt('the identifiers are bare numbers')
  human, mouse = (_names(table, s) for s in range(len(SPECIES)))
  folded = [name.casefold() for name in names]
  only = [
    sum(n in human.folded and n not in mouse.folded for n in folded),
    sum(n in mouse.folded and n not in human.folded for n in folded),
  ]
  cased = [
    sum(n in human.symbols for n in names),
    sum(n in mouse.symbols for n in names),
  ]
  best = int(np.argmax(only))
  other = 1 - best
  if only[best] >= 10 * max(only[other], 1):
    return best
  if only[best] > 3 * only[other] and cased[best] > 10 * cased[other]:
    return best
  raise _in_doubt(
    f'{only[0]:,} names are human only and {only[1]:,} mouse only, and letter '
    'case is no more than a hint'
  )


def choose_identifiers(
  index: Sequence[str],
  columns: Mapping[str, Sequence[str]],
  table: gene_table.GeneTable,
  species: int | None = None,
) -> Choice:
  """Which of a file's identifiers to use, and their species.

  A column counts where it holds identifiers: at least half of it is known.
  Stable ids decide on the species. A column of stable ids that names other
  genes than the index wins, and says so; otherwise the one that knows more
  genes wins, stable ids before symbols.

  Args:
    index: the file's row names.
    columns: its other text columns, by name.
    table: the genes.
    species: species code of the identifiers; None infers it.

  Raises:
    UserError: the species is in doubt, or stable ids are of another one.
  """
  texts = {None: index, **columns}
  stable = [
    name
    for name, values in texts.items()
    if sum(bool(_stable(str(v).strip())) for v in values)
    > 0.5 * sum(bool(str(v).strip()) for v in values)
  ]
  found = {name: infer_species(texts[name], table) for name in stable}
  if len(set(found.values())) > 1:
    kinds = ', '.join(f'{_label(n)} {SPECIES[s]}' for n, s in found.items())
    raise _in_doubt(f'stable ids disagree: {kinds}')
  if species is None:
    if found:
      species = next(iter(found.values()))
    else:
      species = infer_species(index, table)
  elif found and species not in found.values():
    (name, other), *_ = found.items()
    raise errors.UserError(
      f'{_label(name)} holds {SPECIES[other]} ids, not {SPECIES[species]}; '
      f'give --species {SPECIES[other]}, or --ids-of {SPECIES[other]} where '
      f'the cells are {SPECIES[species]}'
    )
  resolved = {
    name: resolve(values, species, table) for name, values in texts.items()
  }
  usable = {
    name: resolution
    for name, resolution in resolved.items()
    if name is None
    or resolution.share_mapped
    >= 0.5 * np.mean([bool(str(v).strip()) for v in texts[name]])
    > 0
  }

  def rank(name):
    return usable[name].share_mapped, name in stable, name is None

  best = max(usable, key=rank)
  known = '; '.join(
    f'{_label(name)} {usable[name].share_mapped:.1%}'
    for name in sorted(usable, key=rank, reverse=True)
  )
  reason = f'{_label(best)} knows most genes ({known})'
  columns_of_ids = [name for name in stable if name is not None]
  contradicts = False
  if None not in stable and columns_of_ids:
    column = max(columns_of_ids, key=rank)
    both = [
      (a, b)
      for a, b in zip(usable[None].gene_ids, usable[column].gene_ids)
      if a and b
    ]
    share = sum(a != b for a, b in both) / len(both) if both else 1.0
    case = _letter_case(index, table)
    contradicts = share > 0.05 or case not in (None, species)
    if contradicts:
      best = column
      reason = (
        f'{_label(column)} holds {SPECIES[species]} ids and contradicts the '
        f'index ({share:.1%} of the genes differ'
        + (f'; its letter case is {SPECIES[case]}' if case is not None else '')
        + '): the column is used'
      )
  return Choice(best, species, reason, contradicts)


def _letter_case(
  names: Sequence[str], table: gene_table.GeneTable
) -> int | None:
  """The species that the letter case of symbols suggests, if it does."""
  hits = [
    sum(str(n).strip() in _names(table, s).symbols for n in names)
    for s in range(len(SPECIES))
  ]
  best = int(np.argmax(hits))
  return best if hits[best] > 10 * hits[1 - best] else None


def _label(column: str | None) -> str:
  return 'the index' if column is None else f'column {column!r}'


def _in_doubt(why: str) -> errors.UserError:
  return errors.UserError(
    f'cannot tell the species: {why}; give --species human or --species mouse'
  )


def _stable(name: str) -> re.Match | None:
  return _STABLE.fullmatch(name)


@dataclasses.dataclass(frozen=True)
class _Names:
  """Names of one species -> row of the table, or _AMBIGUOUS."""

  stable: dict[str, int]
  symbols: dict[str, int]
  aliases: dict[str, int]
  entrez: dict[str, int]
  folded: dict[str, int]  # symbols without regard to letter case
  folded_aliases: dict[str, int]

  def find(self, name: str) -> tuple[int | None, str]:
    """Row (or None) and how it was found."""
    match = _stable(name)
    if match:
      stable = match[1].upper()
      steps = (
        (stable, self.stable, 'ensembl'),
        (stable, self.aliases, 'alias'),
      )
    else:
      number = _NUMBER.fullmatch(name)
      steps = (
        (name, self.symbols, 'symbol'),
        (name, self.aliases, 'alias'),
        (number[1] if number else '', self.entrez, 'entrez'),
        (name.casefold(), self.folded, 'symbol'),
        (name.casefold(), self.folded_aliases, 'alias'),
      )
    for key, rows, how in steps:
      row = rows.get(key)
      if row is not None:
        return (None, 'ambiguous') if row == _AMBIGUOUS else (row, how)
    return None, 'lost'


@functools.lru_cache(maxsize=8)
def _names(table: gene_table.GeneTable, species: int) -> _Names:
  rows = np.flatnonzero(table.species_G == species).tolist()
  named = [g for g in rows if table.symbols[g] != table.gene_ids[g]]
  symbols = [(table.symbols[g], g) for g in named]
  aliases = [(name, g) for g in rows for name in table.aliases[g]]
  return _Names(
    stable={table.gene_ids[g]: g for g in rows},
    symbols=_unique(symbols),
    aliases=_unique(aliases),
    entrez=_unique(
      [(n, g) for g in rows for n in table.entrez[g].split('|') if n]
    ),
    folded=_unique([(name.casefold(), g) for name, g in symbols]),
    folded_aliases=_unique([(name.casefold(), g) for name, g in aliases]),
  )


def _unique(pairs: Sequence[tuple[str, int]]) -> dict[str, int]:
  found = {}
  for name, row in pairs:
    if found.setdefault(name, row) != row:
      found[name] = _AMBIGUOUS
  return found


@functools.lru_cache(maxsize=8)
def _partners(table: gene_table.GeneTable, species: int) -> dict[str, int]:
  """One-to-one orthologue group -> row of the gene of a species."""
  members = collections.Counter(
    (group, species)
    for group, species in zip(table.orthologue_groups, table.species_G.tolist())
  )
  return {
    group: g
    for g, group in enumerate(table.orthologue_groups)
    if group
    and not group.startswith(gene_table.MANY_PREFIX)
    and table.species_G[g] == species
    and all(members[group, s] == 1 for s in range(len(SPECIES)))
  }
