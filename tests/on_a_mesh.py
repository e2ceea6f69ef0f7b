"""Run by tests/test_sharding.py with eight CPU devices: one line of JSON.

A step of training on several meshes, each beside the same step on one device.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genecompass_jax import (
  attention,
  chunked_attention,
  data,
  encoding,
  errors,
  knowledge as knowledge_lib,
  masking,
  model,
  optimizer,
  rows,
  scoring,
  sharding,
)
from genecompass_jax.scaling import collectives
from genecompass_jax.training import (
  train_config,
  train_step,
)

V, ROWS, SLOTS, GENES = 64, 16, 128, 100
BASE = train_config.TrainConfig(
  corpus='',
  model=model.ModelConfig(
    vocabulary_size=V,
    width=32,
    num_layers=2,
    num_heads=4,
    feed_forward=64,
    max_genes=GENES,
    priors=(('a', 8), ('b', 16)),
    hidden_dropout=0.1,
    attention_dropout=0.1,
  ),
  optimizer=optimizer.OptimizerConfig(warmup_steps=0, learning_rate=1e-3),
  data=data.DataConfig(rows_per_batch=ROWS, slots=SLOTS, buckets=(SLOTS,)),
  encoding=encoding.EncodingConfig(max_genes=GENES),
)
NO_DROPOUT = dataclasses.replace(
  BASE,
  model=dataclasses.replace(
    BASE.model, hidden_dropout=0.0, attention_dropout=0.0
  ),
)


def batch():
  """Rows of one or two cells of 20-100 genes."""
  rng = np.random.default_rng(0)
  lengths = np.where(np.arange(ROWS) % 2, 100, 60)
  row_C = np.arange(ROWS)
  small = row_C[row_C % 2 == 0]
  row_C = np.concatenate([row_C, small])
  lengths = np.concatenate([lengths, 20 + small])
  slot_C = np.where(np.arange(len(row_C)) < ROWS, 0, 61)
  segment_C = np.where(np.arange(len(row_C)) < ROWS, 1, 2)
  cells = encoding.EncodedCells(
    gene_ids_N=rng.integers(2, V, lengths.sum()).astype(np.int32),
    values_N=rng.uniform(1, 6, lengths.sum()).astype(np.float32),
    starts_C1=np.cumsum([0, *lengths]),
    keys_C=np.zeros(len(lengths), np.uint64),
    num_genes_C=lengths.astype(np.int32),
  )
  masked = masking.mask_cells(
    cells,
    np.arange(cells.num_cells),
    config=masking.MaskConfig(rate=0.3),
    seed=0,
    epoch=0,
    random_tokens=np.arange(2, V, dtype=np.int32),
    vocabulary_size=V,
  )
  made = rows.empty_batch(ROWS, SLOTS, 64)
  rows.place_cells(
    made.cells,
    cells.starts_C1,
    masked.gene_ids_N,
    masked.values_N,
    row_C,
    slot_C,
    segment_C,
    np.arange(len(lengths)) % 2,
  )
  picks_P = np.flatnonzero(masked.is_masked_N)
  picks_C1 = np.searchsorted(picks_P, cells.starts_C1)
  first_C = np.where(segment_C == 1, 0, 40)
  rows.place_labels(made, cells, picks_P, picks_C1, row_C, slot_C, first_C)
  return made


def knowledge():
  """Random tables with holes."""
  rng = np.random.default_rng(1)
  row_SV = np.stack([np.arange(V)] * 2).astype(np.int32)
  tables = {
    name: rng.normal(size=(V, width)).astype(np.float32)
    for name, width in BASE.model.priors
  }
  has = {name: rng.random(V) < 0.8 for name in tables}
  return knowledge_lib.Knowledge(row_SV, tables, has)


def step(config, shape, num_devices=8):
  """Loss, gradients, parameters after a step; where the largest lie."""
  mesh = sharding.make_mesh(
    sharding.MeshConfig(*shape), jax.devices()[:num_devices]
  )
  with jax.set_mesh(mesh):
    train_step.check_mesh(config, mesh)
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    places = train_step.state_sharding(config, shapes, mesh)
    init = jax.jit(lambda: train_step.init_state(config), out_shardings=places)
    state = init()
    run = jax.jit(
      lambda s, b, k: train_step.train_step(s, b, k, config),
      out_shardings=(places, sharding.replicated(mesh)),
    )
    state, values = run(
      state,
      sharding.put_batch(batch(), mesh),
      jax.device_put(knowledge(), sharding.replicated(mesh)),
    )
    up = state.params['encoder']['up']['kernel']
    return {
      'loss': float(values['loss']),
      'grad_norm': float(values['grad_norm']),
      # The first moment of a first step is its gradient, in parts; Adam's
      # update of the parameters knows no size of it.
      'grads': {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(
          jax.device_get(optax.tree.get(state.opt_state, 'mu'))
        )
      },
      'params': np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(jax.device_get(state.params))]
      ),
      'shard': up.sharding.shard_shape(up.shape),
      'moments': {
        tuple(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(state.opt_state)
        if x.shape == up.shape
      },
    }


def compare(found, alone):
  """Differences from one device."""
  return {
    'loss': abs(found['loss'] - alone['loss']),
    'grad_norm': abs(found['grad_norm'] / alone['grad_norm'] - 1),
    'grads': furthest(found['grads'], alone['grads']),
    'params': float(np.abs(found['params'] - alone['params']).max()),
    'shard': found['shard'],
    'moments': sorted(found['moments']),
  }


def furthest(found, alone):
  """The gradient that is furthest off, beside its own size: how far, name."""
  whole = np.sqrt(sum(np.sum(np.square(x)) for x in alone.values()))

  def apart(name):
    size = np.linalg.norm(alone[name]) + 1e-6 * whole  # some are nearly 0
    return float(np.linalg.norm(found[name] - alone[name]) / size)

  return max((apart(name), name) for name in alone)


def sent_in_parts():
  """Bytes of gradients that four groups sum in a step of four parts.

  Returns:
    Bytes of all-reduces, and of all parameters.
  """
  small = dataclasses.replace(NO_DROPOUT.model, num_layers=1)
  config = dataclasses.replace(NO_DROPOUT, model=small, microbatches=4)
  mesh = sharding.make_mesh(sharding.MeshConfig(4), jax.devices()[:4])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), knowledge()
  )
  lowered = train_step.lower(config, mesh, SLOTS, shapes)
  found = collectives.parse(lowered.compile().as_text())
  sent = sum(t.bytes for t in found if t.kind == 'all-reduce')
  return sent, 4 * model.count_parameters(small)['total']


def kernels():
  """Furthest that a kernel on a mesh is from plain attention, gradients too."""
  rng = np.random.default_rng(2)
  arrays = [
    jnp.asarray(rng.normal(size=(4, 256, 4, 32)), jnp.float32) for _ in range(4)
  ]
  segments_BL = np.repeat([[1] * 4 + [2] * 2 + [3, 0]] * 4, 32, axis=1)

  def run(kind):
    def total(query, key, value, weights, segments_BL):
      out = attention.attend(
        query, key, value, segments_BL, kind=kind, interpret=True
      )
      out = jnp.where((segments_BL > 0)[..., None, None], out, 0)
      # Not their sum: of 131,072 numbers, it rounds by more than they differ.
      return jnp.sum(out * weights), out

    grad = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    return jax.device_get(grad(*arrays, segments_BL))

  plain, found = run('xla'), {}
  for kind, shape in (('splash', (1, 2, 2, 2)), ('pallas', (2, 2, 1, 2))):
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(*shape))):
      pairs = zip(jax.tree.leaves(run(kind)), jax.tree.leaves(plain))
      found[kind] = max(float(np.abs(a - b).max()) for a, b in pairs)
  return found


def main():
  """All meshes, with and without parts and dropout."""
  results = {}
  alone = step(BASE, (1, 1, 1, 1), 1)
  for shape in ((4, 2, 1, 1), (1, 2, 2, 2)):
    name = 'x'.join(map(str, shape))
    results[name] = compare(step(BASE, shape), alone)
  config = dataclasses.replace(BASE, microbatches=2)
  results['parts'] = compare(step(config, (2, 1, 2, 2)), alone)
  # Devices inside of parts, inside of groups of the data axis; two chunks each.
  config = dataclasses.replace(
    NO_DROPOUT,
    model=dataclasses.replace(NO_DROPOUT.model, attention='chunked'),
    microbatches=2,
  )
  chunked_attention.CHUNK = 50
  alone = step(NO_DROPOUT, (1, 1, 1, 1), 1)
  results['sent'] = sent_in_parts()
  # A quarter of the logits of a device: 4 rows x 16 predictions x 64 tokens.
  scoring._LOGITS_BYTES = 4 * 4 * V * 4
  results['pieces'] = compare(step(config, (2, 1, 2, 2)), alone)
  results['kernels'] = kernels()
  refused = {}
  odd = dataclasses.replace(BASE.model, width=36, num_heads=6)
  for name, config, shape in (
    ('heads', dataclasses.replace(BASE, model=odd), (2, 1, 1, 4)),
    ('rows', dataclasses.replace(BASE, microbatches=3), (8, 1, 1, 1)),
    ('devices', BASE, (3, 1, 1, 1)),
    ('slots', BASE, (1, 1, -1, 1)),
  ):
    try:
      step(config, shape)
    except errors.UserError as error:
      refused[name] = str(error)
  results['refused'] = refused
  sharding.LARGE = 1000
  state = {'kernel': jax.device_put(np.zeros((6, 999)))}
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4))
  state = jax.device_put(state, sharding.replicated(mesh))
  try:
    sharding.check_shared(state, mesh)
  except errors.UserError as error:
    refused['whole'] = str(error)
  print(json.dumps(results, default=str))


if __name__ == '__main__':
  main()
