"""Figures hold what they were given, and say what they show."""

import matplotlib.colors
import numpy as np
import pytest

from genecompass_jax import errors
from genecompass_jax.analysis import figures


def texts(figure):
  """Everything that can be read in a figure."""
  found = [t.get_text() for t in figure.texts]
  for name in ('_suptitle', '_supxlabel'):
    label = getattr(figure, name)
    found += [label.get_text()] if label else []
  for axes in figure.axes:
    found += [axes.get_title(loc='left'), axes.get_xlabel(), axes.get_ylabel()]
    found += [t.get_text() for t in axes.texts]
  for legend in figure.legends:
    found += [t.get_text() for t in legend.get_texts()]
    found.append(legend.get_title().get_text())
  return found


@pytest.mark.slow  # 20 s
def test_umap_is_the_same_each_time():
  rng = np.random.default_rng(0)
  features_CD = np.concatenate(
    [rng.normal(size=(40, 5)), 20 + rng.normal(size=(40, 5))]
  )
  xy_C2 = figures.umap(features_CD, seed=3)
  assert xy_C2.shape == (80, 2)
  np.testing.assert_array_equal(xy_C2, figures.umap(features_CD, seed=3))
  first, second = xy_C2[:40], xy_C2[40:]
  gap = np.linalg.norm(first.mean(0) - second.mean(0))
  assert gap > 5 * max(first.std(0).max(), second.std(0).max())


def test_cells_keep_the_colour_of_their_class(tmp_path):
  rng = np.random.default_rng(0)
  sizes = {f'type {i}': 60 - 4 * i for i in range(13)}
  classes = np.repeat(list(sizes), list(sizes.values()))
  places = {
    name: rng.normal(size=(len(classes), 2)) for name in ('PCA', 'model')
  }
  figure = figures.cell_map(
    places, classes, title='Cells of a test', note='a note', colour_name='type'
  )
  named = dict(zip(sizes, figures.PALETTE))  # the largest first
  for axes, xy_C2 in zip(figure.axes, places.values()):
    drawn = axes.collections[0]
    where = {tuple(xy): i for i, xy in enumerate(drawn.get_offsets().data)}
    colours = drawn.get_facecolors()
    for xy, name in zip(xy_C2, classes):
      expected = matplotlib.colors.to_rgb(named.get(name, figures.GREY))
      np.testing.assert_allclose(colours[where[tuple(xy)]][:3], expected)
  said = texts(figure)
  for text in ('Cells of a test', 'a note', 'PCA', 'model', 'type 0 (60)'):
    assert text in said
  rest = sum(sorted(sizes.values())[:3])
  assert f'3 other classes ({rest})' in said
  figure.savefig(tmp_path / 'map.png')
  assert (tmp_path / 'map.png').stat().st_size > 10_000


def test_numbers_get_a_scale():
  rng = np.random.default_rng(0)
  figure = figures.cell_map(
    {'PCA': rng.normal(size=(50, 2))},
    rng.random(50),
    title='x',
    colour_name='genes',
  )
  assert len(figure.axes) == 2 and 'genes' in texts(figure)


def run_lines():
  lines = [
    {'step': s, 'loss': 1.0, 'id_loss': 7 - s / 100, 'value_loss': 1 / s}
    for s in range(10, 110, 10)
  ]
  for step in (0, 50, 100):
    values = {
      'eval_id_loss': 7.1 - step / 100,
      'eval_value_loss': 1.5 / (step + 1),
      'null_id_marginal': 6.5,
      'null_id_rank_bin': 6.1,
      'null_id_rank_bracket': 6.09,
      'null_value_gene_mean': 0.4,
      'null_value_interpolation': 0.003,
    }
    lines.append({'step': step, **values, 'by': {'species=human': values}})
  return [{'event': 'start'}, *lines]


@pytest.mark.parametrize('group', ['', 'species=human'])
def test_learning_curves_hold_the_losses_and_label_the_null_models(group):
  figure = figures.learning_curves(
    run_lines(), title='A run', note='a note', groups={group: 'Cells'}
  )
  top, bottom = figure.axes
  training, held_out = top.lines[:2]
  assert training.get_ydata()[0] == pytest.approx(6.9)
  np.testing.assert_allclose(held_out.get_xdata(), [0, 50, 100])
  np.testing.assert_allclose(held_out.get_ydata(), [7.1, 6.6, 6.1])
  levels = [line.get_ydata()[0] for line in top.lines[2:]]
  np.testing.assert_allclose(levels, [6.5, 6.1, 6.09])
  assert bottom.get_yscale() == 'log'
  said = ' '.join(texts(figure)).replace('\n', ' ')
  for text in ('A run', 'Cells', 'held out: 6.1', 'gene frequency: 6.5'):
    assert text in said


def test_a_long_title_and_a_run_stopped_before_its_evaluation_are_drawn_whole():
  lines = [line for line in run_lines() if line.get('step', 0) != 100]
  figure = figures.learning_curves(
    [*lines, {'step': 90, 'id_loss': 1.0, 'value_loss': 1.0}],
    title='A run of many words, all of which a reader may want to read here',
  )
  figure.canvas.draw()
  assert figure.axes[0].get_xlim() == (0, 90)
  page = figure.bbox
  (title,) = [t for t in figure.texts if t.get_text().startswith('A run')]
  assert title.get_window_extent().x1 <= page.x1


def test_labels_at_the_end_do_not_overlap():
  figure = figures.learning_curves(run_lines(), title='A run')
  figure.canvas.draw()
  for axes in figure.axes:
    boxes = sorted(
      (t.get_window_extent() for t in axes.texts), key=lambda box: box.y0
    )
    assert len(boxes) >= 4
    for below, above in zip(boxes, boxes[1:]):
      assert above.y0 >= below.y1 - 1  # a pixel


def test_a_run_without_evaluation_is_refused():
  with pytest.raises(errors.UserError, match='never evaluated'):
    figures.learning_curves([{'step': 1, 'id_loss': 1.0}], title='x')


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.setitem(figures.importlib.sys.modules, 'umap', None)
  with pytest.raises(errors.UserError, match='umap is not installed'):
    figures.umap(np.zeros((5, 2)))
