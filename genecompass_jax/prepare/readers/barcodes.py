"""What 10x files say of their features: kinds, genomes, species."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from genecompass_jax import errors
from genecompass_jax.prepare import matrices, source_config
from genecompass_jax.prepare.readers import opened

GENES = 'Gene Expression'
OWN_SHARE = 0.9  # of a cell's counts, for it to be one of that genome
_PREFIXED = re.compile(
  r'(?:((?:hg|mm|GRCh|GRCm)\d+)_+(.+)|'
  r'([A-Za-z][\w.-]*?)_+(ENS(?:MUS)?G\d{11}.*))'
)
_MOST_GENOMES = 4  # more are no genomes: symbols before ids, SYMBOL_ENSG...


def of_matrix(
  config: source_config.SourceConfig,
  matrix: matrices.Matrix,
  barcodes: Sequence[str],
  features: pd.DataFrame,
  files: tuple[str, ...],
) -> opened.Opened:
  """Cells of a 10x matrix: its genes, and the cells of one genome.

  Args:
    config: names the genome, where there are several.
    matrix: barcodes x features.
    barcodes: names of the rows.
    features: `id`, `gene_name`, and maybe `feature_type` and `genome`.
    files: that were read.

  Raises:
    UserError: no genes among the features, several genomes and none named, or
      no cell of the one that is named.
  """
  path = config.path
  notes = []
  is_gene = np.ones(len(features), bool)
  if 'feature_type' in features:
    kinds = features['feature_type']
    is_gene = (kinds == GENES).to_numpy()
    others = kinds[~is_gene].value_counts()
    if not is_gene.any():
      raise errors.UserError(
        f'{path}: no features of type {GENES!r}; there are: '
        + (', '.join(map(str, others.index)) or 'none')
      )
    if len(others):
      left = ', '.join(f'{n:,} of {kind}' for kind, n in others.items())
      notes.append(f'features left out: {left}')
  genomes, ids = genomes_of(features)
  names = sorted(set(genomes[is_gene]) - {''})
  rows = None
  var = pd.DataFrame({'gene_name': features['gene_name'].to_numpy()}, index=ids)
  if config.genome and names and config.genome not in names:
    raise errors.UserError(
      f'{path}: no genome {config.genome!r}; there are: {", ".join(names)}'
    )
  if len(names) > 1:
    if not config.genome:
      raise errors.UserError(
        f'{path}: holds genomes {", ".join(names)}; read one with --genome '
        f'{names[0]}'
      )
    code_of = {name: i for i, name in enumerate(names)}
    codes = np.array([code_of.get(g, -1) for g in genomes])
    codes[~is_gene] = -1
    own = code_of[config.genome]
    sums_CG = _sums(matrix, codes, len(names))
    share_C = sums_CG[:, own] / np.maximum(sums_CG.sum(axis=1), 1)
    rows = np.flatnonzero(share_C >= OWN_SHARE)
    if not len(rows) and len(barcodes):
      others = ' or '.join(n for n in names if n != config.genome)
      raise errors.UserError(
        f'{path}: no cell has {OWN_SHARE:.0%} of its counts on {config.genome}; '
        f'read {others} alone with --genome'
      )
    notes.append(
      f'{len(rows):,} of {len(barcodes):,} cells have {OWN_SHARE:.0%} of their '
      f'counts or more on {config.genome}; the others are left out'
    )
    is_gene &= codes == own
    symbols = var['gene_name'].astype(str)
    prefix = rf'^{re.escape(config.genome)}_+'
    var['gene_name'] = symbols.str.replace(prefix, '', regex=True)
  obs = pd.DataFrame(index=pd.Index(list(barcodes), dtype=object))
  columns = None if is_gene.all() else np.flatnonzero(is_gene)
  if rows is not None or columns is not None:
    matrix = matrices.Selected(matrix, rows, columns)
    obs = obs if rows is None else obs.iloc[rows]
    var = var[is_gene]
  return opened.Opened(obs, {'X': (matrix, var)}, files, notes=tuple(notes))


def genomes_of(features: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
  """Genome of every feature ('' where it is not said), and ids without it."""
  ids = features['id'].astype(str).to_numpy(object)
  matches = [_PREFIXED.fullmatch(name) for name in ids]
  parts = [(m[1] or m[3], m[2] or m[4]) if m else ('', '') for m in matches]
  told = np.array([genome for genome, _ in parts], object)
  bare = np.array([rest or name for (_, rest), name in zip(parts, ids)], object)
  if 'genome' in features:
    genomes = features['genome'].astype(str).to_numpy(object)
    return genomes, bare if len(set(genomes) - {''}) > 1 else ids
  if len(set(told) - {''}) > _MOST_GENOMES:
    return np.full(len(ids), '', object), ids
  return told, bare


def _sums(
  matrix: matrices.Matrix, codes: np.ndarray, num_groups: int
) -> np.ndarray:
  """Counts of every row by groups of columns, [C, groups]; code -1 is none."""
  sums_CG = np.zeros((matrix.shape[0], num_groups))
  if hasattr(matrix, 'entries'):  # of a text, which is read through but once
    for entries in matrix.entries():
      code = codes[entries['column']]
      known = code >= 0
      np.add.at(
        sums_CG, (entries['row'][known], code[known]), entries['value'][known]
      )
    return sums_CG
  for first in range(0, matrix.shape[0], matrices.CHUNK_CELLS):
    stop = min(first + matrices.CHUNK_CELLS, matrix.shape[0])
    rows = matrix.read(first, stop)
    for group in range(num_groups):
      part = rows[:, np.flatnonzero(codes == group)]
      sums_CG[first:stop, group] = np.asarray(part.sum(axis=1)).ravel()
  return sums_CG
