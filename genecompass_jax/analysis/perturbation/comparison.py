"""Unperturbed cells and their variants, run and compared on the devices.

States of single deletions differ by about a thousandth: pooled vectors are
summed, and all distances taken, in float32, and 1 - cosine is half the squared
distance of unit vectors, whose rounding does not grow with the vectors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from genecompass_jax import model as model_lib, schemas
from genecompass_jax.analysis import placed_model

Array = jax.Array

NOT_COMPARED = -1.0  # no response is negative


class Base(NamedTuple):
  """C unperturbed cells of one bucket, whole on every device.

  Attributes:
    hidden_CLD: float32 states of the last block.
    gene_ids_CM: int32 tokens, of M = L + 1 slots: where a cell was cut, the
      gene behind the cut stands behind its last one.
    values_CM: float32 likewise.
    is_scored_CM: bool likewise: genes whose states are compared; those that a
      question leaves out are not.
    length_C: int32 genes that the model sees.
    stored_C: int32 genes in `gene_ids_CM`: one more where the cell was cut.
  """

  hidden_CLD: Array
  gene_ids_CM: Array
  values_CM: Array
  is_scored_CM: Array
  length_C: Array
  stored_C: Array


class Compared(NamedTuple):
  """What B variants did, float32; see `effects` for the signs.

  Attributes:
    shift_B: of the pooled state; NaN where it is the mean over shared genes
      that are scored, and there are none.
    gene_shift_B: mean over these genes; NaN where there are none.
    toward_B: along the axis; NaN without one, and as `shift_B`.
    response_BL: of every such gene's state, `NOT_COMPARED` in other slots;
      None if not asked.
  """

  shift_B: Array
  gene_shift_B: Array
  toward_B: Array
  response_BL: Array | None


def states(placed: placed_model.PlacedModel, batch: schemas.CellBatch) -> Array:
  """States of the last block of all slots, whole on every device."""
  whole = jax.sharding.NamedSharding(placed.sharding.mesh, PartitionSpec())
  hidden_BLD = _states(
    placed.params, placed.put(batch), placed.knowledge, placed.config
  )
  return jax.device_put(hidden_BLD, whole)


def compare(
  placed: placed_model.PlacedModel,
  base: Base,
  variants: schemas.CellBatch,
  base_row_B: Array,
  base_slot_BL: Array,
  axis_D: Array | None,
  *,
  pooling: str,
  responses: bool,
) -> Compared:
  """Runs variants that were encoded on the host, and compares them."""
  return _compare_given(
    placed.params,
    placed.knowledge,
    base,
    placed.put(variants),
    jax.device_put(base_row_B, placed.sharding),
    jax.device_put(base_slot_BL, placed.sharding),
    axis_D,
    placed.config,
    pooling,
    responses,
  )


def compare_deletions(
  placed: placed_model.PlacedModel,
  base: Base,
  base_row_B: Array,
  rank_B: Array,
  species: int,
  axis_D: Array | None,
  *,
  pooling: str,
  responses: bool,
) -> Compared:
  """Deletes the gene of one rank from a cell a row; variants are made there.

  Args:
    placed: the model.
    base: unperturbed cells.
    base_row_B: int32 row of the cell in `base`.
    rank_B: int32 rank of the gene that is deleted, from 0.
    species: code of the cells.
    axis_D: unit vector from start to goal; None: no axis.
    pooling: 'cls' or 'mean'.
    responses: give those of single genes.
  """
  return _compare_deleted(
    placed.params,
    placed.knowledge,
    base,
    jax.device_put(base_row_B, placed.sharding),
    jax.device_put(rank_B, placed.sharding),
    axis_D,
    placed.config,
    placed.sharding,
    species,
    pooling,
    responses,
  )


def deleted(
  base: Base, base_row_B: Array, rank_B: Array, species: int
) -> tuple[schemas.CellBatch, Array]:
  """Cells without one gene, and the slots that the others had: [B, L].

  Deletion changes no other scaled count and no tie: what is behind the gene
  moves up by one, and the gene behind the cut comes in.
  """
  L = base.hidden_CLD.shape[1]
  slot_L = jnp.arange(L)
  from_BL = slot_L + (slot_L[None] > rank_B[:, None])  # slot is rank + 1
  kept_B = jnp.minimum(base.stored_C - 1, base.length_C)[base_row_B]
  is_cell_BL = slot_L[None] <= kept_B[:, None]
  is_gene_BL = is_cell_BL & (slot_L > 0)[None]

  def taken(array_CM):
    found_BL = jnp.take_along_axis(array_CM[base_row_B], from_BL, axis=1)
    return jnp.where(is_gene_BL, found_BL, 0)

  batch = schemas.CellBatch(
    gene_ids_BL=taken(base.gene_ids_CM),
    values_BL=taken(base.values_CM),
    positions_BL=jnp.where(is_gene_BL, slot_L[None] - 1, 0),
    segments_BL=is_cell_BL.astype(jnp.int32),
    species_BL=jnp.where(is_cell_BL, species, 0),
    is_cls_BL=jnp.broadcast_to((slot_L == 0)[None], from_BL.shape),
  )
  was_there_BL = from_BL <= base.length_C[base_row_B][:, None]
  return batch, jnp.where(is_cell_BL & was_there_BL, from_BL, -1)


def pool(hidden_BLD: Array, weights_BL: Array, pooling: str) -> Array:
  """Pooled states as unit vectors, float32 [B, D].

  Args:
    hidden_BLD: states, CLS first.
    weights_BL: 1 for the genes that 'mean' is taken over, else 0.
    pooling: 'cls' or 'mean'.
  """
  if pooling == 'cls':
    pooled_BD = hidden_BLD[:, 0]
  else:
    # A mean; the length of the sum does not matter to a unit vector.
    pooled_BD = jnp.einsum(
      'BLD,BL->BD',
      hidden_BLD,
      weights_BL,
      precision=jax.lax.Precision.HIGHEST,
    )
  return unit(pooled_BD)


def unit(x_BD: Array) -> Array:
  """Vectors of length 1; those of zeros stay zeros."""
  squares = jnp.sum(x_BD * x_BD, axis=-1, keepdims=True)
  return x_BD * jax.lax.rsqrt(jnp.maximum(squares, 1e-30))


@functools.partial(jax.jit, static_argnums=3)
def _states(params, batch, knowledge, config):
  return model_lib.evaluate(config, params, batch, knowledge)


@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def _compare_given(
  params,
  knowledge,
  base,
  batch,
  base_row_B,
  base_slot_BL,
  axis_D,
  config,
  pooling,
  responses,
):
  hidden_BLD = model_lib.evaluate(config, params, batch, knowledge)
  return _differences(
    hidden_BLD, base, base_row_B, base_slot_BL, axis_D, pooling, responses
  )


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10))
def _compare_deleted(
  params,
  knowledge,
  base,
  base_row_B,
  rank_B,
  axis_D,
  config,
  rows_sharding,
  species,
  pooling,
  responses,
):
  batch, base_slot_BL = deleted(base, base_row_B, rank_B, species)
  batch = jax.lax.with_sharding_constraint(batch, rows_sharding)
  hidden_BLD = model_lib.evaluate(config, params, batch, knowledge)
  return _differences(
    hidden_BLD, base, base_row_B, base_slot_BL, axis_D, pooling, responses
  )


def _differences(
  hidden_BLD, base, base_row_B, base_slot_BL, axis_D, pooling, responses
) -> Compared:
  before_BL = base_row_B[:, None], jnp.maximum(base_slot_BL, 0)
  is_shared_BL = (base_slot_BL > 0) & base.is_scored_CM[before_BL]
  is_shared_BL = is_shared_BL.astype(jnp.float32)
  before_BLD = base.hidden_CLD[before_BL]
  apart_BLD = unit(hidden_BLD) - unit(before_BLD)
  response_BL = 0.5 * jnp.sum(apart_BLD * apart_BLD, axis=-1) * is_shared_BL
  apart_BD = pool(hidden_BLD, is_shared_BL, pooling) - pool(
    before_BLD, is_shared_BL, pooling
  )
  if axis_D is None:
    toward_B = jnp.full(len(base_row_B), jnp.nan, jnp.float32)
  else:
    toward_B = jnp.sum(apart_BD * axis_D, axis=-1)
  shift_B = 0.5 * jnp.sum(apart_BD * apart_BD, axis=-1)
  shared_B = is_shared_BL.sum(-1)
  if pooling != 'cls':
    # Of a cell of which nothing is left there is no mean, and no effect of 0.
    shift_B, toward_B = (
      jnp.where(shared_B > 0, x_B, jnp.nan) for x_B in (shift_B, toward_B)
    )
  return Compared(
    shift_B=shift_B,
    gene_shift_B=response_BL.sum(-1) / shared_B,
    toward_B=toward_B,
    response_BL=(
      jnp.where(is_shared_BL > 0, response_BL, NOT_COMPARED)
      if responses
      else None
    ),
  )
