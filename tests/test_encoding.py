"""The encoder against a plain NumPy reference, recorded outputs, real cells."""

import concurrent.futures
import dataclasses
import json

import anndata
import hypothesis
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import strategies as st

from genecompass_jax import encoding, errors, kernels, ranking

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(x):
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _BITS
  x = (x ^ x >> 27) * 0x94D049BB133111EB & _BITS
  return x ^ x >> 31


def merged(rows, counts, token_R):
  """Summed counts by token, of expressed tokens."""
  sums = {}
  for row, count in zip(rows, counts):
    token = int(token_R[row])
    if token >= 0 and count > 0:
      sums.setdefault(token, []).append(float(count))
  return {token: float(np.sum(sorted(c))) for token, c in sums.items()}


def cell_key(sums):
  total = len(sums)
  for token, count in sums.items():
    bits = int(np.float64(count).view(np.uint64))
    total += mix64(token * _GOLDEN & _BITS ^ bits)
  return mix64(total & _BITS)


def reference(cells, c, config, token_R, divisor_V, fold=None, key=None):
  """(tokens, values, key) of a cell, in plain float64 and Python integers."""
  s = slice(*cells.starts_C1[c : c + 2])
  sums = merged(cells.gene_rows_N[s], cells.counts_N[s], token_R)
  key = cell_key(sums) if key is None else int(key)
  order_key = key if fold is None else mix64(key ^ int(fold))
  ranked = []
  for token, count in sums.items():
    x = np.float64(count)
    if config.mode == 'library':
      x = x / np.float64(cells.totals_C[c]) * np.float64(config.target_sum)
    x = x / divisor_V[token]
    tie = mix64((order_key + token * _GOLDEN) & _BITS)
    ranked.append((-x, token if config.ties == 'token' else tie, token))
  ranked.sort()
  ranked = ranked[: config.max_genes]
  x = np.array([-r[0] for r in ranked])
  values = (np.log1p(x) / np.log(2)).astype(np.float32)
  return np.array([r[2] for r in ranked], np.int32), values, key


def from_dense(counts_CR, rows_dtype=np.uint16):
  matrix = sp.csr_matrix(counts_CR)
  return encoding.RaggedCells(
    matrix.indices.astype(rows_dtype),
    matrix.data,
    matrix.indptr.astype(np.int64),
    np.asarray(matrix.sum(axis=1), np.float64).ravel(),
  )


def cell(encoded, c):
  s = slice(*encoded.starts_C1[c : c + 2])
  return encoded.gene_ids_N[s], encoded.values_N[s]


def assert_within_one_ulp(got, want):
  steps = got.view(np.int32).astype(np.int64) - want.view(np.int32)
  assert np.abs(steps).max(initial=0) <= 1


def assert_as_reference(cells, config, token_R, divisor_V, which):
  encoder = encoding.CellEncoder(config, token_R, divisor_V)
  for fold, seed, epoch in ((None, 0, None), (kernels.fold(7, 3), 7, 3)):
    encoded = encoder.encode(cells, seed=seed, epoch=epoch)
    for c in which:
      tokens, values, key = reference(
        cells, c, config, token_R, divisor_V, fold
      )
      np.testing.assert_array_equal(cell(encoded, c)[0], tokens)
      assert_within_one_ulp(cell(encoded, c)[1], values)
      assert int(encoded.keys_C[c]) == key
  np.testing.assert_array_equal(
    encoder.lengths(cells), np.diff(encoded.starts_C1)
  )


def random_cells(seed, num_cells=12, num_rows=3000, depth=1500):
  rng = np.random.default_rng(seed)
  weights = rng.gamma(0.3, 1, num_rows)
  counts = rng.poisson(weights / weights.sum() * depth, (num_cells, num_rows))
  token_R = (rng.permutation(2 * num_rows)[:num_rows] + 2).astype(np.int32)
  return from_dense(counts.astype(np.uint16)), token_R, rng


@pytest.mark.parametrize('mode', encoding.MODES)
@pytest.mark.parametrize('ties', encoding.TIES)
@pytest.mark.parametrize('shared', [False, True])
def test_equals_reference(mode, ties, shared):
  cells, token_R, rng = random_cells(0)
  token_R[rng.random(len(token_R)) < 0.1] = -1
  if shared:
    token_R[::3] = token_R[1]
    token_R[5:50] = token_R[50:95]
  divisor_V = np.where(rng.random(7000) < 0.5, 1, rng.gamma(2, 1, 7000) + 0.1)
  for max_genes in (2048, 100):
    config = encoding.EncodingConfig(mode, ties, max_genes)
    assert_as_reference(cells, config, token_R, divisor_V, range(12))


def test_quotients_that_float32_does_not_tell_apart():
  """Thousands of quotients in one float32 step: the repair must be exact."""
  rng = np.random.default_rng(1)
  divisor_V = 1 + rng.integers(0, 500, 4002) * 2.0**-40
  divisor_V[:30] = 3.5
  cells = from_dense(np.ones((2, 4000)))
  token_R = np.arange(2, 4002, dtype=np.int32)
  config = encoding.EncodingConfig(max_genes=4000)
  assert_as_reference(cells, config, token_R, divisor_V, range(2))


def test_log_over_the_whole_range():
  q = np.concatenate(
    [10.0 ** np.linspace(-30, 30, 30001), 1 / np.arange(1, 99)]
  )
  q = np.concatenate(
    [q, np.arange(1, 3000) / 128, 2.0 ** np.arange(-40, 40) - 1]
  )
  q = q[q > 0]
  value = np.empty(len(q), np.float32)
  ranking.log2_1p(len(q), q, np.empty(len(q)), value)
  assert_within_one_ulp(value, (np.log1p(q) / np.log(2)).astype(np.float32))


REAL = (
  'kang_pbmc_ifnb_harmony',
  'pbmc68k_reduced_counts',
  'sc_mixology_lung_lines',
  'mouse_embryo_E35_E45',
)


@pytest.mark.parametrize('name', REAL)
def test_real_cells(real_data, name):
  file = sorted((real_data / name).glob('*.h5ad'))[0]
  matrix = anndata.read_h5ad(file).X[:150]
  cells = from_dense(matrix)
  rng = np.random.default_rng(2)
  token_R = rng.permutation(matrix.shape[1]).astype(np.int32) + 2
  median_V = np.maximum(rng.poisson(0.4, len(token_R) + 2), 1).astype(float)
  for mode in encoding.MODES:
    config = encoding.EncodingConfig(mode)
    assert_as_reference(cells, config, token_R, median_V, range(0, 150, 30))


def test_recorded_outputs_of_the_original(oracle):
  """Values exactly; tokens up to order in exact ties, the cut included."""
  record = np.load(oracle / 'preprocess_synthetic_float.npz')
  tables = json.loads(
    (oracle / 'preprocess_synthetic_float_dicts.json').read_text()
  )
  column_of = {
    tables['name2id'].get(name): j
    for j, name in enumerate(record['in/gene_names'])
  }
  row_of = {name: i for i, name in enumerate(record['in/cell_names'])}
  genes = record['step7/genes']
  counts = record['in/counts_cells_x_genes'][
    np.ix_(
      [row_of[c] for c in record['step7/cells']], [column_of[g] for g in genes]
    )
  ]
  tokens = np.array([tables['token_dict'][g] for g in genes], np.int32)
  divisor_V = np.ones(max(tables['token_dict'].values()) + 1)
  divisor_V[tokens] = [tables['medians'].get(g, 1.0) for g in genes]
  cells = from_dense(counts)
  encoded = encoding.CellEncoder(
    encoding.EncodingConfig(), tokens, divisor_V
  ).encode(cells)
  by_token = encoding.CellEncoder(
    encoding.EncodingConfig(ties='token'), tokens, divisor_V
  ).encode(cells)
  np.testing.assert_array_equal(
    np.diff(encoded.starts_C1), record['out/length']
  )
  assert record['out/length'].max() == 2048
  assert encoded.num_genes_C.max() > 2048
  for c in range(len(counts)):
    ids, values = cell(encoded, c)
    n = len(ids)
    assert_within_one_ulp(values, record['out/ds_values'][c, :n])
    exact = dict(zip(tokens, record['out/log2p1'][c]))
    np.testing.assert_array_equal(
      [exact[i] for i in ids], record['out/values_f64'][c, :n]
    )
    assert len(set(ids)) == n
    # The log of the record joins a few neighbouring quotients into ties.
    ids = cell(by_token, c)[0]
    ids = ids[np.lexsort((ids, [-exact[i] for i in ids]))]
    np.testing.assert_array_equal(ids, record['out/stable_input_ids'][c, :n])


def test_ties_do_not_follow_the_token():
  """No rank correlation of token and place, and another order each epoch."""
  cells = from_dense(np.ones((40, 1000), np.uint16))
  token_R = np.arange(2, 1002, dtype=np.int32)
  encoder = encoding.CellEncoder(
    encoding.EncodingConfig(), token_R, np.ones(1002)
  )
  orders = [encoder.encode(cells, seed=1, epoch=e) for e in range(50)]
  firsts = np.array([cell(o, 0)[0] for o in orders])
  assert len({tuple(f) for f in firsts}) == 50
  correlation = [np.corrcoef(f, np.arange(1000))[0, 1] for f in firsts]
  assert abs(np.mean(correlation)) < 5 / np.sqrt(50 * 1000)
  mean_token = firsts.mean(axis=0)
  assert np.abs(mean_token - 501.5).max() < 6 * 289 / np.sqrt(50)


counts_strategy = st.lists(
  st.tuples(st.integers(0, 39), st.integers(0, 6)), min_size=1, max_size=60
)
SOME = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
TOKEN_R = np.array([2 + i % 25 if i % 7 else -1 for i in range(40)], np.int32)
DIVISOR_V = np.array([1.0, 1.0, *[1 + (i % 3) * 0.7 for i in range(25)]])


def ragged(pairs, dtype, rows_dtype=np.int32, total=50.0):
  rows, counts = zip(*pairs)
  return encoding.RaggedCells(
    np.array(rows, rows_dtype),
    np.array(counts, dtype),
    np.array([0, len(pairs)]),
    np.array([total]),
  )


def assert_equal(a, b):
  for field in dataclasses.fields(encoding.EncodedCells):
    np.testing.assert_array_equal(
      getattr(a, field.name), getattr(b, field.name)
    )


@SOME
@hypothesis.given(
  counts_strategy, st.randoms(), st.sampled_from(encoding.MODES)
)
def test_order_of_columns_duplicates_and_dtype(pairs, random, mode):
  encoder = encoding.CellEncoder(
    encoding.EncodingConfig(mode), TOKEN_R, DIVISOR_V
  )
  first = encoder.encode(ragged(pairs, np.float64), seed=3, epoch=1)
  shuffled = random.sample(pairs, len(pairs))
  assert_equal(
    first, encoder.encode(ragged(shuffled, np.float64), seed=3, epoch=1)
  )
  for dtype, rows in (
    (np.uint16, np.uint16),
    (np.int64, np.int64),
    (np.float32, np.uint32),
  ):
    cells = ragged(pairs, dtype, rows)
    assert_equal(first, encoder.encode(cells, seed=3, epoch=1))
  summed = {}
  for row, count in pairs:
    summed[row] = summed.get(row, 0) + count
  once = ragged(sorted(summed.items()), np.uint16, np.uint16)
  assert_equal(first, encoder.encode(once, seed=3, epoch=1))
  config = encoding.EncodingConfig(mode)
  tokens, _, _ = reference(
    once, 0, config, TOKEN_R, DIVISOR_V, kernels.fold(3, 1)
  )
  np.testing.assert_array_equal(first.gene_ids_N, tokens)


@SOME
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, 9), st.floats(0, 1e6)), min_size=1, max_size=30
  ),
  st.randoms(),
)
def test_fractional_counts_sum_the_same_in_any_order(pairs, random):
  encoder = encoding.CellEncoder(
    encoding.EncodingConfig(), np.full(10, 2, np.int32), np.ones(3)
  )
  shuffled = random.sample(pairs, len(pairs))
  assert_equal(
    encoder.encode(ragged(pairs, np.float64)),
    encoder.encode(ragged(shuffled, np.float64)),
  )


def test_batches_and_threads_change_nothing():
  cells, token_R, rng = random_cells(4, num_cells=40)
  encoder = encoding.CellEncoder(
    encoding.EncodingConfig(), token_R, np.maximum(rng.poisson(1, 7000), 1.0)
  )
  whole = encoder.encode(cells, seed=1, epoch=2)

  def one(c):
    s = cells.starts_C1
    part = encoding.RaggedCells(
      cells.gene_rows_N, cells.counts_N, s[c : c + 2], cells.totals_C[c : c + 1]
    )
    return encoder.encode(part, seed=1, epoch=2)

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for c, part in enumerate(pool.map(one, range(40))):
      np.testing.assert_array_equal(part.gene_ids_N, cell(whole, c)[0])
      np.testing.assert_array_equal(part.values_N, cell(whole, c)[1])
      assert part.keys_C[0] == whole.keys_C[c]


def test_a_perturbed_variant_keeps_the_order_of_its_cell():
  cells, token_R, _ = random_cells(5, num_cells=1)
  encoder = encoding.CellEncoder(
    encoding.EncodingConfig(), token_R, np.ones(7000)
  )
  before = encoder.encode(cells)
  deleted = 17
  keep = np.arange(len(cells.counts_N)) != deleted
  variant = encoding.RaggedCells(
    cells.gene_rows_N[keep],
    cells.counts_N[keep],
    np.array([0, keep.sum()]),
    cells.totals_C,
  )
  gone = token_R[cells.gene_rows_N[deleted]]
  expected = before.gene_ids_N[before.gene_ids_N != gone]
  after = encoder.encode(variant, keys_C=before.keys_C)
  np.testing.assert_array_equal(after.gene_ids_N, expected)
  assert after.keys_C[0] == before.keys_C[0]
  assert not np.array_equal(encoder.encode(variant).gene_ids_N, expected)


def test_empty_cells():
  cells = encoding.RaggedCells(
    np.zeros(1, np.uint16),
    np.array([3], np.uint16),
    np.array([0, 0, 1, 1]),
    np.array([0.0, 3.0, 0.0]),
  )
  for mode in encoding.MODES:
    encoder = encoding.CellEncoder(
      encoding.EncodingConfig(mode), np.array([2], np.int32), np.ones(3)
    )
    encoded = encoder.encode(cells)
    np.testing.assert_array_equal(encoded.starts_C1, [0, 0, 1, 1])
    np.testing.assert_array_equal(encoder.lengths(cells), [0, 1, 0])


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.int32])
def test_input_is_not_touched_and_may_be_read_only(dtype):
  cells = ragged([(3, 2), (1, 2), (8, 1)], dtype)
  cells.counts_N.flags.writeable = False
  copy = cells.gene_rows_N.copy(), cells.counts_N.copy()
  encoding.CellEncoder(encoding.EncodingConfig(), TOKEN_R, DIVISOR_V).encode(
    cells
  )
  np.testing.assert_array_equal(cells.gene_rows_N, copy[0])
  np.testing.assert_array_equal(cells.counts_N, copy[1])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'counts_N': np.array([1.0, -1, 2])}, 'negative'),
    ({'counts_N': np.array([1.0, np.nan, 2])}, 'NaN'),
    ({'counts_N': np.array([1.0, np.inf, 2])}, 'infinite'),
    ({'gene_rows_N': np.array([0, 40, 2], np.int32)}, 'outside'),
    ({'gene_rows_N': np.array([0, -1, 2], np.int32)}, 'outside'),
    ({'gene_rows_N': np.array([0, 1 << 40, 2])}, 'outside'),
    ({'gene_rows_N': np.array([0.0, 1, 2])}, 'integers'),
    ({'starts_C1': np.array([0, 5])}, 'starts'),
    ({'starts_C1': np.array([0, 1 << 50])}, 'starts'),
    ({'starts_C1': np.array([2, 1])}, 'starts'),
    ({'totals_C': np.array([0.0])}, 'library size'),
    ({'totals_C': np.array([1.0, 1.0])}, 'library sizes'),
  ],
)
def test_bad_cells_are_named_in_one_line(change, message):
  cells = encoding.RaggedCells(
    np.array([0, 1, 2], np.int32),
    np.array([1.0, 1, 2]),
    np.array([0, 3]),
    np.array([4.0]),
  )
  encoder = encoding.CellEncoder(
    encoding.EncodingConfig('library'), TOKEN_R, DIVISOR_V
  )
  with pytest.raises(errors.UserError, match=message) as caught:
    encoder.encode(dataclasses.replace(cells, **change))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('token_R', 'divisor_V'),
  [([2, 9], np.ones(3)), ([2, -2], np.ones(3)), ([2], [1.0, 1.0, 0.0])],
)
def test_bad_tables(token_R, divisor_V):
  with pytest.raises(errors.UserError):
    encoding.CellEncoder(
      encoding.EncodingConfig(), np.array(token_R), np.array(divisor_V)
    )


@pytest.mark.parametrize(
  'change',
  [{'mode': 'x'}, {'ties': 'x'}, {'max_genes': 0}, {'target_sum': -1.0}],
)
def test_bad_configs(change):
  with pytest.raises(errors.UserError):
    encoding.EncodingConfig(**change)


def test_kernels_compile_without_a_folder_for_the_cache(monkeypatch):
  real = kernels.numba.njit

  def njit(*args, cache=False, **options):
    if cache:
      raise RuntimeError('cannot cache function: no locator available')
    return real(*args, **options)

  monkeypatch.setattr(kernels.numba, 'njit', njit)
  assert kernels.compiled(lambda x: x + 1)(1) == 2
