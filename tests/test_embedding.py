"""Composed and folded priors give what the plain computation gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import layers, model
from tests.test_model import (
  TINY,
  apart_batch,
  knowledge_of,
  loss_and_grads,
  packed_batch,
  params_of,
)

CONFIGS = [
  TINY,
  dataclasses.replace(TINY, missing_prior='released', prior_scale=0.3),
  dataclasses.replace(TINY, priors=()),
  dataclasses.replace(TINY, use_values=False),
]


def plain(config, params, cells, knowledge):
  """Every slot through every matrix: concatenation, then one product.

  In float64, from the description of the release: word | value | priors, each
  prior projected with its bias and scaled, then one [.., D] kernel.
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params['embedding'])
  ids_BL, species_BL = cells.gene_ids_BL, cells.species_BL
  parts, blocks = [p['word'][ids_BL]], [p['fuse_word']]
  if config.use_values:
    parts.append(np.asarray(cells.values_BL, np.float64)[..., None])
    blocks.append(p['fuse_value'][None])
  row_BL = np.asarray(knowledge.row_SV)[species_BL, ids_BL]
  for name, _ in config.priors:
    vector = np.asarray(knowledge.tables[name], np.float64)[row_BL]
    if config.missing_prior == 'learned':
      has = knowledge.has_vector[name][row_BL][..., None]
      vector = np.where(has, vector, p['priors'][name]['missing'])
    project = p['priors'][name]['project']
    projected = vector @ project['kernel'] + project['bias']
    parts.append(config.prior_scale * projected)
    blocks.append(p['fuse_priors'][name])
  x = np.concatenate(parts, -1) @ np.concatenate(blocks) + p['fuse_bias']
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  x = x * p['fuse_norm']['scale'] + p['fuse_norm']['bias']
  x /= 1 + np.exp(-1.702 * x)
  return x @ p['fuse_project']['kernel'] + p['fuse_project']['bias']


def fused(config, params, cells, knowledge):
  network = model.bind(config, params)
  return network.embedding.fused(
    jnp.asarray(cells.gene_ids_BL),
    jnp.asarray(cells.values_BL),
    jnp.asarray(cells.species_BL),
    knowledge,
    prior_scale=np.float32(config.prior_scale),
  )


@pytest.mark.parametrize('config', CONFIGS)
def test_composed_and_folded_priors_equal_the_plain_computation(config):
  params, knowledge = params_of(config), knowledge_of(config)
  cells = apart_batch().cells
  expected = plain(config, params, cells, knowledge)
  composed = fused(config, params, cells, knowledge)
  np.testing.assert_allclose(composed, expected, atol=2e-5)
  folded = model.fold(config, params, knowledge)
  assert folded.table_SVD.shape == (2, config.vocabulary_size, config.width)
  found = fused(config, params, cells, folded)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_gradients_through_the_composition_are_those_without_it(monkeypatch):
  """One by one: project every slot, then apply the block of the fusion."""
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  batch = packed_batch()
  (loss, _), grads = loss_and_grads(TINY, params, batch, knowledge)
  product = layers.product
  waiting = []

  def apart(equation, x, kernel, bias=None, *, precision, rounds=True):
    if equation == 'BLP,PD->BLD' and waiting:
      project, block = waiting.pop()
      x = jnp.einsum(equation, x, project)
      return jnp.einsum('BLD,DE->BLE', x, block)
    return product(
      equation, x, kernel, bias, precision=precision, rounds=rounds
    )

  def not_composed(self, name):
    prior, block = self.priors[name], self.fuse_priors[name][...]
    waiting.append((prior.project.kernel[...], block))
    return None, prior.project.bias[...] @ block

  from genecompass_jax import embedding

  monkeypatch.setattr(layers, 'product', apart)
  monkeypatch.setattr(embedding.KnowledgeEmbedding, 'composed', not_composed)
  config = dataclasses.replace(TINY, prior_scale=1.0 + 1e-9)  # traced anew
  (expected, _), expected_grads = loss_and_grads(
    config, params, batch, knowledge
  )
  assert not waiting
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_hidden_states_from_a_folded_table():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  cells = packed_batch().cells
  network = model.bind(TINY, params)
  np.testing.assert_allclose(
    network(cells, model.fold(TINY, params, knowledge)),
    network(cells, knowledge),
    atol=1e-5,
  )
