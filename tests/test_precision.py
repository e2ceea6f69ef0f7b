"""Full precision for analysis, and a CLS state that bfloat16 does not round."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import knowledge, model as model_lib, schemas

SLOTS = 24
TABLES = knowledge.empty(2, 60)


def _config(**fields) -> model_lib.ModelConfig:
  return model_lib.ModelConfig(
    **{
      'vocabulary_size': 60,
      'width': 32,
      'num_layers': 3,
      'num_heads': 4,
      'feed_forward': 64,
      'max_genes': SLOTS,
      **fields,
    }
  )


def _params(config: model_lib.ModelConfig, times=1.0) -> model_lib.Params:
  return jax.tree.map(lambda x: times * x, model_lib.init(config, 0))


def _batch(lengths) -> schemas.CellBatch:
  rng = np.random.default_rng(0)
  shape = (len(lengths), SLOTS)
  slot_L = np.arange(SLOTS)
  is_cell_BL = slot_L <= np.array(lengths)[:, None]
  is_gene_BL = is_cell_BL & (slot_L > 0)
  return schemas.CellBatch(
    gene_ids_BL=np.where(is_gene_BL, rng.integers(5, 60, shape), 0),
    values_BL=np.where(is_gene_BL, rng.random(shape), 0).astype(np.float32),
    positions_BL=np.where(is_gene_BL, slot_L - 1, 0),
    segments_BL=is_cell_BL.astype(np.int32),
    species_BL=np.zeros(shape, np.int32),
    is_cls_BL=np.broadcast_to(slot_L == 0, shape),
  )


def _states(config, params, batch) -> np.ndarray:
  run = functools.partial(model_lib.evaluate, knowledge=TABLES)
  return np.asarray(jax.jit(run, static_argnums=0)(config, params, batch))


def _dots(text: str) -> list[str]:
  return re.findall(r'dot_general .*', text)


def test_float32_is_multiplied_in_full_precision():
  config = _config()
  program = jax.jit(model_lib.evaluate, static_argnums=0).lower(
    config, _params(config), _batch([9]), TABLES
  )
  dots = _dots(program.as_text())
  assert len(dots) > 5
  assert all('HIGHEST' in dot for dot in dots)


def test_training_in_float32_leaves_products_to_the_device():
  config = _config()

  def plain(params, batch):
    return model_lib.bind(config, params)(batch, TABLES)

  dots = _dots(jax.jit(plain).lower(_params(config), _batch([9])).as_text())
  assert dots
  assert not any('HIGHEST' in dot for dot in dots)


@pytest.mark.parametrize('norm_order', ['post', 'pre'])
def test_cls_of_bfloat16_is_near_that_of_float32(norm_order):
  config = _config(norm_order=norm_order)
  params, batch = _params(config), _batch([23, 11, 1, 0])
  half = dataclasses.replace(config, dtype='bfloat16')

  def plain(params, batch):
    return model_lib.bind(half, params)(batch, TABLES)

  exact_BLD = _states(config, params, batch)
  rounded_BLD = np.asarray(jax.jit(plain)(params, batch))
  found_BLD = _states(half, params, batch)
  error = np.abs(found_BLD - exact_BLD)[:, 0].mean()
  assert error < 0.5 * np.abs(rounded_BLD - exact_BLD)[:, 0].mean()


def test_first_slot_is_that_of_all_slots_in_float32():
  """In float32 the extra stream is the same computation."""
  config = _config(num_layers=1)
  params, batch = _params(config, 10.0), _batch([23, 11, 1, 0])
  block = jax.tree.map(lambda x: x[0], params['encoder'])
  rng = np.random.default_rng(1)
  x_BLD = rng.standard_normal((4, SLOTS, 32)).astype(np.float32)
  bias_BL = rng.standard_normal((4, SLOTS)).astype(np.float32)
  for bias in (None, jnp.asarray(bias_BL)):
    behind_BLD, first_B1D = model_lib.encoder_block(
      x_BLD, x_BLD[:, :1], batch.segments_BL, block, config, None, bias
    )
    np.testing.assert_allclose(
      first_B1D, behind_BLD[:, :1], rtol=1e-5, atol=1e-5
    )


def test_every_layer_holds_the_precise_cls():
  config = _config(dtype='bfloat16')
  params, batch = _params(config), _batch([23, 11])
  network = model_lib.bind(config, params)
  every_NBLD = network(batch, TABLES, every_layer=True, precise_cls=True)
  last_BLD = network(batch, TABLES, precise_cls=True)
  np.testing.assert_array_equal(every_NBLD[-1], last_BLD)
