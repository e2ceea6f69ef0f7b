"""A user's cells as a restored model reads them.

Cells are streamed and encoded as in training: the checkpoint's vocabulary,
medians and mode, never recomputed from the user's file. Everything that asks a
question of cells (embeddings, perturbation, attribution) comes through here.
"""

import dataclasses
from collections.abc import Iterator

import anndata
import numpy as np

from genecompass_jax import (
  encoding,
  errors,
  paths,
  pretrained,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.prepare import matrices, sources


@dataclasses.dataclass(frozen=True)
class EncodedChunk:
  """Some cells of one species, as the model reads them.

  Attributes:
    species: species code.
    index_C: int64 rows of the cells in the source.
    counts: their counts over the vocabulary's gene list of that species, and
      their library sizes over all columns of the source.
    cells: their ranked genes and values.
  """

  species: int
  index_C: np.ndarray
  counts: encoding.RaggedCells
  cells: encoding.EncodedCells


def open_cells(
  data: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  reading: sources.SourceConfig = sources.SourceConfig(),
  **fields: str | bool,
) -> sources.CellStream:
  """Opens the cells of an AnnData or of a file of any format and size.

  Args:
    data: cells with counts; a file is streamed.
    model: a restored model.
    reading: species, layer and what else a format needs; its path is not read.
    **fields: those of `reading` that are others.

  Raises:
    UserError: the model came without a vocabulary, the cells cannot be read as
      counts, or none of their genes is one that the model knows.
  """
  if model.vocabulary is None or model.assets.medians is None:
    raise errors.UserError(
      f'{model.source}: this model came without vocabulary and medians, so '
      'counts cannot be encoded; convert it with --vocabulary and --medians, '
      'or with --tokens and --medians of the release'
    )
  reading = dataclasses.replace(reading, **fields)
  stream = sources.cells_of(data, model.vocabulary, reading)
  if not any(stream.measured(species).any() for species in stream.species):
    raise errors.UserError(
      f'{stream.source.name}: none of its {stream.source.num_columns:,} genes '
      f'is among the {model.vocabulary.size - vocabulary_lib.NUM_SPECIAL:,} '
      'that this model knows; use a model trained on such genes'
    )
  return stream


def encoders(
  stream: sources.CellStream, model: pretrained.PretrainedModel
) -> dict[int, encoding.CellEncoder]:
  """The encoder of each species that occurs in the cells."""
  assets = model.assets
  return {
    species: encoding.CellEncoder(
      assets.encoding,
      stream.tokens(species),
      assets.medians.divisor_V(species),
    )
    for species in stream.species
  }


def encode(
  stream: sources.CellStream,
  model: pretrained.PretrainedModel,
  wanted_C: np.ndarray | None = None,
) -> Iterator[EncodedChunk]:
  """Cells in the order of the source, chunk by chunk.

  Args:
    stream: the cells.
    model: whose vocabulary, medians and mode encode them.
    wanted_C: bool, the cells that are asked for; None: all. Chunks without any
      of them are not read.

  Raises:
    UserError: a value that is no count, naming the cell.
  """
  encoder_of = encoders(stream, model)
  for chunk in _chunks(stream, wanted_C):
    index_C, counts = chunk.index_C, chunk.cells
    if wanted_C is not None and not wanted_C[index_C].all():
      keep_C = wanted_C[index_C]
      if not keep_C.any():
        continue
      index_C, counts = index_C[keep_C], some(counts, keep_C)
    encoded = encoder_of[chunk.species].encode(counts)
    yield EncodedChunk(chunk.species, index_C, counts, encoded)


def _chunks(
  stream: sources.CellStream, wanted_C: np.ndarray | None
) -> Iterator[sources.Chunk]:
  if wanted_C is None:
    yield from stream.chunks()
    return
  by_rows, size = stream.by_rows(), matrices.CHUNK_CELLS
  for first in range(0, stream.source.num_cells, size):
    if wanted_C[first : first + size].any():
      yield from by_rows.read(first, first + size)


def some(
  cells: encoding.RaggedCells, keep_C: np.ndarray
) -> encoding.RaggedCells:
  """The cells for which `keep_C` is true."""
  lengths_C = np.diff(cells.starts_C1)
  keep_N = np.repeat(keep_C, lengths_C)
  return encoding.RaggedCells(
    gene_rows_N=cells.gene_rows_N[keep_N],
    counts_N=cells.counts_N[keep_N],
    starts_C1=np.concatenate([[0], np.cumsum(lengths_C[keep_C])]),
    totals_C=cells.totals_C[keep_C],
  )
