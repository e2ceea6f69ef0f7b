"""Updates and schedules, against the published rules written out in NumPy."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from genecompass_jax import errors, model, optimizer, tensor_files
from genecompass_jax.convert import names, original

STEPS = 7
CONFIG = optimizer.OptimizerConfig(
  learning_rate=0.1,
  warmup_steps=3,
  total_steps=STEPS,
  weight_decay=0.3,
  clip_norm=0.0,
)


def problem(seed=0):
  """Parameters that decay and that do not, and gradients of a few steps."""
  rng = np.random.default_rng(seed)
  params = {
    'dense': {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)},
    'norm': {'scale': rng.normal(size=3)},
    'missing': rng.normal(size=4),
    'word': rng.normal(size=(4, 2)),
  }
  params = jax.tree.map(np.float32, params)
  grads = [
    jax.tree.map(
      lambda p, s=s: np.float32(rng.normal(size=p.shape) * s), params
    )
    for s in np.geomspace(1e-9, 1, STEPS)  # as small as epsilon, too
  ]
  return params, grads


def run(config, params, grads):
  transform = optimizer.make_optimizer(config)
  state = transform.init(params)
  for grad in grads:
    updates, state = transform.update(grad, state, params)
    params = optax.apply_updates(params, updates)
  return params


def reference(name, param, grads, rates, decay, eps=1e-8, b1=0.9, b2=0.999):
  """One array through transformers.AdamW 4.30 or torch.optim.AdamW."""
  p, m, v = param.astype(np.float64), 0.0, 0.0
  for t, (g, lr) in enumerate(zip(grads, rates), 1):
    g = g.astype(np.float64)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    if name == 'adamw_hf':
      size = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
      p = p - size * m / (np.sqrt(v) + eps)
      p = p - lr * decay * p
    else:
      p = p - lr * decay * p
      p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
  return p


@pytest.mark.parametrize('name', ['adamw', 'adamw_hf'])
def test_updates_follow_the_published_rule(name):
  config = dataclasses.replace(CONFIG, name=name)
  params, grads = problem()
  schedule = optimizer.make_schedule(config)
  rates = [float(schedule(t)) for t in range(STEPS)]
  final = run(config, params, grads)
  decayed = optimizer.is_decayed(params)
  for (path, got), start, decay, *each in zip(
    jax.tree_util.tree_leaves_with_path(final),
    jax.tree.leaves(params),
    jax.tree.leaves(decayed),
    *map(jax.tree.leaves, grads),
  ):
    want = reference(name, start, each, rates, 0.3 if decay else 0.0)
    np.testing.assert_allclose(
      got, want, rtol=2e-5, atol=3e-6, err_msg=str(path)
    )


def test_the_two_rules_differ_where_gradients_are_tiny():
  params, grads = problem()
  finals = [
    run(dataclasses.replace(CONFIG, name=name), params, grads)
    for name in ('adamw', 'adamw_hf')
  ]
  assert np.abs(finals[0]['word'] - finals[1]['word']).max() > 1e-3


def test_clipping_scales_all_gradients_together():
  params, grads = problem()
  clipped = dataclasses.replace(CONFIG, clip_norm=0.5)
  scaled = []
  for grad in grads:
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad)))
    factor = min(1.0, 0.5 / norm)
    scaled.append(jax.tree.map(lambda g, f=factor: np.float32(g * f), grad))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    run(clipped, params, grads),
    run(CONFIG, params, scaled),
  )


@pytest.mark.parametrize(
  'schedule, points',
  [
    ('linear', {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0, 120: 0}),
    ('constant', {0: 0, 5: 0.5, 10: 1, 55: 1, 100: 1}),
    ('wsd', {0: 0, 5: 0.5, 10: 1, 79: 1, 80: 1, 90: 0.5, 100: 0, 110: 0}),
  ],
)
def test_schedules_at_key_points(schedule, points):
  config = optimizer.OptimizerConfig(
    schedule=schedule,
    learning_rate=0.2,
    warmup_steps=10,
    total_steps=100,
    decay_share=0.2,
  )
  rate = optimizer.make_schedule(config)
  for step, share in points.items():
    np.testing.assert_allclose(rate(step), 0.2 * share, atol=1e-7)


def test_no_warm_up_starts_at_the_peak():
  config = optimizer.OptimizerConfig(warmup_steps=0, total_steps=10)
  assert float(optimizer.make_schedule(config)(0)) == np.float32(5e-5)


def test_what_decays_is_what_decayed_in_the_recorded_run(oracle):
  run = np.load(oracle / 'tiny_train_torchadamw.npz')
  config = tiny_full(oracle)
  shapes = jax.tree.map(
    lambda s: np.zeros(s.shape), model.abstract_params(config)
  )
  flags = jax.tree.map(
    lambda x, decays: np.full(x.shape, decays, np.float32),
    shapes,
    optimizer.is_decayed(shapes),
  )
  tensors = names.params_to_original(flags, config)
  assert all(len(np.unique(t)) == 1 for t in tensors.values())
  decayed = {name for name, tensor in tensors.items() if tensor.any()}
  recorded = {
    key: set(run[key].tolist())
    for key in ('decay_param_names', 'nodecay_param_names')
  }
  recorded['nodecay_param_names'].discard('emb_warmup.steps')
  assert decayed == recorded['decay_param_names']
  assert set(tensors) - decayed == recorded['nodecay_param_names']


def tiny_full(oracle):
  meta = json.loads((oracle / 'meta.json').read_text())['files']
  tensors = tensor_files.read(oracle / 'tiny_full.npz', 'sd/')
  return original.config_from_original(tensors, meta['tiny_full.npz']['config'])


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'name': 'sgd'}, "optimizer.name='sgd'"),
    ({'schedule': 'cosine'}, "optimizer.schedule='cosine'"),
    ({'total_steps': 0}, 'total_steps=0 must be positive'),
    ({'warmup_steps': -1}, 'not negative'),
    ({'schedule': 'wsd', 'decay_share': 1.5}, 'decay_share=1.5'),
  ],
)
def test_unknown_optimisers_are_refused(changes, message):
  with pytest.raises(errors.UserError, match=message):
    optimizer.OptimizerConfig(**changes)
