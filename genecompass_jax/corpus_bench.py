"""`genecompass corpus bench`: what loading a corpus costs on this machine."""

import dataclasses
import importlib.metadata
import itertools
import os
import platform

import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  data,
  encoding,
  errors,
  meter as meter_lib,
  packing,
  paths,
  shards,
)

RAW = 'raw'
LAYOUTS = (*packing.LAYOUTS, RAW)
_LABELS = ('cell_type', 'dataset', 'unit', 'source')
_HEADER = (
  '| | cells/s | CPU us a cell | bytes a cell | requests / 1,024 cells |'
  ' bytes read a cell | peak MiB | label entropy (full shuffle), bits |'
  ' real tokens |\n|---|---|---|---|---|---|---|---|---|'
)


def measure(
  corpus: corpus_lib.Corpus,
  *,
  layout: str = packing.PACKED,
  rows: int = 32,
  slots: int = 2304,
  threads: int = 2,
  seconds: float = 10.0,
  max_genes: int = 2048,
  label: str = '',
  cold: bool = False,
) -> dict:
  """Makes batches of the training cells for a while; figures by name.

  Opening and compiling are not in the time; what follows is all in:
  reading, decoding, ranking, logarithms, masks, rows. `raw` stops at decoded
  counts, a window of a stream at a time.

  Args:
    corpus: an open corpus.
    layout: `packed`, `buckets` or `raw`.
    rows: rows of a batch.
    slots: slots of a packed row.
    threads: that make batches.
    seconds: to measure for, through epochs; the planning of all but the first
      is in the time.
    max_genes: the cut.
    label: obs column whose mixing is measured; '' takes the first that is
      there of cell_type, dataset, unit, source.
    cold: ask the system to forget the files, again every quarter of an epoch.

  Raises:
    UserError: no such column, too few cells, or a number that is none.
  """
  for name, number, low in (
    ('rows', rows, 1),
    ('threads', threads, 0),
    ('seconds', seconds, 0),
  ):
    if not low <= number < float('inf'):  # NaN would never end
      raise errors.UserError(f'--{name} {number:g} must be at least {low}')
  config = data.DataConfig(
    rows_per_batch=rows,
    slots=slots,
    layout=packing.PACKED if layout == RAW else layout,
    streams=min(8, rows & -rows),
    buckets=(),
  )
  encode = encoding.EncodingConfig(max_genes=max_genes)
  config = data.fit_buckets(corpus, encode, config)
  small = dataclasses.replace(config, window_blocks=1)
  data.Loader(corpus, encode, small).batch(0)  # compiles
  labels_C = _labels(corpus, label)
  fresh = corpus_lib.Corpus.open(corpus.path)  # nothing of it in memory
  loader = data.Loader(fresh, encode, config)
  if cold:
    forget(corpus.path)
  # Epoch after epoch, or the look-ahead of the last batches of a small corpus
  # would be most of what is measured.
  batches = (
    itertools.chain.from_iterable(map(loader.raw_windows, itertools.count()))
    if layout == RAW
    else loader.iterate(threads=threads)
  )
  next_cold = 0
  before = shards.read_metrics()
  meter = meter_lib.Meter()
  for batch in batches:
    if layout == RAW:
      meter.add(len(batch.number_C), labels_C[batch.number_C])
    else:
      number_C = batch.cell_index_BS[batch.cell_index_BS >= 0]
      segments_BL = batch.batch.cells.segments_BL
      real = int(np.count_nonzero(segments_BL))
      meter.add(len(number_C), labels_C[number_C], segments_BL.size, real)
    if meter.seconds > seconds:
      break
    if cold and meter.cells >= next_cold:  # every epoch is a first one
      forget(corpus.path)
      next_cold += loader.cells_per_epoch() // 4
  after = shards.read_metrics()
  result = meter.result({k: after[k] - before[k] for k in after})
  return {**result, 'stored_bytes': stored_bytes(corpus)}


def _labels(corpus: corpus_lib.Corpus, label: str) -> np.ndarray:
  """Codes of a column over the training cells."""
  stores = [
    store
    for species in range(len(corpus.vocabulary.species))
    if (store := corpus.store('train', species)) is not None
  ]
  names = stores[0].obs_names
  name = label or next(n for n in _LABELS if n in names)
  return np.concatenate([store.obs(name) for store in stores])


def stored_bytes(corpus: corpus_lib.Corpus) -> float:
  """Bytes on disk of the counts of a training cell."""
  held = sum(
    facts['size']
    for name, facts in corpus.manifest['files'].items()
    if name.startswith('train/')
    and name.split('/')[2] in ('counts', 'values', 'overflow')
  )
  return held / corpus.num_cells('train')


def forget(path: str) -> None:
  """Asks the system to drop the files of a local folder from its memory.

  Raises:
    UserError: the folder is a URL, or the system cannot.
  """
  if '://' in path or not hasattr(os, 'posix_fadvise'):
    raise errors.UserError(f'{path}: --cold needs local files and Linux')
  for folder, _, names in os.walk(path):
    for name in names:
      with open(paths.join(folder, name), 'rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row(name: str, figures: dict) -> str:
  """A line of the table."""

  def number(key: str, form: str) -> str:
    value = figures.get(key, float('nan'))
    return '-' if value != value else format(value, form)

  entropy = number('entropy', '.3f')
  if entropy != '-':
    entropy += f' ({number("full_entropy", ".3f")})'
  return (
    f'| {name} | {number("rate", ",.0f")} | {number("cpu_us", ",.1f")} |'
    f' {number("stored_bytes", ",.0f")} | {number("requests", ",.2f")} |'
    f' {number("read_bytes", ",.0f")} | {number("peak_mib", ",.0f")} |'
    f' {entropy} | {number("real_share", ".1%")} |'
  )


def table(rows: list[tuple[str, dict]]) -> str:
  """Figures of several runs, one line each."""
  return '\n'.join([_HEADER, *(row(name, figures) for name, figures in rows)])


def machine() -> str:
  """One line: processor, load and versions."""
  try:
    with open('/proc/cpuinfo') as file:
      model = next(x for x in file if x.startswith('model name')).split(': ')[1]
  except (OSError, StopIteration):
    model = platform.machine()
  versions = ' '.join(
    f'{name} {importlib.metadata.version(name)}'
    for name in ('numpy', 'numba', 'grain', 'tensorstore', 'jax')
  )
  return (
    f'{model.strip()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f};'
    f' Python {platform.python_version()}, {versions}'
  )
