"""Experiments on perturbations: their truth, their scores, what is registered."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.perturbation import (
  atlas_cells,
  calibration,
  deletions,
  perturb_fish,
  real_model,
  scores,
  settings,
)
from genecompass_jax import encoding, simulate
from genecompass_jax.analysis.perturbation import (
  cell_set,
  effects as effects_lib,
  statistics,
)


@pytest.fixture(scope='module')
def atlas():
  return simulate.Atlas(settings.SMOKE.atlas)


def test_leaf_genes_do_nothing_and_are_apart_from_the_pool(atlas):
  truth = atlas_cells.truth(atlas, settings.SMOKE)
  again = atlas_cells.truth(
    simulate.Atlas(settings.SMOKE.atlas), settings.SMOKE
  )
  np.testing.assert_array_equal(truth.kind_R, again.kind_R)
  kinds = {
    k: np.flatnonzero(truth.kind_R == k) for k in np.unique(truth.kind_R)
  }
  assert set(kinds) >= {*scores.KINDS, atlas_cells.POOL}
  for kind, rows in kinds.items():
    done_nothing = truth.total_R[rows] == 0
    assert (
      ~done_nothing if kind == atlas_cells.REGULATOR else done_nothing
    ).all()
  # By the definition of the simulator, and not by the one that was used.
  for row in [*kinds[atlas_cells.EASY][:3], *kinds[atlas_cells.SIBLING][:3]]:
    found = atlas.effects(simulate.knock_out(truth.gene_ids[row]), 0)
    fold = np.nan_to_num(found.log2_fold_YR)
    fold[:, row] = 0
    assert not fold.any()
  row, answers = next(iter(truth.answers.items()))
  found = atlas.effects(simulate.knock_out(truth.gene_ids[row]), 0)
  assert answers[row] == -1
  assert found.is_descendant_R[answers == 1].all()
  assert not found.is_descendant_R[answers == 0].any()


def test_perturbed_cells_were_not_trained_on(atlas):
  cells = atlas_cells.perturbed_cells(atlas, settings.SMOKE)
  counts = cells.obs['donor'].value_counts()
  assert (counts == settings.SMOKE.cells_per_donor).all()
  assert settings.Settings().training_cells < settings.FAR


def test_area_under_the_curve_by_hand():
  score = np.array([3.0, 1.0, 2.0, 2.0, np.nan])
  is_true = np.array([True, False, True, False, True])
  # Pairs: 3>1, 3>2, 2>1, and 2=2 counts half.
  assert scores.area(score, is_true) == 3.5 / 4
  assert np.isnan(scores.area(score, np.ones(5, bool)))


def test_answers_leave_out_what_is_too_small_to_say():
  score = np.array([[5.0, 4.0, 1.0, 0.0, 9.0]])
  answer = np.array([[1, 0, 0, 0, -1]])
  sibling = np.array([[False, True, False, False, False]])
  found = scores.of_answers(score, answer, sibling)
  assert found.true_N[0] == 1.0 and found.sibling_N[0] == 1.0
  found = scores.of_answers(-score, answer, sibling)
  assert found.true_N[0] == 0.0


def test_few_regulators_get_no_interval():
  mean, low, high, number = scores.interval(np.array([0.5, 0.7, np.nan]))
  assert (mean, number) == (0.6, 2) and np.isnan(low) and np.isnan(high)
  mean, low, high, number = scores.interval(np.arange(10.0))
  assert low < mean < high and number == 10


def test_a_score_in_the_form_of_effects():
  score_UT = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
  effects = deletions.of_scores(score_UT)
  means = statistics.unit_means(effects, 'shift', np.arange(3), 3, 1)
  np.testing.assert_array_equal(means[1], [2.0, 4.0, 6.0])


def test_deletion_in_the_space_of_components_by_hand():
  rng = np.random.default_rng(0)
  counts_CV = rng.poisson(2.0, (12, 6)).astype(float)
  counts_CV[:, 0] = 0
  counts_CV[:, 1] += 1
  cell_N, token_N = np.nonzero(counts_CV)
  cells = cell_set.CellSet(
    species=0,
    row_C=np.arange(12),
    counts=encoding.RaggedCells(
      token_N.astype(np.int32),
      counts_CV[cell_N, token_N],
      np.searchsorted(cell_N, np.arange(13)),
      counts_CV.sum(1),
    ),
    keys_C=np.zeros(12, np.uint64),
    measured_V=np.ones(6, bool),
    divisor_V=np.ones(6),
    config=encoding.EncodingConfig(),
    name='cells',
  )
  token_T = np.array([1, 2])
  shown = counts_CV[:, token_T] > 0
  variant_N, where_N = np.nonzero(shown.T)
  none_N = np.zeros(len(variant_N), np.float32)
  shape = 2, 1, 5
  like = deletions.Deleted(
    token_T,
    effects_lib.CellEffects(
      variant_N, where_N, none_N, none_N, none_N, none_N, none_N, none_N
    ),
    effects_lib.Responses(
      np.arange(2), np.arange(1, 6), np.array(['u']), np.zeros(shape),
      np.zeros(shape, np.int32),
    ),
  )  # fmt: skip
  found = deletions.of_components(cells, like, np.zeros(12, int), ['u'], 3)
  log_CV = np.log1p(counts_CV / counts_CV.sum(1, keepdims=True) * 1e4)
  middle_V = log_CV.mean(0)
  axes_VD = np.linalg.svd(log_CV - middle_V, full_matrices=False)[2][:3].T
  for n in (0, len(variant_N) - 1):
    cell, token = where_N[n], token_T[variant_N[n]]
    without = log_CV[cell].copy()
    without[token] = 0
    a, b = ((x - middle_V) @ axes_VD for x in (log_CV[cell], without))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found.effects.shift_N[n] == pytest.approx(1 - cosine, abs=1e-6)
  # Gene 4 answers to gene 2 by the change of its reconstruction.
  both = (counts_CV[:, 2] > 0) & (counts_CV[:, 4] > 0)
  moved = log_CV[both, 2] * abs(axes_VD[2] @ axes_VD[4])
  assert found.responses.sum_TUG[1, 0, 3] == pytest.approx(
    moved.sum(), rel=1e-5
  )
  assert found.responses.cells_TUG[1, 0, 3] == both.sum()
  assert found.responses.cells_TUG[1, 0, 1] == 0  # itself


def test_a_partial_correlation_sees_nothing_in_the_mean_itself():
  rng = np.random.default_rng(0)
  mean = rng.normal(size=4000)
  true = mean + rng.normal(size=4000)
  assert abs(
    perturb_fish._partial(mean + rng.normal(size=4000), true, mean)
  ) < (0.05)
  assert perturb_fish._partial(true, true, mean) == pytest.approx(1.0)


def test_what_is_registered_is_what_is_run():
  facts = real_model.registered()
  for word in ('kang', 'perturb', 'scgen', 'muscat'):
    assert not any(word in name for name in facts['model']['trained_on'])
  config = real_model.matching_config(facts)
  assert config.describe().startswith('the 50 genes nearest')
  assert facts['interferon']['regulators'] == ['STAT1', 'IRF7', 'IRF9', 'JAK1']


def test_a_table_names_every_method_and_kind():
  interval = (0.6, 0.5, 0.7, 12)
  of_kinds = dict.fromkeys(scores.KINDS, 20)
  found = {
    'variants': 100,
    'genes': {k: 20 for k in scores.KINDS},
    'cells': 10,
    'donors': 2,
    'nulls_median': 30.0,
    'model_sha256': 'ab' * 32,
    'model_step': 3,
    'atlas_sha256': 'cd' * 32,
    'on_cells': {
      calibration.MODEL: {
        'called': {
          f'{k} {p}': 0.05
          for k in scores.KINDS
          for p in ('p_empirical', 'p_normal')
        },
        'tested': of_kinds,
        'too_few': of_kinds,
        'auroc': 0.5,
        'auroc_raw': 0.6,
        'spearman': float('nan'),
      }
    },
    'answers': {
      calibration.PCA: dict.fromkeys(
        ('true', 'true_less_coexpression', 'sibling'), interval
      )
    },
  }
  text = calibration.report(found)
  assert '| trained model | 0.05 / 0.05 |' in text
  assert '| PCA deletion | 0.60 [0.50, 0.70], n 12 |' in text
  assert '| 0.50 | 0.60 | - |' in text


@pytest.mark.slow  # a minute of one core
def test_smoke_of_the_calibration(tmp_path):
  command = [sys.executable, '-m', 'experiments.perturbation.calibration']
  result = subprocess.run(
    [*command, str(tmp_path), '--smoke'], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr[-2000:]
  found = json.loads((tmp_path / 'calibration.json').read_text())
  assert set(found['on_cells']) >= {calibration.MODEL, calibration.PRIOR}
  # After what its steps say.
  assert result.stdout.endswith((tmp_path / 'calibration.md').read_text())
