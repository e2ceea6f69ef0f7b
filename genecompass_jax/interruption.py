"""Stopping a loop between two steps, when a machine is taken away."""

import signal
from typing import Any


class StopSignals:
  """Turns SIGTERM and SIGINT into a wish to stop after the step."""

  def __init__(self):
    self.asked_to_stop = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'StopSignals':
    for number in (signal.SIGTERM, signal.SIGINT):
      try:
        self._before[number] = signal.signal(number, self._stop)
      except ValueError:  # not the main thread (a notebook's, say)
        break
    return self

  def __exit__(self, *exc: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _stop(self, number: int, frame: object) -> None:
    del frame
    if self.asked_to_stop and number == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice: now
    self.asked_to_stop = True
