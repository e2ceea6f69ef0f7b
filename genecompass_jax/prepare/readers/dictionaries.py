"""Tables of gene -> number: tokens and medians of released data.

Text, or the pickled dicts of the release, which are read and never run.
"""

import csv
import gzip
import io
import json
import math
import reprlib
import zlib

from genecompass_jax import errors, pickled
from genecompass_jax.prepare import damage


def load(path: str, names: tuple[str, ...]) -> dict[str, float]:
  """Reads a table of genes and numbers.

  Args:
    path: a pickled dict, json of an object, or csv or tsv, compressed or not: two columns, or
      more with a header that names one of `names`; genes come first. Lines
      that begin with # are left out, and empty numbers.
    names: of the column of numbers.

  Raises:
    UserError: missing, damaged, a gene twice, or not a table of numbers.
  """
  plain = path.removesuffix('.gz')
  if plain.endswith(('.pickle', '.pkl')):
    return _checked(path, _of_pickle(path))
  try:
    damage.check_no_pointer(path)
    with open(path, 'rb') as file:
      data = file.read()
    text = gzip.decompress(data) if path.endswith('.gz') else data
    text = text.decode('utf-8-sig')
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such file') from None
  except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
    raise errors.UserError(
      f'{path}: cannot be read ({errors.first_line(error)})'
    ) from None
  if plain.endswith('.json'):
    rows = _of_json(path, text)
  else:
    rows = _of_table(path, text, names)
  return _checked(path, rows)


def _checked(path: str, rows: list[tuple[str, object]]) -> dict[str, float]:
  table: dict[str, float] = {}
  for gene, number in rows:
    gene = str(gene).strip()
    try:
      value = float(number)
    except (TypeError, ValueError, OverflowError):
      value = math.nan
    if not math.isfinite(value) or gene in table:
      what = (
        'twice' if gene in table else f'with {reprlib.repr(number)}, no number'
      )
      raise errors.UserError(
        f'{path}: {reprlib.repr(gene)} stands there {what}'
      )
    table[gene] = value
  if not table:
    raise errors.UserError(f'{path}: no genes in it')
  return table


def _of_pickle(path: str) -> list[tuple[str, object]]:
  value = pickled.read(path)
  if not isinstance(value, dict):
    raise errors.UserError(f'{path}: no dict of genes and numbers')
  return list(value.items())


def _of_json(path: str, text: str) -> list[tuple[str, object]]:
  try:
    # pairs as they stand: a gene twice would be lost in a dict
    rows = json.loads(text, object_pairs_hook=list)
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
      f'{path}: no json ({errors.first_line(error)})'
    ) from None
  if not isinstance(rows, list) or not all(isinstance(r, tuple) for r in rows):
    raise errors.UserError(f'{path}: an object of genes and numbers is needed')
  return rows


def _of_table(
  path: str, text: str, names: tuple[str, ...]
) -> list[tuple[str, str]]:
  lines = [x for x in text.splitlines() if x.strip() and not x.startswith('#')]
  delimiter = '\t' if lines and '\t' in lines[0] else ','
  try:
    rows = list(csv.reader(io.StringIO('\n'.join(lines)), delimiter=delimiter))
  except csv.Error as error:
    raise errors.UserError(
      f'{path}: no table of genes and numbers ({error})'
    ) from None
  if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
    raise errors.UserError(f'{path}: no table of genes and numbers')
  header = [name.strip().casefold() for name in rows[0]]
  column = next((header.index(name) for name in names if name in header), None)
  if column is None:
    if len(header) != 2:
      raise errors.UserError(
        f'{path}: {len(header)} columns, none named {" or ".join(names)}'
      )
    column = 1
    if _is_number(rows[0][1]):
      rows.insert(0, [])
  return [(row[0], row[column]) for row in rows[1:] if row[column].strip()]


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True
