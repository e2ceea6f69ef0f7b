"""Optional writers follow metrics.jsonl; none of them ends a run."""

import sys
import types

import pytest

from genecompass_jax import errors, metrics
from genecompass_jax.training import writers

LINES = (
  {'event': 'start', 'step': 0},
  {'step': 1, 'loss': 2.5, 'masked': 9.0, 'name': 'x', 'by': {'a': 1}},
  {'step': 2, 'eval_loss': 2.0, 'null_id_marginal': 3.0, 'leaky': True},
)


class FakeWandb(types.ModuleType):
  """What of wandb is called, remembered."""

  def __init__(self):
    super().__init__('wandb')
    self.started, self.logged, self.finished = [], [], 0

  def init(self, **values):
    self.started.append(values)
    return self

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  monkeypatch.setenv('WANDB_PROJECT', 'mine')
  return fake


def open_one(folder, name='wandb', step=0):
  return writers.open_writers(
    (name,),
    folder=str(folder),
    run_id='abc',
    title='run',
    config={'seed': 3},
    step=step,
  )


def test_lines_become_curves():
  start, training, evaluation = map(writers.scalars, LINES)
  assert start == {}
  assert training == {'train/loss': 2.5, 'train/masked': 9.0}
  assert evaluation == {
    'evaluation/eval_loss': 2.0, 'evaluation/null_id_marginal': 3.0
  }  # fmt: skip


def test_wandb_is_told_the_lines_and_the_run(tmp_path, wandb):
  log = metrics.MetricsFile(tmp_path, open_one(tmp_path))
  for line in LINES:
    log.write(**line)
  log.flush()
  log.close()
  (begun,) = wandb.started
  assert begun['id'] == 'abc' and begun['resume'] == 'allow'
  assert begun['project'] == 'mine' and begun['name'] == 'run'
  assert begun['config'] == {'seed': 3} and begun['dir'] == str(tmp_path)
  assert [step for step, _ in wandb.logged] == [1, 2]
  assert wandb.logged[0][1] == writers.scalars(LINES[1])
  assert wandb.finished == 1


def test_wandb_without_an_account_is_one_line(tmp_path, wandb, monkeypatch):
  def init(**values):
    raise RuntimeError('no API key\nand more')

  monkeypatch.setattr(wandb, 'init', init)
  with pytest.raises(errors.UserError, match='WANDB_MODE=offline') as error:
    open_one(tmp_path)
  assert 'no API key)' in str(error.value) and '\n' not in str(error.value)


def test_a_writer_that_fails_is_left_out(tmp_path, wandb, monkeypatch, caplog):
  log = metrics.MetricsFile(tmp_path, open_one(tmp_path))

  def fail(values, step):
    raise OSError('the network is gone')

  monkeypatch.setattr(wandb, 'log', fail)
  for line in LINES:
    log.write(**line)
  log.close()
  assert len((tmp_path / metrics.FILE).read_text().splitlines()) == 3
  assert caplog.text.count('wandb failed and is left out') == 1
  assert 'the network is gone' in caplog.text
  assert wandb.finished == 0


def test_what_is_missing_is_said_before_anything_is_done(
  tiny_run, tmp_path, monkeypatch
):
  real = writers.importlib.util.find_spec
  monkeypatch.setattr(
    writers.importlib.util,
    'find_spec',
    lambda name, *rest: None if name == 'tensorboardX' else real(name, *rest),
  )
  with pytest.raises(errors.UserError, match='tensorboardX, which is not') as e:
    tiny_run(tmp_path / 'run', {'writers': ('tensorboard',)})
  assert 'pip install' in str(e.value) and '\n' not in str(e.value)
  assert not (tmp_path / 'run').exists()
  with pytest.raises(errors.UserError, match='choose from tensorboard, wandb'):
    tiny_run(tmp_path / 'run', {'writers': ('mlflow',)})
  assert not (tmp_path / 'run').exists()
