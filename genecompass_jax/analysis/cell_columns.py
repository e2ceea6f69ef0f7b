"""What `embed` says of each cell: the columns `gc_*` of obs.

gc_n_genes_used         int32 genes that entered the model
gc_share_umi_mapped     float32 share of the cell's counts on known genes
gc_share_umi_truncated  float32 share of the mapped counts beyond the cut at
                        max_genes
gc_species              name of the species
gc_ood                  float32 distance percentile against the reference
                        sample; there with one only (`reference_sample`)
"""

import logging

import numpy as np

from genecompass_jax import encoding, pretrained
from genecompass_jax.analysis import model_cells
from genecompass_jax.prepare import sources

GENES = 'gc_n_genes_used'
MAPPED = 'gc_share_umi_mapped'
TRUNCATED = 'gc_share_umi_truncated'
SPECIES = 'gc_species'
OOD = 'gc_ood'
# Columns of numbers, and their types.
DTYPES = {
  GENES: np.dtype('<i4'),
  MAPPED: np.dtype('<f4'),
  TRUNCATED: np.dtype('<f4'),
}


def empty(
  stream: sources.CellStream, has_reference: bool
) -> dict[str, np.ndarray]:
  """The columns of all cells of a source, numbers 0."""
  columns = {
    name: np.zeros(stream.source.num_cells, dtype)
    for name, dtype in DTYPES.items()
  }
  if has_reference:
    columns[OOD] = np.zeros(stream.source.num_cells, np.float32)
  names = np.array(stream.vocabulary.species)
  return {**columns, SPECIES: names[stream.source.species_C]}


def fill(
  columns: dict[str, np.ndarray],
  chunk: model_cells.EncodedChunk,
  model: pretrained.PretrainedModel,
) -> None:
  """Fills in the columns of the cells of a chunk."""
  assets, cells, index_C = model.assets, chunk.cells, chunk.index_C
  lengths_C = np.diff(cells.starts_C1)
  mapped_C = _sums(chunk.counts.counts_N, chunk.counts.starts_C1)
  columns[GENES][index_C] = lengths_C
  columns[MAPPED][index_C] = mapped_C / np.maximum(chunk.counts.totals_C, 1e-12)
  kept_C = _kept_counts(
    cells,
    assets.medians.divisor_V(chunk.species),
    assets.encoding,
    chunk.counts.totals_C,
  )
  lost_C = 1.0 - kept_C / np.maximum(mapped_C, 1e-12)
  # Whole cells lose nothing; rounding of log2 values must not say so.
  is_cut_C = cells.num_genes_C > lengths_C
  columns[TRUNCATED][index_C] = np.where(is_cut_C, lost_C, 0.0)


def warn(name: str, columns: dict[str, np.ndarray], max_genes: int) -> None:
  """Warns of cells that the model sees little of.

  Args:
    name: of the source.
    columns: of all cells.
    max_genes: genes that the model reads of a cell.
  """
  mapped = float(np.mean(columns[MAPPED]))
  if mapped < 0.5:
    logging.warning(
      '%s: the model knows the genes of only %.0f %% of the counts of a cell, '
      'see %s',
      *(name, 100 * mapped, MAPPED),
    )
  lost = float(np.median(columns[TRUNCATED]))
  if lost > 0.2:
    logging.warning(
      '%s: half of the cells lose %.0f %% of their counts or more, because the '
      'model reads %d genes of a cell, see %s',
      *(name, 100 * lost, max_genes, TRUNCATED),
    )


def _kept_counts(
  cells: encoding.EncodedCells,
  divisor_V: np.ndarray,
  config: encoding.EncodingConfig,
  totals_C: np.ndarray,
) -> np.ndarray:
  """Counts on the genes that entered the model, from their values, [C]."""
  counts_N = np.expm1(cells.values_N * np.log(2)) * divisor_V[cells.gene_ids_N]
  kept_C = _sums(counts_N, cells.starts_C1)
  if config.mode == encoding.LIBRARY:
    kept_C *= totals_C / config.target_sum
  return kept_C


def _sums(values_N: np.ndarray, starts_C1: np.ndarray) -> np.ndarray:
  """Sum over the elements of every cell, [C] float64."""
  running = np.concatenate([[0.0], np.cumsum(values_N, dtype=np.float64)])
  return running[starts_C1[1:]] - running[starts_C1[:-1]]
