"""Scores of the cells of a question, one record each, made once and kept.

A record holds all scores of a cell. Records lie in a file in the order of the
tables (target, group, unit, row), so that tables are made of one unit at a time
and do not depend on batches; a cell that is finished is not asked again.
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from genecompass_jax import errors, paths, pretrained, progress
from genecompass_jax.analysis import cell_choice, model_cells, unfinished
from genecompass_jax.analysis.attribution import questions, targets
from genecompass_jax.prepare import sources

_FORMAT = 1
_READ_BYTES = 16 << 20  # of records at a time


@dataclasses.dataclass(frozen=True)
class AskedCells:
  """N cells, each with the target that it is asked for.

  Attributes:
    target_N: int32 place of the target.
    group_N: int32 code of the group.
    unit_N: int32 code of the unit.
    row_N: int64 row in the source.
    holding_TG: int64 cells of every target and group of the names that hold the
      gene, before any draw.
    longest: genes of the longest of the cells.
  """

  target_N: np.ndarray
  group_N: np.ndarray
  unit_N: np.ndarray
  row_N: np.ndarray
  holding_TG: np.ndarray
  longest: int

  @classmethod
  def of(
    cls,
    stream: sources.CellStream,
    model: pretrained.PretrainedModel,
    asked: Sequence[targets.Target],
    chosen: cell_choice.ChosenCells,
  ) -> 'AskedCells':
    """Reads all cells of the groups once, to draw from those that hold a gene.

    Raises:
      UserError: no cell can be asked, or a gene that no species has.
    """
    can_C = chosen.can_be_asked()
    token_TS = [targets.tokens_of_cells(t, model, stream) for t in asked]
    holds_TC = np.zeros((len(asked), stream.source.num_cells), bool)
    length_C = np.zeros(stream.source.num_cells, np.int64)
    with progress.Progress(int(can_C.sum()), 'cells', 'reading') as bar:
      for chunk in model_cells.encode(stream, model, can_C):
        for t, token_S in enumerate(token_TS):
          holds_TC[t, chunk.index_C] = questions.holds(chunk, token_S)
        length_C[chunk.index_C] = np.diff(chunk.cells.starts_C1)
        bar.update(len(chunk.index_C))
    parts = []
    number = len(chosen.groups.names)
    holding_TG = np.zeros((len(asked), number), np.int64)
    for t in range(len(asked)):
      codes_C = chosen.groups.code_C[holds_TC[t] & can_C]
      holding_TG[t] = np.bincount(codes_C, minlength=number)
      for group in chosen.codes:
        rows = chosen.rows(group, holds_TC[t])
        parts.append((np.full(len(rows), t), np.full(len(rows), group), rows))
    target_N, group_N, row_N = (np.concatenate(x) for x in zip(*parts))
    if not len(row_N):
      what = ' or '.join(str(getattr(t, 'gene', 'a gene')) for t in asked)
      raise errors.UserError(
        f'{stream.source.name}: none of the {int(can_C.sum()):,} cells holds '
        f'{what} among the genes that the model reads; choose other cells or '
        'another gene'
      )
    return cls(
      target_N=target_N.astype(np.int32),
      group_N=group_N.astype(np.int32),
      unit_N=chosen.units.code_C[row_N],
      row_N=row_N,
      holding_TG=holding_TG,
      longest=int(length_C[row_N].max()),
    )

  def runs(self) -> Iterator[tuple[int, int, int, slice]]:
    """Target, group, unit, and the cells of each that there are, in order."""
    keys_3N = np.stack([self.target_N, self.group_N, self.unit_N])
    is_new_N = np.append(True, (np.diff(keys_3N) != 0).any(0))
    firsts = np.flatnonzero(is_new_N)
    for first, stop in zip(firsts, [*firsts[1:], len(self.row_N)]):
      t, group, unit = keys_3N[:, first].tolist()
      yield t, group, unit, slice(int(first), int(stop))


def record_type(question: questions.Question, longest: int) -> np.dtype:
  """What is kept of a cell; places beyond its genes have token -1.

  `scores` are of every part, or of all together where the method does not
  share out.
  """
  parts = len(question.chosen)
  shared = 1 if question.method == questions.OCCLUSION else parts
  return np.dtype(
    [
      ('at_input', '<f4'),
      ('at_baseline', '<f4'),
      ('error', '<f8'),
      ('points', '<i4'),
      ('is_close', '?'),
      ('by_part', '<f4', (parts,)),
      ('tokens', '<i4', (longest,)),
      ('by_gene', '<f4', (longest,)),
      ('scores', '<f4', (longest, shared)),
    ]
  )


def run(
  question: questions.Question,
  asked: Sequence[targets.Target],
  stream: sources.CellStream,
  cells: AskedCells,
  records: unfinished.Records,
  batch_size: int,
) -> int:
  """Asks about all cells that are not finished.

  Returns:
    Cells that were finished before.
  """
  number = len(cells.row_N)
  is_done_N = np.concatenate([done for _, _, done in _pieces(records)])
  num_rows = question.placed.num_rows(batch_size)
  if is_done_N.any():
    logging.warning(
      '%s: going on, %d of %d cells are finished',
      *(stream.source.name, is_done_N.sum(), number),
    )
  with progress.Progress(number, 'cells', 'attribution') as bar:
    bar.skip(int(is_done_N.sum()))
    for t, target in enumerate(asked):
      left = np.flatnonzero((cells.target_N == t) & ~is_done_N)
      place_C = np.full(stream.source.num_cells, -1)
      place_C[cells.row_N[left]] = left
      if not len(left):
        continue
      own = question.about(target)
      for rows in questions.of_cells(own, stream, num_rows, place_C >= 0):
        found = questions.explain(own, rows)
        records.write(place_C[found['cell_C']], _records(found, records.dtype))
        bar.update(len(found['cell_C']))
  return int(is_done_N.sum())


def _records(found: dict[str, Any], dtype: np.dtype) -> np.ndarray:
  """Scores of a batch as `questions.explain` gives them, as records."""
  lengths_C = found['lengths_C']
  records_C = np.zeros(len(lengths_C), dtype)
  for name in ('at_input', 'at_baseline', 'error', 'points', 'is_close'):
    records_C[name] = found[f'{name}_C']
  records_C['by_part'] = found['by_part_CK']
  records_C['tokens'] = -1
  cell_N = np.repeat(np.arange(len(lengths_C)), lengths_C)
  starts_C = np.cumsum(lengths_C) - lengths_C
  place_N = np.arange(len(cell_N)) - np.repeat(starts_C, lengths_C)
  records_C['tokens'][cell_N, place_N] = found['tokens_N']
  records_C['by_gene'][cell_N, place_N] = found['by_gene_N']
  scores_NK = found['scores_NK']
  if scores_NK is None:
    scores_NK = found['by_gene_N'][:, None]
  records_C['scores'][cell_N, place_N] = scores_NK
  return records_C


def read(
  records: unfinished.Records, cells: slice
) -> Iterator[tuple[int, np.ndarray]]:
  """Records of a range of cells, some at a time: number of the first, records.

  Raises:
    OSError: one was damaged after it was written.
  """
  for first, found, is_done in _pieces(records, cells):
    if not is_done.all():
      raise OSError(
        f'the record of cell {first + int(np.argmin(is_done))} was damaged '
        'after it was written; the same command makes it anew'
      )
    yield first, found


def _pieces(
  records: unfinished.Records, cells: slice = slice(None)
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  step = max(1, _READ_BYTES // records.dtype.itemsize)
  begin, end, _ = cells.indices(records.num_cells)
  for first in range(begin, end, step):
    yield first, *records.read(first, min(first + step, end))


def check_room(target: str, num_cells: int, dtype: np.dtype) -> None:
  """Refuses what the disk has no room for.

  Raises:
    UserError: it has less than the records need.
  """
  place = os.path.dirname(os.path.abspath(target))
  need, free = num_cells * dtype.itemsize, shutil.disk_usage(place).free
  need -= unfinished.size(target)
  if need > free:
    raise errors.UserError(
      f'{place}: scores of {num_cells:,} cells take {need / 2**30:.1f} GiB, and '
      f'{free / 2**30:.1f} are free: ask about fewer cells (max_cells)'
    )


def settings(
  question: questions.Question,
  words: Sequence[str],
  stream: sources.CellStream,
  cells: AskedCells,
) -> dict[str, Any]:
  """What records depend on; names are those that a message shows.

  Args:
    question: what is asked.
    words: the targets, each in one line that tells it from others.
    stream: the cells.
    cells: that are asked.
  """
  model, config = question.model, stream.source.config
  order = (cells.target_N, cells.group_N, cells.unit_N, cells.row_N)
  return {
    'format': _FORMAT,
    'cells': stream.source.sha256,
    'layer': stream.source.layer,
    'species': paths.sha256_bytes(stream.source.species_C.tobytes()),
    'ids_of': config.ids_of,
    'checkpoint': model.sha256,
    'checkpoint_step': model.step,
    'vocabulary': model.vocabulary.sha256,
    'targets': list(words),
    'over': question.over,
    'method': question.method,
    'baseline': question.baseline,
    'tolerance': question.tolerance,
    'max_points': question.max_points,
    'number of cells': len(cells.row_N),
    'cells that are asked': paths.sha256_bytes(
      b''.join(x.astype(np.int64).tobytes() for x in order)
    ),
  }
