"""The soak, short: experiments/benchmarks/soak.py with a fault of each kind."""

import json
import subprocess
import sys

import pytest

from tests.test_train import ROOT


@pytest.mark.slow  # 3 min: every fault ends a process, which starts again
@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_through_every_fault_ends_in_the_same_bits(processes, tmp_path):
  result = subprocess.run(
    [
      *(sys.executable, 'experiments/benchmarks/soak.py'),
      *('--folder', str(tmp_path / 'soak'), '--steps', '120'),
      *('--faults', '4', '--processes', str(processes)),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr + result.stdout
  figures = json.loads(result.stdout.splitlines()[-1])
  assert figures['same_bits']
  assert figures['other_mesh_loss_apart'] <= 1e-5
  kinds = ('kill', 'sigterm', 'checkpoint', 'shard')
  assert sum(figures['faults'].get(kind, 0) for kind in kinds) >= 2
