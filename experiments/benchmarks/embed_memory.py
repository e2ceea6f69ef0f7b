"""Embeddings of files that do not fit: does memory grow with the cells?

  python experiments/benchmarks/embed_memory.py --folder FOLDER \\
    [--cells 12000,120000] [--genes 150] [--width 32] [--layers 2]

Simulates an h5ad file of each size (less one cell of six, of panels), chunk by
chunk, and a model of random weights over its genes, if they are not there. Then
`genecompass embed` runs on each in a process of its own; on the first also once
more, killed (SIGKILL) half way and started again. Prints cells a second of the
whole command, its peak resident memory, the bytes of the file and of the embeddings, and whether the resumed
output equals the other to the last bit.
"""

import argparse
import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import h5py
import jax
import numpy as np

import genecompass_jax as gc
from experiments.benchmarks import embed_equality
from genecompass_jax import simulate
from genecompass_jax.analysis import unfinished
from genecompass_jax.prepare import simulated, sources

KEY = 'obsm/X_genecompass'


def main() -> None:
  """Makes the files, and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--folder', required=True)
  parser.add_argument('--cells', default='12000,120000')
  parser.add_argument('--genes', type=int, default=150)
  parser.add_argument('--width', type=int, default=32)
  parser.add_argument('--layers', type=int, default=2)
  args = parser.parse_args()
  os.makedirs(args.folder, exist_ok=True)
  sizes = [int(n) for n in args.cells.split(',')]
  files = [simulated_file(args, size) for size in sizes]
  model = os.path.join(args.folder, 'model')
  if not os.path.exists(model):
    source = sources.open_source(sources.SourceConfig(path=files[0]))
    random = embed_equality.random_model(
      source.gene_ids(),
      width=args.width,
      num_layers=args.layers,
      num_heads=max(args.width // 16, 1),
      feed_forward=4 * args.width,
    )
    gc.export(dataclasses.replace(random, source=''), model)
  print(
    f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, '
    f'Python {platform.python_version()}, jax {jax.__version__}, anndata '
    f'{metadata.version("anndata")}; {args.layers} layers of {args.width}\n'
  )
  print(
    '| cells | file, MB | embeddings, MB | run | wall, s | CPU, s | cells/s | '
    'peak, MB |'
  )
  print('|---|---|---|---|---|---|---|---|')
  for path in files:
    measure(path, model, is_killed_too=path == files[0])


def simulated_file(args: argparse.Namespace, num_cells: int) -> str:
  """A file of human cells of one atlas."""
  path = os.path.join(args.folder, f'{num_cells}.h5ad')
  if not os.path.exists(path):
    atlas = simulate.Atlas(
      simulate.AtlasConfig(
        num_genes=args.genes, num_tfs=20, num_cycle_genes=10, one_to_many=5,
        panel_genes=80,
      )
    )  # fmt: skip
    simulated.stream_h5ad(atlas, f'{path}.made', 0, 0, num_cells)
    os.replace(f'{path}.made', path)
  return path


def measure(path: str, model: str, is_killed_too: bool) -> None:
  """Prints the lines of one file."""
  out = path.replace('.h5ad', '.out.h5ad')
  whole = path.replace('.h5ad', '.whole.h5ad')
  for name in (out, whole):
    if os.path.exists(name):
      os.remove(name)
  folder = out + unfinished.SUFFIX
  shutil.rmtree(folder, ignore_errors=True)
  with h5py.File(path) as file:
    num_cells = len(file['X/indptr']) - 1
  line(path, 'whole', num_cells, *run(path, out, model))
  if not is_killed_too:
    return
  os.rename(out, whole)
  cells = os.path.join(folder, 'cells.bin')
  with h5py.File(whole) as file:
    width = file[KEY].shape[1]
  record = 4 * (width + 4)
  # Blocks of the disk that are taken: the file has holes.
  half = num_cells * record // 2
  wall, cpu, peak = run(
    path, out, model, lambda: os.path.exists(cells) and (
      os.stat(cells).st_blocks * 512 > half
    )
  )  # fmt: skip
  line(path, 'killed half way', num_cells, wall, cpu, peak)
  assert not os.path.exists(out)
  line(path, 'gone on', num_cells, *run(path, out, model))
  with h5py.File(out) as one, h5py.File(whole) as other:
    same = np.array_equal(one[KEY][:], other[KEY][:])
    print(f'| {num_cells:,} | | | equal to the last bit: {same} | | | | |')


def line(path, name, num_cells, wall, cpu, peak) -> None:
  """One line of the table."""
  out = path.replace('.h5ad', '.out.h5ad')
  size = 0
  if os.path.exists(out):
    with h5py.File(out) as file:
      size = file[KEY].id.get_storage_size()
  print(
    f'| {num_cells:,} | {os.path.getsize(path) / 1e6:.0f} | {size / 1e6:.0f} '
    f'| {name} | {wall:.0f} | {cpu:.0f} | {num_cells / wall:.0f} | '
    f'{peak / 1e6:.0f} |'
  )
  sys.stdout.flush()


def run(path, out, model, is_to_die=lambda: False):
  """Wall and CPU seconds, and peak resident bytes of one command."""
  begun = time.monotonic()
  process = subprocess.Popen(
    [
      *(sys.executable, '-c', 'from genecompass_jax import cli; cli.main()'),
      *('embed', path, '-o', out, '--checkpoint', model),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  is_killed = False
  while True:
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid:
      break
    if not is_killed and is_to_die():
      process.send_signal(signal.SIGKILL)
      is_killed = True
    time.sleep(0.2)
  if status and not is_killed:
    raise SystemExit(f'embed ended with status {status}')
  cpu = usage.ru_utime + usage.ru_stime
  return time.monotonic() - begun, cpu, usage.ru_maxrss * 1024


if __name__ == '__main__':
  main()
