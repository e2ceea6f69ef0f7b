"""Do interferon regulators hold the stimulated state, in the model's eyes?

  python -m experiments.perturbation.interferon ROOT --data FOLDER

What is tested, by which score and against which nulls stands in
registered.json, which was committed before the first run. The extract names no
donors, so there are ranks and z, and no p. Writes ROOT/interferon.md and .json.
"""

import gzip
import os
import sys

import anndata
import numpy as np

from experiments.perturbation import deletions, real_model
from genecompass_jax import pretrained
from genecompass_jax.analysis import gene_tokens, placed_model
from genecompass_jax.analysis.perturbation import (
  axes,
  cell_set,
  effects as effects_lib,
  matching,
  screen as screen_lib,
  statistics,
)
from genecompass_jax.prepare import sources

SETS = (
  'HALLMARK_INTERFERON_ALPHA_RESPONSE',
  'HALLMARK_INTERFERON_GAMMA_RESPONSE',
)
_CELLS = 'kang_pbmc_ifnb_harmony/kang_pbmc_ifnb_harmony.h5ad'
_GENES = 'gene_sets_msigdb_v2025/human_hallmark.gmt.gz'


def hallmark(data: str) -> set[str]:
  """Symbols of both sets."""
  found: set[str] = set()
  with gzip.open(os.path.join(data, _GENES), 'rt') as file:
    for line in file:
      name, _, *genes = line.rstrip('\n').split('\t')
      if name in SETS:
        found |= set(genes)
  return found


def run(root: str, data: str) -> dict:
  """The test; returns what interferon.json holds."""
  facts = real_model.registered()
  plan = facts['interferon']
  model = real_model.train(root, data)
  adata = anndata.read_h5ad(os.path.join(data, _CELLS))
  symbols_V = np.full(model.vocabulary.size, '', object)
  for token, name in gene_tokens.symbols_of(model.vocabulary, 0).items():
    symbols_V[token] = name
  condition = adata.obs['condition'].to_numpy()
  rows = {
    name: real_model.evenly(
      np.flatnonzero(condition == name), plan['cells_each']
    )
    for name in ('stim', 'ctrl')
  }
  config = sources.SourceConfig(species='human')

  def read(name: str) -> cell_set.CellSet:
    return deletions.read(adata[rows[name]].copy(), model, config)

  start, goal = read('stim'), read('ctrl')
  left_out_V = np.isin(symbols_V, list(hallmark(data)))
  profiles = matching.of_cells(start.encode())
  token_of = {str(s): t for t, s in enumerate(symbols_V) if s}
  shown = {
    name: token_of[name]
    for name in plan['regulators']
    if token_of.get(name) in set(profiles.key_G.tolist())
  }
  excluded = np.flatnonzero(left_out_V).tolist() + list(shown.values())
  matches = matching.match(
    profiles,
    list(shown.values()),
    excluded=excluded,
    config=real_model.matching_config(facts),
  )
  tokens = np.array([*shown.values(), *matches.nulls().tolist()])
  numbered = matches.renumber({int(t): i for i, t in enumerate(tokens)})
  unit_of, units = np.zeros(start.num_cells, np.int64), ['the extract']
  found = {}
  for name, one in (
    ('trained model', model),
    ('random weights', real_model.untrained(model, facts)),
  ):
    effects = _by_model(one, start, goal, tokens, left_out_V)
    for measure in (statistics.TOWARD, statistics.GENE_SHIFT):
      how = statistics.Config(measure=measure)
      found[f'{name}, {measure}'] = statistics.test(
        effects, numbered, unit_of, units, how
      )
  log_CV, other_CV = deletions.logs(start), deletions.logs(goal)
  for name, score_V in {
    'PCA deletion': _components(log_CV, other_CV, left_out_V),
    'expression level': log_CV.mean(0),
    'absolute log fold change': np.abs(log_CV.mean(0) - other_CV.mean(0)),
    'co-expression': _coexpression(log_CV, left_out_V),
  }.items():
    effects = deletions.of_scores(score_V[None, tokens])
    how = statistics.Config(min_cells=1)
    found[name] = statistics.test(
      effects, numbered, np.zeros(1, np.int64), units, how
    )
  return {
    'registered': plan,
    'model_sha256': model.sha256,
    'cells': start.num_cells,
    'not_shown': sorted(set(plan['regulators']) - set(shown)),
    'regulators': {
      name: {
        'detection': float(profiles.detection_G[row]),
        'mean_rank': float(profiles.rank_G[row]),
        'n_null': int(matches.num_T[t]),
        'scores': {
          method: {
            'z': float(tests.z_T[t]),
            'rank': 1 + int(tests.num_above_T[t]),
            'of': 1 + int(tests.num_null_T[t]),
          }
          for method, tests in found.items()
        },
      }
      for t, (name, row) in enumerate(
        zip(shown, profiles.rows(list(shown.values())))
      )
    },
    'mean_z': {
      method: float(np.nanmean(tests.z_T)) for method, tests in found.items()
    },
  }


def _by_model(
  model: pretrained.PretrainedModel,
  start: cell_set.CellSet,
  goal: cell_set.CellSet,
  tokens: np.ndarray,
  left_out_V: np.ndarray,
) -> effects_lib.CellEffects:
  """Deletions of single genes, along the axis of the genes that are scored."""
  placed = placed_model.place(model)
  config = screen_lib.ScreenConfig(
    left_out=tuple(np.flatnonzero(left_out_V).tolist())
  )
  axis = axes.between(
    placed, ('stim', start), ('ctrl', goal), config.pooling, config.left_out
  )
  done = deletions.of_tokens(tokens)
  screen = screen_lib.Screen(placed, start, done, config, axis=axis)
  return screen_lib.joined([screen.run(group) for group in screen.groups])


def _components(log_CV, other_CV, left_out_V, num_components=50) -> np.ndarray:
  """How far deletion moves cells along start -> goal in PCA space.

  Components are fitted on both conditions; the axis is that of the genes that
  are scored.
  """
  both_CV = np.concatenate([log_CV, other_CV])
  centred_CV = both_CV - both_CV.mean(0)
  _, _, axes_DV = np.linalg.svd(centred_CV, full_matrices=False)
  axes_VD = axes_DV[:num_components].T
  scored_VD = np.where(left_out_V[:, None], 0.0, axes_VD)
  apart_V = other_CV.mean(0) - log_CV.mean(0)
  axis_D = apart_V @ scored_VD
  axis_D /= np.linalg.norm(axis_D)
  # A deletion takes the gene's own part away, and nothing else.
  return -log_CV.mean(0) * (axes_VD @ axis_D)


def _coexpression(log_CV, left_out_V) -> np.ndarray:
  """Mean absolute correlation with the genes that are scored."""
  apart_CV = log_CV - log_CV.mean(0)
  norm_V = np.sqrt((apart_CV**2).sum(0))
  unit_CV = apart_CV / np.where(norm_V > 0, norm_V, 1.0)
  scored = np.flatnonzero((norm_V > 0) & ~left_out_V)
  return np.abs(unit_CV.T @ unit_CV[:, scored]).mean(1)


def report(found: dict) -> str:
  """The table, in Markdown."""
  names = list(found['regulators'])
  lines = [
    f'Deletion in {found["cells"]} stimulated cells; model '
    f'{found["model_sha256"][:12]}; score without the perturbed gene and the '
    'hallmark interferon genes. z among matched nulls (place among them, 1 the '
    'highest); one unit: no p. Association learned from expression, not a '
    'causal estimate.',
    '',
    f'| method | {" | ".join(names)} | mean z |',
    '|---|' + '---|' * (len(names) + 1),
  ]
  for method, mean in found['mean_z'].items():
    cells = []
    for name in names:
      s = found['regulators'][name]['scores'][method]
      cells.append(
        f'{s["z"]:+.2f} ({s["rank"]} of {s["of"]})'
        if np.isfinite(s['z'])
        else '-'
      )
    lines.append(f'| {method} | {" | ".join(cells)} | {mean:+.2f} |')
  lines += ['', 'Detection, mean rank, nulls: ' + '; '.join(
    f'{n} {r["detection"]:.2f}, {r["mean_rank"]:.0f}, {r["n_null"]}'
    for n, r in found['regulators'].items()
  ) + '.']  # fmt: skip
  if found['not_shown']:
    lines.append(f'Not shown to the model: {", ".join(found["not_shown"])}.')
  return '\n'.join(lines) + '\n'


def main() -> int:
  """The command; returns its exit code."""
  return real_model.command(__doc__, 'interferon', run, report)


if __name__ == '__main__':
  sys.exit(main())
