"""What readers of other libraries meet in damaged files, in one line."""

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from genecompass_jax import errors

_LARGE = 1 << 28  # bytes
_MOST_PACKED = 20_000  # bytes of zeros in one, of any compression
_OF_SYSTEM = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EMFILE)


@contextlib.contextmanager
def in_one_line(path: str, part: str) -> Iterator[None]:
  """Turns whatever a library stumbles over into an error of one line.

  One that is in a line already, and does not say where, is told it.
  """
  try:
    yield
  except errors.UserError as error:
    is_named = os.path.basename(path.rstrip('/')) in str(error)
    if is_named or re.match(r'\S+: ', str(error)):  # by its label
      raise
    raise errors.UserError(f'{path}: {error}') from error.__cause__
  except errors.RetryableError:  # a network, not the files
    raise
  except Exception as error:  # they raise whatever they stumble over
    raise damaged(path, part, error) from error


@contextlib.contextmanager
def anywhere(path: str) -> Iterator[None]:
  """As `in_one_line`, but faults of the system (no permission) stay theirs."""
  try:
    with in_one_line(path, 'it'):
      yield
  except errors.UserError as error:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in _OF_SYSTEM:
      raise cause from None
    raise


def damaged(path: str, part: str, error: Exception) -> errors.UserError:
  """The error of a part of a file that cannot be read."""
  line = errors.first_line(error)
  anew = ' with anndata' if path.endswith(('.h5ad', '.zarr')) else ''
  return errors.UserError(
    f'{path}: {part} cannot be read ({type(error).__name__}: {line}); copy the '
    f'file again, or write it anew{anew}'
  )


def check_stored(group: Any, part: str) -> None:
  """Refuses arrays of HDF5 or zarr that are large and hardly stored at all.

  What was never written reads as zeros: a file of a kilobyte would fill any
  memory with them.

  Args:
    group: of an HDF5 file or a zarr store.
    part: array, or group of arrays, that will be read whole.

  Raises:
    UserError: there is one.
  """
  if part not in group:
    return
  found = group[part]
  if hasattr(found, 'keys'):
    for name in found.keys():  # noqa: SIM118
      check_stored(group, f'{part}/{name}')
    return
  itemsize = max(getattr(found.dtype, 'itemsize', 1), 1)
  size = math.prod(found.shape) * itemsize
  if size < _LARGE:
    return
  is_zarr = hasattr(found, 'nbytes_stored')
  stored = found.nbytes_stored() if is_zarr else found.id.get_storage_size()
  if size > _MOST_PACKED * (stored + 1024):
    raise errors.UserError(
      f'{part} is {found.shape} and {stored:,} bytes of it are stored: the '
      'file is damaged, or was not written to its end'
    )


def check_no_pointer(path: str) -> None:
  """Refuses a Git LFS pointer in place of a file.

  Raises:
    UserError: it is one.
  """
  with open(path, 'rb') as file:
    head = file.read(64)
  if head.startswith(b'version https://git-lfs'):
    raise errors.UserError(
      f'{path}: a Git LFS pointer, not the file; fetch it with git lfs pull'
    )
