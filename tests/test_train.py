"""Training by its command: exact, restartable, and clear about mistakes."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest

from genecompass_jax import (
  checkpoint,
  cli,
  config_values,
  errors,
  evaluate,
  locks,
  metrics,
  model,
  pretrained,
  workdir as workdir_lib,
)
from genecompass_jax.training import loop
from tests.faults import flip_a_bit, largest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 40
TIMING = metrics.MEASURED
TRAINING_KEYS = {
  *('step', 'loss', 'id_loss', 'value_loss', 'cells_per_s'),
  *('real_token_share', 'masked', 'grad_norm', 'learning_rate'),
  *metrics.MEASURED,
}
EVALUATION_KEYS = {
  *('step', 'eval_loss', 'eval_id_loss', 'eval_value_loss', 'eval_cells'),
  *('eval_masked', 'by', 'time'),
}


def run(command, **kwargs):
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=600, **kwargs
  )


def start(command):
  return subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )


def wait_for(path, process):
  while not path.exists():
    assert process.poll() is None, f'it ended before {path.name} was written'
    time.sleep(0.01)


def lines(workdir):
  """Training and evaluation lines, without what a clock measured."""
  return [
    {k: v for k, v in line.items() if k not in TIMING}
    for line in metrics.read(workdir)
    if 'event' not in line
  ]


def events(workdir):
  """Names of the events, in order, without the account of time."""
  return [
    line['event']
    for line in metrics.read(workdir)
    if line.get('event', 'goodput') != 'goodput'
  ]


def last_event(workdir):
  line = metrics.read(workdir)[-1]
  return line['event'], line['step']


def arrays(workdir, step):
  """Every array of a checkpoint, by name."""
  import orbax.checkpoint as ocp

  folder = workdir / 'checkpoints' / str(step)
  found = {}
  for item in ('params', 'training'):
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore((folder / item).resolve())
    for path, array in flat(tree):
      found[f'{item}/{path}'] = np.asarray(array)
  return found


def flat(tree, prefix=''):
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in items:
    if isinstance(value, dict | list | tuple):
      yield from flat(value, f'{prefix}{key}/')
    elif value is not None:
      yield f'{prefix}{key}', value


def assert_same_run(workdir, reference):
  """The same bits at the end, and the same lines on the way."""
  ours, theirs = (arrays(path, STEPS) for path in (workdir, reference))
  assert ours.keys() == theirs.keys()
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)
  assert lines(workdir) == lines(reference)


def snapshot(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(folder.rglob('*'))
    if p.is_file()
  }


# Without a fault


def test_a_run_leaves_what_the_contract_says(trained):
  names = sorted(p.name for p in trained.iterdir())
  assert names == [
    *('assets', 'checkpoints', 'config.json', 'metrics.jsonl', 'nulls.npz'),
  ]
  found = metrics.read(trained)
  steps = [line for line in found if 'loss' in line]
  assert [line['step'] for line in steps] == list(range(1, STEPS + 1))
  assert all(line.keys() == TRAINING_KEYS for line in steps)
  assert all(np.isfinite(list(line.values())).all() for line in steps)
  evaluations = [line for line in found if 'eval_loss' in line]
  assert [line['step'] for line in evaluations] == [0, 20, 40]
  for line in evaluations:
    nulls = {key for key in line if key.startswith('null_')}
    assert line.keys() == EVALUATION_KEYS | nulls
    assert {'null_id_marginal', 'null_id_rank_bracket'} <= nulls
    assert {'species=human', 'species=mouse'} <= line['by'].keys()
    cells = [
      line['by'][f'species={s}']['eval_cells'] for s in ('human', 'mouse')
    ]
    assert sum(cells) == line['eval_cells'] == 16
    np.testing.assert_allclose(
      line['eval_loss'],
      0.2 * line['eval_id_loss'] + 0.8 * line['eval_value_loss'],
    )
  assert events(trained) == ['start', 'done']
  assert checkpoint.all_steps(trained / 'checkpoints') == [*range(5, 41, 5)]


def test_losses_and_rates_are_plausible(trained):
  steps = [line for line in metrics.read(trained) if 'loss' in line]
  first, last = steps[0], steps[-1]
  size = model.ModelConfig(
    **json.loads((trained / 'config.json').read_text())['run']['model']
  ).vocabulary_size
  np.testing.assert_allclose(first['id_loss'], np.log(size), rtol=0.02)
  assert np.mean([s['loss'] for s in steps[-5:]]) < 0.8 * first['loss']
  assert [s['learning_rate'] for s in steps[:5]] == pytest.approx(
    [0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3]
  )
  assert last['learning_rate'] == pytest.approx(1e-3 / 36)
  rows = 8
  for step in steps:  # a row is a cell
    assert 0 <= step['data_wait_share'] < 1
    assert 0.4 < step['real_token_share'] <= 1.0
    assert rows / step['cells_per_s'] > 1e-3  # seconds that a step took
  assert sum(step['data_wait_share'] > 0 for step in steps) > len(steps) / 2


# Faults: the run goes on and ends in the same bits


def test_a_run_killed_and_stopped_ends_in_the_same_bits(
  train_command, trained, tmp_path
):
  workdir = tmp_path / 'run'
  command = train_command(workdir)
  process = start(command)
  wait_for(workdir / 'checkpoints' / '5.sha256.json', process)
  time.sleep(random.uniform(0, 0.3))
  process.kill()
  assert process.wait() == -signal.SIGKILL
  kept = checkpoint.latest_step(workdir / 'checkpoints')
  assert 5 <= kept < STEPS

  process = start(command)
  wait_for(workdir / 'checkpoints' / f'{kept + 5}.sha256.json', process)
  process.terminate()
  assert process.wait() == errors.EXIT_RETRY
  stopped = checkpoint.latest_step(workdir / 'checkpoints')
  assert stopped > kept
  assert last_event(workdir) == ('stopped', stopped)

  result = run(command)
  assert result.returncode == 0, result.stderr
  assert events(workdir) == ['start', 'resume', 'stopped', 'resume', 'done']
  assert_same_run(workdir, trained)
  # Whoever looks at its output sees the whole run, not what is left of it.
  _, total = last_event(workdir)
  assert f'goes on from step {stopped} of {total}' in result.stderr
  assert f'100% of {total} steps' in result.stderr


@pytest.mark.slow  # 90 s: programs are compiled again in every process
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(
  train_command, trained, tmp_path
):
  workdir = tmp_path / 'run'
  command = train_command(workdir)
  environment = {k: v for k, v in os.environ.items() if 'JAX_' not in k}
  for _ in range(6):
    process = subprocess.Popen(
      command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment
    )
    before = checkpoint.latest_step(workdir / 'checkpoints') or 0
    while process.poll() is None and before == (
      checkpoint.latest_step(workdir / 'checkpoints') or 0
    ):
      time.sleep(random.uniform(0, 0.2))  # also in the middle of a save
    process.kill()
    process.wait()
  result = run(command, env=environment)
  assert result.returncode == 0, result.stderr
  assert_same_run(workdir, trained)


def test_a_signal_ends_an_evaluation_which_is_done_later(
  tiny_run, trained, tmp_path, monkeypatch
):
  """At a step that is not otherwise saved, and at the last."""
  score = evaluate.Evaluator.__call__
  calls = []

  def stop(self, *args):
    calls.append(None)
    if len(calls) in (2, 4):  # of step 20; of 40, behind 20 once more
      os.kill(os.getpid(), signal.SIGTERM)
    return score(self, *args)

  monkeypatch.setattr(evaluate.Evaluator, '__call__', stop)
  # A second signal changes nothing, while the last step is being written and
  # while the workdir is given back.
  default = signal.getsignal(signal.SIGTERM)
  close, handlers = checkpoint.Checkpoints.close, []

  def closes(self):
    handlers.append(signal.getsignal(signal.SIGTERM))
    close(self)

  monkeypatch.setattr(checkpoint.Checkpoints, 'close', closes)
  locked = workdir_lib.locked

  @contextlib.contextmanager
  def unlocks(folder):
    try:
      with locked(folder) as held:
        yield held
    finally:
      handlers.append(signal.getsignal(signal.SIGTERM))

  monkeypatch.setattr(workdir_lib, 'locked', unlocks)
  workdir = tmp_path / 'run'
  rare = {'checkpoint_every': 15}
  for step in (20, 40):
    with pytest.raises(errors.RetryableError, match=f'at step {step};'):
      tiny_run(workdir, rare)
    assert checkpoint.latest_step(workdir / 'checkpoints') == step
    assert [x['step'] for x in lines(workdir) if 'eval_loss' in x] == [
      *range(0, step, 20)
    ]
  tiny_run(workdir, rare)
  assert len(calls) == 5
  assert len(handlers) == 6 and default not in handlers
  assert signal.getsignal(signal.SIGTERM) is default
  assert last_event(workdir) == ('done', STEPS)
  assert_same_run(workdir, trained)


def test_a_damaged_checkpoint_is_passed_over_in_a_moved_workdir(
  trained, tmp_path, tiny_run, caplog
):
  workdir = tmp_path / 'moved' / 'elsewhere'
  shutil.copytree(trained, workdir)
  for step in (25, 30, 35, 40):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  flip_a_bit(largest(workdir / 'checkpoints' / '20' / 'params'))
  assert pretrained.load(workdir).step == 15
  tiny_run(workdir, {'checkpoint_every': 8})
  assert 'checkpoint 20 is passed over' in caplog.text
  assert checkpoint.all_steps(workdir / 'checkpoints') == [
    *(5, 10, 15, 16, 24, 32, 40),
  ]
  assert_same_run(workdir, trained)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
  trained, tmp_path, tiny_run
):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  shutil.rmtree(workdir / 'checkpoints')
  tiny_run(workdir)
  assert lines(workdir) == lines(trained)


# Layouts and devices


def test_packed_rows_train(tmp_path, tiny_run):
  workdir = tmp_path / 'run'
  changes = {
    'data.layout': 'packed',
    'data.slots': 128,
    'data.rows_per_batch': 4,
    'data.streams': 4,
    'optimizer.learning_rate': 3e-3,
    'model.hidden_dropout': 0.0,
    'eval_every': 0,
    'checkpoint_every': 0,
  }
  tiny_run(workdir, changes)
  found = lines(workdir)
  assert all(line.keys() == TRAINING_KEYS - {*TIMING} for line in found)
  losses = [line['loss'] for line in found]
  assert np.mean(losses[-5:]) < 0.6 * losses[0]
  assert checkpoint.all_steps(workdir / 'checkpoints') == [STEPS]


DEVICES = textwrap.dedent("""
  import functools, json, sys
  import jax, ml_collections, numpy
  from genecompass_jax import main, sharding, train

  make_mesh, save, shapes = sharding.make_mesh, train._save, {}

  def look(checkpoints, facts, state, *rest):
    for path, x in jax.tree_util.tree_leaves_with_path(state):
      part = x.sharding.shard_shape(x.shape)
      name = jax.tree_util.keystr(path)
      shapes[name] = x.shape, part, len(x.sharding.device_set)
    params = jax.tree_util.tree_leaves_with_path(state.params)
    numpy.savez(f'{workdir}.npz', **{
      jax.tree_util.keystr(path): numpy.asarray(x) for path, x in params})
    save(checkpoints, facts, state, *rest)

  train._save = look
  for devices, fsdp, workdir in json.loads(sys.argv[1]):
    sharding.make_mesh = functools.partial(
      make_mesh, devices=jax.devices()[:devices])
    config = ml_collections.ConfigDict(json.loads(sys.argv[2]))
    config.mesh = dict(data=-1, fsdp=fsdp)
    shapes.clear()
    main.run(config, workdir)
    print(json.dumps(shapes))
""")


@pytest.mark.parametrize(
  'meshes',
  [[(8, 2)], pytest.param([(2, 1), (4, 4), (8, 1)], marks=pytest.mark.slow)],
)
def test_more_devices_give_the_same_losses(meshes, trained, tmp_path):
  values = json.loads((trained / 'config.json').read_text())['run']
  # As many steps as do not yet show the length of the schedule.
  values['optimizer']['total_steps'] = 5
  values |= {'eval_every': 0, 'checkpoint_every': 0}
  runs = [(*mesh, f'{tmp_path}/{mesh}') for mesh in meshes]
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8'
  result = run(
    [sys.executable, '-c', DEVICES, json.dumps(runs), json.dumps(values)],
    env={**os.environ, 'XLA_FLAGS': flags},
  )
  assert result.returncode == 0, result.stderr
  expected = [line['loss'] for line in lines(trained) if 'loss' in line][:5]
  for (devices, fsdp, workdir), line in zip(runs, result.stdout.splitlines()):
    losses = [line['loss'] for line in lines(workdir)]
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert_loads_on_one_device(workdir)
    shapes = json.loads(line)
    assert {number for _, _, number in shapes.values()} == {devices}
    split = {name for name, (whole, part, _) in shapes.items() if whole != part}
    if fsdp == 1:
      assert not split
      continue
    # Width 32 divides: parameters and both moments.
    for name in ("['word']", "['query']['kernel']", "['down']['kernel']"):
      matching = [key for key in shapes if key.endswith(name)]
      assert len(matching) == 3
      for key in matching:
        whole, part, _ = shapes[key]
        assert np.prod(part) * fsdp == np.prod(whole), key
    size = {name: np.prod(whole) for name, (whole, _, _) in shapes.items()}
    assert sum(size[name] for name in split) > 0.9 * sum(size.values())


def assert_loads_on_one_device(workdir):
  """A run of a mesh, and its export, are the same where there is no mesh."""
  export = f'{workdir}-export'
  words = ['convert', 'params', workdir, '--step', '5', '-o', export]
  assert len(jax.devices()) == 1 and cli.main(words) == 0
  kept = np.load(f'{workdir}.npz')
  for restored in (pretrained.load(workdir), pretrained.load(export)):
    leaves = jax.tree_util.tree_leaves_with_path(restored.params)
    assert len(leaves) == len(kept.files)
    for path, value in leaves:
      assert len(value.sharding.device_set) == 1
      name = jax.tree_util.keystr(path)
      np.testing.assert_array_equal(value, kept[name], err_msg=name)
  with open(f'{export}/README.md') as file:
    card = file.read()
  assert '- step 5 of 5' in card and '- corpus sha256' in card


# Mistakes: one line, exit code 2, nothing touched


def one_line(result):
  """The message of a refused command."""
  assert result.returncode == errors.EXIT_USAGE, result.stderr
  assert 'Traceback' not in result.stderr
  return result.stderr.strip().splitlines()[-1]


def test_another_config_in_a_workdir_is_refused(
  train_command, trained, tiny_run
):
  before = snapshot(trained)
  result = run(train_command(trained, {'model.num_layers': 1, 'seed': 3}))
  message = one_line(result)
  assert 'model.num_layers was 2, now 1; seed was 0, now 3' in message
  assert 'another --workdir' in message
  for changes, message in (
    ({'data.seed': 1}, 'data.seed was 0, now 1'),
    ({'optimizer.total_steps': 50}, 'total_steps was 40, now 50'),
    ({'encoding.ties': 'token'}, "encoding.ties was 'hash', now 'token'"),
  ):
    with pytest.raises(errors.UserError, match=message):
      tiny_run(trained, changes)
  assert snapshot(trained) == before


def test_a_run_that_trained_nothing_leaves_its_place(tiny_run, tmp_path):
  for wrong in (
    {'data.buckets': (32,)},
    {'optimizer.learning_rate': 1e30, 'optimizer.clip_norm': 0.0},
  ):
    with pytest.raises((errors.UserError, FloatingPointError)):
      tiny_run(tmp_path / 'run', wrong)
  tiny_run(tmp_path / 'run')
  assert metrics.read(tmp_path / 'run')[-1]['event'] == 'done'


def test_two_processes_in_a_workdir_are_refused(
  train_command, tiny_run, tmp_path
):
  with workdir_lib.locked(tmp_path / 'run'):
    message = one_line(run(train_command(tmp_path / 'run')))
  assert 'another process is training here' in message
  tiny_run(tmp_path / 'run')


@pytest.mark.parametrize('moment', ['save', 'wait', 'end'])
def test_a_run_that_was_overtaken_leaves_what_is_the_others(
  tiny_run, tmp_path, monkeypatch, moment
):
  """Before a step is saved, while it is sealed, and after the last one."""
  workdir, lease = tmp_path / 'run', tmp_path / 'lease.json'
  file, closing = workdir / 'metrics.jsonl', threading.Event()
  mine = locks.Lease(str(lease), 'busy', 'me', None, 3600.0)
  lease.write_text('{"owner": "me"}')
  monkeypatch.setattr(
    workdir_lib, 'locked', lambda _: contextlib.nullcontext(mine.check)
  )

  def overtaken():
    lease.write_text('{"owner": "another"}')
    file.write_text('{"step": 9}\n')

  save, seal = loop.Run._save, checkpoint.Checkpoints._seal
  close = checkpoint.Checkpoints.close

  def saves(self, state, step):
    if moment == 'save' and step == 4:
      self.save.args[0].wait()  # step 2 is sealed
      overtaken()
    save(self, state, step)

  def seals(self, step):
    if moment == 'wait' and step == 4:
      assert closing.wait(60)
      overtaken()
    seal(self, step)

  def closes(self):
    closing.set()
    close(self)
    if moment == 'end':
      overtaken()

  monkeypatch.setattr(loop.Run, '_save', saves)
  monkeypatch.setattr(checkpoint.Checkpoints, '_seal', seals)
  monkeypatch.setattr(checkpoint.Checkpoints, 'close', closes)
  few = {'optimizer.total_steps': 4, 'checkpoint_every': 2, 'eval_every': 0}
  with pytest.raises(errors.UserError, match='another took it over'):
    tiny_run(workdir, few)
  assert file.read_text() == '{"step": 9}\n'
  newest = checkpoint.latest_step(workdir / 'checkpoints')
  assert newest == (4 if moment == 'end' else 2)


def test_a_corpus_is_no_workdir(tiny_corpus, tiny_run):
  before = sorted(os.listdir(tiny_corpus))
  with pytest.raises(errors.UserError, match='holds a corpus'):
    tiny_run(tiny_corpus)
  assert sorted(os.listdir(tiny_corpus)) == before


def test_damaged_metrics_are_read_around(trained, tmp_path, tiny_run):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  path = workdir / metrics.FILE
  whole = metrics.read(workdir)
  path.write_bytes(path.read_bytes() + b'5\n[1]\n{"step": \xff}\n\xff')
  assert metrics.read(workdir) == whole
  tiny_run(workdir)  # finished: nothing is left to do


def test_a_full_disk_at_a_checkpoint_is_to_be_tried_again(
  tiny_run, tmp_path, monkeypatch
):
  def full(folder):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint, 'seal', full)
  with pytest.raises(errors.RetryableError, match='make room'):
    tiny_run(tmp_path / 'run')
  monkeypatch.undo()
  tiny_run(tmp_path / 'run')


def test_files_that_cannot_grow_are_told_in_one_line(train_command, tmp_path):
  # A checkpoint is larger: as on a full disk.
  limited = ('bash', '-c', 'ulimit -f 64; exec "$@"', 'limited')
  result = subprocess.run(
    [*limited, *train_command(tmp_path / 'run', {'eval_every': 0})],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == errors.EXIT_RETRY, result.stderr
  assert 'start the same command again' in result.stderr.splitlines()[-1]
  assert 'Traceback' not in result.stderr


def test_what_may_change_does(trained, tmp_path, tiny_corpus, tiny_run):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  corpus = tmp_path / 'moved_corpus'
  shutil.copytree(tiny_corpus, corpus)
  changes = {
    'log_every': 7,
    'eval_every': 0,
    'checkpoint_every': 9,
    'keep_checkpoints': 1,
    'mesh.data': 1,
  }
  tiny_run(workdir, changes, corpus)
  assert last_event(workdir) == ('done', STEPS)
  assert_same_run(workdir, trained)


# Commands in one process each, all forked from one that has imported JAX.
COMMANDS = textwrap.dedent("""
  import json, os, runpy, sys, tempfile
  import genecompass_jax.train

  for arguments in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile('w+') as output:
      child = os.fork()
      if not child:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.argv = ['main', *arguments]
        runpy.run_module('genecompass_jax.main', run_name='__main__')
      code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      output.seek(0)
      # Or the next child inherits the text, and writes it as its own.
      print(json.dumps([code, output.read()]), flush=True)
""")


def test_a_model_with_priors_is_given_by_their_widths():
  """config.priors are tables, config.model.priors what a saved run has."""
  from genecompass_jax.training import train_config

  values = {
    'corpus': 'corpus',
    'optimizer': {'total_steps': 9},
    'data': {'rows_per_batch': 8},
    'model': {'vocabulary_size': 9, 'priors': [['grn', 64], ['family', 64]]},
    'priors': [['grn', 'grn.parquet'], ['family', 'family.parquet']],
  }
  config = config_values.to_dataclass(train_config.TrainConfig, values)
  assert config.model.priors == (('grn', 64), ('family', 64))
  assert config.priors[1] == ('family', 'family.parquet')


def test_wrong_commands_are_one_line(train_command, tmp_path):
  workdir = tmp_path / 'run'
  good = train_command(workdir)[3:]
  where = f'--workdir={workdir}'
  wrong = [
    ([*good, '--config.typo=1'], 'config.typo is not known; fields are corpus'),
    ([*good, '--config.model.typo=1'], 'config.model.typo is not known'),
    ([*good, '--config.model.remat=3'], 'model.remat=3 must be of type str'),
    ([*good, '--config.model.width=x'], '--config.model.width=x: invalid'),
    ([*good, '--config.none.typo=1'], "no group 'none'"),
    ([*good, '--typo=1'], "Unknown command line flag 'typo'"),
    ([*good, 'typo'], 'unknown arguments: typo'),
    ([where], '--config'),
    (['--config=experiments/tiny.py:smoke'], '--workdir'),
    (['--config=experiments/none.py', where], 'none.py: no such file here'),
    (['--config', 'experiments/none.py', where], 'none.py: no such file here'),
    ([*good, '--config.priors=grn.parquet'], '(("grn", "grn.parquet"),)'),
    ([*good, '--config.priors=(("grn", "x"))'], 'give pairs of a name and a'),
    (
      ['--config=experiments/tiny.py:large', where],
      'give none, split or smoke',
    ),
    (['--config=experiments/tiny.py', where], 'no corpus: give'),
    (
      ['--config=experiments/tiny.py:smoke', where, '--config.mesh.typo=1'],
      'config.mesh.typo is not known',  # before a corpus is simulated
    ),
    ([f'--config={tmp_path}/syntax.py', where], 'SyntaxError'),
    ([f'--config={tmp_path}/none.py', where], 'get_config'),
    ([f'--config={tmp_path}/raises.py', where], 'RuntimeError: because'),
    ([f'--config={tmp_path}/number.py', where], 'must return a ConfigDict'),
    ([f'--config={tmp_path}/ends.py', where], 'ends the program (sys.exit(0))'),
    ([*good, '--workdir='], '--workdir is empty'),
    ([*good, '--workdir=file:///x'], 'URLs may begin with gs, s3'),
    ([*good, '--config.model.width=0'], 'model.width=0 must be at least 1'),
    ([*good, '--config.optimizer.b1=2.0'], 'optimizer.b1=2.0 is not in'),
    ([*good, '--config.eval_cells=-1'], 'eval_cells=-1 must be at least 0'),
    ([*good, '--config.model.num_species=1'], 'set it to 2'),
    ([*good, f'--config.corpus={tmp_path}'], 'no corpus here'),
  ]
  for name, text in (
    ('syntax', 'def get_config(:'),
    ('none', ''),
    ('raises', 'def get_config():\n  raise RuntimeError("because")'),
    ('number', 'def get_config():\n  return 3'),
    ('ends', 'import sys\nsys.exit(0)'),
  ):
    (tmp_path / f'{name}.py').write_text(text)
  commands = [arguments for arguments, _ in wrong]
  result = run([sys.executable, '-c', COMMANDS, json.dumps(commands)])
  answers = [json.loads(line) for line in result.stdout.splitlines()]
  assert len(answers) == len(wrong), result.stderr
  for (code, output), (_, message) in zip(answers, wrong):
    assert code == errors.EXIT_USAGE, output
    lines = output.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], output
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('place', 'line'),
  [
    ('main.run', 'stopped before training; nothing is lost'),
    ('processes.leave', 'the run is done; nothing is lost'),
  ],
)
def test_ctrl_c_outside_training_ends_at_once(tmp_path, place, line):
  code = textwrap.dedent("""
    import atexit
    from absl import app
    from genecompass_jax import main, processes

    def stop(*arguments):
      raise KeyboardInterrupt

    main.run = print
    PLACE = stop
    atexit.register(print, 'an interpreter that ends while XLA compiles')
    app.run(main.main, flags_parser=main._parse)
  """).replace('PLACE', place)
  config = tmp_path / 'config.py'
  config.write_text(
    'import ml_collections\nget_config = ml_collections.ConfigDict\n'
  )
  flags = [f'--config={config}', '--workdir=none']
  result = run([sys.executable, '-c', code, *flags])
  assert result.returncode == errors.EXIT_INTERRUPTED
  assert result.stderr == f'{line}\n'
  assert 'interpreter' not in result.stdout


def test_help_ends_well():
  result = run([sys.executable, '-m', 'genecompass_jax.main', '--help'])
  assert result.returncode == 0
  assert '--workdir' in result.stdout


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'data.rows_per_batch': 8, 'data.streams': 3}, 'multiple of'),
    ({'encoding.max_genes': 100}, 'encoding.max_genes=100 is more than'),
    ({'data.buckets': (32,)}, 'cannot hold a cell of 63 genes'),
    ({'mesh.fsdp': 3}, 'the number of devices here, 1'),
    ({'model.num_heads': 5}, 'must be divisible by num_heads=5'),
    ({'data.rows_per_batch': 4096}, 'lower data.rows_per_batch'),
    ({'data.source_weights': (('x', 2.0),)}, "weight of source 'x'"),
    ({'priors': (('p', '/none.parquet'),)}, '/none.parquet: not a prior table'),
    ({'optimizer.name': 'sgd'}, "optimizer.name='sgd'"),
  ],
)
def test_configs_that_cannot_work_are_refused(
  changes, message, tiny_run, tmp_path
):
  with pytest.raises(errors.UserError, match=message) as error:
    tiny_run(tmp_path / 'run', changes)
  assert '\n' not in str(error.value)
  assert not checkpoint.all_steps(tmp_path / 'run' / 'checkpoints')


def test_an_export_is_no_run(trained, tmp_path, tiny_run):
  exported = tmp_path / 'export'
  pretrained.export(pretrained.load(trained), exported)
  before = snapshot(exported)
  with pytest.raises(errors.UserError, match='holds an exported model'):
    tiny_run(exported)
  assert snapshot(exported) == before


def test_a_damaged_corpus_is_one_line(
  train_command, tiny_corpus, tiny_run, tmp_path
):
  with pytest.raises(errors.UserError, match='no corpus here'):
    tiny_run(tmp_path / 'a', corpus=tmp_path)
  corpus = tmp_path / 'corpus'
  shutil.copytree(tiny_corpus, corpus)
  shard = largest(corpus / 'train')
  data = shard.read_bytes()
  flip_a_bit(shard)
  message = one_line(run(train_command(tmp_path / 'run', corpus=corpus)))
  assert str(corpus) in message
  shard.write_bytes(data[:-100])
  with pytest.raises(errors.UserError, match=shard.name):
    tiny_run(tmp_path / 'b', corpus=corpus)
  shard.unlink()
  with pytest.raises(errors.UserError, match=shard.name):
    tiny_run(tmp_path / 'c', corpus=corpus)


def test_damaged_workdirs_are_one_line(trained, tmp_path, tiny_run):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  flip_a_bit(workdir / 'assets' / 'medians.tsv')
  with pytest.raises(errors.UserError, match='medians.tsv is missing or was'):
    tiny_run(workdir)
  shutil.copytree(trained / 'assets', workdir / 'assets', dirs_exist_ok=True)
  nulls = workdir / workdir_lib.NULLS
  nulls.write_bytes(nulls.read_bytes()[:-50])
  with pytest.raises(errors.UserError, match='nulls.npz'):
    tiny_run(workdir)
  config = workdir / workdir_lib.CONFIG
  config.write_text(config.read_text()[:-50])
  with pytest.raises(errors.UserError, match='config.json is damaged'):
    tiny_run(workdir)
  config.unlink()
  with pytest.raises(errors.UserError, match='checkpoints but no config.json'):
    tiny_run(workdir)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
  trained, tmp_path, tiny_run
):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  for step in checkpoint.all_steps(workdir / 'checkpoints'):
    flip_a_bit(largest(workdir / 'checkpoints' / str(step)))
  before = snapshot(workdir)
  for use in (tiny_run, pretrained.load):
    with pytest.raises(errors.UserError, match='no checkpoint is whole'):
      use(workdir)
  assert snapshot(workdir) == before


def test_checkpoints_of_another_vocabulary_are_one_line(
  trained, tmp_path, tiny_run
):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  for step in checkpoint.all_steps(workdir / 'checkpoints'):
    place = workdir / 'checkpoints' / str(step)
    path = place / 'metadata' / 'metadata'
    metadata = json.loads(path.read_text())
    metadata['assets']['vocabulary.tsv.gz'] = 'of another corpus'
    path.write_text(json.dumps(metadata))
    checkpoint.seal(place)
  with pytest.raises(errors.UserError, match='written with other assets'):
    tiny_run(workdir)


def test_malformed_configs_are_one_line(trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  for text in ('[]', '{"format": 1}', '{"format": 1, "run": {}}'):
    (workdir / workdir_lib.CONFIG).write_text(text)
    with pytest.raises(errors.UserError, match='config.json is damaged'):
      pretrained.load(workdir)


def test_a_run_that_diverges_goes_back_and_then_fails(tmp_path, tiny_run):
  workdir = tmp_path / 'run'
  changes = {
    'optimizer.learning_rate': 1e30,
    'optimizer.clip_norm': 0.0,
    'log_every': 100,
    'eval_every': 0,
  }
  with pytest.raises(FloatingPointError, match='lower optimizer.learning_rate'):
    tiny_run(workdir, changes)
  # It takes a few updates to diverge; ten batches in a row tell so.
  again = [*10 * ['not_finite'], 'rollback', 'start', 'left_out']
  assert events(workdir) == ['start', *3 * again, *10 * ['not_finite']]
  assert not checkpoint.all_steps(workdir / 'checkpoints')
