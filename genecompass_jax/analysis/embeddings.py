"""Embeddings of cells that never depend on how they were computed.

Cells are streamed, encoded as in training (checkpoint's vocabulary, medians
and mode; never recomputed from the user's file), grouped by length, and run
one cell a row. A cell's row has the same number of slots whatever else is in
the file, so its embedding does not depend on order, chunk or batch.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np

import genecompass_jax
from genecompass_jax import (
  encoding,
  errors,
  model as model_lib,
  paths,
  pretrained,
  progress,
  rows,
)
from genecompass_jax.analysis import model_cells, placed_model
from genecompass_jax.prepare import sources

KEY = 'X_genecompass'
POOLINGS = ('cls', 'mean')


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """Embeddings of C cells with what is known of each.

  Attributes:
    embeddings_CD: float32, in the order of the cells.
    obs: columns for the cells, [C] each:
      gc_n_genes_used: int32 genes that entered the model;
      gc_share_umi_mapped: float32 share of the cell's counts on known genes;
      gc_share_umi_truncated: float32 share of the mapped counts beyond the
        cut at max_genes;
      gc_species: species name.
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
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  batch_size: int = 32,
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
) -> np.ndarray:
  """Embeds cells: `adata.obsm['X_genecompass'] = embed(adata, model)`.

  An AnnData also receives the columns and the `uns['genecompass']` of
  `Embeddings`. The remaining arguments are those of `embed_cells`.

  Returns:
    float32 [C, D] in the order of the cells.
  """
  result = embed_cells(
    adata,
    model,
    pooling=pooling,
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
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  batch_size: int = 32,
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
) -> Embeddings:
  """Embeds the cells of an AnnData or of a file of any format and size.

  Args:
    data: cells with counts; a file is streamed.
    model: a restored model.
    pooling: 'cls', the state of the species slot, or 'mean' over the genes.
    species: 'human', 'mouse', 'auto' or 'obs:COLUMN'.
    ids_of: 'human' where mouse cells carry human identifiers.
    layer: 'X', 'raw' or 'layers/NAME'; by default the one that looks like
      counts.
    batch_size: rows that run together over all local devices.
    allow_noninteger: take corrected counts.
    reading: what else a format needs, such as the genome of a 10x file.

  Raises:
    UserError: the model came without a vocabulary, or the cells cannot be read
      as counts of known genes.
  """
  if pooling not in POOLINGS:
    raise errors.UserError(f'pooling {pooling!r}: give cls or mean')
  if pooling == 'cls' and not model.config.use_cls:
    raise errors.UserError('this model has no CLS slot; use pooling mean')
  if batch_size < 1:
    raise errors.UserError(f'batch size {batch_size} must be positive')
  stream = model_cells.open_cells(
    data,
    model,
    dataclasses.replace(
      reading,
      species=species,
      ids_of=ids_of,
      layer=layer,
      allow_noninteger=allow_noninteger,
    ),
  )
  num_cells = stream.source.num_cells
  obs = {
    'gc_n_genes_used': np.zeros(num_cells, np.int32),
    'gc_share_umi_mapped': np.zeros(num_cells, np.float32),
    'gc_share_umi_truncated': np.zeros(num_cells, np.float32),
    'gc_species': np.array(stream.vocabulary.species)[stream.source.species_C],
  }
  embeddings_CD = np.zeros((num_cells, model.config.width), np.float32)
  runner = _Runner(model, pooling, batch_size)
  with progress.Progress(num_cells, 'cells', 'embedding') as bar:
    for index_B, embeddings_BD in runner.run(_encoded(stream, model, obs)):
      embeddings_CD[index_B] = embeddings_BD
      bar.update(len(index_B))
  mapped = float(np.mean(obs['gc_share_umi_mapped']))
  if mapped < 0.5:
    logging.warning(
      '%s: the model knows the genes of only %.0f %% of the counts of a cell, '
      'see gc_share_umi_mapped',
      stream.source.name,
      100 * mapped,
    )
  lost = float(np.median(obs['gc_share_umi_truncated']))
  if lost > 0.2:
    logging.warning(
      '%s: half of the cells lose %.0f %% of their counts or more, because the '
      'model reads %d genes of a cell, see gc_share_umi_truncated',
      stream.source.name,
      100 * lost,
      model.assets.encoding.max_genes,
    )
  uns = {
    'checkpoint': model.sha256,
    'checkpoint_step': model.step,
    'vocabulary': model.vocabulary.sha256,
    'medians': model.assets.medians.sha256,
    'encoding': dataclasses.asdict(model.assets.encoding),
    'pooling': pooling,
    'layer': stream.source.layer,
    'identifiers': stream.source.identifier_reason,
    'genecompass_jax': genecompass_jax.__version__,
    'jax': jax.__version__,
  }
  return Embeddings(embeddings_CD, obs, uns)


def _encoded(
  stream: sources.CellStream,
  model: pretrained.PretrainedModel,
  obs: dict[str, np.ndarray],
) -> Iterator[model_cells.EncodedChunk]:
  """All cells, filling the columns of `obs`."""
  assets = model.assets
  for chunk in model_cells.encode(stream, model):
    cells, index_C = chunk.cells, chunk.index_C
    lengths_C = np.diff(cells.starts_C1)
    mapped_C = _sums(chunk.counts.counts_N, chunk.counts.starts_C1)
    obs['gc_n_genes_used'][index_C] = lengths_C
    obs['gc_share_umi_mapped'][index_C] = mapped_C / np.maximum(
      chunk.counts.totals_C, 1e-12
    )
    kept_C = _kept_counts(
      cells,
      assets.medians.divisor_V(chunk.species),
      assets.encoding,
      chunk.counts.totals_C,
    )
    lost_C = 1.0 - kept_C / np.maximum(mapped_C, 1e-12)
    # Whole cells lose nothing; rounding of log2 values must not say so.
    is_cut_C = cells.num_genes_C > lengths_C
    obs['gc_share_umi_truncated'][index_C] = np.where(is_cut_C, lost_C, 0.0)
    yield chunk


def _kept_counts(
  cells: encoding.EncodedCells,
  divisor_V: np.ndarray,
  config: encoding.EncodingConfig,
  totals_C: np.ndarray,
) -> np.ndarray:
  """Counts on the genes that entered the model, from their values, [C]."""
  counts_N = np.expm1(cells.values_N * np.log(2)) * divisor_V[cells.gene_ids_N]
  kept_C = _sums(counts_N, cells.starts_C1)
  if config.mode == encoding.LIBRARY:
    kept_C *= totals_C / config.target_sum
  return kept_C


def _sums(values_N: np.ndarray, starts_C1: np.ndarray) -> np.ndarray:
  """Sum over the elements of every cell, [C] float64."""
  running = np.concatenate([[0.0], np.cumsum(values_N, dtype=np.float64)])
  return running[starts_C1[1:]] - running[starts_C1[:-1]]


class _Runner:
  """Runs encoded cells through a model, batches of one length bucket."""

  def __init__(
    self, model: pretrained.PretrainedModel, pooling: str, batch_size: int
  ):
    self._placed = placed_model.place(model)
    self._rows = self._placed.num_rows(batch_size)
    self._pooling = pooling

  def run(
    self, chunks: Iterator[model_cells.EncodedChunk]
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(cell numbers, embeddings) of every cell, in the order they are ready."""
    buckets = self._placed.buckets
    waiting: dict[int, list[tuple[int, int, np.ndarray, np.ndarray]]] = {
      slots: [] for slots in buckets
    }
    for chunk in chunks:
      cells, starts_C1 = chunk.cells, chunk.cells.starts_C1
      slots_C = np.searchsorted(buckets, np.diff(starts_C1) + 1)
      for c, index in enumerate(chunk.index_C):
        slots = buckets[slots_C[c]]
        a, b = starts_C1[c], starts_C1[c + 1]
        cell = index, chunk.species, cells.gene_ids_N[a:b], cells.values_N[a:b]
        waiting[slots].append(cell)
        if len(waiting[slots]) == self._rows:
          yield self._batch(slots, waiting[slots])
          waiting[slots] = []
    for slots, cells in waiting.items():
      if cells:
        yield self._batch(slots, cells)

  def _batch(self, slots: int, cells: list) -> tuple[np.ndarray, np.ndarray]:
    index, species, gene_ids, values = zip(*cells)
    starts_C1 = np.cumsum([0, *map(len, gene_ids)])
    encoded = encoding.EncodedCells(
      gene_ids_N=np.concatenate(gene_ids),
      values_N=np.concatenate(values),
      starts_C1=starts_C1,
      keys_C=np.zeros(len(cells), np.uint64),
      num_genes_C=np.diff(starts_C1).astype(np.int32),
    )
    batch = rows.cell_batch_rows(
      encoded, np.array(species), slots, num_rows=self._rows
    )
    placed = self._placed
    pooled_BD = _pooled(
      placed.params,
      placed.put(batch),
      placed.knowledge,
      placed.config,
      self._pooling,
    )
    return np.array(index), np.asarray(pooled_BD)[: len(cells)]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _pooled(params, batch, knowledge, config, pooling):
  """Pooled states of one cell a row, float32 [B, D]."""
  hidden_BLD = model_lib.bind(config, params)(batch, knowledge)
  if pooling == 'cls':
    return hidden_BLD[:, 0]
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL
  weights_BL = is_gene_BL.astype(jnp.float32)
  sums_BD = jnp.einsum('BLD,BL->BD', hidden_BLD, weights_BL)
  return sums_BD / jnp.maximum(weights_BL.sum(1, keepdims=True), 1.0)
