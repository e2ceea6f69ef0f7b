"""Pairs -> vectors: exact, seeded, and near where genes belong together."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import sparse

from genecompass_jax import errors, vocabulary
from genecompass_jax.prepare.priors import (
  edges,
  embedding,
  factors,
  holdout,
  names,
  network,
  pairs as pairs_lib,
  strata,
)

VOCAB = vocabulary.Vocabulary.default()
GENES = VOCAB.genes


def pairs_of(a_N, b_N, weight_N=None):
  a_N, b_N = np.asarray(a_N), np.asarray(b_N)
  weight_N = np.ones(len(a_N)) if weight_N is None else np.asarray(weight_N)
  zeros = np.zeros(len(a_N), int)
  return pairs_lib.collect(
    a_N, b_N, weight_N, zeros, zeros.astype(bool), ['x'], merge='sum'
  )


def cosine(x):
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  return x @ x.T


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(2, 40))
def test_svd_of_small_matrices_is_exact(seed, rows, columns):
  rng = np.random.default_rng(seed)
  matrix = rng.normal(size=(rows, columns))
  u, s, share = factors.svd(sparse.csr_array(matrix), 100, 0)
  expected = np.linalg.svd(matrix, compute_uv=False)
  np.testing.assert_allclose(s, expected[: len(s)], rtol=1e-6, atol=1e-7)
  assert share == pytest.approx(1, abs=1e-6)
  gram = matrix @ matrix.T
  np.testing.assert_allclose((u * s**2) @ u.T, gram, atol=1e-6 * s[0] ** 2)
  largest = np.abs(u).argmax(0)
  assert (u[largest, np.arange(len(s))] > 0).all()


def test_svd_of_large_matrices_finds_equal_singular_values(monkeypatch):
  monkeypatch.setattr(factors, '_EXACT', 10)
  blocks = [np.ones((5, 5))] * 60 + [np.ones((9, 9))] * 4
  equal = sparse.csr_array(sparse.block_diag(blocks))
  noise = sparse.random_array(equal.shape, density=0.05, rng=0)
  for matrix, rtol in ((equal, 1e-6), (equal + 0.1 * noise, 1e-2)):
    u, s, _ = factors.svd(matrix, 20, 0)
    exact = np.linalg.svd(matrix.toarray(), compute_uv=False)[:20]
    np.testing.assert_allclose(s, exact, rtol=rtol)
    np.testing.assert_allclose(u.T @ u, np.eye(20), atol=1e-9)


def test_projection_keeps_cosines():
  matrix = sparse.random_array((60, 5000), density=0.05, rng=1)
  found = factors.project(matrix, 512, 0)
  error = cosine(found) - cosine(matrix.toarray())
  assert np.abs(error).max() < 5.5 / np.sqrt(512)


def test_ppmi_by_hand():
  # a-b twice as heavy as a-c; each gene beside itself with its mean weight
  counts = embedding._counts(
    np.array([0, 0]), np.array([1, 2]), np.array([2.0, 1.0]), 3, 1
  ).toarray()
  np.testing.assert_allclose(counts, [[1.5, 2, 1], [2, 2, 0], [1, 0, 1]])
  found = embedding._ppmi(sparse.csr_array(counts), 1.0, 0.0).toarray()
  p = counts / counts.sum()
  with np.errstate(divide='ignore'):
    expected = np.log(p / np.outer(p.sum(1), p.sum(0)))
  np.testing.assert_allclose(found, np.maximum(expected, 0))


def test_windows_are_exact_walks():
  rng = np.random.default_rng(0)
  a_N, b_N = np.triu_indices(8, 1)
  chosen = rng.random(len(a_N)) < 0.5
  weight = rng.random(chosen.sum())
  found = embedding._counts(a_N[chosen], b_N[chosen], weight, 8, 3).toarray()
  w = np.zeros((8, 8))
  w[a_N[chosen], b_N[chosen]] = weight
  w += w.T
  p = w / w.sum(1, keepdims=True)
  mean = w.sum(1) / (w > 0).sum(1)
  expected = (w + w @ p + w @ p @ p + np.diag(mean)) / 3
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('method', ['svd', 'projection'])
def test_same_seed_same_bytes_and_small_families_are_near(method):
  rows = np.flatnonzero(GENES.species_G == 0)[:160].astype(np.int32)
  found = pairs_of(rows[0::2], rows[1::2])  # 80 families of two
  config = embedding.EmbeddingConfig(method=method, width=300, seed=3)
  one, again = (embedding.embed(found, VOCAB, config) for _ in range(2))
  assert one.vectors_NP.tobytes() == again.vectors_NP.tobytes()
  near = cosine(one.vectors_NP)
  assert near[np.arange(0, 160, 2), np.arange(1, 160, 2)].min() > 0.99
  assert np.sqrt(np.square(one.vectors_NP).mean()) == pytest.approx(0.67)
  kept = embedding.embed(
    found, VOCAB, embedding.EmbeddingConfig(method=method, rms=0)
  )
  assert kept.vectors_NP.dtype == np.float32


def test_the_width_is_no_more_than_the_network_has():
  rows = np.flatnonzero(GENES.species_G == 0)[:6].astype(np.int32)
  found = embedding.embed(
    pairs_of(rows[:3], rows[3:]), VOCAB, embedding.EmbeddingConfig()
  )
  assert found.vectors_NP.shape == (6, 3)


def test_species_share_a_space():
  """No pair joins the species; contexts of shared tokens do."""
  rng = np.random.default_rng(0)
  partner_G = names.orthologue_rows(GENES)
  human = np.flatnonzero((partner_G >= 0) & (GENES.species_G == 0))[:200]
  a_N, b_N = rng.integers(0, 20, 600), rng.integers(20, 200, 600)
  both = pairs_of(
    np.concatenate([human[a_N], partner_G[human[a_N]]]),
    np.concatenate([human[b_N], partner_G[human[b_N]]]),
  )
  found = embedding.embed(both, VOCAB, embedding.EmbeddingConfig(width=64))
  at = {g: n for n, g in enumerate(found.rows_N.tolist())}
  for g in human.tolist():
    if g in at:
      np.testing.assert_allclose(
        found.vectors_NP[at[g]],
        found.vectors_NP[at[int(partner_G[g])]],
        atol=1e-3,
      )


def test_coregulated_genes_are_nearer_than_permuted(simulated_knowledge):
  """The network of curated statements against the truth of the atlas."""
  atlas, folder = simulated_knowledge
  path = str(folder / 'tf_target.human.tsv')
  found = edges.read(edges.EdgeTable(path, 0, 'trrust'), GENES)
  before, _ = network.build([found], GENES, holdout.none(GENES))
  config = embedding.EmbeddingConfig(width=64)
  known = embedding.embed(before, VOCAB, config)
  rewired = embedding.embed(network.rewire(before, GENES, 0)[0], VOCAB, config)

  def z(result):
    near = cosine(result.vectors_NP)
    rows = [GENES.row_of[i] for i in atlas.genes[0].gene_ids]
    at_G = np.full(len(GENES), -1)
    at_G[result.rows_N] = np.arange(len(result.rows_N))
    at_R = at_G[rows]
    net = atlas.networks[0]
    groups = [at_R[net.target_E[net.tf_E == t]] for t in range(60)]
    groups = [g[g >= 0] for g in groups]

    def mean(order):
      return np.mean(
        [near[np.ix_(order[g], order[g])].mean() for g in groups if len(g) > 4]
      )

    rng = np.random.default_rng(0)
    null = [mean(rng.permutation(len(near))) for _ in range(30)]
    return (mean(np.arange(len(near))) - np.mean(null)) / np.std(null)

  assert z(known) > 10
  assert z(rewired) < z(known) / 2


def test_walks_follow_edges_and_their_weights():
  from genecompass_jax.prepare.priors import skipgram

  graph = sparse.csr_array(
    np.array([[0, 3, 1, 0], [3, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]], float)
  )
  steps = skipgram.walk(graph, 500, 6, 1.0, 1.0, 0)
  dense = graph.toarray()
  assert (dense[steps[:, :-1], steps[:, 1:]] > 0).all()
  assert np.bincount(steps[:, 0]).tolist() == [500] * 4
  after = steps[steps[:, 0] == 0, 1]
  assert (after == 1).mean() == pytest.approx(0.75, abs=0.06)
  np.testing.assert_array_equal(
    steps, skipgram.walk(graph, 500, 6, 1.0, 1.0, 0)
  )
  back = skipgram.walk(graph, 500, 6, 0.01, 1.0, 0)
  returns = (back[:, 2] == back[:, 0])[back[:, 1] == 2].mean()
  assert returns < (steps[:, 2] == steps[:, 0])[steps[:, 1] == 2].mean()


def test_skipgram():
  rows = np.flatnonzero(GENES.species_G == 0)[:40].astype(np.int32)
  a_N, b_N = np.triu_indices(10, 1)
  found = pairs_of(
    np.concatenate([rows[10 * k + a_N] for k in range(4)]),
    np.concatenate([rows[10 * k + b_N] for k in range(4)]),
  )
  config = embedding.EmbeddingConfig(
    method='skipgram', width=16, epochs=60, window=2, seed=1
  )
  try:
    import gensim  # noqa: F401
  except ImportError:
    with pytest.raises(errors.UserError, match='needs gensim'):
      embedding.embed(found, VOCAB, config)
    pytest.skip('gensim is not installed')
  one, again = (embedding.embed(found, VOCAB, config) for _ in range(2))
  np.testing.assert_array_equal(one.vectors_NP, again.vectors_NP)
  near = cosine(one.vectors_NP)
  inside = np.kron(np.eye(4), np.ones((10, 10))).astype(bool)
  assert near[inside].mean() > near[~inside].mean() + 0.3


def test_nothing_to_embed_is_one_line():
  with pytest.raises(errors.UserError, match='no pairs'):
    embedding.embed(pairs_of([], []), VOCAB, embedding.EmbeddingConfig())
  with pytest.raises(errors.UserError, match='method'):
    embedding.EmbeddingConfig(method='node2vec')


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300))
def test_permutations_stay_in_their_strata(seed, number):
  rng = np.random.default_rng(seed)
  strata_N = rng.integers(0, 6, number)
  order = strata.permutation(strata_N, rng)
  np.testing.assert_array_equal(np.sort(order), np.arange(number))
  np.testing.assert_array_equal(strata_N[order], strata_N)


def test_strata_are_deciles_of_the_genes_given():
  rows = np.flatnonzero(GENES.species_G == 0)[:200]
  value_G = np.full(len(GENES), np.nan)
  value_G[rows[:100]] = np.arange(100)
  found = strata.of(rows, value_G, GENES)
  assert np.bincount(found[1:100]).max() == 10
  assert (found[100:] == strata.DECILES).all()
  assert found[0] == strata.DECILES  # not expressed
  mouse = np.flatnonzero(GENES.species_G == 1)[:5]
  assert (strata.of(mouse, None, GENES) == 2 * strata.DECILES + 1).all()
