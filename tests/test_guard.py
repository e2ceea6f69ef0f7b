"""What is done about losses that are not finite, spikes, and hangs."""

import dataclasses
import json
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
from jax.experimental import multihost_utils

from genecompass_jax import (
  checkpoint,
  data,
  errors,
  metrics,
)
from genecompass_jax.training import guard, interruption, watchdog
from tests.test_train import arrays, lines

CHANGES = {'eval_every': 0, 'optimizer.total_steps': 20}


def poison(monkeypatch, values):
  """Replaces values of some batches, by number: inputs, or labels if finite."""
  batch = data.Loader._batch

  def poisoned(self, index, *args, **kwargs):
    made = batch(self, index, *args, **kwargs)
    if index not in values:
      return made
    new = made.batch
    if np.isfinite(values[index]):
      labels_BK = np.full_like(new.value_labels_BK, values[index])
      new = dataclasses.replace(new, value_labels_BK=labels_BK)
    else:
      values_BL = np.full_like(new.cells.values_BL, values[index])
      cells = dataclasses.replace(new.cells, values_BL=values_BL)
      new = dataclasses.replace(new, cells=cells)
    return dataclasses.replace(made, batch=new)

  monkeypatch.setattr(data.Loader, '_batch', poisoned)


def events(workdir, *names):
  return [
    {k: v for k, v in line.items() if k != 'time'}
    for line in metrics.read(workdir)
    if line.get('event') in names
  ]


def assert_same_end(one, other, step=20):
  ours, theirs = arrays(one, step), arrays(other, step)
  assert ours.keys() == theirs.keys()
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)


# The guard alone


def test_a_spike_is_far_above_the_last_losses():
  config = guard.GuardConfig(spike_z=10.0, spike_window=32)
  rng = np.random.default_rng(0)
  losses = (2 + 0.1 * rng.standard_normal(200)).tolist()
  watcher = guard.Guard(config)
  for batch, loss in enumerate(losses):
    watcher.look(batch, loss, True)
  watcher.look(200, 0.1, True)  # falling is no spike
  with pytest.raises(guard.RollBack) as decision:
    watcher.look(201, 4.0, True)
  assert (decision.value.reason, decision.value.stop) == ('spike', 202)
  # One that goes on from a checkpoint decides the same.
  again = guard.Guard(config, json.loads(json.dumps(watcher.memory())))
  assert again.memory() == watcher.memory()
  with pytest.raises(guard.RollBack):
    again.look(201, 4.0, True)
  blind = guard.Guard(dataclasses.replace(config, spike_z=0.0))
  for batch, loss in enumerate([*losses, 1e6]):
    blind.look(batch, loss, True)


def test_equal_losses_do_not_make_a_spike_of_the_last_bit():
  watcher = guard.Guard(guard.GuardConfig(spike_z=10.0))
  for batch in range(50):
    watcher.look(batch, 2.0, True)
  watcher.look(50, 2.001, True)
  with pytest.raises(guard.RollBack):
    watcher.look(51, 2.1, True)


def test_many_in_a_row_are_too_many():
  watcher = guard.Guard(guard.GuardConfig(max_not_finite=3))
  for batch, accepted in enumerate([False, False, True, False, False]):
    watcher.look(batch, float('nan'), accepted)
  # One that goes on from a checkpoint in between counts on.
  again = guard.Guard(
    guard.GuardConfig(max_not_finite=3),
    json.loads(json.dumps(watcher.memory())),
  )
  for either in (watcher, again):
    with pytest.raises(guard.RollBack) as decision:
      either.look(5, float('nan'), False)
    assert (decision.value.reason, decision.value.stop) == ('not_finite', 6)


def test_decisions_are_kept_and_come_to_an_end(tmp_path):
  config = guard.GuardConfig(max_rollbacks=2)
  assert guard.left_out(tmp_path, (7,)) == [range(7, 8)]
  guard.commit(tmp_path, config, guard.RollBack('spike', 9), 5, 5)
  guard.commit(tmp_path, config, guard.RollBack('spike', 12), 5, 5)
  assert guard.left_out(tmp_path) == [range(5, 9), range(5, 12)]
  guard.commit(tmp_path, config, guard.RollBack('spike', 30), 20, 27)
  with pytest.raises(FloatingPointError, match='has not helped 2 times'):
    guard.commit(tmp_path, config, guard.RollBack('spike', 14), 5, 5)
  endless = {'step': 5, 'reason': 'spike', 'first': 5, 'stop': 10**14}
  for damaged in ({}, [], {'rollbacks': [1]}, {'rollbacks': [endless]}):
    (tmp_path / guard.FILE).write_text(json.dumps(damaged))
    with pytest.raises(errors.UserError, match='rollbacks.json is damaged'):
      guard.left_out(tmp_path)


# In a run


def test_a_batch_that_is_not_finite_is_as_if_it_was_skipped(
  tiny_run, tmp_path, monkeypatch
):
  tiny_run(tmp_path / 'told', {**CHANGES, 'skip_batches': (0, 6, 7, 19)})
  bad = dict.fromkeys((0, 6, 7, 19), np.nan)
  poison(monkeypatch, bad)
  # The lines may be rare, the checkpoints anywhere: 5 and 6 end at bad ones.
  tiny_run(tmp_path / 'hit', {**CHANGES, 'checkpoint_every': 3})
  assert_same_end(tmp_path / 'hit', tmp_path / 'told')
  for one, other in zip(
    lines(tmp_path / 'hit'), lines(tmp_path / 'told'), strict=True
  ):
    # The devices were busy with the bad batch too: its tokens count there.
    for line in (one, other):
      del line['real_token_share']
    assert one == other
  found = events(tmp_path / 'hit', 'not_finite')
  assert [line['batch'] for line in found] == [*bad]
  assert [line['step'] for line in found] == [0, 5, 5, 16]
  assert found[0]['loss'] == 'nan'
  steps = [line['step'] for line in lines(tmp_path / 'hit')]
  assert steps == [*range(1, 21)]
  metadata = checkpoint.read_metadata(tmp_path / 'hit' / 'checkpoints' / '20')
  assert metadata['next_batch'] == 24
  told = events(tmp_path / 'told', 'left_out')
  assert [(e['first'], e['stop']) for e in told] == [(0, 1), (6, 8), (19, 20)]


def test_the_devices_leave_the_state_alone(tiny_run, tmp_path, monkeypatch):
  poison(monkeypatch, dict.fromkeys(range(5, 9), np.inf))
  tiny_run(tmp_path / 'run', {**CHANGES, 'optimizer.total_steps': 6})
  five, six = (
    checkpoint.read_metadata(tmp_path / 'run' / 'checkpoints' / str(step))
    for step in (5, 6)
  )
  assert (five['next_batch'], six['next_batch']) == (5, 10)
  tiny_run(
    tmp_path / 'told',
    {**CHANGES, 'optimizer.total_steps': 6, 'skip_batches': (5, 6, 7, 8)},
  )
  assert_same_end(tmp_path / 'run', tmp_path / 'told', 6)


def test_too_many_in_a_row_go_back_and_on_behind_them(
  tiny_run, tmp_path, monkeypatch
):
  poison(monkeypatch, dict.fromkeys(range(12, 15), np.nan))
  changes = {**CHANGES, 'guard.max_not_finite': 3}
  tiny_run(tmp_path / 'run', changes)
  written = json.loads((tmp_path / 'run' / guard.FILE).read_text())
  assert written == {
    'rollbacks': [{'step': 10, 'reason': 'not_finite', 'first': 10, 'stop': 15}]
  }
  assert [line['step'] for line in lines(tmp_path / 'run')] == [*range(1, 21)]
  # A run that is told so from the start ends in the same bits.
  monkeypatch.undo()
  skip = {'skip_batches': tuple(range(10, 15))}
  tiny_run(tmp_path / 'told', {**CHANGES, **skip})
  assert_same_end(tmp_path / 'run', tmp_path / 'told')


def test_a_stop_is_not_forgotten_by_going_back(tiny_run, tmp_path, monkeypatch):
  """In several processes the runtime says it once, here where it goes back.

  What is saved then has as long to be written as a restore to be read.
  """
  poison(monkeypatch, dict.fromkeys(range(12, 15), np.nan))
  signs = []
  beat, close = watchdog.Watchdog.beat, checkpoint.Checkpoints.close
  monkeypatch.setattr(
    watchdog.Watchdog,
    'beat',
    lambda self, compiles=False: signs.append(compiles) or beat(self, compiles),
  )
  monkeypatch.setattr(
    checkpoint.Checkpoints,
    'close',
    lambda self: signs.append('close') or close(self),
  )
  asked = []
  monkeypatch.setattr(
    interruption, 'processes', types.SimpleNamespace(count=lambda: 2)
  )
  monkeypatch.setattr(
    multihost_utils,
    'reached_preemption_sync_point',
    lambda number: asked.append(number) or number == 15,
  )
  with pytest.raises(errors.RetryableError, match='by a signal at step 11'):
    tiny_run(tmp_path, {**CHANGES, 'guard.max_not_finite': 3})
  assert asked == [*range(1, 16)]
  assert len(events(tmp_path, 'rollback')) == 1
  assert signs[signs.index('close') - 1] is True


def test_a_decision_is_replayed_from_an_older_checkpoint(
  tiny_run, tmp_path, monkeypatch
):
  """Of a spike; the checkpoint that the run went back to is lost later."""
  poison(monkeypatch, {18: 100.0})
  workdir = tmp_path / 'run'
  changes = {**CHANGES, 'guard.spike_z': 30.0, 'guard.spike_window': 16}
  tiny_run(workdir, changes)
  rollback = events(workdir, 'rollback')
  assert [(e['step'], e['reason'], e['stop']) for e in rollback] == [
    (15, 'spike', 19)
  ]
  before = arrays(workdir, 20), lines(workdir)
  for step in ('15', '20'):
    (workdir / 'checkpoints' / f'{step}.sha256.json').unlink()
  tiny_run(workdir, changes)
  assert events(workdir, 'rollback') == rollback
  assert lines(workdir) == before[1]
  for name, array in arrays(workdir, 20).items():
    np.testing.assert_array_equal(array, before[0][name], err_msg=name)


def test_going_back_that_does_not_help_ends_the_run(
  tiny_run, tmp_path, monkeypatch
):
  poison(monkeypatch, dict.fromkeys(range(7, 100), np.nan))
  changes = {**CHANGES, 'guard.max_not_finite': 2, 'guard.max_rollbacks': 2}
  with pytest.raises(FloatingPointError, match='going back to step 5') as error:
    tiny_run(tmp_path / 'run', changes)
  assert '\n' not in str(error.value)
  assert len(events(tmp_path / 'run', 'rollback')) == 2
  assert checkpoint.latest_step(tmp_path / 'run' / 'checkpoints') == 5


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'guard.max_not_finite': 0}, 'guard.max_not_finite=0 must be at least 1'),
    ({'guard.spike_z': -1.0}, 'guard.spike_z=-1.0 must be'),
    ({'skip_batches': (-1,)}, 'skip_batches=(-1,)'),
  ],
)
def test_mistakes_are_one_line(changes, message, tiny_run, tmp_path):
  with pytest.raises(errors.UserError) as error:
    tiny_run(tmp_path / 'run', changes)
  assert message in str(error.value) and '\n' not in str(error.value)


# Hangs

HANGS = textwrap.dedent("""
  import sys, threading
  from genecompass_jax.training import watchdog

  def wait_for_ever():
    threading.Event().wait()

  told = lambda seconds: print('told', seconds, flush=True)
  with watchdog.Watchdog(float(sys.argv[1]), told) as watch:
    watch.expect('a shape')
    watch.expect('a shape')
    for _ in range(5):
      watch.beat()
    if len(sys.argv) > 2:
      watch.beat(compiles=sys.argv[2] == 'slow')
      wait_for_ever()
""")


def test_a_hang_ends_with_the_stacks_to_start_again():
  def run(*args):
    return subprocess.run(
      [sys.executable, '-c', HANGS, *args], capture_output=True, text=True
    )

  result = run('0.5', 'hang')
  assert result.returncode == errors.EXIT_RETRY
  assert 'wait_for_ever' in result.stderr  # where it hung
  assert result.stdout == 'told 0.5\n'
  result = run('0.1', 'slow')
  assert result.stdout == 'told 0.4\n'
  assert 'for 0.4 s (guard.hang_after_s=0.1; four' in result.stderr
  for seconds in ('60', '0'):
    result = run(seconds)
    assert (result.returncode, result.stderr, result.stdout) == (0, '', '')
