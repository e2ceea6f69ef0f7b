"""Finished cells of an interrupted command, beside the output it would make.

OUTPUT.unfinished/ holds

  settings.json   what the numbers depend on: cells, checkpoint, options
  cells.bin       one record a cell, in the order of the cells
  lock            held by the process that works there

A record ends with a checksum of the rest. A cell is finished if its checksum
is right, so that a process may be killed while it writes, or the power go: what
was half written is worked out again. Records are written to their place and
read in pieces; the file is never in memory.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from genecompass_jax import errors, locks, paths

SUFFIX = '.unfinished'
_SETTINGS = 'settings.json'
_CELLS = 'cells.bin'
_LOCK = 'lock'
_CRC = 'crc'
_PIECE = 4096  # records read at a time
_SEED = 1  # of the checksum: that of zeros, a hole in the file, is not 0


class Records:
  """Records of finished cells in a file.

  Attributes:
    num_cells: that the file has room for.
    dtype: of a record, without its checksum.
    is_new: whether there was none before.
  """

  def __init__(self, path: str, num_cells: int, dtype: np.dtype):
    """Opens the file, or makes it."""
    self.num_cells, self.dtype = num_cells, dtype
    self._stored = np.dtype(
      [(name, dtype[name]) for name in dtype.names] + [(_CRC, '<u4')]
    )
    self.is_new = not os.path.exists(path)
    self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

  def close(self) -> None:
    """Closes the file."""
    os.close(self._file)

  def write(self, index_B: np.ndarray, records_B: np.ndarray) -> None:
    """Writes the records of some cells.

    Args:
      index_B: numbers of the cells.
      records_B: of `dtype`.
    """
    stored_B = np.zeros(len(records_B), self._stored)
    for name in self.dtype.names:
      stored_B[name] = records_B[name]
    size = self._stored.itemsize
    bytes_BN = stored_B.view(np.uint8).reshape(-1, size)
    for cell, row_N in zip(index_B.tolist(), bytes_BN):
      data = row_N[:-4].tobytes()
      data += np.uint32(zlib.crc32(data, _SEED)).tobytes()
      if os.pwrite(self._file, data, cell * size) != size:
        raise OSError('the disk took part of a record')  # the next says why

  def read(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of a range of cells, and which of them are finished."""
    size = self._stored.itemsize
    stop = min(stop, self.num_cells)
    data = os.pread(self._file, (stop - first) * size, first * size)
    data += bytes((stop - first) * size - len(data))
    stored_B = np.frombuffer(data, self._stored)
    sums = [
      zlib.crc32(data[at : at + size - 4], _SEED)
      for at in range(0, len(data), size)
    ]
    records_B = np.zeros(len(stored_B), self.dtype)
    for name in self.dtype.names:
      records_B[name] = stored_B[name]
    return records_B, stored_B[_CRC] == np.array(sums, np.uint32)

  def pieces(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """All records: number of the first cell, records, which are finished."""
    for first in range(0, self.num_cells, _PIECE):
      yield first, *self.read(first, first + _PIECE)


@contextlib.contextmanager
def records(
  target: str,
  settings: Mapping[str, Any],
  num_cells: int,
  dtype: np.dtype,
  *,
  anew: bool = False,
) -> Iterator[Records]:
  """The finished cells of a command that writes `target`.

  They are removed when the context is left, after success and after a mistake
  of the user's, which the same command would meet again. After any other end
  (Ctrl-C, a signal, a full disk) they stay.

  Args:
    target: the file that the command makes.
    settings: what the records depend on, as JSON holds it.
    num_cells: of the whole.
    dtype: of a record.
    anew: throw away finished cells of other settings.

  Raises:
    UserError: there are cells of other settings, or another process is at work.
  """
  folder = f'{target}{SUFFIX}'
  os.makedirs(folder, exist_ok=True)
  busy = f'{folder}: another process makes {target}; wait for it'
  with locks.held(os.path.join(folder, _LOCK), busy, unlink=False):
    _check_settings(folder, target, json.loads(json.dumps(settings)), anew)
    found = Records(os.path.join(folder, _CELLS), num_cells, dtype)
    try:
      yield found
    except errors.UserError:
      shutil.rmtree(folder)
      raise
    finally:
      found.close()
    shutil.rmtree(folder)


def size(target: str) -> int:
  """Bytes on the disk that finished cells of `target` take."""
  path = os.path.join(f'{target}{SUFFIX}', _CELLS)
  return os.stat(path).st_blocks * 512 if os.path.exists(path) else 0


def staging(target: str) -> str:
  """Where the output grows before it gets its name."""
  return os.path.join(f'{target}{SUFFIX}', 'output')


def _check_settings(
  folder: str, target: str, settings: dict[str, Any], anew: bool
) -> None:
  path, cells = (os.path.join(folder, name) for name in (_SETTINGS, _CELLS))
  if os.path.exists(path):
    try:
      before = paths.read_json(path)
    except (OSError, ValueError):
      before = {}
    if not isinstance(before, dict):
      before = {}
    if before == settings:
      return
    changed = [
      f'{name} was {_short(before.get(name))}, now {_short(settings.get(name))}'
      for name in {**before, **settings}
      if before.get(name) != settings.get(name)
    ]
    if not anew:
      raise errors.UserError(
        f'{folder} holds finished cells of another command '
        f'({"; ".join(changed[:3])}): give what was given before, '
        '--overwrite to begin anew, or another name with -o'
      )
  if os.path.exists(cells):
    os.unlink(cells)
  paths.write_json(path, settings)


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return f'{text[:12]}...' if len(text) > 40 else text or "''"
