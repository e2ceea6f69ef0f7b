"""Identifiers of raw tables -> rows of the gene table, with what was lost."""

from collections.abc import Sequence

import numpy as np

from genecompass_jax import errors, gene_ids, gene_table


def species_code(name: str, species: Sequence[str] = gene_table.SPECIES) -> int:
  """Code of a species by its name, among those of a gene table.

  Raises:
    UserError: it is none of them.
  """
  if name not in species:
    raise errors.UserError(
      f'species {name!r}: give one of {", ".join(species)}'
    )
  return list(species).index(name)


def rows(
  names: Sequence[str], species: int, genes: gene_table.GeneTable
) -> tuple[np.ndarray, dict]:
  """Row of the gene table of each name, -1 where it is lost; and the report.

  The report counts distinct names.
  """
  distinct, place_N = np.unique(np.asarray(names, object), return_inverse=True)
  found = gene_ids.resolve(distinct.tolist(), species, genes)
  row_D = np.array(
    [-1 if i is None else genes.row_of[i] for i in found.gene_ids], np.int32
  )
  row_N = row_D[place_N] if len(row_D) else np.zeros(0, np.int32)
  return row_N, found.report()


def orthologue_rows(genes: gene_table.GeneTable) -> np.ndarray:
  """int32 [G]: row of the one-to-one orthologue of a gene; -1 for none."""
  members: dict[str, list[int]] = {}
  for g, group in enumerate(genes.orthologue_groups):
    if group and not group.startswith(gene_table.MANY_PREFIX):
      members.setdefault(group, []).append(g)
  partner_G = np.full(len(genes), -1, np.int32)
  for group in members.values():
    if sorted(genes.species_G[group].tolist()) == [0, 1]:
      partner_G[group] = group[::-1]
  return partner_G


def check_known(path: object, report: dict, least: float = 0.2) -> None:
  """Refuses a table of which hardly a name is known.

  Raises:
    UserError: less than `least` of the names lead to a gene.
  """
  if report['share_mapped'] < least:
    examples = report['examples_lost'] + report['examples_ambiguous']
    raise errors.UserError(
      f'{path}: only {report["share_mapped"]:.0%} of {report["inputs"]} names '
      f'are {report["species"]} genes (not known: {", ".join(examples[:3])}); '
      'check the species and the columns'
    )
