"""What a corpus costs: a million simulated cells from files to shards.

  python experiments/benchmarks/million_cells.py --folder FOLDER \\
    [--cells 1000000] [--genes 6000] [--files 10] [--jobs 2]

Simulates FILES h5ad files (uncompressed, float32 counts) if they are not there,
builds one corpus of them, and prints for every stage the CPU time a cell and
the wall, the largest resident size of any process, the bytes on disk at each
step, and what that means for 100 million cells. Needs some 25 kB of disk a
cell while it runs.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import threading
import time

import numpy as np

from genecompass_jax import corpus, gene_table, simulate
from genecompass_jax.prepare import pipeline, quality, simulated, sources
from genecompass_jax.prepare.building import builds

TARGET = 100_000_000  # cells
CORE_HOUR = 0.04  # dollars, a spot core on a large cloud; change it here
GB_MONTH = 0.02  # dollars, object storage
PUT, GET = 5e-6, 4e-7  # dollars a request, object storage


def main() -> None:
  """Runs the benchmark and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--folder', required=True)
  parser.add_argument('--cells', type=int, default=1_000_000)
  parser.add_argument('--genes', type=int, default=6000)
  parser.add_argument('--files', type=int, default=10)
  parser.add_argument('--jobs', type=int, default=2)
  parser.add_argument('--medians', default='histogram')
  args = parser.parse_args()
  names = simulate_files(args.folder, args.cells, args.genes, args.files)
  print(
    f'{platform.processor() or platform.machine()}, Python '
    f'{platform.python_version()}, numpy {np.__version__}'
  )
  measure(names, args)


def simulate_files(
  folder: str, num_cells: int, num_genes: int, num_files: int
) -> list[str]:
  """The files, made where they are missing; both species in turn."""
  os.makedirs(folder, exist_ok=True)
  atlas = simulate.Atlas(simulate.AtlasConfig(num_genes=num_genes))
  each = num_cells // num_files
  names = []
  for k in range(num_files):
    species = k % 2
    name = os.path.join(
      folder, f'{gene_table.SPECIES[species]}-{num_genes}-{each}-{k}.h5ad'
    )
    names.append(name)
    if os.path.exists(name):
      continue
    started = time.process_time()
    cells = simulated.stream_h5ad(
      atlas, f'{name}.part', species, k // 2 * each, each
    )
    os.replace(f'{name}.part', name)
    spent = time.process_time() - started
    print(
      f'{name}: {cells:,} cells, {spent / cells * 1e6:.0f} us a cell',
      file=sys.stderr,
    )
  return names


class Watch:
  """Wall, CPU of this process and its children, and sizes, by stage."""

  def __init__(self, folder: str):
    self.folder, self.stages = folder, {}
    self.peak = self.highest = 0  # of any process; in the stage that runs
    self._run = builds.run_stage
    self._ended = threading.Event()

  def __enter__(self) -> 'Watch':
    builds.run_stage = self.run_stage
    threading.Thread(target=self._look, daemon=True).start()
    return self

  def __exit__(self, *exc: object) -> None:
    builds.run_stage = self._run
    self._ended.set()

  def run_stage(self, engine, stage, *rest):
    """Runs a stage and notes what it took."""
    wall, cpu = time.time(), _cpu_of_all()
    self.highest = 0
    results = self._run(engine, stage, *rest)
    self.stages[stage.name] = (
      time.time() - wall,
      _cpu_of_all() - cpu,
      _size_of(os.path.join(stage.folder, stage.name)),
      self.highest,
    )
    return results

  def _look(self) -> None:
    while not self._ended.wait(0.25):
      now = max(_resident(pid) for pid in _family())
      self.peak = max(self.peak, now)
      self.highest = max(self.highest, now)


def _family() -> list[int]:
  """This process and all below it."""
  parents = {}
  for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{pid}/stat', encoding='utf-8') as file:
        parents[int(pid)] = int(file.read().rpartition(')')[2].split()[1])
    except OSError:
      continue
  found = [os.getpid()]
  for pid in found:
    found += [child for child, parent in parents.items() if parent == pid]
  return found


def _resident(pid: int) -> int:
  """Bytes of a process that are its own: mapped files can be dropped."""
  try:
    with open(f'/proc/{pid}/status', encoding='utf-8') as file:
      for line in file:
        if line.startswith('RssAnon'):
          return int(line.split()[1]) << 10
  except OSError:
    pass
  return 0


def _cpu_of_all() -> float:
  """CPU seconds of this process and all below it, dead ones included."""
  ticks = os.sysconf('SC_CLK_TCK')
  total = 0.0
  for pid in _family():
    try:
      with open(f'/proc/{pid}/stat', encoding='utf-8') as file:
        fields = file.read().rpartition(')')[2].split()
    except OSError:
      continue
    total += sum(int(n) for n in fields[11:15]) / ticks
  return total


def _size_of(folder: str) -> int:
  return sum(
    os.path.getsize(os.path.join(place, name))
    for place, _, names in os.walk(folder)
    for name in names
  )


def measure(names: list[str], args: argparse.Namespace) -> None:
  """Builds the corpus and prints what each stage took."""
  output = os.path.join(args.folder, 'corpus')
  shutil.rmtree(output, ignore_errors=True)
  configs = [
    sources.SourceConfig(
      path=name,
      species=os.path.basename(name).partition('-')[0],
      dataset=os.path.basename(name),
      unit='donor',
      obs=('cell_type', 'study'),
      licence='simulated',
    )
    for name in names
  ]
  config = pipeline.PrepareConfig(
    vocabulary='measured',
    filters=quality.QualityConfig.off(),
    jobs=args.jobs,
    medians=args.medians,
    weigh_by=('study',),
  )
  wall, cpu = time.time(), _cpu_of_all()
  with Watch(output) as watch:
    built = pipeline.prepare(configs, output, config)
  wall, cpu = time.time() - wall, _cpu_of_all() - cpu
  kept = sum(built.num_cells(split) for split in corpus.SPLITS)
  cells = sum(s['cells'] for s in built.manifest['sources'])
  elements = sum(
    facts['num_elements']
    for stores in built.manifest['stores'].values()
    for facts in stores.values()
  )
  shards = sum(
    '/c/' in name and name.split('/')[2] in ('counts', 'values')
    for name in built.manifest['files']
  )
  print(
    f'\n{cells:,} cells of {len(names)} files, {kept:,} kept, '
    f'{elements / kept:,.0f} genes a cell, {args.jobs} jobs'
  )
  print(
    '| stage | wall s | CPU us a cell | bytes a cell left behind | MiB of the '
    'largest process |'
  )
  print('|---|---|---|---|---|')
  source_bytes = sum(map(os.path.getsize, names))
  print(f'| (source files) | | | {source_bytes / cells:,.0f} | |')
  for name, (seconds, spent, size, peak) in watch.stages.items():
    print(
      f'| {name} | {seconds:,.1f} | {spent / cells * 1e6:,.1f} | '
      f'{size / cells:,.0f} | {peak / 2**20:,.0f} |'
    )
  corpus_bytes = _size_of(output)
  print(
    f'| all | {wall:,.1f} | {cpu / cells * 1e6:,.1f} | '
    f'{corpus_bytes / cells:,.0f} (the corpus) | {watch.peak / 2**20:,.0f} |'
  )
  print(
    f'\n{cells / wall:,.0f} cells/s; this process '
    f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB '
    'with mapped files'
  )
  scratch = sum(size for *_, size, _ in watch.stages.values())
  scale = TARGET / cells
  print(f'\nFor {TARGET:,} such cells:')
  print(
    f'  {cpu * scale / 3600:,.0f} core-hours, '
    f'{cpu * scale / 3600 * CORE_HOUR:,.2f} dollars at {CORE_HOUR} an hour'
  )
  print(
    f'  {corpus_bytes * scale / 1e12:.2f} TB corpus, '
    f'{corpus_bytes * scale / 1e9 * GB_MONTH:,.2f} dollars a month at '
    f'{GB_MONTH} a GB; {scratch * scale / 1e12:.2f} TB of scratch while it '
    f'is built; {source_bytes * scale / 1e12:.2f} TB read'
  )
  print(
    f'  {shards} shards of counts here; reading an epoch in blocks of '
    f'1,024 cells: {TARGET / 1024 * 1.05:,.0f} requests, '
    f'{TARGET / 1024 * 1.05 * GET:,.2f} dollars'
  )
  print(
    json.dumps(
      {
        'cells': cells,
        'wall': wall,
        'cpu': cpu,
        'stages': watch.stages,
        'corpus_bytes': corpus_bytes,
        'peak': watch.peak,
      }
    )
  )


if __name__ == '__main__':
  main()
