"""Type I error over many splits of the leaf genes; a screen of all genes.

  python -m experiments.perturbation.splits ROOT

After `calibration ROOT`, from the deletions that it kept: leaf genes are split
anew into a third that is tested and a pool, for 2, 3, 6 and all donors. One
split tests some seventy genes; many say whether p is what it says. Then every
gene is tested against all others, as a screen does, and it is counted how many
of what kind have q < 0.05. Writes ROOT/splits.md.
"""

import argparse
import os
import sys

import numpy as np
import scipy.stats

from experiments.perturbation import (
  atlas_cells,
  calibration,
  deletions,
  settings as settings_lib,
)
from genecompass_jax import errors, paths, pretrained, simulate
from genecompass_jax.analysis.perturbation import matching, statistics

SPLITS = 20
UNITS = (2, 3, 6, 0)  # 0: all
SIZES = (0.01, 0.05, 0.1)


def run(root: str, settings: settings_lib.Settings) -> list[str]:
  """Lines of the table.

  Raises:
    UserError: the deletions are not there.
  """
  truth = atlas_cells.truth(simulate.Atlas(settings.atlas), settings)
  model = pretrained.load(os.path.join(root, 'run'))
  facts = f'{model.sha256} {settings!r}'
  kept = {
    name: deletions.load(os.path.join(root, f'{file}.npz'), facts)
    for name, file in (
      (calibration.MODEL, 'trained'),
      (calibration.RANDOM, 'untrained'),
    )
  }
  if None in kept.values():
    raise errors.UserError(
      f'{root}: no deletions of this model; run experiments.perturbation.'
      'calibration there first'
    )
  token_R = model.vocabulary.tokens(truth.gene_ids)
  kind_of = dict(zip(token_R.tolist(), truth.kind_R.tolist()))
  lines = [
    '| method | donors | genes tested | '
    + ' | '.join(f'empirical p < {s:g}' for s in SIZES)
    + ' | '
    + ' | '.join(f'normal p < {s:g}' for s in SIZES)
    + ' | t test of donors, p < 0.05 |',
    '|---|---|---|' + '---|' * (2 * len(SIZES) + 1),
  ]
  donors = kept[calibration.MODEL].responses.units_U
  unit_of = _units_of(settings, donors)
  for name, found in kept.items():
    kind_T = np.array([kind_of[int(t)] for t in found.token_T])
    leaves = np.flatnonzero(
      np.isin(kind_T, [atlas_cells.EASY, atlas_cells.POOL])
    )
    profiles = matching.of_effects(found.effects, len(unit_of))
    for measure in (statistics.SHIFT, statistics.GENE_SHIFT):
      for number in UNITS:
        number = number or len(donors)
        some_of = np.where(unit_of < number, unit_of, -1)
        parts = []
        for split in range(SPLITS):
          rng = np.random.Generator(np.random.Philox([split, 1]))
          mixed = rng.permutation(leaves)
          third = len(mixed) // 3
          matches = matching.match(
            profiles,
            np.sort(mixed[:third]),
            mixed[third:],
            config=settings.matching,
          )
          how = statistics.Config(measure=measure)
          parts.append(
            statistics.test(
              found.effects, matches, some_of, donors[:number], how
            )
          )
        lines.append(_line(f'{name}, {measure}', number, parts))
  lines += ['', 'All genes against each other, all donors: with q < 0.05', '']
  tokens = kept[calibration.MODEL].token_T.tolist()
  kinds = sorted({kind_of[token] for token in tokens})
  lines += [f'| method | {" | ".join(kinds)} |', '|---|' + '---|' * len(kinds)]
  for name, found in kept.items():
    kind_T = np.array([kind_of[int(t)] for t in found.token_T])
    profiles = matching.of_effects(found.effects, len(unit_of))
    matches = matching.match(
      profiles, np.arange(len(kind_T)), config=settings.matching
    )
    for measure in (statistics.SHIFT, statistics.GENE_SHIFT):
      how = statistics.Config(measure=measure)
      q_T = statistics.test(found.effects, matches, unit_of, donors, how).q_T
      shares = [
        f'{(q_T[kind_T == kind] < statistics.ALPHA).sum()} of '
        f'{np.isfinite(q_T[kind_T == kind]).sum()}'
        for kind in kinds
      ]
      lines.append(f'| {name}, {measure} | {" | ".join(shares)} |')
  return lines


def _units_of(settings, donors) -> np.ndarray:
  """Donor of each perturbed cell."""
  adata = atlas_cells.perturbed_cells(simulate.Atlas(settings.atlas), settings)
  return np.searchsorted(donors, adata.obs['donor'].astype(str))


def _line(name: str, number: int, parts: list[statistics.Tests]) -> str:
  shares = []
  tested = np.concatenate([p.p_T for p in parts])
  tested = int(np.isfinite(tested).sum())
  for kind in ('p_empirical', 'p_normal'):
    p = np.concatenate([getattr(one, f'{kind}_T') for one in parts])
    p = p[np.isfinite(p)]
    shares += [f'{(p < size).mean():.3f}' for size in SIZES]
  called, asked = 0, 0
  for one in parts:
    apart_TU = one.effect_TU - one.null_mean_TU
    rows = np.isfinite(one.p_T)
    p = scipy.stats.ttest_1samp(
      apart_TU[rows], 0.0, axis=1, nan_policy='omit', alternative='greater'
    ).pvalue
    called, asked = called + int((p < 0.05).sum()), asked + len(p)
  shares.append(f'{called / max(asked, 1):.3f}')
  return f'| {name} | {number} | {tested:,} | {" | ".join(shares)} |'


def main() -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('root', metavar='ROOT')
  args = parser.parse_args()
  try:
    lines = run(args.root, settings_lib.Settings())
  except errors.UserError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_USAGE
  text = '\n'.join(lines) + '\n'
  paths.write_text(os.path.join(args.root, 'splits.md'), text)
  print(text, end='')
  return errors.EXIT_OK


if __name__ == '__main__':
  sys.exit(main())
