"""Skip-gram with negative sampling: gene2vec on pairs, node2vec on walks.

Training is gensim's (`pip install ".[priors]"`), in one thread so
that a seed gives the same vectors. Walks are drawn here, in a compiled kernel,
each from a hash of (seed, its number). One-to-one orthologues are joined by an
edge of the mean weight of a gene, so that the species share a space.
"""

import numpy as np
from scipy import sparse

from genecompass_jax import errors, kernels, vocabulary
from genecompass_jax.prepare.priors import names, pairs as pairs_lib

_TRIES = 32  # of a biased step, before it is taken as it is


def train(
  pairs: pairs_lib.Pairs, vocab: vocabulary.Vocabulary, config
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the gene table and their vectors.

  Args:
    pairs: of both species.
    vocab: the genes.
    config: an `embedding.EmbeddingConfig`.

  Raises:
    UserError: gensim is not installed.
  """
  try:
    from gensim.models import word2vec
  except ImportError:
    raise errors.UserError(
      '--method skipgram needs gensim: pip install ".[priors]" in the folder of '
      'the repository, or take --method svd, the default'
    ) from None
  rows_K, graph_KK = graph(pairs, vocab)
  if config.window == 1:
    sentences = _sentences(graph_KK, config.seed)
  else:
    sentences = walk(
      graph_KK, config.walks, config.length, config.return_weight,
      config.in_out_weight, config.seed,
    )  # fmt: skip
  words = [[str(k) for k in sentence] for sentence in sentences.tolist()]
  model = word2vec.Word2Vec(
    words,
    vector_size=config.width,
    window=config.window,
    min_count=1,
    sg=1,
    negative=config.negatives,
    sample=0,
    shrink_windows=False,
    workers=1,
    epochs=config.epochs,
    seed=config.seed + 1,  # 0 would be drawn from the clock
  )
  vectors_KP = np.stack([model.wv[str(k)] for k in range(len(rows_K))])
  return rows_K, vectors_KP


def graph(
  pairs: pairs_lib.Pairs, vocab: vocabulary.Vocabulary
) -> tuple[np.ndarray, sparse.csr_array]:
  """Genes, and the symmetric weights between them, orthologues joined."""
  rows_K, place = np.unique(
    np.concatenate([pairs.a_N, pairs.b_N]), return_inverse=True
  )
  a_N, b_N = place[: len(pairs)], place[len(pairs) :]
  partner_K = names.orthologue_rows(vocab.genes)[rows_K]
  at_K = np.searchsorted(rows_K, partner_K)
  at_K[at_K == len(rows_K)] = 0
  linked = np.flatnonzero((partner_K > rows_K) & (rows_K[at_K] == partner_K))
  links_N = np.full(len(linked), pairs.weight_N.mean())
  upper = sparse.coo_array(
    (
      np.concatenate([pairs.weight_N, links_N]),
      (np.concatenate([a_N, linked]), np.concatenate([b_N, at_K[linked]])),
    ),
    (len(rows_K), len(rows_K)),
  ).tocsr()
  return rows_K, sparse.csr_array(upper + upper.T)


def walk(
  graph_KK: sparse.csr_array,
  walks: int,
  length: int,
  return_weight: float,
  in_out_weight: float,
  seed: int,
) -> np.ndarray:
  """Walks from every node, int32 [K * walks, length], in random order.

  A step goes to a neighbour with its weight times `return_weight` where that
  is the node before, 1 where it is a neighbour of that, else `in_out_weight`
  (node2vec's 1/p, 1 and 1/q), by rejection.
  """
  graph_KK = sparse.csr_array(graph_KK)
  graph_KK.sort_indices()
  number_K = np.diff(graph_KK.indptr)
  cumulative = np.cumsum(graph_KK.data)
  start_K = np.concatenate([[0.0], cumulative])[graph_KK.indptr[:-1]]
  starts = np.repeat(np.arange(len(number_K)), walks)
  starts = np.random.default_rng([seed, 2]).permutation(starts)
  steps = np.zeros((len(starts), length), np.int32)
  _walk(
    graph_KK.indptr.astype(np.int64),
    graph_KK.indices.astype(np.int64),
    cumulative,
    start_K,
    starts,
    return_weight,
    in_out_weight,
    kernels.fold(seed, 3),
    steps,
  )
  return steps


@kernels.compiled
def _walk(
  start_K1, neighbour_N, cumulative_N, before_K, starts, back, away, seed, steps
):
  top = max(back, away, 1.0)
  for w in range(len(starts)):
    state = kernels.mix64(seed + kernels.GOLDEN * np.uint64(w + 1))
    last, here = np.int64(-1), starts[w]
    steps[w, 0] = here
    for step in range(1, steps.shape[1]):
      first, end = start_K1[here], start_K1[here + 1]
      low_weight = before_K[here]
      total = cumulative_N[end - 1] - low_weight
      chosen = here
      for _attempt in range(_TRIES):
        state += kernels.GOLDEN
        draw = np.float64(kernels.mix64(state) >> np.uint64(11)) / 2.0**53
        at = np.searchsorted(cumulative_N[first:end], low_weight + draw * total)
        chosen = neighbour_N[min(first + at, end - 1)]
        if last < 0:
          break
        factor = away
        if chosen == last:
          factor = back
        else:
          low, high = start_K1[last], start_K1[last + 1]
          place = low + np.searchsorted(neighbour_N[low:high], chosen)
          if place < high and neighbour_N[place] == chosen:
            factor = 1.0
        state += kernels.GOLDEN
        draw = np.float64(kernels.mix64(state) >> np.uint64(11)) / 2.0**53
        if draw * top <= factor:
          break
      last, here = here, chosen
      steps[w, step] = here


def _sentences(graph_KK: sparse.csr_array, seed: int) -> np.ndarray:
  """Every pair as a sentence, int64 [N, 2], in random order.

  Weights are rounded to whole repeats, of 1 at least, after the median is
  set to 1; five at most.
  """
  upper = sparse.triu(graph_KK, 1).tocoo()
  times = np.clip(np.round(upper.data / np.median(upper.data)), 1, 5)
  pairs = np.repeat(np.stack([upper.row, upper.col], 1), times.astype(int), 0)
  return np.random.default_rng([seed, 4]).permutation(pairs)
