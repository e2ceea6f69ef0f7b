"""Larger models and longer cells, on pods.

Reproduces: nothing published; the recipe of base.py carried to 0.3, 1 and 3
thousand million parameters, and to cells of 20,480 genes, so that the question
"what would more compute buy?" can be asked. Pre-norm blocks, and rates carried
from the width of Base (model.base_width), so that deep and wide models start
without care; weights, moments and gradients are shared over mesh.fsdp devices.

  python -m genecompass_jax.main --config=experiments/scale.py:1b \
      --workdir=gs://BUCKET/1b --config.corpus=gs://BUCKET/corpus \
      --config.priors='(("grn", "gs://BUCKET/grn.parquet"),)'

Hardware: pods; docs/plans.md says what fits where, and
`genecompass plan --config=experiments/scale.py:1b --topology v5e:16x16` says it
for a change of one's own. Time and expected score: not run; the plans assume a
utilisation, they do not measure one.
Variants: none or `:300m` (24 layers of 1,024, sharing 8-wide), `:1b` (20 layers
of 2,048, 16-wide), `:3b` (40 layers of 2,560, 16-wide), `:20k` (Base with
20,480 genes a cell, rows shared by 4 devices); `:smoke` simulates 400 cells,
width 64, 4 steps of two microbatches (under a minute on two cores).
"""

import ml_collections

from genecompass_jax import model

# Variant -> size, rows of a batch, fsdp, context, what is recomputed.
VARIANTS = {
  '300m': ('large', 512, 8, 1, 'attention'),
  '1b': ('1b', 512, 16, 1, 'full'),
  '3b': ('3b', 512, 16, 1, 'full'),
  '20k': ('base', 128, 4, 4, 'attention'),
}
CELLS = 100_000_000
CELLS_A_ROW = 1.84  # packed in rows of 2,304, cells of 1,200 genes


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The configuration; see the top of the file for the variants."""
  is_smoke = variant == 'smoke'
  if variant not in ('', 'smoke', *VARIANTS):
    names = ', '.join((*VARIANTS, 'smoke'))
    raise ValueError(f'{variant=}: give none or one of {names}')
  size, rows, fsdp, context, remat = VARIANTS.get(variant, VARIANTS['300m'])
  is_long = variant == '20k'
  config = ml_collections.ConfigDict()
  config.corpus = ''
  config.simulated_cells = 0
  config.seed = 0
  config.model = {
    'vocabulary_size': 0,  # taken from the corpus
    **model.SIZES[size],
    'max_genes': 20_480 if is_long else 2048,
    'norm_order': 'pre',
    'base_width': model.SIZES['base']['width'],
    'missing_prior': 'learned',
    'dtype': 'bfloat16',
    'remat': remat,
  }
  config.priors = ()
  slots = 21_504 if is_long else 2304  # multiples of the kernels' blocks
  steps = CELLS / (rows * CELLS_A_ROW * slots / 2304)
  config.optimizer = {
    'learning_rate': 5e-5,  # of Base; base_width carries it
    'schedule': 'linear',
    'warmup_steps': 2_000,
    'total_steps': round(steps / 1000) * 1000,
    'weight_decay': 0.01,
    'clip_norm': 1.0,
  }
  config.encoding = {
    'mode': 'released',
    'ties': 'hash',
    'max_genes': config.model.max_genes,
  }
  config.loss = {'id_weight': 0.2, 'value_weight': 0.8}
  config.data = {
    'layout': 'packed',
    'slots': slots,
    'buckets': (2304, 5376, 10_752, slots) if is_long else (),
    'rows_per_batch': rows,
    'streams': 64,
    'mask': {'policy': 'default'},
    'seed': 0,
  }
  config.mesh = {'data': -1, 'fsdp': fsdp, 'context': context, 'tensor': 1}
  config.microbatches = 1
  config.guard = {}  # losses that are not finite, spikes, hangs: the default
  config.log_every = 50
  config.eval_every = 5_000
  config.eval_cells = 20_000
  config.checkpoint_every = 1_000
  config.keep_checkpoints = 3
  if is_smoke:
    config.corpus = 'simulated'
    config.simulated_cells = 400
    config.model.update(model.SIZES['tiny'])
    config.model.dtype = 'float32'
    config.model.base_width = 32
    config.model.max_genes = config.encoding.max_genes = 512
    config.data.slots = 640
    config.data.rows_per_batch = 4
    config.data.streams = 2
    config.mesh.fsdp = 1
    config.microbatches = 2
    config.optimizer.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.log_every = 1
    config.eval_every = 4
    config.eval_cells = 16
    config.checkpoint_every = 4
  return config
