"""Original weights of other sizes than the recorded ones, there and back.

The yardstick is tests/original_forward.py, which is itself held against the
recorded outputs here.
"""

import json

import jax
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import cli, tensor_files
from tests import original_forward
from tests.test_convert_export import assert_same_tensors
from tests.test_parity import recorded_weights, write_release

CONFIG = {
  'vocab_size': 3000,
  'hidden_size': 128,
  'num_hidden_layers': 4,
  'num_attention_heads': 8,
  'intermediate_size': 256,
  'max_position_embeddings': 160,
  'layer_norm_eps': 1e-12,
  'use_values': True,
  'use_promoter': True,
  'use_co_exp': True,
  'use_gene_family': True,
  'use_peca_grn': True,
  'use_cls_token': True,
  'emb_warmup_steps': 10000,
  'hidden_act': 'gelu',
}
WIDTHS = {'promoter': 48, 'co_exp': 64, 'gene_family': 32, 'peca_grn': 56}


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


def run(*words):
  return cli.main([str(word) for word in words])


def cells(seed, num=5, longest=150, vocabulary=3000):
  rng = np.random.default_rng(seed)
  lengths = np.array([longest, *rng.integers(2, longest, num - 1)])
  ids = rng.integers(2, vocabulary, (num, longest))
  values = rng.gamma(2, 1, ids.shape).astype(np.float32)
  is_gene = np.arange(longest) < lengths[:, None]
  species = np.arange(num) % 2
  return ids * is_gene, values * is_gene, species, lengths, is_gene


def test_the_yardstick_equals_the_recorded_original(oracle):
  for name in (
    'tiny_full',
    'tiny_alpha03',
    'tiny_novalues',
    'tiny_seqcls_nocls',
  ):
    weights, arrays, meta = recorded_weights(oracle, name)
    species = arrays.get('in/species', np.zeros(len(meta['lengths']), int))
    _, outputs = original_forward.forward(
      weights,
      meta['config'],
      arrays['in/input_ids'],
      arrays['in/values'],
      species.reshape(-1),
      np.asarray(meta['lengths']),
    )
    np.testing.assert_allclose(
      outputs['logits'], arrays['out/logits'], atol=2e-5
    )


@pytest.mark.parametrize(
  ('changes', 'head'),
  [
    ({}, {}),
    ({}, {'num_labels': 7, 'pooler': True}),
    # 4 s each with those below
    pytest.param(
      {'use_cls_token': False},
      {'num_labels': 3, 'pooler': False},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'use_values': False, 'use_promoter': False}, {}, marks=pytest.mark.slow
    ),
    pytest.param(
      {'use_cls_token': False, 'use_co_exp': False}, {}, marks=pytest.mark.slow
    ),
  ],
)
def test_medium_models_there_and_back(changes, head, tmp_path):
  config = CONFIG | changes
  weights = original_forward.random_weights(config, WIDTHS, **head)
  write_release(tmp_path / 'release', weights, config)
  assert (
    run('convert', 'pytorch', tmp_path / 'release', '-o', tmp_path / 'm') == 0
  )
  model = gc.load(tmp_path / 'm')
  ids, values, species, lengths, is_gene = cells(1)
  batch = gc.cell_batch(ids, values, species, lengths=lengths)
  states, outputs = original_forward.forward(
    weights, config, ids, values, species, lengths
  )
  if config['use_cls_token']:
    is_gene = np.pad(is_gene, ((0, 0), (1, 0)), constant_values=True)
  ours = np.asarray(model.hidden_states(batch, every_layer=True))
  for mine, theirs in zip(ours, states, strict=True):
    np.testing.assert_allclose(mine[is_gene], theirs[is_gene], atol=2e-5)
  found = model.logits(batch)
  if head:
    found, wanted = np.asarray(found), outputs['logits']
    found, wanted = (
      (found, wanted) if head['pooler'] else (found[is_gene], wanted[is_gene])
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)
  else:
    is_gene = is_gene[:, -ids.shape[1] :]
    np.testing.assert_allclose(
      np.asarray(found[0])[is_gene], outputs['logits'][is_gene], atol=2e-5
    )
    if config['use_values']:
      np.testing.assert_allclose(
        np.asarray(found[1])[is_gene], outputs['values'][is_gene], atol=2e-5
      )
  assert run('convert', 'export', tmp_path / 'm', '-o', tmp_path / 'back') == 0
  assert_same_tensors(tensor_files.read(tmp_path / 'back'), weights)
  assert json.loads(
    (tmp_path / 'back' / 'config.json').read_text()
  ).items() >= (config.items())
