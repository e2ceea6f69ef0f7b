"""Lines, events, profile and writers of a run; nothing is compiled twice."""

import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import (
  data,
  errors,
  flops,
  goodput,
  metrics,
  optimizer,
)
from genecompass_jax.training import (
  profiling,
  train_config,
  training_log,
)
from tests.test_utilisation import CONFIG, host_batch

# Two buckets, both of training and of evaluation.
BUCKETS = (52, 64)
CHANGES = {
  'data.buckets': BUCKETS,
  'model.num_layers': 1,
  'optimizer.total_steps': 16,
  'eval_every': 6,
  'checkpoint_every': 4,
  'log_every': 1,
  'writers': ('tensorboard',),
}


def tensorboard(folder):
  """Points and restarts of the event files of a folder, in order.

  The format of TensorBoard: length, its checksum, an Event, its checksum.
  """
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted(folder.iterdir()):
    record = path.read_bytes()
    while record:
      (size,) = struct.unpack('<Q', record[:8])
      event = event_pb2.Event.FromString(record[12 : 12 + size])
      record = record[16 + size :]
      if event.HasField('session_log'):
        found.append(('restart', event.step, None))
      found += [
        (value.tag, event.step, value.simple_value)
        for value in event.summary.value
        if value.HasField('simple_value')
      ]
  return found


def shown(points):
  """What TensorBoard shows: a restart takes back the steps from it on."""
  curves = {}
  for name, step, value in points:
    if name == 'restart':
      for curve in curves.values():
        for late in [s for s in curve if s >= step]:
          del curve[late]
      continue
    curve = curves.setdefault(name, {})
    assert step not in curve, f'{name} has step {step} twice'
    curve[step] = value
  return curves


def events(lines, name):
  return [line for line in lines if line.get('event') == name]


@pytest.fixture(scope='module')
def runs(tiny_run, tmp_path_factory):
  """A run, and what it was when it had been resumed from step 8."""
  import shutil

  workdir = tmp_path_factory.mktemp('log') / 'run'
  tiny_run(workdir, CHANGES | {'profile_steps': (3, 4)})
  whole = metrics.read(workdir)
  for step in (12, 16):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  # The window is open when the run ends.
  tiny_run(workdir, CHANGES | {'profile_steps': (15, 99)})
  return workdir, whole, metrics.read(workdir)


def test_nothing_is_compiled_after_warm_up(runs):
  _, whole, _ = runs
  training = [line for line in whole if 'loss' in line]
  shapes = {
    line['padded_tokens_per_s'] / line['cells_per_s'] for line in training
  }
  assert {round(slots) for slots in shapes} == set(BUCKETS)
  assert len(BUCKETS) <= 6
  # Both shapes are met, and both were evaluated, in the first steps.
  warm = max(
    next(
      i
      for i, line in enumerate(training)
      if round(line['padded_tokens_per_s'] / line['cells_per_s']) == slots
    )
    for slots in BUCKETS
  )
  assert warm < len(training) - 4
  compiled = [line['compiles'] for line in training]
  assert compiled[warm + 1] == compiled[-1] > 0
  assert training[-1]['compile_s'] == training[warm + 1]['compile_s'] > 0
  assert not events(whole, 'recompiled')


def test_rates_and_utilisations_agree(runs):
  _, whole, _ = runs
  (begin,) = events(whole, 'start')
  assert begin['peak_flops'] > 0
  assert 'measured' in begin['peak_source']
  assert begin['memory_source'] == 'process'
  for line in whole:
    if 'loss' not in line:
      continue
    rate = line['padded_tokens_per_s']
    assert line['real_tokens_per_s'] / rate == pytest.approx(
      line['real_token_share']
    )
    used = line['model_flops_utilisation']
    assert 0 < line['real_model_flops_utilisation'] < used
    # Below the shares of slots: attention is quadratic.
    assert (
      line['real_model_flops_utilisation'] / used
      < line['real_token_share'] * 1.2
    )
    assert line['memory_peak_bytes'] > 2**20


def test_the_account_adds_up_to_the_wall(runs):
  _, whole, resumed = runs
  (begin,) = events(whole, 'start')
  last = events(whole, goodput.EVENT)[-1]
  assert set(last['seconds']) == set(goodput.KINDS)
  wall = last['time'] - begin['began']
  assert sum(last['seconds'].values()) == pytest.approx(wall, abs=0.1)
  for kind in ('start', 'compile', 'train', 'evaluate', 'checkpoint'):
    assert last['seconds'][kind] > 0, kind
  assert last['seconds']['restore'] == 0
  (again,) = events(resumed, 'resume')
  assert (again['step'], again['last_step']) == (8, 16)
  assert again['last_time'] == whole[-1]['time']
  assert again['run_id'] == begin['run_id']
  account = goodput.account(resumed)
  assert (account.attempts, account.repeated_steps) == (2, 8)
  assert account.seconds['lost'] > 0
  assert account.seconds['restore'] > 0
  ended = events(resumed, goodput.EVENT)[-1]['time']
  assert account.wall == pytest.approx(ended - begin['began'], abs=0.1)


def test_the_same_training_values_after_a_resume(runs):
  _, whole, resumed = runs

  def values(lines):
    return [
      {k: v for k, v in line.items() if k not in metrics.MEASURED}
      for line in lines
      if 'event' not in line
    ]

  assert values(whole) == values(resumed)


def test_the_profile_is_of_a_window_also_when_the_run_ends_in_it(runs):
  workdir, whole, resumed = runs
  (begin,) = events(whole, 'profile')
  assert begin['step'] == 3
  assert [line['step'] for line in events(resumed, 'profile')] == [3, 15]
  traces = list((workdir / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 2
  assert all(trace.stat().st_size > 0 for trace in traces)
  # The steps are in it; calls of Python are not: their hooks may crash.
  assert all(b'train_step' in trace.read_bytes() for trace in traces)
  assert not any(b'$training_log.py' in trace.read_bytes() for trace in traces)


def test_tensorboard_has_what_metrics_have(runs):
  workdir, _, resumed = runs
  curves = shown(tensorboard(workdir / 'tensorboard'))
  for prefix, key in (('train', 'loss'), ('evaluation', 'eval_loss')):
    expected = {line['step']: line[key] for line in resumed if key in line}
    found = curves[f'{prefix}/{key}']
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(
      list(found.values()), list(expected.values()), rtol=1e-6
    )
  assert 'evaluation/null_id_marginal' in curves
  assert not any(name.endswith(('/time', '/step')) for name in curves)


# The log by itself


def config(total=8, **changes):
  return train_config.TrainConfig(
    corpus='',
    model=CONFIG,
    optimizer=optimizer.OptimizerConfig(total_steps=total),
    data=data.DataConfig(rows_per_batch=8),
    **{'log_every': 1, **changes},
  )


@jax.jit
def _step(segments_BL):
  return {'loss': jnp.sum(segments_BL) * 1.0, 'grad_norm': jnp.ones(())}


def train(log, batches, before=lambda step: None, first=0):
  """A loop as in train.py, whose step only sums."""
  with log.progress():
    stream = log.batches(iter(batches))
    for step in range(first + 1, first + len(batches) + 1):
      batch = next(stream)
      before(step)
      log.step(step, batch, _step(batch.batch.cells.segments_BL))


def test_a_step_that_compiles_again_is_said(tmp_path, caplog):
  def before(step):
    if step == 6:
      _step.clear_cache()

  short, long = host_batch([[1, 1, 0]], [1]), host_batch([[1, 2, 2, 0]], [1])
  with training_log.TrainingLog(tmp_path) as log:
    log.open(config(), 0, is_new=True)
    train(log, [short, short, long, short, long, short, short, long], before)
    log.end('done', 8)
  found = events(metrics.read(tmp_path), 'recompiled')
  # Either shape, once each.
  assert [line['step'] for line in found] == [6, 8]
  assert all('_step' in name for line in found for name in line['programs'])
  assert 'step 6: ' in caplog.text and 'compiled again' in caplog.text


def test_work_of_several_steps_is_in_one_line(tmp_path):
  packed = host_batch([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], [2, 1])
  short = host_batch([[1, 1, 0]], [1])
  with training_log.TrainingLog(tmp_path) as log:
    log.open(config(total=4, log_every=3), 0, is_new=True)
    train(log, [packed, short, packed, short])
    log.end('done', 4)
  lines = [line for line in metrics.read(tmp_path) if 'loss' in line]
  assert [line['step'] for line in lines] == [3, 4]
  first = lines[0]
  assert first['real_token_share'] == (9 + 2 + 9) / (12 + 3 + 12)
  slots = first['padded_tokens_per_s'] / first['cells_per_s']
  assert slots == pytest.approx(27 / 7)
  real, padded = (
    sum(
      sum(flops.training(CONFIG, work).values()) for work in (one, other, one)
    )
    for one, other in (
      (flops.real_work((2, 1, 3), 3), flops.real_work((1,), 1)),
      (flops.padded_work(2, 6, 4), flops.padded_work(1, 3, 4)),
    )
  )
  assert first['real_model_flops_utilisation'] == pytest.approx(
    first['model_flops_utilisation'] * real / padded
  )
  # The seconds of the line, twice.
  peak = events(metrics.read(tmp_path), 'start')[0]['peak_flops']
  assert padded / peak / first['model_flops_utilisation'] == pytest.approx(
    7 / first['cells_per_s'], rel=1e-3
  )


def test_an_unknown_device_has_no_utilisation(tmp_path, monkeypatch):
  monkeypatch.setattr(
    training_log.utilisation,
    'find_peak',
    lambda dtype: training_log.utilisation.Peak(None, 'not known'),
  )
  with training_log.TrainingLog(tmp_path) as log:
    log.open(config(total=1), 0, is_new=True)
    train(log, [host_batch([[1, 1, 0]], [1])])
    log.end('done', 1)
  lines = metrics.read(tmp_path)
  assert 'peak_flops' not in events(lines, 'start')[0]
  (line,) = [line for line in lines if 'loss' in line]
  assert not any('utilisation' in key for key in line)
  assert line['real_tokens_per_s'] > 0


def test_an_error_leaves_an_account_and_closes_everything(tmp_path):
  with (
    pytest.raises(KeyError),
    training_log.TrainingLog(tmp_path) as log,
  ):
    log.open(config(total=4, profile_steps=(1, 4)), 0, is_new=True)
    train(log, [host_batch([[1, 1, 0]], [1])])
    raise KeyError
  lines = metrics.read(tmp_path)
  assert lines[-1]['event'] == goodput.EVENT
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  number = log._compiles.number
  jax.jit(lambda x: x + 2)(1.0)
  assert log._compiles.number == number


def test_accounts_are_written_between_checkpoints(tmp_path, monkeypatch):
  monkeypatch.setattr(training_log, 'SECONDS_BETWEEN_ACCOUNTS', 0.0)
  with training_log.TrainingLog(tmp_path) as log:
    log.open(config(total=3), 0, is_new=True)
    train(log, [host_batch([[1, 1, 0]], [1])] * 3)
    log.end('done', 3)
  steps = [line['step'] for line in events(metrics.read(tmp_path), 'goodput')]
  assert steps == [1, 2, 3, 3]


@pytest.mark.parametrize('steps', [(0,), (0, 4), (5, 4), (1, 2, 3), ('1', 2)])
def test_a_window_that_is_none_is_refused(steps):
  with pytest.raises(errors.UserError, match='first and the last step'):
    config(profile_steps=steps)


def test_one_step_is_a_window(tmp_path, monkeypatch):
  calls = []
  for name in ('start_trace', 'stop_trace'):
    monkeypatch.setattr(
      jax.profiler, name, lambda *_, name=name, **__: calls.append(name)
    )
  window = profiling.Window(tmp_path, config(profile_steps=(3,)).profile_steps)
  assert [window.opens_at(step) for step in (2, 3, 4)] == [False, True, False]
  window.before(3)
  assert window.last == 3
  window.close()
  assert not window.opens_at(4)
  assert calls == ['start_trace', 'stop_trace']


def test_a_run_that_is_done_says_so_and_no_rate(tmp_path, caplog, capsys):
  caplog.set_level('INFO')
  with training_log.TrainingLog(tmp_path) as log:
    log.open(config(total=3), 3, is_new=False)
    with log.progress():
      pass
    log.end('done', 3)
  assert 'done already: step 3 of 3' in caplog.text
  assert 'goes on' not in caplog.text
  assert 'steps' not in capsys.readouterr().err


def test_what_cannot_be_written_to_a_url_is_local(tmp_path):
  assert profiling.local_folder(tmp_path, 'profile') == f'{tmp_path}/profile'
  local = profiling.local_folder('s3://bucket/run', 'profile')
  assert local.endswith('/profile') and os.path.isdir(os.path.dirname(local))
  os.rmdir(os.path.dirname(local))
