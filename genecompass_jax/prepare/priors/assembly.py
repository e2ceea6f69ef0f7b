"""Vectors -> the files of a prior, with everything that is said of it."""

import os
import platform
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow
import scipy

import genecompass_jax
from genecompass_jax import (
  errors,
  paths,
  prior_tables,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.prepare.priors import pairs as pairs_lib


def write(
  path: paths.PathLike,
  rows_N: np.ndarray,
  vectors_NP: np.ndarray,
  vocab: vocabulary_lib.Vocabulary,
  kind: str,
  parameters: Mapping,
  sources: Sequence[Mapping],
  seed: int = 0,
  pairs: pairs_lib.Pairs | None = None,
  **more: object,
) -> dict:
  """Writes a prior; the same content gives the same bytes.

  Args:
    path: NAME.parquet.
    rows_N: rows of the vocabulary's gene table, all different.
    vectors_NP: a vector for each.
    vocab: the genes, and what coverage is counted over.
    kind: what the prior is about.
    parameters: of the build.
    sources: facts of every file read, with what was lost.
    seed: of everything random.
    pairs: what was embedded; kept beside the table.
    **more: further facts, such as `held_out`.

  Returns:
    The facts as written.
  """
  order = np.argsort(rows_N)
  rows_N, vectors_NP = rows_N[order], vectors_NP[order]
  if not str(path).endswith(prior_tables.ENDING):
    raise errors.UserError(
      f'{path}: the name of a prior ends in {prior_tables.ENDING}'
    )
  facts = {
    'kind': kind,
    'parameters': dict(parameters),
    'seed': seed,
    'sources': list(sources),
    'coverage': coverage(rows_N, vocab),
    'width': int(vectors_NP.shape[1]),
    'norms': norms(vectors_NP),
    'vocabulary_sha256': vocab.sha256,
    'versions': versions(),
    **{name: value for name, value in more.items() if value},
  }
  if pairs is not None:
    place = prior_tables.pairs_file(path)
    facts['pairs'] = pairs_lib.write(place, pairs, vocab.genes)
  gene_ids = [vocab.genes.gene_ids[g] for g in rows_N]
  return prior_tables.write(path, gene_ids, vectors_NP, facts)


def coverage(
  rows_N: np.ndarray, vocab: vocabulary_lib.Vocabulary
) -> dict[str, dict]:
  """Genes with a vector, of all and of the protein-coding, by species."""
  has_G = np.zeros(len(vocab.genes), bool)
  has_G[rows_N] = True
  coding_G = np.array([b == 'protein_coding' for b in vocab.genes.biotypes])
  found = {}
  for s, name in enumerate(vocab.species):
    mine_G = vocab.genes.species_G == s
    found[name] = {
      'with_vector': int((has_G & mine_G).sum()),
      'genes': int(mine_G.sum()),
      'share': round(float(has_G[mine_G].mean()), 4) if mine_G.any() else 0.0,
      'coding_with_vector': int((has_G & mine_G & coding_G).sum()),
      'coding': int((mine_G & coding_G).sum()),
    }
  return found


def norms(vectors_NP: np.ndarray) -> dict[str, float]:
  """Mean, spread and quantiles of the lengths of vectors."""
  norm_N = np.sqrt(np.square(vectors_NP, dtype=np.float64).sum(1))
  values = {'mean': norm_N.mean(), 'sd': norm_N.std()}
  for share in (0, 5, 25, 50, 75, 95, 100):
    values[f'q{share}'] = np.percentile(norm_N, share)
  return {name: float(f'{value:.5g}') for name, value in values.items()}


def versions() -> dict[str, str]:
  """What made the table; bytes may differ between versions."""
  return {
    'genecompass_jax': genecompass_jax.__version__,
    'numpy': np.__version__,
    'scipy': scipy.__version__,
    'pyarrow': pyarrow.__version__,
    'python': platform.python_version(),
  }


def load_vocabulary(path: str) -> vocabulary_lib.Vocabulary:
  """A vocabulary file, or the default one for ''."""
  if not path or path == 'default':
    return vocabulary_lib.Vocabulary.default()
  return vocabulary_lib.Vocabulary.load(path)


def check_output(path: str, overwrite: bool) -> None:
  """Refuses a name that is taken or does not end in .parquet.

  Raises:
    UserError: one of both.
  """
  if not path.endswith(prior_tables.ENDING):
    raise errors.UserError(
      f'{path}: the name of a prior ends in {prior_tables.ENDING}'
    )
  if paths.exists(path) and not overwrite:
    raise errors.UserError(f'{path} is there already; give --overwrite')


def name_of(path: str) -> str:
  """The name of a prior: that of its file."""
  return os.path.basename(path).removesuffix(prior_tables.ENDING)
