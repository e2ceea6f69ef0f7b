"""Null models of the split objective: references, Bayes' rule, files."""

import collections
import dataclasses
import io
import json

import numpy as np
import pytest

from genecompass_jax import encoding, errors, masking, nulls
from genecompass_jax.nulls import split as null_split
from tests import test_nulls, test_split

FIRST, TOKENS, DIVISOR_V = test_nulls.FIRST, test_nulls.TOKENS, (
  test_nulls.DIVISOR_V
)  # fmt: skip
MASK = masking.MaskConfig(rate=0.4, objective='split', id_share=0.6)
ALL = (
  *('null_id_marginal', 'null_id_rank_bin', 'null_id_rank_bracket'),
  *('null_id_value_bracket', 'null_value_gene_mean'),
)


def scored(mode, ties='hash', mask=MASK, num_train=200, **choices):
  """(model, train, test, encoded test cells, masked, batch, losses)."""
  config = encoding.EncodingConfig(mode, ties)
  train = test_nulls.gene_counts(0, num_train)
  test = test_nulls.gene_counts(1, 12)
  model = test_nulls.fit(train, config, mask, **choices)
  cells = test_nulls.encode(test, config)
  masked = test_nulls.hide(cells, mask)
  batch = test_split.batch_of(cells, masked)
  return model, train, test, cells, masked, batch, model.losses(batch)


def asked(batch, weights, losses):
  return losses[weights > 0]


@pytest.mark.parametrize('ties', encoding.TIES)
@pytest.mark.parametrize('mode', encoding.MODES)
def test_value_bracket_equals_the_reference(mode, ties):
  """Genes not shown whose count would be whole, weighted as counted."""
  model, train, test, cells, masked, batch, losses = scored(
    mode, ties, pseudo_cells=0.0, mix_value_bracket=0.03
  )
  bins = test_nulls.Reference.atoms
  pairs = collections.Counter()
  width = collections.Counter(bins(int(c)) for c in range(1, 2000))
  cells_of = collections.Counter()
  for row in train:
    for gene in np.flatnonzero(row):
      pairs[gene, bins(row[gene])] += 1
      cells_of[gene] += 1
  seen = {g: len(train) - (1 - 0.4 * 0.6) * cells_of[g] for g in range(40)}
  marginal = {g: cells_of[g] + 0.5 for g in range(40)}
  whole = sum(marginal.values())
  marginal = {g: m / whole for g, m in marginal.items()}
  apart, shown = masking.set_apart(cells, masked)
  got = iter(asked(batch, batch.id_weights_BK, losses['null_id_value_bracket']))
  checked = 0
  for c in range(cells.num_cells):
    a, b = cells.starts_C1[c : c + 2]
    ranked = b - a - shown.unranked_C[c]
    tokens = apart.gene_ids_N[a:b]
    is_shown = shown.gene_ids_N[a:b] != 1
    visible = set(tokens[is_shown].tolist())
    keys = test[c, tokens - FIRST] / DIVISOR_V[tokens]
    for i in np.flatnonzero(~is_shown):
      low, high = -1, test_nulls.SIZE
      if ties == 'token':
        equal = [
          j
          for j in range(ranked)
          if is_shown[j] and abs(keys[j] - keys[i]) < 1e-9
        ]
        low = max([tokens[j] for j in equal if j < i], default=low)
        high = min([tokens[j] for j in equal if j > i], default=high)
      mass = {}
      for token in TOKENS.tolist():
        if token in visible or not low < token < high:
          continue
        g = token - FIRST
        count = keys[i] * DIVISOR_V[token]
        if abs(count - round(count)) < 1e-6 and round(count) >= 1:
          atoms = bins(round(count))
          mass[token] = pairs[g, atoms] / width[atoms] / seen[g]
      unseen = sum(
        marginal[t - FIRST] for t in TOKENS.tolist() if t not in visible
      )
      label = int(tokens[i])
      back = marginal[label - FIRST] / unseen
      total = sum(mass.values())
      p = back
      if total > 0:
        p = 0.97 * mass.get(label, 0) / total + 0.03 * back
      assert next(got) == pytest.approx(-np.log(p), rel=1e-6)
      checked += 1
  assert checked > 40
  assert next(got, None) is None


@pytest.mark.parametrize('ties', encoding.TIES)
@pytest.mark.parametrize('mode', encoding.MODES)
def test_probabilities_sum_to_one_over_genes_not_shown(mode, ties):
  model, _, _, cells, masked, batch, _ = scored(mode, ties)
  shown_B = [
    set(batch.cells.gene_ids_BL[b].tolist()) for b in range(cells.num_cells)
  ]
  is_id = batch.id_weights_BK > 0
  total = collections.Counter()
  for token in TOKENS.tolist():
    labels = np.where(is_id, token, batch.id_labels_BK).astype(np.int32)
    losses = model.losses(dataclasses.replace(batch, id_labels_BK=labels))
    candidate = np.array([token not in shown for shown in shown_B])[:, None]
    for name in nulls.SPLIT_ID_NAMES:
      weight = 1.0 if name == 'null_id_marginal' else candidate
      total[name] += (np.exp(-losses[name]) * weight)[is_id]
  for name, sums in total.items():
    np.testing.assert_allclose(sums, 1.0, atol=1e-9, err_msg=name)


def test_the_value_bracket_sees_more_than_the_rank_bracket():
  _, _, _, _, _, batch, losses = scored('released', num_train=4000)
  means = {
    name: asked(batch, batch.id_weights_BK, losses[name]).mean()
    for name in nulls.SPLIT_ID_NAMES
  }
  assert means['null_id_value_bracket'] <= means['null_id_rank_bracket'] + 0.02
  assert means['null_id_rank_bracket'] < means['null_id_rank_bin']
  assert means['null_id_rank_bin'] < means['null_id_marginal'] - 0.1


def test_marginal_and_gene_mean_keep_their_meaning():
  model, train, _, cells, masked, batch, losses = scored('released')
  expressed = (train > 0).sum(0) + 0.5
  is_id, is_value = batch.id_weights_BK > 0, batch.value_weights_BK > 0
  np.testing.assert_allclose(
    losses['null_id_marginal'][is_id],
    -np.log(expressed / expressed.sum())[batch.id_labels_BK[is_id] - FIRST],
  )
  log = np.log2(1 + train / DIVISOR_V[FIRST:])
  mean = log.sum(0) / (train > 0).sum(0)
  np.testing.assert_allclose(
    losses['null_value_gene_mean'][is_value],
    (mean[batch.id_labels_BK[is_value] - FIRST]
     - batch.value_labels_BK[is_value]) ** 2,
    rtol=1e-4, atol=1e-6,
  )  # fmt: skip
  for name in nulls.SPLIT_VALUE_NAMES[::2]:
    assert not losses[name][~is_value].any()
  assert not losses['null_id_value_bracket'][~is_id].any()


def test_count_mean_is_the_mean_at_the_scale_of_the_cell():
  _, train, test, cells, masked, batch, losses = scored(
    'library', pseudo_cells=0.0
  )
  assert 'null_value_count_mean' in losses
  for row in range(cells.num_cells):
    scale = 1e4 / test[row].sum()
    for k in np.flatnonzero(batch.value_weights_BK[row]):
      gene = batch.id_labels_BK[row, k] - FIRST
      if gene == 7:  # its counts are binned
        continue
      counts = train[train[:, gene] > 0, gene]
      mean = np.log2(1 + scale * counts / DIVISOR_V[FIRST + gene]).mean()
      want = (mean - batch.value_labels_BK[row, k]) ** 2
      got = losses['null_value_count_mean'][row, k]
      assert np.sqrt(got) == pytest.approx(np.sqrt(want), abs=2e-4)


def depth_counts(seed, num_cells):
  """Genes whose counts follow the depth of the cell, and no more."""
  rng = np.random.default_rng(seed)
  depth = 2 ** rng.uniform(0, 5, (num_cells, 1))
  return rng.poisson(np.linspace(0.5, 4, 40) * depth)


def test_a_line_follows_the_depth_of_the_cell():
  config = encoding.EncodingConfig()
  model = test_nulls.fit(depth_counts(0, 600), config, MASK)
  cells = test_nulls.encode(depth_counts(1, 40), config)
  batch = test_split.batch_of(cells, test_nulls.hide(cells, MASK))
  losses = model.losses(batch)
  line, mean = (
    asked(batch, batch.value_weights_BK, losses[f'null_value_{name}']).mean()
    for name in ('cell_scaled', 'gene_mean')
  )
  assert line < 0.5 * mean


def test_lines_are_least_squares_drawn_together():
  rng = np.random.default_rng(0)
  num = null_split.NUM_FEATURES
  moments = null_split.no_moments(3)
  data = []
  for gene, cells in ((0, 500), (1, 300)):
    x = rng.normal(2, 1, (cells, num))
    y = x @ rng.normal(0, 1, num) + gene + rng.normal(0, 0.1, cells)
    upper = [
      (x[:, a] * x[:, b]).sum() for a in range(num) for b in range(a, num)
    ]
    moments[gene] = [
      cells,
      y.sum(),
      *x.sum(0),
      *upper,
      *(x * y[:, None]).sum(0),
    ]
    data.append((x, y))
  free = null_split.lines(moments, 0.0, 0.0)
  tied = null_split.lines(moments, 1e9, 0.0)
  for gene, (x, y) in enumerate(data):
    wanted, *_ = np.linalg.lstsq(x - x.mean(0), y - y.mean(), rcond=None)
    np.testing.assert_allclose(free.slope_TX[gene], wanted, atol=1e-5)
    np.testing.assert_allclose(free.centre_TX[gene], x.mean(0))
    assert abs(free.offset_T[gene] - y.mean()) < 0.02
  np.testing.assert_allclose(tied.slope_TX[0], tied.slope_TX[1], atol=1e-5)
  np.testing.assert_allclose(tied.slope_TX[2], tied.slope_TX[1], atol=1e-5)
  none = null_split.lines(null_split.no_moments(2), 10.0, 1.5)
  np.testing.assert_array_equal(none.offset_T, 1.5)
  assert not none.slope_TX.any()


@pytest.mark.slow  # 15 s
def test_the_lowest_value_is_that_of_the_other_genes():
  cells = encoding.EncodedCells(
    np.array([4, 2, 3, 5], np.int32),
    np.array([4, 3, 1, 1], np.float32),
    np.array([0, 3, 4]),
    np.zeros(2, np.uint64),
    np.array([3, 1], np.int32),
  )
  moments = null_split.no_moments(4)
  null_split.add_moments(
    cells.gene_ids_N, cells.values_N, cells.starts_C1,
    np.array([-1, -1, 0, 1, 2, 3], np.int32), np.ones(6), False, moments,
  )  # fmt: skip
  np.testing.assert_array_equal(moments[:, 0], [1, 1, 1, 0])
  np.testing.assert_allclose(moments[0, 1:6], [3, 2.5, 1, np.log2(3), 0])
  np.testing.assert_allclose(moments[1, 1:6], [1, 3.5, 3, np.log2(3), 0])


@pytest.mark.parametrize('mode', encoding.MODES)
def test_corrected_counts_and_cells_that_show_nothing_are_scored(mode):
  config = encoding.EncodingConfig(mode)
  rng = np.random.default_rng(0)
  broken = test_nulls.gene_counts(0, 80) * rng.uniform(0.5, 1.5, (80, 40))
  for mask in (MASK, dataclasses.replace(MASK, rate=1.0)):
    model = test_nulls.fit(broken[:60], config, mask)
    cells = test_nulls.encode(broken[60:], config)
    batch = test_split.batch_of(cells, test_nulls.hide(cells, mask))
    for name, losses in model.losses(batch).items():
      assert np.isfinite(losses).all(), name


def test_each_objective_and_mode_has_its_names():
  for mode in encoding.MODES:
    config = encoding.EncodingConfig(mode)
    joint = test_nulls.fit(
      test_nulls.gene_counts(0, 30), config, test_nulls.DEFAULT
    )
    split = test_nulls.fit(test_nulls.gene_counts(0, 30), config, MASK)
    assert joint.names == nulls.NAMES
    has_mean = ('null_value_count_mean',) * (mode == 'library')
    assert split.names == (*ALL, *has_mean, 'null_value_cell_scaled')
    assert joint.moments == ()


@pytest.mark.parametrize('mode', encoding.MODES)
def test_files_come_back_and_are_refused_beside_other_cells(mode, tmp_path):
  model, _, _, _, _, batch, want = scored(mode)
  path = tmp_path / 'nulls.npz'
  model.save(path)
  again = nulls.NullModels.load(path)
  assert again.digest == model.digest
  for name, losses in again.losses(batch).items():
    np.testing.assert_array_equal(losses, want[name])
  again.check(model.encoding, MASK)
  with pytest.raises(errors.UserError, match='data.mask.objective'):
    again.check(model.encoding, masking.MaskConfig(rate=0.4))
  with pytest.raises(errors.UserError, match='encoding.max_genes'):
    again.check(dataclasses.replace(model.encoding, max_genes=9), MASK)
  joint = test_nulls.fit(
    test_nulls.gene_counts(0, 30), model.encoding, test_nulls.DEFAULT
  )
  with pytest.raises(errors.UserError, match='ranks are hidden'):
    joint.losses(batch)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(errors.UserError, match='fit them again'):
    nulls.NullModels.load(path)


def test_files_of_the_first_format_are_read(tmp_path):
  """They know neither the objective nor the choices that came with it."""
  model = test_nulls.fit(
    test_nulls.gene_counts(0, 30), encoding.EncodingConfig(), test_nulls.DEFAULT
  )
  path = tmp_path / 'nulls.npz'
  model.save(path)
  arrays = dict(np.load(path))
  header = json.loads(bytes(arrays['header']))
  header['format'] = 1
  for name in ('objective', 'id_share'):
    del header['mask'][name]
  for choices in header['choices']:
    for name in ('mix_value_bracket', 'slope_cells'):
      del choices[name]
  file = io.BytesIO()
  text = json.dumps(header).encode()
  np.savez(file, **(arrays | {'header': np.frombuffer(text, np.uint8)}))
  path.write_bytes(file.getvalue())
  again = nulls.NullModels.load(path)
  assert again.mask == model.mask
  assert again.choices == model.choices
  header['format'] = 3
  text = json.dumps(header).encode()
  np.savez(file := io.BytesIO(), **(arrays | {
    'header': np.frombuffer(text, np.uint8)}))  # fmt: skip
  path.write_bytes(file.getvalue())
  with pytest.raises(errors.UserError, match='reads 1 and 2'):
    nulls.NullModels.load(path)
