"""Checkpoints where Orbax does not reach: local copies of their files.

Orbax (0.12) reads and writes local folders and gs://. For s3:// it writes to a
local folder, whose files are copied up when they are complete; for s3:// and
https:// it reads from a folder to which they are copied. The seal, which names
all files, is written last and read first, so nothing has to be listed or renamed.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent import futures

from genecompass_jax import errors, paths, scratch, stores

_AT_ONCE = 8  # files copied


def is_needed(folder: paths.PathLike) -> bool:
  """Whether Orbax can neither read nor write a folder itself."""
  return paths.is_url(folder) and stores.scheme(os.fspath(folder)) != 'gs'


def new_folder() -> str:
  """A local folder for a checkpoint on its way, of its size: `scratch`."""
  return scratch.new_folder('checkpoint')


def upload(local: str, folder: paths.PathLike) -> None:
  """Copies all files of a local folder up, and looks whether they are there.

  Raises:
    UserError: as `stores.faults`.
    RetryableError: likewise, or the store has not kept what it took.
  """

  def copy(name: str) -> None:
    paths.upload(os.path.join(local, name), paths.join(folder, name))

  names = paths.files_below(local)
  _at_once(copy, names)
  listed = paths.sizes_below(folder) or {}
  for name in names:
    size = os.path.getsize(os.path.join(local, name))
    if listed.get(name) != size and _size(folder, name) != size:
      raise errors.RetryableError(
        f'{paths.join(folder, name)}: the store took it and does not have it'
      )


def _size(folder: paths.PathLike, name: str) -> int | None:
  """Bytes of a file that a listing did not show; it may have been late."""
  try:
    return paths.size(paths.join(folder, name))
  except FileNotFoundError:
    return None


@contextlib.contextmanager
def downloaded(folder: paths.PathLike, names: Iterable[str]) -> Iterator[str]:
  """A local copy of some files of a folder, for as long as the context.

  Args:
    folder: a URL.
    names: of files, relative to it, such as a seal names.
  """
  local = new_folder()

  def copy(name: str) -> None:
    place = os.path.join(local, name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    paths.download(paths.join(folder, name), place)

  try:
    _at_once(copy, names)
    yield local
  finally:
    scratch.remove(local)


def _at_once(copy, names: Iterable[str]) -> None:
  with futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    for _ in pool.map(copy, names):
      pass
