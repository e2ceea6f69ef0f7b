"""From file to file: whatever interrupts it, the same command ends the same."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap

import anndata
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import cli, errors
from genecompass_jax.analysis import embedding_files, embeddings, unfinished
from genecompass_jax.prepare import h5ad_copy
from tests.conftest import tiny_cells

NUM = 60
KEY = embeddings.KEY


@pytest.fixture(scope='module')
def cells():
  return tiny_cells(NUM, seed=3)


@pytest.fixture
def folder(cells, tmp_path):
  cells.write_h5ad(tmp_path / 'in.h5ad')
  return tmp_path


def embed(folder, model, **options):
  states = embeddings.StateConfig(
    **{'batch_size': 8, **options.pop('states', {})}
  )
  return embedding_files.embed_file(
    folder / 'in.h5ad', folder / 'out.h5ad', model, states=states, **options
  )


class Stop(BaseException):
  """What ends a process in between, besides SIGKILL."""


def stop_after(monkeypatch, batches):
  """Has the next run end after some batches."""
  write, left = unfinished.Records.write, [batches]

  def counted(self, *arguments):
    if not left[0]:
      raise Stop
    left[0] -= 1
    write(self, *arguments)

  monkeypatch.setattr(unfinished.Records, 'write', counted)


def interrupted(folder, model, monkeypatch, batches=3, **options):
  with monkeypatch.context() as patch:
    stop_after(patch, batches)
    with pytest.raises(Stop):
      embed(folder, model, **options)


def test_a_file_equals_cells_in_memory(folder, model, cells):
  written = embed(folder, model)
  expected = gc.embed_cells(cells, model, batch_size=8)
  found = anndata.read_h5ad(folder / 'out.h5ad')
  assert found.obsm[KEY].dtype == np.float32
  np.testing.assert_array_equal(found.obsm[KEY], expected.embeddings_CD)
  for name, column in expected.obs.items():
    np.testing.assert_array_equal(found.obs[name], column)
  assert found.uns['genecompass']['block'] == model.config.num_layers
  assert written.uns == expected.uns
  assert (written.num_cells, written.width) == expected.embeddings_CD.shape
  assert sorted(os.listdir(folder)) == ['in.h5ad', 'out.h5ad']


def test_what_was_interrupted_goes_on(
  folder, model, cells, monkeypatch, caplog
):
  interrupted(folder, model, monkeypatch)
  assert set(os.listdir(folder)) == {'in.h5ad', 'out.h5ad.unfinished'}
  interrupted(folder, model, monkeypatch, batches=1)
  # Of what was being written when the power went, half is there.
  path = folder / 'out.h5ad.unfinished' / 'cells.bin'
  torn = bytearray(path.read_bytes())
  torn[40] ^= 1
  path.write_bytes(torn)
  written = embed(folder, model)
  assert written.num_before == 4 * 8 - 1
  assert 'going on, 31 of 60 cells are finished' in caplog.text
  found = anndata.read_h5ad(folder / 'out.h5ad')
  expected = gc.embed_cells(cells, model, batch_size=8)
  np.testing.assert_array_equal(found.obsm[KEY], expected.embeddings_CD)
  for name, column in expected.obs.items():
    np.testing.assert_array_equal(found.obs[name], column)
  assert sorted(os.listdir(folder)) == ['in.h5ad', 'out.h5ad']


KILLED = textwrap.dedent("""
  import os, signal, sys
  import genecompass_jax as gc
  from genecompass_jax.analysis import embedding_files, embeddings, unfinished

  write, left = unfinished.Records.write, [4]

  def counted(self, *arguments):
    write(self, *arguments)
    left[0] -= 1
    if not left[0]:
      os.kill(os.getpid(), signal.SIGKILL)

  unfinished.Records.write = counted
  embedding_files.embed_file(
    'in.h5ad', 'out.h5ad', gc.load(sys.argv[1]),
    states=embeddings.StateConfig(batch_size=8),
  )
""")


def test_kill_9_leaves_no_output_and_loses_little(
  folder, model, trained, cells, monkeypatch
):
  result = subprocess.run(
    [sys.executable, '-c', KILLED, str(trained)], cwd=folder
  )
  assert result.returncode == -signal.SIGKILL
  assert set(os.listdir(folder)) == {'in.h5ad', 'out.h5ad.unfinished'}

  # Killed once more, while the output is written: half of it is there.
  def killed(*arguments, staging, **named):
    with open(staging, 'wb') as file:
      file.write(b'half')
    raise Stop

  with monkeypatch.context() as patch:
    patch.setattr(h5ad_copy, 'write', killed)
    with pytest.raises(Stop):
      embed(folder, model)
  assert set(os.listdir(folder)) == {'in.h5ad', 'out.h5ad.unfinished'}
  assert embed(folder, model).num_before == NUM
  found = anndata.read_h5ad(folder / 'out.h5ad')
  expected = gc.embed_cells(cells, model, batch_size=8)
  np.testing.assert_allclose(found.obsm[KEY], expected.embeddings_CD, atol=1e-6)
  assert sorted(os.listdir(folder)) == ['in.h5ad', 'out.h5ad']


def test_finished_cells_of_other_settings_are_not_used(
  folder, model, trained, cells, monkeypatch, capsys
):
  interrupted(folder, model, monkeypatch)

  def refused(**options):
    with pytest.raises(errors.UserError) as caught:
      embed(folder, model, **options)
    assert '\n' not in str(caught.value)
    assert 'out.h5ad.unfinished' in str(caught.value)
    return str(caught.value)

  assert 'pooling was cls, now mean' in refused(states={'pooling': 'mean'})
  assert 'dtype was float32, now bfloat16' in refused(
    states={'dtype': 'bfloat16'}
  )
  assert 'number of cells was 60, now 9' in refused(limit=9)
  earlier = gc.load(trained / 'checkpoints' / '5')
  with pytest.raises(errors.UserError, match='checkpoint was'):
    embed(folder, earlier)
  # Of the same checkpoint, but for what was changed in memory.
  config = dataclasses.replace(model.config, prior_scale=0.5)
  other = dataclasses.replace(model, config=config)
  with pytest.raises(errors.UserError, match='model was'):
    embed(folder, other)
  # Another file of the same name, and of the same size.
  changed = cells.copy()
  changed.X.data[:] = changed.X.data[::-1]
  changed.write_h5ad(folder / 'other.h5ad')
  os.replace(folder / 'other.h5ad', folder / 'in.h5ad')
  assert 'cells was' in refused()
  common = [str(folder / 'in.h5ad'), '-o', str(folder / 'out.h5ad')]
  common += ['--checkpoint', str(trained)]
  capsys.readouterr()
  assert cli.main(['embed', *common]) == errors.EXIT_USAGE
  assert len(capsys.readouterr().err.splitlines()) == 1
  assert not (folder / 'out.h5ad').exists()
  assert embed(folder, model, overwrite=True).num_before == 0
  np.testing.assert_array_equal(
    anndata.read_h5ad(folder / 'out.h5ad').obsm[KEY],
    gc.embed(changed, model, batch_size=8),
  )


@pytest.mark.parametrize('text', ['[1]', '{"cells"', '\xff'])
def test_settings_that_are_damaged(folder, model, text):
  left = folder / 'out.h5ad.unfinished'
  left.mkdir()
  (left / 'settings.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(errors.UserError, match='--overwrite to begin anew'):
    embed(folder, model)
  assert embed(folder, model, overwrite=True).num_cells == NUM


def test_another_process_is_not_disturbed(folder, model, monkeypatch):
  write = unfinished.Records.write

  def meets(self, *arguments):
    with pytest.raises(errors.UserError, match='another process makes'):
      embed(folder, model)
    write(self, *arguments)

  monkeypatch.setattr(unfinished.Records, 'write', meets)
  assert embed(folder, model).num_cells == NUM


def test_the_first_cells_alone(folder, model, trained, cells, capsys):
  common = [str(folder / 'in.h5ad'), '-o', str(folder / 'out.h5ad')]
  common += ['--checkpoint', str(trained), '--limit']
  assert cli.main(['embed', *common, '-1']) == errors.EXIT_USAGE
  assert cli.main(['embed', *common, '7']) == 0
  assert 'of 7 cells' in capsys.readouterr().out
  found = anndata.read_h5ad(folder / 'out.h5ad')
  assert found.X is None
  assert list(found.obs['cell_type']) == list(cells.obs['cell_type'][:7])
  np.testing.assert_allclose(
    found.obsm[KEY], gc.embed(cells, model)[:7], atol=1e-5
  )


def test_backed_cells(folder, model, cells):
  backed = anndata.read_h5ad(folder / 'in.h5ad', backed='r')
  np.testing.assert_array_equal(gc.embed(backed, model), gc.embed(cells, model))
  assert 'gc_species' in backed.obs


# Blocks and types


def test_the_output_of_any_block(cells, model):
  num_layers = model.config.num_layers
  batch = gc.cell_batch(np.zeros((1, 1), np.int32), np.zeros((1, 1)))
  assert len(model.hidden_states(batch, every_layer=True)) == num_layers + 1
  last = gc.embed(cells, model)
  np.testing.assert_array_equal(gc.embed(cells, model, block=num_layers), last)
  first = gc.embed(cells, model, block=1)
  np.testing.assert_array_equal(
    gc.embed(cells, model, block=-num_layers), first
  )
  assert np.abs(first - last).max() > 0.1
  for block in (0, num_layers + 1, -num_layers - 1):
    with pytest.raises(errors.UserError, match='give 1 to'):
      gc.embed(cells, model, block=block)
  with pytest.raises(errors.UserError, match='float32 or bfloat16'):
    gc.embed(cells, model, dtype='float16')


@pytest.mark.parametrize('norm_order', ['post', 'pre'])
def test_a_block_is_one_of_every_layer(cells, model, norm_order):
  from genecompass_jax import model as model_lib
  from genecompass_jax.analysis import model_cells

  config = model_lib.ModelConfig(
    **{
      **model.config.__dict__,
      'norm_order': norm_order,
      'num_layers': 3,
    }
  )
  params = model_lib.init(config, seed=1)
  other = model.replace(config=config, params=params)
  (chunk,) = model_cells.encode(model_cells.open_cells(cells, other), other)
  starts = chunk.cells.starts_C1
  ids = np.zeros((NUM, 63), np.int32)
  values = np.zeros((NUM, 63), np.float32)
  for c, (a, b) in enumerate(zip(starts, starts[1:])):
    ids[c, : b - a] = chunk.cells.gene_ids_N[a:b]
    values[c, : b - a] = chunk.cells.values_N[a:b]
  states = other.hidden_states(gc.cell_batch(ids, values), every_layer=True)
  for block in (1, 3):
    np.testing.assert_allclose(
      gc.embed(cells, other, block=block), states[block, :, 0], atol=1e-5
    )


def test_bfloat16_is_near(cells, model):
  exact = gc.embed(cells, model, dtype='float32')
  rounded = gc.embed(cells, model, dtype='bfloat16')
  assert rounded.dtype == np.float32
  assert np.abs(exact - rounded).max() > 1e-4
  cosine = np.sum(exact * rounded, 1) / (
    np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
  )
  assert cosine.min() > 0.9999


SECOND = textwrap.dedent("""
  import sys
  from genecompass_jax import cli
  from genecompass_jax.training import compiles

  counter = compiles.Counter()
  counter.start()
  code = cli.main(['embed', *sys.argv[1:]])
  print(code, counter.number, counter.fetched)
""")


def test_a_second_command_compiles_nothing(folder, trained):
  """The cache is where the user's caches are, and has every program."""
  environment = {**os.environ, 'XDG_CACHE_HOME': str(folder / 'cache')}
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  environment.pop('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', None)

  def run(name, **more):
    arguments = [str(folder / 'in.h5ad'), '-o', str(folder / name)]
    result = subprocess.run(
      [sys.executable, '-c', SECOND, *arguments, '--checkpoint', str(trained)],
      env={**environment, **more},
      capture_output=True,
      text=True,
      check=True,
    )
    return [int(n) for n in result.stdout.splitlines()[-1].split()]

  code, programs, fetched = run('1.h5ad')
  assert (code, fetched) == (0, 0)
  assert run('2.h5ad') == [0, programs, programs]
  assert os.listdir(folder / 'cache') == ['genecompass_jax']
