"""Which genes the atlas has, and what each of them is.

Roles, expression and families are drawn without looking at the place of a
gene in the table, so that they do not depend on token or chromosome.
"""

import collections
import dataclasses

import numpy as np

from genecompass_jax import errors, gene_table
from genecompass_jax.simulate import config as config_lib

ROLES = ('regulated', 'tf', 'housekeeping', 'unregulated', 'silent', 'cycle')
REGULATED, TF, HOUSEKEEPING, UNREGULATED, SILENT, CYCLE = range(len(ROLES))


@dataclasses.dataclass(frozen=True, eq=False)
class Genes:
  """R genes of one species, in the order of the gene table.

  Attributes:
    species: its code.
    gene_ids, symbols, entrez, groups: from the gene table; genes of one group
      are orthologues, '' for none.
    human_R: row of the human gene that a mouse gene takes after, -1 for none;
      for human genes their own row.
    one_to_one_R: True where there is exactly one orthologue.
    role_R: index into ROLES.
    is_master_R: True for TFs without regulators.
    level_R: of a TF in 0..1; regulators stand above (below in number); masters
      have 0, other genes 1.
    baseline_R: log expression without regulation, -inf for silent genes.
    family_R: number of the family, the same in both species, -1 for none.
    sibling_of_R: row of the TF whose regulators a gene was given, or -1.
    peak_R: phase at which a cell-cycle gene peaks, in radians, else nan.
    fame_R: log of how well studied a gene is.
    size_R: size parameter of the negative binomial.
  """

  species: int
  gene_ids: tuple[str, ...]
  symbols: tuple[str, ...]
  entrez: tuple[str, ...]
  groups: tuple[str, ...]
  human_R: np.ndarray
  one_to_one_R: np.ndarray
  role_R: np.ndarray
  is_master_R: np.ndarray
  level_R: np.ndarray
  baseline_R: np.ndarray
  family_R: np.ndarray
  sibling_of_R: np.ndarray
  peak_R: np.ndarray
  fame_R: np.ndarray
  size_R: np.ndarray

  def __len__(self) -> int:
    return len(self.gene_ids)


def draw(
  table: gene_table.GeneTable, config: config_lib.AtlasConfig
) -> tuple[Genes, Genes]:
  """The genes of human and mouse.

  Raises:
    UserError: the table holds too few genes of a kind.
  """
  rows = _choose(table, config)
  human = _human(table, rows[0], config)
  return human, _mouse(table, rows[1], human, config)


def _choose(table, config) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the table for each species: orthologues first, then the rest."""
  names = collections.Counter(
    (s, name.upper()) for s, name in zip(table.species_G, table.symbols)
  )

  def usable(g):
    # One name, one gene, as tables that name genes by symbol need it.
    name = table.symbols[g].upper()
    return (
      table.biotypes[g] == 'protein_coding'
      and name != table.gene_ids[g]
      and names[table.species_G[g], name] == 1
      and not name.startswith('MT-')
    )

  members = collections.defaultdict(lambda: ([], []))
  alone = ([], [])
  for g, group in enumerate(table.orthologue_groups):
    if group:
      members[group][table.species_G[g]].append(g)
    elif usable(g):
      alone[table.species_G[g]].append(g)
  pairs, triples = [], []
  for one, other in members.values():
    size = (len(one), len(other))
    if size in ((1, 1), (1, 2), (2, 1)) and all(map(usable, one + other)):
      (pairs if size == (1, 1) else triples).append((one, other))

  rng = config_lib.generator(config.seed, 'genes')
  num_pairs = round(config.one_to_one * config.num_genes)

  def take(source, number, what):
    if number > len(source):
      raise errors.UserError(
        f'the gene table has {len(source)} {what}, an atlas of '
        f'{config.num_genes} genes needs {number}; ask for fewer num_genes'
      )
    return [source[i] for i in rng.permutation(len(source))[:number]]

  shared = take(pairs, num_pairs, 'pairs of orthologues')
  shared += take(triples, config.one_to_many, 'groups of three orthologues')
  rows = []
  for s in range(2):
    chosen = [g for group in shared for g in group[s]]
    missing = config.num_genes - len(chosen)
    chosen += take(alone[s], missing, 'genes without an orthologue')
    rows.append(np.sort(np.array(chosen)))
  return rows[0], rows[1]


def _annotation(table, rows) -> dict:
  return {
    'gene_ids': tuple(table.gene_ids[g] for g in rows),
    'symbols': tuple(table.symbols[g] for g in rows),
    'entrez': tuple(table.entrez[g] for g in rows),
    'groups': tuple(table.orthologue_groups[g] for g in rows),
  }


def _one_to_one(table, rows) -> np.ndarray:
  size = collections.Counter(table.orthologue_groups)
  return np.array([size[table.orthologue_groups[g]] == 2 for g in rows])


def _roles(rng, candidates, config) -> np.ndarray:
  """Roles of genes that are not TFs."""
  number = len(candidates)
  role = np.full(number, REGULATED, np.int8)
  order = rng.permutation(number)
  start = 0
  for code, share in (
    (HOUSEKEEPING, config.housekeeping),
    (UNREGULATED, config.unregulated),
    (SILENT, config.silent),
    (CYCLE, config.num_cycle_genes / config.num_genes),
  ):
    stop = start + round(share * number)
    role[order[start:stop]] = code
    start = stop
  return role


def _families(rng, role_R, config) -> np.ndarray:
  """Families of 2 to 20; TFs have families of 2 to 4 of their own."""
  family_R = np.full(len(role_R), -1, np.int32)
  number = 0
  for is_tf, largest in ((True, 4), (False, 20)):
    rows = rng.permutation(np.flatnonzero((role_R == TF) == is_tf))
    left = round(config.family_share * len(rows))
    start = 0
    while left - start >= 2:
      size = min(1 + rng.geometric(0.25), largest)
      family_R[rows[start : start + size]] = number
      start += size
      number += 1
  return family_R


def _human(table, rows, config) -> Genes:
  rng = config_lib.generator(config.seed, 'roles', 0)
  R = len(rows)
  one_to_one_R = _one_to_one(table, rows)
  # Nine in ten TFs, and all masters, have one orthologue: cell types are
  # states of masters and shared by the species.
  shared = rng.permutation(np.flatnonzero(one_to_one_R))
  groups = [table.orthologue_groups[g] for g in rows]
  own = rng.permutation([r for r in range(R) if not groups[r]])
  num_shared = round(0.9 * config.num_tfs)
  tfs = np.concatenate(
    [shared[:num_shared], own[: config.num_tfs - num_shared]]
  )
  role_R = np.full(R, TF, np.int8)
  others = np.setdiff1d(np.arange(R), tfs)
  role_R[others] = _roles(rng, others, config)
  is_master_R = np.zeros(R, bool)
  is_master_R[tfs[: config.num_masters]] = True
  level_R = np.where(role_R == TF, rng.random(R), 1.0)
  level_R[is_master_R] = 0.0
  baseline_R = config.baseline_sd * rng.standard_normal(R)
  baseline_R = np.minimum(baseline_R, config.baseline_cap)
  baseline_R[role_R == SILENT] = -np.inf
  sibling_of_R = np.full(R, -1, np.int32)
  receivers = rng.permutation(np.flatnonzero(role_R == REGULATED))
  followed = np.repeat(tfs[config.num_masters :], config.siblings_per_tf)
  sibling_of_R[receivers[: len(followed)]] = followed[: len(receivers)]
  return Genes(
    species=0,
    **_annotation(table, rows),
    human_R=np.arange(R, dtype=np.int32),
    one_to_one_R=one_to_one_R,
    role_R=role_R,
    is_master_R=is_master_R,
    level_R=level_R,
    baseline_R=baseline_R,
    family_R=_families(rng, role_R, config),
    sibling_of_R=sibling_of_R,
    peak_R=np.where(role_R == CYCLE, rng.uniform(0, 2 * np.pi, R), np.nan),
    fame_R=rng.standard_normal(R),
    size_R=config.dispersion
    * np.exp(config.dispersion_sd * rng.normal(size=R)),
  )


def _mouse(table, rows, human, config) -> Genes:
  """Mouse genes take after their human orthologue, the rest is drawn anew."""
  rng = config_lib.generator(config.seed, 'roles', 1)
  R = len(rows)
  first = {}
  for r, group in enumerate(human.groups):
    if group:
      first.setdefault(group, r)
  groups = [table.orthologue_groups[g] for g in rows]
  human_R = np.array([first.get(group, -1) for group in groups], np.int32)

  def inherit(values_R, new_R):
    return np.where(human_R >= 0, values_R[human_R], new_R)

  own = rng.permutation(np.flatnonzero(human_R < 0))
  num_own_tfs = config.num_tfs - int(
    np.sum((human.role_R == TF) & human.one_to_one_R)
  )
  role_R = inherit(human.role_R, np.int8(TF))
  role_R[own[num_own_tfs:]] = _roles(rng, own[num_own_tfs:], config)
  is_own_tf_R = (role_R == TF) & (human_R < 0)
  level_R = inherit(human.level_R, np.where(is_own_tf_R, rng.random(R), 1.0))
  baseline_R = inherit(
    human.baseline_R + config.baseline_drift * rng.standard_normal(R),
    config.baseline_sd * rng.standard_normal(R),
  )
  baseline_R = np.minimum(baseline_R, config.baseline_cap)
  baseline_R[role_R == SILENT] = -np.inf
  # A gene of its own joins a family with the usual chance, large ones first.
  joined_R = rng.choice(human.family_R[human.role_R != TF], R)
  joined_R = np.where(is_own_tf_R, -1, joined_R)
  row_of = {int(h): r for r, h in enumerate(human_R) if h >= 0}
  tf_R = np.array([row_of.get(int(t), -1) for t in human.sibling_of_R])
  tf_R[human.sibling_of_R < 0] = -1
  peaks_R = rng.uniform(0, 2 * np.pi, R)
  peaks_R = np.where(role_R == CYCLE, peaks_R, np.nan)
  return Genes(
    species=1,
    **_annotation(table, rows),
    human_R=human_R,
    one_to_one_R=_one_to_one(table, rows),
    role_R=role_R,
    is_master_R=inherit(human.is_master_R, False),
    level_R=level_R,
    baseline_R=baseline_R,
    family_R=inherit(human.family_R, joined_R).astype(np.int32),
    sibling_of_R=inherit(tf_R, -1).astype(np.int32),
    peak_R=inherit(human.peak_R, peaks_R),
    fame_R=inherit(
      0.8 * human.fame_R + 0.6 * rng.standard_normal(R),
      rng.standard_normal(R),
    ),
    size_R=inherit(
      human.size_R,
      config.dispersion * np.exp(config.dispersion_sd * rng.normal(size=R)),
    ),
  )
