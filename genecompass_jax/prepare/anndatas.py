"""From annotated cells to a corpus, and back to those it held out."""

import dataclasses
import os
import warnings
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from genecompass_jax import corpus as corpus_lib, errors, paths, vocabulary
from genecompass_jax.prepare import matrices, pipeline, sources
from genecompass_jax.prepare.readers import formats

Cells = anndata.AnnData | paths.PathLike


def build_corpus(
  cells: Cells | Sequence[Cells],
  folder: paths.PathLike,
  *,
  species: str = 'auto',
  ids_of: str = '',
  layer: str = '',
  unit: str = '',
  obs: Sequence[str] = (),
  genes: str = 'measured',
  validation_share: float = 0.1,
  allow_noninteger: bool = False,
  seed: int = 0,
  overwrite: bool = False,
) -> corpus_lib.Corpus:
  """Builds a corpus of AnnData objects or files: the short form of `prep`.

  Args:
    cells: one or several, with counts in X, raw or a layer.
    folder: of the corpus.
    species: `human`, `mouse`, `auto` or `obs:COLUMN`.
    ids_of: `human` or `mouse`, where the identifiers are of that species.
    layer: `X`, `raw` or `layers/NAME`; '' takes what looks like counts.
    unit: obs column (donor, study) that is never split; `cell` splits single
      cells, and the corpus is marked leaky.
    obs: further obs columns to carry.
    genes: vocabulary: `measured`, `default` (all genes) or a file.
    validation_share: share of cells to hold out.
    allow_noninteger: take corrected counts as they are.
    seed: of the order and of what is held out.
    overwrite: replace a corpus that is there.

  Raises:
    UserError: as `pipeline.prepare`.
  """
  if isinstance(cells, anndata.AnnData | str | os.PathLike):
    cells = [cells]
  return pipeline.prepare(
    [
      open_cells(
        each,
        sources.SourceConfig(
          species=species,
          ids_of=ids_of,
          layer=layer,
          unit=unit,
          obs=tuple(obs),
          allow_noninteger=allow_noninteger,
        ),
      )
      for each in cells
    ],
    folder,
    pipeline.PrepareConfig(
      vocabulary=genes,
      validation_share=validation_share,
      seed=seed,
      overwrite=overwrite,
    ),
  )


def open_cells(cells: Cells, config: sources.SourceConfig) -> sources.Source:
  """Opens an AnnData or a file of any format under one configuration."""
  if isinstance(cells, anndata.AnnData):
    return sources.from_anndata(cells, config)
  return sources.open_source(dataclasses.replace(config, path=os.fspath(cells)))


def held_out_cells(
  corpus: corpus_lib.Corpus,
  cells: Cells,
  *,
  source: str = '',
  split: str = 'validation',
  max_cells: int = 0,
) -> anndata.AnnData:
  """The cells of a source that a corpus kept out of training.

  Args:
    corpus: an open corpus.
    cells: what its source was made of; of a file only these cells are read.
    source: name of the source; may be '' where there is one.
    split: `validation`, `test`, or `train` for the others.
    max_cells: an evenly spaced part; 0 for all.

  Returns:
    A copy, in the order of `cells`.

  Raises:
    UserError: no such source, or none of its cells are in that split.
  """
  names = [facts['name'] for facts in corpus.manifest['sources']]
  if not source and len(names) == 1:
    source = names[0]
  if source not in names:
    raise errors.UserError(
      f'{corpus.path}: no source {source!r}; there are: {", ".join(names)}'
    )
  rows = []
  for store in corpus.stores(split):
    code = store.categories('source').index(source)
    rows.append(store.obs('source_row')[store.obs('source') == code])
  rows = np.sort(np.concatenate(rows)) if rows else np.zeros(0, np.int64)
  if not len(rows):
    raise errors.UserError(
      f'{corpus.path}: holds no {split} cells of {source}; build it with a '
      'validation share and a unit to hold out'
    )
  if max_cells and len(rows) > max_cells:
    rows = rows[np.arange(max_cells) * len(rows) // max_cells]
  if isinstance(cells, anndata.AnnData):
    return cells[rows].copy()
  config = sources.SourceConfig(os.fspath(cells))
  if formats.find_format(config) != 'h5ad':
    return _rows_of(sources.open_source(config), rows)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # files of older versions
    backed = anndata.read_h5ad(cells, backed='r')
    try:
      return backed[rows].to_memory()
    finally:
      backed.file.close()


def _rows_of(source: sources.Source, rows: np.ndarray) -> anndata.AnnData:
  """Some cells of a source that is no h5ad file."""
  part = matrices.Selected(source.matrix.by_rows(), rows)
  return anndata.AnnData(
    part.read(0, len(rows)),
    source.obs.iloc[rows].copy(),
    pd.DataFrame(index=list(source.names)),
  )


def token_counts(
  cells: Cells, vocab: vocabulary.Vocabulary, config: sources.SourceConfig
) -> scipy.sparse.csr_matrix:
  """Counts as a model with this vocabulary sees them, [C, V] by token."""
  stream = sources.cells_of(cells, vocab, config)
  cell_N, token_N, count_N = [], [], []
  for chunk in stream.chunks():
    lengths_C = np.diff(chunk.cells.starts_C1)
    cell_N.append(np.repeat(chunk.index_C, lengths_C))
    token_N.append(stream.tokens(chunk.species)[chunk.cells.gene_rows_N])
    count_N.append(chunk.cells.counts_N)
  return scipy.sparse.csr_matrix(
    (
      np.concatenate(count_N).astype(np.float64),
      (np.concatenate(cell_N), np.concatenate(token_N)),
    ),
    shape=(stream.source.num_cells, vocab.size),
  )
