"""FLOPs by hand, against the original's figures and the compiler's count."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import (
  chips,
  flops,
  knowledge,
  layers,
  losses,
  model,
  schemas,
  scoring,
)

GENES, VOCABULARY = 2048, 50_558


def original(size, genes=GENES):
  """Configuration and work of the original: both heads at every gene."""
  config = model.named_config(
    size,
    vocabulary_size=VOCABULARY,
    priors=tuple((name, 768) for name in ('a', 'b', 'c', 'd')),
    missing_prior='released',
  )
  # Its CLS slot passes the encoder only.
  encoder = flops.Work(genes + 1, (genes + 1) ** 2, genes)
  return config, encoder, flops.Work(genes, 0, 0)


def total(count, config, encoder, embedding):
  """FLOPs with the embedding at the genes only."""
  parts = count(config, encoder, composed=False)
  genes = count(config, embedding, composed=False)
  for part in ('fusion', 'priors'):
    parts[part] = genes[part]
  return sum(parts.values()) / 1e9


@pytest.mark.parametrize(
  'changes, genes, forward, training',
  [
    ({}, 2048, 690.9, 2062.9),
    ({'num_layers': 6}, 2048, 439.5, 1308.7),
    ({}, 1200, 367.4, 1096.4),
  ],
)
def test_the_figures_of_the_original(changes, genes, forward, training):
  config, encoder, embedding = original('base', genes)
  config = dataclasses.replace(config, **changes)
  assert total(flops.forward, config, encoder, embedding) == pytest.approx(
    forward, rel=1e-3
  )
  assert total(flops.training, config, encoder, embedding) == pytest.approx(
    training, rel=1e-3
  )


def test_parts_of_the_original():
  config, encoder, embedding = original('base')
  parts = flops.forward(config, encoder, composed=False)
  found = {name: value / 1e9 for name, value in parts.items()}
  assert found['encoder'] == pytest.approx(348.1, abs=0.05)
  assert found['attention'] == pytest.approx(154.8, abs=0.05)
  heads = found['id_head'] + found['value_head']
  assert heads == pytest.approx(159.0 + 4.8, abs=0.1)
  genes = flops.forward(config, embedding, composed=False)
  assert (genes['fusion'] + genes['priors']) / 1e9 == pytest.approx(
    9.7 + 14.5, abs=0.05
  )


def test_masked_heads_of_the_original():
  # With the decoder (not its transform) on 15 % of positions: 1,657.
  config, encoder, embedding = original('base')
  hidden = 0.85 * GENES * 3 * 2 * config.width * VOCABULARY
  step = total(flops.training, config, encoder, embedding)
  assert step - hidden / 1e9 == pytest.approx(1657, rel=1e-3)


def test_work_of_shapes_and_of_cells():
  padded = flops.padded_work(4, 256, 32)
  assert padded == flops.Work(1024, 4 * 256**2, 128)
  real = flops.real_work(np.array([99, 149]), 37)
  assert real == flops.Work(250, 100**2 + 150**2, 37)
  assert padded + real == flops.Work(1274, 4 * 256**2 + 32_500, 165)


def unrolled(config, params, batch, tables):
  """The loss of a model whose layers are written out and not recomputed."""
  config = dataclasses.replace(config, unroll=config.num_layers)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, 'recomputed', lambda f: f)
    id_BK, value_BK = scoring.slot_losses(params, batch, tables, config)
  ones = jnp.ones_like(id_BK)
  sums = losses.loss_sums(id_BK, ones, value_BK, ones)
  return sums.means(losses.LossConfig())[0]


@pytest.mark.parametrize('missing_prior', ['learned', 'released'])
def test_the_count_of_the_compiler(missing_prior):
  # Wide enough that products are all that counts.
  rows, slots, masked = 2, 512, 128
  config = model.ModelConfig(
    vocabulary_size=4000,
    width=1536,
    num_layers=2,
    num_heads=3,
    feed_forward=3072,
    max_genes=slots,
    priors=(('a', 128), ('b', 192)),
    missing_prior=missing_prior,
    attention='xla',  # of a loop the compiler counts one round
    hidden_dropout=0.0,
    attention_dropout=0.0,
  )
  params = model.abstract_params(config)
  ints = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
  reals = jax.ShapeDtypeStruct((rows, slots), jnp.float32)
  bools = jax.ShapeDtypeStruct((rows, slots), jnp.bool_)
  some = jax.ShapeDtypeStruct((rows, masked), jnp.int32)
  some_reals = jax.ShapeDtypeStruct((rows, masked), jnp.float32)
  batch = schemas.PretrainingBatch(
    schemas.CellBatch(ints, reals, ints, ints, ints, bools),
    *(some, some, some_reals, some_reals, some_reals),
  )
  tables = knowledge.Knowledge(
    row_SV=jax.ShapeDtypeStruct((2, 4000), jnp.int32),
    tables={
      name: jax.ShapeDtypeStruct((4000, width), jnp.float32)
      for name, width in config.priors
    },
    has_vector={
      name: jax.ShapeDtypeStruct((4000,), jnp.bool_)
      for name, _ in config.priors
    },
  )
  gradient = jax.grad(lambda p, b, t: unrolled(config, p, b, t))
  compiled = jax.jit(gradient).lower(params, batch, tables).compile()
  counted = compiled.cost_analysis()['flops']
  work = flops.padded_work(rows, slots, masked)
  by_hand = sum(flops.training(config, work).values())
  # The compiler counts activations, norms and softmax besides.
  assert 0 <= counted / by_hand - 1 < 0.005


def test_a_value_and_a_prior_cost_what_they_cost():
  work = flops.padded_work(1, 128, 16)
  config = model.named_config('tiny', vocabulary_size=100)
  plain = flops.forward(dataclasses.replace(config, use_values=False), work)
  assert 'value_head' not in plain
  assert plain['priors'] == plain['composition'] == 0
  more = dataclasses.replace(config, priors=(('a', 32),))
  parts = flops.forward(more, work)
  assert parts['priors'] == 128 * 2 * 32 * 64
  assert parts['composition'] == 2 * 32 * 64 * 64
  doubled = flops.forward(more, flops.padded_work(2, 128, 16))
  assert doubled['composition'] == parts['composition']  # once a step
  assert doubled['priors'] == 2 * parts['priors']
  # A frozen table needs no gradient.
  assert flops.training(more, work)['priors'] == 3 * parts['priors']
  frozen = dataclasses.replace(more, missing_prior='released')
  assert flops.training(frozen, work)['priors'] == 2 * parts['priors']


def test_split_scores_all_tokens_at_half_of_the_slots():
  work = flops.padded_work(1, 128, 16)
  config = model.named_config('tiny', vocabulary_size=100)
  split = dataclasses.replace(config, hides_ranks=True)
  whole, half = flops.forward(config, work), flops.forward(split, work)
  assert half['id_head'] == whole['id_head'] / 2
  assert half['value_head'] == whole['value_head']


def test_chips_are_found_by_what_jax_calls_them():
  kinds = {
    'TPU v4': 'v4',
    'TPU v5 lite': 'v5e',
    'TPU v5': 'v5p',
    'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e',
    'TPU7x': 'v7x',
    'NVIDIA A100-SXM4-80GB': 'a100-80',
    'NVIDIA H100 80GB HBM3': 'h100',
    'NVIDIA H100 PCIe': 'h100-pcie',
    'NVIDIA H200': 'h200',
    'NVIDIA GH200 480GB': 'gh200',
    'NVIDIA L4': 'l4',
    'NVIDIA L40S': 'l40s',
  }
  for kind, name in kinds.items():
    assert chips.by_kind(kind) is chips.by_name(name)
  for kind in ('cpu', 'NVIDIA A10G', 'TPU v4 lite', 'TPU v9', ''):
    assert chips.by_kind(kind) is None, kind
    assert chips.peak_flops(kind, 'bfloat16') is None
  assert chips.peak_flops('TPU v5 lite', 'bfloat16') == 197e12
  assert chips.peak_flops('NVIDIA H200', 'float32') == 494.7e12
  with pytest.raises(ValueError, match='float16'):
    chips.peak_flops('NVIDIA H200', 'float16')


def test_gigabytes_in_a_name_are_binary_and_not_all_there():
  named = [
    (int(digits), chip)
    for chip in chips.CHIPS
    for kind in chip.kinds
    for digits in re.findall(r'(\d+) ?GB', kind)
  ]
  assert len(named) >= 5
  for number, chip in named:
    assert 0.95 < chip.memory / (number * 2**30) <= 1, chip.name
