"""Embeddings of cells: the same however computed, and clear about mistakes."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import anndata
import h5py
import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import genecompass_jax as gc
from experiments.benchmarks import formats
from genecompass_jax import cli, encoding, errors, pretrained
from genecompass_jax.analysis import embeddings, placed_model
from genecompass_jax.prepare import sources
from tests.conftest import tiny_cells
from tests.faults import flip_a_bit

NUM = 40
COLUMNS = {
  'gc_n_genes_used',
  'gc_share_umi_mapped',
  'gc_share_umi_truncated',
  'gc_species',
}


@pytest.fixture(scope='module')
def human():
  """Human cells of 8 to 90 genes, and some genes that no one knows."""
  adata = tiny_cells(NUM, seed=7)
  rng = np.random.default_rng(0)
  dense = adata.X.toarray()
  dense *= rng.random(dense.shape) < np.linspace(0.1, 1.0, NUM)[:, None]
  dense[-5:] += 1  # longer than the cut
  unknown = rng.poisson(0.5, (NUM, 10)).astype(np.float32)
  var = pd.DataFrame(index=[*adata.var_names, *(f'LOST{i}' for i in range(10))])
  matrix = scipy.sparse.csr_matrix(np.concatenate([dense, unknown], 1))
  return anndata.AnnData(matrix, adata.obs, var)


@pytest.fixture
def cells(human):
  return human.copy()


@pytest.fixture(scope='module')
def mouse():
  return tiny_cells(NUM, species=1, seed=8)


@pytest.fixture(scope='module')
def expected(human, model):
  """Each cell encoded, laid out and run by itself, without `embed`."""
  return by_hand(human, model, 0)


def by_hand(adata, model, species):
  vocab, assets = model.vocabulary, model.assets
  token_of = dict(zip(adata.var_names, vocab.tokens(list(adata.var_names))))
  known = np.array([token_of[name] >= 0 for name in adata.var_names])
  matrix = scipy.sparse.csr_matrix(adata.X[:, known])
  encoder = encoding.CellEncoder(
    assets.encoding,
    np.array([t for t in token_of.values() if t >= 0], np.int32),
    assets.medians.divisor_V(species),
  )
  encoded = encoder.encode(
    encoding.RaggedCells(
      matrix.indices.astype(np.int32),
      matrix.data.astype(np.float64),
      matrix.indptr.astype(np.int64),
      np.asarray(adata.X.sum(1)).ravel().astype(np.float64),
    )
  )
  gene_ids = np.zeros((adata.n_obs, 63), np.int32)
  values = np.zeros((adata.n_obs, 63), np.float32)
  for c, (a, b) in enumerate(zip(encoded.starts_C1, encoded.starts_C1[1:])):
    gene_ids[c, : b - a] = encoded.gene_ids_N[a:b]
    values[c, : b - a] = encoded.values_N[a:b]
  batch = gc.cell_batch(gene_ids, values, species)
  hidden = np.asarray(model.hidden_states(batch))
  lengths = np.diff(encoded.starts_C1)
  mean = [hidden[c, 1 : 1 + n].mean(0) for c, n in enumerate(lengths)]
  kept = [
    adata.X[c]
    .toarray()
    .ravel()[
      [
        g
        for g, name in enumerate(adata.var_names)
        if token_of[name] in gene_ids[c, :n]
      ]
    ]
    .sum()
    for c, n in enumerate(lengths)
  ]
  return {
    'cls': hidden[:, 0],
    'mean': np.array(mean),
    'lengths': lengths,
    'mapped': np.asarray(adata.X[:, known].sum(1)).ravel(),
    'total': np.asarray(adata.X.sum(1)).ravel(),
    'kept': np.array(kept),
  }


# The same numbers however they are computed


@pytest.mark.parametrize('pooling', embeddings.POOLINGS)
def test_embeddings_are_states_of_the_model(cells, model, expected, pooling):
  adata = cells.copy()
  adata.obsm['X_genecompass'] = gc.embed(adata, model, pooling=pooling)
  result = adata.obsm['X_genecompass']
  assert result.dtype == np.float32
  np.testing.assert_allclose(result, expected[pooling], atol=1e-5)
  assert result.std(0).min() > 1e-3


def test_mouse_cells_have_the_species_vector_of_mouse(mouse, model):
  found = gc.embed_cells(mouse, model)
  assert set(found.obs['gc_species']) == {'mouse'}
  np.testing.assert_allclose(
    found.embeddings_CD, by_hand(mouse, model, 1)['cls'], atol=1e-5
  )


def test_order_batch_and_chunks_change_nothing(
  cells, model, expected, monkeypatch
):
  order = np.random.default_rng(1).permutation(NUM)
  np.testing.assert_allclose(
    gc.embed(cells[order].copy(), model), expected['cls'][order], atol=1e-5
  )
  columns = np.random.default_rng(2).permutation(cells.n_vars)
  np.testing.assert_allclose(
    gc.embed(cells[:, columns].copy(), model), expected['cls'], atol=1e-5
  )
  np.testing.assert_allclose(
    gc.embed(cells[7].copy(), model, batch_size=1),
    expected['cls'][7:8],
    atol=1e-5,
  )
  chunks = sources.CellStream.chunks
  monkeypatch.setattr(
    sources.CellStream, 'chunks', lambda self: chunks(self, cells=3)
  )
  monkeypatch.setattr(placed_model, 'BUCKETS', (16, 48))
  np.testing.assert_allclose(
    gc.embed(cells, model, batch_size=5), expected['cls'], atol=1e-5
  )


def test_a_file_equals_cells_in_memory(cells, model, tmp_path):
  found = gc.embed_cells(cells, model)
  for name, matrix in (
    ('csr', cells.X),
    ('csc', scipy.sparse.csc_matrix(cells.X)),
    ('dense', cells.X.toarray().astype(np.int64)),
  ):
    path = tmp_path / f'{name}.h5ad'
    anndata.AnnData(matrix, cells.obs, cells.var).write_h5ad(path)
    from_file = gc.embed_cells(path, model)
    np.testing.assert_array_equal(from_file.embeddings_CD, found.embeddings_CD)
    for column in COLUMNS:
      np.testing.assert_array_equal(from_file.obs[column], found.obs[column])


DEVICES = textwrap.dedent("""
  import sys
  import jax, numpy as np
  import genecompass_jax as gc

  model, devices = gc.load(sys.argv[1]), jax.devices()
  for number in (1, 2, 8):
    jax.local_devices = lambda: devices[:number]
    found = gc.embed(sys.argv[2], model, batch_size=9)
    np.save(f'{sys.argv[3]}/{number}.npy', found)
""")


def test_more_devices_change_nothing(trained, cells, expected, tmp_path):
  cells.write_h5ad(tmp_path / 'cells.h5ad')
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8'
  arguments = [str(trained), f'{tmp_path}/cells.h5ad', str(tmp_path)]
  subprocess.run(
    [sys.executable, '-c', DEVICES, *arguments],
    env={**os.environ, 'XLA_FLAGS': flags},
    check=True,
  )
  for number in (1, 2, 8):
    found = np.load(tmp_path / f'{number}.npy')
    np.testing.assert_allclose(found, expected['cls'], atol=1e-5)


# What is said about the cells


def test_columns_and_provenance(cells, model, expected, trained):
  adata = cells.copy()
  gc.embed(adata, model)
  assert set(adata.obs) == {*cells.obs, *COLUMNS}
  np.testing.assert_array_equal(
    adata.obs['gc_n_genes_used'], expected['lengths']
  )
  np.testing.assert_allclose(
    adata.obs['gc_share_umi_mapped'],
    expected['mapped'] / expected['total'],
    rtol=1e-5,
  )
  lost = 1 - expected['kept'] / expected['mapped']
  np.testing.assert_allclose(
    adata.obs['gc_share_umi_truncated'], lost, atol=1e-5
  )
  is_cut = expected['lengths'] == 63
  assert 0 < is_cut.sum() < NUM
  assert (adata.obs['gc_share_umi_truncated'][~is_cut] == 0).all()
  assert set(adata.obs['gc_species']) == {'human'}
  uns = adata.uns['genecompass']
  assert uns['checkpoint'] == model.sha256
  assert uns['checkpoint_step'] == 40
  assert uns['vocabulary'] == model.vocabulary.sha256
  assert uns['medians'] == model.assets.medians.sha256
  assert uns['encoding']['mode'] == 'released'
  assert (uns['pooling'], uns['layer']) == ('cls', 'X')
  assert uns['genecompass_jax'] == gc.__version__
  assert json.dumps(uns)


def test_genes_outside_of_the_vocabulary_change_nothing(cells, model):
  table = gc.GeneTable.default()
  known = set(cells.var_names)
  others = [
    gene
    for gene, species, biotype in zip(
      table.gene_ids, table.species_G, table.biotypes
    )
    if not species and biotype == 'protein_coding' and gene not in known
  ][:5000]
  wide = anndata.concat(
    [
      cells,
      anndata.AnnData(
        np.ones((NUM, 5000), np.float32),
        cells.obs,
        pd.DataFrame(index=others),
      ),
    ],
    axis=1,
  )
  np.testing.assert_allclose(
    gc.embed(wide, model, species='human'),
    gc.embed(cells, model, species='human'),
    atol=1e-5,
  )
  assert (wide.obs['gc_share_umi_mapped'] < 0.1).all()


def test_species_of_a_column(cells, mouse, model):
  adata = cells[:, :90].copy()
  adata.obs['organism'] = 'Homo sapiens'
  found = gc.embed_cells(adata, model, species='obs:organism')
  assert set(found.obs['gc_species']) == {'human'}
  # Mouse cells that carry the names of their human orthologues.
  adata.obs['organism'] = ['human', 'mouse'] * (NUM // 2)
  both = gc.embed_cells(adata, model, species='obs:organism', ids_of='human')
  assert list(both.obs['gc_species']) == list(adata.obs['organism'])
  np.testing.assert_allclose(
    both.embeddings_CD[::2], found.embeddings_CD[::2], atol=1e-5
  )
  assert np.abs(both.embeddings_CD - found.embeddings_CD)[1::2].min(1).all()


# The command


def run(arguments, capsys):
  code = cli.main(['embed', *map(str, arguments)])
  output = capsys.readouterr()
  return code, output.out.strip(), output.err.strip().splitlines()


def test_the_command_adds_to_a_copy(cells, model, trained, tmp_path, capsys):
  adata = cells.copy()
  adata.obsm['X_pca'] = np.ones((NUM, 2))
  adata.layers['log'] = adata.X.log1p()
  adata.write_h5ad(tmp_path / 'in.h5ad')
  before = (tmp_path / 'in.h5ad').read_bytes()
  out = tmp_path / 'out.h5ad'
  common = ['--checkpoint', trained, '--batch-size', 7]
  code, said, _ = run([tmp_path / 'in.h5ad', '-o', out, *common], capsys)
  assert code == 0
  assert said.startswith(f"{out}: obsm['X_genecompass'] of 40 cells x 32")
  assert 'counts from X' in said
  assert (tmp_path / 'in.h5ad').read_bytes() == before
  found = anndata.read_h5ad(out)
  expected = gc.embed_cells(cells, model)
  np.testing.assert_allclose(
    found.obsm['X_genecompass'], expected.embeddings_CD, atol=1e-5
  )
  assert list(found.obs_names) == list(cells.obs_names)
  assert set(found.obs) == {*cells.obs, *COLUMNS}
  assert set(found.obsm) == {'X_pca', 'X_genecompass'}
  assert abs(found.X - cells.X).nnz == 0
  assert 'log' in found.layers
  assert found.uns['genecompass']['checkpoint'] == model.sha256
  # Once more: refused, then allowed.
  code, _, lines = run([tmp_path / 'in.h5ad', '-o', out, *common], capsys)
  assert code == errors.EXIT_USAGE
  assert '--overwrite' in lines[-1]
  common += ['--overwrite', '--pooling', 'mean', '--species', 'human']
  code, said, _ = run([out, '-o', out, *common], capsys)
  assert code == 0
  again = anndata.read_h5ad(out)
  assert again.uns['genecompass']['pooling'] == 'mean'
  assert np.abs(again.obsm['X_genecompass'] - found.obsm['X_genecompass']).any()


def changed(adata, function):
  adata = adata.copy()
  matrix = adata.X.toarray()
  adata.X = scipy.sparse.csr_matrix(function(matrix).astype(np.float32))
  return adata


def with_value(value):
  def function(matrix):
    matrix[3, 5] = value
    return matrix

  return function


def renamed(adata):
  adata = adata.copy()
  names = [f'X{i}' for i in range(adata.n_vars)]
  names[:40] = adata.var_names[:40]
  adata.var_names = names
  return adata


BAD_CELLS = {
  'log': (lambda a: changed(a, np.log1p), 'log-transformed', []),
  'negative': (lambda a: changed(a, with_value(-1)), 'negative', []),
  'infinite': (lambda a: changed(a, with_value(np.inf)), 'not finite', []),
  'nan': (lambda a: changed(a, with_value(np.nan)), 'not finite', []),
  'corrected': (lambda a: changed(a, lambda x: x * 9.3), 'allow_nonint', []),
  'empty': (lambda a: a[:0].copy(), 'no cells', []),
  'no genes': (lambda a: a[:, :0].copy(), 'no genes', []),
  'unknown': (renamed, 'identifier', []),
  'wrong species': (lambda a: a, 'mouse', ['--species', 'mouse']),
  'no column': (lambda a: a, 'no such obs', ['--species', 'obs:none']),
  'no layer': (lambda a: a, "no layer 'none'", ['--layer', 'none']),
  'odd species': (lambda a: a, 'give human, mouse', ['--species', 'rat']),
}


@pytest.mark.parametrize('name', BAD_CELLS)
def test_cells_that_are_no_counts_of_known_genes(
  name, cells, trained, tmp_path, capsys
):
  make, message, flags = BAD_CELLS[name]
  make(cells[:, :90]).write_h5ad(tmp_path / 'in.h5ad')
  code, said, lines = run(
    [
      *(tmp_path / 'in.h5ad', '-o', tmp_path / 'out.h5ad'),
      *('--checkpoint', trained, *flags),
    ],
    capsys,
  )
  assert code == errors.EXIT_USAGE
  assert not said
  assert message in lines[-1]
  assert len([line for line in lines if 'embedding' not in line]) == 1
  assert os.listdir(tmp_path) == ['in.h5ad']


def test_a_bad_value_deep_in_a_file_leaves_no_output(trained, tmp_path, capsys):
  adata = tiny_cells(2600)
  matrix = adata.X.copy()
  matrix.data[len(matrix.data) // 14] = -3  # between what is sampled
  row = np.searchsorted(matrix.indptr, len(matrix.data) // 14, 'right') - 1
  anndata.AnnData(matrix, adata.obs, adata.var).write_h5ad(tmp_path / 'in.h5ad')
  code, _, lines = run(
    [
      *(tmp_path / 'in.h5ad', '-o', tmp_path / 'out.h5ad'),
      *('--checkpoint', trained),
    ],
    capsys,
  )
  assert code == errors.EXIT_USAGE
  assert f'a negative value, in cell cell{row} (row {row})' in lines[-1]
  assert os.listdir(tmp_path) == ['in.h5ad']


def test_the_hint_names_the_layer_that_looks_like_counts(
  cells, model, trained, tmp_path, capsys
):
  adata = changed(cells, np.log1p)
  adata.layers['umi'] = cells.X
  adata.write_h5ad(tmp_path / 'in.h5ad')
  common = [tmp_path / 'in.h5ad', '-o', tmp_path / 'out.h5ad']
  common += ['--checkpoint', trained]
  code, _, (line,) = run([*common, '--layer', 'X'], capsys)
  assert code == errors.EXIT_USAGE
  assert 'layers/umi looks like counts: pass --layer layers/umi' in line
  code, said, _ = run(common, capsys)  # found by itself, and said so
  assert code == 0
  assert 'counts from layers/umi' in said
  np.testing.assert_allclose(
    anndata.read_h5ad(tmp_path / 'out.h5ad').obsm['X_genecompass'],
    gc.embed(cells, model),
    atol=1e-5,
  )


def test_files_that_are_no_h5ad(trained, tmp_path, capsys):
  text = tmp_path / 'text.h5ad'
  text.write_text('gene,count\n')
  pointer = tmp_path / 'pointer.h5ad'
  pointer.write_text('version https://git-lfs.github.com/spec/v1\n')
  other = tmp_path / 'other.h5ad'
  with h5py.File(other, 'w') as file:
    file['x'] = 1
  cut = tmp_path / 'cut.h5ad'
  tiny_cells(10).write_h5ad(cut)
  cut.write_bytes(cut.read_bytes()[:-5000])
  names = set(os.listdir(tmp_path))
  for path, message in (
    (text, 'not an h5ad'),
    (pointer, 'git lfs pull'),
    (other, 'no AnnData'),
    (cut, 'damaged'),
    (tmp_path, 'a folder'),
    (tmp_path / 'none.h5ad', 'no such file'),
  ):
    code, said, (line,) = run(
      [path, '-o', tmp_path / 'out.h5ad', '--checkpoint', trained], capsys
    )
    assert code == errors.EXIT_USAGE
    assert not said
    assert message in line
    assert str(path) in line
  assert set(os.listdir(tmp_path)) == names


def test_damaged_parts_of_a_file_are_one_line(cells, trained, tmp_path, capsys):
  def unknown_encoding(file):
    file['obs/cell_type'].attrs['encoding-type'] = 'of tomorrow'

  def no_offsets(file):
    del file['X/indptr']

  def no_shape(file):
    del file['X'].attrs['shape']

  def turned_beyond(file):
    turned = scipy.sparse.csc_matrix(cells.X)
    turned.indices[5] = 2_000_000_000
    del file['X']
    anndata.io.write_elem(file, 'X', turned)

  def text(file):
    del file['X']
    file['X'] = np.full(cells.shape, b'text')

  names = ['in.h5ad']
  for spoil in (unknown_encoding, no_offsets, no_shape, turned_beyond, text):
    cells.write_h5ad(tmp_path / 'in.h5ad')
    with h5py.File(tmp_path / 'in.h5ad', 'a') as file:
      spoil(file)
    code, said, lines = run(
      [
        *(tmp_path / 'in.h5ad', '-o', tmp_path / 'out.h5ad'),
        *('--checkpoint', trained, '--layer', 'X'),
      ],
      capsys,
    )
    assert code == errors.EXIT_USAGE, spoil
    assert 'in.h5ad' in lines[-1] or lines[-1].startswith('in: X holds')
    assert os.listdir(tmp_path) == names
  # A layer that nobody asked for may be anything.
  cells.write_h5ad(tmp_path / 'in.h5ad')
  with h5py.File(tmp_path / 'in.h5ad', 'a') as file:
    file.create_group('layers/odd')
  gc.embed(tmp_path / 'in.h5ad', gc.load(trained))


def test_cells_of_none_of_the_genes_are_refused(model, cells, caplog):
  table = gc.GeneTable.default()
  known = set(model.vocabulary.genes.gene_ids)
  others = [
    gene
    for gene, species in zip(table.gene_ids, table.species_G)
    if not species and gene not in known
  ]
  strange = cells[:, :90].copy()
  strange.var_names = others[:90]
  with pytest.raises(errors.UserError, match='none of its 90 genes'):
    gc.embed(strange, model)
  strange.var_names = [*cells.var_names[:9], *others[:81]]
  gc.embed(strange, model)
  assert 'knows the genes of only' in caplog.text


def test_a_link_to_the_output_stays_a_link(cells, trained, tmp_path, capsys):
  cells.write_h5ad(tmp_path / 'in.h5ad')
  (tmp_path / 'link.h5ad').symlink_to(tmp_path / 'real.h5ad')
  code, _, _ = run(
    [
      *(tmp_path / 'in.h5ad', '-o', tmp_path / 'link.h5ad'),
      *('--checkpoint', trained),
    ],
    capsys,
  )
  assert code == 0
  assert (tmp_path / 'link.h5ad').is_symlink()
  found = anndata.read_h5ad(tmp_path / 'real.h5ad')
  assert 'X_genecompass' in found.obsm


def test_outputs_that_cannot_be_are_refused_first(trained, tmp_path, capsys):
  cells = tmp_path / 'in.h5ad'
  tiny_cells(5).write_h5ad(cells)
  out = tmp_path / 'no' / 'out.h5ad'
  code, _, (line,) = run([cells, '-o', out, '--checkpoint', trained], capsys)
  assert code == errors.EXIT_USAGE
  assert 'no such folder' in line
  code, _, (line,) = run([cells, '-o', cells, '--checkpoint', trained], capsys)
  assert code == errors.EXIT_USAGE
  assert 'exists' in line
  for url in ('s3://bucket/out.h5ad', 'https://host/out.h5ad'):
    code, _, (line,) = run([cells, '-o', url, '--checkpoint', trained], capsys)
    assert code == errors.EXIT_USAGE and 'local disks only' in line


def test_what_is_no_place_of_cells(model):
  for data in (None, np.ones((3, 4))):
    with pytest.raises(errors.UserError, match='cells are an AnnData, or the'):
      gc.embed(data, model)
  for options in ({'batch_size': 1.5}, {'block': '1'}, {'batch_size': True}):
    with pytest.raises(errors.UserError, match='must be a whole number'):
      gc.embed(tiny_cells(2), model, **options)


def test_checkpoints_that_cannot_be_trusted(trained, tmp_path, capsys):
  cells = tmp_path / 'in.h5ad'
  tiny_cells(5).write_h5ad(cells)

  def refused(checkpoint):
    code, said, (line,) = run(
      [cells, '-o', tmp_path / 'out.h5ad', '--checkpoint', checkpoint], capsys
    )
    assert code == errors.EXIT_USAGE
    assert not said
    assert not (tmp_path / 'out.h5ad').exists()
    return line

  assert 'no model here' in refused(tmp_path / 'none')
  assert 'no model here' in refused(tmp_path)
  run_dir = tmp_path / 'run'
  shutil.copytree(trained, run_dir)
  assert 'no step' in refused(run_dir / 'checkpoints' / 'last')
  assert '41' in refused(run_dir / 'checkpoints' / '41')
  for name in ('vocabulary.tsv.gz', 'medians.tsv', 'knowledge.npz'):
    flip_a_bit(run_dir / 'assets' / name)
    assert f'{name} is missing or was changed' in refused(run_dir)
    shutil.copy(trained / 'assets' / name, run_dir / 'assets')
  other = pretrained.load(trained)
  swapped = dict(other.assets.__dict__)
  genes = other.vocabulary.token_gene_ids()[2:-1]
  smaller = other.vocabulary.restrict(genes)
  swapped |= {'vocabulary': smaller, 'medians': None}
  from genecompass_jax import assets

  shutil.rmtree(run_dir / 'assets')
  assets.save(run_dir / 'assets', assets.Assets(**swapped))
  assert 'belongs to another model' in refused(run_dir)
  shutil.rmtree(run_dir / 'assets')
  shutil.copytree(trained / 'assets', run_dir / 'assets')
  for name, old, new in (
    ('assets/assets.json', '"max_genes": 63', '"max_genes": 13'),
    ('config.json', '"norm_epsilon": 1e-12', '"norm_epsilon": 0.1'),
  ):
    text = (run_dir / name).read_text()
    assert old in text
    (run_dir / name).write_text(text.replace(old, new))
    refused(run_dir)
    (run_dir / name).write_text(text)
  shutil.rmtree(run_dir / 'assets')
  assert 'cannot be read' in refused(run_dir)
  shutil.copytree(trained / 'assets', run_dir / 'assets')
  for step in (run_dir / 'checkpoints').glob('*'):
    if step.is_dir():
      shutil.rmtree(step)
  assert 'no finished checkpoint yet' in refused(run_dir)


def test_a_step_a_workdir_and_an_export_give_the_same(
  cells, trained, tmp_path, expected
):
  moved = tmp_path / 'moved'
  shutil.copytree(trained, moved)
  pretrained.export(gc.load(moved), tmp_path / 'export')
  folders = moved, moved / 'checkpoints' / '40', tmp_path / 'export'
  for folder in folders:
    model = gc.load(folder)
    np.testing.assert_array_equal(
      gc.embed(cells, model), gc.embed(cells, gc.load(trained))
    )
    assert model.step == 40
  earlier = gc.load(moved / 'checkpoints' / '5')
  assert earlier.step == 5
  assert np.abs(gc.embed(cells, earlier) - expected['cls']).max() > 1e-3
  with pytest.raises(errors.UserError, match='is not empty'):
    pretrained.export(earlier, tmp_path / 'export')


def test_a_model_without_vocabulary_cannot_embed(cells, model):
  bare = model.replace(
    assets=type(model.assets)(knowledge=model.assets.knowledge)
  )
  with pytest.raises(errors.UserError, match='without vocabulary'):
    gc.embed(cells, bare)
  with pytest.raises(errors.UserError, match='give cls or mean'):
    gc.embed(cells, model, pooling='max')


def test_the_facade_answers():
  assert jax.__version__
  assert pathlib.Path(gc.__file__).is_file()
  for name in gc.__all__:
    assert getattr(gc, name) is not None
  assert set(gc.__all__) <= set(dir(gc))
  with pytest.raises(AttributeError):
    gc.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize('kind', ['zarr3', '10x 3', 'mtx.gz'])
def test_cells_of_other_formats(cells, model, trained, tmp_path, capsys, kind):
  formats.WRITERS[kind](cells, str(tmp_path / 'cells'))
  path = tmp_path / f'cells{formats.PATHS[kind]}'
  expected = gc.embed_cells(cells, model)
  labels = pd.DataFrame({'label': ['a', 'b'] * (NUM // 2)}, cells.obs_names)
  labels.to_csv(tmp_path / 'labels.csv')
  out = tmp_path / 'out.h5ad'
  arguments = [path, '-o', out, '--checkpoint', trained, '--obs-table']
  code, said, _ = run([*arguments, tmp_path / 'labels.csv'], capsys)
  assert code == 0 and 'counts from X' in said
  found = anndata.read_h5ad(out)
  np.testing.assert_array_equal(
    found.obsm['X_genecompass'], gc.embed(path, model)
  )
  np.testing.assert_allclose(
    found.obsm['X_genecompass'], expected.embeddings_CD, atol=1e-5
  )
  assert list(found.obs_names) == list(cells.obs_names)
  assert {'label', *COLUMNS} <= set(found.obs)
  assert found.uns['genecompass']['checkpoint'] == model.sha256


def test_embeddings_that_are_not_finite_are_told(model):
  params = jax.tree.map(lambda x: x, model.params)
  bias = params['embedding']['fuse_bias']
  params['embedding']['fuse_bias'] = bias * np.nan
  with pytest.raises(errors.UserError, match='cell 0 .* is not finite'):
    gc.embed(tiny_cells(2), model.replace(params=params))
