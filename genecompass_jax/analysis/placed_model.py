"""A restored model on all local devices, ready to run batches of cells.

Rows of a batch are shared among the devices, parameters and the folded prior
tables lie whole on each.
"""

import dataclasses

import jax
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import (
  errors,
  model as model_lib,
  pretrained,
  schemas,
)

# Slots of the rows; the last is max_genes + 1. Six shapes at most are compiled.
BUCKETS = (128, 256, 512, 1024, 1536)
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class PlacedModel:
  """What a jitted function takes to run a model.

  Attributes:
    config: of the model; `dtype` is the type that blocks compute in.
    params: on every device.
    knowledge: its prior tables, folded with these parameters or as they are.
    sharding: of arrays whose first axis are rows of a batch.
    num_devices: devices that share the rows.
    buckets: lengths of rows in slots, ascending; the last holds any cell.
  """

  config: model_lib.ModelConfig
  params: model_lib.Params
  knowledge: model_lib.Tables
  sharding: NamedSharding
  num_devices: int
  buckets: tuple[int, ...]

  def put(self, batch: schemas.CellBatch) -> schemas.CellBatch:
    """A batch on the devices; its rows divide by their number."""
    return jax.device_put(batch, self.sharding)

  def num_rows(self, wanted: int) -> int:
    """Rows of a batch: at least `wanted`, the same on every device."""
    return -(-max(wanted, 1) // self.num_devices) * self.num_devices


def place(
  model: pretrained.PretrainedModel,
  *,
  dtype: str = '',
  block: int = -1,
  folds: bool = True,
) -> PlacedModel:
  """Places a model on all local devices.

  Args:
    model: a restored model.
    dtype: 'float32' or 'bfloat16' to compute in; '': as the model says.
    block: the last block that is run, from 1; -1 is the last one, -2 the one
      before it. Blocks behind it are left out, and so is their work.
    folds: whether the prior tables are folded; False keeps them apart.

  Raises:
    UserError: there is no such block, or no such type.
  """
  config = model.config
  if dtype not in ('', *DTYPES):
    raise errors.UserError(f'dtype {dtype!r}: give {" or ".join(DTYPES)}')
  if dtype:
    config = dataclasses.replace(config, dtype=dtype)
  number = block_number(config, block)
  params = model.params
  if number < config.num_layers:
    config = dataclasses.replace(config, num_layers=number)
    params = {**params, 'encoder': _first_blocks(params['encoder'], number)}
  devices = jax.local_devices()
  mesh = jax.make_mesh(
    (len(devices),),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )
  whole = NamedSharding(mesh, PartitionSpec())
  knowledge: model_lib.Tables = model.assets.knowledge
  if config.priors and folds:
    # Once for every token, not once for every gene of every cell; in float32,
    # whatever the blocks compute in.
    precise = dataclasses.replace(config, dtype='float32')
    knowledge = _fold(precise, model.params, knowledge)
  longest = model.assets.encoding.max_genes + 1
  return PlacedModel(
    config=config,
    params=jax.device_put(params, whole),
    knowledge=jax.device_put(knowledge, whole),
    sharding=NamedSharding(mesh, PartitionSpec('data')),
    num_devices=len(devices),
    buckets=(*(b for b in BUCKETS if b < longest), longest),
  )


def block_number(config: model_lib.ModelConfig, block: int) -> int:
  """Blocks that are run for the states behind `block`, from 1 to all.

  Raises:
    UserError: there is no such block.
  """
  errors.check_whole(block=block)
  number = block + config.num_layers + 1 if block < 0 else block
  if not 1 <= number <= config.num_layers:
    raise errors.UserError(
      f'block {block}: this model has {config.num_layers}; give 1 to '
      f'{config.num_layers}, or -1 for the last, -2 for the one before it'
    )
  return number


def _first_blocks(encoder: model_lib.Params, number: int) -> model_lib.Params:
  """Parameters of the first blocks; what all blocks share stays."""
  return {
    name: part
    if name == 'final_norm'
    else jax.tree.map(lambda x: x[:number], part)
    for name, part in encoder.items()
  }


_fold = jax.jit(model_lib.fold, static_argnums=0)
