"""Batches a second of the loader, beside the way of the published code.

    python experiments/benchmarks/loader.py                     # simulated
    python experiments/benchmarks/loader.py --corpus DIR
    python experiments/benchmarks/loader.py --h5ad FILE --species human

The published code keeps cells ranked and padded to 2,048 in an Arrow dataset
(int64 ids, float32 values), takes rows out as Python lists, makes arrays of
the lists and masks those. That path is written here from its description, in
NumPy, over the same cells; `datasets`, where installed, reads the same file as
a further peer. The loader starts from raw counts: shuffling, ranking, the
log, masking and packing are in its time.

CPU time is that of the process, all threads. Cells are those of whole
batches; compilation is left out by a first batch, planning is given apart.
Simulated cells: log-normal gene means and depths, Poisson counts, about 1,200
expressed genes; no evidence about biology.
"""

import argparse
import importlib.metadata
import os
import platform
import resource
import tempfile
import time

import numpy as np
import pyarrow as pa

from genecompass_jax import (
  corpus,
  corpus_writer,
  data,
  encoding,
  medians,
  vocabulary,
)
from genecompass_jax.prepare import pipeline, sources

_MAX_GENES = 2048


def simulated_corpus(path: str, num_cells: int) -> corpus.Corpus:
  """Writes a corpus of two species, three human cells to two of mouse."""
  rng = np.random.default_rng(0)
  vocab = vocabulary.Vocabulary.default()
  sizes = num_cells * 3 // 5, num_cells - num_cells * 3 // 5
  num_rows = [int((vocab.genes.species_G == s).sum()) for s in range(2)]
  with corpus_writer.CorpusWriter(
    path,
    vocab,
    sources=[{'name': 'simulated'}],
    measured={s: np.ones((1, r), bool) for s, r in enumerate(num_rows)},
    categories={'source': ('simulated',), 'unit': ('simulated',)},
  ) as writer:
    histograms = {
      mode: {
        s: medians.MedianHistogram(mode, _tokens(vocab, s), vocab.size)
        for s in range(2)
      }
      for mode in encoding.MODES
    }
    for species, size in enumerate(sizes):
      mean_R = np.exp(rng.normal(0, 2.6, num_rows[species]))
      mean_R /= mean_R.sum()
      store = writer.store('train', species)
      for first in range(0, size, 1024):
        num = min(1024, size - first)
        cells = _simulated_cells(rng, mean_R, num)
        for mode in encoding.MODES:
          histograms[mode][species].add(cells)
        codes = np.zeros(num, np.int32)
        store.append(
          cells,
          {'source': codes, 'unit': codes, 'source_row': first + codes},
          [f'{species}-{first + i}' for i in range(num)],
        )
    for mode in encoding.MODES:
      writer.write_medians(
        medians.Medians.from_histograms(vocab, histograms[mode])
      )
    writer.commit({'seed': 0})
  return corpus.Corpus.open(path)


def _tokens(vocab: vocabulary.Vocabulary, species: int) -> np.ndarray:
  return vocab.token_G[vocab.genes.species_G == species]


def _simulated_cells(rng, mean_R, num_cells) -> encoding.RaggedCells:
  depth_C = np.exp(rng.normal(np.log(1750), 0.6, num_cells))
  rows, counts, lengths = [], [], []
  for depth in depth_C:
    drawn_R = rng.poisson(mean_R * depth)
    row = np.flatnonzero(drawn_R)
    rows.append(row)
    counts.append(drawn_R[row])
    lengths.append(len(row))
  starts_C1 = np.concatenate([[0], np.cumsum(lengths)])
  counts_N = np.concatenate(counts)
  totals_C = np.add.reduceat(counts_N, starts_C1[:-1]).astype(np.float64)
  return encoding.RaggedCells(
    np.concatenate(rows).astype(np.uint16), counts_N, starts_C1, totals_C
  )


def corpus_of_h5ad(file: str, path: str, species: str) -> corpus.Corpus:
  """Runs the preparation of the package on one file, all cells for training."""
  source = sources.SourceConfig(path=file, species=species)
  config = pipeline.PrepareConfig(validation_share=0.0)
  return pipeline.prepare([source], path, config)


class Clock:
  """Wall and CPU time, and cells, of a run of batches."""

  def __init__(self, name: str):
    self.name = name
    self.cells = self.slots = self.real = 0
    self.wall, self.cpu = time.perf_counter(), time.process_time()

  def stop(self) -> 'Clock':
    """Ends the run."""
    self.wall = time.perf_counter() - self.wall
    self.cpu = time.process_time() - self.cpu
    return self

  def row(self, bytes_per_cell: float) -> list:
    """Cells/s, CPU us a cell, bytes a cell, share of real tokens."""
    return [
      self.name,
      self.cells / self.wall,
      self.cpu / self.cells * 1e6,
      bytes_per_cell,
      self.real / self.slots,
    ]


def run_loader(name, source, config, seconds, threads) -> tuple[Clock, float]:
  """One pass over the corpus, or `seconds` of it."""
  encode = encoding.EncodingConfig(max_genes=_MAX_GENES)
  planning = time.process_time()
  loader = data.Loader(source, encode, config)
  planning = (time.process_time() - planning) / loader.cells_per_epoch() * 1e6
  print(f'{name}: {loader.describe()}')
  iterator = loader.iterate(threads=threads)
  next(iterator)
  iterator.close()
  iterator = data.Loader(source, encode, config).iterate(threads=threads)
  clock = Clock(name)
  for index in range(loader.batches_per_epoch()):
    batch = next(iterator)
    clock.cells += int((batch.cell_index_BS >= 0).sum())
    segments_BL = batch.batch.cells.segments_BL
    clock.slots += segments_BL.size
    clock.real += int(np.count_nonzero(segments_BL))
    if time.perf_counter() - clock.wall > seconds and index > 2:
      break
  clock.stop()
  iterator.close()
  return clock, planning


def padded_arrow(source: corpus.Corpus, path: str, num_cells: int) -> int:
  """The cells as the published code stores them; returns their number."""
  encode = encoding.EncodingConfig(max_genes=_MAX_GENES)
  config = data.DataConfig(layout='buckets', buckets=(_MAX_GENES + 1,))
  fields = [
    ('input_ids', pa.list_(pa.int64())),
    ('values', pa.list_(pa.float32())),
    ('species', pa.int64()),
    ('length', pa.int32()),
  ]
  written = 0
  batches = data.evaluation_batches(
    source, encode, config, 'train', max_cells=num_cells
  )
  with pa.OSFile(path, 'wb') as file:
    with pa.ipc.new_stream(file, pa.schema(fields)) as stream:
      for batch in batches:
        cells = batch.batch.cells
        used = batch.cell_index_BS[:, 0] >= 0
        ids, values = cells.gene_ids_BL.copy(), cells.values_BL.copy()
        for row, k in np.argwhere(batch.batch.id_weights_BK > 0):
          slot = batch.batch.masked_slots_BK[row, k]
          ids[row, slot] = batch.batch.id_labels_BK[row, k]
          values[row, slot] = batch.batch.value_labels_BK[row, k]
        stream.write_batch(
          pa.record_batch(
            [
              pa.array(list(ids[used, 1:].astype(np.int64)), fields[0][1]),
              pa.array(list(values[used, 1:]), fields[1][1]),
              pa.array(cells.species_BL[used, 0].astype(np.int64)),
              pa.array((ids[used, 1:] > 0).sum(1).astype(np.int32)),
            ],
            schema=pa.schema(fields),
          )
        )
        written += int(used.sum())
  return written


def collate_lists(rows: list[dict], rng, vocabulary_size: int) -> tuple:
  """Pads lists, makes arrays of them, masks: the published collator."""
  longest = max(len(row['input_ids']) for row in rows)
  padded = {'input_ids': [], 'values': [], 'attention_mask': []}
  for row in rows:
    missing = longest - len(row['input_ids'])
    padded['attention_mask'].append([1] * len(row['input_ids']) + [0] * missing)
    padded['input_ids'].append(row['input_ids'] + [0] * missing)
    padded['values'].append(row['values'] + [0.0] * missing)
  ids = np.array(padded['input_ids'], np.int64)
  values = np.array(padded['values'], np.float32)
  attention = np.array(padded['attention_mask'], np.int64)
  id_labels, value_labels = ids.copy(), values.copy()
  is_picked = (rng.random(ids.shape) < 0.15) & (ids > 1)
  id_labels[~is_picked] = -100
  value_labels[~is_picked] = -100
  is_hidden = is_picked & (rng.random(ids.shape) < 0.8)
  ids[is_hidden], values[is_hidden] = 1, -1
  is_random = is_picked & ~is_hidden & (rng.random(ids.shape) < 0.5)
  ids[is_random] = rng.integers(0, vocabulary_size, int(is_random.sum()))
  values[is_random] = -1
  return ids, values, attention, id_labels, value_labels


def run_lists(name, read, num_cells, vocabulary_size, rows_per_batch) -> Clock:
  """One pass in random order, batch by batch in one thread."""
  rng = np.random.default_rng(0)
  order = rng.permutation(num_cells)
  collate_lists(read(order[:2]), rng, vocabulary_size)
  clock = Clock(name)
  for first in range(0, num_cells - rows_per_batch + 1, rows_per_batch):
    ids, *_ = collate_lists(
      read(order[first : first + rows_per_batch]), rng, vocabulary_size
    )
    clock.cells += len(ids)
    clock.slots += ids.size
    clock.real += int(np.count_nonzero(ids))
  return clock.stop()


def _stored_bytes(source: corpus.Corpus) -> float:
  """Bytes of counts on disk a cell of the training split."""
  files = source.manifest['files']
  held = sum(
    facts['size']
    for name, facts in files.items()
    if name.startswith('train/') and '/counts/' in name
  )
  return held / source.num_cells('train')


def _table(rows: list[list]) -> str:
  base = rows[0]
  lines = [
    '| path | cells/s | x | CPU us/cell | CPU x less | bytes/cell |'
    ' real tokens |',
    '|---|---|---|---|---|---|---|',
  ]
  for name, rate, cpu, size, real in rows:
    lines.append(
      f'| {name} | {rate:,.0f} | {rate / base[1]:.1f} | {cpu:,.1f} |'
      f' {base[2] / cpu:.1f} | {size:,.0f} | {real:.1%} |'
    )
  return '\n'.join(lines)


def main() -> None:
  """Builds or opens a corpus, times every path, prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--corpus')
  parser.add_argument('--h5ad')
  parser.add_argument('--species', default='auto')
  parser.add_argument('--cells', type=int, default=32_768)
  parser.add_argument('--peer_cells', type=int, default=2048)
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--slots', type=int, default=2304)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--seconds', type=float, default=30)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    if args.corpus:
      source = corpus.Corpus.open(args.corpus)
    elif args.h5ad:
      source = corpus_of_h5ad(args.h5ad, f'{folder}/corpus', args.species)
    else:
      source = simulated_corpus(f'{folder}/corpus', args.cells)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = data.DataConfig(rows_per_batch=args.rows, slots=args.slots)
    buckets = data.DataConfig(rows_per_batch=args.rows, layout='buckets')
    ours = [
      run_loader(f'this loader, {c.layout}', source, c, args.seconds, t)
      for c, t in ((packed, args.threads), (buckets, args.threads), (packed, 1))
    ]
    ours[-1][0].name += ', 1 thread'
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = f'{folder}/padded.arrow'
    num_cells = padded_arrow(source, file, args.peer_cells)
    table = pa.ipc.open_stream(pa.memory_map(file)).read_all()
    padded_bytes = os.path.getsize(file) / num_cells
    size = source.vocabulary.size
    peers = [
      run_lists(
        'list collator (re-created)',
        lambda some: table.take(pa.array(some)).to_pylist(),
        num_cells,
        size,
        args.rows,
      )
    ]
    try:
      import datasets  # an optional peer
    except ImportError:
      print('datasets is not installed: no peer that reads with it')
    else:
      hf = datasets.Dataset.from_file(file)

      def read(some):
        columns = hf[some.tolist()]
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

      peers.append(
        run_lists(
          f'list collator (datasets {datasets.__version__})',
          read,
          num_cells,
          size,
          args.rows,
        )  # fmt: skip
      )
    stored = _stored_bytes(source)
    print()
    print(
      _table(
        [clock.row(padded_bytes) for clock in peers]
        + [clock.row(stored) for clock, _ in ours]
      )
    )
    mean = np.mean(
      np.concatenate(
        [s.length_N for k in range(2) if (s := source.store('train', k))]
      )
    )
    print(
      f'\n{source.num_cells("train")} cells of {mean:.0f} expressed genes on'
      f' average; batches of {args.rows} rows; opening and planning the first'
      f' epoch {ours[0][1]:.2f} us CPU a cell (compilation included); peak'
      f' memory {peak / 1024:.0f} MiB, {before / 1024:.0f} before loading'
    )
    versions = ' '.join(
      f'{name} {importlib.metadata.version(name)}'
      for name in ('numpy', 'numba', 'grain', 'tensorstore', 'pyarrow', 'jax')
    )
    print(
      f'{platform.machine()}, {os.cpu_count()} cores, load'
      f' {os.getloadavg()[0]:.1f}, Python {platform.python_version()},'
      f' {versions}'
    )


if __name__ == '__main__':
  main()
