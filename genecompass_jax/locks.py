"""One process at a time in a folder of this machine."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from genecompass_jax import errors


@contextlib.contextmanager
def held(path: str, busy: str, unlink: bool = True) -> Iterator[None]:
  """Holds the lock of a file, which is made, or refuses at once.

  The system gives a lock up with its process, however that ends. A file that
  was unlinked between opening and locking it is nobody's lock any more.

  Args:
    path: of the file, in a folder that exists.
    busy: what to say where another process holds it.
    unlink: whether to remove the file at the end.

  Raises:
    UserError: another process holds it.
  """
  with open(path, 'w', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      mine = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
      mine = False
    if not mine:
      raise errors.UserError(busy)
    try:
      yield
    finally:
      if unlink:
        with contextlib.suppress(FileNotFoundError):  # the folder may be gone
          os.unlink(path)
