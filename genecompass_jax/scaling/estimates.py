"""Arithmetic about a step: for machines that it is not compiled for."""

import dataclasses
import math

import jax

from genecompass_jax import sharding
from genecompass_jax.training import (
  train_config,
  train_step,
)


def memory(
  config: train_config.TrainConfig, slots: int, num_devices: int
) -> dict[str, int]:
  """Bytes on a device by arithmetic: state, tables, kept states, logits.

  Weights, two moments and the gradient are float32 and lie as in a run. Kept
  states are what `remat` says: full: the input of a block; attention: also its
  attention; none: also its projections and feed-forward, of which the inputs
  of products are kept. Heads and feed-forward are shared over mesh.tensor.

  Args:
    config: the configuration.
    slots: of a row.
    num_devices: of the machine.

  Returns:
    Bytes by use, and their `total`. Compiled steps of Base took up to a third
    more.

  Raises:
    UserError: the mesh cannot share such a batch or model.
  """
  size, shared = config.model, config.mesh
  mesh = jax.sharding.AbstractMesh(
    (num_devices // shared.shared, shared.fsdp, shared.context, shared.tensor),
    sharding.AXES,
  )
  train_step.check_mesh(config, mesh)
  D, F, tensor = size.width, size.feed_forward, shared.tensor
  width = 2 if size.dtype == 'bfloat16' else 4
  slots_a_part = config.data.rows_per_batch * slots / config.microbatches
  held = slots_a_part * tensor / num_devices
  whole, apart = 5 * D, 4 * D + 2 * F  # what a block keeps of a slot
  kept = {
    'full': D, 'attention': D + D / tensor, 'none': whole + apart / tensor
  }[size.remat]  # fmt: skip
  inside = (whole + apart / tensor) * width  # of the one that is worked on
  masked = config.data.num_masked(slots) * slots_a_part / slots / num_devices
  tables = sum(size.vocabulary_size * P * width for _, P in size.priors)
  activations = held * (size.num_layers * kept * width + inside + 12 * D)
  # And their gradient, float32; 256 MiB of them at a time.
  logits = min(masked * size.vocabulary_size * 4, 2**28) * 2
  parts = {
    'state': _state(config, mesh),
    'tables': int(tables),
    'activations': int(activations),
    'logits': int(logits),
  }
  return {**parts, 'total': sum(parts.values())}


def _state(
  config: train_config.TrainConfig, mesh: jax.sharding.AbstractMesh
) -> int:
  """Bytes of weights, moments and the gradient on a device."""
  blank = dataclasses.replace(config, id_bias='zeros')  # the others need cells
  shapes = jax.eval_shape(lambda: train_step.init_state(blank))
  places = train_step.state_sharding(config, shapes, mesh)
  state = jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
    shapes,
    places,
  )
  sharding.check_shared((state.params, state.opt_state), mesh)
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves((state, state.params))
  )


def cells_per_row(
  config: train_config.TrainConfig, slots: int, mean_genes: float
) -> float:
  """Cells of a row: one, or as many as packing fits on average.

  98 % of packed slots hold a gene or a CLS (padding is at most 2 %); a cell of
  n genes takes n + 1.
  """
  if config.data.layout != 'packed':
    return 1.0
  genes = min(mean_genes, config.encoding.max_genes)
  return max(1.0, 0.98 * slots / (genes + 1))
