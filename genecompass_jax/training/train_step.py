"""One update of a pretraining run, and the state that it changes.

Everything here is a pure function of configuration, state and batch: the loop
in `train.py` runs it, `genecompass plan` compiles it for machines that are not
there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genecompass_jax import (
  attention,
  errors,
  knowledge as knowledge_lib,
  layers,
  losses,
  model as model_lib,
  nulls,
  optimizer as optimizer_lib,
  packing,
  schemas,
  scoring,
  sharding,
)
from genecompass_jax.training import train_config

# Folded into the seed before the number of a batch: a key that no initial
# parameter was drawn from.
_DROPOUT = 1 << 30


def check_mesh(
  config: train_config.TrainConfig, mesh: jax.sharding.Mesh
) -> None:
  """Refuses a batch or a model that a mesh cannot share.

  Raises:
    UserError: rows, slots or heads do not divide; the field is named.
  """
  shape, rows = mesh.shape, config.data.rows_per_batch
  groups = shape[sharding.DATA] * shape[sharding.FSDP]
  if rows % (groups * config.microbatches):
    parts = ''
    if config.microbatches > 1:
      parts = f' x microbatches={config.microbatches}'
    raise errors.UserError(
      f'data.rows_per_batch={rows} must be divisible by {groups} devices'
      f' (mesh.data x mesh.fsdp){parts}'
    )
  tensor, context = shape[sharding.TENSOR], shape[sharding.CONTEXT]
  for name in ('num_heads', 'feed_forward'):
    size = getattr(config.model, name)
    if size % tensor:
      raise errors.UserError(
        f'model.{name}={size} must be divisible by mesh.tensor={tensor}'
      )
  slots = config.data.shapes(config.encoding.max_genes)
  slots += config.data.evaluation_shapes(config.encoding.max_genes)
  odd = [size for size in slots if size % context]
  if odd:
    raise errors.UserError(
      f'rows of {odd[0]} slots must be divisible by mesh.context={context}; set '
      'data.slots and data.buckets so'
    )


def for_devices(
  config: train_config.TrainConfig, mesh: jax.sharding.Mesh
) -> train_config.TrainConfig:
  """The configuration with the attention that the devices of a mesh compute.

  Raises:
    UserError: the one that was asked for does not run there.
  """
  return for_platform(config, mesh.devices.flat[0].platform)


def for_platform(
  config: train_config.TrainConfig, platform: str
) -> train_config.TrainConfig:
  """As `for_devices`, by the platform of the devices: 'tpu', 'gpu' or 'cpu'."""
  kind = attention.choose(
    config.model.attention,
    platform=platform,
    dtype=config.model.dtype,
    # Without a CLS the first slot of a row is padding: its cell begins later.
    one_cell_a_row=config.data.layout == packing.BUCKETS
    and config.model.use_cls,
  )
  model = dataclasses.replace(config.model, attention=kind)
  return dataclasses.replace(config, model=model)


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

  @property
  def skipped(self) -> jax.Array:
    """Batches that these parameters were not trained on: every other was."""
    return self.next_batch - self.step


def train_step(
  state: TrainState,
  batch: schemas.PretrainingBatch,
  knowledge: knowledge_lib.Knowledge,
  config: train_config.TrainConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Each term is a sum over the global batch, divided by the number of genes in
  the global batch that it was asked of: it depends neither on how rows lie on
  devices nor on how many of them are worked on at a time. A term that was
  asked of none is 0.

  A batch whose loss or gradient is not finite changes nothing but
  `next_batch`: `accepted` is then False.
  """
  key = jax.random.fold_in(jax.random.key(config.seed), _DROPOUT)
  dropout_key = jax.random.fold_in(key, state.next_batch)
  prior_scale = None
  if config.prior_warmup_steps:
    share = (state.step + 1) / config.prior_warmup_steps
    prior_scale = jnp.minimum(share, 1.0).astype(jnp.float32)
  grads, values = gradients(
    state.params, batch, knowledge, config, prior_scale, dropout_key
  )
  transform = make_optimizer(config)
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  values['grad_norm'] = optax.tree.norm(grads)
  values['learning_rate'] = optimizer_lib.make_schedule(config.optimizer)(
    state.step
  )
  accepted = jnp.isfinite(values['loss']) & jnp.isfinite(values['grad_norm'])
  values['accepted'] = accepted
  updated = TrainState(
    step=state.step + 1,
    next_batch=state.next_batch + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  kept = dataclasses.replace(state, next_batch=updated.next_batch)
  state = jax.tree.map(
    lambda new, old: jnp.where(accepted, new, old), updated, kept
  )
  return state, values


def gradients(
  params: model_lib.Params,
  batch: schemas.PretrainingBatch,
  knowledge: knowledge_lib.Knowledge,
  config: train_config.TrainConfig,
  prior_scale: jax.Array | None,
  dropout_key: jax.Array,
) -> tuple[model_lib.Params, dict[str, jax.Array]]:
  """Gradients of the loss of a batch, float32, and its terms.

  Args:
    params: float32 parameters.
    batch: the global batch.
    knowledge: prior tables.
    config: of the run.
    prior_scale: factor on projected priors; None for the model's.
    dropout_key: of the batch.

  Returns:
    Gradients, and `loss`, `id_loss`, `value_loss`, `masked` (genes hidden).
  """
  # Known before the first slot is computed: parts of a batch can be divided by
  # the number of the whole.
  weights = jnp.sum(batch.id_weights_BK), jnp.sum(batch.value_weights_BK)
  rest = knowledge, prior_scale, weights, dropout_key
  find = functools.partial(_gradients_of_part, config)
  if config.microbatches == 1:
    rows_B = jnp.arange(batch.masked_slots_BK.shape[0])
    grads, values = find(params, (batch, rows_B), rest)
  else:
    grads, values = _in_parts(find, config, params, batch, rest)
  values['masked'] = jnp.sum(
    jnp.maximum(batch.id_weights_BK, batch.value_weights_BK)
  )
  return grads, values


def _gradients_of_part(config, params, part, rest):
  """What the rows of a batch add to its gradients, and to its loss and terms.

  Args:
    config: of the run.
    params: float32 parameters.
    part: some rows, or all, and their numbers in the batch.
    rest: prior tables, their scale, the sums of both weights of the batch, and
      its key.
  """
  batch, rows_B = part
  knowledge, prior_scale, (id_weight, value_weight), dropout_key = rest

  def loss(params):
    id_BK, value_BK = scoring.slot_losses(
      params,
      batch,
      knowledge,
      config.model,
      prior_scale=prior_scale,
      dropout_keys_B=layers.keys_of_rows(dropout_key, rows_B),
    )
    sums = losses.loss_sums(
      id_BK, batch.id_weights_BK, value_BK, batch.value_weights_BK
    )
    whole = dataclasses.replace(
      sums, id_weight=id_weight, value_weight=value_weight
    )
    total, id_loss, value_loss = whole.means(config.loss)
    if not config.model.use_values:
      total = id_loss
    return total, {'loss': total, 'id_loss': id_loss, 'value_loss': value_loss}

  return jax.grad(loss, has_aux=True)(params)


def _in_parts(find, config, params, batch, rest):
  """Sums of `find` over parts of a batch, one after the other.

  Every group of the data axis sums its own parts, and the sums are added over
  the network once: left to itself, the compiler adds each part (jax 0.10.2; on
  CPUs as on TPUs). Within a group, fsdp has to: it holds a share of each sum.
  """
  rows_B = jnp.arange(batch.masked_slots_BK.shape[0])
  parts_NB = jax.tree.map(
    lambda x: _parts(x, config.microbatches), (batch, rows_B)
  )

  def accumulate(params, parts_NB, rest):
    def add(sums, part):
      return jax.tree.map(jnp.add, sums, find(params, part, rest)), None

    first = jax.tree.map(lambda x: x[0], parts_NB)
    zeros = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype),
      jax.eval_shape(find, params, first, rest),
    )
    return jax.lax.scan(add, zeros, parts_NB)[0]

  def of_all(*given):
    return jax.lax.psum(accumulate(*given), sharding.DATA)

  mesh = jax.sharding.get_abstract_mesh()
  sums = accumulate
  if sharding.is_shared(mesh) and mesh.shape[sharding.DATA] > 1:
    whole = jax.sharding.PartitionSpec()
    apart = jax.sharding.PartitionSpec(None, sharding.DATA)
    sums = jax.shard_map(
      of_all,
      in_specs=(whole, apart, whole),
      out_specs=whole,
      axis_names={sharding.DATA},
      check_vma=False,
    )
  return sums(params, parts_NB, rest)


def _parts(x_B: jax.Array, number: int) -> jax.Array:
  """Every number-th row: the parts of a batch, with the rows of all devices."""
  x_BN = jnp.reshape(x_B, (-1, number, *x_B.shape[1:]))
  x_NB = jnp.moveaxis(x_BN, 1, 0)
  return sharding.constrain(
    x_NB, None, sharding.BATCH_AXES, *(None,) * (x_B.ndim - 1)
  )


def make_optimizer(
  config: train_config.TrainConfig,
) -> optax.GradientTransformation:
  """The gradient transformation of a run."""
  scales = model_lib.rate_scales(config.model)
  return optimizer_lib.make_optimizer(config.optimizer, scales)


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
  transform = make_optimizer(config)
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
  transform = make_optimizer(config)
  opt_state = optax.tree.map_params(
    transform,
    lambda _, place: place,
    shapes.opt_state,
    params,
    transform_non_params=lambda _: whole,
  )
  return TrainState(whole, whole, params, opt_state)


def jitted(
  config: train_config.TrainConfig, places: TrainState, mesh: jax.sharding.Mesh
) -> Any:
  """`train_step` as a run calls it: (state, batch, knowledge), state donated.

  Args:
    config: of the run, for its devices (`for_devices`).
    places: of the state (`state_sharding`).
    mesh: of the run.
  """
  return jax.jit(
    functools.partial(train_step, config=config),
    donate_argnums=0,
    out_shardings=(places, sharding.replicated(mesh)),
  )


def batch_shapes(
  config: train_config.TrainConfig, slots: int
) -> schemas.PretrainingBatch:
  """Shapes of a global batch of rows of `slots`, as the loader makes it."""
  rows, masked = config.data.rows_per_batch, config.data.num_masked(slots)

  def field(width, dtype):
    return jax.ShapeDtypeStruct((rows, width), dtype)

  whole, asked = field(slots, jnp.int32), field(masked, jnp.int32)
  number = field(masked, jnp.float32)
  return schemas.PretrainingBatch(
    cells=schemas.CellBatch(
      gene_ids_BL=whole,
      values_BL=field(slots, jnp.float32),
      positions_BL=whole,
      segments_BL=whole,
      species_BL=whole,
      is_cls_BL=field(slots, jnp.bool_),
    ),
    masked_slots_BK=asked,
    id_labels_BK=asked,
    id_weights_BK=number,
    value_labels_BK=number,
    value_weights_BK=number,
  )


def lower(
  config: train_config.TrainConfig,
  mesh: jax.sharding.Mesh,
  slots: int,
  knowledge: knowledge_lib.Knowledge,
) -> jax.stages.Lowered:
  """The step of a run, ready to be compiled for devices that may be absent.

  Args:
    config: of the run, vocabulary size and priors filled in.
    mesh: of its devices.
    slots: of the rows.
    knowledge: shapes of the prior tables.

  Raises:
    UserError: the mesh cannot share such a batch or model.
  """
  check_mesh(config, mesh)
  config = for_devices(config, mesh)
  # What the bias starts from changes no shape, and needs a corpus.
  blank = dataclasses.replace(config, id_bias='zeros')

  def placed(shapes, places):
    return jax.tree.map(
      lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
      shapes,
      places,
    )

  # Outside of the mesh, whose devices may not be able to compute anything.
  shapes = jax.eval_shape(lambda: init_state(blank))
  places = state_sharding(config, shapes, mesh)
  state = placed(shapes, places)
  sharding.check_shared((state.params, state.opt_state), mesh)
  batch = batch_shapes(config, slots)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  with jax.set_mesh(mesh):
    return jitted(config, places, mesh).lower(
      state,
      placed(batch, jax.tree.map(lambda _: rows, batch)),
      placed(knowledge, jax.tree.map(lambda _: whole, knowledge)),
    )
