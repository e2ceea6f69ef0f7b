"""The split objective: what the model is shown never holds what it is asked."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from genecompass_jax import (
  corpus as corpus_lib,
  data,
  encoding,
  errors,
  knowledge as knowledge_lib,
  losses,
  masking,
  metrics,
  model,
  pretrained,
  rows,
  scoring,
)
from genecompass_jax.analysis import report
from tests import test_masking, test_model, test_train

SPLIT = masking.MaskConfig(objective='split')
OFTEN = masking.MaskConfig(rate=0.4, objective='split')
V = 200
MODEL = dataclasses.replace(
  test_model.TINY,
  vocabulary_size=V,
  max_genes=63,
  priors=(),
  hides_ranks=True,
)
CONFIG = data.DataConfig(
  rows_per_batch=8, layout='buckets', buckets=(32, 64), seed=3, mask=OFTEN
)
PACKED = dataclasses.replace(CONFIG, layout='packed', slots=256, streams=2)
ENCODING = encoding.EncodingConfig(max_genes=63)


def tied_cells(lengths=(30, 45, 12), seed=0):
  """Cells whose values are whole quotients: most of them tied."""
  rng = np.random.default_rng(seed)
  counts = [np.sort(rng.geometric(0.6, n))[::-1] for n in lengths]
  ids = [2 + rng.permutation(V - 2)[:n] for n in lengths]
  return encoding.EncodedCells(
    np.concatenate(ids).astype(np.int32),
    np.log2(1 + np.concatenate(counts)).astype(np.float32),
    np.cumsum([0, *lengths]),
    np.zeros(len(lengths), np.uint64),
    np.array(lengths, np.int32),
  )


def hide(cells, config=OFTEN, **draw):
  return masking.mask_cells(
    cells,
    np.arange(cells.num_cells),
    config=config,
    random_tokens=np.arange(2, V, dtype=np.int32),
    vocabulary_size=V,
    **({'seed': 0, 'epoch': 0} | draw),
  )


def batch_of(cells, masked):
  """One cell a row."""
  cells, masked = masking.set_apart(cells, masked)
  batch = rows.empty_batch(cells.num_cells, 64, 48)
  where = np.arange(cells.num_cells), np.zeros(cells.num_cells, np.int64)
  rows.place_cells(
    batch.cells,
    cells.starts_C1,
    masked.gene_ids_N,
    masked.values_N,
    *where,
    np.ones(cells.num_cells, np.int64),
    np.zeros(cells.num_cells, np.int64),
    masked.unranked_C,
  )
  picks_P = np.flatnonzero(masked.is_masked_N)
  picks_C1 = np.searchsorted(picks_P, cells.starts_C1)
  dropped = rows.place_labels(
    batch, cells, picks_P, picks_C1, *where, where[1], masked.unranked_C
  )
  assert not dropped
  return batch


def assert_same_inputs(a, b):
  jax.tree.map(np.testing.assert_array_equal, a.cells, b.cells)


# Masks


def test_the_same_genes_are_selected_and_dealt_to_one_question_each():
  cells = test_masking.make_cells([1200] * 400)
  joint = test_masking.mask(cells, np.arange(400))
  split = test_masking.mask(cells, np.arange(400), SPLIT)
  np.testing.assert_array_equal(joint.is_masked_N, split.is_masked_N)
  asks_value = split.hides_rank_N
  asks_id = split.is_masked_N & ~asks_value
  assert not (asks_value & ~split.is_masked_N).any()
  share = asks_id.sum() / split.is_masked_N.sum()
  assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(split.is_masked_N.sum())
  np.testing.assert_array_equal(split.gene_ids_N == 1, asks_id)
  np.testing.assert_array_equal(split.values_N == -1, asks_value)
  rest = ~asks_id
  np.testing.assert_array_equal(split.gene_ids_N[rest], cells.gene_ids_N[rest])
  np.testing.assert_array_equal(
    split.values_N[~asks_value], cells.values_N[~asks_value]
  )


@pytest.mark.parametrize('share', [0.0, 0.2, 1.0])
def test_the_share_of_ids_is_a_choice(share):
  cells = test_masking.make_cells([1200] * 100)
  config = masking.MaskConfig(objective='split', id_share=share)
  got = test_masking.mask(cells, np.arange(100), config)
  ids = (got.gene_ids_N == 1).sum() / got.is_masked_N.sum()
  assert abs(ids - share) < 0.02
  assert config.id_rate == pytest.approx(0.15 * share)


def test_the_draws_equal_a_reference():
  cells = test_masking.make_cells([150])
  got = test_masking.mask(cells, np.array([9]), OFTEN)
  state = 0
  mix, bits, golden = (
    test_masking.mix64, (1 << 64) - 1, test_masking._GOLDEN
  )  # fmt: skip
  for part in (0x6D61736B, 3, 5):
    state = mix(((state ^ part) + golden) & bits)
  key = mix(state ^ mix(9))
  for i, token in enumerate(cells.gene_ids_N.tolist()):
    draw = mix((key + token * golden) & bits)
    masked = draw < int(0.4 * 2**64)
    is_id = masked and mix(draw ^ golden) < 2**63
    assert got.is_masked_N[i] == masked
    assert got.hides_rank_N[i] == (masked and not is_id)
    assert (got.gene_ids_N[i] == 1) == is_id


def test_genes_apart_stand_last_by_token_and_the_others_close_up():
  cells = tied_cells()
  masked = hide(cells)
  shown, apart = masking.set_apart(cells, masked)
  batch = batch_of(cells, masked)
  assert apart.unranked_C.min() > 0
  for c in range(3):
    a, b = cells.starts_C1[c : c + 2]
    ranked = b - a - apart.unranked_C[c]
    stays = ~masked.hides_rank_N[a:b]
    np.testing.assert_array_equal(
      shown.gene_ids_N[a : a + ranked], cells.gene_ids_N[a:b][stays]
    )
    behind = shown.gene_ids_N[a + ranked : b]
    np.testing.assert_array_equal(
      behind, np.sort(cells.gene_ids_N[a:b][~stays])
    )
    positions = batch.cells.positions_BL[c, 1 : b - a + 1]
    np.testing.assert_array_equal(positions[:ranked], np.arange(ranked))
    assert (positions[ranked:] == masking.HIDDEN_RANK).all()
  again = masking.set_apart(cells, hide(cells, masking.MaskConfig()))
  assert again[0] is cells


@pytest.mark.parametrize(
  'change',
  [
    {'objective': 'x'},
    {'objective': 'split', 'id_share': 1.5},
    {'objective': 'split', 'policy': 'released'},
    {'objective': 'split', 'mask_share': 1.0},
    {'id_share': 0.3},
  ],
)
def test_what_has_no_effect_is_refused(change):
  with pytest.raises(errors.UserError) as caught:
    masking.MaskConfig(**change)
  assert '\n' not in str(caught.value)


# Leaks


@pytest.mark.parametrize('seed', range(20))
def test_no_value_of_a_hidden_rank_changes_what_is_shown(seed):
  """Any other counts of genes asked for their value, in their new ranks."""
  rng = np.random.default_rng(seed)
  cells = tied_cells(seed=seed)
  masked = hide(cells, epoch=seed)
  batch = batch_of(cells, masked)
  ids, values = cells.gene_ids_N.copy(), cells.values_N.copy()
  hidden_N = masked.hides_rank_N
  values[hidden_N] = rng.uniform(0.1, 9, hidden_N.sum())
  for a, b in zip(cells.starts_C1, cells.starts_C1[1:]):
    order = a + np.argsort(-values[a:b], kind='stable')
    ids[a:b], values[a:b] = ids[order], values[order]
  other = dataclasses.replace(cells, gene_ids_N=ids, values_N=values)
  assert not np.array_equal(other.gene_ids_N, cells.gene_ids_N)
  changed = batch_of(other, hide(other, epoch=seed))
  assert_same_inputs(batch, changed)
  for name in ('masked_slots_BK', 'id_labels_BK', 'id_weights_BK',
               'value_weights_BK'):  # fmt: skip
    np.testing.assert_array_equal(getattr(batch, name), getattr(changed, name))
  differs = batch.value_labels_BK != changed.value_labels_BK
  np.testing.assert_array_equal(differs, batch.value_weights_BK > 0)


def test_no_id_that_is_asked_changes_what_is_shown():
  """Ids asked for, swapped for others that stand at the same quotient."""
  cells = tied_cells()
  masked = hide(cells)
  batch = batch_of(cells, masked)
  swapped = 0
  for place in np.flatnonzero(masked.is_masked_N & ~masked.hides_rank_N):
    cell = np.searchsorted(cells.starts_C1, place, 'right') - 1
    a, b = cells.starts_C1[cell : cell + 2]
    for token in np.setdiff1d(np.arange(2, V), cells.gene_ids_N[a:b])[:60]:
      ids = cells.gene_ids_N.copy()
      ids[place] = token
      other = dataclasses.replace(cells, gene_ids_N=ids)
      changed = hide(other)
      is_asked = changed.is_masked_N[place] & ~changed.hides_rank_N[place]
      if not is_asked:  # the draws of another gene
        continue
      changed = batch_of(other, changed)
      assert_same_inputs(batch, changed)
      differs = batch.id_labels_BK != changed.id_labels_BK
      assert differs.sum() == 1
      assert batch.id_weights_BK[differs] == 1
      swapped += 1
      break
  assert swapped > 10


@pytest.mark.parametrize('id_share', [0.0, 0.5, 1.0])
def test_ids_are_scored_where_they_are_asked(id_share):
  """Half of the slots pass the id head, and all where that is not enough."""
  config, knowledge = MODEL, knowledge_lib.empty(2, V)
  params = test_model.params_of(config)
  mask = dataclasses.replace(OFTEN, rate=0.6, id_share=id_share)
  batch = batch_of(tied_cells(), hide(tied_cells(), mask))
  is_id = batch.id_weights_BK > 0
  most, num_slots = is_id.sum(1).max(), is_id.shape[1]
  assert (most > num_slots // 2) == (id_share == 1.0)

  def in_full(params):
    network = model.bind(config, params)
    hidden_BKD = jax.numpy.take_along_axis(
      network(batch.cells, knowledge), batch.masked_slots_BK[..., None], 1
    )
    return losses.id_losses(network.id_logits(hidden_BKD), batch.id_labels_BK)

  def as_trained(params):
    return scoring.slot_losses(params, batch, knowledge, config)[0]

  def total(losses_of):
    return lambda params: (batch.id_weights_BK * losses_of(params)).sum()

  np.testing.assert_allclose(
    np.where(is_id, as_trained(params), 0.0),
    np.where(is_id, in_full(params), 0.0),
    rtol=1e-6,
  )
  grads, wanted = (
    jax.grad(total(losses_of))(params) for losses_of in (as_trained, in_full)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    grads,
    wanted,
  )


def test_the_vector_of_hidden_ranks_is_learned():
  """Predictions of values read it, and no position that no gene has."""
  config, knowledge = MODEL, knowledge_lib.empty(2, V)
  params = test_model.params_of(config)
  batch = batch_of(tied_cells(), hide(tied_cells()))

  def position_grad(which_BK):
    def loss(params):
      id_BK, value_BK = scoring.slot_losses(params, batch, knowledge, config)
      return (which_BK * (id_BK + value_BK)).sum()

    return jax.grad(loss)(params)['embedding']

  grads = position_grad(batch.value_weights_BK)
  assert np.abs(grads['rank_hidden']).max() > 0
  used = np.unique(batch.cells.positions_BL[batch.cells.positions_BL >= 0])
  unused = np.setdiff1d(np.arange(config.max_genes), used)
  assert not np.asarray(grads['position'])[unused].any()


def test_slots_tell_nothing():
  """Genes apart in any order of slots give the same states."""
  config, knowledge = MODEL, knowledge_lib.empty(2, V)
  params = test_model.params_of(config)
  cells = batch_of(tied_cells(), hide(tied_cells(), epoch=7)).cells
  states = test_model.hidden_states(config, params, cells, knowledge)
  turned = jax.tree.map(np.copy, cells)
  row_places = []
  for row in range(3):
    apart = np.flatnonzero(cells.positions_BL[row] < 0)
    turned.gene_ids_BL[row, apart] = cells.gene_ids_BL[row, apart[::-1]]
    row_places.append(apart)
  again = test_model.hidden_states(config, params, turned, knowledge)
  assert max(len(apart) for apart in row_places) > 3
  for row, apart in enumerate(row_places):
    np.testing.assert_allclose(
      again[row, apart[::-1]], states[row, apart], atol=2e-5
    )
    rest = np.setdiff1d(np.flatnonzero(cells.segments_BL[row]), apart)
    np.testing.assert_allclose(again[row, rest], states[row, rest], atol=2e-5)


# The model


def test_one_vector_more_and_all_else_as_without_it():
  config = test_model.TINY
  split = dataclasses.replace(config, hides_ranks=True)
  a, b = (model.init(c, 0) for c in (config, split))
  assert not b['embedding'].pop('rank_hidden').any()
  jax.tree.map(np.testing.assert_array_equal, a, b)
  cells = test_model.apart_batch().cells
  knowledge = test_model.knowledge_of(config)
  np.testing.assert_array_equal(
    test_model.hidden_states(config, a, cells, knowledge),
    test_model.hidden_states(split, model.init(split, 0), cells, knowledge),
  )


def test_losses_are_each_divided_by_their_own_number():
  id_BK = np.array([[2.0, 4.0, 100.0]], np.float32)
  value_BK = np.array([[100.0, np.nan, 3.0]], np.float32)
  id_weights = np.array([[1.0, 1.0, 0.0]], np.float32)
  value_weights = np.array([[0.0, 0.0, 1.0]], np.float32)
  config = losses.LossConfig(0.5, 2.0)
  sums = losses.loss_sums(id_BK, id_weights, value_BK, value_weights)
  total, id_loss, value_loss = sums.means(config)
  assert (id_loss, value_loss, total) == (3.0, 3.0, 7.5)
  zeros = np.zeros_like(id_weights)
  none = losses.loss_sums(id_BK, zeros, value_BK, zeros).means(config)
  assert none == (0.0, 0.0, 0.0)


# Batches of a corpus


def of_cells(batches):
  """{cell: all that is shown and asked of it}, however it is laid out."""
  found = {}
  for host_batch in batches:
    batch = host_batch.batch
    for row, numbers in enumerate(host_batch.cell_index_BS):
      for s, number in enumerate(numbers):
        if number < 0:
          continue
        slots = np.flatnonzero(batch.cells.segments_BL[row] == s + 1)
        used = (batch.id_weights_BK + batch.value_weights_BK)[row] > 0
        mine = used & np.isin(batch.masked_slots_BK[row], slots)
        found[int(number)] = [
          *(
            np.asarray(x)[row, slots]
            for x in (
              batch.cells.gene_ids_BL,
              batch.cells.values_BL,
              batch.cells.positions_BL,
            )
          ),
          batch.masked_slots_BK[row, mine] - slots[0],
          *(
            np.asarray(x)[row, mine]
            for x in (
              batch.id_labels_BK,
              batch.id_weights_BK,
              batch.value_labels_BK,
              batch.value_weights_BK,
            )
          ),
        ]
  return found


def epoch_of(corpus, config, rows=None):
  loader = data.Loader(corpus, ENCODING, config, rows=rows)
  return of_cells(loader.batch(i) for i in range(loader.batches_per_epoch()))


def test_packing_buckets_and_hosts_show_a_cell_alike(tiny_corpus):
  corpus = corpus_lib.Corpus.open(tiny_corpus)
  buckets, packed = (epoch_of(corpus, c) for c in (CONFIG, PACKED))
  hosts = {}
  for half in np.split(np.arange(PACKED.rows_per_batch), 2):
    hosts |= epoch_of(corpus, PACKED, rows=half)
  both = buckets.keys() & packed.keys()
  assert len(both) > 300
  for cell in both:
    for a, b in zip(buckets[cell], packed[cell]):
      np.testing.assert_array_equal(a, b)
  assert hosts.keys() == packed.keys()
  for cell, arrays in hosts.items():
    for a, b in zip(arrays, packed[cell]):
      np.testing.assert_array_equal(a, b)
  ids, values, positions = (
    np.concatenate([c[k] for c in packed.values()]) for k in range(3)
  )
  np.testing.assert_array_equal(values == -1, positions == -1)
  assert not ((ids == 1) & (values <= 0)).any()
  weights = [np.concatenate([c[k] for c in packed.values()]) for k in (5, 7)]
  np.testing.assert_array_equal(weights[0] + weights[1], 1)


def test_evaluation_masks_are_fixed_and_those_of_epochs_are_not(tiny_corpus):
  corpus = corpus_lib.Corpus.open(tiny_corpus)
  first, again = (
    of_cells(data.evaluation_batches(corpus, ENCODING, c, 'train'))
    for c in (CONFIG, dataclasses.replace(CONFIG, rows_per_batch=16))
  )
  for cell, arrays in first.items():
    for a, b in zip(arrays, again[cell]):
      np.testing.assert_array_equal(a, b)
  trained = epoch_of(corpus, CONFIG)
  differ = [not np.array_equal(first[c][3], trained[c][3]) for c in trained]
  assert np.mean(differ) > 0.9


def test_a_value_beyond_k_stays_hidden_and_unasked(tiny_corpus, monkeypatch):
  corpus = corpus_lib.Corpus.open(tiny_corpus)
  full = data.Loader(corpus, ENCODING, CONFIG).batch(0)
  monkeypatch.setattr(data.DataConfig, 'num_masked', lambda self, slots: 9)
  cut = data.Loader(corpus, ENCODING, CONFIG).batch(0)
  assert cut.num_dropped_picks > 0
  np.testing.assert_array_equal(
    full.batch.cells.positions_BL, cut.batch.cells.positions_BL
  )
  apart = cut.batch.cells.positions_BL == -1
  assert (cut.batch.cells.values_BL[apart] == -1).all()
  given_back = (full.batch.cells.gene_ids_BL == 1) & (
    cut.batch.cells.gene_ids_BL != 1
  )
  asked = (cut.batch.id_weights_BK + cut.batch.value_weights_BK).sum()
  assert (
    asked + cut.num_dropped_picks
    == (full.batch.id_weights_BK + full.batch.value_weights_BK).sum()
  )
  assert given_back.sum() <= cut.num_dropped_picks


# Runs, in both modes of encoding


@pytest.fixture(scope='module', params=encoding.MODES)
def run(request, tiny_run, tmp_path_factory):
  """A run under `split`, and the same stopped and gone on with."""
  changes = {
    'data.mask.objective': 'split',
    'encoding.mode': request.param,
    'optimizer.total_steps': 10,
  }
  folder = tmp_path_factory.mktemp('split') / 'run'
  tiny_run(folder, changes)
  return request.param, changes, folder


def test_a_run_has_the_nulls_of_its_objective_and_mode(run):
  mode, _, folder = run
  lines = [x for x in metrics.read(folder) if 'eval_loss' in x]
  for line in lines:
    names = {key for key in line if key.startswith('null_')}
    wanted = {
      *('null_id_marginal', 'null_id_rank_bin', 'null_id_rank_bracket'),
      *('null_id_value_bracket', 'null_value_gene_mean'),
      'null_value_cell_scaled',
    }
    if mode == 'library':
      wanted.add('null_value_count_mean')
    assert names == wanted
    assert np.isfinite([line[name] for name in names]).all()
    assert line['eval_id_loss'] > 0
    assert line['eval_value_loss'] > 0
  table = report.table(folder)
  assert 'value bracket' in table
  assert 'cell scaled' in table
  assert 'interpolation' not in table


def test_a_run_goes_on_in_the_same_bits(run, tiny_run, tmp_path):
  _, changes, folder = run
  part = tmp_path / 'run'
  shutil.copytree(folder, part)
  shutil.rmtree(part / 'checkpoints' / '10')
  tiny_run(part, changes)
  ours, theirs = (test_train.arrays(path, 10) for path in (part, folder))
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)
  assert test_train.lines(part) == test_train.lines(folder)


def test_the_model_loads_and_embeds(run):
  mode, _, folder = run
  loaded = pretrained.load(folder)
  assert loaded.config.hides_ranks
  assert loaded.assets.encoding.mode == loaded.assets.medians.mode == mode
  batch = pretrained.cell_batch([[5, 6, 7]], [[2.0, 1.0, 0.5]])
  whole = loaded.hidden_states(batch)
  positions = batch.positions_BL.copy()
  positions[0, 2] = masking.HIDDEN_RANK
  hidden = dataclasses.replace(batch, positions_BL=positions)
  assert np.isfinite(loaded.hidden_states(hidden)).all()
  assert not np.array_equal(loaded.hidden_states(hidden), whole)
  with pytest.raises(errors.UserError, match=r'position -2 is outside of \[-1'):
    positions[0, 2] = -2
    loaded.hidden_states(hidden)


def test_null_models_of_another_run_are_refused(run, tiny_run, tmp_path):
  mode, changes, folder = run
  part = tmp_path / 'run'
  for key, value, message in (
    ('data.mask.objective', 'released', "mask.objective='split', but the cel"),
    (
      'encoding.mode',
      {'library': 'released', 'released': 'library'}[mode],
      f"encoding.mode='{mode}', but the cells here have",
    ),
  ):
    tiny_run(part, changes | {key: value, 'optimizer.total_steps': 5})
    shutil.copy(folder / 'nulls.npz', part / 'nulls.npz')
    with pytest.raises(errors.UserError, match=message) as caught:
      tiny_run(part, changes | {key: value, 'optimizer.total_steps': 5})
    assert 'nulls.npz' in str(caught.value)
    shutil.rmtree(part)


def test_a_model_without_values_cannot_be_asked_for_them(tiny_run, tmp_path):
  with pytest.raises(errors.UserError, match='model.use_values is false'):
    tiny_run(
      tmp_path, {'data.mask.objective': 'split', 'model.use_values': False}
    )


def test_the_config_says_what_was_asked(run):
  _, _, folder = run
  config = json.loads((folder / 'config.json').read_text())['run']
  assert config['data']['mask']['objective'] == 'split'
  assert config['model']['hides_ranks'] is True


@pytest.mark.slow  # 20 s
def test_devices_do_not_change_the_losses(train_command, tmp_path):
  """Each term is divided by its number in the global batch."""
  changes = {
    'data.mask.objective': 'split',
    'optimizer.total_steps': 3,
    'eval_every': 0,
    'checkpoint_every': 0,
  }
  found = []
  for devices, fsdp in ((1, 1), (4, 2)):
    folder = tmp_path / str(devices)
    flags = f'--xla_force_host_platform_device_count={devices}'
    result = test_train.run(
      train_command(folder, changes | {'mesh.fsdp': fsdp}),
      env={**os.environ, 'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flags}'},
    )
    assert result.returncode == 0, result.stderr
    found.append([x for x in metrics.read(folder) if 'loss' in x])
  one, four = found
  assert len(one) == 3
  for a, b in zip(one, four):
    assert a['masked'] == b['masked']
    for name in ('id_loss', 'value_loss', 'loss', 'grad_norm'):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    np.testing.assert_allclose(
      a['loss'], 0.2 * a['id_loss'] + 0.8 * a['value_loss'], rtol=1e-6
    )
