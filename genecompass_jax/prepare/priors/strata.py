"""Genes that are alike in species and expression: what controls permute."""

import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  encoding,
  errors,
  gene_table,
  paths,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.prepare.priors import files, names

DECILES = 10


def expression(
  path: paths.PathLike, vocab: vocabulary_lib.Vocabulary
) -> np.ndarray:
  """float64 [G]: how much each gene is expressed; nan where unknown.

  Args:
    path: a corpus: training cells that express the gene; or a table of two
      columns, gene and value.
    vocab: the genes.

  Raises:
    UserError: neither, a value that is no number, or none of a known gene.
  """
  value_G = np.full(len(vocab.genes), np.nan)
  if paths.exists(paths.join(path, 'manifest.json')):
    opened = corpus_lib.Corpus.open(path)
    medians = opened.medians(encoding.LIBRARY)
    row_of = vocab.genes.row_of
    for s in range(len(gene_table.SPECIES)):
      support = medians.support_SV[s][opened.tokens(s)]
      if not support.any():
        continue
      for gene, number in zip(opened.gene_ids(s), support.tolist()):
        if gene in row_of:
          value_G[row_of[gene]] = number
    return value_G
  if not paths.exists(path):
    raise errors.UserError(f'{path}: no such corpus or table of expression')
  frame = files.table(path)
  if frame.shape[1] < 2:
    raise errors.UserError(f'{path}: give two columns, gene and value')
  for s in range(len(gene_table.SPECIES)):
    row_N, _ = names.rows(frame.iloc[:, 0], s, vocab.genes)
    for row, text in zip(row_N, frame.iloc[:, 1]):
      if row >= 0:
        try:
          value_G[row] = float(text)
          if np.isinf(value_G[row]):
            raise ValueError
        except ValueError:
          raise errors.UserError(
            f'{path}: the value {text!r} is no number'
          ) from None
  if not (value_G > 0).any():
    raise errors.UserError(
      f'{path}: no gene that is known has a value above 0 (columns: '
      f'{", ".join(map(str, frame.columns[:2]))}); give gene and value'
    )
  return value_G


def of(
  rows_N: np.ndarray, value_G: np.ndarray | None, genes: gene_table.GeneTable
) -> np.ndarray:
  """Stratum of each gene: species times decile of expression.

  Deciles are those of the genes given, so that all hold about as many. Genes
  that are not expressed, or not known to be, are a stratum of their own.
  """
  species_N = genes.species_G[rows_N].astype(np.int64)
  decile_N = np.full(len(rows_N), DECILES)
  for s in range(len(gene_table.SPECIES)) if value_G is not None else ():
    mine = np.flatnonzero((species_N == s) & (value_G[rows_N] > 0))
    # Equal values are ordered by place, which says nothing about a gene.
    order = np.argsort(value_G[rows_N[mine]], kind='stable')
    decile_N[mine[order]] = np.arange(len(mine)) * DECILES // max(len(mine), 1)
  return species_N * (DECILES + 1) + decile_N


def permutation(strata_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A random order of all places that keeps the stratum of every place."""
  to = np.argsort(strata_N, kind='stable')
  order = np.lexsort((rng.random(len(strata_N)), strata_N))
  found = np.empty(len(strata_N), np.int64)
  found[to] = order
  return found
