"""Tables of vectors from elsewhere: ESM-2, GenePT, gene2vec, anything.

csv and tsv (plain or gzip), parquet, npz, and the text format of word2vec.
"""

import io
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from genecompass_jax import errors, gene_ids, gene_table, paths
from genecompass_jax.prepare import raw_files
from genecompass_jax.prepare.priors import files, names

_GENES = ('gene_id', 'gene', 'genes', 'gene_ids', 'symbol', 'names', 'index')
_VECTORS = ('vector', 'vectors', 'embedding', 'embeddings')


def read(
  path: paths.PathLike, gene_column: str = ''
) -> tuple[list[str], np.ndarray]:
  """Names and vectors of a table, in its order.

  Args:
    path: the format is told by the ending; .txt and .vec are word2vec text.
    gene_column: '' takes the first column of text (npz: an array of text).

  Raises:
    UserError: no such file, another format, or values that are no numbers.
  """
  lower = str(path).lower().removesuffix('.gz')
  if lower.endswith('.npz'):
    found, vectors = _npz(path, gene_column)
  elif lower.endswith(('.txt', '.vec', '.w2v')):
    found, vectors = _word2vec(path)
  elif lower.endswith(('.csv', '.tsv', '.parquet')):
    frame = _frame(path, lower)
    found, vectors = _from_frame(path, frame, gene_column)
  else:
    raise errors.UserError(
      f'{path}: give csv, tsv, parquet, npz, or word2vec text (.txt, .vec)'
    )
  if len(found) != len(vectors) or vectors.ndim != 2 or not vectors.size:
    raise errors.UserError(
      f'{path}: {len(found)} names for vectors of shape {vectors.shape}'
    )
  is_good = (np.abs(vectors) <= np.finfo(np.float32).max).all(1)  # no NaN
  if not is_good.all():
    raise errors.UserError(
      f'{path}: the vector of {found[int(np.argmin(is_good))]!r} is not finite '
      'in float32'
    )
  if not vectors.astype(np.float32).any():
    raise errors.UserError(f'{path}: every vector is zero')
  return [str(name) for name in found], vectors


def by_gene(
  found: Sequence[str],
  vectors: np.ndarray,
  genes: gene_table.GeneTable,
  species: str = 'auto',
  path: object = 'the table',
) -> tuple[np.ndarray, np.ndarray, dict]:
  """Rows of the gene table, their vectors, and what was lost.

  A gene that several rows name has their mean.

  Args:
    found: names of the rows.
    vectors: a row each.
    genes: the gene table.
    species: a species of the gene table, 'both' (each name by the species it
      is of, for tables of stable ids) or 'auto'.
    path: for messages.

  Raises:
    UserError: hardly a name is known, rows are only numbered, or the species
      is in doubt.
  """
  if gene_ids.counts_up(found):
    raise errors.UserError(
      f'{path}: the genes have no names, only the numbers {found[0]}, '
      f'{found[1]}, {found[2]}, ...; name the column of names'
    )
  if species == 'auto':
    try:
      species = genes.species[gene_ids.infer_species(found, genes)]
    except errors.UserError:
      stable = sum(name.upper().startswith('ENS') for name in found)
      if stable < 0.95 * len(found):
        raise
      species = 'both'
  if species == 'both':  # every species of the table
    row_N, report = names.rows(found, 0, genes)
    reports = [report]
    for code in range(1, len(genes.species)):
      more_N, more = names.rows(found, code, genes)
      row_N = np.where(row_N < 0, more_N, row_N)
      reports.append(more)
    if (row_N >= 0).mean() < 0.2:
      names.check_known(path, report)
  else:
    row_N, report = names.rows(
      found, names.species_code(species, genes.species), genes
    )
    reports = [report]
    names.check_known(path, report)
  known = np.flatnonzero(row_N >= 0)
  rows, place = np.unique(row_N[known], return_inverse=True)
  total = np.zeros((len(rows), vectors.shape[1]))
  np.add.at(total, place, vectors[known])
  total /= np.bincount(place)[:, None]
  facts = {
    'rows': len(found),
    'rows_lost': int(len(found) - len(known)),
    'rows_averaged_into_others': int(len(known) - len(rows)),
    'identifiers': reports,
  }
  return rows, total, facts


def with_orthologues(
  rows: np.ndarray, vectors: np.ndarray, genes: gene_table.GeneTable
) -> tuple[np.ndarray, np.ndarray, int]:
  """Adds one-to-one orthologues that have no vector of their own.

  Returns:
    Rows, vectors, and how many are lifted; they come last.
  """
  partner_N = names.orthologue_rows(genes)[rows]
  new = np.flatnonzero((partner_N >= 0) & ~np.isin(partner_N, rows))
  return (
    np.concatenate([rows, partner_N[new]]),
    np.concatenate([vectors, vectors[new]]),
    len(new),
  )


def _frame(path: paths.PathLike, lower: str) -> pd.DataFrame:
  if not lower.endswith('.parquet'):
    return files.table(path)
  try:
    data = paths.read_bytes(path)
    return pyarrow.parquet.read_table(io.BytesIO(data)).to_pandas()
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such file') from None
  except (OSError, pyarrow.ArrowException) as error:
    raise errors.UserError(
      f'{path}: not parquet ({errors.first_line(error)})'
    ) from None


def _from_frame(path, frame: pd.DataFrame, gene_column: str):
  if gene_column:
    (column,) = files.columns(path, frame, [gene_column])
  else:
    lists = [c for c in frame if str(c).lower() in _VECTORS]
    column = next(
      (
        c
        for c in frame
        if c not in lists and pd.to_numeric(frame[c], 'coerce').isna().all()
      ),
      frame.columns[0],
    )
    if frame.index.dtype == object and isinstance(frame.index[0], str):
      frame = frame.reset_index(names='_index')
      column = '_index'
  rest = frame.drop(columns=[column])
  lists = [c for c in rest if str(c).lower() in _VECTORS]
  try:
    if lists and rest[lists[0]].dtype == object:
      vectors = np.array(rest[lists[0]].tolist(), np.float64)
    else:
      rest = rest.apply(pd.to_numeric, errors='coerce')
      rest = rest.loc[:, rest.notna().any()]  # columns of other text
      vectors = rest.to_numpy(np.float64)
  except (ValueError, TypeError) as error:
    raise errors.UserError(
      f'{path}: no vectors of one width ({errors.first_line(error)})'
    ) from None
  return frame[column].astype(str).tolist(), vectors


def _npz(path, gene_column):
  try:
    data = paths.read_bytes(path)
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in archive.files}
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such file') from None
  except (
    *(ValueError, OSError, zipfile.BadZipFile, EOFError, zlib.error),
    *(MemoryError, RuntimeError),  # sizes that cannot be, a password
  ) as error:
    raise errors.UserError(
      f'{path}: not an npz of plain arrays ({errors.first_line(error)}); save '
      'names as an array of str, not of objects'
    ) from None
  texts = [n for n, a in arrays.items() if a.dtype.kind in 'US']
  texts.sort(key=lambda n: n not in _GENES)
  tables = [
    n for n, a in arrays.items() if a.ndim == 2 and a.dtype.kind in 'fiu'
  ]
  if gene_column and gene_column not in arrays or not texts or not tables:
    raise errors.UserError(
      f'{path}: give an array of names and one of vectors; it has: '
      + ', '.join(f'{n} {a.dtype}{list(a.shape)}' for n, a in arrays.items())
    )
  found = arrays[gene_column or texts[0]].astype(str).tolist()
  return found, arrays[tables[0]].astype(np.float64)


def _word2vec(path):
  found, rows, width = [], [], 0
  for number, line in enumerate(raw_files.lines(path), 1):
    parts = line.split()
    if number == 1 and len(parts) == 2 and all(p.isdigit() for p in parts):
      continue  # the header: words and width
    if not parts:
      continue
    try:
      row = np.array(parts[1:], np.float64)
    except ValueError:
      raise errors.UserError(
        f'{path} line {number}: a name, then numbers, are expected'
      ) from None
    width = width or len(row)
    if len(row) != width or not width:
      raise errors.UserError(
        f'{path} line {number}: {len(row)} numbers where others have {width}'
      )
    found.append(parts[0])
    rows.append(row)
  return found, np.array(rows)
