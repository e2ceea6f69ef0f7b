"""Arrays in files that are whole or not there."""

import os
from collections.abc import Mapping

import numpy as np


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays under a name that ends in .npz."""
  staging = f'{path}.tmp-{os.getpid()}.npz'
  try:
    np.savez(staging, **arrays)
    os.replace(staging, path)
  finally:
    if os.path.exists(staging):
      os.remove(staging)


def read(path: str) -> dict[str, np.ndarray] | None:
  """Arrays of a file; None where it is missing or damaged."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except FileNotFoundError:
    return None
  except OSError as error:
    if error.errno:  # of the system, such as a missing permission
      raise
    return None
  except Exception:  # damaged files raise whatever their parser meets
    return None
