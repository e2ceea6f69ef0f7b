"""Gradients under `split`: all masked slots through the id head, or ids alone.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python \
      experiments/benchmarks/split_head.py --corpus CORPUS --rows 32 \
      [--max_genes 63] [--rate 0.5] [--size tiny]

Under `split` every other masked slot is asked its value, not its id
(scoring.slot_losses). Both arms have the same parameters and cells; their
losses must agree to 1e-5, or the program fails. Milliseconds are the median of
`--steps` gradients of one batch, arms in turn.
"""

import argparse
import functools
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  data,
  encoding,
  knowledge as knowledge_lib,
  losses,
  masking,
  model,
  scoring,
)


def in_full(params, batch, knowledge, config):
  """What `scoring.slot_losses` is under the other objectives."""
  network = model.bind(config, params)
  hidden_BKD = jnp.take_along_axis(
    network(batch.cells, knowledge), batch.masked_slots_BK[..., None], axis=1
  )
  return (
    losses.id_losses(network.id_logits(hidden_BKD), batch.id_labels_BK),
    losses.value_losses(
      network.predicted_values(hidden_BKD), batch.value_labels_BK
    ),
  )


def main() -> None:
  """Times both arms."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--corpus', required=True)
  parser.add_argument('--size', default='tiny', choices=tuple(model.SIZES))
  parser.add_argument('--max_genes', type=int, default=63)
  parser.add_argument('--rate', type=float, default=masking.MaskConfig().rate)
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--steps', type=int, default=20)
  args = parser.parse_args()
  corpus = corpus_lib.Corpus.open(args.corpus)
  batch = next(
    iter(
      data.evaluation_batches(
        corpus,
        encoding.EncodingConfig(max_genes=args.max_genes),
        data.DataConfig(
          layout='buckets',
          buckets=(args.max_genes + 1,),
          rows_per_batch=args.rows,
          mask=masking.MaskConfig(rate=args.rate, objective=masking.SPLIT),
        ),
        'train',
        max_cells=args.rows,
      )
    )
  ).batch
  config = model.named_config(
    args.size,
    vocabulary_size=corpus.vocabulary.size,
    max_genes=args.max_genes,
    hides_ranks=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
  )
  knowledge = knowledge_lib.empty(2, config.vocabulary_size)
  params = model.init(config, 0)
  arms = {}
  for name, losses_of in (
    ('all masked slots', in_full),
    ('ids alone', scoring.slot_losses),
  ):
    loss = functools.partial(_loss, losses_of, batch, knowledge, config)
    arms[name] = jax.jit(jax.value_and_grad(loss))
  found = {name: float(step(params)[0]) for name, step in arms.items()}
  first, second = found.values()
  np.testing.assert_allclose(first, second, rtol=1e-5)
  seconds = {name: [] for name in arms}
  for _ in range(args.steps):
    for name, step in arms.items():
      start = time.perf_counter()
      jax.block_until_ready(step(params))
      seconds[name].append(time.perf_counter() - start)
  slots = batch.masked_slots_BK.shape
  print(
    f'{args.size}, vocabulary {config.vocabulary_size:,}, {slots[0]} rows of '
    f'{slots[1]} masked slots, {int(batch.id_weights_BK.sum())} ids and '
    f'{int(batch.value_weights_BK.sum())} values asked'
  )
  for name, spent in seconds.items():
    print(f'  {name:18} {1e3 * np.median(spent):8.1f} ms')
  print(
    f'{platform.processor() or platform.machine()}, '
    f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, '
    f'jax {jax.__version__}'
  )


def _loss(losses_of, batch, knowledge, config, params):
  id_BK, value_BK = losses_of(params, batch, knowledge, config)
  sums = losses.loss_sums(
    id_BK, batch.id_weights_BK, value_BK, batch.value_weights_BK
  )
  return sums.means(losses.LossConfig())[0]


if __name__ == '__main__':
  main()
