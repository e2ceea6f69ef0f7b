"""Perturbation: equal to encoding and running each variant by hand."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse

import genecompass_jax as gc
from genecompass_jax import encoding, errors
from genecompass_jax.analysis import model_cells
from genecompass_jax.analysis.perturbation import (
  axes,
  cell_set,
  interventions,
  response_sums,
  screen,
)
from tests.conftest import tiny_cells

NUM = 12


@pytest.fixture(scope='module')
def adata():
  """Cells of a few genes to more than the cut of 63."""
  cells = tiny_cells(NUM, seed=3)
  rng = np.random.default_rng(0)
  dense = cells.X.toarray()
  dense *= rng.random(dense.shape) < np.linspace(0.3, 1.0, NUM)[:, None]
  dense[-3:] += rng.integers(0, 2, dense[-3:].shape) + 1
  cells.X = scipy.sparse.csr_matrix(dense)
  return cells


@pytest.fixture(scope='module')
def cells(adata, model):
  return cell_set.read(model_cells.open_cells(adata, model), model)


def one(kind, token, **rest):
  return interventions.Intervention(kind, (int(token),), (f't{token}',), **rest)


def all_deletions(cells):
  tokens = np.unique(cells.counts.gene_rows_N)
  return [one('delete', t) for t in tokens]


def by_hand(model, adata, cells, cell, changed, gone, pooling='mean'):
  """Shift of one cell whose counts became `changed`, without the engine.

  Args:
    changed: AnnData of the one cell after the intervention.
    gone: tokens that are left out of both sides.
  """

  def run(one_cell, keys):
    counts = one_cell.X.toarray()[0].astype(np.float64)
    genes = np.flatnonzero(counts)
    encoder = encoding.CellEncoder(
      model.assets.encoding,
      model.vocabulary.tokens(list(one_cell.var_names)),
      model.assets.medians.divisor_V(0),
    )
    ragged = encoding.RaggedCells(
      genes.astype(np.int32),
      counts[genes],
      np.array([0, len(genes)]),
      cells.counts.totals_C[cell : cell + 1],
    )
    encoded = encoder.encode(ragged, keys_C=keys)
    tokens = encoded.gene_ids_N
    batch = gc.cell_batch(tokens[None], encoded.values_N[None], cells.species)
    return tokens, np.asarray(model.hidden_states(batch), np.float64)[0]

  keys = cells.keys_C[cell : cell + 1]
  before_tokens, before = run(adata[cell].copy(), keys)
  after_tokens, after = run(changed, keys)
  shared = [
    t for t in before_tokens if t in set(after_tokens) and t not in gone
  ]
  rows_before = [1 + list(before_tokens).index(t) for t in shared]
  rows_after = [1 + list(after_tokens).index(t) for t in shared]

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  genes = 0.5 * np.sum(
    (unit(after[rows_after]) - unit(before[rows_before])) ** 2, -1
  )
  if pooling == 'cls':
    pooled = after[0], before[0]
  else:
    pooled = after[rows_after].mean(0), before[rows_before].mean(0)
  shift = 0.5 * np.sum((unit(pooled[0]) - unit(pooled[1])) ** 2)
  return shift, genes.mean(), dict(zip(map(int, shared), genes))


def changed_cell(adata, model, cell, token, function):
  """The cell as an AnnData, with the count of one gene changed."""
  one_cell = adata[cell].copy()
  dense = one_cell.X.toarray()
  gene = list(model.vocabulary.tokens(list(adata.var_names))).index(token)
  dense[0, gene] = function(dense[0, gene])
  one_cell.X = scipy.sparse.csr_matrix(dense)
  return one_cell


@pytest.mark.parametrize('pooling', screen.POOLINGS)
def test_a_screen_is_one_by_one_deletion(model, adata, cells, placed, pooling):
  done = all_deletions(cells)
  config = screen.ScreenConfig(pooling=pooling, batch_slots=512)
  work = screen.Screen(placed, cells, done, config)
  found = screen.joined([work.run(g) for g in work.groups])
  assert len(found.cell_N) == work.num_variants == len(work.base.gene_ids_N)
  assert found.entered_N.any() and not found.entered_N.all()
  rng = np.random.default_rng(0)
  for n in rng.choice(len(found.cell_N), 25, replace=False):
    cell, token = found.cell_N[n], done[found.variant_N[n]].tokens[0]
    changed = changed_cell(adata, model, cell, token, lambda count: 0)
    shift, gene_shift, _ = by_hand(
      model, adata, cells, cell, changed, {token}, pooling
    )
    assert abs(found.shift_N[n] - shift) < 1e-6
    assert abs(found.gene_shift_N[n] - gene_shift) < 1e-6
    start = work.base.starts_C1[cell]
    assert work.base.gene_ids_N[start + found.rank_N[n]] == token


def test_deletions_made_on_the_host_are_those_of_the_devices(cells, placed):
  """The general way, encoding every variant, and the quick one agree."""
  done = all_deletions(cells)
  quick = screen.Screen(placed, cells, done)
  # A fold of 0 is a deletion, but not one that the quick way takes.
  general = screen.Screen(
    placed, cells, [one('fold', d.tokens[0], factor=0.0) for d in done]
  )
  a = screen.joined([quick.run(g) for g in quick.groups])
  b = screen.joined([general.run(g) for g in general.groups])
  np.testing.assert_array_equal(a.cell_N, b.cell_N)
  np.testing.assert_array_equal(a.variant_N, b.variant_N)
  np.testing.assert_allclose(a.shift_N, b.shift_N, atol=1e-6)
  np.testing.assert_allclose(a.gene_shift_N, b.gene_shift_N, atol=1e-6)
  np.testing.assert_array_equal(a.rank_N, b.rank_N)
  np.testing.assert_array_equal(a.entered_N, b.entered_N)
  # What lies behind the cut is left out.
  assert len(a.cell_N) < len(cells.counts.gene_rows_N)


@pytest.mark.parametrize(
  'kind, rest, function',
  [
    ('fold', {'factor': 0.5}, lambda count: 0.5 * count),
    ('fold', {'factor': 3.0}, lambda count: 3.0 * count),
    ('over_express', {'level': 'max'}, None),
    ('over_express', {'level': 'median'}, None),
  ],
)
def test_other_interventions_are_new_cells(
  model, adata, cells, placed, kind, rest, function
):
  tokens = np.unique(cells.counts.gene_rows_N)
  done = [one(kind, t, **rest) for t in tokens[::7]]
  work = screen.Screen(placed, cells, done)
  found = screen.joined([work.run(g) for g in work.groups])
  if kind == 'over_express':
    assert len(found.cell_N) == len(done) * NUM
    assert (found.rank_N == -1).any()  # a gene that the cell did not express
    level = interventions.levels(cells, rest['level'], tokens)
  for n in np.random.default_rng(1).choice(len(found.cell_N), 12, False):
    cell, token = found.cell_N[n], done[found.variant_N[n]].tokens[0]

    def change(count, token=token):
      if function is not None:
        return function(count)
      return max(count, level[int(token)])  # 'released': counts are scaled

    changed = changed_cell(adata, model, cell, token, change)
    shift, gene_shift, _ = by_hand(model, adata, cells, cell, changed, {token})
    assert abs(found.shift_N[n] - shift) < 1e-6
    assert abs(found.gene_shift_N[n] - gene_shift) < 1e-6


def test_levels_are_those_of_cells_that_express_the_gene(adata, model, cells):
  tokens = model.vocabulary.tokens(list(adata.var_names))
  for gene in range(0, adata.n_vars, 9):
    counts = adata.X[:, gene].toarray().ravel()
    counts = counts[counts > 0]
    if not len(counts):
      continue
    token = int(tokens[gene])
    median = interventions.levels(cells, 'median', [token])[token]
    highest = interventions.levels(cells, 'max', [token])[token]
    assert (median, highest) == (np.median(counts), counts.max())


def test_a_set_is_changed_at_once(model, adata, cells, placed):
  base = cells.encode()
  pair = tuple(int(t) for t in base.gene_ids_N[:2])
  done = [interventions.Intervention('delete', pair, ('a', 'b'))]
  work = screen.Screen(placed, cells, done)
  found = screen.joined([work.run(g) for g in work.groups])
  assert done[0].name == 'a+b'
  has_any = [
    bool({*pair} & {*base.gene_ids_N[a:b]})
    for a, b in zip(base.starts_C1, base.starts_C1[1:])
  ]
  assert list(found.cell_N) == list(np.flatnonzero(has_any))
  changed = changed_cell(adata, model, 0, pair[0], lambda count: 0)
  changed = changed_cell(changed, model, 0, pair[1], lambda count: 0)
  shift, _, _ = by_hand(model, adata, cells, 0, changed, {*pair})
  assert abs(found.shift_N[0] - shift) < 1e-6


def test_responses_stand_with_their_own_genes(model, adata, cells, placed):
  """Not with their neighbours in rank, as in the original."""
  base = cells.encode()
  tokens = [int(t) for t in base.gene_ids_N[[0, 5, 9]]]
  for done in (
    [one('delete', t) for t in tokens],
    [one('fold', t, factor=0.0) for t in tokens],
  ):
    work = screen.Screen(placed, cells, done)
    units = np.arange(NUM) % 2
    genes = np.unique(base.gene_ids_N)
    sums = response_sums.ResponseSums(
      [
        response_sums.Wanted(
          np.arange(len(done)), genes, cells.row_C, units, ['even', 'odd']
        )
      ]
    )
    for group in work.groups:
      work.run(group, sums)
    (found,) = sums.responses()
    expected = np.zeros((len(done), 2, len(cells.divisor_V)))
    numbers = np.zeros(expected.shape, int)
    for v, token in enumerate(tokens):
      for cell in range(NUM):
        if (
          token not in base.gene_ids_N[slice(*base.starts_C1[cell : cell + 2])]
        ):
          continue
        changed = changed_cell(adata, model, cell, token, lambda count: 0)
        _, _, genes = by_hand(model, adata, cells, cell, changed, {token})
        for other, response in genes.items():
          expected[v, cell % 2, other] += response
          numbers[v, cell % 2, other] += 1
    np.testing.assert_array_equal(found.cells_TUG, numbers[:, :, found.token_G])
    np.testing.assert_allclose(
      found.sum_TUG, expected[:, :, found.token_G], atol=1e-5
    )
    for v, token in enumerate(tokens):
      assert not found.cells_TUG[v][:, found.token_G == token].any()


def test_towards_the_goal_is_positive(model, adata, cells, placed):
  start = cells.take(np.arange(0, 6))
  goal = cells.take(np.arange(6, 12))
  axis = axes.between(placed, ('a', start), ('b', goal), 'mean')
  assert abs(np.linalg.norm(axis.direction_D) - 1) < 1e-6
  back = axes.between(placed, ('b', goal), ('a', start), 'mean')
  np.testing.assert_allclose(back.direction_D, -axis.direction_D, atol=1e-6)
  done = all_deletions(cells)[:20]
  there, home = (
    screen.Screen(placed, start, done, axis=a) for a in (axis, back)
  )
  a = screen.joined([there.run(g) for g in there.groups])
  b = screen.joined([home.run(g) for g in home.groups])
  np.testing.assert_allclose(a.toward_N, -b.toward_N, atol=1e-6)
  assert np.ptp(a.toward_N) > 0
  # The change along the axis is no more than the whole change.
  length = np.sqrt(2 * a.shift_N)
  assert (np.abs(a.toward_N) <= length + 1e-6).all()
  with pytest.raises(errors.UserError, match='same centroid'):
    axes.between(placed, ('a', start), ('a', start), 'mean')


@pytest.mark.parametrize(
  'kind, rest', [('delete', {}), ('fold', {'factor': 0.0})]
)
def test_genes_left_out_are_in_no_score(
  model, adata, cells, placed, kind, rest
):
  """Made on the devices or on the host; the model still reads them."""
  tokens = np.unique(cells.counts.gene_rows_N)
  left_out = tuple(tokens[::3].tolist())
  done = [one(kind, t, **rest) for t in tokens]
  config = screen.ScreenConfig(left_out=left_out)
  work = screen.Screen(placed, cells, done, config)
  wanted = response_sums.Wanted(
    np.arange(len(done)), tokens, cells.row_C, np.zeros(NUM, int), ['all']
  )
  sums = response_sums.ResponseSums([wanted])
  found = screen.joined([work.run(g, sums) for g in work.groups])
  assert set(left_out) <= {done[v].tokens[0] for v in found.variant_N}
  for n in np.random.default_rng(2).choice(len(found.cell_N), 6, False):
    cell, token = found.cell_N[n], int(tokens[found.variant_N[n]])
    changed = changed_cell(adata, model, cell, token, lambda count: 0)
    shift, gene_shift, _ = by_hand(
      model, adata, cells, cell, changed, {token, *left_out}
    )
    assert abs(found.shift_N[n] - shift) < 1e-6
    assert abs(found.gene_shift_N[n] - gene_shift) < 1e-6
  (responses,) = sums.responses()
  answer = responses.token_G
  assert len(answer) and not set(answer.tolist()) & set(left_out)


def test_genes_left_out_are_on_no_axis(model, cells, placed):
  start, goal = cells.take(np.arange(6)), cells.take(np.arange(6, NUM))
  left_out = np.unique(cells.counts.gene_rows_N)[::3].tolist()
  found = axes.between(placed, ('a', start), ('b', goal), 'mean', left_out)
  base, units = cells.encode(), []
  for first, stop in zip(base.starts_C1, base.starts_C1[1:]):
    tokens = base.gene_ids_N[first:stop]
    values = base.values_N[first:stop]
    batch = gc.cell_batch(tokens[None], values[None], cells.species)
    hidden = np.asarray(model.hidden_states(batch), np.float64)[0]
    pooled = hidden[1:][~np.isin(tokens, left_out)].mean(0)
    units.append(pooled / np.linalg.norm(pooled))
  apart = np.mean(units[6:], 0) - np.mean(units[:6], 0)
  apart /= np.linalg.norm(apart)
  np.testing.assert_allclose(found.direction_D, apart, atol=2e-5)
  whole = axes.between(placed, ('a', start), ('b', goal), 'mean')
  assert np.abs(whole.direction_D - apart).max() > 1e-3


def test_groups_and_batches_change_nothing(cells, placed, monkeypatch):
  done = all_deletions(cells)
  expected = screen.Screen(placed, cells, done)
  a = screen.joined([expected.run(g) for g in expected.groups])
  monkeypatch.setattr(screen, '_GROUP_VARIANTS', 100)
  config = screen.ScreenConfig(batch_slots=200)
  order = np.random.default_rng(0).permutation(NUM)
  work = screen.Screen(placed, cells.take(order), done, config)
  assert len(work.groups) > len(expected.groups)
  b = screen.joined([work.run(g) for g in reversed(work.groups)])
  np.testing.assert_array_equal(a.cell_N, b.cell_N)
  np.testing.assert_allclose(a.shift_N, b.shift_N, atol=1e-6)
  np.testing.assert_allclose(a.gene_shift_N, b.gene_shift_N, atol=1e-6)
  assert a.shift_N.max() > 1e-4  # there is something to be equal


def test_what_cannot_be_done_is_refused(model, adata, cells):
  known = adata.var_names[0]
  for names, rest, match in (
    (['nonsense'], {}, 'is not known'),
    ([], {}, 'takes one gene'),
    ([known, known], {}, 'several different'),
    ([known], {'kind': 'remove'}, 'give one of delete'),
    ([known], {'kind': 'fold', 'factor': -1.0}, 'from 0 on'),
    ([known], {'kind': 'over_express', 'level': 'high'}, 'median, max'),
  ):
    with pytest.raises(errors.UserError, match=match):
      tokens = tuple(cells.tokens_of(names, model.vocabulary))
      interventions.Intervention(
        **{'kind': 'delete', 'tokens': tokens, 'names': tuple(names), **rest}
      )
  unmeasured = dataclasses.replace(
    cells, measured_V=np.zeros_like(cells.measured_V)
  )
  with pytest.raises(errors.UserError, match='was not measured'):
    unmeasured.tokens_of([known], model.vocabulary)


def test_cells_that_are_not_asked_for_are_not_encoded(
  model, adata, cells, monkeypatch
):
  encoded, encode = [], encoding.CellEncoder.encode

  def counting(self, counts, **rest):
    encoded.append(counts.num_cells)
    return encode(self, counts, **rest)

  monkeypatch.setattr(encoding.CellEncoder, 'encode', counting)
  few = cell_set.read(model_cells.open_cells(adata, model), model, [7, 2])
  assert encoded == [2]
  assert few.sha256 == cells.take(np.array([2, 7])).sha256 != cells.sha256
