"""Runs perturbations over cells: groups, batches, effects.

Cells are grouped by the length of their rows (at most six lengths), a group's
unperturbed states are made once and stay on the devices, and its variants run
in batches of one shape. A cell's effects do not depend on its group, its batch
or the number of devices.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import encoding, errors, packing, rows
from genecompass_jax.analysis import placed_model
from genecompass_jax.analysis.perturbation import (
  axes,
  cell_set,
  comparison,
  effects,
  interventions,
  ranks,
  response_sums,
  variants,
)

POOLINGS = ('cls', 'mean')
# Slots that run together on one device. On a CPU larger batches take twice as
# long a variant (experiments/benchmarks/perturbation.py).
_SLOTS = {'cpu': 1_536, 'gpu': 131_072, 'tpu': 65_536}
_GROUP_BYTES = 1 << 28  # of the unperturbed states of a group, per device
_MEASURED = 8  # batches, for an estimate
_GROUP_VARIANTS = 4_096  # most in a group, which is what a resumed run repeats


@dataclasses.dataclass(frozen=True)
class ScreenConfig:
  """How variants are run and compared.

  Attributes:
    pooling: 'cls', the state of the species slot, or 'mean' over shared genes.
    batch_slots: slots that run together on one device; 0: by its kind.
    renormalise: library sizes follow the changed counts (compositional).
    left_out: tokens whose states are not compared, in no cell; the model reads
      them, and they may be perturbed. They are in no mean over genes and have
      no response; the state of the species slot is none of theirs.
  """

  pooling: str = 'mean'
  batch_slots: int = 0
  renormalise: bool = False
  left_out: tuple[int, ...] = ()

  def __post_init__(self):
    if self.pooling not in POOLINGS:
      raise errors.UserError(f'pooling {self.pooling!r}: give cls or mean')
    if self.batch_slots < 0:
      raise errors.UserError(f'batch slots {self.batch_slots} must be positive')


@dataclasses.dataclass(frozen=True)
class Group:
  """Some cells of one bucket, and what is to be done to each.

  Attributes:
    cell_C: places of the cells in the set.
    slots: L.
    row_P: row in `cell_C` of each of P variants.
    variant_P: number of its intervention.
  """

  cell_C: np.ndarray
  slots: int
  row_P: np.ndarray
  variant_P: np.ndarray


class Screen:
  """Interventions on cells with one model, made group by group.

  All of it is fixed at the start: `groups` can be run in any order, on any
  machine, and give the same.
  """

  def __init__(
    self,
    placed: placed_model.PlacedModel,
    cells: cell_set.CellSet,
    done: Sequence[interventions.Intervention],
    config: ScreenConfig = ScreenConfig(),
    *,
    axis: axes.Axis | None = None,
    reference: cell_set.CellSet | None = None,
  ):
    """Plans the work; nothing is run.

    Args:
      placed: the model.
      cells: unperturbed cells.
      done: interventions; each is done to every cell in which it acts.
      config: how.
      axis: for `toward`.
      reference: cells whose levels over-expression raises genes to; the cells
        themselves if not given.

    Raises:
      UserError: the model has no CLS, or a level is not known.
    """
    if config.pooling == 'cls' and not placed.config.use_cls:
      raise errors.UserError('this model has no CLS slot; use pooling mean')
    self.placed, self.cells, self.done = placed, cells, tuple(done)
    self.config, self.axis = config, axis
    self.axis_D = None if axis is None else jnp.asarray(axis.direction_D)
    reference = cells if reference is None else reference
    self.levels = {
      level: interventions.levels(
        reference,
        level,
        [t for d in self.done if d.level == level for t in d.tokens],
      )
      for level in {d.level for d in self.done if d.level}
    }
    # One gene behind the cut: what a deletion lets in.
    self._stored = cells.encode(beyond=1)
    self._base = ranks.cut(self._stored, cells.config.max_genes)
    # Alone, deletions of single genes are made on the devices.
    self._is_plain = not config.renormalise and all(
      d.kind == interventions.DELETE and len(d.tokens) == 1 for d in self.done
    )
    self._scored_V = cells.is_scored(config.left_out)
    self._rank_of = ranks.Ranks(self._base, len(cells.divisor_V))
    self.groups = self._plan()
    # One shape a bucket, for unperturbed cells too.
    self._group_rows = {
      slots: max(len(g.cell_C) for g in self.groups if g.slots == slots)
      for slots in {g.slots for g in self.groups}
    }

  @property
  def num_variants(self) -> int:
    """Variants of all cells together."""
    return sum(len(g.row_P) for g in self.groups)

  @property
  def base(self) -> encoding.EncodedCells:
    """The unperturbed cells as the model sees them."""
    return self._base

  def measure(self, slots: int) -> tuple[float, float]:
    """Seconds for the unperturbed cells of a group, and for one batch.

    From one batch of the largest group and several of them: what a batch more
    takes. A group of a single batch has all of its time in the first.
    """
    group = max(
      (g for g in self.groups if g.slots == slots), key=lambda g: len(g.row_P)
    )
    more = min(self.batches(group), 1 + _MEASURED)

    def seconds(batches: int) -> float:
      stop = min(batches * self._rows(slots), len(group.row_P))
      part = dataclasses.replace(
        group, row_P=group.row_P[:stop], variant_P=group.variant_P[:stop]
      )
      start = time.perf_counter()
      self.run(part)
      return time.perf_counter() - start

    first_s = seconds(1)
    if more == 1:
      return first_s, 0.0
    batch_s = max(seconds(more) - first_s, 0.0) / (more - 1)
    return max(first_s - batch_s, 0.0), batch_s

  def batches(self, group: Group) -> int:
    """Batches of a group."""
    return -(-len(group.row_P) // self._rows(group.slots))

  def _plan(self) -> tuple[Group, ...]:
    cells, done = self.cells, self.done
    most = cells.config.max_genes
    length_C = np.diff(self._base.starts_C1)
    act_in = [self._acts_in(d) for d in done]
    cell_A = np.concatenate([*act_in, np.empty(0, np.int64)]).astype(np.int64)
    variant_A = np.repeat(np.arange(len(done)), [len(c) for c in act_in])
    order_A = np.lexsort((variant_A, cell_A))
    cell_A, variant_A = cell_A[order_A], variant_A[order_A]
    grows = max((len(d.tokens) for d in done if d.level), default=0)
    need_C = np.minimum(length_C + grows, most)
    number_C = np.bincount(cell_A, minlength=cells.num_cells)
    buckets = packing.choose_buckets(
      np.repeat(need_C, number_C), most, step=64 if most >= 512 else 16
    )
    # The last holds max_genes + 1 whether a cell needs it or not.
    longest = int(need_C[number_C > 0].max(initial=0)) + 1
    buckets = [b for b in buckets if b < longest]
    buckets.append(min(-(-longest // 16) * 16, max(most + 1, longest)))
    slots_C = np.array(buckets)[np.searchsorted(buckets, need_C + 1)]
    start_C = np.searchsorted(cell_A, np.arange(cells.num_cells + 1))
    groups = []
    for slots in buckets:
      in_bucket = np.flatnonzero((slots_C == slots) & (number_C > 0))
      width = self.placed.config.width
      room = max(1, _GROUP_BYTES // (4 * slots * width))
      for cell_C in _chunks(in_bucket, number_C, room):
        row_P = np.repeat(np.arange(len(cell_C)), number_C[cell_C])
        of_cells = [variant_A[start_C[c] : start_C[c + 1]] for c in cell_C]
        group = Group(cell_C, int(slots), row_P, np.concatenate(of_cells))
        groups.append(group)
    return tuple(groups)

  def _acts_in(self, done: interventions.Intervention) -> np.ndarray:
    """Cells in which the model can see that something was done."""
    cell_A = interventions.acts_on(self.cells, done)
    lowers = done.kind != interventions.OVER_EXPRESS and done.factor <= 1
    # In `released` mode nothing is divided by the library size.
    is_divided = self.cells.config.mode == encoding.LIBRARY
    if not lowers or (self.config.renormalise and is_divided):
      return cell_A
    # Behind the cut a gene is not seen: its loss changes nothing.
    rank_TA = [self._rank_of.of(cell_A, np.int64(t)) for t in done.tokens]
    return cell_A[(np.array(rank_TA) >= 0).any(0)]

  def _tokens(self) -> np.ndarray:
    """Token of every deletion of one gene."""
    return np.array([d.tokens[0] for d in self.done], np.int64)

  def _rows(self, slots: int) -> int:
    platform = self.placed.sharding.mesh.devices.flat[0].platform
    budget = self.config.batch_slots or _SLOTS.get(platform, _SLOTS['cpu'])
    return max(1, budget // slots) * self.placed.num_devices

  def run(
    self,
    group: Group,
    responses: response_sums.ResponseSums | None = None,
    *,
    tell: Callable[[int], object] | None = None,
  ) -> effects.CellEffects:
    """Effects of all variants of a group, in the order of its arrays.

    Args:
      group: one of `groups`.
      responses: sums to which those of single genes are added.
      tell: is told the number of variants of every batch that is done.
    """
    rows_a_batch = self._rows(group.slots)
    base = self._base_states(group)
    cell_P = group.cell_C[group.row_P]
    found: list[tuple] = []
    running: collections.deque = collections.deque()
    rank_P = np.full(len(cell_P), -1, np.int32)
    entered_P = np.zeros(len(cell_P), np.int32)

    def finish():
      first, stop, compared, token_BL = running.popleft()
      number = stop - first
      if tell is not None:
        tell(number)
      columns = [
        np.asarray(x)[:number]
        for x in (compared.shift_B, compared.gene_shift_B, compared.toward_B)
      ]
      found.append(columns)
      if responses is not None:
        response_BL = np.asarray(compared.response_BL)[:number]
        responses.add(
          group.variant_P[first:stop],
          self.cells.row_C[cell_P[first:stop]],
          token_BL[:number],
          response_BL,
        )

    for first in range(0, len(cell_P), rows_a_batch):
      stop = min(first + rows_a_batch, len(cell_P))
      make = self._deletions if self._is_plain else self._variants
      compared, rank, entered, token_BL = make(
        group, base, first, stop, rows_a_batch, responses is not None
      )
      rank_P[first:stop], entered_P[first:stop] = rank, entered
      running.append((first, stop, compared, token_BL))
      if len(running) > 1:  # the devices are one batch ahead
        finish()
    while running:
      finish()
    shift, gene_shift, toward = (np.concatenate(x) for x in zip(*found))
    return effects.CellEffects(
      variant_N=group.variant_P.astype(np.int32),
      cell_N=self.cells.row_C[cell_P],
      rank_N=rank_P,
      length_N=np.diff(self._base.starts_C1)[cell_P].astype(np.int32),
      entered_N=entered_P,
      shift_N=shift,
      gene_shift_N=gene_shift,
      toward_N=toward,
    )

  def _base_states(self, group: Group) -> comparison.Base:
    number = len(group.cell_C)
    padded = self.placed.num_rows(self._group_rows[group.slots])
    base = ranks.take(self._base, group.cell_C)
    batch = rows.cell_batch_rows(
      base, np.full(number, self.cells.species), group.slots, padded
    )
    stored = ranks.take(self._stored, group.cell_C)
    wide = rows.cell_batch_rows(
      stored, np.full(number, self.cells.species), group.slots + 1, padded
    )
    whole = jax.sharding.NamedSharding(
      self.placed.sharding.mesh, jax.sharding.PartitionSpec()
    )

    def lengths(cells):
      lengths_C = np.zeros(padded, np.int32)
      lengths_C[:number] = np.diff(cells.starts_C1)
      return lengths_C

    return comparison.Base(
      comparison.states(self.placed, batch),
      *jax.device_put(
        (
          wide.gene_ids_BL,
          wide.values_BL,
          self._scored_V[wide.gene_ids_BL],
          lengths(base),
          lengths(stored),
        ),
        whole,
      ),
    )

  def _deletions(self, group, base, first, stop, rows_a_batch, responses):
    cell_B = group.cell_C[group.row_P[first:stop]]
    token_B = self._tokens()[group.variant_P[first:stop]]
    rank_B = self._rank_of.of(cell_B, token_B).astype(np.int32)
    row_B = group.row_P[first:stop].astype(np.int32)
    pad = (0, rows_a_batch - len(row_B))
    compared = comparison.compare_deletions(
      self.placed,
      base,
      np.pad(row_B, pad),
      np.pad(rank_B, pad),
      self.cells.species,
      self.axis_D,
      pooling=self.config.pooling,
      responses=responses,
    )
    length_C = np.diff(self._base.starts_C1)
    is_cut_B = np.diff(self._stored.starts_C1)[cell_B] > length_C[cell_B]
    tokens = None
    if responses:
      tokens = ranks.tokens_without(self._stored, cell_B, rank_B, group.slots)
    return compared, rank_B, is_cut_B.astype(np.int32), tokens

  def _variants(self, group, base, first, stop, rows_a_batch, responses):
    cell_B = group.cell_C[group.row_P[first:stop]]
    made = variants.make(
      self.cells,
      self._base,
      cell_B,
      [self.done[v] for v in group.variant_P[first:stop]],
      group.slots,
      levels_of=self.levels,
      renormalise=self.config.renormalise,
    )
    pad = rows_a_batch - len(cell_B)

    def padded(array):
      widths = ((0, pad),) + ((0, 0),) * (array.ndim - 1)
      return np.pad(array, widths)

    compared = comparison.compare(
      self.placed,
      base,
      jax.tree.map(padded, made.batch),
      padded(group.row_P[first:stop].astype(np.int32)),
      padded(made.base_slot_BL),
      self.axis_D,
      pooling=self.config.pooling,
      responses=responses,
    )
    return compared, made.rank_B, made.entered_B, made.batch.gene_ids_BL


def joined(parts: Sequence[effects.CellEffects]) -> effects.CellEffects:
  """Effects of several groups as one, by variant, then cell."""
  names = [f.name for f in dataclasses.fields(effects.CellEffects)]
  columns = {
    name: np.concatenate([getattr(p, name) for p in parts]) for name in names
  }
  order_N = np.lexsort((columns['cell_N'], columns['variant_N']))
  return effects.CellEffects(**{k: v[order_N] for k, v in columns.items()})


def _chunks(
  cell_C: np.ndarray, number_C: np.ndarray, room: int
) -> Iterator[np.ndarray]:
  """Consecutive cells: at most `room`, and few variants unless it is one."""
  start, variants_so_far = 0, 0
  for i, cell in enumerate(cell_C):
    is_full = i - start >= room
    is_much = variants_so_far + number_C[cell] > _GROUP_VARIANTS
    if i > start and (is_full or is_much):
      yield cell_C[start:i]
      start, variants_so_far = i, 0
    variants_so_far += number_C[cell]
  if start < len(cell_C):
    yield cell_C[start:]
