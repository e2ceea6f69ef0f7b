"""The original's config and state dict -> a model of ours.

What a model of ours has no place for (the counters of the warm-up, a value head
that is not used, the config) is kept with its assets, so that `state_dict` can
write the original's state dict again, bit for bit.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genecompass_jax import (
  assets as assets_lib,
  errors,
  knowledge as knowledge_lib,
  model as model_lib,
  paths,
  tensor_files,
)
from genecompass_jax.convert import names

CONFIG = 'config.json'
_CONFIG_BESIDE = '.config.json'  # of weights.safetensors: weights.config.json
# Tensors that the original's checkpoints may hold, and that its forward pass
# does not read: a buffer of zeros; heads of what the weights were before.
_UNREAD = (f'{names.EMBEDDINGS}.token_type_ids', 'bert.pooler.')
_UNREAD_HEADS = ('cls.', 'cls4value.', 'emb_warmup.')
# Keys of the config -> what the weights show.
_SIZES = (
  ('vocab_size', 'vocabulary_size'),
  ('hidden_size', 'width'),
  ('num_hidden_layers', 'num_layers'),
  ('intermediate_size', 'feed_forward'),
  ('max_position_embeddings', 'max_genes'),
)


def read_original(
  source: paths.PathLike,
  config_path: paths.PathLike | None = None,
  key_prefix: str = '',
  leave_out: Sequence[str] = (),
) -> tuple[
  model_lib.ModelConfig, model_lib.Params, assets_lib.Assets, list[str]
]:
  """Reads original weights: (config, params, assets, names not used).

  Args:
    source: a file or folder of weights; see `tensor_files.read`.
    config_path: the original's config; None takes the one beside the weights.
    key_prefix: of the names that are read.
    leave_out: beginnings of names of tensors that are not the original's.

  Raises:
    UserError: as `tensor_files.read`, `config_from_original` and
      `params_from_original`; or a tensor under the names of the model is one
      that the original does not have.
  """
  tensors = tensor_files.read(source, key_prefix)
  original = _read_config(config_path or _config_beside(source))
  for copy, owner in names.TIED.items():  # files without copies keep either
    if owner not in tensors and copy in tensors:
      tensors[owner] = tensors[copy]
  try:
    _check_prefix(tensors)
    _check_kinds(tensors)
    _check_rows(tensors, original)
    config = config_from_original(tensors, original)
    params = names.params_from_original(tensors, config)
    knowledge = knowledge_from_original(tensors, config)
    _check_positions(tensors, config)
  except errors.UserError as error:
    raise errors.UserError(f'{os.fspath(source)}: {error}') from error.__cause__
  except (ValueError, TypeError, IndexError, KeyError) as error:
    raise errors.UserError(
      f'{os.fspath(source)}: the tensors do not have the shapes and names of '
      f'GeneCompass ({errors.first_line(error)})'
    ) from error
  unused = _unused(tensors, config)
  _check_unknown(source, unused, config, leave_out)
  record = assets_lib.Original(
    config=dict(original or {}),
    tensors={
      name: np.asarray(tensors[name], order='C')
      for name in sorted({*unused, names.ALPHA, names.STEPS} & tensors.keys())
      if name.startswith(names.PARTS) and not name.startswith(tuple(leave_out))
    },
  )
  return config, params, assets_lib.Assets(knowledge, original=record), unused


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

  word, position = tensor(names.WORD), tensor(names.POSITION)
  if 'num_attention_heads' not in original:
    raise errors.UserError(
      'the number of attention heads does not show in the weights; give '
      '--config with num_attention_heads (and the other keys of the original)'
    )
  _refuse_unlike(original, 'hidden_act', 'gelu')
  _refuse_unlike(original, 'position_embedding_type', 'absolute')
  _refuse_unlike(original, 'is_decoder', False)  # its attention looks back only
  _refuse_unlike(original, 'add_cross_attention', False)
  parts = [name.split('.') for name in tensors]
  layers = {int(n[3]) for n in parts if n[:3] == ['bert', 'encoder', 'layer']}
  use_values = _switch(
    original,
    'use_values',
    tensor(names.FUSION_WEIGHT).shape[1] % word.shape[1] == 1,
  )
  priors = []
  for ours, name, switch in names.PRIORS:
    table = names.knowledge_name(name)
    if _switch(original, switch, table in tensors):
      priors.append((ours, int(tensor(table).shape[1])))
  head, num_labels = 'pretraining', 0
  if 'classifier.weight' in tensors:
    pooled = 'bert.pooler.dense.weight' in tensors
    head = 'sequence' if pooled else 'token'
    num_labels = int(tensor('classifier.weight').shape[0])
    _check_labels(original, num_labels)
  use_cls = _switch(original, 'use_cls_token', names.CLS in tensors)
  cls = tensor(names.CLS) if use_cls else None
  shown = {
    'vocabulary_size': int(word.shape[0]),
    'width': int(word.shape[1]),
    'num_layers': len(layers),
    'feed_forward': int(
      tensor('bert.encoder.layer.0.intermediate.dense.bias').shape[0]
    ),
    'max_genes': int(position.shape[0]),
  }
  for key, ours in _SIZES:
    if (said := _number(original, key, shown[ours])) != shown[ours]:
      raise errors.UserError(
        f'--config: {key}={said}, the weights have {shown[ours]}'
      )
  return model_lib.ModelConfig(
    **shown,
    num_heads=_number(original, 'num_attention_heads'),
    num_species=2 if cls is None else int(cls.shape[0]),
    priors=tuple(priors),
    missing_prior='released',
    use_values=use_values,
    use_cls=use_cls,
    hidden_dropout=_number(original, 'hidden_dropout_prob', 0.02),
    attention_dropout=_number(original, 'attention_probs_dropout_prob', 0.02),
    prior_scale=prior_scale(tensors, original, head),
    norm_epsilon=_number(original, 'layer_norm_eps', 1e-12),
    head=head,
    num_labels=num_labels,
  )


def knowledge_from_original(
  tensors: Mapping[str, np.ndarray], config: model_lib.ModelConfig
) -> knowledge_lib.Knowledge:
  """The prior tables that the original keeps inside its state dict.

  Raises:
    UserError: a table or the map of orthologues is damaged.
  """
  V = config.vocabulary_size
  own_V = np.arange(V, dtype=np.int32)
  homologs = np.asarray(tensors.get(names.HOMOLOGS, own_V))
  if (
    homologs.shape != (V,)
    or homologs.dtype.kind not in 'iu'
    or homologs.min() < 0
    or homologs.max() >= V
  ):
    raise errors.UserError(
      f'{names.HOMOLOGS} must hold {V} tokens below {V}; the file is damaged'
    )
  tables = {}
  for ours, name, _ in names.PRIORS:
    if ours not in dict(config.priors):
      continue
    key = names.knowledge_name(name)
    table = np.asarray(tensors[key], np.float32)
    if len(table) != V or not np.isfinite(table).all():
      raise errors.UserError(
        f'{key} must hold {V} finite rows, it is {table.shape}'
      )
    tables[ours] = table
  rows = [own_V] * config.num_species
  if config.num_species > 1:
    rows[1] = homologs.astype(np.int32)  # mouse cells read mouse rows
  return knowledge_lib.Knowledge(
    row_SV=np.stack(rows),
    tables=tables,
    has_vector={name: np.ones(V, bool) for name in tables},
  )


def prior_scale(
  tensors: Mapping[str, np.ndarray], original: Mapping[str, Any], head: str
) -> float:
  """The factor on priors that the original's next forward pass would use.

  Its warm-up adds 1 / emb_warmup_steps on every call while alpha < 1, in
  evaluation too; classification heads never pass alpha on.
  """
  alphas = np.ravel(tensors.get(names.ALPHA, 1.0))
  if len(alphas) != 1:
    raise errors.UserError(
      f'{names.ALPHA} holds {len(alphas)} numbers, not one'
    )
  alpha = np.float32(alphas[0])
  steps = _number(original, 'emb_warmup_steps', 0)
  if head != 'pretraining':
    return 1.0
  if not np.isfinite(alpha):
    raise errors.UserError(f'{names.ALPHA} is not finite')
  if steps > 0 and alpha < 1:
    alpha = np.float32(alpha + np.float32(1.0 / steps))
  return float(alpha)


def _config_beside(source: paths.PathLike) -> str | None:
  """The config beside some weights: of its own name, or of the folder."""
  name = os.fspath(source)
  if tensor_files.is_folder(source):
    found = [paths.join(name, CONFIG)]
  else:
    folder, _, file = name.rpartition('/')
    beside = (file.rpartition('.')[0] + _CONFIG_BESIDE, CONFIG)
    found = [f'{folder}/{n}' if folder else n for n in beside]
  return next((place for place in found if paths.exists(place)), None)


def _read_config(path: paths.PathLike | None) -> dict[str, Any] | None:
  if path is None:
    return None
  try:
    original = paths.read_json(path)
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f'{path}: not a JSON config ({errors.first_line(error)})'
    ) from error
  if not isinstance(original, dict):
    raise errors.UserError(f'{path}: must hold one JSON object')
  return original


def _check_prefix(tensors: Mapping[str, np.ndarray]) -> None:
  """Names the prefix, where the model's names stand behind one."""
  if names.WORD in tensors:
    return
  for name in tensors:
    if name.endswith((f'.{names.WORD}', f'/{names.WORD}')):
      prefix = name.removesuffix(names.WORD)
      raise errors.UserError(
        f'the names of the weights begin with {prefix!r}; give --key-prefix '
        f'{prefix}'
      )


def _check_kinds(tensors: Mapping[str, np.ndarray]) -> None:
  """Refuses tensors of the model that hold something else than they should."""
  for key, tensor in tensors.items():
    if not key.startswith(names.PARTS):
      continue
    if tensor.dtype.kind not in 'fiub':
      raise errors.UserError(f'{key} holds {tensor.dtype}, not real numbers')
    is_index = key in (names.POSITION_IDS, names.HOMOLOGS, names.STEPS)
    is_index |= key in _UNREAD
    if is_index != (tensor.dtype.kind in 'iu'):
      kind = 'whole numbers' if is_index else 'floating-point numbers'
      raise errors.UserError(f'{key} holds {tensor.dtype}, not {kind}')


def _check_rows(
  tensors: Mapping[str, np.ndarray], original: Mapping[str, Any] | None
) -> None:
  """Refuses parts that are of vocabularies of different sizes."""
  rows = {}
  if (size := (original or {}).get('vocab_size')) is not None:
    rows['vocab_size of the config'] = size
  tables = [names.knowledge_name(name) for _, name, _ in names.PRIORS]
  for name in (names.WORD, names.HOMOLOGS, 'cls.predictions.bias', *tables):
    if name in tensors:
      rows[name] = int(tensors[name].shape[0])
  if len(set(rows.values())) > 1:
    said = ', '.join(f'{name} {number}' for name, number in rows.items())
    raise errors.UserError(
      f'sizes of the vocabulary disagree: {said}; these parts are not of one '
      'model (see --config)'
    )


def _check_positions(
  tensors: Mapping[str, np.ndarray], config: model_lib.ModelConfig
) -> None:
  """Refuses positions that are not counted from 0: they would be looked up."""
  ids = tensors.get(names.POSITION_IDS)
  wanted = np.arange(config.max_genes)
  if ids is not None and not np.array_equal(np.ravel(ids), wanted):
    raise errors.UserError(
      f'{names.POSITION_IDS} must count from 0 to {config.max_genes - 1}; the '
      'file is damaged'
    )


def _check_labels(original: Mapping[str, Any], num_labels: int) -> None:
  said = original.get('num_labels')
  if said is None and isinstance(original.get('id2label'), dict):
    said = len(original['id2label'])
  if said is not None and said != num_labels:
    raise errors.UserError(
      f'--config: num_labels={said!r}, the classifier of the weights has '
      f'{num_labels}'
    )


def _unused(
  tensors: Mapping[str, np.ndarray], config: model_lib.ModelConfig
) -> list[str]:
  """Names of tensors that nothing was made of."""
  used = names.parameter_names(config) | {
    *(names.POSITION_IDS, names.HOMOLOGS, names.ALPHA, names.STEPS),
    *names.TIED,
  }
  used |= {
    names.knowledge_name(name)
    for ours, name, _ in names.PRIORS
    if ours in dict(config.priors)
  }
  return sorted(set(tensors) - used)


def _check_unknown(
  source: paths.PathLike,
  unused: Sequence[str],
  config: model_lib.ModelConfig,
  leave_out: Sequence[str],
) -> None:
  """Refuses tensors of the model whose part in it is not known.

  Without them the model would not be the one that was trained.
  """
  known = (*_UNREAD, *leave_out)
  if config.head != 'pretraining':
    known += _UNREAD_HEADS
  elif not config.use_values:
    known += ('cls4value.',)
  unknown = [
    name
    for name in unused
    if name.startswith(names.PARTS) and not name.startswith(known)
  ]
  if unknown:
    raise errors.UserError(
      f'{os.fspath(source)}: {", ".join(unknown[:5])}'
      f'{" ..." * (len(unknown) > 5)} would be left out: the original has no '
      'such tensor, or not with this config; leave it out with --leave-out NAME '
      'if the model does not need it'
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
  is_number = is_number and abs(value) < 1e300  # NaN is none either
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


def _refuse_unlike(
  original: Mapping[str, Any], key: str, wanted: str | bool
) -> None:
  if original.get(key, wanted) not in (wanted, None):
    raise errors.UserError(
      f'--config: {key}={original[key]!r} is not an option of the original; '
      f'only {wanted!r} can be converted'
    )
