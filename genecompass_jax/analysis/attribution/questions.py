"""A question about cells, and what the scores of a batch of them are."""

import dataclasses
import logging
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from genecompass_jax import (
  errors,
  masking,
  pretrained,
  schemas,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.analysis import (
  model_batches,
  model_cells,
  placed_model,
)
from genecompass_jax.analysis.attribution import (
  integrals,
  parts as parts_lib,
  targets,
)
from genecompass_jax.analysis.perturbation import ranks
from genecompass_jax.prepare import sources

INTEGRATED, GRADIENT, OCCLUSION = METHODS = (
  'integrated',
  'gradient',
  'occlusion',
)


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked, and of which model.

  Attributes:
    model: as it was restored.
    placed: the same on the devices, in float32, priors not folded.
    target: what is explained.
    over, method, baseline: as for `attribute.attribute`.
    chosen: K parts.
    mean_KSD: their baselines.
    tolerance, max_points: of the path integral.
  """

  model: pretrained.PretrainedModel
  placed: placed_model.PlacedModel
  target: targets.Target
  over: str
  method: str
  baseline: str
  chosen: tuple[str, ...]
  mean_KSD: np.ndarray
  tolerance: float
  max_points: int

  @classmethod
  def of(
    cls,
    model: pretrained.PretrainedModel,
    target: targets.Target,
    *,
    over: str = parts_lib.PARTS,
    method: str = INTEGRATED,
    baseline: str = parts_lib.MEAN,
    tolerance: float = integrals.TOLERANCE,
    max_points: int = integrals.MAX_POINTS,
  ) -> 'Question':
    """A question to a model, which is placed on all local devices.

    The arguments are those of `attribute.attribute`.

    Raises:
      UserError: a target that the model has no answer to, or an unknown word.
    """
    if method not in METHODS:
      raise errors.UserError(
        f'method={method!r}: give one of {", ".join(METHODS)}'
      )
    errors.check_whole(max_points=max_points)
    if not isinstance(tolerance, numbers.Real):
      raise errors.UserError(f'{tolerance=} must be a number')
    if max_points < 1 or not tolerance > 0:
      raise errors.UserError(f'{max_points=} and {tolerance=} must be positive')
    targets.check(target, model.config)
    return cls(
      model=model,
      placed=placed_model.place(model, dtype='float32', folds=False),
      target=target,
      over=over,
      method=method,
      baseline=baseline,
      chosen=parts_lib.names(model.config, over),
      mean_KSD=parts_lib.means(model, baseline),
      tolerance=tolerance,
      max_points=max_points,
    )

  def about(self, target: targets.Target) -> 'Question':
    """The same question about another target."""
    targets.check(target, self.model.config)
    return dataclasses.replace(self, target=target)


@dataclasses.dataclass(frozen=True)
class Rows:
  """A batch of cells before anything is hidden, one a row.

  Attributes:
    batch: NumPy arrays.
    cell_B: int64 rows of the cells in the source; -1 where nothing is asked.
    token_B: int32 token that the target asks for, -1 for none.
  """

  batch: schemas.CellBatch
  cell_B: np.ndarray
  token_B: np.ndarray


def of_cells(
  question: Question,
  stream: sources.CellStream,
  num_rows: int,
  wanted_C: np.ndarray | None = None,
) -> Iterator[Rows]:
  """Cells that the target applies to, batches of one length bucket.

  Args:
    question: what is asked.
    stream: the cells.
    num_rows: of a batch; the last ones are filled up.
    wanted_C: bool, only these cells; None: all.

  Raises:
    UserError: none of the species of the cells has the gene.
  """
  token_S = targets.tokens_of_cells(question.target, question.model, stream)
  chunks = _holding(
    model_cells.encode(stream, question.model, wanted_C), token_S
  )
  buckets = question.placed.buckets
  for batch in model_batches.of_chunks(chunks, buckets, num_rows):
    cell_B = np.full(num_rows, -1, np.int64)
    cell_B[: len(batch.index_C)] = batch.index_C
    species_B = batch.cells.species_BL[:, 0]
    token_B = np.where(cell_B < 0, targets.ANY, token_S[species_B])
    yield Rows(batch.cells, cell_B, token_B)


def holds(chunk: model_cells.EncodedChunk, token_S: np.ndarray) -> np.ndarray:
  """Bool [cells of the chunk]: those that a target applies to.

  Args:
    chunk: encoded cells.
    token_S: from `targets.tokens_of_cells`.

  Returns:
    Whether the gene is among those that the model reads; where none is asked
    for, whether it reads any.
  """
  cells, token = chunk.cells, token_S[chunk.species]
  lengths_C = np.diff(cells.starts_C1)
  if token == targets.ANY:
    return lengths_C > 0
  cell_N = np.repeat(np.arange(cells.num_cells), lengths_C)
  return (
    np.bincount(cell_N[cells.gene_ids_N == token], minlength=cells.num_cells)
    > 0
  )


def _holding(
  chunks: Iterable[model_cells.EncodedChunk], token_S: np.ndarray
) -> Iterator[model_cells.EncodedChunk]:
  """The cells that a target applies to."""
  for chunk in chunks:
    kept = np.flatnonzero(holds(chunk, token_S))
    if len(kept):
      yield dataclasses.replace(
        chunk,
        index_C=chunk.index_C[kept],
        cells=ranks.take(chunk.cells, kept),
      )


def explain(question: Question, given: Rows) -> dict[str, Any]:
  """Scores of the cells of a batch, by field of `Attribution`.

  Beside these fields: species_C and lengths_C of the cells, and is_close_C,
  whether the scores of a cell add up within the tolerance.
  """
  placed = question.placed
  asked, readout = targets.ask(
    question.target, given.batch, given.token_B, placed.config
  )
  parts = parts_lib.of_batch(
    placed.params,
    placed.put(asked),
    placed.knowledge,
    question.mean_KSD,
    placed.config,
    question.chosen,
  )
  problem = placed.params, parts, readout, placed.config
  scores_BLK, points_B = None, np.zeros(len(given.cell_B), np.int32)
  is_close_B = np.ones(len(given.cell_B), bool)
  if question.method == INTEGRATED:
    integral = integrals.integrate(
      *problem, tolerance=question.tolerance, max_points=question.max_points
    )
    scores_BLK, points_B = integral.scores_BLK, integral.points_B
    ends_2B = integral.at_baseline_B, integral.at_input_B
    is_close_B = integral.is_close_B
  else:
    ends_2B = integrals.ends(*problem)
  if question.method == GRADIENT:
    scores_BLK = integrals.gradient_times_input(*problem)
  if scores_BLK is not None:
    by_part_BK, by_gene_BL = scores_BLK.sum(1), scores_BLK.sum(2)
  else:
    by_part_BK = integrals.leave_out_parts(*problem)
    by_gene_BL = integrals.leave_out_genes(*problem)
  error_B = by_part_BK.sum(1, dtype=np.float64) - (ends_2B[1] - ends_2B[0])

  batch, kept_B = given.batch, given.cell_B >= 0
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL & kept_B[:, None]
  is_hidden_BL = asked.gene_ids_BL == vocabulary_lib.MASK
  is_hidden_BL |= asked.values_BL == masking.HIDDEN_VALUE
  return {
    'cell_C': given.cell_B[kept_B],
    'species_C': batch.species_BL[kept_B, 0],
    'lengths_C': is_gene_BL.sum(1)[kept_B],
    'tokens_N': batch.gene_ids_BL[is_gene_BL],
    'ranks_N': batch.positions_BL[is_gene_BL],
    'is_hidden_N': is_hidden_BL[is_gene_BL],
    'by_part_CK': by_part_BK[kept_B],
    'by_gene_N': by_gene_BL[is_gene_BL],
    'scores_NK': None if scores_BLK is None else scores_BLK[is_gene_BL],
    'at_input_C': ends_2B[1][kept_B],
    'at_baseline_C': ends_2B[0][kept_B],
    'error_C': error_B[kept_B],
    'points_C': points_B[kept_B],
    'is_close_C': is_close_B[kept_B],
  }


def warn(number: int, of: int, max_points: int, baseline: str) -> None:
  """Says how many of the cells have scores that do not add up, if any."""
  if number:
    logging.warning(
      'attribution of %d of %d cells does not add up to what it should after '
      '%d points, see the column error: raise max_points%s',
      *(number, of, max_points),
      '' if baseline == parts_lib.MEAN else ", or take baseline='mean'",
    )
