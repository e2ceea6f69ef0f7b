"""BioNeMo SCDL: rows of a memory map in random order, its collate function.

What a DataLoader without workers does with it. Its time includes reading and
collating of raw CSR rows; no ranking. Reads of the map are page faults: no
request and no byte of them is counted.
"""

import importlib.metadata
import os

import anndata
import measure
import numpy as np
from bionemo.scdl.io import single_cell_memmap_dataset
from bionemo.scdl.util import torch_dataloader_utils


def prepare(cells: str, folder: str) -> None:
  held = anndata.read_h5ad(cells)
  measure.write_num_cells(folder, held.n_obs)
  # A label by row, for its obs are not read with a row.
  np.save(
    os.path.join(folder, 'labels.npy'),
    held.obs['cell_type'].cat.codes.to_numpy(),
  )
  single_cell_memmap_dataset.SingleCellMemMapDataset(
    os.path.join(folder, 'map'), cells, use_X_not_raw=True
  )


def batches(folder: str, rows: int):
  dataset = single_cell_memmap_dataset.SingleCellMemMapDataset(
    os.path.join(folder, 'map')
  )
  labels = np.load(os.path.join(folder, 'labels.npy'))
  order = np.random.default_rng(0).permutation(len(dataset))
  for first in range(0, len(order) - rows + 1, rows):
    some = order[first : first + rows]
    torch_dataloader_utils.collate_sparse_matrix_batch(
      [dataset[int(i)] for i in some]
    )
    yield rows, labels[some], 0, 0


if __name__ == '__main__':
  measure.main(
    f'BioNeMo SCDL {importlib.metadata.version("bionemo-scdl")}',
    prepare,
    batches,
  )
