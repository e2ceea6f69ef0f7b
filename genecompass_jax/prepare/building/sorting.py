"""From cells that stay to sorted buckets, and to medians."""

from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import encoding, medians
from genecompass_jax.prepare import assays, labels as labels_lib
from genecompass_jax.prepare.building import (
  engines,
  exact_medians,
  opening,
  plans,
  runs,
)


def kept_by_species(
  plan: plans.Plan, opened: Sequence[opening.Opened]
) -> list[int]:
  """Cells that are left of each species.

  Raises:
    UserError: none is.
  """
  kept = [0] * len(plan.vocabulary().species)
  for source in opened:
    keep_C = plan.load(f'keep/{source.number}')
    species_C = np.asarray(plan.load(f'species/{source.number}'))[keep_C]
    for species, cells in enumerate(
      np.bincount(species_C, minlength=len(kept))
    ):
      kept[species] += int(cells)
  return kept


def count_units(
  plan: plans.Plan,
  opened: Sequence[opening.Opened],
  labels: labels_lib.Labels,
) -> None:
  """Tells the labels how many cells of each unit are left."""
  for source in opened:
    keep_C = np.asarray(plan.load(f'keep/{source.number}'))
    labels.count(
      source.number,
      np.asarray(plan.load(f'codes/{source.number}')[1])[keep_C],
      np.asarray(plan.load(f'species/{source.number}'))[keep_C],
    )


def tasks(
  plan: plans.Plan,
  opened: Sequence[opening.Opened],
  labels: labels_lib.Labels,
  split_U: np.ndarray,
) -> tuple[dict[str, str], runs.Sort]:
  """Kind of the assays whose cells give the medians, and the tasks that sort.

  Returns:
    Species -> kind, of species with training cells; and the buckets.
  """
  of_species, sources_of, kinds_of, buckets = {}, [], [], []
  for species, name in enumerate(plan.vocabulary().species):
    kinds: dict[int, list[int]] = {}
    is_there = False
    for source in opened:
      keep_C = plan.load(f'keep/{source.number}')
      mine_C = np.asarray(keep_C) & (
        np.asarray(plan.load(f'species/{source.number}')) == species
      )
      is_there |= bool(mine_C.any())
      unit_C = np.asarray(plan.load(f'codes/{source.number}')[1])[mine_C]
      training_C = split_U[labels.unit_U[unit_C]] == 0
      if labels.split_by_cell[source.number]:
        training_C[:] = True
      kind_C = np.asarray(plan.load(f'assays/{source.number}'))[mine_C]
      for kind in np.unique(kind_C[training_C]).tolist():
        kinds.setdefault(kind, []).append(source.number)
    first = min(kinds, default=0)
    if kinds:
      of_species[name] = assays.KINDS[first]
    kinds_of.append(first)
    sources_of.append(tuple(kinds.get(first, ())))
    if is_there:
      buckets += [(species, bucket) for bucket in range(2**plan.bits)]
  context = runs.Sort(
    plan,
    tuple(buckets),
    tuple(sources_of),
    tuple(kinds_of),
    tuple(source.number for source in opened if source.assay == assays.MIXED),
    tuple(labels.split_by_cell),
  )
  return of_species, context


def cells_of_buckets(
  plan: plans.Plan, buckets: Sequence[tuple[int, int]], kept: Sequence[int]
) -> list[int]:
  """About how many cells each bucket has, for the progress."""
  number = 2**plan.bits
  return [
    kept[species] * (bucket + 1) // number - kept[species] * bucket // number
    for species, bucket in buckets
  ]


def count_medians(
  engine: engines.Engine,
  context: runs.Sort,
  kinds: Mapping[str, str],
  method: str,
) -> dict[str, medians.Medians]:
  """Medians of each mode, of the species that have training cells.

  Args:
    engine: who counts exact ones.
    context: of the sorted buckets.
    kinds: species -> kind of assay, as of `tasks`.
    method: 'histogram' or 'exact'.
  """
  counted, plan = {}, context.plan
  names = plan.vocabulary().species
  species_of = [names.index(name) for name in kinds]
  for mode in encoding.MODES:
    histograms = {
      species: runs.merged_medians(plan, context.buckets, species, mode)
      for species in species_of
    }
    if not histograms:
      continue
    if plan.is_divided:  # by medians already: 1 is that of every gene
      if mode == encoding.RELEASED:
        counted[mode] = medians.Medians.ones(plan.vocabulary(), mode)
      continue
    values = medians.Medians.from_histograms(plan.vocabulary(), histograms)
    if method == 'exact':
      values = exact_medians.refine(engine, context, values, histograms)
    counted[mode] = values
  return counted
