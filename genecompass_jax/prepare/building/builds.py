"""The folder of a build that is under way, and its stages.

A build may be killed at any point and is then continued by the same command. A
stage is a list of tasks; a task writes its files and, last, a small JSON file,
which says that it is done. So nothing is repeated but the tasks that ran when
the build was killed.

    OUTPUT.building/.lock            held by the process that builds
    OUTPUT.building/identity.json    what is built of what; another build in the
                                     same place starts from nothing
    OUTPUT.building/STAGE/NUMBER/    files of a task
    OUTPUT.building/STAGE/NUMBER.json  its result
    OUTPUT.building/corpus/          takes the name of the corpus at the end
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import genecompass_jax
from genecompass_jax import errors, locks, paths, progress, staging
from genecompass_jax.prepare.building import engines

ENDING = '.building'
_FULL = ('No space left', 'Not enough free space', 'requested and')
_LOCK, _IDENTITY = '.lock', 'identity.json'


def folder_of(output: str, scratch: str) -> str:
  """Where a corpus is built: beside it, or in a folder of the user's.

  Args:
    output: folder or URL of the corpus.
    scratch: a folder, or '' for a place beside the output; needed for a URL.

  Raises:
    UserError: the output is a URL and no folder was given.
  """
  if not scratch:
    if not staging.is_local(output):
      raise errors.UserError(
        f'{output}: name a local folder for the work with --scratch FOLDER'
      )
    return f'{output}{ENDING}'
  digest = hashlib.sha256(output.encode()).hexdigest()[:8]
  name = os.path.basename(output.rstrip('/')) or 'corpus'
  return os.path.join(staging.real(scratch), f'{name}-{digest}{ENDING}')


@contextlib.contextmanager
def opened(folder: str, identity: Mapping | None) -> Iterator[None]:
  """Holds the folder of a build, empty or as a killed build left it.

  It stays where it is after a fault or a kill, to be continued, and goes after
  a `UserError`: the user will change something, and so the identity.

  Args:
    folder: of the build.
    identity: all that the result depends on; None never continues.

  Raises:
    UserError: another process builds here.
    RetryableError: the disk is full.
  """
  os.makedirs(folder, exist_ok=True)
  lock = os.path.join(folder, _LOCK)
  busy = (
    f'{folder}: another process builds here; wait for it, or name another '
    'output'
  )
  # What was done stays with its lock file, or goes with the folder.
  with locks.held(lock, busy, unlink=False):
    name = os.path.join(folder, _IDENTITY)
    text = json.dumps(identity, indent=1, sort_keys=True)
    if identity is None or not _holds(name, text):
      _disown(folder)
      for entry in os.listdir(folder):
        if entry != _LOCK:
          _remove(os.path.join(folder, entry))
      if identity is not None:
        paths.write_text(name, text)
    try:
      yield
    except errors.UserError:
      _disown(folder)
      shutil.rmtree(folder, ignore_errors=True)
      raise
    except (OSError, ValueError) as error:  # TensorStore raises the second
      if not _is_full(folder, error):
        raise
      raise errors.RetryableError(
        f'the disk of {folder} is full; what is finished is kept: free some '
        'space and run the same command again, or remove that folder'
      ) from error
    _disown(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _disown(folder: str) -> None:
  """Before files go: a kill among them must leave nothing to continue."""
  with contextlib.suppress(FileNotFoundError):
    os.remove(os.path.join(folder, _IDENTITY))


def _is_full(folder: str, error: Exception) -> bool:
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
    return True
  # NumPy and TensorStore say it in words
  return any(words in str(error) for words in _FULL)


def _holds(name: str, text: str) -> bool:
  try:
    return paths.read_text(name) == text
  except (OSError, UnicodeDecodeError):
    return False


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)
  else:
    os.remove(path)


def identity_of_file(path: str) -> list:
  """What tells a file, or a folder of files, from an older one of its name."""
  path = os.path.realpath(path)
  if not os.path.isdir(path):
    found = os.stat(path)
    return [path, found.st_size, found.st_mtime_ns]
  listed = []
  for place, folders, names in os.walk(path):
    folders.sort()
    for name in sorted(names):
      found = os.stat(os.path.join(place, name))
      inner = os.path.relpath(os.path.join(place, name), path)
      listed.append([inner, found.st_size, found.st_mtime_ns])
  digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
  return [path, len(listed), digest]


def version() -> str:
  """Of the code: another one does not continue what this one began."""
  return genecompass_jax.__version__


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a build, by name; its tasks have numbers.

  Attributes:
    folder: of the build.
    name: of the stage.
  """

  folder: str
  name: str

  def place(self, task: int) -> str:
    """Folder of a finished task's files."""
    return os.path.join(self.folder, self.name, f'{task:06d}')

  def result(self, task: int) -> dict:
    """What a finished task returned."""
    with open(f'{self.place(task)}.json', encoding='utf-8') as file:
      return json.load(file)

  def array(self, task: int, name: str) -> np.ndarray:
    """An array that a finished task left, mapped into memory."""
    return np.load(
      os.path.join(self.place(task), f'{name}.npy'),
      mmap_mode='r',
      allow_pickle=False,
    )

  def is_done(self, task: int) -> bool:
    """Whether the task has finished."""
    return os.path.exists(f'{self.place(task)}.json')

  def forget(self) -> None:
    """Removes files and results of all tasks: none is done."""
    shutil.rmtree(os.path.join(self.folder, self.name), ignore_errors=True)


Work = Callable[[Any, int, str], dict]


def run_stage(
  engine: engines.Engine,
  stage: Stage,
  work: Work,
  context: Any,
  cells: Sequence[int],
  label: str,
) -> list[dict]:
  """Runs the tasks of a stage that are not done -> the results of all.

  Args:
    engine: who runs them.
    stage: where their files are.
    work: called with the context, the number of the task and a new folder for
      its files; returns its result, as JSON.
    context: what all tasks share, small.
    cells: for each task, how many cells it is about.
    label: for the progress.
  """
  top = os.path.join(stage.folder, stage.name)
  os.makedirs(top, exist_ok=True)
  for name in os.listdir(top):
    if '.part-' in name:  # of a killed build: the lock is ours
      _remove(os.path.join(top, name))
  left = [k for k in range(len(cells)) if not stage.is_done(k)]
  unit = 'cells'
  if not sum(cells):  # not about cells: the tasks are counted
    unit, cells = 'parts', [1] * len(cells)
  with progress.Progress(sum(cells), unit, label) as bar:
    ready = sum(cells) - sum(cells[k] for k in left)
    if ready:
      bar.skip(ready)
    if left:
      function = functools.partial(
        _run_task, stage, work, context, tuple(cells)
      )
      with _watched(stage, left, cells, bar, engine):
        engine.run(function, left, bar.update)
  return [stage.result(k) for k in range(len(cells))]


def _run_task(stage, work, context, cells, task: int) -> int:
  part = f'{stage.place(task)}.part-{os.getpid()}'
  shutil.rmtree(part, ignore_errors=True)
  os.makedirs(part)
  try:
    result = work(context, task, part)
    shutil.rmtree(stage.place(task), ignore_errors=True)
    os.rename(part, stage.place(task))
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
  paths.write_json(f'{stage.place(task)}.json', result)
  return cells[task]


@contextlib.contextmanager
def _watched(stage, left, cells, bar, engine) -> Iterator[None]:
  """Shows what an engine that does not tell has done, by its files."""
  if not isinstance(engine, engines.Beam):
    yield
    return
  ended = threading.Event()

  def look() -> None:
    waiting = set(left)
    while waiting:
      over = ended.wait(0.5)
      for task in [k for k in waiting if stage.is_done(k)]:
        waiting.discard(task)
        bar.update(cells[task])
      if over:
        return

  watcher = threading.Thread(target=look, daemon=True)
  watcher.start()
  try:
    yield
  finally:
    ended.set()
    watcher.join()
