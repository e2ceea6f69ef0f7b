"""An axis between two groups of some cells, as something to explain."""

import dataclasses

import numpy as np

from genecompass_jax import errors, pretrained
from genecompass_jax.analysis import (
  cell_choice,
  cell_groups,
  embeddings,
  model_cells,
  placed_model,
)
from genecompass_jax.analysis.attribution import targets
from genecompass_jax.prepare import sources

_CENTROID_CELLS = 2_000  # most of a group that a centroid is made of
_APART = 1e-6  # of two centroids of unit vectors, to be two


@dataclasses.dataclass(frozen=True)
class GroupAxis:
  """From the centroid of one group's unit embeddings to that of another.

  Attributes:
    start: value of the obs column of the groups.
    goal: another one.
    pooling: 'cls', or 'mean' over the genes.
  """

  start: str
  goal: str
  pooling: str = targets.CLS

  def __post_init__(self):
    if not self.start or not self.goal or self.start == self.goal:
      raise errors.UserError(
        'an axis needs a start and another goal: give both'
      )

  def target(
    self,
    stream: sources.CellStream,
    model: pretrained.PretrainedModel,
    column: str,
    seed: int = 0,
  ) -> targets.CellAxis:
    """The axis by a model, of at most 2,000 cells of each group.

    Args:
      stream: the cells.
      model: whose embeddings they are, in float32.
      column: obs column of the groups.
      seed: of the cells that are drawn.

    Raises:
      UserError: no such column or group, the same centroid of both, or a
        pooling that the model does not have.
    """
    if not column:
      raise errors.UserError(
        'start and goal are values of an obs column: name it with group_by'
      )
    states = embeddings.StateConfig(self.pooling, dtype='float32', batch_size=8)
    states.check(model)
    groups = cell_groups.CellGroups.of(stream, column)
    place_C = np.full(stream.source.num_cells, -1)
    for place, name in enumerate((self.start, self.goal)):
      code = groups.code(stream.source.name, name)
      rows = np.flatnonzero(groups.code_C == code)
      place_C[cell_choice.draw(rows, _CENTROID_CELLS, seed)] = place
    sums_2D = np.zeros((2, model.config.width))
    placed = placed_model.place(model, dtype='float32')
    chunks = model_cells.encode(stream, model, place_C >= 0)
    for index_B, pooled_BD in embeddings.pooled(placed, chunks, states):
      x_BD = pooled_BD.astype(np.float64)
      lengths_B1 = np.linalg.norm(x_BD, axis=1, keepdims=True)
      np.add.at(sums_2D, place_C[index_B], x_BD / np.maximum(lengths_B1, 1e-30))
    start_D, goal_D = sums_2D / np.bincount(place_C[place_C >= 0])[:, None]
    if not np.linalg.norm(goal_D - start_D) > _APART:
      raise errors.UserError(
        f'start {self.start!r} and goal {self.goal!r} have the same centroid: '
        'there is no axis between them'
      )
    return targets.CellAxis(goal_D - start_D, self.pooling)
