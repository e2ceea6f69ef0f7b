"""The contract between data, model and tasks: batches of encoded cells.

Legend of the shape suffixes used in the whole project:

  B rows of a batch        L slots in a row          C cells
  D model width            H attention heads         F feed-forward width
  K masked slots in a row  V tokens                  S species
  P width of a prior       G genes of a gene table   R genes of one species
  N elements of ragged (flat) storage

In attention K also names the width of one head, as is usual.
"""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CellBatch:
  """Encoded cells, as the model takes them: B rows of L slots.

  A cell takes n + 1 slots: its CLS slot first, then its n genes by falling
  rank, those whose rank is hidden last, by token. A row holds one cell or,
  packed, several.

  Attributes:
    gene_ids_BL: int32 token; 0 (`<pad>`) in CLS and padding slots.
    values_BL: float32 log2(1 + scaled count); -1 where hidden; 0 in CLS and
      padding slots.
    positions_BL: int32 rank of the gene in its cell, from 0, among the genes
      whose rank is shown; -1 where it is hidden; 0 in CLS and padding slots.
    segments_BL: int32; 0 is padding, 1, 2, ... number the cells of a row.
    species_BL: int32 species code of the slot's cell; 0 in padding.
    is_cls_BL: bool, True on the first slot of every cell.
  """

  gene_ids_BL: Array
  values_BL: Array
  positions_BL: Array
  segments_BL: Array
  species_BL: Array
  is_cls_BL: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
  """Where a cell is open to the removal of single genes, smoothly.

  With zeros, nothing changes. Derivatives say to first order what the deletion
  of a gene does: its key bias falls, and genes behind it retreat by one rank.

  Attributes:
    key_bias_BL: float32 added to the scores of the slot's key: the logarithm of
      its weight in the attention of other slots.
    retreat_BL: float32 share of the way that the slot, as it is embedded, has
      moved to where it would be one rank higher.
  """

  key_bias_BL: Array
  retreat_BL: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PretrainingBatch:
  """Cells with hidden genes, and what was hidden.

  Attributes:
    cells: the inputs, hidden genes replaced.
    masked_slots_BK: int32 slot in the row of each prediction; 0 where unused.
      Under the mask objective `split` id or value is predicted, not both.
    id_labels_BK: int32 true token; 0 where unused.
    id_weights_BK: float32, 1 where the id is predicted, else 0.
    value_labels_BK: float32 true log2 value; 0 where unused.
    value_weights_BK: float32, 1 where the value is predicted, else 0.
  """

  cells: CellBatch
  masked_slots_BK: Array
  id_labels_BK: Array
  id_weights_BK: Array
  value_labels_BK: Array
  value_weights_BK: Array


@dataclasses.dataclass(frozen=True)
class HostBatch:
  """One batch as the loader gives it, with what only the host needs.

  Attributes:
    index: number of the batch in the stream of training.
    batch: NumPy arrays.
    cell_index_BS: int32 corpus cell of segment s + 1 of a row, -1 for none;
      cells are numbered over the stores of the split, human first.
    num_dropped_picks: genes picked for masking beyond K, left unmasked.
  """

  index: int
  batch: PretrainingBatch
  cell_index_BS: np.ndarray
  num_dropped_picks: int = 0
