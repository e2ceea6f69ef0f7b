"""What counting predicts on a corpus under each objective and mode.

  python experiments/benchmarks/objectives.py --corpus CORPUS \
      [--max_genes 255] [--objective split] [--mode library]

Null models are fitted on the training cells and scored on all held-out cells,
as an evaluation scores them: ids in nats, values in squared log2 units, by
species and unit. Nothing is trained. Times are of this process.
"""

import argparse
import collections
import platform
import time

import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  data,
  encoding,
  evaluate,
  masking,
  vocabulary,
)


def measure(corpus, objective, mode, max_genes, by):
  """{group: {null: mean loss}}, groups in order of the split."""
  encoding_config = encoding.EncodingConfig(mode, max_genes=max_genes)
  config = data.fit_buckets(
    corpus,
    encoding_config,
    data.DataConfig(
      layout='buckets',
      buckets=(),
      mask=masking.MaskConfig(objective=objective),
    ),
  )
  models = evaluate.fit_nulls(corpus, encoding_config, config)
  sums = collections.defaultdict(lambda: collections.defaultdict(float))
  for host_batch in data.evaluation_batches(
    corpus, encoding_config, config, 'validation'
  ):
    batch = host_batch.batch
    losses = models.losses(host_batch)
    weights = {
      'id': np.asarray(batch.id_weights_BK),
      'value': np.asarray(batch.value_weights_BK),
    }
    for row, cell in enumerate(host_batch.cell_index_BS[:, 0]):
      if cell < 0:
        continue
      for group in ('all', *(names[cell] for names in by)):
        for kind, weights_BK in weights.items():
          sums[group][kind] += weights_BK[row].sum()
        for name, loss_BK in losses.items():
          sums[group][name] += loss_BK[row].sum()
  means = {}
  for group, values in sums.items():
    means[group] = {
      name: values[name] / max(values[name.split('_')[1]], 1)
      for name in models.names
    }
  return means, models.choices


def groups_of(corpus):
  """Names of the species and of the unit of every held-out cell."""
  species, units = [], []
  for code, name in enumerate(vocabulary.SPECIES):
    store = corpus.store('validation', code)
    if store is not None:
      species += [name] * store.num_cells
      names = store.categories('unit')
      units += [names[u] for u in store.obs('unit')]
  return species, units


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--corpus', required=True)
  parser.add_argument('--max_genes', type=int, default=255)
  parser.add_argument(
    '--objective', nargs='+', default=masking.OBJECTIVES, metavar='NAME'
  )
  parser.add_argument(
    '--mode', nargs='+', default=encoding.MODES, metavar='NAME'
  )
  args = parser.parse_args()
  corpus = corpus_lib.Corpus.open(args.corpus)
  by = groups_of(corpus)
  print(f'{platform.machine()}, Python {platform.python_version()}')
  for objective in args.objective:
    for mode in args.mode:
      started = time.process_time()
      means, choices = measure(corpus, objective, mode, args.max_genes, by)
      seconds = time.process_time() - started
      names = list(means['all'])
      print(f'\n{objective} objective, {mode} mode ({seconds:.0f} s CPU)\n')
      titles = [name.removeprefix('null_').replace('_', ' ') for name in names]
      print('| | ' + ' | '.join(titles) + ' |')
      print('|---' * (len(names) + 1) + '|')
      for group, values in means.items():
        row = ' | '.join(f'{values[name]:.4g}' for name in names)
        print(f'| {group} | {row} |')
      print(f'\n{choices}', flush=True)


if __name__ == '__main__':
  main()
