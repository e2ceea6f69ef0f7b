"""Looks over an HDF5 file for damage that its library does not survive.

Texts of HDF5 lie in heaps, chains of objects. A free object of size zero, as
zeros over a part of a file make it, is one that libhdf5 steps on for ever
(seen with 2.0); it is looked for in the bytes before the library reads them. And a text whose
type says that it is something else of variable length than text or sequence is
one that libhdf5 (2.0) dies of when its value is read.
"""

import os
import struct
from typing import Any, BinaryIO

import h5py

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


def check_types(file: h5py.File, part: str) -> None:
  """Refuses a part with texts or sequences of a kind that there is not.

  Args:
    file: open.
    part: group or array; all that is in it is looked at, values are not read.

  Raises:
    UserError: there is one.
  """
  if part not in file:
    return
  found = file[part]
  types = [(a, h5py.h5a.open(found.id, a.encode())) for a in found.attrs]
  if isinstance(found, h5py.Dataset):
    types.append((part, found.id))
  for name, place in types:
    if not _is_known(place.get_type()):
      raise errors.UserError(
        f'{name} of {part} is of a type that there is not: the file is damaged'
      )
  if isinstance(found, h5py.Group):
    for name in found:
      check_types(file, f'{part}/{name}')


def _is_known(kind: Any) -> bool:
  """Whether what has variable length is a sequence (0) or a text (1).

  The kind is the low half of the byte behind class and version of the encoded
  type (HDF5 File Format Specification, IV.A.2.d), which two bytes precede.
  """
  if kind.get_class() != h5py.h5t.VLEN:
    return True  # texts come as another class, their kind being 1
  return kind.encode()[3] & 0x0F < 2


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
