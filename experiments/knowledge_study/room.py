"""How much there is to be known: what the type of a cell tells of its ranks.

Reproduces: the reason for the atlas of the study (settings.py).

  python -m experiments.knowledge_study.room

Genes of held-out cells are hidden at the rate of the study. One guess knows how
often each gene is among the highest ranks of training cells, the other how often
it is so in cells of this type; both know which genes are visible. The difference
is what a model can win by reading the state of a cell off its other genes, at
the resolution of types; knowledge of genes can shorten the way there, and no
more.

Hardware: one CPU core. Time: 20 seconds.
Expected: 0.17 nats in the default atlas, 0.71 in that of the study.
"""

import sys

import numpy as np
from scipy import sparse

from experiments.knowledge_study import (
  config as config_lib,
  materials,
  settings as settings_lib,
)
from genecompass_jax import masking, simulate

_TRAINING, _HELD_OUT = 4096, 512
_SHRINK = 3.0  # cells of the mean that a type's own frequencies start from


def main() -> int:
  """Prints a line for each atlas."""
  for name, atlas in (
    ('default', simulate.AtlasConfig()),
    ('study', settings_lib.ATLAS),
  ):
    by_gene, by_type = room(atlas)
    print(
      f'{name:8} atlas {atlas.sha256[:16]}: {by_gene:.3f} nats by gene, '
      f'{by_type:.3f} by gene and type, {by_gene - by_type:.3f} to be known'
    )
  return 0


def room(
  atlas_config: simulate.AtlasConfig,
  num_training: int = _TRAINING,
  num_held_out: int = _HELD_OUT,
) -> tuple[float, float]:
  """Cross-entropies of hidden ids in nats: by gene, and by gene and type."""
  atlas = simulate.Atlas(atlas_config)
  training = materials.draw(atlas, 'training', 'human', num_training)
  held_out = materials.draw(atlas, 'heldout', 'human', num_held_out)
  divisor_R = _medians(training.counts)
  top_CR = _highest(training.counts, divisor_R)
  asked_CR = _highest(held_out.counts, divisor_R)
  types_C, own_C = (
    np.asarray(cells.obs['cell_type']) for cells in (training, held_out)
  )
  mean_R = np.clip(top_CR.mean(0), 1e-4, 0.999)
  rate = masking.MaskConfig(
    rate=config_lib.MASK_RATE, objective=masking.SPLIT
  ).id_rate
  chance_TR = {}
  for name in np.unique(own_C):
    mine_CR = top_CR[types_C == name]
    chance_R = mine_CR.sum(0) + _SHRINK * mean_R
    chance_TR[name] = np.clip(chance_R / (len(mine_CR) + _SHRINK), 1e-5, 0.999)
  losses = np.zeros(2)
  number = 0
  rng = np.random.default_rng(0)
  for asked_R, name in zip(asked_CR, own_C):
    genes = np.flatnonzero(asked_R)
    hidden = rng.random(len(genes)) < rate
    for i, chance_R in enumerate((mean_R, chance_TR[name])):
      # Where a gene is not visible, it is hidden with odds r p : 1 - p.
      odds_R = chance_R / (1 - (1 - rate) * chance_R)
      odds_R[genes[~hidden]] = 0
      losses[i] -= np.log(odds_R[genes[hidden]] / odds_R.sum()).sum()
    number += int(hidden.sum())
  by_gene, by_type = losses / number
  return float(by_gene), float(by_type)


def _medians(counts_CR: sparse.csr_matrix) -> np.ndarray:
  """Median of the counts above 0 of each gene; 1 where there is none."""
  columns = counts_CR.tocsc()
  return np.array(
    [
      np.median(columns.data[a:b]) if b > a else 1.0
      for a, b in zip(columns.indptr, columns.indptr[1:])
    ]
  )


def _highest(counts_CR: sparse.csr_matrix, divisor_R) -> np.ndarray:
  """bool [C, R]: genes of the highest ranks of each cell."""
  top_CR = np.zeros(counts_CR.shape, bool)
  for c, (a, b) in enumerate(zip(counts_CR.indptr, counts_CR.indptr[1:])):
    genes = counts_CR.indices[a:b]
    order = np.argsort(-counts_CR.data[a:b] / divisor_R[genes], kind='stable')
    top_CR[c, genes[order[: config_lib.MAX_GENES]]] = True
  return top_CR


if __name__ == '__main__':
  sys.exit(main())
