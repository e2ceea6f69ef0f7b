"""Writes files as `torch.save` does, byte by byte, without PyTorch.

The layout was read off PyTorch's documentation and serialisation code: a zip
whose data.pkl is a pickle of protocol 2. Every fault a test wants is an argument.
"""

import struct
import zipfile

import ml_dtypes
import numpy as np

KINDS = {
  np.dtype(np.float32): 'Float',
  np.dtype(np.float64): 'Double',
  np.dtype(np.float16): 'Half',
  np.dtype(ml_dtypes.bfloat16): 'BFloat16',
  np.dtype(np.int64): 'Long',
  np.dtype(np.int32): 'Int',
  np.dtype(np.int16): 'Short',
  np.dtype(np.int8): 'Char',
  np.dtype(np.uint8): 'Byte',
  np.dtype(bool): 'Bool',
}
EMPTY = b'ccollections\nOrderedDict\n)R'


def text(value: str) -> bytes:
  """A pickled text."""
  data = value.encode()
  return b'X' + struct.pack('<I', len(data)) + data


def whole(value: int) -> bytes:
  """A pickled whole number."""
  if -(1 << 31) <= value < 1 << 31:
    return b'J' + struct.pack('<i', value)
  data = value.to_bytes(9, 'little', signed=True)
  return b'\x8a' + bytes([len(data)]) + data


def numbers(values) -> bytes:
  """A pickled tuple of whole numbers."""
  return b'(' + b''.join(map(whole, values)) + b't'


def storage(kind: str, key: str, size: int) -> bytes:
  """A pickled reference to a member of the zip."""
  return (
    b'(' + text('storage') + f'ctorch\n{kind}Storage\n'.encode()
    + text(key) + text('cpu') + whole(size) + b'tQ'
  )  # fmt: skip


def tensor(where: bytes, offset, shape, strides) -> bytes:
  """A pickled tensor over a pickled storage."""
  return (
    b'ctorch._utils\n_rebuild_tensor_v2\n(' + where + whole(offset)
    + numbers(shape) + numbers(strides) + b'\x89' + EMPTY + b'tR'
  )  # fmt: skip


def parameter(value: bytes) -> bytes:
  """A pickled parameter around a pickled tensor."""
  return (
    b'ctorch._utils\n_rebuild_parameter\n(' + value + b'\x88' + EMPTY + b'tR'
  )


def pickle_of(items: dict[str, bytes], metadata: bool = True) -> bytes:
  """A pickled state dict of pickled values."""
  body = b''.join(text(name) + value for name, value in items.items())
  state = b''
  if metadata:  # what torch keeps as an attribute of the dict
    versions = EMPTY + b'(' + text('') + b'}(' + text('version')
    state = b'}' + text('_metadata') + versions + b'K\x01uu' + b'sb'
  return b'\x80\x02' + EMPTY + b'(' + body + b'u' + state + b'.'


def strides_of(shape) -> list[int]:
  """Strides in elements of a contiguous array."""
  found, step = [], 1
  for size in reversed(shape):
    found.insert(0, step)
    step *= max(size, 1)
  return found


def write(
  path,
  arrays: dict[str, np.ndarray],
  *,
  ties=(),
  root='archive',
  parameters=(),
  nested='',
  compression=zipfile.ZIP_STORED,
) -> None:
  """Writes a state dict.

  Args:
    path: of the file.
    arrays: by name.
    ties: (copy, owner) names that share a storage.
    root: folder in the zip.
    parameters: names that are parameters, not plain tensors.
    nested: key under which the state dict stands in another dict.
    compression: of the members; torch stores them.
  """
  owner = dict(ties)
  key_of = {
    n: str(i) for i, n in enumerate(n for n in arrays if n not in owner)
  }
  items = {}
  for name, array in arrays.items():
    held = arrays[owner.get(name, name)]
    kind = KINDS[held.dtype]
    where = storage(kind, key_of[owner.get(name, name)], held.size)
    items[name] = tensor(where, 0, array.shape, strides_of(array.shape))
    if name in parameters:
      items[name] = parameter(items[name])
  program = pickle_of(items)
  if nested:
    program = b'\x80\x02}' + text(nested) + program[2:-1] + b's.'
  members = {
    'data.pkl': program,
    'byteorder': b'little',
    **{
      f'data/{key}': np.ascontiguousarray(arrays[name]).tobytes()
      for name, key in key_of.items()
    },
    'version': b'3\n',
  }
  write_members(path, members, root, compression)


def write_members(
  path, members: dict[str, bytes], root='archive', compression=0
) -> None:
  """Writes a zip of members under a folder."""
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, data in members.items():
      archive.writestr(f'{root}/{name}', data)
