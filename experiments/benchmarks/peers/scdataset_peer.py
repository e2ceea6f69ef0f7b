"""scDataset over a backed h5ad: blocks of 8 cells, 64 batches a fetch, CSR.

Its time includes reading, shuffling and slicing of raw CSR rows; no ranking.
"""

import importlib.metadata
import os
import shutil

import anndata
import measure
import scdataset


class Backed:
  """Rows of a backed file, as scDataset asks for them."""

  def __init__(self, path: str):
    self.cells = anndata.read_h5ad(path, backed='r')
    self.labels = self.cells.obs['cell_type'].to_numpy()

  def __len__(self) -> int:
    return self.cells.n_obs

  def __getitem__(self, rows):
    return self.cells.X[rows], self.labels[rows]


def prepare(cells: str, folder: str) -> None:
  measure.write_num_cells(folder, anndata.read_h5ad(cells, backed='r').n_obs)
  shutil.copy(cells, os.path.join(folder, 'cells.h5ad'))


def batches(folder: str, rows: int):
  dataset = scdataset.scDataset(
    Backed(os.path.join(folder, 'cells.h5ad')),
    scdataset.BlockShuffling(block_size=8),
    batch_size=rows,
    fetch_factor=64,
    batch_callback=lambda data, at: (data[0][at], data[1][at]),
    seed=0,
  )
  for X, labels in dataset:
    yield X.shape[0], labels, 0, 0


if __name__ == '__main__':
  measure.main(
    f'scDataset {importlib.metadata.version("scDataset")}', prepare, batches
  )
