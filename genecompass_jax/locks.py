"""One process at a time in a folder: by locks here, by leases in stores."""

import contextlib
import fcntl
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from genecompass_jax import errors, paths


def take(file: IO[str], shared: bool = False) -> bool:
  """Locks an open file until it is closed; whether that came about.

  Not where another process has it, or where it was unlinked between opening
  and locking it: it is nobody's lock any more.

  Args:
    file: open for writing.
    shared: beside others that share it, rather than alone.

  Raises:
    OSError: the file system has no locks.
  """
  kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return _is_there(file)


def _is_there(file: IO[str]) -> bool:
  """Whether an open file still has its name."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def held(
  path: str, busy: str, unlink: bool = True, shared: bool = False
) -> Iterator[None]:
  """Holds the lock of a file, which is made, or refuses at once.

  The system gives a lock up with its process, however that ends.

  Args:
    path: of the file, in a folder that exists.
    busy: what to say where another process holds it.
    unlink: whether to remove the file at the end, where nobody shares it.
    shared: beside others that share it, rather than alone.

  Raises:
    UserError: another process holds it.
  """
  with open(path, 'w', encoding='utf-8') as file:
    if not take(file, shared):
      raise errors.UserError(busy)
    try:
      yield
    finally:
      if unlink and (not shared or take(file)):
        with contextlib.suppress(FileNotFoundError):  # the folder may be gone
          os.unlink(path)


@contextlib.contextmanager
def waited(path: str, said: str) -> Iterator[None]:
  """Holds the lock of a file, which is made, once no other process does.

  Args:
    path: of the file, in a folder that exists.
    said: what to say, once, where another process holds it.
  """
  is_said = False
  while True:
    with open(path, 'w', encoding='utf-8') as file:
      if not take(file):
        if not is_said:
          logging.warning('%s', said)
          is_said = True
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _is_there(file):  # its holder has removed it: once more
          continue
      try:
        yield
      finally:
        with contextlib.suppress(FileNotFoundError):
          os.unlink(path)
      return


class Lease:
  """That a process is the one in a folder of a store.

  Attributes:
    lost_to: who has taken it over, once that is known.
  """

  def __init__(
    self,
    path: str,
    busy: str,
    name: str,
    before: dict[str, Any] | None,
    seconds: float,
  ):
    """One that was written just now; `leased` says what all this is."""
    self._path, self._busy, self._name = path, busy, name
    self._before, self._seconds = before, seconds
    self._renewed = time.monotonic()
    self.lost_to: str | None = None

  def check(self, now: bool = False) -> None:
    """Raises UserError where another process has taken it over.

    Args:
      now: whether to look at the file, before something that would harm the
        other; else it is known as late as the lease is renewed.
    """
    if now:
      self._look()
    if self.lost_to is not None:
      raise errors.UserError(
        f'{self._busy} ({self.lost_to} took it over while this one did not '
        f'write {self._path})'
      )

  def renew(self, number: int) -> None:
    """Writes it anew, unless it is lost."""
    begun = time.monotonic()
    self._look()
    if self.lost_to is None:
      _write(self._path, self._name, number)
      self._renewed = begun

  def _look(self) -> None:
    """Finds out whether it is lost."""
    if self.lost_to is not None:
      return
    found = _read(self._path)
    if found is None:
      # Removed by hand, or by one that took it over and has ended since.
      if time.monotonic() - self._renewed <= self._seconds:
        return
      owner = 'another one, which has ended,'
    else:
      owner = found.get('owner', 'unknown')
      if owner == self._name or found == self._before:
        return
    logging.error('%s: %s trains here as well; stop one', self._path, owner)
    self.lost_to = owner


@contextlib.contextmanager
def leased(path: str, busy: str, seconds: float = 60.0) -> Iterator[Lease]:
  """Holds a lease: what there is where a store has no locks.

  The holder writes the file anew every quarter of the time. One that finds a
  file waits as long as a lease lasts: if the file is still being written, it
  refuses; if not, its holder is dead and the lease is taken over. No clocks are
  compared. Two that come within the same moments may both believe that they
  hold it, if the store shows what they wrote late: a lease keeps mistakes away,
  it proves nothing. A holder that finds another's name in it, or no lease after
  it has not renewed its own for so long, because it hung or the store was away
  from it, has lost it: it asks by `Lease.check`, and ends.

  Args:
    path: of the file, local or a URL.
    busy: what to say where another process holds it.
    seconds: that a lease lasts without being written anew.

  Raises:
    UserError: another process holds it.
  """
  name = f'{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}'
  before = _read(path)
  if before is not None:
    logging.warning(
      '%s: another process has trained here; looking whether it still does, '
      'for %g s', *(path, seconds)
    )  # fmt: skip
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
      time.sleep(min(seconds / 20, 1.0))
      now = _read(path)
      if now is None:
        break
      if now != before:
        raise errors.UserError(f'{busy} ({now.get("owner", "unknown")})')
  _write(path, name, 0)
  deadline = time.monotonic() + seconds / 4
  while True:
    time.sleep(min(seconds / 60, 1.0))
    found = _read(path)
    # A store may show for a while what was there before.
    if found not in (None, before) or time.monotonic() > deadline:
      break
  owner = (found or {}).get('owner', 'unknown')
  if owner != name:
    raise errors.UserError(f'{busy} ({owner})')
  lease = Lease(path, busy, name, before, seconds)
  ends = threading.Event()

  def renew() -> None:
    for number in itertools.count(1):
      if ends.wait(seconds / 4) or lease.lost_to is not None:
        return
      try:
        lease.renew(number)
      except (OSError, ValueError, RuntimeError) as error:
        logging.warning('%s cannot be written: %s', path, error)

  thread = threading.Thread(target=renew, daemon=True, name='genecompass-lease')
  thread.start()
  try:
    yield lease
  finally:
    ends.set()
    thread.join()
    with contextlib.suppress(OSError, RuntimeError, ValueError):
      if (_read(path) or {}).get('owner') == name:
        paths.remove(path)


def _read(path: str) -> dict[str, Any] | None:
  """A lease; None where there is none."""
  try:
    found = (
      paths.parse_json(paths.read_text(path)) if paths.exists(path) else {}
    )
  except (FileNotFoundError, ValueError):  # gone, or half written: somebody's
    return {'owner': 'unknown'} if paths.exists(path) else None
  return found if isinstance(found, dict) and found else None


def _write(path: str, owner: str, number: int) -> None:
  lease = {'owner': owner, 'renewed': number, 'time': round(time.time())}
  paths.write_json(path, lease)
