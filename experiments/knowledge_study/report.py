"""Finished runs -> rows, contrasts, tables and figures.

Nothing is concluded before the registered number of seeds is there.
"""

import math
import os

import numpy as np

from experiments.knowledge_study import (
  arms,
  inference,
  pictures,
  results,
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
    'id and value of the arms of CONTRASTS, by size',
    'rare: id loss of genes among the kept ranks of less than 1 % of the '
    'training cells',
    'edges: average precision of the targets of held-out TFs, minus the prior '
    'tables untrained',
    'orthologues: pairs without a common token against non-pairs of the same '
    'decile of expression, by cosine',
  ],
  'described': [
    'steps to the final id loss of none',
    'value loss over that of the cell-scaled mean (under split no rank is left '
    'to interpolate)',
  ],
}
ANALYSIS = (
  'pairs by seed and unit (held-out donor, TF or gene); crossed bootstrap over '
  "seeds and units, Student's t; Holm over the two primary endpoints, and over "
  'the secondary family; no cell is drawn; no verdict before the registered '
  'seeds; an effect that is not in all four of study and species is said to be '
  'so; an endpoint on which the own controls of the study fail is said to be '
  'one that it cannot answer: they need an effect at fidelity 1, none at 0 '
  '(not significant, or within the margin), and between neighbours no rise '
  'above what the seeds of a control detect; permutations, rewirings, random '
  'rows and the statements of a fidelity are drawn anew for every seed'
)
# Arm, and what it is held against. Reported in this order; what genes know is
# asked of `_OF_GENES` alone, for the family of tests not to grow.
CONTRASTS = (
  ('all', 'permuted'),
  ('all', 'none'),
  ('all', 'constant'),
  ('all', 'random'),
  ('permuted', 'none'),
  ('grn', 'grn_rewired'),
  ('grn', 'none'),
)
_OF_GENES = (('all', 'permuted'), ('all', 'none'), ('grn', 'grn_rewired'))
# Thought of after the registered runs were seen: in no family, no verdict.
EXPLORED = (
  ('stated', 'permuted_stated'),
  ('coexpression', 'permuted_coexpression'),
  ('all', 'stated'),
  ('all', 'coexpression'),
  ('all', 'permuted_pairs'),
  ('permuted_pairs', 'permuted'),
)
_CONTRAST = ('contrast', 'endpoint', 'difference', '95 % interval', 'p')
_CONTRAST += ('seeds', 'units')
_CONTROLLED = ('id', 'value')


def write(root: str, settings, planned, registered: str) -> str:
  """ROOT/report.md, results.parquet and pictures; the text."""
  found = results.load(root, planned, settings)
  facts = paths.read_json(registered) if os.path.exists(registered) else None
  main = {key: value for key, value in found.items() if key[2] < 100}
  lines = ['# Does knowledge help? What was run', '']
  lines += [f'Simulated atlas `{settings.atlas.sha256[:16]}`; simulated cells ']
  lines[-1] += 'are no evidence about biology.'
  lines += ['', *_progress(found, settings, planned)]
  lines += ['', '## The study itself', '', *_controls(main, settings, facts)]
  lines += ['', '## Primary endpoints', '', *_primary(main, settings, facts)]
  lines += ['', '## Losses', '', *_losses(main, settings)]
  lines += ['', '## Contrasts', '', *_contrasts(main, settings)]
  lines += ['', '## What the genes know', '', *_genes(main, settings)]
  if settings.folds:
    lines += ['', '## Real cells', '', *_real(main, settings)]
  lines += ['', '## Explored, not registered', '', *_explored(main, settings)]
  text = '\n'.join(lines) + '\n'
  paths.write_text(os.path.join(root, 'report.md'), text)
  results.write_rows(root, found)
  pictures.draw(root, main, settings, CONTRASTS)
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
    if results.mean(score, 'id') >= results.null(score, 'null_id_marginal')
  ]
  if stuck:
    # They stay in every table: to leave them out would choose the result.
    lines += ['', f'Not below the frequency of genes: {"; ".join(stuck)}']
  return lines


def _controls(found, settings, facts) -> list[str]:
  rows = []
  for p in settings.fidelities:
    for endpoint in _CONTROLLED:
      diff, *_ = _control(found, settings, p, endpoint)
      if diff.size:
        one = inference.interval(diff)
        rows.append((p, endpoint, *_interval_cells(one)))
  lines = [
    f'Knowledge of fidelity p minus the same rows permuted, '
    f'{settings.control_size:,} training cells, relative to the loss of the '
    'permuted arm (below 0: it helps).',
    '',
    *table(
      ('fidelity', 'loss', 'difference', '95 % interval', 'p', 'seeds')
      + ('units',),
      rows,
    ),
  ]
  for endpoint in _CONTROLLED:
    why = _answers(found, settings, facts, endpoint)[1]
    lines += ['', f'**{endpoint}: {why}**']
  return lines


def _control(found, settings, p: str, endpoint: str):
  return results.differences(
    found,
    f'fidelity_{p}',
    f'permuted_fidelity_{p}',
    str(settings.control_size),
    endpoint,
  )


def _answers(found, settings, facts, endpoint) -> tuple[bool | None, str]:
  """Whether the study can answer on an endpoint, by its own controls."""
  if facts is None:
    return None, 'the study is not registered'
  effects = {}
  for p in settings.fidelities:
    diff, seeds, _ = _control(found, settings, p, endpoint)
    if len(seeds) >= settings.seeds_of(p, facts['seeds']['primary']):
      effects[float(p)] = inference.interval(diff)
  detectable = facts['smallest_detectable_relative'][endpoint]['primary']
  margin = dict(settings.margins)[endpoint]
  return inference.controls(effects, detectable, margin, settings.alpha)


def _primary(found, settings, facts) -> list[str]:
  seeds = list(range(facts['seeds']['primary'])) if facts else []
  rows, p_values, intervals, clusters = [], [], {}, {}
  for endpoint in ('id', 'value'):
    for cells in settings.sizes:
      diff, have, _ = results.differences(
        found, *arms.PAIR, str(cells), endpoint
      )
      if diff.size:
        one = inference.interval(diff)
        rows.append((endpoint, f'{cells:,}', *_interval_cells(one)))
    whole, _, units = results.pooled(
      found, *arms.PAIR, settings.sizes, endpoint, seeds
    )
    if seeds and whole.size:
      names = [results.cluster(unit) for unit in units]
      clusters[endpoint] = {
        name: whole[:, np.equal(names, name)].mean()
        for name in sorted({*names})
      }
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
  for (name, one), p in zip(intervals.items(), inference.holm(p_values)):
    margin = dict(settings.margins)[name]
    said = inference.verdict(
      one, margin, p, settings.alpha, tuple(clusters[name].values())
    )
    ok, why = _answers(found, settings, facts, name)
    if not ok:
      said = why if ok is False else f'no verdict: {why}'
    lines += ['', f'**{name} loss: {said}** (p {p:.3g} after Holm)']
  lines += [
    '',
    'Mean over all sizes by study and species, whose donors have',
    '',
  ]
  lines[-2] += ' something in common:'
  lines += table(
    ('loss', *clusters['id']),
    [
      (name, *(f'{mean:+.2%}' for mean in means.values()))
      for name, means in clusters.items()
    ],
  )
  return [*lines, '', *_worth(found, settings)]


def _worth(found, settings) -> list[str]:
  """Knowledge in cells: where the curve without it reaches the same loss."""
  rows = []
  for endpoint in ('id', 'value'):
    curves = [
      [
        np.mean(
          [results.mean(s, endpoint) for s in results.of(found, arm, cells)]
          or np.nan
        )
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
    for arm in (*arms.MAIN, *arms.EXPLORATORY):
      scores = results.of(found, arm, cells)
      if not scores:
        continue
      base = results.null(scores[0])
      ids = [results.mean(s, 'id') for s in scores]
      values = [results.mean(s, 'value') for s in scores]
      scaled = results.null(scores[0], 'null_value_cell_scaled')
      rows.append(
        (
          f'{cells:,}',
          arm,
          f'{np.mean(ids):.4f}',
          f'{np.mean(ids) - base:+.4f}',
          f'{np.mean(values):.4f}',
          f'{np.mean(values) / scaled:.3f}',
          f'{np.mean([results.mean(s, "rare") for s in scores]):.3f}',
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
    asked = ['id', 'value', 'rare']
    if (one, other) == arms.PAIR:
      asked = ['rare']  # the others are the primary endpoints
    if (one, other) in _OF_GENES:
      asked += results.GAINS
    for row, p in _contrast(found, settings, one, other, asked):
      rows.append(row)
      p_values.append(p)
  for row, p in zip(rows, inference.holm(p_values)):
    row.append(f'{p:.3g}')
  sizes = ' and '.join(f'{n:,}' for n in settings.other_sizes)
  return [
    f'Mean over corpora of {sizes} cells. Losses relative to that of the other '
    'arm (below 0: the first is better); edges and orthologues as they are '
    '(above 0: the first is better).',
    '',
    *table((*_CONTRAST, 'p, Holm'), rows),
  ]


def _explored(found, settings) -> list[str]:
  """Contrasts that no one had asked for before results were there."""
  asked = ('id', 'value', 'rare', *results.GAINS)
  rows = [
    row
    for one, other in EXPLORED
    for row, _ in _contrast(found, settings, one, other, asked)
  ]
  return [
    'With and without co-expression, which is counted from the training '
    'cells; and held against rows that orthologues swap together. '
    'These arms were added after the registered results were seen: p is not '
    'adjusted, and nothing is concluded.',
    '',
    *table(_CONTRAST, rows),
  ]


def _contrast(found, settings, one, other, asked):
  """(row, p) of two arms by endpoint; none before its runs are all there."""
  for endpoint in asked:
    diff, seeds, _ = results.pooled(
      found, one, other, settings.other_sizes, endpoint
    )
    if len(seeds) < settings.other_seeds:
      continue
    interval = inference.interval(diff)
    as_share = endpoint not in results.GAINS
    cells = _interval_cells(interval, as_share)
    yield [f'{one} - {other}', endpoint, *cells], interval.p


def _genes(found, settings) -> list[str]:
  rows = []
  for cells in settings.sizes:
    for arm in arms.ARMS:
      scores = [s for s in results.of(found, arm, cells) if 'genes' in s]
      if scores:
        columns = (
          _mean(s['genes']['edges'] for s in scores),
          _mean(s['genes']['edges_chance'] for s in scores),
          _mean(s['tables_alone']['edges'] for s in scores),
          _mean(results.by_unit(s, results.EDGES) for s in scores),
          _mean(s['genes']['orthologues'] for s in scores),
          _mean(s['tables_alone']['orthologues'] for s in scores),
        )
        shown = ('' if np.isnan(x) else f'{x:.3f}' for x in columns)
        rows.append((f'{cells:,}', arm, *shown, len(scores)))
  return [
    'Targets of TFs that the TF table leaves out, mean average precision; '
    'orthologues without a common token, share of matched non-pairs that come '
    'after the pair.',
    '',
    *table(
      ('cells', 'arm', 'edges', 'share of targets', 'tables untrained')
      + ('gain', 'orthologues', 'tables untrained', 'seeds'),
      rows,
    ),
  ]


def _mean(values_by_unit) -> float:
  """Mean over runs of means over units; not a number where there is none."""
  means = [np.mean(list(v.values())) for v in values_by_unit if v]
  return float(np.mean(means)) if means else math.nan


def _real(found, settings) -> list[str]:
  rows = []
  for endpoint in ('id', 'value'):
    for fold in settings.folds:
      scores = {arm: results.of(found, arm, fold) for arm in arms.MAIN}
      scores = {arm: some for arm, some in scores.items() if some}
      diff, _, units = results.differences(found, *arms.PAIR, fold, endpoint)
      for column, unit in enumerate(units):
        means = {
          arm: np.mean([results.by_unit(s, endpoint)[unit] for s in some])
          for arm, some in scores.items()
        }
        rows.append(
          (
            endpoint,
            unit,
            *(
              f'{means[arm]:.4f}' if arm in means else ''
              for arm in settings.real_arms
            ),
            ', '.join(f'{x:+.2%}' for x in diff[:, column]),
          )
        )
  one, other = arms.PAIR
  return [
    'Each study held out in turn; every unit, no interval over so few studies. '
    'Means over seeds; the difference of each seed, relative to the mean loss '
    'of its study.',
    '',
    *table(
      ('loss', 'unit', *settings.real_arms, f'{one} - {other}, by seed'), rows
    ),
  ]


def _interval_cells(
  one: inference.Interval, as_share: bool = True
) -> tuple[str, ...]:
  form = '+.2%' if as_share else '+.3f'
  numbers = str(one.seeds), str(one.units)
  if not one.is_supported:
    return (f'{one.mean:{form}}', '', '', *numbers)
  bounds = f'{one.low:{form}} to {one.high:{form}}'
  return (f'{one.mean:{form}}', bounds, f'{one.p:.3g}', *numbers)


def table(head, rows) -> list[str]:
  """A table of Markdown; one line that says so where there is no row."""
  if not rows:
    return ['(no run yet)']
  lines = ['| ' + ' | '.join(map(str, head)) + ' |', '|---' * len(head) + '|']
  return lines + ['| ' + ' | '.join(map(str, row)) + ' |' for row in rows]
