"""One update of a pretraining run, and the state that it changes.

Everything here is a pure function of configuration, state and batch: the loop
in `train.py` runs it, `genecompass plan` compiles it for machines that are not
there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genecompass_jax import (
  evaluate,
  knowledge as knowledge_lib,
  losses,
  model as model_lib,
  nulls,
  optimizer as optimizer_lib,
  schemas,
  sharding,
  train_config,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that changes in training.

  Attributes:
    step: int32 updates done; the schedule folds from it.
    next_batch: int32 batch to train on next; masks, dropout and order fold
      from it.
    params: float32 parameters.
    opt_state: state of the optimiser.
  """

  step: jax.Array
  next_batch: jax.Array
  params: model_lib.Params
  opt_state: Any


def train_step(
  state: TrainState,
  batch: schemas.PretrainingBatch,
  knowledge: knowledge_lib.Knowledge,
  config: train_config.TrainConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Each term is a sum over the global batch, divided by the number of genes in
  the global batch that it was asked of: it does not depend on how rows lie on
  devices. A term that was asked of none is 0.
  """
  key = jax.random.key(config.seed)
  dropout_key = jax.random.fold_in(key, state.next_batch)
  prior_scale = None
  if config.prior_warmup_steps:
    share = (state.step + 1) / config.prior_warmup_steps
    prior_scale = jnp.minimum(share, 1.0).astype(jnp.float32)

  def loss(params):
    id_BK, value_BK = evaluate.slot_losses(
      params,
      batch,
      knowledge,
      config.model,
      prior_scale=prior_scale,
      dropout_key=dropout_key,
    )
    sums = losses.loss_sums(
      id_BK, batch.id_weights_BK, value_BK, batch.value_weights_BK
    )
    total, id_loss, value_loss = sums.means(config.loss)
    if not config.model.use_values:
      total = id_loss
    return total, {
      'loss': total,
      'id_loss': id_loss,
      'value_loss': value_loss,
      'masked': jnp.sum(
        jnp.maximum(batch.id_weights_BK, batch.value_weights_BK)
      ),
    }

  grads, values = jax.grad(loss, has_aux=True)(state.params)
  transform = optimizer_lib.make_optimizer(config.optimizer)
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  values['grad_norm'] = optax.tree.norm(grads)
  values['learning_rate'] = optimizer_lib.make_schedule(config.optimizer)(
    state.step
  )
  state = TrainState(
    step=state.step + 1,
    next_batch=state.next_batch + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  return state, values


def init_state(
  config: train_config.TrainConfig, null_models: nulls.NullModels | None = None
) -> TrainState:
  """The state before the first update; `id_bias` 'frequency' needs counts."""
  params = model_lib.init(config.model, config.seed)
  if config.id_bias == 'frequency':
    cells_V = null_models.cells_V() + 1.0  # one is added: no log of zero
    params['id_head']['bias'] = jnp.asarray(
      np.log(cells_V / cells_V.sum()), jnp.float32
    )
  transform = optimizer_lib.make_optimizer(config.optimizer)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, zero, params, transform.init(params))


def state_sharding(
  config: train_config.TrainConfig, shapes: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
  """Where every array of the state lies; moments lie as their parameters."""
  whole = sharding.replicated(mesh)
  params = sharding.parameter_sharding(
    model_lib.logical_axes(config.model), shapes.params, mesh
  )
  transform = optimizer_lib.make_optimizer(config.optimizer)
  opt_state = optax.tree.map_params(
    transform,
    lambda _, place: place,
    shapes.opt_state,
    params,
    transform_non_params=lambda _: whole,
  )
  return TrainState(whole, whole, params, opt_state)
