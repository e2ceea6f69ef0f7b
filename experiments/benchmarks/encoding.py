"""CPU time of ranking one cell: the kernels against NumPy.

  python experiments/benchmarks/encoding.py --cells 1000 --genes 1200

Cells are Poisson draws over a gene list of a species, one thread, CPU time and
not wall time, the best of some repeats. `released` divides by medians that are
mostly 1 (UMI counts: giant ties), `library` by continuous ones (hardly a tie).
The NumPy reference sorts stably by quotient, with ties in column order: less
work than the kernel's exact ties by hash.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

os.environ.setdefault('NUMBA_NUM_THREADS', '1')

import numba
import numpy as np

from genecompass_jax import encoding, masking, medians, ranking

NUM_ROWS = 25_000
VOCABULARY_SIZE = 60_000


def make_cells(num_cells: int, num_genes: int, seed: int):
  """Poisson cells with about `num_genes` expressed genes of NUM_ROWS."""
  rng = np.random.default_rng(seed)
  weight_R = rng.gamma(0.3, 1, NUM_ROWS)
  weight_R /= weight_R.sum()
  depth = float(num_genes)
  for _ in range(30):  # expected expressed genes rise with depth
    depth *= num_genes / np.sum(-np.expm1(-depth * weight_R))
  rows, counts, starts = [], [], [0]
  for _ in range(num_cells):
    counts_R = rng.poisson(depth * weight_R)
    rows.append(np.flatnonzero(counts_R))
    counts.append(counts_R[rows[-1]])
    starts.append(starts[-1] + len(rows[-1]))
  counts_N = np.concatenate(counts).astype(np.uint16)
  starts_C1 = np.array(starts)
  totals_C = np.array([c.sum() for c in counts], np.float64)
  token_R = rng.permutation(VOCABULARY_SIZE - 2)[:NUM_ROWS].astype(np.int32) + 2
  cells = encoding.RaggedCells(
    np.concatenate(rows).astype(np.uint16), counts_N, starts_C1, totals_C
  )
  ones_V = np.where(
    rng.random(VOCABULARY_SIZE) < 0.9,
    1.0,
    rng.integers(2, 8, VOCABULARY_SIZE) / 2,
  )
  continuous_V = np.exp(rng.normal(0, 1, VOCABULARY_SIZE))
  return cells, token_R, {'released': ones_V, 'library': continuous_V}


def numpy_cells(cells, token_R, divisor_V, mode, with_log):
  """What the kernel does, with a stable argsort a cell."""
  for c in range(cells.num_cells):
    s = slice(cells.starts_C1[c], cells.starts_C1[c + 1])
    tokens = token_R[cells.gene_rows_N[s]]
    x = cells.counts_N[s].astype(np.float64)
    if mode == 'library':
      x = x / cells.totals_C[c] * 1e4
    x = x / divisor_V[tokens]
    order = np.argsort(-x, kind='stable')[:2048]
    tokens = tokens[order]
    if with_log:
      x = (np.log1p(x[order]) / np.log(2)).astype(np.float32)


def cpu_us(call: Callable[[], object], num_cells: int, repeats: int) -> float:
  """Least CPU microseconds a cell."""
  call()
  best = np.inf
  for _ in range(repeats):
    start = time.process_time()
    call()
    best = min(best, time.process_time() - start)
  return best / num_cells * 1e6


def processor() -> str:
  """Model of the processor, where the system says."""
  try:
    with open('/proc/cpuinfo') as file:
      names = [line for line in file if line.startswith('model name')]
    return names[0].split(':')[1].strip()
  except (OSError, IndexError):
    return platform.processor() or 'unknown'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cells', type=int, default=512)
  parser.add_argument('--genes', type=int, default=1200)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  cells, token_R, divisors = make_cells(args.cells, args.genes, args.seed)
  print(
    f'{processor()}, {os.cpu_count()} cores, 1 thread; Python'
    f' {platform.python_version()}, numpy {np.__version__}, numba'
    f' {numba.__version__}'
  )
  print(
    f'{args.cells} cells of {np.diff(cells.starts_C1).mean():.0f} expressed'
    ' genes on average\n'
  )
  print(f'{"":<44}{"released":>10}{"library":>10}   us CPU a cell')

  def row(name, make):
    figures = [
      cpu_us(make(mode), args.cells, args.repeats) for mode in encoding.MODES
    ]
    print(f'{name:<44}{figures[0]:>10.1f}{figures[1]:>10.1f}')

  encoders = {
    mode: encoding.CellEncoder(
      encoding.EncodingConfig(mode), token_R, divisors[mode]
    )
    for mode in encoding.MODES
  }

  def in_numpy(with_log):
    return lambda mode: (
      lambda: numpy_cells(cells, token_R, divisors[mode], mode, with_log)
    )

  row('numpy stable argsort, order only', in_numpy(False))
  row('numpy stable argsort, with log2', in_numpy(True))
  row(
    'kernel: exact order, hash, log2',
    lambda mode: lambda: encoders[mode].encode(cells, seed=1, epoch=2),
  )
  size = encoding.longest(cells.starts_C1)
  quotient_n = np.random.default_rng(0).gamma(1, 2, size)
  one_n, value_n = np.empty(size), np.empty(size, np.float32)
  log_us = cpu_us(
    lambda: [
      ranking.log2_1p(int(n), quotient_n, one_n, value_n)
      for n in np.diff(cells.starts_C1)
    ],
    args.cells,
    args.repeats,
  )
  print(f'{"  of which log2, calls from Python included":<44}{log_us:>10.1f}')
  row(
    'kernel: lengths only',
    lambda mode: lambda: encoders[mode].lengths(cells),
  )
  encoded = {mode: encoders[mode].encode(cells) for mode in encoding.MODES}
  row(
    'masks',
    lambda mode: (
      lambda: masking.mask_cells(
        encoded[mode],
        np.arange(args.cells),
        config=masking.MaskConfig(),
        seed=0,
        epoch=0,
        random_tokens=token_R,
        vocabulary_size=VOCABULARY_SIZE,
      )
    ),
  )

  def count(mode):
    histogram = medians.MedianHistogram(mode, token_R, VOCABULARY_SIZE)
    return lambda: histogram.add(cells)

  row('median histograms', count)


if __name__ == '__main__':
  main()
