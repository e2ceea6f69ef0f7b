"""NumPy's arrays, numbers and dtypes out of the arguments that pickles give."""

import math

import numpy as np

from genecompass_jax import errors


class Unfinished:
  """An array, number or dtype under construction.

  Attributes:
    word: 'array', 'scalar' or 'dtype'.
    value: what it is by now; None before its content came.
  """

  def __init__(self, word: str):
    """Nothing yet."""
    self.word = word
    self.value = None


def is_array(value: object) -> bool:
  """Whether it is an array or number, finished or not."""
  return isinstance(value, Unfinished) and value.word != 'dtype'


def dtype(code: object) -> np.dtype:
  """The dtype that NumPy calls so.

  Raises:
    UserError: it is none of numbers or text.
  """
  if not isinstance(code, str) or code[:1] not in tuple('biufSU'):
    raise errors.UserError(
      f'the pickle has an array of {code!r}; only numbers and text are read'
    )
  return np.dtype(code)


def dtype_of(value: object) -> np.dtype:
  """What was built as a dtype; TypeError where it was not."""
  if not isinstance(value, Unfinished) or value.word != 'dtype':
    raise TypeError('an array without a dtype')
  return value.value


def content(data: object) -> bytes:
  """The bytes of an array; TypeError where there are none."""
  if isinstance(data, str):  # Python 2
    return data.encode('latin-1')
  if not isinstance(data, bytes | bytearray):
    raise TypeError('an array without bytes')
  return bytes(data)


def array(
  data: object, dtype: np.dtype, shape: object, is_fortran: object
) -> np.ndarray:
  """An array of its bytes; TypeError or ValueError where they do not fit."""
  if type(shape) is not tuple or not all(
    type(n) is int and n >= 0 for n in shape
  ):
    raise TypeError(f'an array of shape {shape!r}')
  held = content(data)
  if math.prod(shape) * dtype.itemsize != len(held):
    raise ValueError(f'an array of {shape} has {len(held)} bytes')
  flat = np.frombuffer(held, dtype)
  return flat.reshape(shape, order='F' if is_fortran else 'C').copy()
