"""Where the CPU of the loader goes: one part changed at a time, in one run.

    python experiments/benchmarks/loader_steps.py CORPUS

The arms give the same bytes (tests hold them to it; a hash is printed). They
are run in turn, several times, and the least CPU a cell of each is kept: on a
shared machine the least is what the code needs.

  in steps, copies   windows copied from their blocks; a batch gathered,
                     encoded, masked and placed one step after the other
  in steps           windows read to their place
  one pass, copies   windows copied; a cell done in one pass
  one pass           as the loader does it
"""

import argparse
import hashlib
import time
from unittest import mock

import numpy as np

from genecompass_jax import corpus, corpus_bench, data, encoding, reading

_IN_STEPS = (reading.Split, 'batch', reading.Split.batch_in_steps)
_COPIES = (reading.Split, '_read_whole', lambda self, wanted: None)
ARMS = {
  'in steps, copies': (_IN_STEPS, _COPIES),
  'in steps': (_IN_STEPS,),
  'one pass, copies': (_COPIES,),
  'one pass': (),
}


class Parts:
  """CPU seconds of this thread in some functions, by name."""

  def __init__(self):
    self.seconds = {}

  def timed(self, name: str, call):
    """The function, its CPU counted."""

    def run(*args, **kwargs):
      start = time.thread_time()
      try:
        return call(*args, **kwargs)
      finally:
        self.seconds[name] = (
          self.seconds.get(name, 0) + time.thread_time() - start
        )

    return run


def run(opened: corpus.Corpus, config: data.DataConfig, batches: int):
  """Makes batches in one thread -> (CPU us a cell, parts of it, hash)."""
  parts = Parts()
  loader = data.Loader(opened, encoding.EncodingConfig(), config)
  loader.batch(0)  # compiles
  loader = data.Loader(opened, encoding.EncodingConfig(), config)
  digest = hashlib.sha256()
  cells = 0
  with (
    mock.patch.object(
      reading.Split, 'batch', parts.timed('batches', reading.Split.batch)
    ),
    mock.patch.object(
      data.Loader, '_load', parts.timed('windows', data.Loader._load)
    ),
  ):
    iterator = loader.iterate(threads=1)
    start = time.process_time()
    for _ in range(batches):
      batch = next(iterator)
      cells += int(np.count_nonzero(batch.cell_index_BS >= 0))
    cpu = time.process_time() - start
    iterator.close()
  for index in range(0, batches, max(batches // 8, 1)):
    made = loader.batch(index).batch
    digest.update(made.cells.gene_ids_BL.tobytes())
    digest.update(made.cells.values_BL.tobytes())
    digest.update(made.id_labels_BK.tobytes())
  each = {name: s / cells * 1e6 for name, s in parts.seconds.items()}
  return cpu / cells * 1e6, each, digest.hexdigest()[:12]


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('corpus')
  parser.add_argument('--batches', type=int, default=600)
  parser.add_argument('--repeats', type=int, default=4)
  parser.add_argument('--rows', type=int, default=32)
  args = parser.parse_args()
  opened = corpus.Corpus.open(args.corpus)
  config = data.DataConfig(rows_per_batch=args.rows)
  found = {name: [] for name in ARMS}
  for _ in range(args.repeats):
    for name, patches in ARMS.items():
      held = [mock.patch.object(*patch) for patch in patches]
      for patch in held:
        patch.start()
      found[name].append(run(opened, config, args.batches))
      for patch in held:
        patch.stop()
  first = min(cpu for cpu, _, _ in found['in steps, copies'])
  print('| | CPU us a cell | of it batches | of it windows | x | bytes |')
  print('|---|---|---|---|---|---|')
  for name, runs in found.items():
    cpu, parts, digest = min(runs, key=lambda r: r[0])
    print(
      f'| {name} | {cpu:.1f} | {parts["batches"]:.1f} |'
      f' {parts["windows"]:.1f} | {first / cpu:.2f} | {digest} |'
    )
  print(f'\n{args.batches} batches; {corpus_bench.machine()}')


if __name__ == '__main__':
  main()
