"""How much of what the devices can do goes into the model.

Utilisation is work by hand (`flops.py`) a second, over the most that the
devices can do: once for the slots that are computed, padding included, and once
for those of real cells alone.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import chips, flops, meter, model as model_lib, schemas

# Sides of the matrices that measure a CPU: the next is tried while it is
# expected to take less than the limit. 2,048 reaches the plateau on two cores.
_SIDES = (1024, 2048, 4096)
_LIMIT_S = 0.1
_REPEATS = 3  # the best counts: other work on the machine slows some


@dataclasses.dataclass(frozen=True)
class Peak:
  """The most that the devices of a run can do.

  Attributes:
    flops: FLOP/s of all devices of the job; None where not known.
    source: where the number is from, in words.
  """

  flops: float | None
  source: str


def find_peak(dtype: str) -> Peak:
  """The peak of all devices of the job: of the table, or measured on a CPU.

  Args:
    dtype: of matrix products, 'float32' or 'bfloat16'.
  """
  device = jax.devices()[0]
  kind, number = device.device_kind, jax.device_count()
  if device.platform == 'cpu':
    # Devices of one process share its cores. Both types: XLA has no faster
    # product of bfloat16 on most CPUs.
    measured = _measure()
    return Peak(
      measured * jax.process_count(),
      f'{measured / 1e9:.0f} GFLOP/s a process, float32, measured at the start',
    )
  one = chips.peak_flops(kind, dtype)
  if one is None:
    return Peak(None, f'not known for {kind!r}')
  return Peak(
    one * number, f'{number} x {kind}, {dtype}, {one / 1e12:.4g} TFLOP/s each'
  )


def _measure() -> float:
  """FLOP/s of a large float32 matrix product on this host; 0.1 to 0.4 s."""
  multiply = jax.jit(lambda a, b: a @ b)
  best = 0.0
  for side in _SIDES:
    matrix = jax.device_put(np.ones((side, side), np.float32))
    multiply(matrix, matrix).block_until_ready()  # compiles
    begin = time.perf_counter()
    for _ in range(_REPEATS):
      before = time.perf_counter()
      multiply(matrix, matrix).block_until_ready()
      seconds = max(time.perf_counter() - before, 1e-9)
      best = max(best, 2.0 * side**3 / seconds)
      if time.perf_counter() - begin > _LIMIT_S:
        return best
    if 8 * seconds > _LIMIT_S:
      return best
  return best


@dataclasses.dataclass(frozen=True)
class Amount:
  """What some steps took in, on this process or in the whole job.

  Attributes:
    rows: of batches.
    cells: in them.
    padded: slots, comparisons and predictions as computed.
    real: the same of the cells alone.
  """

  rows: float = 0.0
  cells: float = 0.0
  padded: flops.Work = flops.Work(0.0, 0.0, 0.0)
  real: flops.Work = flops.Work(0.0, 0.0, 0.0)

  def __add__(self, other: 'Amount') -> 'Amount':
    """Both together."""
    return Amount(
      self.rows + other.rows,
      self.cells + other.cells,
      self.padded + other.padded,
      self.real + other.real,
    )

  def numbers(self) -> np.ndarray:
    """All eight as an array."""
    works = (dataclasses.astuple(w) for w in (self.padded, self.real))
    flat = [self.rows, self.cells, *(x for work in works for x in work)]
    return np.asarray(flat, np.float32)

  @classmethod
  def of_numbers(cls, numbers: Any) -> 'Amount':
    """The inverse of `numbers`."""
    rows, cells, *rest = (float(x) for x in numbers)
    return cls(rows, cells, flops.Work(*rest[:3]), flops.Work(*rest[3:]))

  def times(self, factor: float) -> 'Amount':
    """So many times of it."""
    return Amount.of_numbers(self.numbers().astype(np.float64) * factor)


def amount(host_batch: schemas.HostBatch) -> Amount:
  """What a batch holds of this process's rows.

  The work of real attention is the sum over cells of (n + 1)^2, whatever row
  they lie in; computed are all slots of a row with all of it.
  """
  batch = host_batch.batch
  segments_BL = np.asarray(batch.cells.segments_BL)
  rows, slots = segments_BL.shape
  asked_BK = np.maximum(batch.id_weights_BK, batch.value_weights_BK) > 0
  codes_BL = segments_BL + np.arange(rows)[:, None] * (segments_BL.max() + 1)
  sizes = np.bincount(codes_BL[segments_BL > 0]).astype(np.float64)
  return Amount(
    rows=rows,
    cells=int((host_batch.cell_index_BS >= 0).sum()),
    padded=flops.padded_work(rows, slots, asked_BK.shape[1]),
    real=flops.Work(sizes.sum(), (sizes**2).sum(), int(asked_BK.sum())),
  )


def training_flops(
  config: model_lib.ModelConfig, work: flops.Work, steps: int
) -> float:
  """FLOPs of the work of several steps, forward and backward."""
  parts = flops.training(config, work)
  # The one part that is done once a step, whatever it takes in.
  once = parts.pop('composition', 0.0)
  return sum(parts.values()) + once * steps


class Reducer:
  """Sums small arrays over the processes of a job, without waiting for it."""

  def __init__(self):
    devices = np.asarray(jax.devices())
    self._mesh = jax.sharding.Mesh(devices, ('all',))
    self._first = int(np.flatnonzero(devices == jax.local_devices()[0])[0])

  def sum(self, numbers: np.ndarray) -> jax.Array:
    """The sum of what every process gives; all of them must call it."""
    sharding = NamedSharding(self._mesh, PartitionSpec('all'))
    shape = (self._mesh.devices.size, len(numbers))

    def row(index):
      own = index[0].start in (self._first, None)
      return (numbers if own else np.zeros_like(numbers))[None]

    return self._sum(jax.make_array_from_callback(shape, sharding, row))

  @functools.cached_property
  def _sum(self):
    whole = NamedSharding(self._mesh, PartitionSpec())
    return jax.jit(lambda x: x.sum(0), out_shardings=whole)


def memory_peak() -> tuple[int, str]:
  """Most memory so far, in bytes, and of what it is.

  Of the fullest device of this process where devices tell; else of the process
  itself, its share of everything included.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [
    s['peak_bytes_in_use'] for s in stats if s and 'peak_bytes_in_use' in s
  ]
  if peaks:
    return max(peaks), 'fullest device'
  return meter.peak_memory(), 'process'
