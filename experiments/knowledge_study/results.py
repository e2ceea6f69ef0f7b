"""Finished runs -> numbers: by unit, by arm, and differences of arms."""

import math
import os

import numpy as np
import pyarrow

from experiments.knowledge_study import (
  arms,
  runs as runs_lib,
  settings as settings_lib,
)
from genecompass_jax import paths, prior_tables

SCORE = 'score.json'
ID_NULL = 'null_id_rank_bracket'
LOSSES = {
  'id': ('id', 'id_n'),
  'value': ('value', 'value_n'),
  'rare': ('rare_id', 'rare_n'),
}
# Of the vectors of genes; more is better, and a unit is a gene.
EDGES, ORTHOLOGUES = 'edges', 'orthologues'
GAINS = (EDGES, ORTHOLOGUES)


def load(root: str, runs, settings) -> dict:
  """Score of every finished run: (arm, place, seed) -> score."""
  found = {}
  for run in runs:
    name = runs_lib.key(run, settings)
    score = read_score(runs_lib.folder_of(root, name))
    if score is not None:
      found[run.arm, run.place, run.seed] = {**score, 'run': name}
  return found


def read_score(folder: str) -> dict | None:
  """Score of a run; None where it is missing, or was made another way."""
  place = os.path.join(folder, SCORE)
  if not os.path.exists(place):
    return None
  score = paths.read_json(place)
  if score['format'] != settings_lib.SCORE_FORMAT:
    return None
  return score


def cluster(unit: str) -> str:
  """What the donors of one study and species have in common; itself else."""
  return unit.partition('_donor')[0]


def by_unit(score: dict, endpoint: str) -> dict[str, float]:
  """One number a unit.

  Losses are means over what was asked of a held-out donor. 'edges' is the
  average precision of each held-out TF less that of the prior tables of the
  run alone (of no table: less the share of targets); 'orthologues' the share
  of matched non-pairs that come after the pair, by human gene.
  """
  if endpoint == EDGES:
    genes, alone = score['genes'], score['tables_alone']
    return {
      tf: found - alone[EDGES].get(tf, genes['edges_chance'][tf])
      for tf, found in genes[EDGES].items()
    }
  if endpoint == ORTHOLOGUES:
    return dict(score['genes'][ORTHOLOGUES])
  total, number = LOSSES[endpoint]
  return {
    unit: values[total] / values[number]
    for unit, values in score['units'].items()
    if values.get(number)
  }


def mean(score: dict, endpoint: str) -> float:
  """Mean over units: each counts the same."""
  values = list(by_unit(score, endpoint).values())
  return float(np.mean(values)) if values else math.nan


def null(score: dict, name: str = ID_NULL) -> float:
  """Mean over units of the loss of a null model."""
  number = 'value_n' if 'null_value' in name else 'id_n'
  means = [
    values[name] / values[number]
    for values in score['nulls'].values()
    if values.get(number) and name in values
  ]
  return float(np.mean(means)) if means else math.nan


def differences(
  found: dict, one: str, other: str, place: str, endpoint: str, seeds=None
) -> tuple[np.ndarray, list[int], list[str]]:
  """Differences [seeds, units] of two arms, their seeds and units.

  Those of losses are relative to the mean loss of the other arm, so that sizes
  can be averaged; gains of `GAINS` are as they are.
  """
  common = sorted(
    seed
    for arm, where, seed in found
    if arm == one
    and where == place
    and (other, place, seed) in found
    and (seeds is None or seed in seeds)
  )
  pairs = [
    tuple(by_unit(found[arm, place, seed], endpoint) for arm in (one, other))
    for seed in common
  ]
  units = (
    sorted(set.intersection(*(set(v) for pair in pairs for v in pair)))
    if pairs
    else []
  )
  if not units:
    return np.zeros((0, 0)), [], []
  rows = [
    [
      (a[unit] - b[unit])
      / (1.0 if endpoint in GAINS else np.mean(list(b.values())))
      for unit in units
    ]
    for a, b in pairs
  ]
  return np.array(rows), common, units


def spread(found: dict, settings) -> dict[str, dict[str, float]]:
  """Seed-to-seed spread of the pilot, by endpoint, relative to the loss.

  Of two seeds the spread of the paired difference has one degree of freedom;
  that of the losses of both arms has two, and is an upper bound where seeds
  move both arms alike. The larger of the two is taken.
  """
  place = str(settings.control_size)
  result = {}
  for endpoint in ('id', 'value'):
    diff, _, _ = differences(found, *arms.PAIR, place, endpoint)
    paired = float(diff.mean(1).std(ddof=1))
    losses = np.array(
      [
        [mean(found[arm, place, seed], endpoint) for arm in arms.PAIR]
        for seed in settings.pilot_seeds
      ]
    )
    single = math.sqrt(losses.var(0, ddof=1).mean()) / losses[:, 1].mean()
    result[endpoint] = {
      'losses_by_seed': losses.tolist(),
      'sd_of_difference': paired,
      'sd_of_loss_times_root_2': math.sqrt(2) * single,
      'sd_relative': max(paired, math.sqrt(2) * single),
    }
  return result


def pooled(
  found: dict, one: str, other: str, sizes, endpoint: str, seeds=None
) -> tuple[np.ndarray, list[int], list[str]]:
  """Differences [seeds, units], mean over sizes, their seeds and units.

  Of seeds and units that every size has; of `seeds` all, or nothing.
  """
  parts = [
    differences(found, one, other, str(cells), endpoint, seeds)
    for cells in sizes
  ]
  common = sorted(set.intersection(*(set(have) for _, have, _ in parts)))
  units = sorted(set.intersection(*(set(names) for *_, names in parts)))
  if not common or not units or common != sorted(seeds or common):
    return np.zeros((0, 0)), [], []
  chosen = [
    diff[
      np.ix_(
        [have.index(seed) for seed in common],
        [names.index(unit) for unit in units],
      )
    ]
    for diff, have, names in parts
  ]
  return np.mean(chosen, axis=0), common, units


def of(found, arm, place) -> list[dict]:
  return [
    score
    for (name, where, _), score in sorted(found.items())
    if name == arm and where == str(place)
  ]


def write_rows(root: str, found: dict) -> None:
  """results.parquet: one row a run, unit and metric."""
  rows = []
  for (arm, place, seed), score in sorted(found.items()):
    for unit, values in score['units'].items():
      for metric, (total, number) in LOSSES.items():
        if values.get(number):
          rows.append(
            {
              'task': 'knowledge',
              'dataset': 'atlas' if place.isdecimal() else 'real',
              'split': place,
              'unit': unit,
              'seed': seed,
              'method': arm,
              'run': score['run'],
              'checkpoint': score['checkpoint'],
              'step': score['step'],
              'metric': metric,
              'value': values[total] / values[number],
              'n': int(values[number]),
              'contaminated': False,  # units are held out whole
            }
          )
  if rows:
    data = prior_tables.to_bytes(pyarrow.Table.from_pylist(rows))
    paths.write_bytes(os.path.join(root, 'results.parquet'), data)
