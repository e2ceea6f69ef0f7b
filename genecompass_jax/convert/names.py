"""The name table: a tensor of the original <-> a parameter of ours.

An original linear layer keeps [out, in] weights,
ours [in, out]; attention heads are split out; layers are stacked; the fusion
matrix of 5h + 1 columns is cut into one block a part.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from genecompass_jax import errors, model as model_lib

# Our name, the original's name of its parts, and the switch in its config, in
# the order in which the original concatenates them.
PRIORS = (
  ('promoter', 'promoter', 'use_promoter'),
  ('co_expression', 'co_exp', 'use_co_exp'),
  ('gene_family', 'gene_family', 'use_gene_family'),
  ('grn', 'peca_grn', 'use_peca_grn'),
)

# What names of the model's own tensors begin with.
PARTS = ('bert.', 'cls.', 'cls4value.', 'classifier.', 'emb_warmup.')
EMBEDDINGS = 'bert.embeddings'
WORD = f'{EMBEDDINGS}.word_embeddings.weight'
POSITION = f'{EMBEDDINGS}.position_embeddings.weight'
CLS = 'bert.cls_embedding.weight'
_FUSION = f'{EMBEDDINGS}.concat_embeddings'
FUSION_WEIGHT = f'{_FUSION}.cat_fc.weight'

# Tensors of the original's state dict that are no parameters.
POSITION_IDS = f'{EMBEDDINGS}.position_ids'  # a constant: 0, 1, ...
HOMOLOGS = f'{EMBEDDINGS}.homologous_index'  # read into the prior tables
ALPHA = 'emb_warmup.alpha'  # read into prior_scale
STEPS = 'emb_warmup.steps'  # a counter of calls
# Names under which a parameter stands once more -> its own.
TIED = {
  'cls.predictions.decoder.weight': WORD,
  'cls.predictions.decoder.bias': 'cls.predictions.bias',
  'cls4value.predictions.decoder.bias': 'cls4value.predictions.bias',
}


def knowledge_name(original: str) -> str:
  """The buffer of a prior, by the original's name of it."""
  return f'{EMBEDDINGS}.{original}_knowledge'


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
  yield _Entry(WORD, (embedding, 'word'))
  yield _Entry(POSITION, (embedding, 'position'))
  yield _Entry(
    f'{EMBEDDINGS}.token_type_embeddings.weight', (embedding, 'token_type')
  )
  yield from _norm(f'{EMBEDDINGS}.LayerNorm', embedding, 'norm')
  if config.use_cls:
    yield _Entry(CLS, (embedding, 'cls'))
  for ours, original, _ in PRIORS:
    if ours in dict(config.priors):
      yield from _linear(
        f'{EMBEDDINGS}.{original}_embeddings.linear1',
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


def parameter_names(config: model_lib.ModelConfig) -> set[str]:
  """Names of the original's parameters in a model of this configuration."""
  return {entry.name for entry in _entries(config)} | {FUSION_WEIGHT}


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
  fusion = tensors.get(FUSION_WEIGHT)
  if fusion is None:
    missing.append(FUSION_WEIGHT)
  elif fusion.shape != (config.width, columns):
    wrong.append(
      f'{FUSION_WEIGHT} is {fusion.shape}, not {(config.width, columns)}'
    )
  elif not np.isfinite(np.asarray(fusion, np.float32)).all():
    wrong.append(f'{FUSION_WEIGHT} is not finite')
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
  tensors[FUSION_WEIGHT] = fusion
  return tensors


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
  for name, _, _ in PRIORS:  # in the original's order, whatever ours is
    if name in dict(config.priors):
      add(config.width, 'fuse_priors', name)
  return parts, start


def _check_tied(tensors: Mapping[str, np.ndarray]) -> None:
  for copy, owner in TIED.items():
    if copy in tensors and not np.array_equal(
      tensors[copy], tensors.get(owner, tensors[copy])
    ):
      raise errors.UserError(
        f'{copy} differs from {owner}, to which the original ties it; the '
        'file does not come from this architecture'
      )


def _get(tree: Any, path: tuple[str, ...]) -> Any:
  for part in path:
    tree = tree[part]
  return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  for part in path[:-1]:
    tree = tree.setdefault(part, {})
  tree[path[-1]] = value
