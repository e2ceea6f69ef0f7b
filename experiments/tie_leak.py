"""The tie leak: what the order of equal ranks tells about a hidden gene.

Reproduces: the reason for `encoding.ties`. Genes of these cells are
independent, so nothing but the encoding can beat counting. With ties in the
order of a hash, the default, the held-out id loss stays at the rank bracket;
with ties in the order of tokens the visible neighbours of a hidden gene
enclose its token, and the loss falls far below.

  python -m genecompass_jax.main --config=experiments/tie_leak.py \
      --workdir=HASH
  python -m genecompass_jax.main --config=experiments/tie_leak.py:token \
      --workdir=TOKEN

Compare `eval_id_loss` and `null_id_rank_bracket` of the last lines of both
metrics.jsonl: cells and masks of the two runs are the same, so the bracket of
HASH is what TOKEN should not beat.
Hardware: two CPU cores. Time: about 95 CPU seconds each.
Expected (500 cells): HASH 4.91 over its bracket of 4.58; TOKEN 3.02, on the
way to its own bracket of 2.14.
Variants: `:token`; `:smoke` trains 4 steps on 400 cells (20 s).
"""

import ml_collections

from genecompass_jax import model

MAX_GENES = 71  # 48 on average; one cell in 10,000 is cut


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The configuration; see the top of the file for the variants."""
  config = ml_collections.ConfigDict()
  config.corpus = 'independent'
  config.simulated_cells = 5000
  config.seed = 0
  config.id_bias = 'frequency'
  config.model = {
    'vocabulary_size': 0,  # taken from the corpus
    **model.SIZES['tiny'],
    'max_genes': MAX_GENES,
    'hidden_dropout': 0.0,
    'attention_dropout': 0.0,
  }
  config.optimizer = {
    'learning_rate': 2e-3,
    'warmup_steps': 50,
    'total_steps': 1000,
  }
  # The id alone is asked: the value is not what ties betray.
  config.loss = {'id_weight': 1.0, 'value_weight': 0.1}
  config.encoding = {
    'mode': 'released',
    'ties': 'hash',
    'max_genes': MAX_GENES,
  }
  config.data = {
    'layout': 'buckets',
    'buckets': (MAX_GENES + 1,),
    'mask': {},  # rates and policy: the default
    'rows_per_batch': 32,
    'seed': 0,
  }
  config.mesh = {'data': -1, 'fsdp': 1}
  config.guard = {}  # losses that are not finite, spikes, hangs: the default
  config.log_every = 50
  config.eval_every = 500
  config.eval_cells = 0  # all
  config.checkpoint_every = 500
  config.keep_checkpoints = 1
  if variant == 'token':
    config.encoding.ties = 'token'
  elif variant == 'smoke':
    config.simulated_cells = 400
    config.optimizer.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.log_every = 1
    config.eval_every = 4
    config.checkpoint_every = 4
  elif variant:
    raise ValueError(f'{variant=}: give none, token or smoke')
  return config
