"""Raw tables as they come: text, plain or gzip, local or by URL."""

from collections.abc import Sequence

import pandas as pd

from genecompass_jax import errors, paths
from genecompass_jax.prepare import raw_files, text_tables


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


def names(text: str) -> tuple[str, ...]:
  """Names of a flag: separated by commas, or one a line in a file.

  Raises:
    UserError: the file is damaged.
  """
  if text and paths.exists(text):
    found = (line.split('\t')[0].strip() for line in raw_files.lines(text))
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
  with raw_files.opened(path) as file:
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
