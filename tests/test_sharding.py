"""Meshes of eight devices give what one device gives, and share what they say."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def results():
  flags = os.environ.get('XLA_FLAGS', '')
  environment = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
  }
  done = subprocess.run(
    [sys.executable, '-m', 'tests.on_a_mesh'],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('mesh', ['4x2x1x1', '1x2x2x2', 'parts', 'pieces'])
def test_a_step_is_the_same_on_every_mesh(results, mesh):
  """Dropout included: its draws do not depend on where an array lies."""
  found = results[mesh]
  assert found['loss'] < 1e-5
  assert found['grad_norm'] < 1e-5
  assert found['params'] < 1e-5


def test_weights_and_moments_are_shared_as_asked(results):
  """The first product of the feed-forward is [2 layers, 32, 64]."""
  for name, shard in (('4x2x1x1', [2, 16, 64]), ('1x2x2x2', [2, 16, 32])):
    assert results[name]['shard'] == shard
    assert results[name]['moments'] == [shard]


def test_what_a_mesh_cannot_share_is_said(results):
  refused = results['refused']
  assert (
    'model.num_heads=6 must be divisible by mesh.tensor=4' in (refused['heads'])
  )
  assert 'data.rows_per_batch=16 must be divisible by 8' in refused['rows']
  assert 'microbatches=3' in refused['rows']
  assert 'mesh.data=3' in refused['devices']
  assert '8 devices' in refused['devices']
  assert 'mesh.context=-1' in refused['slots']
  assert 'kernel' in refused['whole']
  assert '(6, 999)' in refused['whole']
