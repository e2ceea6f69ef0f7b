"""Every config says what it is for, and its smoke variant trains."""

import dataclasses
import pathlib
import runpy
import subprocess
import sys
import typing

import pytest

from genecompass_jax import metrics
from genecompass_jax.training import train_config

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
def test_every_field_of_a_run_can_be_set_on_the_command_line(path):
  """A group that a file does not name takes no --config.GROUP.FIELD."""
  config = runpy.run_path(str(path))['get_config']('')

  def check(cls, values, where):
    for name, hint in typing.get_type_hints(cls).items():
      if dataclasses.is_dataclass(hint):
        assert name in values, f'config{where}.{name} = {{}} is missing'
        check(hint, values[name], f'{where}.{name}')

  check(train_config.TrainConfig, config, '')


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
