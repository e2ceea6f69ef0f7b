"""metrics.jsonl: one JSON object a line, every step once."""

import json
import os
import tempfile
from typing import Any

from genecompass_jax import paths

FILE = 'metrics.jsonl'


class MetricsFile:
  """Appends lines to a metrics file.

  For a workdir behind a URL the file is written locally and copied up whole
  at each flush, because object stores cannot append.
  """

  def __init__(self, workdir: paths.PathLike):
    """Opens WORKDIR/metrics.jsonl for appending."""
    self._target = paths.join(workdir, FILE)
    self._local = self._target
    if '://' in self._target:
      self._local = os.path.join(tempfile.mkdtemp(), FILE)
      if paths.exists(self._target):
        paths.write_bytes(self._local, paths.read_bytes(self._target))
    os.makedirs(os.path.dirname(os.path.abspath(self._local)), exist_ok=True)
    self._file = open(self._local, 'a', encoding='utf-8')  # noqa: SIM115

  def write(self, **values: Any) -> None:
    """Appends one line; numbers keep their full precision."""
    self._file.write(json.dumps(values) + '\n')

  def flush(self) -> None:
    """Makes all lines durable, and copies them up where they live remotely."""
    self._file.flush()
    os.fsync(self._file.fileno())
    if self._local != self._target:
      paths.write_bytes(self._target, paths.read_bytes(self._local))

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    self._file.close()


def cut_after(workdir: paths.PathLike, step: int) -> None:
  """Removes lines of later steps, and a line that was never finished.

  A resumed run writes those steps again; events stay, they tell what happened.
  """
  path = paths.join(workdir, FILE)
  if not paths.exists(path):
    return
  kept = [
    json.dumps(values) + '\n'
    for values in read(workdir)
    if 'event' in values or values.get('step', 0) <= step
  ]
  paths.write_text(path, ''.join(kept))


def read(workdir: paths.PathLike) -> list[dict[str, Any]]:
  """All finished lines of a workdir's metrics, in order."""
  text = paths.read_bytes(paths.join(workdir, FILE)).decode('utf-8', 'replace')
  found = []
  for line in text.splitlines():
    try:
      values = paths.parse_json(line)
    except ValueError:
      continue  # damaged, or what a running or killed process is writing
    if isinstance(values, dict):
      found.append(values)
  return found
