"""Pairs of genes -> one vector a gene.

`svd`: the positive pointwise mutual information (PPMI) of genes and the
contexts they are paired with, then a truncated SVD. `projection`: the same
PPMI rows, of length 1, under a random projection; for graphs of more separate
groups than a vector has dimensions. `skipgram`: gene2vec and node2vec, in
`skipgram.py`.

The contexts of PPMI are tokens: orthologues that share a token are one
context. So the vectors of the two species lie in one space without any weight
to choose, though no pair joins them. A gene is one context of its own, with
the mean weight of its pairs: members of a pair are alike even where they have
no third gene in common.
"""

import dataclasses

import numpy as np
from scipy import sparse

from genecompass_jax import errors, gene_table, vocabulary
from genecompass_jax.prepare.priors import factors, pairs as pairs_lib

METHODS = ('svd', 'projection', 'skipgram')
RMS = 0.67  # of an entry of the released tables: norm 18.6 in 768 dimensions
_MAX_DENSE = 16_000  # genes of a species; walks need their full square


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  """How pairs become vectors.

  Attributes:
    method: one of `METHODS`.
    width: of the vectors, at most; a graph may have fewer dimensions.
    window: steps of a walk within which two genes are paired, each step
      counted the same. 1: the pairs themselves. Larger ones are computed
      exactly, from powers of the transition matrix, or walked (skipgram).
    smoothing: power of the frequency of contexts (Levy 2015): rare contexts
      count for less.
    shift: subtracted from the mutual information before negatives are cut.
    power: of the singular values.
    rms: root mean square of the entries of the table; 0 leaves them.
    seed: of everything random.
    walks, length, return_weight, in_out_weight: of skipgram with a window
      above 1; node2vec's 1/p and 1/q.
    epochs, negatives: of skipgram.
  """

  method: str = 'svd'
  width: int = 256
  window: int = 1
  smoothing: float = 0.75
  shift: float = 0.0
  power: float = 0.5
  rms: float = RMS
  seed: int = 0
  walks: int = 10
  length: int = 20
  return_weight: float = 1.0
  in_out_weight: float = 1.0
  epochs: int = 5
  negatives: int = 5

  def __post_init__(self):
    if self.method not in METHODS:
      raise errors.UserError(
        f'method {self.method!r}: give one of {", ".join(METHODS)}'
      )
    errors.check_at_least(
      'embedding', self, width=1, window=1, seed=0, walks=1, length=2, epochs=1,
      negatives=1, shift=0, rms=0, power=0, smoothing=0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
  """Vectors of some genes.

  Attributes:
    rows_N: rows of the gene table, ascending.
    vectors_NP: float32.
    facts: what happened on the way.
  """

  rows_N: np.ndarray
  vectors_NP: np.ndarray
  facts: dict


def embed(
  pairs: pairs_lib.Pairs,
  vocab: vocabulary.Vocabulary,
  config: EmbeddingConfig,
) -> Embedded:
  """Embeds the genes of some pairs; direction is not looked at.

  Raises:
    UserError: no pairs; or skipgram without gensim.
  """
  if not len(pairs):
    raise errors.UserError('there are no pairs of genes to embed')
  if config.method == 'skipgram':
    from genecompass_jax.prepare.priors import skipgram

    rows_N, vectors_NP = skipgram.train(pairs, vocab, config)
    return Embedded(rows_N, rescaled(vectors_NP, config.rms), {})
  rows_N, matrix_NV = _information(pairs, vocab, config)
  norm_N = np.sqrt(np.asarray(matrix_NV.multiply(matrix_NV).sum(1)).ravel())
  facts = {'genes_in_pairs': len(rows_N)}
  keep_N = norm_N > 0
  rows_N, matrix_NV, norm_N = rows_N[keep_N], matrix_NV[keep_N], norm_N[keep_N]
  facts['genes_without_positive_information'] = int((~keep_N).sum())
  if not len(rows_N):
    raise errors.UserError(
      f'no pair of {len(keep_N):,} genes says more than chance: give more '
      f'pairs, or a shift below {config.shift:g}'
    )
  facts['contexts'] = matrix_NV.shape[1]
  if config.method == 'svd':
    u_NP, s_P, share = factors.svd(matrix_NV, config.width, config.seed)
    kept_N = np.sqrt(np.square(u_NP * s_P).sum(1)) / norm_N
    vectors_NP = u_NP * s_P**config.power
    facts['share_of_squares_kept'] = round(share, 4)
    facts['singular_values'] = [
      float(f'{s:.4g}') for s in s_P[:: max(len(s_P) // 8, 1)]
    ]
    # A gene that the first dimensions do not see has a vector near zero.
    facts['genes_kept_below_a_tenth'] = int((kept_N < 0.1).sum())
  else:
    scaled_NV = sparse.csr_array(sparse.diags_array(1 / norm_N) @ matrix_NV)
    width = min(config.width, matrix_NV.shape[1])
    vectors_NP = factors.project(scaled_NV, width, config.seed)
  return Embedded(rows_N, rescaled(vectors_NP, config.rms), facts)


def components(vectors_NP: np.ndarray, width: int) -> np.ndarray:
  """Scores of the first principal components of wide vectors."""
  centred_NP = vectors_NP - vectors_NP.mean(0)
  _, v_PP = np.linalg.eigh(centred_NP.T @ centred_NP)
  v_PK = v_PP[:, ::-1][:, :width]
  largest_K = np.abs(v_PK).argmax(0)
  return centred_NP @ (v_PK * np.sign(v_PK[largest_K, np.arange(width)]))


def rescaled(vectors_NP: np.ndarray, rms: float) -> np.ndarray:
  """float32 vectors times one factor, so that an entry has a given RMS."""
  size = np.sqrt(np.square(vectors_NP, dtype=np.float64).mean())
  if rms and size:
    vectors_NP = vectors_NP * (rms / size)
  return np.asarray(vectors_NP, np.float32) + np.float32(0)  # no -0


def _information(
  pairs: pairs_lib.Pairs,
  vocab: vocabulary.Vocabulary,
  config: EmbeddingConfig,
) -> tuple[np.ndarray, sparse.csr_array]:
  """Genes, and their PPMI with contexts, each species by itself."""
  species_N = vocab.genes.species_G[pairs.a_N]
  rows, blocks, tokens = [], [], []
  for s in range(len(gene_table.SPECIES)):
    mine = pairs.select(species_N == s)
    if not len(mine):
      continue
    genes, place = np.unique(
      np.concatenate([mine.a_N, mine.b_N]), return_inverse=True
    )
    a_N, b_N = place[: len(mine)], place[len(mine) :]
    counts = _counts(a_N, b_N, mine.weight_N, len(genes), config.window)
    blocks.append(_ppmi(counts, config.smoothing, config.shift))
    rows.append(genes)
    tokens.append(vocab.token_G[genes])
  contexts = np.unique(np.concatenate(tokens))
  placed = []
  for block, token_K in zip(blocks, tokens):
    block = block.tocoo()
    column = np.searchsorted(contexts, token_K)[block.col]
    shape = (block.shape[0], len(contexts))
    placed.append(sparse.csr_array((block.data, (block.row, column)), shape))
  return np.concatenate(rows), sparse.csr_array(sparse.vstack(placed))


def _counts(a_N, b_N, weight_N, size, window) -> sparse.csr_array:
  """Symmetric co-occurrence, each gene beside itself too."""
  upper = sparse.coo_array((weight_N, (a_N, b_N)), (size, size)).tocsr()
  counts = (upper + upper.T).tocsr()
  number_K = np.diff(counts.indptr)
  own_K = np.asarray(counts.sum(1)).ravel() / np.maximum(number_K, 1)
  if window == 1:
    return sparse.csr_array(counts + sparse.diags_array(own_K))
  if size > _MAX_DENSE:
    raise errors.UserError(
      f'a window of {window} needs the square of {size:,} genes in memory, '
      f'more than {_MAX_DENSE:,}; take a window of 1'
    )
  degree_K = np.asarray(counts.sum(1)).ravel()
  step = sparse.csr_array(sparse.diags_array(1 / degree_K) @ counts)
  power = counts.toarray().astype(np.float32)
  total = power.copy()
  for _ in range(window - 1):
    power = (step.T.astype(np.float32) @ power.T).T  # power @ step
    total += power
  total += np.diag(own_K).astype(np.float32)
  return sparse.csr_array(total / window)


def _ppmi(counts, smoothing, shift) -> sparse.csr_array:
  """max(0, log(p(gene, context) / p(gene) p(context)) - shift)."""
  counts = counts.tocoo()
  row_K = np.asarray(counts.sum(1), np.float64).ravel()
  context_K = np.asarray(counts.sum(0), np.float64).ravel() ** smoothing
  context_K /= context_K.sum()
  expected_N = row_K[counts.row] * context_K[counts.col]
  value_N = np.log(np.asarray(counts.data, np.float64) / expected_N) - shift
  keep_N = value_N > 0
  return sparse.csr_array(
    (value_N[keep_N], (counts.row[keep_N], counts.col[keep_N])), counts.shape
  )
