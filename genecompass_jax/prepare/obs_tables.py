"""More columns for cells, from a table keyed by their names."""

import gzip
import os

import pandas as pd

from genecompass_jax import errors
from genecompass_jax.prepare import damage, text_tables

_SHOWN = 3
# What R, pandas and spreadsheets write where there is no value.
_MISSING = (
  *('', 'NA', 'N/A', 'n/a', '#N/A', '<NA>', 'NaN', 'nan', '-nan', '-NaN'),
  *('NULL', 'null', 'None', '#NA', '#N/A N/A', '1.#IND', '1.#QNAN'),
  *('-1.#IND', '-1.#QNAN'),
)


def joined(obs: pd.DataFrame, path: str) -> pd.DataFrame:
  """The columns of a csv or tsv beside those of the cells.

  Cells that the table does not name have no value there; rows of cells that
  are not here are left out.

  Args:
    obs: cells by name.
    path: of the table, compressed or not; its first column names cells, as
      text, and it has a header.

  Raises:
    UserError: damaged, a cell twice, a column that is there already, or no
      cell of these.
  """
  if not os.path.isfile(path):
    raise errors.UserError(f'{path}: no such file')
  damage.check_no_pointer(path)
  plain = path.removesuffix('.gz')
  with damage.in_one_line(path, 'the file'):
    with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
      data = file.read()
  table = text_tables.read(path, data, ',' if plain.endswith('.csv') else '\t')
  if isinstance(table.index, pd.RangeIndex):
    table = table.set_index(table.columns[0])
  if not table.shape[1]:
    raise errors.UserError(
      f'{path}: one column; a table ends in .csv or .tsv, with names of cells '
      'in its first column'
    )
  for name in table:
    if table[name].str.contains('\n', regex=False).any():
      raise errors.UserError(
        f'{path}: a value of column {name!r} goes over several lines: a quote '
        'that is not closed?'
      )
  table = table.mask(table.isin(_MISSING))
  if not table.index.is_unique:
    twice = table.index[table.index.duplicated()][0]
    raise errors.UserError(f'{path}: cell {twice!r} stands there twice')
  clash = [column for column in table if column in obs]
  if clash:
    raise errors.UserError(f'{path}: the cells have a column {clash[0]!r}')
  cells = obs.index.astype(str)
  if not cells.isin(table.index).any():
    raise errors.UserError(
      f'{path}: names none of these cells; it has '
      f'{", ".join(table.index[:_SHOWN])}, the cells are '
      f'{", ".join(cells[:_SHOWN])}'
    )
  more = table.reindex(cells).set_axis(obs.index)
  return pd.concat([obs, more], axis=1)
