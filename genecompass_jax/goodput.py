"""Where the wall time of a run went: how much of it trained.

A run writes its account as event lines (`event: 'goodput'`) at each checkpoint,
now and then between them, and at its end: seconds by kind since its process
began, which add up to all of them. From these lines, `account` adds up a run of
several processes, whatever ended them: steps that were trained and then done
again are no training, nor is the time in which no process ran.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from genecompass_jax import progress

EVENT = 'goodput'
# What a process does, one at a time.
KINDS = (
  'start',  # opening corpus and workdir, null models, initial parameters
  'restore',  # reading a checkpoint
  'compile',  # tracing, lowering and compiling, or fetching from the cache
  'train',
  'data_wait',  # the devices had nothing to do: a batch was not there
  'evaluate',
  'checkpoint',  # what is not hidden behind training
  'profile',  # opening and writing traces, not the steps in them
)
# What only shows when lines of several processes are laid side by side.
LOST = 'lost'  # trained and done again, or never accounted for: a kill
DOWN = 'down'  # no process ran, or none had come as far as its clock


class Clock:
  """Seconds by kind, from its creation on; one kind at a time.

  Attributes:
    began: Unix seconds of its creation.
  """

  def __init__(self):
    """Starts with the kind 'start'."""
    self.began = time.time()
    self._kind = 'start'
    self._since = time.monotonic()
    self._seconds = dict.fromkeys(KINDS, 0.0)

  def enter(self, kind: str) -> None:
    """From now on, time is of this kind."""
    now = time.monotonic()
    self._seconds[self._kind] += now - self._since
    self._kind, self._since = kind, now

  @contextlib.contextmanager
  def spent(self, kind: str) -> Iterator[None]:
    """Time inside is of this kind; then of the one before."""
    before = self._kind
    self.enter(kind)
    try:
      yield
    finally:
      self.enter(before)

  def move(self, seconds: float, kind: str) -> None:
    """Of the time of the present kind, the last seconds were of another."""
    self._seconds[self._kind] -= seconds
    self._seconds[kind] += seconds

  def seconds(self) -> dict[str, float]:
    """Seconds by kind so far, rounded to milliseconds."""
    self.enter(self._kind)
    return {kind: round(max(s, 0.0), 3) for kind, s in self._seconds.items()}


@dataclasses.dataclass(frozen=True)
class Account:
  """Where the time of a run went.

  Attributes:
    seconds: by kind: `KINDS`, 'lost' and 'down'.
    attempts: processes (or jobs of several) that the run took so far.
    repeated_steps: steps that were done again.
  """

  seconds: Mapping[str, float]
  attempts: int
  repeated_steps: int

  @property
  def wall(self) -> float:
    """Seconds from the first start to the last line of the account."""
    return sum(self.seconds.values())

  def share(self, kind: str) -> float:
    """Share of a kind in the wall time."""
    return self.seconds.get(kind, 0.0) / max(self.wall, 1e-9)


@dataclasses.dataclass
class _Stretch:
  """Training between two lines of the account: steps (first, last]."""

  first: int
  last: int
  seconds: float

  def cut(self, step: int) -> float:
    """Forgets what is beyond a step; returns its seconds."""
    kept = max(step, self.first)
    if self.last <= kept:  # also where nothing is left of it
      return 0.0
    gone = self.seconds * (self.last - kept) / (self.last - self.first)
    self.seconds -= gone
    self.last = kept
    return gone


class _Attempt:
  """What one process said of itself."""

  def __init__(self, line: Mapping[str, Any]):
    self.began = line.get('began', line['time'])
    self.alive = line['time']
    self.step = self.counted_step = line.get('step', 0)
    self.seconds: dict[str, float] | None = None

  def count(self, line: Mapping[str, Any]) -> dict[str, float]:
    """An account line; returns the seconds since the one before."""
    before, self.seconds = self.seconds or {}, line['seconds']
    return {k: s - before.get(k, 0.0) for k, s in self.seconds.items()}

  def see(self, time_: float, step: int) -> None:
    """A line of the attempt: it was alive then."""
    self.alive, self.step = max(self.alive, time_), max(self.step, step)

  @property
  def unaccounted(self) -> float:
    """Seconds between its last account and its last line."""
    counted = sum(self.seconds.values()) if self.seconds else 0.0
    return max(self.alive - self.began - counted, 0.0)


def account(lines: Iterable[Mapping[str, Any]]) -> Account | None:
  """Adds up the account of a run, over all of its processes.

  Args:
    lines: of metrics.jsonl, from `metrics.read`.

  Returns:
    None where there is no account yet, or the run is of an earlier version.
    The present process counts up to its last account line.
  """
  total = dict.fromkeys((*KINDS, LOST, DOWN), 0.0)
  stretches: list[_Stretch] = []
  attempts: list[_Attempt] = []
  repeated = 0

  def go_back(step: int) -> int:
    """What is beyond a step will be done again; returns its steps."""
    gone = sum(stretch.cut(step) for stretch in stretches)
    total['train'] -= gone
    total[LOST] += gone
    return max(attempts[-1].step - step, 0)

  for line in lines:
    event, now, step = line.get('event'), line.get('time'), line.get('step', 0)
    if now is None:
      continue  # of an earlier version
    if event in ('start', 'resume'):
      if attempts:
        before = attempts[-1]
        before.see(line.get('last_time', 0.0), line.get('last_step', 0))
        repeated += go_back(step)
        if before.began == line.get('began'):
          # The same process has gone back to a checkpoint; its clock runs on.
          before.step = before.counted_step = step
          continue
        total[LOST] += before.unaccounted
        total[DOWN] += max(line.get('began', now) - before.alive, 0.0)
      attempts.append(_Attempt(line))
      continue
    if not attempts:
      continue
    attempt = attempts[-1]
    if event == EVENT:
      news = attempt.count(line)
      for kind, value in news.items():
        total[kind] = total.get(kind, 0.0) + value
      if step > attempt.counted_step:
        stretches.append(
          _Stretch(attempt.counted_step, step, news.get('train', 0.0))
        )
        attempt.counted_step = step
    attempt.see(now, step)
  if all(attempt.seconds is None for attempt in attempts):
    return None
  return Account(total, len(attempts), repeated)


def describe(account_: Account) -> str:
  """An account in one line of words."""
  parts = [
    f'{kind.replace("_", " ")} {account_.share(kind):.1%}'
    for kind in (*KINDS, LOST, DOWN)
    if kind != 'train' and account_.share(kind) >= 0.0005
  ]
  text = (
    f'{account_.share("train"):.1%} of '
    f'{progress.duration(account_.wall)} trained'
  )
  if parts:
    text += f' ({", ".join(parts)})'
  restarts = account_.attempts - 1
  if restarts or account_.repeated_steps:
    text += (
      f'; {restarts} restart{"s"[: restarts != 1]}, '
      f'{account_.repeated_steps:,} step'
      f'{"s"[: account_.repeated_steps != 1]} repeated'
    )
  return text
