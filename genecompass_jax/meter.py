"""What a loader costs: time, memory, reads, and how well it shuffles.

Only NumPy and the standard library: the benchmark of other loaders runs this
file in their environments.
"""

import collections
import os
import resource
import time
from collections.abc import Sequence

import numpy as np

WINDOW = 256  # consecutive cells whose labels are looked at together


def mean_entropy(labels_C: np.ndarray, window: int = WINDOW) -> float:
  """Mean entropy, in bits, of the labels of consecutive cells."""
  _, code_C = np.unique(labels_C, return_inverse=True)
  found = []
  for first in range(0, len(code_C) - window + 1, window):
    share = np.bincount(code_C[first : first + window]) / window
    share = share[share > 0]
    found.append(-(share * np.log2(share)).sum())
  return float(np.mean(found)) if found else float('nan')


def _reads() -> collections.Counter:
  """Read calls and bytes of this process; none where the system is silent."""
  try:
    with open('/proc/self/io') as file:
      fields = dict(line.split(': ') for line in file)
  except OSError:
    return collections.Counter()
  return collections.Counter(
    requests=int(fields['syscr']), bytes=int(fields['rchar'])
  )


def _cpu() -> float:
  """CPU seconds of this process, all threads, and of its dead workers."""
  both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
  return sum(
    usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, both)
  )


def peak_memory() -> int:
  """Most memory of this process so far, in bytes."""
  try:
    with open('/proc/self/status') as file:
      line = next(line for line in file if line.startswith('VmHWM'))
    return int(line.split()[1]) * 1024
  except (OSError, StopIteration):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Meter:
  """Counts cells from its creation on, in one process.

  Attributes:
    cells: so far.
    seconds: so far, by the wall.
  """

  def __init__(self):
    self.cells = self._slots = self._real = 0
    self._labels = []
    self._wall, self._cpu, self._io = time.perf_counter(), _cpu(), _reads()

  @property
  def seconds(self) -> float:
    """Wall time so far."""
    return time.perf_counter() - self._wall

  def add(
    self,
    cells: int,
    labels: Sequence | None = None,
    slots: int = 0,
    real: int = 0,
  ) -> None:
    """Counts a batch: cells, their labels, its slots, those with a token."""
    self.cells += cells
    self._slots += slots
    self._real += real
    if labels is not None:
      self._labels.append(np.asarray(labels))

  def result(self, reads: dict | None = None) -> dict:
    """Figures by name; `reads` in place of what the system counts."""
    wall, cpu = self.seconds, _cpu() - self._cpu
    io = _reads()
    io.subtract(self._io)
    io = io if reads is None else reads
    cells = max(self.cells, 1)
    entropy = full = float('nan')
    if self._labels:
      labels_C = np.concatenate(self._labels)
      entropy = mean_entropy(labels_C)
      rng = np.random.default_rng(0)
      full = mean_entropy(rng.permutation(labels_C))
    return {
      'cells': self.cells,
      'rate': self.cells / wall,
      'cpu_us': cpu / cells * 1e6,
      'requests': io['requests'] / cells * 1024,
      'read_bytes': io['bytes'] / cells,
      'peak_mib': peak_memory() / 2**20,
      'entropy': entropy,
      'full_entropy': full,
      'real_share': self._real / self._slots if self._slots else float('nan'),
      'load': os.getloadavg()[0],
    }
