"""Ways to store the counts of real cells: bytes, and CPU to write and read.

    python data_prep/real_cells.py --data FOLDER -o CORPUS
    python experiments/benchmarks/codecs.py CORPUS

Blocks of the training cells of a corpus are written and read back through
codecs of numcodecs, in chunks as the corpus has them; what is read is compared
with what was written. CPU is the least of some repeats, one thread, user and
system; undoing the differences of gene rows is in the time of reading. The
choice of the format stands in docs/loading.md.
"""

import argparse
import time
from collections.abc import Callable

import numcodecs
import numpy as np

from genecompass_jax import corpus, corpus_bench, encoding, shards

_MAX_GENES = 2048
numcodecs.blosc.use_threads = False
_SHUFFLES = {
  'bitshuffle': numcodecs.Blosc.BITSHUFFLE,
  'shuffle': numcodecs.Blosc.SHUFFLE,
  'no shuffle': numcodecs.Blosc.NOSHUFFLE,
}


def blosc(name: str, level: int, shuffle: str) -> numcodecs.abc.Codec:
  """A blosc codec; the item size is that of the array."""
  return numcodecs.Blosc(name, level, _SHUFFLES[shuffle])


CODECS = {
  'blosc lz4 5, bitshuffle (the format)': blosc('lz4', 5, 'bitshuffle'),
  'blosc lz4 1, bitshuffle': blosc('lz4', 1, 'bitshuffle'),
  'blosc lz4 9, bitshuffle': blosc('lz4', 9, 'bitshuffle'),
  'blosc lz4 5, shuffle': blosc('lz4', 5, 'shuffle'),
  'blosc lz4hc 9, bitshuffle': blosc('lz4hc', 9, 'bitshuffle'),
  'blosc zstd 1, bitshuffle': blosc('zstd', 1, 'bitshuffle'),
  'blosc zstd 5, bitshuffle': blosc('zstd', 5, 'bitshuffle'),
  'blosc zstd 9, bitshuffle': blosc('zstd', 9, 'bitshuffle'),
  'blosc zstd 1, shuffle': blosc('zstd', 1, 'shuffle'),
  'blosc zstd 5, shuffle': blosc('zstd', 5, 'shuffle'),
  'zstd 3': numcodecs.Zstd(3),
  'gzip 6': numcodecs.GZip(6),
  'none': None,
}


def read_cells(path: str, most: int) -> tuple[encoding.RaggedCells, int]:
  """Cells of the largest training store, in stored order; its species."""
  opened = corpus.Corpus.open(path)
  stores = [
    store
    for species in range(len(opened.vocabulary.species))
    if (store := opened.store('train', species)) is not None
  ]
  store = max(stores, key=lambda s: s.num_cells)
  num = min(-(-most // store.block_cells), store.num_blocks)
  blocks = store.read_blocks(range(num))
  starts = np.cumsum([0, *(n for b in blocks for n in np.diff(b.starts_C1))])
  cells = encoding.RaggedCells(
    np.concatenate([b.gene_rows_N for b in blocks]),
    np.concatenate([b.counts_N for b in blocks]).astype(np.uint16),
    starts,
    np.concatenate([b.totals_C for b in blocks]),
  )
  return cells, store.species


def differences(cells: encoding.RaggedCells) -> np.ndarray:
  """Gene rows as the corpus stores them: the first absolute, then steps."""
  rows_N = cells.gene_rows_N.astype(np.uint16)
  stepped_N = np.diff(rows_N, prepend=np.uint16(0))
  first_C = cells.starts_C1[:-1][np.diff(cells.starts_C1) > 0]
  stepped_N[first_C] = rows_N[first_C]
  return stepped_N


def chunks(array: np.ndarray, size: int) -> list[np.ndarray]:
  """Pieces along the last axis, contiguous each."""
  return [
    np.ascontiguousarray(array[..., a : a + size])
    for a in range(0, array.shape[-1], size)
  ]


def least_cpu(call: Callable[[], object], repeats: int) -> float:
  """Least CPU seconds of some calls."""
  times = []
  for _ in range(repeats):
    start = time.process_time()
    call()
    times.append(time.process_time() - start)
  return min(times)


def measure(
  pieces: list[np.ndarray],
  codec: numcodecs.abc.Codec | None,
  num_cells: int,
  repeats: int,
  after: Callable[[list], object] | None = None,
) -> tuple[float, float, float]:
  """Bytes a cell, and CPU us a cell of writing and of reading."""
  encode = codec.encode if codec else bytes
  decode = codec.decode if codec else bytes

  def write() -> list:
    return [encode(piece) for piece in pieces]

  stored = write()

  def read() -> list:
    out = [
      np.frombuffer(decode(s), p.dtype).reshape(p.shape)
      for s, p in zip(stored, pieces)
    ]
    if after:
      after(out)
    return out

  for got, piece in zip(read(), pieces):
    np.testing.assert_array_equal(got, piece)
  size = sum(len(s) for s in stored) / num_cells
  return (
    size,
    least_cpu(write, repeats) / num_cells * 1e6,
    least_cpu(read, repeats) / num_cells * 1e6,
  )


def ranked(
  path: str, cells: encoding.RaggedCells, species: int
) -> tuple[np.ndarray, ...]:
  """The same cells ranked: ragged and padded tokens, and float32 values."""
  opened = corpus.Corpus.open(path)
  encoded = encoding.CellEncoder(
    encoding.EncodingConfig(max_genes=_MAX_GENES),
    opened.tokens(species),
    opened.medians(encoding.RELEASED).divisor_V(species),
  ).encode(cells)
  shape = cells.num_cells, _MAX_GENES
  ids, values = np.zeros(shape, np.uint16), np.zeros(shape, np.float32)
  length_C = np.diff(encoded.starts_C1)
  is_gene = np.arange(_MAX_GENES) < length_C[:, None]
  ids[is_gene], values[is_gene] = encoded.gene_ids_N, encoded.values_N
  return ids[is_gene], values[is_gene], ids.ravel(), values.ravel()


def main() -> None:
  """Prints three tables: codecs, layouts, sizes of chunks."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('corpus')
  parser.add_argument('--cells', type=int, default=4096)
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  cells, species = read_cells(args.corpus, args.cells)
  num = cells.num_cells
  steps_N = differences(cells)
  both_2N = np.stack([steps_N, cells.counts_N])
  chosen = next(iter(CODECS.values()))
  print(
    f'{num:,} real cells of {len(steps_N) / num:.0f} expressed genes; numcodecs'
    f' {numcodecs.__version__}; {corpus_bench.machine()}\n'
  )

  def undo(pieces: list[np.ndarray]) -> None:
    rows_N = np.concatenate([p.reshape(-1, p.shape[-1])[0] for p in pieces])
    corpus.undo_differences(rows_N, cells.starts_C1)

  def table(title: str, rows: list[tuple]) -> None:
    print(f'| {title} | bytes a cell | write, us a cell | read, us a cell |')
    print('|---|---|---|---|')
    for name, (size, write, read) in rows:
      print(f'| {name} | {size:,.0f} | {write:.1f} | {read:.1f} |', flush=True)
    print()

  def run(array, codec, size=shards.INNER_CHUNK, after=undo):
    return measure(chunks(array, size), codec, num, args.repeats, after)

  table(
    'uint16[2, n], differences and counts, chunks of 65,536',
    [(name, run(both_2N, codec)) for name, codec in CODECS.items()],
  )
  two = [run(a, chosen, after=f) for a, f in (
    (steps_N, undo), (cells.counts_N, None)
  )]  # fmt: skip
  ids, values, padded_ids, padded_values = ranked(args.corpus, cells, species)
  ranked_ids = run(ids, chosen, after=None)
  ranked_values = run(values, chosen, after=None)
  padded_both = (
    run(padded_ids, chosen, after=None),
    run(padded_values, chosen, after=None),
  )
  absolute = np.stack([cells.gene_rows_N.astype(np.uint16), cells.counts_N])
  pairs = np.ascontiguousarray(both_2N.T).reshape(-1)

  def total(parts):
    return tuple(np.sum(parts, axis=0))

  table(
    'layout, all blosc lz4 5 bitshuffle',
    [
      ('uint16[2, n], differences (the format)', run(both_2N, chosen)),
      ('two arrays uint16[n]', total(two)),
      ('pairs uint16[n, 2]', run(pairs, chosen, 2 * 65_536, None)),
      ('uint16[2, n], absolute rows', run(absolute, chosen, after=None)),
      ('ranked uint16 tokens alone', ranked_ids),
      ('ranked tokens and float32 values', total([ranked_ids, ranked_values])),
      ('padded [cells, 2048] tokens and values', total(padded_both)),
    ],
  )
  table(
    'inner chunk, elements',
    [
      (f'{size:,}', run(both_2N, chosen, size))
      for size in (4096, 16_384, 65_536, 262_144, 1 << 20)
    ],
  )


if __name__ == '__main__':
  main()
