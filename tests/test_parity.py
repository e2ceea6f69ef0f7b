"""Numerical parity with the original, on its recorded outputs.

Tolerances are those that the recordings support: their own rounding floor is
7.3e-6 on logits and 1.8e-6 on hidden states (float32 against float64).
"""

import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from genecompass_jax import cli, optimizer, pretrained
from genecompass_jax.convert import names, original
from tests import torch_zips

PRETRAINING = [
  'tiny_full',
  'tiny_alpha03',
  'tiny_species_none',
  'tiny_novalues',
  'tiny_promoter_only',
  'tiny_nocls',
  'tiny_novalues_nocls_family',
]
HEADS = ['tiny_seqcls', 'tiny_seqreg', 'tiny_seqcls_nocls', 'tiny_tokcls']


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


def recorded_weights(oracle, name):
  """State dict and config of a recorded model, and its recorded arrays."""
  meta = json.loads((oracle / 'meta.json').read_text())['files'][f'{name}.npz']
  arrays = dict(np.load(oracle / f'{name}.npz'))
  source = dict(arrays)
  if not any(key.startswith('sd/') for key in arrays):
    # Same weights as tiny_full, the warm-up factor apart.
    source = dict(np.load(oracle / 'tiny_full.npz'))
    source['sd/emb_warmup.alpha'] = np.float32(meta.get('alpha_param', 1.0))
  weights = {
    key.removeprefix('sd/'): np.asarray(value)
    for key, value in source.items()
    if key.startswith('sd/')
  }
  return weights, arrays, meta


def load(oracle, name, tmp_path):
  """A recorded model, its recorded arrays and its number of genes a cell."""
  weights, arrays, meta = recorded_weights(oracle, name)
  np.savez(
    tmp_path / 'weights.npz', **{f'sd/{k}': v for k, v in weights.items()}
  )
  (tmp_path / 'config.json').write_text(json.dumps(meta['config']))
  config, params, assets, _ = original.read_original(
    tmp_path / 'weights.npz', tmp_path / 'config.json', 'sd/'
  )
  model = pretrained.PretrainedModel(config, params, assets)
  return model, arrays, np.asarray(meta['lengths'])


def batch_of(arrays, lengths):
  return pretrained.cell_batch(
    arrays['in/input_ids'],
    arrays['in/values'],
    arrays.get('in/species'),
    lengths=lengths,
  )


@pytest.mark.parametrize('name', PRETRAINING)
def test_forward_equals_the_recorded_original(oracle, name, tmp_path):
  model, arrays, lengths = load(oracle, name, tmp_path)
  batch = batch_of(arrays, lengths)
  hidden = model.hidden_states(batch, every_layer=True)
  for layer, states in enumerate(hidden):
    np.testing.assert_allclose(states, arrays[f'out/hidden_{layer}'], atol=1e-5)
  np.testing.assert_array_equal(model.hidden_states(batch), hidden[-1])
  id_logits, values = model.logits(batch)
  np.testing.assert_allclose(id_logits, arrays['out/logits'], atol=2e-5)
  if model.config.use_values:
    np.testing.assert_allclose(
      values, arrays['out/predicted_values'], atol=2e-5
    )
  else:
    assert values is None


@pytest.mark.parametrize('name', PRETRAINING)
def test_loss_and_gradients_equal_the_recorded_original(oracle, name, tmp_path):
  model, arrays, lengths = load(oracle, name, tmp_path)
  batch = batch_of(arrays, lengths)

  def loss(params):
    total, *parts = pretrained.pretraining_loss(
      model.replace(params=params),
      batch,
      arrays['in/labels'],
      arrays['in/labels_values'],
    )
    return total, parts

  (total, (id_loss, value_loss)), grads = jax.value_and_grad(
    loss, has_aux=True
  )(model.params)
  for ours, theirs in [
    (total, 'out/loss'),
    (id_loss, 'out/id_loss'),
    (value_loss, 'out/value_loss'),
  ]:
    np.testing.assert_allclose(ours, arrays[theirs].squeeze(), rtol=1e-6)
  recorded = {
    key.removeprefix('grad/'): value
    for key, value in arrays.items()
    if key.startswith('grad/')
  }
  ours = names.params_to_original(grads, model.config)
  for key, value in recorded.items():
    np.testing.assert_allclose(ours[key], value, atol=1e-5, err_msg=key)
  if recorded:
    assert set(ours) == set(recorded)


@pytest.mark.parametrize('name', HEADS)
def test_task_heads_equal_the_recorded_original(oracle, name, tmp_path):
  model, arrays, lengths = load(oracle, name, tmp_path)
  batch = batch_of(arrays, lengths)
  hidden = model.hidden_states(batch, every_layer=True)
  for layer, states in enumerate(hidden):
    np.testing.assert_allclose(states, arrays[f'out/hidden_{layer}'], atol=1e-5)
  np.testing.assert_allclose(
    model.logits(batch), arrays['out/logits'], atol=2e-5
  )


def write_release(folder, weights, config):
  """A folder as Hugging Face writes it, weights tied as in PyTorch."""
  folder.mkdir()
  torch_zips.write(
    folder / 'pytorch_model.bin',
    weights,
    ties=[(c, o) for c, o in names.TIED.items() if c in weights],
    root='archive',
  )
  (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('name', [*PRETRAINING, *HEADS])
def test_a_file_of_pytorch_gives_the_same_model(oracle, name, tmp_path):
  weights, _, meta = recorded_weights(oracle, name)
  model, _, _ = load(oracle, name, tmp_path)
  write_release(tmp_path / 'release', weights, meta['config'])
  config, params, assets, _ = original.read_original(tmp_path / 'release')
  assert config == model.config
  jax.tree.map(np.testing.assert_array_equal, params, model.params)
  jax.tree.map(
    np.testing.assert_array_equal, assets.knowledge, model.assets.knowledge
  )


@pytest.mark.parametrize('name', ['tiny_full', 'tiny_seqcls_nocls'])
def test_a_converted_folder_answers_as_the_original(oracle, name, tmp_path):
  weights, arrays, meta = recorded_weights(oracle, name)
  write_release(tmp_path / 'release', weights, meta['config'])
  words = ['convert', 'pytorch', tmp_path / 'release', '-o', tmp_path / 'model']
  assert cli.main([str(word) for word in words]) == 0
  model = pretrained.load(tmp_path / 'model')
  found = model.logits(batch_of(arrays, np.asarray(meta['lengths'])))
  found = found[0] if name == 'tiny_full' else found
  np.testing.assert_allclose(found, arrays['out/logits'], atol=2e-5)


@pytest.mark.parametrize('name', ['torchadamw', 'hfadamw'])
def test_ten_optimiser_steps_follow_the_recorded_run(oracle, name, tmp_path):
  path = oracle / f'tiny_train_{name}.npz'
  if not path.exists():
    pytest.skip(f'{path.name} was not recorded')
  run = dict(np.load(path))
  meta = json.loads((oracle / 'meta.json').read_text())['files'][path.name]
  model, _, _ = load(oracle, 'tiny_full', tmp_path)
  transform = optimizer.make_optimizer(
    optimizer.OptimizerConfig(
      name={'torchadamw': 'adamw', 'hfadamw': 'adamw_hf'}[name],
      learning_rate=meta['lr'],
      warmup_steps=meta['warmup'],
      total_steps=meta['total'],
      weight_decay=meta['weight_decay'],
      clip_norm=meta['clip'],
    )
  )

  @jax.jit
  def step(params, state, batch, labels, values):
    def loss(params):
      return pretrained.pretraining_loss(
        model.replace(params=params), batch, labels, values
      )[0]

    total, grads = jax.value_and_grad(loss)(params)
    updates, state = transform.update(grads, state, params)
    return optax.apply_updates(params, updates), state, total, grads

  params = jax.tree.map(jax.numpy.asarray, model.params)
  state = transform.init(params)
  for index in range(len(run['out/loss'])):
    batch = pretrained.cell_batch(
      run[f'in/input_ids_{index}'],
      run[f'in/values_{index}'],
      run[f'in/species_{index}'],
      lengths=run[f'in/attention_mask_{index}'].sum(1),
    )
    params, state, total, grads = step(
      params,
      state,
      batch,
      run[f'in/labels_{index}'],
      run[f'in/labels_values_{index}'],
    )
    np.testing.assert_allclose(total, run['out/loss'][index], rtol=1e-5)
    np.testing.assert_allclose(
      optax.global_norm(grads), run['out/grad_norm'][index], rtol=1e-4
    )
  final = names.params_to_original(params, model.config)
  for key, value in final.items():
    if key.endswith('attention.self.key.bias'):
      continue  # its gradient is 0 but for rounding, which Adam blows up
    np.testing.assert_allclose(
      value, run[f'out/final/{key}'], atol=2e-5, err_msg=key
    )


def test_original_names_round_trip(oracle, tmp_path):
  model, arrays, _ = load(oracle, 'tiny_full', tmp_path)
  tensors = names.params_to_original(model.params, model.config)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, arrays[f'sd/{name}'])


def test_golden_forward_loss_and_gradients():
  """The same on a recording that lies beside the tests.

  Recorded once from the original (random weights, float32, PyTorch 2.13). If
  this fails after a change of the model, the change departs from the original:
  make it an option that is off by default, do not record anew.
  """
  golden = pathlib.Path(__file__).parent / 'golden'
  config, params, assets, unused = original.read_original(
    golden / 'original_tiny.npz', golden / 'original_tiny.json', 'sd/'
  )
  assert not unused
  arrays = dict(np.load(golden / 'original_tiny.npz'))
  model = pretrained.PretrainedModel(config, params, assets)
  batch = batch_of(arrays, arrays['lengths'])
  np.testing.assert_allclose(
    model.hidden_states(batch), arrays['out/hidden_2'], atol=1e-5
  )
  id_logits, values = model.logits(batch)
  np.testing.assert_allclose(id_logits, arrays['out/logits'], atol=2e-5)
  np.testing.assert_allclose(values, arrays['out/predicted_values'], atol=2e-5)

  def loss(params):
    return pretrained.pretraining_loss(
      model, batch, arrays['in/labels'], arrays['in/labels_values'],
      params=params,
    )[0]  # fmt: skip

  total, grads = jax.value_and_grad(loss)(model.params)
  np.testing.assert_allclose(total, arrays['out/loss'], rtol=1e-6)
  ours = names.params_to_original(grads, config)
  for key in arrays:
    if key.startswith('grad/'):
      name = key.removeprefix('grad/')
      np.testing.assert_allclose(ours[name], arrays[key], atol=1e-5)
