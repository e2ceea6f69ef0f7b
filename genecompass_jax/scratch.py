"""Local folders for what is on its way, which do not outlive their process long.

A process that is killed removes nothing. Beside each folder is a file that its
process holds locked, and the system gives a lock up with its process: the next
one that makes a folder removes those whose owner is gone.
"""

import atexit
import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from typing import IO

_PREFIX = 'genecompass-'
_LOCK = '.lock'
_held: dict[str, IO[str]] = {}


def new_folder(kind: str) -> str:
  """A new folder in $TMPDIR, to be given back by `remove`.

  Args:
    kind: a word for its name.
  """
  remove_abandoned()
  while True:
    folder = tempfile.mkdtemp(prefix=f'{_PREFIX}{kind}-')
    # Closed by `remove`, or with the process.
    file = open(f'{folder}{_LOCK}', 'w', encoding='utf-8')  # noqa: SIM115
    if _lock(file):
      _held[folder] = file
      return folder
    file.close()  # taken for abandoned before it was locked: once more
    shutil.rmtree(folder, ignore_errors=True)


def remove(folder: str) -> None:
  """Removes a folder and all in it."""
  shutil.rmtree(folder, ignore_errors=True)
  with contextlib.suppress(OSError):
    os.unlink(f'{folder}{_LOCK}')
  file = _held.pop(folder, None)
  if file is not None:
    file.close()


@atexit.register
def _remove_held() -> None:
  """After an error; a process that is killed does not come here."""
  for folder in list(_held):
    remove(folder)


def remove_abandoned() -> None:
  """Removes the folders of processes that were killed; those of others stay."""
  place = os.path.join(glob.escape(tempfile.gettempdir()), f'{_PREFIX}*{_LOCK}')
  for lock in glob.glob(place):
    try:
      with open(lock, encoding='utf-8') as file:
        if _lock(file):
          shutil.rmtree(lock.removesuffix(_LOCK), ignore_errors=True)
          os.unlink(lock)
    except OSError:
      continue  # another user's, or another process was faster


def _lock(file: IO[str]) -> bool:
  """Locks a file; False where another has it, or it was removed meanwhile."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
  except (BlockingIOError, FileNotFoundError):
    return False
