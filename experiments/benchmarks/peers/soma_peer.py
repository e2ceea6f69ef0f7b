"""tiledbsoma-ml over a SOMA experiment, shuffled as it does by default, CSR.

Its time includes reading, shuffling and slicing of raw CSR rows; no ranking.
"""

import importlib.metadata
import os
import warnings

import anndata
import measure
import tiledbsoma
import tiledbsoma.io
import tiledbsoma_ml

warnings.filterwarnings('ignore')


def prepare(cells: str, folder: str) -> None:
  measure.write_num_cells(folder, anndata.read_h5ad(cells, backed='r').n_obs)
  tiledbsoma.io.from_h5ad(
    os.path.join(folder, 'soma'), cells, measurement_name='RNA'
  )


def batches(folder: str, rows: int):
  with tiledbsoma.Experiment.open(os.path.join(folder, 'soma')) as experiment:
    with experiment.axis_query(measurement_name='RNA') as query:
      dataset = tiledbsoma_ml.ExperimentDataset(
        query,
        layer_name='data',
        obs_column_names=['cell_type'],
        batch_size=rows,
        shuffle=True,
        seed=0,
        return_sparse_X=True,
      )
      for X, obs in dataset:
        yield X.shape[0], obs['cell_type'].to_numpy(), 0, 0


if __name__ == '__main__':
  measure.main(
    f'tiledbsoma-ml {importlib.metadata.version("tiledbsoma-ml")}',
    prepare,
    batches,
  )
