"""Which genes answer a knock-out, beyond those that answer any?

  python -m experiments.perturbation.perturb_fish ROOT --data FOLDER

Predicted answers of panel genes against published fold changes (Perturb-FISH,
astrocytes), beside the mean of all other perturbations. What is tested stands
in registered.json, which was committed before the first run. Writes
ROOT/perturb_fish.md and .json.
"""

import csv
import gzip
import os
import sys

import anndata
import numpy as np
import scipy.stats

from experiments.perturbation import deletions, real_model, scores
from genecompass_jax.analysis import gene_tokens
from genecompass_jax.analysis.perturbation import (
  answers,
  matching,
)
from genecompass_jax.prepare import sources

_CHANGES = 'perturb_fish_astrocytes/effects_astrocytes_LFCs.csv.gz'
MODEL, MEAN = 'trained model', 'mean of perturbations'


def changes(data: str) -> tuple[list[str], list[str], np.ndarray]:
  """Published log fold changes: (genes, targets, [genes, targets])."""
  with gzip.open(os.path.join(data, _CHANGES), 'rt', newline='') as file:
    head, *lines = csv.reader(file)
  values = np.array([[float(x or 'nan') for x in line[1:]] for line in lines])
  return [line[0] for line in lines], head[1:], values


def run(root: str, data: str) -> dict:
  """The test; returns what perturb_fish.json holds."""
  facts = real_model.registered()
  plan = facts['perturb_fish']
  model = real_model.train(root, data)
  adata = anndata.read_h5ad(os.path.join(data, real_model.PANEL))
  controls = np.flatnonzero((adata.obs['condition'] == 'ctrl').to_numpy())
  used = real_model.evenly(controls, plan['cells_used'])
  cells = deletions.read(
    adata[used].copy(), model, sources.SourceConfig(species='human')
  )
  token_of = {
    name: token
    for token, name in gene_tokens.symbols_of(model.vocabulary, 0).items()
    if cells.measured_V[token]
  }
  genes, targets, change_GT = changes(data)
  profiles = matching.of_cells(cells.encode())
  shown = dict(zip(profiles.key_G.tolist(), profiles.cells_G.tolist()))
  on_panel = [t for t in targets if token_of.get(t) in shown]
  enough = [t for t in on_panel if shown[token_of[t]] >= plan['least_cells']]
  matches = matching.match(
    profiles,
    [token_of[t] for t in enough],
    excluded=[token_of[t] for t in on_panel],
    config=real_model.matching_config(facts),
  )
  has_nulls_T = matches.num_T >= matches.config.fewest
  tokens = np.array(
    [token_of[t] for t in enough] + matches.nulls().tolist(), np.int64
  )
  numbered = matches.renumber({int(t): i for i, t in enumerate(tokens)})
  unit_of, units = np.zeros(cells.num_cells, np.int64), ['controls']
  trained = deletions.of_model(cells, model, tokens, unit_of, units)
  untrained = deletions.of_model(
    cells, real_model.untrained(model, facts), tokens, unit_of, units
  )
  components = deletions.of_components(cells, trained, unit_of, units)
  scored = {
    name: answers.score(one.responses, numbered).z_TG
    for name, one in (
      (MODEL, trained),
      ('random weights', untrained),
      ('PCA deletion', components),
    )
  }
  # Genes of the panel that are published and that answer.
  token_G = trained.responses.token_G
  place_of = {int(token): g for g, token in enumerate(token_G)}
  kept = [
    (row, place_of[token_of[name]])
    for row, name in enumerate(genes)
    if token_of.get(name) in place_of
  ]
  row_N, place_N = np.array(kept).T
  log_CV = deletions.logs(cells)
  apart_CV = log_CV - log_CV.mean(0)
  norm_V = np.sqrt((apart_CV**2).sum(0))
  unit_CV = apart_CV / np.where(norm_V > 0, norm_V, 1.0)
  size_GT = np.abs(change_GT)
  values: dict[str, list[float]] = {}
  beyond: dict[str, list[float]] = {}
  names = [t for t, has in zip(enough, has_nulls_T) if has]
  for t in np.flatnonzero(has_nulls_T):
    column = targets.index(enough[t])
    true_N = size_GT[row_N, column]
    others = np.delete(size_GT, column, axis=1)
    mean_N = np.nanmean(others, axis=1)[row_N]
    token = int(tokens[t])
    predicted = {name: z_TG[t, place_N] for name, z_TG in scored.items()}
    predicted |= {
      'co-expression': np.abs(unit_CV.T @ unit_CV[:, token])[token_G[place_N]],
      'expression level': log_CV.mean(0)[token_G[place_N]],
      MEAN: mean_N,
    }
    is_other_N = token_G[place_N] != token
    # The same genes for every method.
    is_used_N = is_other_N & np.isfinite(true_N) & np.isfinite(mean_N)
    for z_N in predicted.values():
      is_used_N &= np.isfinite(z_N)
    for name, z_N in predicted.items():
      one = (z_N[is_used_N], true_N[is_used_N], mean_N[is_used_N])
      values.setdefault(name, []).append(_spearman(*one[:2]))
      beyond.setdefault(name, []).append(
        np.nan if name == MEAN else _partial(*one)
      )
  mean = np.array(values.get(MEAN, []))
  return {
    'registered': plan,
    'model_sha256': model.sha256,
    'cells': cells.num_cells,
    'genes': len(kept),
    'targets': names,
    'not_used': {
      'not on the panel or not known': len(targets) - len(on_panel),
      'shown by too few cells': len(on_panel) - len(enough),
      'too few nulls': len(enough) - len(names),
    },
    'each': {name: list(v) for name, v in values.items()},
    'spearman': {
      name: scores.interval(np.array(v)) for name, v in values.items()
    },
    'less_mean': {
      name: scores.interval(np.array(v) - mean) for name, v in values.items()
    },
    'beyond_mean': {
      name: scores.interval(np.array(v)) for name, v in beyond.items()
    },
  }


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
  if len(x) < 3:
    return np.nan
  return float(scipy.stats.spearmanr(x, y).statistic)


def _partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
  """Spearman of x and y, given a third."""
  xy, xg, yg = _spearman(x, y), _spearman(x, given), _spearman(y, given)
  rest = np.sqrt((1 - xg**2) * (1 - yg**2))
  return float((xy - xg * yg) / rest) if rest > 0 else np.nan


def report(found: dict) -> str:
  """The table, in Markdown."""
  lines = [
    f'{len(found["targets"])} targets, {found["genes"]} genes of the panel, '
    f'{found["cells"]} control cells; model {found["model_sha256"][:12]}. '
    'Spearman with absolute published log fold changes, one value a target: '
    'mean [95 % bootstrap over targets]. Left out: '
    + ', '.join(f'{n} {why}' for why, n in found['not_used'].items())
    + '. Association learned from expression, not a causal estimate.',
    '',
    f'| method | Spearman | less {MEAN} | given {MEAN} |',
    '|---|---|---|---|',
  ]
  for name in found['spearman']:
    cells = [
      _interval(found[k][name])
      for k in ('spearman', 'less_mean', 'beyond_mean')
    ]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _interval(values) -> str:
  mean, low, high, number = values
  if not number:
    return '-'
  inside = f' [{low:+.3f}, {high:+.3f}]' if np.isfinite(low) else ''
  return f'{mean:+.3f}{inside}, n {number}'


def main() -> int:
  """The command; returns its exit code."""
  return real_model.command(__doc__, 'perturb_fish', run, report)


if __name__ == '__main__':
  sys.exit(main())
