"""The lines of a run as they come: what `watch` reads."""

import os
import time
from typing import Any

from genecompass_jax import errors, metrics, paths, workdir as workdir_lib

SECONDS_BETWEEN_DOWNLOADS = 15.0


class Tail:
  """The lines of one run; each call of `read` looks only at what is new.

  Attributes:
    total: steps of the whole run; None as long as config.json does not say.
    lines: all finished lines; none where nothing was written yet.
    problem: why a store does not answer; empty where all is well.
  """

  def __init__(self, folder: paths.PathLike):
    """The run in a workdir, local or a URL.

    Raises:
      UserError: no such folder, or a URL that nothing here reads.
    """
    self.folder = os.fspath(folder)
    self._path = paths.join(folder, metrics.FILE)
    self._is_remote = paths.is_url(folder)
    if not self._is_remote and not os.path.isdir(self.folder):
      raise errors.UserError(
        f'{self.folder}: no such folder; give the --workdir of a run'
      )
    self.lines: list[dict[str, Any]] = []
    self._file: tuple[int, int] | None = None  # device and inode
    self._offset = 0
    self._downloaded = -SECONDS_BETWEEN_DOWNLOADS
    self.total: int | None = None
    self.problem = ''

  def read(self, *, once: bool = False) -> None:
    """Looks for what is new.

    Args:
      once: a store that does not answer is an error; else it may come back.

    Raises:
      UserError: the folder is of another kind, or a store refuses.
      RetryableError: a store does not answer.
    """
    if self._is_remote:
      now = time.monotonic()
      if now - self._downloaded < SECONDS_BETWEEN_DOWNLOADS:
        return
      self._downloaded = now
    try:
      self._read()
      self.problem = ''
    except errors.RetryableError as error:
      if once:
        raise
      self.problem = errors.first_line(error)

  def _read(self) -> None:
    if self.total is None:
      self.total = _total_steps(self.folder)
    if not self._is_remote:
      self._read_new()
    elif paths.exists(self._path):
      self.lines = metrics.read(self.folder)

  def _read_new(self) -> None:
    try:
      file = open(self._path, 'rb')  # noqa: SIM115
    except FileNotFoundError:
      return
    with file:
      facts = os.fstat(file.fileno())
      identity = facts.st_dev, facts.st_ino
      if identity != self._file or facts.st_size < self._offset:
        # A resumed run cuts lines, in a new file.
        self._file, self._offset, self.lines = identity, 0, []
      file.seek(self._offset)
      data = file.read()
    data = data[: data.rfind(b'\n') + 1]
    self._offset += len(data)
    self.lines += metrics.parse(data)


def _total_steps(folder: str) -> int | None:
  try:
    run = (workdir_lib.read_config(folder) or {}).get('run', {})
  except errors.UserError:
    return None  # damaged, or of another version: the lines may be read yet
  return run.get('optimizer', {}).get('total_steps')
