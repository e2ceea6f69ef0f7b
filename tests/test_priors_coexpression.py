"""Co-expression: equal to the definition, and honest under permutation."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import sparse

from genecompass_jax import corpus as corpus_lib, errors, vocabulary
from genecompass_jax.prepare.priors import coexpression as lib


def matrix_of(counts, name='m', species=0):
  counts = sparse.csr_array(np.asarray(counts))
  return lib.Matrix(name, species, counts, counts.sum(1).astype(float))


def oracle(counts, config, least):
  """Every pair by the definition: Pearson over cells with both counts."""
  counts = np.asarray(counts, float)
  totals = counts.sum(1, keepdims=True)
  values = {
    'log': np.log2(1 + counts),
    'count': counts,
    'normalised': np.log2(1 + counts * 1e4 / np.maximum(totals, 1)),
  }[config.value]
  found = {}
  for i in range(counts.shape[1]):
    for j in range(i + 1, counts.shape[1]):
      both = (counts[:, i] > 0) & (counts[:, j] > 0)
      x, y = values[both, i], values[both, j]
      if both.sum() >= least and x.std() > 1e-6 and y.std() > 1e-6:
        found[i, j] = np.corrcoef(x, y)[0, 1]
  return found


def simulated(seed, cells=120, genes=30, extra=3.0):
  rng = np.random.default_rng(seed)
  programme = rng.lognormal(0, 1, (cells, 3))
  rate = programme[:, rng.integers(0, 3, genes)] * rng.uniform(
    0.3, extra, genes
  )
  return rng.poisson(rate)


@settings(max_examples=12, deadline=None)
@given(
  st.integers(0, 10**6),
  st.sampled_from(lib.VALUES),
  st.sampled_from((0.3, 0.6, 0.8)),
  st.integers(3, 40),
)
def test_equals_the_definition(seed, value, min_r, least):
  counts = simulated(seed)
  config = lib.CoexpressionConfig(
    value=value, min_r=min_r, min_cells=least, max_cells=500
  )
  values = sparse.csc_array(lib._values(matrix_of(counts), value))
  i_N, j_N, r_N, n_N = lib._above(values, min_r, least)
  expected = oracle(counts, config, least)
  found = dict(zip(zip(i_N.tolist(), j_N.tolist()), r_N))
  for pair, r in expected.items():
    if abs(r - min_r) > 1e-9:
      assert (pair in found) == (r > min_r), (pair, r)
  for pair, r in found.items():
    assert r == pytest.approx(expected[pair], abs=2e-4)
  both = (counts[:, i_N] > 0) & (counts[:, j_N] > 0)
  np.testing.assert_array_equal(n_N, both.sum(0))


def test_blocks_do_not_matter(monkeypatch):
  config = lib.CoexpressionConfig(min_r=0.3, rule='released')
  whole = lib.correlated(matrix_of(simulated(0, genes=60)), config)
  monkeypatch.setattr(lib, '_ROWS', 7)
  parts = lib.correlated(matrix_of(simulated(0, genes=60)), config)
  assert set(zip(*whole[:2])) == set(zip(*parts[:2])) != set()


def test_independent_genes_are_not_co_expressed():
  """A heavy tail makes an r near 1 of one cell; the test must see it."""
  rng = np.random.default_rng(0)
  counts = 1 + (rng.random((60, 300)) < 0.02) * rng.integers(50, 500, (60, 300))
  counts[rng.random(counts.shape) < 0.05] = 0
  config = lib.CoexpressionConfig()
  _, _, _, facts = lib.correlated(matrix_of(counts), config)
  assert facts['pairs_above_r'] > 100  # the released rule would keep them
  assert facts['pairs_kept'] == 0
  assert facts['ranges'][0]['null_pairs'] > 50


def test_real_programmes_are_kept():
  rng = np.random.default_rng(1)
  programme = rng.lognormal(2, 1, (400, 1))
  counts = np.concatenate(
    [
      rng.poisson(programme * np.ones(10)),
      rng.poisson(rng.lognormal(2, 1, (400, 40))),
    ],
    1,
  )
  i, j, r, facts = lib.correlated(
    matrix_of(counts), lib.CoexpressionConfig(seed=3)
  )
  assert len(i) == 45  # all pairs of the programme, and no other
  assert j.max() == 9
  assert r.min() > 0.8
  again = lib.correlated(matrix_of(counts), lib.CoexpressionConfig(seed=3))
  np.testing.assert_array_equal(r, again[2])
  assert facts == again[3]


def test_dividing_by_the_library_size_makes_pairs_of_its_own():
  """Why the default is log2(1 + count): genes of one count each."""
  rng = np.random.default_rng(2)
  counts = (rng.random((300, 40)) < 0.6).astype(int)
  depth = np.round(rng.lognormal(6, 1, 300)).astype(int)
  counts = np.concatenate([counts, depth[:, None]], 1)
  pairs = {
    value: len(lib.correlated(
      matrix_of(counts), lib.CoexpressionConfig(value=value)
    )[0])
    for value in lib.VALUES
  }  # fmt: skip
  assert pairs['log'] == pairs['count'] == 0
  assert pairs['normalised'] == 40 * 39 // 2


def test_the_training_cells_of_a_corpus(tiny_corpus, monkeypatch):
  opened = corpus_lib.Corpus.open(tiny_corpus)
  config = lib.CoexpressionConfig(max_cells=40)
  found = list(lib.matrices(opened, config))
  train = {
    opened.store('train', s).categories('unit')[code]
    for s in (0, 1)
    for code in np.unique(opened.store('train', s).obs('unit')).tolist()
  }
  assert {m.name for m in found} == train
  held = set(opened.manifest['split']['validation_units'])
  assert held
  assert not held & {m.name for m in found}
  assert max(m.counts_CR.shape[0] for m in found) == 40
  # The counts are those of the corpus, whatever the passes.
  monkeypatch.setattr(lib, '_PASS', 2000)
  parts = list(lib.matrices(opened, config))
  for one, other in zip(found, parts, strict=True):
    assert one.name == other.name
    assert (one.counts_CR != other.counts_CR).nnz == 0
    np.testing.assert_array_equal(one.totals_C, one.counts_CR.sum(1))
  everything = lib.CoexpressionConfig(max_cells=10**6)
  number = sum(m.counts_CR.shape[0] for m in lib.matrices(opened, everything))
  assert number == opened.num_cells('train')


def test_pairs_are_pooled_over_matrices(tiny_corpus):
  opened = corpus_lib.Corpus.open(tiny_corpus)
  genes = vocabulary.Vocabulary.default().genes
  config = lib.CoexpressionConfig(min_r=0.3, rule='released')
  found, facts = lib.from_corpus(opened, genes, config)
  kept = sum(m['pairs_kept'] for m in facts['matrices'])
  assert found.weight_N.sum() == kept
  assert found.weight_N.max() > 1
  assert set(genes.species_G[found.a_N]) == {0, 1}
  with pytest.raises(errors.UserError, match='no pair of genes'):
    lib.from_corpus(opened, genes, lib.CoexpressionConfig(min_cells=10**6))
  with pytest.raises(errors.UserError, match='no obs column'):
    lib.from_corpus(opened, genes, lib.CoexpressionConfig(matrix='study'))
  with pytest.raises(errors.UserError, match='rule'):
    lib.CoexpressionConfig(rule='strict')


@pytest.mark.parametrize(('null_pairs', 'kept'), [(9, True), (10, False)])
def test_false_pairs_are_at_most_the_share_that_was_asked_for(null_pairs, kept):
  shape = len(lib.SUPPORTS) + 1, lib._STEPS
  observed, null = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
  observed[2, [0, 10]] = 100
  null[2, [0, 10]] = 60, null_pairs  # of two permutations
  config = lib.CoexpressionConfig(permutations=2)
  limit, (facts,) = lib._limits(observed, null, config)
  # (9 + 1) / 2 is 5 % of the 100 pairs above the first step
  assert limit[2] == pytest.approx(0.81 if kept else np.inf)
  assert np.isinf(np.delete(limit, 2)).all()
  assert facts['pairs'] == 200
