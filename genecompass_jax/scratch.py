"""Local folders for what is on its way, which do not outlive their process long.

A process that is killed removes nothing. Beside each folder is a file that its
process holds locked, and the system gives a lock up with its process: the next
one on this host that makes a folder removes those whose owner is gone. What
other hosts have made in a folder that they share stays: locks may not reach
across hosts.
"""

import atexit
import contextlib
import glob
import os
import shutil
import socket
import tempfile
from typing import IO

from genecompass_jax import locks

_PREFIX = 'genecompass-'
_LOCK = '.lock'
_held: dict[str, IO[str]] = {}


def new_folder(kind: str) -> str:
  """A new folder in $TMPDIR, to be given back by `remove`.

  Where its file system has no locks, nobody else ever removes it.

  Args:
    kind: a word for its name, without a hyphen.
  """
  remove_abandoned()
  while True:
    folder = tempfile.mkdtemp(prefix=f'{_PREFIX}{socket.gethostname()}-{kind}-')
    # Closed by `remove`, or with the process.
    file = open(f'{folder}{_LOCK}', 'w', encoding='utf-8')  # noqa: SIM115
    try:
      is_mine = locks.take(file)
    except OSError:
      os.unlink(file.name)
      is_mine = True
    if is_mine:
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
    # Of HOST-KIND-RANDOM the host alone may have hyphens.
    name = os.path.basename(lock).removeprefix(_PREFIX)
    if name.rsplit('-', 2)[0] != socket.gethostname():
      continue
    try:
      with open(lock, encoding='utf-8') as file:
        if locks.take(file):
          shutil.rmtree(lock.removesuffix(_LOCK), ignore_errors=True)
          os.unlink(lock)
    except OSError:
      continue  # no locks here, another user's, or another was faster
