"""Genes held out of a network: whole TFs, their paralogues and orthologues.

What a test asks about must be in no source and in neither species.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from genecompass_jax import errors, gene_ids, gene_table
from genecompass_jax.prepare.priors import families

MAX_PARALOGUES = 120  # larger groups (C2H2 zinc fingers: 779) are no family


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
  """Genes that no edge may touch.

  Attributes:
    is_held_G: bool over the gene table.
    facts: which genes, and why.
  """

  is_held_G: np.ndarray
  facts: dict


def none(genes: gene_table.GeneTable) -> HeldOut:
  """Nothing is held out."""
  return HeldOut(np.zeros(len(genes), bool), {})


def choose(
  wanted: Sequence[str],
  paralogues: families.Groups | None,
  genes: gene_table.GeneTable,
  max_paralogues: int = MAX_PARALOGUES,
) -> HeldOut:
  """The genes that go with some TFs.

  In turn, until nothing is added: orthologues (of every kind, one-to-many
  too), then members of the TF's groups.

  Args:
    wanted: any identifiers, human or mouse.
    paralogues: groups of related genes; None for none.
    genes: the gene table.
    max_paralogues: groups of more members are not read as paralogues.

  Raises:
    UserError: a name is not a gene, or is one of several.
  """
  rows = {row for name in wanted for row in _rows(name, genes)}
  reason = {row: 'named' for row in rows}
  groups_of, members, ignored = _index(paralogues, max_paralogues)
  of_orthologues: dict[str, list[int]] = {}
  for g, group in enumerate(genes.orthologue_groups):
    if group:
      of_orthologues.setdefault(group, []).append(g)

  def add_orthologues():
    for row in list(reason):
      for other in of_orthologues.get(genes.orthologue_groups[row], ()):
        reason.setdefault(other, 'orthologue')

  add_orthologues()
  unknown = []
  for row in sorted(reason):  # paralogues of paralogues are not chased
    groups = groups_of.get(row, ())
    if not groups and reason[row] == 'named':
      unknown.append(genes.symbols[row])
    for group in groups:
      for other in members[group]:
        reason.setdefault(other, 'paralogue')
  add_orthologues()
  is_held_G = np.zeros(len(genes), bool)
  is_held_G[list(reason)] = True
  facts = {
    'asked_for': sorted(wanted),
    'genes': [
      {
        'gene_id': genes.gene_ids[g],
        'symbol': genes.symbols[g],
        'species': gene_table.SPECIES[genes.species_G[g]],
        'why': reason[g],
      }
      for g in np.flatnonzero(is_held_G).tolist()
    ],
    'without_known_paralogues': unknown,
    'groups_too_large_for_paralogues': sorted(
      {title for row in rows for title in ignored.get(row, ())}
    ),
  }
  return HeldOut(is_held_G, facts)


def _rows(name: str, genes: gene_table.GeneTable) -> list[int]:
  """Genes of a name: of the species whose current symbol or id it is."""
  found = [gene_ids.resolve([name], s, genes) for s in (0, 1)]
  known = [f for f in found if f.gene_ids[0] is not None]
  exact = [
    f
    for f in known
    if f.how[0] == 'ensembl'
    or genes.symbols[genes.row_of[f.gene_ids[0]]] == name
  ]
  chosen = exact or known
  if not chosen:
    raise errors.UserError(
      f'{name!r}, to be held out, is not a known human or mouse gene'
    )
  return [genes.row_of[f.gene_ids[0]] for f in chosen]


def _index(paralogues, max_paralogues):
  """Groups of a gene, members of a group, and titles of groups too large."""
  groups_of: dict[int, list[int]] = {}
  members: dict[int, list[int]] = {}
  ignored: dict[int, list[str]] = {}
  if paralogues is None:
    return groups_of, members, ignored
  size_K = np.bincount(paralogues.group_M)
  for row, group in zip(
    paralogues.gene_M.tolist(), paralogues.group_M.tolist()
  ):
    if families.NAMED_ALIKE.search(paralogues.titles[group]):
      continue
    if size_K[group] > max_paralogues:
      ignored.setdefault(row, []).append(paralogues.titles[group])
      continue
    groups_of.setdefault(row, []).append(group)
    members.setdefault(group, []).append(row)
  return groups_of, members, ignored
