"""Losses of hidden genes, slot by slot: what training and evaluation share."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from genecompass_jax import (
  knowledge as knowledge_lib,
  losses,
  model as model_lib,
  sharding,
)

# Devices that hold the same rows share predictions over these axes.
_PREDICTION_AXES = (sharding.CONTEXT, sharding.TENSOR)
# Of the logits that a device holds at a time. Larger ones are made in pieces, and
# again in the backward pass: 1.4 % more FLOPs for base.
_LOGITS_BYTES = 256 << 20


def slot_losses(
  params: model_lib.Params,
  batch: Any,
  knowledge: knowledge_lib.Knowledge,
  config: model_lib.ModelConfig,
  *,
  prior_scale: Any = None,
  dropout_keys_B: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Losses of every masked slot: id [B, K] in nats, value [B, K] or None.

  Only masked slots pass the heads: the logits of all positions would be the
  largest array of the whole step. Slots of weight 0 hold no meaning.
  """
  network = model_lib.bind(config, params)
  hidden_BLD = network(
    batch.cells,
    knowledge,
    prior_scale=prior_scale,
    dropout_keys_B=dropout_keys_B,
  )
  hidden_BKD = jnp.take_along_axis(
    hidden_BLD, batch.masked_slots_BK[..., None], axis=1
  )
  # Devices that share a row or its heads share its predictions.
  hidden_BKD = sharding.constrain(
    hidden_BKD, sharding.BATCH_AXES, _PREDICTION_AXES, None
  )
  labels_BK = jnp.asarray(batch.id_labels_BK)
  score = functools.partial(_id_losses, network)
  if config.hides_ranks:
    is_id_BK = jnp.asarray(batch.id_weights_BK) > 0
    id_BK = _of_ids_alone(score, hidden_BKD, labels_BK, is_id_BK)
  else:
    id_BK = score(hidden_BKD, labels_BK)
  values_BK = network.predicted_values(hidden_BKD)
  if values_BK is None:
    return id_BK, None
  return id_BK, losses.value_losses(values_BK, batch.value_labels_BK)


def _id_losses(network, hidden_BKD, labels_BK) -> jax.Array:
  """Id losses [B, K]; logits of a piece of K at a time where they are large.

  On a mesh every device goes through its own pieces, and gradients of the
  weights are summed over devices once, behind the last of them: left alone, the
  compiler would sum them once a piece.
  """
  config = network.config
  hidden_BKD = network.id_head.transform(hidden_BKD)
  word_VD, bias_V = network.embedding.word[...], network.id_head.bias[...]
  mesh = jax.sharding.get_abstract_mesh()
  shared = sharding.is_shared(mesh)
  rows, num_slots, _ = hidden_BKD.shape
  if shared:
    own = [num_slots, rows]
    axes = (_PREDICTION_AXES, sharding.batch_axes())
    for i, names in enumerate(axes):
      number = math.prod(mesh.shape[n] for n in names)
      if own[i] % number:
        shared = False  # they do not divide: the compiler finds a way
      own[i] //= number
    num_slots, rows = own if shared else (num_slots, rows)
  size = rows * num_slots * config.vocabulary_size * 4
  pieces = next(
    n
    for n in range(1, num_slots + 1)
    if num_slots % n == 0 and (size <= n * _LOGITS_BYTES or n == num_slots)
  )

  def score(hidden_BKD, labels_BK, word_VD, bias_V):
    logits_BKV = model_lib.token_logits(hidden_BKD, word_VD, bias_V, config)
    return losses.id_losses(logits_BKV, labels_BK)

  def in_pieces(hidden_BKD, labels_BK, word_VD, bias_V):
    def cut(x_BK):
      shape = x_BK.shape[0], pieces, -1, *x_BK.shape[2:]
      return jnp.moveaxis(x_BK.reshape(shape), 1, 0)

    again = jax.checkpoint(score, prevent_cse=False)
    id_NBK = jax.lax.map(
      lambda x: again(*x, word_VD, bias_V), (cut(hidden_BKD), cut(labels_BK))
    )
    return jnp.moveaxis(id_NBK, 0, 1).reshape(labels_BK.shape)

  if pieces == 1:
    return score(hidden_BKD, labels_BK, word_VD, bias_V)
  if shared:
    spec = jax.sharding.PartitionSpec
    places = spec(sharding.batch_axes(), _PREDICTION_AXES)
    in_pieces = jax.shard_map(
      in_pieces,
      in_specs=(places, places, spec(), spec()),
      out_specs=places,
      check_vma=False,
    )
  return in_pieces(hidden_BKD, labels_BK, word_VD, bias_V)


def _of_ids_alone(score, hidden_BKD, labels_BK, is_id_BK) -> jax.Array:
  """Under `split`, id losses [B, K] of slots whose id is asked.

  Every other masked slot is asked its value, and scoring all tokens for it
  would be for nothing. A row in which more than half of the slots are ids has
  all of them scored: nothing that was asked is left out.
  """
  num_slots = labels_BK.shape[1]
  half = -(-num_slots // 2)
  ids_first_BK = jnp.argsort(~is_id_BK, axis=1, stable=True)
  place_BK = jnp.argsort(ids_first_BK, axis=1)

  def score_half(hidden_BKD, labels_BK):
    chosen_BH = ids_first_BK[:, :half]
    id_BH = score(
      jnp.take_along_axis(hidden_BKD, chosen_BH[..., None], axis=1),
      jnp.take_along_axis(labels_BK, chosen_BH, axis=1),
    )
    id_BK = jnp.pad(id_BH, ((0, 0), (0, num_slots - half)))
    return jnp.take_along_axis(id_BK, place_BK, axis=1)

  # Without checkpoints the branch that is taken would write zeros in place of
  # the logits that the other one keeps for its gradient.
  return jax.lax.cond(
    jnp.all(is_id_BK.sum(1) <= half),
    jax.checkpoint(score_half),
    jax.checkpoint(score),
    hidden_BKD,
    labels_BK,
  )
