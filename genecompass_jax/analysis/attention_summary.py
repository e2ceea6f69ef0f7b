"""Whom genes look at: attention, averaged over cells, never held whole.

The attention of a cell takes heads x genes x genes numbers a layer. Here the
queries of the asked genes and of the CLS slot alone are compared with the keys
of a cell, some at a time, and only sums over cells are kept:

  gene to gene  mean weight that gene a gives to gene b, over the cells of a
                group that have both
  CLS to gene   mean weight that the CLS slot gives to a gene, over the cells
                of a group that have it

Queries and keys are made anew from the states before a block, by the weights of
the block: the network is not changed and has no second copy. Weights of all
slots of a cell, CLS included, sum to 1; so in cells of more genes they are
smaller, and groups of cells of other lengths differ by that alone
(`mean_slots_G` is there to see it). Attention is no measure of regulation.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import (
  chunked_attention,
  errors,
  layers as layers_lib,
  model as model_lib,
  paths,
  pretrained,
  progress,
)
from genecompass_jax.analysis import (
  cell_groups,
  embeddings,
  model_batches,
  model_cells,
  placed_model,
  token_table,
)
from genecompass_jax.prepare import sources

_QUERIES = 64  # whose weights exist at a time, in every row and head
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
  head_numbers = _head_numbers(heads, config.num_heads)
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


def _head_numbers(
  heads: str | Sequence[int], num_heads: int
) -> tuple[int, ...]:
  """Numbers of the heads; none for their mean."""
  if isinstance(heads, str) and heads in ('mean', 'all'):
    return () if heads == 'mean' else tuple(range(num_heads))
  heads = heads if isinstance(heads, str) else np.atleast_1d(heads).tolist()
  if isinstance(heads, str) or not heads:
    raise errors.UserError(f"heads {heads!r}: give 'mean', 'all' or numbers")
  for head in heads:
    errors.check_whole(head=head)
  if not all(0 <= h < num_heads for h in heads):
    raise errors.UserError(
      f'heads {list(heads)}: this model has 0 to {num_heads - 1}'
    )
  return tuple(heads)


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
  slot_BA, has_BA = _slots_of(batch, token_A)
  is_of_BG = (group_B[:, None] == jnp.arange(num_groups)).astype(jnp.float32)
  both_BAA = has_BA[:, :, None] & has_BA[:, None, :]
  genes, cls = [], []
  with model_lib.full_precision(config):
    asked = params, batch, knowledge, slot_BA, config, numbers, heads
    weights_NBHQA = list(_weights(*asked))
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


def _slots_of(batch, token_A):
  """Slot of every asked gene in every row (0 where it is not), and whether."""
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL

  def of_gene(token):
    is_it_BL = is_gene_BL & (batch.gene_ids_BL == token)
    return jnp.argmax(is_it_BL, axis=1), is_it_BL.any(axis=1)

  slot_AB, has_AB = jax.lax.map(of_gene, token_A)
  return slot_AB.T, has_AB.T


def _weights(params, batch, knowledge, slot_BA, config, numbers, heads):
  """[B, H, 1 + A, A] of each asked layer: CLS and genes as queries."""
  network = model_lib.bind(config, params)
  segments_BL = batch.segments_BL
  if not config.use_cls:
    segments_BL = jnp.where(batch.is_cls_BL, 0, segments_BL)
  x_BLD = network.embedding(
    batch,
    knowledge,
    prior_scale=np.float32(config.prior_scale),
    dropout_keys_B=None,
  )
  shared = ('final_norm',)
  stacked = {k: v for k, v in params['encoder'].items() if k not in shared}
  for index in range(numbers[-1]):
    block = jax.tree.map(lambda x: x[index], stacked)  # noqa: B023
    if index + 1 in numbers:
      yield _block_weights(x_BLD, segments_BL, block, slot_BA, config, heads)
    if index + 1 < numbers[-1]:
      x_BLD, _ = model_lib.encoder_block(
        x_BLD, None, segments_BL, block, config, None
      )


def _block_weights(x_BLD, segments_BL, block, slot_BA, config, heads):
  """Softmax weights of one block, some queries at a time."""
  if config.norm_order == 'pre':
    x_BLD = layers_lib.layer_norm(
      x_BLD, block['attention_norm'], config.norm_epsilon
    )

  def project(name):
    x_BLHK = layers_lib.product(
      'BLD,DHK->BLHK',
      x_BLD,
      block[name]['kernel'],
      block[name]['bias'],
      precision=config.precision,
    )
    return x_BLHK[:, :, list(heads)] if heads else x_BLHK

  query_BLHK, key_BLHK = project('query'), project('key')
  rows_B1 = jnp.arange(len(x_BLD))[:, None]
  slot_BQ = jnp.pad(slot_BA, ((0, 0), (1, 0)))  # CLS stands in slot 0
  number = -(-slot_BQ.shape[1] // _QUERIES)
  padding = number * _QUERIES - slot_BQ.shape[1]
  slot_NBC = jnp.pad(slot_BQ, ((0, 0), (0, padding))).reshape(
    -1, number, _QUERIES
  )
  # Queries are of the cell of the row: padding is looked at by nobody.
  hidden_BL = chunked_attention.added_to_scores(
    jnp.ones_like(segments_BL[:, :1]), segments_BL
  )[:, 0]

  def some(slot_BC):
    scores_BHCL = jnp.einsum(
      'BCHK,BLHK->BHCL',
      query_BLHK[rows_B1, slot_BC],
      key_BLHK,
      preferred_element_type=jnp.float32,
    ) / math.sqrt(config.head_dim)
    probs_BHCL = jax.nn.softmax(scores_BHCL + hidden_BL[:, None, None], -1)
    if not heads:
      probs_BHCL = probs_BHCL.mean(1, keepdims=True)
    return jnp.take_along_axis(probs_BHCL, slot_BA[:, None, None], axis=-1)

  found_NBHCA = jax.lax.map(some, jnp.moveaxis(slot_NBC, 1, 0))
  found_BHNCA = jnp.moveaxis(found_NBHCA, 0, 2)
  found_BHQA = found_BHNCA.reshape(
    *found_BHNCA.shape[:2], number * _QUERIES, -1
  )
  return found_BHQA[:, :, : slot_BQ.shape[1]]
