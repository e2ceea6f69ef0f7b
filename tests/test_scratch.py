"""Folders for what is on its way, and those of processes that were killed."""

import os
import subprocess
import sys
import textwrap

from genecompass_jax import scratch
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
