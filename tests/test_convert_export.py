"""Models back under the original's names, and exports of runs."""

import json

import jax
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import cli, tensor_files
from tests.test_parity import (
  HEADS,
  PRETRAINING,
  recorded_weights,
  write_release,
)


def run(*words):
  return cli.main([str(word) for word in words])


def assert_same_model(one, other):
  assert one.config == other.config
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  jax.tree.map(
    np.testing.assert_array_equal, one.assets.knowledge, other.assets.knowledge
  )


def assert_same_tensors(found, wanted):
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    array = np.asarray(array)
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize('name', [*PRETRAINING, *HEADS])
def test_a_recorded_state_dict_comes_back_bit_for_bit(oracle, name, tmp_path):
  weights, _, meta = recorded_weights(oracle, name)
  write_release(tmp_path / 'release', weights, meta['config'])
  assert (
    run('convert', 'pytorch', tmp_path / 'release', '-o', tmp_path / 'm') == 0
  )
  ending = 'npz' if name == 'tiny_nocls' else 'safetensors'
  file = tmp_path / 'back' / f'model.{ending}'
  assert run('convert', 'export', tmp_path / 'm', '-o', file) == 0
  assert_same_tensors(tensor_files.read(file), weights)
  config = json.loads((tmp_path / 'back' / 'config.json').read_text())
  for key, value in meta['config'].items():
    assert config[key] == value, key
  # and once more, from what was exported
  assert run('convert', 'pytorch', file, '-o', tmp_path / 'again') == 0
  model = gc.load(tmp_path / 'again')
  assert_same_model(model, gc.load(tmp_path / 'm'))
