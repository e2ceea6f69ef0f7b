"""The corpus on disk: raw counts of cells, shuffled once, in checked shards.

    CORPUS/manifest.json               written last: its presence is the commit
    CORPUS/build.json                  time, host and versions; not compared
    CORPUS/vocabulary.tsv.gz           gene lists and their tokens
    CORPUS/medians_<mode>.tsv.gz       medians of the training cells
    CORPUS/<split>/<species>/
      counts/       uint16[2, n]       rows of the species' gene list, ascending
                                       in a cell, the first absolute, then
                                       differences; and the counts
      values/       float32[n]         only in a corpus of corrected counts,
                                       where counts/ is [1, n] and holds rows
      overflow/     int64[2, m]        flat index and count above 65,534
      length/       uint16[N]          expressed genes of a cell
      total/        uint32[N]          library size (float64 with values/)
      block_start/  int64[blocks + 1]  element offset of every block of cells
      measured/     uint8[sources, R/8]  bitset: genes that a source measured
      obs/<column>/ int32[N]           codes into obs/categories.json, -1 none;
                                       source_row is int64 and no code
      cells.tsv.gz                     cell names, in order

All arrays are zarr3 with sharding and crc32c: a flipped bit is an error, and so
is a missing shard, which plain zarr would read as zeros. The cells are shuffled
when the corpus is built, so that a few blocks are a fair sample of it. This is
the only module that imports tensorstore.
"""

import dataclasses
import functools
import gzip
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures

import numpy as np
import tensorstore as ts

from genecompass_jax import encoding, errors, medians, paths, vocabulary

FORMAT = 'genecompass_jax corpus'
FORMAT_VERSION = 1
SPLITS = ('train', 'validation', 'test')
INNER_CHUNK = 65_536  # elements: about 55 cells; the unit of reading
SHARD_ELEMENTS = 2**26  # 256 MiB of rows and counts before compression
SHARD_CELLS = 2**22  # the one-dimensional columns
MAX_BLOCK, MIN_BLOCK = 1024, 32  # cells in a block
MIN_BLOCKS = 32  # of a store, where it has the cells: shuffling needs them
OVERFLOW_MARK = 65_535  # in the plane of counts: see overflow/
CACHE_BYTES = 64 << 20
HISTOGRAM_STEP = 64  # genes, width of a bin of the length histogram
VALUE_DTYPES = ('uint16', 'float32')
_VOCABULARY = 'vocabulary.tsv.gz'
_CODEC_HINT = 'build the corpus again or copy it again'


def _kvstore(*parts: str) -> dict | str:
  """The TensorStore place of a local folder or a URL."""
  name = paths.join(*parts)
  if '://' in name:
    return f'{name}/'
  return {'driver': 'file', 'path': f'{os.path.abspath(name)}/'}


def _is_local(path: str) -> bool:
  return '://' not in path


def _array_metadata(shape: Sequence[int], dtype: str, shard: int) -> dict:
  """zarr3 metadata: whole shards of small checked chunks, index at the end."""
  lead = list(shape[:-1])
  little = {'name': 'bytes', 'configuration': {'endian': 'little'}}
  crc = {'name': 'crc32c'}
  blosc = {
    'cname': 'lz4',
    'clevel': 5,
    'shuffle': 'bitshuffle',
    'typesize': np.dtype(dtype).itemsize,
  }
  sharding = {
    'chunk_shape': lead + [min(INNER_CHUNK, shard)],
    'codecs': [little, {'name': 'blosc', 'configuration': blosc}, crc],
    'index_codecs': [little, crc],
    'index_location': 'end',
  }
  return {
    'shape': list(shape),
    'data_type': dtype,
    'fill_value': 0,
    'chunk_grid': {
      'name': 'regular',
      'configuration': {'chunk_shape': lead + [shard]},
    },
    'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
  }


def _open_array(context: ts.Context, *parts: str) -> ts.TensorStore:
  """Opens an array for reading; never fills what is missing with zeros."""
  spec = {
    'driver': 'zarr3',
    'kvstore': _kvstore(*parts),
    # both are needed, or every block costs a second request for its index
    'recheck_cached_data': False,
    'recheck_cached_metadata': False,
    'fill_missing_data_reads': False,
  }
  return ts.open(spec, read=True, context=context)


def _result(future: ts.Future) -> np.ndarray | ts.TensorStore:
  """Waits for a read; damage and absence become one line for the user."""
  try:
    return future.result()
  except (ValueError, OSError) as error:
    text = ' '.join(str(error).split())
    if any(k in text for k in ('DATA_LOSS', 'NOT_FOUND', 'OUT_OF_RANGE')):
      raise errors.UserError(
        f'a shard of the corpus is damaged or missing, {_CODEC_HINT}: {text}'
      ) from None
    if any(k in text for k in ('UNAVAILABLE', 'DEADLINE', 'ABORTED')):
      raise errors.RetryableError(f'reading the corpus: {text}') from None
    raise


@encoding.compiled
def _undo_differences(rows_N: np.ndarray, starts_C1: np.ndarray) -> None:
  """Turns differences within each cell back into rows, in place."""
  for cell in range(len(starts_C1) - 1):
    row = np.int64(0)
    for i in range(starts_C1[cell], starts_C1[cell + 1]):
      row += rows_N[i]
      rows_N[i] = row


_UNORDERED, _BAD_ROW, _BAD_COUNT = 1, 2, 3
_REFUSED = {
  _UNORDERED: 'a gene row stands twice',
  _BAD_ROW: 'a gene row is beyond the gene list',
  _BAD_COUNT: 'a count is not positive and finite, or not whole in a corpus of '
  'counts',
}


@encoding.compiled
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
        if count >= OVERFLOW_MARK:
          small[0, i] = OVERFLOW_MARK
          num_large += 1
        else:
          small[0, i] = np.uint16(count)
  return 0, 0, num_large


def block_size(num_cells: int) -> int:
  """Cells in a block: 1,024, fewer where that would make too few blocks."""
  size = MAX_BLOCK
  while size > MIN_BLOCK and num_cells < size * MIN_BLOCKS:
    size //= 2
  return size


def _gene_rows(vocab: vocabulary.Vocabulary, species: int) -> np.ndarray:
  """Indices in the gene table of one species' gene list."""
  return np.flatnonzero(vocab.genes.species_G == species)


class Store:
  """The cells of one species in one split, read in whole blocks.

  Attributes:
    split: `train`, `validation` or `test`.
    species: species code.
    num_cells: cells in the store, numbered in their stored, shuffled order.
    block_cells: cells in a block; the last one may hold fewer.
    num_blocks: blocks in the store.
    value_dtype: `uint16` for counts, `float32` for corrected counts.
  """

  def __init__(
    self,
    path: str,
    split: str,
    species: int,
    facts: Mapping,
    context: ts.Context,
  ):
    self.split, self.species = split, species
    self.num_cells: int = facts['num_cells']
    self.num_elements: int = facts['num_elements']
    self.block_cells: int = facts['block_cells']
    self.num_blocks: int = -(-self.num_cells // self.block_cells)
    self.value_dtype: str = facts['value_dtype']
    self.obs_names: tuple[str, ...] = tuple(facts['obs'])
    self._num_rows: int = facts['num_genes']
    self._path, self._context = path, context
    arrays = ['counts', 'overflow', 'block_start', 'length']
    if self.value_dtype == 'float32':
      arrays[1] = 'values'
    opened = {name: _open_array(context, path, name) for name in arrays}
    self._arrays = {name: _result(f) for name, f in opened.items()}
    reads = {
      name: self._arrays[name].read()
      for name in arrays
      if name not in ('counts', 'values')
    }
    small = {name: _result(f) for name, f in reads.items()}
    self.length_N: np.ndarray = small['length']
    self._block_start: np.ndarray = small['block_start']
    self._overflow = small.get('overflow', np.zeros((2, 0), np.int64))

  def __repr__(self) -> str:
    name = vocabulary.SPECIES[self.species]
    return f'Store({self.split}/{name}, {self.num_cells} cells)'

  def _read(self, *parts: str) -> np.ndarray:
    array = _result(_open_array(self._context, self._path, *parts))
    return _result(array.read())

  @functools.cached_property
  def total_N(self) -> np.ndarray:  # noqa: N802
    """Library size of every cell: uint32, float64 for corrected counts."""
    return self._read('total')

  @functools.cached_property
  def measured_SrcR(self) -> np.ndarray:  # noqa: N802
    """Bool [sources, R]: the genes that each source of the corpus measured."""
    bits = self._read('measured')
    return np.unpackbits(bits, axis=1, count=self._num_rows).astype(bool)

  @functools.cached_property
  def _categories(self) -> dict[str, list[str]]:
    return json.loads(
      paths.read_text(paths.join(self._path, 'obs', 'categories.json'))
    )

  def categories(self, name: str) -> tuple[str, ...]:
    """The names that the codes of a column stand for."""
    return tuple(self._categories.get(name, ()))

  def obs(self, name: str) -> np.ndarray:
    """Codes of a column, int32 [num_cells], -1 where the source has none.

    The codes are the same in all stores of the corpus. `source_row` is the row
    of the cell in its source and has no categories.

    Raises:
      UserError: the corpus has no such column.
    """
    if name not in self.obs_names:
      raise errors.UserError(
        f'the corpus has no obs column {name!r}; it has: '
        + ', '.join(self.obs_names)
      )
    return self._read('obs', name)

  def cell_names(self) -> list[str]:
    """Names of the cells, in stored order."""
    data = paths.read_bytes(paths.join(self._path, 'cells.tsv.gz'))
    return gzip.decompress(data).decode('utf-8').splitlines()[1:]

  def read_blocks(self, blocks: Sequence[int]) -> list[encoding.RaggedCells]:
    """Reads blocks, all requests in flight at once.

    Args:
      blocks: block numbers, any order.

    Returns:
      The cells of each block: rows of the species' gene list ascending in a
      cell (uint16), counts (uint16; uint32 in a block with a count above
      65,534; float32 in a corpus of corrected counts), and library sizes.

    Raises:
      UserError: a shard is damaged, cut short or missing.
    """
    ranges, reads = [], []
    for block in blocks:
      if not 0 <= block < self.num_blocks:
        raise ValueError(f'{block=} is not one of {self.num_blocks} blocks')
      first, last = (int(x) for x in self._block_start[block : block + 2])
      ranges.append((block, first, last))
      reads.append(
        [
          self._arrays[name][..., first:last].read()
          for name in ('counts', 'values')
          if name in self._arrays
        ]
      )
    return [
      self._decode(*where, [_result(f) for f in planes])
      for where, planes in zip(ranges, reads)
    ]

  def _decode(
    self, block: int, first: int, last: int, planes: list[np.ndarray]
  ) -> encoding.RaggedCells:
    cells = slice(
      block * self.block_cells,
      min((block + 1) * self.block_cells, self.num_cells),
    )
    starts_C1 = np.zeros(cells.stop - cells.start + 1, np.int64)
    np.cumsum(self.length_N[cells], out=starts_C1[1:])
    if starts_C1[-1] != last - first:
      raise errors.UserError(
        f'{self._path}: lengths and offsets of block {block} disagree, '
        f'{_CODEC_HINT}'
      )
    rows_N = planes[0][0]
    _undo_differences(rows_N, starts_C1)
    counts_N = planes[1] if len(planes) > 1 else planes[0][1]
    lo, hi = np.searchsorted(self._overflow[0], (first, last))
    if hi > lo:
      counts_N = counts_N.astype(np.uint32)
      counts_N[self._overflow[0, lo:hi] - first] = self._overflow[1, lo:hi]
    return encoding.RaggedCells(
      gene_rows_N=rows_N,
      counts_N=counts_N,
      starts_C1=starts_C1,
      totals_C=self.total_N[cells].astype(np.float64),
    )

  def problems(self) -> list[str]:
    """Reads everything back; one line for each thing that is wrong."""
    found = []
    for block in range(self.num_blocks):
      try:
        (cells,) = self.read_blocks([block])
      except errors.UserError as error:
        found.append(f'{self!r} block {block}: {error}')
        continue
      rows_N = cells.gene_rows_N.astype(np.int64)
      inside_N = np.ones(len(rows_N), bool)
      inside_N[cells.starts_C1[:-1][np.diff(cells.starts_C1) > 0]] = False
      steps_N = np.diff(rows_N, prepend=0)
      if (steps_N[inside_N] <= 0).any():
        found.append(f'{self!r} block {block}: rows of a cell do not ascend')
      if len(rows_N) and rows_N.max() >= self._num_rows:
        found.append(f'{self!r} block {block}: row beyond the gene list')
      if not (cells.counts_N > 0).all():
        found.append(f'{self!r} block {block}: a count that is not positive')
      if self.value_dtype == 'uint16' and cells.counts_N.dtype == np.uint16:
        marks = int((cells.counts_N == OVERFLOW_MARK).sum())
        if marks:
          found.append(f'{self!r} block {block}: {marks} large counts lost')
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """A finished corpus: what it says of itself, and its stores.

  Attributes:
    path: local folder or URL.
    manifest: the content of manifest.json.
    vocabulary: gene lists and tokens that the corpus was built with.
  """

  path: str
  manifest: dict
  vocabulary: vocabulary.Vocabulary
  _context: ts.Context = dataclasses.field(repr=False)
  _stores: dict = dataclasses.field(default_factory=dict, repr=False)

  @classmethod
  def open(cls, path: paths.PathLike) -> 'Corpus':
    """Opens a corpus and checks that every file is there at full length.

    Raises:
      UserError: there is no finished corpus, its format is another one, or a
        file is missing or has another size than the manifest says.
    """
    path = os.fspath(path)
    try:
      manifest = json.loads(paths.read_text(paths.join(path, 'manifest.json')))
    except FileNotFoundError:
      raise errors.UserError(
        f'{path}: no corpus here (no manifest.json, which is written last); '
        'build one with: genecompass prep h5ad FILE... -o CORPUS'
      ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
      raise errors.UserError(
        f'{path}/manifest.json is damaged, {_CODEC_HINT}'
      ) from None
    if manifest.get('format') != FORMAT:
      raise errors.UserError(f'{path}: manifest.json is not that of a corpus')
    if manifest.get('format_version') != FORMAT_VERSION:
      raise errors.UserError(
        f'{path}: corpus format {manifest.get("format_version")}, this '
        f'version reads {FORMAT_VERSION}: build the corpus again'
      )
    _check_sizes(path, manifest['files'])
    context = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
    vocab = vocabulary.Vocabulary.load(paths.join(path, _VOCABULARY))
    if vocab.sha256 != manifest['vocabulary']['sha256']:
      raise errors.UserError(
        f'{path}: {_VOCABULARY} is not the one of the manifest, {_CODEC_HINT}'
      )
    return cls(path, manifest, vocab, context)

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that hold cells, in the order of `SPLITS`."""
    return tuple(s for s in SPLITS if s in self.manifest['stores'])

  def num_cells(self, split: str) -> int:
    """Cells of a split, over the species."""
    stores = self.manifest['stores'].get(split, {})
    return sum(facts['num_cells'] for facts in stores.values())

  def store(self, split: str, species: int) -> Store | None:
    """The cells of a species in a split; None where there are none."""
    name = vocabulary.SPECIES[species]
    facts = self.manifest['stores'].get(split, {}).get(name)
    if facts is None:
      return None
    if (split, species) not in self._stores:
      place = paths.join(self.path, split, name)
      self._stores[split, species] = Store(
        place, split, species, facts, self._context
      )
    return self._stores[split, species]

  def gene_ids(self, species: int) -> tuple[str, ...]:
    """The gene list of a species: Ensembl id of each row [R]."""
    ids = self.vocabulary.genes.gene_ids
    return tuple(ids[g] for g in _gene_rows(self.vocabulary, species))

  def tokens(self, species: int) -> np.ndarray:
    """Token of each row of a species' gene list, int32 [R]."""
    return self.vocabulary.token_G[_gene_rows(self.vocabulary, species)]

  def medians(self, mode: str) -> medians.Medians:
    """Non-zero medians of the training cells in an encoding mode.

    Raises:
      UserError: the corpus was written without medians of that mode.
    """
    name = f'medians_{mode}.tsv.gz'
    if name not in self.manifest['files']:
      raise errors.UserError(f'{self.path}: no medians of mode {mode!r} here')
    return medians.Medians.load(paths.join(self.path, name), self.vocabulary)

  def verify(self) -> list[str]:
    """Hashes every file again and reads every block back.

    Returns:
      One line for each problem; empty where the corpus is sound.
    """
    files = self.manifest['files']
    names = sorted(files)
    with futures.ThreadPoolExecutor(8) as pool:
      hashes = pool.map(
        lambda name: paths.sha256_file(paths.join(self.path, name)), names
      )
      found = [
        f'{self.path}/{name}: content differs from the manifest, {_CODEC_HINT}'
        for name, digest in zip(names, hashes)
        if digest != files[name]['sha256']
      ]
    for split in self.splits:
      for species in range(len(vocabulary.SPECIES)):
        store = self.store(split, species)
        if store is not None:
          found += store.problems()
    return found


def _check_sizes(path: str, files: Mapping[str, Mapping]) -> None:
  """Existence and length of every file: a lost shard is found at open."""

  def problem(item: tuple[str, Mapping]) -> str:
    name, facts = item
    try:
      size = paths.path(paths.join(path, name)).stat().length
    except FileNotFoundError:
      return f'{path}/{name} is missing, {_CODEC_HINT}'
    if size != facts['size']:
      return (
        f'{path}/{name} has {size} bytes instead of {facts["size"]}, '
        f'{_CODEC_HINT}'
      )
    return ''

  with futures.ThreadPoolExecutor(32) as pool:
    for line in pool.map(problem, files.items()):
      if line:
        raise errors.UserError(line)


class _ArrayWriter:
  """An array that grows along its last axis and is written in whole shards."""

  def __init__(self, shape: Sequence[int], dtype: str, shard: int, *place: str):
    self.size = 0
    self._lead, self._dtype, self._shard = list(shape), np.dtype(dtype), shard
    self._buffer: np.ndarray | None = None  # a shard, touched as it fills
    self._held = 0
    self._pending: ts.Future | None = None
    spec = {
      'driver': 'zarr3',
      'kvstore': _kvstore(*place),
      'metadata': _array_metadata([*shape, 2**60], dtype, shard),
      # or a chunk of zeros writes no file, and no file looks like a lost one
      'store_data_equal_to_fill_value': True,
    }
    self._array = ts.open(spec, create=True).result()

  def append(self, data: np.ndarray) -> None:
    done = 0
    while done < data.shape[-1]:
      if self._buffer is None:
        self._buffer = np.empty([*self._lead, self._shard], self._dtype)
      size = min(data.shape[-1] - done, self._shard - self._held)
      piece = data[..., done : done + size]
      self._buffer[..., self._held : self._held + size] = piece
      done += size
      self._held += size
      if self._held == self._shard:
        self._write(self._buffer)

  def _write(self, data: np.ndarray) -> None:
    if self._pending is not None:  # one shard in flight bounds the memory
      self._pending.result()
    stop = self.size + data.shape[-1]
    self._pending = self._array[..., self.size : stop].write(data)
    self.size, self._buffer, self._held = stop, None, 0

  def close(self) -> None:
    end = [None] * len(self._lead) + [self.size + self._held]
    self._array = self._array.resize(
      exclusive_max=end, resize_metadata_only=True
    ).result()
    if self._held:
      self._write(self._buffer[..., : self._held])
    if self._pending is not None:
      self._pending.result()


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
    self._counts = _ArrayWriter(
      [planes], 'uint16', shard_elements, path, 'counts'
    )
    if self._is_float:
      self._values = _ArrayWriter([], 'float32', shard_elements, path, 'values')
    else:
      self._overflow = _ArrayWriter([2], 'int64', SHARD_CELLS, path, 'overflow')
    total_dtype = 'float64' if self._is_float else 'uint32'
    self._length = _ArrayWriter([], 'uint16', SHARD_CELLS, path, 'length')
    self._total = _ArrayWriter([], total_dtype, SHARD_CELLS, path, 'total')
    self._obs = {
      name: _ArrayWriter(
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
      rows_N = encoding.read_only(rows_N[order_N])
      counts_N = encoding.read_only(counts_N[order_N])
      status, cell, num_large = self._fill(rows_N, counts_N, starts_C1, planes)
    if status:
      raise ValueError(f'cell {cell}: {_REFUSED[status]}')
    totals_C = np.asarray(cells.totals_C)
    if self._is_float:
      self._values.append(counts_N.astype(np.float32))
    elif (totals_C % 1 != 0).any() or (totals_C >= 2**32).any():
      raise ValueError('library sizes of counts must be whole numbers')
    if num_large:
      large = np.flatnonzero(planes[1] == OVERFLOW_MARK)
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
      array = _ArrayWriter(shape, str(data.dtype), shard, self._path, name)
      array.append(data)
      array.close()
    paths.write_text(
      paths.join(self._path, 'obs', 'categories.json'),
      _json({name: list(categories.get(name, ())) for name in self._obs}),
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


def _json(content: object) -> str:
  return (
    json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + '\n'
  )


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
    self.path = os.fspath(path)
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
      num_rows = len(_gene_rows(vocab, species))
      if num_rows > 65_535:
        raise errors.UserError(
          f'{num_rows} {name} genes in the vocabulary, a corpus takes 65,535'
        )
    self._place = self.path
    if _is_local(self.path):
      self._place = staging_folder(self.path)
    elif overwrite and paths.exists(self.path):
      paths.path(self.path).rmtree()
    vocab.save(paths.join(self._place, _VOCABULARY))

  def __enter__(self) -> 'CorpusWriter':
    return self

  def __exit__(self, *exc: object) -> None:
    """Leaves nothing of a corpus that was not committed."""
    for store in self._stores.values():
      store.abort()
    self._stores = {}
    if self._place != self.path and os.path.isdir(self._place):
      shutil.rmtree(self._place)

  def store(self, split: str, species: int) -> StoreWriter:
    """The writer of one store, made on first use."""
    if split not in SPLITS:
      raise ValueError(f'{split=} must be one of {SPLITS}')
    key = (split, species)
    if key not in self._stores:
      self._stores[key] = StoreWriter(
        paths.join(self._place, split, vocabulary.SPECIES[species]),
        len(_gene_rows(self._vocab, species)),
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

  def write_text(self, name: str, text: str) -> None:
    """Adds a small text file, such as a report."""
    paths.write_text(paths.join(self._place, name), text)

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
      'format': FORMAT,
      'format_version': FORMAT_VERSION,
      'value_dtype': self._value_dtype,
      'vocabulary': {
        'file': _VOCABULARY,
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
    paths.write_text(paths.join(self._place, 'build.json'), _json(build))
    paths.write_text(paths.join(self._place, 'manifest.json'), _json(manifest))
    if self._place != self.path:
      _swap(self._place, self.path)


def _files_below(place: str, inner: str = '') -> Iterator[str]:
  for child in paths.path(paths.join(place, inner)).iterdir():
    name = os.path.join(inner, child.name)
    if child.is_dir():
      yield from _files_below(place, name)
    else:
      yield name


def _file_facts(place: str) -> dict[str, dict]:
  """Size and sha256 of every file below a folder."""
  names = sorted(_files_below(place))

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
  if _is_local(path) and os.path.exists(path) and not os.path.isdir(path):
    raise errors.UserError(f'{path} is a file; name a folder for the corpus')
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


def staging_folder(path: str) -> str:
  """Makes a folder beside a local output, and clears those of dead runs."""
  path = os.path.abspath(path)
  stem = f'{os.path.basename(path)}.staging-{socket.gethostname()}-'
  parent = os.path.dirname(path)
  os.makedirs(parent, exist_ok=True)
  for name in os.listdir(parent):
    pid = name.removeprefix(stem)
    if name.startswith(stem) and pid.isdigit() and not _is_alive(int(pid)):
      shutil.rmtree(os.path.join(parent, name))
  staging = os.path.join(parent, f'{stem}{os.getpid()}')
  shutil.rmtree(staging, ignore_errors=True)
  os.makedirs(staging)
  return staging


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _swap(staging: str, path: str) -> None:
  """Gives a finished folder its name; an old corpus goes last."""
  old = f'{staging}-old'
  if os.path.exists(path):
    os.rename(path, old)
  os.rename(staging, path)
  shutil.rmtree(old, ignore_errors=True)
