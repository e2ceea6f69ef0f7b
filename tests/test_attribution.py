"""Attributions add up, agree with leaving out, and need true knowledge.

One shape of batches and few models throughout: compiling is all of the time.
"""

import dataclasses
import os
import subprocess
import sys
import textwrap

import anndata
import jax
import numpy as np
import optax
import pytest
import scipy.stats

import genecompass_jax as gc
from genecompass_jax import (
  assets,
  encoding,
  errors,
  knowledge as knowledge_lib,
  medians,
  model as model_lib,
  pretrained,
  vocabulary,
)
from genecompass_jax.analysis import model_cells
from genecompass_jax.analysis.attribution import integrals, parts, targets
from tests import test_model
from tests.conftest import tiny_cells, tiny_genes

V = test_model.V
TINY = dataclasses.replace(test_model.TINY, norm_epsilon=1e-6)
SPLIT = dataclasses.replace(TINY, hides_ranks=True)
CLASSES = dataclasses.replace(TINY, head='sequence', num_labels=3)
LENGTHS = (9, 12, 7)
GENE = 5  # in every cell


def params_of(config, seed=0, std=0.3):
  """As large as those of a trained model; 0.02 is what training starts from."""

  def draw(path, shape):
    value = rng.normal(0, std, shape.shape)
    is_scale = 'scale' in jax.tree_util.keystr(path)
    return np.asarray(1 + value / 3 if is_scale else value, np.float32)

  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    draw, model_lib.abstract_params(config)
  )


def model_of(config, params=None, knowledge=None):
  return pretrained.PretrainedModel(
    config,
    params_of(config) if params is None else params,
    assets.Assets(knowledge=knowledge or test_model.knowledge_of(config)),
  )


def batch_of(lengths=LENGTHS, seed=3, slots=12):
  """Cells of both species."""
  rng = np.random.default_rng(seed)
  ids = np.zeros((len(lengths), slots), np.int32)
  values = np.zeros((len(lengths), slots), np.float32)
  for row, n in enumerate(lengths):
    others = rng.permutation(np.setdiff1d(np.arange(2, V), [GENE]))
    ids[row, :n] = rng.permutation(np.append(others[: n - 1], GENE))
    values[row, :n] = np.sort(rng.uniform(1, 6, n))[::-1]
  return gc.cell_batch(ids, values, np.arange(len(lengths)) % 2)


def attribute(batch, model, target, **choices):
  return gc.attribute(batch, model, target, batch_size=3, **choices)


def problem_of(model, batch, target):
  """What the functions of `integrals` take."""
  token_B = np.full(len(batch.gene_ids_BL), targets.token_of(target, model, 0))
  asked, readout = targets.ask(target, batch, token_B, model.config)
  found = parts.of_batch(
    model.params,
    asked,
    model.assets.knowledge,
    parts.means(model, 'mean'),
    model.config,
    parts.names(model.config, 'parts'),
  )
  return model.params, found, readout, model.config


def axis(seed=4):
  return np.random.default_rng(seed).normal(size=TINY.width)


def test_the_sum_of_the_parts_is_what_the_model_reads():
  config = dataclasses.replace(TINY, prior_scale=0.3)
  params, knowledge = params_of(config), test_model.knowledge_of(config)
  batch = batch_of()

  @jax.jit
  def run(params, batch, knowledge):
    network = model_lib.bind(config, params)
    looked_up = batch.gene_ids_BL, batch.species_BL, knowledge, np.float32(0.3)
    whole_BLD = network.embedding.linear_part(*looked_up)
    given = network(batch, knowledge_lib.AtSlots(whole_BLD))
    parts = list(network.embedding.parts(*looked_up))
    return parts, whole_BLD, given, network(batch, knowledge)

  found, whole_BLD, given_BLD, expected_BLD = run(params, batch, knowledge)
  assert len(found) == 3 and all(part.std() > 0.1 for part in found)
  bias_D = params['embedding']['fuse_bias']
  np.testing.assert_allclose(sum(found) + bias_D, whole_BLD, atol=1e-5)
  np.testing.assert_allclose(given_BLD, expected_BLD, atol=1e-5)


# Completeness


@pytest.mark.parametrize('over', parts.OVER)
@pytest.mark.parametrize(
  'config, target',
  [
    (TINY, targets.GeneId(GENE)),
    (SPLIT, targets.GeneValue(GENE)),
    (TINY, targets.CellAxis(axis(), 'mean')),
  ],
)
def test_scores_add_up(config, target, over):
  found = attribute(batch_of(), model_of(config), target, over=over)
  assert found.parts == parts.names(config, over)
  assert list(found.cell_C) == [0, 1, 2]
  assert list(np.diff(found.starts_C1)) == list(LENGTHS)
  difference_C = found.at_input_C - found.at_baseline_C
  size_C = np.add.reduceat(np.abs(found.scores_NK).sum(1), found.starts_C1[:-1])
  assert size_C.min() > 0.01 and np.abs(difference_C).max() > 0.01
  off_C = np.maximum(1.1e-3 * size_C, 1e-5)
  assert (np.abs(found.by_part_CK.sum(1) - difference_C) <= off_C).all()
  assert (np.abs(found.error_C) <= off_C).all()
  assert found.points_C.min() >= integrals.FIRST_POINTS
  np.testing.assert_allclose(
    np.add.reduceat(found.by_gene_N, found.starts_C1[:-1]),
    found.by_part_CK.sum(1),
    atol=1e-4 * size_C.max(),
  )
  # What was hidden names no gene, or no amount.
  asks_gene = isinstance(target, targets.GeneId | targets.GeneValue)
  is_asked_N = (found.tokens_N == GENE) & asks_gene
  np.testing.assert_array_equal(found.is_hidden_N, is_asked_N)
  is_shown_K = [config.hides_ranks and p != parts.VALUE for p in found.parts]
  hidden_NK = found.scores_NK[found.is_hidden_N]
  assert ((hidden_NK != 0) == is_shown_K).all()
  # A limit of points is kept to.
  few = attribute(
    batch_of(),
    model_of(config),
    target,
    over=over,
    max_points=1,
    tolerance=1e-9,
  )
  assert (few.points_C == integrals.FIRST_POINTS).all()


def test_scores_do_not_depend_on_the_other_cells():
  model, lengths = model_of(TINY), (9, 12, 7, 4, 11)
  batch, target = batch_of(lengths), targets.GeneId(GENE)
  whole = attribute(batch, model, target)
  np.testing.assert_array_equal(
    whole.scores_NK, attribute(batch, model, target).scores_NK
  )
  turned = attribute(jax.tree.map(lambda x: x[::-1], batch), model, target)
  alone = attribute(jax.tree.map(lambda x: x[1:2], batch), model, target)
  for c in range(5):
    mine = slice(*whole.starts_C1[c : c + 2])
    other = slice(*turned.starts_C1[4 - c : 6 - c])
    np.testing.assert_array_equal(whole.tokens_N[mine], turned.tokens_N[other])
    np.testing.assert_allclose(
      whole.scores_NK[mine], turned.scores_NK[other], atol=1e-5
    )
  np.testing.assert_array_equal(whole.points_C, turned.points_C[::-1])
  np.testing.assert_allclose(alone.scores_NK, whole.scores_NK[9:21], atol=1e-5)


DEVICES = textwrap.dedent("""
  import sys
  import jax, numpy as np
  from genecompass_jax.analysis.attribution import targets
  from tests import test_attribution as own

  devices = jax.devices()
  batch = own.batch_of((9, 12, 7, 4, 11, 8))
  for number in (1, 3):
    jax.local_devices = lambda: devices[:number]
    for seed in (0, 1, 2):
      model = own.model_of(own.TINY, own.params_of(own.TINY, seed))
      for target in (targets.GeneId(own.GENE), targets.CellAxis(own.axis())):
        found = own.attribute(batch, model, target, over='all')
        name = f'{number}-{type(target).__name__}-{seed}'
        np.save(f'{sys.argv[1]}/{name}.npy', found.scores_NK)
""")


@pytest.mark.slow  # 10 s: another process compiles for one device and for three
def test_more_devices_change_nothing(tmp_path):
  """Of weights of several seeds, over word, priors and values."""
  flags = '--xla_force_host_platform_device_count=3'
  subprocess.run(
    [sys.executable, '-c', DEVICES, str(tmp_path)],
    check=True,
    env={
      **os.environ,
      'XLA_FLAGS': f'{flags} --xla_backend_optimization_level=0',
    },
  )
  ones = sorted(tmp_path.glob('1-*.npy'))
  assert len(ones) == 6
  for path in ones:
    one_NK, three_NK = (
      np.load(tmp_path / f'{number}{path.name[1:]}') for number in (1, 3)
    )
    assert np.abs(one_NK).max() > 0.01
    np.testing.assert_allclose(one_NK, three_NK, rtol=0, atol=1e-6)


def test_a_cell_takes_the_points_that_it_needs(monkeypatch):
  """Whatever the others need: rows that are close keep their scores."""
  problem = problem_of(model_of(TINY), batch_of(), targets.GeneId(GENE))
  error_of = {16: [0.0, 0.1, 0.1], 32: [9.0, 0.0, 0.1], 64: [9.0, 9.0, 0.0]}
  shape = problem[1].change_KBLD.shape
  monkeypatch.setattr(
    integrals, 'ends', lambda *_: np.array([[0, 0, 0], [1, 1, 1]], 'f4')
  )

  def integral(params, parts, readout, config, points):
    scores_BLK = np.zeros((*shape[1:3], shape[0]), np.float32)
    scores_BLK[:, 1, 0] = 1 + np.array(error_of[points])
    return scores_BLK

  monkeypatch.setattr(integrals, '_integral', integral)
  found = integrals.integrate(*problem)
  assert list(found.points_B) == [16, 32, 64] and found.is_close_B.all()
  np.testing.assert_allclose(found.error_B, 0, atol=1e-6)
  found = integrals.integrate(*problem, max_points=32)
  assert list(found.points_B) == [16, 32, 32]
  assert list(found.is_close_B) == [True, True, False]
  np.testing.assert_allclose(found.error_B, [0, 0, 0.1], atol=1e-6)


def test_points_integrate_polynomials_exactly():
  for points in (8, 16):
    at_P, weights_P = integrals.nodes(points)
    for power in (0, 1, 5, 2 * points - 1):
      assert (weights_P @ at_P**power) == pytest.approx(1 / (power + 1))
  assert abs(integrals.nodes(2)[1] @ integrals.nodes(2)[0] ** 4 - 0.2) > 1e-3


def test_bfloat16_models_are_explained_in_float32():
  low = dataclasses.replace(TINY, dtype='bfloat16')
  found = attribute(batch_of(), model_of(low), targets.GeneId(GENE))
  expected = attribute(batch_of(), model_of(TINY), targets.GeneId(GENE))
  np.testing.assert_array_equal(found.scores_NK, expected.scores_NK)


# What is asked


def test_the_gene_is_hidden_as_in_training():
  batch, rows = batch_of(), np.arange(3)
  at_BL = batch.gene_ids_BL == GENE
  masked_BL = np.where(at_BL, vocabulary.MASK, batch.gene_ids_BL)
  unvalued_BL = np.where(at_BL, -1, batch.values_BL)
  token_B = np.full(3, GENE)

  def asked(target, config):
    found, readout = targets.ask(target, batch, token_B, config)
    np.testing.assert_array_equal(readout.slots_BK[:, 0], at_BL.argmax(1))
    return found

  for target in (targets.GeneId(GENE), targets.GeneValue(GENE)):
    found = asked(target, TINY)
    np.testing.assert_array_equal(found.gene_ids_BL, masked_BL)
    np.testing.assert_array_equal(found.values_BL, unvalued_BL)
    np.testing.assert_array_equal(found.positions_BL, batch.positions_BL)
  found = asked(targets.GeneId(GENE), SPLIT)
  np.testing.assert_array_equal(found.gene_ids_BL, masked_BL)
  np.testing.assert_array_equal(found.values_BL, batch.values_BL)
  np.testing.assert_array_equal(found.positions_BL, batch.positions_BL)
  found = asked(targets.GeneValue(GENE), SPLIT)
  np.testing.assert_array_equal(found.gene_ids_BL, batch.gene_ids_BL)
  np.testing.assert_array_equal(found.values_BL, unvalued_BL)
  for row in rows:  # ranks close up behind the gene
    is_other = (batch.segments_BL[row] > 0) & ~at_BL[row]
    is_other[0] = False
    ranks = found.positions_BL[row]
    np.testing.assert_array_equal(ranks[is_other], range(LENGTHS[row] - 1))
    assert ranks[at_BL[row]] == -1 and ranks[0] == 0


def test_answers_are_those_of_the_heads():
  batch, token_B = batch_of(), np.array([GENE, GENE, -1])
  hidden_BLD = np.random.default_rng(0).normal(size=(3, 13, TINY.width))
  hidden_BLD = hidden_BLD.astype(np.float32)
  rows, slot_B = np.arange(3), (batch.gene_ids_BL == GENE).argmax(1)

  def answer(target, config, network):
    asked, readout = targets.ask(target, batch, token_B, config)
    return np.asarray(readout(network, asked, hidden_BLD))

  network = model_lib.bind(TINY, params_of(TINY))
  logits_BV = np.asarray(network.id_logits(hidden_BLD))[rows, slot_B]
  values_B = np.asarray(network.predicted_values(hidden_BLD))[rows, slot_B]
  for target, expected_B in (
    (targets.GeneId(GENE, 'logit'), logits_BV[:, GENE]),
    (targets.GeneId(GENE), jax.nn.log_softmax(logits_BV)[:, GENE]),
    (targets.GeneValue(GENE), values_B),
  ):
    np.testing.assert_allclose(
      answer(target, TINY, network), [*expected_B[:2], 0], atol=1e-5
    )
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL
  for pooling, pooled_BD in (
    ('cls', hidden_BLD[:, 0]),
    ('mean', [h[w].mean(0) for h, w in zip(hidden_BLD, is_gene_BL)]),
  ):
    unit_BD = pooled_BD / np.linalg.norm(pooled_BD, axis=1, keepdims=True)
    np.testing.assert_allclose(
      answer(targets.CellAxis(axis(), pooling), TINY, network),
      unit_BD @ (axis() / np.linalg.norm(axis())),
      atol=1e-5,
    )
  network = model_lib.bind(CLASSES, params_of(CLASSES))
  np.testing.assert_allclose(
    answer(targets.ClassLogit(2), CLASSES, network),
    network.class_logits(hidden_BLD)[:, 2],
    atol=1e-6,
  )


def test_an_axis_leads_from_start_to_goal():
  start_CD, goal_CD = np.random.default_rng(0).normal(size=(2, 7, 16)) + [
    [[1.0]],
    [[-1.0]],
  ]
  found = targets.CellAxis.between(start_CD, goal_CD)
  unit = [
    x / np.linalg.norm(x, axis=1, keepdims=True) for x in (start_CD, goal_CD)
  ]
  assert (unit[1] @ found.axis_D).mean() > (unit[0] @ found.axis_D).mean() + 0.5
  np.testing.assert_allclose(np.linalg.norm(found.axis_D), 1, rtol=1e-6)
  np.testing.assert_allclose(
    targets.CellAxis.between(start_CD * 3, goal_CD).axis_D,
    found.axis_D,
    atol=1e-6,
  )


# Baselines, and leaving out


def test_leaving_a_part_out_is_the_model_without_it():
  """`mean`: every gene's row is their mean. `zero`: no projection at all."""
  model, batch = model_of(CLASSES), batch_of()
  knowledge, params = model.assets.knowledge, model.params
  asked_B = np.asarray(model.logits(batch))[:, 1]
  mean, zero = (
    attribute(
      batch,
      model,
      targets.ClassLogit(1),
      method='occlusion',
      baseline=baseline,
    )
    for baseline in parts.BASELINES
  )
  np.testing.assert_allclose(mean.at_input_C, asked_B, atol=1e-5)
  special = vocabulary.NUM_SPECIAL
  for k, (name, _) in enumerate(CLASSES.priors):
    missing_P = params['embedding']['priors'][name]['missing']
    has = knowledge.has_vector[name]
    read = np.where(has[:, None], knowledge.tables[name], missing_P)
    changed_B = np.zeros(3)
    for species in (0, 1):
      table = np.tile(
        read[knowledge.row_SV[species, special:]].mean(0), (len(read), 1)
      ).astype(np.float32)
      table[:special] = knowledge.tables[name][:special]
      constant = dataclasses.replace(
        knowledge,
        tables={**knowledge.tables, name: table},
        has_vector={**knowledge.has_vector, name: np.ones_like(has)},
      )
      is_mine_B = batch.species_BL[:, 0] == species
      logits_B = model_of(CLASSES, params, constant).logits(batch)[:, 1]
      changed_B = np.where(is_mine_B, logits_B, changed_B)
    np.testing.assert_allclose(
      mean.by_part_CK[:, 1 + k], asked_B - changed_B, atol=2e-5
    )
    embedding = params['embedding']
    block = {name: np.zeros_like(embedding['fuse_priors'][name])}
    blocks = {**embedding['fuse_priors'], **block}
    without = {**params, 'embedding': {**embedding, 'fuse_priors': blocks}}
    # Padding and CLS read the prior too, and give nothing on.
    logits_B = model_of(CLASSES, without, knowledge).logits(batch)[:, 1]
    np.testing.assert_allclose(
      zero.by_part_CK[:, 1 + k], asked_B - logits_B, atol=2e-5
    )
  for found in (mean, zero):
    assert np.abs(found.by_part_CK).min(0).max() > 0.01
    assert found.scores_NK is None


def test_leaving_a_value_out_is_a_gene_of_value_zero():
  model, batch = model_of(CLASSES), batch_of()
  found = attribute(
    batch, model, targets.ClassLogit(1), over='values', method='occlusion'
  )
  asked_B = np.asarray(model.logits(batch))[:, 1]
  for rank in range(max(LENGTHS)):
    values_BL = batch.values_BL.copy()
    values_BL[:, 1 + rank] = 0
    without = dataclasses.replace(batch, values_BL=values_BL)
    lost_B = asked_B - np.asarray(model.logits(without))[:, 1]
    for row in np.flatnonzero(np.array(LENGTHS) > rank):
      score = found.by_gene_N[found.starts_C1[row] + rank]
      assert score == pytest.approx(lost_B[row], abs=2e-5)
  assert np.abs(found.by_gene_N).max() > 0.01
  all_zero = dataclasses.replace(batch, values_BL=0 * batch.values_BL)
  np.testing.assert_allclose(
    found.at_baseline_C, model.logits(all_zero)[:, 1], atol=1e-5
  )


def test_a_prior_that_says_the_same_of_all_genes_explains_nothing():
  knowledge = test_model.knowledge_of(TINY)
  row_P = np.random.default_rng(0).normal(size=(1, 5)).astype('f4')
  table = np.repeat(row_P, len(knowledge.tables['a']), axis=0)
  constant = dataclasses.replace(
    knowledge,
    tables={**knowledge.tables, 'a': table},
    has_vector={**knowledge.has_vector, 'a': np.ones(len(table), bool)},
  )
  model, target = model_of(TINY, knowledge=constant), targets.GeneId(GENE)
  for method in ('integrated', 'gradient'):
    found = attribute(batch_of(), model, target, method=method)
    size_K = np.abs(found.by_part_CK).max(0)
    assert size_K[1] < 1e-5 < 1e-2 < min(size_K[0], size_K[2])
  found = attribute(batch_of(), model, target, baseline='zero')
  assert np.abs(found.by_part_CK[:, 1]).max() > 1e-2  # of its mere presence


def test_small_changes_look_alike_to_all_methods():
  params, problem, readout, config = problem_of(
    model_of(CLASSES), batch_of(), targets.ClassLogit(0)
  )
  small = dataclasses.replace(
    problem,
    change_KBLD=problem.change_KBLD * 1e-2,
    changes_BLD=problem.changes_BLD * 1e-2,
  )
  ask = params, small, readout, config
  gradient_BLK = integrals.gradient_times_input(*ask)
  integral_BLK = integrals.integrate(*ask).scores_BLK
  for axis, leave_out in (
    (1, integrals.leave_out_parts),
    (2, integrals.leave_out_genes),
  ):
    expected = leave_out(*ask)
    size = np.abs(expected).max()
    assert size > 1e-4
    for found_BLK in (gradient_BLK, integral_BLK):
      np.testing.assert_allclose(found_BLK.sum(axis), expected, atol=0.1 * size)


# Mistakes


@pytest.mark.parametrize(
  'config, target, choices, message',
  [
    (TINY, targets.ClassLogit(0), {}, 'needs a model with the sequence head'),
    (CLASSES, targets.GeneId(GENE), {}, 'needs a model with the pretraining'),
    (CLASSES, targets.ClassLogit(3), {}, r'label 3 is outside of \[0, 3\)'),
    (TINY, targets.GeneId('TP53'), {}, 'came without a vocabulary'),
    (TINY, targets.GeneId(V), {}, 'token 30 is none of a gene'),
    (TINY, targets.GeneId(GENE + 0.5), {}, 'token=5.5 must be a whole number'),
    (TINY, 'TP53', {}, "target 'TP53': give GeneId"),
    (TINY, None, {}, 'target None: give GeneId'),
    (CLASSES, targets.ClassLogit(0.5), {}, 'label=0.5 must be a whole'),
    (TINY, targets.GeneId(GENE), {'max_points': 1.5}, 'must be a whole number'),
    (TINY, targets.GeneId(1), {}, 'token 1 is none of a gene'),
    (TINY, targets.CellAxis(np.ones(3)), {}, 'an axis of 3 numbers'),
    (TINY, targets.GeneId(GENE), {'over': 'genes'}, "over='genes': give one"),
    (TINY, targets.GeneId(GENE), {'method': 'ig'}, "method='ig': give one"),
    (TINY, targets.GeneId(GENE), {'baseline': '0'}, 'give mean or zero'),
    (TINY, targets.GeneId(GENE), {'tolerance': 0}, 'must be positive'),
  ],
)
def test_questions_without_an_answer(config, target, choices, message):
  with pytest.raises(errors.UserError, match=message):
    gc.attribute(batch_of(), model_of(config), target, **choices)


def test_parts_that_are_not_there():
  bare = dataclasses.replace(TINY, use_values=False, use_cls=False)
  for over, target, message in (
    ('values', targets.GeneId(GENE), 'this model reads no values'),
    ('parts', targets.GeneValue(GENE), 'predicts no values'),
    ('parts', targets.CellAxis(axis()), 'no CLS slot'),
  ):
    with pytest.raises(errors.UserError, match=message):
      gc.attribute(batch_of(), model_of(bare), target, over=over)
  assert parts.names(bare, 'all') == ('word', 'a', 'b')
  named = dataclasses.replace(TINY, priors=(('word', 5),))
  with pytest.raises(errors.UserError, match="is called 'word'"):
    parts.names(named, 'parts')
  with pytest.raises(errors.UserError, match='not zero'):
    targets.CellAxis(np.zeros(16))
  with pytest.raises(errors.UserError, match='cls or mean'):
    targets.CellAxis(np.ones(16), 'max')
  with pytest.raises(errors.UserError, match='log_probability, logit'):
    targets.GeneId(GENE, 'odds')


def test_batches_that_cannot_be_asked():
  model, target = model_of(TINY), targets.GeneId(GENE)
  packed = test_model.packed_batch().cells
  with pytest.raises(errors.UserError, match='one cell a row'):
    gc.attribute(packed, model, target)
  ids = np.array([[7, 8, 9]])
  without = gc.cell_batch(ids, np.ones((1, 3)))
  with pytest.raises(errors.UserError, match='none of the 1 cells holds 5'):
    gc.attribute(without, model, target)
  with pytest.raises(errors.UserError, match='token 30 is outside'):
    gc.attribute(gc.cell_batch(ids + 21, np.ones((1, 3))), model, target)


# A user's cells


@pytest.fixture(scope='module')
def of_counts():
  """A model that reads counts of both species, untrained."""
  ids = [*tiny_genes(0), *tiny_genes(1)]
  vocab = vocabulary.Vocabulary.default().restrict(ids)
  rng = np.random.default_rng(0)
  vectors = {
    name: (ids[:100], rng.normal(size=(100, size)).astype('f4'))
    for name, size in TINY.priors
  }
  config = dataclasses.replace(TINY, vocabulary_size=vocab.size, max_genes=63)
  ones_SV = np.ones((2, vocab.size))
  return pretrained.PretrainedModel(
    config,
    params_of(config),
    assets.Assets(
      knowledge=knowledge_lib.align(vocab, vectors),
      vocabulary=vocab,
      medians=medians.Medians(
        'released', ones_SV, 1000 * ones_SV.astype(int), vocab.is_shared_V()
      ),
      encoding=encoding.EncodingConfig(max_genes=63),
    ),
  )


def test_a_users_cells(of_counts):
  human = tiny_cells(9, seed=5)
  counts = human.X.toarray()
  gene = human.var_names[np.argsort((counts > 0).mean(0))[60]]
  has_C = (counts[:, list(human.var_names).index(gene)] > 0).ravel()
  assert 2 <= has_C.sum() < 9
  found = gc.attribute(human, of_counts, gc.GeneId(gene), batch_size=4)
  np.testing.assert_array_equal(found.cell_C, np.flatnonzero(has_C))
  assert list(found.cell_names_C) == list(human.obs_names[has_C])
  assert found.parts == ('word', 'a', 'b') and found.points_C.all()
  # By hand: the cell as the model reads it, its gene hidden.
  token = int(of_counts.vocabulary.tokens([gene])[0])
  mine = slice(*found.starts_C1[:2])
  table = found.gene_table()
  first = table[table['cell'] == found.cell_names_C[0]]
  assert list(first['gene_id'][::3]) == list(
    np.array(of_counts.vocabulary.token_gene_ids())[found.tokens_N[mine]]
  )
  assert list(first['part'][:3]) == ['word', 'a', 'b']
  hidden = first[first['hidden']]
  assert set(hidden['gene_id']) == {gene} and not hidden['score'].any()
  ids = np.where(found.tokens_N[mine] == token, 1, found.tokens_N[mine])
  stream = model_cells.open_cells(human, of_counts)
  (chunk,) = model_cells.encode(stream, of_counts)
  cell = slice(*chunk.cells.starts_C1[found.cell_C[0] :][:2])
  np.testing.assert_array_equal(
    chunk.cells.gene_ids_N[cell], found.tokens_N[mine]
  )
  values = np.where(ids == 1, -1, chunk.cells.values_N[cell])
  logits_BSV, _ = of_counts.logits(gc.cell_batch(ids[None], values[None]))
  log_p = jax.nn.log_softmax(logits_BSV[0, list(ids).index(1)])[token].item()
  assert found.at_input_C[0] == pytest.approx(log_p, abs=1e-5)
  # Tables for people.
  cells = found.part_table()
  np.testing.assert_allclose(
    cells[['word', 'a', 'b']].sum(axis=1),
    cells['at_input'] - cells['at_baseline'] + cells['error'],
    atol=1e-5,
  )
  top = found.top_genes(5)
  assert len(top) == 5 and top['mean'].abs().is_monotonic_decreasing
  assert 'GeneId' in repr(found)
  most = top['cells'].max()
  assert (found.top_genes(5, most)['cells'] >= most).all()
  assert not len(found.top_genes(5, len(found.cell_C) + 1))
  with pytest.raises(errors.UserError, match="'NOGENE' is not known in human"):
    gc.attribute(human, of_counts, gc.GeneId('NOGENE'))
  with pytest.raises(errors.UserError, match='none that this model knows'):
    gc.attribute(human, of_counts, gc.GeneId('GATA1'))
  counts[:, list(human.var_names).index(gene)] = 0
  empty = anndata.AnnData(counts, human.obs, human.var)
  with pytest.raises(errors.UserError, match='none of the 9 cells holds'):
    gc.attribute(empty, of_counts, gc.GeneId(gene))


def test_names_are_those_of_the_species(of_counts):
  mouse = tiny_cells(4, species=1, seed=6)
  counts = mouse.X.toarray()
  gene = mouse.var_names[(counts > 0).all(0)][0]
  found = gc.attribute(mouse, of_counts, gc.GeneId(gene), batch_size=4)
  assert len(found.cell_C) == 4 and set(found.gene_ids_N) <= {*mouse.var_names}
  symbol = gc.GeneTable.default().symbols[
    gc.GeneTable.default().row_of[found.gene_ids_N[0]]
  ]
  assert found.symbols_N[0] == symbol
  assert found.facts['target'] == repr(gc.GeneId(gene))


def test_cells_of_a_species_without_the_gene_are_left_out(of_counts, caplog):
  human, mouse = tiny_cells(6, seed=6), tiny_cells(4, species=1, seed=6)
  mouse.obs_names = [f'm{name}' for name in mouse.obs_names]
  both = anndata.concat([mouse, human], join='outer', fill_value=0)
  both.obs['kind'] = ['mouse'] * 4 + ['human'] * 6
  gene = human.var_names[60]  # shares no token with one of the mouse
  has_C = human[:, gene].X.toarray().ravel() > 0
  assert has_C.any()
  found = gc.attribute(
    both, of_counts, gc.GeneId(gene), species='obs:kind', batch_size=4
  )
  np.testing.assert_array_equal(found.cell_C, 4 + np.flatnonzero(has_C))
  assert f"mouse has no gene '{gene}'" in caplog.text


# A trained model: the prior that it learned from, and two that it did not


NUM_GENES = 200
OPTIMIZER = optax.adam(1e-2)
LEARNER = dataclasses.replace(
  CLASSES,
  vocabulary_size=NUM_GENES,
  num_layers=1,
  num_labels=2,
  hidden_dropout=0.0,
  priors=(('true', 4), ('other', 4)),
)


def learnable(seed=0):
  """Genes of two kinds, which one prior knows and the other does not."""
  rng = np.random.default_rng(seed)
  kind_V = rng.integers(0, 2, NUM_GENES)
  tables = {
    name: rng.normal(size=(NUM_GENES, 4)).astype('f4')
    for name, _ in LEARNER.priors
  }
  tables['true'][:, 0] = 2 * kind_V - 1
  for table in tables.values():
    table[:2] = 0
  row_SV = np.tile(np.arange(NUM_GENES, dtype=np.int32), (2, 1))
  has = {name: np.ones(NUM_GENES, bool) for name in tables}
  return kind_V, knowledge_lib.Knowledge(row_SV, tables, has)


def labelled_cells(kind_V, genes, num, rng):
  """12 genes a cell, most of the kind that its label says.

  One label in five is wrong, or a model would grow sure without bounds, and
  switch from one answer to the other within a hair of the path.
  """
  kind_C = rng.integers(0, 2, num)
  label_C = np.where(rng.random(num) < 0.2, 1 - kind_C, kind_C)
  weight_CV = np.where(kind_V[genes] == kind_C[:, None], 3.0, 1.0)
  drawn_CV = rng.random(weight_CV.shape) ** (1 / weight_CV)
  ids_CL = genes[np.argsort(-drawn_CV, axis=1)[:, :12]]
  values_CL = -np.sort(-rng.uniform(1, 4, ids_CL.shape), axis=1)
  return gc.cell_batch(ids_CL, values_CL), label_C, kind_C


@jax.jit
def train_step(params, state, batch, label_B, knowledge):
  def loss(params):
    network = model_lib.bind(LEARNER, params)
    logits = network.class_logits(network(batch, knowledge))
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, label_B
    ).mean()

  updates, state = OPTIMIZER.update(jax.grad(loss)(params), state)
  return optax.apply_updates(params, updates), state


def train(knowledge, kind_V, steps=120, seed=1):
  """Labels from genes of even tokens; odd ones are kept for later."""
  rng = np.random.default_rng(seed)
  params = params_of(LEARNER, std=0.02)
  state = OPTIMIZER.init(params)
  for _ in range(steps):
    seen = np.arange(2, NUM_GENES, 2)
    batch, label_B, _ = labelled_cells(kind_V, seen, 32, rng)
    params, state = train_step(params, state, batch, label_B, knowledge)
  return params


@pytest.mark.slow  # 40 s: it trains
def test_a_model_that_learned_from_a_prior_says_so():
  """And neither random weights do, nor a prior whose rows were permuted.

  The gain of a part is its score towards the kind of the cell, in logits, on genes
  that were never seen: only the true prior can tell of what kind they are. Of
  random weights single models lean to either side, as random projections of
  the prior do; their mean over seeds does not, and all of it is little.
  """
  kind_V, knowledge = learnable()
  order_V = 2 + np.random.default_rng(2).permutation(NUM_GENES - 2)
  true = knowledge.tables['true'][np.append([0, 1], order_V)]
  permuted = dataclasses.replace(
    knowledge, tables={**knowledge.tables, 'true': true}
  )
  unseen = np.arange(3, NUM_GENES, 2)
  rng = np.random.default_rng(3)
  batch, _, kind_C = labelled_cells(kind_V, unseen, 96, rng)

  def gain(params, given, method='integrated'):
    """Mean over cells [K], their mean sum of absolute scores, and all."""
    model = pretrained.PretrainedModel(LEARNER, params, assets.Assets(given))
    found = gc.attribute(
      batch,
      model,
      gc.ClassLogit(1),
      method=method,
      batch_size=96,
      tolerance=0.01,
    )
    scores_CK = found.by_part_CK * (2 * kind_C - 1)[:, None]
    return scores_CK.mean(0), np.abs(scores_CK).sum(1).mean(), found

  trained = train(knowledge, kind_V)
  gain_K, size, found = gain(trained, knowledge)
  assert found.parts == ('word', 'true', 'other')
  assert gain_K[1] > 0.5 * size and np.abs(gain_K[[0, 2]]).max() < 0.2 * size
  # Trained with it permuted, or given it permuted afterwards.
  for params in (train(permuted, kind_V), trained):
    lost_K, all_of_it, _ = gain(params, permuted)
    assert np.abs(lost_K).max() < 0.2 * min(all_of_it, gain_K[1])
  # Random weights.
  random = [
    gain(params_of(LEARNER, seed, 0.02), knowledge)[:2] for seed in range(1, 17)
  ]
  assert max(all_of_it for _, all_of_it in random) < 0.05 * gain_K[1]
  shares = np.mean([lost_K / all_of_it for lost_K, all_of_it in random], axis=0)
  assert np.abs(shares).max() < 0.25
  # Leaving out agrees by the prior over cells, whatever cells it was trained on.
  # By single genes it does in most of these trainings and not in all: from -.21
  # to .93 in seeds 1 to 5, where a gene more says little that others do not.
  of_genes = []
  for seed in range(1, 6):
    params = train(knowledge, kind_V, seed=seed)
    _, _, shared_out = gain(params, knowledge)
    _, _, left_out = gain(params, knowledge, 'occlusion')
    of_prior = scipy.stats.spearmanr(
      shared_out.by_part_CK[:, 1], left_out.by_part_CK[:, 1]
    ).statistic
    assert of_prior > 0.75
    of_genes.append(
      scipy.stats.spearmanr(shared_out.by_gene_N, left_out.by_gene_N).statistic
    )
  assert np.median(of_genes) > 0.6
