"""PyTorch's zips are read without PyTorch, and without carrying anything out."""

import collections
import json
import os
import pickle
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from genecompass_jax import errors, pickled, tensor_files
from tests import torch_zips as tz


@pytest.mark.parametrize('dtype', tz.KINDS, ids=str)
@pytest.mark.parametrize(
  'compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
)
def test_every_type_comes_back(tmp_path, dtype, compression):
  rng = np.random.default_rng(0)
  arrays = {
    'matrix': rng.integers(0, 2, (3, 5)).astype(dtype),
    'number': np.array(1, dtype),
    'none': np.zeros((0, 4), dtype),
  }
  path = tmp_path / 'pytorch_model.bin'
  tz.write(path, arrays, root='pytorch_model', compression=compression)
  found = tensor_files.read(path)
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    wanted = np.float32 if dtype == ml_dtypes.bfloat16 else dtype
    assert found[name].dtype == wanted
    np.testing.assert_array_equal(found[name], array.astype(wanted))


def test_views_of_shared_storages(tmp_path):
  """Tied weights, slices and transposed views are read where they lie."""
  base = np.arange(24, dtype=np.float32)
  where = tz.storage('Float', 'a', 24)
  items = {
    'whole': tz.parameter(tz.tensor(where, 0, (4, 6), (6, 1))),
    'tied': tz.tensor(where, 0, (4, 6), (6, 1)),
    'transposed': tz.tensor(where, 0, (6, 4), (1, 6)),
    'slice': tz.tensor(where, 7, (2, 3), (6, 2)),
    'one': tz.tensor(where, 5, (1, 4), (1 << 40, 1)),
  }
  members = {'data.pkl': tz.pickle_of(items), 'data/a': base.tobytes()}
  tz.write_members(tmp_path / 'w.pt', members)
  found = tensor_files.read(tmp_path / 'w.pt')
  matrix = base.reshape(4, 6)
  np.testing.assert_array_equal(found['whole'], matrix)
  np.testing.assert_array_equal(found['tied'], matrix)
  np.testing.assert_array_equal(found['transposed'], matrix.T)
  np.testing.assert_array_equal(found['slice'], matrix[1:3, 1:6:2])
  np.testing.assert_array_equal(found['one'], base[None, 5:9])


def test_a_checkpoint_around_a_state_dict(tmp_path):
  arrays = {'a.weight': np.ones((2, 2), np.float32)}
  tz.write(tmp_path / 'w.pt', arrays, nested='model')
  assert [*tensor_files.read(tmp_path / 'w.pt')] == ['model.a.weight']
  found = tensor_files.read(tmp_path / 'w.pt', 'model.')
  np.testing.assert_array_equal(found['a.weight'], np.ones((2, 2)))


def test_unused_storages_are_not_read(tmp_path):
  items = {
    'a': tz.tensor(tz.storage('Float', '0', 2), 0, (2,), (1,)),
    'b': tz.tensor(tz.storage('Float', 'gone', 2), 0, (2,), (1,)),
  }
  members = {'data.pkl': tz.pickle_of(items), 'data/0': bytes(8)}
  tz.write_members(tmp_path / 'w.pt', members)
  assert [*tensor_files.read(tmp_path / 'w.pt', 'a')] == ['']


class Evil:
  def __reduce__(self):
    return os.mkdir, ('hacked',)


def _of_storage(kind='Float', key='0', size=4, offset=0, shape=(4,), by=(1,)):
  return {'a': tz.tensor(tz.storage(kind, key, size), offset, shape, by)}


def _members(items, **more):
  return {'data.pkl': tz.pickle_of(items), 'data/0': bytes(16)} | more


HOSTILE = {
  'storage too short': _members(_of_storage(size=5, shape=(5,))),
  'storage too long': _members(_of_storage(size=3, shape=(3,))),
  'another type': _members(_of_storage('Double')),
  'unknown type': _members(_of_storage('QInt8')),
  'beyond its storage': _members(_of_storage(shape=(5,))),
  'offset beyond': _members(_of_storage(offset=1)),
  'stride beyond': _members(_of_storage(shape=(2, 2), by=(3, 1))),
  'negative stride': _members(_of_storage(offset=3, by=(-1,))),
  'negative offset': _members(_of_storage(offset=-1)),
  'negative size': _members(_of_storage(shape=(-1,))),
  'fewer strides': _members(_of_storage(shape=(2, 2), by=(1,))),
  'many axes': _members(_of_storage(shape=(1,) * 70, by=(1,) * 70)),
  'huge and empty': _members(_of_storage(size=1 << 60, shape=(1 << 60,))),
  'huge by repeating': _members(
    _of_storage(shape=(1 << 30, 1 << 20), by=(0, 0))
  ),
  'huge axes of nothing': _members(
    _of_storage(shape=(0, 1 << 62), by=(1 << 62, 1 << 62))
  ),
  'a missing storage': _members(_of_storage(key='7')),
  'a storage outside': _members(_of_storage(key='../../../etc/passwd')),
  'a storage at a path': _members(_of_storage(key='/etc/passwd')),
  'big endian': _members(_of_storage(), byteorder=b'big'),
  'a program': _members(_of_storage(), **{'constants.pkl': b'.'}),
  'os.system': {'data.pkl': b"cos\nsystem\n(S'mkdir hacked'\ntR."},
  'a call': {'data.pkl': pickle.dumps(Evil(), 2)},
  'a whole model': {
    'data.pkl': b'\x80\x02cgenecompass.modeling_bert\nBertForMaskedLM\n)\x81.'
  },
  'a class as a value': {'data.pkl': tz.pickle_of({'a': b'ctorch\nFloat\n'})},
  'a constructor as a value': {
    'data.pkl': tz.pickle_of({'a': b'ctorch._utils\n_rebuild_tensor_v2\n'})
  },
  'no dict': {'data.pkl': b'\x80\x02]K\x01a.'},
  'nothing': {'data.pkl': tz.pickle_of({})},
  'nested': {
    'data.pkl': b'\x80\x02' + (b'}' + tz.text('a')) * 60 + b'N' + b's' * 60
                + b'.'
  },
  'a bomb': {'data.pkl': b'\x80\x02}' + tz.text('a') + b']' + b'2\x86' * 60
             + b's.'},
  'itself': {'data.pkl': b'\x80\x02}q\x00' + tz.text('a') + b'h\x00s.'},
  'arguments of a dict': {
    'data.pkl': b'\x80\x02ccollections\nOrderedDict\n(]tR.'
  },
  'a persistent id of text': {'data.pkl': b'\x80\x02' + tz.text('a') + b'Q.'},
  'a persistent id of a class': {
    'data.pkl': b'\x80\x02(' + tz.text('module') + b'K\x01K\x01K\x01K\x01tQ.'
  },
  'an unfinished pickle': {'data.pkl': tz.pickle_of(_of_storage())[:-30]},
  'an empty pickle': {'data.pkl': b''},
  'odd names': _members({'a\nb': _of_storage()['a']}),
  'only metadata': {'version': b'3\n'},
}  # fmt: skip


@pytest.mark.parametrize('members', HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_one_line(members, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tz.write_members(tmp_path / 'w.bin', members)
  with pytest.raises(errors.UserError) as error:
    tensor_files.read('w.bin')
  assert '\n' not in str(error.value) and 'w.bin' in str(error.value)
  assert os.listdir(tmp_path) == ['w.bin']


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_names_that_stand_twice(tmp_path):
  with zipfile.ZipFile(tmp_path / 'w.bin', 'w') as archive:
    archive.writestr('a/data.pkl', tz.pickle_of(_of_storage()))
    archive.writestr('a/data/0', bytes(16))
    archive.writestr('a/data/0', bytes(range(16)))
  with pytest.raises(errors.UserError, match='one name'):
    tensor_files.read(tmp_path / 'w.bin')
  with zipfile.ZipFile(tmp_path / 'w.bin', 'w') as archive:
    for root in 'ab':
      archive.writestr(f'{root}/data.pkl', tz.pickle_of(_of_storage()))
  with pytest.raises(errors.UserError, match='2 pickles'):
    tensor_files.read(tmp_path / 'w.bin')
  program = tz.pickle_of(_of_storage())
  body = program[program.index(b'(X') + 1 : program.index(b'u}')]
  twice = program.replace(body, body + body)
  tz.write_members(tmp_path / 'w.bin', {'data.pkl': twice, 'data/0': bytes(16)})
  with pytest.raises(errors.UserError, match="'a' stands twice"):
    tensor_files.read(tmp_path / 'w.bin')
  with zipfile.ZipFile(tmp_path / 'w.npz', 'w') as archive:
    for name in ('a', 'a.npy'):
      archive.writestr(name, b'')
  with pytest.raises(errors.UserError, match='one name'):
    tensor_files.read(tmp_path / 'w.npz')
  facts = '"a":{"dtype":"%s","shape":[1],"data_offsets":[0,4]}'
  header = f'{{{facts % "F32"},{facts % "I32"}}}'.encode()
  size = len(header).to_bytes(8, 'little')
  (tmp_path / 'w.safetensors').write_bytes(size + header + bytes(4))
  with pytest.raises(errors.UserError, match='one name'):
    tensor_files.read(tmp_path / 'w.safetensors')
  nested = {'a': b'}' + tz.text('b') + _of_storage()['a'] + b's'}
  members = _members(nested | {'a.b': _of_storage()['a']})
  tz.write_members(tmp_path / 'w.bin', members)
  with pytest.raises(errors.UserError, match="'a.b' stands there twice"):
    tensor_files.read(tmp_path / 'w.bin')


def test_files_that_are_no_zip(tmp_path):
  path = tmp_path / 'pytorch_model.bin'
  for content, match in (
    (
      b'version https://git-lfs.github.com/spec/v1\noid',
      'Git-LFS.*git lfs pull',
    ),
    (b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.', '1.6'),
    (b'<!DOCTYPE html><html>', 'damaged or of another format'),
    (b'PK\x03\x04', 'damaged or of another format'),
    (b'', 'damaged or of another format'),
  ):
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match=match) as error:
      tensor_files.read(path)
    assert '\n' not in str(error.value)


def _model_files(folder):
  rng = np.random.default_rng(0)
  arrays = {f'n{i}': rng.normal(size=(3, i + 1)) for i in range(5)}
  arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
  tz.write(folder / 'w.bin', arrays, parameters=('n1',))
  np.savez(folder / 'w.npz', **arrays)
  tensor_files.write_safetensors(folder / 'w.safetensors', arrays)
  return arrays


@pytest.mark.parametrize('kind', ['bin', 'npz', 'safetensors'])
def test_flipped_bits_and_cuts_give_the_answer_or_one_line(kind, tmp_path):
  arrays = _model_files(tmp_path)
  data = (tmp_path / f'w.{kind}').read_bytes()
  rng = random.Random(0)
  path = tmp_path / f'bad.{kind}'
  refused = 0
  for trial in range(400):
    bad = bytearray(data)
    if trial % 4 == 0:
      bad = bad[: rng.randrange(len(bad))]
    # a digest of safetensors may be hit beside what it is of
    for _ in range(1 if kind == 'safetensors' else rng.randrange(1, 4)):
      if bad:
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    path.write_bytes(bad)
    try:
      found = tensor_files.read(path)
    except errors.UserError as error:
      assert '\n' not in str(error)
      refused += 1
      continue
    for name, array in found.items():
      if name in arrays:
        np.testing.assert_array_equal(array, arrays[name])
    assert len(found) == len(arrays) or kind == 'npz'
  assert refused > 200


def _folder(tmp_path, kind, shards=2):
  rng = np.random.default_rng(0)
  arrays = {f'n{i}': rng.normal(size=(2, 3)).astype('f') for i in range(5)}
  suffix = kind.rpartition('.')[2]
  weight_map = {}
  for shard in range(shards):
    part = {k: v for k, v in arrays.items() if int(k[1:]) % shards == shard}
    name = f'{kind.removesuffix("." + suffix)}-{shard + 1:05d}-of-2.{suffix}'
    if suffix == 'bin':
      tz.write(tmp_path / name, part)
    else:
      safetensors.numpy.save_file(part, tmp_path / name)
    weight_map |= dict.fromkeys(part, name)
  index = {'metadata': {'total_size': 0}, 'weight_map': weight_map}
  (tmp_path / f'{kind}.index.json').write_text(json.dumps(index))
  return arrays, index


@pytest.mark.parametrize('kind', ['model.safetensors', 'pytorch_model.bin'])
def test_folders_of_parts(kind, tmp_path):
  arrays, index = _folder(tmp_path, kind)
  found = tensor_files.read(tmp_path)
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[name], array)
  place = tmp_path / f'{kind}.index.json'
  for weight_map, match in (
    ({'n9': index['weight_map']['n0']}, 'n9 is not in it'),
    ({'n0': '../elsewhere.bin'}, 'no file of its folder'),
    ({'n0': 'gone.bin'}, 'no such file'),
    ({'n0': 3}, 'no file of its folder'),
    ({}, 'names no tensors'),
    ([], 'no index'),
    ({'n0': None}, 'no file of its folder'),
  ):
    place.write_text(json.dumps({'weight_map': weight_map}))
    with pytest.raises(errors.UserError, match=match) as error:
      tensor_files.read(tmp_path)
    assert '\n' not in str(error.value)
  place.write_text('{')
  with pytest.raises(errors.UserError, match='no index'):
    tensor_files.read(tmp_path)
  os.remove(place)
  with pytest.raises(errors.UserError, match='holds no model.safetensors'):
    tensor_files.read(tmp_path)


def test_an_ordered_dict_with_attributes_is_a_dict(tmp_path):
  """What Python's own pickler makes of torch's `_metadata`."""
  state = collections.OrderedDict(a=1.5)
  state._metadata = collections.OrderedDict(version=1)
  tz.write_members(tmp_path / 'w.pt', {'data.pkl': pickle.dumps(state, 2)})
  assert tensor_files.read(tmp_path / 'w.pt') == {'a': 1.5}


def test_large_tensors_are_no_bomb_of_their_small_pickle(tmp_path, monkeypatch):
  monkeypatch.setattr(pickled, '_SMALL', 1 << 12)
  arrays = {'w': np.ones((300, 1000), np.float32)}
  tz.write(tmp_path / 'w.bin', arrays)
  assert tensor_files.read(tmp_path / 'w.bin')['w'].sum() == 300_000
