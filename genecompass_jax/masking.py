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
import functools
from collections.abc import Sequence

import numpy as np

from genecompass_jax import encoding, errors, kernels, vocabulary

HIDDEN_VALUE = -1.0
HIDDEN_RANK = -1
EVALUATION_EPOCH = -1  # masks of held-out cells: the same in every evaluation
POLICIES = ('default', 'released')
RELEASED = 'released'
SPLIT = 'split'
OBJECTIVES = (RELEASED, SPLIT)

_DOMAIN = 0x6D61736B  # 'mask': apart from other draws of one seed
_ONLY_RELEASED = ('mask_share', 'random_share', 'policy')
_ONLY_SPLIT = ('id_share',)


@dataclasses.dataclass(frozen=True)
class MaskConfig:
  """Rates of hiding.

  Attributes:
    rate: share of a cell's genes that are predicted.
    mask_share: share of those that show `<mask>`.
    random_share: share of those that show a random id; the rest keep theirs.
    policy: 'default' or 'released', see the module.
    objective: 'released': id and value of the same genes; 'split': the id of
      some and the value of others. `mask_share`, `random_share` and `policy`
      are of 'released' alone.
    id_share: share of the selected genes whose id is asked, under 'split'.
  """

  rate: float = 0.15
  mask_share: float = 0.8
  random_share: float = 0.1
  policy: str = 'default'
  objective: str = RELEASED
  id_share: float = 0.5

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise errors.UserError(
        f'mask objective {self.objective!r}: give one of {OBJECTIVES}'
      )
    if self.policy not in POLICIES:
      raise errors.UserError(
        f'mask policy {self.policy!r}: give one of {POLICIES}'
      )
    shares = self.rate, self.mask_share, self.random_share
    if not all(0 <= s <= 1 for s in shares) or sum(shares[1:]) > 1 + 1e-12:
      raise errors.UserError(
        f'mask.rate={self.rate}, mask_share={self.mask_share} and random_share='
        f'{self.random_share} must be shares, the last two at most 1 together'
      )
    if not 0 <= self.id_share <= 1:
      raise errors.UserError(f'mask.id_share={self.id_share} must be a share')
    # Refused, not ignored: a run must not be told apart by what has no effect.
    other = RELEASED if self.splits else SPLIT
    names = _ONLY_RELEASED if self.splits else _ONLY_SPLIT
    for name in names:
      if getattr(self, name) != getattr(type(self), name):
        raise errors.UserError(
          f'mask.{name}={getattr(self, name)!r} has an effect only under the'
          f' objective {other!r}: leave it out, or set mask.objective'
        )

  @property
  def splits(self) -> bool:
    """Whether ids and values are asked of different genes."""
    return self.objective == SPLIT

  @property
  def id_rate(self) -> float:
    """Share of a cell's genes whose id is hidden."""
    return self.rate * self.id_share if self.splits else self.rate


@dataclasses.dataclass(frozen=True)
class MaskedCells:
  """What the model sees, aligned with the encoded cells.

  Attributes:
    gene_ids_N: int32 tokens, those of hidden genes replaced.
    values_N: float32, -1 where hidden.
    is_masked_N: bool, True where gene, value or both are predicted.
    hides_rank_N: bool, True where value and rank are hidden and the value is
      predicted, the id elsewhere; None where both are, of the same gene.
    unranked_C: int64 genes without rank, the last of every cell; None before
      `set_apart`.
  """

  gene_ids_N: np.ndarray
  values_N: np.ndarray
  is_masked_N: np.ndarray
  hides_rank_N: np.ndarray | None = None
  unranked_C: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPools:
  """P pools of tokens that random ids are drawn from, checked once.

  Attributes:
    tokens_N: int32 tokens of all pools, one pool after the other.
    starts_P1: int64 [P + 1] where each pool begins.
  """

  tokens_N: np.ndarray
  starts_P1: np.ndarray

  @classmethod
  def of(
    cls, pools: Sequence[np.ndarray], vocabulary_size: int
  ) -> 'TokenPools':
    """Pools of gene tokens; one may be empty as long as no cell draws from it.

    Raises:
      UserError: a token is special or outside the vocabulary.
    """
    tokens_N = np.concatenate([np.zeros(0, np.int32), *pools])
    low, high = vocabulary.NUM_SPECIAL, vocabulary_size - 1
    if len(tokens_N) and not low <= tokens_N.min() <= tokens_N.max() <= high:
      raise errors.UserError(
        'random ids must be gene tokens of the vocabulary:'
        f' {tokens_N.min()} to {tokens_N.max()} is not within {low} to {high}'
      )
    return cls(
      kernels.read_only(tokens_N.astype(np.int32, copy=False)),
      np.cumsum([0, *map(len, pools)]),
    )


@kernels.compiled
def _mask(
  gene_ids_N, values_N, starts_C1, cell_index_C, salt, below, mask_below,
  random_below, keeps_value, pool_C, pool_P1, pools_N, is_masked_N, picked_n,
  splits, id_below, hides_rank_N,
):  # fmt: skip
  """Hides genes in place; `hides_rank_N` is written only where it `splits`."""
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
      if splits:
        if draw < id_below:
          ids_n[i] = vocabulary.MASK
        else:
          values_n[i] = HIDDEN_VALUE
          hides_rank_N[starts_C1[cell] + i] = True
        continue
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
  random_tokens: np.ndarray | TokenPools,
  vocabulary_size: int,
  pool_C: np.ndarray | None = None,
) -> MaskedCells:
  """Hides genes of encoded cells; the cells themselves stay as they are.

  Args:
    cells: encoded cells.
    cell_index_C: int64 number of every cell in its corpus.
    config: rates.
    seed: of the run.
    epoch: of the cell; `EVALUATION_EPOCH` for held-out cells.
    random_tokens: int32 tokens that a random id is drawn from, or pools of
      them: those that the cell's source measured. Unused by the policy
      `released` and by the objective `split`.
    vocabulary_size: V.
    pool_C: int64 pool of every cell; the first for all where None.

  Raises:
    UserError: a pool that a cell draws from is empty, or a token special.
  """
  num_cells = cells.num_cells
  cell_index_C = np.asarray(cell_index_C, np.int64)
  if cell_index_C.shape != (num_cells,):
    raise errors.UserError(
      f'{num_cells} cells but {cell_index_C.shape} numbers'
    )
  draws_all = config.policy == 'released' or config.splits
  if pool_C is None or draws_all:
    pool_C = np.zeros(num_cells, np.int64)
  pool_C = np.asarray(pool_C, np.int64)
  if draws_all:
    pools = _whole_vocabulary(vocabulary_size)
  elif isinstance(random_tokens, TokenPools):
    pools = random_tokens
  else:
    pools = TokenPools.of([random_tokens], vocabulary_size)
  if pool_C.shape != (num_cells,):
    raise errors.UserError(f'{num_cells} cells but {pool_C.shape} pools')
  if (np.diff(pools.starts_P1)[pool_C] == 0).any():
    raise errors.UserError(
      'no tokens to draw random ids from: the source measured no gene of the'
      ' vocabulary'
    )
  gene_ids_N = np.array(cells.gene_ids_N, np.int32)
  values_N = np.array(cells.values_N, np.float32)
  is_masked_N = np.empty(len(gene_ids_N), np.bool_)
  hides_rank_N = np.zeros(len(gene_ids_N) if config.splits else 0, np.bool_)
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
    kernels.read_only(pool_C),
    pools.starts_P1,
    pools.tokens_N,
    is_masked_N,
    np.empty(encoding.longest(cells.starts_C1) + 1, np.int64),
    config.splits,
    threshold(config.id_share),
    hides_rank_N,
  )
  return MaskedCells(
    gene_ids_N, values_N, is_masked_N, hides_rank_N if config.splits else None
  )


@kernels.compiled
def _order_apart(starts_C1, gene_ids_N, hides_rank_N, order_N, unranked_C):
  """Order in which genes without rank come last, by token."""
  for cell in range(len(starts_C1) - 1):
    start = starts_C1[cell]
    stop = starts_C1[cell + 1]
    hidden_h = start + np.flatnonzero(hides_rank_N[start:stop])
    at = start
    for i in range(start, stop):
      if not hides_rank_N[i]:
        order_N[at] = i
        at += 1
    order_N[at:stop] = hidden_h[np.argsort(gene_ids_N[hidden_h])]
    unranked_C[cell] = len(hidden_h)


def set_apart(
  cells: encoding.EncodedCells, masked: MaskedCells
) -> tuple[encoding.EncodedCells, MaskedCells]:
  """Puts genes whose rank is hidden behind the others of their cell.

  The others keep their order and become the ranks 0, 1, ...; those apart stand
  in the order of tokens, which the model is shown anyway. Cells without hidden
  ranks, as under `released`, come back as they are.

  Args:
    cells: encoded cells, before masking.
    masked: what the model sees of them.

  Returns:
    Both, in one new order; `unranked_C` says how many stand apart.
  """
  if masked.hides_rank_N is None:
    return cells, masked
  order_N = np.empty(len(cells.gene_ids_N), np.int64)
  unranked_C = np.empty(cells.num_cells, np.int64)
  _order_apart(
    kernels.read_only(np.asarray(cells.starts_C1, np.int64)),
    kernels.read_only(np.asarray(cells.gene_ids_N, np.int32)),
    masked.hides_rank_N,
    order_N,
    unranked_C,
  )
  return (
    dataclasses.replace(
      cells,
      gene_ids_N=cells.gene_ids_N[order_N],
      values_N=cells.values_N[order_N],
    ),
    MaskedCells(
      masked.gene_ids_N[order_N],
      masked.values_N[order_N],
      masked.is_masked_N[order_N],
      masked.hides_rank_N[order_N],
      unranked_C,
    ),
  )


@functools.lru_cache(maxsize=2)
def _whole_vocabulary(size: int) -> TokenPools:
  """The pool of `released`, special tokens included."""
  tokens_N = np.arange(size, dtype=np.int32)
  return TokenPools(kernels.read_only(tokens_N), np.array([0, size]))
