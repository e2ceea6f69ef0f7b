"""Encoded cells -> batches of one length, one cell a row.

A cell's row has the same number of slots whatever else is in the file, so that
what a model says of it depends neither on order, nor on chunk or batch.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from genecompass_jax import encoding, rows, schemas
from genecompass_jax.analysis import model_cells


@dataclasses.dataclass(frozen=True)
class ModelBatch:
  """Some cells of one length bucket, as the network takes them.

  Attributes:
    index_C: int64 rows of the cells in the source.
    cells: B rows, those of the cells first, the others empty: every batch of
      a bucket has the same shape.
  """

  index_C: np.ndarray
  cells: schemas.CellBatch


def of_chunks(
  chunks: Iterable[model_cells.EncodedChunk],
  buckets: tuple[int, ...],
  num_rows: int | Mapping[int, int],
) -> Iterator[ModelBatch]:
  """Batches of all cells, in the order in which they are full.

  Args:
    chunks: encoded cells.
    buckets: lengths of rows in slots, ascending; the last holds any cell.
    num_rows: B, or B by length. Fewer cells of a length wait for others.
  """
  rows_of = (
    num_rows
    if isinstance(num_rows, Mapping)
    else dict.fromkeys(buckets, num_rows)
  )
  waiting: dict[int, list[tuple[int, int, np.ndarray, np.ndarray]]] = {
    slots: [] for slots in buckets
  }
  for chunk in chunks:
    cells, starts_C1 = chunk.cells, chunk.cells.starts_C1
    bucket_C = np.searchsorted(buckets, np.diff(starts_C1) + 1)
    for c, index in enumerate(chunk.index_C):
      slots = buckets[bucket_C[c]]
      a, b = starts_C1[c], starts_C1[c + 1]
      # Copies: a view of one waiting cell would keep its whole chunk.
      gene_ids, values = (
        cells.gene_ids_N[a:b].copy(),
        cells.values_N[a:b].copy(),
      )
      waiting[slots].append((index, chunk.species, gene_ids, values))
      if len(waiting[slots]) == rows_of[slots]:
        yield _batch(slots, waiting[slots], rows_of[slots])
        waiting[slots] = []
  for slots, cells in waiting.items():
    if cells:
      yield _batch(slots, cells, rows_of[slots])


def _batch(slots: int, cells: list, num_rows: int) -> ModelBatch:
  index, species, gene_ids, values = zip(*cells)
  starts_C1 = np.cumsum([0, *map(len, gene_ids)])
  encoded = encoding.EncodedCells(
    gene_ids_N=np.concatenate(gene_ids),
    values_N=np.concatenate(values),
    starts_C1=starts_C1,
    keys_C=np.zeros(len(cells), np.uint64),
    num_genes_C=np.diff(starts_C1).astype(np.int32),
  )
  batch = rows.cell_batch_rows(
    encoded, np.array(species), slots, num_rows=num_rows
  )
  return ModelBatch(np.array(index), batch)
