"""Encoded cells -> arrays of a batch: filling rows exists once, here.

Training lays several cells in a row; evaluation, embedding and the tasks lay
one. All of it is compiled, for a padded row of 2,304 slots is 48 kB.
"""

from collections.abc import Sequence

import numpy as np

from genecompass_jax import encoding, kernels, masking, schemas


@kernels.compiled
def _place_cells(
  starts_C1, gene_ids_N, values_N, row_C, slot_C, segment_C, species_C,
  unranked_C, gene_ids_BL, values_BL, positions_BL, segments_BL, species_BL,
  is_cls_BL,
):  # fmt: skip
  for cell in range(len(row_C)):
    row = row_C[cell]
    first = slot_C[cell]
    start = starts_C1[cell]
    n = starts_C1[cell + 1] - start
    is_cls_BL[row, first] = True
    segments_BL[row, first : first + n + 1] = segment_C[cell]
    species_BL[row, first : first + n + 1] = species_C[cell]
    gene_ids_BL[row, first + 1 : first + n + 1] = gene_ids_N[start : start + n]
    values_BL[row, first + 1 : first + n + 1] = values_N[start : start + n]
    ranked = n - unranked_C[cell]
    for i in range(ranked):
      positions_BL[row, first + 1 + i] = i
    for i in range(ranked, n):
      positions_BL[row, first + 1 + i] = masking.HIDDEN_RANK


@kernels.compiled
def _place_labels(
  starts_C1, gene_ids_N, values_N, picks_P, picks_C1, row_C, slot_C, first_C,
  splits, unranked_C, gene_ids_BL, values_BL, masked_slots_BK, id_labels_BK,
  id_weights_BK, value_labels_BK, value_weights_BK,
):  # fmt: skip
  """Labels of picks; those beyond K get their gene back -> their number.

  Where the objective `splits`, genes without rank are asked for their value
  and others for their id; one without rank beyond K stays hidden, unasked, for
  it has no place to go back to.
  """
  most = masked_slots_BK.shape[1]
  dropped = 0
  for cell in range(len(row_C)):
    row = row_C[cell]
    k = first_C[cell]
    ahead = slot_C[cell] + 1 - starts_C1[cell]
    ranked_stop = starts_C1[cell + 1] - unranked_C[cell]
    for p in range(picks_C1[cell], picks_C1[cell + 1]):
      i = picks_P[p]
      slot = ahead + i
      if k < most:
        masked_slots_BK[row, k] = slot
        id_labels_BK[row, k] = gene_ids_N[i]
        id_weights_BK[row, k] = not splits or i < ranked_stop
        value_labels_BK[row, k] = values_N[i]
        value_weights_BK[row, k] = not splits or i >= ranked_stop
        k += 1
      else:
        if i < ranked_stop:
          gene_ids_BL[row, slot] = gene_ids_N[i]
          values_BL[row, slot] = values_N[i]
        dropped += 1
  return dropped


@kernels.compiled
def _gather(
  rows_N, counts_N, starts_C1, which_c, into_c, out_C1, out_rows_N, out_counts_N
):
  """Copies cells `which` of one array to places `into` of another."""
  for j in range(len(which_c)):
    a = starts_C1[which_c[j]]
    b = out_C1[into_c[j]]
    n = starts_C1[which_c[j] + 1] - a
    out_rows_N[b : b + n] = rows_N[a : a + n]
    out_counts_N[b : b + n] = counts_N[a : a + n]


def empty_batch(
  num_rows: int, slots: int, num_masked: int
) -> schemas.PretrainingBatch:
  """Padding only: NumPy arrays [B, L] and [B, K]."""

  def labels(dtype):
    return np.zeros((num_rows, num_masked), dtype)

  return schemas.PretrainingBatch(
    cells=_empty_cells(num_rows, slots),
    masked_slots_BK=labels(np.int32),
    id_labels_BK=labels(np.int32),
    id_weights_BK=labels(np.float32),
    value_labels_BK=labels(np.float32),
    value_weights_BK=labels(np.float32),
  )


def _empty_cells(num_rows: int, slots: int) -> schemas.CellBatch:
  def zeros(dtype):
    return np.zeros((num_rows, slots), dtype)

  return schemas.CellBatch(
    gene_ids_BL=zeros(np.int32),
    values_BL=zeros(np.float32),
    positions_BL=zeros(np.int32),
    segments_BL=zeros(np.int32),
    species_BL=zeros(np.int32),
    is_cls_BL=zeros(bool),
  )


def place_cells(
  batch: schemas.CellBatch,
  starts_C1: np.ndarray,
  gene_ids_N: np.ndarray,
  values_N: np.ndarray,
  row_C: np.ndarray,
  slot_C: np.ndarray,
  segment_C: np.ndarray,
  species_C: np.ndarray,
  unranked_C: np.ndarray | None = None,
) -> None:
  """Writes cells into a batch: cell c at row, from its CLS slot on.

  The last `unranked_C` genes of a cell have no rank; None: all have one.
  """
  _place_cells(
    starts_C1,
    gene_ids_N,
    values_N,
    row_C,
    slot_C,
    segment_C,
    species_C,
    _or_zeros(unranked_C, len(row_C)),
    batch.gene_ids_BL,
    batch.values_BL,
    batch.positions_BL,
    batch.segments_BL,
    batch.species_BL,
    batch.is_cls_BL,
  )


def place_labels(
  batch: schemas.PretrainingBatch,
  cells: encoding.EncodedCells,
  picks_P: np.ndarray,
  picks_C1: np.ndarray,
  row_C: np.ndarray,
  slot_C: np.ndarray,
  first_C: np.ndarray,
  unranked_C: np.ndarray | None = None,
) -> int:
  """Writes what was hidden in cells that are placed already.

  Args:
    batch: written to; a pick beyond K gets its gene and value back.
    cells: the cells before masking, in the order they are placed in.
    picks_P: int64 places in N of the genes to predict, ascending.
    picks_C1: cell c has picks_P[picks_C1[c] : picks_C1[c + 1]].
    row_C: row of each cell.
    slot_C: slot of its CLS.
    first_C: picks before it in its row.
    unranked_C: genes without rank, the last of each cell: these are asked for
      their value, the others for their id. None: picks are asked for both.

  Returns:
    Picks beyond K.
  """
  return _place_labels(
    cells.starts_C1,
    cells.gene_ids_N,
    cells.values_N,
    picks_P,
    picks_C1,
    row_C,
    slot_C,
    first_C,
    unranked_C is not None,
    _or_zeros(unranked_C, len(row_C)),
    batch.cells.gene_ids_BL,
    batch.cells.values_BL,
    batch.masked_slots_BK,
    batch.id_labels_BK,
    batch.id_weights_BK,
    batch.value_labels_BK,
    batch.value_weights_BK,
  )


def _or_zeros(number_C: np.ndarray | None, num_cells: int) -> np.ndarray:
  return np.zeros(num_cells, np.int64) if number_C is None else number_C


def within_rows(row_N: np.ndarray, sizes_N: np.ndarray) -> np.ndarray:
  """Sum of the sizes that come before each cell in its row."""
  before_N = np.cumsum(sizes_N) - sizes_N
  starts_row = np.flatnonzero(np.diff(row_N, prepend=-1))
  runs = np.diff(np.append(starts_row, len(row_N)))
  return before_N - np.repeat(before_N[starts_row], runs)


def cell_batch_rows(
  cells: encoding.EncodedCells,
  species_C: np.ndarray,
  slots: int,
  num_rows: int | None = None,
) -> schemas.CellBatch:
  """Encoded cells as a batch, one cell a row, nothing hidden.

  Args:
    cells: C encoded cells of one or both species.
    species_C: species code of each cell.
    slots: L, at least the genes of the longest cell and one.
    num_rows: B, at least C; rows beyond C are padding. C if not given.

  Returns:
    NumPy arrays [B, L].

  Raises:
    ValueError: the cells do not fit.
  """
  num_cells = cells.num_cells
  num_rows = num_cells if num_rows is None else num_rows
  longest = int(np.diff(cells.starts_C1).max(initial=0))
  if num_rows < num_cells or slots < longest + 1:
    raise ValueError(
      f'{num_cells} cells of up to {longest} genes do not fit'
      f' {num_rows=} of {slots=}'
    )
  batch = _empty_cells(num_rows, slots)
  row_C = np.arange(num_cells)
  place_cells(
    batch,
    cells.starts_C1,
    cells.gene_ids_N,
    cells.values_N,
    row_C,
    np.zeros_like(row_C),
    np.ones_like(row_C),
    np.asarray(species_C, np.int64),
  )
  return batch


def gather(
  parts: Sequence[tuple[encoding.RaggedCells, np.ndarray, np.ndarray]],
  num_cells: int,
) -> encoding.RaggedCells:
  """Copies cells out of several arrays into one.

  Args:
    parts: (cells, which of them, their places in the result); the places of
      all parts together are 0 to num_cells - 1, each once.
    num_cells: of the result.
  """
  lengths_C = np.zeros(num_cells, np.int64)
  totals_C = np.zeros(num_cells, np.float64)
  for cells, which, into in parts:
    lengths_C[into] = cells.starts_C1[which + 1] - cells.starts_C1[which]
    totals_C[into] = cells.totals_C[which]
  starts_C1 = np.concatenate([[0], np.cumsum(lengths_C)])
  arrays = (
    [(np.uint16(0), np.uint16(0))]
    if not parts
    else [(cells.gene_rows_N, cells.counts_N) for cells, _, _ in parts]
  )
  rows_N, counts_N = (
    np.empty(starts_C1[-1], np.result_type(*(a.dtype for a in column)))
    for column in zip(*arrays)
  )
  for cells, which, into in parts:
    _gather(
      kernels.read_only(cells.gene_rows_N),
      kernels.read_only(cells.counts_N),
      cells.starts_C1,
      which,
      into,
      starts_C1,
      rows_N,
      counts_N,
    )
  return encoding.RaggedCells(rows_N, counts_N, starts_C1, totals_C)
