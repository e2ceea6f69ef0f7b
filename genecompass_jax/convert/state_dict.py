"""A model of ours -> the original's state dict and config.

All that the original's `state_dict()` lists is written, what is no parameter
included: prior tables, the map of orthologues, tied copies, constants, counters.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genecompass_jax import errors, model as model_lib, pretrained
from genecompass_jax.convert import names, original as original_lib

_ARCHITECTURES = {
  'pretraining': 'BertForMaskedLM',
  'sequence': 'BertForSequenceClassification',
  'token': 'BertForTokenClassification',
}


def state_dict(model: pretrained.PretrainedModel) -> dict[str, np.ndarray]:
  """The tensors of a model under the original's names, float32.

  Raises:
    UserError: the original has no place for a part of the model.
  """
  config = model.config
  _check_expressible(config)
  tensors = names.params_to_original(model.params, config)
  positions = np.arange(config.max_genes, dtype=np.int64)[None]
  tensors[names.POSITION_IDS] = positions
  tensors |= _prior_buffers(model)
  kept = model.assets.original
  if kept is not None:
    tensors |= {n: t for n, t in kept.tensors.items() if n not in tensors}
  if config.head == 'pretraining' and not _has_warm_up(model):
    tensors[names.ALPHA] = np.float32(config.prior_scale)
    tensors[names.STEPS] = np.int64(0)
  for copy, owner in names.TIED.items():
    head = copy.partition('.predictions')[0]
    if f'{head}.predictions.bias' in tensors:
      tensors[copy] = tensors[owner]
  return tensors


def original_config(model: pretrained.PretrainedModel) -> dict[str, Any]:
  """The configuration of a model in the keys of the original."""
  config, kept = model.config, model.assets.original
  priors = dict(config.priors)
  found = {
    'architectures': [_ARCHITECTURES[config.head]],
    'initializer_range': 0.02,
    'model_type': 'bert',
    'pad_token_id': 0,
    'type_vocab_size': 2,
    'warmup_steps': 10000,
  }
  found |= dict(kept.config if kept is not None else {})
  found |= {
    'attention_probs_dropout_prob': config.attention_dropout,
    'hidden_act': 'gelu',
    'hidden_dropout_prob': config.hidden_dropout,
    'hidden_size': config.width,
    'intermediate_size': config.feed_forward,
    'layer_norm_eps': config.norm_epsilon,
    'max_position_embeddings': config.max_genes,
    'num_attention_heads': config.num_heads,
    'num_hidden_layers': config.num_layers,
    'use_cls_token': config.use_cls,
    'use_values': config.use_values,
    'vocab_size': config.vocabulary_size,
  }
  found |= {switch: ours in priors for ours, _, switch in names.PRIORS}
  if config.head != 'pretraining':
    found['num_labels'] = config.num_labels
  elif not _has_warm_up(model):
    found['emb_warmup_steps'] = 0  # nothing is added to alpha
  return found


def _check_expressible(config: model_lib.ModelConfig) -> None:
  """Refuses what the original's architecture does not have."""
  known = {ours for ours, _, _ in names.PRIORS}
  foreign = [name for name, _ in config.priors if name not in known]
  reasons = {
    "norms before the blocks (norm_order='pre')": config.norm_order != 'post',
    'a vector of hidden ranks (hides_ranks)': config.hides_ranks,
    'logits scaled by width (base_width)': config.hidden_scale != 1,
    f'{config.num_species} species': config.num_species > 2,
    f'a prior {foreign[0] if foreign else ""!r}': bool(foreign),
    'no priors at all': not config.priors,
  }
  for what, is_so in reasons.items():
    if is_so:
      raise errors.UserError(
        f'the original has no model with {what}; a model of that kind is '
        'exported with `genecompass convert params`, and read by this package'
      )


def _has_warm_up(model: pretrained.PretrainedModel) -> bool:
  """Whether the kept counters give the factor on priors that the model has."""
  kept = model.assets.original
  if kept is None or names.ALPHA not in kept.tensors:
    return False
  scale = original_lib.prior_scale(kept.tensors, kept.config, model.config.head)
  return scale == model.config.prior_scale


def _prior_buffers(
  model: pretrained.PretrainedModel,
) -> Mapping[str, np.ndarray]:
  """Prior tables with a row a token, and the rows of mouse cells.

  Raises:
    UserError: mouse cells read rows that no token has.
  """
  config, knowledge = model.config, model.assets.knowledge
  row_SV = np.asarray(knowledge.row_SV)
  tables = {}
  for ours, original, _ in names.PRIORS:
    if ours not in dict(config.priors):
      continue
    table = np.array(knowledge.tables[ours], np.float32)
    if config.missing_prior == 'learned':
      vector = model.params['embedding']['priors'][ours]['missing']
      has = np.asarray(knowledge.has_vector[ours])
      table[~has] = np.asarray(vector)
    tables[names.knowledge_name(original)] = table[row_SV[0]]
  homologs_V = np.arange(config.vocabulary_size, dtype=np.int64)
  if config.num_species > 1:
    token_of = np.full(int(row_SV.max()) + 1, -1)
    token_of[row_SV[0][::-1]] = homologs_V[::-1]
    same_V = row_SV[1] == row_SV[0]
    homologs_V = np.where(same_V, homologs_V, token_of[row_SV[1]])
  if lost := int((homologs_V < 0).sum()):
    raise errors.UserError(
      f'{lost} tokens have a prior of their own in mouse cells, for which the '
      "original needs a row of the vocabulary (layout 'released'); this model's "
      "is 'compact': use `genecompass convert params`"
    )
  return tables | {names.HOMOLOGS: homologs_V}
