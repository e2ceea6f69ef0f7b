"""Finished runs -> rows, contrasts, tables and figures.

Nothing is concluded before the registered number of seeds is there.
"""

import json
import math
import os

import numpy as np

from experiments.knowledge_study import (
  arms,
  inference,
  settings as settings_lib,
)
from genecompass_jax import paths

ENDPOINTS = {
  'primary': 'id: held-out id loss under the masks of one seed, ties by hash, '
  'in excess of the rank bracket fitted on the same training cells; all minus '
  'permuted, relative to the id loss of permuted, mean over the sizes',
  'co_primary': 'value: held-out value loss under the objective split; all '
  'minus permuted, relative to that of permuted, mean over the sizes',
  'secondary': [
    'id and value of every other arm minus none or its control, by size',
    'rare: id loss of genes among the kept ranks of less than 1 % of the '
    'training cells',
    'steps to the final id loss of none',
    'value loss relative to interpolation (mean between visible neighbours)',
    'AUPRC of edges of held-out TFs, minus the prior tables untrained',
    'cosine of orthologues without a common token against random pairs',
  ],
}
ANALYSIS = (
  'pairs by seed and held-out donor; crossed bootstrap over seeds and donors, '
  "Student's t; Holm over the two primary endpoints, and over the secondary "
  'family; no cell is drawn; no verdict before the registered seeds; a study '
  'whose own controls fail says so and answers nothing'
)
# Arm, and what it is held against. Reported in this order.
CONTRASTS = (
  ('all', 'permuted'),
  ('all', 'none'),
  ('all', 'constant'),
  ('all', 'random'),
  ('permuted', 'none'),
  ('grn', 'grn_rewired'),
  ('grn', 'none'),
)
SCORE = 'score.json'
ID_NULL = 'null_id_rank_bracket'
_LOSSES = {
  'id': ('id', 'id_n'),
  'value': ('value', 'value_n'),
  'rare': ('rare_id', 'rare_n'),
}


def load(root: str, runs, settings) -> dict:
  """Score of every finished run: (arm, place, seed) -> score."""
  from experiments.knowledge_study import study

  found = {}
  for run in runs:
    name = study.key(run, settings)
    score = read_score(study.folder_of(root, name))
    if score is not None:
      found[run.arm, run.place, run.seed] = {**score, 'run': name}
  return found


def read_score(folder: str) -> dict | None:
  """Score of a run; None where it is missing, or was made another way."""
  place = os.path.join(folder, SCORE)
  if not os.path.exists(place):
    return None
  score = json.loads(paths.read_text(place))
  if score['format'] != settings_lib.SCORE_FORMAT:
    return None
  return score


def loss(score: dict, endpoint: str, unit: str | None = None) -> float:
  """Mean loss of a unit, or the mean over units (each counts the same)."""
  total, number = _LOSSES[endpoint]
  units = score['units'] if unit is None else {unit: score['units'][unit]}
  means = [
    values[total] / values[number]
    for values in units.values()
    if values.get(number)
  ]
  return float(np.mean(means)) if means else math.nan


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
  """Relative differences [seeds, units] of two arms, and their names.

  Relative to the mean loss of the other arm, so that sizes can be averaged.
  """
  common = sorted(
    seed
    for arm, where, seed in found
    if arm == one
    and where == place
    and (other, place, seed) in found
    and (seeds is None or seed in seeds)
  )
  if not common:
    return np.zeros((0, 0)), [], []
  number = _LOSSES[endpoint][1]
  scores = [(found[one, place, s], found[other, place, s]) for s in common]
  units = [
    unit
    for unit in sorted(scores[0][0]['units'])
    if all(s['units'][unit].get(number) for pair in scores for s in pair)
  ]
  rows = [
    [
      (loss(a, endpoint, unit) - loss(b, endpoint, unit)) / loss(b, endpoint)
      for unit in units
    ]
    for a, b in scores
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
        [loss(found[arm, place, seed], endpoint) for arm in arms.PAIR]
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


def pooled(found: dict, settings, endpoint: str, seeds) -> np.ndarray:
  """Relative differences of the pair, mean over sizes: [seeds, units]."""
  parts = []
  for cells in settings.sizes:
    diff, have, _ = differences(
      found, *arms.PAIR, str(cells), endpoint, set(seeds)
    )
    if have != list(seeds):
      return np.zeros((0, 0))
    parts.append(diff)
  return np.mean(parts, axis=0)


def write(root: str, settings, planned, registered: str) -> str:
  """ROOT/report.md, ROOT/results.parquet and ROOT/curves.png; the text."""
  found = load(root, planned, settings)
  facts = (
    json.loads(paths.read_text(registered))
    if os.path.exists(registered)
    else None
  )
  seeds = list(range(facts['seeds']['primary'])) if facts else []
  main = {key: value for key, value in found.items() if key[2] < 100}
  lines = ['# Does knowledge help? What was run', '']
  lines += [f'Simulated atlas `{settings.atlas.sha256[:16]}`; simulated cells ']
  lines[-1] += 'are no evidence about biology.'
  lines += ['', *_progress(found, settings, planned)]
  lines += ['', '## The study itself', '', *_controls(main, settings)]
  lines += ['', '## Primary endpoints', '', *_primary(main, settings, seeds)]
  lines += ['', '## Losses', '', *_losses(main, settings)]
  lines += ['', '## Contrasts', '', *_contrasts(main, settings)]
  lines += ['', '## What the genes know', '', *_genes(main, settings)]
  if settings.folds:
    lines += ['', '## Real cells', '', *_real(main, settings)]
  text = '\n'.join(lines) + '\n'
  paths.write_text(os.path.join(root, 'report.md'), text)
  _rows(root, found)
  _figure(root, main, settings)
  print(text)
  return text


def _progress(found, settings, planned) -> list[str]:
  rows = []
  for stage in settings_lib.STAGES:
    mine = [run for run in planned if run.stage == stage]
    done = sum((r.arm, r.place, r.seed) in found for r in mine)
    if mine:
      rows.append((stage, f'{done} of {len(mine)}'))
  cpu = [s['cpu_seconds'] for s in found.values()]
  lines = table(('stage', 'runs finished'), rows)
  if cpu:
    lines += ['', f'CPU seconds a run: {np.median(cpu):.0f} (median)']
  stuck = [
    f'{arm} {place} seed {seed}'
    for (arm, place, seed), score in found.items()
    if loss(score, 'id') >= null(score, 'null_id_marginal')
  ]
  if stuck:
    # They stay in every table: to leave them out would choose the result.
    lines += ['', f'Not below the frequency of genes: {"; ".join(stuck)}']
  return lines


def _controls(found, settings) -> list[str]:
  place = str(settings.control_size)
  rows, effects = [], {}
  complete = True
  for p in settings.fidelities:
    for endpoint in ('id', 'value'):
      diff, seeds, units = differences(
        found, f'fidelity_{p}', f'permuted_fidelity_{p}', place, endpoint
      )
      if not diff.size:
        complete = False
        continue
      one = inference.interval(diff)
      complete &= len(seeds) >= settings.other_seeds
      if endpoint == 'id':
        effects[float(p)] = one
      rows.append((p, endpoint, *_interval_cells(one)))
  lines = table(
    ('fidelity', 'loss', 'difference', '95 % interval', 'p', 'seeds', 'units'),
    rows,
  )
  if not complete:
    verdict = 'no verdict: the registered runs are not all there'
  else:
    verdict = inference.controls(effects, settings.alpha)[1]
  return [
    f'Knowledge of fidelity p minus the same rows permuted, {place} training '
    'cells, relative to the loss of the permuted arm (below 0: it helps).',
    '',
    *lines,
    '',
    f'**{verdict}**',
  ]


def _primary(found, settings, seeds) -> list[str]:
  rows, p_values, intervals = [], [], {}
  for endpoint in ('id', 'value'):
    for cells in settings.sizes:
      diff, have, _ = differences(found, *arms.PAIR, str(cells), endpoint)
      if diff.size:
        one = inference.interval(diff)
        rows.append((endpoint, f'{cells:,}', *_interval_cells(one)))
    whole = pooled(found, settings, endpoint, seeds) if seeds else None
    if whole is not None and whole.size:
      intervals[endpoint] = inference.interval(whole)
      p_values.append(intervals[endpoint].p)
      rows.append((endpoint, 'all', *_interval_cells(intervals[endpoint])))
  lines = ['All four minus permuted, relative to the loss of permuted.', '']
  lines += table(
    ('loss', 'cells', 'difference', '95 % interval', 'p', 'seeds', 'units'),
    rows,
  )
  if len(intervals) < 2:
    return [*lines, '', f'**No verdict: {len(seeds)} seeds are registered**']
  ok, why = _study_answers(found, settings)
  for (name, one), p in zip(intervals.items(), inference.holm(p_values)):
    margin = dict(settings.margins)[name]
    said = inference.verdict(one, margin, p, settings.alpha)
    if not ok:
      said = why if ok is False else f'no verdict: {why}'
    lines += ['', f'**{name} loss: {said}** (p {p:.3g} after Holm)']
  return [*lines, '', *_worth(found, settings)]


def _study_answers(found, settings):
  effects = {}
  for p in settings.fidelities:
    diff, seeds, _ = differences(
      found,
      f'fidelity_{p}',
      f'permuted_fidelity_{p}',
      str(settings.control_size),
      'id',
    )
    if len(seeds) >= settings.other_seeds:
      effects[float(p)] = inference.interval(diff)
  return inference.controls(effects, settings.alpha)


def _worth(found, settings) -> list[str]:
  """Knowledge in cells: where the curve without it reaches the same loss."""
  rows = []
  for endpoint in ('id', 'value'):
    curves = [
      [
        np.mean([loss(s, endpoint) for s in _of(found, arm, cells)] or np.nan)
        for cells in settings.sizes
      ]
      for arm in arms.PAIR
    ]
    if not np.isfinite(curves).all() or len(settings.sizes) < 2:
      continue
    worth = inference.worth(settings.sizes, *curves)
    rows.append((endpoint, *(f'{sign}{x:.2f}' for sign, x in worth)))
  if not rows:
    return []
  head = ('loss', *(f'{n:,} cells' for n in settings.sizes))
  return ['Knowledge is worth x times the cells:', '', *table(head, rows)]


def _losses(found, settings) -> list[str]:
  rows = []
  for cells in settings.sizes:
    for arm in arms.MAIN:
      scores = _of(found, arm, cells)
      if not scores:
        continue
      base = null(scores[0])
      ids = [loss(s, 'id') for s in scores]
      values = [loss(s, 'value') for s in scores]
      scaled = null(scores[0], 'null_value_cell_scaled')
      rows.append(
        (
          f'{cells:,}',
          arm,
          f'{np.mean(ids):.4f}',
          f'{np.mean(ids) - base:+.4f}',
          f'{np.mean(values):.4f}',
          f'{np.mean(values) / scaled:.3f}',
          f'{np.mean([loss(s, "rare") for s in scores]):.3f}',
          _steps(found, arm, cells),
          len(scores),
        )
      )
  return table(
    (
      'cells',
      'arm',
      'id',
      'over rank bracket',
      'value',
      'of cell-scaled mean',
      'rare id',
      'steps to final none',
      'seeds',
    ),
    rows,
  )


def _steps(found, arm, cells) -> str:
  """First step of a curve at or below the last id loss of `none`."""
  reached = []
  for (name, place, seed), score in found.items():
    base = found.get(('none', place, seed))
    if name != arm or place != str(cells) or base is None:
      continue
    goal = base['curve'][-1][1]
    steps = [step for step, value, _ in score['curve'] if value <= goal]
    reached.append(steps[0] if steps else math.inf)
  if not reached:
    return ''
  middle = float(np.median(reached))
  return 'never' if math.isinf(middle) else f'{middle:.0f}'


def _contrasts(found, settings) -> list[str]:
  """The secondary family, adjusted together."""
  rows, p_values = [], []
  for one, other in CONTRASTS:
    for endpoint in ('id', 'value', 'rare'):
      if (one, other) == arms.PAIR and endpoint != 'rare':
        continue  # the primary endpoints
      for cells in settings.sizes:
        diff, have, _ = differences(found, one, other, str(cells), endpoint)
        if len(have) < inference.MIN_SEEDS or not diff.size:
          continue
        found_here = inference.interval(diff)
        p_values.append(found_here.p)
        rows.append(
          [
            f'{one} - {other}',
            endpoint,
            f'{cells:,}',
            *_interval_cells(found_here),
          ]
        )
  for row, p in zip(rows, inference.holm(p_values)):
    row.append(f'{p:.3g}')
  return table(
    (
      'contrast',
      'loss',
      'cells',
      'difference',
      '95 % interval',
      'p',
      'seeds',
      'units',
      'p, Holm',
    ),
    rows,
  )


def _genes(found, settings) -> list[str]:
  rows = []
  names = [*arms.MAIN, *arms.CONTROLS]
  for cells in settings.sizes:
    for arm in names:
      scores = [s for s in _of(found, arm, cells) if 'genes' in s]
      if not scores:
        continue
      trained = np.mean([s['genes']['edges_auprc'] for s in scores])
      alone = np.mean(
        [s['tables_alone'].get('edges_auprc', np.nan) for s in scores]
      )
      chance = np.mean([s['genes']['edges_chance'] for s in scores])
      pairs = np.mean([s['genes']['orthologues_auroc'] for s in scores])
      rows.append(
        (
          f'{cells:,}',
          arm,
          f'{trained:.3f}',
          f'{chance:.3f}',
          f'{alone:.3f}',
          f'{trained - alone:+.3f}',
          f'{pairs:.3f}',
          len(scores),
        )
      )
  return [
    'Targets of TFs that the TF table leaves out, mean average precision; '
    'orthologues without a common token, AUROC against random pairs.',
    '',
    *table(
      (
        'cells',
        'arm',
        'edges',
        'share of targets',
        'tables untrained',
        'gain',
        'orthologues',
        'seeds',
      ),
      rows,
    ),
  ]


def _real(found, settings) -> list[str]:
  rows = []
  for fold in settings.folds:
    for arm in arms.MAIN:
      scores = _of(found, arm, fold)
      for unit in sorted(scores[0]['units']) if scores else ():
        ids = [loss(s, 'id', unit) for s in scores]
        values = [loss(s, 'value', unit) for s in scores]
        rows.append(
          (
            unit,
            arm,
            f'{np.mean(ids):.4f}',
            f'{np.mean(values):.4f}',
            len(scores),
          )
        )
  return [
    'Each study held out in turn; every unit, no interval over so few studies.',
    '',
    *table(('unit', 'arm', 'id', 'value', 'seeds'), rows),
  ]


def _of(found, arm, place) -> list[dict]:
  return [
    score
    for (name, where, _), score in sorted(found.items())
    if name == arm and where == str(place)
  ]


def _interval_cells(one: inference.Interval) -> tuple[str, ...]:
  if not one.is_supported:
    return (f'{one.mean:+.2%}', '', '', str(one.seeds), str(one.units))
  return (
    f'{one.mean:+.2%}',
    f'{one.low:+.2%} to {one.high:+.2%}',
    f'{one.p:.3g}',
    str(one.seeds),
    str(one.units),
  )


def table(head, rows) -> list[str]:
  """A table of Markdown; one line that says so where there is no row."""
  if not rows:
    return ['(no run yet)']
  lines = ['| ' + ' | '.join(map(str, head)) + ' |', '|---' * len(head) + '|']
  return lines + ['| ' + ' | '.join(map(str, row)) + ' |' for row in rows]


def _rows(root, found) -> None:
  """results.parquet: one row a run, unit and metric."""
  import pyarrow

  from genecompass_jax import prior_tables

  rows = []
  for (arm, place, seed), score in sorted(found.items()):
    for unit, values in score['units'].items():
      for metric, (total, number) in _LOSSES.items():
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


def _figure(root, found, settings) -> None:
  """Learning curves by size; left out where matplotlib is not installed."""
  try:
    import matplotlib
  except ImportError:
    return
  matplotlib.use('Agg')
  from matplotlib import pyplot

  from genecompass_jax.analysis import figures

  with pyplot.rc_context(figures._STYLE):
    figure, axes = pyplot.subplots(
      1,
      len(settings.sizes),
      figsize=(3 * len(settings.sizes), 2.8),
      squeeze=False,
      sharey=True,
      layout='constrained',
    )
    for axis, cells in zip(axes[0], settings.sizes):
      for colour, arm in zip(figures.PALETTE, arms.MAIN):
        scores = _of(found, arm, cells)
        if not scores:
          continue
        steps = [step for step, _, _ in scores[0]['curve']]
        mean = np.mean([[y for _, y, _ in s['curve']] for s in scores], axis=0)
        axis.plot(steps, mean, color=colour, label=arm, lw=1.2)
      axis.set_title(f'{cells:,} cells')
      axis.set_xlabel('step')
    axes[0][0].set_ylabel('held-out id loss, nats')
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
      figure.legend(handles, labels, loc='outside right center')
    figure.savefig(os.path.join(root, 'curves.png'))
    pyplot.close(figure)
