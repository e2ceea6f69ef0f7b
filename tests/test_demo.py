"""The demo, end to end on few cells and steps; what it refuses, and resumes."""

import argparse
import json
import warnings

import anndata
import numpy as np
import pyarrow.parquet
import pytest

from genecompass_jax import cli, corpus, demo as demo_lib, metrics, pretrained
from genecompass_jax.analysis import figures
from genecompass_jax.demo import files, plans, pretraining, scores
from genecompass_jax.prepare import pbmc68k
from genecompass_jax.tasks import cell_types


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Few simulated cells, one seed, and no UMAP (tests/test_figures.py)."""
  monkeypatch.setattr(plans, 'SIMULATED_CELLS', 360)
  monkeypatch.setattr(plans, 'PROBE_CELLS', 120)
  monkeypatch.setattr(pretraining, 'EVALUATIONS', 1)
  monkeypatch.setattr(pretraining, 'EVALUATION_CELLS', 16)
  monkeypatch.setattr(scores, 'CONFIG', cell_types.ProbeConfig(seeds=(0,)))
  monkeypatch.setattr(
    figures, 'umap', lambda features_CD, seed: np.asarray(features_CD)[:, :2]
  )


def demo(*arguments):
  return cli.main(['demo', *map(str, arguments)])


@pytest.fixture(scope='module')
def blood():
  return pbmc68k.blood_cells()


def test_default_demo_from_cells_to_pictures_and_again(tmp_path, capsys):
  folder = tmp_path / 'out'
  assert demo('-o', folder, '--steps', 5) == 0
  said = capsys.readouterr().out
  for number in range(1, 7):
    assert f'{number}/6  ' in said
  # what the table is, in print
  for words in ('one donor', '765 selected genes', 'no winner', 'LEAKY'):
    assert words in said
  for name in ('umap.png', 'learning.png'):
    assert (folder / name).read_bytes().startswith(b'\x89PNG')

  table = pyarrow.parquet.read_table(folder / 'results.parquet').to_pylist()
  results = json.loads((folder / 'results.json').read_text())
  assert len(table) == len(results['rows']) > 0
  assert {row['method'] for row in table} == {
    scores.PCA,
    scores.RANDOM,
    scores.MEAN,
    scores.CLS,
  }
  model = pretrained.load(folder / 'run')
  assert model.step == 5
  hashes = {r['checkpoint'] for r in table if r['method'] == scores.MEAN}
  assert hashes == {model.sha256}

  # Held-out cells, and only they, were embedded.
  built = corpus.Corpus.open(folder / 'corpus')
  assert built.manifest['split']['leaky']
  embedded = anndata.read_h5ad(folder / 'embeddings.h5ad')
  assert embedded.obsm['X_genecompass'].shape == (embedded.n_obs, 64)
  trained_on = set(built.store('train', 0).cell_names())
  assert embedded.n_obs == 120
  assert not trained_on & set(embedded.obs_names)
  for row in table:  # simulated donors are not leaky, blood cells are
    assert row['contaminated'] == (row['dataset'] == 'blood cells')

  # Again: it goes on from what is done. Other steps: anew.
  lines = len(metrics.read(folder / 'run'))
  (folder / 'mine.txt').write_text('kept')
  assert demo('-o', folder, '--steps', 5) == 0
  assert 'goes on from what is done' in capsys.readouterr().out
  steps = [
    line['step'] for line in metrics.read(folder / 'run') if 'loss' in line
  ]
  assert steps == [1, 2, 3, 4, 5]
  assert lines < len(metrics.read(folder / 'run')) < lines + 4  # events alone
  assert (folder / 'mine.txt').read_text() == 'kept'


def test_a_demo_of_other_cells_or_steps_starts_anew(tmp_path):
  folder = tmp_path / 'out'
  for name in ('corpus', 'run'):
    (folder / name).mkdir(parents=True)
  (folder / 'umap.png').write_text('old')
  (folder / 'mine.txt').write_text('kept')
  (folder / 'demo.json').write_text('{"steps": 5}')
  is_new, what = files.open_folder(str(folder), {'steps': 4})
  assert is_new and 'started anew' in what
  assert sorted(p.name for p in folder.iterdir()) == ['demo.json', 'mine.txt']
  is_new, what = files.open_folder(str(folder), {'steps': 4})
  assert not is_new and 'goes on' in what


@pytest.mark.parametrize('kind', ['labels and donors', 'nothing'])
def test_a_file_of_ones_own(blood, kind, tmp_path, capsys):
  cells = blood.copy()
  if kind == 'nothing':
    del cells.obs['cell_type']
  else:
    cells.obs['Donor'] = np.arange(cells.n_obs) % 4
  cells.write_h5ad(tmp_path / 'mine.h5ad')
  arguments = ('--data', tmp_path / 'mine.h5ad', '--steps', 3)
  assert demo('-o', tmp_path / 'out', *arguments) == 0
  said = capsys.readouterr().out
  built = corpus.Corpus.open(tmp_path / 'out' / 'corpus')
  assert built.manifest['split']['leaky'] == (kind == 'nothing')
  if kind == 'nothing':
    assert 'no obs column of cell types' in said and 'LEAKY' in said
    assert not (tmp_path / 'out' / 'results.parquet').exists()
  else:
    assert "Whole units of obs['Donor']" in said and 'LEAKY' not in said
    path = tmp_path / 'out' / 'results.parquet'
    table = pyarrow.parquet.read_table(path).to_pylist()
    assert {row['split'] for row in table} == {cell_types.LEAVE_UNIT_OUT}
    assert all(np.isnan(row['ci_low']) for row in table)  # two units
  assert (tmp_path / 'out' / 'umap.png').exists()


def bad_file(kind, blood, folder):
  path = folder / 'bad.h5ad'
  if kind == 'no such file':
    return path
  if kind == 'not an h5ad':
    path.write_text('cells')
    return path
  cells = blood.copy()
  if kind == 'log-transformed':
    cells.X = cells.X.log1p()
  elif kind == 'the demo needs at least':
    cells = cells[:50].copy()
  elif kind == 'a value that is not an integer':  # found while reading all
    matrix = cells.X.tolil()
    matrix[650, 3] = 0.5
    cells.X = matrix.tocsr()
  elif kind == 'no cell passed the filters':
    cells.X = (cells.X > 100).astype(np.float32)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    cells.write_h5ad(path)
  return path


@pytest.mark.parametrize(
  'kind',
  [
    'no such file',
    'not an h5ad',
    'log-transformed',
    'the demo needs at least',
    'a value that is not an integer',
    'no cell passed the filters',
  ],
)
def test_bad_files_are_refused_in_one_line_and_leave_nothing(
  kind, blood, tmp_path, capsys
):
  path = bad_file(kind, blood, tmp_path)
  assert demo('-o', tmp_path / 'out', '--data', path) == 2
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert kind in message
  assert not (tmp_path / 'out').exists()


def test_what_to_do_next_takes_the_flags_of_the_cells(monkeypatch):
  args = argparse.Namespace(
    data='my cells.h5ad',
    species='obs:species',
    ids_of='human',
    layer='',
    allow_noninteger=False,
  )
  said = demo_lib._next_steps(args, 'demo/run')
  assert (
    "embed 'my cells.h5ad' -o OUT.h5ad --checkpoint demo/run "
    '--species obs:species --ids-of human\n'
  ) in said
  assert '-o CORPUS --species obs:species --ids-of human\n' in said
  assert "gc.embed(adata, model, species='obs:species', ids_of='human')" in said
  args.data = ''
  monkeypatch.setenv('PATH', '')
  said = demo_lib._next_steps(args, 'demo/run')
  assert 'embed CELLS.h5ad -o OUT.h5ad --checkpoint demo/run\n' in said


def test_a_folder_that_is_not_of_a_demo_is_left_alone(tmp_path, capsys):
  (tmp_path / 'thesis.txt').write_text('years of work')
  assert demo('-o', tmp_path) == 2
  assert 'not of a demo' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_counts_of_the_blood_cells_are_those_of_the_source(blood, real_data):
  path = real_data / 'pbmc68k_reduced_counts' / 'pbmc68k_reduced_counts.h5ad'
  expected = anndata.read_h5ad(path)
  assert list(blood.obs_names) == list(expected.obs_names)
  assert list(blood.var_names) == list(expected.var_names)
  assert (blood.X != expected.X).nnz == 0
  assert blood.obs['cell_type'].tolist() == expected.obs['cell_type'].tolist()


def test_logs_that_are_not_of_counts_are_refused(blood):
  totals_C = blood.obs['total'].to_numpy()
  counts_CG = blood.X.toarray()
  logs_CG = np.log1p(counts_CG * 1e4 / totals_C[:, None]).round(3)
  np.testing.assert_array_equal(
    pbmc68k.counts_of_logs(logs_CG.astype(np.float32), totals_C), counts_CG
  )
  logs_CG[5, np.flatnonzero(counts_CG[5])[0]] += 0.004
  with pytest.raises(ValueError, match='cell 5'):
    pbmc68k.counts_of_logs(logs_CG, totals_C)


def test_without_scanpy_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setattr(pbmc68k.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'pip install .*\[demo\]'):
    pbmc68k.blood_cells()
