"""Files of named tensors, without torch: npz and safetensors."""

import os

import ml_dtypes
import numpy as np
import safetensors

from genecompass_jax import errors, paths

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
  """Reads a state dict from an npz or safetensors file.

  Args:
    source: file of tensors under the original's names.
    key_prefix: only names that begin so are read, and it is taken off.

  Raises:
    UserError: no such file, another format, damaged, or nothing under the
      prefix.
  """
  name = os.fspath(source)
  if not paths.exists(name):
    raise errors.UserError(f'{name}: no such file')
  try:
    if name.endswith('.safetensors'):
      tensors = _read_safetensors(name)
    elif name.endswith('.npz'):
      with paths.path(name).open('rb') as file:
        with np.load(file, allow_pickle=False) as archive:
          tensors = {
            key: archive[key]
            for key in archive.files
            if key.startswith(key_prefix)
          }
    else:
      raise errors.UserError(
        f'{name}: give weights as .npz or .safetensors under the names of the '
        'original state dict'
      )
  except errors.UserError:
    raise
  except Exception as error:  # damaged files raise whatever their parser meets
    raise errors.UserError(
      f'{name}: cannot be read as tensors ({errors.first_line(error)}); the file is '
      'damaged or of another format, fetch it again'
    ) from error
  tensors = {
    key[len(key_prefix) :]: value
    for key, value in tensors.items()
    if key.startswith(key_prefix)
  }
  if not tensors:
    raise errors.UserError(
      f'{name}: no tensor begins with {key_prefix!r}; check --key-prefix'
    )
  return tensors


def _read_safetensors(name: str) -> dict[str, np.ndarray]:
  """The tensors of a file; numpy knows bfloat16 by way of ml_dtypes."""
  tensors = {}
  for key, facts in safetensors.deserialize(paths.read_bytes(name)):
    kind = facts['dtype']
    dtype = {'BF16': ml_dtypes.bfloat16}.get(kind)
    dtype = np.dtype(dtype or _DTYPES[kind])
    array = np.frombuffer(facts['data'], dtype).reshape(facts['shape'])
    tensors[key] = array.astype(np.float32) if kind == 'BF16' else array
  return tensors
