"""Cells of the waterfall: one a row, several a batch, packed in rows."""

import dataclasses

import jax
import numpy as np
import straight_port

from genecompass_jax import (
  corpus as corpus_lib,
  data,
  encoding,
  masking,
  packing,
  schemas,
)

BUCKETS = data.DataConfig().buckets


def random(
  num_cells: int, num_genes: int, vocabulary_size: int
) -> list[schemas.PretrainingBatch]:
  """Cells of random genes and falling values in the smallest bucket."""
  rng = np.random.default_rng(0)
  tokens = np.arange(2, vocabulary_size, dtype=np.int32)
  ids_N = np.concatenate(
    [rng.choice(tokens, num_genes, replace=False) for _ in range(num_cells)]
  )
  values_N = np.concatenate(
    [np.sort(rng.gamma(2, 1, num_genes))[::-1] for _ in range(num_cells)]
  ).astype(np.float32)
  cells = encoding.EncodedCells(
    ids_N,
    values_N,
    np.arange(num_cells + 1) * num_genes,
    np.zeros(num_cells, np.uint64),
    np.full(num_cells, num_genes, np.int32),
  )
  masked = masking.mask_cells(
    cells,
    np.arange(num_cells),
    config=masking.MaskConfig(),
    seed=0,
    epoch=0,
    random_tokens=tokens,
    vocabulary_size=vocabulary_size,
  )
  slots = BUCKETS[np.searchsorted(BUCKETS, num_genes + 1)]
  picks = data.DataConfig(layout='buckets').num_masked(slots)
  return [
    _one_cell(
      *(
        array[cell * num_genes : (cell + 1) * num_genes]
        for array in (
          ids_N,
          values_N,
          masked.gene_ids_N,
          masked.values_N,
          masked.is_masked_N,
        )
      ),
      slots,
      picks,
    )
    for cell in range(num_cells)
  ]


def _one_cell(ids, values, shown_ids, shown_values, is_masked, slots, picks):
  n = len(ids)
  integers, reals = np.zeros((4, 1, slots), np.int32), np.zeros((1, slots))
  gene_ids, positions, segments, species = integers
  gene_ids[0, 1 : n + 1] = shown_ids
  positions[0, 1 : n + 1] = np.arange(n)
  segments[0, : n + 1] = 1
  reals[0, 1 : n + 1] = shown_values
  hidden = np.flatnonzero(is_masked)
  at, labels = np.zeros((2, 1, picks), np.int32)
  truth, weights = np.zeros((2, 1, picks), np.float32)
  used = slice(len(hidden))
  at[0, used], labels[0, used] = hidden + 1, ids[hidden]
  truth[0, used], weights[0, used] = values[hidden], 1
  cells = schemas.CellBatch(
    gene_ids,
    reals.astype(np.float32),
    positions,
    segments,
    species,
    np.arange(slots)[None] == 0,
  )
  return schemas.PretrainingBatch(cells, at, labels, weights, truth, weights)


def of_corpus(
  path: str, num_cells: int
) -> tuple[list[schemas.PretrainingBatch], int]:
  """Evenly spaced training cells of a corpus, and its vocabulary's size."""
  corpus = corpus_lib.Corpus.open(path)
  config = data.DataConfig(layout='buckets', rows_per_batch=1, streams=1)
  batches = data.evaluation_batches(
    corpus, encoding.EncodingConfig(), config, 'train', max_cells=num_cells
  )
  return [b.batch for b in batches], corpus.vocabulary.size


def for_port(
  batch: schemas.PretrainingBatch, num_genes: int
) -> dict[str, np.ndarray]:
  """The same cell as the original takes it, padded to `num_genes`."""
  cells = batch.cells

  def genes(x_BL):
    x_BL = x_BL[:, 1 : num_genes + 1]
    return np.pad(x_BL, ((0, 0), (0, num_genes - x_BL.shape[1])))

  used = batch.id_weights_BK > 0
  masked = np.where(used, batch.masked_slots_BK - 1, 0)
  labels = np.full((1, num_genes), straight_port.IGNORED, np.int32)
  label_values = np.zeros((1, num_genes), np.float32)
  labels[0, masked[used]] = batch.id_labels_BK[used]
  label_values[0, masked[used]] = batch.value_labels_BK[used]
  return {
    'input_ids': genes(cells.gene_ids_BL),
    'values': genes(cells.values_BL),
    'attention_mask': genes((cells.segments_BL > 0).astype(np.int32)),
    'species': cells.species_BL[:, :1],
    'labels': labels,
    'labels_values': label_values,
    'masked': masked,
    'used': used,
  }


def together(
  cells: list[schemas.PretrainingBatch], number: int
) -> list[schemas.PretrainingBatch]:
  """Batches of `number` cells of one bucket; what is left is smaller."""
  batches = []
  for slots in sorted({c.cells.segments_BL.shape[1] for c in cells}):
    same = [c for c in cells if c.cells.segments_BL.shape[1] == slots]
    batches += [
      _joined(same[i : i + number]) for i in range(0, len(same), number)
    ]
  return batches


def packed(
  cells: list[schemas.PretrainingBatch], slots: int, number: int
) -> list[schemas.PretrainingBatch]:
  """The same cells in rows of `slots`, so many rows that `number` cells go."""
  needs_N = np.array([(c.cells.segments_BL > 0).sum() for c in cells])
  row_N, num_rows = packing.best_fit(needs_N, slots, slots)
  picks = data.DataConfig(slots=slots).num_masked(slots)
  rows = [
    _packed_row([cells[i] for i in np.flatnonzero(row_N == row)], slots, picks)
    for row in range(num_rows)
  ]
  each = max(number * num_rows // len(cells), 1)
  return [_joined(rows[i : i + each]) for i in range(0, num_rows, each)]


def _joined(
  batches: list[schemas.PretrainingBatch],
) -> schemas.PretrainingBatch:
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def _packed_row(cells, slots, picks) -> schemas.PretrainingBatch:
  """Cells one behind the other in one row."""
  fields = {f.name: [] for f in dataclasses.fields(schemas.CellBatch)}
  labels = {
    f.name: []
    for f in dataclasses.fields(schemas.PretrainingBatch)
    if f.name != 'cells'
  }
  first = 0
  for number, cell in enumerate(cells):
    used = int((cell.cells.segments_BL > 0).sum())
    hidden = int((cell.id_weights_BK > 0).sum())
    for name, parts in fields.items():
      part = getattr(cell.cells, name)[:, :used]
      parts.append(part + number if name == 'segments_BL' else part)
    for name, parts in labels.items():
      part = getattr(cell, name)[:, :hidden]
      parts.append(part + first if name == 'masked_slots_BK' else part)
    first += used

  def filled(parts, size):
    x = np.concatenate(parts, axis=1)
    return np.pad(x, ((0, 0), (0, size - x.shape[1])))

  return schemas.PretrainingBatch(
    cells=schemas.CellBatch(**{n: filled(p, slots) for n, p in fields.items()}),
    **{n: filled(p, picks) for n, p in labels.items()},
  )
