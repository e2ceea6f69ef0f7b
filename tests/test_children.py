"""Commands that end with their parent."""

import os
import subprocess
import sys

import pytest

from genecompass_jax import children


def test_a_command_that_is_not_there_is_one_line():
  result = subprocess.run(
    children.bound(['no-such-command', 'x']), capture_output=True, text=True
  )
  assert result.returncode == 127
  assert result.stderr == (
    'no-such-command cannot be started: No such file or directory\n'
  )


@pytest.mark.parametrize(
  'ctypes', ['raise ImportError', 'CDLL = lambda name: None']
)
def test_without_ctypes_it_is_the_command_alone(tmp_path, ctypes):
  """A Python that was built without it, or whose system has no prctl."""
  (tmp_path / 'ctypes.py').write_text(ctypes)
  interpreter, *flags, program, parent = children.bound([])
  assert '-I' in flags  # which leaves this folder out: it is put in by hand
  program = f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}'
  result = subprocess.run(
    [interpreter, *flags, program, parent, 'echo', 'it runs'],
    capture_output=True,
    text=True,
  )
  assert (result.stdout, result.stderr) == ('it runs\n', '')


def test_one_whose_parent_is_gone_does_not_start():
  *binding, parent = children.bound([])
  assert parent == str(os.getpid())
  result = subprocess.run(
    [*binding, '1' if os.getpid() != 1 else '2', 'echo', 'it runs'],
    capture_output=True,
    text=True,
  )
  assert result.stdout == ''
  assert (result.returncode != 0) is (sys.platform == 'linux')
