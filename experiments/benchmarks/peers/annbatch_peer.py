"""annbatch over its sharded, shuffled zarr collection; chunks of 512, CSR.

Its time includes reading, shuffling and slicing of raw CSR rows; no ranking.
`preload_to_gpu` is off: there is no GPU here.
"""

import importlib.metadata
import os
import warnings

import annbatch
import anndata
import measure
import zarr

warnings.filterwarnings('ignore')
try:
  import zarrs  # noqa: F401  its own advice for local files

  zarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'})
except ImportError:
  pass


def prepare(cells: str, folder: str) -> None:
  measure.write_num_cells(folder, anndata.read_h5ad(cells, backed='r').n_obs)
  place = os.path.join(folder, 'collection.zarr')
  annbatch.DatasetCollection(place, mode='w').add_adatas([cells], shuffle=True)


def batches(folder: str, rows: int):
  loader = annbatch.Loader(
    chunk_size=512,
    preload_nchunks=8,
    batch_size=rows,
    shuffle=True,
    preload_to_gpu=False,
    to=None,
  )
  loader.use_collection(
    annbatch.DatasetCollection(os.path.join(folder, 'collection.zarr'))
  )
  for batch in loader:
    obs = batch['obs']
    labels = None if obs is None else obs['cell_type'].to_numpy()
    yield batch['X'].shape[0], labels, 0, 0


if __name__ == '__main__':
  measure.main(
    f'annbatch {importlib.metadata.version("annbatch")}', prepare, batches
  )
