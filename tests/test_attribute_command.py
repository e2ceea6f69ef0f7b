"""`genecompass attribute`: which part and which genes, by group of cells."""

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import scipy.stats

import genecompass_jax as gc
from genecompass_jax import cli, errors
from genecompass_jax.analysis import (
  attribution_figures,
  cell_choice,
  unit_means,
)
from genecompass_jax.analysis.attribution import (
  by_group,
  group_axis,
  group_files,
  questions,
)
from genecompass_jax.analysis.perturbation import results as results_lib
from tests import test_attribution, test_figures
from tests.conftest import tiny_cells

of_counts = test_attribution.of_counts
FEW = {'batch_size': 8, 'min_cells': 1}


@pytest.fixture(scope='module')
def cells():
  return tiny_cells(40, seed=11)


@pytest.fixture(scope='module')
def genes(cells):
  """Two that some cells hold and some do not."""
  share_R = np.asarray((cells.X > 0).mean(0)).ravel()
  return list(cells.var_names[np.argsort(np.abs(share_R - 0.6))[:2]])


@pytest.fixture(scope='module')
def found(cells, genes, of_counts):
  return by_group.attribute_groups(
    cells,
    of_counts,
    [gc.GeneId(gene) for gene in genes],
    group_by='cell_type',
    donor_key='donor',
    top=7,
    max_cells=0,
    **FEW,
  )


@pytest.fixture(scope='module')
def files(cells, of_counts, tmp_path_factory):
  """The cells and the model as files."""
  folder = tmp_path_factory.mktemp('attribute')
  cells.write_h5ad(folder / 'cells.h5ad')
  gc.export(of_counts, folder / 'model')
  return folder


def run(files, output, *rest):
  return cli.main(
    ['attribute', str(files / 'cells.h5ad'), '--checkpoint']
    + [str(files / 'model'), '-o', str(output), '--min-cells', '1', *rest]
  )


def test_scores_are_those_of_the_cells_averaged_over_donors(
  cells, genes, of_counts, found
):
  for gene in genes:
    plain = gc.attribute(cells, of_counts, gc.GeneId(gene), batch_size=8)
    own = found.cells[found.cells['target'] == f'id of {gene}']
    own = own.set_index('row').sort_index()
    assert list(own.index) == list(plain.cell_C)
    by_part = plain.part_table().drop(columns=['points'])
    by_part['all'] = by_part['at_input'] - by_part['at_baseline']
    np.testing.assert_allclose(
      own[['at_input', 'at_baseline', *plain.parts]],
      by_part[['at_input', 'at_baseline', *plain.parts]],
      atol=1e-5,
    )
    obs = cells.obs.iloc[plain.cell_C]
    scores = plain.gene_table().merge(obs, left_on='cell', right_index=True)
    for group in ('A', 'B'):
      of_group = by_part[(obs['cell_type'] == group).to_numpy()]
      donors = obs['donor'][obs['cell_type'] == group].to_numpy()
      lines = found.parts[
        (found.parts['target'] == f'id of {gene}')
        & (found.parts['group'] == group)
      ].set_index('part')
      assert set(lines['n_units']) == {len(set(donors))}
      assert set(lines['n_cells']) == {len(donors)}
      for part in ('word', 'a', 'b', 'all'):
        means = of_group[part].groupby(donors).mean()
        assert lines['score'][part] == pytest.approx(means.mean(), abs=1e-5)
        sizes = of_group[part].abs().groupby(donors).mean()
        assert lines['size'][part] == pytest.approx(sizes.mean(), abs=1e-5)
        if len(means) >= 6:
          low, high = scipy.stats.t.interval(
            0.95, len(means) - 1, means.mean(), means.sem()
          )
          assert lines['ci_low'][part] == pytest.approx(low, abs=1e-5)
          assert lines['ci_high'][part] == pytest.approx(high, abs=1e-5)
      assert lines['share'][:3].sum() == pytest.approx(1)
      # Genes: 0 counts where a cell lacks them.
      own_genes = scores[scores['cell_type'] == group]
      sums = own_genes.groupby(['gene_id', 'part', 'donor'])['score'].sum()
      number = pd.Series(donors).value_counts()
      share = sums / number[sums.index.get_level_values('donor')].to_numpy()
      score = share.groupby(['gene_id', 'part']).sum() / len(number)
      top = found.genes[
        (found.genes['target'] == f'id of {gene}')
        & (found.genes['group'] == group)
      ]
      assert top['place'].nunique() == 7
      for line in top[top['part'] != 'all'].itertuples():
        assert line.score == pytest.approx(
          score[line.gene_id, line.part], abs=1e-5
        )
      whole = score.groupby('gene_id').sum().abs().sort_values()[::-1]
      first = top[top['part'] == 'all']
      np.testing.assert_allclose(first['score'].abs(), whole[:7], atol=1e-5)
      held = own_genes[own_genes['gene_id'] == first['gene_id'].iloc[0]]
      assert first['n_holding'].iloc[0] == held['cell'].nunique()
      assert first['mean_rank'].iloc[0] == pytest.approx(held['rank'].mean())
      of_cell = held.groupby('cell')['score'].sum()
      assert first['score_held'].iloc[0] == pytest.approx(
        of_cell.mean(), abs=1e-5
      )
  assert {6, 7, 8} & set(found.parts['n_units'])  # there were intervals


def test_an_interval_from_six_units_on():
  value_U = np.arange(12.0).reshape(6, 2) ** 2
  value_U[0, 1] = np.nan
  means = unit_means.over(value_U)
  assert list(means.number) == [6, 5]
  np.testing.assert_allclose(means.mean, np.nanmean(value_U, 0))
  low, high = scipy.stats.t.interval(
    0.95, 5, value_U[:, 0].mean(), scipy.stats.sem(value_U[:, 0])
  )
  np.testing.assert_allclose([means.low[0], means.high[0]], [low, high])
  assert np.isnan([means.low[1], means.high[1]]).all()
  assert np.isnan(unit_means.over(np.full((1, 1), np.nan)).mean).all()


def test_a_draw_is_of_cells_that_hold_the_gene(cells, genes, of_counts):
  """And more cells do not change which are drawn."""
  found = by_group.attribute_groups(
    cells,
    of_counts,
    gc.GeneId(genes[0]),
    method='gradient',
    max_cells=5,
    seed=3,
    **FEW,
  )
  holds_C = cells[:, genes[0]].X.toarray().ravel() > 0
  assert len(found.cells) == 5 and holds_C[found.cells['row']].all()
  (line,) = found.parts[found.parts['part'] == 'all'].itertuples()
  assert line.n_holding == holds_C.sum() and line.n_group == 40
  assert line.n_units == 1 and np.isnan(line.ci_low)
  few = cell_choice.draw(np.arange(20), 8, 3)
  more = cell_choice.draw(np.arange(30), 8, 3)
  assert set(more[more < 20]) <= set(few) and len(few) == len(more) == 8


def test_groups_of_few_cells_have_no_mean(cells, genes, of_counts):
  cells = cells.copy()
  cells.obs['kind'] = ['rare'] * 2 + ['$common_'] * 38  # no formula
  found = by_group.attribute_groups(
    cells,
    of_counts,
    gc.GeneId(genes[0]),
    method='gradient',
    group_by='kind',
    min_cells=3,
    batch_size=8,
  )
  lines = found.parts[found.parts['part'] == 'all'].set_index('group')
  assert np.isnan(lines['score']['rare']) and lines['n_units']['rare'] == 0
  assert 'few_cells' in lines['flags']['rare']
  assert np.isfinite(lines['score']['$common_'])
  for draw in (attribution_figures.parts_plot, attribution_figures.genes_plot):
    draw(found, f'id of {genes[0]}').canvas.draw()


@pytest.mark.slow  # 6 s: embeddings and their gradient are compiled
def test_an_axis_between_groups(cells, of_counts):
  found = by_group.attribute_groups(
    cells,
    of_counts,
    group_axis.GroupAxis('A', 'B', 'mean'),
    group_by='cell_type',
    method='gradient',
    max_cells=0,
    **FEW,
  )
  embeddings = gc.embed(cells, of_counts, pooling='mean')
  kind = cells.obs['cell_type'].to_numpy()
  axis = gc.CellAxis.between(
    embeddings[kind == 'A'], embeddings[kind == 'B'], 'mean'
  )
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  np.testing.assert_allclose(
    found.cells.set_index('row').sort_index()['at_input'],
    unit @ axis.axis_D,
    atol=1e-5,
  )
  assert set(found.parts['target']) == {'A -> B'}
  assert '(cosine)' in found.header['targets']


@pytest.mark.slow  # 6 s: two programs are compiled
def test_leaving_out_has_genes_without_parts(cells, genes, of_counts):
  found = by_group.attribute_groups(
    cells[:8], of_counts, gc.GeneId(genes[0]), method='occlusion', **FEW
  )
  plain = gc.attribute(
    cells[:8], of_counts, gc.GeneId(genes[0]), method='occlusion', batch_size=8
  )
  assert set(found.genes['part']) == {'all'}
  assert set(found.parts['part']) == {'word', 'a', 'b', 'all'}
  lines = found.parts.set_index('part')['score']
  np.testing.assert_allclose(
    lines[['word', 'a', 'b']], plain.by_part_CK.mean(0), atol=1e-5
  )


def test_figures_say_what_the_tables_hold(found, genes):
  target = f'id of {genes[0]}'
  parts = attribution_figures.parts_plot(found, target)
  said = ' '.join(test_figures.texts(parts)).replace('\n', ' ')
  assert results_lib.STATEMENT in said and target in said and 'nats' in said
  lines = found.parts[found.parts['target'] == target]
  bars = [b.get_width() for c in parts.axes[0].containers[:3] for b in c]
  scores = lines[lines['part'] != 'all']['score']
  np.testing.assert_allclose(sorted(bars), sorted(scores), atol=1e-9)
  by_genes = attribution_figures.genes_plot(found, target)
  said = ' '.join(test_figures.texts(by_genes)).replace('\n', ' ')
  assert results_lib.STATEMENT in said
  own = found.genes[found.genes['target'] == target]
  named = {
    label.get_text()
    for axes in by_genes.axes
    for label in axes.get_yticklabels()
  }
  assert named == set(own['symbol'])
  with pytest.raises(errors.UserError, match='no target'):
    attribution_figures.parts_plot(found, 'id of NOGENE')


# The command


def test_the_command_writes_tables_and_figures(
  files, genes, found, tmp_path, capsys
):
  output = tmp_path / 'found.parquet'
  rest = [
    *('--genes', ','.join(genes), '--group-by', 'cell_type'),
    *('--donor-key', 'donor', '--max-cells', '0', '--top', '7'),
  ]
  assert run(files, output, *rest) == errors.EXIT_OK
  said = capsys.readouterr().out
  assert f'id of {genes[0]}' in said and 'found.tsv' in said
  written = group_files.read(output)
  for kind in ('parts', 'units', 'genes', 'cells'):
    pd.testing.assert_frame_equal(
      getattr(written, kind), getattr(found, kind), check_dtype=False, atol=1e-5
    )
  assert results_lib.STATEMENT in written.header['what']
  metadata = pyarrow.parquet.read_schema(output).metadata
  assert group_files.KEY.encode() in metadata
  text = (tmp_path / 'found.tsv').read_text()
  assert results_lib.STATEMENT in text.splitlines()[0]
  table = pd.read_csv(tmp_path / 'found.tsv', sep='\t', comment='#')
  assert list(table.columns) == list(found.parts.columns)
  kept = {p.name for p in tmp_path.iterdir()}
  assert {f'found.id_of_{genes[0]}.{k}.png' for k in ('parts', 'genes')} <= kept
  assert not (tmp_path / 'found.parquet.unfinished').exists()
  # What is there is not written over.
  assert run(files, output, *rest) == errors.EXIT_USAGE
  assert '--overwrite' in capsys.readouterr().err


def test_an_interrupted_command_goes_on(
  files, genes, tmp_path, monkeypatch, capsys, caplog
):
  """And gives the very tables of one that was not; other settings are refused."""
  rest = ['--genes', genes[0], '--method', 'gradient']
  whole, output = tmp_path / 'whole.parquet', tmp_path / 'found.parquet'
  assert run(files, whole, *rest) == errors.EXIT_OK
  explain, calls = questions.explain, []

  def interrupted(*arguments):
    if len(calls) == 2:
      raise KeyboardInterrupt
    calls.append(explain(*arguments))
    return calls[-1]

  with monkeypatch.context() as patch:
    patch.setattr(questions, 'explain', interrupted)
    assert run(files, output, *rest) == errors.EXIT_INTERRUPTED
  assert not output.exists() and len(calls) == 2
  capsys.readouterr()
  other = ['--genes', genes[0], '--method', 'occlusion']
  assert run(files, output, *other) == errors.EXIT_USAGE
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'method was gradient, now occlusion' in said
  assert run(files, output, *rest) == errors.EXIT_OK
  done = sum(len(c['cell_C']) for c in calls)
  assert f'going on, {done} of' in caplog.text
  assert whole.read_bytes() == output.read_bytes()
  for kind in ('units', 'genes', 'cells'):
    a, b = (tmp_path / f'{n}.{kind}.parquet' for n in ('whole', 'found'))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
  'rest, message',
  [
    ((), 'give one of --genes, --start'),
    (('--genes', 'A', '--classes', '0'), 'give one of --genes, --start'),
    (('--genes', 'NOGENE'), "'NOGENE' is not known in human"),
    (('--genes', 'GATA1'), 'none that this model knows'),
    (('--classes', '0'), 'needs a model with the sequence head'),
    (('--classes', 'one'), 'give numbers from 0'),
    (('--start', 'A'), 'give both'),
    (('--start', 'A', '--goal', 'B'), 'name it with group_by'),
    (
      ('--start', 'A', '--goal', 'Z', '--group-by', 'cell_type'),
      "no cells with cell_type = 'Z'",
    ),
    (('--genes', 'GENE', '--group-by', 'none'), "no obs column 'none'"),
    (('--genes', 'GENE', '--donor-key', 'none'), "no obs column 'none'"),
    (('--genes', 'GENE', '--groups', 'A'), 'name it with group_by'),
    (('--genes', 'GENE', '--max-cells', '-1'), 'give numbers from 0'),
    (('--genes', 'GENE,GENE'), 'named twice'),
    (('--genes', 'GENE', '--over', 'none'), 'invalid choice'),
  ],
)
def test_mistakes_are_one_line(files, genes, tmp_path, capsys, rest, message):
  rest = [r.replace('GENE', genes[0]) if 'NO' not in r else r for r in rest]
  try:
    code = run(files, tmp_path / 'found.parquet', *rest)
  except SystemExit as left:  # argparse
    code = left.code
  said = capsys.readouterr().err.strip().splitlines()
  assert code == errors.EXIT_USAGE and message in said[-1]
  assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(files, tmp_path, capsys):
  for output, message in (
    ('found.csv', 'ending in .parquet'),
    ('no/such/found.parquet', 'no such folder'),
  ):
    code = run(files, tmp_path / output, '--genes', 'A')
    assert code == errors.EXIT_USAGE and message in capsys.readouterr().err
  with pytest.raises(errors.UserError, match='is not there'):
    group_files.read(tmp_path / 'none.parquet')


def test_no_cell_holds_it(cells, genes, of_counts):
  counts = cells.X.toarray()
  counts[:, list(cells.var_names).index(genes[0])] = 0
  empty = anndata.AnnData(counts, cells.obs, cells.var)
  with pytest.raises(errors.UserError, match='none of the 40 cells holds'):
    by_group.attribute_groups(empty, of_counts, gc.GeneId(genes[0]))
