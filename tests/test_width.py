"""Pre-norm blocks and rates that carry over from width to width."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from genecompass_jax import losses, model, optimizer, scoring
from tests.test_model import (
  TINY,
  apart_batch,
  hidden_states,
  knowledge_of,
  packed_batch,
  params_of,
)

SHALLOW = dataclasses.replace(TINY, hidden_dropout=0.0, attention_dropout=0.0)
PRE = dataclasses.replace(SHALLOW, norm_order='pre')


def test_a_pre_norm_block_with_zero_outputs_changes_nothing():
  params = params_of(PRE)
  for name in ('out', 'down'):
    params['encoder'][name] = jax.tree.map(
      np.zeros_like, params['encoder'][name]
    )
  cells = apart_batch().cells
  layers = hidden_states(
    PRE, params, cells, knowledge_of(PRE), every_layer=True
  )
  np.testing.assert_array_equal(layers[1], layers[2])
  norm = params['encoder']['final_norm']
  x = np.asarray(layers[0], np.float64)
  x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  np.testing.assert_allclose(
    layers[1], x * norm['scale'] + norm['bias'], atol=1e-4
  )


def test_pre_norm_packs_like_post_norm():
  params, knowledge = params_of(PRE), knowledge_of(PRE)
  packed, apart = packed_batch().cells, apart_batch().cells
  a = hidden_states(PRE, params, packed, knowledge)[packed.segments_BL > 0]
  b = hidden_states(PRE, params, apart, knowledge)[apart.segments_BL > 0]
  np.testing.assert_allclose(a, b, atol=2e-5)


def at_width(width, base_width):
  return dataclasses.replace(
    PRE,
    width=width,
    feed_forward=2 * width,
    num_heads=width // 8,
    base_width=base_width,
  )


@functools.cache
def coordinates(width, base_width, steps=6):
  """Mean change of final states and of logits after some updates."""
  config = at_width(width, base_width)
  knowledge, batch = knowledge_of(config), packed_batch()
  params = model.init(config, 0)
  transform = optimizer.make_optimizer(
    optimizer.OptimizerConfig(
      learning_rate=4e-3, warmup_steps=0, weight_decay=0.0, schedule='constant'
    ),
    model.rate_scales(config),
  )

  def loss(params):
    id_BK, value_BK = scoring.slot_losses(params, batch, knowledge, config)
    sums = losses.loss_sums(
      id_BK, batch.id_weights_BK, value_BK, batch.value_weights_BK
    )
    return sums.means(losses.LossConfig(1.0, 0.05))[0]

  @jax.jit
  def update(params, state):
    updates, state = transform.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  def logits(params):
    network = model.bind(config, params)
    hidden = network(batch.cells, knowledge)
    used = batch.cells.segments_BL > 0
    return np.asarray(network.id_logits(hidden)[used])

  first, state = logits(params), transform.init(params)
  for _ in range(steps):
    params, state = update(params, state)
  return float(np.abs(logits(params) - first).mean())


@pytest.mark.slow  # 25 s
def test_coordinates_move_alike_at_every_width():
  """The coordinate check: with base_width the updates of logits keep their

  size from width 16 to 256; without it they grow with the width.
  """
  widths = (16, 64, 256)
  carried = [coordinates(w, 16) for w in widths]
  plain = [coordinates(w, 0) for w in widths]
  assert carried[0] == pytest.approx(plain[0])  # the base width itself
  assert max(carried) < 2 * min(carried)
  assert plain[2] > 2 * plain[0]


def test_hidden_matrices_alone_learn_more_slowly():
  config = at_width(64, 16)
  scales = model.rate_scales(config)
  assert scales['encoder']['up'] == {'kernel': 0.25, 'bias': 1.0}
  assert scales['encoder']['query'] == {'kernel': 0.25, 'bias': 1.0}
  assert scales['embedding']['word'] == 1.0
  assert scales['embedding']['fuse_word'] == 0.25
  assert scales['embedding']['priors']['a']['project']['kernel'] == 1.0
  assert scales['id_head']['transform']['dense']['kernel'] == 0.25
  assert model.rate_scales(PRE) is None
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    model.abstract_params(config),
  )
  plain, scaled = (
    optimizer.make_optimizer(optimizer.OptimizerConfig(warmup_steps=0), s)
    for s in (None, scales)
  )
  a, b = (t.update(params, t.init(params), params)[0] for t in (plain, scaled))
  for one, other, scale in zip(*map(jax.tree.leaves, (a, b, scales))):
    np.testing.assert_allclose(other, scale * one, rtol=1e-6)
