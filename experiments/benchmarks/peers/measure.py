"""What all peers share: they run in environments of their own.

  python PEER.py prepare CELLS FOLDER      converts, once
  python PEER.py run FOLDER BATCH SECONDS  prints figures as one JSON line

The meter is the one that measures our loader.
"""

import json
import os
import pathlib
import runpy
import sys

_METER = pathlib.Path(__file__).parents[3] / 'genecompass_jax' / 'meter.py'


def folder_bytes(path: str) -> int:
  """Bytes of all files below a folder."""
  return sum(
    os.path.getsize(os.path.join(folder, name))
    for folder, _, names in os.walk(path)
    for name in names
  )


def main(version: str, prepare, batches) -> None:
  """Runs a peer.

  Args:
    version: of its package.
    prepare: (cells, folder): converts an h5ad file, or what it needs.
    batches: (folder, batch size) -> iterator of (cells, labels or None,
      slots, slots with a token), without end or one epoch.
  """
  if sys.argv[1] == 'prepare':
    prepare(sys.argv[2], sys.argv[3])
    return
  folder, rows, seconds = sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
  size = folder_bytes(folder)
  next(iter(batches(folder, rows)))  # compiles, imports, opens
  meter = runpy.run_path(str(_METER))['Meter']()
  for cells, labels, slots, real in batches(folder, rows):
    meter.add(cells, labels, slots, real)
    if meter.seconds > seconds:
      break
  with open(os.path.join(folder, 'num_cells')) as file:
    stored = size / int(file.read())
  print(json.dumps({**meter.result(), 'stored_bytes': stored, 'of': version}))


def write_num_cells(folder: str, num_cells: int) -> None:
  """Leaves the number of cells beside the data."""
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, 'num_cells'), 'w') as file:
    file.write(str(num_cells))
