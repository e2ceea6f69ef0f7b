"""Ties by hash tell nothing about a hidden gene; ties by token tell it.

Two models learn the same cells of independent genes, with the configuration of
experiments/tie_leak.py cut short (one block, 250 steps). Nothing but the encoding can beat counting
there. Loss differences are taken cell by cell: held-out cells and their masks
are the same under both tie rules.
"""

import functools
import pathlib
import runpy

import jax
import numpy as np
import pytest

from genecompass_jax import (
  config_values,
  corpus as corpus_lib,
  data,
  main,
  nulls,
  pretrained,
  scoring,
  workdir,
)
from genecompass_jax.prepare import simulated
from genecompass_jax.training import train_config

# 60 CPU seconds for both models; 0.5 nats of leak against 0.035 of error.
NUM_CELLS = 3000
STEPS = 250
CONFIG = pathlib.Path(__file__).parents[1] / 'experiments' / 'tie_leak.py'


def train_and_score(corpus_path: str, folder, variant: str):
  """Held-out id losses [cells] (sums), of model and bracket, and slots."""
  values = runpy.run_path(str(CONFIG))['get_config'](variant).to_dict()
  values['corpus'] = corpus_path
  values['model']['num_layers'] = 1
  values['optimizer'] |= {
    'total_steps': STEPS,
    'learning_rate': 6e-3,
    'warmup_steps': 20,
  }
  values['eval_every'] = STEPS
  main.run(values, folder)
  del values['simulated_cells']
  config = config_values.to_dataclass(train_config.TrainConfig, values)
  model = pretrained.load(folder)
  null_models = nulls.NullModels.load(folder / workdir.NULLS)
  slot_losses = jax.jit(
    functools.partial(scoring.slot_losses, config=model.config)
  )
  corpus = corpus_lib.Corpus.open(corpus_path)
  sums_3C = np.zeros((3, corpus.num_cells('validation')))
  for host_batch in data.evaluation_batches(
    corpus, config.encoding, config.data
  ):
    cells_B = host_batch.cell_index_BS[:, 0]
    batch = host_batch.batch
    id_BK, _ = slot_losses(model.params, batch, model.assets.knowledge)
    null_BK = null_models.losses(host_batch)['null_id_rank_bracket']
    columns = np.asarray(id_BK), null_BK, np.ones_like(null_BK)
    for sums_C, column_BK in zip(sums_3C, columns):
      sums_B = (column_BK * batch.id_weights_BK).sum(1)
      sums_C[cells_B[cells_B >= 0]] += sums_B[cells_B >= 0]
  return sums_3C


def mean_and_error(sums_C, slots_C):
  """Mean a slot and its standard error, cells being the units."""
  mean = sums_C.sum() / slots_C.sum()
  rest_C = sums_C - mean * slots_C
  return mean, np.sqrt((rest_C**2).sum()) / slots_C.sum()


@pytest.fixture(scope='module')
def scores(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tie_leak')
  path = simulated.independent_corpus(folder, NUM_CELLS)
  return {
    ties: train_and_score(path, folder / ties, variant)
    for ties, variant in (('hash', ''), ('token', 'token'))
  }


@pytest.mark.slow  # 30 s: it trains
def test_hashed_ties_do_not_beat_counting(scores):
  model_C, bracket_C, slots_C = scores['hash']
  gain, error = mean_and_error(bracket_C - model_C, slots_C)
  print(f'hash: bracket - model = {gain:.3f} +- {error:.3f} nats')
  assert gain <= 2 * error


@pytest.mark.slow  # 30 s: it trains
def test_token_ties_tell_the_hidden_gene(scores):
  model_C, _, slots_C = scores['token']
  _, honest_C, honest_slots_C = scores['hash']
  np.testing.assert_array_equal(slots_C, honest_slots_C)
  gain, error = mean_and_error(honest_C - model_C, slots_C)
  print(f'token: hash bracket - model = {gain:.3f} +- {error:.3f} nats')
  assert gain > max(5 * error, 0.2)
