"""Third stage: buckets are sorted into runs, as they will stand in the corpus.

A run is the cells of one split in one bucket: arrays that only have to be
joined end to end. The same pass counts the medians' histograms over training
cells, and how many cells there are of each kind.
"""

import collections
import dataclasses
import os

import numpy as np

from genecompass_jax import (
  corpus,
  corpus_writer,
  encoding,
  kernels,
  medians,
)
from genecompass_jax.prepare.building import cells as cells_lib, pieces, plans

NAME = 'runs'  # of the stage


@dataclasses.dataclass(frozen=True)
class Sort:
  """What the tasks share.

  Attributes:
    plan: of the build.
    buckets: (species, bucket) of each task.
    median_sources: for each species, the sources whose cells give the medians.
    median_kinds: for each species, the place in `assays.KINDS` of those cells.
    mixed: sources that have cells of several kinds.
    split_by_cell: for each source, whether its cells are split one by one.
  """

  plan: plans.Plan
  buckets: tuple[tuple[int, int], ...]
  median_sources: tuple[tuple[int, ...], ...]
  median_kinds: tuple[int, ...]
  mixed: tuple[int, ...]
  split_by_cell: tuple[bool, ...]


def sort(context: Sort, task: int, folder: str) -> dict:
  """Sorts a bucket; leaves the arrays of each split, and the histograms."""
  plan = context.plan
  species, bucket = context.buckets[task]
  result: dict = {'cells': {}, 'elements': {}, 'large': {}, 'kinds': []}
  cells = pieces.read_bucket(plan, species, bucket)
  if cells is None:
    return result
  split_C = splits_of(context, cells)
  order_C = np.argsort(cells.records_C['key'], kind='stable')
  num_rows = len(plan.vocabulary().gene_rows(species))
  for split, name in enumerate(corpus.SPLITS):
    index_C = order_C[split_C[order_C] == split]
    if not len(index_C):
      continue
    run = cells.take(index_C)
    large = _write(plan, run, num_rows, os.path.join(folder, name))
    result['cells'][name] = len(index_C)
    result['elements'][name] = len(run.rows_N)
    result['large'][name] = large
    if split == 0:
      count_medians(context, species, run, folder)
      result['kinds'] = _count_kinds(plan, run)
  return result


def splits_of(context: Sort, cells: cells_lib.Cells) -> np.ndarray:
  """int8 index into the splits of each cell; -1 for one that is refused."""
  plan = context.plan
  records_C = cells.records_C
  source_C = records_C['codes'][:, 0]
  split_U, unit_U = plan.load('splits'), plan.load('units')
  split_C = np.asarray(split_U)[records_C['codes'][:, 1]].astype(np.int8)
  for number in np.unique(source_C):
    mine = np.flatnonzero(source_C == number)
    if context.split_by_cell[number]:
      # another hash than the order's, or a split would be a range of it
      draw = kernels.mix64_all(records_C['key'][mine] + kernels.GOLDEN)
      share = draw.astype(np.float64) / 2.0**64
      split_C[mine] = share < plan.validation_share
    keep_C = plan.load(f'keep/{number}')
    split_C[mine[~keep_C[records_C['source_row'][mine]]]] = -1
  # units that were joined are one
  records_C['codes'][:, 1] = np.asarray(unit_U)[records_C['codes'][:, 1]]
  return split_C


def _write(
  plan: plans.Plan, run: cells_lib.Cells, num_rows: int, place: str
) -> int:
  """Writes the arrays of a run; returns how many large counts there are."""
  planes, large = corpus_writer.to_planes(run.ragged(), num_rows, plan.is_float)
  records_C = run.records_C
  files = {
    'steps': planes[0],
    'length': records_C['length'].astype('<u2'),
    'total': records_C['total'].astype('<f8' if plan.is_float else '<u4'),
    'source_row': records_C['source_row'],
    'codes': np.ascontiguousarray(records_C['codes'].T),
    'large': large,
    'names': np.frombuffer(cells_lib.encode_names(run.names), np.uint8),
  }
  if plan.is_float:
    files['values'] = run.counts_N
  else:
    files['counts'] = planes[1]
  for name, array in files.items():
    np.save(f'{place}.{name}.npy', array)
  return large.shape[1]


def load(plan: plans.Plan, task: int, split: str, name: str) -> np.ndarray:
  """An array of a run, mapped into memory."""
  return plan.stage(NAME).array(task, f'{split}.{name}')


def histogram(
  plan: plans.Plan, mode: str, species: int
) -> medians.MedianHistogram:
  """An empty histogram over the genes of a species."""
  vocab = plan.vocabulary()
  token_R = vocab.token_G[vocab.gene_rows(species)]
  return medians.MedianHistogram(mode, token_R, vocab.size)


def count_medians(
  context: Sort, species: int, run: cells_lib.Cells, folder: str
) -> None:
  """Counts the cells that give the medians; leaves sparse histograms."""
  ragged = median_cells(context, species, run)
  for mode in encoding.MODES:
    counted = histogram(context.plan, mode, species)
    counted.add(ragged)
    where, counts = counted.sparse()
    np.save(os.path.join(folder, f'bins-{mode}.npy'), where)
    np.save(os.path.join(folder, f'counts-{mode}.npy'), counts)


def median_cells(
  context: Sort, species: int, run: cells_lib.Cells
) -> encoding.RaggedCells:
  """The cells of a run that give the medians of a species."""
  source_C = run.records_C['codes'][:, 0]
  mine_C = np.isin(source_C, context.median_sources[species])
  for source in context.mixed:
    kind_C = context.plan.load(f'assays/{source}')
    here_C = np.flatnonzero(mine_C & (source_C == source))
    rows_C = run.records_C['source_row'][here_C]
    mine_C[here_C] = kind_C[rows_C] == context.median_kinds[species]
  if mine_C.all():
    return run.ragged()
  return run.take(np.flatnonzero(mine_C)).ragged()


def _count_kinds(plan: plans.Plan, run: cells_lib.Cells) -> list:
  """[codes of the columns to weigh by, cells] of each kind of cells."""
  if not plan.weigh_by:
    return []
  columns = [
    run.records_C['codes'][:, k]
    for k in plan.load('weigh_columns')  # places among the labels
  ]
  kinds = collections.Counter(zip(*(column.tolist() for column in columns)))
  return [[list(kind), number] for kind, number in sorted(kinds.items())]


def merged_medians(
  plan: plans.Plan,
  buckets: tuple[tuple[int, int], ...],
  species: int,
  mode: str,
) -> medians.MedianHistogram:
  """The histogram of a species over all runs; merging is a sum."""
  total = histogram(plan, mode, species)
  stage = plan.stage(NAME)
  for task, (of_species, _) in enumerate(buckets):
    place = os.path.join(stage.place(task), f'bins-{mode}.npy')
    if of_species == species and os.path.exists(place):
      total.add_sparse(
        np.asarray(stage.array(task, f'bins-{mode}')),
        np.asarray(stage.array(task, f'counts-{mode}')),
      )
  return total
