"""Contextual embeddings of genes: states of a gene, averaged over cells.

Averages are by token: the state of a gene counts for that gene wherever it
stands in a cell (the original averages by position). One pass over the cells,
in which mean and variance grow on the devices by Welford's recurrence, with a
compensated mean (Kahan); states of single cells never leave them.
"""

import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import (
  errors,
  model as model_lib,
  paths,
  pretrained,
  progress,
  staging,
)
from genecompass_jax.analysis import (
  cell_groups,
  embeddings,
  model_batches,
  model_cells,
  placed_model,
  token_table,
)
from genecompass_jax.prepare import sources, zarr_writer

MEMORY_GIB = 2.0
_NUMBERS = 3  # arrays of [groups, tokens, width]: mean, compensation, squares


@dataclasses.dataclass(frozen=True)
class GeneEmbeddings:
  """Mean states of genes: N rows, one a group and gene that occurs in it.

  Attributes:
    groups: names of the groups.
    column: obs column that they come from; '' for all cells as one group.
    genes: the T genes that were asked for, or all that were measured.
    group_N: int32 place in `groups`, ascending.
    gene_N: int32 place in `genes`, ascending within a group.
    count_N: int64 cells of the group that have the gene.
    mean_ND: float32 mean state; an array on disk where a path was given.
    variance_ND: float32 variance over the cells (divided by count - 1), NaN
      of one cell; likewise.
    uns: where the numbers come from.
  """

  groups: tuple[str, ...]
  column: str
  genes: token_table.TokenTable
  group_N: np.ndarray
  gene_N: np.ndarray
  count_N: np.ndarray
  mean_ND: Any
  variance_ND: Any
  uns: dict[str, Any]

  def __repr__(self) -> str:
    rows, width = self.mean_ND.shape
    groups = f'{len(self.groups)} groups of {self.column}'
    return (
      f'GeneEmbeddings({rows:,} rows of {width}: {len(self.genes):,} genes in '
      f'{groups if self.column else "all cells"}; .of(group), .table() and '
      '.to_anndata() give them)'
    )

  def table(self) -> pd.DataFrame:
    """What the rows are: group, gene_id, symbol, token, n_cells."""
    symbols = np.array(self.genes.symbols, object)[self.gene_N]
    gene_ids = np.array(self.genes.gene_ids, object)[self.gene_N]
    groups = np.array(self.groups, object)[self.group_N]
    return pd.DataFrame(
      {
        'group': pd.Categorical(groups, categories=self.groups),
        'gene_id': gene_ids,
        'symbol': symbols,
        'token': self.genes.token_T[self.gene_N],
        'n_cells': self.count_N,
      },
      index=[f'{group}:{gene}' for group, gene in zip(groups, gene_ids)],
    )

  def of(self, group: str) -> tuple[np.ndarray, np.ndarray]:
    """Places in `genes`, and mean states, of the genes of one group.

    Raises:
      UserError: there is no such group.
    """
    if group not in self.groups:
      raise errors.UserError(
        f'no group {group!r}; there are: {", ".join(self.groups)}'
      )
    lo, hi = np.searchsorted(
      self.group_N, self.groups.index(group) + np.array([0, 1])
    )
    return self.gene_N[lo:hi], np.asarray(self.mean_ND[lo:hi])

  def to_anndata(self) -> anndata.AnnData:
    """Rows as observations, for scanpy: X means, layers['variance']."""
    return anndata.AnnData(
      np.asarray(self.mean_ND[:]),
      obs=self.table(),
      layers={'variance': np.asarray(self.variance_ND[:])},
      uns={'genecompass': self.uns},
    )


def gene_embeddings(
  data: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  by: str = '',
  *,
  path: paths.PathLike | None = None,
  genes: Sequence[str] = (),
  block: int = -1,
  dtype: str = '',
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  batch_size: int = 32,
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
  memory_gib: float = MEMORY_GIB,
) -> GeneEmbeddings:
  """Averages the states of every gene over the cells of each group.

  Args:
    data: cells with counts; a file is streamed.
    model: a restored model.
    by: obs column of the groups; '' is one group of all cells.
    path: zarr folder to write, an AnnData; it appears when it is whole, and
      means and variances then stay on disk.
    genes: which, by any identifier; all that were measured if empty.
    block: whose output is taken, from 1; -1: the last, -2: the one before it.
    dtype: 'float32' or 'bfloat16' to compute states in; '': as the model says.
      Averages are float32.
    species: 'human', 'mouse', 'auto' or 'obs:COLUMN'.
    ids_of: 'human' where mouse cells carry human identifiers.
    layer: 'X', 'raw' or 'layers/NAME'; '' takes the one that looks like counts.
    batch_size: rows that run together over all local devices.
    allow_noninteger: take corrected counts.
    reading: what else a format needs.
    memory_gib: for the averages, over all devices. Groups that do not fit
      together are made one after the other: cells are read once for each
      share of the groups, and run once in all.

  Raises:
    UserError: no such column, gene or block; one group alone needs more than
      `memory_gib`; `path` exists; or as `embeddings.embed_cells`.
  """
  if path is not None:
    path = paths.local(path)
    if not path or os.path.exists(path):
      raise errors.UserError(f'{path!r} exists; give another name')
  pooling = 'cls' if model.config.use_cls else 'mean'  # neither is read
  states = embeddings.StateConfig(pooling, block, dtype, batch_size)
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
  groups = cell_groups.CellGroups.of(stream, by)
  genes = (genes,) if isinstance(genes, str) else genes
  table = token_table.TokenTable.of(stream, genes)
  shares = _shares(
    len(groups.names), len(table), model.config.width, memory_gib
  )
  if len(shares) > 1:
    logging.warning(
      '%s: %d groups of %d genes do not fit in %g GiB together; cells are read '
      '%d times (--memory-gib)',
      *(stream.source.name, len(groups.names), len(table), memory_gib),
      len(shares),
    )
  uns = embeddings.provenance(model, stream, states)
  del uns['pooling']
  uns['groups'] = groups.column
  found = _Found()
  parts = _parts(stream, model, placed, groups, table, shares, batch_size)
  if path is None:
    means, variances = [], []
    for mean_ND, variance_ND in found.noted(parts):
      means.append(mean_ND)
      variances.append(variance_ND)
    empty = np.zeros((0, model.config.width), np.float32)
    return found.result(
      groups, table, uns,
      np.concatenate([empty, *means]), np.concatenate([empty, *variances]),
    )  # fmt: skip
  folder = staging.folder(path)
  try:
    rows = zarr_writer.ZarrRows(folder, model.config.width, ('variance',))
    for mean_ND, variance_ND in found.noted(parts):
      rows.add(mean_ND, variance=variance_ND)
    made = found.result(groups, table, uns, None, None)
    rows.label(made.table(), {'genecompass': uns})
  except BaseException:
    shutil.rmtree(folder)
    raise
  staging.swap(folder, path)
  mean_ND, variance_ND = zarr_writer.rows_of(path, 'variance')
  return dataclasses.replace(made, mean_ND=mean_ND, variance_ND=variance_ND)


class _Found:
  """What the rows are, as they come."""

  def __init__(self):
    self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

  def noted(self, parts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Means and variances of groups, noting what their rows are."""
    for group, count_T, mean_TD, variance_TD in parts:
      (gene_N,) = np.nonzero(count_T)
      group_N = np.full(len(gene_N), group, np.int32)
      rows = group_N, gene_N.astype(np.int32), count_T[gene_N].astype(np.int64)
      self.rows.append(rows)
      yield mean_TD[gene_N], variance_TD[gene_N]

  def result(self, groups, table, uns, mean_ND, variance_ND) -> GeneEmbeddings:
    """All rows as one object."""
    group_N, gene_N, count_N = (
      np.concatenate(parts) for parts in zip(*self.rows)
    )
    return GeneEmbeddings(
      groups.names, groups.column, table,
      group_N, gene_N, count_N, mean_ND, variance_ND, uns,
    )  # fmt: skip


def _shares(
  num_groups: int, num_tokens: int, width: int, memory_gib: float
) -> list[range]:
  """Groups that are averaged in one pass, for all passes."""
  need = num_tokens * (width * _NUMBERS + 1) * 4
  if not memory_gib > 0:  # NaN included
    raise errors.UserError(f'--memory-gib {memory_gib} must be positive')
  fit = int(min(memory_gib * 2**30 / max(need, 1), num_groups))
  if fit < 1:
    raise errors.UserError(
      f'averages of {num_tokens:,} genes x {width} take {need / 2**30:.2g} GiB '
      f'a group, more than the {memory_gib:g} given: raise --memory-gib, or '
      'name fewer genes'
    )
  # As even as may be: every pass reads the file.
  number = -(-num_groups // fit)
  edges = np.linspace(0, num_groups, number + 1).astype(int).tolist()
  return [range(a, b) for a, b in zip(edges, edges[1:])]


def _parts(stream, model, placed, groups, table, shares, batch_size):
  """(group, counts [T], means [T, D], variances [T, D]) of every group."""
  place_V = jnp.asarray(table.place_V(placed.config.vocabulary_size))
  num_rows = placed.num_rows(batch_size)
  num_cells = int((groups.code_C >= 0).sum())
  with progress.Progress(num_cells, 'cells', 'gene embeddings') as bar:
    for share in shares:
      wanted_C = (groups.code_C >= share.start) & (groups.code_C < share.stop)
      sums = _empty_sums(placed, len(share), len(table))
      chunks = model_cells.encode(stream, model, wanted_C)
      for batch in model_batches.of_chunks(chunks, placed.buckets, num_rows):
        group_B = np.full(num_rows, -1, np.int32)
        group_B[: len(batch.index_C)] = (
          groups.code_C[batch.index_C] - share.start
        )
        sums = _added(
          sums,
          placed.params,
          placed.put(batch.cells),
          placed.knowledge,
          place_V,
          group_B,
          placed.config,
          len(table),
          _by_width(placed),
        )
        # Not to run ahead: batches would wait in memory.
        sums['count'].block_until_ready()
        bar.update(len(batch.index_C))
      for group in share:
        yield group, *_finished(sums, group - share.start, len(table))


def _by_width(placed: placed_model.PlacedModel) -> NamedSharding:
  """Averages are shared by width: sums have the same order on any devices."""
  shared = placed.config.width % placed.num_devices == 0
  spec = PartitionSpec(None, 'data') if shared else PartitionSpec()
  return NamedSharding(placed.sharding.mesh, spec)


def _empty_sums(
  placed: placed_model.PlacedModel, num_groups: int, num_tokens: int
) -> dict[str, jax.Array]:
  shape = num_groups * num_tokens, placed.config.width
  by_width = _by_width(placed)
  whole = NamedSharding(by_width.mesh, PartitionSpec())
  sums = {
    name: jnp.zeros(shape, jnp.float32, device=by_width)
    for name in ('mean', 'lost', 'squares')
  }
  return {**sums, 'count': jnp.zeros(shape[:1], jnp.int32, device=whole)}


@functools.partial(jax.jit, static_argnums=(6, 7, 8), donate_argnums=0)
def _added(
  sums, params, batch, knowledge, place_V, group_B, config, num_tokens, by_width
):
  """Mean, compensation and squared deviations with the cells of a batch."""
  hidden_BLD = model_lib.evaluate(config, params, batch, knowledge)
  spec = PartitionSpec(None, *by_width.spec)
  hidden_BLD = jax.lax.with_sharding_constraint(
    hidden_BLD, NamedSharding(by_width.mesh, spec)
  )
  place_BL = jnp.take(place_V, batch.gene_ids_BL)
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL
  is_asked_BL = is_gene_BL & (place_BL >= 0) & (group_B[:, None] >= 0)
  nowhere = sums['count'].shape[0]
  key_BL = jnp.where(
    is_asked_BL, group_B[:, None] * num_tokens + place_BL, nowhere
  )
  # What all devices need whole.
  key_BL = jax.lax.with_sharding_constraint(
    key_BL, NamedSharding(by_width.mesh, PartitionSpec())
  )

  def add_cell(sums, cell):
    # A gene stands once in a cell: no two slots have one key.
    key_L, x_LD = cell

    def old(name):
      return sums[name].at[key_L].get(mode='fill', fill_value=0)

    count_L, mean_LD = old('count') + 1, old('mean')
    delta_LD = x_LD - mean_LD
    step_LD = delta_LD / count_L[:, None].astype(jnp.float32) - old('lost')
    new_LD = mean_LD + step_LD
    changed = {
      'count': count_L,
      'mean': new_LD,
      'lost': (new_LD - mean_LD) - step_LD,
      'squares': old('squares') + delta_LD * (x_LD - new_LD),
    }
    return {
      name: sums[name].at[key_L].set(changed[name], mode='drop')
      for name in sums
    }, None

  return jax.lax.scan(add_cell, sums, (key_BL, hidden_BLD))[0]


def _finished(sums, group, num_tokens):
  """Counts, means and variances of one group, on the host."""
  count_T, mean_TD, squares_TD = map(
    np.asarray, _group_of(sums, group, num_tokens)
  )
  with np.errstate(invalid='ignore', divide='ignore'):
    variance_TD = squares_TD / (count_T - 1)[:, None].astype(np.float32)
  variance_TD[count_T < 2] = np.nan
  return count_T, mean_TD, variance_TD


@functools.partial(jax.jit, static_argnums=2)
def _group_of(sums, group, num_tokens):
  return tuple(
    jax.lax.dynamic_slice_in_dim(sums[name], group * num_tokens, num_tokens)
    for name in ('count', 'mean', 'squares')
  )
