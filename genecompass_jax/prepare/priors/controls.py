"""Priors without the knowledge: what a claim for knowledge is held against.

`shuffled`: the rows of a prior, permuted within species, decile of expression
and has-this-prior. `shuffled_pairs`: the same, where genes of several species
that share a token swap rows together with others that do: orthologues stay as
alike as they were, and knowledge of them is left. `random`: random rows with the norms (permuted in the same
strata) and the singular values of the prior. `constant`: every row the same.
`rewired`: a network of the same degrees through the same embedding. One more
control, `none`, is a run with `priors = ()`.
"""

import dataclasses

import numpy as np

from genecompass_jax import errors, vocabulary as vocabulary_lib
from genecompass_jax.prepare.priors import (
  embedding,
  network,
  pairs as pairs_lib,
  strata,
)

KINDS = ('shuffled', 'shuffled_pairs', 'random', 'constant', 'rewired')
_ROUNDS = 200  # of matching norms and spectrum
_CLOSE = 1e-3  # relative error of singular values at which that ends


def shuffled(
  vectors_NP: np.ndarray, strata_N: np.ndarray, seed: int
) -> tuple[np.ndarray, dict]:
  """Rows permuted within strata; all rows are kept."""
  rng = np.random.default_rng([seed, 10])
  order = strata.permutation(strata_N, rng)
  sizes = np.bincount(np.unique(strata_N, return_inverse=True)[1])
  facts = {
    'strata': len(sizes),
    'smallest_stratum': int(sizes.min()),
    'rows_left_in_place': int((order == np.arange(len(order))).sum()),
  }
  return vectors_NP[order], facts


def shuffled_pairs(
  vectors_NP: np.ndarray,
  strata_N: np.ndarray,
  species_N: np.ndarray,
  token_N: np.ndarray,
  seed: int,
) -> tuple[np.ndarray, dict]:
  """Rows permuted within strata, those of one token together.

  A gene whose token another species shares takes the row of such a gene, and
  its orthologue that of the orthologue; the stratum is that of the first
  species. All rows are kept.
  """
  rng = np.random.default_rng([seed, 12])
  by_token = np.lexsort((species_N, token_N))
  first = np.flatnonzero(np.diff(token_N[by_token], prepend=-1))
  size = np.diff(np.append(first, len(by_token)))
  order = np.arange(len(token_N))
  strata_found = 0
  for number in np.unique(size):
    rows_GM = by_token[first[size == number][:, None] + np.arange(number)]
    key_G = np.unique(
      np.column_stack([strata_N[rows_GM[:, 0]], species_N[rows_GM]]),
      axis=0,
      return_inverse=True,
    )[1].ravel()
    order[rows_GM] = rows_GM[strata.permutation(key_G, rng)]
    strata_found += int(key_G.max(initial=-1)) + 1
  facts = {
    'strata': strata_found,
    'rows_that_share_a_token': int(size[size > 1].sum()),
    'rows_left_in_place': int((order == np.arange(len(order))).sum()),
  }
  return vectors_NP[order], facts


def random(
  vectors_NP: np.ndarray, strata_N: np.ndarray, seed: int
) -> tuple[np.ndarray, dict]:
  """Random rows with the same norms and singular values.

  Norms and spectrum are imposed in turn until both hold. Norms are exact;
  the largest relative error of a singular value is among the facts.
  """
  rng = np.random.default_rng([seed, 11])
  given = vectors_NP.astype(np.float64)
  norm_N = np.linalg.norm(given, axis=1)
  norm_N = norm_N[strata.permutation(strata_N, rng)]
  s_P = _singular(given)[0]
  x_NP = rng.normal(size=given.shape)
  error = np.inf
  for _ in range(_ROUNDS):
    now_P, v_PP = _singular(x_NP)
    x_NP = x_NP @ (
      (v_PP * (s_P / np.maximum(now_P, 1e-12 * now_P[0]))) @ v_PP.T
    )
    length_N = np.linalg.norm(x_NP, axis=1)
    x_NP *= (norm_N / np.maximum(length_N, 1e-300))[:, None]
    error = float(np.abs(_singular(x_NP)[0] - s_P).max() / s_P[0])
    if error < _CLOSE:
      break
  return x_NP.astype(np.float32), {'largest_error_of_spectrum': error}


def _singular(x_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Singular values, largest first, and right vectors, from the P x P square."""
  square_P, v_PP = np.linalg.eigh(x_NP.T @ x_NP)
  return np.sqrt(np.maximum(square_P[::-1], 0)), v_PP[:, ::-1]


def constant(vectors_NP: np.ndarray) -> tuple[np.ndarray, dict]:
  """Every row the direction of the mean row, with the mean norm.

  The mean row itself may be zero (promoters are centred); then the first
  principal direction stands in.
  """
  given = vectors_NP.astype(np.float64)
  norm = np.linalg.norm(given, axis=1).mean()
  row = given.mean(0)
  is_zero = np.linalg.norm(row) < 1e-3 * norm
  if is_zero:
    row = np.linalg.svd(given, full_matrices=False)[2][0]
  row *= norm / np.linalg.norm(row)
  same = np.tile(row.astype(np.float32), (len(given), 1))
  return same, {'mean_row_is_zero': bool(is_zero)}


def rewired(
  pairs: pairs_lib.Pairs | None,
  facts: dict,
  vocab: vocabulary_lib.Vocabulary,
  seed: int,
) -> tuple[embedding.Embedded, pairs_lib.Pairs, dict]:
  """The prior of a network of the same degrees, by the same embedding.

  Args:
    pairs: of the prior.
    facts: of the prior, with the parameters of its embedding.
    vocab: the genes.
    seed: of the rewiring; the embedding keeps its own.

  Raises:
    UserError: the prior is no regulatory network.
  """
  if pairs is None or facts.get('kind') != 'grn':
    raise errors.UserError(
      f'only a regulatory network can be rewired, not a prior of kind '
      f'{facts.get("kind", "unknown")!r}; take shuffled or random'
    )
  fields = {f.name for f in dataclasses.fields(embedding.EmbeddingConfig)}
  given = facts['parameters']['embedding']
  config = embedding.EmbeddingConfig(
    **{name: value for name, value in given.items() if name in fields}
  )
  swapped, report = network.rewire(pairs, vocab.genes, seed)
  return embedding.embed(swapped, vocab, config), swapped, report
