"""What every task of a build knows: small, the same in all processes."""

import dataclasses
import functools
import os
from typing import Any

import numpy as np

from genecompass_jax import vocabulary
from genecompass_jax.prepare import sources
from genecompass_jax.prepare.building import builds, cells, fingerprints


@dataclasses.dataclass(frozen=True)
class Piece:
  """Neighbouring cells of one source: rows first to stop."""

  source: int
  first: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """A build: what it reads, where it works, and how the cells are ordered.

  Attributes:
    folder: of the build.
    configs: of the sources, each with the name that the manifest gives it.
    held: sources that were opened by the caller, in memory; they do not travel
      to other processes.
    is_float: whether counts are corrected ones.
    is_divided: whether they are counts divided by medians already.
    num_labels: columns of labels, source and unit first.
    seed: of the order of the cells.
    bits: a bucket is a range of the ordering hash: there are 2 ** bits.
    pieces: ranges of cells that are read by one task each.
    shard_elements: elements in a shard of counts.
    weigh_by: label columns whose rare combinations are to be seen more often.
    validation_share: for cells that are split one by one.
  """

  folder: str
  configs: tuple[sources.SourceConfig, ...]
  held: tuple[Any, ...]
  is_float: bool
  is_divided: bool
  num_labels: int
  seed: int
  bits: int
  pieces: tuple[Piece, ...]
  shard_elements: int
  weigh_by: tuple[str, ...]
  validation_share: float

  @property
  def record(self) -> np.dtype:
    """Of what goes with a cell."""
    return cells.record_dtype(self.num_labels)

  def stage(self, name: str) -> builds.Stage:
    """A stage of the build."""
    return builds.Stage(self.folder, name)

  def file(self, *parts: str) -> str:
    """A file that all tasks read."""
    return os.path.join(self.folder, *parts)

  def save(self, name: str, array: np.ndarray) -> None:
    """Leaves an array for the tasks, whole or not at all."""
    place = self.file(f'{name}.npy')
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(f'{place}.part', 'wb') as file:
      np.save(file, array)
    os.replace(f'{place}.part', place)

  def load(self, name: str) -> np.ndarray:
    """An array that `save` left, mapped into memory."""
    return np.load(self.file(f'{name}.npy'), mmap_mode='r', allow_pickle=False)

  def vocabulary(self) -> vocabulary.Vocabulary:
    """Gene lists and tokens of the corpus."""
    return _vocabulary(self.file('vocabulary.tsv.gz'))

  def stream(self, source: int) -> sources.CellStream:
    """Cells of a source, opened once in a process."""
    if self.held[source] is not None:
      stream = self.held[source].bind(self.vocabulary())
      return stream.by_rows(self.file('turned', str(source)))
    return _stream(
      self.configs[source],
      self.file('vocabulary.tsv.gz'),
      self.file('turned', str(source)),
    )

  def gene_sets(self, species: int) -> fingerprints.GeneSets:
    """What cells of a species are hashed over."""
    return fingerprints.GeneSets(
      self.load(f'sets/member-{species}'), self.load(f'sets/sources-{species}')
    )


@functools.lru_cache(2)
def _vocabulary(path: str) -> vocabulary.Vocabulary:
  return vocabulary.Vocabulary.load(path)


@functools.lru_cache(2)
def _stream(
  config: sources.SourceConfig, path: str, turned: str
) -> sources.CellStream:
  vocab = _vocabulary(path)
  opened = sources.open_source(config, sources.table_of(vocab))
  return opened.bind(vocab).by_rows(turned)


def forget() -> None:
  """Closes what this process opened for an earlier build."""
  _vocabulary.cache_clear()
  _stream.cache_clear()
