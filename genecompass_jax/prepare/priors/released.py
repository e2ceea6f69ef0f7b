"""The original's prior pickles: {symbol: vector} -> a prior, and a report.

Nothing is unpickled; see `pickled`. Files named `..._random` hold random
vectors for genes without data, in disguise. They cannot be told for certain:
a row looks random when, after the mean is taken off, no other row is nearer to
it than random directions are to each other.
"""

import numpy as np

from genecompass_jax import errors, gene_ids, gene_table, paths, pickled
from genecompass_jax.prepare.priors import assembly

_ROWS = 1024
_STANDARD_ERRORS = 6  # of the cosine of two random directions


def read(path: paths.PathLike) -> tuple[list[str], np.ndarray]:
  """Symbols and float32 vectors of a released table.

  Raises:
    UserError: not a dict of vectors of one width.
  """
  table = pickled.read(path)
  if not isinstance(table, dict) or not table:
    raise errors.UserError(
      f'{path}: holds a {type(table).__name__}, not a dict of vectors by symbol'
    )
  try:
    rows = [np.asarray(v, np.float32).ravel() for v in table.values()]
    vectors = np.stack(rows)
  except (ValueError, TypeError) as error:
    raise errors.UserError(
      f'{path}: the values are not vectors of one width '
      f'({errors.first_line(error)})'
    ) from None
  if not np.isfinite(vectors).all() or not vectors.size:
    raise errors.UserError(f'{path}: a vector is empty or not finite')
  return [str(symbol) for symbol in table], vectors


def by_gene(
  symbols: list[str], species: int, genes: gene_table.GeneTable
) -> tuple[np.ndarray, np.ndarray, dict]:
  """Rows of the gene table, and the number of the vector each takes.

  Where several symbols lead to a gene, its current symbol wins, then the
  first.

  Returns:
    Rows of the gene table, numbers of vectors, and the report.
  """
  found = gene_ids.resolve(symbols, species, genes)
  chosen: dict[int, int] = {}
  for n, (gene, how) in enumerate(zip(found.gene_ids, found.how)):
    if gene is None:
      continue
    row = genes.row_of[gene]
    if row not in chosen or (
      how == 'symbol' and found.how[chosen[row]] != 'symbol'
    ):
      chosen[row] = n
  rows = np.array(sorted(chosen), np.int64)
  return rows, np.array([chosen[r] for r in rows.tolist()]), found.report()


def report(symbols: list[str], vectors: np.ndarray) -> dict:
  """What can be said of a table without knowing how it was made."""
  distinct = np.unique(vectors, axis=0)
  looks_random = random_rows(vectors)
  return {
    'rows': len(symbols),
    'width': int(vectors.shape[1]),
    'norms': assembly.norms(vectors),
    'zero_vectors': int((np.abs(vectors).max(1) == 0).sum()),
    'duplicate_vectors': int(len(vectors) - len(distinct)),
    'rows_that_look_random': int(looks_random.sum()),
    'examples_random': [symbols[n] for n in np.flatnonzero(looks_random)[:10]],
  }


def random_rows(vectors: np.ndarray) -> np.ndarray:
  """bool [N]: rows without any neighbour; see the top of the file."""
  centred = vectors - vectors.mean(0, dtype=np.float64).astype(np.float32)
  norm = np.linalg.norm(centred, axis=1, keepdims=True)
  unit = centred / np.maximum(norm, 1e-30)
  limit = _STANDARD_ERRORS / np.sqrt(vectors.shape[1])
  nearest = np.zeros(len(unit), np.float32)
  for first in range(0, len(unit), _ROWS):
    cosine = unit[first : first + _ROWS] @ unit.T
    own = np.arange(len(cosine))
    cosine[own, own + first] = 0
    nearest[first : first + _ROWS] = np.abs(cosine).max(1)
  return (nearest < limit) & (norm[:, 0] > 0)
