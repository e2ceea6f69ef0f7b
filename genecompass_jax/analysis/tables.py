"""Tables with a header: as parquet, and as text for people.

The header says what the numbers mean and where they come from. It is in the
metadata of a parquet file, as JSON under a key, and in the first lines of a
text file, behind #.
"""

import io
import json
from collections.abc import Mapping

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from genecompass_jax import errors, paths


def parquet(frame: pd.DataFrame, header: Mapping[str, str], key: str) -> bytes:
  """A parquet file with its header in the metadata under `key`."""
  table = pa.Table.from_pandas(frame, preserve_index=False)
  metadata = {**(table.schema.metadata or {}), key: json.dumps(dict(header))}
  buffer = io.BytesIO()
  pa.parquet.write_table(table.replace_schema_metadata(metadata), buffer)
  return buffer.getvalue()


def read(
  path: paths.PathLike, key: str, what: str
) -> tuple[pd.DataFrame, dict[str, str]]:
  """A table and its header.

  Args:
    path: of a parquet file.
    key: of the header.
    what: kind of the results, for the message.

  Raises:
    FileNotFoundError: there is none.
    UserError: it is no parquet file, or has no header of this key.
  """
  data = paths.read_bytes(path)
  try:
    table = pa.parquet.read_table(io.BytesIO(data))
    header = json.loads((table.schema.metadata or {})[key.encode()])
  except (pa.ArrowException, KeyError, ValueError) as error:
    raise errors.UserError(
      f'{path} holds no results of {what} ({errors.first_line(error)})'
    ) from error
  return table.to_pandas(), header


def text(frame: pd.DataFrame, header: Mapping[str, str]) -> str:
  """The header in lines that begin with #, then the table, tab-separated."""
  lines = [f'# {name}: {one_line(value)}' for name, value in header.items()]
  body = frame.to_csv(
    sep='\t', index=False, float_format='%.6g', lineterminator='\n'
  )
  return '\n'.join([*lines, body])


def one_line(value: object) -> str:
  """A value as text without line breaks."""
  return ' '.join(str(value).split())
