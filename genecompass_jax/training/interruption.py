"""Stopping a loop between two steps, when a machine is taken away."""

import os
import signal
from typing import Any

from genecompass_jax import processes

_AT_ONCE = 'stopped at once; the same command goes on from the last checkpoint'


class Stopped(Exception):  # noqa: N818
  """What was under way is given up, because a signal asks to stop."""


class StopSignals:
  """Turns SIGTERM and SIGINT into a wish to stop after the step.

  A context: from `catch`, which is called where stopping is looked for, to its
  end. What is entered behind it is left in peace, too.

  In several processes, SIGTERM to one of them is a wish of all: the runtime
  catches it, tells the others, and finds the next step that none has passed.
  """

  def __init__(self):
    self.asked_to_stop = False
    self._asked = 0
    self._reached = False
    self._before: dict[int, Any] = {}

  def reached_stop(self) -> bool:
    """Whether to stop now.

    To be asked by all processes after every batch, of an evaluation too.
    """
    if processes.count() == 1:
      return self.asked_to_stop
    if self._reached:
      return True
    from jax.experimental import multihost_utils

    self._asked += 1  # as often as by the others
    # The runtime says it once, and a loop that rolls back there asks again.
    self._reached = multihost_utils.reached_preemption_sync_point(self._asked)
    return self._reached

  def __enter__(self) -> 'StopSignals':
    return self

  def catch(self) -> None:
    """Signals do nothing by themselves from here on."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if processes.count() > 1:
      numbers = [signal.SIGINT]  # the other one is the runtime's
    for number in numbers:
      try:
        self._before[number] = signal.signal(number, self._stop)
      except ValueError:  # not the main thread (a notebook's, say)
        break

  def __exit__(self, *exc: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _stop(self, number: int, frame: object) -> None:
    del frame
    if self.asked_to_stop and number == signal.SIGINT:
      raise KeyboardInterrupt(_AT_ONCE)  # asked twice
    self.asked_to_stop = True
    if processes.count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
