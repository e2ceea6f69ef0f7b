"""The account of time adds up over processes, whatever ended them."""

import pytest

from genecompass_jax import goodput


def start(time, step=0, event='resume', **facts):
  return {'event': event, 'time': time, 'began': time, 'step': step, **facts}


def counted(time, step, **seconds):
  return {
    'event': goodput.EVENT, 'time': time, 'step': step, 'seconds': seconds
  }  # fmt: skip


def line(time, step):
  return {'time': time, 'step': step, 'loss': 1.0}


def test_a_clock_has_one_kind_at_a_time(stop_clock):
  now = stop_clock(goodput, 100.0)
  clock = goodput.Clock()
  now[0] += 5
  clock.enter('train')
  now[0] += 10
  clock.move(4.0, 'compile')
  with clock.spent('evaluate'):
    now[0] += 3
    clock.move(1.0, 'compile')
  now[0] += 2
  found = clock.seconds()
  assert found == dict.fromkeys(goodput.KINDS, 0.0) | {
    'start': 5.0, 'train': 8.0, 'compile': 5.0, 'evaluate': 2.0,
  }  # fmt: skip
  assert sum(found.values()) == 20.0


def test_a_run_of_one_process():
  lines = [
    start(0.0, event='start'),
    line(12.0, 5),
    counted(20.0, 10, start=4.0, train=16.0),
    counted(50.0, 20, start=4.0, train=40.0, evaluate=6.0),
    line(60.0, 25),  # not accounted for yet: the process may be alive
  ]
  account = goodput.account(lines)
  assert account.wall == 50.0
  assert account.seconds['train'] == 40.0
  assert account.share('evaluate') == pytest.approx(0.12)
  assert (account.attempts, account.repeated_steps) == (1, 0)
  said = goodput.describe(account)
  assert said == '80.0% of 50 s trained (start 8.0%, evaluate 12.0%)'


def test_what_a_kill_costs():
  lines = [
    start(0.0, event='start'),
    counted(20.0, 10, start=4.0, train=16.0),
    # Killed at 32 s and step 17; the lines of steps 11 to 17 were cut.
    start(40.0, step=10, last_time=32.0, last_step=17),
    counted(70.0, 20, start=5.0, train=25.0),
    counted(71.0, 20, start=5.0, train=26.0),
  ]
  account = goodput.account(lines)
  assert account.seconds['train'] == 16.0 + 26.0
  assert account.seconds['lost'] == 12.0
  assert account.seconds['down'] == 8.0
  assert account.wall == 71.0
  assert (account.attempts, account.repeated_steps) == (2, 7)
  assert '; 1 restart, 7 steps repeated' in goodput.describe(account)


def test_training_is_lost_when_an_earlier_checkpoint_is_taken():
  lines = [
    start(0.0, event='start'),
    counted(10.0, 10, train=10.0),
    counted(30.0, 20, train=30.0),
    # Checkpoints 20 and 10 are damaged; an account stands between 0 and 10.
    start(30.0, step=5, last_time=30.0, last_step=20),
    counted(40.0, 15, train=10.0),
    # And this one's only checkpoint too.
    start(40.0, step=5, last_time=40.0, last_step=15),
    counted(60.0, 25, train=20.0),
  ]
  account = goodput.account(lines)
  assert account.seconds['lost'] == 20.0 + 5.0 + 10.0
  assert account.seconds['train'] == 5.0 + 20.0
  assert account.wall == 60.0
  assert account.repeated_steps == 15 + 10


def test_a_run_that_never_saved_has_lost_everything():
  lines = [
    start(0.0, event='start'),
    start(50.0, event='start', last_time=30.0, last_step=9),
    counted(60.0, 3, start=2.0, train=8.0),
  ]
  account = goodput.account(lines)
  assert account.seconds['lost'] == 30.0
  assert account.seconds['down'] == 20.0
  assert account.seconds['train'] == 8.0
  assert account.repeated_steps == 9


def test_a_process_that_goes_back_to_a_checkpoint_has_lost_training():
  lines = [
    start(0.0, event='start'),
    counted(10.0, 10, train=10.0),
    counted(18.0, 14, train=18.0),
    # The same clock: no new process.
    start(19.0, step=10, last_time=18.0, last_step=14) | {'began': 0.0},
    counted(30.0, 20, train=29.0, restore=1.0),
  ]
  account = goodput.account(lines)
  assert account.seconds['lost'] == 8.0
  assert account.seconds['train'] == 21.0
  assert account.wall == 30.0
  assert (account.attempts, account.repeated_steps) == (1, 4)
  assert goodput.describe(account).endswith('; 0 restarts, 4 steps repeated')


def test_runs_of_earlier_versions_have_no_account():
  assert goodput.account([]) is None
  old = [{'event': 'start', 'step': 0}, {'step': 1, 'loss': 1.0}]
  assert goodput.account(old) is None
  assert goodput.account([start(0.0, event='start'), line(1.0, 1)]) is None
