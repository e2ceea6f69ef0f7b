"""A small model in minutes: what the demo and the notebooks train."""

from collections.abc import Sequence

import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  data,
  encoding,
  model as model_lib,
  optimizer,
  packing,
  paths,
  pretrained,
  train,
)
from genecompass_jax.training import train_config

STEPS = 5000  # of cells of up to SHORT slots; of longer ones in proportion
SHORT = 384
EVALUATIONS = 10  # during training, on so many held-out cells
EVALUATION_CELLS = 384
LONGEST = 512  # slots: longer cells keep their highest ranks


def default_steps(corpus: corpus_lib.Corpus) -> int:
  """Updates that take about as long for cells of any length."""
  _, max_genes = _lengths(corpus)
  return STEPS * SHORT // max(max_genes + 1, SHORT)


def _lengths(corpus: corpus_lib.Corpus) -> tuple[np.ndarray, int]:
  """Genes of every training cell, and how many of them are kept."""
  lengths_C = np.concatenate([s.length_N for s in corpus.stores('train')])
  # The longest hundredth of the cells may lose their lowest ranks. Two shapes
  # of batches waste little then; each costs seconds to compile.
  longest = 64 * -(-(int(np.quantile(lengths_C, 0.99)) + 1) // 64)
  return lengths_C, min(longest, LONGEST) - 1


def config(
  corpus: corpus_lib.Corpus,
  *,
  steps: int = 0,
  seed: int = 0,
  source_weights: Sequence[tuple[str, float]] = (),
) -> train_config.TrainConfig:
  """A run of minutes on two CPU cores, fitted to the cells of a corpus.

  Args:
    corpus: an open corpus.
    steps: updates of four cells each; 0 takes `default_steps`.
    seed: of initial parameters, order of cells and masks.
    source_weights: (source, times its cells are seen in an epoch).
  """
  lengths_C, max_genes = _lengths(corpus)
  steps = steps or default_steps(corpus)
  return train_config.TrainConfig(
    corpus=corpus.path,
    model=model_lib.ModelConfig(
      **{**model_lib.SIZES['tiny'], 'num_heads': 2},
      max_genes=max_genes,
      hidden_dropout=0.1,
      attention_dropout=0.0,
    ),
    # Few cells and little time: small batches, a high rate, and gene
    # frequencies given rather than learned.
    optimizer=optimizer.OptimizerConfig(
      learning_rate=3e-3,
      warmup_steps=min(100, steps // 4),
      total_steps=steps,
      b2=0.99,
    ),
    data=data.DataConfig(
      rows_per_batch=4,
      streams=4,
      layout=packing.BUCKETS,
      buckets=packing.choose_buckets(lengths_C, max_genes, 2),
      seed=seed,
      source_weights=tuple(source_weights),
    ),
    encoding=encoding.EncodingConfig(max_genes=max_genes),
    seed=seed,
    id_bias='frequency',
    log_every=max(steps // 60, 1),
    eval_every=max(steps // EVALUATIONS, 1),
    eval_cells=EVALUATION_CELLS,
    checkpoint_every=max(steps // 3, 1),
    keep_checkpoints=2,
  )


def pretrain(
  corpus: corpus_lib.Corpus | paths.PathLike,
  workdir: paths.PathLike,
  *,
  steps: int = 0,
  seed: int = 0,
  source_weights: Sequence[tuple[str, float]] = (),
) -> pretrained.PretrainedModel:
  """Trains a tiny model on a corpus, or goes on with the run in `workdir`.

  For anything larger: `python -m genecompass_jax.main`.

  Args:
    corpus: an open corpus, or its folder.
    workdir: folder of the run: metrics.jsonl, checkpoints, assets.
    steps: updates of four cells each; 0 takes `default_steps`.
    seed: of initial parameters, order of cells and masks.
    source_weights: (source, times its cells are seen in an epoch).

  Returns:
    The model, restored from the last checkpoint.

  Raises:
    UserError: the workdir holds another run.
    RetryableError: it was stopped; the same call goes on.
  """
  if not isinstance(corpus, corpus_lib.Corpus):
    corpus = corpus_lib.Corpus.open(corpus)
  run = config(corpus, steps=steps, seed=seed, source_weights=source_weights)
  train.train_and_evaluate(run, workdir)
  return pretrained.load(workdir)
