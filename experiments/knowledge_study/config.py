"""One run of the study of what knowledge is worth.

Reproduces: a cell of the table in README.md beside this file; the study itself
(corpora, priors, all runs, statistics) is made by study.py.

  python -m experiments.knowledge_study.study ROOT --only materials
  python -m genecompass_jax.main --workdir=DIR \
      --config=experiments/knowledge_study/config.py:root=ROOT,arm=all,cells=4096

Hardware: two CPU cores. Time: about 3 CPU minutes.
Expected: the held-out id loss falls below the rank bracket of counting.
Variants: `KEY=VALUE,...` with the keys root (folder of the study), arm (see
`arms.py`), cells (training cells) or fold (a study of the real cells that is
held out), seed, steps, objective; `smoke` trains 4 steps on 400 simulated cells
without priors. At another size: --config.model.width=256 and the like.
"""

import ml_collections

from experiments.knowledge_study import arms
from genecompass_jax import model

MAX_GENES = 63  # the highest ranks of a cell
STEPS = 2000  # the same for all arms and sizes
ROWS = 32
# More of a cell is asked than in pretraining (15 %): three times the answers for
# the price of a step. Under `split` every asked gene still shows its id, or its
# rank and value.
MASK_RATE = 0.5
KEYS = {
  'root': '',
  'arm': 'all',
  'cells': '4096',
  'fold': '',
  'seed': '0',
  'steps': str(STEPS),
  'objective': 'split',
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The configuration; see the top of the file for the variants."""
  values = dict(KEYS)
  if variant not in ('', 'smoke'):
    for part in variant.split(','):
      key, equals, value = part.partition('=')
      if not equals or key not in KEYS:
        raise ValueError(
          f'{variant=}: give smoke, or KEY=VALUE,... of {", ".join(KEYS)}'
        )
      values[key] = value
  config = ml_collections.ConfigDict()
  config.seed = int(values['seed'])
  config.corpus = ''
  config.priors = ()
  config.simulated_cells = 0
  if values['root']:
    place = values['fold'] or values['cells']
    config.corpus = f'{values["root"]}/corpora/{place}'
    config.priors = tuple(
      (name, f'{values["root"]}/priors/{place}/{file}.parquet')
      for name, file in arms.ARMS[values['arm']].files(config.seed)
    )
  config.id_bias = 'frequency'
  config.model = {
    'vocabulary_size': 0,  # taken from the corpus
    **model.SIZES['tiny'],
    'max_genes': MAX_GENES,
    # A run sees a cell of the smallest corpus 62 times, each time masked anew.
    'hidden_dropout': 0.0,
    'attention_dropout': 0.0,
  }
  steps = int(values['steps'])
  config.optimizer = {
    'learning_rate': 3e-3,
    'warmup_steps': min(200, steps // 2),
    'total_steps': steps,
  }
  # One gene is asked either of the two under `split`; neither is an aside.
  config.loss = {'id_weight': 1.0, 'value_weight': 1.0}
  config.encoding = {
    'mode': 'released',
    'ties': 'hash',
    'max_genes': MAX_GENES,
  }
  config.data = {
    'layout': 'buckets',
    'buckets': (MAX_GENES + 1,),
    'mask': {'objective': values['objective'], 'rate': MASK_RATE},
    'rows_per_batch': ROWS,
    'seed': config.seed,
  }
  config.mesh = {'data': -1, 'fsdp': 1}
  config.log_every = 50
  config.eval_every = max(steps // 8, 1)
  config.eval_cells = 256  # of the curve; the endpoints are scored on all
  config.checkpoint_every = max(steps // 2, 1)
  config.keep_checkpoints = 1
  if variant == 'smoke':
    config.corpus = 'simulated'
    config.simulated_cells = 400
    config.optimizer.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.data.rows_per_batch = 8
    config.log_every = 1
    config.eval_every = 4
    config.eval_cells = 32
    config.checkpoint_every = 4
  return config
