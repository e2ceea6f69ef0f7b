"""A local file that grows, and its copy in a store.

Stores cannot append. The file is copied up whole, in a thread of its own, so
that a step of training never waits for a store and does not die of one copy
that failed.
"""

import logging
import os
import threading
import time

from genecompass_jax import errors, paths

EVERY = 10.0  # seconds between copies, where nobody waits for one
PATIENCE = 300.0  # seconds that `wait` gives a store that fails
_LAST_COPY = 10.0  # seconds that `close` gives a copy under way
_LONGEST_PAUSE = 30.0  # seconds between tries


class Upload:
  """Copies a file up when asked, at most once in a while."""

  def __init__(self, local: str, target: paths.PathLike):
    """Nothing is copied yet.

    Args:
      local: the file.
      target: URL of its copy.
    """
    self._local, self._target = local, os.fspath(target)
    self._changed = threading.Condition()
    self._asked = self._copied = 0  # bytes
    self._hurry = self._closed = False
    self._error: Exception | None = None
    self._thread = threading.Thread(
      target=self._run, name='genecompass-upload', daemon=True
    )
    self._thread.start()

  def ask(self) -> None:
    """What is in the file now is to be copied, soon."""
    size = os.path.getsize(self._local)
    with self._changed:
      self._asked = size
      self._changed.notify_all()

  def wait(self, patience: float | None = None) -> None:
    """Returns when all that was asked for is in the store.

    Args:
      patience: seconds to go on trying for; `PATIENCE` if not given.

    Raises:
      UserError: the store refuses it.
      RetryableError: it could not be copied in that time.
    """
    patience = PATIENCE if patience is None else patience
    until = time.monotonic() + patience
    with self._changed:
      self._hurry = True
      self._changed.notify_all()
      while self._copied < self._asked:
        left = until - time.monotonic()
        if isinstance(self._error, errors.UserError):
          raise self._error
        if left <= 0:
          raise errors.RetryableError(
            f'{self._target} could not be written for {patience:.0f} s '
            f'({self._error or "no answer"}); start the same command again '
            'when the store answers'
          )
        self._changed.wait(left)
      self._hurry = False

  def close(self) -> None:
    """Ends the thread; what was not waited for may not be copied.

    A copy under way may not be broken off: it is waited for, a while, so that
    what comes after is not written over.
    """
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    self._thread.join(_LAST_COPY)
    if self._thread.is_alive():
      logging.warning('%s: a copy under way may still come there', self._target)

  def _run(self) -> None:
    pause, begun = 0.0, -EVERY
    while True:
      with self._changed:
        self._changed.wait_for(
          lambda: self._closed or self._asked > self._copied
        )
        rest = max(pause, begun + EVERY - time.monotonic())
        self._changed.wait_for(
          lambda: self._closed or (self._hurry and self._error is None),
          max(rest, 0.0),
        )
        if self._closed:
          return
        size = self._asked
      begun = time.monotonic()
      try:
        with open(self._local, 'rb') as file:
          paths.write_bytes(self._target, file.read(size))
        error, pause = None, 0.0
      except Exception as fault:  # told to who waits, and tried again
        error, pause = fault, min(max(2 * pause, 1.0), _LONGEST_PAUSE)
        logging.warning(
          '%s; it is tried again in %.0f s', errors.first_line(fault), pause
        )
      with self._changed:
        self._error = error
        if error is None:
          self._copied = size
        self._changed.notify_all()
