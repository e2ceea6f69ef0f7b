"""PyTorch's files of tensors, without PyTorch: `torch.save` of a state dict.

Since PyTorch 1.6 such a file is a zip:

  NAME/data.pkl     a pickle: names, and for each tensor its storage, offset,
                    shape and strides
  NAME/data/KEY     the bytes of a storage, which tensors may share
  NAME/byteorder    'little' or 'big' (since 2.1)

The pickle is read by `pickled`, which imports and calls nothing. Every member
has a checksum in the zip, so a flipped bit is found.
"""

import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Callable, Mapping
from typing import IO

import ml_dtypes
import numpy as np

from genecompass_jax import errors, pickled

# What `torch.save` wrote before 1.6: a pickle of this number comes first.
LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
ADVICE = (
  'only tensors under their names are read; in PyTorch, save '
  'model.state_dict(), or write it as safetensors'
)
_ENDING = '/data.pkl'
_MAX_PICKLE = 1 << 24  # bytes; that of the release has some 50,000
_MAX_AXES = 8
_MAX_NESTING = 8  # of dicts, such as {'model': state dict}
# Tensors may share storages, and members be compressed: what a file stands for
# may be this many times its size, or `_SMALL` bytes.
_EXPANSION = 64
_SMALL = 1 << 30

_DTYPES = {
  'Float': np.dtype('<f4'),
  'Double': np.dtype('<f8'),
  'Half': np.dtype('<f2'),
  'BFloat16': np.dtype(ml_dtypes.bfloat16),
  'Long': np.dtype('<i8'),
  'Int': np.dtype('<i4'),
  'Short': np.dtype('<i2'),
  'Char': np.dtype('i1'),
  'Byte': np.dtype('u1'),
  'Bool': np.dtype('?'),
}


@dataclasses.dataclass(frozen=True)
class _Storage:
  """Numbers that lie in a member of the zip, to be read when they are used."""

  key: str
  dtype: np.dtype
  size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A view of a storage, in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Bytes of a copy."""
    return math.prod(self.shape) * self.storage.dtype.itemsize


def is_torch(names: list[str]) -> bool:
  """Whether a zip of these members is a file of PyTorch."""
  return any(name.endswith(_ENDING) for name in names)


def read(
  file: IO[bytes], is_wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
  """Tensors by name; nested dicts are joined by dots.

  bfloat16 becomes float32, which holds it exactly.

  Args:
    file: open, and can be searched.
    is_wanted: names to read; storages of others are not touched.

  Raises:
    UserError: no state dict, or one that contradicts itself.
    Exception: whatever `zipfile` stumbles over in a damaged file.
  """
  size = file.seek(0, 2)
  with zipfile.ZipFile(file) as archive:
    members = archive.namelist()
    if len(set(members)) != len(members):
      raise errors.UserError('two members of the zip have one name')
    pickles = [n for n in members if n.endswith(_ENDING) and n.count('/') == 1]
    if len(pickles) != 1:
      raise errors.UserError(f'{len(pickles)} pickles of names, one is needed')
    root = pickles[0].removesuffix(_ENDING)
    if f'{root}/constants.pkl' in members:
      raise errors.UserError(f'a TorchScript program; {ADVICE}')
    with contextlib.suppress(KeyError):
      order = archive.read(f'{root}/byteorder')
      if order != b'little':
        raise errors.UserError(
          f'its numbers are {order[:16]!r}-endian; save it on a machine that is '
          'little-endian'
        )
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE:
      raise errors.UserError('its pickle is too large for names of tensors')
    state = pickled.loads(archive.read(pickles[0]), _DIALECT)
    wanted = {k: v for k, v in _flat(state).items() if is_wanted(k)}
    tensors = [v for v in wanted.values() if isinstance(v, _Tensor)]
    used = {t.storage for t in tensors}
    needed = sum(t.nbytes for t in tensors)
    needed += sum(s.size * s.dtype.itemsize for s in used)
    if needed > max(_EXPANSION * size, _SMALL):
      raise errors.UserError(
        f'its tensors stand for {needed:,} bytes, the file has {size:,}'
      )
    storages = {s: _content(archive, root, s) for s in used}
  return {
    name: _array(value, storages) if isinstance(value, _Tensor) else value
    for name, value in wanted.items()
  }


def _flat(state: object) -> dict[str, object]:
  """Names and tensors of a dict, and of dicts in it."""
  if not isinstance(state, dict):
    raise errors.UserError(f'it holds a {type(state).__name__}; {ADVICE}')
  found: dict[str, object] = {}

  def add(inner: dict, prefix: str, depth: int) -> None:
    for key, value in inner.items():
      name = f'{prefix}{key}'
      if isinstance(value, dict) and depth < _MAX_NESTING:
        add(value, f'{name}.', depth + 1)
        continue
      if name in found:
        raise errors.UserError(f'{ascii(name)} stands there twice')
      is_plain = isinstance(value, str | int | float | np.ndarray)
      # What is no tensor is not used: a word in its place names it.
      found[name] = (
        value
        if isinstance(value, _Tensor)
        else np.asarray(value if is_plain else type(value).__name__)
      )

  add(state, '', 0)
  return found


def _content(
  archive: zipfile.ZipFile, root: str, storage: _Storage
) -> np.ndarray:
  """All numbers of a storage [N]."""
  name = f'{root}/data/{storage.key}'
  needed = storage.size * storage.dtype.itemsize
  try:
    held = archive.getinfo(name).file_size
  except KeyError:
    raise errors.UserError(
      f'the numbers of storage {ascii(storage.key)} are missing'
    ) from None
  if held != needed:
    raise errors.UserError(
      f'storage {ascii(storage.key)} has {held:,} bytes, its tensors need '
      f'{needed:,}'
    )
  data = archive.read(name)
  if len(data) != needed:
    raise errors.UserError(f'storage {ascii(storage.key)} is cut off')
  if storage.dtype == bool:
    return np.frombuffer(data, np.uint8) != 0
  return np.frombuffer(data, storage.dtype)


def _array(
  tensor: _Tensor, storages: Mapping[_Storage, np.ndarray]
) -> np.ndarray:
  """The numbers of a tensor; a view where its storage is read anyway."""
  flat = storages[tensor.storage][tensor.offset :]
  strides = [
    by * flat.itemsize if n > 1 else 0  # what is not walked may be anything
    for n, by in zip(tensor.shape, tensor.strides)
  ]
  view = np.lib.stride_tricks.as_strided(
    flat, tensor.shape, strides, writeable=False
  )
  is_bfloat16 = tensor.storage.dtype == ml_dtypes.bfloat16
  return view.astype(np.float32) if is_bfloat16 else view


def _is_count(value: object) -> bool:
  return type(value) is int and value >= 0


def _tensor(
  storage: object, offset: object, shape: object, strides: object, *rest: object
) -> _Tensor:
  """What `torch._utils._rebuild_tensor_v2` is told."""
  del rest  # whether it is trained, and hooks
  if not isinstance(storage, _Storage):
    raise TypeError('a tensor without a storage')
  for numbers in (shape, strides):
    if type(numbers) is not tuple or not all(map(_is_count, numbers)):
      raise TypeError(f'a tensor of shape {shape!r} and strides {strides!r}')
  if len(shape) != len(strides) or len(shape) > _MAX_AXES:
    raise TypeError(f'a tensor of shape {shape!r} and strides {strides!r}')
  if not _is_count(offset):
    raise TypeError(f'a tensor that begins at {offset!r}')
  last = offset + sum((n - 1) * by for n, by in zip(shape, strides))
  outside = offset > storage.size if 0 in shape else last >= storage.size
  if outside:
    raise errors.UserError(
      f'a tensor reaches beyond its storage {ascii(storage.key)} of '
      f'{storage.size:,} numbers'
    )
  return _Tensor(storage, offset, shape, strides)


def _parameter(data: object, *rest: object) -> _Tensor:
  """What `torch._utils._rebuild_parameter` is told."""
  del rest
  if not isinstance(data, _Tensor):
    raise TypeError('a parameter without a tensor')
  return data


def _ordered_dict() -> dict:
  return {}


def _size(numbers: object) -> tuple:
  if type(numbers) is not tuple:
    raise TypeError('a size of no numbers')
  return numbers


def _persistent(name: object) -> _Storage:
  """A storage of a persistent id ('storage', type, key, place, size)."""
  if type(name) is not tuple or len(name) != 5 or name[0] != 'storage':
    raise TypeError('a persistent id that names no storage')
  _, dtype, key, _, size = name
  if not isinstance(dtype, np.dtype) or not _is_count(size):
    raise TypeError('a storage of unknown type or size')
  if not isinstance(key, str):
    raise TypeError('a storage without a name')
  return _Storage(key, dtype, size)


_DIALECT = pickled.Dialect(
  names={
    **{f'torch {name}Storage': dtype for name, dtype in _DTYPES.items()},
    'torch._utils _rebuild_tensor_v2': _tensor,
    'torch._utils _rebuild_parameter': _parameter,
    'collections OrderedDict': _ordered_dict,
    'torch Size': _size,
  },
  persistent=_persistent,
  advice=ADVICE,
)
