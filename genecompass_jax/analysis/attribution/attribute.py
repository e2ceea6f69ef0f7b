"""Attribution of a user's cells: which parts and genes a number came from."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import anndata
import numpy as np

from genecompass_jax import (
  errors,
  masking,
  paths,
  pretrained,
  progress,
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
  result as result_lib,
  targets,
)
from genecompass_jax.analysis.perturbation import interventions, ranks
from genecompass_jax.prepare import sources

INTEGRATED, GRADIENT, OCCLUSION = METHODS = (
  'integrated',
  'gradient',
  'occlusion',
)


@dataclasses.dataclass(frozen=True)
class _Question:
  """What is asked, and of which model.

  Attributes:
    model: as it was restored.
    placed: the same on the devices, in float32, priors not folded.
    target: what is explained.
    over, method, baseline: as given to `attribute`.
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


@dataclasses.dataclass(frozen=True)
class _Rows:
  """A batch of cells before anything is hidden, one a row.

  Attributes:
    batch: NumPy arrays.
    cell_B: int64 rows of the cells in the source; -1 where nothing is asked.
    token_B: int32 token that the target asks for, -1 for none.
  """

  batch: schemas.CellBatch
  cell_B: np.ndarray
  token_B: np.ndarray


def attribute(
  cells: anndata.AnnData | paths.PathLike | schemas.CellBatch,
  model: pretrained.PretrainedModel,
  target: targets.Target,
  *,
  over: str = parts_lib.PARTS,
  method: str = INTEGRATED,
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
  if method not in METHODS:
    raise errors.UserError(
      f'method={method!r}: give one of {", ".join(METHODS)}'
    )
  if batch_size < 1 or max_points < 1 or not tolerance > 0:
    raise errors.UserError(
      f'{batch_size=}, {max_points=} and {tolerance=} must be positive'
    )
  targets.check(target, model.config)
  question = _Question(
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
    batches = _laid_out(question, stream, question.placed.num_rows(batch_size))
  found = []
  with progress.Progress(number, 'cells', 'attribution') as bar:
    for each in batches:
      found.append(_explain(question, each))
      bar.update(len(found[-1]['cell_C']))
    bar.skip(number - bar.done)  # those that hold no such gene
  if not found:
    raise errors.UserError(
      f'none of the {number:,} cells holds {getattr(target, "gene", "a gene")} '
      'among the genes that the model reads; choose other cells or another gene'
    )
  return _joined(question, found, names_C)


def _given(
  question: _Question, batch: schemas.CellBatch, num_rows: int
) -> Iterator[_Rows]:
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
    yield _Rows(
      schemas.CellBatch(
        **{
          field.name: getattr(batch, field.name)[row_B]
          for field in dataclasses.fields(batch)
        }
      ),
      np.where(is_new_B, row_B, -1),
      token_B[row_B],
    )


def _laid_out(
  question: _Question, stream: sources.CellStream, num_rows: int
) -> Iterator[_Rows]:
  """Cells that the target applies to, batches of one length bucket."""
  token_S = np.full(question.model.config.num_species, -1, np.int32)
  for code in stream.species:
    token_S[code] = targets.token_of(question.target, question.model, code)
  chunks = _holding(model_cells.encode(stream, question.model), token_S)
  buckets = question.placed.buckets
  for batch in model_batches.of_chunks(chunks, buckets, num_rows):
    cell_B = np.full(num_rows, -1, np.int64)
    cell_B[: len(batch.index_C)] = batch.index_C
    species_B = batch.cells.species_BL[:, 0]
    token_B = np.where(cell_B < 0, -1, token_S[species_B])
    yield _Rows(batch.cells, cell_B, token_B)


def _holding(
  chunks: Iterable[model_cells.EncodedChunk], token_S: np.ndarray
) -> Iterator[model_cells.EncodedChunk]:
  """Cells that hold the gene of their species; all with genes, if it is -1."""
  for chunk in chunks:
    cells, token = chunk.cells, token_S[chunk.species]
    cell_N = np.repeat(np.arange(cells.num_cells), np.diff(cells.starts_C1))
    kept = np.unique(cell_N[(cells.gene_ids_N == token) | (token < 0)])
    if len(kept):
      yield dataclasses.replace(
        chunk, index_C=chunk.index_C[kept], cells=ranks.take(cells, kept)
      )


def _explain(question: _Question, given: _Rows) -> dict[str, Any]:
  """Scores of the cells of a batch, by field of `Attribution`."""
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
  if question.method == INTEGRATED:
    integral = integrals.integrate(
      *problem, tolerance=question.tolerance, max_points=question.max_points
    )
    scores_BLK, points_B = integral.scores_BLK, integral.points_B
    ends_2B = integral.at_baseline_B, integral.at_input_B
    _warn(integral, given.cell_B >= 0)
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
  }


def _warn(integral: integrals.Integral, kept_B: np.ndarray) -> None:
  is_far_B = kept_B & ~integral.is_close_B
  if is_far_B.any():
    logging.warning(
      'attribution of %d cells does not add up to what it should after %d '
      'points, see error: raise max_points, or take baseline mean',
      int(is_far_B.sum()),
      int(integral.points_B.max()),
    )


def _joined(
  question: _Question,
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
  symbols_N, gene_ids_N = _gene_names(
    question.model.vocabulary, columns['tokens_N'], species_N
  )
  target = question.target
  facts = {
    'target': _said(target),
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


def _said(target: targets.Target) -> str:
  """A target in one line."""
  if isinstance(target, targets.CellAxis):
    return f'CellAxis({target.pooling})'
  return repr(target)


def _gene_names(
  vocab: vocabulary_lib.Vocabulary | None,
  tokens_N: np.ndarray,
  species_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Symbols and Ensembl ids of tokens, in the words of the cell's species."""
  symbols_N = np.full(len(tokens_N), '', object)
  gene_ids_N = symbols_N.copy()
  if vocab is None:
    return symbols_N, gene_ids_N
  for species in np.unique(species_N).tolist():
    symbols_V = np.array(vocab.token_symbols(), object)
    for token, name in interventions.token_names(vocab, species).items():
      symbols_V[token] = name
    gene_ids_V = np.array(vocab.token_gene_ids(), object)
    rows_R = vocab.gene_rows(species)[::-1]  # of a shared token the first
    gene_ids_V[vocab.token_G[rows_R]] = [
      vocab.genes.gene_ids[r] for r in rows_R
    ]
    mine_N = species_N == species
    symbols_N[mine_N] = symbols_V[tokens_N[mine_N]]
    gene_ids_N[mine_N] = gene_ids_V[tokens_N[mine_N]]
  return symbols_N, gene_ids_N
