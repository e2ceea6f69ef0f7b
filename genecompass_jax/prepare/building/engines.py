"""Who runs the tasks of a build: this process, a pool of them, or Beam.

A task is a function of a module and a small argument. It leaves its result in
files and may be run twice; so an engine only has to run every task that is not
done yet, in any order, anywhere.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

from genecompass_jax import errors

ENGINES = ('pool', 'beam')
Task = Any
Run = Callable[[Task], int]  # returns the cells it was about
Done = Callable[[int], None]


class Engine(Protocol):
  """Runs tasks."""

  def run(self, function: Run, tasks: Sequence[Task], done: Done) -> None:
    """Runs a function on every task.

    Args:
      function: of a module, or a partial of one, as workers import it.
      tasks: small arguments.
      done: is told the cells of every finished task.

    Raises:
      RetryableError: a worker died; what is done stays done.
    """

  def close(self) -> None:
    """Ends the workers."""


class Inline:
  """Runs tasks here, one after the other."""

  def run(self, function: Run, tasks: Sequence[Task], done: Done) -> None:
    """Runs a function on every task."""
    for task in tasks:
      done(function(task))

  def close(self) -> None:
    """Nothing to end."""


class Pool:
  """Runs tasks in processes of this machine, which live until `close`."""

  def __init__(self, jobs: int):
    # not forked: threads of TensorStore and locks of HDF5 do not survive it;
    # the server imports once what all its children need
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['genecompass_jax.prepare.pipeline'])
    self._pool = futures.ProcessPoolExecutor(jobs, context, _start_worker)

  def run(self, function: Run, tasks: Sequence[Task], done: Done) -> None:
    """Runs a function on every task; the first error ends the rest."""
    running = {self._pool.submit(function, task) for task in tasks}
    try:
      for future in futures.as_completed(running):
        running.discard(future)
        done(future.result())
    except futures.process.BrokenProcessPool:
      raise errors.RetryableError(
        'a worker process died (of memory?); what is finished is kept: run the '
        'same command again, with fewer --jobs if it was memory. A script of '
        "your own has to call it under: if __name__ == '__main__'"
      ) from None
    finally:
      for future in running:
        future.cancel()

  def close(self) -> None:
    """Ends the processes, also those at work."""
    processes = list((self._pool._processes or {}).values())
    self._pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
      with contextlib.suppress(OSError):
        process.terminate()


def _start_worker() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells what to do
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends an orphan: after a kill -9 of the parent nobody else would."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class Beam:
  """Runs tasks as Apache Beam pipelines.

  Attributes:
    options: flags of Beam (`--runner=FlinkRunner`, ...). Without a runner, the
      local one. Workers of others must see the folder of the build and the
      sources under the same names, and have this package installed.
  """

  options: tuple[str, ...] = ()

  def run(self, function: Run, tasks: Sequence[Task], done: Done) -> None:
    """Runs a function on every task: Create, Reshuffle, Map."""
    try:
      import apache_beam as beam
      from apache_beam.options import pipeline_options
    except ImportError:
      raise errors.UserError(
        '--engine beam needs Apache Beam: pip install ".[beam]" in the folder '
        'of the repository'
      ) from None
    options = pipeline_options.PipelineOptions(list(self.options))
    standard = options.view_as(pipeline_options.StandardOptions)
    if standard.runner in (None, 'DirectRunner'):
      # the default one would fetch a program of its own from the network
      standard.runner = 'FnApiRunner'
    try:
      with beam.Pipeline(options=options) as pipeline:
        _ = (
          pipeline
          | beam.Create(list(tasks))
          | beam.Reshuffle()
          | beam.Map(functools.partial(_run_in_beam, function))
        )
    except Exception as error:  # runners wrap what a task raised, in words
      raise _unwrapped(error) from error
    done(0)

  def close(self) -> None:
    """Nothing to end."""


_MARK = 'genecompass UserError: '


def _run_in_beam(function: Run, task: Task) -> int:
  try:
    return function(task)
  except errors.UserError as error:
    raise RuntimeError(f'{_MARK}{error}') from error


def _unwrapped(error: Exception) -> Exception:
  """The mistake that a task reported, out of a runner's error."""
  text = str(error)
  if _MARK in text:
    return errors.UserError(text.partition(_MARK)[2].splitlines()[0])
  return error


@contextlib.contextmanager
def opened(name: str, jobs: int, options: Sequence[str]) -> Iterator[Engine]:
  """The engine of a name, ended on leaving.

  Args:
    name: one of `ENGINES`.
    jobs: processes of a pool; 1 runs everything here.
    options: flags of Beam.

  Raises:
    UserError: no such engine.
  """
  if name not in ENGINES:
    raise errors.UserError(f'--engine {name}: give one of {", ".join(ENGINES)}')
  if name == 'beam':
    engine: Engine = Beam(tuple(options))
  else:
    engine = Pool(jobs) if jobs > 1 else Inline()
  try:
    yield engine
  finally:
    engine.close()
