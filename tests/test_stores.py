"""Corpora, runs and models behind URLs, against a store in this process.

The store speaks S3, Google's JSON API and plain HTTP (`object_store`).
"""

import dataclasses
import hashlib
import json
import subprocess
import threading
import time

import jax
import numpy as np
import pytest

from genecompass_jax import (
  checkpoint,
  checkpoint_copies,
  corpus as corpus_lib,
  data,
  doctor,
  encoding,
  errors,
  metrics,
  paths,
  pretrained,
  stores,
  uploads,
)
from genecompass_jax.prepare import pipeline, quality, sources
from tests import object_store
from tests.conftest import ROOT, tiny_cells

ENCODING = encoding.EncodingConfig(max_genes=63)
BATCHES = data.DataConfig(
  rows_per_batch=8, layout='buckets', buckets=(64,), streams=2
)
KINDS = ('s3', 'gs', 'http')


@pytest.fixture
def corpus_store(store, tiny_corpus):
  """The store with the tiny corpus in it."""
  store.upload(tiny_corpus, 'corpus')
  return store


def url(store, kind: str, name: str) -> str:
  """The address of a folder of the store."""
  if kind == 'http':
    return f'{store.url}/{object_store.BUCKET}/{name}'
  return f'{kind}://{object_store.BUCKET}/{name}'


def batches(path, number=5):
  """The first batches of a corpus, as plain arrays."""
  loader = data.Loader(corpus_lib.Corpus.open(path), ENCODING, BATCHES)
  return [dataclasses.asdict(loader.batch(n)) for n in range(number)]


@pytest.mark.parametrize('kind', KINDS)
def test_batches_are_those_of_the_local_corpus(corpus_store, tiny_corpus, kind):
  place = url(corpus_store, kind, 'corpus')
  for here, there in zip(
    jax.tree.leaves(batches(tiny_corpus)), jax.tree.leaves(batches(place))
  ):
    np.testing.assert_array_equal(here, there)
  assert corpus_lib.Corpus.open(place).verify() == []


@pytest.mark.parametrize('kind', KINDS)
def test_a_missing_shard_is_found_at_open(corpus_store, kind):
  shard = next(k for k in corpus_store.objects if k.endswith('/counts/c/0/0'))
  del corpus_store.objects[shard]
  with pytest.raises(errors.UserError, match=f'{shard} is missing'):
    corpus_lib.Corpus.open(url(corpus_store, kind, 'corpus'))


@pytest.mark.parametrize('kind', KINDS)
def test_a_flipped_bit_is_found(corpus_store, kind):
  shard = next(
    k for k in corpus_store.objects if k.endswith('human/counts/c/0/0')
  )
  data_ = bytearray(corpus_store.objects[shard])
  data_[40] ^= 1
  corpus_store.put(object_store.BUCKET, shard, bytes(data_))
  opened = corpus_lib.Corpus.open(url(corpus_store, kind, 'corpus'))
  assert any('differs from the manifest' in line for line in opened.verify())
  with pytest.raises(errors.UserError, match='damaged or missing'):
    opened.stores('train')[0].read_blocks([0])


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_not_there_is_said(corpus_store, kind):
  place = url(corpus_store, kind, 'corpsu')
  with pytest.raises(errors.UserError, match=f'{place}: no corpus here'):
    corpus_lib.Corpus.open(place)
  place = place.replace('/bucket/', '/buckte/')
  with pytest.raises(errors.UserError, match='no corpus here|no such bucket'):
    corpus_lib.Corpus.open(place)


def answer(status, *words):
  """A fault for the objects whose names hold one of some words."""
  return lambda asked: status if any(w in asked.key for w in words) else None


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('part', ['manifest.json', 'counts/c/0/0'])
def test_a_store_that_refuses_is_a_mistake(corpus_store, kind, part):
  corpus_store.fault = answer(403, part)
  with pytest.raises(errors.UserError, match='refuses') as told:
    batches(url(corpus_store, kind, 'corpus'))
  assert '\n' not in str(told.value)


@pytest.mark.parametrize('status', [503, 0])  # 0: the connection is cut
@pytest.mark.parametrize(
  ('kind', 'part'),
  [
    *(('http', p) for p in ('manifest.json', 'length/c/0')),
    *((k, 'counts/c/0/0') for k in ('s3', 'gs')),
  ],
)
def test_a_store_that_fails_is_to_be_tried_again(
  corpus_store, kind, part, status
):
  corpus_store.fault = answer(status, part)
  with pytest.raises(errors.RetryableError) as told:
    batches(url(corpus_store, kind, 'corpus'))
  assert '\n' not in str(told.value)


@pytest.mark.parametrize('kind', KINDS)
def test_a_fault_that_passes_changes_nothing(corpus_store, tiny_corpus, kind):
  failed = set()

  def once(asked):
    if asked.key in failed or asked.method == 'HEAD':
      return None
    failed.add(asked.key)
    return 503 if 'counts' in asked.key else None

  corpus_store.fault = once
  got = batches(url(corpus_store, kind, 'corpus'))
  assert any('counts' in key for key in failed)
  for here, there in zip(
    jax.tree.leaves(batches(tiny_corpus)), jax.tree.leaves(got)
  ):
    np.testing.assert_array_equal(here, there)


def test_a_file_that_is_cut_on_the_way_goes_on(store):
  content = np.random.default_rng(0).bytes(3_000_000)
  store.put(object_store.BUCKET, 'file', content)
  place = url(store, 'http', 'file')
  assert paths.sha256_file(place) == hashlib.sha256(content).hexdigest()
  store.cut_after = 1_000_000
  store.forget()
  assert paths.sha256_file(place) == hashlib.sha256(content).hexdigest()
  asked = [request.range for request in store.requests]
  assert asked[0] == '' and asked[1].startswith('bytes=')


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('file:///x', 'URLs may begin with gs, s3'),
    ('htp://x/y', 'URLs may begin with gs, s3'),
    ('s3://', 'names no bucket'),
    ('https://x/y?signature=1', 'names one file, no folder'),
  ],
)
def test_urls_that_nothing_reads_are_refused(name, message):
  with pytest.raises(errors.UserError, match=message):
    corpus_lib.Corpus.open(name)


def test_a_package_that_is_not_there_is_named(monkeypatch):
  stores._make_ready.cache_clear()
  monkeypatch.setattr(stores.importlib.util, 'find_spec', lambda name: None)
  for kind, package in (('s3', 's3fs'), ('gs', 'gcsfs')):
    with pytest.raises(errors.UserError, match=f'pip install {package}'):
      paths.read_bytes(f'{kind}://bucket/file')
  stores._make_ready.cache_clear()


def test_a_web_server_is_read_only(store):
  place = url(store, 'http', 'folder')
  with pytest.raises(errors.UserError, match='read only'):
    paths.write_text(f'{place}/file', 'text')
  with pytest.raises(errors.UserError, match='lists no folders'):
    paths.listdir(place)
  assert not store.requests


@pytest.mark.parametrize('kind', ['s3', 'gs'])
def test_small_files(store, kind):
  place = url(store, kind, 'folder')
  assert paths.listdir(place) == [] and not paths.exists(place)
  for name in ('b/c.txt', 'a.txt', 'b/d/e.txt'):
    paths.write_text(paths.join(place, name), name)
  assert store.objects['folder/a.txt'] == b'a.txt'
  assert paths.listdir(place) == ['a.txt', 'b']
  assert paths.files_below(place) == ['a.txt', 'b/c.txt', 'b/d/e.txt']
  assert paths.sizes_below(place)['b/d/e.txt'] == 9
  assert paths.exists(f'{place}/a.txt') and paths.exists(f'{place}/b')
  assert paths.read_text(f'{place}/b/c.txt') == 'b/c.txt'
  paths.write_text(f'{place}/a.txt', 'new')
  assert paths.read_text(f'{place}/a.txt') == 'new'
  assert paths.size(f'{place}/a.txt') == 3
  paths.remove(f'{place}/a.txt')
  paths.remove(f'{place}/a.txt')
  assert paths.listdir(place) == ['b']
  paths.remove_tree(place)
  paths.remove_tree(place)
  assert not store.objects
  with pytest.raises(FileNotFoundError):
    paths.read_bytes(f'{place}/a.txt')


def test_a_bucket_that_is_not_there_is_not_made(store):
  with pytest.raises(errors.UserError, match='no such bucket'):
    paths.write_text('s3://buckte/file', 'text')
  assert list(store.buckets) == [object_store.BUCKET]


def test_no_credentials(store, monkeypatch):
  import s3fs

  for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
    monkeypatch.delenv(name)
  s3fs.S3FileSystem.clear_instance_cache()
  with pytest.raises(errors.UserError, match='no valid credentials.*aws conf'):
    paths.read_bytes('s3://bucket/file')
  s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def metrics_file(store, monkeypatch):
  """A metrics file behind a URL, whose copies follow one another closely."""
  monkeypatch.setattr(uploads, 'EVERY', 0.05)
  # the store's own tries do not count here: a fault is one failed copy
  file = metrics.MetricsFile('s3://bucket/run')
  yield file
  file._upload.close()


def kept(store):
  """The steps that the copy in the store has lines of."""
  lines = store.objects.get('run/metrics.jsonl', b'').splitlines()
  return [json.loads(line)['step'] for line in lines]


def test_metrics_are_copied_up(store, metrics_file):
  for step in range(5):
    metrics_file.write(step=step)
    metrics_file.flush()
  metrics_file.sync()
  assert kept(store) == [0, 1, 2, 3, 4]
  metrics_file.write(step=5)
  metrics_file.close()
  assert kept(store) == [0, 1, 2, 3, 4, 5]
  assert [line['step'] for line in metrics.read('s3://bucket/run')] == kept(
    store
  )
  again = metrics.MetricsFile('s3://bucket/run')
  again.write(step=6)
  again.close()
  assert kept(store) == [0, 1, 2, 3, 4, 5, 6]


def test_a_copy_that_fails_is_made_again(store, metrics_file, caplog):
  left = [403, 403]  # which the client does not try again by itself
  store.fault = lambda asked: (
    left.pop() if left and asked.method == 'PUT' else None
  )
  monkeypatched = store.requests
  metrics_file.write(step=0)
  metrics_file.flush()
  deadline = time.monotonic() + 30
  while not kept(store) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert kept(store) == [0] and not left
  assert 'tried again' in caplog.text
  metrics_file.close()
  assert len([r for r in monkeypatched if r.method == 'PUT']) == 3


def test_metrics_that_cannot_be_copied_end_the_run(store, metrics_file):
  store.fault = lambda asked: 503 if asked.method == 'PUT' else None
  metrics_file.write(step=0)
  metrics_file.flush()  # does not wait
  with pytest.raises(errors.RetryableError, match='could not be written'):
    metrics_file.sync(patience=0.5)


def test_a_silent_store_does_not_hold_a_step(store, metrics_file):
  free = threading.Event()

  def hold(asked):
    if asked.method == 'PUT':
      free.wait(30)

  store.fault = hold
  for step in range(20):
    metrics_file.write(step=step)
    metrics_file.flush()
  assert kept(store) == []
  free.set()
  metrics_file.sync()
  assert kept(store) == list(range(20))
  assert len([r for r in store.requests if r.method == 'PUT']) < 20


def test_nothing_comes_after_a_file_is_given_up(store, metrics_file):
  asked, free = threading.Event(), threading.Event()

  def hold(request):
    if request.method == 'PUT':
      asked.set()
      free.wait(30)

  store.fault = hold
  metrics_file.write(step=0)
  metrics_file.flush()
  assert asked.wait(30)
  threading.Timer(0.2, free.set).start()
  metrics_file.abandon()
  assert kept(store) == [0]  # it was on its way, and is not any more
  assert not metrics_file._upload._thread.is_alive()


RUN = {
  'optimizer.total_steps': 10, 'checkpoint_every': 5, 'eval_every': 10,
  'eval_cells': 8,
}  # fmt: skip


@pytest.fixture(scope='module')
def local_run(tiny_run, tmp_path_factory):
  """The workdir of the run on this machine that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('stores') / 'run'
  tiny_run(workdir, RUN)
  return workdir


def trained_values(workdir):
  """What was trained, without what clocks and machines measured."""
  return [
    {k: v for k, v in line.items() if k not in metrics.MEASURED}
    for line in metrics.read(workdir)
    if 'event' not in line
  ]


def assert_same_model(one, other):
  """The parameters of two models are the same bits."""
  one, other = (jax.tree.leaves(model.params) for model in (one, other))
  for here, there in zip(one, other, strict=True):
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize('kind', ['s3', 'gs'])
def test_a_run_in_a_store(
  corpus_store, tiny_run, local_run, kind, monkeypatch, capsys
):
  store, place = corpus_store, url(corpus_store, kind, 'run')
  corpus = url(store, kind, 'corpus')
  # The seal of the last step is refused: the run ends with that step unsealed.
  store.fault = lambda asked: (
    403
    if asked.method in ('PUT', 'POST') and '10.sha256' in asked.key
    else None
  )
  with pytest.raises(errors.UserError, match='refuses'):
    tiny_run(place, RUN, corpus=corpus)
  assert 'run/checkpoints/5.sha256.json' in store.objects
  assert 'run/checkpoints/10.sha256.json' not in store.objects
  assert pretrained.load(place).step == 5
  store.fault = lambda asked: None
  tiny_run(place, RUN, corpus=corpus)  # goes on from step 5
  assert not any('tmp' in name for name in store.objects)
  assert trained_values(place) == trained_values(local_run)
  model = pretrained.load(place)
  assert model.step == 10
  assert_same_model(model, pretrained.load(local_run))
  assert_same_model(model, pretrained.load(f'{place}/checkpoints/10'))
  assert doctor.run([place, corpus]) == 0
  assert 'checkpoint 10: every file is as written' in capsys.readouterr().out
  pretrained.export(model, url(store, kind, 'export'))
  exported = pretrained.load(url(store, kind, 'export'))
  assert_same_model(model, exported)
  # what lies in a store may be read over the web
  assert_same_model(model, pretrained.load(url(store, 'http', 'export')))
  web_run = url(store, 'http', 'run')
  assert_same_model(model, pretrained.load(f'{web_run}/checkpoints/10'))
  with pytest.raises(errors.UserError, match='lists no folders'):
    pretrained.load(web_run)
  # a bit that flips in the last step: the one before is taken
  name = next(
    n for n in store.objects if n.startswith('run/checkpoints/10/par')
  )
  content = store.objects[name]
  store.put(object_store.BUCKET, name, content[:-1] + bytes([content[-1] ^ 1]))
  assert pretrained.load(place).step == 5


def test_a_corpus_is_built_into_a_store(store, tmp_path):
  cells = str(tmp_path / 'cells.h5ad')
  tiny_cells(160).write_h5ad(cells)
  source = sources.SourceConfig(path=cells, unit='donor', assay='umi')
  config = pipeline.PrepareConfig(
    vocabulary='measured', filters=quality.QualityConfig.off()
  )
  pipeline.prepare([source], tmp_path / 'corpus', config)
  far = dataclasses.replace(config, scratch=str(tmp_path / 'scratch'))
  place = url(store, 's3', 'corpus')
  with pytest.raises(errors.UserError, match='--scratch FOLDER'):
    pipeline.prepare([source], place, config)
  store.fault = lambda asked: (
    503
    if (asked.method, asked.key) == ('PUT', 'corpus/manifest.json')
    else None
  )
  with pytest.raises(errors.RetryableError):
    pipeline.prepare([source], place, far)
  # The manifest is the last of all: nothing there looks like a corpus yet.
  assert any('counts/c/0/0' in name for name in store.objects)
  with pytest.raises(errors.UserError, match='no corpus here'):
    corpus_lib.Corpus.open(place)
  store.fault = lambda asked: None
  pipeline.prepare([source], place, far)
  for file in (tmp_path / 'corpus').rglob('*'):
    name = file.relative_to(tmp_path / 'corpus').as_posix()
    if file.is_file() and name != 'build.json':  # when and where
      assert store.objects[f'corpus/{name}'] == file.read_bytes(), name
  with pytest.raises(errors.UserError, match='is not empty'):
    pipeline.prepare([source], place, far)


def test_what_a_store_took_and_has_not_is_found(store, tmp_path, monkeypatch):
  for name in ('kept', 'lost'):
    (tmp_path / name).write_text(name)
  put, listed = store.put, store.listed

  def forgetful(bucket, key, data):
    if 'lost' not in key:
      put(bucket, key, data)

  monkeypatch.setattr(store, 'put', forgetful)
  folder = url(store, 's3', 'folder')
  with pytest.raises(errors.RetryableError, match='lost: the store took it'):
    checkpoint_copies.upload(str(tmp_path), folder)
  monkeypatch.setattr(store, 'put', put)
  # A listing may be late: what it lacks is asked for.
  monkeypatch.setattr(
    store, 'listed', lambda *asked: ([], []) if asked[1] else listed(*asked)
  )
  checkpoint_copies.upload(str(tmp_path), folder)


def test_half_of_a_file_is_not_taken_for_it(store, monkeypatch):
  run = url(store, 's3', 'run')
  text = b'{"event": "start"}\n' * 4
  store.objects['run/metrics.jsonl'] = text
  half = len(text) // 2
  with monkeypatch.context() as change:
    read = paths.read_bytes
    change.setattr(paths, 'read_bytes', lambda name: read(name)[:half])
    with pytest.raises(errors.RetryableError, match=f'{half} of {2 * half} '):
      metrics.cut_after(run, 0)
  assert store.objects['run/metrics.jsonl'] == text
  store.objects['run/5.sha256.json'] = json.dumps(
    {'params/d': hashlib.sha256(text).hexdigest()}
  ).encode()
  step = f'{run}/5'
  store.objects['run/5/params/d'] = text
  with checkpoint._readable(step) as folder:
    assert (folder / 'params' / 'd').read_bytes() == text
  store.objects['run/5/params/d'] = text[:half]
  # For good: a reader is told the file. A run may find the step before.
  with (
    pytest.raises(errors.UserError, match='params/d did not .* copy it there'),
    checkpoint._readable(step),
  ):
    pass
  with (
    pytest.raises(errors.RetryableError, match='params/d did not .* start the'),
    checkpoint._readable(step, damaged=errors.RetryableError),
  ):
    pass
  sha256_file = paths.sha256_file

  def mended(name):
    found = sha256_file(name)
    store.objects['run/5/params/d'] = text
    return found

  monkeypatch.setattr(paths, 'sha256_file', mended)
  with checkpoint._readable(step) as folder:  # once: it is fetched again
    assert (folder / 'params' / 'd').read_bytes() == text


@pytest.mark.parametrize('kind', ['s3', 'gs'])
def test_what_others_write_is_listed(store, kind):
  place = url(store, kind, 'folder')
  for names in (['a'], ['a', 'b'], ['b']):
    store.objects.clear()
    for name in names:
      store.put(object_store.BUCKET, f'folder/{name}', b'x')
    assert paths.listdir(place) == names
    assert sorted(paths.sizes_below(place)) == names


def test_several_processes_and_s3(store, monkeypatch):
  monkeypatch.setattr(checkpoint.processes, 'count', lambda: 2)
  monkeypatch.setattr(checkpoint.processes, 'barrier', lambda name: None)
  with pytest.raises(errors.UserError, match='several processes go to gs://'):
    checkpoint.Checkpoints('s3://bucket/run/checkpoints')


@pytest.mark.slow  # 40 s: two processes of training
@pytest.mark.parametrize('kind', ['s3', 'gs'])
def test_a_run_that_is_killed_goes_on(
  corpus_store, train_command, local_run, kind
):
  store, place = corpus_store, url(corpus_store, kind, 'run')
  command = train_command(place, RUN, url(store, kind, 'corpus'))
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
  seal = 'run/checkpoints/5.sha256.json'
  store.fault = lambda asked: (
    process.kill() if seal in store.objects and '/10' in asked.key else None
  )
  process.communicate()
  assert process.returncode == -9
  store.fault = lambda asked: None
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert trained_values(place) == trained_values(local_run)
  assert_same_model(pretrained.load(place), pretrained.load(local_run))
  assert pretrained.load(place).step == 10
