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

The arrays are those of `shards`; `corpus_writer` writes them. The cells are
shuffled when the corpus is built, so that a few blocks are a fair sample of it.
"""

import dataclasses
import functools
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import NoReturn

import numpy as np

from genecompass_jax import (
  corpus_manifest,
  encoding,
  errors,
  kernels,
  medians,
  paths,
  shards,
  vocabulary,
)

FORMAT = 'genecompass_jax corpus'
FORMAT_VERSION = 1
SPLITS = ('train', 'validation', 'test')
MAX_BLOCK = 1024  # cells in a block
OVERFLOW_MARK = 65_535  # in the plane of counts: see overflow/
VOCABULARY = 'vocabulary.tsv.gz'


@kernels.compiled
def undo_differences(rows_N: np.ndarray, starts_C1: np.ndarray) -> None:
  """Turns differences within each cell back into rows, in place."""
  for cell in range(len(starts_C1) - 1):
    row = np.int64(0)
    for i in range(starts_C1[cell], starts_C1[cell + 1]):
      row += rows_N[i]
      rows_N[i] = row


class Store:
  """The cells of one species in one split, read in whole blocks.

  Attributes:
    split: `train`, `validation` or `test`.
    species: species code.
    species_name: its name.
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
    species_name: str,
    facts: Mapping,
    context: shards.Context,
  ):
    self.split, self.species = split, species
    self.species_name = species_name
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
    opened = {name: shards.open_array(context, path, name) for name in arrays}
    self._arrays = {name: shards.result(f) for name, f in opened.items()}
    reads = {
      name: self._arrays[name].read()
      for name in arrays
      if name not in ('counts', 'values')
    }
    small = {name: shards.result(f) for name, f in reads.items()}
    self.length_N: np.ndarray = small['length']
    self._block_start: np.ndarray = small['block_start']
    self._overflow = small.get('overflow', np.zeros((2, 0), np.int64))
    self._check_lengths()

  def __repr__(self) -> str:
    return f'Store({self.split}/{self.species_name}, {self.num_cells} cells)'

  def _check_lengths(self) -> None:
    """The manifest is hashed by nothing; the arrays know how long they are."""
    name = 'values' if 'values' in self._arrays else 'counts'
    stored = (
      len(self.length_N),
      len(self._block_start) - 1,
      int(self._block_start[-1]) if len(self._block_start) else -1,
      int(self._arrays[name].shape[-1]),
    )
    said = (
      self.num_cells, self.num_blocks, self.num_elements, self.num_elements
    )  # fmt: skip
    if stored != said:
      raise errors.UserError(
        f'{self._path}: the manifest says {self.num_cells} cells of '
        f'{self.num_elements} elements, the arrays hold {stored[0]} of '
        f'{stored[-1]}, {shards.HINT}'
      )

  def _read(self, *parts: str) -> np.ndarray:
    array = shards.result(shards.open_array(self._context, self._path, *parts))
    return shards.result(array.read())

  @functools.cached_property
  def total_N(self) -> np.ndarray:  # noqa: N802
    """Library size of every cell: uint32, float64 for corrected counts."""
    return self._read('total')

  @property
  def largest_count(self) -> int:
    """No count is larger; `OVERFLOW_MARK` where none is above it."""
    return int(self._overflow[1].max(initial=OVERFLOW_MARK))

  @functools.cached_property
  def measured_SrcR(self) -> np.ndarray:  # noqa: N802
    """Bool [sources, R]: the genes that each source of the corpus measured."""
    bits = self._read('measured')
    return np.unpackbits(bits, axis=1, count=self._num_rows).astype(bool)

  @functools.cached_property
  def panels(self) -> tuple[np.ndarray, np.ndarray]:
    """The distinct sets of genes that sources measured, few beside sources.

    Returns:
      Bool [P, R] sets, and int64 [sources + 1] the set of each source. The
      last is that of cells of no source, of code -1: all genes.
    """
    bits = np.packbits(self.measured_SrcR, axis=1)
    every = np.packbits(np.ones((1, self._num_rows), bool), axis=1)
    bits_PR, panel_Src = np.unique(
      np.concatenate([bits, every]), axis=0, return_inverse=True
    )
    measured_PR = np.unpackbits(bits_PR, axis=1, count=self._num_rows)
    return measured_PR.astype(bool), panel_Src.ravel()

  @functools.cached_property
  def _categories(self) -> dict[str, list[str]]:
    path = paths.join(self._path, 'obs', 'categories.json')
    try:
      found = paths.read_json(path)
      return {name: [str(n) for n in names] for name, names in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
      raise errors.UserError(
        f'{path} is damaged ({error}), {shards.HINT}'
      ) from None

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
      self._decode(*where, [shards.result(f) for f in planes])
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
      self._disagree(block)
    rows_N = planes[0][0]
    undo_differences(rows_N, starts_C1)
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

  def _disagree(self, block: int) -> NoReturn:
    raise errors.UserError(
      f'{self._path}: lengths and offsets of block {block} disagree, '
      f'{shards.HINT}'
    )

  def read_cells(
    self, first: int, stop: int, out_2N: np.ndarray
  ) -> shards.Future | None:
    """Reads cells of one block as they are stored, without a copy.

    Args:
      first: number of the first cell.
      stop: number behind the last.
      out_2N: uint16 [2, n] for their n elements; gets rows, as differences
        within a cell, and counts.

    Returns:
      What to wait for; None where a count is above 65,534 or the counts are
      corrected ones: `read_blocks` reads those.

    Raises:
      UserError: lengths and offsets of the block disagree.
    """
    if self.value_dtype != 'uint16':
      return None
    block = first // self.block_cells
    of_block = self.length_N[block * self.block_cells :][: self.block_cells]
    a, b = self._block_start[block : block + 2].tolist()
    if int(of_block.sum(dtype=np.int64)) != b - a:
      self._disagree(block)
    a += int(of_block[: first % self.block_cells].sum(dtype=np.int64))
    b = a + out_2N.shape[-1]
    low, high = np.searchsorted(self._overflow[0], (a, b))
    if high > low:
      return None
    return shards.read_into(self._arrays['counts'][..., a:b], out_2N)

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
    manifest: the content of manifest.json, without its own hash.
    vocabulary: gene lists and tokens that the corpus was built with.
    is_sealed: whether the manifest holds its own hash, which was compared;
      corpora of earlier versions have none.
  """

  path: str
  manifest: dict
  vocabulary: vocabulary.Vocabulary
  _context: shards.Context = dataclasses.field(repr=False)
  is_sealed: bool = True
  _stores: dict = dataclasses.field(default_factory=dict, repr=False)

  @classmethod
  def open(cls, path: paths.PathLike) -> 'Corpus':
    """Opens a corpus and checks that every file is there at full length.

    Chunks of arrays have checksums of their own; JSON files, which have none,
    are hashed.

    Raises:
      UserError: there is no finished corpus, its format is another one, or a
        file is missing or is not the one that the manifest names.
    """
    path = os.fspath(path)
    try:
      manifest = paths.read_json(paths.join(path, 'manifest.json'))
    except FileNotFoundError:
      raise errors.UserError(
        f'{path}: no corpus here (no manifest.json, which is written last); '
        'build one with: genecompass prep FILE... -o CORPUS'
      ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
      raise errors.UserError(
        f'{path}/manifest.json is damaged, {shards.HINT}'
      ) from None
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
      raise errors.UserError(f'{path}: manifest.json is not that of a corpus')
    if manifest.get('format_version') != FORMAT_VERSION:
      raise errors.UserError(
        f'{path}: corpus format {manifest.get("format_version")}, this '
        f'version reads {FORMAT_VERSION}: build the corpus again'
      )
    corpus_manifest.check(path, manifest, shards.HINT)
    manifest, is_sealed = corpus_manifest.unsealed(path, manifest, shards.HINT)
    _check_files(path, manifest['files'])
    context = shards.new_context()
    vocab = vocabulary.Vocabulary.load(paths.join(path, VOCABULARY))
    if vocab.sha256 != manifest['vocabulary']['sha256']:
      raise errors.UserError(
        f'{path}: {VOCABULARY} is not the one of the manifest, {shards.HINT}'
      )
    return cls(path, manifest, vocab, context, is_sealed)

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
    name = self.vocabulary.species[species]
    facts = self.manifest['stores'].get(split, {}).get(name)
    if facts is None:
      return None
    if (split, species) not in self._stores:
      place = paths.join(self.path, split, name)
      self._stores[split, species] = Store(
        place, split, species, name, facts, self._context
      )
    return self._stores[split, species]

  def stores(self, split: str) -> list[Store]:
    """The stores of a split, in the order of the species."""
    found = (
      self.store(split, species)
      for species in range(len(self.vocabulary.species))
    )
    return [store for store in found if store is not None]

  def gene_ids(self, species: int) -> tuple[str, ...]:
    """The gene list of a species: Ensembl id of each row [R]."""
    ids = self.vocabulary.genes.gene_ids
    return tuple(ids[g] for g in self.vocabulary.gene_rows(species))

  def tokens(self, species: int) -> np.ndarray:
    """Token of each row of a species' gene list, int32 [R]."""
    return self.vocabulary.token_G[self.vocabulary.gene_rows(species)]

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
        f'{self.path}/{name}: content differs from the manifest, {shards.HINT}'
        for name, digest in zip(names, hashes)
        if digest != files[name]['sha256']
      ]
    for split in self.splits:
      for species, name in enumerate(self.vocabulary.species):
        try:
          store = self.store(split, species)
          if store is not None:
            found += store.problems()
        except errors.UserError as error:
          found.append(f'{split}/{name}: {error}')
    return found


def _check_files(path: str, files: Mapping[str, Mapping]) -> None:
  """Existence and length of every file: a lost shard is found at open."""
  sizes = paths.sizes_below(path)

  def problem(item: tuple[str, Mapping]) -> str:
    name, facts = item
    place = paths.join(path, name)
    try:
      size = paths.size(place) if sizes is None else sizes.get(name)
      if size is None:
        raise FileNotFoundError
      if name.endswith('.json') and paths.sha256_file(place) != facts['sha256']:
        return f'{place}: content differs from the manifest, {shards.HINT}'
    except FileNotFoundError:
      return f'{path}/{name} is missing, {shards.HINT}'
    if size != facts['size']:
      return (
        f'{path}/{name} has {size} bytes instead of {facts["size"]}, '
        f'{shards.HINT}'
      )
    return ''

  with futures.ThreadPoolExecutor(32) as pool:
    for line in pool.map(problem, files.items()):
      if line:
        raise errors.UserError(line)
