"""What compiled kernels share: how they are compiled, and their randomness.

Draws are hashes of integers (splitmix64), never a hidden state.
"""

from collections.abc import Callable

import numba
import numpy as np
from numba.core import caching

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # steps of it are spread evenly
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def compiled(function: Callable) -> Callable:
  """Compiles a kernel without the GIL, kept on disk where that is possible.

  IEEE arithmetic as written: no fastmath, so orders and values do not change
  with the machine.
  """
  try:
    kernel = numba.njit(nogil=True, cache=True)(function)
    kernel._cache = _Cache(function)
    return kernel
  except RuntimeError:  # no writable folder for the cache: compile each run
    return numba.njit(nogil=True)(function)


class _Cache(caching.FunctionCache):
  """Numba's, which forgets what an older version of a module has left.

  Its index names the types of arguments. Where a named tuple was renamed since,
  it cannot be read any more, and Numba would end the program.
  """

  def load_overload(self, sig, target_context):
    """The machine code kept for a signature; None where there is none."""
    try:
      return super().load_overload(sig, target_context)
    except (AttributeError, ImportError, TypeError):
      self.flush()
      return None


@compiled
def mix64(x: np.uint64) -> np.uint64:
  """The finaliser of splitmix64, a bijection of 64 bits."""
  x ^= x >> np.uint64(30)
  x *= _MIX_1
  x ^= x >> np.uint64(27)
  x *= _MIX_2
  return x ^ (x >> np.uint64(31))


def mix64_all(x_N: np.ndarray) -> np.ndarray:
  """`mix64` of every element of a uint64 array."""
  return mix64.py_func(x_N.copy())


def fold(*parts: int) -> np.uint64:
  """Hashes integers, in order, into 64 bits: fold(seed, epoch)."""
  bits = (1 << 64) - 1
  state = 0
  for part in parts:
    state = (state ^ (int(part) & bits)) + int(GOLDEN) & bits
    state = (state ^ state >> 30) * int(_MIX_1) & bits
    state = (state ^ state >> 27) * int(_MIX_2) & bits
    state ^= state >> 31
  return np.uint64(state)


def read_only(array: np.ndarray) -> np.ndarray:
  """A contiguous read-only view, so that a kernel is compiled once a dtype."""
  view = np.ascontiguousarray(array).view()
  view.flags.writeable = False
  return view
