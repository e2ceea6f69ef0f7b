"""What the original computes, line for line in jnp: the yardstick.

Written from a description of the released computation, not from its code: the
state dict of the original (its names, its [out, in] weights) goes in, rows are
padded to one length, the embedding concatenates word, value and four projected
priors (5h + 1 columns) before one matrix, every position is projected, blocks
stand one after the other, and logits are taken at every position over the
whole vocabulary though only masked ones are scored. Float32, no dropout.
"""

import jax
import jax.numpy as jnp
import numpy as np

PRIORS = ('promoter', 'co_exp', 'gene_family', 'peca_grn')
IGNORED = -100  # label of a position that is not predicted


def loss(
  weights,
  tables,
  batch,
  *,
  num_layers,
  num_heads,
  masked_only=False,
  composed=False,
) -> jax.Array:
  """0.2 cross-entropy + 0.8 squared error, each a mean over masked positions.

  Args:
    weights: state dict of the original.
    tables: prior name -> [V, P].
    batch: input_ids [B, L], values [B, L], attention_mask [B, L], species
      [B, 1], labels [B, L], labels_values [B, L]; for `masked_only` also
      masked [B, K], the positions with a label (0 where unused), and used
      [B, K].
    num_layers: blocks.
    num_heads: attention heads.
    masked_only: gather the masked positions before the heads.
    composed: multiply the projection of every prior with its columns of the
      next matrix first, and the slots with the product.
  """
  x = _embed(weights, tables, batch, composed)
  hidden = _encode(weights, x, batch, num_layers, num_heads)[:, 1:]
  labels, label_values = batch['labels'], batch['labels_values']
  is_masked = labels != IGNORED
  if masked_only:
    at = batch['masked']
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    labels = jnp.take_along_axis(labels, at, axis=1)
    label_values = jnp.take_along_axis(label_values, at, axis=1)
    is_masked = batch['used']
  logits = (
    _transform(weights, 'cls.predictions.transform', hidden)
    @ weights['bert.embeddings.word_embeddings.weight'].T
    + weights['cls.predictions.bias']
  )
  predicted = (
    _transform(weights, 'cls4value.predictions.transform', hidden)
    @ weights['cls4value.predictions.decoder.weight'].T
    + weights['cls4value.predictions.bias']
  )[..., 0]
  count = jnp.sum(is_masked)
  log_probabilities = jax.nn.log_softmax(logits, axis=-1)
  true = jnp.where(is_masked, labels, 0)[..., None]
  picked = jnp.take_along_axis(log_probabilities, true, axis=-1)[..., 0]
  id_loss = -jnp.sum(jnp.where(is_masked, picked, 0.0)) / count
  errors = jnp.where(is_masked, (predicted - label_values) ** 2, 0.0)
  return 0.2 * id_loss + 0.8 * jnp.sum(errors) / count


def _encode(weights, x, batch, num_layers, num_heads):
  """Hidden states, the species vector first: [B, L + 1, h]."""
  species = batch['species'][:, 0]
  cls = weights['bert.cls_embedding.weight'][species][:, None]
  x = jnp.concatenate([cls, x], axis=1)
  seen = jnp.pad(
    batch['attention_mask'], ((0, 0), (1, 0)), constant_values=1
  ).astype(jnp.float32)
  bias = (1.0 - seen[:, None, None, :]) * jnp.finfo(jnp.float32).min
  for i in range(num_layers):
    name = f'bert.encoder.layer.{i}'
    query, key, value = (
      _heads(_linear(weights, f'{name}.attention.self.{part}', x), num_heads)
      for part in ('query', 'key', 'value')
    )
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]) + bias
    context = jax.nn.softmax(scores, axis=-1) @ value
    context = context.swapaxes(1, 2).reshape(x.shape)
    context = _linear(weights, f'{name}.attention.output.dense', context)
    x = _norm(weights, f'{name}.attention.output.LayerNorm', x + context)
    h = jax.nn.gelu(
      _linear(weights, f'{name}.intermediate.dense', x), approximate=False
    )
    h = _linear(weights, f'{name}.output.dense', h)
    x = _norm(weights, f'{name}.output.LayerNorm', x + h)
  return x


def _embed(weights, tables, batch, composed):
  name = 'bert.embeddings'
  ids = batch['input_ids']
  if composed:
    x = _composed(weights, tables, batch)
  else:
    x = _concatenated(weights, tables, batch)
  x = _norm(weights, f'{name}.concat_embeddings.cat_ln', x, 1e-5)
  x = x * jax.nn.sigmoid(1.702 * x)
  x = _linear(weights, f'{name}.concat_embeddings.cat_proj', x)
  x += weights[f'{name}.token_type_embeddings.weight'][0]
  x += weights[f'{name}.position_embeddings.weight'][: ids.shape[1]]
  return _norm(weights, f'{name}.LayerNorm', x)


def _composed(weights, tables, batch):
  name = 'bert.embeddings'
  ids = batch['input_ids']
  word = weights[f'{name}.word_embeddings.weight'][ids]
  kernel = weights[f'{name}.concat_embeddings.cat_fc.weight'].T
  width = word.shape[-1]
  x = word @ kernel[:width] + batch['values'][..., None] * kernel[width]
  x += weights[f'{name}.concat_embeddings.cat_fc.bias']
  for i, prior in enumerate(PRIORS):
    block = kernel[width + 1 + i * width :][:width]
    project = weights[f'{name}.{prior}_embeddings.linear1.weight'].T
    bias = weights[f'{name}.{prior}_embeddings.linear1.bias']
    x += tables[prior][ids] @ (project @ block) + bias @ block
  return x


def _concatenated(weights, tables, batch):
  name = 'bert.embeddings'
  ids = batch['input_ids']
  parts = [
    weights[f'{name}.word_embeddings.weight'][ids],
    batch['values'][..., None],
  ]
  parts += [
    _linear(weights, f'{name}.{prior}_embeddings.linear1', tables[prior][ids])
    for prior in PRIORS
  ]
  x = jnp.concatenate(parts, axis=-1)
  return _linear(weights, f'{name}.concat_embeddings.cat_fc', x)


def _linear(weights, name, x):
  return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']


def _norm(weights, name, x, epsilon=1e-12):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  x = (x - mean) / jnp.sqrt(variance + epsilon)
  return x * weights[f'{name}.weight'] + weights[f'{name}.bias']


def _transform(weights, name, x):
  x = jax.nn.gelu(_linear(weights, f'{name}.dense', x), approximate=False)
  return _norm(weights, f'{name}.LayerNorm', x)


def _heads(x, num_heads):
  batch, length, width = x.shape
  x = x.reshape(batch, length, num_heads, width // num_heads)
  return x.swapaxes(1, 2)
