"""Tables of perturbations: what stands in them, in files and for scanpy."""

import dataclasses
import io

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from genecompass_jax import (
  assets,
  encoding,
  errors,
  medians,
  pretrained,
  vocabulary,
)
from genecompass_jax.analysis import gene_tokens
from genecompass_jax.analysis.perturbation import (
  answers,
  effects as effects_lib,
  interventions,
  matching,
  result_files,
  results,
  statistics,
)
from tests import test_perturbation_statistics as synthetic

MATCHED = dataclasses.replace(synthetic.MATCHING, most=40)
TESTED = statistics.Config()


@pytest.fixture(scope='module')
def model():
  """What a header names of a model, without parameters."""
  genes = vocabulary.Vocabulary.default().genes.gene_ids[:90]
  vocab = vocabulary.Vocabulary.default().restrict(genes)
  return pretrained.PretrainedModel(
    config=None,
    params=None,
    assets=assets.Assets(
      knowledge=(),
      vocabulary=vocab,
      medians=medians.Medians.ones(vocab, 'released'),
      encoding=encoding.EncodingConfig(max_genes=63),
    ),
    source='runs/a',
    step=7,
    sha256='ab' * 32,
  )


@pytest.fixture
def found(model):
  """Deletions of 30 targets and 50 nulls in two groups of cells."""
  return made(model)


def made(model, units=3, order=None):
  rng = np.random.default_rng(3)
  shift_GC, shown_GC, unit_C = synthetic.drawn(rng, 80, 120, units, of_gene=0.3)
  shift_GC[:5] += 3.0
  effects = synthetic.effects_of(shift_GC, shown_GC=shown_GC)
  effects = dataclasses.replace(
    effects, entered_N=(effects.cell_N % 5).astype(np.int32)
  )
  tokens = np.arange(4, 84)
  symbols = gene_tokens.symbols_of(model.vocabulary, 0)
  done = [
    interventions.Intervention('delete', (t,), (symbols[t],))
    for t in tokens.tolist()
  ]
  targets = np.arange(30) if order is None else order
  group_C = np.where(np.arange(120) < 72, 0, 1)
  tests, unit_of, profiles = {}, {}, {}
  names = [f'donor{u}' for u in range(units)]
  for code, group in enumerate(('T cell', 'B cell')):
    unit_of[group] = np.where(group_C == code, unit_C, -1)
    profiles[group] = matching.of_effects(effects, 120)
    matches = matching.match(
      profiles[group], targets, np.arange(30, 80), config=MATCHED
    )
    tests[group] = statistics.test(
      effects, matches, unit_of[group], names, TESTED
    )
  head = results.header(
    model=model,
    source='cells.h5ad',
    matched=MATCHED,
    tested=TESTED,
    unit='donor',
    family='30 transcription factors in 2 groups',
    pooling='mean',
  )
  ids = gene_tokens.gene_ids_of(model.vocabulary, 0)
  table = results.tabulate(done, effects, tests, unit_of, profiles, ids, head)
  return table, tests, done, matches, symbols, ids, effects


def test_what_is_missing_is_explained(model):
  by_units = {1: '--donor-key', 3: 'fewer than 6', 6: None}
  for units, expected in by_units.items():
    head = {'unit': 'all cells are one unit'} if units == 1 else {}
    table = made(model, units=units)[0]
    table.header.update(head)
    said = results.gaps(table)
    assert len(said) == bool(expected)
    assert not expected or expected in said[0]
  table.table.loc[0, 'flags'] = 'few_null'
  (said,) = results.gaps(table)
  assert 'no z: 1 of 60 lines have fewer than 10 matched nulls' in said
  assert len(repr(table)) < 200 and 'T cell' in repr(table)


def test_a_line_a_target_and_group(found):
  table, tests, done, _, symbols, ids, effects = found
  frame = table.table
  assert list(frame.columns) == results.COLUMNS
  assert len(frame) == 60
  assert list(frame['group'].unique()) == ['B cell', 'T cell']
  for _, lines in frame.groupby('group'):
    assert lines['score'].is_monotonic_decreasing
    assert lines['rank'].tolist() == list(range(1, 31))
  line = frame[(frame['group'] == 'T cell') & (frame['symbol'] == symbols[6])]
  (line,) = line.to_dict('records')
  tested = tests['T cell']
  assert line['gene_id'] == ids[6] and line['gene_id'].startswith('ENSG')
  assert line['z'] == line['score'] == tested.z_T[2]
  assert line['n_null'] == tested.num_null_T[2]
  assert line['z'] == pytest.approx(
    (line['shift'] - line['null_mean']) / line['null_sd']
  )
  of_gene = (effects.variant_N == 2) & (effects.cell_N < 72)
  assert line['n_cells'] == of_gene.sum()
  by_unit = [
    effects.shift_N[of_gene & (effects.cell_N % 3 == u)].mean()
    for u in range(3)
  ]
  assert line['shift'] == pytest.approx(np.mean(by_unit))
  assert line['entered'] == pytest.approx((effects.cell_N[of_gene] % 5).mean())
  assert 'at the cut' in table.header['entered']
  assert 'joined' in table.header['measured']
  assert np.isnan(line['toward'])
  units = table.units
  units = units[(units['group'] == 'T cell') & (units['symbol'] == symbols[6])]
  np.testing.assert_allclose(units['shift'], by_unit)
  np.testing.assert_array_equal(units['z'], tested.z_TU[2])


def test_q_is_over_all_groups(found):
  table = found[0].table
  np.testing.assert_array_equal(
    table['q'], statistics.false_discovery_rate(table['p'].to_numpy())
  )
  top = table.sort_values('score')['symbol'].iloc[-10:]
  assert set(top) == {found[4][t] for t in range(4, 9)}


def test_below_six_units_nothing_is_said(found, model):
  frame = found[0].table
  assert (frame['verdict'] == '').all()
  assert frame[['ci_low', 'ci_high']].isna().all().all()
  assert frame['flags'].str.contains('few_units').all()
  assert np.isfinite(frame['p']).all()
  six = made(model, units=6)[0].table
  less = six[six['n_units'] < 6]
  assert (less['verdict'] == '').all() and len(less) < 10
  six = six[six['n_units'] == 6]
  assert six['verdict'].isin(['more', 'less', 'not shown']).all()
  assert np.isfinite(six['ci_low']).all()
  assert not six['flags'].str.contains('few_units').any()
  one = made(model, units=1)[0].table
  assert one['p'].isna().all() and one['q'].isna().all()
  assert one['rank'].notna().all() and (one['n_units'] == 1).all()


def test_order_of_targets_changes_nothing(model):
  one = made(model)[0]
  other = made(model, order=np.arange(30)[::-1])[0]
  pd.testing.assert_frame_equal(one.table, other.table)
  pd.testing.assert_frame_equal(one.units, other.units)


def test_written_and_read(found, tmp_path):
  table = found[0]
  output = tmp_path / 'new' / 'screen.parquet'
  result_files.write(table, output)
  assert sorted(p.name for p in output.parent.iterdir()) == [
    'screen.parquet',
    'screen.tsv',
    'screen.units.parquet',
  ]
  back = result_files.read(output)
  pd.testing.assert_frame_equal(back.table, table.table)
  pd.testing.assert_frame_equal(back.units, table.units)
  assert back.header == table.header
  first = output.read_bytes()
  result_files.write(table, output)
  assert output.read_bytes() == first
  # Anything that reads parquet sees the header.
  metadata = pyarrow.parquet.read_schema(output).metadata
  assert b'not a causal estimate' in metadata[results.KEY.encode()]


def test_people_see_the_header(found, tmp_path):
  table = found[0]
  output = tmp_path / 'screen.parquet'
  result_files.write(table, output)
  text = (tmp_path / 'screen.tsv').read_text()
  head = [line for line in text.splitlines() if line.startswith('#')]
  assert text.startswith('# what: in-silico perturbation: association learned')
  for wanted in (
    *effects_lib.SIGNS.values(),
    '30 transcription factors in 2 groups',
    'within detection 9 sd',
    'ab' * 32,
    "obs['donor']",
    'pooling: mean',
  ):
    assert any(wanted in line for line in head), wanted
  frame = pd.read_csv(io.StringIO(text), sep='\t', comment='#')
  assert list(frame.columns) == results.COLUMNS
  assert len(frame) == 60


def test_nothing_half_written(found, tmp_path, monkeypatch):
  output = tmp_path / 'screen.parquet'

  def broken(*arguments):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(result_files.paths, 'write_text', broken)
  with pytest.raises(OSError):
    result_files.write(found[0], output)
  assert not output.exists()
  with pytest.raises(errors.UserError, match='is not there'):
    result_files.read(output)


def test_other_files_are_refused_in_one_line(found, tmp_path):
  (tmp_path / 'a.parquet').write_bytes(b'PAR1 of something else')
  found[0].table.to_parquet(tmp_path / 'b.parquet')
  found[0].units.to_parquet(tmp_path / 'b.units.parquet')
  for name in ('a', 'b'):
    with pytest.raises(errors.UserError, match='no results of a pert') as told:
      result_files.read(tmp_path / f'{name}.parquet')
    assert '\n' not in str(told.value)
  with pytest.raises(errors.UserError, match='ends in .parquet'):
    result_files.write(found[0], tmp_path / 'a.csv')
  output = tmp_path / 'c.parquet'
  result_files.write(found[0], output)
  other = dataclasses.replace(found[0], header={'what': 'another'})
  result_files.write(other, tmp_path / 'd.parquet')
  (tmp_path / 'd.units.parquet').rename(tmp_path / 'c.units.parquet')
  with pytest.raises(errors.UserError, match='of two perturbations'):
    result_files.read(output)


def test_a_frame_as_scanpy_users_know_it(found):
  frame = found[0].genes_df('T cell')
  assert list(frame.columns) == [
    *('names', 'scores', 'shift', 'p', 'q', 'n_cells', 'n_donors')
  ]
  assert frame['scores'].is_monotonic_decreasing and len(frame) == 30
  assert found[0].genes_df().columns[0] == 'group'
  with pytest.raises(errors.UserError, match='there are: B cell, T cell'):
    found[0].genes_df('NK')


def test_answers_for_scanpy(found, tmp_path):
  table, _, done, matches, symbols, ids, _ = found
  rng = np.random.default_rng(0)
  responses = synthetic.responses_of(rng.random((80, 80)))
  responses = dataclasses.replace(
    responses, token_G=np.arange(4, 84, dtype=np.int32)
  )
  score = answers.score(responses, matches)
  adata = result_files.answers_adata(table, 'B cell', done, score, symbols, ids)
  output = tmp_path / 'screen.parquet'
  result_files.write(
    dataclasses.replace(table, answers={'B cell': adata}), output
  )
  back = anndata.read_h5ad(tmp_path / 'screen.answers.h5ad')
  assert back.shape == (30, 80)
  assert back.obs_names.is_unique and back.var_names.is_unique
  place = back.obs_names.get_loc(symbols[6])
  np.testing.assert_allclose(back.X[place], score.z_TG[2], rtol=1e-6)
  assert np.isnan(back.X[place, back.var_names.get_loc(symbols[6])])
  np.testing.assert_allclose(
    back.layers['response'][place], score.mean_TG[2], rtol=1e-6
  )
  assert (back.layers['cells'][place] == score.cells_TG[2]).all()
  assert back.obs['score'].is_monotonic_decreasing
  assert back.uns[results.KEY] == table.header
  assert back.var['gene_ids'].iloc[0] == ids[4]


def test_groups_of_like_names_have_files_of_their_own():
  groups = ['\u03b1 cell', '\u03b2 cell', 'T/b', 'T b', 't_b', 'x' * 300]
  tails = result_files.tails_of(groups)
  assert len({tail.lower() for tail in tails.values()}) == len(groups)
  assert all(len(tail) < 70 and '/' not in tail for tail in tails.values())
  assert result_files.tails_of(['T/b']) == {'T/b': ''}
