"""Attribution of a user's cells: which parts and genes a number came from."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import anndata
import numpy as np

from genecompass_jax import (
  errors,
  paths,
  pretrained,
  progress,
  schemas,
)
from genecompass_jax.analysis import gene_tokens, model_cells
from genecompass_jax.analysis.attribution import (
  integrals,
  parts as parts_lib,
  questions,
  result as result_lib,
  targets,
)
from genecompass_jax.prepare import sources


def attribute(
  cells: anndata.AnnData | paths.PathLike | schemas.CellBatch,
  model: pretrained.PretrainedModel,
  target: targets.Target,
  *,
  over: str = parts_lib.PARTS,
  method: str = questions.INTEGRATED,
  baseline: str = parts_lib.MEAN,
  tolerance: float = integrals.TOLERANCE,
  max_points: int = integrals.MAX_POINTS,
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  batch_size: int = 8,
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
) -> result_lib.Attribution:
  """Says what a number of each cell came from.

  It tells what the model used; that is learned from expression and no causal
  estimate.

  Args:
    cells: an AnnData or a file with counts; or encoded cells, one a row, as
      `cell_batch` makes them.
    model: a restored model.
    target: what is explained, see `targets`.
    over: 'parts': word vector and priors of the genes, while values stay as
      they are; 'values'; or 'all' of them along one path.
    method: 'integrated' gradients; 'gradient' at the cell times the change from
      the baseline; 'occlusion': the exact change when one part of all genes,
      or all parts of one gene, are put to their baselines, in as many passes
      as a row has slots.
    baseline: what word and priors are when nothing is known: 'mean' over the
      species' genes, or 'zero'; see `parts`. That of values is 0.
    tolerance: of the error of the path integral, relative to the sum of the
      cell's absolute scores.
    max_points: of the path.
    species: 'human', 'mouse', 'auto' or 'obs:COLUMN'.
    ids_of: 'human' where mouse cells carry human identifiers.
    layer: 'X', 'raw' or 'layers/NAME'; by default what looks like counts.
    batch_size: rows that run together over all local devices.
    allow_noninteger: take corrected counts.
    reading: what else a format needs.

  Returns:
    Scores in the units of the target. They do not depend on which other cells
    were asked about, but for rounding.

  Raises:
    UserError: a target that the model has no answer to, a gene that none of
      the cells holds, an unknown word, or cells that cannot be read.
  """
  errors.check_whole(batch_size=batch_size)
  if batch_size < 1:
    raise errors.UserError(f'{batch_size=} must be positive')
  question = questions.Question.of(
    model,
    target,
    over=over,
    method=method,
    baseline=baseline,
    tolerance=tolerance,
    max_points=max_points,
  )
  names_C = None
  if isinstance(cells, schemas.CellBatch):
    number = len(cells.gene_ids_BL)
    batches = _given(question, cells, question.placed.num_rows(batch_size))
  else:
    stream = model_cells.open_cells(
      cells,
      model,
      reading,
      species=species,
      ids_of=ids_of,
      layer=layer,
      allow_noninteger=allow_noninteger,
    )
    number = stream.source.num_cells
    names_C = stream.source.obs.index.astype(str).to_numpy()
    batches = questions.of_cells(
      question, stream, question.placed.num_rows(batch_size)
    )
  found = []
  with progress.Progress(number, 'cells', 'attribution') as bar:
    for each in batches:
      found.append(questions.explain(question, each))
      bar.update(len(found[-1]['cell_C']))
    bar.skip(number - bar.done)  # those that hold no such gene
  if not found:
    raise errors.UserError(
      f'none of the {number:,} cells holds {getattr(target, "gene", "a gene")} '
      'among the genes that the model reads; choose other cells or another gene'
    )
  is_close_C = np.concatenate([each.pop('is_close_C') for each in found])
  questions.warn(
    int((~is_close_C).sum()), len(is_close_C), max_points, baseline
  )
  return _joined(question, found, names_C)


def _given(
  question: questions.Question, batch: schemas.CellBatch, num_rows: int
) -> Iterator[questions.Rows]:
  """The rows of a batch that was given, in batches of one size."""
  batch = schemas.CellBatch(
    **{
      field.name: np.asarray(getattr(batch, field.name))
      for field in dataclasses.fields(batch)
    }
  )
  pretrained.check_inside(batch, question.model.config)
  if batch.segments_BL.max(initial=0) > 1:
    raise errors.UserError(
      'attribution takes one cell a row; this batch has rows of several'
    )
  is_cell_B = (batch.segments_BL > 0).any(1)
  species_B = batch.species_BL[:, 0]
  token_B = np.full(len(is_cell_B), -1, np.int32)
  for code in np.unique(species_B[is_cell_B]).tolist():
    token_B[species_B == code] = targets.token_of(
      question.target, question.model, code
    )
  at_BL = (batch.gene_ids_BL == token_B[:, None]) & (batch.segments_BL > 0)
  is_asked_B = is_cell_B & ((token_B < 0) | at_BL.any(1))
  cell = np.flatnonzero(is_asked_B)
  for first in range(0, len(cell), num_rows):
    some = cell[first : first + num_rows]
    # The last row again, and not asked, where they do not fill a batch.
    row_B = np.pad(some, (0, num_rows - len(some)), mode='edge')
    is_new_B = np.arange(num_rows) < len(some)
    yield questions.Rows(
      schemas.CellBatch(
        **{
          field.name: getattr(batch, field.name)[row_B]
          for field in dataclasses.fields(batch)
        }
      ),
      np.where(is_new_B, row_B, -1),
      token_B[row_B],
    )


def _joined(
  question: questions.Question,
  found: Sequence[dict[str, Any]],
  names_C: np.ndarray | None,
) -> result_lib.Attribution:
  """All batches as one result, in the order of the source."""

  def column(name):
    return np.concatenate([each[name] for each in found])

  cell_C, lengths_C = column('cell_C'), column('lengths_C')
  order_C = np.argsort(cell_C, kind='stable')
  order_N = np.argsort(np.repeat(cell_C, lengths_C), kind='stable')
  species_N = np.repeat(column('species_C'), lengths_C)[order_N]
  columns = {
    name: column(name)[order_C if name.endswith(('_C', '_CK')) else order_N]
    for name, first in found[0].items()
    if first is not None and name not in ('lengths_C', 'species_C')
  }
  cell_C = columns['cell_C']
  symbols_N, gene_ids_N = gene_tokens.names_of(
    question.model.vocabulary, columns['tokens_N'], species_N
  )
  target = question.target
  facts = {
    'target': targets.in_words(target),
    'over': question.over,
    'method': question.method,
    'baseline': question.baseline,
    'checkpoint': question.model.sha256,
    'checkpoint_step': question.model.step,
  }
  return result_lib.Attribution(
    parts=question.chosen,
    cell_names_C=cell_C.astype(str) if names_C is None else names_C[cell_C],
    starts_C1=np.cumsum([0, *lengths_C[order_C]]),
    symbols_N=symbols_N,
    gene_ids_N=gene_ids_N,
    facts=facts,
    **{'scores_NK': None, **columns},
  )
