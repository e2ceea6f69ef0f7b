"""The way from a start to a goal, in the space of pooled states."""

import dataclasses
import hashlib
from collections.abc import Collection

import numpy as np

from genecompass_jax import errors
from genecompass_jax.analysis import placed_model
from genecompass_jax.analysis.perturbation import cell_set, comparison

_ROWS = 8  # of a batch


@dataclasses.dataclass(frozen=True)
class Axis:
  """From the start's to the goal's centroid.

  Attributes:
    direction_D: float32 unit vector.
    start: name of the start's group.
    goal: name of the goal's group.
    made_of: digest of cells, pooling and genes; '' of one made otherwise.
  """

  direction_D: np.ndarray
  start: str
  goal: str
  made_of: str = ''


def centroid(
  placed: placed_model.PlacedModel,
  cells: cell_set.CellSet,
  pooling: str,
  left_out: Collection[int] = (),
) -> np.ndarray:
  """Mean of the unit vectors of cells, float64 [D].

  Args:
    placed: the model.
    cells: of a group.
    pooling: 'cls' or 'mean'.
    left_out: tokens that are in no mean over genes; the model reads them.
  """
  scored_V = cells.is_scored(left_out)
  rows_of = dict.fromkeys(placed.buckets, placed.num_rows(_ROWS))
  sum_D = np.zeros(placed.config.width)
  for made in cells.batches(cells.encode(), placed.buckets, rows_of):
    hidden_BLD = comparison.states(placed, made.cells)
    is_scored_BL = scored_V[made.cells.gene_ids_BL].astype(np.float32)
    pooled_BD = comparison.pool(hidden_BLD, is_scored_BL, pooling)
    sum_D += np.asarray(pooled_BD, np.float64)[: len(made.index_C)].sum(0)
  return sum_D / max(cells.num_cells, 1)


def made_of(
  start: cell_set.CellSet,
  goal: cell_set.CellSet,
  pooling: str,
  left_out: Collection[int] = (),
) -> str:
  """Digest of all that an axis depends on but the model."""
  text = repr((start.sha256, goal.sha256, pooling, sorted(left_out)))
  return hashlib.sha256(text.encode()).hexdigest()


def between(
  placed: placed_model.PlacedModel,
  start: tuple[str, cell_set.CellSet],
  goal: tuple[str, cell_set.CellSet],
  pooling: str,
  left_out: Collection[int] = (),
) -> Axis:
  """The axis between the centroids of two groups of cells.

  Args:
    placed: the model.
    start: name and cells.
    goal: likewise.
    pooling: 'cls' or 'mean'.
    left_out: as for `centroid`.

  Raises:
    UserError: both have the same centroid.
  """
  start_D, goal_D = (
    centroid(placed, cells, pooling, left_out) for _, cells in (start, goal)
  )
  apart_D = goal_D - start_D
  length = float(np.linalg.norm(apart_D))
  if not length > 1e-6:
    raise errors.UserError(
      f'start {start[0]!r} and goal {goal[0]!r} have the same centroid: there '
      'is no axis between them'
    )
  return Axis(
    (apart_D / length).astype(np.float32),
    start[0],
    goal[0],
    made_of(start[1], goal[1], pooling, left_out),
  )
