"""Embeddings of cells that never depend on how they were computed.

Cells are streamed, encoded as in training (checkpoint's vocabulary, medians
and mode; never recomputed from the user's file), grouped by length, and run
one cell a row. A cell's row has the same number of slots whatever else is in
the file, so its embedding does not depend on order, chunk or batch.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np

import genecompass_jax
from genecompass_jax import (
  errors,
  model as model_lib,
  paths,
  pretrained,
  progress,
  schemas,
)
from genecompass_jax.analysis import (
  cell_columns,
  model_batches,
  model_cells,
  placed_model,
  reference_sample,
)
from genecompass_jax.prepare import sources

KEY = 'X_genecompass'
POOLINGS = ('cls', 'mean')
REFERENCE = 'reference'  # in uns: what gc_ood is measured against


@dataclasses.dataclass(frozen=True)
class StateConfig:
  """Which states of the model stand for a cell, and how they are computed.

  Attributes:
    pooling: 'cls', the state of the species slot, or 'mean' over the genes.
    block: whose output it is, from 1; -1 is the last block, -2 the one before.
    dtype: 'float32' or 'bfloat16' to compute in; '': as the model says.
    batch_size: rows that run together over all local devices; the result does
      not depend on it.
  """

  pooling: str = 'cls'
  block: int = -1
  dtype: str = ''
  batch_size: int = 32

  def check(self, model: pretrained.PretrainedModel) -> None:
    """Raises UserError for what this model does not have."""
    if self.pooling not in POOLINGS:
      raise errors.UserError(f'pooling {self.pooling!r}: give cls or mean')
    if self.pooling == 'cls' and not model.config.use_cls:
      raise errors.UserError('this model has no CLS slot; use pooling mean')
    errors.check_whole(batch_size=self.batch_size)
    if self.batch_size < 1:
      raise errors.UserError(f'batch size {self.batch_size} must be positive')


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """Embeddings of C cells with what is known of each.

  Attributes:
    embeddings_CD: float32, in the order of the cells.
    obs: columns for the cells, [C] each; see `cell_columns`.
    uns: where the numbers come from: checkpoint, vocabulary, mode, pooling,
      layer, identifiers, versions.
  """

  embeddings_CD: np.ndarray
  obs: dict[str, np.ndarray]
  uns: dict[str, Any]


def embed(
  adata: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  *,
  pooling: str = 'cls',
  block: int = -1,
  dtype: str = '',
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  batch_size: int = 32,
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
) -> np.ndarray:
  """Embeds cells: `adata.obsm['X_genecompass'] = embed(adata, model)`.

  An AnnData also receives the columns and the `uns['genecompass']` of
  `Embeddings`. The arguments are those of `embed_cells`.

  Returns:
    float32 [C, D] in the order of the cells.
  """
  result = embed_cells(
    adata,
    model,
    pooling=pooling,
    block=block,
    dtype=dtype,
    species=species,
    ids_of=ids_of,
    layer=layer,
    batch_size=batch_size,
    allow_noninteger=allow_noninteger,
    reading=reading,
  )
  if isinstance(adata, anndata.AnnData):
    for name, column in result.obs.items():
      adata.obs[name] = column
    adata.uns['genecompass'] = result.uns
  return result.embeddings_CD


def embed_cells(
  data: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  *,
  pooling: str = 'cls',
  block: int = -1,
  dtype: str = '',
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  batch_size: int = 32,
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
) -> Embeddings:
  """Embeds the cells of an AnnData or of a file of any format and size.

  Memory holds labels, chunks of cells, and the result. `embed_file` keeps the
  result on disk, and goes on where it was interrupted.

  Args:
    data: cells with counts, in memory or backed; a file is streamed.
    model: a restored model.
    pooling: 'cls', the state of the species slot, or 'mean' over the genes.
    block: whose output is taken, from 1; -1: the last, -2: the one before it.
    dtype: 'float32' or 'bfloat16' to compute in; '': as the model says.
    species: 'human', 'mouse', 'auto' or 'obs:COLUMN'.
    ids_of: 'human' where mouse cells carry human identifiers.
    layer: 'X', 'raw' or 'layers/NAME'; by default the one that looks like
      counts.
    batch_size: rows that run together over all local devices.
    allow_noninteger: take corrected counts.
    reading: what else a format needs, such as the genome of a 10x file.

  Raises:
    UserError: the model came without a vocabulary, has no such block, or the
      cells cannot be read as counts of known genes; or an embedding is not
      finite.
  """
  states = StateConfig(pooling, block, dtype, batch_size)
  states.check(model)
  placed = placed_model.place(model, dtype=dtype, block=block)
  stream = model_cells.open_cells(
    data,
    model,
    reading,
    species=species,
    ids_of=ids_of,
    layer=layer,
    allow_noninteger=allow_noninteger,
  )
  num_cells = stream.source.num_cells
  reference, why = reference_of(model, states)
  obs = cell_columns.empty(stream, reference is not None)
  embeddings_CD = np.zeros((num_cells, model.config.width), np.float32)
  chunks = with_columns(model_cells.encode(stream, model), model, obs)
  with progress.Progress(num_cells, 'cells', 'embedding') as bar:
    for index_B, embeddings_BD in pooled(placed, chunks, states):
      embeddings_CD[index_B] = embeddings_BD
      if reference is not None:
        obs[cell_columns.OOD][index_B] = reference.percentiles(embeddings_BD)
      bar.update(len(index_B))
  max_genes = model.assets.encoding.max_genes
  cell_columns.warn(stream.source.name, obs, max_genes)
  uns = {**provenance(model, stream, states), REFERENCE: why}
  return Embeddings(embeddings_CD, obs, uns)


def reference_of(
  model: pretrained.PretrainedModel, states: StateConfig
) -> tuple[reference_sample.ReferenceSample | None, str]:
  """What `gc_ood` is measured against, or None; and in words, why."""
  number = placed_model.block_number(model.config, states.block)
  found, why = reference_sample.find(
    model, states.pooling, number == model.config.num_layers
  )
  return found, why if found else f'{cell_columns.OOD} left out: {why}'


def provenance(
  model: pretrained.PretrainedModel,
  stream: sources.CellStream,
  states: StateConfig,
) -> dict[str, Any]:
  """Where states come from, for `uns['genecompass']`."""
  return {
    'checkpoint': model.sha256,
    'checkpoint_step': model.step,
    'vocabulary': model.vocabulary.sha256,
    'medians': model.assets.medians.sha256,
    'encoding': dataclasses.asdict(model.assets.encoding),
    'pooling': states.pooling,
    'block': placed_model.block_number(model.config, states.block),
    'dtype': states.dtype or model.config.dtype,
    'layer': stream.source.layer,
    'identifiers': stream.source.identifier_reason,
    'genecompass_jax': genecompass_jax.__version__,
    'jax': jax.__version__,
  }


def with_columns(
  chunks: Iterable[model_cells.EncodedChunk],
  model: pretrained.PretrainedModel,
  columns: dict[str, np.ndarray],
) -> Iterator[model_cells.EncodedChunk]:
  """The chunks as they come, filling in the columns of their cells."""
  for chunk in chunks:
    cell_columns.fill(columns, chunk, model)
    yield chunk


def pooled(
  placed: placed_model.PlacedModel,
  chunks: Iterable[model_cells.EncodedChunk],
  states: StateConfig,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Rows of cells in the source, and their embeddings [B, D] float32.

  Cells come in the order in which their batches are full. While the devices
  work on one batch the next is encoded.
  """
  num_rows = placed.num_rows(states.batch_size)
  before = None
  for batch in model_batches.of_chunks(chunks, placed.buckets, num_rows):
    pooled_BD = _pooled(
      placed.params,
      placed.put(batch.cells),
      placed.knowledge,
      placed.config,
      states.pooling,
    )
    if before is not None:
      yield _fetched(*before)
    before = batch.index_C, pooled_BD
  if before is not None:
    yield _fetched(*before)


def _fetched(
  index_C: np.ndarray, pooled_BD: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
  found_BD = np.asarray(pooled_BD)[: len(index_C)]
  is_finite_B = np.isfinite(found_BD).all(1)
  if not is_finite_B.all():
    raise errors.UserError(
      f'the embedding of cell {index_C[np.argmin(is_finite_B)]} (from 0) is not '
      'finite: parameters or medians of the model are of no sensible size, or '
      'its count is; convert or train the model again'
    )
  return index_C, found_BD


@functools.partial(jax.jit, static_argnums=(3, 4))
def _pooled(params, batch, knowledge, config, pooling):
  """Pooled states of one cell a row, float32 [B, D]."""
  hidden_BLD = model_lib.evaluate(config, params, batch, knowledge)
  return pool(hidden_BLD, batch, pooling)


def pool(
  hidden_BLD: jax.Array, batch: schemas.CellBatch, pooling: str
) -> jax.Array:
  """One vector a cell of its states, one cell a row: float32 [B, D].

  Args:
    hidden_BLD: float32 states of all slots.
    batch: the cells.
    pooling: 'cls', or 'mean' over the genes.
  """
  if pooling == 'cls':
    return hidden_BLD[:, 0]
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL
  weights_BL = is_gene_BL.astype(jnp.float32)
  sums_BD = jnp.einsum(
    'BLD,BL->BD',
    hidden_BLD,
    weights_BL,
    precision=jax.lax.Precision.HIGHEST,
  )
  return sums_BD / jnp.maximum(weights_BL.sum(1, keepdims=True), 1.0)
