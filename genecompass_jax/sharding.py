"""The device mesh, and which axis of an array lies on which axis of it.

Parameters name their axes ('embed', 'mlp', ...) where they are made; the one
table here says where such a name goes. Axes that do not divide evenly stay
whole, because uneven sharding is refused by the runtime.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import errors

DATA, FSDP, CONTEXT, TENSOR = 'data', 'fsdp', 'context', 'tensor'
# Outermost first: what talks least is furthest apart. Slices of a pod, which
# only a slow network joins, differ along the data axis alone.
AXES = (DATA, FSDP, CONTEXT, TENSOR)
# Mesh axes that the rows of a batch are split over.
BATCH_AXES = (DATA, FSDP)

# Logical axis -> mesh axis. Weights are split over 'fsdp' along the model's
# width (50,558 tokens divide by nothing useful) and over 'tensor' along heads
# and feed-forward.
RULES: dict[str | None, str | None] = {
  'embed': FSDP,
  'hidden': None,
  'heads': TENSOR,
  'head_dim': None,
  'mlp': TENSOR,
  'vocab': None,
  'position': None,
  'prior': None,
  'norm': None,
  'layer': None,
  None: None,
}

# A parameter or moment of so many elements (4 MiB) is large: it must lie as
# the mesh was asked to share it.
LARGE = 1 << 20


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Shape of the mesh; -1 in `data` takes the devices that are left.

  Attributes:
    data: groups of devices that hold different cells and whole weights.
    fsdp: devices that hold different cells and share the weights.
    context: devices that share the slots of a row, for long cells.
    tensor: devices that share heads and feed-forward units.
  """

  data: int = -1
  fsdp: int = 1
  context: int = 1
  tensor: int = 1

  @property
  def shared(self) -> int:
    """Devices of one group of the data axis."""
    return self.fsdp * self.context * self.tensor


def make_mesh(config: MeshConfig, devices: Any = None) -> jax.sharding.Mesh:
  """The mesh over all devices, data axis outside.

  Neighbours on the inner axes are neighbours in the machine where its shape
  allows it. Several slices are laid one after the other along the data axis.

  Raises:
    UserError: the shape does not take every device exactly once, or shares
      weights between slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  num_devices, data = len(devices), config.data
  inner = (config.fsdp, config.context, config.tensor)
  if data == -1 and min(inner) > 0:
    data = num_devices // config.shared
  if min(data, *inner) < 1 or data * config.shared != num_devices:
    shape = ' x '.join(f'mesh.{a}={getattr(config, a)}' for a in AXES)
    raise errors.UserError(
      f'{shape} does not come to the number of devices here, {num_devices}; '
      'set mesh.data=-1 and the others so that their product divides it'
    )
  is_tpu = devices[0].platform == 'tpu'
  # JAX calls a host of GPUs a slice as well: between those weights may be
  # shared, if the network is up to it.
  slices = {(getattr(d, 'slice_index', 0) or 0) * is_tpu for d in devices}
  if data % len(slices):
    raise errors.UserError(
      f'mesh.data={data} does not divide into {len(slices)} slices: a group '
      'that shares weights must lie in one slice; lower mesh.fsdp'
    )
  shape = (data, *inner)
  if len(slices) > 1:
    placed = mesh_utils.create_hybrid_device_mesh(
      (data // len(slices), *inner),
      (len(slices), 1, 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
  elif is_tpu:
    placed = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  else:  # hosts one after the other: a group of devices shares a host
    placed = np.array(devices).reshape(shape)
  return jax.sharding.Mesh(
    placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows are split over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def is_shared(mesh: Any) -> bool:
  """Whether a mesh is one of `make_mesh` and of more than one device."""
  return set(AXES) <= set(mesh.axis_names) and mesh.size > 1


def batch_axes() -> tuple[str, ...]:
  """`BATCH_AXES` that split what is traced now: not those of a `shard_map`."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return tuple(axis for axis in BATCH_AXES if axis not in manual)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """Says where an array of a traced function lies; nothing without our mesh.

  Args:
    x: an array.
    *axes: a mesh axis, some of them, or None for each of its axes; what does
      not divide evenly stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not is_shared(mesh):
    return x

  def fits(axis, size: int) -> bool:
    names = axis if isinstance(axis, tuple) else (axis,)
    return size % math.prod(mesh.shape[n] for n in names if n) == 0

  axes = [batch_axes() if a == BATCH_AXES else a for a in axes]
  kept = [a if fits(a, size) else None for a, size in zip(axes, x.shape)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def constrain_slots(x_BLD: jax.Array) -> jax.Array:
  """States of slots: rows over the batch axes, slots over the context axis."""
  rest = (None,) * (x_BLD.ndim - 2)
  return constrain(x_BLD, BATCH_AXES, CONTEXT, *rest)


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


def check_shared(state: Any, mesh: jax.sharding.Mesh) -> None:
  """Refuses to train when large arrays are whole on every device.

  Args:
    state: parameters and moments as they lie, or their shapes with shardings.
    mesh: that shares weights over its fsdp and tensor axes.

  Raises:
    UserError: a large array is less shared than the fsdp axis asks for; the
      largest is named.
  """
  asked = mesh.shape[FSDP]
  whole = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    size = math.prod(leaf.shape)
    held = math.prod(leaf.sharding.shard_shape(leaf.shape))
    if size >= LARGE and size < held * asked:
      whole.append((size, jax.tree_util.keystr(path), leaf.shape))
  if whole:
    _, name, shape = max(whole)
    raise errors.UserError(
      f'mesh.fsdp={asked}, but {len(whole)} large arrays are not split so, such '
      f'as {name} of shape {shape}: choose an fsdp that divides model.width'
    )


def put_everywhere(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Places whole arrays, the same in every process, on every device."""
  if jax.process_count() == 1:
    return jax.device_put(tree, replicated(mesh))

  def place(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(
      x.shape, replicated(mesh), lambda index: x[index]
    )

  return jax.tree.map(place, tree)


def _row_slices(mesh: jax.sharding.Mesh, num_rows: int) -> dict[Any, slice]:
  """The rows of a batch that every device of the mesh holds."""
  places = batch_sharding(mesh).devices_indices_map((num_rows,))
  return {device: index[0] for device, index in places.items()}


def process_rows(mesh: jax.sharding.Mesh, num_rows: int) -> np.ndarray:
  """Rows of a global batch that this process's devices hold, ascending.

  Where a mesh axis does not split the batch, processes hold the same rows.
  """
  mine = jax.process_index()
  held_B = np.zeros(num_rows, bool)
  for device, rows in _row_slices(mesh, num_rows).items():
    held_B[rows] |= device.process_index == mine
  return np.flatnonzero(held_B)


def owned_rows(mesh: jax.sharding.Mesh, num_rows: int) -> np.ndarray:
  """Of `process_rows`, those that no process of a lower number holds.

  Every row is owned once: sums over owned rows may be added over processes.
  """
  owner_B = np.full(num_rows, jax.process_count())
  for device, rows in _row_slices(mesh, num_rows).items():
    owner_B[rows] = np.minimum(owner_B[rows], device.process_index)
  return np.flatnonzero(owner_B == jax.process_index())


def put_batch(
  batch: Any, mesh: jax.sharding.Mesh, num_rows: int | None = None
) -> Any:
  """Places a batch's rows over the mesh.

  Args:
    batch: tree of arrays; in several processes those of `process_rows`, in
      ascending order.
    mesh: where they go.
    num_rows: of the global batch; needed in several processes only.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  rows_B = process_rows(mesh, num_rows)

  def place(x):
    x = np.asarray(x)

    def part(index):
      first, stop, _ = index[0].indices(num_rows)
      held = np.searchsorted(rows_B, [first, stop])
      return x[slice(*held), *index[1:]]

    shape = (num_rows, *x.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(place, batch)
