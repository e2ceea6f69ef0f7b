"""Any gene identifier -> Ensembl id of the gene table, with a loss report.

Symbols, former symbols and nicknames, Ensembl ids with or without version,
retired Ensembl ids, Entrez ids; of every species of the table.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import errors, gene_table

HOW = ('ensembl', 'symbol', 'alias', 'entrez', 'lost', 'ambiguous')

# Also inside TSPAN6_ENSG00000000003 or ENSG00000000003.14_PAR_Y.
_STABLE = re.compile(
  r'(?:.*[_|;: ])?(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:[_|;: ].*)?', re.IGNORECASE
)
# Of other databases, such as FBgn0000008: learned from the ids of the table.
_OTHER_STABLE = re.compile(r'([A-Za-z]{2,}[A-Za-z_]*)(\d{5,})')
# A small table may lack genes of a species that it names all the same.
_PREFIX = {'human': 'ENSG', 'mouse': 'ENSMUSG'}
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
    species_name: the name of that species.
  """

  gene_ids: tuple[str | None, ...]
  how: tuple[str, ...]
  species: int
  identifiers: tuple[str, ...]
  species_name: str = ''

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
    report = {'species': self.species_name, 'inputs': len(self.how)}
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
  partner = _partners(table, species, ids_of) if ids_of != species else None
  gene_ids, hows = [], []
  for identifier in identifiers:
    row, how = names.find(str(identifier).strip())
    if row is not None and partner is not None:
      row = partner.get(table.orthologue_groups[row])
      how = 'lost' if row is None else how
    gene_ids.append(None if row is None else table.gene_ids[row])
    hows.append(how)
  return Resolution(
    tuple(gene_ids),
    tuple(hows),
    species,
    tuple(map(str, identifiers)),
    table.species[species],
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
    f'are known {resolution.species_name} genes (not known: '
    f'{", ".join(unknown[:3])}); check --species, --ids-of and which column '
    'holds the gene identifiers'
  )


def infer_species(
  identifiers: Sequence[str], table: gene_table.GeneTable
) -> int:
  """The species of identifiers, where they leave no doubt.

  Stable ids decide, by their prefix in the table. Without them, names that
  one species has and another has not, whatever their letter case, must
  outnumber those of the reverse tenfold, or threefold where the letter case
  (`ACTB`, `Actb`), no more than a hint, agrees; and so against each other
  species. Entrez ids decide where 80 % are genes of one species and 5 % at
  most of any other: plain row numbers match all.

  Raises:
    UserError: in doubt, naming `--species`.
  """
  names = _present(identifiers)
  if not names:
    raise _in_doubt('there are no identifiers', table)
  species_of = _prefixes(table)
  stable = collections.Counter(
    prefix for name in names if (prefix := _stable_prefix(name, species_of))
  )
  if stable:  # a few among symbols count too: genes without a symbol
    (prefix, most), *_ = stable.most_common(1)
    if most < 0.95 * stable.total():
      kinds = ', '.join(f'{n:,} {kind}' for kind, n in stable.items())
      raise _in_doubt(f'stable ids of several species: {kinds}', table)
    if prefix not in species_of:
      *others, last = table.species
      known = (
        f'neither {" nor ".join((*others, last))}' if others else f'not {last}'
      )
      raise errors.UserError(
        f'the identifiers are {prefix} ids, {known}; map them '
        f'to {" or ".join(table.species)} orthologues and name that species '
        'with --species, or give a gene table with their species'
      )
    return species_of[prefix]
  numbers = {name for name in names if _NUMBER.fullmatch(name)}
  if sum(name in numbers for name in names) > 0.5 * len(names):
    shares = np.array(
      [
        sum(_names(table, s).find(n)[1] == 'entrez' for n in numbers)
        / len(numbers)
        for s in range(len(table.species))
      ]
    )
    best = int(np.argmax(shares))
    others = np.delete(shares, best)
    if shares[best] >= 0.8 and (others <= 0.05).all() and len(numbers) >= 20:
      return best
    raise _in_doubt('the identifiers are bare numbers', table)
  folded = [name.casefold() for name in names]
  has_SN = [
    np.array([name in _names(table, s).folded for name in folded])
    for s in range(len(table.species))
  ]
  cased_S = [
    sum(name in _names(table, s).symbols for name in names)
    for s in range(len(table.species))
  ]

  def beats(one: int, other: int) -> bool:
    mine = int((has_SN[one] & ~has_SN[other]).sum())
    its = int((has_SN[other] & ~has_SN[one]).sum())
    factor = 3 if cased_S[one] > 10 * cased_S[other] else 10
    return mine >= factor * max(its, 1)

  every = range(len(table.species))
  for one in every:
    if has_SN[one].any() and all(beats(one, s) for s in every if s != one):
      return one
  only_S = [(has_SN[s] & (sum(has_SN) == 1)).sum() for s in every]
  counts = [f'{n:,} {table.species[s]} only' for s, n in enumerate(only_S)]
  raise _in_doubt(
    f'of the names {" and ".join(counts)}, and letter case is no more than a '
    'hint',
    table,
  )


def choose_identifiers(
  index: Sequence[str],
  columns: Mapping[str, Sequence[str]],
  table: gene_table.GeneTable,
  species: int | None = None,
) -> Choice:
  """Which of a file's identifiers to use, and their species.

  Stable ids decide on the species. A column of stable ids that names other
  genes than the index, or genes of another species than the index's letter
  case suggests, wins and says so. Otherwise the identifiers win of which the
  largest share is known, to a hundredth; stable ids before others, then the
  index.

  Args:
    index: the file's row names.
    columns: its other columns, by name; those that hold no identifiers
      (less than half known, or less than half distinct) are passed over.
    table: the genes.
    species: species code of the identifiers; None infers it.

  Raises:
    UserError: the species is in doubt, stable ids are of another one, or the
      rows are only numbered.
  """
  texts = {None: index}
  prefixes = _prefixes(table)
  for name, values in columns.items():
    if counts_up(values):
      continue
    present = _present(values)
    known = max(
      sum(_names(table, s).find(text)[0] is not None for text in present)
      for s in range(len(table.species))
    )
    if known and min(known, len(set(present))) >= 0.5 * len(present):
      texts[name] = values
  if counts_up(index):  # nobody named the rows: small Entrez ids look so too
    del texts[None]
    if not texts:
      raise errors.UserError(
        f'the genes have no names, only the numbers {index[0]}, {index[1]}, '
        f'{index[2]}, ..., which no --species explains: write the file with '
        'their ids or symbols'
      )
  stable = [
    name
    for name, values in texts.items()
    if sum(bool(_stable_prefix(t, prefixes)) for t in _present(values))
    > 0.5 * len(_present(values))
  ]
  species = _species_of({n: texts[n] for n in stable} or texts, table, species)
  resolved = {n: resolve(texts[n], species, table) for n in texts}

  def rank(name):
    share = round(resolved[name].share_mapped, 2)
    return share, name in stable, name is None

  order = sorted(texts, key=rank, reverse=True)
  best = order[0]
  shares = (f'{_label(n)} {resolved[n].share_mapped:.1%}' for n in order)
  reason = f'{_label(best)} is used; share known: {", ".join(shares)}'
  if None not in texts or None in stable or not stable:
    return Choice(best, species, reason, contradicts_index=False)
  column = next(name for name in order if name in stable)
  pairs = zip(resolved[None].gene_ids, resolved[column].gene_ids)
  differ = [a != b for a, b in pairs if a and b]
  case = _letter_case(index, table)
  if case in (None, species) and differ and np.mean(differ) <= 0.05:
    return Choice(best, species, reason, contradicts_index=False)
  reason = f'{_label(column)} is used, its ids are of {table.species[species]}'
  if sum(differ):
    reason += (
      f'; the index contradicts it: {sum(differ):,} of {len(differ):,} genes '
      'differ'
    )
  else:
    reason += '; the index names the same genes'
  if case not in (None, species):
    reason += f', in the letter case of {table.species[case]} symbols'
  return Choice(column, species, reason, contradicts_index=True)


def counts_up(names: Sequence[str]) -> bool:
  """Whether names only count: 0, 1, 2, ... or 1, 2, 3, ..."""
  if len(names) < 5 or names[0] not in ('0', '1'):
    return False
  first = int(names[0])
  return all(name == str(k) for k, name in enumerate(names, first))


def _species_of(
  texts: Mapping[str | None, Sequence[str]],
  table: gene_table.GeneTable,
  species: int | None,
) -> int:
  """The one species of identifiers in several columns."""
  found, doubt = {}, None
  for name, values in texts.items():
    try:
      found[name] = infer_species(values, table)
    except errors.UserError as error:
      doubt = doubt or error
  if species is None:
    if len(set(found.values())) == 1:
      return next(iter(found.values()))
    kinds = ', '.join(
      f'{_label(n)} {table.species[s]}' for n, s in found.items()
    )
    if found:
      raise _in_doubt(f'identifiers disagree: {kinds}', table)
    raise doubt
  for name, other in found.items():
    if other != species:
      theirs, ours = table.species[other], table.species[species]
      raise errors.UserError(
        f'{_label(name)} holds {theirs} identifiers, not {ours} ones; '
        f'if the cells are {ours}, give --ids-of {theirs}, else --species '
        f'{theirs}'
      )
  return species


def _letter_case(
  names: Sequence[str], table: gene_table.GeneTable
) -> int | None:
  """The species that the letter case of symbols suggests, if it does."""
  hits = [
    sum(str(n).strip() in _names(table, s).symbols for n in names)
    for s in range(len(table.species))
  ]
  best = int(np.argmax(hits))
  others = [n for s, n in enumerate(hits) if s != best]
  return best if hits[best] > 10 * max(others, default=0) else None


def _present(values: Sequence[str]) -> list[str]:
  texts = (str(value).strip() for value in values)
  return [text for text in texts if text and text.lower() != 'nan']


def _label(column: str | None) -> str:
  return 'the index' if column is None else f'column {column!r}'


def _in_doubt(why: str, table: gene_table.GeneTable) -> errors.UserError:
  flags = ' or '.join(f'--species {name}' for name in table.species)
  return errors.UserError(f'cannot tell the species: {why}; give {flags}')


def _stable(name: str) -> re.Match | None:
  return _STABLE.fullmatch(name)


@functools.lru_cache(maxsize=8)
def _prefixes(table: gene_table.GeneTable) -> dict[str, int]:
  """Prefix of the stable ids -> species, where it is of one species only."""
  found: dict[str, set[int]] = {}
  for gene_id, species in zip(table.gene_ids, table.species_G.tolist()):
    match = _stable(gene_id)
    if match and match[1] == gene_id:
      found.setdefault(gene_id[:-11].upper(), set()).add(species)
    elif match := _OTHER_STABLE.fullmatch(gene_id):
      found.setdefault(match[1].upper(), set()).add(species)
  known = {p: min(of) for p, of in found.items() if len(of) == 1}
  for name, prefix in _PREFIX.items():
    if name in table.species:
      known.setdefault(prefix, table.species.index(name))
  return known


def _stable_prefix(name: str, known: Mapping[str, int]) -> str:
  """Prefix of a stable id; '' of other names.

  An id of Ensembl's form has one whatever its species; another only where the
  ids of the table begin so.
  """
  if match := _stable(name):
    return match[1][:-11].upper()
  match = _OTHER_STABLE.fullmatch(name)
  prefix = match[1].upper() if match else ''
  return prefix if prefix in known else ''


@dataclasses.dataclass(frozen=True)
class _Names:
  """Names of one species -> row of the table, or _AMBIGUOUS."""

  stable: dict[str, int]
  symbols: dict[str, int]
  aliases: dict[str, int]
  entrez: dict[str, int]
  folded: dict[str, int]  # symbols without regard to letter case
  folded_aliases: dict[str, int]
  found: dict[str, tuple[int | None, str]] = dataclasses.field(
    default_factory=dict
  )

  def find(self, name: str) -> tuple[int | None, str]:
    """Row (or None) and how it was found; kept, as files share names."""
    found = self.found.get(name)
    if found is None:
      found = self.found[name] = self._search(name)
    return found

  def _search(self, name: str) -> tuple[int | None, str]:
    match = _stable(name)
    if match or name in self.stable:
      stable = match[1].upper() if match else name
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
def _partners(
  table: gene_table.GeneTable, species: int, ids_of: int
) -> dict[str, int]:
  """Group that is one-to-one of two species -> row of the gene of the first."""
  members = collections.Counter(
    (group, species)
    for group, species in zip(table.orthologue_groups, table.species_G.tolist())
  )
  return {
    group: g
    for g, group in enumerate(table.orthologue_groups)
    if table.is_one_to_one(g)
    and table.species_G[g] == species
    and all(members[group, s] == 1 for s in (species, ids_of))
  }
