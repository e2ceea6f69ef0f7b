"""Every config says what it is for, and its smoke variant trains."""

import pathlib
import runpy
import subprocess
import sys

import pytest

from genecompass_jax import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'experiments').glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_the_docstring_says_what_a_user_needs(path):
  text = runpy.run_path(str(path))['__doc__']
  for word in ('Reproduces:', 'Hardware:', 'Time', 'Variants:', '--config='):
    assert word in text, word
  with pytest.raises(ValueError, match='variant'):
    runpy.run_path(str(path))['get_config']('no such variant')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_smoke_trains(path, tmp_path):
  result = subprocess.run(
    [sys.executable, '-m', 'genecompass_jax.main']
    + [f'--config={path}:smoke', f'--workdir={tmp_path}/run'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-2000:]
  lines = metrics.read(tmp_path / 'run')
  assert lines[-1]['event'] == 'done'
  assert any('eval_id_loss' in line for line in lines)
