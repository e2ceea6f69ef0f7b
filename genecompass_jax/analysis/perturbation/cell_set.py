"""The cells of a perturbation in memory, counted by token.

Thousands of cells, not millions: all variants of a cell are made from its
counts, by the encoder that training used.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from genecompass_jax import (
  encoding,
  errors,
  pretrained,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.analysis import (
  gene_tokens,
  model_batches,
  model_cells,
)
from genecompass_jax.prepare import sources


@dataclasses.dataclass(frozen=True)
class CellSet:
  """C cells of one species.

  Attributes:
    species: species code.
    row_C: int64 rows of the cells in the source.
    counts: `gene_rows_N` are tokens, each once a cell, counts above 0;
      `totals_C` are the observed library sizes.
    keys_C: uint64 keys that order ties, also those of all variants of a cell.
    measured_V: bool, tokens that the source measured in this species.
    divisor_V: float64 divisors of the counts.
    config: how counts become ranks and values.
    name: of the source.
  """

  species: int
  row_C: np.ndarray
  counts: encoding.RaggedCells
  keys_C: np.ndarray
  measured_V: np.ndarray
  divisor_V: np.ndarray
  config: encoding.EncodingConfig
  name: str

  @property
  def num_cells(self) -> int:
    """C."""
    return self.counts.num_cells

  @functools.cached_property
  def sha256(self) -> str:
    """Digest of the counts, and of all that ranks them."""
    digest = hashlib.sha256(repr((self.species, self.config)).encode())
    counts = self.counts
    for array in (
      *(self.row_C, self.keys_C, self.divisor_V, counts.starts_C1),
      *(counts.gene_rows_N, counts.counts_N, counts.totals_C),
    ):
      digest.update(f'{array.dtype} {array.shape} '.encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

  @functools.cached_property
  def _by_token(self) -> tuple[np.ndarray, np.ndarray]:
    """Cells sorted by token, and where those of each token begin."""
    counts = self.counts
    cell_N = np.repeat(np.arange(self.num_cells), np.diff(counts.starts_C1))
    order_N = np.argsort(counts.gene_rows_N, kind='stable')
    edges_V1 = np.arange(len(self.divisor_V) + 1)
    starts_V1 = np.searchsorted(counts.gene_rows_N[order_N], edges_V1)
    return cell_N[order_N], starts_V1

  def expressing(self, token: int) -> np.ndarray:
    """Cells that express a gene, ascending."""
    cell_N, starts_V1 = self._by_token
    return cell_N[starts_V1[token] : starts_V1[token + 1]]

  def tokens_of(
    self, names: Sequence[str], vocab: vocabulary_lib.Vocabulary
  ) -> list[int]:
    """Tokens of genes that these cells were measured for.

    Raises:
      UserError: see `gene_tokens.tokens_of`.
    """
    return gene_tokens.tokens_of(
      names,
      vocab,
      self.species,
      measured_V=self.measured_V,
      source=self.name,
    )

  def take(self, index: np.ndarray) -> 'CellSet':
    """Some of the cells, in the order given."""
    counts = self.counts
    lengths = np.diff(counts.starts_C1)[index]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    place_N = np.arange(starts[-1]) + np.repeat(
      counts.starts_C1[:-1][index] - starts[:-1], lengths
    )
    return dataclasses.replace(
      self,
      row_C=self.row_C[index],
      keys_C=self.keys_C[index],
      counts=encoding.RaggedCells(
        counts.gene_rows_N[place_N],
        counts.counts_N[place_N],
        starts,
        counts.totals_C[index],
      ),
    )

  def encode(
    self,
    counts: encoding.RaggedCells | None = None,
    keys_C: np.ndarray | None = None,
    *,
    beyond: int = 0,
  ) -> encoding.EncodedCells:
    """Ranks the genes of the cells, or of variants of them.

    Args:
      counts: of variants; None: the cells as they were observed.
      keys_C: of the cells that the variants were made from.
      beyond: genes to keep behind the cut at max_genes.
    """
    config = self.config
    most = min(config.max_genes + beyond, 65_535)
    token_V = np.arange(len(self.divisor_V), dtype=np.int32)
    token_V[: vocabulary_lib.NUM_SPECIAL] = -1
    encoder = encoding.CellEncoder(
      dataclasses.replace(config, max_genes=most), token_V, self.divisor_V
    )
    if counts is None:
      counts, keys_C = self.counts, self.keys_C
    return encoder.encode(counts, keys_C=keys_C)

  def batches(
    self,
    encoded: encoding.EncodedCells,
    buckets: tuple[int, ...],
    rows_of: Mapping[int, int],
  ) -> Iterator[model_batches.ModelBatch]:
    """The cells, unperturbed, in batches of one length.

    Args:
      encoded: what `encode` gives.
      buckets: lengths of rows in slots, ascending; the last holds any cell.
      rows_of: rows of a batch by length.

    Yields:
      Batches whose `index_C` are places in this set.
    """
    chunk = model_cells.EncodedChunk(
      self.species, np.arange(self.num_cells), self.counts, encoded
    )
    return model_batches.of_chunks([chunk], buckets, rows_of)

  def is_scored(self, left_out: Collection[int]) -> np.ndarray:
    """Bool [V]: tokens whose states scores are made of; no special one is."""
    scored_V = np.ones(len(self.divisor_V), bool)
    scored_V[: vocabulary_lib.NUM_SPECIAL] = False
    scored_V[np.fromiter(left_out, np.int64)] = False
    return scored_V


def read(
  stream: sources.CellStream,
  model: pretrained.PretrainedModel,
  rows: Sequence[int] | np.ndarray | None = None,
) -> CellSet:
  """Reads cells of one species into memory.

  Args:
    stream: opened with `model_cells.open_cells`.
    model: that opened them.
    rows: which cells; None: all. They come in the order of the source.

  Raises:
    UserError: no cells, cells of several species, or values that are no counts.
  """
  name = stream.source.name
  wanted = np.ones(stream.source.num_cells, bool)
  if rows is not None:
    wanted[:] = False
    wanted[np.asarray(rows)] = True
  species = np.unique(stream.source.species_C[wanted])
  if not len(species):
    raise errors.UserError(f'{name}: no cells are left to perturb')
  if len(species) > 1:
    names = ' and '.join(stream.vocabulary.species[s] for s in species)
    raise errors.UserError(
      f'{name}: cells of {names}; perturb those of one species at a time'
    )
  (code,) = species.tolist()
  size = stream.vocabulary.size
  parts, keys, row_parts = [], [], []
  for chunk in model_cells.encode(stream, model, wanted):
    counts = _counted_by_token(chunk.counts, stream.tokens(code), size)
    row_parts.append(chunk.index_C)
    keys.append(chunk.cells.keys_C)
    parts.append(counts)
  lengths_C = np.concatenate([np.diff(c.starts_C1) for c in parts])
  return CellSet(
    species=code,
    row_C=np.concatenate(row_parts),
    counts=encoding.RaggedCells(
      np.concatenate([c.gene_rows_N for c in parts]),
      np.concatenate([c.counts_N for c in parts]),
      np.concatenate([[0], np.cumsum(lengths_C)]),
      np.concatenate([c.totals_C for c in parts]),
    ),
    keys_C=np.concatenate(keys),
    measured_V=gene_tokens.measured(stream, code),
    divisor_V=model.assets.medians.divisor_V(code),
    config=model.assets.encoding,
    name=name,
  )


def _counted_by_token(
  cells: encoding.RaggedCells, token_R: np.ndarray, size: int
) -> encoding.RaggedCells:
  """Counts over tokens, ascending, those of one token summed."""
  token_N = token_R[cells.gene_rows_N].astype(np.int64)
  cell_N = np.repeat(np.arange(cells.num_cells), np.diff(cells.starts_C1))
  kept_N = (token_N >= 0) & (cells.counts_N > 0)
  place_N = cell_N[kept_N] * size + token_N[kept_N]
  unique_N, inverse_N = np.unique(place_N, return_inverse=True)
  sums_N = np.bincount(
    inverse_N, cells.counts_N[kept_N].astype(np.float64), len(unique_N)
  )
  starts_C1 = np.searchsorted(
    unique_N, np.arange(cells.num_cells + 1) * np.int64(size)
  )
  return encoding.RaggedCells(
    (unique_N % size).astype(np.int32), sums_N, starts_C1, cells.totals_C
  )
