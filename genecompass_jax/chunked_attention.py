"""Attention some queries at a time, with a derivative written by hand.

Scores exist for one chunk of queries at a time, in both passes: memory grows
with the row, not with its square. Of the forward pass the output and two
numbers a query are kept, the highest score and the sum of the exponentials;
the backward pass makes the probabilities anew from them. What the derivative
of a softmax subtracts, the mean of the cotangents under the probabilities, is
the product of the output and its cotangent, so that nothing is summed over the
scores again.

The derivation is that of FlashAttention (Dao et al., 2022), without its tiles
over keys. Axes here: N chunks of C queries, M keys, H heads of K.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genecompass_jax import layers

Array = jax.Array

CHUNK = 256  # queries at a time, at most


def added_to_scores(query_segments_BL: Array, segments_BM: Array) -> Array:
  """What hides the genes of other cells: 0 or the lowest number, [B, L, M].

  Padding is looked at by nobody. It looks at all cells of its row, as in the
  release: no one reads it, but recorded states compare in full.
  """
  own_BLM = query_segments_BL[:, :, None] == segments_BM[:, None, :]
  pads_BLM = query_segments_BL[:, :, None] == 0
  mask_BLM = (own_BLM | pads_BLM) & (segments_BM > 0)[:, None, :]
  return jnp.where(mask_BLM, 0.0, jnp.finfo(jnp.float32).min)


def attend(
  query_BLHK: Array,
  key_BMHK: Array,
  value_BMHK: Array,
  query_segments_BL: Array,
  segments_BM: Array,
  dropout_keys_B: Array | None = None,
  *,
  scale: float,
  kept: str,
  rate: float = 0.0,
) -> Array:
  """Softmax attention inside segments, [B, L, H, K] in the type of the query.

  Args:
    query_BLHK: in the precision of the products.
    key_BMHK: likewise.
    value_BMHK: likewise.
    query_segments_BL: cell of each query.
    segments_BM: cell of each key, 0 in padding.
    dropout_keys_B: a key a row; None for evaluation.
    scale: of the scores.
    kept: name, for `jax.checkpoint`, of what the backward pass reads.
    rate: of dropout of probabilities.
  """
  length = query_BLHK.shape[1]
  number = -(-length // CHUNK)
  chunk = -(-length // number)
  pad = number * chunk - length

  def cut(x_BL: Array) -> Array:
    x_BL = jnp.pad(x_BL, ((0, 0), (0, pad)) + ((0, 0),) * (x_BL.ndim - 2))
    return jnp.moveaxis(
      x_BL.reshape(x_BL.shape[0], number, chunk, *x_BL.shape[2:]), 1, 0
    )

  query_BLHK = query_BLHK * jnp.asarray(scale, query_BLHK.dtype)
  out_NBHCK = _attend(
    rate,
    kept,
    jnp.swapaxes(cut(query_BLHK), 2, 3),
    jnp.swapaxes(key_BMHK, 1, 2),
    jnp.swapaxes(value_BMHK, 1, 2),
    cut(query_segments_BL),
    segments_BM,
    dropout_keys_B,
  )
  out_BNCHK = jnp.transpose(out_NBHCK, (1, 0, 3, 2, 4))
  out_BLHK = out_BNCHK.reshape(
    out_BNCHK.shape[0], number * chunk, *out_BNCHK.shape[3:]
  )
  return out_BLHK[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rate, kept, *arrays) -> Array:
  return _forward(rate, kept, *arrays)[0]


def _forward(
  rate,
  kept,
  query_NBHCK,
  key_BHMK,
  value_BHMK,
  query_segments_NBC,
  segments_BM,
  dropout_keys_B,
):
  """Outputs of all chunks, and what the backward pass reads."""

  def one(chunk):
    index, query_BHCK, query_segments_BC = chunk
    scores_BHCM = _scores(query_BHCK, key_BHMK, query_segments_BC, segments_BM)
    top_BHC = scores_BHCM.max(-1)
    # Above 0 and at most 1; the sum divides what has passed the values, which
    # is smaller.
    weights_BHCM = jnp.exp(scores_BHCM - top_BHC[..., None])
    total_BHC = weights_BHCM.sum(-1)
    dropped_BHCM = layers.dropout(
      weights_BHCM, rate, layers.fold_in(dropout_keys_B, index)
    )
    out_BHCK = _product('BHCM,BHMK->BHCK', dropped_BHCM, value_BHMK)
    out_BHCK = out_BHCK / total_BHC[..., None]
    return out_BHCK.astype(query_BHCK.dtype), top_BHC, total_BHC

  chunks = _indices(query_NBHCK), query_NBHCK, query_segments_NBC
  found = jax.lax.map(one, chunks)
  out_NBHCK, top_NBHC, total_NBHC = (checkpoint_name(x, kept) for x in found)
  return out_NBHCK, (
    *(query_NBHCK, key_BHMK, value_BHMK, query_segments_NBC, segments_BM),
    *(dropout_keys_B, out_NBHCK, top_NBHC, total_NBHC),
  )


def _backward(rate, kept, residuals, out_bar_NBHCK):
  """Cotangents of queries, keys and values."""
  del kept
  query_NBHCK, key_BHMK, value_BHMK = residuals[:3]
  query_segments_NBC, segments_BM, dropout_keys_B = residuals[3:6]
  out_NBHCK, top_NBHC, total_NBHC = residuals[6:]
  mean_NBHC = jnp.einsum(
    'NBHCK,NBHCK->NBHC',
    out_bar_NBHCK,
    out_NBHCK,
    preferred_element_type=jnp.float32,
  )

  def one(sums, chunk):
    key_bar_BHMK, value_bar_BHMK = sums
    index, query_BHCK, query_segments_BC, out_bar_BHCK = chunk[:4]
    top_BHC, total_BHC, mean_BHC = chunk[4:]
    keys_B = layers.fold_in(dropout_keys_B, index)
    scores_BHCM = _scores(query_BHCK, key_BHMK, query_segments_BC, segments_BM)
    probs_BHCM = jnp.exp(scores_BHCM - top_BHC[..., None])
    probs_BHCM = probs_BHCM * (1 / total_BHC)[..., None]
    dropped_BHCM = layers.dropout(probs_BHCM, rate, keys_B)
    value_bar_BHMK += _product('BHCM,BHCK->BHMK', dropped_BHCM, out_bar_BHCK)
    probs_bar_BHCM = layers.dropout(
      _product('BHCK,BHMK->BHCM', out_bar_BHCK, value_BHMK), rate, keys_B
    )
    scores_bar_BHCM = probs_BHCM * (probs_bar_BHCM - mean_BHC[..., None])
    query_bar_BHCK = _product('BHCM,BHMK->BHCK', scores_bar_BHCM, key_BHMK)
    key_bar_BHMK += _product('BHCM,BHCK->BHMK', scores_bar_BHCM, query_BHCK)
    return (key_bar_BHMK, value_bar_BHMK), query_bar_BHCK.astype(
      query_BHCK.dtype
    )

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (key_BHMK, value_BHMK))
  chunks = (
    *(_indices(query_NBHCK), query_NBHCK, query_segments_NBC, out_bar_NBHCK),
    *(top_NBHC, total_NBHC, mean_NBHC),
  )
  (key_bar_BHMK, value_bar_BHMK), query_bar_NBHCK = jax.lax.scan(
    one, zeros, chunks
  )
  return (
    query_bar_NBHCK,
    key_bar_BHMK.astype(key_BHMK.dtype),
    value_bar_BHMK.astype(value_BHMK.dtype),
    *(None, None, None),
  )


_attend.defvjp(_forward, _backward)


def _scores(query_BHCK, key_BHMK, query_segments_BC, segments_BM) -> Array:
  scores_BHCM = _product('BHCK,BHMK->BHCM', query_BHCK, key_BHMK)
  return scores_BHCM + added_to_scores(query_segments_BC, segments_BM)[:, None]


def _product(equation: str, x: Array, y: Array) -> Array:
  """An einsum in the precision of the second factor, summed in float32."""
  return jnp.einsum(
    equation, x.astype(y.dtype), y, preferred_element_type=jnp.float32
  )


def _indices(query_NBHCK: Array) -> Array:
  return jnp.arange(query_NBHCK.shape[0])
