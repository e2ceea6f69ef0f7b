"""gc.perturb: from cells to tables, on a tiny model."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

import genecompass_jax as gc
from genecompass_jax import model as model_lib
from genecompass_jax.analysis.perturbation import (
  axes,
  first_order,
  perturb,
  result_files,
  runs,
  screen,
)
from tests.conftest import tiny_cells

# 90 genes, of which few are alike.
FEW = {'min_cells': 1, 'calipers': (2.0, 2.0, 2.0), 'fewest_nulls': 5}


@pytest.fixture(scope='module')
def adata():
  return tiny_cells(48, seed=11)


@pytest.fixture(scope='module')
def screened(adata, model):
  return gc.perturb(
    adata, model, group_by='cell_type', donor_key='donor', **FEW
  )


def test_a_screen_of_all_genes(screened, adata):
  table = screened.table
  assert set(table['group']) == {'A', 'B'}
  assert (table['n_cells'] >= 1).all() and table['z'].notna().any()
  for _, of_group in table.groupby('group'):
    assert of_group['score'].dropna().is_monotonic_decreasing
  frame = screened.genes_df('A')
  assert {*('names', 'scores', 'shift', 'p', 'q', 'n_cells', 'n_donors')} == {
    *frame.columns
  }
  assert 'not a causal estimate' in screened.header['what']
  assert screened.units['unit'].isin(adata.obs['donor']).all()


def test_one_gene_is_as_in_the_screen(screened, adata, model):
  """The same z as among all genes: its nulls are the same."""
  table = screened.table
  line = table[(table['group'] == 'A') & table['z'].notna()].iloc[0]
  alone = gc.perturb(
    adata,
    model,
    [line['gene_id']],
    group_by='cell_type',
    donor_key='donor',
    **FEW,
  ).table
  own = alone[alone['group'] == 'A'].iloc[0]
  assert len(alone) <= 2 and own['symbol'] == line['symbol']
  np.testing.assert_allclose(own['shift'], line['shift'], atol=1e-6)
  np.testing.assert_allclose(own['z'], line['z'], rtol=1e-2)
  assert own['n_null'] == line['n_null']


def test_towards_a_goal_from_a_file(adata, model, tmp_path):
  source, output = tmp_path / 'cells.h5ad', tmp_path / 'found.parquet'
  adata.write_h5ad(source)
  options = dict(
    group_by='cell_type', start='A', goal='B', donor_key='donor', **FEW
  )
  name = adata.var_names[3]
  found = gc.perturb_file(
    str(source),
    str(output),
    model,
    [name, f'{adata.var_names[0]}+{adata.var_names[1]}'],
    responses=True,
    **options,
  )
  assert {p.name for p in tmp_path.iterdir()} == {
    *('cells.h5ad', 'found.parquet', 'found.tsv', 'found.units.parquet'),
    'found.answers.h5ad',
  }
  again = result_files.read(str(output))
  pd.testing.assert_frame_equal(again.table, found.table, check_dtype=False)
  assert set(found.table['group']) == {'A'}
  assert found.table['toward'].notna().all()
  answers = found.answers['A']
  assert answers.n_obs == 2 and answers.n_vars > 10
  # The target does not answer itself.
  gene = list(answers.var['gene_ids']).index(name)
  row = list(answers.obs['gene_id']).index(name)
  assert np.isnan(answers.X[row, gene])


def test_the_first_order_chooses(adata, model):
  options = dict(group_by='cell_type', groups=('A',), **FEW)
  found = gc.perturb(adata, model, top=8, **options)
  assert len(found.table) == 8
  exact = gc.perturb(adata, model, **options).table
  highest = set(exact.nlargest(14, 'z')['gene_id'])
  assert len(highest & set(found.table['gene_id'])) >= 6
  assert 'first-order' in found.header['q']


def test_over_expression_reaches_cells_that_lack_the_gene(adata, model):
  counts = np.asarray((adata.X > 0).sum(0)).ravel()
  gene = adata.var_names[int(np.argmin(np.where(counts > 4, counts, 99)))]
  found = gc.perturb(
    adata, model, gene, kind='over_express', level='max', min_cells=1
  )
  assert found.table['n_cells'].item() == 48 > counts.min()
  assert 'raised to the max' in found.header['done']


def test_over_expression_is_matched_in_the_reference(adata, model):
  """Of a gene that the start does not express at all."""
  cells = adata.copy()
  counts = cells.X.toarray()
  is_start = (cells.obs['cell_type'] == 'A').to_numpy()
  gene = int((counts[~is_start] > 0).sum(0).argmax())
  counts[is_start, gene] = 0
  cells.X = counts
  found = gc.perturb(
    cells,
    model,
    cells.var_names[gene],
    kind='over_express',
    group_by='cell_type',
    start='A',
    goal='B',
    **FEW,
  )
  line = found.table.iloc[0]
  assert line['n_cells'] == is_start.sum() and np.isfinite(line['z'])
  assert found.header['matched_in'].startswith('the reference cells, detection')


def test_genes_without_a_line_are_named(adata, model, caplog):
  """One that no monocyte shows, and a pathway of which some are unknown."""
  cells = adata.copy()
  counts = cells.X.toarray()
  counts[(cells.obs['cell_type'] == 'A').to_numpy(), 4] = 0
  cells.X = counts
  names = list(cells.var_names[[2, 4]])
  options = dict(group_by='cell_type', species='human', **FEW)
  found = gc.perturb(
    cells, model, names, never_null=(cells.var_names[7], 'NOSUCH'), **options
  )
  lines = set(zip(found.table['group'], found.table['gene_id']))
  assert lines == {('A', names[0]), ('B', names[0]), ('B', names[1])}
  assert 'A: no cell shows' in caplog.text
  assert '1 of 2 genes' in caplog.text and 'NOSUCH' in caplog.text


def test_genes_are_left_out_of_scores(adata, model):
  """Of those of the cell, of the first order and of other genes; by name."""
  names = list(adata.var_names)
  options = dict(
    group_by='cell_type', start='A', goal='B', species='human', **FEW
  )
  found = gc.perturb(
    adata, model, names[:12], top=2, responses=True,
    left_out=(*names[20:60], 'NOSUCH'), **options,
  )  # fmt: skip
  assert len(found.table) == 2 and found.table['z'].notna().any()
  assert len(found.header['left_out'].split(', ')) == 40
  assert not set(found.answers['A'].var['gene_ids']) & set(names[20:60])
  whole = gc.perturb(adata, model, list(found.table['gene_id']), **options)
  assert whole.header['left_out'] == 'none'
  for name in ('shift', 'gene_shift', 'toward'):
    a, b = (x.table.set_index('gene_id')[name] for x in (found, whole))
    assert (np.abs(a / b[a.index] - 1) > 1e-3).all()


def test_sums_of_other_donors_are_not_taken(adata, model, tmp_path):
  gene, folder = adata.var_names[2], str(tmp_path / 'parts')
  options = dict(responses=True, folder=folder, **FEW)
  gc.perturb(adata, model, gene, donor_key='donor', **options)
  other = adata.copy()
  other.obs['donor'] = other.obs['donor'].to_numpy()[::-1]
  with pytest.raises(gc.UserError, match='its units is another'):
    gc.perturb(other, model, gene, donor_key='donor', **options)


def test_all_genes_that_cannot_be_asked_about_are_named(adata, model):
  genes = ['NOSUCH', adata.var_names[0], 'NONE1', 'NONE2']
  with pytest.raises(
    gc.UserError, match='2 more of 4.*: NONE1, NONE2$'
  ) as told:
    gc.perturb(adata, model, genes, **FEW)
  assert "'NOSUCH' is not known" in str(told.value)


def test_responses_take_what_is_asked_for(adata, model, monkeypatch):
  """Of one group what it alone needs, whatever else the file holds."""
  options = dict(group_by='cell_type', donor_key='donor', responses=True, **FEW)
  genes = list(adata.var_names[[2, 5]])
  of_both = gc.perturb(adata, model, genes, **options)
  # At most 2 targets with 50 nulls each, 8 donors and 90 genes.
  monkeypatch.setattr(perturb, '_RESPONSE_BYTES', 90 * 8 * 90 * 12)
  alone = gc.perturb(adata, model, genes, groups=('B',), **options)
  (group,) = alone.answers
  np.testing.assert_allclose(
    alone.answers[group].layers['response'],
    of_both.answers[group].layers['response'],
    atol=1e-6,
  )
  cells = alone.answers[group].layers['cells']
  assert cells.max() > 10
  monkeypatch.setattr(perturb, '_RESPONSE_BYTES', 10_000)
  with pytest.raises(gc.UserError, match='fewer groups at a time'):
    gc.perturb(adata, model, genes, **options)


def test_questions_that_cannot_be_answered(adata, model):
  for genes, options, match in (
    ('all', {'start': 'A'}, 'give both'),
    ('all', {'goal': 'B', 'start': 'A'}, 'name it with group_by'),
    ('all', {'group_by': 'cell_type', 'groups': ('C',)}, 'there are: A, B'),
    ('all', {'group_by': 'kind'}, "'kind'"),
    ('all', {'measure': 'toward'}, 'needs a start'),
    ('all', {'kind': 'fold', 'top': 3}, 'is of deletions'),
    ('TP53x', {}, 'is not known'),
    ('all', {'donor_key': 'nobody'}, "'nobody'"),
    ('all', {'left_out': ('NOSUCH',)}, 'none of NOSUCH'),
    ('all', {'left_out': tuple(adata.var_names)}, 'leave out fewer'),
    ('all', {'left_out': 'A', 'pooling': 'cls'}, "use pooling 'mean'"),
    ('all', {'pooling': 'max'}, 'cls or mean'),
    ('all', {'min_cells': 1000}, 'lower min_cells'),
    ((5,), {}, 'as text'),
    ((), {}, 'an empty list'),
    ('all', {'seed': -1}, 'from 0 on'),
    ('all', {'top': 0.5}, 'top=0.5 must be a whole number'),
    (adata.var_names[0], {'kind': 'fold', 'factor': 1}, 'changes nothing'),
    (adata.var_names[0], {'kind': 'fold', 'factor': '2'}, 'must be a number'),
  ):
    with pytest.raises(gc.UserError, match=match):
      gc.perturb(adata, model, genes, **options)


@pytest.mark.parametrize('kind', ['delete', 'fold'])
def test_genes_that_no_cell_expresses_are_one_line(adata, model, kind):
  """Alone, and as a member of a set that would have no line."""
  cells = adata.copy()
  counts = cells.X.toarray()
  counts[:, 3] = 0
  cells.X = counts
  lost, there = cells.var_names[3], cells.var_names[4]
  for genes in (lost, f'{lost}+{there}'):
    with pytest.raises(gc.UserError, match='no cell shows any of the genes'):
      gc.perturb(cells, model, genes, kind=kind, species='human', **FEW)


def test_a_cell_of_which_nothing_is_left_has_no_mean(adata, model):
  """It is no effect of 0: of the species slot there is one."""
  counts = np.zeros((5, adata.n_vars), np.float32)
  counts[[0, 1, 2], 0] = 3
  counts[[1, 3, 4], 1] = 2
  cells = adata[:5].copy()
  cells.X = counts
  options = dict(species='human', **FEW)
  gene = adata.var_names[0]
  mean = gc.perturb(cells, model, gene, **options).table
  assert mean['n_cells'].item() == 1 and mean['shift'].item() > 0
  cls = gc.perturb(cells, model, gene, pooling='cls', **options).table
  assert cls['n_cells'].item() == 3 and cls['shift'].item() > 0
  alone = cells[[0, 2]].copy()
  alone.X[:, 1] = 0
  found = gc.perturb(alone, model, gene, **options)
  assert found.table['n_cells'].item() == 0 and not len(found.units)
  assert np.isnan(found.table['shift'].item())


def test_one_name_is_not_its_letters(adata, model):
  options = dict(group_by='cell_type', **FEW)
  found = gc.perturb(adata, model, adata.var_names[0], groups='A', **options)
  assert set(found.table['group']) == {'A'}
  with pytest.raises(gc.UserError, match="'AB'"):
    gc.perturb(adata, model, adata.var_names[0], groups='AB', **options)


def test_parts_of_other_parameters_are_not_taken(adata, model, tmp_path):
  """Nor are those of other prior tables: the checkpoint says nothing of it."""
  options = dict(folder=str(tmp_path / 'parts'), **FEW)
  gene = adata.var_names[2]
  gc.perturb(adata, model, gene, **options)
  params = model_lib.init(model.config, 7)
  other = model.replace(params=params)
  assert (other.sha256, other.step) == ('', -1) and model.sha256
  with pytest.raises(gc.UserError, match='its model is another'):
    gc.perturb(adata, other, gene, **options)
  medians = dataclasses.replace(model.assets.medians, mode='library')
  assets = dataclasses.replace(model.assets, medians=medians)
  assert model.replace(assets=assets).fingerprint != model.fingerprint
  assert model.replace(params=model.params).fingerprint == model.fingerprint


def test_what_comes_before_a_screen_is_kept(
  adata, model, tmp_path, monkeypatch, capsys
):
  """Axis and estimates: other devices would give another last bit."""
  options = dict(group_by='cell_type', start='A', goal='B', top=8, **FEW)
  expected = gc.perturb(adata, model, **options).table
  folder = str(tmp_path / 'parts')

  def dying(self, group, sums=None, **more):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(screen.Screen, 'run', dying)
    patched.setattr(runs, 'estimate', lambda *work: 'not measured')
    gc.perturb(adata, model, folder=folder, **options)
  said = capsys.readouterr().err
  assert 'backward passes' in said and 'cells/s' in said

  def again(*args, **rest):
    raise AssertionError('worked out once more')

  monkeypatch.setattr(axes, 'centroid', again)
  monkeypatch.setattr(first_order, '_changes', again)
  found = gc.perturb(adata, model, folder=folder, **options).table
  pd.testing.assert_frame_equal(found, expected)
  with pytest.raises(AssertionError, match='once more'):  # of another question
    gc.perturb(adata, model, folder=folder, pooling='cls', **options)


def test_parts_of_other_medians_or_versions_are_not_taken(
  adata, model, tmp_path, monkeypatch
):
  options = dict(folder=str(tmp_path / 'parts'), **FEW)
  gc.perturb(adata, model, adata.var_names[2], **options)
  medians = dataclasses.replace(model.assets.medians, mode='library')
  other = model.replace(
    assets=dataclasses.replace(model.assets, medians=medians)
  )
  with pytest.raises(gc.UserError, match='its medians is another'):
    gc.perturb(adata, other, adata.var_names[2], **options)
  monkeypatch.setattr(gc, '__version__', '0.0')
  with pytest.raises(gc.UserError, match='its genecompass_jax is another'):
    gc.perturb(adata, model, adata.var_names[2], **options)


def test_library_sizes_where_they_are_divided_by(adata, model):
  gene, options = adata.var_names[2], dict(FEW)
  found = gc.perturb(adata, model, gene, **options)
  assert 'library size' not in found.header['done']
  with pytest.raises(gc.UserError, match='`released` mode'):
    gc.perturb(adata, model, gene, renormalise=True, **options)
  encoding = dataclasses.replace(model.assets.encoding, mode='library')
  assets = dataclasses.replace(model.assets, encoding=encoding)
  library = model.replace(assets=assets)
  for renormalise, word in ((False, 'stays'), (True, 'follows')):
    found = gc.perturb(adata, library, gene, renormalise=renormalise, **options)
    assert f'library size {word}' in found.header['done']


def test_how_many_cells_is_said(adata, model, caplog):
  found = gc.perturb(adata, model, adata.var_names[2], max_cells=9, **FEW)
  assert '9 of 48 cells are perturbed' in caplog.text
  assert 'at most 9 a group' in found.header['cells']
  caplog.clear()
  found = gc.perturb(adata, model, adata.var_names[2], **FEW)
  assert 'are perturbed' not in caplog.text
  assert 'at most 500 a group' in found.header['cells']


def test_a_folder_is_of_one_run_or_of_shards(adata, model, tmp_path):
  """Whoever ended first took the parts away from the other."""
  source, output = tmp_path / 'cells.h5ad', tmp_path / 'a.parquet'
  adata.write_h5ad(source)
  gene, folder = adata.var_names[2], str(tmp_path / 'a.unfinished')

  def run(shard=(0, 1)):
    return gc.perturb_file(
      str(source), str(output), model, gene, shard=shard, **FEW
    )

  with perturb._held(folder, (0, 2), perturb._OUTPUT_LOCK):
    with pytest.raises(gc.UserError, match='or a shard, is at work'):
      run()
    with pytest.raises(gc.UserError, match='runs shard 0/2'):
      run((0, 2))
    assert run((1, 2)) is None
  with perturb._held(folder, (0, 1), perturb._PARTS_LOCK):
    with pytest.raises(gc.UserError, match='is at work there'):
      run((1, 2))
    with pytest.raises(gc.UserError, match='is at work there'):
      gc.perturb(adata, model, gene, folder=folder, **FEW)
  assert len(run().table) == 1
  assert not list(tmp_path.glob('*.unfinished'))


def test_outputs_are_looked_at_before_any_work(adata, model, tmp_path):
  source = tmp_path / 'cells.h5ad'
  adata.write_h5ad(source)
  (tmp_path / 'there.parquet').touch()
  for name, match in (
    ('found.csv', 'ends in .parquet'),
    ('there.parquet', 'exists'),
    ('no/such/found.parquet', 'no such folder'),
  ):
    with pytest.raises(gc.UserError, match=match):
      gc.perturb_file(str(source), str(tmp_path / name), model)
  with (
    perturb._held(str(tmp_path / 'a.unfinished'), (0, 1), 'lock'),
    pytest.raises(gc.UserError, match='another process'),
  ):
    gc.perturb_file(str(source), str(tmp_path / 'a.parquet'), model)
  assert not list(tmp_path.glob('*.unfinished'))
