"""Writes results into a copy of an h5ad file, or a new one for other formats."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping

import anndata
import h5py
import numpy as np
import pandas as pd

from genecompass_jax import errors, paths


def check_output(path: str, overwrite: bool) -> None:
  """Refuses, before any work, an output that cannot be written.

  Raises:
    UserError: it exists, its folder does not, or it is a URL.
  """
  paths.local(path)
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


@dataclasses.dataclass(frozen=True)
class Blocks:
  """An array that is written block by block, larger than memory.

  Attributes:
    shape: of the whole.
    dtype: of its elements.
    blocks: gives the rows in their order, [n, ...] at a time.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  blocks: Callable[[], Iterable[np.ndarray]]


def write(
  target: str,
  *,
  copy_of: str = '',
  labels: pd.DataFrame | None = None,
  obsm: Mapping[str, np.ndarray | Blocks],
  obs: Mapping[str, np.ndarray],
  uns: Mapping[str, object],
  staging: str = '',
) -> None:
  """Writes columns into a copy of an h5ad file; matrices are never loaded.

  Cells of another format get a new file with their labels and the columns,
  without a matrix.

  Args:
    target: h5ad file to write; it appears only when it is complete.
    copy_of: h5ad file to copy, or
    labels: columns of the cells of a new file.
    obsm: arrays [cells, ...] to add.
    obs: columns [cells] to add or replace.
    uns: entries to add or replace.
    staging: file on the same disk that grows; beside the target by default.
  """
  target = os.path.realpath(target)  # a link stays, and leads to the result
  staging = staging or f'{target}.tmp-{os.getpid()}'
  try:
    if copy_of:
      shutil.copyfile(copy_of, staging)
    else:
      anndata.AnnData(obs=_plain(labels)).write_h5ad(staging)
    with h5py.File(staging, 'r+') as file:
      for name, array in obsm.items():
        _write_array(_group(file, 'obsm'), name, array)
      frame = anndata.io.read_elem(file['obs'])
      for name, column in obs.items():
        column = np.asarray(column)
        is_text = column.dtype.kind in 'UO'
        frame[name] = pd.Categorical(column) if is_text else column
      anndata.io.write_elem(file, 'obs', frame)
      for name, value in uns.items():
        anndata.io.write_elem(_group(file, 'uns'), name, value)
    os.replace(staging, target)
  finally:
    if os.path.exists(staging):
      os.remove(staging)


def _group(file: h5py.File, name: str) -> h5py.Group:
  group = file.require_group(name)
  group.attrs.setdefault('encoding-type', 'dict')
  group.attrs.setdefault('encoding-version', '0.1.0')
  return group


def _write_array(
  group: h5py.Group, name: str, array: np.ndarray | Blocks
) -> None:
  if not isinstance(array, Blocks):
    anndata.io.write_elem(group, name, np.asarray(array))
    return
  if name in group:
    del group[name]
  stored = group.create_dataset(name, array.shape, array.dtype)
  stored.attrs['encoding-type'] = 'array'
  stored.attrs['encoding-version'] = '0.2.0'
  first = 0
  for block in array.blocks():
    stored[first : first + len(block)] = block
    first += len(block)


def _plain(obs: pd.DataFrame) -> pd.DataFrame:
  """Columns as an h5ad file takes them: mixed ones as text."""
  obs = obs.copy()
  obs.index = obs.index.astype(str)
  for name in obs:
    if obs[name].dtype == object:
      text = obs[name].map(str).where(obs[name].notna(), None)
      obs[name] = pd.Categorical(text)
  return obs
