"""What the package runs on computes what it says: sums of products on CPUs."""

import os
import subprocess
import sys

import numpy as np

from genecompass_jax import doctor

FLAG = '--xla_cpu_experimental_ynn_fusion_type'


def flags_of(given: str) -> str:
  """XLA_FLAGS in a fresh process that imports the package."""
  found = subprocess.run(
    [
      *(sys.executable, '-c'),
      'import os, genecompass_jax; print(os.environ.get("XLA_FLAGS", ""))',
    ],
    env={**os.environ, 'XLA_FLAGS': given},
    capture_output=True,
    text=True,
    check=True,
  )
  return found.stdout.strip()


def test_rows_get_their_own_sums():
  assert doctor._miscompiled() == ''


def test_flags_of_others_stay():
  devices = '--xla_force_host_platform_device_count=2'
  assert flags_of(devices).startswith(devices)
  assert flags_of(f'{FLAG}=') == f'{FLAG}='


def test_a_fault_is_told(monkeypatch):
  import jax

  monkeypatch.setattr(jax, 'jit', lambda f: lambda x: np.zeros(len(x)))
  assert 'compiles sums of products wrongly' in doctor._miscompiled()
