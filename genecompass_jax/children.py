"""Processes that this one starts, and that must not outlive it."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable

from genecompass_jax import errors


def kill(process: subprocess.Popen) -> None:
  """Ends a process and all that it has started."""
  with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def die_with(parent: int) -> Callable[[], None]:
  """What makes a new process end with this one (Linux; elsewhere nothing).

  Args:
    parent: this process.

  Returns:
    To be called by the new process: a `preexec_fn` of `subprocess.Popen`, or,
    where this one has loaded JAX, by the program itself.
  """
  try:
    library = ctypes.CDLL(None, use_errno=True)
    set_option = library.prctl
  except (OSError, AttributeError):
    return lambda: None

  def before_it_runs() -> None:
    set_option(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died in between
      os._exit(errors.EXIT_RETRY)

  return before_it_runs
