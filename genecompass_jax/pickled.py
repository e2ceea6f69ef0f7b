"""Reads pickled data without unpickling: a machine that knows only values.

A pickle is a program. Here the few instructions that build dicts, lists,
tuples, text, bytes, numbers and NumPy arrays are carried out; the names of
NumPy's own constructors are known as words, and nothing is ever imported or
called. Anything else is refused in one line.
"""

import dataclasses
import pickletools
import struct
from collections.abc import Callable, Mapping

import numpy as np

from genecompass_jax import errors, paths, pickled_arrays

LFS_POINTER = b'version https://git-lfs.github.com/spec/'
# What the names in a pickle stand for; they are compared, never looked up.
_WORDS = {
  'numpy ndarray': 'ndarray',
  'numpy dtype': 'dtype',
  '_codecs encode': 'encode',
  '__builtin__ bytes': 'bytes',  # how protocols 0 to 2 write b''
} | {
  f'numpy.{core}.{place}': word
  for core in ('core', '_core')
  for place, word in (
    ('multiarray _reconstruct', 'array'),
    ('multiarray scalar', 'scalar'),
    ('numeric _frombuffer', 'frombuffer'),
  )
}
_PLAIN = (str, int, float, bytes, bool, type(None))
_PUSH_ARGUMENT = frozenset(
  [
    'INT',
    'BININT',
    'BININT1',
    'BININT2',
    'LONG',
    'LONG1',
    'LONG4',
    'FLOAT',
    'BINFLOAT',
    'UNICODE',
    'SHORT_BINUNICODE',
    'BINUNICODE',
    'BINUNICODE8',
    'BINBYTES',
    'SHORT_BINBYTES',
    'BINBYTES8',
    'BYTEARRAY8',
  ]
)
_NO_WORK = frozenset(('PROTO', 'FRAME'))
# A pickle may name a part of itself again, so that a few bytes stand for any
# number of values. A value and all in it, counted as often as they are named,
# may be `_EXPANSION` times as many as the pickle has bytes, or `_SMALL`.
_EXPANSION = 16
_SMALL = 1 << 26
_MAX_DEPTH = 32  # of containers in containers
_MARK = object()


@dataclasses.dataclass(frozen=True)
class Dialect:
  """What pickles of some format may hold besides plain values and arrays.

  Attributes:
    names: 'module name' -> what it stands for: a function of this package that
      makes a value of the arguments, or a value. They too are only compared.
    persistent: makes a value of a persistent id, which stands for data outside
      of the pickle; None where there is none.
    advice: what an error says is read, and what to do.
  """

  names: Mapping[str, object] = dataclasses.field(default_factory=dict)
  persistent: Callable[[object], object] | None = None
  advice: str = (
    'only plain values and numeric arrays are read, so export it as npz, csv '
    'or parquet'
  )


_PLAIN_VALUES = Dialect()


class _Word:
  """A known name; it can be built from, and does nothing else."""

  def __init__(self, word: str, make: Callable | None = None):
    self.word = word
    self.make = make  # of a dialect


def read(path: paths.PathLike) -> object:
  """The value in a file of pickled data.

  Raises:
    UserError: no such file, a Git-LFS pointer, damage, or a pickle of more
      than plain values and numeric arrays.
  """
  try:
    data = paths.read_bytes(path)
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such file') from None
  check_no_pointer(path, data)
  try:
    return loads(data)
  except errors.UserError as error:
    raise errors.UserError(f'{path}: {error}') from None


def check_no_pointer(path: paths.PathLike, data: bytes) -> None:
  """Refuses what Git writes in place of a large file.

  Args:
    path: named in the message.
    data: how the file begins.

  Raises:
    UserError: it is a Git-LFS pointer.
  """
  if data.startswith(LFS_POINTER):
    raise errors.UserError(
      f'{path} is a Git-LFS pointer, a few lines of text in place of the data; '
      'fetch it with "git lfs pull" in the repository it comes from'
    )


def loads(data: bytes, dialect: Dialect = _PLAIN_VALUES) -> object:
  """The value of pickled data.

  Raises:
    UserError: it is damaged, or holds more than values; see `read`.
  """
  try:
    return _Machine(dialect).run(data)
  except errors.UserError:
    raise
  except (
    *(ValueError, IndexError, KeyError, TypeError, AttributeError),
    *(struct.error, OverflowError, MemoryError, RecursionError, SyntaxError),
  ) as error:
    raise errors.UserError(
      f'damaged pickle ({errors.first_line(error)}); fetch it again'
    ) from error


class _Machine:
  """The stack, the memo and the instructions that are known."""

  def __init__(self, dialect: Dialect):
    self.dialect = dialect
    self.stack: list = []
    self.memo: dict = {}
    self.allowed = 0  # values
    self.made = 0  # bytes of arrays
    self.done: Callable = {
      'MARK': lambda: self.stack.append(_MARK),
      'POP': self.stack.pop,
      'POP_MARK': self._above_mark,
      'DUP': lambda: self.stack.append(self.stack[-1]),
      'NONE': lambda: self.stack.append(None),
      'NEWTRUE': lambda: self.stack.append(True),
      'NEWFALSE': lambda: self.stack.append(False),
      'EMPTY_DICT': lambda: self.stack.append({}),
      'EMPTY_LIST': lambda: self.stack.append([]),
      'EMPTY_TUPLE': lambda: self.stack.append(()),
      'DICT': lambda: self._dict({}, self._above_mark(), push=True),
      'LIST': lambda: self.stack.append(self._above_mark()),
      'TUPLE': lambda: self._tuple(self._above_mark()),
      'TUPLE1': lambda: self._tuple(self._popped(1)),
      'TUPLE2': lambda: self._tuple(self._popped(2)),
      'TUPLE3': lambda: self._tuple(self._popped(3)),
      'APPEND': lambda: self._extend([self.stack.pop()]),
      'APPENDS': lambda: self._extend(self._above_mark()),
      'SETITEM': lambda: self._set_item(),
      'SETITEMS': lambda: self._set_items(),
      'MEMOIZE': self._memoize,
      'STACK_GLOBAL': lambda: self._name(*self._popped(2)),
      'REDUCE': lambda: self._reduce(*self._popped(2)),
      'BUILD': self._build,
    }
    if dialect.persistent is not None:
      self.done['BINPERSID'] = lambda: self.stack.append(
        dialect.persistent(self.stack.pop())
      )

  def run(self, data: bytes) -> object:
    """Carries out a pickle; ends at its STOP."""
    self.allowed = max(_EXPANSION * len(data), _SMALL)
    for opcode, argument, place in pickletools.genops(data):
      name = opcode.name
      if name in _PUSH_ARGUMENT:
        if isinstance(argument, int) and argument.bit_length() >= 1024:
          raise OverflowError(f'a number of {argument.bit_length()} bits')
        self.stack.append(argument)
      elif name in ('BINGET', 'LONG_BINGET', 'GET'):
        self.stack.append(self.memo[int(argument)])
      elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
        self.memo[int(argument)] = self.stack[-1]
      elif name in ('STRING', 'BINSTRING', 'SHORT_BINSTRING'):
        self.stack.append(argument)  # of Python 2: bytes read as Latin-1
      elif name == 'GLOBAL':
        self._name(*argument.split(' ', 1))
      elif name == 'STOP':
        (value,) = self.stack
        value = self._value(value)
        if _expanded(value) > self.allowed:
          raise errors.UserError(_TOO_MUCH)
        return value
      elif name in self.done:
        self.done[name]()
      elif name not in _NO_WORK:
        raise errors.UserError(
          f'the pickle asks for {name} at byte {place}; {self.dialect.advice}'
        )
    raise ValueError('it has no end')

  def _value(self, value: object) -> object:
    """A finished value in place of what it was built in."""
    unfinished = isinstance(value, _Word) or value is _MARK
    if type(value) is tuple:
      unfinished = any(
        isinstance(v, _Word | pickled_arrays.Unfinished) for v in value
      )
    if unfinished or (
      isinstance(value, pickled_arrays.Unfinished) and value.word == 'dtype'
    ):
      raise errors.UserError(
        f'the pickle holds a class or function; {self.dialect.advice}'
      )
    if isinstance(value, pickled_arrays.Unfinished):
      if value.value is None:
        raise ValueError('an array without content')
      return value.value
    return value

  def _popped(self, number: int) -> list:
    if number > len(self.stack):
      raise IndexError('the stack is empty')
    found = self.stack[-number:]
    del self.stack[-number:]
    return found

  def _above_mark(self) -> list:
    for place in range(len(self.stack) - 1, -1, -1):
      if self.stack[place] is _MARK:
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return [
          self._value(v) if pickled_arrays.is_array(v) else v for v in found
        ]
    raise IndexError('a mark is missing')

  def _tuple(self, values: list) -> None:
    # Words and dtypes may stand here: tuples are arguments of constructors.
    self.stack.append(
      tuple(
        self._value(v) if pickled_arrays.is_array(v) or type(v) is tuple else v
        for v in values
      )
    )

  def _extend(self, values: list) -> None:
    if not isinstance(self.stack[-1], list):
      raise TypeError('appends to what is no list')
    self.stack[-1].extend(self._value(v) for v in values)

  def _dict(self, target: dict, flat: list, push: bool = False) -> None:
    if type(target) is not dict or len(flat) % 2:
      raise TypeError('items of what is no dict')
    for key, value in zip(flat[::2], flat[1::2]):
      if not isinstance(key, _PLAIN) and not (
        isinstance(key, tuple) and all(isinstance(k, _PLAIN) for k in key)
      ):
        if isinstance(key, np.generic):
          key = key.item()
        else:
          raise errors.UserError(
            f'the pickle has a {type(key).__name__} for a key of a dict; only '
            'text, numbers and tuples of them are read'
          )
      if key in target:
        raise ValueError(f'{ascii(key)[:200]} stands twice in a dict')
      target[key] = self._value(value)
    if push:
      self.stack.append(target)

  def _set_item(self) -> None:
    pair = [self._value(v) for v in self._popped(2)]
    self._dict(self.stack[-1], pair)

  def _set_items(self) -> None:
    flat = self._above_mark()
    self._dict(self.stack[-1], flat)

  def _memoize(self) -> None:
    self.memo[len(self.memo)] = self.stack[-1]

  def _name(self, module: str, name: str) -> None:
    full = f'{module} {name}'
    found = self.dialect.names.get(full)
    if callable(found):
      self.stack.append(_Word(full, found))
    elif found is not None:
      self.stack.append(found)
    elif full in _WORDS:
      self.stack.append(_Word(_WORDS[full]))
    else:
      shown = f'{module}.{name}'[:200]
      shown = shown if shown.isprintable() else ascii(shown)
      raise errors.UserError(f'the pickle names {shown}; {self.dialect.advice}')

  def _reduce(self, what: object, arguments: object) -> None:
    if not isinstance(what, _Word) or type(arguments) is not tuple:
      raise TypeError('a call of what is no constructor')
    if what.make is not None:
      built = what.make(*arguments)
    elif what.word == 'dtype':
      built = pickled_arrays.Unfinished('dtype')
      built.value = pickled_arrays.dtype(arguments[0])
    elif what.word == 'array':
      built = pickled_arrays.Unfinished('array')  # its content comes with BUILD
    elif what.word == 'scalar':
      dtype, data = arguments
      built = pickled_arrays.Unfinished('scalar')
      built.value = np.frombuffer(
        pickled_arrays.content(data), pickled_arrays.dtype_of(dtype), 1
      )[0]
    elif what.word == 'frombuffer':
      data, dtype, shape, order = arguments
      built = pickled_arrays.Unfinished('array')
      built.value = pickled_arrays.array(
        data, pickled_arrays.dtype_of(dtype), shape, order == 'F'
      )
    elif what.word == 'bytes' and arguments == ():
      built = b''
    elif what.word == 'encode':
      text, encoding = arguments
      if encoding not in ('latin1', 'latin-1') or not isinstance(text, str):
        raise TypeError('text of an unknown encoding')
      built = text.encode('latin-1')
    else:
      raise TypeError('a call of what is no constructor')
    self._count(built)
    self.stack.append(built)

  def _count(self, built: object) -> None:
    """Refuses bytes that are copied again and again."""
    held = (
      built.value if isinstance(built, pickled_arrays.Unfinished) else built
    )
    if isinstance(held, np.ndarray | np.generic):
      self.made += held.nbytes
    elif isinstance(held, bytes):
      self.made += len(held)
    if self.made > 8 * self.allowed:
      raise errors.UserError(_TOO_MUCH)

  def _build(self) -> None:
    state = self.stack.pop()
    built = self.stack[-1]
    if type(built) is dict and type(state) is dict and self.dialect.names:
      return  # attributes of a dict, such as torch's versions of modules
    if (
      not isinstance(built, pickled_arrays.Unfinished)
      or type(state) is not tuple
    ):
      raise errors.UserError(
        f'the pickle sets the state of an object; {self.dialect.advice}'
      )
    if built.word == 'dtype':
      order = state[1]
      if order not in ('<', '>', '|', '='):
        raise ValueError(f'byte order {order!r}')
      if any(part is not None for part in state[2:5]):
        raise errors.UserError('arrays of records are not read')
      built.value = built.value.newbyteorder(order)
    elif built.word == 'array':
      _, shape, dtype, is_fortran, data = state
      built.value = pickled_arrays.array(
        data, pickled_arrays.dtype_of(dtype), shape, is_fortran
      )
      self._count(built)
    else:
      raise TypeError('a state of what has none')


_TOO_MUCH = (
  'the pickle stands for far more values than it has bytes; no table is '
  'written so: export it as npz, csv or parquet'
)


def _expanded(value: object) -> int:
  """Values in a value, those that stand in it twice counted twice.

  Raises:
    UserError: it holds itself, or containers in too many others.
  """
  sizes: dict[int, int] = {}

  def size(held: object, depth: int) -> int:
    if isinstance(held, np.ndarray):
      return max(held.size, 1)
    if not isinstance(held, dict | list | tuple):
      return 1
    if depth > _MAX_DEPTH:  # of one that holds itself as well
      raise errors.UserError(
        f'the pickle nests containers more than {_MAX_DEPTH} deep; no table '
        'is written so: export it as npz, csv or parquet'
      )
    if id(held) not in sizes:
      parts = held.values() if isinstance(held, dict) else held
      sizes[id(held)] = 1 + sum(size(part, depth + 1) for part in parts)
    return sizes[id(held)]

  return size(value, 0)
