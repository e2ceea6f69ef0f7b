import argparse
import dataclasses
import os
import pathlib
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from genecompass_jax import (
  cli,
  corpus,
  errors,
  gene_table,
  paths,
  vocabulary,
)
from genecompass_jax.prepare import (
  command,
  matrices,
  pipeline,
  quality,
  reports,
  sources,
)

OFF = quality.QualityConfig.off()
GENES = 80
ROOT = pathlib.Path(__file__).resolve().parents[1]


def gene_names(species=0, num=GENES):
  table = gene_table.GeneTable.default()
  rows = np.flatnonzero(table.species_G == species)[: 60 * num : 60]
  return [table.gene_ids[g] for g in rows]


def make(num_cells=400, seed=0, species=0, donors=8, scale=1.0):
  rng = np.random.default_rng(seed)
  matrix = scipy.sparse.random(
    num_cells,
    GENES,
    0.4,
    format='csr',
    random_state=rng,
    data_rvs=lambda n: rng.geometric(0.2, n).astype(np.float32),
  )
  matrix.data = (matrix.data * scale).astype(np.float32)
  obs = pd.DataFrame(
    {
      'donor': [f'd{d}' for d in rng.integers(0, donors, num_cells)],
      'cell_type': rng.choice(['T', 'B', None], num_cells),
    },
    index=[f's{seed}c{i}' for i in range(num_cells)],
  )
  var = pd.DataFrame(index=gene_names(species))
  return anndata.AnnData(matrix, obs, var)


def source(adata, name='a', unit='donor', **kwargs):
  config = sources.SourceConfig(name=name, unit=unit, **kwargs)
  return sources.from_anndata(adata, config)


def prepare(opened, path, filters=OFF, **kwargs):
  config = pipeline.PrepareConfig(
    vocabulary='measured', filters=filters, **kwargs
  )
  return pipeline.prepare(opened, path, config)


def cells_of(built, split, species):
  """source, source_row, unit and dense counts of a store."""
  store = built.store(split, species)
  if store is None:
    return pd.DataFrame({'name': [], 'row': []}), np.zeros((0, GENES))
  blocks = store.read_blocks(range(store.num_blocks))
  num_rows = len(built.gene_ids(species))
  dense = scipy.sparse.vstack(
    [
      scipy.sparse.csr_matrix(
        (b.counts_N, b.gene_rows_N.astype(int), b.starts_C1),
        shape=(b.num_cells, num_rows),
      )
      for b in blocks
    ]
  ).toarray()
  labels = {
    name: np.array([*store.categories(name), None], object)[store.obs(name)]
    for name in store.obs_names
    if name != 'source_row'
  }
  labels['row'] = store.obs('source_row')
  labels['name'] = store.cell_names()
  labels['total'] = np.concatenate([b.totals_C for b in blocks])
  return pd.DataFrame(labels), dense


def files_of(path):
  root = pathlib.Path(path)
  return {
    str(p.relative_to(root)): p.read_bytes()
    for p in sorted(root.rglob('*'))
    if p.is_file() and p.name != 'build.json'
  }


def test_every_cell_arrives_once_with_its_labels(tmp_path):
  human, mouse = make(400), make(150, seed=1, species=1)
  del mouse.obs['cell_type']  # a column that one source lacks
  built = prepare(
    [
      source(human, 'h', obs=('cell_type',)),
      source(mouse, 'm', dataset='study'),
    ],
    tmp_path / 'c',
  )
  assert not built.verify()
  assert built.splits == ('train', 'validation')
  for species, adata, name in ((0, human, 'h'), (1, mouse, 'm')):
    parts = [cells_of(built, split, species) for split in built.splits]
    labels = pd.concat([p[0] for p in parts], ignore_index=True)
    dense = np.concatenate([p[1] for p in parts])
    assert sorted(labels['row']) == list(range(adata.n_obs))
    assert (labels['source'] == name).all()
    row = labels['row'].to_numpy()
    order = [built.gene_ids(species).index(i) for i in gene_names(species)]
    np.testing.assert_array_equal(dense[:, order], adata.X[row].toarray())
    assert labels['name'].tolist() == adata.obs_names[row].tolist()
    dataset = 'study' if name == 'm' else 'h'
    donors = [f'{dataset}:{d}' for d in adata.obs['donor'].iloc[row]]
    assert labels['unit'].tolist() == donors
    np.testing.assert_array_equal(labels['total'], dense.sum(axis=1))
  labels, _ = cells_of(built, 'train', 0)
  types = human.obs['cell_type'].iloc[labels['row']]
  expected = types.astype(object).where(types.notna(), None).tolist()
  assert labels['cell_type'].tolist() == expected
  assert set(cells_of(built, 'train', 1)[0]['cell_type']) == {None}
  # shuffled: neighbours in the file are not neighbours in the corpus
  steps = np.abs(np.diff(labels['row'].to_numpy()))
  assert np.median(steps) > 50


def test_units_are_never_split(tmp_path):
  built = prepare([source(make(1000))], tmp_path / 'c', validation_share=0.2)
  train, _ = cells_of(built, 'train', 0)
  held, _ = cells_of(built, 'validation', 0)
  assert not set(train['unit']) & set(held['unit'])
  assert set(held['unit']) == set(built.manifest['split']['validation_units'])
  assert 0.1 < len(held) / 1000 < 0.31
  assert not built.manifest['split']['leaky']


def test_named_units(tmp_path):
  built = prepare(
    [source(make())],
    tmp_path / 'c',
    validation_units=('d3', 'a:d5'),
    test_units=('d1',),
  )
  assert built.splits == ('train', 'validation', 'test')
  held, _ = cells_of(built, 'validation', 0)
  assert set(held['unit']) == {'a:d3', 'a:d5'}
  assert set(cells_of(built, 'test', 0)[0]['unit']) == {'a:d1'}
  with pytest.raises(errors.UserError, match="no unit 'd9'; there are: a:d"):
    prepare([source(make())], tmp_path / 'd', validation_units=('d9',))
  everything = tuple(f'd{i}' for i in range(8))
  with pytest.raises(errors.UserError, match='none is left to train on'):
    prepare([source(make())], tmp_path / 'd', validation_units=everything)


def test_one_unit_is_not_split_silently(tmp_path):
  with pytest.raises(errors.UserError) as error:
    prepare([source(make(), unit='')], tmp_path / 'c')
  for word in ('all cells are of a', '--unit COLUMN', '--validation_share 0'):
    assert word in str(error.value)
  assert not list(tmp_path.iterdir())
  built = prepare([source(make(), unit='')], tmp_path / 'c', validation_share=0)
  assert built.splits == ('train',)


def test_single_cells_are_split_on_request_and_marked(tmp_path):
  built = prepare([source(make(2000), unit='cell')], tmp_path / 'c')
  assert built.manifest['split']['leaky']
  assert 140 < built.num_cells('validation') < 260
  assert 'LEAKY' in reports.describe(reports.read(tmp_path / 'c'))


def test_a_species_with_one_unit_is_said(tmp_path):
  built = prepare(
    [source(make()), source(make(90, 1, 1, donors=1), 'm')], tmp_path / 'c'
  )
  assert built.store('validation', 1) is None
  report = reports.read(tmp_path / 'c')
  assert 'no mouse unit can be held out' in reports.describe(report)


def test_the_last_unit_of_an_assay_stays_in_training(tmp_path):
  opened = [
    source(make(900), 'p', assay='panel'),
    source(make(60, 1), 'u', assay='umi', unit=''),
  ]
  for seed in range(4):
    built = prepare(opened, tmp_path / f'{seed}', seed=seed)
    assert built.manifest['medians_of'] == {'human': 'umi'}


def of_three_donors():
  """One of them of three cells: the filter of samples takes them all."""
  adata = make(240)
  adata.obs['donor'] = ['a'] * 130 + ['b'] * 107 + ['c'] * 3
  return source(adata)


FOUR = quality.QualityConfig(0, 0, 1.0, 0.0, 4)


def test_what_is_held_out_has_cells(tmp_path):
  """Of a, b and c the last alone is small enough, as it is read."""
  built = prepare([of_three_donors()], tmp_path / 'c', filters=FOUR)
  assert built.manifest['split']['validation_units'] == ['a:b']
  assert built.num_cells('validation') == 107


def test_a_named_unit_without_cells_is_told(tmp_path):
  units = ('c',)
  with pytest.raises(errors.UserError, match='no cell of c is left to hold'):
    prepare(
      [of_three_donors()], tmp_path / 'c', filters=FOUR, validation_units=units
    )
  assert not list(tmp_path.glob('c*'))
  prepare(
    [of_three_donors()],
    tmp_path / 'c',
    filters=FOUR,
    validation_units=('b', 'c'),
  )
  report = reports.read(tmp_path / 'c')
  assert any('no cell of c is left' in note for note in report['notes'])
  assert report['split']['validation_units'] == ['a:b']  # as `merge` reads it
  with pytest.raises(errors.UserError, match='every unit is held out'):
    prepare(
      [of_three_donors()],
      tmp_path / 'd',
      filters=FOUR,
      validation_units=('a', 'b'),
    )


def test_two_files_are_two_units(tmp_path):
  opened = [source(make(300, s), n, unit='') for s, n in enumerate('abc')]
  built = prepare(opened, tmp_path / 'c')
  assert len(built.manifest['split']['validation_units']) == 1
  assert built.num_cells('validation') == 300


def test_same_inputs_same_bytes(tmp_path):
  paths = []
  for seed in range(2):
    make(700, seed).write_h5ad(tmp_path / f's{seed}.h5ad')
    paths.append(str(tmp_path / f's{seed}.h5ad'))

  def build(name, **kwargs):
    opened = [sources.SourceConfig(p, unit='donor') for p in paths]
    prepare(opened, tmp_path / name, **kwargs)
    return files_of(tmp_path / name)

  first = build('a')
  assert first == build('b')
  # many buckets give the same order as one
  assert first == build('c', bucket_bytes=30_000)
  assert (
    first['train/human/counts/c/0/0']
    != (build('d', seed=1)['train/human/counts/c/0/0'])
  )


@pytest.mark.parametrize(
  ('how', 'scale', 'rel'),
  [('histogram', 1, 0.02), ('exact', 1, 1e-12), ('exact', 300, 1e-12)],
)
def test_medians_are_those_of_training_cells(tmp_path, how, scale, rel):
  adata = make(2000, scale=scale)
  built = prepare(
    [source(adata)], tmp_path / 'c', validation_share=0.3, medians=how
  )
  _, dense = cells_of(built, 'train', 0)
  token_R = built.tokens(0)
  released, library = built.medians('released'), built.medians('library')
  totals = dense.sum(axis=1, keepdims=True)
  for row in range(dense.shape[1]):
    values = dense[:, row]
    on = values > 0
    token = token_R[row]
    assert released.support_SV[0, token] == on.sum()
    if on.any():
      assert released.median_SV[0, token] == np.median(values[on])
      scaled = (values / totals[:, 0] * 1e4)[on]
      found = library.median_SV[0, token]
      assert found == pytest.approx(np.median(scaled), rel=rel)


@pytest.mark.parametrize(
  ('assays', 'used'),
  [
    (('panel', 'umi'), 'umi'),
    (('full_length', 'panel'), 'full_length'),
    (('panel', 'panel'), 'panel'),
    (('auto', 'auto'), 'panel'),  # 80 genes are a panel
  ],
)
def test_assays_do_not_mix_in_medians(tmp_path, assays, used):
  adatas = [make(500, 0), make(500, 1, scale=7)]
  opened = [
    source(adata, name, assay=assay)
    for adata, name, assay in zip(adatas, 'ab', assays)
  ]
  built = prepare(opened, tmp_path / 'c')
  assert built.manifest['medians_of'] == {'human': used}
  labels, dense = cells_of(built, 'train', 0)
  facts = {f['name']: f['assay'] for f in built.manifest['sources']}
  mine = np.array([facts[name] == used for name in labels['source']])
  support = built.medians('released').support_SV[0, built.tokens(0)]
  np.testing.assert_array_equal(support, (dense[mine] > 0).sum(axis=0))


def test_measured_genes_of_each_source(tmp_path):
  few = make(200, 1)[:, :30].copy()
  built = prepare([source(make()), source(few, 'few')], tmp_path / 'c')
  measured_SrcR = built.store('train', 0).measured_SrcR
  assert measured_SrcR.sum(axis=1).tolist() == [80, 30]
  ids = np.array(built.gene_ids(0))
  assert set(ids[measured_SrcR[1]]) == set(gene_names()[:30])


def test_what_a_vocabulary_leaves_out_is_reported(tmp_path):
  adata = make(200)
  names = gene_names()
  vocab = vocabulary.Vocabulary.default().restrict(names[:50])
  vocab.save(tmp_path / 'few.tsv.gz')
  config = pipeline.PrepareConfig(str(tmp_path / 'few.tsv.gz'), filters=OFF)
  pipeline.prepare([source(adata)], tmp_path / 'c', config)
  report = reports.read(tmp_path / 'c')
  genes = report['sources'][0]['genes']['human']
  assert genes['genes'] == GENES and genes['share_umis_lost'] == 0
  assert genes['genes_outside_vocabulary'] == GENES - 50
  share = adata.X[:, 50:].sum() / adata.X.sum()
  assert genes['share_umis_outside_vocabulary'] == pytest.approx(share)
  assert f'30 of these genes, {share:.2%} of the counts' in reports.describe(
    report
  )


def test_filters_apply_and_are_reported(tmp_path):
  adata = make(500)
  adata.X[:20] = 0
  adata.X.eliminate_zeros()
  filters = quality.QualityConfig(min_cells=0, max_sd=0)
  built = prepare([source(adata)], tmp_path / 'c', filters)
  (report,) = reports.read(tmp_path / 'c')['sources']
  counted = {
    f['name']: f['removed'] for f in report['quality']['human']['filters']
  }
  assert counted['min_genes'] == 20
  assert report['kept'] == 480 - counted['min_coding']
  total = built.num_cells('train') + built.num_cells('validation')
  assert total == report['kept']
  with pytest.raises(errors.UserError, match='no cell passed.*--min_coding'):
    prepare(
      [source(adata)], tmp_path / 'd', quality.QualityConfig(min_coding=79)
    )


def test_cells_without_a_known_gene_are_left_out(tmp_path):
  adata = make(300)
  adata.X[:7] = 0
  adata.X.eliminate_zeros()
  prepare([source(adata)], tmp_path / 'c')
  report = reports.read(tmp_path / 'c')
  assert report['sources'][0]['cells_without_known_genes'] == 7
  assert '7 cells without a known gene' in reports.describe(report)


def test_cells_of_no_counts_are_told_so(tmp_path):
  adata = make(300)
  adata.X = adata.X * 0
  with pytest.raises(errors.UserError, match='none of 300 cells expresses'):
    prepare([source(adata)], tmp_path / 'c', quality.QualityConfig.off())
  assert not list(tmp_path.iterdir())


def test_a_file_given_twice_is_refused(tmp_path, capsys):
  make(300).write_h5ad(tmp_path / 'a.h5ad')
  shutil.copy(tmp_path / 'a.h5ad', tmp_path / 'b.h5ad')
  files = [str(tmp_path / name) for name in ('a.h5ad', 'b.h5ad')]
  assert cli.main(['prep', 'h5ad', *files, '-o', str(tmp_path / 'c')]) == 2
  assert 'is the same file as' in capsys.readouterr().err


def test_units_that_cannot_be_held_out(tmp_path):
  opened = source(make(300), unit='donor')
  units = ('d0', 'd1')
  for kwargs, match in (
    ({'validation_units': units, 'test_units': units[:1]}, 'give one'),
    ({'test_units': ('donor',)}, 'no unit'),
  ):
    config = pipeline.PrepareConfig(vocabulary='measured', **kwargs)
    with pytest.raises(errors.UserError, match=match):
      pipeline.prepare([opened], tmp_path / 'c', config)
  by_cell = source(make(300), unit='cell')
  config = pipeline.PrepareConfig(
    vocabulary='measured', validation_units=('d0',)
  )
  with pytest.raises(errors.UserError, match='no units to name'):
    pipeline.prepare([by_cell], tmp_path / 'c', config)


def test_a_link_to_the_output_stays_a_link(tmp_path):
  (tmp_path / 'disk').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'disk' / 'corpus')
  prepare([source(make(300))], tmp_path / 'link')
  assert (tmp_path / 'link').is_symlink()
  assert corpus.Corpus.open(tmp_path / 'disk' / 'corpus').splits
  assert os.listdir(tmp_path / 'disk') == ['corpus']


def test_corrected_counts_have_their_own_corpus(tmp_path):
  adata = make(300, scale=3.7)
  corrected = source(adata, 'x', allow_noninteger=True)
  with pytest.raises(errors.UserError, match='not mixed'):
    prepare([corrected, source(make())], tmp_path / 'c')
  built = prepare([corrected], tmp_path / 'c')
  labels, dense = cells_of(built, 'train', 0)
  order = [built.gene_ids(0).index(i) for i in gene_names()]
  row = labels['row'].to_numpy()
  np.testing.assert_array_equal(dense[:, order], adata.X[row].toarray())
  assert built.manifest['value_dtype'] == 'float32'


def test_sources_of_one_name_are_told_apart(tmp_path):
  opened = [source(make(200, 0)), source(make(200, 1))]
  built = prepare(opened, tmp_path / 'c')
  assert [f['name'] for f in built.manifest['sources']] == ['a', 'a-2']


def test_bad_input_leaves_nothing(tmp_path):
  spoilt = make(300, 1)
  spoilt.X.data[-1] = -1
  # found only while streaming, after cells went to the buckets
  opened = source(make(300, 1), 'b')
  object.__setattr__(opened, 'matrix', matrices.wrapped(spoilt.X))
  with pytest.raises(errors.UserError, match='negative'):
    prepare([source(make()), opened], tmp_path / 'c')
  assert not list(tmp_path.iterdir())


def test_a_failed_rebuild_keeps_the_old_corpus(tmp_path):
  prepare([source(make())], tmp_path / 'c')
  before = files_of(tmp_path / 'c')
  with pytest.raises(errors.UserError, match='--overwrite'):
    prepare([source(make())], tmp_path / 'c')
  with pytest.raises(errors.UserError):
    prepare([source(make(), unit='')], tmp_path / 'c', overwrite=True)
  assert files_of(tmp_path / 'c') == before
  assert os.listdir(tmp_path) == ['c']


def run(*arguments):
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  return command.run(parser.parse_args([str(a) for a in arguments]))


def test_command(tmp_path, capsys):
  make(500).write_h5ad(tmp_path / 's.h5ad')
  arguments = ['h5ad', tmp_path / 's.h5ad', '-o', tmp_path / 'c']
  arguments += ['--unit', 'donor', '--obs', 'cell_type']
  assert run(*arguments, '--vocabulary', 'measured') == 0
  out, err = capsys.readouterr()
  assert 's: ' in out
  assert 'cells kept (panel)' in out
  assert 'human genes: 80 from 80 columns' in out
  assert 'human --max-mito: skipped' in out
  assert 'train' in out.splitlines()[-1]
  assert 'cells/s' in err
  built = corpus.Corpus.open(tmp_path / 'c')
  assert built.store('train', 0).categories('cell_type') == ('B', 'T')
  with pytest.raises(errors.UserError, match='--overwrite'):
    run(*arguments)
  assert run(*arguments, '--overwrite', '--no-filters') == 0


def test_no_path_of_this_machine_in_the_corpus(tmp_path):
  (tmp_path / 'in').mkdir()
  make(300).write_h5ad(tmp_path / 'in' / 's.h5ad')
  prepare(
    [sources.SourceConfig(str(tmp_path / 'in' / 's.h5ad'), unit='donor')],
    tmp_path / 'c',
  )
  for name, data in files_of(tmp_path / 'c').items():
    if name.endswith('.json'):
      assert str(tmp_path).encode() not in data


def test_a_table_of_labels_is_proven_too(tmp_path):
  """Whole donors are held out by its columns."""
  adata = make(300)
  adata.obs[['donor']].to_csv(tmp_path / 'donors.csv')
  del adata.obs['donor']
  adata.write_h5ad(tmp_path / 's.h5ad')
  config = sources.SourceConfig(str(tmp_path / 's.h5ad'), unit='donor')
  config = dataclasses.replace(config, obs_table=str(tmp_path / 'donors.csv'))
  built = prepare([config], tmp_path / 'c')
  assert built.manifest['sources'][0]['obs_table'] == {
    'file': 'donors.csv',
    'sha256': paths.sha256_file(tmp_path / 'donors.csv'),
  }
  plain = prepare([source(make(300))], tmp_path / 'd')
  assert 'obs_table' not in plain.manifest['sources'][0]


def test_real_sets_of_both_species(tmp_path, real_data):
  def real(name, **kwargs):
    return sources.SourceConfig(
      str(real_data / name / f'{name}.h5ad'), **kwargs
    )

  built = pipeline.prepare(
    [
      real(
        'baron_pancreas_human_mouse',
        species='obs:species',
        ids_of='human',
        unit='donor',
        obs=('cell_type',),
      ),
      real('mouse_brain_merfish', unit='donor_id', obs=('cell_type',)),
      real('kang_pbmc_ifnb_harmony'),
    ],
    tmp_path / 'c',
    pipeline.PrepareConfig(vocabulary='measured'),
  )
  assert not built.verify()
  kept = {s['name']: s['kept'] for s in built.manifest['sources']}
  assert kept['mouse_brain_merfish'] > 970
  assert kept['kang_pbmc_ifnb_harmony'] > 1900
  assert built.manifest['medians_of'] == {'human': 'umi', 'mouse': 'umi'}
  store = built.store('train', 0)
  labels = store.obs('source') == 2
  adata = anndata.read_h5ad(
    real_data / 'kang_pbmc_ifnb_harmony' / 'kang_pbmc_ifnb_harmony.h5ad'
  )
  totals = np.asarray(adata.X.sum(axis=1)).ravel()
  np.testing.assert_array_equal(
    store.total_N[labels], totals[store.obs('source_row')[labels]]
  )


def test_a_donor_in_two_files_is_not_split_silently(tmp_path, capsys):
  files = [str(tmp_path / f'lane{lane}.h5ad') for lane in range(2)]
  for seed, path in enumerate(files):
    make(num_cells=60, seed=seed).write_h5ad(path)
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  flags = ['--species', 'human', '--unit', 'donor', '--no-filters']
  flags += ['-o', str(tmp_path / 'corpus')]
  with pytest.raises(errors.UserError, match='--dataset NAME'):
    command.run(parser.parse_args([*files, *flags]))
  assert not (tmp_path / 'corpus').exists()
  assert command.run(parser.parse_args([*files, *flags, '--dataset=s'])) == 0
