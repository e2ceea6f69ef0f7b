"""An AnnData in a zarr folder whose rows are written piece by piece."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd

_ROWS = 1024  # of a chunk


class ZarrRows:
  """Appends rows of X, and of layers of the same shape.

  `label` is called once, at the end.

  Args:
    folder: to write to; empty.
    width: columns of X.
    layers: names of the layers.
  """

  def __init__(self, folder: str, width: int, layers: Sequence[str] = ()):
    import zarr

    self._group = zarr.open_group(folder, mode='w')
    self._width = width
    for name, kind in (('anndata', 'anndata'), ('layers', 'dict')):
      group = self._group if name == kind else self._group.require_group(name)
      group.attrs.update({'encoding-type': kind, 'encoding-version': '0.1.0'})
    self._arrays = {
      name: self._new(f'layers/{name}' if name else 'X')
      for name in ('', *layers)
    }
    self.num_rows = 0

  def add(self, rows_ND: np.ndarray, **layers_ND: np.ndarray) -> None:
    """Appends rows of X and of every layer."""
    stop = self.num_rows + len(rows_ND)
    for name, array in self._arrays.items():
      array.resize((stop, self._width))
      array[self.num_rows : stop] = layers_ND[name] if name else rows_ND
    self.num_rows = stop

  def label(self, obs: pd.DataFrame, uns: Mapping[str, Any]) -> None:
    """Writes what the rows are, and `uns`."""
    var = pd.DataFrame(index=[str(i) for i in range(self._width)])
    with warnings.catch_warnings():
      # About anndata's next version: nothing that a user could act on.
      warnings.filterwarnings('ignore', 'zarr v3 autosharding')
      for name, value in (('obs', obs), ('var', var), ('uns', dict(uns))):
        anndata.io.write_elem(self._group, name, value)

  def _new(self, name: str) -> Any:
    make = getattr(self._group, 'create_array', self._group.create_dataset)
    array = make(
      name,
      shape=(0, self._width),
      chunks=(_ROWS, self._width),
      dtype=np.float32,
    )
    array.attrs.update({'encoding-type': 'array', 'encoding-version': '0.2.0'})
    return array


def rows_of(folder: str, *layers: str) -> tuple[Any, ...]:
  """X and layers of a folder, as arrays on disk."""
  import zarr

  group = zarr.open_group(folder, mode='r')
  return tuple(group[name] for name in ('X', *(f'layers/{n}' for n in layers)))
