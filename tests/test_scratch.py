"""Folders for what is on its way, and those of processes that were killed."""

import errno
import fcntl
import os
import subprocess
import sys
import textwrap

from genecompass_jax import locks, scratch
from tests.conftest import ROOT

KILLED = textwrap.dedent("""
  import os, signal
  from genecompass_jax import scratch

  open(os.path.join(scratch.new_folder('checkpoint'), 'file'), 'w').close()
  os.kill(os.getpid(), signal.SIGKILL)
""")


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
  monkeypatch.setattr(scratch.tempfile, 'tempdir', str(tmp_path))
  mine = scratch.new_folder('checkpoint')
  subprocess.run(
    [sys.executable, '-c', KILLED],
    cwd=ROOT,
    env={**os.environ, 'TMPDIR': str(tmp_path)},
  )
  # One cannot be told from a folder that somebody else has made so.
  (tmp_path / 'genecompass-checkpoint-old').mkdir()
  kept = {*os.listdir(mine + '/..')}
  assert len(kept) == 5
  other = scratch.new_folder('metrics')
  own = {os.path.basename(x) for x in (mine, other)}
  assert {*os.listdir(tmp_path)} == {
    'genecompass-checkpoint-old', *own, *(f'{name}.lock' for name in own)
  }  # fmt: skip
  scratch.remove(mine)
  scratch.remove(other)
  assert os.listdir(tmp_path) == ['genecompass-checkpoint-old']


def test_what_other_hosts_have_made_stays(tmp_path, monkeypatch):
  """Their locks may not be seen here: all look as if nobody held them."""
  monkeypatch.setattr(scratch.tempfile, 'tempdir', str(tmp_path))
  monkeypatch.setattr(scratch.socket, 'gethostname', lambda: 'node-1')
  for host in ('node-1', 'node-1-a', 'node'):
    (tmp_path / f'genecompass-{host}-checkpoint-12345678').mkdir()
    (tmp_path / f'genecompass-{host}-checkpoint-12345678.lock').touch()
  scratch.remove_abandoned()
  assert sorted(os.listdir(tmp_path)) == [
    'genecompass-node-1-a-checkpoint-12345678',
    'genecompass-node-1-a-checkpoint-12345678.lock',
    'genecompass-node-checkpoint-12345678',
    'genecompass-node-checkpoint-12345678.lock',
  ]


def test_a_file_system_without_locks_is_used_and_not_swept(
  tmp_path, monkeypatch
):
  def refuse(*arguments):
    raise OSError(errno.ENOTSUP, 'Operation not supported')

  monkeypatch.setattr(scratch.tempfile, 'tempdir', str(tmp_path))
  flock = fcntl.flock
  monkeypatch.setattr(locks.fcntl, 'flock', refuse)
  mine, other = scratch.new_folder('checkpoint'), scratch.new_folder('metrics')
  monkeypatch.setattr(locks.fcntl, 'flock', flock)
  scratch.remove_abandoned()
  assert {*os.listdir(tmp_path)} == {os.path.basename(x) for x in (mine, other)}
  scratch.remove(mine)
  scratch.remove(other)
  assert os.listdir(tmp_path) == []
