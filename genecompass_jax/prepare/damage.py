"""What readers of other libraries meet in damaged files, in one line."""

import contextlib
import errno
from collections.abc import Iterator

from genecompass_jax import errors

_OF_SYSTEM = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EMFILE)


@contextlib.contextmanager
def in_one_line(path: str, part: str) -> Iterator[None]:
  """Turns whatever a library stumbles over into an error of one line."""
  try:
    yield
  except errors.UserError:
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
