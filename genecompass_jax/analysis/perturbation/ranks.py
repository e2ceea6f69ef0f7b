"""Encoded cells, looked up and cut: where a gene stands, and which stay."""

import dataclasses

import numpy as np

from genecompass_jax import encoding


class Ranks:
  """Where a token stands in a cell."""

  def __init__(self, cells: encoding.EncodedCells, size: int):
    """Sorts the genes of all cells; `size` is that of the vocabulary."""
    length_C = np.diff(cells.starts_C1)
    cell_N = np.repeat(np.arange(cells.num_cells), length_C)
    rank_N = np.arange(len(cell_N)) - np.repeat(cells.starts_C1[:-1], length_C)
    place_N = cell_N * np.int64(size) + cells.gene_ids_N
    order_N = np.argsort(place_N)
    self._size = size
    # One more than any, so that a search always finds something.
    self._place_N = np.append(place_N[order_N], np.iinfo(np.int64).max)
    self._rank_N = np.append(rank_N[order_N], -1)

  def of(self, cell_A: np.ndarray, token_A: np.ndarray) -> np.ndarray:
    """Rank from 0; -1 where the cell does not show the token."""
    wanted_A = cell_A * np.int64(self._size) + token_A
    found_A = np.searchsorted(self._place_N, wanted_A)
    is_there_A = self._place_N[found_A] == wanted_A
    return np.where(is_there_A, self._rank_N[found_A], -1)


def cut(cells: encoding.EncodedCells, most: int) -> encoding.EncodedCells:
  """Cells with their best `most` genes alone."""
  length_C = np.diff(cells.starts_C1)
  rank_N = np.arange(len(cells.gene_ids_N)) - np.repeat(
    cells.starts_C1[:-1], length_C
  )
  kept_N = rank_N < most
  return dataclasses.replace(
    cells,
    gene_ids_N=cells.gene_ids_N[kept_N],
    values_N=cells.values_N[kept_N],
    starts_C1=np.concatenate([[0], np.cumsum(np.minimum(length_C, most))]),
  )


def take(
  cells: encoding.EncodedCells, index: np.ndarray
) -> encoding.EncodedCells:
  """Some of the cells, in the order given."""
  parts = [slice(*cells.starts_C1[c : c + 2]) for c in index]
  return encoding.EncodedCells(
    np.concatenate([cells.gene_ids_N[p] for p in parts]),
    np.concatenate([cells.values_N[p] for p in parts]),
    np.concatenate([[0], np.cumsum([p.stop - p.start for p in parts])]),
    cells.keys_C[index],
    cells.num_genes_C[index],
  )


def tokens_without(
  stored: encoding.EncodedCells,
  cell_B: np.ndarray,
  rank_B: np.ndarray,
  slots: int,
) -> np.ndarray:
  """Tokens of the slots of variants that are made on the devices, [B, L]."""
  token_BL = np.zeros((len(cell_B), slots), np.int32)
  for b, (cell, rank) in enumerate(zip(cell_B, rank_B)):
    tokens = stored.gene_ids_N[
      stored.starts_C1[cell] : stored.starts_C1[cell + 1]
    ]
    left = np.delete(tokens, rank)[: slots - 1]
    token_BL[b, 1 : len(left) + 1] = left
  return token_BL
