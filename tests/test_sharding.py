"""Meshes of eight devices give what one device gives, and share what they say."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from genecompass_jax import (
  data,
  errors,
  model,
  optimizer,
  sharding,
)
from genecompass_jax.training import (
  train_config,
  train_step,
)

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
  """Dropout included: every row draws by its number in the batch."""
  found = results[mesh]
  assert found['loss'] < 1e-5
  assert found['grad_norm'] < 1e-5
  assert found['grads'][0] < 1e-5, found['grads']
  assert found['params'] < 1e-5


def test_gradients_of_parts_cross_the_network_once(results):
  sent, of_parameters = results['sent']
  # Four groups, four parts: one sum, and not four.
  assert of_parameters <= sent < 1.1 * of_parameters


@pytest.mark.parametrize('kind', ['splash', 'pallas'])
def test_kernels_give_the_same_on_a_mesh(results, kind):
  """Queries lie apart over the context axis, heads over the tensor axis."""
  assert results['kernels'][kind] < 3e-5


@dataclasses.dataclass(frozen=True)
class Device:
  """One that cannot compute."""

  id: int
  platform: str
  slice_index: int


def devices(platform, hosts, each):
  """JAX counts hosts of GPUs as slices too."""
  return [Device(i, platform, i // each) for i in range(hosts * each)]


def test_hosts_of_gpus_may_share_weights_and_slices_of_a_pod_may_not():
  found = devices('gpu', hosts=2, each=4)
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8), found)
  assert mesh.shape['fsdp'] == 8
  # A group that a host can hold lies on one.
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4), found)
  for group in mesh.devices.reshape(2, 4):
    assert len({device.slice_index for device in group}) == 1
  with pytest.raises(errors.UserError, match='lower mesh.fsdp'):
    sharding.make_mesh(sharding.MeshConfig(fsdp=8), devices('tpu', 2, 4))


@pytest.mark.parametrize(
  ('layout', 'use_cls', 'kind'),
  [
    ('buckets', True, 'cudnn'),
    ('buckets', False, 'pallas'),
    ('packed', True, 'pallas'),
  ],
)
def test_cudnn_needs_cells_at_the_first_slot(layout, use_cls, kind):
  """It knows lengths alone: a CLS that nobody sees would push the last gene

  out of its sight.
  """
  config = train_config.TrainConfig(
    corpus='',
    model=model.ModelConfig(dtype='bfloat16', use_cls=use_cls),
    optimizer=optimizer.OptimizerConfig(),
    data=data.DataConfig(layout=layout),
  )
  assert train_step.for_platform(config, 'gpu').model.attention == kind


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
  assert 'devices here, 8;' in refused['devices']
  assert 'mesh.context=-1' in refused['slots']
  assert 'kernel' in refused['whole']
  assert '(6, 999)' in refused['whole']
