"""700 blood cells of one donor, as they lie in the scanpy package.

`10x_pbmc68k_reduced.h5ad` (Zheng 2017; 10x Genomics, CC BY 4.0; scanpy BSD-3)
holds 765 selected genes and labels by correlation with sorted bulk samples.
Its `raw` has log1p(10,000 * count / total) to three decimals, with the total
of each cell over all genes in `obs['n_counts']`. No counts are stored, but
they follow from the logs: see `counts_of_logs`.
"""

import importlib.util
import os
import warnings

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from genecompass_jax import errors

FILE = '10x_pbmc68k_reduced.h5ad'
SCALE = 1e4
HALF_DIGIT = 5e-4  # stored values have three decimals
FLOAT32 = 1e-5  # and are float32, as are the totals


def blood_cells() -> anndata.AnnData:
  """The 700 cells with integer counts in X.

  Returns:
    700 cells x 765 genes named by symbol, float32 counts; `obs` has
    `cell_type` (bulk labels) and `total` (molecules over all genes).

  Raises:
    UserError: scanpy is not installed, or its file is another one.
  """
  path = _find()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # the file is of an older anndata
    stored = anndata.read_h5ad(path)
  if stored.raw is None or not {'n_counts', 'bulk_labels'} <= set(stored.obs):
    raise errors.UserError(
      f'{path}: not the file that scanpy 1.11 carries; install scanpy again'
    )
  logs = stored.raw.X
  logs_CG = logs.toarray() if scipy.sparse.issparse(logs) else np.asarray(logs)
  totals_C = stored.obs['n_counts'].to_numpy(np.float64)
  counts_CG = counts_of_logs(logs_CG, totals_C)
  obs = pd.DataFrame(
    {
      'cell_type': stored.obs['bulk_labels'].astype(str).to_numpy(),
      'total': totals_C,
    },
    index=stored.obs_names.astype(str),
  )
  return anndata.AnnData(
    scipy.sparse.csr_matrix(counts_CG.astype(np.float32)),
    obs=obs,
    var=pd.DataFrame(index=stored.raw.var_names.astype(str)),
  )


def _find() -> str:
  """The file in the installed scanpy; nothing is downloaded or imported."""
  package = importlib.util.find_spec('scanpy')
  if package is None:
    raise errors.UserError(
      'the demo takes its cells from scanpy, which is not installed: '
      'pip install ".[demo]" in the folder of the repository, or give your own '
      'with --data'
    )
  path = os.path.join(package.submodule_search_locations[0], 'datasets', FILE)
  if not os.path.exists(path):
    raise errors.UserError(
      f'{path}: not there; install scanpy 1.11 again, or give your own cells '
      'with --data'
    )
  return path


def counts_of_logs(logs_CG: np.ndarray, totals_C: np.ndarray) -> np.ndarray:
  """Inverts log1p(10,000 * count / total) that was rounded to three decimals.

  In every cell the smallest value above 0 is that of a count of one, so
  counts are expm1(log) over expm1 of that smallest value, rounded. It is not
  taken on trust: the logs are computed again from these counts and the
  totals, which the inverse did not use, and must agree in every entry to half
  of the last digit. Another integer would be off by far more, as neighbouring
  counts n and n + 1 differ by log(1 + 1 / n) at least until n = 1,000.

  Args:
    logs_CG: stored values, cells x genes.
    totals_C: molecules of each cell over all genes, selected or not.

  Returns:
    float64 [C, G] integer counts.

  Raises:
    UserError: a value does not follow from integer counts.
  """
  scaled_CG = np.expm1(logs_CG.astype(np.float64))
  is_shown_CG = scaled_CG > 0
  if not is_shown_CG.any(1).all():
    cell = int(np.argmin(is_shown_CG.any(1)))
    raise errors.UserError(f'{FILE}: cell {cell} has no expressed gene')
  one_C = np.where(is_shown_CG, scaled_CG, np.inf).min(1)
  counts_CG = np.round(scaled_CG / one_C[:, None])
  again_CG = np.log1p(counts_CG * SCALE / totals_C[:, None])
  off_CG = np.abs(again_CG - logs_CG)
  if counts_CG.max() >= 1000 or off_CG.max() > HALF_DIGIT + FLOAT32:
    cell = int(off_CG.max(1).argmax())
    raise errors.UserError(
      f'{FILE}: the stored logs are not those of integer counts (cell {cell} '
      f'is off by {off_CG.max():.4f}); install scanpy 1.11 again'
    )
  return counts_CG
