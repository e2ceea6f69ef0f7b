"""First-order estimates of deletions: derivatives, and their order."""

import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import model as model_lib, rows, schemas
from genecompass_jax.analysis import model_cells
from genecompass_jax.analysis.perturbation import (
  axes,
  cell_set,
  comparison,
  first_order,
  interventions,
  screen,
  stages,
)
from tests.conftest import tiny_cells


@pytest.fixture(scope='module')
def cells(model):
  adata = tiny_cells(8, seed=5)
  return cell_set.read(model_cells.open_cells(adata, model), model)


@pytest.mark.parametrize(
  'pooling, every', [('cls', 0), ('mean', 0), ('mean', 3)]
)
def test_the_estimate_is_the_derivative(cells, placed, pooling, every):
  """Against differences, at the middle of the way: gates opened by hand."""
  goal, start = cells.take(np.arange(4)), cells.take(np.arange(4, 8))
  base = cells.encode()
  # Every third gene is in no score.
  left_out = np.unique(base.gene_ids_N)[::every].tolist() if every else []
  axis = axes.between(placed, ('a', start), ('b', goal), pooling, left_out)
  found = first_order.score(
    placed, cells, pooling=pooling, axis=axis, points=1, left_out=left_out
  )
  batch = rows.cell_batch_rows(base, np.zeros(8, int), 64)
  weights_BL = (batch.gene_ids_BL > 0).astype(np.float32)
  is_scored_BL = weights_BL * ~np.isin(batch.gene_ids_BL, left_out)
  network = model_lib.bind(placed.config, placed.params)

  def along(key_bias_BL, retreat_BL):
    hidden_BLD = network(
      batch,
      placed.knowledge,
      gates=schemas.Gates(jnp.array(key_bias_BL), jnp.array(retreat_BL)),
    )
    pooled_BD = comparison.pool(hidden_BLD, is_scored_BL, pooling)
    return np.asarray(pooled_BD, np.float64) @ axis.direction_D

  step = 0.05
  for cell, rank in ((0, 0), (1, 7), (5, 20), (7, 3)):
    sides = []
    for sign in (1, -1):
      key_bias_BL = np.zeros((8, 64), np.float32)
      retreat_BL = 0.5 * weights_BL
      key_bias_BL[cell, rank + 1] = -sign * step
      retreat_BL[cell, rank + 2 :] += sign * step * weights_BL[cell, rank + 2 :]
      sides.append(along(key_bias_BL, retreat_BL)[cell])
    n = base.starts_C1[cell] + rank
    expected = (sides[0] - sides[1]) / (2 * step)
    assert abs(expected) > 1e-5
    np.testing.assert_allclose(
      found.toward_N[n], expected, rtol=0.02, atol=2e-6
    )


def test_gates_of_zero_change_nothing(cells, placed):
  batch = rows.cell_batch_rows(cells.encode(), np.zeros(8, int), 64)
  network = model_lib.bind(placed.config, placed.params)
  zeros = jnp.zeros((8, 64))
  np.testing.assert_allclose(
    network(batch, placed.knowledge, gates=schemas.Gates(zeros, zeros)),
    network(batch, placed.knowledge),
    atol=2e-6,
  )


def test_enough_probes_are_all_directions(cells, placed):
  """With every direction the estimate is the squared length itself."""
  width = placed.config.width
  whole = first_order.score(placed, cells, pooling='mean', probes=width)
  few = first_order.score(placed, cells, pooling='mean', probes=8)
  ratio = few.shift_N.sum() / whole.shift_N.sum()
  assert 0.5 < ratio < 2
  assert np.corrcoef(np.log(few.shift_N), np.log(whole.shift_N))[0, 1] > 0.8


def test_it_finds_the_genes_that_matter(cells, placed):
  estimate = first_order.score(
    placed, cells, pooling='mean', probes=placed.config.width
  )
  tokens = np.unique(estimate.token_N)
  done = [
    interventions.Intervention('delete', (int(t),), (f't{t}',)) for t in tokens
  ]
  work = screen.Screen(placed, cells, done)
  exact = screen.joined([work.run(g) for g in work.groups])
  key = np.lexsort((estimate.token_N, estimate.cell_N))
  exact_token_N = tokens[exact.variant_N]
  other = np.lexsort((exact_token_N, exact.cell_N))
  np.testing.assert_array_equal(estimate.token_N[key], exact_token_N[other])

  def ranked(values):
    return np.argsort(np.argsort(values))

  agreement = np.corrcoef(
    ranked(estimate.shift_N[key]), ranked(exact.shift_N[other])
  )[0, 1]
  assert agreement > 0.9


def test_scored_cells_are_kept(cells, placed, tmp_path, monkeypatch, capsys):
  """A run that was stopped goes on, also in batches of another size."""
  options = dict(pooling='mean', probes=4, batch_slots=512)
  whole = first_order.score(placed, cells, **options)
  monkeypatch.setattr(first_order, '_SECONDS_BETWEEN_SAVES', -1.0)
  changes, ran = first_order._changes, []

  def counting(params, knowledge, batch, *rest):
    if len(ran) == 5:
      raise KeyboardInterrupt
    ran.append(batch)
    return changes(params, knowledge, batch, *rest)

  monkeypatch.setattr(first_order, '_changes', counting)
  stage = stages.Stage(str(tmp_path / 'scores.npz'))
  with pytest.raises(KeyboardInterrupt):
    small = {**options, 'batch_slots': 64}
    first_order.score(placed, cells, **small, stage=stage)
  said = capsys.readouterr().err
  assert '8 cells in 8 batches of 8 backward passes' in said
  assert 'more (measured on a batch)' in said
  ran.clear()
  found = first_order.score(placed, cells, **options, stage=stage)
  assert len(ran) == 1
  np.testing.assert_allclose(found.shift_N, whole.shift_N, rtol=1e-4)
  (tmp_path / 'scores.npz').write_bytes(b'PK')
  ran.clear()
  first_order.score(placed, cells, **options, stage=stage)
  assert ran


@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_estimates_do_not_depend_on_the_batch(cells, placed, pooling):
  """Also where many rows and directions run together."""
  few, many = (
    first_order.score(
      placed, cells, pooling=pooling, probes=4, batch_slots=slots
    ).shift_N
    for slots in (64, 4096)
  )
  np.testing.assert_allclose(many, few, rtol=1e-3)
