"""Delimited tables as text, every row as long as the header.

What reads tables elsewhere shortens rows that are too long, moves their values
by a column, fills those that are too short, ends a value at a zero byte, and
takes 01 and 1 for one number. Here nothing is guessed.
"""

import csv
import io
from collections.abc import Iterator

import pandas as pd

from genecompass_jax import errors


def read(
  path: object, data: bytes, delimiter: str, header: bool = True
) -> pd.DataFrame:
  """A table of text; empty cells are ''.

  A header that is one name shorter than all rows is that of R, which names no
  column of row names: they are the index. (With commas R does name it, and
  values may hold some.) Where all rows end in a delimiter, nothing is behind.

  Args:
    path: of the file, for messages.
    data: its content, UTF-8.
    delimiter: between columns.
    header: the first line names the columns; else they are numbered from 1.

  Raises:
    UserError: no text, or rows of several lengths.
  """
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'{path}: no UTF-8 text ({errors.first_line(error)}); write it anew'
    ) from None
  if '\0' in text:
    line = text.count('\n', 0, text.index('\0')) + 1
    raise errors.UserError(
      f'{path}: line {line} has a zero byte: it is damaged, or no text'
    )
  number, names, width, num_rows = 0, [], 0, 0
  for number_of_line, row in _rows(path, text, delimiter):
    if header and not names:
      number, names = number_of_line, row
      continue
    width = width or len(row)
    num_rows += 1
    if len(row) != width:
      raise errors.UserError(
        f'{path}: not a table (line {number_of_line} has {len(row)} columns, '
        f'those above it {width}); quote values with a delimiter in them, or '
        'copy the file again'
      )
  if not names and not num_rows:
    raise errors.UserError(f'{path}: not a table (it is empty)')
  if not num_rows:
    raise errors.UserError(f'{path}: a table without rows')
  frame = pd.read_csv(
    io.StringIO(text, newline=None),
    sep=delimiter,
    header=None,
    skiprows=number,
    dtype=str,
    keep_default_na=False,
  )
  if not header:
    return frame.set_axis([str(k + 1) for k in range(width)], axis=1)
  if width == len(names) + 1 and (frame.iloc[:, -1] == '').all():
    frame = frame.iloc[:, :-1]
  elif width == len(names) + 1 and delimiter == '\t':
    frame = frame.set_index(0)
  elif width != len(names):
    raise errors.UserError(
      f'{path}: not a table (rows of {width} columns below a header of '
      f'{len(names)}); quote values with a delimiter in them, or copy the file '
      'again'
    )
  return frame.set_axis(_unlike(names), axis=1).rename_axis(None)


def _rows(
  path: object, text: str, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
  """Last line and values of every row that is not blank."""
  lines = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter)
  before = csv.field_size_limit(len(text) + 1)  # sequences are long
  try:
    for row in lines:
      if row:
        yield lines.line_num, row
  except csv.Error as error:
    raise errors.UserError(
      f'{path}: not a table (line {lines.line_num}: {error})'
    ) from None
  finally:
    csv.field_size_limit(before)


def _unlike(names: list[str]) -> list[str]:
  """Names, those that stand there again with a number: x, x.1."""
  seen: dict[str, int] = {}
  found = []
  for name in names:
    number = seen.get(name, 0)
    seen[name] = number + 1
    found.append(f'{name}.{number}' if number else name)
  return found
