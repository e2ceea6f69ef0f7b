"""Figures of perturbations show what the table holds, and say what it is."""

import numpy as np
import pytest

from genecompass_jax import errors
from genecompass_jax.analysis import perturbation_figures
from genecompass_jax.analysis.perturbation import results as results_lib
from tests import test_figures, test_perturbation_results as synthetic

model = synthetic.model


def dots(axes):
  return np.concatenate(
    [c.get_offsets() for c in axes.collections if len(c.get_offsets()) > 0]
  )


def texts(figure):
  return ' | '.join([*test_figures.texts(figure), ''])


def test_a_rank_plot_holds_all_targets_and_names_the_wanted(model):
  found = synthetic.made(model)[0]
  lines = found.table[found.table['group'] == 'T cell']
  last = lines['symbol'].iloc[-1]
  figure = perturbation_figures.rank_plot(
    found, title='Deletions', group='T cell', expected=[last], label=4
  )
  drawn = dots(figure.axes[0])
  drawn = drawn[np.argsort(drawn[:, 0])]
  np.testing.assert_allclose(drawn[:, 0], np.arange(1, 31))
  np.testing.assert_allclose(drawn[:, 1], lines['score'])
  said = texts(figure)
  for name in (*lines['symbol'].iloc[:4], last):
    assert f'| {name} |' in said
  assert f'| {lines["symbol"].iloc[5]} |' not in said
  assert '95 % of\nmatched nulls' in said
  assert results_lib.STATEMENT in said.replace('\n', ' ')
  assert 'fewer than 6: no verdict' in said.replace('\n', ' ')


def test_ranks_of_few_targets_are_whole_and_the_rest_is_told(model):
  found = synthetic.made(model)[0]
  found.table.loc[found.table['rank'] > 1, 'score'] = np.nan
  figure = perturbation_figures.rank_plot(found, title='', group='T cell')
  assert 'rank among 1 target (29 without z)' in texts(figure)
  figure.draw_without_rendering()
  axes = figure.axes[0]
  low, high = axes.get_xlim()
  assert [t for t in axes.get_xticks() if low <= t <= high] == [1]


def test_a_step_towards_a_goal_names_it(model):
  found = synthetic.made(model)[0]
  found.header.update(
    measure='toward: z is of it', axis='young -> old', alternative='two-sided'
  )
  found.table['toward'] = found.table['shift']
  for draw in perturbation_figures.rank_plot, perturbation_figures.volcano:
    figure = draw(found, title='', group='T cell')
    assert 'step towards old' in texts(figure)
  lines = found.table[found.table['group'] == 'T cell']
  # The other side counts too.
  found.table.loc[lines.index[-1], 'score'] = -99.0
  figure = perturbation_figures.rank_plot(
    found, title='', group='T cell', label=1
  )
  assert f'| {lines["symbol"].iloc[-1]} |' in texts(figure)
  assert f'| {lines["symbol"].iloc[0]} |' not in texts(figure)


def test_a_volcano_is_of_effect_and_q(model):
  found = synthetic.made(model, units=6)[0]
  lines = found.table[found.table['group'] == 'T cell']
  figure = perturbation_figures.volcano(
    found, title='Deletions', group='T cell'
  )
  drawn = {tuple(np.round(d, 6)) for d in dots(figure.axes[0])}
  x = lines['shift'] - lines['null_mean']
  y = -np.log10(lines['q'])
  assert drawn == {tuple(np.round(d, 6)) for d in zip(x, y)}
  assert 'log_{10}$ q' in texts(figure) and 'no verdict' not in texts(figure)


def test_with_one_unit_a_volcano_has_z_and_says_so(model):
  found = synthetic.made(model, units=1)[0]
  lines = found.table[found.table['group'] == 'T cell']
  figure = perturbation_figures.volcano(
    found, title='Deletions', group='T cell'
  )
  assert 'one unit: no p, no q' in texts(figure)
  np.testing.assert_allclose(
    np.sort(dots(figure.axes[0])[:, 1]), np.sort(lines['score'])
  )


def test_names_do_not_lie_on_each_other(model):
  found = synthetic.made(model)[0]
  figure = perturbation_figures.rank_plot(
    found, title='Deletions', group='T cell', label=12
  )
  figure.draw_without_rendering()
  axes = figure.axes[0]
  boxes = [t.get_window_extent() for t in axes.texts[1:]]
  assert len(boxes) == 12
  overlaps = [
    (a, b)
    for a in range(12)
    for b in range(a)
    if boxes[a].shrunk(0.9, 0.7).overlaps(boxes[b].shrunk(0.9, 0.7))
  ]
  assert not overlaps


def test_what_cannot_be_drawn_is_told(model):
  found = synthetic.made(model)[0]
  for group, what in (('', 'name one group'), ('NK', 'no group')):
    with pytest.raises(errors.UserError, match=what):
      perturbation_figures.volcano(found, title='x', group=group)
  table = found.table.assign(score=np.nan)
  empty = results_lib.Results(table, found.units, found.header)
  with pytest.raises(errors.UserError, match='nothing to draw'):
    perturbation_figures.rank_plot(empty, title='x', group='T cell')


def test_names_are_no_formulas(model):
  """Dollar signs are formulas to matplotlib, and mostly wrong ones."""
  found = synthetic.made(model)[0]
  table = found.table[found.table['group'] == 'T cell']
  table = table.assign(group='a$x^$', symbol='$g^{$')
  strange = results_lib.Results(table, found.units, found.header)
  for draw in (perturbation_figures.rank_plot, perturbation_figures.volcano):
    figure = draw(strange, title='Of a$x^$', group='a$x^$', note='$n_$')
    figure.draw_without_rendering()
    assert 'Of a$x^$' in texts(figure)
