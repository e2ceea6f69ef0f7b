"""Learning curves of the study, drawn."""

import os

import numpy as np

from experiments.knowledge_study import arms, results


def draw(root: str, found: dict, settings) -> None:
  """ROOT/curves.png: held-out id loss by size; left out where matplotlib is not installed."""
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
        scores = results.of(found, arm, cells)
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
