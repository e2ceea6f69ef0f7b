"""A model card: what an exported model is, in a page for people.

Only what the model itself says is written: no results, and nothing about
training that is not recorded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import genecompass_jax
from genecompass_jax import (
  assets as assets_lib,
  encoding as encoding_lib,
  model as model_lib,
  vocabulary as vocabulary_lib,
)

NAME = 'README.md'
_PAPER = 'Yang et al., Cell Research 34:830-845 (2024)'
_DOI = 'https://doi.org/10.1038/s41422-024-01034-y'
_HEADS = {
  'pretraining': 'predicts hidden genes and their values',
  'sequence': 'classifies cells',
  'token': 'classifies genes of a cell',
}


def text(
  config: model_lib.ModelConfig,
  assets: assets_lib.Assets,
  *,
  loading: str,
  step: int = -1,
  provenance: Mapping[str, Any] | None = None,
  hashes: Mapping[str, str] | None = None,
) -> str:
  """The card as Markdown.

  Args:
    config: of the model.
    assets: its vocabulary, medians, encoding and priors.
    loading: Python lines that load the files beside the card.
    step: training step, -1 where unknown.
    provenance: what is recorded of where the parameters come from: of a run
      `corpus_sha256`, `seed`, `total_steps`; of the original `weights`
      {file: sha256}.
    hashes: sha256 of files or parts, by name.
  """
  provenance = dict(provenance or {})
  parts = [
    _head(config, assets, provenance),
    _section('Parameters', _parameters(config)),
    _section('Genes and encoding', _genes(config, assets)),
    _section('Knowledge', _priors(config, assets)),
    _section('Training', _training(step, provenance)),
    _section('Loading', f'```python\n{loading.strip()}\n```'),
    _section('Limits', _limits(config, assets)),
    _section('Licence', _licence(assets)),
    _section('Hashes', _table(('what', 'sha256'), (hashes or {}).items())),
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _section(title: str, body: str) -> str:
  return f'## {title}\n\n{body}' if body else ''


def _table(heads: Sequence[str], rows) -> str:
  lines = [f'| {" | ".join(map(str, row))} |' for row in rows]
  if not lines:
    return ''
  top = [f'| {" | ".join(heads)} |', '|' + '---|' * len(heads)]
  return '\n'.join(top + lines)


def _head(config, assets, provenance) -> str:
  is_original = assets.original is not None
  origin = (
    'Converted from weights under the names of the original PyTorch model'
    if is_original or 'weights' in provenance
    else 'Trained with genecompass_jax'
  )
  norms = 'after the residual sums' if config.norm_order == 'post' else 'before'
  return (
    f'# GeneCompass, {config.num_layers} layers of {config.width}\n\n'
    f'A transformer of single cells, of the architecture of [{_PAPER}]({_DOI}). '
    f'{origin}; written by genecompass_jax {genecompass_jax.__version__}.\n\n'
    f'It {_HEADS[config.head]}'
    f'{f" ({config.num_labels} labels)" if config.num_labels else ""}: '
    f'{config.num_layers} blocks, {config.num_heads} attention heads of '
    f'{config.head_dim}, feed-forward of {config.feed_forward:,}, norms '
    f'{norms}, up to {config.max_genes:,} genes of a cell, '
    f'{config.num_species} species, {"with" if config.use_values else "without"} '
    f'expression values, {"with" if config.use_cls else "without"} a species '
    'slot before the genes.'
  )


def _parameters(config) -> str:
  counts = model_lib.count_parameters(config)
  rows = [(k.replace('_', ' '), f'{n:,}') for k, n in counts.items()]
  return _table(('group', 'parameters'), rows)


def _genes(config, assets) -> str:
  vocabulary = assets.vocabulary
  if vocabulary is None:
    return (
      f'{config.vocabulary_size:,} tokens, of which the files do not say the '
      'genes: the model takes tokens and values, not counts.'
    )
  genes_S = [
    f'{int((vocabulary.genes.species_G == s).sum()):,} {name}'
    for s, name in enumerate(vocabulary.species)
  ]
  shared = int(vocabulary.is_shared_V().sum())
  said = (
    f'{vocabulary.size:,} tokens of {" and ".join(genes_S)} genes (Ensembl ids); '
    f'{shared:,} tokens stand for genes of several species (orthologues: '
    f'{vocabulary.orthologues}). Vocabulary sha256 `{vocabulary.sha256}`.'
  )
  if assets.medians is None:
    return f'{said}\n\nWithout medians, so counts cannot be encoded.'
  encoding, medians = assets.encoding, assets.medians
  supported = medians.is_supported_SV().sum(1).tolist()
  count = (
    'count / median'
    if encoding.mode == encoding_lib.RELEASED
    else f'count / library size x {encoding.target_sum:g} / median'
  )
  by_species = ', '.join(
    f'{n:,} {name}' for n, name in zip(supported, vocabulary.species)
  )
  return (
    f'{said}\n\nEncoding `{encoding.mode}`: log2(1 + {count}), genes by falling '
    f'value, at most {encoding.max_genes:,}; ties by {encoding.ties}. Medians of '
    f'{by_species} tokens; sha256 `{medians.sha256}`.'
  )


def _priors(config, assets) -> str:
  rows = []
  special = vocabulary_lib.NUM_SPECIAL
  for name, width in config.priors:
    table = np.asarray(assets.knowledge.tables[name])[special:]
    has = np.asarray(assets.knowledge.has_vector[name])[special:]
    has = has & (table != 0).any(axis=1)
    share = has.mean() if len(has) else 0.0
    rows.append((name, width, f'{has.sum():,} of {len(has):,}', f'{share:.1%}'))
  if not rows:
    return 'No prior tables.'
  missing = (
    'read a trained vector'
    if config.missing_prior == 'learned'
    else 'read zeros'
  )
  return (
    _table(('prior', 'width', 'rows with a vector', 'coverage'), rows)
    + f'\n\nGenes without a vector {missing}. Projected priors are scaled by '
    f'{config.prior_scale:g}.'
  )


def _training(step, provenance) -> str:
  lines = []
  if step >= 0:
    total = provenance.get('total_steps')
    of = f' of {total:,}' if isinstance(total, int) else ''
    lines.append(f'- step {step:,}{of}')
  if 'corpus_sha256' in provenance:
    lines.append(f'- corpus sha256 `{provenance["corpus_sha256"]}`')
  if 'seed' in provenance:
    lines.append(f'- seed {provenance["seed"]}')
  for file, sha256 in dict(provenance.get('weights', {})).items():
    lines.append(f'- converted from `{file}`, sha256 `{sha256}`')
  if step < 0 and 'corpus_sha256' not in provenance:
    lines.append('- steps and cells of the training are not recorded here')
  return '\n'.join(lines)


def _limits(config, assets) -> str:
  lines = [
    '- What the model says about genes are associations learned from '
    'expression, no causal estimates: a perturbation of its input is no '
    'experiment.',
    '- This page states no results: none were obtained by writing it.',
    '- Research use only, nothing clinical.',
  ]
  if assets.original is not None and config.head != 'pretraining':
    lines.append(
      '- In the original, the classification heads read every cell as human.'
    )
  return '\n'.join(lines)


def _licence(assets) -> str:
  if assets.original is not None:
    return (
      'The weights are of those who trained them and keep their terms; the '
      'authors of GeneCompass state no licence for theirs. Converting them gives '
      'no new rights.'
    )
  return (
    'The code is Apache-2.0. The weights follow the terms of the cells and '
    'tables that they were trained on.'
  )
