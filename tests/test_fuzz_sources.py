"""Damaged files of every format: an answer of the right shape, or one line.

The oracle. Bytes of small valid files are changed, cut out or cut off. What
comes is `errors.UserError` in one line, or cells: then cells and genes are
as many as they were, names may differ, and values that differ are whole and
not negative (HDF5 and text have no checksums, so a changed digit is another
count). Where the container has checksums (gzip, zip, zstd frames with one) a
change of the data is an error. Nothing else: no other exception, no hang, no
end of the process. Mutations run in another process, which is started again
if it dies, and its death is a failure.
"""

import dataclasses
import functools
import multiprocessing
import os
import pathlib
import queue
import shutil
import tempfile
import warnings

import hypothesis
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import strategies as st

from experiments.benchmarks import formats
from genecompass_jax import errors, vocabulary
from genecompass_jax.prepare import sources
from tests import test_readers_hf
from tests.test_prepare_sources import counts, gather, human_ids
from tests.test_readers import adata_of

CELLS, GENES = 30, 60
SECONDS = 60  # for one damaged file
KINDS = (*formats.WRITERS, 'arrow', 'parquet')


def make(kind, folder):
  """Writes a small set; returns the fields of its configuration."""
  matrix = counts(CELLS)
  if kind in ('arrow', 'parquet'):
    config = test_readers_hf.write(
      pathlib.Path(folder), matrix, parquet=kind == 'parquet'
    )
    return dataclasses.asdict(config)
  formats.WRITERS[kind](
    adata_of(matrix, kind=['a', 'b', 'c'] * 10), f'{folder}/c'
  )
  return {'path': f'{folder}/c{formats.PATHS[kind]}'}


def outcome(fields):
  """What reading gives: a line, or shape and whether values are counts."""
  warnings.simplefilter('ignore')
  vocab = vocabulary.Vocabulary.default()
  try:
    source = sources.open_source(
      sources.SourceConfig(**fields, species='human')
    )
    stream = source.bind(vocab).by_rows()
    seen, good, total = 0, True, 0.0
    for first in range(0, source.num_cells, 16):
      for chunk in stream.read(first, first + 16):
        values = chunk.cells.counts_N
        seen += len(chunk.index_C)
        good &= bool((values > 0).all() and (values % 1 == 0).all())
        good &= len(chunk.cells.starts_C1) == len(chunk.index_C) + 1
        total += float(chunk.cells.totals_C.sum())
    labels = len(source.cell_names()), len(source.obs)
    return (
      'cells',
      source.num_cells,
      source.num_columns,
      seen,
      good,
      total,
      labels,
    )
  except errors.UserError as error:
    return 'line', str(error)
  except Exception as error:  # what must not come
    import traceback

    return 'other', f'{type(error).__name__}: {traceback.format_exc()}'


def _serve(tasks, answers):
  for fields in iter(tasks.get, None):
    answers.put(outcome(fields))


class Reader:
  """Another process that reads, and may die of what it reads."""

  def __init__(self):
    self._context = multiprocessing.get_context('spawn')
    self._process = None

  def _start(self):
    self._tasks, self._answers = self._context.Queue(), self._context.Queue()
    self._process = self._context.Process(
      target=_serve, args=(self._tasks, self._answers), daemon=True
    )
    self._process.start()

  def read(self, fields):
    if self._process is None or not self._process.is_alive():
      self._start()
    self._tasks.put(fields)
    for _ in range(SECONDS * 2):
      try:
        return self._answers.get(timeout=0.5)
      except queue.Empty:
        if not self._process.is_alive():
          code = self._process.exitcode
          self._process = None
          return 'died', code
    self.close()
    return 'hung', SECONDS

  def close(self):
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._process = None


@pytest.fixture(scope='module')
def reader():
  held = Reader()
  yield held
  held.close()


@functools.cache
def original(kind):
  """A valid set in a folder that lasts, its fields and its answer."""
  place = tempfile.TemporaryDirectory(prefix='genecompass-fuzz-')
  fields = make(kind, place.name)
  return place, fields, outcome(fields)


def files_of(kind):
  """Files of a valid set whose bytes are changed, relative to its folder."""
  place, fields, _ = original(kind)
  names = sorted(
    str(p.relative_to(place.name))
    for p in pathlib.Path(place.name).rglob('*')
    if p.is_file() and p.stat().st_size
  )
  return [n for n in names if not n.startswith('medians')]


def damaged(kind, name, how, where, value, length):
  """A copy of a set of which one file is damaged; its folder and fields."""
  place, fields, _ = original(kind)
  folder = tempfile.mkdtemp(prefix='genecompass-fuzz-')
  copy = os.path.join(folder, 'set')
  shutil.copytree(place.name, copy)
  path = os.path.join(copy, name)
  data = bytearray(pathlib.Path(path).read_bytes())
  at = min(int(where * len(data)), len(data) - 1)
  if how == 'byte':
    data[at] = value
  elif how == 'bit':
    data[at] ^= 1 << (value % 8)
  elif how == 'zeros':
    data[at : at + length] = bytes(len(data[at : at + length]))
  elif how == 'ones':
    data[at : at + length] = b'\xff' * len(data[at : at + length])
  elif how == 'cut out':
    del data[at : at + length]
  elif how == 'put in':
    data[at:at] = bytes([value]) * length
  elif how == 'cut off':
    del data[at:]
  pathlib.Path(path).write_bytes(data)
  moved = {
    key: v.replace(place.name, copy) if isinstance(v, str) else v
    for key, v in fields.items()
    if key not in ('species',)
  }
  return folder, moved


def check_one(reader, kind, name, how, where, value, length):
  folder, fields = damaged(kind, name, how, where, value, length)
  try:
    found = reader.read(fields)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  what, *rest = found
  if what == 'line':
    (line,) = rest
    assert '\n' not in line and len(line) < 4000, line
    return what
  assert what == 'cells', (what, rest)
  num_cells, num_columns, seen, good, total, labels = rest
  assert good
  assert seen == num_cells and labels == (num_cells, num_cells)
  _, expected = original(kind)[1:]
  if num_cells != CELLS or num_columns != GENES:
    # a smaller set that agrees with itself: all its parts say so
    assert name.endswith(('.tsv', '.mtx')) or kind in FREE, (found, expected)
  if name.endswith('.gz') and 'matrix' in name and how != 'cut off':
    assert total == expected[5], 'gzip has a checksum'
  return what


# shapes that only one number holds: a changed one is another set, in itself
FREE = ('h5ad', '10x 3', '10x 2', 'zarr2', 'zarr3', 'arrow', 'parquet')

mutations = st.tuples(
  st.integers(0, 1000),
  st.sampled_from(
    ['byte', 'bit', 'zeros', 'ones', 'cut out', 'put in', 'cut off']
  ),
  st.floats(0, 1, exclude_max=True),
  st.integers(0, 255),
  st.integers(1, 64),
)


def fuzz(reader, kind, examples, seed=None):
  names = files_of(kind)

  @hypothesis.settings(
    max_examples=examples,
    deadline=None,
    database=None,
    derandomize=seed is None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate],
  )
  @hypothesis.given(mutations)
  def run(mutation):
    file, how, where, value, length = mutation
    check_one(reader, kind, names[file % len(names)], how, where, value, length)

  run()


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_files(reader, kind):
  fuzz(reader, kind, 8)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_many_damaged_files(reader, kind):
  fuzz(reader, kind, 1500, seed=0)


matrices = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@hypothesis.settings(
  max_examples=12, deadline=None, database=None, derandomize=True
)
@hypothesis.given(
  matrices,
  st.sampled_from([k for k in KINDS if k != 'zarr3 zip']),
  st.integers(1, 40),
  st.floats(0.02, 0.9),
)
def test_what_is_written_is_what_is_read(rng, kind, num_cells, density):
  """Random counts, read at random ranges, against SciPy."""
  matrix = scipy.sparse.random(
    num_cells, GENES, density, 'csr', random_state=rng,
    data_rvs=lambda n: rng.geometric(0.05, n).astype(np.float32),
  )  # fmt: skip
  if not matrix.nnz:
    return
  with tempfile.TemporaryDirectory() as folder:
    if kind in ('arrow', 'parquet'):
      config = test_readers_hf.write(
        pathlib.Path(folder), matrix, parquet=kind == 'parquet'
      )
    else:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        formats.WRITERS[kind](adata_of(matrix), f'{folder}/c')
      config = sources.SourceConfig(f'{folder}/c{formats.PATHS[kind]}')
    vocab = vocabulary.Vocabulary.default()
    stream = sources.open_source(config).bind(vocab).by_rows()
    found, totals = gather(stream)
    np.testing.assert_array_equal(
      found[human_ids()].to_numpy(), matrix.toarray()
    )
    for _ in range(4):
      first = int(rng.integers(num_cells))
      stop = int(rng.integers(first + 1, num_cells + 1))
      (chunk,) = stream.read(first, stop)
      np.testing.assert_array_equal(chunk.cells.totals_C, totals[first:stop])


@hypothesis.settings(
  max_examples=20, deadline=None, database=None, derandomize=True
)
@hypothesis.given(matrices, st.booleans(), st.sampled_from(['integer', 'real']))
def test_mtx_against_scipy(rng, flipped, kind):
  """Entries in any order, with duplicates, as scipy.io reads them."""
  num = int(rng.integers(1, 300))
  rows = rng.integers(1, CELLS + 1, num)
  columns = rng.integers(1, GENES + 1, num)
  values = rng.integers(1, 50, num)
  first, second = (columns, rows) if flipped else (rows, columns)
  shape = (GENES, CELLS) if flipped else (CELLS, GENES)
  lines = [f'{a} {b} {v}' for a, b, v in zip(first, second, values)]
  head = [
    f'%%MatrixMarket matrix coordinate {kind} general',
    f'{shape[0]} {shape[1]} {num}',
  ]
  with tempfile.TemporaryDirectory() as folder:
    formats.write_mtx(adata_of(counts(CELLS)), folder, packed=False)
    path = pathlib.Path(folder) / 'matrix.mtx'
    path.write_text('\n'.join(head + lines) + '\n')
    expected = scipy.io.mmread(path).toarray()
    expected = expected.T if flipped else expected
    stream = sources.cells_of(folder, vocabulary.Vocabulary.default())
    found, _ = gather(stream)
  np.testing.assert_array_equal(found[human_ids()].to_numpy(), expected)
