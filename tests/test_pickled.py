"""Pickles are read without carrying them out."""

import collections
import io
import os
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from genecompass_jax import errors, pickled

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False)
  | st.text()
  | st.binary(),
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
  ),
  max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.sampled_from(PROTOCOLS))
def test_plain_values_come_back(value, protocol):
  assert pickled.loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_arrays_come_back(protocol):
  arrays = {
    'matrix': np.arange(6, dtype=np.float32).reshape(2, 3),
    'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    'text': np.array(['a', 'bcd']),
    'big endian': np.arange(3, dtype='>i4'),
    'flags': np.array([True, False]),
    'number': np.float64(2.5),
    'none': np.zeros((0, 3), np.float16),
    'pair': (np.ones(2), [np.int64(3)]),
  }
  arrays['again'] = arrays['matrix']  # by reference
  found = pickled.loads(pickle.dumps(arrays, protocol))
  assert found.keys() == arrays.keys()
  for name in arrays.keys() - {'pair'}:
    np.testing.assert_array_equal(found[name], arrays[name])
    assert np.asarray(found[name]).dtype == np.asarray(arrays[name]).dtype
  np.testing.assert_array_equal(found['pair'][0], np.ones(2))
  assert found['pair'][1] == [3]


class Evil:
  def __reduce__(self):
    return os.mkdir, ('hacked',)


class Stateful:
  def __setstate__(self, state):
    os.mkdir('hacked')

  def __getstate__(self):
    return {'a': 1}


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize(
  'value',
  [
    Evil(),
    {'gene': Evil()},
    Stateful(),
    np.array([1, 'a'], object),
    np.zeros(2, 'i4,f4'),
    np.dtype(np.float32),
    (np.dtype(np.float32),),
    np.ndarray,
    collections.OrderedDict(a=1),
    {1, 2},
    print,
    1j,
  ],
  ids=lambda v: type(v).__name__,
)
def test_all_else_is_refused_in_one_line(
  value, protocol, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError) as error:
    pickled.loads(pickle.dumps(value, protocol))
  assert '\n' not in str(error.value)
  assert not os.path.exists('hacked')


@pytest.mark.parametrize(
  'program',
  [
    b"cos\nsystem\n(S'mkdir hacked'\ntR.",
    b"(S'mkdir hacked'\nios\nsystem\n.",  # INST
    b"(cos\nsystem\nS'mkdir hacked'\no.",  # OBJ
    b'\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.',
    b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.',
    b'cnumpy.core.multiarray\n_reconstruct\n.',
    b'cnumpy\ndtype\n(Vos\nI00\nI01\ntR.',
    b'P1\n.',  # a persistent id
    b'\x82\x01.',  # an extension
    b'.',
    b'',
    b'0.',
    b'h\x07.',
    b'(.',
    b']K\x01K\x02s.',
    b'\x80\x04\x8a\xff' + b'\xff' * 10,
    b'\x80\x04B\xff\xff\xff\x7f' + b'x',
  ],
)
def test_crafted_programs_do_nothing(program, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError) as error:
    pickled.loads(program)
  assert '\n' not in str(error.value)
  assert not os.listdir(tmp_path)


_DOUBLED = b'\x80\x02}X\x04\x00\x00\x00TP53' + b']' + b'2\x86' * 60 + b's.'
_WIDE = b'\x80\x02' + b''.join(
  b'](' + (b'NNNN' if n == 0 else b'h%c' % (n - 1) * 4) * 500 + b'eq%c' % n
  for n in range(4)
)


@pytest.mark.parametrize(
  'program',
  [
    _DOUBLED,
    _WIDE + b'h\x03\x85' + b'.',
    b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
    b'\x80\x02]q\x00h\x00a.',  # holds itself
    b'\x80\x02cnumpy\ndtype\nX\x04\x00\x00\x00i4,(\x85R.',
  ],
)
def test_bombs_are_refused_at_once(program):
  with pytest.raises(errors.UserError) as error:
    pickled.loads(program)
  assert '\n' not in str(error.value)


def test_bytes_that_are_copied_again_and_again(monkeypatch):
  monkeypatch.setattr(pickled, '_SMALL', 1 << 12)
  block = b'x' * 4096
  text = b'X\x00\x10\x00\x00' + block + b'q\x00'
  encode = b'c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02000'
  again = b'h\x01h\x00h\x02\x86Ra' * 1000
  with pytest.raises(errors.UserError, match='far more values'):
    pickled.loads(b'\x80\x02' + text + encode + b']' + again + b'.')


def test_one_vector_of_many_genes_is_no_bomb():
  vector = np.ones(768, np.float32)
  table = {f'G{i}': vector for i in range(30_000)}
  found = pickled.loads(pickle.dumps(table))
  assert len(found) == 30_000 and (found['G7'] == vector).all()


def test_damage_is_one_line():
  data = pickle.dumps({f'G{i}': np.ones(4, np.float32) for i in range(20)})
  rng = random.Random(0)
  for _ in range(300):
    bad = bytearray(data[: rng.randrange(len(data))])
    for _ in range(rng.randrange(3)):
      if bad:
        bad[rng.randrange(len(bad))] = rng.randrange(256)
    try:
      pickled.loads(bytes(bad))
    except errors.UserError as error:
      assert '\n' not in str(error)


def test_files(tmp_path):
  path = tmp_path / 'x.pickle'
  path.write_bytes(pickle.dumps({'A': [1.0]}))
  assert pickled.read(path) == {'A': [1.0]}
  path.write_bytes(
    b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'
  )
  with pytest.raises(errors.UserError, match='Git-LFS pointer.*git lfs pull'):
    pickled.read(path)
  with pytest.raises(errors.UserError, match='no such file'):
    pickled.read(tmp_path / 'none')


def test_what_torch_saves_is_no_plain_value():
  stream = io.BytesIO()
  pickle.Pickler(stream, 2).dump(np.random.default_rng(0))
  with pytest.raises(errors.UserError, match='names'):
    pickled.loads(stream.getvalue())
