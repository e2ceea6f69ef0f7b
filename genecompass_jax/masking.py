"""Which genes of a cell are hidden, and what stands in their place.

The draws are hashes of (seed, epoch, cell, gene), so a cell has the same mask
however it is batched, packed, ranked or divided over hosts.

Of the genes of a cell, 15 % are predicted, each by an independent draw. What
the model sees in their place:

  share   id        value, policy `default`   value, policy `released`
  80 %    `<mask>`  hidden                    hidden
  10 %    random    hidden                    hidden
  10 %    its own   hidden                    its own

By default a value that is predicted is never visible, and a random id is one
that the cell could hold: a gene that its source measured, of its species.
`released` is what the published code does: the last tenth shows the value it
asks for, and random ids come from the whole vocabulary, special tokens and the
other species' genes included.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from genecompass_jax import encoding, errors, kernels, vocabulary

HIDDEN_VALUE = -1.0
EVALUATION_EPOCH = -1  # masks of held-out cells: the same in every evaluation
POLICIES = ('default', 'released')

_DOMAIN = 0x6D61736B  # 'mask': apart from other draws of one seed


@dataclasses.dataclass(frozen=True)
class MaskConfig:
  """Rates of hiding.

  Attributes:
    rate: share of a cell's genes that are predicted.
    mask_share: share of those that show `<mask>`.
    random_share: share of those that show a random id; the rest keep theirs.
    policy: 'default' or 'released', see the module.
  """

  rate: float = 0.15
  mask_share: float = 0.8
  random_share: float = 0.1
  policy: str = 'default'

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise errors.UserError(
        f'mask policy {self.policy!r}: give one of {POLICIES}'
      )
    shares = self.rate, self.mask_share, self.random_share
    if not all(0 <= s <= 1 for s in shares) or sum(shares[1:]) > 1 + 1e-12:
      raise errors.UserError(
        f'mask {self.rate=}, {self.mask_share=}, {self.random_share=} must be'
        ' shares, and the last two at most 1 together'
      )


@dataclasses.dataclass(frozen=True)
class MaskedCells:
  """What the model sees, aligned with the encoded cells.

  Attributes:
    gene_ids_N: int32 tokens, those of hidden genes replaced.
    values_N: float32, -1 where hidden.
    is_masked_N: bool, True where gene and value are predicted.
  """

  gene_ids_N: np.ndarray
  values_N: np.ndarray
  is_masked_N: np.ndarray


@kernels.compiled
def _mask(
  gene_ids_N, values_N, starts_C1, cell_index_C, salt, below, mask_below,
  random_below, keeps_value, pool_C, pool_P1, pools_N, is_masked_N, picked_n,
):  # fmt: skip
  """Hides genes in place."""
  for cell in range(len(starts_C1) - 1):
    ids_n = gene_ids_N[starts_C1[cell] : starts_C1[cell + 1]]
    values_n = values_N[starts_C1[cell] : starts_C1[cell + 1]]
    is_masked_n = is_masked_N[starts_C1[cell] : starts_C1[cell + 1]]
    key = kernels.mix64(salt ^ kernels.mix64(np.uint64(cell_index_C[cell])))
    for i in range(len(ids_n)):
      draw = kernels.mix64(key + np.uint64(ids_n[i]) * kernels.GOLDEN)
      is_masked_n[i] = draw < below
    num_picked = 0
    for i in range(len(ids_n)):
      picked_n[num_picked] = i
      num_picked += is_masked_n[i]
    pool_n = pools_N[pool_P1[pool_C[cell]] : pool_P1[pool_C[cell] + 1]]
    for p in range(num_picked):
      i = picked_n[p]
      draw = kernels.mix64(key + np.uint64(ids_n[i]) * kernels.GOLDEN)
      draw = kernels.mix64(draw ^ kernels.GOLDEN)
      if draw < mask_below:
        ids_n[i] = vocabulary.MASK
      elif draw < random_below:
        draw = kernels.mix64(draw ^ kernels.GOLDEN) >> np.uint64(32)
        place = (draw * np.uint64(len(pool_n))) >> np.uint64(32)
        ids_n[i] = pool_n[place]
      elif keeps_value:
        continue
      values_n[i] = HIDDEN_VALUE


def threshold(share: float) -> np.uint64:
  """The integer that a share of all 64-bit hashes lies below."""
  return np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def mask_cells(
  cells: encoding.EncodedCells,
  cell_index_C: np.ndarray,
  *,
  config: MaskConfig,
  seed: int,
  epoch: int,
  random_tokens: np.ndarray | Sequence[np.ndarray],
  vocabulary_size: int,
) -> MaskedCells:
  """Hides genes of encoded cells; the cells themselves stay as they are.

  Args:
    cells: encoded cells.
    cell_index_C: int64 number of every cell in its corpus.
    config: rates.
    seed: of the run.
    epoch: of the cell; `EVALUATION_EPOCH` for held-out cells.
    random_tokens: int32 tokens that a random id is drawn from, for all cells
      or for each: those that the cell's source measured. Repeated arrays cost
      nothing. Unused by `released`.
    vocabulary_size: V.

  Raises:
    UserError: a pool of random tokens is empty or holds a special token.
  """
  num_cells = cells.num_cells
  cell_index_C = np.asarray(cell_index_C, np.int64)
  if cell_index_C.shape != (num_cells,):
    raise errors.UserError(
      f'{num_cells} cells but {cell_index_C.shape} numbers'
    )
  pool_C, pools = _pools(config, random_tokens, num_cells, vocabulary_size)
  gene_ids_N = np.array(cells.gene_ids_N, np.int32)
  values_N = np.array(cells.values_N, np.float32)
  is_masked_N = np.empty(len(gene_ids_N), np.bool_)
  _mask(
    gene_ids_N,
    values_N,
    kernels.read_only(np.asarray(cells.starts_C1, np.int64)),
    kernels.read_only(cell_index_C),
    kernels.fold(_DOMAIN, seed, epoch),
    threshold(config.rate),
    threshold(config.mask_share),
    threshold(config.mask_share + config.random_share),
    config.policy == 'released',
    pool_C,
    np.cumsum([0, *map(len, pools)]),
    kernels.read_only(np.concatenate(pools).astype(np.int32, copy=False)),
    is_masked_N,
    np.empty(encoding.longest(cells.starts_C1) + 1, np.int64),
  )
  return MaskedCells(gene_ids_N, values_N, is_masked_N)


def _pools(
  config: MaskConfig,
  random_tokens: np.ndarray | Sequence[np.ndarray],
  num_cells: int,
  vocabulary_size: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
  """The distinct pools of random tokens, and which of them a cell draws from."""
  pool_C = np.zeros(num_cells, np.int64)
  if config.policy == 'released':
    return pool_C, [np.arange(vocabulary_size, dtype=np.int32)]
  if isinstance(random_tokens, np.ndarray):
    pools = [random_tokens]
  else:
    if len(random_tokens) != num_cells:
      raise errors.UserError(
        f'{num_cells} cells but {len(random_tokens)} pools of random tokens'
      )
    pools, number_of = [], {}
    for cell, pool in enumerate(random_tokens):
      if id(pool) not in number_of:
        number_of[id(pool)] = len(pools)
        pools.append(pool)
      pool_C[cell] = number_of[id(pool)]
  for pool in pools:
    if not len(pool):
      raise errors.UserError(
        'no tokens to draw random ids from: the source measured no gene of the'
        ' vocabulary'
      )
    if pool.min() < vocabulary.NUM_SPECIAL or pool.max() >= vocabulary_size:
      raise errors.UserError(
        'random ids must be gene tokens of the vocabulary:'
        f' {pool.min()} to {pool.max()} is not within'
        f' {vocabulary.NUM_SPECIAL} to {vocabulary_size - 1}'
      )
  return pool_C, pools or [np.zeros(0, np.int32)]
