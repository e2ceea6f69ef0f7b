"""metrics.jsonl: one JSON object a line, every step once."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from genecompass_jax import (
  errors,
  goodput,
  paths,
  scratch,
  uploads,
)

FILE = 'metrics.jsonl'
_LAST_WAIT = 30.0  # seconds to copy the last lines up for, at the end
# Fields of a training line that a clock or a machine has measured. All others
# are the same, bit for bit, when a run is done again or goes on after a kill.
MEASURED = (
  *('time', 'cells_per_s', 'real_tokens_per_s', 'padded_tokens_per_s'),
  *('model_flops_utilisation', 'real_model_flops_utilisation'),
  *('data_wait_share', 'memory_peak_bytes', 'compiles', 'compile_s'),
)


class Follower(Protocol):
  """Something that is told the lines as they are written (`writers.py`)."""

  def write(self, line: Mapping[str, Any]) -> None:
    """Takes a line."""

  def flush(self) -> None:
    """Makes what was taken durable."""

  def close(self) -> None:
    """Ends."""


class MetricsFile:
  """Appends lines to a metrics file.

  For a workdir behind a URL the file is written locally and copied up whole
  in the background, because object stores cannot append.
  """

  def __init__(
    self, workdir: paths.PathLike, followers: Sequence[Follower] = ()
  ):
    """Opens WORKDIR/metrics.jsonl for appending; followers are told too."""
    self._followers = followers
    self._target = paths.join(workdir, FILE)
    self._local = self._target
    self._upload: uploads.Upload | None = None
    if paths.is_url(self._target):
      self._local = os.path.join(scratch.new_folder('metrics'), FILE)
      if paths.exists(self._target):
        paths.write_bytes(self._local, _whole(self._target))
    os.makedirs(os.path.dirname(os.path.abspath(self._local)), exist_ok=True)
    self._file = open(self._local, 'a', encoding='utf-8')  # noqa: SIM115
    if self._local != self._target:
      self._upload = uploads.Upload(self._local, self._target)

  def write(self, **values: Any) -> None:
    """Appends one line; numbers keep their full precision.

    `time`, Unix seconds, is added.
    """
    values = {**values, 'time': round(time.time(), 3)}
    self._file.write(json.dumps(values) + '\n')
    for follower in self._followers:
      follower.write(values)

  def flush(self) -> None:
    """Makes all lines durable; those that live remotely are copied up soon."""
    self._file.flush()
    os.fsync(self._file.fileno())
    if self._upload is not None:
      self._upload.ask()
    for follower in self._followers:
      follower.flush()

  def sync(self, patience: float | None = None) -> None:
    """Flushes, and waits until lines that live remotely are there.

    Raises:
      RetryableError: the store did not take them for `patience` seconds, by
        default those of `uploads`.
    """
    self.flush()
    if self._upload is not None:
      self._upload.wait(patience)

  def close(self) -> None:
    """Flushes and closes; raises as `sync`, which has more patience."""
    try:
      self.sync(_LAST_WAIT)
    finally:
      self.abandon()

  def abandon(self) -> None:
    """Closes; what is not on its way to a store yet does not come there."""
    self._file.close()
    if self._upload is not None:
      self._upload.close()
      scratch.remove(os.path.dirname(self._local))
    for follower in self._followers:
      follower.close()


def cut_after(workdir: paths.PathLike, step: int) -> list[dict[str, Any]]:
  """Removes lines of later steps, and a line that was never finished.

  A resumed run writes those steps again; events stay, they tell what happened.

  Returns:
    The lines that are left.
  """
  path = paths.join(workdir, FILE)
  if not paths.exists(path):
    return []
  kept = [
    values
    for values in parse(_whole(path))
    if 'event' in values or values.get('step', 0) <= step
  ]
  paths.write_text(path, ''.join(json.dumps(line) + '\n' for line in kept))
  return kept


def _whole(path: str) -> bytes:
  """A file that is going to be written anew: no line of it may be missing.

  Raises:
    RetryableError: a part of it came.
  """
  data = paths.read_bytes(path)
  if paths.is_url(path) and len(data) != paths.size(path):
    raise errors.RetryableError(
      f'{path}: {len(data)} of {paths.size(path)} bytes came; start the same '
      'command again'
    )
  return data


def read(workdir: paths.PathLike) -> list[dict[str, Any]]:
  """All finished lines of a workdir's metrics, in order."""
  return parse(paths.read_bytes(paths.join(workdir, FILE)))


def parse(data: bytes) -> list[dict[str, Any]]:
  """The lines of a part of a file.

  What is damaged, unfinished, or written by something else is left out, so
  that whoever reads them finds steps, times and numbers where they belong.
  """
  found = []
  for line in data.decode('utf-8', 'replace').splitlines():
    try:
      values = paths.parse_json(line)
    except ValueError:
      continue  # damaged, or what a running or killed process is writing
    if isinstance(values, dict) and _is_ours(values):
      found.append(values)
  return found


_COUNTS = ('step', 'last_step')
_TIMES = ('time', 'began', 'last_time', 'compile_s')
_LARGEST = 2**63  # what is larger was never counted, and is no float either


def _is_ours(line: Mapping[str, Any]) -> bool:
  """Whether the values of a line are of the kinds that a run writes."""
  if not all(
    type(line[key]) is int and 0 <= line[key] < _LARGEST
    for key in _COUNTS
    if key in line
  ):
    return False
  if not all(_is_finite(line[key]) for key in _TIMES if key in line):
    return False
  if 'event' in line:
    if line['event'] != goodput.EVENT:
      return isinstance(line['event'], str)
    seconds = line.get('seconds')
    return isinstance(seconds, dict) and all(map(_is_finite, seconds.values()))
  groups = line.get('by', {})
  return (
    'step' in line
    and isinstance(groups, dict)
    and all(isinstance(group, dict) for group in groups.values())
    and all(
      _is_number(value)
      for values in (line, *groups.values())
      for key, value in values.items()
      if key != 'by'
    )
  )


def _is_number(value: Any) -> bool:
  """A number or a truth; losses need not be finite."""
  return isinstance(value, float) or (
    isinstance(value, int) and abs(value) < _LARGEST
  )


def _is_finite(value: Any) -> bool:
  return _is_number(value) and math.isfinite(value) and abs(value) < _LARGEST


def strongest_null(
  line: Mapping[str, Any], prefix: str
) -> tuple[str, float] | None:
  """Name and loss of the strongest null of a line: what a model has to beat.

  Args:
    line: an evaluation.
    prefix: 'null_id_' or 'null_value_'.
  """
  found = {k: v for k, v in line.items() if k.startswith(prefix)}
  if not found:
    return None
  name = min(found, key=found.__getitem__)
  return name.removeprefix(prefix).replace('_', ' '), found[name]
