"""Writes results into a copy of an h5ad file, or a new one for other formats."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping

import anndata
import h5py
import numpy as np
import pandas as pd

from genecompass_jax import errors
from genecompass_jax.prepare import sources
from genecompass_jax.prepare.readers import formats


def check_output(path: str, overwrite: bool) -> None:
  """Refuses, before any work, an output that cannot be written.

  Raises:
    UserError: it exists, or its folder does not.
  """
  if os.path.isdir(path) or not path:
    raise errors.UserError(f'{path!r}: name a file to write with -o')
  if os.path.exists(path) and not overwrite:
    raise errors.UserError(
      f'{path} exists; give --overwrite, or another name with -o'
    )
  folder = os.path.dirname(os.path.abspath(path))
  if not os.path.isdir(folder):
    raise errors.UserError(f'{folder}: no such folder; make it first')
  try:
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise errors.UserError(f'{folder}: cannot be written ({error})') from None


def write(
  source: str,
  target: str,
  *,
  obsm: Mapping[str, np.ndarray],
  obs: Mapping[str, np.ndarray],
  uns: Mapping[str, object],
  config: sources.SourceConfig = sources.SourceConfig(),
) -> None:
  """Copies an h5ad file and adds columns; the matrices are never loaded.

  Cells of another format get a new file with their labels and the columns,
  without a matrix.

  Args:
    source: file or folder of cells.
    target: h5ad file to write; it appears only when it is complete.
    obsm: arrays [cells, ...] to add.
    obs: columns [cells] to add or replace.
    uns: entries to add or replace.
    config: how the cells were read, but for their place.
  """
  config = dataclasses.replace(config, path=source)
  is_copy = formats.find_format(config) == 'h5ad'
  target = os.path.realpath(target)  # a link stays, and leads to the result
  staging = f'{target}.tmp-{os.getpid()}'
  try:
    if is_copy:
      shutil.copyfile(source, staging)
    else:
      labels = _plain(sources.open_source(config).obs)
      anndata.AnnData(obs=labels).write_h5ad(staging)
    with h5py.File(staging, 'r+') as file:
      for name, array in obsm.items():
        group = file.require_group('obsm')
        group.attrs.setdefault('encoding-type', 'dict')
        group.attrs.setdefault('encoding-version', '0.1.0')
        anndata.io.write_elem(group, name, np.asarray(array))
      frame = anndata.io.read_elem(file['obs'])
      for name, column in obs.items():
        column = np.asarray(column)
        is_text = column.dtype.kind in 'UO'
        frame[name] = pd.Categorical(column) if is_text else column
      anndata.io.write_elem(file, 'obs', frame)
      group = file.require_group('uns')
      group.attrs.setdefault('encoding-type', 'dict')
      group.attrs.setdefault('encoding-version', '0.1.0')
      for name, value in uns.items():
        anndata.io.write_elem(group, name, value)
    os.replace(staging, target)
  finally:
    if os.path.exists(staging):
      os.remove(staging)


def _plain(obs: pd.DataFrame) -> pd.DataFrame:
  """Columns as an h5ad file takes them: mixed ones as text."""
  obs = obs.copy()
  obs.index = obs.index.astype(str)
  for name in obs:
    if obs[name].dtype == object:
      text = obs[name].map(str).where(obs[name].notna(), None)
      obs[name] = pd.Categorical(text)
  return obs
