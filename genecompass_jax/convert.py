"""Weights of the released PyTorch model <-> our parameter tree, without torch.

The name table comes first. An original linear layer keeps [out, in] weights,
ours [in, out]; attention heads are split out; layers are stacked; the fusion
matrix of 5h + 1 columns is cut into one block a part.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from genecompass_jax import (
  assets as assets_lib,
  encoding as encoding_lib,
  errors,
  knowledge as knowledge_lib,
  medians as medians_lib,
  model as model_lib,
  paths,
  tensor_files,
  vocabulary as vocabulary_lib,
)

# Our name, the original's name of its parts, and the switch in its config, in
# the order in which the original concatenates them.
PRIORS = (
  ('promoter', 'promoter', 'use_promoter'),
  ('co_expression', 'co_exp', 'use_co_exp'),
  ('gene_family', 'gene_family', 'use_gene_family'),
  ('grn', 'peca_grn', 'use_peca_grn'),
)

_PARTS = ('bert.', 'cls', 'classifier.', 'emb_warmup.')
_EMBEDDINGS = 'bert.embeddings'
_FUSION = f'{_EMBEDDINGS}.concat_embeddings'
_FUSION_WEIGHT = f'{_FUSION}.cat_fc.weight'
_HOMOLOGS = f'{_EMBEDDINGS}.homologous_index'

# Tensors of the original that hold nothing to convert, with the reason.
_IGNORED = {
  f'{_EMBEDDINGS}.position_ids': 'a constant',
  'emb_warmup.alpha': 'read into prior_scale',
  'emb_warmup.steps': 'a counter',
  'cls.predictions.decoder.weight': 'tied to the word embedding',
  'cls.predictions.decoder.bias': 'tied to cls.predictions.bias',
  'cls4value.predictions.decoder.bias': 'tied to cls4value.predictions.bias',
}


def _same(x):
  return x


def _transpose(x):
  return x.T


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One original tensor: where it goes and how its axes change."""

  name: str
  path: tuple[str, ...]
  to_ours: Callable[[np.ndarray], np.ndarray] = _same
  to_original: Callable[[np.ndarray], np.ndarray] = _same
  layer: int | None = None


def _linear(name: str, *path: str) -> Iterator[_Entry]:
  yield _Entry(f'{name}.weight', (*path, 'kernel'), _transpose, _transpose)
  yield _Entry(f'{name}.bias', (*path, 'bias'))


def _norm(name: str, *path: str) -> Iterator[_Entry]:
  yield _Entry(f'{name}.weight', (*path, 'scale'))
  yield _Entry(f'{name}.bias', (*path, 'bias'))


def _transform(name: str, *path: str) -> Iterator[_Entry]:
  yield from _linear(f'{name}.transform.dense', *path, 'transform', 'dense')
  yield from _norm(f'{name}.transform.LayerNorm', *path, 'transform', 'norm')


def _layer(config: model_lib.ModelConfig, index: int) -> Iterator[_Entry]:
  D, H, K = config.width, config.num_heads, config.head_dim
  name = f'bert.encoder.layer.{index}'
  for part in ('query', 'key', 'value'):
    original, path = f'{name}.attention.self.{part}', ('encoder', part)
    yield _Entry(
      f'{original}.weight',
      (*path, 'kernel'),
      lambda x: x.T.reshape(D, H, K),
      lambda x: x.reshape(D, D).T,
    )
    yield _Entry(
      f'{original}.bias',
      (*path, 'bias'),
      lambda x: x.reshape(H, K),
      lambda x: x.reshape(D),
    )
  yield _Entry(
    f'{name}.attention.output.dense.weight',
    ('encoder', 'out', 'kernel'),
    lambda x: x.T.reshape(H, K, D),
    lambda x: x.reshape(D, D).T,
  )
  yield _Entry(
    f'{name}.attention.output.dense.bias', ('encoder', 'out', 'bias')
  )
  yield from _norm(
    f'{name}.attention.output.LayerNorm', 'encoder', 'attention_norm'
  )
  yield from _linear(f'{name}.intermediate.dense', 'encoder', 'up')
  yield from _linear(f'{name}.output.dense', 'encoder', 'down')
  yield from _norm(f'{name}.output.LayerNorm', 'encoder', 'output_norm')


def _entries(config: model_lib.ModelConfig) -> Iterator[_Entry]:
  """The name table of a configuration, but for the fusion matrix."""
  embedding = 'embedding'
  yield _Entry(f'{_EMBEDDINGS}.word_embeddings.weight', (embedding, 'word'))
  yield _Entry(
    f'{_EMBEDDINGS}.position_embeddings.weight', (embedding, 'position')
  )
  yield _Entry(
    f'{_EMBEDDINGS}.token_type_embeddings.weight', (embedding, 'token_type')
  )
  yield from _norm(f'{_EMBEDDINGS}.LayerNorm', embedding, 'norm')
  if config.use_cls:
    yield _Entry('bert.cls_embedding.weight', (embedding, 'cls'))
  for ours, original, _ in PRIORS:
    if ours in dict(config.priors):
      yield from _linear(
        f'{_EMBEDDINGS}.{original}_embeddings.linear1',
        *(embedding, 'priors', ours, 'project'),
      )
  yield _Entry(f'{_FUSION}.cat_fc.bias', (embedding, 'fuse_bias'))
  yield from _norm(f'{_FUSION}.cat_ln', embedding, 'fuse_norm')
  yield from _linear(f'{_FUSION}.cat_proj', embedding, 'fuse_project')
  for index in range(config.num_layers):
    for entry in _layer(config, index):
      yield dataclasses.replace(entry, layer=index)
  if config.head == 'pretraining':
    yield from _transform('cls.predictions', 'id_head')
    yield _Entry('cls.predictions.bias', ('id_head', 'bias'))
    if config.use_values:
      yield from _transform('cls4value.predictions', 'value_head')
      yield _Entry(
        'cls4value.predictions.decoder.weight',
        ('value_head', 'kernel'),
        lambda x: x[0],
        lambda x: x[None],
      )
      yield _Entry(
        'cls4value.predictions.bias',
        ('value_head', 'bias'),
        lambda x: x[0],
        lambda x: x[None],
      )
  else:
    if config.head == 'sequence':
      yield from _linear('bert.pooler.dense', 'pooler')
    yield from _linear('classifier', 'classifier')


def config_from_original(
  tensors: Mapping[str, np.ndarray], original: Mapping[str, Any] | None
) -> model_lib.ModelConfig:
  """Our configuration of an original model.

  Args:
    tensors: its state dict.
    original: its config in its own keys; sizes that the tensors show may be
      missing, the number of attention heads may not.

  Raises:
    UserError: the config is missing what cannot be inferred, asks for what the
      original never had, or contradicts the tensors.
  """
  original = dict(original or {})

  def tensor(name: str) -> np.ndarray:
    if name not in tensors:
      raise errors.UserError(
        f'the weights hold no {name}; are these GeneCompass weights, and is '
        '--key-prefix right?'
      )
    return tensors[name]

  word = tensor(f'{_EMBEDDINGS}.word_embeddings.weight')
  position = tensor(f'{_EMBEDDINGS}.position_embeddings.weight')
  if 'num_attention_heads' not in original:
    raise errors.UserError(
      'the number of attention heads does not show in the weights; give '
      '--config with num_attention_heads (and the other keys of the original)'
    )
  _refuse_unlike(original, 'hidden_act', 'gelu')
  _refuse_unlike(original, 'position_embedding_type', 'absolute')
  names = [name.split('.') for name in tensors]
  layers = {int(n[3]) for n in names if n[:3] == ['bert', 'encoder', 'layer']}
  use_values = _switch(
    original,
    'use_values',
    tensor(_FUSION_WEIGHT).shape[1] % word.shape[1] == 1,
  )
  priors = []
  for ours, name, switch in PRIORS:
    table = f'{_EMBEDDINGS}.{name}_knowledge'
    if _switch(original, switch, table in tensors):
      priors.append((ours, int(tensor(table).shape[1])))
  head, num_labels = 'pretraining', 0
  if 'classifier.weight' in tensors:
    pooled = 'bert.pooler.dense.weight' in tensors
    head = 'sequence' if pooled else 'token'
    num_labels = int(tensor('classifier.weight').shape[0])
  use_cls = _switch(
    original, 'use_cls_token', 'bert.cls_embedding.weight' in tensors
  )
  cls = tensor('bert.cls_embedding.weight') if use_cls else None
  config = model_lib.ModelConfig(
    vocabulary_size=_number(original, 'vocab_size', word.shape[0]),
    width=_number(original, 'hidden_size', word.shape[1]),
    num_layers=_number(original, 'num_hidden_layers', len(layers)),
    num_heads=_number(original, 'num_attention_heads'),
    feed_forward=_number(
      original,
      'intermediate_size',
      tensor('bert.encoder.layer.0.intermediate.dense.bias').shape[0],
    ),
    max_genes=_number(original, 'max_position_embeddings', position.shape[0]),
    num_species=2 if cls is None else int(cls.shape[0]),
    priors=tuple(priors),
    missing_prior='released',
    use_values=use_values,
    use_cls=use_cls,
    hidden_dropout=_number(original, 'hidden_dropout_prob', 0.02),
    attention_dropout=_number(original, 'attention_probs_dropout_prob', 0.02),
    prior_scale=_prior_scale(tensors, original, head),
    norm_epsilon=_number(original, 'layer_norm_eps', 1e-12),
    head=head,
    num_labels=num_labels,
  )
  if config.num_layers != len(layers):
    raise errors.UserError(
      f'--config says {config.num_layers} layers, the weights hold '
      f'{len(layers)}'
    )
  return config


def params_from_original(
  tensors: Mapping[str, np.ndarray], config: model_lib.ModelConfig
) -> model_lib.Params:
  """Parameters from an original state dict.

  Raises:
    UserError: a tensor is missing, of another shape, not finite, or untied
      where the original ties; all names concerned are listed.
  """
  shapes = model_lib.abstract_params(config)
  params: model_lib.Params = {}
  stacked: dict[tuple[str, ...], list[np.ndarray]] = {}
  missing, wrong = [], []
  for entry in _entries(config):
    if entry.name not in tensors:
      missing.append(entry.name)
      continue
    wanted = _get(shapes, entry.path).shape
    wanted = wanted[1:] if entry.layer is not None else wanted
    original = entry.to_original(np.zeros(wanted, np.bool_)).shape
    tensor = np.asarray(tensors[entry.name])
    if tensor.shape != original:
      wrong.append(f'{entry.name} is {tensor.shape}, not {original}')
      continue
    array = np.asarray(entry.to_ours(tensor), np.float32)
    if not np.isfinite(array).all():
      wrong.append(f'{entry.name} is not finite')
    if entry.layer is None:
      _set(params, entry.path, array)
    else:
      stacked.setdefault(entry.path, []).append(array)
  parts, columns = _fusion_columns(config)
  fusion = tensors.get(_FUSION_WEIGHT)
  if fusion is None:
    missing.append(_FUSION_WEIGHT)
  elif fusion.shape != (config.width, columns):
    wrong.append(
      f'{_FUSION_WEIGHT} is {fusion.shape}, not {(config.width, columns)}'
    )
  elif not np.isfinite(np.asarray(fusion, np.float32)).all():
    wrong.append(f'{_FUSION_WEIGHT} is not finite')
  if missing or wrong:
    raise errors.UserError(
      'the weights do not fit the config: '
      + '; '.join([f'missing {", ".join(missing)}'] * bool(missing) + wrong)
    )
  for path, cut in parts:
    block = np.asarray(fusion[:, cut].T, np.float32)
    _set(params, path, block[0] if path[-1] == 'fuse_value' else block)
  for path, arrays in stacked.items():
    _set(params, path, np.stack(arrays))
  _check_tied(tensors)
  return params


def params_to_original(
  params: model_lib.Params, config: model_lib.ModelConfig
) -> dict[str, np.ndarray]:
  """Parameters (or their gradients) under the original's names and shapes.

  Tied tensors stand once, under the name of the embedding and of
  `cls.predictions.bias`. Vectors of missing priors have no counterpart.
  """
  tensors = {}
  for entry in _entries(config):
    array = np.asarray(_get(params, entry.path))
    if entry.layer is not None:
      array = array[entry.layer]
    tensors[entry.name] = entry.to_original(array)
  parts, columns = _fusion_columns(config)
  fusion = np.zeros((config.width, columns), np.float32)
  for path, cut in parts:
    fusion[:, cut] = np.atleast_2d(np.asarray(_get(params, path))).T
  tensors[_FUSION_WEIGHT] = fusion
  return tensors


def knowledge_from_original(
  tensors: Mapping[str, np.ndarray], config: model_lib.ModelConfig
) -> knowledge_lib.Knowledge:
  """The prior tables that the original keeps inside its state dict.

  Raises:
    UserError: a table or the map of orthologues is damaged.
  """
  V = config.vocabulary_size
  own_V = np.arange(V, dtype=np.int32)
  homologs = np.asarray(tensors.get(_HOMOLOGS, own_V), np.int32)
  if homologs.shape != (V,) or homologs.min() < 0 or homologs.max() >= V:
    raise errors.UserError(
      f'{_HOMOLOGS} must hold {V} tokens below {V}; the file is damaged'
    )
  tables = {}
  for ours, name, _ in PRIORS:
    if ours not in dict(config.priors):
      continue
    key = f'{_EMBEDDINGS}.{name}_knowledge'
    table = np.asarray(tensors[key], np.float32)
    if len(table) != V or not np.isfinite(table).all():
      raise errors.UserError(
        f'{key} must hold {V} finite rows, it is {table.shape}'
      )
    tables[ours] = table
  rows = [own_V] * config.num_species
  if config.num_species > 1:
    rows[1] = homologs  # 0 human, 1 mouse: mouse cells read mouse rows
  return knowledge_lib.Knowledge(
    row_SV=np.stack(rows),
    tables=tables,
    has_vector={name: np.ones(V, bool) for name in tables},
  )


def read_original(
  source: paths.PathLike,
  config_path: paths.PathLike | None = None,
  key_prefix: str = '',
) -> tuple[
  model_lib.ModelConfig, model_lib.Params, assets_lib.Assets, list[str]
]:
  """Reads original weights: (config, params, assets, names not used).

  Raises:
    UserError: as `tensor_files.read`, `config_from_original` and
      `params_from_original`.
  """
  tensors = tensor_files.read(source, key_prefix)
  original = None
  if config_path is not None:
    try:
      original = paths.read_json(config_path)
    except (OSError, ValueError) as error:
      raise errors.UserError(
        f'{config_path}: not a JSON config ({errors.first_line(error)})'
      ) from error
    if not isinstance(original, dict):
      raise errors.UserError(f'{config_path}: must hold one JSON object')
  for key, tensor in tensors.items():
    if key.startswith(_PARTS) and tensor.dtype.kind not in 'fiub':
      raise errors.UserError(f'{key} holds {tensor.dtype}, not real numbers')
  try:
    config = config_from_original(tensors, original)
    params = params_from_original(tensors, config)
    assets = assets_lib.Assets(knowledge_from_original(tensors, config))
  except errors.UserError:
    raise
  except (ValueError, TypeError, IndexError, KeyError) as error:
    raise errors.UserError(
      f'{os.fspath(source)}: the tensors do not have the shapes and names of '
      f'GeneCompass ({errors.first_line(error)})'
    ) from error
  used = {entry.name for entry in _entries(config)} | set(_IGNORED)
  used |= {_FUSION_WEIGHT, _HOMOLOGS}
  used |= {
    f'{_EMBEDDINGS}.{name}_knowledge'
    for ours, name, _ in PRIORS
    if ours in dict(config.priors)
  }
  return config, params, assets, sorted(set(tensors) - used)


def with_genes(
  assets: assets_lib.Assets,
  config: model_lib.ModelConfig,
  vocabulary_path: paths.PathLike = '',
  medians_path: paths.PathLike = '',
) -> assets_lib.Assets:
  """Assets that can encode counts: with the genes behind the tokens.

  Args:
    assets: of converted weights, which know tokens only.
    config: of the model.
    vocabulary_path: file of `Vocabulary.save`; '' for none.
    medians_path: file of `Medians.save`, with the vocabulary; '' for none.

  Raises:
    UserError: one without the other, or a vocabulary of another size.
  """
  if bool(vocabulary_path) != bool(medians_path):
    raise errors.UserError(
      'give --vocabulary and --medians together: counts need both'
    )
  if not vocabulary_path:
    return assets
  vocabulary = vocabulary_lib.Vocabulary.load(vocabulary_path)
  if vocabulary.size != config.vocabulary_size:
    raise errors.UserError(
      f'{vocabulary_path}: {vocabulary.size} tokens, the weights have '
      f'{config.vocabulary_size}'
    )
  medians = medians_lib.Medians.load(medians_path, vocabulary)
  return dataclasses.replace(
    assets,
    vocabulary=vocabulary,
    medians=medians,
    encoding=encoding_lib.EncodingConfig(
      mode=medians.mode, max_genes=min(config.max_genes, 2048)
    ),
  )


def _fusion_columns(config: model_lib.ModelConfig):
  """Our parameters that make up the fusion matrix: (path, columns), total."""
  parts, start = [], 0

  def add(width, *path):
    nonlocal start
    parts.append((('embedding', *path), slice(start, start + width)))
    start += width

  add(config.width, 'fuse_word')
  if config.use_values:
    add(1, 'fuse_value')
  for name, _ in config.priors:
    add(config.width, 'fuse_priors', name)
  return parts, start


def _prior_scale(tensors, original, head: str) -> float:
  """The factor on priors that the original's next forward pass would use.

  Its warm-up adds 1 / emb_warmup_steps on every call while alpha < 1, in
  evaluation too; classification heads never pass alpha on.
  """
  alpha = np.float32(np.ravel(tensors.get('emb_warmup.alpha', 1.0))[0])
  steps = _number(original, 'emb_warmup_steps', 0)
  if head != 'pretraining':
    return 1.0
  if steps > 0 and alpha < 1:
    alpha = np.float32(alpha + np.float32(1.0 / steps))
  return float(alpha)


def _check_tied(tensors: Mapping[str, np.ndarray]) -> None:
  pairs = (
    ('cls.predictions.decoder.weight', f'{_EMBEDDINGS}.word_embeddings.weight'),
    ('cls.predictions.decoder.bias', 'cls.predictions.bias'),
    ('cls4value.predictions.decoder.bias', 'cls4value.predictions.bias'),
  )
  for copy, owner in pairs:
    if copy in tensors and not np.array_equal(tensors[copy], tensors[owner]):
      raise errors.UserError(
        f'{copy} differs from {owner}, to which the original ties it; the '
        'file does not come from this architecture'
      )


def _number(
  original: Mapping[str, Any], key: str, default: int | float = 0
) -> int | float:
  """A number of the original's config, of the kind of its default.

  A key that holds null is as good as absent, but for one without a default.
  """
  value = original.get(key, default)
  value = default if value is None and key != 'num_attention_heads' else value
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or value < 0 or value != type(default)(value):
    kind = 'whole number' if isinstance(default, int) else 'number'
    raise errors.UserError(
      f'--config: {key}={value!r} must be a {kind}, not negative'
    )
  return type(default)(value)


def _switch(original: Mapping[str, Any], key: str, default: bool) -> bool:
  value = original.get(key, default)
  value = default if value is None else value
  if value not in (True, False):  # 0 and 1 too
    raise errors.UserError(f'--config: {key}={value!r} must be true or false')
  return bool(value)


def _refuse_unlike(original: Mapping[str, Any], key: str, wanted: str) -> None:
  if original.get(key, wanted) != wanted:
    raise errors.UserError(
      f'--config: {key}={original[key]!r} is not an option of the original; '
      f'only {wanted!r} can be converted'
    )


def _get(tree: Any, path: tuple[str, ...]) -> Any:
  for part in path:
    tree = tree[part]
  return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  for part in path[:-1]:
    tree = tree.setdefault(part, {})
  tree[path[-1]] = value
