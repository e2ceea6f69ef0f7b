"""Processes that this one starts, and that must not outlive it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from genecompass_jax import errors

_NOT_FOUND = 127  # as a shell ends

# A program that binds itself to its parent and becomes another one. It is a
# program, not a `preexec_fn`: what runs between fork and exec in a process that
# has threads, as every one that has loaded JAX, may wait for ever for a lock
# that some thread held at the fork.
_BIND = f"""
import os, sys
try:
  import ctypes
  set_option = ctypes.CDLL(None).prctl
except (ImportError, OSError, AttributeError):
  pass  # Linux alone knows it, and not every Python has ctypes
else:
  set_option(1, {int(signal.SIGKILL)})  # PR_SET_PDEATHSIG, which exec keeps
  if os.getppid() != int(sys.argv[1]):  # it died in between
    os._exit({errors.EXIT_RETRY})
try:
  os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
  print(f'{{sys.argv[2]}} cannot be started: {{error.strerror}}', file=sys.stderr)
  sys.exit({_NOT_FOUND})
"""


def bound(command: Sequence[str | os.PathLike[str]]) -> list[str]:
  """A command that ends with the thread that starts it, even if that is killed.

  Elsewhere than on Linux it is the command alone that runs. One that cannot be
  started is one line and exit code 127.
  """
  binding = [sys.executable, '-I', '-S', '-c', _BIND, str(os.getpid())]
  return [*binding, *map(os.fspath, command)]


def kill(process: subprocess.Popen) -> None:
  """Ends a process and all that it has started."""
  with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()
