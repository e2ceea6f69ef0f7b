"""A tiny model on one's own cells, on a laptop.

Reproduces: nothing; it is the shortest way to see a run from corpus to
checkpoint.

  genecompass prep cells.h5ad -o CORPUS --vocabulary measured
  python -m genecompass_jax.main --config=experiments/tiny.py \
      --workdir=DIR --config.corpus=CORPUS

Hardware: two CPU cores. Time: about 2 minutes for cells of 300 genes. Time grows
with genes a cell and with tokens: blood cells of 9,015 measured genes took 4.5 s a
step, with the whole vocabulary of 96,828 tokens 15 s (beside other work). Keep
`--vocabulary measured`, and cut cells with
--config.encoding.max_genes=511 or use smaller batches (data.rows_per_batch=8).
Expected: the held-out id loss falls below the marginal null within the run.
Variants: `:split` asks ids of some genes and values of others, so that the
order of ranks does not give the values away (docs/objectives.md); `:smoke`
simulates 400 cells and trains 8 steps (20 s).
Any config takes the same choices by its flags:
--config.data.mask.objective=split, --config.encoding.mode=library.
"""

import ml_collections

from genecompass_jax import model


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The configuration; see the top of the file for the variants."""
  config = ml_collections.ConfigDict()
  config.corpus = ''
  config.simulated_cells = 0
  config.seed = 0
  config.model = {
    'vocabulary_size': 0,  # taken from the corpus
    **model.SIZES['tiny'],
    'attention_dropout': 0.0,
  }
  config.optimizer = {
    'learning_rate': 1e-3,
    'warmup_steps': 50,
    'total_steps': 600,
  }
  config.loss = {}  # weights of the two terms: those of the release
  config.encoding = {'mode': 'released', 'max_genes': 2048}
  config.data = {
    'layout': 'buckets',
    'buckets': (),  # those that pad the cells of the corpus least
    'mask': {},  # rates and policy: the default
    'rows_per_batch': 32,
    'seed': 0,
  }
  config.mesh = {'data': -1, 'fsdp': 1}
  config.guard = {}  # losses that are not finite, spikes, hangs: the default
  config.log_every = 10
  config.eval_every = 200
  config.eval_cells = 512
  config.checkpoint_every = 200
  config.keep_checkpoints = 2
  if variant == 'split':
    config.data.mask.objective = 'split'
  elif variant == 'smoke':
    config.corpus = 'simulated'
    config.simulated_cells = 400
    config.optimizer.total_steps = 8
    config.optimizer.warmup_steps = 2
    config.data.rows_per_batch = 8
    config.log_every = 1
    config.eval_every = 4
    config.eval_cells = 32
    config.checkpoint_every = 4
  elif variant:
    raise ValueError(f'{variant=}: give none, split or smoke')
  return config
