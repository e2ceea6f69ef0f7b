"""Looks over an HDF5 file for damage that its library never returns from.

Texts of HDF5 lie in heaps, chains of objects. A free object of size zero, as
zeros over a part of a file make it, is one that libhdf5 steps on for ever
(seen with 2.0); it is looked for in the bytes before the library reads them.
"""

import os
import struct
from typing import BinaryIO

from genecompass_jax import errors

_NAME = b'GCOL'  # sought by itself: a needle that ends in zeros is slow
_MARK = _NAME + b'\x01\0\0\0'  # of a heap; its size follows
_HEAD = 16  # bytes, of a heap and of an object
_BLOCK = 16 << 20


def check(path: str) -> None:
  """Refuses a file with a heap that has no end.

  Raises:
    UserError: there is one.
  """
  size = os.path.getsize(path)
  with open(path, 'rb') as file:
    for at in _places(file):
      if not _ends(file, at, size):
        raise errors.UserError(
          f'{path}: a damaged HDF5 file (its texts at byte {at} have no end); '
          'copy it again'
        )


def _places(file: BinaryIO) -> list[int]:
  places, first, rest = [], 0, b''
  while block := file.read(_BLOCK):
    text = rest + block
    at = text.find(_NAME)
    while at >= 0:
      if text.startswith(_MARK, at):
        places.append(first - len(rest) + at)
      at = text.find(_NAME, at + 1)
    first += len(block)
    rest = text[1 - len(_MARK) :]
  return places


def _ends(file: BinaryIO, at: int, file_size: int) -> bool:
  """Whether the objects of a heap lead to its end, or to an error."""
  file.seek(at)
  head = file.read(_HEAD)
  if len(head) < _HEAD:
    return True
  (size,) = struct.unpack('<Q', head[8:])
  if at + size > file_size:
    return True  # the library says so
  heap = file.read(size - _HEAD) if size > _HEAD else b''
  place = 0
  while place + _HEAD <= len(heap):
    number, _, step = struct.unpack_from('<HH4xQ', heap, place)
    if number:
      step = _HEAD + -(-step // 8) * 8
    if not step:
      return False
    place += step
  return True
