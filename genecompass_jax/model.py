"""The network: knowledge embedding, encoder and heads, as Flax NNX modules.

Modules hold parameters and nothing else: no random state, no tables, no
statistics. Training and analysis keep the parameters as a plain nested dict
(`init`, `bind`), so that optimisers, checkpoints and converters see a pytree.

Equations are those of GeneCompass (Cell Research 2024) as its released code
computes them. `embedding` makes the input of the encoder, `attention` and
`layers` hold what its blocks are made of.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genecompass_jax import (
  attention,
  embedding,
  errors,
  knowledge as knowledge_lib,
  layers,
  model_config,
  schemas,
  sharding,
  vocabulary as vocabulary_lib,
)

Array = jax.Array
Params = dict[str, Any]
Tables = embedding.Tables

# What callers of this module name most.
ModelConfig = model_config.ModelConfig
SIZES = model_config.SIZES
named_config = model_config.named_config

# Axes that grow with the width of a model.
_WIDE = ('embed', 'hidden', 'heads', 'mlp')


class Encoder(nnx.Module):
  """Transformer blocks; parameters are stacked over layers."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Parameters of all blocks, with a leading axis of layers."""
    self.config = config
    N, D, F = config.num_layers, config.width, config.feed_forward
    H, K = config.num_heads, config.head_dim
    linear = functools.partial(layers.Linear, rngs=rngs, std=config.hidden_std)
    split = ('layer', 'embed', 'heads', 'head_dim')
    self.query = linear((N, D, H, K), split)
    self.key = linear((N, D, H, K), split)
    self.value = linear((N, D, H, K), split)
    self.out = linear(
      (N, H, K, D), ('layer', 'heads', 'head_dim', 'embed'), num_in=2
    )
    self.attention_norm = layers.Norm(D, N)
    self.up = linear((N, D, F), ('layer', 'embed', 'mlp'))
    self.down = linear((N, F, D), ('layer', 'mlp', 'embed'))
    self.output_norm = layers.Norm(D, N)
    if config.norm_order == 'pre':
      self.final_norm = layers.Norm(D)

  def __call__(
    self,
    x_BLD: Array,
    segments_BL: Array,
    *,
    dropout_keys_B: Array | None,
    every_layer: bool = False,
    key_bias_BL: Array | None = None,
    first_B1D: Array | None = None,
  ) -> Array:
    """Runs all blocks.

    Args:
      x_BLD: embedded slots.
      segments_BL: cell of each slot, 0 in padding; a gene sees its own cell.
      dropout_keys_B: a key a row; None for evaluation.
      every_layer: return the states after every block, [N, B, L, D].
      key_bias_BL: see `schemas.Gates`.
      first_B1D: see `encoder_block`; its states stand in the result.

    Returns:
      States [B, L, D], or [N, B, L, D], in the type of x, or float32 with
      `first_B1D`. Under norm_order 'pre' the last norm is applied to all.
    """
    config = self.config
    stacked = nnx.to_pure_dict(nnx.state(self, nnx.Param))
    final_norm = stacked.pop('final_norm', None)

    def block(states, layer):
      params, index = layer
      keys_B = layers.fold_in(dropout_keys_B, index)
      x_BLD, first_B1D = encoder_block(
        *states, segments_BL, params, config, keys_B, key_bias_BL
      )
      states = sharding.constrain_slots(x_BLD), first_B1D
      return states, (states if every_layer else None)

    if config.remat == 'attention':
      policy = jax.checkpoint_policies.save_only_these_names(attention.KEPT)
      block = layers.recomputed(block, policy=policy)
    elif config.remat == 'full':
      block = layers.recomputed(block)
    indices = jnp.arange(config.num_layers)
    last, every = jax.lax.scan(
      block,
      (x_BLD, first_B1D),
      (stacked, indices),
      unroll=min(config.unroll, len(indices)),
    )
    x, first = every if every_layer else last
    if first is not None:
      x = x.astype(jnp.float32).at[..., :1, :].set(first)
    if final_norm is not None:
      x = layers.layer_norm(x, final_norm, config.norm_epsilon)
    return x


def encoder_block(
  x_BLD: Array,
  first_B1D: Array | None,
  segments_BL: Array,
  params: Params,
  config: ModelConfig,
  dropout_keys_B: Array | None,
  key_bias_BL: Array | None = None,
) -> tuple[Array, Array | None]:
  """One block: self-attention, then feed-forward, with norms after or before.

  Args:
    x_BLD: states.
    first_B1D: for evaluation of rows of one cell: the first slot once more, in
      float32, whose block looks at the keys and values of all and is itself
      computed in float32. None: no such thing.
    segments_BL: cell of each slot, 0 in padding.
    params: of this block.
    config: of the model.
    dropout_keys_B: a key a row; None for evaluation.
    key_bias_BL: see `schemas.Gates`.

  Returns:
    `x_BLD` and `first_B1D` behind the block.
  """
  keys = [layers.fold_in(dropout_keys_B, i) for i in range(3)]
  h_BLD = _attention_input(x_BLD, params, config)
  key_BLHK = _project('key', h_BLD, params, config)
  value_BLHK = _project('value', h_BLD, params, config)
  # Where attention is 'xla': reading dropped probabilities back is cheaper than
  # drawing them twice; without dropout, making them anew saves memory.
  drops = dropout_keys_B is not None and config.attention_dropout > 0
  attended_BLHK = attention.attend(
    _project('query', h_BLD, params, config),
    key_BLHK,
    value_BLHK,
    segments_BL,
    kind=config.attention,
    dropout_rate=config.attention_dropout,
    dropout_keys_B=keys[0],
    key_bias_BL=key_bias_BL,
    keep_probabilities=config.remat != 'none' or drops,
  )
  x_BLD = _add_attended(x_BLD, attended_BLHK, params, config, keys)
  if first_B1D is None:
    return x_BLD, None
  precise = dataclasses.replace(config, dtype='float32')
  with full_precision(precise):
    h_B1D = _attention_input(first_B1D, params, precise)
    attended_B1HK = attention.attend_from_first(
      _project('query', h_B1D, params, precise),
      key_BLHK,
      value_BLHK,
      segments_BL,
      key_bias_BL=key_bias_BL,
    )
    first_B1D = _add_attended(first_B1D, attended_B1HK, params, precise, keys)
  return x_BLD, first_B1D


def _attention_input(x_BLD, params, config) -> Array:
  if config.norm_order != 'pre':
    return x_BLD
  return layers.layer_norm(x_BLD, params['attention_norm'], config.norm_epsilon)


def _project(name, h_BLD, params, config) -> Array:
  """Queries, keys or values of all heads."""
  weights = params[name]
  return layers.product(
    'BLD,DHK->BLHK',
    h_BLD,
    weights['kernel'],
    weights['bias'],
    precision=config.precision,
  )


def _add_attended(x_BLD, attended_BLHK, params, config, keys) -> Array:
  """What follows attention: its last product, feed-forward, norms."""
  is_pre = config.norm_order == 'pre'
  norm = functools.partial(layers.layer_norm, epsilon=config.norm_epsilon)
  h_BLD = layers.product(
    'BLHK,HKD->BLD',
    attended_BLHK,
    params['out']['kernel'],
    params['out']['bias'],
    precision=config.precision,
  )
  h_BLD = layers.dropout(h_BLD, config.hidden_dropout, keys[1])
  if is_pre:
    x_BLD += h_BLD
    h_BLD = norm(x_BLD, params['output_norm'])
  else:
    h_BLD = x_BLD = norm(x_BLD, params['attention_norm'], add=h_BLD)
  h_BLD = _feed_forward(h_BLD, params, config)
  h_BLD = layers.dropout(h_BLD, config.hidden_dropout, keys[2])
  if is_pre:
    return x_BLD + h_BLD
  return norm(x_BLD, params['output_norm'], add=h_BLD)


def _feed_forward(x_BLD, params, config) -> Array:
  product = functools.partial(layers.product, precision=config.precision)
  up, down = params['up'], params['down']
  h_BLF = product('BLD,DF->BLF', x_BLD, up['kernel'], up['bias'])
  h_BLF = layers.gelu(h_BLF)
  return product('BLF,FD->BLD', h_BLF, down['kernel'], down['bias'])


class HeadTransform(nnx.Module):
  """Linear, GELU, LayerNorm: the first half of both pretraining heads."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Parameters of a square transform."""
    self.config = config
    shape = (config.width, config.width)
    self.dense = layers.Linear(
      shape, ('embed', 'hidden'), rngs=rngs, std=config.hidden_std
    )
    self.norm = layers.Norm(config.width)

  def __call__(self, h_BKD: Array) -> Array:
    """Transforms states; axes stay."""
    h_BKD = layers.product(
      'BKD,DE->BKE',
      h_BKD,
      self.dense.kernel[...],
      self.dense.bias[...],
      precision=self.config.precision,
    )
    h_BKD = layers.gelu(h_BKD)
    return layers.layer_norm(h_BKD, self.norm, self.config.norm_epsilon)


class IdHead(nnx.Module):
  """Scores every token; its matrix is the word embedding (tied)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Transform and one bias a token."""
    self.config = config
    self.transform = HeadTransform(config, rngs=rngs)
    self.bias = layers.constant(0.0, (config.vocabulary_size,), ('vocab',))

  def __call__(self, h_BKD: Array, word_VD: Array) -> Array:
    """Logits over tokens, [B, K, V] float32."""
    return token_logits(
      self.transform(h_BKD), word_VD, self.bias[...], self.config
    )


def token_logits(
  h_BKD: Array, word_VD: Array, bias_V: Array, config: ModelConfig
) -> Array:
  """The last product of the id head: transformed states to logits [B, K, V].

  Rounded logits would tie tokens: they leave the product as float32.
  """
  logits_BKV = layers.product(
    'BKD,VD->BKV',
    h_BKD * config.hidden_scale,
    word_VD,
    precision=config.precision,
    rounds=False,
  )
  return logits_BKV + bias_V


class ValueHead(nnx.Module):
  """Predicts the log2 expression value of a gene."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Transform and a linear map to one number."""
    self.scale = config.hidden_scale
    self.transform = HeadTransform(config, rngs=rngs)
    self.kernel = layers.normal((config.width,), ('hidden',), rngs)
    self.bias = layers.constant(0.0, (), ())

  def __call__(self, h_BKD: Array) -> Array:
    """Values, [B, K] float32."""
    h_BKD = self.transform(h_BKD).astype(jnp.float32) * self.scale
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
    self.embedding = embedding.KnowledgeEmbedding(config, rngs=rngs)
    self.encoder = Encoder(config, rngs=rngs)
    square = (config.width, config.width)
    scores = (config.width, config.num_labels)
    if config.head == 'pretraining':
      self.id_head = IdHead(config, rngs=rngs)
      if config.use_values:
        self.value_head = ValueHead(config, rngs=rngs)
    else:
      if config.head == 'sequence':
        self.pooler = layers.Linear(square, ('embed', 'hidden'), rngs=rngs)
      self.classifier = layers.Linear(scores, ('embed', None), rngs=rngs)

  def __call__(
    self,
    batch: schemas.CellBatch,
    knowledge: Tables,
    *,
    prior_scale: Array | float | None = None,
    dropout_keys_B: Array | None = None,
    every_layer: bool = False,
    gates: schemas.Gates | None = None,
    precise_cls: bool = False,
  ) -> Array:
    """Hidden states of all slots.

    Args:
      batch: encoded cells.
      knowledge: prior tables, which must hold the priors of the config, or
        what `fold` made of them, or the embedding's `linear_part` of this batch.
      prior_scale: overrides the config's factor on projected priors.
      dropout_keys_B: a key a row (`layers.keys_of_rows`); None for evaluation.
      every_layer: also return the embedding and every block's output.
      gates: opened for derivatives; in evaluation, with attention 'auto' or
        'xla'.
      precise_cls: whatever the type of the blocks, the state of CLS is computed
        in float32, from keys and values in their type. For evaluation, one cell
        a row. What is rounded in hundreds of genes averages out; what is
        rounded in one state does not.

    Returns:
      float32 [B, L, D], or with `every_layer` [N + 1, B, L, D].
    """
    config = self.config
    if prior_scale is None:
      prior_scale = np.float32(config.prior_scale)
    keys = [layers.fold_in(dropout_keys_B, i) for i in range(2)]
    segments_BL = jnp.asarray(batch.segments_BL)
    if not config.use_cls:
      segments_BL = jnp.where(batch.is_cls_BL, 0, segments_BL)
    x_BLD = self.embedding(
      batch,
      knowledge,
      prior_scale=prior_scale,
      dropout_keys_B=keys[0],
      retreat_BL=None if gates is None else gates.retreat_BL,
    )
    first_B1D = None
    if precise_cls and config.use_cls and config.dtype != 'float32':
      first_B1D = self.embedding.cls_vectors(batch.species_BL[:, :1])
    h = self.encoder(
      x_BLD,
      segments_BL,
      dropout_keys_B=keys[1],
      every_layer=every_layer,
      key_bias_BL=None if gates is None else gates.key_bias_BL,
      first_B1D=first_B1D,
    )
    h = jnp.concatenate([x_BLD[None], h]) if every_layer else h
    return h.astype(jnp.float32)

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


def full_precision(config: ModelConfig) -> contextlib.AbstractContextManager:
  """Within it, what is traced in float32 is computed in float32.

  Left alone, accelerators multiply float32 by parts of it: TPUs in one pass of
  bfloat16, NVIDIA in TF32. Training may; what is compared with other numbers
  may not. Models in bfloat16 are left alone (kernels refuse the demand).
  """
  if config.dtype != 'float32':
    return contextlib.nullcontext()
  return jax.default_matmul_precision('highest')


def evaluate(
  config: ModelConfig,
  params: Params,
  batch: schemas.CellBatch,
  knowledge: Tables,
  *,
  gates: schemas.Gates | None = None,
) -> Array:
  """Hidden states for analysis, one cell a row: [B, L, D] float32.

  As precise as the model's type allows: see `full_precision`, and `precise_cls`
  of the network.
  """
  with full_precision(config):
    return bind(config, params)(batch, knowledge, gates=gates, precise_cls=True)


def fold(
  config: ModelConfig, params: Params, knowledge: knowledge_lib.Knowledge
) -> knowledge_lib.Folded:
  """What inference passes in place of prior tables, for given parameters."""
  network = bind(config, params)
  with full_precision(config):
    return network.embedding.fold(
      knowledge, prior_scale=np.float32(config.prior_scale)
    )


def rate_scales(config: ModelConfig) -> Params | None:
  """Factors on the learning rates of parameters; None where all are 1.

  With `base_width`, matrices whose inputs and outputs both grow with the width
  learn at base_width / width of the rate.
  """
  if not config.base_width:
    return None

  def scale(names) -> float:
    is_hidden = sum(name in _WIDE for name in names) >= 2
    return config.hidden_scale if is_hidden else 1.0

  return jax.tree.map(
    scale, logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
  )


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
