"""The file of a prior: one vector a gene, and what the table is made of.

    NAME.parquet         columns gene_id (text) and vector (float32, one width)
    NAME.json            what it is made of, and the sha256 of the table
    NAME.pairs.parquet   of networks: the pairs of genes before embedding

The table carries the same facts in its own metadata, and checksums on its
pages, so that it can be moved without the rest. NAME.json is written last.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet

from genecompass_jax import errors, paths

FORMAT = 'genecompass_jax prior 1'
_KEY = b'genecompass_prior'
ENDING = '.parquet'


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
  """Vectors of genes, and where they come from.

  Attributes:
    gene_ids: Ensembl ids, all different.
    vectors_GP: float32.
    facts: what NAME.json holds.
  """

  gene_ids: tuple[str, ...]
  vectors_GP: np.ndarray
  facts: dict


def sidecar(path: paths.PathLike) -> str:
  """The JSON file that belongs to a table."""
  return str(path).removesuffix(ENDING) + '.json'


def pairs_file(path: paths.PathLike) -> str:
  """The file of pairs that belongs to a table."""
  return str(path).removesuffix(ENDING) + '.pairs.parquet'


def read(path: paths.PathLike) -> Prior:
  """Reads a table and its facts; facts are empty where it has none.

  Raises:
    UserError: no such file, not parquet, other columns, ragged vectors,
      damaged pages, or not the table that its JSON file names.
  """
  data = _read_bytes(path)
  facts = _facts(path)
  if facts and facts.get('sha256') != paths.sha256_bytes(data):
    raise errors.UserError(
      f'{path}: the checksum is not the one in {sidecar(path)}; build the prior '
      'again, or copy both files of it'
    )
  try:
    table = pyarrow.parquet.read_table(
      io.BytesIO(data),
      columns=['gene_id', 'vector'],
      page_checksum_verification=True,
    )
    gene_ids = _gene_ids(table['gene_id'])
    vectors_GP = _vectors(table['vector'])
    if not facts:
      facts = paths.parse_json((table.schema.metadata or {}).get(_KEY, b'{}'))
    if not isinstance(facts, dict):
      raise ValueError('what it says of itself is no JSON of names')
  except (
    *(OSError, pyarrow.ArrowException, KeyError, ValueError, MemoryError),
  ) as error:
    raise errors.UserError(
      f'{path}: not a prior table ({errors.first_line(error)}); it must be a '
      'parquet file with the columns gene_id (text) and vector (list of float, '
      'one width)'
    ) from error
  return Prior(gene_ids, vectors_GP, facts)


def write(
  path: paths.PathLike,
  gene_ids: Sequence[str],
  vectors_GP: np.ndarray,
  facts: Mapping,
) -> dict:
  """Writes a table and its JSON file; equal content gives equal bytes.

  The old JSON file goes first and the new one comes last: a killed process
  leaves no table that another file describes.

  Returns:
    The facts as written, with the sha256 of the table.

  Raises:
    UserError: the name does not end in .parquet; vectors that are not finite
      in float32.
    ValueError: not one vector a gene.
  """
  if not str(path).endswith(ENDING):
    raise errors.UserError(f'{path}: the name of a prior ends in {ENDING}')
  with np.errstate(over='ignore'):
    vectors_GP = np.ascontiguousarray(vectors_GP, np.float32)
  if vectors_GP.ndim != 2 or len(vectors_GP) != len(gene_ids):
    raise ValueError(f'{vectors_GP.shape=} for {len(gene_ids)} genes')
  if len(set(gene_ids)) != len(gene_ids):
    raise ValueError('a gene stands twice')
  if not np.isfinite(vectors_GP).all():
    raise errors.UserError(
      f'{path}: a vector is not finite as float32; scale those it is made of'
    )
  facts = {'format': FORMAT, **facts}
  facts.pop('sha256', None)
  flat = pyarrow.array(vectors_GP.ravel())
  table = pyarrow.table(
    {
      'gene_id': pyarrow.array(list(gene_ids), pyarrow.string()),
      'vector': pyarrow.FixedSizeListArray.from_arrays(
        flat, vectors_GP.shape[1]
      ),
    }
  ).replace_schema_metadata({_KEY: _json(facts).encode()})
  old = paths.path(sidecar(path))
  if old.exists():
    old.unlink()
  data = to_bytes(table)
  paths.write_bytes(path, data)
  facts = {**facts, 'sha256': paths.sha256_bytes(data)}
  paths.write_json(sidecar(path), facts)
  return facts


def to_bytes(table: pyarrow.Table) -> bytes:
  """A parquet file with a checksum on every page."""
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(
    table, buffer, compression='zstd', write_page_checksum=True
  )
  return buffer.getvalue()


def _read_bytes(path: paths.PathLike) -> bytes:
  try:
    return paths.read_bytes(path)
  except OSError as error:
    raise errors.UserError(
      f'{path}: not a prior table ({errors.first_line(error)}); build one with '
      'genecompass prior'
    ) from error


def _facts(path: paths.PathLike) -> dict:
  """What the JSON file says; empty where there is none of ours."""
  place = sidecar(path)
  if place == str(path) or not paths.exists(place):
    return {}
  try:
    facts = paths.read_json(place)
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f'{place} is damaged ({errors.first_line(error)}); build the prior again'
    ) from None
  if not isinstance(facts, dict) or facts.get('format') != FORMAT:
    return {}
  return facts


def _gene_ids(column: pyarrow.ChunkedArray) -> tuple[str, ...]:
  found = tuple(column.to_pylist())
  if not all(isinstance(name, str) for name in found):
    raise ValueError('a gene_id is no text')
  if len(set(found)) != len(found):
    raise ValueError('a gene stands twice')
  return found


def _vectors(column: pyarrow.ChunkedArray) -> np.ndarray:
  array = column.combine_chunks()
  kind = array.type
  is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
  if not is_list and not pyarrow.types.is_fixed_size_list(kind):
    raise ValueError('vector is not a list')
  if not len(array):
    raise ValueError('it has no genes')
  if array.null_count:
    raise ValueError('a gene has no vector')
  widths = np.unique(array.value_lengths()) if is_list else [kind.list_size]
  if len(widths) != 1 or not widths[0]:
    raise ValueError('the vectors differ in width')
  flat = array.flatten().cast(pyarrow.float32())
  vectors_GP = np.array(flat.to_numpy(zero_copy_only=False), np.float32)
  if not np.isfinite(vectors_GP).all():
    raise ValueError('a vector is not finite')
  return vectors_GP.reshape(len(array), int(widths[0]))


def _json(facts: Mapping) -> str:
  return json.dumps(facts, sort_keys=True, ensure_ascii=False)
