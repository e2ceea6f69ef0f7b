"""Base, as released, on accelerators.

Reproduces: the architecture and recipe of GeneCompass base (12 layers, 768
wide, 2,048 genes; AdamW as in transformers 4.30, peak rate 5e-5, 10,000
warm-up steps, weights 0.2 and 0.8, global batch 320 rows, one epoch of 100 M
cells), with ties broken by hash and values always hidden: the release's own
choices let the model read part of the answer from the input.

  python -m genecompass_jax.main --config=experiments/base.py \
      --workdir=gs://BUCKET/base --config.corpus=gs://BUCKET/corpus \
      --config.priors='(("grn", "gs://BUCKET/grn.parquet"),)'

Hardware: any mesh whose devices divide 320 rows; set mesh.fsdp to share the
weights. Time and expected score: not run yet; nothing of this size has been
trained with this code.
Variants: `:released` masks, keeps values and treats missing priors as the
release does; `:small` is the released small model; `:smoke`
simulates 400 cells, width 64, 4 steps (under a minute on two cores).
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
    **model.SIZES['base'],
    'max_genes': 2048,
    'hidden_dropout': 0.02,
    'attention_dropout': 0.02,
    'missing_prior': 'learned',
    'dtype': 'bfloat16',
    'remat': 'attention',
  }
  config.priors = ()
  config.prior_warmup_steps = 0
  config.optimizer = {
    'name': 'adamw_hf',
    'learning_rate': 5e-5,
    'schedule': 'linear',
    'warmup_steps': 10_000,
    'total_steps': 170_000,  # 100 M cells at 1.84 packed cells a row of 2,304
    'weight_decay': 0.01,
    'clip_norm': 1.0,
  }
  config.encoding = {'mode': 'released', 'ties': 'hash', 'max_genes': 2048}
  config.loss = {'id_weight': 0.2, 'value_weight': 0.8}
  config.data = {
    'layout': 'packed',
    'slots': 2304,
    'buckets': (),  # of the evaluation
    'rows_per_batch': 320,
    'streams': 32,
    'mask': {'policy': 'default'},
    'seed': 0,
  }
  config.mesh = {'data': -1, 'fsdp': 1}
  config.guard = {}  # losses that are not finite, spikes, hangs: the default
  config.log_every = 50
  config.eval_every = 5_000
  config.eval_cells = 20_000
  config.checkpoint_every = 1_000
  config.keep_checkpoints = 3
  if variant == 'released':
    config.model.missing_prior = 'released'
    config.data.mask.policy = 'released'
  elif variant == 'small':
    config.model.update(model.SIZES['small'])
  elif variant == 'smoke':
    config.corpus = 'simulated'
    config.simulated_cells = 400
    config.model.update(model.SIZES['tiny'])
    config.model.dtype = 'float32'
    config.model.max_genes = config.encoding.max_genes = 512
    config.data.slots = 640
    config.optimizer.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.data.rows_per_batch = 4
    config.data.streams = 2
    config.log_every = 1
    config.eval_every = 4
    config.eval_cells = 16
    config.checkpoint_every = 4
  elif variant:
    raise ValueError(f'{variant=}: give none, released, small or smoke')
  return config
