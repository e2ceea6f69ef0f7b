"""Which cells stay: what the filters refuse, and which copies go."""

from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import errors, vocabulary
from genecompass_jax.prepare import labels as labels_lib, perturbed, quality
from genecompass_jax.prepare.building import (
  builds,
  copies,
  engines,
  opening,
  pieces,
  plans,
)

NO_COPIES: Mapping = {
  'report': {'searched': False},
  'notes': [],
}


def apply_filters(
  plan: plans.Plan,
  opened: Sequence[opening.Opened],
  config: quality.QualityConfig,
) -> list[dict]:
  """Leaves `keep/N.npy`, True for the cells of source N that pass.

  Returns:
    A report of each source.

  Raises:
    UserError: no cell passes.
  """
  reports = []
  names = plan.vocabulary().species
  for source in opened:
    statistics_C = pieces.statistics_of(plan, source.number)
    sums = pieces.column_sums(plan, source.number)
    sample_C = np.asarray(plan.load(f'samples/{source.number}'))
    perturbed_C = np.asarray(plan.load(f'perturbed/{source.number}'))
    keep_C = np.zeros(source.num_cells, bool)
    filters = {}
    for species in sorted(source.resolutions):
      index_C = np.flatnonzero(
        (statistics_C['species'] == species) & ~perturbed_C
      )
      if not len(index_C):
        continue
      some = statistics_C[index_C]
      has_coding, has_mito = source.flags[species]
      keep_C[index_C], report = quality.keep_cells(
        quality.CellStatistics(
          some['genes'], some['coding'], some['mito'], some['total']
        ),
        sample_C[index_C],
        config,
        measured=source.num_columns,
        has_coding=has_coding,
        has_mito=has_mito,
      )
      filters[names[species]] = report
    unknown = int((keep_C & (statistics_C['length'] == 0)).sum())
    keep_C &= statistics_C['length'] > 0
    plan.save(f'keep/{source.number}', keep_C)
    reports.append(
      {
        'name': source.name,
        'cells': source.num_cells,
        'kept': int(keep_C.sum()),
        'layer': source.layer[1],
        'identifiers': source.identifiers,
        'assay': source.assay,
        'genes': {
          names[species]: resolution.report(
            sums[species] if sums.any() else None
          )
          | _outside(source, species, sums[species], plan.vocabulary())
          for species, resolution in source.resolutions.items()
        },
        'perturbed': {
          'removed': int(perturbed_C.sum()),
          'note': source.controls,
        },
        'quality': filters,
        'cells_without_known_genes': unknown,
      }
    )
  _check_some_left(reports)
  return reports


def _outside(
  source: opening.Opened,
  species: int,
  umis: np.ndarray,
  vocab: vocabulary.Vocabulary,
) -> dict:
  """Known genes that the vocabulary does not have, and their counts."""
  ids = source.resolutions[species].gene_ids
  measured_R = source.measured(vocab, species)
  rows_R = vocab.gene_rows(species)[measured_R]
  inside = {vocab.genes.gene_ids[row] for row in rows_R}
  is_outside = np.array([i is not None and i not in inside for i in ids], bool)
  return {
    'genes_outside_vocabulary': len(set(ids) - inside - {None}),
    'share_umis_outside_vocabulary': float(
      umis[is_outside].sum() / max(umis.sum(), 1e-300)
    ),
  }


def _check_some_left(reports: Sequence[Mapping]) -> None:
  if any(report['kept'] for report in reports):
    return
  filters = [
    f for r in reports for q in r['quality'].values() for f in q['filters']
  ]
  if all(r['perturbed']['removed'] == r['cells'] for r in reports):
    raise errors.UserError(
      'something was done to every cell: a corpus is of controls; --controls '
      f'{perturbed.ALL} takes all'
    )
  worst = max(filters, key=lambda f: f['removed'], default={'removed': 0})
  if not worst['removed']:
    cells = sum(report['cells'] for report in reports)
    raise errors.UserError(
      f'none of {cells} cells expresses a gene that is known here; check that '
      'the matrix holds counts, and --species and --ids-of'
    )
  raise errors.UserError(
    f'no cell passed the filters; {worst["name"]} (threshold '
    f'{worst["threshold"]}) removed {worst["removed"]}: lower it with '
    f'--{worst["name"]}'
  )


def remove_copies(
  engine: engines.Engine,
  plan: plans.Plan,
  opened: Sequence[opening.Opened],
  labels: labels_lib.Labels,
  num_prints: int,
  reports: Sequence[dict],
) -> dict:
  """Takes copies out of `keep/N.npy` and joins units that share cells.

  Args:
    engine: who joins the fingerprints.
    plan: of the build.
    opened: the sources.
    labels: its units are joined.
    num_prints: fingerprints of all pieces.
    reports: of each source; `kept` is corrected and `copies` added.

  Returns:
    `report` and `notes`.
  """
  tasks = copies.num_tasks(num_prints)
  builds.run_stage(
    engine,
    plan.stage(copies.NAME),
    copies.find,
    copies.Join(plan, tasks),
    [0] * tasks,
    'looking for copies',
  )
  stage = plan.stage(copies.NAME)
  pairs_P22 = np.concatenate([stage.array(k, 'pairs') for k in range(tasks)])
  gone, shared = copies.drop(
    pairs_P22,
    [source.num_columns for source in opened],
    [plan.load(f'keep/{source.number}') for source in opened],
  )
  by_source: dict[int, list[int]] = {}
  for source, row in gone:
    by_source.setdefault(source, []).append(row)
  for source, report in zip(opened, reports):
    rows = by_source.get(source.number, [])
    report['copies'] = len(rows)
    if rows:
      keep_C = np.array(plan.load(f'keep/{source.number}'))
      keep_C[rows] = False
      plan.save(f'keep/{source.number}', keep_C)
      report['kept'] = int(keep_C.sum())
  across = [pair for pair in shared if pair[0] != pair[1]]
  within = _units_within(plan, pairs_P22)
  labels.join(across, within)
  names = [source.name for source in opened]
  notes = [
    f'{names[a]} and {names[b]} share {shared[a, b]:,} cells: one unit'
    for a, b in across
  ]
  units = labels.names('unit')
  notes += [
    f'{units[a]} and {units[b]} share cells of one file: one unit'
    for a, b in within
  ]
  notes += _unsearched(plan, names)
  return {
    'report': {
      'searched': True,
      'removed': len(gone),
      'shared': [
        {'sources': [names[a], names[b]], 'cells': number}
        for (a, b), number in shared.items()
      ],
    },
    'notes': notes,
  }


def _units_within(
  plan: plans.Plan, pairs_P22: np.ndarray
) -> list[tuple[int, int]]:
  """Pairs of units of one source that share cells, as two of one file do."""
  found: set[tuple[int, int]] = set()
  one_P, other_P = pairs_P22[:, 0], pairs_P22[:, 1]
  for source in np.unique(one_P[:, 0]):
    unit_C = plan.load(f'codes/{source}')[1]
    mine = (one_P[:, 0] == source) & (other_P[:, 0] == source)
    units = unit_C[one_P[mine, 1]], unit_C[other_P[mine, 1]]
    found |= {(a, b) for a, b in zip(*map(np.ndarray.tolist, units)) if a != b}
  return sorted(found)


def _unsearched(plan: plans.Plan, names: Sequence[str]) -> list[str]:
  """A line where pairs of sources were not searched for copies."""
  found = {
    (int(a), int(b))
    for species in range(len(plan.vocabulary().species))
    for a, b in plan.gene_sets(species).unsearched(
      np.asarray(plan.load(f'measured/{species}'))
    )
  }
  if not found:
    return []
  a, b = min(found)
  return [
    f'{len(found):,} pairs of sources, {names[a]} and {names[b]} among them, '
    'were not searched for copies: too many different gene lists'
  ]
