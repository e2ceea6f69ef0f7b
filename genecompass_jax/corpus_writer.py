"""Writes a corpus: whole shards, under a staging name, the manifest last.

The format stands in `corpus`, which reads it.
"""

import gzip
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent import futures

import numpy as np

from genecompass_jax import (
  corpus,
  encoding,
  errors,
  kernels,
  medians,
  paths,
  shards,
  staging,
  vocabulary,
)

SHARD_ELEMENTS = 2**26  # 256 MiB of rows and counts before compression
SHARD_CELLS = 2**22  # the one-dimensional columns
MIN_BLOCK = 32  # cells in a block
MIN_BLOCKS = 32  # of a store, where it has the cells: shuffling needs them
HISTOGRAM_STEP = 64  # genes, width of a bin of the length histogram
VALUE_DTYPES = ('uint16', 'float32')


_UNORDERED, _BAD_ROW, _BAD_COUNT = 1, 2, 3
_REFUSED = {
  _UNORDERED: 'a gene row stands twice',
  _BAD_ROW: 'a gene row is beyond the gene list',
  _BAD_COUNT: 'a count is not positive and finite, or not whole in a corpus of '
  'counts',
}


@kernels.compiled
def _to_differences(rows_N, counts_N, starts_C1, num_rows, steps_N, small):
  """Fills the stored planes -> (status, cell, number of large counts).

  `small` is [1, N] for the plane of counts, or [0, N] where counts are stored
  as they are.
  """
  whole = len(small) > 0
  num_large = 0
  for cell in range(len(starts_C1) - 1):
    last = np.int64(-1)
    for i in range(starts_C1[cell], starts_C1[cell + 1]):
      row = np.int64(rows_N[i])
      if row <= last:
        return _UNORDERED, cell, num_large
      if row >= num_rows:
        return _BAD_ROW, cell, num_large
      steps_N[i] = row - max(last, 0)
      last = row
      count = counts_N[i]
      if not (count > 0 and count < np.inf):
        return _BAD_COUNT, cell, num_large
      if whole:
        if count != np.floor(count) or count > 4294967295.0:
          return _BAD_COUNT, cell, num_large
        if count >= corpus.OVERFLOW_MARK:
          small[0, i] = corpus.OVERFLOW_MARK
          num_large += 1
        else:
          small[0, i] = np.uint16(count)
  return 0, 0, num_large


def block_size(num_cells: int) -> int:
  """Cells in a block: 1,024, fewer where that would make too few blocks."""
  size = corpus.MAX_BLOCK
  while size > MIN_BLOCK and num_cells < size * MIN_BLOCKS:
    size //= 2
  return size


class StoreWriter:
  """Appends cells to one store; made by `CorpusWriter.store`."""

  def __init__(
    self,
    path: str,
    num_rows: int,
    value_dtype: str,
    obs_names: Sequence[str],
    shard_elements: int,
  ):
    self._path, self._num_rows = path, num_rows
    self._is_float = value_dtype == 'float32'
    self._value_dtype = value_dtype
    planes = 1 if self._is_float else 2
    self._counts = shards.ArrayWriter(
      [planes], 'uint16', shard_elements, path, 'counts'
    )
    if self._is_float:
      self._values = shards.ArrayWriter(
        [], 'float32', shard_elements, path, 'values'
      )
    else:
      self._overflow = shards.ArrayWriter(
        [2], 'int64', SHARD_CELLS, path, 'overflow'
      )
    total_dtype = 'float64' if self._is_float else 'uint32'
    self._length = shards.ArrayWriter([], 'uint16', SHARD_CELLS, path, 'length')
    self._total = shards.ArrayWriter(
      [], total_dtype, SHARD_CELLS, path, 'total'
    )
    self._obs = {
      name: shards.ArrayWriter(
        [],
        'int64' if name == 'source_row' else 'int32',
        SHARD_CELLS,
        path,
        'obs',
        name,
      )
      for name in obs_names
    }
    self.num_cells = self.num_elements = self.num_overflow = 0
    self._histogram = np.zeros(2**16 // HISTOGRAM_STEP + 1, np.int64)
    self._block_start = [np.zeros(1, np.int64)]  # of blocks of MIN_BLOCK
    names = paths.path(paths.join(path, 'cells.tsv.gz'))
    names.parent.mkdir(parents=True, exist_ok=True)
    self._names_file = names.open('wb')
    # no time and no file name in the header: the same cells, the same bytes
    self._names = gzip.GzipFile('', 'wb', 6, self._names_file, mtime=0)
    self._names.write(b'cell\n')

  def append(
    self,
    cells: encoding.RaggedCells,
    obs: Mapping[str, np.ndarray],
    names: Sequence[str],
  ) -> None:
    """Adds cells behind those already there.

    Args:
      cells: rows of the species' gene list in any order within a cell.
      obs: for every column of the corpus the codes of these cells.
      names: names of these cells.

    Raises:
      ValueError: rows beyond the gene list or twice in a cell, counts that
        are not positive, or broken counts in a corpus of counts.
    """
    starts_C1 = np.asarray(cells.starts_C1, np.int64)
    lengths_C = np.diff(starts_C1)
    num_cells = len(lengths_C)
    if len(names) != num_cells or set(obs) != set(self._obs):
      raise ValueError('names and obs must be those of the cells and columns')
    rows_N, counts_N, starts_C1 = encoding.kernel_arrays(cells)
    if starts_C1[0] != 0 or starts_C1[-1] != len(rows_N):
      raise ValueError('starts_C1 must run from 0 to the number of elements')
    planes = np.empty((1 if self._is_float else 2, len(rows_N)), np.uint16)
    status, cell, num_large = self._fill(rows_N, counts_N, starts_C1, planes)
    if status == _UNORDERED:
      cell_N = np.repeat(np.arange(num_cells), lengths_C)
      order_N = np.lexsort((rows_N, cell_N))
      rows_N = kernels.read_only(rows_N[order_N])
      counts_N = kernels.read_only(counts_N[order_N])
      status, cell, num_large = self._fill(rows_N, counts_N, starts_C1, planes)
    if status:
      raise ValueError(f'cell {cell}: {_REFUSED[status]}')
    totals_C = np.asarray(cells.totals_C)
    if self._is_float:
      self._values.append(counts_N.astype(np.float32))
    elif (totals_C % 1 != 0).any() or (totals_C >= 2**32).any():
      raise ValueError('library sizes of counts must be whole numbers')
    if num_large:
      large = np.flatnonzero(planes[1] == corpus.OVERFLOW_MARK)
      where = np.stack([large + self.num_elements, counts_N[large]])
      self._overflow.append(where.astype(np.int64))
      self.num_overflow += num_large
    self._counts.append(planes)
    self._length.append(lengths_C.astype(np.uint16))
    self._total.append(totals_C)
    for name, column in self._obs.items():
      if len(obs[name]) != num_cells:
        raise ValueError(f'obs column {name!r} has {len(obs[name])} cells')
      column.append(np.asarray(obs[name]))
    first = -self.num_cells % MIN_BLOCK  # next multiple of MIN_BLOCK
    if first == 0 and self.num_cells == 0:
      first = MIN_BLOCK
    self._block_start.append(starts_C1[first:-1:MIN_BLOCK] + self.num_elements)
    self._histogram += np.bincount(
      -(-lengths_C // HISTOGRAM_STEP), minlength=len(self._histogram)
    )
    lines = ''.join(' '.join(str(n).split()) + '\n' for n in names)
    self._names.write(lines.encode('utf-8'))
    self.num_cells += num_cells
    self.num_elements += len(rows_N)

  def _fill(self, rows_N, counts_N, starts_C1, planes) -> tuple[int, int, int]:
    """Differences and counts into planes -> (status, cell, large counts)."""
    return _to_differences(
      rows_N, counts_N, starts_C1, self._num_rows, planes[0], planes[1:]
    )

  def close(self, measured_SrcR: np.ndarray, categories: Mapping) -> dict:
    """Writes what is left and returns the facts for the manifest."""
    arrays = [self._counts, self._length, self._total, *self._obs.values()]
    arrays.append(self._values if self._is_float else self._overflow)
    for array in arrays:
      array.close()
    self.abort()
    block_cells = block_size(self.num_cells)
    starts = np.concatenate(self._block_start)[:: block_cells // MIN_BLOCK]
    starts = np.append(starts, self.num_elements)
    for name, shape, data in (
      ('block_start', [], starts),
      (
        'measured',
        [len(measured_SrcR)],
        np.packbits(measured_SrcR, axis=1),
      ),
    ):
      shard = SHARD_CELLS if name == 'block_start' else data.shape[-1]
      array = shards.ArrayWriter(
        shape, str(data.dtype), shard, self._path, name
      )
      array.append(data)
      array.close()
    paths.write_json(
      paths.join(self._path, 'obs', 'categories.json'),
      {name: list(categories.get(name, ())) for name in self._obs},
    )
    last = int(np.flatnonzero(self._histogram).max(initial=0))
    return {
      'num_cells': self.num_cells,
      'num_elements': self.num_elements,
      'num_overflow': self.num_overflow,
      'num_genes': self._num_rows,
      'block_cells': block_cells,
      'value_dtype': self._value_dtype,
      'obs': list(self._obs),
      'length_histogram': {
        'step': HISTOGRAM_STEP,  # bin i: lengths in ((i - 1) step, i step]
        'cells': self._histogram[: last + 1].tolist(),
      },
    }

  def abort(self) -> None:
    """Closes the one open file."""
    self._names.close()
    self._names_file.close()


class CorpusWriter:
  """Writes a corpus: all of it, or nothing that looks like one.

  Use as a context; `commit` inside it. A local corpus grows in a staging
  folder beside its place and takes its name when it is whole; behind a URL
  the manifest, written last, is the commit.

  Args:
    path: where the corpus will be; must not exist or be empty.
    vocab: gene lists (rows of a species in the table's order) and tokens.
    sources: facts of each source, for the manifest.
    measured: for each species, bool [sources, R].
    categories: names behind the codes of every obs column; `source` and
      `unit` must be among them. `source_row` is added.
    value_dtype: `uint16` for counts, `float32` for corrected counts.
    overwrite: replace a corpus that is already there.
    shard_elements: elements in a shard.

  Raises:
    UserError: the place is taken.
  """

  def __init__(
    self,
    path: paths.PathLike,
    vocab: vocabulary.Vocabulary,
    *,
    sources: Sequence[Mapping],
    measured: Mapping[int, np.ndarray],
    categories: Mapping[str, Sequence[str]],
    value_dtype: str = 'uint16',
    overwrite: bool = False,
    shard_elements: int = SHARD_ELEMENTS,
  ):
    if value_dtype not in VALUE_DTYPES:
      raise ValueError(f'{value_dtype=} must be one of {VALUE_DTYPES}')
    if not {'source', 'unit'} <= set(categories):
      raise ValueError('categories must name the columns source and unit')
    self.path = staging.real(os.fspath(path))
    check_output(self.path, overwrite)
    self._vocab = vocab
    self._sources = [dict(s) for s in sources]
    self._measured = measured
    self._categories = categories
    self._value_dtype = value_dtype
    self._shard_elements = shard_elements
    self._stores: dict[tuple[str, int], StoreWriter] = {}
    self._started = time.time()
    for species, name in enumerate(vocabulary.SPECIES):
      num_rows = len(vocab.gene_rows(species))
      if num_rows > 65_535:
        raise errors.UserError(
          f'{num_rows} {name} genes in the vocabulary, a corpus takes 65,535'
        )
    self._place = self.path
    if staging.is_local(self.path):
      self._place = staging.folder(self.path)
    elif overwrite and paths.exists(self.path):
      paths.path(self.path).rmtree()
    vocab.save(paths.join(self._place, corpus.VOCABULARY))

  def __enter__(self) -> 'CorpusWriter':
    return self

  def __exit__(self, *exc: object) -> None:
    """Leaves nothing of a corpus that was not committed."""
    stores, self._stores = self._stores, {}
    try:
      for store in stores.values():
        store.abort()
    except OSError:  # a full disk: what is left to write goes anyway
      pass
    finally:
      if self._place != self.path and os.path.isdir(self._place):
        shutil.rmtree(self._place)

  def store(self, split: str, species: int) -> StoreWriter:
    """The writer of one store, made on first use."""
    if split not in corpus.SPLITS:
      raise ValueError(f'{split=} must be one of {corpus.SPLITS}')
    key = (split, species)
    if key not in self._stores:
      self._stores[key] = StoreWriter(
        paths.join(self._place, split, vocabulary.SPECIES[species]),
        len(self._vocab.gene_rows(species)),
        self._value_dtype,
        [*self._categories, 'source_row'],
        self._shard_elements,
      )
    return self._stores[key]

  def write_medians(self, values: medians.Medians) -> None:
    """Adds the medians of one mode."""
    values.save(
      paths.join(self._place, f'medians_{values.mode}.tsv.gz'), self._vocab
    )

  def write_json(self, name: str, content: object) -> None:
    """Adds a small file of facts, such as a report."""
    paths.write_json(paths.join(self._place, name), content)

  def commit(self, facts: Mapping) -> None:
    """Finishes every store and writes the manifest, which makes it a corpus.

    Args:
      facts: more entries of the manifest (seed, rule of the split, ...); no
        time, host or absolute path, so that corpora compare byte for byte.
    """
    if not self._stores:
      raise ValueError('no store was written')
    stores: dict[str, dict] = {}
    for (split, species), store in sorted(self._stores.items()):
      name = vocabulary.SPECIES[species]
      stores.setdefault(split, {})[name] = store.close(
        self._measured[species], self._categories
      )
    self._stores = {}
    manifest = {
      **facts,
      'format': corpus.FORMAT,
      'format_version': corpus.FORMAT_VERSION,
      'value_dtype': self._value_dtype,
      'vocabulary': {
        'file': corpus.VOCABULARY,
        'sha256': self._vocab.sha256,
        'size': self._vocab.size,
      },
      'sources': self._sources,
      'stores': stores,
      'files': _file_facts(self._place),
    }
    build = {
      'finished': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      'seconds': round(time.time() - self._started, 1),
      'host': socket.gethostname(),
      'platform': platform.platform(),
      'python': platform.python_version(),
      'numpy': np.__version__,
    }
    paths.write_json(paths.join(self._place, 'build.json'), build)
    paths.write_json(paths.join(self._place, 'manifest.json'), manifest)
    if self._place != self.path:
      staging.swap(self._place, self.path)


def _file_facts(place: str) -> dict[str, dict]:
  """Size and sha256 of every file below a folder."""
  names = paths.files_below(place)

  def facts(name: str) -> dict:
    full = paths.join(place, name)
    return {
      'size': paths.path(full).stat().length,
      'sha256': paths.sha256_file(full),
    }

  with futures.ThreadPoolExecutor(8) as pool:
    return dict(zip(names, pool.map(facts, names)))


def check_output(path: str, overwrite: bool) -> None:
  """Refuses a place that is taken.

  Raises:
    UserError: something is there, and it may not or must not be replaced.
  """
  if (
    staging.is_local(path) and os.path.exists(path) and not os.path.isdir(path)
  ):
    raise errors.UserError(f'{path} is a file; name a folder for the corpus')
  if not path:
    raise errors.UserError('an empty name for the corpus; name a folder')
  held = paths.listdir(path)
  if not held:
    return
  if not overwrite:
    raise errors.UserError(
      f'{path} is not empty; name another folder or pass --overwrite'
    )
  if 'manifest.json' not in held:
    raise errors.UserError(
      f'{path} holds something that is not a corpus; it is left alone: name '
      'another folder'
    )
