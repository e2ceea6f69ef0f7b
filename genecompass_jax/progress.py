"""Progress of long work: a bar on a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output stays a result.
"""

import collections
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar('T')

# Of several processes that do the same, one shows how far it is.
is_shown = True

BAR_WIDTH = 24
SECONDS_BETWEEN_FRAMES = 0.2  # on a terminal
SECONDS_BETWEEN_LINES = 15.0  # in a log
# What is left is judged by the last minute: compiling at the start, or a slow
# disk an hour ago, says nothing about the rest.
SECONDS_OF_RATE = 60.0
SECONDS_BETWEEN_MARKS = 5.0


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
    # (time, units done) of the last minute
    self._marks: collections.deque[tuple[float, float]] = collections.deque()
    self._skipped = 0
    self._note = ''
    self._is_told = False  # a log has the line of the finished work
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

  def update(self, n: int = 1, note: str = '') -> None:
    """Adds n finished units; prints when the last print is long ago.

    Args:
      n: units finished since the last call.
      note: a short text to show behind the figures, such as a loss.
    """
    self.done += n
    self._note = note or self._note
    now = time.monotonic()
    if not self._marks or now - self._marks[-1][0] >= SECONDS_BETWEEN_MARKS:
      # The first mark is behind the first units: they compile.
      self._marks.append((now, self.done))
      # The window begins with the newest mark that is old enough.
      while len(self._marks) > 1 and now - self._marks[1][0] >= SECONDS_OF_RATE:
        self._marks.popleft()
    if now - self._last >= self._every:
      self._show()

  def line(self) -> str:
    """The state in one line."""
    elapsed = max(time.monotonic() - self._start, 1e-9)
    is_running = bool(self.total) and self.done < self.total
    if is_running:
      rate = self._recent_rate()
    else:
      rate = (self.done - self._skipped) / elapsed
    parts = [self.label] if self.label else []
    if self.total:
      share = min(self.done / self.total, 1.0)
      if self._is_terminal:
        full = round(share * BAR_WIDTH)
        parts.append('[' + '#' * full + '.' * (BAR_WIDTH - full) + ']')
      parts.append(f'{share:4.0%} of {_amount(self.total)} {self.unit}')
    else:
      parts.append(f'{_amount(self.done)} {self.unit}')
    if rate is not None:
      parts.append(f'{_significant(rate)} {self.unit}/s')
    if is_running:
      left = (self.total - self.done) / rate if rate else None
      parts.append(f'{duration(left)} left')
    else:
      parts.append(f'in {duration(elapsed)}')
    if self._note:
      parts.append(self._note)
    return '  '.join(parts)

  def _recent_rate(self) -> float | None:
    """Units a second of the last minute; None before enough are done.

    Ten units, or a hundredth of the work: several shapes may be compiled, one
    after the other, and a rate of compiling would speak of days.
    """
    if not self._marks:
      return None
    since, before = self._marks[0]
    if self.done - before < min(10, self.total / 100):
      return None
    seconds = max(time.monotonic() - since, 1e-9)
    return (self.done - before) / seconds or None

  def _show(self, end: bool = False) -> None:
    self._last = time.monotonic()
    if not is_shown or (end and self._is_told):
      return
    if self._is_terminal:  # overwrite the line, clearing what was longer
      self._stream.write(f'\r\x1b[2K{self.line()}' + ('\n' if end else ''))
    else:
      self._stream.write(self.line() + '\n')
      self._is_told = bool(self.total) and self.done >= self.total
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


def duration(seconds: float | None) -> str:
  """Seconds in words, such as `3 min 05 s`; ? where they are not known."""
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
