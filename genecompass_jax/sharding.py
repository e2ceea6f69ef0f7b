"""The device mesh, and which axis of an array lies on which axis of it.

Parameters name their axes ('embed', 'mlp', ...) where they are made; the one
table here says where such a name goes. Axes that do not divide evenly stay
whole, because uneven sharding is refused by the runtime.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import errors

# Mesh axes a batch is split over.
BATCH_AXES = ('data', 'fsdp')

# Logical axis -> mesh axis. Weights are split over 'fsdp' along the model's
# width: 50,558 tokens divide by nothing useful.
RULES: dict[str | None, str | None] = {
  'embed': 'fsdp',
  'hidden': None,
  'heads': None,
  'head_dim': None,
  'mlp': None,
  'vocab': None,
  'position': None,
  'prior': None,
  'norm': None,
  'layer': None,
  None: None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Shape of the mesh; -1 in `data` takes the devices that are left.

  Attributes:
    data: groups of devices that hold different cells and whole weights.
    fsdp: devices that hold different cells and share the weights.
  """

  data: int = -1
  fsdp: int = 1


def make_mesh(config: MeshConfig, devices: Any = None) -> jax.sharding.Mesh:
  """The mesh over all devices, data axis outside.

  Raises:
    UserError: the shape does not take every device exactly once.
  """
  devices = jax.devices() if devices is None else devices
  num_devices, data = len(devices), config.data
  if data == -1 and config.fsdp > 0:
    data = num_devices // config.fsdp
  if data * config.fsdp != num_devices:
    raise errors.UserError(
      f'mesh.data={config.data} x mesh.fsdp={config.fsdp} does not take '
      f'{num_devices} devices; set mesh.data=-1 and an fsdp that divides it'
    )
  return jax.make_mesh(
    (data, config.fsdp),
    BATCH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=devices,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows are split over all devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def parameter_sharding(axes: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shardings of parameters from the logical names of their axes.

  Args:
    axes: tree of tuples of logical names (leaves are tuples).
    shapes: tree of arrays or shapes with the same structure.
    mesh: where they go.
  """

  def place(names, leaf):
    spec = []
    for name, size in zip(names, leaf.shape):
      target = RULES[name]
      fits = target is not None and size % mesh.shape[target] == 0
      spec.append(target if fits else None)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(
    place, axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Places a batch's rows over the mesh.

  Every process gives its own rows; the global batch is their concatenation
  in the order of processes.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )
