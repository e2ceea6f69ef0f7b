"""Ends a process that hangs, with the stacks of its threads, to start again.

A lost connection or a file system that does not answer may hold a step for
ever, and machines with it. A thread that waits for signs of life is all that
can be done from inside: the main thread is not to be woken.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from genecompass_jax import errors, processes

# Times as long without a sign of life, for what is known to take long.
_PATIENCE = 4.0
_LAST_WORDS_S = 15.0


class Watchdog:
  """Waits for signs of life; use as a context."""

  def __init__(
    self, seconds: float, tell: Callable[[float], None] = lambda seconds: None
  ):
    """A watchdog that ends the process after so many silent seconds.

    Args:
      seconds: without a sign of life; 0 for never.
      tell: is called with them before the end, to write an event.
    """
    self._seconds, self._tell = seconds, tell
    self._shapes: set[object] = set()
    self._ends = threading.Event()
    self.beat(compiles=True)
    self._thread = threading.Thread(
      target=self._watch, daemon=True, name='genecompass-watchdog'
    )

  def __enter__(self) -> 'Watchdog':
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._ends.set()
    if self._seconds:
      self._thread.join()

  def beat(self, compiles: bool = False) -> None:
    """A sign of life.

    Args:
      compiles: whether four times as long may pass until the next one, because
        programs are compiled, or a checkpoint is read or completed.
    """
    self._limit = (_PATIENCE if compiles else 1.0) * self._seconds
    self._deadline = time.monotonic() + self._limit

  def expect(self, shape: object) -> None:
    """A step on a batch of a shape is next: a new one is compiled for."""
    self.beat(compiles=shape not in self._shapes)
    self._shapes.add(shape)

  def _watch(self) -> None:
    while True:
      left = self._deadline - time.monotonic()
      if left <= 0:
        self._end()
      if self._ends.wait(max(left, 0.0)):
        return

  def _end(self) -> None:
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    # Even these may hang: a file that does not answer, a service that is gone.
    for last in (
      lambda: self._tell(self._limit),
      lambda: processes.fail(
        errors.EXIT_RETRY,
        f'no sign of life for {self._limit:g} s (guard.hang_after_s='
        f'{self._seconds:g}; four times that to compile, to restore and to '
        'complete the last checkpoint); the stacks above say where; start the '
        'same command again to go on, with more if it was only slow',
      ),
    ):
      thread = threading.Thread(target=last, daemon=True)
      thread.start()
      thread.join(_LAST_WORDS_S)
    sys.stderr.flush()
    os._exit(errors.EXIT_RETRY)
