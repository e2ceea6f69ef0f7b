"""The view of a run in a terminal says what is true of it."""

import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys

import pytest

from genecompass_jax import (
  errors,
  metrics,
  paths,
  tail as tail_lib,
  text_plot,
  watch,
  workdir,
)
from tests import test_stores

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, '-m', 'genecompass_jax.cli', 'watch')


def start(time=0.0, event='start', **values):
  return {
    'event': event, 'time': time, 'began': time, 'step': 0, **values
  }  # fmt: skip


def training(step, time, **values):
  return {
    'step': step, 'time': time, 'loss': 3.0, 'id_loss': 6.0 - step / 100,
    'value_loss': 1.0, 'cells_per_s': 100.0, **values,
  }  # fmt: skip


def evaluation(step, time):
  return {
    'step': step, 'time': time, 'eval_loss': 2.0, 'eval_id_loss': 5.5,
    'eval_value_loss': 0.5, 'null_id_marginal': 6.5, 'null_id_rank_bin': 5.25,
    'null_value_gene_mean': 0.75,
  }  # fmt: skip


RUN = [
  start(peak_source='8 x TPU v4', memory_source='fullest device'),
  evaluation(0, 5.0),
  *(
    training(
      *(step, 10.0 + step),
      real_tokens_per_s=120_000.0,
      padded_tokens_per_s=150_000.0,
      model_flops_utilisation=0.5,
      real_model_flops_utilisation=0.4,
      data_wait_share=0.002,
      memory_peak_bytes=3 * 2**30,
      compiles=7,
      compile_s=59.0,
    )
    for step in range(10, 101, 10)
  ),
  {
    'event': 'goodput', 'step': 100, 'time': 110.0,
    'seconds': {'start': 11.0, 'train': 99.0},
  },
]  # fmt: skip


def described(lines, now, total=200, **kwargs):
  return '\n'.join(watch.describe('run', lines, total, now=now, **kwargs))


def test_a_run_that_trains():
  text = described([*RUN, evaluation(100, 112.0)], now=115.0, width=79)
  assert 'run: step 100 of 200 (50%), 1 min 40 s left' in text
  assert 'running; last line 3 s ago' in text
  assert '5.0000 training, 5.5000 held out at step 100' in text
  assert '5.2500 strongest null (rank bin)' in ' '.join(text.split())
  assert '100 cells/s, 120 k real tokens/s, 150 k padded tokens/s' in text
  assert '50.0% padded, 40.0% real; of 8 x TPU v4' in text
  assert '0.2% waiting for data, 3.00 GiB (fullest device), 7 programs' in text
  assert '90.0% of 1 min 50 s trained (start 10.0%)' in text
  assert '1 min 55 s ago: start (step 0)' in text
  assert max(map(len, text.splitlines())) <= 79
  assert '-----' in text and '. training   o held out' in text
  small = described(RUN, now=115.0, height=0)
  assert '-----' not in small and 'running' in small


@pytest.mark.parametrize(
  'lines, now, expected',
  [
    ([], 0.0, 'nothing written yet'),
    ([start()], 100.0, 'starting: compiling, or evaluating; last line 1 min'),
    ([start()], 2000.0, 'SILENT since it started, 33 min 20 s ago'),
    (RUN, 160.0, 'running; last line 50 s ago'),
    (RUN, 230.0, 'SILENT: nothing written for 2 min 00 s'),
    ([*RUN, start(500.0, 'resume')], 510.0, 'starting: compiling'),
    (
      [*RUN, start(500.0, 'resume'), training(110, 501.0)],
      510.0,
      'running; last line 9 s ago',
    ),
    ([*RUN, start(500.0, 'done', step=200)], 9999.0, 'done; last line 2 h'),
    (
      [*RUN, start(111.0, 'not_finite'), training(110, 112.0)],
      113.0,
      'running; last line 1 s ago',
    ),
    ([*RUN, start(111.0, 'stopped')], 9999.0, 'stopped; the same command'),
    (
      [*RUN, start(111.0, 'not_finite', loss='nan')],
      113.0,
      'running, the last batch was not finite and is left out; last line 2 s',
    ),
    ([start(), start(9.0, 'not_finite')], 11.0, 'running, the last batch'),
    ([*RUN, start(111.0, 'not_finite')], 9999.0, 'SILENT'),
    ([{'step': 3, 'loss': 1.0, 'id_loss': 1.0}], 9.0, 'an earlier version'),
  ],
)
def test_whether_it_lives(lines, now, expected):
  assert expected in described(lines, now, height=3)


def test_time_left_is_of_this_process():
  lines = [*RUN, start(500.0, 'resume', step=100)]
  assert ' left' not in described(lines, now=501.0)
  assert 'step 60 of 200' in described(
    [*RUN, start(500.0, 'resume', step=60)], now=501.0
  )
  lines += [training(110, 520.0), training(120, 560.0)]
  assert '5 min 20 s left' in described(lines, now=560.0)
  assert ' left' not in described(lines, now=560.0, total=None)


def steps(tail, **kwargs):
  tail.read(**kwargs)
  return [line['step'] for line in tail.lines]


def test_only_what_is_new_is_read_and_cut_lines_go(tmp_path):
  with pytest.raises(errors.UserError, match='no such folder'):
    tail_lib.Tail(tmp_path / 'none')
  tail = tail_lib.Tail(tmp_path)
  assert steps(tail) == []
  log = metrics.MetricsFile(tmp_path)
  for step in (1, 2, 3):
    log.write(step=step)
  log.flush()
  assert steps(tail) == [1, 2, 3]
  path = tmp_path / metrics.FILE
  with path.open('a') as file:
    file.write('{"step": 4}\n{"step": 5')
    file.flush()
    assert steps(tail) == [1, 2, 3, 4]
    file.write('0}\n')
  assert steps(tail) == [1, 2, 3, 4, 50]
  metrics.cut_after(tmp_path, 2)
  assert steps(tail) == [1, 2]
  assert tail.total is None
  workdir.write_config(
    tmp_path,
    {
      'run': {'optimizer': {'total_steps': 60}},
      'corpus_sha256': '0',
      'assets': {},
    },
  )
  steps(tail)
  assert tail.total == 60


@pytest.mark.parametrize('kind', ['s3', 'http'])
def test_a_run_in_a_store(store, kind, stop_clock):
  now = stop_clock(tail_lib)
  tail = tail_lib.Tail(test_stores.url(store, kind, 'run'))
  assert steps(tail) == []
  now[0] += tail_lib.SECONDS_BETWEEN_DOWNLOADS
  store.objects['run/metrics.jsonl'] = b'{"step": 1}\n'
  assert steps(tail) == [1]
  store.objects['run/metrics.jsonl'] += b'{"step": 2}\n'
  now[0] += tail_lib.SECONDS_BETWEEN_DOWNLOADS / 2
  assert steps(tail) == [1]  # not fetched at every look
  now[0] += tail_lib.SECONDS_BETWEEN_DOWNLOADS
  assert steps(tail) == [1, 2]


def test_a_store_that_does_not_answer_may_come_back(monkeypatch):
  def fail(name):
    raise errors.RetryableError('no answer')

  monkeypatch.setattr(paths, 'exists', fail)
  tail = tail_lib.Tail('s3://bucket/run')
  with pytest.raises(errors.RetryableError):
    tail.read(once=True)
  tail = tail_lib.Tail('s3://bucket/run')
  tail.read()
  assert tail.problem == 'no answer'
  assert '  not up to date: no answer' in watch._frame([tail], 79)
  monkeypatch.setattr(paths, 'exists', lambda name: False)
  tail._downloaded -= tail_lib.SECONDS_BETWEEN_DOWNLOADS
  tail.read()
  assert not tail.problem


def write_run(folder):
  folder.mkdir(exist_ok=True)
  text = ''.join(json.dumps(line) + '\n' for line in RUN)
  (folder / metrics.FILE).write_text(text)


def test_the_command_prints_once_where_there_is_no_terminal(tmp_path):
  for name in ('a', 'b'):
    write_run(tmp_path / name)
  result = subprocess.run(
    [*COMMAND, tmp_path / 'a', tmp_path / 'b'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert '/a: step 100' in result.stdout and '/b: step 100' in result.stdout
  assert '\x1b' not in result.stdout
  result = subprocess.run(
    [*COMMAND, tmp_path / 'none'], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == errors.EXIT_USAGE
  assert len(result.stderr.splitlines()) == 1
  assert 'no such folder' in result.stderr


def test_ctrl_c_ends_the_live_view(tmp_path):
  write_run(tmp_path)
  mine, its = pty.openpty()
  process = subprocess.Popen(
    [*COMMAND, tmp_path, '--every', '0.05'],
    cwd=ROOT,
    stdout=its,
    stderr=subprocess.PIPE,
    env={**os.environ, 'COLUMNS': '90', 'LINES': '30'},
  )
  os.close(its)
  shown = b''
  try:
    while shown.count(b'\x1b[H') < 2:
      ready, _, _ = select.select([mine], [], [], 60)
      assert ready, shown
      shown += os.read(mine, 1 << 16)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
  finally:
    process.kill()
    os.close(mine)
  assert process.returncode == 0
  assert complaint == b''
  assert b'step 100' in shown


# Curves


def test_curves_lie_where_their_numbers_are():
  lines = text_plot.plot(
    {'.': [(0, 1.0), (10, 3.0)], 'o': [(5, 2.0)]},
    {'-': 2.0},
    width=text_plot.LABEL_WIDTH + 1 + 11,
    height=3,
  )
  assert lines == [
    '      3|          .',
    '       |-----o-----',
    '      1|.          ',
    '        0        10',
  ]


def test_a_scale_of_logarithms_and_what_has_none():
  lines = text_plot.plot(
    {'.': [(0, 100.0), (1, 10.0), (2, 1.0), (3, 0.0), (4, float('nan'))]},
    {'-': float('nan')},
    width=text_plot.LABEL_WIDTH + 1 + 3,
    height=3,
    is_log=True,
  )
  assert [line[-3:] for line in lines[:3]] == ['.  ', ' . ', '  .']
  for nothing in ({}, {'.': []}, {'.': [(0, float('nan'))]}):
    assert text_plot.plot(nothing, {}, width=20, height=2) == [' ' * 20] * 3
  (top, _, axis) = text_plot.plot(
    {'.': [(7, 5.0)]}, {}, width=20, height=2
  )  # one point: no scale
  assert '7' in axis and top.strip().startswith('5')


def test_lines_that_no_run_writes_are_left_out():
  whole = [*RUN]
  for wrong in (
    {'time': 'noon'}, {'step': -1}, {'step': 1.5}, {'step': 10**30},
    {'loss': None}, {'loss': '1'}, {'loss': [1]}, {'time': float('inf')},
    {'event': 3}, {'event': 'goodput'}, {'event': 'goodput', 'seconds': 1},
    {'event': 'goodput', 'seconds': {'train': 'x'}}, {'by': {'human': 1}},
    {'compile_s': float('nan')}, {'last_step': None, 'event': 'resume'},
  ):  # fmt: skip
    whole.insert(3, {**training(10, 20.0), **wrong})
  data = '\n'.join(json.dumps(line) for line in whole).encode()
  assert metrics.parse(data) == RUN
  for line in ([], 3, None, 'x', {'loss': 1.0}):  # without a step
    assert metrics.parse(json.dumps(line).encode()) == []


def test_a_clock_that_was_put_back():
  lines = [start(1000.0), training(10, 990.0), training(20, 900.0)]
  text = watch.describe('RUN', lines, 100, now=800.0)
  assert 'left' not in text[0]
  assert '-' not in text[0]
