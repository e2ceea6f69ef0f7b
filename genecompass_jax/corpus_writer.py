"""Writes a corpus: whole shards, under a staging name, the manifest last.

The format stands in `corpus`, which reads it.
"""

import dataclasses
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
  corpus_manifest,
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
def _to_differences(rows_N, starts_C1, num_rows, steps_N):
  """Fills the differences of rows within each cell -> (status, cell)."""
  for cell in range(len(starts_C1) - 1):
    last = np.int64(-1)
    for i in range(starts_C1[cell], starts_C1[cell + 1]):
      row = np.int64(rows_N[i])
      if row <= last:
        return _UNORDERED, cell
      steps_N[i] = row - max(last, 0)
      last = row
    if last >= num_rows:
      return _BAD_ROW, cell
  return 0, 0


@kernels.compiled
def _bad_count(counts_N, whole):
  """The first element that is no count, or -1."""
  for i in range(len(counts_N)):
    count = counts_N[i]
    if not (count > 0 and count < np.inf):
      return i
    if whole and (count != np.floor(count) or count > 4294967295.0):
      return i
  return -1


def block_size(num_cells: int) -> int:
  """Cells in a block: 1,024, fewer where that would make too few blocks."""
  size = corpus.MAX_BLOCK
  while size > MIN_BLOCK and num_cells < size * MIN_BLOCKS:
    size //= 2
  return size


def to_planes(
  cells: encoding.RaggedCells, num_rows: int, is_float: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Cells as they are stored.

  Args:
    cells: rows of the species' gene list, ascending in a cell.
    num_rows: genes of the list.
    is_float: whether counts are corrected ones, which are stored apart.

  Returns:
    uint16 [2, N] planes, differences of rows and counts ([1, N] where counts
    are stored apart), and int64 [2, n] element and count of the counts that
    do not fit.

  Raises:
    ValueError: rows beyond the gene list or out of order in a cell, counts
      that are not positive, or broken counts in a corpus of counts.
  """
  rows_N, counts_N, starts_C1 = encoding.kernel_arrays(cells)
  planes = np.empty((1 if is_float else 2, len(rows_N)), np.uint16)
  status, cell = _to_differences(rows_N, starts_C1, num_rows, planes[0])
  if status:
    raise ValueError(f'cell {cell}: {_REFUSED[status]}')
  if counts_N.dtype == np.uint16:  # nothing to check but zeros
    is_zero = not counts_N.all()
    bad = int(np.argmin(counts_N)) if is_zero else -1
  else:
    bad = _bad_count(counts_N, not is_float)
  if bad >= 0:
    cell = int(np.searchsorted(starts_C1, bad, 'right')) - 1
    raise ValueError(f'cell {cell}: {_REFUSED[_BAD_COUNT]}')
  if is_float:
    return planes, np.zeros((2, 0), np.int64)
  np.minimum(counts_N, corpus.OVERFLOW_MARK, out=planes[1], casting='unsafe')
  large = np.flatnonzero(planes[1] == corpus.OVERFLOW_MARK)
  return planes, np.stack([large, counts_N[large].astype(np.int64)])


def _in_order(cells: encoding.RaggedCells) -> encoding.RaggedCells:
  """The cells with ascending rows in each."""
  rows_N, counts_N, starts_C1 = encoding.kernel_arrays(cells)
  lengths_C = np.diff(starts_C1)
  ascends = rows_N[1:] > rows_N[:-1]
  ascends[starts_C1[1:-1][lengths_C[1:] > 0] - 1] = True  # a cell begins
  if ascends.all():
    return cells
  order_N = np.lexsort(
    (rows_N, np.repeat(np.arange(len(lengths_C)), lengths_C))
  )
  return encoding.RaggedCells(
    rows_N[order_N], counts_N[order_N], starts_C1, cells.totals_C
  )


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """An array of a store: axes before the last, dtype, elements in a shard."""

  lead: tuple[int, ...]
  dtype: str
  shard: int


def element_arrays(
  value_dtype: str, shard_elements: int
) -> dict[str, ArraySpec]:
  """Arrays with an entry an element."""
  if value_dtype == 'float32':
    return {
      'counts': ArraySpec((1,), 'uint16', shard_elements),
      'values': ArraySpec((), 'float32', shard_elements),
    }
  return {'counts': ArraySpec((2,), 'uint16', shard_elements)}


def cell_arrays(
  value_dtype: str, obs_names: Sequence[str]
) -> dict[str, ArraySpec]:
  """Arrays with an entry a cell."""
  total = 'float64' if value_dtype == 'float32' else 'uint32'
  found = {
    'length': ArraySpec((), 'uint16', SHARD_CELLS),
    'total': ArraySpec((), total, SHARD_CELLS),
  }
  for name in obs_names:
    dtype = 'int64' if name == 'source_row' else 'int32'
    found[f'obs/{name}'] = ArraySpec((), dtype, SHARD_CELLS)
  return found


OVERFLOW = ArraySpec((2,), 'int64', SHARD_CELLS)
BLOCK_START = ArraySpec((), 'int64', SHARD_CELLS)


def length_histogram(lengths_C: np.ndarray) -> np.ndarray:
  """Cells in bins of `HISTOGRAM_STEP` expressed genes, the longest possible."""
  bins = 2**16 // HISTOGRAM_STEP + 1
  lengths_C = np.asarray(lengths_C, np.int64)
  return np.bincount(-(-lengths_C // HISTOGRAM_STEP), minlength=bins)


def store_facts(
  *,
  num_cells: int,
  num_elements: int,
  num_overflow: int,
  num_genes: int,
  value_dtype: str,
  obs: Sequence[str],
  histogram: np.ndarray,
) -> dict:
  """What the manifest says of a store."""
  last = int(np.flatnonzero(histogram).max(initial=0))
  return {
    'num_cells': num_cells,
    'num_elements': num_elements,
    'num_overflow': num_overflow,
    'num_genes': num_genes,
    'block_cells': block_size(num_cells),
    'value_dtype': value_dtype,
    'obs': list(obs),
    'length_histogram': {
      'step': HISTOGRAM_STEP,  # bin i: lengths in ((i - 1) step, i step]
      'cells': histogram[: last + 1].tolist(),
    },
  }


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
    self._value_dtype, self._obs = value_dtype, tuple(obs_names)
    specs = {
      **element_arrays(value_dtype, shard_elements),
      **cell_arrays(value_dtype, obs_names),
    }
    if not self._is_float:
      specs['overflow'] = OVERFLOW
    self._arrays = {
      name: shards.ArrayWriter(
        spec.lead, spec.dtype, spec.shard, path, *name.split('/')
      )
      for name, spec in specs.items()
    }
    self.num_cells = self.num_elements = self.num_overflow = 0
    self._histogram = length_histogram(np.zeros(0))
    self._block_start = [np.zeros(1, np.int64)]  # of blocks of MIN_BLOCK
    self._names = NamesWriter(paths.join(path, 'cells.tsv.gz'))

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
    size = len(cells.gene_rows_N)
    if starts_C1[0] != 0 or starts_C1[-1] != size:
      raise ValueError('starts_C1 must run from 0 to the number of elements')
    for name, codes in obs.items():
      if len(codes) != num_cells:
        raise ValueError(f'obs column {name!r} has {len(codes)} cells')
    cells = _in_order(cells)
    planes, large = to_planes(cells, self._num_rows, self._is_float)
    totals_C = np.asarray(cells.totals_C)
    if self._is_float:
      self._arrays['values'].append(cells.counts_N.astype(np.float32))
    elif (totals_C % 1 != 0).any() or (totals_C >= 2**32).any():
      raise ValueError('library sizes of counts must be whole numbers')
    if large.size:
      large[0] += self.num_elements
      self._arrays['overflow'].append(large)
      self.num_overflow += large.shape[1]
    self._arrays['counts'].append(planes)
    self._arrays['length'].append(lengths_C.astype(np.uint16))
    self._arrays['total'].append(totals_C)
    for name, codes in obs.items():
      self._arrays[f'obs/{name}'].append(np.asarray(codes))
    first = -self.num_cells % MIN_BLOCK  # next multiple of MIN_BLOCK
    if first == 0 and self.num_cells == 0:
      first = MIN_BLOCK
    self._block_start.append(starts_C1[first:-1:MIN_BLOCK] + self.num_elements)
    self._histogram += length_histogram(lengths_C)
    self._names.add(names)
    self.num_cells += num_cells
    self.num_elements += size

  def close(self, measured_SrcR: np.ndarray, categories: Mapping) -> dict:
    """Writes what is left and returns the facts for the manifest."""
    for array in self._arrays.values():
      array.close()
    self.abort()
    step = block_size(self.num_cells) // MIN_BLOCK
    starts = np.concatenate(self._block_start)[::step]
    write_small(
      self._path,
      np.append(starts, self.num_elements),
      measured_SrcR,
      {name: list(categories.get(name, ())) for name in self._obs},
    )
    return store_facts(
      num_cells=self.num_cells,
      num_elements=self.num_elements,
      num_overflow=self.num_overflow,
      num_genes=self._num_rows,
      value_dtype=self._value_dtype,
      obs=self._obs,
      histogram=self._histogram,
    )

  def abort(self) -> None:
    """Closes the one open file."""
    self._names.close()


class NamesWriter:
  """The compressed table of cell names: the same cells, the same bytes."""

  def __init__(self, path: str):
    place = paths.path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    self._file = place.open('wb')
    # no time and no file name in the header
    self._gzip = gzip.GzipFile('', 'wb', 1, self._file, mtime=0)
    self._gzip.write(b'cell\n')

  def add(self, names: Sequence[str]) -> None:
    """Adds names, each on a line."""
    lines = ''.join(' '.join(str(n).split()) + '\n' for n in names)
    self._gzip.write(lines.encode('utf-8'))

  def add_lines(self, text: bytes) -> None:
    """Adds names that are lines already."""
    self._gzip.write(text)

  def close(self) -> None:
    """Finishes the file."""
    self._gzip.close()
    self._file.close()


def write_small(
  path: str,
  block_start: np.ndarray,
  measured_SrcR: np.ndarray,
  categories: Mapping[str, Sequence[str]],
) -> None:
  """Writes what a store has one small file or array of.

  Args:
    path: of the store.
    block_start: int64 element offset of every block, and the end.
    measured_SrcR: bool, genes that each source measured.
    categories: names behind the codes of every obs column.
  """
  bits = np.packbits(measured_SrcR, axis=1)
  measured = ArraySpec((len(bits),), 'uint8', bits.shape[-1])
  for name, spec, data in (
    ('block_start', BLOCK_START, block_start),
    ('measured', measured, bits),
  ):
    array = shards.ArrayWriter(spec.lead, spec.dtype, spec.shard, path, name)
    array.append(data)
    array.close()
  paths.write_json(paths.join(path, 'obs', 'categories.json'), dict(categories))


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
    vocab.check_rows()
    self._place = self.path
    if staging.is_local(self.path):
      self._place = staging.folder(self.path)
    elif overwrite and paths.exists(self.path):
      paths.remove(paths.join(self.path, 'manifest.json'))
      paths.remove_tree(self.path)
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
        paths.join(self._place, split, self._vocab.species[species]),
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
      name = self._vocab.species[species]
      stores.setdefault(split, {})[name] = store.close(
        self._measured[species], self._categories
      )
    self._stores = {}
    commit(
      self._place,
      self.path,
      self._vocab,
      {
        **facts,
        'value_dtype': self._value_dtype,
        'sources': self._sources,
        'stores': stores,
      },
      seconds=time.time() - self._started,
    )


def commit(
  place: str,
  path: str,
  vocab: vocabulary.Vocabulary,
  facts: Mapping,
  *,
  seconds: float,
  known: Mapping[str, Mapping] | None = None,
) -> None:
  """Writes the manifest of a finished corpus, and gives it its name.

  Args:
    place: where its files are.
    path: where it will be; the same place behind a URL.
    vocab: of the corpus.
    facts: entries of the manifest; no time, host or absolute path, so that
      corpora compare byte for byte.
    seconds: that the build took, for `build.json`.
    known: size and sha256 of files that were hashed already.
  """
  manifest = {
    **facts,
    'format': corpus.FORMAT,
    'format_version': corpus.FORMAT_VERSION,
    'vocabulary': {
      'file': corpus.VOCABULARY,
      'sha256': vocab.sha256,
      'size': vocab.size,
    },
    'files': _file_facts(place, known or {}),
  }
  build = {
    'finished': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    'seconds': round(seconds, 1),
    'host': socket.gethostname(),
    'platform': platform.platform(),
    'python': platform.python_version(),
    'numpy': np.__version__,
  }
  paths.write_json(paths.join(place, 'build.json'), build)
  sealed = corpus_manifest.sealed(manifest)
  paths.write_json(paths.join(place, 'manifest.json'), sealed)
  if place != path:
    staging.swap(place, path)


def file_facts(path: str) -> dict:
  """Size and sha256 of a file, as the manifest has them."""
  size = paths.size(path)
  return {'size': size, 'sha256': paths.sha256_file(path)}


def _file_facts(place: str, known: Mapping[str, Mapping]) -> dict[str, dict]:
  """Size and sha256 of every file below a folder."""
  names = [
    name
    for name in paths.files_below(place)
    if name not in ('build.json', 'manifest.json')
  ]

  def facts(name: str) -> dict:
    return (
      dict(known[name])
      if name in known
      else file_facts(paths.join(place, name))
    )

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
