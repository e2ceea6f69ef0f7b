"""The original's forward pass in NumPy, float64, from its state dict alone.

Written from the description of the architecture (BERT with norms after the
residual sums, the fused knowledge embedding before it), not from our model: it
stands in for the original at sizes of which nothing was recorded.
"""

import numpy as np
import scipy.special

PRIORS = ('promoter', 'co_exp', 'gene_family', 'peca_grn')


def forward(weights, config, ids, values, species, lengths):
  """(hidden states of every layer, outputs of the head by name)."""
  w = {k: np.asarray(v, np.float64) for k, v in weights.items()}
  eps = config['layer_norm_eps']

  def linear(x, name):
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

  def norm(x, name, epsilon=eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * w[f'{name}.weight'] + w[f'{name}.bias']

  def gelu(x):
    return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))

  is_head = 'classifier.weight' in w
  emb = 'bert.embeddings'
  alpha = 1.0 if is_head else float(np.ravel(w['emb_warmup.alpha'])[0])
  if not is_head and alpha < 1 and config['emb_warmup_steps'] > 0:
    alpha += 1 / config['emb_warmup_steps']
  homologs = np.asarray(weights[f'{emb}.homologous_index'])
  rows = np.where(species[:, None] == 1, homologs[ids], ids)
  parts = [w[f'{emb}.word_embeddings.weight'][ids]]
  if config['use_values']:
    parts.append(values[..., None])
  for name in PRIORS:
    if config[f'use_{name}']:
      vectors = w[f'{emb}.{name}_knowledge'][rows]
      parts.append(alpha * linear(vectors, f'{emb}.{name}_embeddings.linear1'))
  x = linear(np.concatenate(parts, -1), f'{emb}.concat_embeddings.cat_fc')
  x = norm(x, f'{emb}.concat_embeddings.cat_ln', 1e-5)
  x = linear(
    x * scipy.special.expit(1.702 * x), f'{emb}.concat_embeddings.cat_proj'
  )
  x += w[f'{emb}.token_type_embeddings.weight'][0]
  x += w[f'{emb}.position_embeddings.weight'][: ids.shape[1]]
  x = norm(x, f'{emb}.LayerNorm')
  seen = np.arange(ids.shape[1]) < lengths[:, None]
  if config['use_cls_token']:
    cls = w['bert.cls_embedding.weight'][species][:, None]
    x = np.concatenate([cls, x], 1)
    seen = np.concatenate([np.ones((len(ids), 1), bool), seen], 1)
  bias = np.where(seen, 0.0, -np.inf)[:, None, None]
  states = [x]
  heads = config['num_attention_heads']
  for n in range(config['num_hidden_layers']):
    layer = f'bert.encoder.layer.{n}'

    def split(name, layer=layer, x=x):
      y = linear(x, f'{layer}.attention.self.{name}')
      return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    q, k, v = split('query'), split('key'), split('value')
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]) + bias
    y = scipy.special.softmax(scores, -1) @ v
    y = y.transpose(0, 2, 1, 3).reshape(x.shape)
    y = linear(y, f'{layer}.attention.output.dense')
    x = norm(x + y, f'{layer}.attention.output.LayerNorm')
    y = gelu(linear(x, f'{layer}.intermediate.dense'))
    y = linear(y, f'{layer}.output.dense')
    x = norm(x + y, f'{layer}.output.LayerNorm')
    states.append(x)
  if 'bert.pooler.dense.weight' in w:
    pooled = np.tanh(linear(x[:, 0], 'bert.pooler.dense'))
    return states, {'logits': linear(pooled, 'classifier')}
  if is_head:
    return states, {'logits': linear(x, 'classifier')}

  def transform(name):
    genes = x[:, 1:] if config['use_cls_token'] else x
    y = gelu(linear(genes, f'{name}.transform.dense'))
    return norm(y, f'{name}.transform.LayerNorm')

  y = transform('cls.predictions')
  word = w[f'{emb}.word_embeddings.weight']
  outputs = {'logits': y @ word.T + w['cls.predictions.bias']}
  if config['use_values']:
    y = transform('cls4value.predictions')
    outputs['values'] = linear(y, 'cls4value.predictions.decoder')[..., 0]
  return states, outputs


def random_weights(config, widths, num_labels=0, pooler=False, seed=0):
  """A state dict of the original with random weights, all that it lists.

  Args:
    config: in the original's keys.
    widths: of the prior tables, by the original's names.
    num_labels: of a classification head; 0 for the pretraining heads.
    pooler: whether it classifies cells.
    seed: of the weights.
  """
  rng = np.random.default_rng(seed)
  V, D = config['vocab_size'], config['hidden_size']
  F, L = config['intermediate_size'], config['max_position_embeddings']
  w = {}

  def normal(name, *shape, scale=0.05):
    w[name] = (rng.normal(size=shape) * scale).astype(np.float32)

  def linear(name, out, into):
    normal(f'{name}.weight', out, into, scale=0.6 / np.sqrt(into))
    normal(f'{name}.bias', out)

  def norm(name, size):
    w[f'{name}.weight'] = (1 + 0.1 * rng.normal(size=size)).astype(np.float32)
    normal(f'{name}.bias', size)

  emb = 'bert.embeddings'
  columns = D
  for name in PRIORS:
    if config[f'use_{name}']:
      normal(f'{emb}.{name}_knowledge', V, widths[name], scale=1)
      w[f'{emb}.{name}_knowledge'][:2] = 0
      linear(f'{emb}.{name}_embeddings.linear1', D, widths[name])
      columns += D
  columns += config['use_values']
  w[f'{emb}.position_ids'] = np.arange(L)[None]
  homologs = np.arange(V)
  pairs = rng.permutation(np.arange(2, V))[: V // 4 * 2].reshape(2, -1)
  homologs[pairs[0]] = pairs[1]
  w[f'{emb}.homologous_index'] = homologs
  normal(f'{emb}.word_embeddings.weight', V, D, scale=0.3)
  linear(f'{emb}.concat_embeddings.cat_fc', D, columns)
  norm(f'{emb}.concat_embeddings.cat_ln', D)
  linear(f'{emb}.concat_embeddings.cat_proj', D, D)
  normal(f'{emb}.position_embeddings.weight', L, D, scale=0.3)
  normal(f'{emb}.token_type_embeddings.weight', 2, D)
  norm(f'{emb}.LayerNorm', D)
  if config['use_cls_token']:
    normal('bert.cls_embedding.weight', 2, D, scale=0.5)
  for n in range(config['num_hidden_layers']):
    layer = f'bert.encoder.layer.{n}'
    for part in ('query', 'key', 'value'):
      linear(f'{layer}.attention.self.{part}', D, D)
    linear(f'{layer}.attention.output.dense', D, D)
    norm(f'{layer}.attention.output.LayerNorm', D)
    linear(f'{layer}.intermediate.dense', F, D)
    linear(f'{layer}.output.dense', D, F)
    norm(f'{layer}.output.LayerNorm', D)
  if num_labels:
    if pooler:
      linear('bert.pooler.dense', D, D)
    linear('classifier', num_labels, D)
    return w
  for name, size in (('cls', V), ('cls4value', 1)):
    normal(f'{name}.predictions.bias', size)
    linear(f'{name}.predictions.transform.dense', D, D)
    norm(f'{name}.predictions.transform.LayerNorm', D)
    w[f'{name}.predictions.decoder.bias'] = w[f'{name}.predictions.bias']
  w['cls.predictions.decoder.weight'] = w[f'{emb}.word_embeddings.weight']
  normal('cls4value.predictions.decoder.weight', 1, D)
  w['emb_warmup.alpha'] = np.float32(0.4)
  w['emb_warmup.steps'] = np.int64(12)
  return w
