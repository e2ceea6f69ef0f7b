"""Arithmetic about a step: for machines that it is not compiled for."""

from genecompass_jax import model, train_config


def memory(
  config: train_config.TrainConfig, slots: int, device_slots: int
) -> dict[str, int]:
  """Bytes on a device by arithmetic: state, tables, kept states, logits.

  Weights, two moments and the gradient are float32; everything is shared over
  mesh.fsdp and mesh.tensor. Kept states are what `remat` says: full: the input
  of a block; attention: also its attention; none: also its projections and
  feed-forward, of which the inputs of products are kept.

  Args:
    config: the configuration.
    slots: of a row.
    device_slots: slots of a batch by device.

  Returns:
    Bytes by use, and their `total`. Compiled steps of Base took up to a third
    more.
  """
  size, mesh = config.model, config.mesh
  D, F = size.width, size.feed_forward
  width = 2 if size.dtype == 'bfloat16' else 4
  held = device_slots / config.microbatches
  kept = {'full': D, 'attention': 2 * D, 'none': 9 * D + 2 * F}[size.remat]
  inside = (9 * D + 2 * F) * width  # of the one block that is worked on
  masked = config.data.num_masked(slots) / slots * held
  state = 16 * model.count_parameters(size)['total'] / (mesh.fsdp * mesh.tensor)
  tables = sum(size.vocabulary_size * P * width for _, P in size.priors)
  activations = held * (size.num_layers * kept * width + inside + 12 * D)
  # And their gradient, float32; 256 MiB of them at a time.
  logits = min(masked * size.vocabulary_size * 4, 2**28) * 2
  parts = {
    'state': int(state),
    'tables': int(tables),
    'activations': int(activations),
    'logits': int(logits),
  }
  return {**parts, 'total': sum(parts.values())}


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
