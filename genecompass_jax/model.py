"""The network: knowledge embedding, encoder and heads, as Flax NNX modules.

Modules hold parameters and nothing else: no random state, no tables, no
statistics. Training and analysis keep the parameters as a plain nested dict
(`init`, `bind`), so that optimisers, checkpoints and converters see a pytree.

Equations are those of GeneCompass (Cell Research 2024) as its released code
computes them: word vector, expression value and projected priors of a gene
are concatenated and fused (linear, LayerNorm, quick GELU, linear), position
by rank is added, and a species vector stands before the genes as CLS. The
concatenation is kept as one block of the fusion kernel a part: 3,841 columns
divide by no useful number of devices.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genecompass_jax import (
  errors,
  knowledge as knowledge_lib,
  schemas,
  vocabulary as vocabulary_lib,
)

Array = jax.Array
Params = dict[str, Any]

# torch's default LayerNorm epsilon, which the release has in the fusion block.
FUSION_EPSILON = 1e-5
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Size and parts of a model.

  Attributes:
    vocabulary_size: V, tokens including `<pad>` and `<mask>`; 0 until it is
      taken from a corpus.
    width: D. Released base 768, small 256.
    num_layers: encoder blocks. Base 12, small 6.
    num_heads: attention heads; must divide `width`.
    feed_forward: F. Base 3,072, small 512.
    max_genes: positions, the most genes of a cell (2,048 in the release).
    num_species: rows of the species (CLS) table.
    priors: (name, P) of every knowledge table, in the order of fusion.
    missing_prior: 'learned': a gene without a vector reads a trained vector of
      the prior's width; 'released': it reads zeros.
    use_values: whether expression values enter, and are predicted.
    use_cls: whether a species vector stands before the genes.
    hides_ranks: whether a trained vector stands for the position of genes whose
      rank is hidden; taken from the mask objective in training ('split').
    hidden_dropout: rate after embedding, attention and feed-forward.
    attention_dropout: rate on attention probabilities.
    prior_scale: factor on projected priors, bias included (the release's
      embedding warm-up; 1 there, because that warm-up has no effect).
    norm_epsilon: of every LayerNorm but the fusion block's (BERT's 1e-12).
    head: 'pretraining' (tied id head and value head), 'sequence' (pooled
      class scores) or 'token' (class scores a slot).
    num_labels: classes of a 'sequence' or 'token' head.
    dtype: 'float32' or 'bfloat16': the precision of matrix products.
      Parameters, norms, softmax and losses are float32 throughout.
    remat: whether blocks are recomputed in the backward pass.
  """

  vocabulary_size: int = 0
  width: int = 768
  num_layers: int = 12
  num_heads: int = 12
  feed_forward: int = 3072
  max_genes: int = 2048
  num_species: int = 2
  priors: tuple[tuple[str, int], ...] = ()
  missing_prior: str = 'learned'
  use_values: bool = True
  use_cls: bool = True
  hides_ranks: bool = False
  hidden_dropout: float = 0.02
  attention_dropout: float = 0.02
  prior_scale: float = 1.0
  norm_epsilon: float = 1e-12
  head: str = 'pretraining'
  num_labels: int = 0
  dtype: str = 'float32'
  remat: bool = False

  def __post_init__(self):
    """Refuses sizes and names that cannot work."""
    errors.check_at_least(
      'model',
      self,
      width=1,
      num_layers=1,
      feed_forward=1,
      max_genes=1,
      num_species=1,
      vocabulary_size=0,
      norm_epsilon=0,
    )
    if self.num_heads < 1 or self.width % self.num_heads:
      raise errors.UserError(
        f'width={self.width} must be divisible by num_heads={self.num_heads}'
      )
    _check_choice('missing_prior', self.missing_prior, ('learned', 'released'))
    _check_choice('head', self.head, ('pretraining', 'sequence', 'token'))
    _check_choice('dtype', self.dtype, ('float32', 'bfloat16'))
    for name in ('hidden_dropout', 'attention_dropout'):
      if not 0 <= getattr(self, name) < 1:
        raise errors.UserError(f'{name}={getattr(self, name)} is not in [0, 1)')
    if self.head != 'pretraining' and self.num_labels < 1:
      raise errors.UserError(f'head={self.head!r} needs num_labels >= 1')

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.width // self.num_heads


# Sizes by name. Base and small are the release's; small's head count is not
# documented, 4 heads of 64 are our reading. Larger ones keep heads of 64-128.
SIZES: dict[str, dict[str, int]] = {
  'tiny': {
    'width': 64,
    'num_layers': 2,
    'num_heads': 4,
    'feed_forward': 128,
  },
  'small': {
    'width': 256,
    'num_layers': 6,
    'num_heads': 4,
    'feed_forward': 512,
  },
  'base': {
    'width': 768,
    'num_layers': 12,
    'num_heads': 12,
    'feed_forward': 3072,
  },
  'large': {
    'width': 1024,
    'num_layers': 24,
    'num_heads': 16,
    'feed_forward': 4096,
  },
  '1b': {
    'width': 2048,
    'num_layers': 20,
    'num_heads': 16,
    'feed_forward': 8192,
  },
  '3b': {
    'width': 2560,
    'num_layers': 40,
    'num_heads': 20,
    'feed_forward': 10240,
  },
}


def named_config(size: str, **changes: Any) -> ModelConfig:
  """The configuration of a named size with some fields changed.

  Args:
    size: a key of `SIZES`.
    **changes: fields of `ModelConfig`; `vocabulary_size` must be among them.
  """
  _check_choice('size', size, tuple(SIZES))
  return ModelConfig(**{**SIZES[size], **changes})


class Linear(nnx.Module):
  """x @ kernel + bias; a leading axis of layers in the encoder."""

  def __init__(self, shape, axes, *, rngs: nnx.Rngs, num_in: int = 1):
    """Shapes of kernel [in..., out...]; the bias takes the out axes.

    Args:
      shape: kernel shape, possibly with a leading 'layer' axis.
      axes: logical names of its axes.
      rngs: source of the initial values.
      num_in: number of input axes (after 'layer').
    """
    self.kernel = _normal(shape, axes, rngs)
    layer = axes[0] == 'layer'
    cut = layer + num_in
    bias_shape = shape[:layer] + shape[cut:]
    bias_axes = axes[:layer] + axes[cut:]
    self.bias = _constant(0.0, bias_shape, bias_axes)


class Norm(nnx.Module):
  """LayerNorm parameters: scale and bias."""

  def __init__(self, width: int, num_layers: int | None = None):
    """One norm, or one a layer."""
    shape, axes = (width,), ('norm',)
    if num_layers is not None:
      shape, axes = (num_layers, width), ('layer', 'norm')
    self.scale = _constant(1.0, shape, axes)
    self.bias = _constant(0.0, shape, axes)


class Prior(nnx.Module):
  """Projection of one knowledge table to the model's width."""

  def __init__(self, width_in: int, config: ModelConfig, *, rngs: nnx.Rngs):
    """Parameters for a table of `width_in` columns."""
    shape = (width_in, config.width)
    self.project = Linear(shape, ('prior', 'embed'), rngs=rngs)
    if config.missing_prior == 'learned':
      # Zeros: training starts at the released treatment and departs from it.
      self.missing = _constant(0.0, (width_in,), ('prior',))


class KnowledgeEmbedding(nnx.Module):
  """Gene, value, priors, rank and species -> the encoder's input."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Parameters of the embedding; see `ModelConfig`."""
    self.config = config
    width, V = config.width, config.vocabulary_size
    self.word = _normal((V, width), ('vocab', 'embed'), rngs)
    self.word.set_value(self.word.get_value().at[vocabulary_lib.PAD].set(0.0))
    self.priors = nnx.Dict(
      {name: Prior(size, config, rngs=rngs) for name, size in config.priors}
    )
    square, axes = (width, width), ('embed', 'hidden')
    self.fuse_word = _normal(square, axes, rngs)
    if config.use_values:
      self.fuse_value = _normal((width,), ('hidden',), rngs)
    self.fuse_priors = nnx.Dict(
      {name: _normal(square, axes, rngs) for name, _ in config.priors}
    )
    self.fuse_bias = _constant(0.0, (width,), ('hidden',))
    self.fuse_norm = Norm(width)
    self.fuse_project = Linear(square, ('hidden', 'embed'), rngs=rngs)
    self.position = _normal(
      (config.max_genes, width), ('position', 'embed'), rngs
    )
    # Row 0 is added everywhere and row 1 never used, as in the release.
    self.token_type = _normal((2, width), (None, 'embed'), rngs)
    self.norm = Norm(width)
    if config.hides_ranks:
      # Zeros draw nothing: all else starts as in a model without it.
      self.rank_hidden = _constant(0.0, (width,), ('embed',))
    if config.use_cls:
      self.cls = _normal((config.num_species, width), (None, 'embed'), rngs)

  def __call__(
    self,
    batch: schemas.CellBatch,
    knowledge: knowledge_lib.Knowledge,
    *,
    prior_scale: Array | float,
    dropout_key: Array | None,
  ) -> Array:
    """Embeds every slot: x_BLD."""
    config = self.config
    gene_ids_BL = jnp.asarray(batch.gene_ids_BL)
    x_BLD = self.fused(
      gene_ids_BL,
      jnp.asarray(batch.values_BL),
      jnp.asarray(batch.species_BL),
      knowledge,
      prior_scale=prior_scale,
    )
    x_BLD += self.token_type[0]
    x_BLD += self._positions(jnp.asarray(batch.positions_BL))
    x_BLD = _layer_norm(x_BLD, self.norm, config.norm_epsilon)
    x_BLD = _dropout(x_BLD, config.hidden_dropout, dropout_key)
    if config.use_cls:
      # After norm and dropout, and without a position, as in the release.
      cls_BLD = jnp.take(self.cls[...], batch.species_BL, axis=0)
      x_BLD = jnp.where(batch.is_cls_BL[..., None], cls_BLD, x_BLD)
    return x_BLD

  def _positions(self, positions_BL: Array) -> Array:
    """Vector of each rank, or that of a hidden one: [B, L, D]."""
    position_BLD = jnp.take(self.position[...], positions_BL, axis=0)
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
    knowledge: knowledge_lib.Knowledge,
    *,
    prior_scale: Array | float = 1.0,
  ) -> Array:
    """Word, value and priors of each slot, fused: [B, L, D] float32."""
    config = self.config
    dot = functools.partial(_dot, dtype=config.dtype)
    word_BLD = jnp.take(self.word[...], gene_ids_BL, axis=0)
    # torch's padding_idx: looking `<pad>` up trains nothing (the tied id head
    # still does).
    is_pad_BL = gene_ids_BL == vocabulary_lib.PAD
    word_BLD = jnp.where(
      is_pad_BL[..., None], jax.lax.stop_gradient(word_BLD), word_BLD
    )
    x_BLD = dot(word_BLD, self.fuse_word) + self.fuse_bias[...]
    if config.use_values:
      x_BLD += values_BL[..., None] * self.fuse_value[...]
    if config.priors:
      row_BL = jnp.asarray(knowledge.row_SV)[species_BL, gene_ids_BL]
    for name, _ in config.priors:
      prior = self.priors[name]
      table = jnp.asarray(knowledge.tables[name])
      vector_BLP = jnp.take(table, row_BL, axis=0)
      if config.missing_prior == 'learned':
        has_BL = jnp.take(jnp.asarray(knowledge.has_vector[name]), row_BL)
        vector_BLP = jnp.where(
          has_BL[..., None], vector_BLP, prior.missing[...]
        )
      projected_BLD = dot(vector_BLP, prior.project.kernel)
      projected_BLD = prior_scale * (projected_BLD + prior.project.bias[...])
      x_BLD += dot(projected_BLD, self.fuse_priors[name])
    x_BLD = _layer_norm(x_BLD, self.fuse_norm, FUSION_EPSILON)
    x_BLD = x_BLD * jax.nn.sigmoid(1.702 * x_BLD)  # quick GELU
    return dot(x_BLD, self.fuse_project.kernel) + self.fuse_project.bias[...]


class Encoder(nnx.Module):
  """Post-norm transformer blocks; parameters are stacked over layers."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Parameters of all blocks, with a leading axis of layers."""
    self.config = config
    N, D, F = config.num_layers, config.width, config.feed_forward
    H, K = config.num_heads, config.head_dim
    split = ('layer', 'embed', 'heads', 'head_dim')
    self.query = Linear((N, D, H, K), split, rngs=rngs)
    self.key = Linear((N, D, H, K), split, rngs=rngs)
    self.value = Linear((N, D, H, K), split, rngs=rngs)
    self.out = Linear(
      (N, H, K, D), ('layer', 'heads', 'head_dim', 'embed'), rngs=rngs, num_in=2
    )
    self.attention_norm = Norm(D, N)
    self.up = Linear((N, D, F), ('layer', 'embed', 'mlp'), rngs=rngs)
    self.down = Linear((N, F, D), ('layer', 'mlp', 'embed'), rngs=rngs)
    self.output_norm = Norm(D, N)

  def __call__(
    self,
    x_BLD: Array,
    segments_BL: Array,
    *,
    dropout_key: Array | None,
    every_layer: bool = False,
  ) -> Array:
    """Runs all blocks.

    Args:
      x_BLD: embedded slots.
      segments_BL: cell of each slot, 0 in padding; a gene sees its own cell.
      dropout_key: None for evaluation.
      every_layer: return the states after every block, [N, B, L, D].

    Returns:
      float32 states [B, L, D], or [N, B, L, D].
    """
    config = self.config
    own_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    # Padding is looked at by nobody. It looks at all cells of its row, as in
    # the release: no one reads it, but recorded states compare in full.
    pads_BLL = segments_BL[:, :, None] == 0
    mask_B1LL = ((own_BLL | pads_BLL) & (segments_BL > 0)[:, None, :])[:, None]
    layers = nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def block(x_BLD, layer):
      params, index = layer
      key = None
      if dropout_key is not None:
        key = jax.random.fold_in(dropout_key, index)
      x_BLD = encoder_block(x_BLD, mask_B1LL, params, config, key)
      return x_BLD, (x_BLD if every_layer else None)

    if config.remat:
      block = jax.checkpoint(block, prevent_cse=False)
    indices = jnp.arange(config.num_layers)
    x_BLD, states_NBLD = jax.lax.scan(block, x_BLD, (layers, indices))
    return states_NBLD if every_layer else x_BLD


def encoder_block(
  x_BLD: Array,
  mask_B1LL: Array,
  params: Params,
  config: ModelConfig,
  dropout_key: Array | None,
) -> Array:
  """One post-norm block: self-attention, then feed-forward."""
  keys = (None, None, None)
  if dropout_key is not None:
    keys = jax.random.split(dropout_key, 3)
  project = functools.partial(
    _einsum, 'BLD,DHK->BLHK', x_BLD, dtype=config.dtype
  )
  query_BLHK = project(params['query']['kernel']) + params['query']['bias']
  key_BLHK = project(params['key']['kernel']) + params['key']['bias']
  value_BLHK = project(params['value']['kernel']) + params['value']['bias']
  attend = attention
  if not config.remat and (keys[0] is None or not config.attention_dropout):
    # Probabilities are made anew in the backward pass: half the memory of a
    # step, for the time that writing and reading them would take. Drawing
    # dropout twice would cost a quarter more.
    attend = jax.checkpoint(attention, static_argnums=4)
  attended_BLHK = attend(
    query_BLHK, key_BLHK, value_BLHK, mask_B1LL, config, keys[0]
  )
  attended_BLD = _einsum(
    'BLHK,HKD->BLD', attended_BLHK, params['out']['kernel'], dtype=config.dtype
  )
  attended_BLD += params['out']['bias']
  attended_BLD = _dropout(attended_BLD, config.hidden_dropout, keys[1])
  x_BLD = _layer_norm(
    x_BLD + attended_BLD, params['attention_norm'], config.norm_epsilon
  )
  h_BLF = _dot(x_BLD, params['up']['kernel'], dtype=config.dtype)
  h_BLF = jax.nn.gelu(h_BLF + params['up']['bias'], approximate=False)
  h_BLD = _dot(h_BLF, params['down']['kernel'], dtype=config.dtype)
  h_BLD = _dropout(
    h_BLD + params['down']['bias'], config.hidden_dropout, keys[2]
  )
  return _layer_norm(x_BLD + h_BLD, params['output_norm'], config.norm_epsilon)


def attention(
  query_BLHK: Array,
  key_BLHK: Array,
  value_BLHK: Array,
  mask_B1LL: Array,
  config: ModelConfig,
  dropout_key: Array | None,
) -> Array:
  """Scaled dot-product attention inside segments: [B, L, H, K] float32."""
  dtype = config.dtype
  # On [B, H, L, L], the largest arrays of a step, as little as possible: the
  # scale goes to the queries, and the mask is added.
  query_BLHK = query_BLHK / np.sqrt(config.head_dim).astype(np.float32)
  lowest_B1LL = jnp.where(mask_B1LL, 0.0, jnp.finfo(jnp.float32).min)
  scores_BHLL = _einsum('BLHK,BMHK->BHLM', query_BLHK, key_BLHK, dtype=dtype)
  probs_BHLL = jax.nn.softmax(scores_BHLL + lowest_B1LL, axis=-1)
  probs_BHLL = _dropout(probs_BHLL, config.attention_dropout, dropout_key)
  return _einsum('BHLM,BMHK->BLHK', probs_BHLL, value_BLHK, dtype=dtype)


class HeadTransform(nnx.Module):
  """Linear, GELU, LayerNorm: the first half of both pretraining heads."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Parameters of a square transform."""
    self.config = config
    shape = (config.width, config.width)
    self.dense = Linear(shape, ('embed', 'hidden'), rngs=rngs)
    self.norm = Norm(config.width)

  def __call__(self, h_BKD: Array) -> Array:
    """Transforms states; axes stay."""
    h_BKD = _dot(h_BKD, self.dense.kernel, dtype=self.config.dtype)
    h_BKD = jax.nn.gelu(h_BKD + self.dense.bias[...], approximate=False)
    return _layer_norm(h_BKD, self.norm, self.config.norm_epsilon)


class IdHead(nnx.Module):
  """Scores every token; its matrix is the word embedding (tied)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Transform and one bias a token."""
    self.dtype = config.dtype
    self.transform = HeadTransform(config, rngs=rngs)
    self.bias = _constant(0.0, (config.vocabulary_size,), ('vocab',))

  def __call__(self, h_BKD: Array, word_VD: Array) -> Array:
    """Logits over tokens, [B, K, V] float32."""
    h_BKD = self.transform(h_BKD)
    logits_BKV = _einsum('BKD,VD->BKV', h_BKD, word_VD, dtype=self.dtype)
    return logits_BKV + self.bias[...]


class ValueHead(nnx.Module):
  """Predicts the log2 expression value of a gene."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Transform and a linear map to one number."""
    self.transform = HeadTransform(config, rngs=rngs)
    self.kernel = _normal((config.width,), ('hidden',), rngs)
    self.bias = _constant(0.0, (), ())

  def __call__(self, h_BKD: Array) -> Array:
    """Values, [B, K] float32."""
    h_BKD = self.transform(h_BKD)
    return jnp.einsum('BKD,D->BK', h_BKD, self.kernel[...]) + self.bias[...]


class GeneCompass(nnx.Module):
  """The whole network."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Parameters of the parts that `config` asks for."""
    if config.vocabulary_size <= vocabulary_lib.NUM_SPECIAL:
      raise errors.UserError(
        f'vocabulary_size={config.vocabulary_size} holds no gene'
      )
    self.config = config
    self.embedding = KnowledgeEmbedding(config, rngs=rngs)
    self.encoder = Encoder(config, rngs=rngs)
    square = (config.width, config.width)
    scores = (config.width, config.num_labels)
    if config.head == 'pretraining':
      self.id_head = IdHead(config, rngs=rngs)
      if config.use_values:
        self.value_head = ValueHead(config, rngs=rngs)
    else:
      if config.head == 'sequence':
        self.pooler = Linear(square, ('embed', 'hidden'), rngs=rngs)
      self.classifier = Linear(scores, ('embed', None), rngs=rngs)

  def __call__(
    self,
    batch: schemas.CellBatch,
    knowledge: knowledge_lib.Knowledge,
    *,
    prior_scale: Array | float | None = None,
    dropout_key: Array | None = None,
    every_layer: bool = False,
  ) -> Array:
    """Hidden states of all slots.

    Args:
      batch: encoded cells.
      knowledge: prior tables; must hold the priors of the config.
      prior_scale: overrides the config's factor on projected priors.
      dropout_key: a key folded from (seed, step); None for evaluation.
      every_layer: also return the embedding and every block's output.

    Returns:
      float32 [B, L, D], or with `every_layer` [N + 1, B, L, D].
    """
    config = self.config
    if prior_scale is None:
      prior_scale = np.float32(config.prior_scale)
    keys = (None, None)
    if dropout_key is not None:
      keys = jax.random.split(dropout_key)
    segments_BL = jnp.asarray(batch.segments_BL)
    if not config.use_cls:
      segments_BL = jnp.where(batch.is_cls_BL, 0, segments_BL)
    x_BLD = self.embedding(
      batch, knowledge, prior_scale=prior_scale, dropout_key=keys[0]
    )
    h = self.encoder(
      x_BLD, segments_BL, dropout_key=keys[1], every_layer=every_layer
    )
    return jnp.concatenate([x_BLD[None], h]) if every_layer else h

  def id_logits(self, h_BKD: Array) -> Array:
    """Token logits of hidden states, [B, K, V]."""
    return self.id_head(h_BKD, self.embedding.word)

  def predicted_values(self, h_BKD: Array) -> Array | None:
    """Predicted log2 values [B, K]; None for a model without values."""
    if not self.config.use_values:
      return None
    return self.value_head(h_BKD)

  def class_logits(self, h_BLD: Array) -> Array:
    """Scores of a task head, one cell a row.

    Returns:
      'sequence': [B, labels], from the CLS slot (the first gene's where the
      model has no CLS); 'token': [B, L, labels], CLS slot included.
    """
    if self.config.head == 'token':
      return h_BLD @ self.classifier.kernel[...] + self.classifier.bias[...]
    first_BD = h_BLD[:, 0 if self.config.use_cls else 1]
    pooled_BD = jnp.tanh(
      first_BD @ self.pooler.kernel[...] + self.pooler.bias[...]
    )
    return pooled_BD @ self.classifier.kernel[...] + self.classifier.bias[...]


def init(config: ModelConfig, seed: int) -> Params:
  """Random parameters: normal(0, 0.02), zero biases, unit norm scales."""
  network = GeneCompass(config, rngs=nnx.Rngs(seed))
  return nnx.to_pure_dict(nnx.state(network, nnx.Param))


def bind(config: ModelConfig, params: Params) -> GeneCompass:
  """The network over given parameters; cheap inside a traced function."""
  graph, state = _abstract(config)
  state = jax.tree.map(lambda x: x, state)  # a copy: replace works in place
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


def abstract_params(config: ModelConfig) -> Params:
  """Shapes and dtypes of the parameters, without making them."""
  return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
  """Names of the axes of every parameter, for the sharding rules."""
  _, state = _abstract(config)
  return jax.tree.map(
    lambda p: p.get_metadata()['logical_axes'],
    state,
    is_leaf=lambda p: isinstance(p, nnx.Variable),
  ).to_pure_dict()


def count_parameters(config: ModelConfig) -> dict[str, int]:
  """Numbers of trainable parameters by group, and their 'total'."""
  params = abstract_params(config)

  def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))

  embedding = dict(params.pop('embedding'))
  counts = {'word_embedding': count(embedding.pop('word'))}
  priors = [embedding.pop('priors', {}), embedding.pop('fuse_priors', {})]
  counts['priors'] = count(priors)
  counts['other_embedding'] = count(embedding)
  counts |= {group: count(tree) for group, tree in params.items()}
  return counts | {'total': sum(counts.values())}


@functools.lru_cache(maxsize=32)
def _abstract(config: ModelConfig):
  network = nnx.eval_shape(lambda: GeneCompass(config, rngs=nnx.Rngs(0)))
  return nnx.split(network)


def _normal(shape, axes, rngs: nnx.Rngs) -> nnx.Param:
  value = INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32)
  return nnx.Param(value, logical_axes=axes)


def _constant(value: float, shape, axes) -> nnx.Param:
  return nnx.Param(jnp.full(shape, value, jnp.float32), logical_axes=axes)


def _dot(x, kernel, *, dtype: str) -> Array:
  """x @ kernel over the last axis of x, in `dtype`, giving float32."""
  return jnp.matmul(
    jnp.asarray(x, dtype),
    jnp.asarray(kernel, dtype),
    preferred_element_type=jnp.float32,
  )


def _einsum(equation: str, x, y, *, dtype: str) -> Array:
  return jnp.einsum(
    equation,
    jnp.asarray(x, dtype),
    jnp.asarray(y, dtype),
    preferred_element_type=jnp.float32,
  )


def _layer_norm(x, norm, epsilon: float) -> Array:
  """Normalises the last axis; `norm` is a `Norm` or its dict of arrays."""
  if isinstance(norm, Norm):
    norm = {'scale': norm.scale[...], 'bias': norm.bias[...]}
  mean = jnp.mean(x, axis=-1, keepdims=True)
  centred = x - mean
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return (
    centred * jax.lax.rsqrt(variance + epsilon) * norm['scale'] + norm['bias']
  )


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0.0)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise errors.UserError(
      f'{name}={value!r} is not known; choose one of {", ".join(choices)}'
    )
