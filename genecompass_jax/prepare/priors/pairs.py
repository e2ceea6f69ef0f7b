"""Weighted pairs of genes: what a network is before it is embedded."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.parquet

from genecompass_jax import errors, gene_table, paths, prior_tables

MAX_SOURCES = 31  # bits of `source_N`


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
  """N pairs of genes, both of one species, each once.

  Attributes:
    a_N, b_N: int32 rows of the gene table; of a directed network a is the
      regulator.
    weight_N: float64, positive.
    source_N: int32; bit i is set where source i has the pair.
    is_lifted_N: bool; known from the other species only.
    sources: names of the sources.
  """

  a_N: np.ndarray
  b_N: np.ndarray
  weight_N: np.ndarray
  source_N: np.ndarray
  is_lifted_N: np.ndarray
  sources: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.a_N)

  def select(self, keep_N: np.ndarray) -> 'Pairs':
    """The pairs at some places, or where a mask is True."""
    return Pairs(
      self.a_N[keep_N],
      self.b_N[keep_N],
      self.weight_N[keep_N],
      self.source_N[keep_N],
      self.is_lifted_N[keep_N],
      self.sources,
    )


def collect(
  a_N: np.ndarray,
  b_N: np.ndarray,
  weight_N: np.ndarray,
  source_N: np.ndarray,
  is_lifted_N: np.ndarray,
  sources: Sequence[str],
  merge: str = 'max',
) -> Pairs:
  """Statements -> pairs, in order; repeated ones are merged.

  Args:
    a_N, b_N, weight_N, is_lifted_N: as of `Pairs`, repeats allowed; a pair of a
      gene with itself is dropped.
    source_N: number of the source of each statement.
    sources: names of the sources.
    merge: 'max': a pair has the largest weight that a source gives it, so that
      a source inside another one counts once; 'sum': weights are added.
  """
  if len(sources) > MAX_SOURCES:
    raise errors.UserError(
      f'{len(sources)} sources; give {MAX_SOURCES} at most'
    )
  keep_N = a_N != b_N
  a_N, b_N = a_N[keep_N].astype(np.int64), b_N[keep_N].astype(np.int64)
  key_N = a_N << 32 | b_N
  key_M, place_N = np.unique(key_N, return_inverse=True)
  weight_M = np.zeros(len(key_M))
  if merge == 'max':
    np.maximum.at(weight_M, place_N, weight_N[keep_N])
  else:
    np.add.at(weight_M, place_N, weight_N[keep_N])
  source_M = np.zeros(len(key_M), np.int32)
  bits_N = np.left_shift(np.int32(1), source_N[keep_N].astype(np.int32))
  np.bitwise_or.at(source_M, place_N, bits_N)
  is_lifted_M = np.ones(len(key_M), bool)
  np.logical_and.at(is_lifted_M, place_N, is_lifted_N[keep_N])
  return Pairs(
    (key_M >> 32).astype(np.int32),
    (key_M & 0xFFFFFFFF).astype(np.int32),
    weight_M,
    source_M,
    is_lifted_M,
    tuple(sources),
  )


def write(
  path: paths.PathLike, pairs: Pairs, genes: gene_table.GeneTable
) -> dict:
  """Writes pairs by gene id; returns what the prior says of the file."""
  ids = pyarrow.array(genes.gene_ids)
  table = pyarrow.table(
    {
      'a': pyarrow.DictionaryArray.from_arrays(pairs.a_N, ids).cast('string'),
      'b': pyarrow.DictionaryArray.from_arrays(pairs.b_N, ids).cast('string'),
      'weight': pyarrow.array(pairs.weight_N),
      'source': pyarrow.array(pairs.source_N),
      'lifted': pyarrow.array(pairs.is_lifted_N),
    }
  ).replace_schema_metadata({b'sources': '\n'.join(pairs.sources).encode()})
  data = prior_tables.to_bytes(table)
  paths.write_bytes(path, data)
  return {
    'number': len(pairs),
    'sources': list(pairs.sources),
    'sha256': paths.sha256_bytes(data),
  }


def read(
  prior: paths.PathLike, facts: dict, genes: gene_table.GeneTable
) -> Pairs | None:
  """The pairs of a prior, of genes in the table; None where it has none.

  Raises:
    UserError: the file is missing, damaged, or not the one of the prior.
  """
  if 'pairs' not in facts:
    return None
  path = prior_tables.pairs_file(prior)
  try:
    data = paths.read_bytes(path)
  except FileNotFoundError:
    raise errors.UserError(
      f'{path} is missing: copy it beside {prior}, or build the prior again'
    ) from None
  if paths.sha256_bytes(data) != facts['pairs']['sha256']:
    raise errors.UserError(
      f'{path}: the checksum is not the one of the prior; build it again'
    )
  table = pyarrow.parquet.read_table(io.BytesIO(data))
  ids = pyarrow.array(genes.gene_ids)

  def rows(name):
    found = pyarrow.compute.index_in(table[name].combine_chunks(), ids)
    return found.fill_null(-1).to_numpy()

  a_N, b_N = rows('a'), rows('b')
  sources = table.schema.metadata[b'sources'].decode().split('\n')
  found = Pairs(
    a_N,
    b_N,
    table['weight'].to_numpy(),
    table['source'].to_numpy(),
    table['lifted'].to_numpy(),
    tuple(sources),
  )
  return found.select((a_N >= 0) & (b_N >= 0))


def keys(a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
  """One int64 for a pair, whichever of the two comes first."""
  low_N = np.minimum(a_N, b_N).astype(np.int64)
  return low_N << 32 | np.maximum(a_N, b_N)
