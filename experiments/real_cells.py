"""`small` on real cells of human and mouse: what a real run gives.

Reproduces: nothing published; it asks what 48 CPU-minutes of pretraining on
about 10,000 real cells of both species are worth against counting predictors.

  python data_prep/real_cells.py --data FOLDER -o CORPUS
  python -m genecompass_jax.main --config=experiments/real_cells.py \
      --workdir=DIR --config.corpus=CORPUS

Hardware: two CPU cores, 3 GB. Time: 48 CPU-minutes (measured).
Expected score: experiments/README.md has the run, by study and species.
Cells keep their 255 highest ranks (256 slots with CLS), and the bias of the id
head starts at the log frequencies: with 512 ranks and zeros, 160 updates took
as long and were a nat above the marginal null. Panels of few genes count half
(kang_muscat, MERFISH) or a quarter (Perturb-FISH controls, 277 genes).
Variants: `:smoke` simulates 400 cells, width 64, 4 steps (under a minute).
"""

import ml_collections

from genecompass_jax import model


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The configuration; see the top of the file for the variants."""
  config = ml_collections.ConfigDict()
  config.corpus = ''
  config.simulated_cells = 0
  config.seed = 0
  config.id_bias = 'frequency'
  config.model = {
    'vocabulary_size': 0,  # taken from the corpus
    **model.SIZES['small'],
    'max_genes': 255,
    'hidden_dropout': 0.02,
    'attention_dropout': 0.0,  # random bits of [H, L, L] cost a fifth here
  }
  config.optimizer = {
    'learning_rate': 8e-4,
    'warmup_steps': 200,
    'total_steps': 2200,
  }
  # By the release's 0.2 and 0.8 the value term fills the clipped gradient for
  # hundreds of steps: 300 updates end 0.25 nats higher.
  config.loss = {'id_weight': 1.0, 'value_weight': 0.2}
  config.encoding = {'mode': 'released', 'max_genes': 255}
  config.data = {
    'layout': 'buckets',
    'buckets': (),  # those that pad the cells of the corpus least
    'mask': {},  # rates and policy: the default
    'rows_per_batch': 8,
    'source_weights': (
      ('kang_muscat', 0.5),
      ('merfish_brain', 0.5),
      ('perturb_fish_controls', 0.25),
    ),
    'seed': 0,
  }
  config.mesh = {'data': -1, 'fsdp': 1}
  config.guard = {}  # losses that are not finite, spikes, hangs: the default
  config.log_every = 10
  config.eval_every = 550
  config.eval_cells = 0  # all
  config.checkpoint_every = 100
  config.keep_checkpoints = 2
  if variant == 'smoke':
    config.corpus = 'simulated'
    config.simulated_cells = 400
    config.model.update(model.SIZES['tiny'])
    config.optimizer.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.data.rows_per_batch = 8
    config.data.source_weights = ()
    config.log_every = 1
    config.eval_every = 4
    config.eval_cells = 32
    config.checkpoint_every = 4
  elif variant:
    raise ValueError(f'{variant=}: give none or smoke')
  return config
