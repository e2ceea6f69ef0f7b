"""What deleting each gene of a cell would do, from a few backward passes.

A deletion takes a gene out of the attention of all others, and lets those
behind it move up by one rank. Both can be done by degrees (`schemas.Gates`), so
that a backward pass through one run of the cell gives the derivative of any
number f with respect to the deletion of every gene at once:

  -df/d(key bias of i) + sum over j behind i of df/d(retreat of j)

The first term is nearly all of what a missing key does: no gene has much of
the attention. The second is not small: hundreds of genes move, and vectors of
neighbouring ranks differ. So the derivative is averaged over `points` on the
way from all genes where they are to all of them one rank up (Gauss-Legendre).
On a trained model the estimates were then within 2 to 4 % of the change that
the ranks make, and with the derivative at the cell itself off by more than its
size (experiments/benchmarks/perturbation.py).

The change along an axis is such a number: one backward pass a point. The shift
is half the square of a vector's length, which has no derivative where it
begins; it is estimated from `probes` random directions, each of them a backward
pass a point: for normal directions the mean squared derivative is the squared
length of the change, with a relative error of sqrt(2 / probes). What a gene does
to its own state, and the gene that comes in at the cut, are left out.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import (
  encoding,
  model as model_lib,
  progress,
  schemas,
)
from genecompass_jax.analysis import placed_model
from genecompass_jax.analysis.perturbation import (
  axes,
  cell_set,
  comparison,
  effects,
  stages,
)

PROBES = 32
POINTS = 2
_LABEL = 'first-order estimate'
_SECONDS_BETWEEN_SAVES = 60.0


@dataclasses.dataclass(frozen=True)
class FirstOrder:
  """Estimates for every gene that every cell shows to the model.

  Attributes:
    cell_N: int64 row of the cell in the source.
    token_N: int32.
    rank_N: int32, from 0.
    shift_N: float32 estimate of `CellEffects.shift_N`.
    toward_N: float32 estimate of `CellEffects.toward_N`; NaN without an axis.
  """

  cell_N: np.ndarray
  token_N: np.ndarray
  rank_N: np.ndarray
  shift_N: np.ndarray
  toward_N: np.ndarray


def score(
  placed: placed_model.PlacedModel,
  cells: cell_set.CellSet,
  *,
  pooling: str,
  axis: axes.Axis | None = None,
  probes: int = PROBES,
  points: int = POINTS,
  seed: int = 0,
  batch_slots: int = 4096,
  left_out: Collection[int] = (),
  stage: stages.Stage = stages.NO_STAGE,
) -> FirstOrder:
  """Scores all genes of all cells, and says how long it will take.

  Args:
    placed: the model.
    cells: unperturbed cells.
    pooling: 'cls' or 'mean'.
    axis: for `toward_N`.
    probes: random directions for `shift_N`; 0 for none, then it is NaN.
    points: at which derivatives are taken; 1 is the middle of the way.
    seed: of the directions.
    batch_slots: slots that run together on one device.
    left_out: tokens that are in no mean over genes; the model reads them.
    stage: where cells that are scored are kept, and those of a run that was
      stopped are found; a stage of these cells, and of all of the above but
      `batch_slots`.
  """
  base = cells.encode()
  length_C = np.diff(base.starts_C1)
  directions_PD = _directions(placed.config.width, probes, axis, seed)
  nodes, weights = np.polynomial.legendre.leggauss(points)
  way_N2 = np.stack([(nodes + 1) / 2, weights / 2], 1).astype(np.float32)
  scored_V = cells.is_scored(left_out)
  rows_of = {
    slots: placed.num_rows(max(1, batch_slots // slots) * placed.num_devices)
    for slots in placed.buckets
  }
  found = _Found.of(stage, base)
  left = np.flatnonzero(~found.is_done_C)
  passes = points * len(directions_PD)
  timed = _Timed(placed.buckets, length_C[left], rows_of, passes)
  some = cells.take(left)
  saved = time.monotonic()
  with progress.Progress(cells.num_cells, 'cells', _LABEL) as bar:
    bar.skip(cells.num_cells - len(left))
    for made in some.batches(some.encode(), placed.buckets, rows_of):
      start = time.perf_counter()
      is_scored_BL = scored_V[made.cells.gene_ids_BL].astype(np.float32)
      change_PBL = np.asarray(
        _changes(
          placed.params,
          placed.knowledge,
          placed.put(made.cells),
          jax.device_put(is_scored_BL, placed.sharding),
          directions_PD,
          way_N2,
          placed.config,
          pooling,
        )
      )
      cell_B = left[made.index_C]
      for row, cell in enumerate(cell_B):
        own = slice(*base.starts_C1[cell : cell + 2])
        change_Pn = change_PBL[:, row, 1 : length_C[cell] + 1]
        if probes:
          along_Pn = change_Pn if axis is None else change_Pn[:-1]
          found.shift_N[own] = 0.5 * np.mean(along_Pn**2, axis=0)
        if axis is not None:
          found.toward_N[own] = change_Pn[-1]
      found.is_done_C[cell_B] = True
      timed.tell(is_scored_BL.shape[1], time.perf_counter() - start)
      if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
        found.save(stage)
        saved = time.monotonic()
      bar.update(len(cell_B))
  if len(left):
    found.save(stage)
  cell_N = np.repeat(np.arange(cells.num_cells), length_C)
  rank_N = np.arange(len(cell_N)) - np.repeat(base.starts_C1[:-1], length_C)
  return FirstOrder(
    cell_N=cells.row_C[cell_N],
    token_N=base.gene_ids_N,
    rank_N=rank_N.astype(np.int32),
    shift_N=found.shift_N,
    toward_N=found.toward_N,
  )


@dataclasses.dataclass(frozen=True)
class _Found:
  """Estimates so far, over all genes of all cells, and which cells have them."""

  shift_N: np.ndarray
  toward_N: np.ndarray
  is_done_C: np.ndarray

  @classmethod
  def of(cls, stage: stages.Stage, base: encoding.EncodedCells) -> '_Found':
    """What the stage holds; none of it where that is damaged."""
    number, num_cells = len(base.gene_ids_N), len(base.starts_C1) - 1
    new = cls(
      np.full(number, np.nan, np.float32),
      np.full(number, np.nan, np.float32),
      np.zeros(num_cells, bool),
    )
    kept = stage.load()
    shapes = {name: (x.shape, x.dtype) for name, x in vars(new).items()}
    if kept is None or shapes != {
      name: (x.shape, x.dtype) for name, x in kept.items()
    }:
      return new
    return cls(**kept)

  def save(self, stage: stages.Stage) -> None:
    """Keeps them."""
    stage.save(vars(self))


class _Timed:
  """Says what is to be done, and once a batch was timed, how long it takes."""

  def __init__(
    self,
    buckets: tuple[int, ...],
    length_C: np.ndarray,
    rows_of: Mapping[int, int],
    passes: int,
  ):
    bucket_C = np.searchsorted(buckets, length_C + 1)
    number_K = np.bincount(bucket_C, minlength=len(buckets))
    self._left = sum(
      -(-int(number) // rows_of[slots])
      for slots, number in zip(buckets, number_K)
    )
    self._compiled: set[int] = set()
    self._is_said = False
    if self._left:
      print(
        f'{_LABEL}: {len(length_C):,} cells in {self._left:,} batches of '
        f'{passes} backward passes',
        file=sys.stderr,
      )

  def tell(self, slots: int, seconds: float) -> None:
    """Takes the time of a batch; the first of each length compiles."""
    self._left -= 1
    if slots in self._compiled and self._left and not self._is_said:
      print(
        # All batches have about as many slots.
        f'{_LABEL}: about {progress.duration(seconds * self._left)} more '
        '(measured on a batch), and what compiling other lengths takes',
        file=sys.stderr,
      )
      self._is_said = True
    self._compiled.add(slots)


def as_effects(
  estimate: FirstOrder, cells: cell_set.CellSet
) -> effects.CellEffects:
  """Estimates as effects are tested; tokens are the numbers of variants."""
  place_of = {int(row): place for place, row in enumerate(cells.row_C)}
  length_C = np.diff(cells.encode().starts_C1).astype(np.int32)
  place_N = np.array([place_of[int(row)] for row in estimate.cell_N], np.int64)
  number = len(estimate.token_N)
  return effects.CellEffects(
    variant_N=estimate.token_N.astype(np.int32),
    cell_N=estimate.cell_N,
    rank_N=estimate.rank_N,
    length_N=length_C[place_N],
    entered_N=np.zeros(number, np.int32),
    shift_N=estimate.shift_N,
    gene_shift_N=np.full(number, np.nan, np.float32),
    toward_N=estimate.toward_N,
  )


def _directions(
  width: int, probes: int, axis: axes.Axis | None, seed: int
) -> np.ndarray:
  """Directions to differentiate along, the axis last: [P, D]."""
  rng = np.random.default_rng(seed)
  found = [rng.standard_normal((probes, width))]
  if probes >= width:  # every direction once, in place of random ones
    found = [np.eye(width) * width**0.5]
  if axis is not None:
    found.append(axis.direction_D[None])
  return np.concatenate(found).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _changes(
  params,
  knowledge,
  batch,
  is_scored_BL,
  directions_PD,
  way_N2,
  config,
  pooling,
):
  """Change along each direction by the deletion of each slot, [P, B, L]."""
  shape = batch.gene_ids_BL.shape
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL
  weights_BL = is_gene_BL.astype(jnp.float32)

  def pooled(gates):
    hidden_BLD = model_lib.evaluate(
      config, params, batch, knowledge, gates=gates
    )
    return comparison.pool(hidden_BLD, is_scored_BL, pooling)

  def at(sum_PBL, point):
    share, weight = point
    gates = schemas.Gates(jnp.zeros(shape), share * weights_BL)
    _, pull_back = jax.vjp(pooled, gates)

    def along(direction_D):
      (found,) = pull_back(jnp.broadcast_to(direction_D, (shape[0], width)))
      retreat_BL = found.retreat_BL * weights_BL
      behind_BL = jnp.cumsum(retreat_BL[:, ::-1], axis=1)[:, ::-1] - retreat_BL
      return weight * (behind_BL - found.key_bias_BL) * weights_BL

    # One by one: of several together jaxlib 0.10.2 gives wrong ones on CPUs, see
    # `genecompass_jax/__init__.py`.
    found_PBL = jax.lax.map(along, directions_PD)
    return sum_PBL + found_PBL, None

  width = directions_PD.shape[1]
  zeros_PBL = jnp.zeros((len(directions_PD), *shape))
  return jax.lax.scan(at, zeros_PBL, way_N2)[0]
