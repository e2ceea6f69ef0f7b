"""Batches of cells of one length."""

import weakref

import numpy as np

from genecompass_jax import encoding
from genecompass_jax.analysis import model_batches, model_cells


def _chunk(first: int, lengths: list[int]) -> model_cells.EncodedChunk:
  number = sum(lengths)
  starts_C1 = np.cumsum([0, *lengths])
  gene_ids_N = np.arange(5, 5 + number, dtype=np.int32)
  totals_C = np.ones(len(lengths))
  return model_cells.EncodedChunk(
    species=0,
    index_C=np.arange(first, first + len(lengths)),
    counts=encoding.RaggedCells(
      gene_ids_N, np.ones(number), starts_C1, totals_C
    ),
    cells=encoding.EncodedCells(
      gene_ids_N,
      np.full(number, first, np.float32),
      starts_C1,
      np.zeros(len(lengths), np.uint64),
      np.array(lengths, np.int32),
    ),
  )


def test_cells_come_in_batches_of_their_length():
  chunks = [_chunk(0, [3, 9, 2]), _chunk(3, [8, 1, 1])]
  batches = list(model_batches.of_chunks(chunks, (4, 16), 2))
  found = {tuple(b.index_C): b.cells.gene_ids_BL.shape for b in batches}
  assert found == {(0, 2): (2, 4), (1, 3): (2, 16), (4, 5): (2, 4)}
  (batch,) = (b for b in batches if b.index_C[0] == 1)
  np.testing.assert_array_equal(
    batch.cells.gene_ids_BL[0, 1:10], np.arange(8, 17)
  )
  np.testing.assert_array_equal(batch.cells.gene_ids_BL[1, 1:9], range(5, 13))
  np.testing.assert_array_equal(batch.cells.values_BL[1, 1:9], [3.0] * 8)


def test_cells_that_wait_keep_no_chunk():
  """Memory holds a chunk and the cells that wait, not all of their chunks."""
  alive = []

  def chunks():
    for number in range(4):
      chunk = _chunk(2 * number, [2, 9])
      for array in (chunk.cells.gene_ids_N, chunk.cells.values_N):
        alive.append((number, weakref.ref(array)))
      yield chunk
      del chunk, array
      assert {n for n, kept in alive if kept() is not None} <= {number}

  (short, long) = model_batches.of_chunks(chunks(), (4, 16), 8)
  np.testing.assert_array_equal(short.index_C, [0, 2, 4, 6])
  np.testing.assert_array_equal(long.index_C, [1, 3, 5, 7])
