"""Whom genes look at: attention, averaged over cells, never held whole.

The attention of a cell takes heads x genes x genes numbers a layer. Here the
queries of the asked genes and of the CLS slot alone are compared with the keys
of a cell (`attention_weights`), and only sums over cells are kept:

  gene to gene  mean weight that gene a gives to gene b, over the cells of a
                group that have both
  CLS to gene   mean weight that the CLS slot gives to a gene, over the cells
                of a group that have it

Weights of all slots of a cell, CLS included, sum to 1; so in cells of more genes
they are smaller, and groups of cells of other lengths differ by that alone
(`mean_slots_G` is there to see it). Attention is no measure of regulation.
"""

import dataclasses
import functools
from collections.abc import Sequence
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
)
from genecompass_jax.analysis import (
  attention_weights,
  cell_groups,
  embeddings,
  model_batches,
  model_cells,
  placed_model,
  token_table,
)
from genecompass_jax.prepare import sources

MEMORY_GIB = 2.0


@dataclasses.dataclass(frozen=True)
class AttentionSummary:
  """Mean attention over cells: N layers, H heads, G groups, A genes.

  Attributes:
    layers: numbers of the blocks, from 1.
    heads: of each layer: numbers from 0, or ('mean',).
    groups: names of the groups.
    genes: the A genes.
    gene_NHGAA: float32 weight that the first gene gives to the second, NaN
      where no cell has both.
    pairs_GAA: int64 cells that have both.
    cls_NHGA: float32 weight that CLS gives to a gene, NaN where no cell has
      it; None for a model without CLS.
    cells_GA: int64 cells that have the gene.
    mean_slots_G: mean number of slots, CLS included, of the cells of a group:
      even attention would be 1 / slots.
    uns: where the numbers come from.
  """

  layers: tuple[int, ...]
  heads: tuple[int | str, ...]
  groups: tuple[str, ...]
  genes: token_table.TokenTable
  gene_NHGAA: np.ndarray
  pairs_GAA: np.ndarray
  cls_NHGA: np.ndarray | None
  cells_GA: np.ndarray
  mean_slots_G: np.ndarray
  uns: dict[str, Any]

  def __repr__(self) -> str:
    return (
      f'AttentionSummary({len(self.genes):,} genes, layers {self.layers}, heads '
      f'{self.heads}, {len(self.groups)} groups; .table() gives the weights)'
    )

  def table(self) -> pd.DataFrame:
    """One row a layer, head, group and pair that occurs; from 'CLS' too.

    Columns: layer, head, group, from, to (symbols), weight, n_cells.
    """
    symbols = np.array(
      [s or g for s, g in zip(self.genes.symbols, self.genes.gene_ids)], object
    )
    frames = []
    for n, layer in enumerate(self.layers):
      for h, head in enumerate(self.heads):
        for g, group in enumerate(self.groups):
          facts = {'layer': layer, 'head': head, 'group': group}
          a, b = np.nonzero(self.pairs_GAA[g])
          parts = [
            (symbols[a], symbols[b], self.gene_NHGAA[n, h, g, a, b],
             self.pairs_GAA[g, a, b])
          ]  # fmt: skip
          if self.cls_NHGA is not None:
            (b,) = np.nonzero(self.cells_GA[g])
            parts.append(
              (np.full(len(b), 'CLS', object), symbols[b],
               self.cls_NHGA[n, h, g, b], self.cells_GA[g, b])
            )  # fmt: skip
          for source, target, weight, number in parts:
            columns = {'from': source, 'to': target, 'weight': weight}
            frames.append(pd.DataFrame({**facts, **columns, 'n_cells': number}))
    return pd.concat(frames, ignore_index=True)


def attention_summary(
  data: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  genes: Sequence[str],
  by: str = '',
  *,
  layers: Sequence[int] = (-1,),
  heads: str | Sequence[int] = 'mean',
  dtype: str = '',
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  batch_size: int = 32,
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
  memory_gib: float = MEMORY_GIB,
) -> AttentionSummary:
  """Averages attention among some genes over the cells of each group.

  Args:
    data: cells with counts; a file is streamed.
    model: a restored model.
    genes: by any identifier; all others are looked at as well, unnamed.
    by: obs column of the groups; '' is one group of all cells.
    layers: blocks, from 1; -1: the last. (`layer` is a matrix of counts.)
    heads: 'mean', their mean; 'all'; or numbers from 0.
    dtype: 'float32' or 'bfloat16' to compute states in; '': as the model says.
      Weights are float32.
    species: 'human', 'mouse', 'auto' or 'obs:COLUMN'.
    ids_of: 'human' where mouse cells carry human identifiers.
    layer: 'X', 'raw' or 'layers/NAME'; '' takes the one that looks like counts.
    batch_size: rows that run together over all local devices.
    allow_noninteger: take corrected counts.
    reading: what else a format needs.
    memory_gib: for weights of a batch and their sums.

  Raises:
    UserError: no genes, or more than fit into `memory_gib`; no such gene, column, block or head; or as
      `embeddings.embed_cells`.
  """
  config = model.config
  layers = np.atleast_1d(layers).tolist()
  numbers = tuple(
    sorted({placed_model.block_number(config, b) for b in layers})
  )
  head_numbers = attention_weights.head_numbers(heads, config.num_heads)
  if not len(genes) or not numbers or isinstance(genes, str):
    raise errors.UserError('attention: give a list of genes, and of layers')
  errors.check_whole(batch_size=batch_size)
  if batch_size < 1:
    raise errors.UserError(f'batch size {batch_size} must be positive')
  stream = model_cells.open_cells(
    data,
    model,
    reading,
    species=species,
    ids_of=ids_of,
    layer=layer,
    allow_noninteger=allow_noninteger,
  )
  table = token_table.TokenTable.of(stream, genes)
  groups = cell_groups.CellGroups.of(stream, by)
  placed = placed_model.place(model, dtype=dtype, block=numbers[-1])
  rows, num_groups = placed.num_rows(batch_size), len(groups.names)
  # Weights of a batch; sums of a batch, here and there; all sums in float64.
  copies = rows + len(numbers) * (2 * min(rows, num_groups) + 2 * num_groups)
  need = 4 * copies * (len(head_numbers) or 1) * len(table) ** 2 / 2**30
  if not need <= memory_gib:  # NaN included
    raise errors.UserError(
      f'attention among {len(table):,} genes in {num_groups} groups takes '
      f'{need:.2g} GiB, more than the {memory_gib:g} given: name fewer genes, '
      'layers or heads, or raise memory_gib'
    )
  sums = _summed(
    stream, model, placed, groups, table, numbers, head_numbers, batch_size
  )
  pairs_GAA, cells_GA = (
    sums[name].astype(np.int64) for name in ('pairs', 'cells')
  )
  with np.errstate(invalid='ignore'):
    gene_NHGAA = (sums['genes'] / pairs_GAA).astype(np.float32)
    cls_NHGA = (sums['cls'] / cells_GA).astype(np.float32)
    mean_slots_G = sums['slots'] / sums['all']
  last = embeddings.StateConfig(block=numbers[-1], dtype=dtype)
  uns = embeddings.provenance(model, stream, last)
  for name in ('pooling', 'block'):
    del uns[name]
  return AttentionSummary(
    layers=numbers,
    heads=head_numbers or ('mean',),
    groups=groups.names,
    genes=table,
    gene_NHGAA=gene_NHGAA,
    pairs_GAA=pairs_GAA,
    cls_NHGA=cls_NHGA if config.use_cls else None,
    cells_GA=cells_GA,
    mean_slots_G=mean_slots_G,
    uns=uns,
  )


def _summed(
  stream, model, placed, groups, table, numbers, heads, batch_size
) -> dict[str, np.ndarray]:
  """Sums over the cells of each group, float64."""
  num_rows = placed.num_rows(batch_size)
  whole = NamedSharding(placed.sharding.mesh, PartitionSpec())
  token_A = jax.device_put(table.token_T, whole)
  sums: dict[str, Any] = {}
  wanted_C = groups.code_C >= 0
  chunks = model_cells.encode(stream, model, wanted_C)
  with progress.Progress(int(wanted_C.sum()), 'cells', 'attention') as bar:
    for batch in model_batches.of_chunks(chunks, placed.buckets, num_rows):
      # Of few cells a batch holds few groups: the others need no sums.
      code_B = groups.code_C[batch.index_C]
      present, local_B = np.unique(code_B, return_inverse=True)
      group_B = np.full(num_rows, -1, np.int32)
      group_B[: len(local_B)] = local_B
      found = _sums_of(
        placed.params,
        placed.put(batch.cells),
        placed.knowledge,
        token_A,
        group_B,
        placed.config,
        min(num_rows, len(groups.names)),
        numbers,
        heads,
      )
      for name, x in found.items():
        # Groups are the first axis here.
        x = np.asarray(x, np.float64)
        if name not in sums:
          sums[name] = np.zeros((len(groups.names), *x.shape[1:]))
        sums[name][present] += x[: len(present)]
      bar.update(len(batch.index_C))
  return {
    name: np.moveaxis(x, 0, 2) if name in ('genes', 'cls') else x
    for name, x in sums.items()
  }


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _sums_of(
  params, batch, knowledge, token_A, group_B, config, num_groups, numbers, heads
):
  """Sums of a batch, groups first: of weights, and of cells."""
  slot_BA, has_BA = attention_weights.slots_of(batch, token_A)
  slot_BQ = jnp.pad(slot_BA, ((0, 0), (1, 0)))  # CLS stands in slot 0
  is_of_BG = (group_B[:, None] == jnp.arange(num_groups)).astype(jnp.float32)
  both_BAA = has_BA[:, :, None] & has_BA[:, None, :]
  genes, cls = [], []
  with model_lib.full_precision(config):
    weights_NBHQA = [
      block.weights(slot_BQ, slot_BA)
      for block in attention_weights.blocks(
        params, batch, knowledge, config, numbers, heads
      )
    ]
  for weights_BHQA in weights_NBHQA:
    cls_BHA = jnp.where(has_BA[:, None], weights_BHQA[:, :, 0], 0.0)
    pair_BHAA = jnp.where(both_BAA[:, None], weights_BHQA[:, :, 1:], 0.0)
    genes.append(_by_group('BG,BHAC->GHAC', is_of_BG, pair_BHAA))
    cls.append(_by_group('BG,BHA->GHA', is_of_BG, cls_BHA))
  num_slots_B = jnp.sum(
    (batch.segments_BL > 0) & (config.use_cls | ~batch.is_cls_BL), axis=1
  )
  return {
    'genes': jnp.stack(genes, 1),
    'cls': jnp.stack(cls, 1),
    'pairs': _by_group('BG,BAC->GAC', is_of_BG, both_BAA),
    'cells': _by_group('BG,BA->GA', is_of_BG, has_BA),
    'slots': _by_group('BG,B->G', is_of_BG, num_slots_B),
    'all': is_of_BG.sum(0),
  }


def _by_group(equation, is_of_BG, x_B):
  return jnp.einsum(
    equation,
    is_of_BG,
    x_B.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
