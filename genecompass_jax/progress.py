"""Progress of long work: a bar on a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output stays a result.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar('T')

BAR_WIDTH = 24
SECONDS_BETWEEN_FRAMES = 0.2  # on a terminal
SECONDS_BETWEEN_LINES = 15.0  # in a log


class Progress:
  """Counts units of work and says how fast it goes and what is left.

  Use as a context: the last state is printed on leaving it.

  Args:
    total: units of the whole work; None where it is not known.
    unit: what is counted, in the plural.
    label: what is being done.
    stream: where to write; standard error by default.
  """

  def __init__(
    self,
    total: float | None = None,
    unit: str = 'cells',
    label: str = '',
    stream: TextIO | None = None,
  ):
    self.total, self.unit, self.label = total, unit, label
    self.done = 0
    self._first = 0.0, 0
    self._skipped = 0
    self._note = ''
    self._stream = sys.stderr if stream is None else stream
    self._is_terminal = self._stream.isatty()
    self._every = (
      SECONDS_BETWEEN_FRAMES if self._is_terminal else SECONDS_BETWEEN_LINES
    )
    self._start = self._last = time.monotonic()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc: object) -> None:
    self._show(end=True)

  def skip(self, n: int) -> None:
    """Counts units that were finished before this began, without their time."""
    self._skipped += n
    self.done += n
    self._first = time.monotonic(), self.done

  def update(self, n: int = 1, note: str = '') -> None:
    """Adds n finished units; prints when the last print is long ago.

    Args:
      n: units finished since the last call.
      note: a short text to show behind the figures, such as a loss.
    """
    if self.done == 0:  # what came before, compiling say, is no rate
      self._first = time.monotonic(), n
    self.done += n
    self._note = note or self._note
    if time.monotonic() - self._last >= self._every:
      self._show()

  def line(self) -> str:
    """The state in one line."""
    elapsed = max(time.monotonic() - self._start, 1e-9)
    rate = (self.done - self._skipped) / elapsed
    since, first = self._first
    if self.done > first and self.done < (self.total or 0):
      rate = (self.done - first) / max(time.monotonic() - since, 1e-9)
    parts = [self.label] if self.label else []
    if self.total:
      share = min(self.done / self.total, 1.0)
      if self._is_terminal:
        full = round(share * BAR_WIDTH)
        parts.append('[' + '#' * full + '.' * (BAR_WIDTH - full) + ']')
      parts.append(f'{share:4.0%} of {_amount(self.total)} {self.unit}')
    else:
      parts.append(f'{_amount(self.done)} {self.unit}')
    parts.append(f'{_significant(rate)} {self.unit}/s')
    if self.total and self.done < self.total:
      left = (self.total - self.done) / rate if rate else None
      parts.append(f'{_duration(left)} left')
    else:
      parts.append(f'in {_duration(elapsed)}')
    if self._note:
      parts.append(self._note)
    return '  '.join(parts)

  def _show(self, end: bool = False) -> None:
    self._last = time.monotonic()
    if self._is_terminal:  # overwrite the line, clearing what was longer
      self._stream.write(f'\r\x1b[2K{self.line()}' + ('\n' if end else ''))
    else:
      self._stream.write(self.line() + '\n')
    self._stream.flush()


def track(
  iterable: Iterable[T],
  total: int | None = None,
  unit: str = 'items',
  label: str = '',
) -> Iterator[T]:
  """Yields the items of an iterable and shows how far it is."""
  if total is None and hasattr(iterable, '__len__'):
    total = len(iterable)
  with Progress(total, unit, label) as progress:
    for item in iterable:
      yield item
      progress.update()


def _amount(done: float) -> str:
  return f'{done:,.1f}' if isinstance(done, float) else f'{done:,}'


def _significant(rate: float) -> str:
  return f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return '?'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes:02d} min'
  return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'


def is_due(step: int, period: int) -> bool:
  """Whether something done every `period` steps is due; 0 is never."""
  return period > 0 and step % period == 0
