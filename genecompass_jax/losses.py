"""Pretraining losses: which gene was hidden, and how much of it there was.

Losses are kept apart a slot, so that training can sum them over the whole
global batch before dividing, and evaluation can gather them by cell, study
and species.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the two terms; 0.2 and 0.8 in the released training run."""

  id_weight: float = 0.2
  value_weight: float = 0.8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
  """Sums over slots, ready to be added over batches and devices.

  Attributes:
    id_sum: weighted sum of cross-entropies, nats.
    id_weight: sum of weights.
    value_sum: weighted sum of squared errors, log2 units squared.
    value_weight: sum of weights.
  """

  id_sum: Array
  id_weight: Array
  value_sum: Array
  value_weight: Array

  def means(self, config: LossConfig) -> tuple[Array, Array, Array]:
    """(total, id, value) losses; a term without any slot is 0."""
    id_loss = self.id_sum / jnp.maximum(self.id_weight, 1.0)
    value_loss = self.value_sum / jnp.maximum(self.value_weight, 1.0)
    return combine(id_loss, value_loss, config), id_loss, value_loss


def combine(id_loss: Array, value_loss: Array, config: LossConfig) -> Array:
  """The weighted total of the two terms."""
  return config.id_weight * id_loss + config.value_weight * value_loss


def id_losses(logits_BKV: Array, id_labels_BK: Array) -> Array:
  """Cross-entropy of each slot in nats, [B, K] float32."""
  logits_BKV = logits_BKV.astype(jnp.float32)
  log_norm_BK = jax.nn.logsumexp(logits_BKV, axis=-1)
  true_BK1 = jnp.take_along_axis(logits_BKV, id_labels_BK[..., None], axis=-1)
  return log_norm_BK - true_BK1[..., 0]


def value_losses(values_BK: Array, value_labels_BK: Array) -> Array:
  """Squared error of each slot in log2 units squared, [B, K] float32."""
  return jnp.square(values_BK.astype(jnp.float32) - value_labels_BK)


def loss_sums(
  id_losses_BK: Array,
  id_weights_BK: Array,
  value_losses_BK: Array | None,
  value_weights_BK: Array,
) -> LossSums:
  """Adds slot losses up; a model without values has no value term."""
  zero = jnp.zeros((), jnp.float32)
  # A slot of weight 0 must not poison the sum if its loss is not finite.
  id_sum = jnp.sum(
    jnp.where(id_weights_BK > 0, id_losses_BK, 0.0) * id_weights_BK
  )
  if value_losses_BK is None:
    return LossSums(id_sum, jnp.sum(id_weights_BK), zero, zero)
  value_sum = jnp.sum(
    jnp.where(value_weights_BK > 0, value_losses_BK, 0.0) * value_weights_BK
  )
  return LossSums(
    id_sum, jnp.sum(id_weights_BK), value_sum, jnp.sum(value_weights_BK)
  )
