"""Files and folders of named tensors, without torch.

npz, safetensors and PyTorch's zips are told apart by what they begin with. A
folder is one of Hugging Face's layout: `model.safetensors` or
`pytorch_model.bin`, or one of them in parts with an index.
"""

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from genecompass_jax import errors, paths, pickled, torch_files

# The files of a folder, the first that is there.
_NAMES = ('model.safetensors', 'pytorch_model.bin')
_INDEX = '.index.json'
_DIGEST = 'genecompass_sha256'  # in the header of what is written here
_EXPANSION = 64  # what a compressed npz may hold, in times its size, or
_SMALL = 1 << 30  # bytes
# Names of types in safetensors; numpy has no bfloat16 of its own.
_DTYPES = {
  'F64': '<f8',
  'F32': '<f4',
  'F16': '<f2',
  'I64': '<i8',
  'I32': '<i4',
  'I16': '<i2',
  'I8': 'i1',
  'U8': 'u1',
  'U16': '<u2',
  'U32': '<u4',
  'U64': '<u8',
  'BOOL': '?',
}


def read(source: paths.PathLike, key_prefix: str = '') -> dict[str, np.ndarray]:
  """Reads a state dict.

  Args:
    source: npz, safetensors or PyTorch file of tensors under the original's
      names, or a folder as Hugging Face writes it.
    key_prefix: only names that begin so are read, and it is taken off.

  Raises:
    UserError: no such file, another format, damaged, parts that contradict
      their index, or nothing under the prefix.
  """
  name = os.fspath(source)
  parts = _parts(name)
  tensors: dict[str, np.ndarray] = {}
  for part, promised in parts.items():
    found = _read_file(part, key_prefix)
    if promised is not None:
      wanted = {n for n in promised if n.startswith(key_prefix)}
      if missing := sorted(wanted - found.keys()):
        raise errors.UserError(
          f'{part}: {missing[0]} is not in it, where the index of the folder '
          'says so; fetch the folder again'
        )
    if twice := sorted(found.keys() & tensors.keys()):
      raise errors.UserError(
        f'{part}: {twice[0]} stands in another part of the folder too; fetch '
        'the folder again'
      )
    tensors |= found
  for key in tensors:
    if not key.isprintable():
      raise errors.UserError(
        f'{name}: a tensor is called {ascii(key)[:200]}; no state dict has '
        'such names'
      )
  if not tensors:
    raise errors.UserError(
      f'{name}: no tensor begins with {key_prefix!r}; check --key-prefix'
    )
  return {key[len(key_prefix) :]: value for key, value in tensors.items()}


def files(source: paths.PathLike) -> tuple[str, ...]:
  """The files that hold the weights of a file or folder.

  Raises:
    UserError: as `read`, of what is missing.
  """
  return tuple(_parts(os.fspath(source)))


def is_folder(source: paths.PathLike) -> bool:
  """Whether a source of weights is a folder, local or in a store."""
  if paths.is_url(source):  # objects that begin so make a folder
    name = os.fspath(source).rstrip('/')
    return not name.endswith(('.npz', '.safetensors', '.bin', '.pt', '.pth'))
  return os.path.isdir(source)


def write_safetensors(
  path: paths.PathLike, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes safetensors with a digest of their content in the header."""
  tensors = {k: np.asarray(v, order='C') for k, v in tensors.items()}
  metadata = {'format': 'pt', _DIGEST: digest(tensors)}
  paths.write_bytes(path, safetensors.numpy.save(tensors, metadata))


def digest(tensors: Mapping[str, np.ndarray]) -> str:
  """One hash of names, types, shapes and numbers, whatever their order."""
  found = hashlib.sha256()
  for name in sorted(tensors):
    array = np.asarray(tensors[name])
    found.update(f'{name} {array.dtype.str} {array.shape} '.encode())
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()


def _parts(name: str) -> dict[str, list[str] | None]:
  """Files that hold the weights -> names that each must hold, if said."""
  if not is_folder(name):
    if not paths.exists(name):
      raise errors.UserError(f'{name}: no such file')
    return {name: None}
  for file in _NAMES:
    if paths.exists(paths.join(name, file)):
      return {paths.join(name, file): None}
    if paths.exists(index := paths.join(name, file + _INDEX)):
      return _indexed(name, index)
  raise errors.UserError(
    f'{name}: this folder holds no {" and no ".join(_NAMES)}, whole or in parts '
    f'(*{_INDEX}); name the file of the weights'
  )


def _indexed(folder: str, index: str) -> dict[str, list[str] | None]:
  """Parts that an index names, all of which are there."""
  try:
    where = paths.read_json(index)['weight_map']
    of_file: dict[str, list[str]] = {}
    for tensor, file in where.items():
      of_file.setdefault(file, []).append(tensor)
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise errors.UserError(
      f'{index}: no index of tensors ({errors.first_line(error)}); fetch it '
      'again'
    ) from error
  for file in of_file:
    if not isinstance(file, str) or os.path.basename(file) != file:
      raise errors.UserError(
        f'{index}: names {ascii(file)[:200]}, which is no file of its folder'
      )
    if not paths.exists(paths.join(folder, file)):
      raise errors.UserError(
        f'{paths.join(folder, file)}: no such file, but {os.path.basename(index)} '
        'names it; fetch the folder again'
      )
  if not of_file:
    raise errors.UserError(f'{index}: names no tensors; fetch it again')
  return {paths.join(folder, file): names for file, names in of_file.items()}


def _read_file(name: str, key_prefix: str) -> dict[str, np.ndarray]:
  """Tensors of one file whose names begin with the prefix, under full names."""

  def is_wanted(key: str) -> bool:
    return key.startswith(key_prefix)

  try:
    with _opened(name) as file:
      head = file.read(64)
      file.seek(0)
      pickled.check_no_pointer(name, head)
      if head.startswith(b'PK'):
        return _read_zip(file, is_wanted)
      if head.startswith(torch_files.LEGACY_MAGIC):
        raise errors.UserError(
          'PyTorch wrote it before version 1.6, or without its zip format; save '
          'it again in PyTorch: torch.save(torch.load(FILE), NEW)'
        )
      if head[8:9] == b'{' or name.endswith('.safetensors'):
        return _read_safetensors(file.read(), is_wanted)
    if name.endswith(('.npz', '.bin', '.pt', '.pth')):
      raise ValueError('it is no zip')
    raise errors.UserError(
      'give weights as .npz, .safetensors or pytorch_model.bin under the names '
      'of the original state dict'
    )
  except errors.UserError as error:
    is_named = str(error).startswith(name)
    raise errors.UserError(
      str(error) if is_named else f'{name}: {error}'
    ) from error.__cause__
  except errors.RetryableError:  # a network, not the file
    raise
  except Exception as error:  # damaged files raise whatever their parser meets
    raise errors.UserError(
      f'{name}: cannot be read as tensors ({errors.first_line(error)}); the '
      'file is damaged or of another format, fetch it again'
    ) from error


@contextlib.contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
  if paths.is_url(name):
    yield io.BytesIO(paths.read_bytes(name))
  elif not os.path.isfile(name):  # reading a device might never end
    raise errors.UserError('this is no plain file; name that of the weights')
  else:
    with open(name, 'rb') as file:
      yield file


def _read_zip(file: IO[bytes], is_wanted) -> dict[str, np.ndarray]:
  """The tensors of an npz file, or of one of PyTorch."""
  with zipfile.ZipFile(file) as archive:
    members = archive.infolist()
  names = [m.filename for m in members]
  if torch_files.is_torch(names):
    return torch_files.read(file, is_wanted)
  if len({n.removesuffix('.npy') for n in names}) != len(names):
    raise errors.UserError('two tensors have one name')
  size = file.seek(0, 2)
  held = sum(m.file_size for m in members)
  if held > max(_EXPANSION * size, _SMALL):
    raise errors.UserError(
      f'its tensors stand for {held:,} bytes, the file has {size:,}'
    )
  file.seek(0)
  with np.load(file, allow_pickle=False) as archive:
    tensors = {key: archive[key] for key in archive.files if is_wanted(key)}
  for key, value in tensors.items():
    if not isinstance(value, np.ndarray):  # what is no npy comes as bytes
      raise errors.UserError(f'{ascii(key)} in it is no array')
  return tensors


def _read_safetensors(data: bytes, is_wanted) -> dict[str, np.ndarray]:
  """The tensors of a file; numpy knows bfloat16 by way of ml_dtypes."""
  tensors = {}
  for key, facts in safetensors.deserialize(data):
    kind = facts['dtype']
    dtype = {'BF16': ml_dtypes.bfloat16}.get(kind)
    dtype = np.dtype(dtype or _DTYPES[kind])
    tensors[key] = np.frombuffer(facts['data'], dtype).reshape(facts['shape'])
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length], object_pairs_hook=list)
  if len({key for key, _ in header}) != len(header):  # a dict keeps the last
    raise errors.UserError('two tensors have one name')
  promised = dict(dict(header).get('__metadata__', ())).get(_DIGEST)
  if promised is not None and promised != digest(tensors):
    raise ValueError('its numbers are not those that were written')
  return {
    key: array.astype(np.float32)
    if array.dtype == ml_dtypes.bfloat16
    else array
    for key, array in tensors.items()
    if is_wanted(key)
  }
