"""Work is counted as it was done; the peak is that of the devices."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest

from genecompass_jax import (
  chips,
  flops,
  model as model_lib,
  schemas,
)
from genecompass_jax.training import utilisation

CONFIG = model_lib.ModelConfig(
  vocabulary_size=50, width=8, num_heads=2, num_layers=2, feed_forward=16,
  max_genes=15, priors=(('grn', 4),),
)  # fmt: skip


def host_batch(segments_BL, masked_B, num_slots=4):
  """A batch in which only what is counted has meaning."""
  segments_BL = np.asarray(segments_BL, np.int32)
  rows = len(segments_BL)
  weights_BK = np.zeros((rows, num_slots), np.float32)
  for row, number in enumerate(masked_B):
    weights_BK[row, :number] = 1.0
  empty = np.zeros_like(segments_BL)
  cells = schemas.CellBatch(
    *(empty, empty.astype(np.float32), empty, segments_BL, empty),
    empty.astype(bool),
  )
  found_BS = np.full((rows, segments_BL.max()), -1)
  for row, segments_L in enumerate(segments_BL):
    found_BS[row, : segments_L.max()] = 7
  slots_BK = np.zeros_like(weights_BK, np.int32)
  batch = schemas.PretrainingBatch(
    *(cells, slots_BK, slots_BK, weights_BK, weights_BK, weights_BK)
  )
  return schemas.HostBatch(0, batch, found_BS)


def test_packed_rows_count_by_cell():
  found = utilisation.amount(
    host_batch([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6], [2, 1, 0])
  )
  assert (found.rows, found.cells) == (3, 3)
  assert found.padded == flops.padded_work(3, 6, 4)
  assert found.real == flops.real_work((2, 1, 3), 3)  # n, without CLS
  assert found.real.attended == 3**2 + 2**2 + 4**2


def test_steps_add_up_and_compose_once_a_step():
  batch = utilisation.amount(host_batch([[1, 1, 1, 0]], [2]))
  both = batch + batch
  one = sum(flops.training(CONFIG, batch.real).values())
  two = utilisation.training_flops(CONFIG, both.real, steps=2)
  assert two == pytest.approx(2 * one)
  assert utilisation.Amount.of_numbers(both.numbers()) == both
  assert both.times(0.5) == batch


def test_an_accelerator_has_the_peak_of_the_table(monkeypatch):
  device = types.SimpleNamespace(platform='tpu', device_kind='TPU v4')
  monkeypatch.setattr(jax, 'devices', lambda: [device] * 8)
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  peak = utilisation.find_peak('bfloat16')
  assert peak.flops == 8 * chips.by_name('v4').bfloat16
  assert peak.source == '8 x TPU v4, bfloat16, 275 TFLOP/s each'
  device.device_kind = 'TPU v99'
  peak = utilisation.find_peak('bfloat16')
  assert peak.flops is None
  assert 'not known' in peak.source


def test_a_cpu_is_measured():
  peak = utilisation.find_peak('float32')
  assert 1e8 < peak.flops < 1e16  # no number of a clock, but no nonsense
  assert 'measured' in peak.source


def test_memory_is_of_devices_where_they_tell(monkeypatch):
  measured, source = utilisation.memory_peak()
  assert source == 'process'
  assert measured > 2**20

  def device(peak):
    return types.SimpleNamespace(
      memory_stats=lambda: {'peak_bytes_in_use': peak}
    )

  monkeypatch.setattr(jax, 'local_devices', lambda: [device(5), device(9)])
  assert utilisation.memory_peak() == (9, 'fullest device')


PROCESS = textwrap.dedent("""
  import json, sys
  import jax, numpy as np

  port, index = sys.argv[1:]
  jax.distributed.initialize(
    f'localhost:{port}', num_processes=2, process_id=int(index))
  from genecompass_jax import sharding
  from genecompass_jax.training import utilisation

  # Inside of a training mesh, as in the loop.
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
    reducer = utilisation.Reducer()
    numbers = np.asarray([1.0, 10.0], np.float32) * (1 + int(index))
    sums = [reducer.sum(numbers), reducer.sum(numbers + 1)]
  print(json.dumps([np.asarray(x).tolist() for x in sums]))
""")


def test_processes_are_summed():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2'
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROCESS, port, str(index)],
      env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  for process in processes:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(output.splitlines()[-1]) == [[3.0, 30.0], [5.0, 32.0]]
