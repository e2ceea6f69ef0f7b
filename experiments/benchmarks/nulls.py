"""What counting alone predicts on real cells, and what it costs.

  python experiments/benchmarks/nulls.py --data CELLS.h5ad [MORE.h5ad ...]

A fifth of the cells of each file, drawn at random, is scored by null models
fitted on the rest (cells, not donors: these are figures about rank order, not
about generalisation). Columns are the genes as the file has them, numbered by
name, so that the `token` order of ties is that of names. `mask` is the id loss
where the position shows `<mask>`, `all` at all hidden positions, where a tenth
shows its own id. Values: gene mean over interpolation, and over the bracket
mean, as ratios of squared errors. Times are of one core. `--objective split`
prints the mean loss of each null model of that objective.
"""

import argparse
import platform
import time

import anndata
import numpy as np
import scipy.sparse

from genecompass_jax import (
  encoding,
  masking,
  medians,
  nulls,
  rows,
  vocabulary,
)

ARMS = (('released', 'hash'), ('released', 'token'), ('library', 'hash'))
FIRST = vocabulary.NUM_SPECIAL
ROWS = 64


def read(path: str) -> scipy.sparse.csr_matrix:
  """Counts with the genes sorted by name; human cells where a file mixes."""
  adata = anndata.read_h5ad(path)
  if 'species' in adata.obs:
    adata = adata[adata.obs['species'] == 'human']
  table = scipy.sparse.csr_matrix(adata.X[:, np.argsort(adata.var_names)])
  table.sort_indices()
  table.eliminate_zeros()
  return table


def ragged(table: scipy.sparse.csr_matrix) -> encoding.RaggedCells:
  return encoding.RaggedCells(
    table.indices.astype(np.int32),
    table.data.astype(np.float64),
    table.indptr.astype(np.int64),
    np.asarray(table.sum(1), np.float64).ravel(),
  )


def batches(cells, masked):
  """One cell a row, 64 rows."""
  cells, masked = masking.set_apart(cells, masked)
  lengths = np.diff(cells.starts_C1)
  slots = int(lengths.max()) + 1
  for first in range(0, cells.num_cells, ROWS):
    number = min(ROWS, cells.num_cells - first)
    c = slice(first, first + number)
    n = slice(cells.starts_C1[first], cells.starts_C1[first + number])
    starts = cells.starts_C1[first : first + number + 1] - n.start
    some = encoding.EncodedCells(
      cells.gene_ids_N[n],
      cells.values_N[n],
      starts,
      cells.keys_C[c],
      cells.num_genes_C[c],
    )
    unranked = None if masked.unranked_C is None else masked.unranked_C[c]
    batch = rows.empty_batch(number, slots, slots)
    row_C = np.arange(number)
    zeros = np.zeros(number, np.int64)
    rows.place_cells(
      batch.cells,
      starts,
      masked.gene_ids_N[n],
      masked.values_N[n],
      row_C,
      zeros,
      zeros + 1,
      zeros,
      unranked,
    )
    picks = np.flatnonzero(masked.is_masked_N[n])
    picks_C1 = np.searchsorted(picks, starts)
    rows.place_labels(
      batch, some, picks, picks_C1, row_C, zeros, zeros, unranked
    )
    yield batch


def measure(table, mode, ties, seed, objective):
  """Mean losses, all and where `<mask>` is shown, and times in seconds."""
  num_cells, num_genes = table.shape
  config = encoding.EncodingConfig(mode, ties)
  tokens = np.arange(FIRST, FIRST + num_genes, dtype=np.int32)
  size = FIRST + num_genes
  held = np.random.default_rng(seed).permutation(num_cells) < num_cells // 5
  train, test = ragged(table[~held]), ragged(table[held])
  histogram = medians.MedianHistogram(mode, tokens, size)
  histogram.add(train)
  known = medians.Medians(
    mode,
    histogram.median_V()[None],
    histogram.support_V()[None],
    np.zeros(size, bool),
  )
  divisor_V = known.divisor_V(0)
  encoder = encoding.CellEncoder(config, tokens, divisor_V)
  mask = masking.MaskConfig(objective=objective)
  started = time.perf_counter()
  model = nulls.NullModels.fit(
    [nulls.TrainingCells(0, encoder.encode(train))],
    encoding_config=config,
    mask=mask,
    divisor_SV=divisor_V[None],
    species_tokens=[tokens],
    seed=seed,
  )
  fit_seconds = time.perf_counter() - started
  cells = encoder.encode(test)
  masked = masking.mask_cells(
    cells,
    np.arange(cells.num_cells),
    config=mask,
    seed=seed,
    epoch=masking.EVALUATION_EPOCH,
    random_tokens=tokens,
    vocabulary_size=size,
  )
  sums = {name: np.zeros(2) for name in model.names}
  counts = {'id': np.zeros(2), 'value': np.zeros(2)}
  seconds = []
  model.losses(next(batches(cells, masked)))  # compiles, and builds the tables
  for batch in batches(cells, masked):
    started = time.perf_counter()
    losses = model.losses(batch)
    seconds.append((time.perf_counter() - started) / len(batch.id_labels_BK))
    shown = np.take_along_axis(
      batch.cells.gene_ids_BL, batch.masked_slots_BK, axis=1
    )
    used = {'id': batch.id_weights_BK > 0, 'value': batch.value_weights_BK > 0}
    for part, among in enumerate((True, shown == vocabulary.MASK)):
      for kind, where in used.items():
        counts[kind][part] += (where & among).sum()
      for name in model.names:
        where = used[name.split('_')[1]] & among
        sums[name][part] += losses[name][where].sum()
  means = {
    name: total / np.maximum(counts[name.split('_')[1]], 1)
    for name, total in sums.items()
  }
  length = np.diff(cells.starts_C1).mean()
  return means, length, fit_seconds, np.median(seconds), model.choices[0]


def print_split(args):
  """A row an arm under `split`: mean losses of every null."""
  for path in args.data:
    table = read(path)
    name = path.rsplit('/', 1)[-1].removesuffix('.h5ad')[:16]
    for mode, ties in ARMS:
      means, length, fit_seconds, seconds, choices = measure(
        table, mode, ties, args.seed, args.objective
      )
      losses = ', '.join(
        f'{null.removeprefix("null_").replace("_", " ")} {mean[0]:.4g}'
        for null, mean in means.items()
      )
      print(
        f'{name:16} {mode:8} {ties:5} {length:5.0f} genes: {losses};'
        f' {64e3 * seconds:.1f} ms a 64, {fit_seconds:.1f} s to fit',
        flush=True,
      )
      if args.choices:
        print(f'  {choices}')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', nargs='+', required=True, metavar='H5AD')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--choices', action='store_true', help='print choices too'
  )
  parser.add_argument(
    '--objective', default=masking.RELEASED, choices=masking.OBJECTIVES
  )
  args = parser.parse_args()
  print(f'{platform.machine()}, Python {platform.python_version()}')
  if args.objective == masking.SPLIT:
    print_split(args)
    return
  print(
    f'{"":38} {"id, <mask> shown":^24} {"id, all":^24}'
    f' {"gene mean /":^13} {"ms a":>7} {"s to":>6}'
  )
  print(
    f'{"cells":16} {"mode":8} {"ties":5} {"genes":>6}'
    f' {"margin":>8}{"bin":>8}{"bracket":>8} {"margin":>8}{"bin":>8}'
    f'{"bracket":>8} {"line":>6}{"brack":>7} {"64":>7} {"fit":>6}'
  )
  for path in args.data:
    table = read(path)
    name = path.rsplit('/', 1)[-1].removesuffix('.h5ad')[:16]
    for mode, ties in ARMS:
      means, length, fit_seconds, seconds, choices = measure(
        table, mode, ties, args.seed, args.objective
      )
      ids = [
        f'{means[null][part]:8.2f}'
        for part in (1, 0)
        for null in nulls.ID_NAMES
      ]
      mean, line, bracket = (means[null][0] for null in nulls.VALUE_NAMES)
      print(
        f'{name:16} {mode:8} {ties:5} {length:6.0f} {"".join(ids[:3])}'
        f' {"".join(ids[3:])} {mean / line:6.0f}{mean / bracket:7.0f}'
        f' {64e3 * seconds:7.1f} {fit_seconds:6.1f}',
        flush=True,
      )
      if args.choices:
        print(f'  {choices}')


if __name__ == '__main__':
  main()
