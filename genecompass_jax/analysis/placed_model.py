"""A restored model on all local devices, ready to run batches of cells.

Rows of a batch are shared among the devices, parameters and the folded prior
tables lie whole on each.
"""

import dataclasses

import jax
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import (
  model as model_lib,
  pretrained,
  schemas,
)

# Slots of the rows; the last is max_genes + 1. Six shapes at most are compiled.
BUCKETS = (128, 256, 512, 1024, 1536)


@dataclasses.dataclass(frozen=True)
class PlacedModel:
  """What a jitted function takes to run a model.

  Attributes:
    config: of the model; `dtype` is the type that blocks compute in.
    params: on every device.
    knowledge: its prior tables, folded with these parameters.
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


def place(model: pretrained.PretrainedModel, *, dtype: str = '') -> PlacedModel:
  """Places a model on all local devices.

  Args:
    model: a restored model.
    dtype: 'float32' or 'bfloat16' to compute in; '': as the model says.
  """
  config = model.config
  if dtype:
    config = dataclasses.replace(config, dtype=dtype)
  devices = jax.local_devices()
  mesh = jax.make_mesh(
    (len(devices),),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )
  whole = NamedSharding(mesh, PartitionSpec())
  knowledge: model_lib.Tables = model.assets.knowledge
  if config.priors:
    # Once for every token, not once for every gene of every cell; in float32,
    # whatever the blocks compute in.
    precise = dataclasses.replace(config, dtype='float32')
    knowledge = _fold(precise, model.params, knowledge)
  longest = model.assets.encoding.max_genes + 1
  return PlacedModel(
    config=config,
    params=jax.device_put(model.params, whole),
    knowledge=jax.device_put(knowledge, whole),
    sharding=NamedSharding(mesh, PartitionSpec('data')),
    num_devices=len(devices),
    buckets=(*(b for b in BUCKETS if b < longest), longest),
  )


_fold = jax.jit(model_lib.fold, static_argnums=0)
