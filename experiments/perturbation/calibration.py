"""Type I error and power of deletions, on cells whose regulation is known.

  python -m experiments.perturbation.calibration ROOT [--smoke]

Trains a small model on simulated cells (or goes on with the one in ROOT),
deletes every gene in cells that it has not seen, and writes ROOT/calibration.md
and ROOT/calibration.json. What is tested is fixed before: `atlas_cells.truth`.
"""

import argparse
import dataclasses
import logging
import os
import sys

import numpy as np

from experiments.perturbation import (
  atlas_cells,
  baselines,
  deletions,
  scores,
  settings as settings_lib,
)
from genecompass_jax import errors, model as model_lib, paths, simulate
from genecompass_jax.analysis.perturbation import (
  answers,
  matching,
  statistics,
)
from genecompass_jax.prepare import sources

MODEL, RANDOM = 'trained model', 'random weights'
MODEL_GENES, RANDOM_GENES = f'{MODEL}, gene shift', f'{RANDOM}, gene shift'
PCA, COEXPRESSION = 'PCA deletion', 'co-expression'
EXPRESSION, PRIOR = 'expression level', 'prior cosine'


def run(root: str, settings: settings_lib.Settings) -> dict:
  """Everything; returns what calibration.json holds."""
  atlas = simulate.Atlas(settings.atlas)
  truth = atlas_cells.truth(atlas, settings)
  seen = atlas_cells.training_cells(atlas, settings)
  adata = atlas_cells.perturbed_cells(atlas, settings)
  model = atlas_cells.train(root, seen, settings)
  config = sources.SourceConfig(species='human')
  cells = deletions.read(adata, model, config)
  profiles = matching.of_cells(cells.encode())
  token_R = model.vocabulary.tokens(truth.gene_ids)
  # Genes that cells show, and that stand in one of the sets.
  is_used_R = (truth.kind_R != '') & np.isin(token_R, profiles.key_G)
  used = np.flatnonzero(is_used_R)
  token_T, kind_T = token_R[used], truth.kind_R[used]
  number_of = {int(token): t for t, token in enumerate(token_T)}
  matches = matching.match(
    profiles,
    token_T[kind_T != atlas_cells.POOL],
    token_T[kind_T == atlas_cells.POOL],
    config=settings.matching,
  ).renumber(number_of)
  donors = sorted(adata.obs['donor'].unique())
  unit_of = np.searchsorted(donors, adata.obs['donor'].astype(str))
  print(
    f'{len(token_T)} genes deleted in {cells.num_cells} cells of '
    f'{len(donors)} donors',
    file=sys.stderr,
  )
  facts = f'{model.sha256} {settings!r}'

  def deleted(name: str, one) -> deletions.Deleted:
    place = os.path.join(root, f'{name}.npz')
    found = deletions.load(place, facts)
    if found is None:
      found = deletions.of_model(cells, one, token_T, unit_of, donors)
      deletions.save(place, found, facts)
    return found

  trained = deleted('trained', model)
  untrained = deleted(
    'untrained',
    model.replace(params=model_lib.init(model.config, settings.random_seed)),
  )
  components = deletions.of_components(cells, trained, unit_of, donors)
  place_V = np.full(model.vocabulary.size, -1)
  place_V[model.vocabulary.tokens(list(seen.var_names))] = np.arange(
    seen.n_vars
  )
  mean_UV, correlation_UVV, known = baselines.of_expression(seen, place_V)
  prior_VV = baselines.of_prior(atlas, root, model.vocabulary)

  def tested(effects, units, unit_of, measure=statistics.SHIFT, least=3):
    how = statistics.Config(measure=measure, min_cells=least)
    return statistics.test(effects, matches, unit_of, units, how)

  def scored(score_UV, units):
    effects = deletions.of_scores(score_UV[:, token_T])
    return tested(effects, units, np.arange(len(units)), least=1)

  tests = {
    MODEL: tested(trained.effects, donors, unit_of),
    MODEL_GENES: tested(
      trained.effects, donors, unit_of, statistics.GENE_SHIFT
    ),
    RANDOM: tested(untrained.effects, donors, unit_of),
    RANDOM_GENES: tested(
      untrained.effects, donors, unit_of, statistics.GENE_SHIFT
    ),
    PCA: tested(components.effects, donors, unit_of),
    COEXPRESSION: scored(np.abs(correlation_UVV).mean(1), known),
    EXPRESSION: scored(mean_UV, known),
    PRIOR: scored(np.abs(prior_VV).mean(1)[None], ['the prior']),
  }
  target_kind_T = kind_T[matches.target_T]
  total_T = truth.total_R[used][matches.target_T]
  cell_scores = {
    name: scores.of_cells(found, target_kind_T, total_T)
    for name, found in tests.items()
  }
  # Who answers.
  token_G = trained.responses.token_G
  row_of = {int(token): row for row, token in enumerate(token_R)}
  row_G = np.array([row_of[int(token)] for token in token_G])
  true_T = [
    t for t, v in enumerate(matches.target_T) if int(used[v]) in truth.answers
  ]
  regulators = [int(used[matches.target_T[t]]) for t in true_T]
  answer_NG = np.array([truth.answers[r][row_G] for r in regulators])
  sibling_NG = np.array([truth.siblings[r][row_G] for r in regulators])
  token_N = token_R[regulators]
  by_method = {}
  for name, found in (
    (MODEL, trained),
    (RANDOM, untrained),
    (PCA, components),
  ):
    answered = answers.score(found.responses, matches)
    by_method[name] = answered.z_TG[true_T]
    by_method[f'{name}, raw response'] = answered.mean_TG[true_T]
  by_method |= {
    COEXPRESSION: np.abs(correlation_UVV.mean(0))[token_N][:, token_G],
    EXPRESSION: np.tile(mean_UV.mean(0)[token_G], (len(token_N), 1)),
    PRIOR: prior_VV[token_N][:, token_G],
  }
  answer_scores = {
    name: scores.of_answers(score_NG, answer_NG, sibling_NG)
    for name, score_NG in by_method.items()
  }
  return {
    'settings': dataclasses.asdict(settings),
    'atlas_sha256': settings.atlas.sha256,
    'model_sha256': model.sha256,
    'model_step': model.step,
    'cells': cells.num_cells,
    'donors': len(donors),
    'genes': {k: int((kind_T == k).sum()) for k in np.unique(kind_T)},
    'variants': len(trained.effects.cell_N),
    'nulls_median': float(np.median(matches.num_T)),
    'on_cells': {
      name: {
        'called': {f'{k} {p}': v for (k, p), v in s.called.items()},
        'tested': s.tested,
        'too_few': s.too_few,
        'auroc': s.auroc,
        'auroc_raw': s.auroc_raw,
        'spearman': s.spearman,
      }
      for name, s in cell_scores.items()
    },
    'answers': {
      name: {
        'true': scores.interval(s.true_N),
        'sibling': scores.interval(s.sibling_N),
        'true_less_coexpression': scores.interval(
          s.true_N - answer_scores[COEXPRESSION].true_N
        ),
      }
      for name, s in answer_scores.items()
    },
  }


def report(found: dict) -> str:
  """The tables, in Markdown."""
  easy = atlas_cells.EASY
  lines = [
    f'{found["variants"]:,} deletions of {sum(found["genes"].values())} genes in '
    f'{found["cells"]} simulated cells of {found["donors"]} donors; genes: '
    + ', '.join(f'{n} {k}' for k, n in found['genes'].items())
    + f'; {found["nulls_median"]:g} nulls a target (median); model '
    f'{found["model_sha256"][:12]}, step {found["model_step"]}; atlas '
    f'{found["atlas_sha256"][:12]}.',
    '',
    f'Share of genes called at p < {scores.ALPHA:g} (empirical / normal p), and '
    'how regulators come apart from leaf genes:',
    '',
    '| method | '
    + ' | '.join(scores.KINDS)
    + ' | AUROC z | AUROC bare | Spearman of z and true effect |',
    '|---|' + '---|' * (len(scores.KINDS) + 3),
  ]
  for name, s in found['on_cells'].items():
    shares = [
      '{} / {}'.format(
        *(_share(s['called'][f'{k} {p}']) for p in ('p_empirical', 'p_normal'))
      )
      for k in scores.KINDS
    ]
    numbers = [_two(s[k]) for k in ('auroc', 'auroc_raw', 'spearman')]
    lines.append(f'| {name} | {" | ".join([*shares, *numbers])} |')
  tested = found['on_cells'][MODEL]
  lines += [
    '',
    'Genes tested (without enough nulls): '
    + ', '.join(
      f'{k} {tested["tested"][k]} ({tested["too_few"][k]})'
      for k in scores.KINDS
    )
    + f'. 95 % of shares of {tested["tested"][easy]} {easy} genes lie within '
    + '{:.2f} and {:.2f} if p is right.'.format(
      *_binomial(tested['tested'][easy])
    ),
    '',
    'AUROC of genes that truly answer, and of siblings, against genes that do '
    'not (mean over regulators, 95 % bootstrap over them):',
    '',
    '| method | true answers | less co-expression | siblings (.50 is right) |',
    '|---|---|---|---|',
  ]
  for name, s in found['answers'].items():
    cells = [
      _interval(s[k]) for k in ('true', 'true_less_coexpression', 'sibling')
    ]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _binomial(number: int) -> tuple[float, float]:
  import scipy.stats

  if not number:
    return np.nan, np.nan
  low, high = scipy.stats.binom.interval(0.95, number, scores.ALPHA)
  return low / number, high / number


def _share(value: float) -> str:
  return f'{value:.2f}' if np.isfinite(value) else '-'


def _two(value: float) -> str:
  return f'{value:.2f}' if np.isfinite(value) else '-'


def _interval(values) -> str:
  mean, low, high, number = values
  inside = f' [{low:.2f}, {high:.2f}]' if np.isfinite(low) else ''
  return f'{mean:.2f}{inside}, n {number}' if number else '-'


def main() -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('root', metavar='ROOT')
  parser.add_argument('--smoke', action='store_true', help='a toy, for tests')
  args = parser.parse_args()
  logging.basicConfig(level=logging.WARNING)
  settings = settings_lib.SMOKE if args.smoke else settings_lib.Settings()
  try:
    os.makedirs(args.root, exist_ok=True)
    found = run(args.root, settings)
  except errors.UserError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_USAGE
  except errors.RetryableError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_RETRY
  paths.write_json(os.path.join(args.root, 'calibration.json'), found)
  text = report(found)
  paths.write_text(os.path.join(args.root, 'calibration.md'), text)
  print(text, end='')
  return errors.EXIT_OK


if __name__ == '__main__':
  sys.exit(main())
