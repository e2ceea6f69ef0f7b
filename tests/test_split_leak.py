"""Under `split` neither rank nor value can be learned from the encoding.

A model learns cells of independent genes, with the configuration of
experiments/tie_leak.py cut short. Nothing but the encoding can beat counting
there. Under `released` the order of ranks gives the values away, in the same
cells and as many steps: the control.
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
from tests import test_tie_leak

NUM_CELLS = 3000
STEPS = 400
pytestmark = pytest.mark.slow  # two models, about 90 CPU seconds together
CONFIG = pathlib.Path(__file__).parents[1] / 'experiments' / 'tie_leak.py'


def train_and_score(corpus_path: str, folder, objective: str):
  """{'id' or 'value': {name: sums [cells]}} of model, nulls and slots."""
  values = runpy.run_path(str(CONFIG))['get_config']().to_dict()
  values['corpus'] = corpus_path
  values['model']['num_layers'] = 1
  values['optimizer'] |= {
    'total_steps': STEPS,
    'learning_rate': 6e-3,
    'warmup_steps': 20,
  }
  values['loss'] = {'id_weight': 1.0, 'value_weight': 1.0}
  values['data']['mask'] = {'objective': objective}
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
  num_cells = corpus.num_cells('validation')
  found = {'id': {}, 'value': {}}
  for host_batch in data.evaluation_batches(
    corpus, config.encoding, config.data
  ):
    cells_B = host_batch.cell_index_BS[:, 0]
    batch = host_batch.batch
    id_BK, value_BK = slot_losses(model.params, batch, model.assets.knowledge)
    columns = null_models.losses(host_batch)
    for kind, model_BK in (('id', id_BK), ('value', value_BK)):
      weights_BK = getattr(batch, f'{kind}_weights_BK')
      mine = {n: v for n, v in columns.items() if n.split('_')[1] == kind}
      mine |= {'model': np.asarray(model_BK), 'slots': np.ones_like(weights_BK)}
      for name, column_BK in mine.items():
        sums_C = found[kind].setdefault(name, np.zeros(num_cells))
        sums_B = (column_BK * weights_BK).sum(1)
        sums_C[cells_B[cells_B >= 0]] += sums_B[cells_B >= 0]
  return found


@pytest.fixture(scope='module')
def scores(tmp_path_factory):
  folder = tmp_path_factory.mktemp('split_leak')
  path = simulated.independent_corpus(folder, NUM_CELLS)
  return {
    objective: train_and_score(path, folder / objective, objective)
    for objective in ('split', 'released')
  }


def gain_over_strongest(sums):
  """Strongest null minus model, its error, and the null's name and mean."""
  names = [name for name in sums if name.startswith('null_')]
  name = min(names, key=lambda n: sums[n].sum())
  gain, error = test_tie_leak.mean_and_error(
    sums[name] - sums['model'], sums['slots']
  )
  return gain, error, name, sums[name].sum() / sums['slots'].sum()


@pytest.mark.parametrize('kind', ['id', 'value'])
def test_nothing_beats_counting_where_genes_are_independent(scores, kind):
  gain, error, name, mean = gain_over_strongest(scores['split'][kind])
  print(f'{kind}: {name} {mean:.4f} - model = {gain:.4f} +- {error:.4f}')
  assert gain <= 2 * error
  assert gain > -0.15 * mean  # and the model has learned what counting knows


def test_ranks_give_values_away_under_released(scores):
  sums = scores['released']['value']
  gain, error = test_tie_leak.mean_and_error(
    sums['null_value_gene_mean'] - sums['model'], sums['slots']
  )
  mean = sums['null_value_gene_mean'].sum() / sums['slots'].sum()
  print(f'released: gene mean {mean:.4f} - model = {gain:.4f} +- {error:.4f}')
  assert gain > max(5 * error, 0.3 * mean)
