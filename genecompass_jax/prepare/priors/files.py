"""Raw files as they come: text, plain or gzip, local or by URL."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence

import pandas as pd

from genecompass_jax import errors, paths
from genecompass_jax.prepare import text_tables

_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError)


def source(path: paths.PathLike, licence: str = '') -> dict:
  """What a table says of a file: its name, not its place, and its digest.

  Args:
    path: the file.
    licence: origin and licence, in the user's words.

  Raises:
    UserError: there is no such file.
  """
  try:
    digest = paths.sha256_file(path)
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such file') from None
  name = str(path).replace('\\', '/').rsplit('/', 1)[-1]
  return {'file': name, 'sha256': digest, 'licence': licence}


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


def lines(path: paths.PathLike) -> Iterator[str]:
  """Lines of UTF-8 text without their ends."""
  with opened(path) as file:
    for line in io.TextIOWrapper(file, encoding='utf-8', newline=''):
      yield line.rstrip('\r\n')


def names(text: str) -> tuple[str, ...]:
  """Names of a flag: separated by commas, or one a line in a file.

  Raises:
    UserError: the file is damaged.
  """
  if text and paths.exists(text):
    found = (line.split('\t')[0].strip() for line in lines(text))
    return tuple(n for n in found if n and not n.startswith('#'))
  return tuple(n.strip() for n in text.split(',') if n.strip())


def table(path: paths.PathLike, header: bool = True) -> pd.DataFrame:
  """A delimited table as text; empty cells are ''.

  Args:
    path: comma-separated where its name says csv, else tab-separated.
    header: the first line names the columns; else they are numbered from 1.

  Raises:
    UserError: no such file, damage, or rows of several lengths.
  """
  name = str(path).rsplit('/', 1)[-1].lower()
  with opened(path) as file:
    data = file.read()
  frame = text_tables.read(path, data, ',' if '.csv' in name else '\t', header)
  if not len(frame):
    raise errors.UserError(f'{path}: a table without rows')
  frame.columns = [str(c).lstrip('#') for c in frame.columns]
  return frame


def columns(
  path: paths.PathLike, frame: pd.DataFrame, wanted: Sequence[str]
) -> list[str]:
  """Columns by name, or by number from 1.

  Raises:
    UserError: the table has no such column.
  """
  found = []
  for name in wanted:
    if name in frame.columns:
      found.append(name)
    elif name.isdigit() and 1 <= int(name) <= frame.shape[1]:
      found.append(frame.columns[int(name) - 1])
    else:
      raise errors.UserError(
        f'{path}: no column {name!r}; it has: {", ".join(frame.columns)}'
      )
  return found
