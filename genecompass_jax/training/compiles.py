"""What was compiled, how long it took, and where compiled programs are kept.

JAX tells of every program that it traces, lowers and compiles (jax.monitoring;
the names of its events are the same in jax 0.10.2 and 0.11.1). Where they are
missing nothing is counted, and nothing fails.
"""

import collections
import contextlib
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
from jax import monitoring

# Each is told at its end, with its duration and the name of the program.
_COMPILED = '/jax/core/compile/backend_compile_duration'
_PARTS = (
  '/jax/core/compile/jaxpr_trace_duration',
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  _COMPILED,
)
_FETCHED = '/jax/compilation_cache/cache_hits'
_LEAST_S = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
# A cached program that was not written for so long is of code that is gone.
_CACHE_DAYS = 30


class Counter:
  """Counts programs between `start` and `stop`.

  Attributes:
    programs: name -> times it was compiled, or fetched from the cache.
    fetched: how many of them came from the cache.
    seconds: spent with it: tracing and lowering too.
  """

  def __init__(self, on_seconds: Callable[[float], None] | None = None):
    """A counter at zero.

    Args:
      on_seconds: called with every piece of `seconds` as it is spent.
    """
    self.programs: collections.Counter[str] = collections.Counter()
    self.fetched = 0
    self.seconds = 0.0
    self._on_seconds = on_seconds
    self._counted: list[tuple[float, float]] = []

  @property
  def number(self) -> int | None:
    """Programs so far; None where JAX tells of none."""
    return sum(self.programs.values()) or None

  def start(self) -> None:
    """Listens from now on."""
    register = getattr(
      monitoring, 'register_event_duration_secs_listener', None
    )
    if register is not None:
      register(self._listen)
    register = getattr(monitoring, 'register_event_listener', None)
    if register is not None:
      register(self._hear)

  def stop(self) -> None:
    """Listens no more."""
    # Of jax 0.10; the older name has no _secs.
    unregister = getattr(monitoring, 'unregister_event_duration_listener', None)
    if unregister is not None:
      # Somebody may have cleared the list.
      with contextlib.suppress(AssertionError, ValueError):
        unregister(self._listen)
    unregister = getattr(monitoring, 'unregister_event_listener', None)
    if unregister is not None:
      with contextlib.suppress(AssertionError, ValueError):
        unregister(self._hear)

  def _hear(self, event: str, **facts: Any) -> None:
    del facts
    self.fetched += event == _FETCHED

  def _listen(self, event: str, duration: float, **facts: Any) -> None:
    if event not in _PARTS:
      return
    if event == _COMPILED:
      self.programs[str(facts.get('fun_name', 'unknown'))] += 1
    # What runs inside another part is told before it: count its time once.
    end = time.monotonic()
    begin = end - duration
    new = duration
    while self._counted and self._counted[-1][1] > begin:
      inner_begin, inner_end = self._counted.pop()
      new -= inner_end - max(inner_begin, begin)
      begin = min(begin, inner_begin)
    self._counted = [*self._counted[-8:], (begin, end)]
    self.seconds += max(new, 0.0)
    if self._on_seconds is not None:
      self._on_seconds(max(new, 0.0))


def keep_programs(small_too: bool = False) -> None:
  """Keeps compiled programs over restarts, where the user chose no place.

  JAX_COMPILATION_CACHE_DIR, or what a program set, is left as it is; empty
  means none. Else runs of one process keep them in the cache folder of the
  user, by kind of host: programs for one CPU may crash on another. Jobs of
  several processes keep none by themselves, be they on one host: JAX writes
  from the first process alone. On CPUs the others never find what it wrote,
  for the name of a program has the process in it (jax 0.10.2, gloo): the first
  is done at once, waits for the others in a sum, and gives up after 30 s.

  Args:
    small_too: keep programs of less than a second of compiling as well, where
      the user says nothing of it: for commands that end soon after.
  """
  if small_too and _LEAST_S not in os.environ:
    jax.config.update(_LEAST_S.lower(), 0.0)
  chosen = jax.config.jax_compilation_cache_dir is not None
  if chosen or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  if jax.process_count() > 1:
    return
  folder = cache_folder()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _forget_old(folder)
  except OSError:
    return  # no home, or a full one: compile anew, as always
  jax.config.update('jax_compilation_cache_dir', str(folder))


def cache_folder() -> pathlib.Path:
  """The folder of compiled programs of this kind of host."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  host = f'{platform.machine()}-{_processor()}'
  return pathlib.Path(base) / 'genecompass_jax' / 'xla' / host


def _processor() -> str:
  """A short hash of what the CPU can do."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      wanted = ('model name', 'flags', 'Features')
      facts = {line.strip() for line in file if line.startswith(wanted)}
  except OSError:
    facts = {platform.processor()}
  return hashlib.sha256('\n'.join(sorted(facts)).encode()).hexdigest()[:8]


def _forget_old(folder: pathlib.Path) -> None:
  oldest = time.time() - _CACHE_DAYS * 24 * 3600
  for path in folder.iterdir():
    try:
      if path.stat().st_mtime < oldest:
        path.unlink()
    except OSError:
      continue  # another process was faster
