"""`genecompass attention`: partners of genes, against a plain softmax."""

import numpy as np
import pandas as pd
import pytest

from genecompass_jax import cli, errors
from genecompass_jax.analysis import (
  attention_command,
  attention_figures,
  attention_partners,
  attention_weights,
  tables,
)
from genecompass_jax.analysis.perturbation import results as results_lib
from tests import test_attention_summary as plainly, test_figures

NUM = plainly.NUM
# d2 has too few cells of either kind.
DONORS = ['d0'] * 11 + ['d1'] * 11 + ['d2'] * 2


@pytest.fixture(scope='module')
def cells():
  adata = plainly.tiny_cells(NUM, seed=5)
  adata.obs['kind'] = plainly.KINDS
  adata.obs['donor'] = DONORS
  return adata


def of_cell(token, partner, ids, probs, direction):
  """What a gene (None: CLS) and a partner of it give, mean over heads."""
  slot = {t: s + 1 for s, t in enumerate(ids.tolist())}
  if partner not in slot or (token is not None and token not in slot):
    return np.nan
  ends = 0 if token is None else slot[token], slot[partner]
  ends = ends if direction == 'gives' else ends[::-1]
  return probs[:, ends[0], ends[1]].mean()


def test_it_is_the_mean_of_plain_softmax(cells, model, monkeypatch):
  monkeypatch.setattr(attention_weights, '_QUERIES', 24)
  gene = cells.var_names[4]
  found = attention_partners.attention_partners(
    cells,
    model,
    [gene],
    group_by='kind',
    donor_key='donor',
    min_cells=2,
    top=4,
    batch_size=5,
  )
  (token,) = model.vocabulary.tokens([gene]).tolist()
  probs = plainly.plain(cells, model, model.config.num_layers)
  donor_C = np.array(DONORS)
  assert set(found.table['gene']) == {'CLS', found.table['gene'].iloc[-1]}
  for (name, direction, group), lines in found.table.groupby(
    ['gene', 'direction', 'group']
  ):
    asked = None if name == 'CLS' else token
    is_of_C = np.array([k == group for k in plainly.KINDS])
    means = {}
    for partner in cells.var_names:
      (other,) = model.vocabulary.tokens([partner]).tolist()
      if other < 0 or other == asked:
        continue
      one_C = np.array(
        [of_cell(asked, other, *cell, direction) for cell in probs]
      )
      times_C = one_C * np.array([len(ids) + 1 for ids, _ in probs])
      has_C = np.isfinite(one_C) & is_of_C
      units = [
        has_C & (donor_C == d)
        for d in set(DONORS)
        if (has_C & (donor_C == d)).sum() >= 2
      ]
      if units:
        means[partner] = (
          np.mean([times_C[u].mean() for u in units]),
          np.mean([one_C[u].mean() for u in units]),
          sum(u.sum() for u in units),
          len(units),
        )
    order = sorted(means, key=lambda p: -means[p][0])
    places = lines.set_index('partner_id')
    assert set(order[:4]) <= set(places.index)
    for partner, line in places.iterrows():
      times, weight, number, of_units = means[partner]
      assert line['times_even'] == pytest.approx(times, abs=1e-5)
      assert line['weight'] == pytest.approx(weight, abs=1e-6)
      assert (line['n_cells'], line['n_units']) == (number, of_units)
      assert order[line['place'] - 1] == partner
    assert lines['ci_low'].isna().all()  # of two units
  # A partner of one group stands in all where enough cells have both.
  both = found.table.groupby(['gene', 'direction', 'partner_id'])['group']
  assert (both.nunique() == 2).any()
  # The units give the means.
  first = found.table.iloc[0]
  keys = ['gene', 'direction', 'group', 'partner_id']
  units = found.units
  for key in keys:
    units = units[units[key] == first[key]]
  assert units[units['n_cells'] >= 2]['times_even'].mean() == pytest.approx(
    first['times_even']
  )


def test_heads_and_layers_are_told_apart(cells, model):
  options = {'top': 3, 'min_cells': 1, 'max_cells': 6}
  every = attention_partners.attention_partners(
    cells, model, layers=(1, -1), heads='all', **options
  )
  assert set(zip(every.table['layer'], every.table['head'])) == {
    (layer, head) for layer in (1, 2) for head in (0, 1)
  }
  assert (every.table['gene'] == 'CLS').all()
  assert every.table['n_cells'].max() <= 6
  assert results_lib.STATEMENT in every.header['what']


def run(path, trained, output, *rest):
  return cli.main(
    ['attention', str(path), '--checkpoint', str(trained), '-o', str(output)]
    + ['--min-cells', '2', *rest]
  )


@pytest.fixture(scope='module')
def path(cells, tmp_path_factory):
  path = tmp_path_factory.mktemp('attention') / 'cells.h5ad'
  cells.write_h5ad(path)
  return path


def test_the_command_writes_tables_and_figures(
  path, cells, trained, tmp_path, capsys
):
  output = tmp_path / 'found.parquet'
  rest = '--genes', cells.var_names[4], '--group-by', 'kind'
  assert run(path, trained, output, *rest) == errors.EXIT_OK
  said = capsys.readouterr().out
  assert 'CLS, block 2, mean of the heads' in said and 'found.tsv' in said
  table, header = tables.read(output, attention_command.KEY, 'attention')
  assert (
    set(table['group']) == {'x', 'y'} and table['weight'].between(0, 1).all()
  )
  assert results_lib.STATEMENT in header['what']
  text = pd.read_csv(tmp_path / 'found.tsv', sep='\t', comment='#')
  assert list(text.columns) == list(table.columns)
  gene = table['gene'].iloc[-1]
  kept = {p.name for p in tmp_path.iterdir()}
  assert {'found.units.parquet', 'found.CLS.png', f'found.{gene}.png'} <= kept
  found = attention_partners.AttentionPartners(table, table, header)
  figure = attention_figures.partners_plot(found, gene)
  drawn = ' '.join(test_figures.texts(figure)).replace('\n', ' ')
  assert results_lib.STATEMENT in drawn
  image = figure.axes[0].images[0].get_array()
  own = table[(table['gene'] == gene) & (table['direction'] == 'gives')]
  assert np.nanmax(image) == pytest.approx(np.log2(own['times_even'].max()))
  assert run(path, trained, output, *rest) == errors.EXIT_USAGE
  assert '--overwrite' in capsys.readouterr().err


@pytest.mark.parametrize(
  'rest, message',
  [
    (('--genes', 'NOGENE'), "gene 'NOGENE' is not known in human"),
    (('--group-by', 'none'), "no obs column 'none'"),
    (('--group-by', 'kind', '--groups', 'z'), "no cells with kind = 'z'"),
    (('--layers', '3'), 'block 3: this model has 2'),
    (('--layers', 'last'), '--layers last: give numbers'),
    (('--heads', '2'), 'this model has 0 to 1'),
    (('--heads', 'max'), '--heads max: give numbers'),
    (('--top', '0'), 'from 1 on'),
    (('--memory-gib', '1e-6'), 'name fewer genes'),
  ],
)
def test_mistakes_are_one_line(path, trained, tmp_path, capsys, rest, message):
  code = run(path, trained, tmp_path / 'found.parquet', *rest)
  said = capsys.readouterr().err.strip().splitlines()
  assert code == errors.EXIT_USAGE and message in said[-1]
  assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(path, trained, tmp_path, capsys):
  for output, message in (
    ('found.csv', 'ending in .parquet'),
    ('no/such/found.parquet', 'no such folder'),
  ):
    assert run(path, trained, tmp_path / output) == errors.EXIT_USAGE
    assert message in capsys.readouterr().err


def test_a_model_without_cls_needs_genes(cells, model):
  import dataclasses

  config = dataclasses.replace(model.config, use_cls=False)
  with pytest.raises(errors.UserError, match='no CLS slot: name genes'):
    attention_partners.attention_partners(cells, model.replace(config=config))


def test_too_few_cells_for_any_line_are_told(cells, model):
  with pytest.raises(errors.UserError, match='lower --min-cells'):
    attention_partners.attention_partners(cells[:6].copy(), model)
