"""Cells of a split by number, and batches of them: read, encode, mask, fill.

What `data` plans, this carries out. A batch depends on the cells picked, the
seed and the epochs that ties and masks are drawn in, and on nothing else.
"""

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Sequence

import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  encoding,
  errors,
  kernels,
  masking,
  medians as medians_lib,
  packing,
  paths,
  rows as rows_lib,
  schemas,
  vocabulary as vocabulary_lib,
)

_READ_BLOCKS = 16  # in flight at a time in one thread


@dataclasses.dataclass(frozen=True)
class Window:
  """Raw cells in memory, of one or both species, and how they are laid out."""

  cells: encoding.RaggedCells
  number_C: np.ndarray
  rows: packing.Rows | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of a host's batch: rows, slots, masked slots, most cells of a row."""

  num_rows: int
  slots: int
  num_masked: int
  segments: int


@dataclasses.dataclass(frozen=True)
class Picks:
  """Cells of a window that go into a batch, in order of rows.

  Attributes:
    window: where they are held.
    place_n: their places in it.
    repeat_n: 1, 2, ... for further copies of a cell in an epoch.
    row_n: their rows of the batch, ascending.
  """

  window: Window
  place_n: np.ndarray
  repeat_n: np.ndarray
  row_n: np.ndarray


class Split:
  """Reads cells of a split by number and makes batches of them.

  Attributes:
    stores: of the species that the split has, human first.
    first_T1: number of the first cell of each store, and of all cells.
    lengths_C: uint16 genes of every encoded cell.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    encoding_config: encoding.EncodingConfig,
    split: str,
    vocabulary: vocabulary_lib.Vocabulary | None = None,
    medians: medians_lib.Medians | None = None,
  ):
    """Opens the stores and counts the genes of encoded cells.

    Args:
      corpus: an open corpus.
      encoding_config: how counts become ranks and values.
      split: name of the split.
      vocabulary: in place of the corpus' own, with medians for it.
      medians: in place of the corpus' own.

    Raises:
      UserError: no such split; medians of another mode.
    """
    self.stores = [
      store
      for species in range(len(vocabulary_lib.SPECIES))
      if (store := corpus.store(split, species)) is not None
    ]
    if not self.stores:
      raise errors.UserError(
        f'{corpus.path} has no split {split!r}; it has:'
        f' {", ".join(corpus.splits)}'
      )
    vocab = vocabulary or corpus.vocabulary
    medians = medians or corpus.medians(encoding_config.mode)
    if medians.mode != encoding_config.mode:
      raise errors.UserError(
        f'medians of mode {medians.mode!r} for an encoding in mode'
        f' {encoding_config.mode!r}: give those of the same mode'
      )
    self.vocabulary_size = vocab.size
    sizes = [store.num_cells for store in self.stores]
    self.first_T1 = tuple(np.cumsum([0, *sizes]).tolist())
    self.species_T = np.array([store.species for store in self.stores])
    tokens = [
      np.asarray(vocab.tokens(corpus.gene_ids(store.species)), np.int32)
      for store in self.stores
    ]
    self.encoders = [
      encoding.CellEncoder(
        encoding_config, token_R, medians.divisor_V(store.species)
      )
      for store, token_R in zip(self.stores, tokens)
    ]
    self.source_T = [store.obs('source') for store in self.stores]
    self.pools_T = [
      masking.TokenPools.of(measured_tokens(store, token_R), vocab.size)
      for store, token_R in zip(self.stores, tokens)
    ]
    self.lengths_C = np.concatenate(
      [
        _encoded_lengths(corpus, split, store, encoder, token_R)
        for store, encoder, token_R in zip(self.stores, self.encoders, tokens)
      ]
    )

  @property
  def num_cells(self) -> int:
    """Cells of all stores."""
    return self.first_T1[-1]

  def weights(
    self,
    source_weights: Sequence[tuple[str, float]],
    species_weights: Sequence[tuple[str, float]],
  ) -> np.ndarray | None:
    """Times that each cell is seen in an epoch; None: once each.

    Raises:
      UserError: a source or species that the corpus does not have.
    """
    if not source_weights and not species_weights:
      return None
    by_source, by_species = dict(source_weights), dict(species_weights)
    sources = {n for store in self.stores for n in store.categories('source')}
    for what, named, known in (
      ('source', by_source, sources),
      ('species', by_species, set(vocabulary_lib.SPECIES)),
    ):
      if unknown := set(named) - known:
        raise errors.UserError(
          f'weight of {what} {sorted(unknown)[0]!r}, which the corpus does not'
          f' have; it has: {", ".join(sorted(known))}'
        )
    weights = []
    for store, source_C in zip(self.stores, self.source_T):
      names = store.categories('source')
      table = np.array([by_source.get(n, 1.0) for n in names] + [1.0])
      species = vocabulary_lib.SPECIES[store.species]
      weights.append(table[source_C] * by_species.get(species, 1.0))
    return np.concatenate(weights).astype(np.float32)

  def read(self, number_C: np.ndarray) -> Window:
    """Reads cells by number; cells of one block must stand together."""
    store_C = np.searchsorted(self.first_T1, number_C, 'right') - 1
    size_T = np.array([store.block_cells for store in self.stores])
    inside_C = number_C - np.array(self.first_T1)[store_C]
    block_C = inside_C // size_T[store_C]
    changes = np.flatnonzero(np.diff(block_C) | np.diff(store_C)) + 1
    starts = [0, *changes.tolist()] if len(number_C) else []
    stops = [*starts[1:], len(number_C)]
    wanted = [
      (int(store_C[a]), int(block_C[a]), inside_C[a:b])
      for a, b in zip(starts, stops)
    ]
    parts = []
    for t, store in enumerate(self.stores):
      mine = [i for i, (s, _, _) in enumerate(wanted) if s == t]
      for first in range(0, len(mine), _READ_BLOCKS):
        some = mine[first : first + _READ_BLOCKS]
        blocks = store.read_blocks([wanted[i][1] for i in some])
        for i, cells in zip(some, blocks):
          which = wanted[i][2] - wanted[i][1] * store.block_cells
          parts.append((cells, which, np.arange(starts[i], stops[i])))
    return Window(rows_lib.gather(parts, len(number_C)), number_C)

  def batch(
    self,
    index: int,
    shape: Shape,
    picks: Sequence[Picks],
    *,
    seed: int,
    mask: masking.MaskConfig,
    tie_epoch: int | None,
    mask_epoch: int,
  ) -> schemas.HostBatch:
    """Encodes, masks and lays out the cells of a batch.

    Args:
      index: number of the batch.
      shape: of its arrays.
      picks: the cells, in order of rows.
      seed: of ties and masks.
      mask: which genes are hidden, and how.
      tie_epoch: folded into the order of ties; None in evaluation.
      mask_epoch: folded into the masks.

    Raises:
      UserError: cells do not have the length that was counted for them.
    """
    number_N = np.concatenate([p.window.number_C[p.place_n] for p in picks])
    repeat_N = np.concatenate([p.repeat_n for p in picks])
    row_N = np.concatenate([p.row_n for p in picks])
    store_N = np.searchsorted(self.first_T1, number_N, 'right') - 1
    needs_N = self.lengths_C[number_N].astype(np.int64) + 1
    slot_N = rows_lib.within_rows(row_N, needs_N)
    segment_N = rows_lib.within_rows(row_N, np.ones_like(row_N))
    picked_N = np.zeros(len(row_N), np.int64)
    groups = []
    batch = rows_lib.empty_batch(shape.num_rows, shape.slots, shape.num_masked)
    for key in np.unique(repeat_N * len(self.stores) + store_N):
      repeat, t = divmod(int(key), len(self.stores))
      group = np.flatnonzero((repeat_N == repeat) & (store_N == t))
      cells = self.encoders[t].encode(
        rows_lib.gather(_parts(picks, group), len(group)),
        seed=seed,
        epoch=None if tie_epoch is None else _draw(tie_epoch, repeat),
      )
      if not np.array_equal(
        cells.starts_C1[1:] - cells.starts_C1[:-1] + 1, needs_N[group]
      ):
        raise errors.UserError(
          'cells do not have the length that was counted for them: remove the'
          ' folder cache/ of the corpus'
        )
      source_c = self.source_T[t][number_N[group] - self.first_T1[t]]
      masked = masking.mask_cells(
        cells,
        number_N[group],
        config=mask,
        seed=seed,
        epoch=_draw(mask_epoch, repeat),
        random_tokens=self.pools_T[t],
        vocabulary_size=self.vocabulary_size,
        pool_C=self.stores[t].panels[1][source_c],
      )
      cells, masked = masking.set_apart(cells, masked)
      where = row_N[group], slot_N[group]
      rows_lib.place_cells(
        batch.cells,
        cells.starts_C1,
        masked.gene_ids_N,
        masked.values_N,
        *where,
        segment_N[group] + 1,
        np.full(len(group), self.species_T[t]),
        masked.unranked_C,
      )
      picks_P = np.flatnonzero(masked.is_masked_N)
      picks_C1 = np.searchsorted(picks_P, cells.starts_C1)
      picked_N[group] = picks_C1[1:] - picks_C1[:-1]
      groups.append(
        (group, masked.unranked_C, cells, picks_P, picks_C1, *where)
      )
    first_N = rows_lib.within_rows(row_N, picked_N)
    dropped = 0
    for group, unranked_C, *placed in groups:
      dropped += rows_lib.place_labels(
        batch, *placed, first_N[group], unranked_C
      )
    index_BS = np.full((shape.num_rows, shape.segments), -1, np.int32)
    index_BS[row_N, segment_N] = number_N
    return schemas.HostBatch(index, batch, index_BS, dropped)


def _draw(epoch: int, repeat: int) -> int:
  """The epoch that ties and masks of a further copy of a cell are drawn in."""
  return epoch if not repeat else int(kernels.fold(epoch, repeat) >> 2)


def _parts(picks: Sequence[Picks], group: np.ndarray) -> list[tuple]:
  """Cells of a batch, by number over its picks, for `rows.gather`."""
  bounds = np.cumsum([0, *(len(p.place_n) for p in picks)])
  parts = []
  for pick, first, stop in zip(picks, bounds[:-1], bounds[1:]):
    a, b = np.searchsorted(group, (first, stop))
    if a < b:
      which = pick.place_n[group[a:b] - first]
      parts.append((pick.window.cells, which, np.arange(a, b)))
  return parts


def measured_tokens(
  store: corpus_lib.Store, token_R: np.ndarray
) -> list[np.ndarray]:
  """Ascending tokens that were measured, for each of the store's panels."""
  return [
    np.unique(token_R[measured_R & (token_R >= 0)])
    for measured_R in store.panels[0]
  ]


def _encoded_lengths(
  corpus: corpus_lib.Corpus,
  split: str,
  store: corpus_lib.Store,
  encoder: encoding.CellEncoder,
  token_R: np.ndarray,
) -> np.ndarray:
  """uint16 genes of every encoded cell of a store, counted once.

  Where every row has its own token that is the stored length, cut. Otherwise
  all blocks are read, and the lengths are kept under CORPUS/cache, if it can
  be written, under a name that holds the hash of all they depend on.
  """
  max_genes = encoder.config.max_genes
  if token_R.min(initial=0) >= 0 and not encoding.shares_tokens(token_R):
    return np.minimum(store.length_N, max_genes).astype(np.uint16)
  digest = hashlib.sha256(json.dumps(corpus.manifest, sort_keys=True).encode())
  digest.update(np.ascontiguousarray(token_R).tobytes())
  digest.update(f'{split} {store.species} {max_genes}'.encode())
  name = paths.join(
    corpus.path, 'cache', f'encoded_length-{digest.hexdigest()[:32]}.npy'
  )
  if paths.exists(name):
    kept = np.load(io.BytesIO(paths.read_bytes(name)), allow_pickle=False)
    if kept.shape == (store.num_cells,) and kept.dtype == np.uint16:
      return kept
  logging.info('counting encoded genes of %d cells', store.num_cells)
  parts = []
  for first in range(0, store.num_blocks, _READ_BLOCKS):
    blocks = range(first, min(first + _READ_BLOCKS, store.num_blocks))
    parts += [encoder.lengths(cells) for cells in store.read_blocks(blocks)]
  lengths_C = np.concatenate(parts).astype(np.uint16)
  data = io.BytesIO()
  np.save(data, lengths_C, allow_pickle=False)
  try:
    paths.write_bytes(name, data.getvalue())
  except OSError as error:
    logging.info('encoded lengths are not kept: %s', error)
  return lengths_C
