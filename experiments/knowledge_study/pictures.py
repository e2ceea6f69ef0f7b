"""The effects of the study, and its learning curves, drawn."""

import os
from collections.abc import Sequence

import numpy as np

from experiments.knowledge_study import (
  arms,
  inference,
  results,
  settings as settings_lib,
)
from genecompass_jax.analysis import figures

EFFECTS, CURVES = 'effects.svg', 'curves.png'
_BELOW = {'id': 'id loss', 'value': 'value loss'}


def draw(
  root: str,
  found: dict,
  settings: settings_lib.Settings,
  contrasts: Sequence[tuple[str, str]],
) -> None:
  """ROOT/effects.svg and ROOT/curves.png; neither without matplotlib.

  Args:
    root: of the study.
    found: finished runs, as of `results.load`.
    settings: of the study.
    contrasts: arms at `other_sizes`, and what each is held against.
  """
  try:
    import matplotlib
  except ImportError:
    return
  matplotlib.use('Agg')
  from matplotlib import pyplot

  style = {**figures.STYLE, 'svg.hashsalt': 'effects'}
  with pyplot.rc_context(style):
    figure = _effects(found, settings, contrasts)
    figure.savefig(os.path.join(root, EFFECTS), metadata={'Date': None})
    pyplot.close(figure)
    figure = _curves(found, settings)
    figure.savefig(os.path.join(root, CURVES))
    pyplot.close(figure)


def _effects(found, settings, contrasts):
  """Differences with their intervals: controls, the pair by size, other arms."""
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(
    2,
    3,
    figsize=(10, 5.6),
    sharey='row',
    layout='constrained',
    width_ratios=(1, 1.2, 1.6),
  )
  place = str(settings.control_size)
  others = [str(cells) for cells in settings.other_sizes]
  titles = (
    f"the study's own controls, {settings.control_size:,} cells",
    'all four against their permuted rows',
    'other arms, ' + ' and '.join(f'{int(n):,}' for n in others) + ' cells',
  )
  for row, (endpoint, margin) in zip(axes, settings.margins):
    controls = [
      (
        p,
        results.differences(
          found, f'fidelity_{p}', f'permuted_fidelity_{p}', place, endpoint
        )[0],
      )
      for p in settings.fidelities
    ]
    pair = [
      (
        f'{cells:,}',
        results.differences(found, *arms.PAIR, str(cells), endpoint)[0],
      )
      for cells in settings.sizes
    ]
    pair.append(
      (
        'mean',
        results.pooled(found, *arms.PAIR, settings.sizes, endpoint)[0],
      )
    )
    rest = [
      (
        f'{one}\n- {other}',
        results.pooled(found, one, other, others, endpoint)[0],
      )
      for one, other in contrasts
      if (one, other) != arms.PAIR
    ]
    for axis, several, colour in zip(
      row, (controls, pair, rest), figures.PALETTE
    ):
      _intervals(axis, several, margin, colour)
    row[0].set_ylabel(f'{_BELOW[endpoint]}, % (below 0: better)')
  for axis, title in zip(axes[0], titles):
    axis.set_title(title, fontsize=9)
  axes[1][0].set_xlabel('share of statements that are true')
  axes[1][1].set_xlabel('training cells')
  for axis in axes[:, 2]:
    axis.tick_params('x', labelsize=7)
  return figure


def _intervals(axis, several, margin: float, colour: str) -> None:
  axis.axhspan(-100 * margin, 100 * margin, color='#EEEEEE', lw=0, zorder=0)
  axis.axhline(0.0, color='#666666', lw=0.8)
  for x, (_, diff) in enumerate(several):
    if not diff.size:
      continue
    one = inference.interval(diff)
    if one.is_supported:
      axis.plot([x, x], [100 * one.low, 100 * one.high], color=colour, lw=1.6)
    axis.plot(x, 100 * one.mean, 'o', color=colour, ms=5)
    seeds = 100 * diff.mean(1)
    axis.plot(
      np.full(len(seeds), x + 0.16), seeds, '_', color=figures.GREY, ms=6
    )
  axis.set_xticks(range(len(several)), [name for name, _ in several])
  axis.set_xlim(-0.5, max(len(several), 1) - 0.5)


def _curves(found, settings):
  """Held-out id loss of 256 cells over the steps, by size; means over seeds."""
  from matplotlib import pyplot

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
      scores = results.of(found, arm, cells)
      if not scores:
        continue
      steps = [step for step, _, _ in scores[0]['curve']]
      mean = np.mean([[y for _, y, _ in s['curve']] for s in scores], axis=0)
      axis.plot(steps, mean, color=colour, label=arm, lw=1.2)
    axis.set_title(f'{cells:,} cells')
    axis.set_xlabel('step')
  axes[0][0].set_ylabel('held-out id loss, nats')
  drawn = {}
  for axis in axes[0]:
    handles, labels = axis.get_legend_handles_labels()
    drawn |= dict(zip(labels, handles))
  if drawn:
    figure.legend(drawn.values(), drawn, loc='outside right center')
  return figure
