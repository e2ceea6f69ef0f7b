"""Raw files as they come: plain or gzip, local or by URL."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator

from genecompass_jax import errors, paths

_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


@contextlib.contextmanager
def opened(path: paths.PathLike) -> Iterator[io.BufferedIOBase]:
  """The bytes of a file, unzipped; damage is a `UserError`."""
  try:
    with paths.path(path).open('rb') as raw:
      is_zipped = raw.read(2) == b'\x1f\x8b'
      raw.seek(0)
      if is_zipped:
        with gzip.open(raw) as file:
          yield file
      else:
        yield raw
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such file') from None
  except IsADirectoryError:
    raise errors.UserError(f'{path} is a folder; name a file in it') from None
  except _DAMAGE as error:
    raise errors.UserError(
      f'{path}: damaged file ({errors.first_line(error)}); fetch it again'
    ) from None
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'{path}: this is no text ({errors.first_line(error)}); check the file'
    ) from None


def lines(path: paths.PathLike) -> Iterator[str]:
  """Lines of UTF-8 text without their ends."""
  with opened(path) as file:
    for line in io.TextIOWrapper(file, encoding='utf-8', newline=''):
      yield line.rstrip('\r\n')
