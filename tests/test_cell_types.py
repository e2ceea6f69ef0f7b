"""Probes of cell types: folds, scores and intervals against slow references."""

import sys

import numpy as np
import pytest
import scipy.sparse
import sklearn.metrics

from genecompass_jax import errors
from genecompass_jax.tasks import cell_types


def blobs(num_cells=240, num_classes=4, spread=0.3, seed=0):
  rng = np.random.default_rng(seed)
  code_C = rng.integers(num_classes, size=num_cells)
  centres = rng.normal(size=(num_classes, 8))
  values_CD = centres[code_C] + spread * rng.normal(size=(num_cells, 8))
  return values_CD, np.array([f'type {c}' for c in code_C])


def features(values):
  return {'method': cell_types.Features(values)}


def test_separate_classes_are_found_and_noise_is_not():
  values_CD, labels = blobs()
  rng = np.random.default_rng(1)
  given = features(values_CD) | {
    'noise': cell_types.Features(rng.normal(size=values_CD.shape))
  }
  rows = cell_types.probe(given, labels, dataset='blobs')
  assert len(rows) == 2 * 2 * 3  # methods, probes, seeds
  for row in rows:
    assert (row.value > 0.95) == (row.method == 'method'), row
    assert row.n == 240 and row.split == cell_types.WITHIN_SAMPLE
    assert np.isnan(row.ci_low)  # cells of one unit


def test_macro_f1_is_that_of_scikit_learn():
  rng = np.random.default_rng(0)
  labels = rng.choice(list('abcd'), 300)
  predicted = np.where(
    rng.random(300) < 0.6, labels, rng.choice(list('abcde'), 300)
  )
  expected = sklearn.metrics.f1_score(
    labels, predicted, labels=np.unique(labels), average='macro'
  )
  assert cell_types._macro_f1(labels, predicted) == pytest.approx(expected)


def test_folds_are_stratified_and_follow_the_seed():
  _, labels = blobs(num_cells=263)
  fold_C = cell_types._folds(labels, 5, seed=0)
  sizes = np.bincount(fold_C)
  assert sizes.max() - sizes.min() <= 1
  for name in np.unique(labels):
    each = np.bincount(fold_C[labels == name], minlength=5)
    assert each.max() - each.min() <= 1
  np.testing.assert_array_equal(fold_C, cell_types._folds(labels, 5, seed=0))
  assert (fold_C != cell_types._folds(labels, 5, seed=1)).any()


def test_a_unit_is_never_in_training_and_test():
  # Every unit shifts the features more than the classes differ and names its
  # classes at random: who learns from a unit's own cells would do well.
  rng = np.random.default_rng(0)
  units = np.repeat([f'donor {u}' for u in range(8)], 60)
  labels = rng.choice(['a', 'b'], len(units))
  values_CD = rng.normal(size=(len(units), 4)) * 0.01
  values_CD[:, 0] += 10 * np.unique(units, return_inverse=True)[1]
  values_CD[:, 1] += np.where(labels == 'a', 0.1, 0)
  values_CD[:, 1] *= np.unique(units, return_inverse=True)[1] % 2 * 2 - 1
  inside = cell_types.probe(features(values_CD), labels, dataset='x')
  apart = cell_types.probe(
    features(values_CD), labels, dataset='x', units=units
  )
  knn = [r for r in inside if r.metric == cell_types.KNN]
  assert min(r.value for r in knn) > 0.95
  means = [r for r in apart if not r.unit and r.metric == cell_types.KNN]
  assert len(means) == 1 and means[0].value < 0.8
  assert means[0].n == 8 and means[0].split == cell_types.LEAVE_UNIT_OUT
  assert means[0].ci_low < means[0].value < means[0].ci_high
  singles = [r for r in apart if r.unit and r.metric == cell_types.KNN]
  assert {r.unit for r in singles} == set(units)
  assert np.mean([r.value for r in singles]) == pytest.approx(means[0].value)


def test_fewer_than_six_units_get_no_interval():
  values_CD, labels = blobs()
  units = np.arange(len(labels)) % 5
  rows = cell_types.probe(features(values_CD), labels, dataset='x', units=units)
  assert all(np.isnan(row.ci_low) and np.isnan(row.ci_high) for row in rows)
  assert np.isnan(
    cell_types.difference(rows, 'x', cell_types.KNN, 'method', 'method')[1]
  )


def test_difference_is_paired_over_units():
  values_CD, labels = blobs(spread=1.2)
  units = np.arange(len(labels)) % 6
  noise_CD = np.random.default_rng(2).normal(size=(3, *values_CD.shape))
  given = features(values_CD) | {'random': cell_types.Features(noise_CD)}
  rows = cell_types.probe(given, labels, dataset='x', units=units)
  assert {row.seed for row in rows if row.method == 'random'} == {0, 1, 2}
  gap, low, high, num = cell_types.difference(
    rows, 'x', cell_types.LINEAR, 'method', 'random'
  )
  assert num == 6 and 0 < low < gap < high
  by_unit = [
    np.mean(
      [
        r.value
        for r in rows
        if (r.method, r.unit, r.metric)
        == (method, str(unit), cell_types.LINEAR)
      ]
    )
    for method in ('method', 'random')
    for unit in range(6)
  ]
  assert gap == pytest.approx(np.mean(by_unit[:6]) - np.mean(by_unit[6:]))


def test_small_classes_and_cells_without_a_label_are_left_out():
  values_CD, labels = blobs()
  labels[:14], labels[14:30] = 'rare', ''
  keep_C = cell_types.eligible(labels)
  assert not keep_C[:30].any() and keep_C[30:].all()
  rows = cell_types.probe(features(values_CD), labels, dataset='x')
  assert {row.n for row in rows} == {keep_C.sum()}
  with pytest.raises(errors.UserError, match='fewer than two classes'):
    cell_types.probe(features(values_CD), ['one'] * len(labels), dataset='x')


def test_pca_is_that_of_log_normalised_counts():
  rng = np.random.default_rng(0)
  counts = scipy.sparse.csr_matrix(rng.poisson(1.0, size=(60, 30)))
  found_CN = cell_types.pca(counts, num_components=5)
  dense = counts.toarray() / counts.sum(1) * 1e4
  dense = np.log1p(np.asarray(dense))
  dense -= dense.mean(0)
  values, vectors = np.linalg.eigh(dense.T @ dense)
  expected_CN = dense @ vectors[:, ::-1][:, :5]
  np.testing.assert_allclose(np.abs(found_CN), np.abs(expected_CN), rtol=1e-6)
  few_CN = cell_types.pca(counts, num_components=5, num_genes=3)
  assert few_CN.shape == (60, 3)  # no more than there are genes


def test_table_keeps_the_order_of_the_methods():
  values_CD, labels = blobs()
  rng = np.random.default_rng(0)
  given = {
    'worst': cell_types.Features(rng.normal(size=values_CD.shape)),
    'best': cell_types.Features(values_CD),
  }
  rows = cell_types.probe(given, labels, dataset='x')
  lines = cell_types.table(rows, 'x').splitlines()
  assert [line.split()[0] for line in lines[1:]] == ['worst', 'best']
  assert not cell_types.table(rows, 'x').count('nan')


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
  values_CD, labels = blobs()
  monkeypatch.setitem(sys.modules, 'sklearn.neighbors', None)
  with pytest.raises(errors.UserError, match=r'pip install "\.\[demo\]"'):
    cell_types.probe(features(values_CD), labels, dataset='x')
