"""The plan of an epoch: every cell once, rows full, batches by look-up."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from genecompass_jax import packing


def realistic_lengths(num_cells: int, seed: int = 0) -> np.ndarray:
  """Genes a cell like those of a mixed corpus: mean about 1,200, cut 2,048."""
  rng = np.random.default_rng(seed)
  lengths = np.exp(rng.normal(np.log(1150), 0.55, num_cells))
  return np.clip(lengths, 200, 2048).astype(np.uint16)


def make_cells(sizes=(9000, 4321), block_cells=(64, 128), weights=None):
  first = tuple(np.cumsum([0, *sizes]).tolist())
  return packing.Cells(
    first, block_cells, realistic_lengths(first[-1]), weights
  )


def make_layout(
  kind='packed', streams=8, rows=32, slots=None, seed=3, window=300
):
  slots = slots or ((2304,) if kind == 'packed' else (256, 512, 1024, 2304))
  return packing.Layout(kind, rows, slots, streams, window, seed)


def batch_cells(plan, layout, batch):
  """Cell numbers, repeats and needs of the rows of a batch, by stream."""
  rows = []
  for stream in range(layout.streams):
    for window, first, stop in plan.locate(stream, batch):
      laid = plan.rows(stream, window)
      number = np.concatenate(
        [np.arange(a, b) for a, b in plan.windows_VW[stream][window]]
      )
      for r in range(first, stop):
        inside = slice(laid.starts_R1[r], laid.starts_R1[r + 1])
        rows.append((number[laid.places_N[inside]], laid.repeats_N[inside]))
  return rows


def all_cells(plan, layout):
  rows = [
    row for b in range(plan.num_batches) for row in batch_cells(plan, layout, b)
  ]
  return np.concatenate([numbers for numbers, _ in rows])


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(1, 256), max_size=300),
  st.integers(256, 400),
  st.integers(1, 12),
)
def test_best_fit_fills_no_row_beyond_its_slots(needs, slots, most):
  needs = np.array(needs, np.int64)
  row, num = packing.best_fit(needs, slots, most)
  assert len(row) == len(needs)
  if len(needs):
    np.testing.assert_array_equal(np.unique(row), np.arange(num))
    assert np.bincount(row, weights=needs).max() <= slots
    assert np.bincount(row).max() <= most


def test_best_fit_takes_the_tightest_row():
  row, num = packing.best_fit(np.array([6, 5, 4, 3, 2]), 10, 9)
  assert num == 2
  assert row[0] == row[2]  # 6 + 4, not 5 + 4
  assert row[1] == row[3] == row[4]


def test_best_fit_counts_rows_alike_in_any_order():
  needs = realistic_lengths(4096).astype(np.int64) + 1
  counts = {
    packing.best_fit(np.random.default_rng(i).permutation(needs), 2304, 72)[1]
    for i in range(4)
  }
  assert len(counts) == 1


@pytest.mark.parametrize('kind', packing.LAYOUTS)
@pytest.mark.parametrize('streams', [1, 4, 8])
def test_every_cell_once_but_for_the_tail(kind, streams):
  cells, layout = make_cells(), make_layout(kind, streams)
  plan = packing.EpochPlan(cells, layout, 0)
  seen = all_cells(plan, layout)
  assert len(np.unique(seen)) == len(seen)
  dropped = cells.first_T1[-1] - len(seen)
  assert abs(dropped - plan.dropped_cells) <= 4 * layout.rows_per_batch
  limit = 0.06 if kind == 'packed' else 0.03
  assert 0 <= dropped <= limit * cells.first_T1[-1]


def test_streams_get_equal_numbers_of_cells_of_each_store():
  cells = make_cells()
  shares = []
  for pieces in packing.deal(cells, 8, 0, 0):
    numbers = np.concatenate(
      [np.arange(a, b) for piece in pieces for a, b in piece]
    )
    shares.append([(numbers < 9000).sum(), (numbers >= 9000).sum()])
  assert (np.ptp(shares, axis=0) <= 1).all()
  assert np.sum(shares) == cells.first_T1[-1]


def test_both_stores_come_in_every_part_of_an_epoch():
  plan = packing.EpochPlan(make_cells(), make_layout(), 0)
  for windows in zip(*plan.windows_VW):  # a window of all streams
    numbers = np.concatenate([np.arange(a, b) for w in windows for a, b in w])
    assert 0.5 < (numbers < 9000).mean() < 0.85  # 0.68 overall


def test_epochs_differ_and_come_again_the_same():
  cells, layout = make_cells(), make_layout()
  first, again, other = (packing.EpochPlan(cells, layout, e) for e in (0, 0, 1))
  assert first.windows_VW == again.windows_VW
  assert first.windows_VW != other.windows_VW
  a, b = first.rows(3, 0), again.rows(3, 0)
  np.testing.assert_array_equal(a.places_N, b.places_N)


def test_realistic_rows_are_full():
  lengths = realistic_lengths(65536)
  cells = packing.Cells((0, 65536), (1024,), lengths)
  plan = packing.EpochPlan(cells, make_layout(window=4096), 0)
  assert plan.real_share >= 0.95  # every second cell is above half a row
  cells = packing.Cells((0, 65536), (1024,), (lengths * 0.75).astype(np.uint16))
  plan = packing.EpochPlan(cells, make_layout(window=4096), 0)
  assert plan.real_share >= 0.98
  assert plan.dropped_cells <= 0.01 * 65536


def test_long_rows_do_not_come_first():
  cells = packing.Cells((0, 65536), (1024,), realistic_lengths(65536))
  layout = make_layout()
  plan = packing.EpochPlan(cells, layout, 0)
  laid = plan.rows(0, 0)
  sizes = np.diff(laid.starts_R1)
  place = np.arange(len(sizes))
  assert abs(np.corrcoef(place, sizes)[0, 1]) < 0.1


def test_buckets_give_batches_of_one_shape_that_hold_their_cells():
  cells, layout = make_cells(), make_layout('buckets')
  plan = packing.EpochPlan(cells, layout, 0)
  for b in range(plan.num_batches):
    rows = batch_cells(plan, layout, b)
    assert len(rows) == layout.rows_per_batch
    needs = [int(cells.lengths_C[n[0]]) + 1 for n, _ in rows]
    assert max(needs) <= plan.slots(b)
  used = {plan.slots(b) for b in range(plan.num_batches)}
  assert len(used) > 1 and used <= set(layout.slots)


@pytest.mark.parametrize('kind', packing.LAYOUTS)
def test_weights_give_their_shares(kind):
  weights = np.ones(13321, np.float32)
  kind_C = np.random.default_rng(0).permutation(13321)
  thin, rich = kind_C < 2000, kind_C >= 12321
  weights[thin], weights[rich] = 0.25, 2.5
  cells, layout = make_cells(weights=weights), make_layout(kind)
  seen = []
  for epoch in range(4):
    plan = packing.EpochPlan(cells, layout, epoch)
    expected = 500 + 2500 + 10321
    assert abs(plan.num_cells - expected) < 4 * expected**0.5
    for b in range(plan.num_batches):
      for numbers, repeats in batch_cells(plan, layout, b):
        seen.append(numbers)
        assert (repeats[thin[numbers]] == 0).all()
        assert repeats.max() <= 2
  times = np.bincount(np.concatenate(seen), minlength=13321)
  # thinned to a quarter: in four epochs each cell once, but for dropped tails
  assert times[thin].max() == 1
  assert times[thin].mean() > 0.93
  assert times[rich].max() == 10


def test_cells_without_genes_are_left_out():
  cells = make_cells()
  cells.lengths_C[::7] = 0
  layout = make_layout()
  plan = packing.EpochPlan(cells, layout, 0)
  assert plan.num_cells == (cells.lengths_C > 0).sum()
  assert (cells.lengths_C[all_cells(plan, layout)] > 0).all()


@pytest.mark.parametrize(
  ('num_cells', 'streams', 'rows', 'expected'),
  [(10_000, 8, 32, 8), (300, 8, 32, 4), (10, 8, 32, 1), (400, 12, 24, 4),
   (400, 12, 12, 4), (300, 6, 6, 2)],
)  # fmt: skip
def test_small_corpora_get_fewer_streams(num_cells, streams, rows, expected):
  assert packing.fitting_streams(num_cells, streams, rows) == expected


@pytest.mark.parametrize('num', [1, 31, 32, 33, 1000])
def test_evaluation_has_every_cell_once_in_few_shapes(num):
  lengths = realistic_lengths(num, seed=num)
  batches = packing.one_cell_batches(lengths, 32, (256, 512, 1024, 2304), 200)
  np.testing.assert_array_equal(
    np.sort(np.concatenate([cells for _, cells in batches])), np.arange(num)
  )
  assert all(len(cells) == 32 for _, cells in batches[:-1])
  for slots, cells in batches:
    assert lengths[cells].max() < slots


def test_chosen_buckets_pad_least_of_all_choices():
  rng = np.random.default_rng(3)
  for lengths in (rng.integers(1, 500, 400), rng.integers(200, 260, 300)):
    buckets = packing.choose_buckets(lengths, 500, count=3, step=64)

    def padded(choice, lengths=lengths):
      return np.take(choice, np.searchsorted(choice, lengths + 1)).sum()

    grid = range(64, 513, 64)
    choices = [
      (a, b, 512) for a in grid for b in grid if a <= b and lengths.max() < 512
    ]
    assert padded(buckets) == min(padded(c) for c in choices)
    assert buckets[-1] == 512
