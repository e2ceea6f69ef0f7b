"""Encoded variants of cells, and where each of their genes stood before."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import encoding, rows, schemas
from genecompass_jax.analysis.perturbation import cell_set, interventions

CLS_SLOT = 0
NOWHERE = -1  # a slot whose gene is not compared


@dataclasses.dataclass(frozen=True)
class Variants:
  """B variants, one a row of L slots, as the model takes them.

  Attributes:
    batch: NumPy arrays [B, L].
    base_slot_BL: int32 slot of the same gene in the row of the unperturbed
      cell; `NOWHERE` for perturbed genes, genes that came in, and padding.
    entered_B: int32 genes that came in because others left.
    rank_B: int32 rank that the perturbed gene had, the best of a set; -1 where
      the cell did not show it to the model.
  """

  batch: schemas.CellBatch
  base_slot_BL: np.ndarray
  entered_B: np.ndarray
  rank_B: np.ndarray


def make(
  cells: cell_set.CellSet,
  base: encoding.EncodedCells,
  cell_B: np.ndarray,
  done_B: Sequence[interventions.Intervention],
  slots: int,
  *,
  levels_of: Mapping[str, Mapping[int, float]] | None = None,
  renormalise: bool = False,
) -> Variants:
  """Encodes variants exactly as new cells of these counts would be.

  Args:
    cells: the unperturbed cells.
    base: the same, encoded.
    cell_B: a cell of each variant.
    done_B: what is done to it.
    slots: L.
    levels_of: as for `interventions.edit`.
    renormalise: likewise.
  """
  counts = interventions.edit(
    cells, cell_B, done_B, levels_of=levels_of, renormalise=renormalise
  )
  encoded = cells.encode(counts, cells.keys_C[cell_B])
  batch = rows.cell_batch_rows(
    encoded, np.full(len(cell_B), cells.species), slots
  )
  base_slot_BL = np.full((len(cell_B), slots), NOWHERE, np.int32)
  entered_B = np.zeros(len(cell_B), np.int32)
  rank_B = np.full(len(cell_B), -1, np.int32)
  place_V = np.full(len(cells.divisor_V), NOWHERE, np.int32)
  for b, (cell, done) in enumerate(zip(cell_B.tolist(), done_B)):
    before = base.gene_ids_N[base.starts_C1[cell] : base.starts_C1[cell + 1]]
    after = encoded.gene_ids_N[encoded.starts_C1[b] : encoded.starts_C1[b + 1]]
    place_V[before] = np.arange(1, len(before) + 1)
    tokens = np.array(done.tokens)
    seen = place_V[tokens]
    if (seen > 0).any():
      rank_B[b] = seen[seen > 0].min() - 1
    place_V[tokens] = NOWHERE
    slots_n = place_V[after]
    base_slot_BL[b, CLS_SLOT] = CLS_SLOT
    base_slot_BL[b, 1 : len(after) + 1] = slots_n
    is_new_n = (slots_n == NOWHERE) & ~np.isin(after, tokens)
    entered_B[b] = is_new_n.sum()
    place_V[before] = NOWHERE
  return Variants(batch, base_slot_BL, entered_B, rank_B)
