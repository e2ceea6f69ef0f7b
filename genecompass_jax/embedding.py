"""What a slot holds -> the encoder's input: the knowledge embedding.

Word vector, expression value and projected priors of a gene are concatenated
and fused (linear, LayerNorm, quick GELU, linear), position by rank is added,
and a species vector stands before the genes as CLS. The concatenation is kept
as one block of the fusion kernel a part: 3,841 columns divide by no useful
number of devices.

Two maps follow each other without anything between them: the projection of a
prior and its block of the fusion kernel. Training multiplies the two matrices
once a step and every slot by the product. Inference goes further and does the
whole linear part once for every gene (`fold`).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from genecompass_jax import (
  knowledge as knowledge_lib,
  layers,
  model_config,
  schemas,
  sharding,
  vocabulary as vocabulary_lib,
)

Array = jax.Array
Tables = knowledge_lib.Knowledge | knowledge_lib.Folded | knowledge_lib.AtSlots

# torch's default LayerNorm epsilon, which the release has in the fusion block.
FUSION_EPSILON = 1e-5


class Prior(nnx.Module):
  """Projection of one knowledge table to the model's width."""

  def __init__(
    self,
    width_in: int,
    config: model_config.ModelConfig,
    *,
    rngs: nnx.Rngs,
  ):
    """Parameters for a table of `width_in` columns."""
    shape = (width_in, config.width)
    self.project = layers.Linear(shape, ('prior', 'embed'), rngs=rngs)
    if config.missing_prior == 'learned':
      # Zeros: training starts at the released treatment and departs from it.
      self.missing = layers.constant(0.0, (width_in,), ('prior',))


class KnowledgeEmbedding(nnx.Module):
  """Gene, value, priors, rank and species -> the encoder's input."""

  def __init__(self, config: model_config.ModelConfig, *, rngs: nnx.Rngs):
    """Parameters of the embedding; see `ModelConfig`."""
    self.config = config
    width, V = config.width, config.vocabulary_size
    self.word = layers.normal((V, width), ('vocab', 'embed'), rngs)
    self.word.set_value(self.word.get_value().at[vocabulary_lib.PAD].set(0.0))
    self.priors = nnx.Dict(
      {name: Prior(size, config, rngs=rngs) for name, size in config.priors}
    )
    square, axes = (width, width), ('embed', 'hidden')
    std = config.hidden_std
    self.fuse_word = layers.normal(square, axes, rngs, std)
    if config.use_values:
      self.fuse_value = layers.normal((width,), ('hidden',), rngs)
    self.fuse_priors = nnx.Dict(
      {
        name: layers.normal(square, axes, rngs, std)
        for name, _ in config.priors
      }
    )
    self.fuse_bias = layers.constant(0.0, (width,), ('hidden',))
    self.fuse_norm = layers.Norm(width)
    self.fuse_project = layers.Linear(
      square, ('hidden', 'embed'), rngs=rngs, std=std
    )
    self.position = layers.normal(
      (config.max_genes, width), ('position', 'embed'), rngs
    )
    # Row 0 is added everywhere and row 1 never used, as in the release.
    self.token_type = layers.normal((2, width), (None, 'embed'), rngs)
    self.norm = layers.Norm(width)
    if config.hides_ranks:
      # Zeros draw nothing: all else starts as in a model without it.
      self.rank_hidden = layers.constant(0.0, (width,), ('embed',))
    if config.use_cls:
      shape = (config.num_species, width)
      self.cls = layers.normal(shape, (None, 'embed'), rngs)

  def __call__(
    self,
    batch: schemas.CellBatch,
    knowledge: Tables,
    *,
    prior_scale: Array | float,
    dropout_keys_B: Array | None,
    retreat_BL: Array | None = None,
  ) -> Array:
    """Embeds every slot: x_BLD in the precision of the model.

    `retreat_BL` is that of `schemas.Gates`.
    """
    config = self.config
    x_BLD = self.fused(
      jnp.asarray(batch.gene_ids_BL),
      jnp.asarray(batch.values_BL),
      jnp.asarray(batch.species_BL),
      knowledge,
      prior_scale=prior_scale,
    )
    positions_BL = jnp.asarray(batch.positions_BL)

    def placed(positions_BL):
      place_BLD = self._positions(positions_BL) + self.token_type[0]
      return layers.layer_norm(
        x_BLD, self.norm, config.norm_epsilon, add=place_BLD
      )

    embedded_BLD = placed(positions_BL)
    if retreat_BL is not None:
      higher_BLD = placed(jnp.maximum(positions_BL - 1, 0))
      embedded_BLD += retreat_BL[..., None] * (higher_BLD - embedded_BLD)
    x_BLD = layers.dropout(embedded_BLD, config.hidden_dropout, dropout_keys_B)
    if config.use_cls:
      # After norm and dropout, and without a position, as in the release.
      cls_BLD = self.cls_vectors(batch.species_BL)
      is_cls_BL1 = jnp.asarray(batch.is_cls_BL)[..., None]
      x_BLD = jnp.where(is_cls_BL1, cls_BLD.astype(x_BLD.dtype), x_BLD)
    return sharding.constrain_slots(x_BLD)

  def cls_vectors(self, species_BL: Array) -> Array:
    """The species vector of each slot, float32 [B, L, D]."""
    return _rows(self.cls[...], jnp.asarray(species_BL))

  def _positions(self, positions_BL: Array) -> Array:
    """Vector of each rank, or that of a hidden one: [B, L, D]."""
    position_BLD = _rows(self.position[...], positions_BL)
    if not self.config.hides_ranks:
      return position_BLD
    is_hidden_BL = positions_BL < 0
    return jnp.where(
      is_hidden_BL[..., None], self.rank_hidden[...], position_BLD
    )

  def fused(
    self,
    gene_ids_BL: Array,
    values_BL: Array,
    species_BL: Array,
    knowledge: Tables,
    *,
    prior_scale: Array | float = 1.0,
  ) -> Array:
    """Word, value and priors of each slot, fused: [B, L, D].

    Args:
      gene_ids_BL: tokens.
      values_BL: log2 values.
      species_BL: species codes.
      knowledge: prior tables, or what `fold` or `linear_part` made of them
        with these parameters, for the same `prior_scale`.
      prior_scale: factor on projected priors, bias included.
    """
    config = self.config
    if isinstance(knowledge, knowledge_lib.Folded):
      x_BLD = jnp.asarray(knowledge.table_SVD)[species_BL, gene_ids_BL]
    elif isinstance(knowledge, knowledge_lib.AtSlots):
      x_BLD = jnp.asarray(knowledge.sum_BLD)
    else:
      x_BLD = self.linear_part(gene_ids_BL, species_BL, knowledge, prior_scale)
    x_BLD = sharding.constrain_slots(x_BLD)
    if config.use_values:
      x_BLD += values_BL[..., None] * self.fuse_value[...]
    x_BLD = layers.layer_norm(
      x_BLD.astype(config.dtype), self.fuse_norm, FUSION_EPSILON
    )
    return layers.product(
      'BLD,DE->BLE',
      layers.quick_gelu(x_BLD),
      self.fuse_project.kernel[...],
      self.fuse_project.bias[...],
      precision=config.precision,
    )

  def linear_part(
    self,
    gene_ids_BL: Array,
    species_BL: Array,
    knowledge: knowledge_lib.Knowledge,
    prior_scale: Array | float = 1.0,
  ) -> Array:
    """All of the fusion's sum but the values, [B, L, D] float32."""
    parts = self.parts(gene_ids_BL, species_BL, knowledge, prior_scale)
    x_BLD = next(parts) + self.fuse_bias[...]
    for part_BLD in parts:
      x_BLD += part_BLD
    return x_BLD

  def parts(
    self,
    gene_ids_BL: Array,
    species_BL: Array,
    knowledge: knowledge_lib.Knowledge,
    prior_scale: Array | float = 1.0,
  ) -> Iterator[Array]:
    """What each part of a gene adds to the fusion's sum, [B, L, D] float32.

    Yields:
      The word vector's share, then that of every prior in the order of the
      config, each with the bias of its projection. With the bias of the fusion
      and the value's share they are all that the fusion's LayerNorm sees.
    """
    config = self.config
    word_BLD = _rows(self.word[...], gene_ids_BL)
    # torch's padding_idx: looking `<pad>` up trains nothing (the tied id head
    # still does).
    is_pad_BL = gene_ids_BL == vocabulary_lib.PAD
    word_BLD = jnp.where(
      is_pad_BL[..., None], jax.lax.stop_gradient(word_BLD), word_BLD
    )

    def add(x_BLP, kernel_PD):
      return layers.product(
        'BLP,PD->BLD',
        sharding.constrain_slots(x_BLP),
        kernel_PD,
        precision=config.precision,
      ).astype(jnp.float32)

    yield add(word_BLD, self.fuse_word[...])
    if config.priors:
      row_BL = jnp.asarray(knowledge.row_SV)[species_BL, gene_ids_BL]
    for name, _ in config.priors:
      prior = self.priors[name]
      vector_BLP = jnp.take(jnp.asarray(knowledge.tables[name]), row_BL, axis=0)
      if config.missing_prior == 'learned':
        has_BL = jnp.take(jnp.asarray(knowledge.has_vector[name]), row_BL)
        vector_BLP = jnp.where(
          has_BL[..., None], vector_BLP, prior.missing[...]
        )
      kernel_PD, bias_D = self.composed(name)
      yield prior_scale * (add(vector_BLP, kernel_PD) + bias_D)

  def composed(self, name: str) -> tuple[Array, Array]:
    """A prior's projection and its block of the fusion as one map.

    Returns:
      kernel [P, D] and bias [D], float32: (x K + b) F = x (K F) + b F.
    """
    project, block_DD = self.priors[name].project, self.fuse_priors[name][...]
    precise = jax.lax.Precision.HIGHEST
    return (
      jnp.matmul(project.kernel[...], block_DD, precision=precise),
      jnp.matmul(project.bias[...], block_DD, precision=precise),
    )

  def fold(
    self,
    knowledge: knowledge_lib.Knowledge,
    *,
    prior_scale: Array | float = 1.0,
  ) -> knowledge_lib.Folded:
    """The linear part of the fusion for every species and token.

    298 GFLOP for base with four priors of 768 and 50,558 tokens, and S x V x D
    numbers: it pays for parameters that no longer change.
    """
    config = self.config
    tokens_V = jnp.arange(config.vocabulary_size)
    num_species = knowledge.row_SV.shape[0]
    tokens_SV = jnp.broadcast_to(tokens_V, (num_species, len(tokens_V)))
    species_SV = jnp.broadcast_to(
      jnp.arange(num_species)[:, None], tokens_SV.shape
    )
    table_SVD = self.linear_part(tokens_SV, species_SV, knowledge, prior_scale)
    return knowledge_lib.Folded(table_SVD=table_SVD)


def _rows(table_VD: Array, numbers_BL: Array) -> Array:
  """Rows of a trained table: [B, L, D].

  Devices that share the table gather it whole first: left alone, the compiler
  would gather every row's slots in its place, which is more.
  """
  return jnp.take(sharding.constrain(table_VD, None, None), numbers_BL, axis=0)
