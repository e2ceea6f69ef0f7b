"""First stage: ranges of cells are read, counted, and scattered over buckets.

A bucket is a range of the hash that orders the corpus, so that reading the
buckets in turn, each sorted, gives a shuffle of the whole. A piece keeps its
cells by bucket, and beside them what the filters and the search for copies
need, in the order of the source.
"""

import dataclasses
import os

import numpy as np

from genecompass_jax import kernels
from genecompass_jax.prepare import matrices
from genecompass_jax.prepare.building import (
  cells as cells_lib,
  fingerprints,
  plans,
)

NAME = 'pieces'  # of the stage
MIN_ENTRIES, MAX_ENTRIES = 1 << 22, 1 << 26  # of a piece
BYTES_PER_ENTRY = 6  # of a bucket in memory
PREFIX_BITS = 8  # of a fingerprint: they are joined by prefix
STATISTICS = np.dtype(
  [
    ('species', '<i1'),
    ('genes', '<i4'),
    ('coding', '<i4'),
    ('mito', '<f8'),
    ('total', '<f8'),
    ('length', '<i4'),
    ('place', '<i8'),
  ]
)


def cut(entries: list[int], num_cells: list[int]) -> tuple[plans.Piece, ...]:
  """Ranges of cells of about equal work, by the sources alone.

  Args:
    entries: stored entries of each source.
    num_cells: of each source.
  """
  wanted = int(np.clip(sum(entries) // 256, MIN_ENTRIES, MAX_ENTRIES))
  pieces = []
  for source, (size, cells) in enumerate(zip(entries, num_cells)):
    parts = max(1, round(size / wanted))
    each = -(-cells // parts)
    each = -(-each // matrices.CHUNK_CELLS) * matrices.CHUNK_CELLS
    pieces += [
      plans.Piece(source, first, min(first + each, cells))
      for first in range(0, cells, each)
    ]
  return tuple(pieces)


def bucket_bits(entries: int, bucket_bytes: int) -> int:
  """log2 of the number of buckets, of about `bucket_bytes` each."""
  buckets = max(BYTES_PER_ENTRY * entries / bucket_bytes, 1)
  return max(0, int(np.ceil(np.log2(buckets))))


def scatter(plan: plans.Plan, task: int, folder: str) -> dict:
  """Reads a piece.

  Leaves in the folder: the cells by (species, bucket), `bounds` [species x
  buckets + 1, 3] where each begins, `statistics` of all cells in the order of
  the source, `prints` sorted by key and `print_starts` of each
  prefix of keys, `sums` of the columns by species.

  Raises:
    UserError: a value that is no count, naming the cell.
  """
  piece = plan.pieces[task]
  stream = plan.stream(piece.source)
  source = stream.source
  stream.clear_sums()
  codes = plan.load(f'codes/{piece.source}')
  num_species = len(plan.vocabulary().species)
  sets = [plan.gene_sets(s) for s in range(num_species)]
  base = kernels.fold(plan.seed, piece.source)
  statistics_C = np.zeros(piece.stop - piece.first, STATISTICS)
  parts: list[list[cells_lib.Cells]] = [[] for _ in range(num_species)]
  prints = []
  for first in range(piece.first, piece.stop, matrices.CHUNK_CELLS):
    stop = min(first + matrices.CHUNK_CELLS, piece.stop)
    names = source.cell_names(slice(first, stop))
    for chunk in stream.read(first, stop):
      inside = chunk.index_C - piece.first
      counts = dataclasses.replace(
        chunk.cells, counts_N=cells_lib.small_counts(chunk.cells.counts_N)
      )
      records_C = np.zeros(len(inside), plan.record)
      records_C['key'] = kernels.mix64_all(
        base + chunk.index_C.astype(np.uint64) * kernels.GOLDEN
      )
      records_C['source_row'] = chunk.index_C
      records_C['total'] = chunk.cells.totals_C
      records_C['length'] = np.diff(chunk.cells.starts_C1)
      records_C['codes'] = codes[:, chunk.index_C].T
      parts[chunk.species].append(
        cells_lib.Cells(
          counts.gene_rows_N,
          counts.counts_N,
          records_C,
          names[chunk.index_C - first],
        )
      )
      found = statistics_C[inside]
      found['species'] = chunk.species
      found['length'] = records_C['length']
      for name in ('genes', 'coding', 'mito', 'total'):
        found[name] = getattr(chunk.statistics, f'{name}_C')
      statistics_C[inside] = found
      prints.append(
        fingerprints.prints(
          counts,
          sets[chunk.species],
          piece.source,
          chunk.index_C,
          chunk.species,
        )
      )
  _write(plan, piece, parts, statistics_C, folder)
  printed = np.concatenate(prints)
  printed = printed[np.argsort(printed['key'], kind='stable')]
  prefix = (printed['key'] >> np.uint64(64 - PREFIX_BITS)).astype(np.int64)
  starts = np.searchsorted(prefix, np.arange(2**PREFIX_BITS + 1))
  np.save(os.path.join(folder, 'prints.npy'), printed)
  np.save(os.path.join(folder, 'print_starts.npy'), starts)
  np.save(os.path.join(folder, 'sums.npy'), stream.column_sums)
  return {'cells': len(statistics_C), 'prints': len(printed)}


def _write(
  plan: plans.Plan,
  piece: plans.Piece,
  parts: list[list[cells_lib.Cells]],
  statistics_C: np.ndarray,
  folder: str,
) -> None:
  """Writes the cells by bucket, and where the cells of the source went."""
  num_buckets = 2**plan.bits
  ordered, counts = [], np.zeros((len(parts), num_buckets), np.int64)
  for species, some in enumerate(parts):
    if not some:
      continue
    cells = cells_lib.concatenate(some)
    bucket_C = bucket_of(cells.records_C['key'], plan.bits)
    order_C = np.argsort(bucket_C, kind='stable')
    ordered.append(cells.take(order_C))
    counts[species] = np.bincount(bucket_C, minlength=num_buckets)
  cells = cells_lib.concatenate(ordered)
  row_C = cells.records_C['source_row'] - piece.first
  statistics_C['place'][row_C] = cells.starts_C1[:-1]
  starts_K1 = np.concatenate([[0], np.cumsum(counts.ravel())])
  cells.write(folder)
  np.save(os.path.join(folder, 'bounds.npy'), cells.bounds(starts_K1))
  np.save(os.path.join(folder, 'statistics.npy'), statistics_C)


def bucket_of(key_C: np.ndarray, bits: int) -> np.ndarray:
  """int64 bucket of each ordering hash."""
  if not bits:
    return np.zeros(len(key_C), np.int64)
  return (key_C >> np.uint64(64 - bits)).astype(np.int64)


def read_bucket(
  plan: plans.Plan, species: int, bucket: int
) -> cells_lib.Cells | None:
  """The cells of one bucket, of all pieces; None where there is none."""
  stage = plan.stage(NAME)
  index = species * 2**plan.bits + bucket
  parts = []
  for task in range(len(plan.pieces)):
    bounds_23 = stage.array(task, 'bounds')[index : index + 2]
    if bounds_23[1, 0] > bounds_23[0, 0]:
      parts.append(cells_lib.read(stage.place(task), bounds_23))
  return cells_lib.concatenate(parts) if parts else None


class CellReader:
  """Counts of single cells, by source and row, out of the finished pieces."""

  def __init__(self, plan: plans.Plan):
    self._plan, self._stage = plan, plan.stage(NAME)
    self._tasks: dict[int, list[int]] = {}
    for task, piece in enumerate(plan.pieces):
      self._tasks.setdefault(piece.source, []).append(task)
    self._firsts = {
      source: np.array([plan.pieces[t].first for t in tasks])
      for source, tasks in self._tasks.items()
    }
    self._open: dict[int, tuple] = {}

  def read(self, source: int, row: int) -> tuple[int, tuple]:
    """Species of a cell, and its rows and counts."""
    k = int(np.searchsorted(self._firsts[source], row, 'right')) - 1
    task = self._tasks[source][k]
    if task not in self._open:
      place = self._stage.place(task)
      self._open[task] = (
        cells_lib.mapped(place, 'rows'),
        cells_lib.mapped(place, 'counts'),
        self._stage.array(task, 'statistics'),
      )
    rows_N, counts_N, statistics_C = self._open[task]
    cell = statistics_C[row - self._plan.pieces[task].first]
    where = slice(cell['place'], cell['place'] + cell['length'])
    return int(cell['species']), (
      np.asarray(rows_N[where]),
      np.asarray(counts_N[where]),
    )


def statistics_of(plan: plans.Plan, source: int) -> np.ndarray:
  """Statistics of all cells of a source, in its order."""
  stage = plan.stage(NAME)
  return np.concatenate(
    [
      stage.array(task, 'statistics')
      for task, piece in enumerate(plan.pieces)
      if piece.source == source
    ]
  )


def column_sums(plan: plans.Plan, source: int) -> np.ndarray:
  """Counts in each column of a source, by species."""
  stage = plan.stage(NAME)
  return sum(
    np.asarray(stage.array(task, 'sums'))
    for task, piece in enumerate(plan.pieces)
    if piece.source == source
  )
