"""The supervisor: starts all again when one is lost, and leaves nobody behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from genecompass_jax import cli, errors, launch, metrics
from tests.test_processes import assert_close
from tests.test_train import ROOT, lines

# A process of a job: it notes its start, and does what the plan says for it.
FAKE = textwrap.dedent("""
  import json, os, pathlib, signal, sys, time

  folder = pathlib.Path(sys.argv[1])
  index = os.environ.get('JAX_PROCESS_ID', 'alone')
  attempt = len(list(folder.glob(f'start-{index}-*')))
  (folder / f'start-{index}-{attempt}').write_text(json.dumps({
    'pid': os.getpid(), **{k: v for k, v in os.environ.items()
                           if k.startswith(('JAX_', 'XLA_'))}}))
  print('started', flush=True)
  plan = json.loads((folder / 'plan.json').read_text())
  act = plan[min(attempt, len(plan) - 1)].get(index, 0)
  if act == 'wait':
    time.sleep(600)
  elif act == 'stop':
    def stop(*_):
      sys.exit(42)
    signal.signal(signal.SIGTERM, stop)
    (folder / f'ready-{index}').touch()
    while True:
      time.sleep(0.05)
  elif act == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)
  elif act == 'talk':
    for _ in range(10):
      os.write(1, b'x' * 100_000)  # without a line's end
    sys.exit(0)
  elif act == 'leave':
    import subprocess
    left = subprocess.Popen(['sleep', '500'])  # it holds the pipe
    (folder / 'left').write_text(str(left.pid))
    sys.exit(0)
  elif act == 'progress':
    (folder / 'checkpoints').mkdir(exist_ok=True)
    (folder / 'checkpoints' / f'{attempt}.sha256.json').touch()
    sys.exit(42)
  sys.exit(act)
""")


def supervise(tmp_path, plan, num=2, **options):
  """Runs a job of fakes; returns the code and the number of starts of each."""
  (tmp_path / 'plan.json').write_text(json.dumps(plan))
  supervisor = launch.Supervisor(
    [sys.executable, '-c', FAKE, str(tmp_path)],
    str(tmp_path),
    num_processes=num,
    **options,
  )
  code = supervisor.run()
  indices = ['alone'] if num == 1 else range(num)
  return code, [len(list(tmp_path.glob(f'start-{i}-*'))) for i in indices]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
  monkeypatch.setattr(launch, '_FIRST_WAIT_S', 0.01)
  monkeypatch.setattr(launch, '_GRACE_S', 1.0)


def test_one_code_of_many():
  for codes, code in (
    ([0, 0], 0),
    ([42, 42], 42),
    ([137, 134], 42),
    ([0, 134], 42),
    ([2, 134], 2),
    ([134, 1], 1),
    ([0, 3], 3),
  ):
    assert launch.verdict(codes) == code


def test_processes_know_each_other_and_end_with_0(tmp_path, capfd):
  assert supervise(tmp_path, [{}], devices=3) == (0, [1, 1])
  first, second = (
    json.loads((tmp_path / f'start-{i}-0').read_text()) for i in range(2)
  )
  assert first['JAX_NUM_PROCESSES'] == second['JAX_NUM_PROCESSES'] == '2'
  assert (first['JAX_PROCESS_ID'], second['JAX_PROCESS_ID']) == ('0', '1')
  address = first['JAX_COORDINATOR_ADDRESS']
  assert address == second['JAX_COORDINATOR_ADDRESS']
  assert address.startswith('127.0.0.1:')
  assert first['XLA_FLAGS'].endswith('device_count=3')
  out = capfd.readouterr().out
  assert sorted(out.splitlines()) == ['[0] started', '[1] started']


def test_one_process_needs_no_others(tmp_path):
  assert supervise(tmp_path, [{}], num=1) == (0, [1])
  assert 'JAX_NUM_PROCESSES' not in (tmp_path / 'start-alone-0').read_text()


@pytest.mark.parametrize('fault', ['kill', 42, 134])
def test_all_are_started_again_when_one_is_lost(tmp_path, fault, capfd):
  plan = [{'0': 'wait', '1': fault}, {}]
  assert supervise(tmp_path, plan) == (0, [2, 2])
  assert 'starting all again' in capfd.readouterr().err


def test_the_first_one_is_ended_last(tmp_path, monkeypatch):
  """After a fault too: the others would tell that it is gone."""
  started, ended = [], []
  start, kill = launch.Supervisor._start, launch.children.kill

  def note_start(*arguments):
    started.append(start(*arguments))
    return started[-1]

  def note_end(process):
    if process.poll() is None:
      ended.append(process)
    kill(process)

  monkeypatch.setattr(launch.Supervisor, '_start', note_start)
  monkeypatch.setattr(launch.children, 'kill', note_end)
  fake = (
    'import os, signal, time\n'
    'if os.environ["JAX_PROCESS_ID"] == "2":\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
    'time.sleep(600)'
  )
  supervisor = launch.Supervisor(
    [sys.executable, '-c', fake],
    str(tmp_path),
    num_processes=3,
    max_restarts=0,
  )
  assert supervisor.run() == errors.EXIT_RETRY
  first, second, _ = started
  assert ended == [second, first]


@pytest.mark.parametrize('code', [errors.EXIT_USAGE, errors.EXIT_FAILED])
def test_mistakes_are_final(tmp_path, code):
  assert supervise(tmp_path, [{'0': 'wait', '1': code}]) == (code, [1, 1])


def test_starts_that_bring_nothing_come_to_an_end(tmp_path, capfd):
  code, starts = supervise(tmp_path, [{'1': 42}], max_restarts=2)
  assert (code, starts) == (errors.EXIT_RETRY, [3, 3])
  assert '2 restarts brought no new checkpoint' in capfd.readouterr().err


def test_progress_does_not_count_against_the_limit(tmp_path):
  plan = [{'0': 'progress'}] * 4 + [{}]
  assert supervise(tmp_path, plan, max_restarts=1) == (0, [5, 5])


COMMAND = textwrap.dedent("""
  import sys
  from genecompass_jax import launch
  code = sys.argv[1]
  sys.exit(launch.Supervisor(
    [sys.executable, '-c', code, sys.argv[2]], sys.argv[2], num_processes=2,
  ).run())
""")


def start_job(tmp_path, act):
  (tmp_path / 'plan.json').write_text(json.dumps([{'0': act, '1': act}]))
  return subprocess.Popen(
    [sys.executable, '-c', COMMAND, FAKE, str(tmp_path)], cwd=ROOT
  )


def pids(tmp_path):
  paths = [tmp_path / f'start-{i}-0' for i in range(2)]
  wait_until(lambda: all(p.exists() and p.read_text() for p in paths))
  return [json.loads(p.read_text())['pid'] for p in paths]


def wait_until(is_so):
  deadline = time.monotonic() + 300
  while not is_so():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def is_alive(pid):
  try:
    return 'Z' not in pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2]
  except OSError:
    return False


def test_a_signal_is_passed_on_and_nothing_is_started_again(tmp_path):
  for number in (signal.SIGTERM, signal.SIGINT):
    folder = tmp_path / str(int(number))
    folder.mkdir()
    job = start_job(folder, 'stop')
    for i in range(2):
      wait_until((folder / f'ready-{i}').exists)
    job.send_signal(number)
    assert job.wait(60) == errors.EXIT_RETRY
    assert len(list(folder.glob('start-*'))) == 2


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='Linux alone can do it')
def test_a_killed_supervisor_leaves_nobody(tmp_path):
  job = start_job(tmp_path, 'wait')
  children = pids(tmp_path)
  assert all(map(is_alive, children))
  job.kill()
  job.wait()
  wait_until(lambda: not any(map(is_alive, children)))


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='looks for processes')
def test_training_goes_on_after_a_kill(train_command, trained, tmp_path):
  """Two processes of two devices; one of them is killed on the way."""
  workdir = tmp_path / 'run'
  flags = train_command(workdir)[3:]
  genecompass = [sys.executable, '-m', 'genecompass_jax.cli']
  job = subprocess.Popen(
    [
      *(*genecompass, 'launch', 'local', '-n', '2'),
      *('--devices-per-process', '2', '--', *flags),
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_until((workdir / 'checkpoints' / '10.sha256.json').exists)
  listed = pathlib.Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text()
  children = [int(pid) for pid in listed.split()]
  os.kill(children[-1], signal.SIGKILL)
  said = job.communicate(timeout=300)[1]
  assert job.returncode == 0, said
  assert 'starting all again' in said
  assert_close(lines(workdir), lines(trained))
  kinds = [line.get('event') for line in metrics.read(workdir)]
  assert kinds.count('resume') == 1
  np.testing.assert_equal(kinds.count('done'), 1)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['local', '-n', '0', '--', '--workdir=x'], '--processes=0 must be'),
    (['local', '-n', '2'], 'no run is named'),
    (['local', '-n', '2', '--', '--config=x.py'], 'no run is named'),
  ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
  assert cli.main(['launch', *arguments]) == errors.EXIT_USAGE
  said = capsys.readouterr().err
  assert message in said and len(said.splitlines()) == 1


def test_output_that_nobody_takes_or_that_has_no_end_holds_nobody_up(tmp_path):
  (tmp_path / 'plan.json').write_text(json.dumps([{'0': 'talk'}]))
  script = (
    'import sys; from genecompass_jax import launch\n'
    's = launch.Supervisor([sys.executable, "-c", sys.argv[1], sys.argv[2]], '
    'sys.argv[2], num_processes=2)\n'
    'sys.exit(s.run())'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script, FAKE, str(tmp_path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=ROOT,
  )
  process.stdout.close()
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (0, b'')


def test_long_lines_are_broken(tmp_path, capfd):
  assert supervise(tmp_path, [{'0': 'talk'}])[0] == 0
  found = capfd.readouterr().out.splitlines()
  assert max(map(len, found)) < 70_000
  assert sum(line.count('x') for line in found) == 1_000_000


def test_what_a_process_leaves_behind_is_ended(tmp_path):
  assert supervise(tmp_path, [{'0': 'leave'}]) == (0, [1, 1])
  status = pathlib.Path('/proc', (tmp_path / 'left').read_text(), 'status')
  for _ in range(100):  # until the system has ended it
    if not status.exists() or 'State:\tZ' in status.read_text():
      return
    time.sleep(0.1)
  raise AssertionError('it lives')


def test_more_processes_than_a_host_can_hold_are_refused(capsys):
  assert cli.main(['launch', 'local', '-n', '100000', '--', '--workdir=x']) == 2
  assert 'give at most' in capsys.readouterr().err


def test_a_store_that_is_away_does_not_end_the_supervisor(
  tmp_path, monkeypatch, capfd
):
  def away(name):
    raise errors.RetryableError('s3://bucket: the store does not answer')

  monkeypatch.setattr(launch.paths, 'exists', away)
  assert supervise(tmp_path, [{'1': 42}, {}]) == (0, [2, 2])
  assert 'does not answer' in capfd.readouterr().err
