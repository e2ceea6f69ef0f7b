"""Locks of files, and leases where a store has none: on files, read alike."""

import json
import threading
import time

import pytest

from genecompass_jax import errors, locks


def test_a_second_one_is_refused_while_the_first_is_alive(tmp_path):
  path = str(tmp_path / 'lease.json')
  with locks.leased(path, 'busy', 1.0):
    owner = json.loads((tmp_path / 'lease.json').read_text())['owner']
    with (
      pytest.raises(errors.UserError, match=f'busy .*{owner}'),
      locks.leased(path, 'busy', 1.0),
    ):
      pass
  assert not (tmp_path / 'lease.json').exists()  # given back


def test_a_lease_of_the_dead_is_taken_over(tmp_path):
  path = tmp_path / 'lease.json'
  for text in ('{"owner": "dead", "renewed": 7}', 'no lease {'):
    path.write_text(text)
    with locks.leased(str(path), 'busy', 0.2):
      assert json.loads(path.read_text())['owner'] != 'dead'


def test_a_store_may_show_the_lease_of_the_dead_for_a_while(
  tmp_path, monkeypatch
):
  path = tmp_path / 'lease.json'
  path.write_text('{"owner": "dead", "renewed": 7}')
  dead, read, stale = json.loads(path.read_text()), locks._read, [3]

  def late(name):
    if json.loads(path.read_text())['owner'] == 'dead' or not stale[0]:
      return read(name)
    stale[0] -= 1
    return dead

  monkeypatch.setattr(locks, '_read', late)
  with locks.leased(str(path), 'busy', 0.4) as lease:
    lease.check()
  assert not stale[0]


def test_one_that_is_overtaken_says_so_and_leaves_the_lease(tmp_path, caplog):
  path = tmp_path / 'lease.json'
  with locks.leased(str(path), 'busy', 0.2) as lease:
    lease.check()
    path.write_text('{"owner": "another"}')
    deadline = time.monotonic() + 60
    while lease.lost_to is None:
      assert time.monotonic() < deadline
      time.sleep(0.02)
    with pytest.raises(errors.UserError, match='busy .another took it over'):
      lease.check()
  assert 'another trains here as well' in caplog.text
  assert 'another' in path.read_text()
  assert not any(
    t.name == 'genecompass-lease' and t.is_alive()
    for t in threading.enumerate()
  )


def test_one_that_has_to_know_looks(tmp_path):
  path = tmp_path / 'lease.json'
  path.write_text('{"owner": "me"}')
  lease = locks.Lease(str(path), 'busy', 'me', None, 60.0)
  lease.check(now=True)
  path.unlink()  # by hand
  lease.check(now=True)
  lease.renew(1)
  assert json.loads(path.read_text())['owner'] == 'me'
  path.write_text('{"owner": "another"}')
  lease.check()  # nobody has looked
  with pytest.raises(errors.UserError, match='busy .another took it over'):
    lease.check(now=True)
  lease.renew(2)
  assert 'another' in path.read_text()


def test_a_lease_that_is_gone_after_its_time_was_taken_over(tmp_path):
  path = tmp_path / 'lease.json'
  lease = locks.Lease(str(path), 'busy', 'me', None, 0.0)
  with pytest.raises(errors.UserError, match='which has ended, took it over'):
    lease.check(now=True)
  lease.renew(1)
  assert not path.exists()


def test_a_lock_is_shared_or_held_alone(tmp_path):
  path = str(tmp_path / 'lock')
  with locks.held(path, 'busy', shared=True):
    with locks.held(path, 'busy', shared=True):
      pass
    assert (tmp_path / 'lock').exists()  # one still has it
    with (
      pytest.raises(errors.UserError, match='busy'),
      locks.held(path, 'busy'),
    ):
      pass
  assert not (tmp_path / 'lock').exists()
  with (
    locks.held(path, 'busy'),
    pytest.raises(errors.UserError, match='busy'),
    locks.held(path, 'busy', shared=True),
  ):
    pass


def test_a_lock_is_waited_for(tmp_path, caplog):
  """One after the other, though each removes the file."""
  path, inside, most = str(tmp_path / 'lock'), [], []

  def work():
    with locks.waited(path, 'waiting'):
      inside.append(1)
      most.append(len(inside))
      time.sleep(0.05)
      inside.pop()

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert most == [1] * 4 and 'waiting' in caplog.text
  assert not (tmp_path / 'lock').exists()
