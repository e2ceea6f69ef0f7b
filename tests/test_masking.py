"""Masks against a pure-Python reference and the original's collator."""

import dataclasses
import json

import numpy as np
import pytest

from genecompass_jax import encoding, errors, masking

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
SIZE = 5000
POOL = np.arange(100, 4000, 3, dtype=np.int32)


def mix64(x):
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _BITS
  x = (x ^ x >> 27) * 0x94D049BB133111EB & _BITS
  return x ^ x >> 31


def reference(ids, values, index, config, seed, epoch, pool):
  """(ids, values, is_masked) of one cell in Python integers."""
  state = 0
  for part in (0x6D61736B, seed, epoch):
    state = mix64(((state ^ part & _BITS) + _GOLDEN) & _BITS)
  key = mix64(state ^ mix64(index & _BITS))
  out = []
  for token, value in zip(map(int, ids), values):
    draw = mix64((key + token * _GOLDEN) & _BITS)
    if draw >= int(config.rate * 2**64):
      out.append((token, value, False))
      continue
    draw = mix64(draw ^ _GOLDEN)
    if draw < int(config.mask_share * 2**64):
      out.append((1, -1.0, True))
    elif draw < int((config.mask_share + config.random_share) * 2**64):
      place = (mix64(draw ^ _GOLDEN) >> 32) * len(pool) >> 32
      out.append((pool[place], -1.0, True))
    else:
      out.append((token, value if config.policy == 'released' else -1.0, True))
  return out


def make_cells(lengths, seed=0):
  rng = np.random.default_rng(seed)
  ids = [rng.permutation(SIZE - 2)[:n] + 2 for n in lengths]
  return encoding.EncodedCells(
    np.concatenate(ids).astype(np.int32),
    rng.gamma(2, 1, sum(lengths)).astype(np.float32),
    np.cumsum([0, *lengths]),
    np.zeros(len(lengths), np.uint64),
    np.array(lengths, np.int32),
  )


def mask(cells, index_C, config=masking.MaskConfig(), **change):  # noqa: B008
  arguments = {
    'seed': 3,
    'epoch': 5,
    'random_tokens': POOL,
    'vocabulary_size': SIZE,
  }
  return masking.mask_cells(
    cells, index_C, config=config, **(arguments | change)
  )


def assert_equal(a, b):
  for field in dataclasses.fields(masking.MaskedCells):
    np.testing.assert_array_equal(
      getattr(a, field.name), getattr(b, field.name)
    )


@pytest.mark.parametrize('policy', masking.POLICIES)
@pytest.mark.parametrize('epoch', [0, 5, masking.EVALUATION_EPOCH])
def test_equals_reference(policy, epoch):
  cells = make_cells([200, 0, 1, 300])
  index_C = np.array([9, 2**40, 0, 77])
  config = masking.MaskConfig(policy=policy)
  got = mask(cells, index_C, config, epoch=epoch)
  pool = np.arange(SIZE) if policy == 'released' else POOL
  for c in range(4):
    s = slice(*cells.starts_C1[c : c + 2])
    want = reference(
      cells.gene_ids_N[s], cells.values_N[s], int(index_C[c]), config, 3, epoch,
      pool,
    )  # fmt: skip
    found = zip(got.gene_ids_N[s], got.values_N[s], got.is_masked_N[s])
    assert list(found) == want


def test_rates_and_what_is_hidden():
  cells = make_cells([1200] * 500)
  got = mask(cells, np.arange(500))
  picked = got.is_masked_N
  n = picked.sum()
  ids = got.gene_ids_N[picked]
  own = ids == cells.gene_ids_N[picked]
  hidden = ids == 1
  for share, of, want in (
    (picked, picked.size, 0.15),
    (hidden, n, 0.8),
    (~own & ~hidden, n, 0.1),
  ):
    spread = np.sqrt(want * (1 - want) / of)
    assert abs(share.mean() - want) < 5 * spread
  np.testing.assert_array_equal(got.values_N == -1, picked)
  np.testing.assert_array_equal(
    got.gene_ids_N[~picked], cells.gene_ids_N[~picked]
  )
  drawn = ids[~own & ~hidden]
  assert np.isin(drawn, POOL).all()
  share = np.bincount(drawn, minlength=SIZE)[POOL] / len(drawn) * len(POOL)
  assert abs(share[: len(POOL) // 2].mean() - 1) < 5 / np.sqrt(len(drawn))
  per_cell = picked.reshape(500, -1).sum(axis=1)
  assert abs(per_cell.var() / (1200 * 0.15 * 0.85) - 1) < 0.35


def test_released_policy_is_the_original_collator(oracle):
  """The same three outcomes, at the same rates, on the recorded cells."""
  record = np.load(oracle / 'mlm_collator.npz')
  meta = json.loads((oracle / 'collator_meta.json').read_text())
  labels = record['out/labels']
  seen, ids = record['out/input_ids'], record['in/input_ids']
  values = record['out/values']
  chosen = labels != -100
  picks = [record[f'draw/{i}_bernoulli_result'].astype(bool) for i in (0, 1, 2)]
  is_gene = ids > 1
  np.testing.assert_array_equal(chosen, picks[0] & is_gene)
  # Replaying the recorded draws through the rules of the module's table:
  is_mask = chosen & picks[1]
  is_random = chosen & ~picks[1] & picks[2]
  want_ids = np.where(is_mask, 1, ids)
  want_ids = np.where(is_random, record['draw/3_randint_result'], want_ids)
  np.testing.assert_array_equal(seen, want_ids)
  hidden = is_mask | is_random
  np.testing.assert_array_equal(
    values, np.where(hidden, np.float32(-1), record['in/values'])
  )
  low, high = meta['mlm_collator']['rates']['random_words_min_max']
  assert (low, high) == (0, int(record['draw/3_randint_arg'][0]) - 1)

  cells = make_cells([1200] * 400)
  got = mask(
    cells,
    np.arange(400),
    masking.MaskConfig(policy='released'),
    random_tokens=np.zeros(0, np.int32),
  )
  picked = got.is_masked_N
  same = got.gene_ids_N == cells.gene_ids_N
  keeps = picked & (got.values_N != -1)
  np.testing.assert_array_equal(got.values_N[keeps], cells.values_N[keeps])
  assert same[keeps].all()
  rates = meta['mlm_collator']['rates']
  assert abs(picked.mean() - rates['selected_of_nonpad']) < 0.005
  assert abs(keeps.sum() / picked.sum() - rates['kept']) < 0.005
  share = (got.gene_ids_N[picked] == 1).mean()
  assert abs(share - rates['mask']) < 0.006
  drawn = got.gene_ids_N[picked & ~same & (got.gene_ids_N != 1)]
  assert drawn.min() < 20
  assert drawn.max() > SIZE - 20


def test_packing_batch_and_order_of_genes_change_nothing():
  lengths = [300, 20, 500, 1]
  cells = make_cells(lengths)
  index_C = np.array([4, 1, 8, 2])
  whole = mask(cells, index_C)
  for c in (2, 0, 3, 1):
    s = slice(*cells.starts_C1[c : c + 2])
    one = encoding.EncodedCells(
      cells.gene_ids_N[s],
      cells.values_N[s],
      np.array([0, lengths[c]]),
      cells.keys_C[:1],
      cells.num_genes_C[:1],
    )
    assert_equal(
      mask(one, index_C[c : c + 1]),
      masking.MaskedCells(
        whole.gene_ids_N[s], whole.values_N[s], whole.is_masked_N[s]
      ),
    )
    back = dataclasses.replace(
      one, gene_ids_N=one.gene_ids_N[::-1], values_N=one.values_N[::-1]
    )
    np.testing.assert_array_equal(
      mask(back, index_C[c : c + 1]).is_masked_N, whole.is_masked_N[s][::-1]
    )


def test_seed_epoch_and_cell_each_change_the_mask():
  cells = make_cells([1000])
  masks = [
    mask(cells, np.array([index]), seed=seed, epoch=epoch).is_masked_N
    for seed, epoch, index in (
      (0, 0, 0),
      (1, 0, 0),
      (0, 1, 0),
      (0, 0, 1),
      (0, -1, 0),
      (1, 1, 1),
    )  # fmt: skip
  ]
  overlap = np.corrcoef(np.array(masks))
  assert np.abs(overlap - np.eye(6)).max() < 0.2
  assert_equal(mask(cells, np.array([3])), mask(cells, np.array([3])))


def test_each_cell_draws_from_its_own_source():
  cells = make_cells([1000] * 30)
  pools = [POOL[:5], POOL[-7:]]
  got = mask(
    cells,
    np.arange(30),
    masking.MaskConfig(rate=1, mask_share=0, random_share=1),
    random_tokens=masking.TokenPools.of([*pools, pools[0][:0]], SIZE),
    pool_C=np.arange(30) % 2,
  )
  assert got.is_masked_N.all()
  for c, ids in enumerate(got.gene_ids_N.reshape(30, 1000)):
    assert set(ids) == set(pools[c % 2])


def test_an_empty_pool_is_an_error_only_for_a_cell_that_draws_from_it():
  pools = masking.TokenPools.of([POOL, POOL[:0]], SIZE)
  cells = make_cells([10, 10])
  got = mask(cells, np.arange(2), random_tokens=pools)
  assert_equal(got, mask(cells, np.arange(2)))
  with pytest.raises(errors.UserError, match='measured no gene'):
    mask(cells, np.arange(2), random_tokens=pools, pool_C=np.array([0, 1]))


def test_inputs_stay_as_they_are():
  cells = make_cells([100])
  copy = cells.gene_ids_N.copy(), cells.values_N.copy()
  mask(cells, np.array([0]))
  np.testing.assert_array_equal(cells.gene_ids_N, copy[0])
  np.testing.assert_array_equal(cells.values_N, copy[1])


def test_nothing_to_hide():
  cells = make_cells([100])
  got = mask(cells, np.array([0]), masking.MaskConfig(rate=0))
  assert not got.is_masked_N.any()
  empty = make_cells([0])
  assert len(mask(empty, np.array([0])).gene_ids_N) == 0


@pytest.mark.parametrize(
  'pool', [np.zeros(0, np.int32), np.array([1, 5]), np.array([5, SIZE])]
)
def test_bad_pools_are_one_line(pool):
  with pytest.raises(errors.UserError) as caught:
    mask(make_cells([10]), np.array([0]), random_tokens=pool)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'change',
  [
    {'policy': 'x'},
    {'rate': 1.5},
    {'mask_share': -0.1},
    {'mask_share': 0.95},
    {'rate': float('nan')},
  ],
)
def test_bad_configs(change):
  with pytest.raises(errors.UserError):
    masking.MaskConfig(**change)
