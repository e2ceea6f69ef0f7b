"""The way from a start to a goal, in the space of pooled states."""

import dataclasses

import numpy as np

from genecompass_jax import errors, rows
from genecompass_jax.analysis import placed_model
from genecompass_jax.analysis.perturbation import cell_set, comparison, ranks


@dataclasses.dataclass(frozen=True)
class Axis:
  """From the start's to the goal's centroid.

  Attributes:
    direction_D: float32 unit vector.
    start: name of the start's group.
    goal: name of the goal's group.
  """

  direction_D: np.ndarray
  start: str
  goal: str


def centroid(
  placed: placed_model.PlacedModel, cells: cell_set.CellSet, pooling: str
) -> np.ndarray:
  """Mean of the unit vectors of cells, float64 [D]."""
  base = cells.encode()
  order_C = np.argsort(np.diff(base.starts_C1), kind='stable')
  rows_a_batch = placed.num_rows(8)
  sum_D = np.zeros(placed.config.width)
  lengths_C = np.diff(base.starts_C1)
  for first in range(0, len(order_C), rows_a_batch):
    index = order_C[first : first + rows_a_batch]
    longest = int(lengths_C[index].max()) + 1
    slots = placed.buckets[int(np.searchsorted(placed.buckets, longest))]
    batch = rows.cell_batch_rows(
      ranks.take(base, index),
      np.full(len(index), cells.species),
      slots,
      rows_a_batch,
    )
    hidden_BLD = comparison.states(placed, batch)
    is_gene_BL = (batch.gene_ids_BL > 0).astype(np.float32)
    pooled_BD = comparison.pool(hidden_BLD, is_gene_BL, pooling)
    sum_D += np.asarray(pooled_BD, np.float64)[: len(index)].sum(0)
  return sum_D / max(len(order_C), 1)


def between(
  placed: placed_model.PlacedModel,
  start: tuple[str, cell_set.CellSet],
  goal: tuple[str, cell_set.CellSet],
  pooling: str,
) -> Axis:
  """The axis between the centroids of two groups of cells.

  Raises:
    UserError: both have the same centroid.
  """
  apart_D = centroid(placed, goal[1], pooling) - centroid(
    placed, start[1], pooling
  )
  length = float(np.linalg.norm(apart_D))
  if not length > 1e-6:
    raise errors.UserError(
      f'start {start[0]!r} and goal {goal[0]!r} have the same centroid: there '
      'is no axis between them'
    )
  return Axis((apart_D / length).astype(np.float32), start[0], goal[0])
