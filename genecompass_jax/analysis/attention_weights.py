"""Attention weights of single blocks, for the queries and keys that are asked.

Queries and keys are made anew from the states before a block, by the weights of
the block: the network is not changed and has no second copy. A softmax is over
all slots of a cell, CLS included, and exists for some queries at a time.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import (
  chunked_attention,
  errors,
  knowledge as knowledge_lib,
  layers as layers_lib,
  model as model_lib,
  schemas,
)

_QUERIES = 64  # whose weights exist at a time, in every row and head


def head_numbers(heads: str | Sequence[int], num_heads: int) -> tuple[int, ...]:
  """Numbers of the heads; none for their mean.

  Args:
    heads: 'mean', 'all' or numbers from 0.
    num_heads: of the model.

  Raises:
    UserError: no such heads.
  """
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


def slots_of(
  batch: schemas.CellBatch, token_A: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Slots of genes, [B, A]: 0 where a row has not the gene; and whether."""
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL

  def of_gene(token):
    is_it_BL = is_gene_BL & (batch.gene_ids_BL == token)
    return jnp.argmax(is_it_BL, axis=1), is_it_BL.any(axis=1)

  slot_AB, has_AB = jax.lax.map(of_gene, token_A)
  return slot_AB.T, has_AB.T


@dataclasses.dataclass(frozen=True)
class Block:
  """What the attention of one block is made of.

  Attributes:
    query_BLHK: of every slot, of the heads that are asked.
    key_BLHK: likewise.
    hidden_BL: float32, added to scores: very low where a slot is not looked at.
    is_mean: whether weights are averaged over the heads.
  """

  query_BLHK: jax.Array
  key_BLHK: jax.Array
  hidden_BL: jax.Array
  is_mean: bool

  def weights(
    self, slot_BQ: jax.Array, slot_BA: jax.Array | None = None
  ) -> jax.Array:
    """Softmax weights, float32 [B, H, Q, A].

    Args:
      slot_BQ: slots of the queries.
      slot_BA: slots of the keys whose weights are returned; None: all.
    """
    rows_B1 = jnp.arange(len(slot_BQ))[:, None]
    number = -(-slot_BQ.shape[1] // _QUERIES)
    padding = number * _QUERIES - slot_BQ.shape[1]
    slot_NBC = jnp.moveaxis(
      jnp.pad(slot_BQ, ((0, 0), (0, padding))).reshape(-1, number, _QUERIES),
      1,
      0,
    )

    def some(slot_BC):
      scores_BHCL = jnp.einsum(
        'BCHK,BLHK->BHCL',
        self.query_BLHK[rows_B1, slot_BC],
        self.key_BLHK,
        preferred_element_type=jnp.float32,
      ) / math.sqrt(self.query_BLHK.shape[-1])
      probs_BHCL = jax.nn.softmax(
        scores_BHCL + self.hidden_BL[:, None, None], -1
      )
      if self.is_mean:
        probs_BHCL = probs_BHCL.mean(1, keepdims=True)
      if slot_BA is None:
        return probs_BHCL
      return jnp.take_along_axis(probs_BHCL, slot_BA[:, None, None], axis=-1)

    found_NBHCA = jax.lax.map(some, slot_NBC)
    found_BHNCA = jnp.moveaxis(found_NBHCA, 0, 2)
    found_BHQA = found_BHNCA.reshape(
      *found_BHNCA.shape[:2], number * _QUERIES, -1
    )
    return found_BHQA[:, :, : slot_BQ.shape[1]]


def blocks(
  params: model_lib.Params,
  batch: schemas.CellBatch,
  knowledge: knowledge_lib.Knowledge,
  config: model_lib.ModelConfig,
  numbers: Sequence[int],
  heads: Sequence[int],
) -> list[Block]:
  """The asked blocks, in their order.

  To be called, as `Block.weights`, under `model_lib.full_precision`.

  Args:
    params: of the model, with as many blocks as the last that is asked.
    batch: one cell a row.
    knowledge: prior tables.
    config: of the model.
    numbers: of the blocks, from 1, ascending.
    heads: from `head_numbers`.
  """
  found, network = [], model_lib.bind(config, params)
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
      found.append(_block(x_BLD, segments_BL, block, config, heads))
    if index + 1 < numbers[-1]:
      x_BLD, _ = model_lib.encoder_block(
        x_BLD, None, segments_BL, block, config, None
      )
  return found


def _block(x_BLD, segments_BL, block, config, heads) -> Block:
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

  # Queries are of the cell of the row: padding is looked at by nobody.
  hidden_BL = chunked_attention.added_to_scores(
    jnp.ones_like(segments_BL[:, :1]), segments_BL
  )[:, 0]
  return Block(project('query'), project('key'), hidden_BL, not heads)
