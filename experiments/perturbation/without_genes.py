"""Deletions whose score leaves some genes out.

The genes stay in the cells, and the model reads them; their states are part of
neither side of the comparison, and not of the axis.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from genecompass_jax import pretrained, rows
from genecompass_jax.analysis import placed_model
from genecompass_jax.analysis.perturbation import (
  cell_set,
  comparison,
  effects as effects_lib,
  interventions,
  ranks,
  variants,
)

_ROWS = 32


def axis(
  model: pretrained.PretrainedModel,
  start: cell_set.CellSet,
  goal: cell_set.CellSet,
  left_out_V: np.ndarray,
) -> np.ndarray:
  """Unit vector from the centroid of one set of cells to that of another."""
  placed = placed_model.place(model)
  apart_D = _centroid(placed, goal, left_out_V) - _centroid(
    placed, start, left_out_V
  )
  return (apart_D / np.linalg.norm(apart_D)).astype(np.float32)


def _centroid(placed, cells: cell_set.CellSet, left_out_V) -> np.ndarray:
  pooled = []
  for chosen, base, slots in _batches(placed, cells.encode()):
    batch = rows.cell_batch_rows(
      base, np.full(len(chosen), cells.species), slots, _ROWS
    )
    hidden_BLD = comparison.states(placed, batch)
    is_used_BL = _is_gene(batch) & ~left_out_V[batch.gene_ids_BL]
    pooled_BD = comparison.pool(
      hidden_BLD, jnp.asarray(is_used_BL, jnp.float32), 'mean'
    )
    pooled.append(np.asarray(pooled_BD)[: len(chosen)])
  return np.concatenate(pooled).mean(0)


def _is_gene(batch) -> np.ndarray:
  return (batch.segments_BL > 0) & ~batch.is_cls_BL


def _batches(placed, base):
  """Cells of one bucket together: (places, encoded, slots)."""
  slots_C = np.array(placed.buckets)[
    np.searchsorted(placed.buckets, np.diff(base.starts_C1) + 1)
  ]
  for slots in np.unique(slots_C):
    places = np.flatnonzero(slots_C == slots)
    for first in range(0, len(places), _ROWS):
      chosen = places[first : first + _ROWS]
      yield chosen, ranks.take(base, chosen), int(slots)


def deletions(
  model: pretrained.PretrainedModel,
  cells: cell_set.CellSet,
  tokens: Sequence[int],
  left_out_V: np.ndarray,
  axis_D: np.ndarray | None = None,
) -> effects_lib.CellEffects:
  """Deletes every gene in every cell that shows it to the model.

  Args:
    model: that is asked.
    cells: unperturbed.
    tokens: their places are the numbers of the variants.
    left_out_V: bool, tokens whose states are not compared.
    axis_D: for `toward`.
  """
  placed = placed_model.place(model)
  whole = cells.encode()
  rank_of = ranks.Ranks(whole, len(cells.divisor_V))
  done = [
    interventions.Intervention(interventions.DELETE, (int(t),), (str(t),))
    for t in tokens
  ]
  axis_D = None if axis_D is None else jnp.asarray(axis_D)
  found: list[list[np.ndarray]] = []
  for chosen, base_cells, slots in _batches(placed, whole):
    batch = rows.cell_batch_rows(
      base_cells, np.full(len(chosen), cells.species), slots, _ROWS
    )
    lengths_B = np.zeros(_ROWS, np.int32)
    lengths_B[: len(chosen)] = np.diff(base_cells.starts_C1)
    base = comparison.Base(
      comparison.states(placed, batch),
      jnp.asarray(batch.gene_ids_BL),
      jnp.asarray(batch.values_BL),
      jnp.asarray(lengths_B),
      jnp.asarray(lengths_B),
    )
    row_P, variant_P = np.meshgrid(
      np.arange(len(chosen)), np.arange(len(done)), indexing='ij'
    )
    row_P, variant_P = row_P.reshape(-1), variant_P.reshape(-1)
    rank_P = rank_of.of(chosen[row_P], np.asarray(tokens)[variant_P])
    row_P, variant_P = row_P[rank_P >= 0], variant_P[rank_P >= 0]
    for first in range(0, len(row_P), _ROWS):
      row_B = row_P[first : first + _ROWS]
      variant_B = variant_P[first : first + _ROWS]
      made = variants.make(
        cells,
        whole,
        chosen[row_B],
        [done[v] for v in variant_B],
        slots,
      )
      is_out_BL = left_out_V[made.batch.gene_ids_BL]
      base_slot_BL = np.where(is_out_BL, variants.NOWHERE, made.base_slot_BL)
      pad = _ROWS - len(row_B)
      compared = comparison.compare(
        placed,
        base,
        _padded(made.batch, pad),
        np.pad(row_B.astype(np.int32), (0, pad)),
        np.pad(base_slot_BL, ((0, pad), (0, 0)), constant_values=-1),
        axis_D,
        pooling='mean',
        responses=False,
      )
      number = len(row_B)
      found.append(
        [
          variant_B.astype(np.int32),
          cells.row_C[chosen[row_B]],
          made.rank_B,
          lengths_B[row_B],
          made.entered_B,
          np.asarray(compared.shift_B)[:number],
          np.asarray(compared.gene_shift_B)[:number],
          np.asarray(compared.toward_B)[:number],
        ]
      )
  columns = [np.concatenate(c) for c in zip(*found)]
  order_N = np.lexsort((columns[1], columns[0]))
  return effects_lib.CellEffects(*(c[order_N] for c in columns))


def _padded(batch, pad: int):
  return type(batch)(
    **{
      name: np.pad(np.asarray(value), ((0, pad), (0, 0)))
      for name, value in vars(batch).items()
    }
  )
