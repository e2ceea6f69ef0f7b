"""Properties of the network, on a model of 30 tokens.

Numbers of the original are compared in test_parity.py. Parameters are drawn
wide, biases and norms included: at their initial values much would cancel.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import (
  encoding,
  errors,
  knowledge as knowledge_lib,
  layers,
  losses,
  masking,
  model,
  rows,
  scoring,
)

V = 30
SLOTS = 40
LENGTHS = (9, 12, 7)
SPECIES = np.array([0, 1, 0])
TINY = model.ModelConfig(
  vocabulary_size=V,
  width=16,
  num_layers=2,
  num_heads=2,
  feed_forward=24,
  max_genes=12,
  priors=(('a', 5), ('b', 3)),
  hidden_dropout=0.1,
  attention_dropout=0.1,
)
BARE = dataclasses.replace(TINY, priors=(), use_values=False, use_cls=False)


def params_of(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32),
    model.abstract_params(config),
  )


def knowledge_of(config, seed=1):
  """Tables of 2 + 28 + 10 rows: mouse cells read the last for shared tokens."""
  rng = np.random.default_rng(seed)
  row_SV = np.stack([np.arange(V), np.arange(V)]).astype(np.int32)
  row_SV[1, 2:12] = np.arange(V, V + 10)
  tables, has = {}, {}
  for name, width in config.priors:
    has[name] = rng.random(V + 10) < 0.7
    has[name][:2] = True
    table = rng.normal(size=(V + 10, width)).astype(np.float32)
    table[~has[name]] = table[:2] = 0.0
    tables[name] = table
  return knowledge_lib.Knowledge(row_SV, tables, has)


def cells_of(lengths=LENGTHS, seed=2):
  rng = np.random.default_rng(seed)
  return encoding.EncodedCells(
    gene_ids_N=np.concatenate(
      [2 + rng.permutation(V - 2)[:n] for n in lengths]
    ).astype(np.int32),
    values_N=np.concatenate(
      [np.sort(rng.uniform(1, 6, n))[::-1] for n in lengths]
    ).astype(np.float32),
    starts_C1=np.cumsum([0, *lengths]),
    keys_C=np.zeros(len(lengths), np.uint64),
    num_genes_C=np.array(lengths, np.int32),
  )


def masked_batch(cells, row_C, slot_C, segment_C, slots):
  """Hidden cells where they are wanted in a batch of three rows."""
  masked = masking.mask_cells(
    cells,
    np.arange(cells.num_cells),
    config=masking.MaskConfig(rate=0.4),
    seed=0,
    epoch=0,
    random_tokens=np.arange(2, V, dtype=np.int32),
    vocabulary_size=V,
  )
  batch = rows.empty_batch(3, slots, 24)
  where = np.asarray(row_C), np.asarray(slot_C)
  rows.place_cells(
    batch.cells,
    cells.starts_C1,
    masked.gene_ids_N,
    masked.values_N,
    *where,
    np.asarray(segment_C),
    SPECIES[: cells.num_cells],
  )
  picks_P = np.flatnonzero(masked.is_masked_N)
  picks_C1 = np.searchsorted(picks_P, cells.starts_C1)
  first_C = rows.within_rows(where[0], np.diff(picks_C1))
  assert not rows.place_labels(batch, cells, picks_P, picks_C1, *where, first_C)
  return batch


def packed_batch(cells=None):
  """Three cells in one row, padding behind and below."""
  cells = cells or cells_of()
  first = [0, *np.cumsum([n + 1 for n in LENGTHS])[:-1]]
  return masked_batch(cells, [0, 0, 0], first, [1, 2, 3], SLOTS)


def apart_batch(cells=None, slots=SLOTS):
  """The same cells, one a row."""
  return masked_batch(
    cells or cells_of(), [0, 1, 2], [0, 0, 0], [1, 1, 1], slots
  )


@functools.partial(jax.jit, static_argnums=0, static_argnames='every_layer')
def hidden_states(config, params, cells, knowledge, **kwargs):
  return model.bind(config, params)(cells, knowledge, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, params, batch, knowledge):
  """(loss, slot losses), gradients."""

  def loss(params):
    slots = scoring.slot_losses(params, batch, knowledge, config)
    id_BK, value_BK = slots
    sums = losses.loss_sums(
      id_BK, batch.id_weights_BK, value_BK, batch.value_weights_BK
    )
    return sums.means(losses.LossConfig())[0], slots

  return jax.value_and_grad(loss, has_aux=True)(params)


def by_cell(array_BL, segments_BL):
  """Values of every cell, in the order of rows and segments."""
  array_BL, found = np.asarray(array_BL), []
  for row, segments in enumerate(segments_BL):
    cells = np.unique(segments[segments > 0])
    found += [array_BL[row, segments == cell] for cell in cells]
  return np.concatenate(found)


def assert_close(a, b, atol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


# Sizes


def test_base_has_the_parameters_of_the_release():
  priors = tuple((name, 768) for name in ('a', 'b', 'c', 'd'))
  base = model.named_config(
    'base', vocabulary_size=50_558, priors=priors, missing_prior='released'
  )
  counts = model.count_parameters(base)
  assert counts['total'] == 132_601_215
  assert counts['total'] == sum(v for k, v in counts.items() if k != 'total')
  assert counts['word_embedding'] == 50_558 * 768
  learned = dataclasses.replace(base, missing_prior='learned')
  assert model.count_parameters(learned)['total'] == 132_601_215 + 4 * 768


@pytest.mark.parametrize('size', model.SIZES)
def test_named_sizes_have_shapes_and_axes(size):
  config = model.named_config(size, vocabulary_size=100, priors=(('a', 8),))
  shapes, axes = model.abstract_params(config), model.logical_axes(config)
  jax.tree.map(
    lambda s, names: None if len(s.shape) == len(names) else 1 / 0,
    shapes,
    axes,
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'num_heads': 3}, 'width=16 must be divisible by num_heads=3'),
    ({'dtype': 'float16'}, 'choose one of float32, bfloat16'),
    ({'head': 'sequence'}, 'needs num_labels'),
    ({'missing_prior': 'zero'}, 'missing_prior'),
    ({'hidden_dropout': 1.0}, r'hidden_dropout=1.0 is not in \[0, 1\)'),
  ],
)
def test_impossible_models_are_refused(changes, message):
  with pytest.raises(errors.UserError, match=message):
    dataclasses.replace(TINY, **changes)


def test_a_model_without_genes_and_an_unknown_size_are_refused():
  with pytest.raises(errors.UserError, match='vocabulary_size=2 holds no gene'):
    model.abstract_params(dataclasses.replace(TINY, vocabulary_size=2))
  with pytest.raises(errors.UserError, match="size='huge' is not known"):
    model.named_config('huge')


def test_initial_parameters_are_those_of_the_release():
  params = jax.jit(lambda: model.init(TINY, seed=0))()
  word_VD = params['embedding']['word']
  assert not word_VD[0].any()
  assert 0.015 < np.std(word_VD[1:]) < 0.025
  assert not params['embedding']['priors']['a']['missing'].any()
  assert (params['encoder']['output_norm']['scale'] == 1).all()
  assert not params['encoder']['up']['bias'].any()


# Cells, rows and padding


VARIANTS = {
  'whole': TINY,
  'one prior': dataclasses.replace(
    TINY, priors=TINY.priors[1:], missing_prior='released'
  ),
  'no cls': dataclasses.replace(TINY, use_cls=False),
  'no values': dataclasses.replace(TINY, use_values=False),
  'bare': BARE,
}


@pytest.mark.parametrize('name', VARIANTS)
def test_states_in_a_packed_row_equal_those_of_one_cell_a_row(name):
  config = VARIANTS[name]
  params, knowledge = params_of(config), knowledge_of(config)
  found = []
  for batch in (packed_batch().cells, apart_batch().cells):
    states = hidden_states(config, params, batch, knowledge)
    segments = batch.segments_BL
    if not config.use_cls:
      segments = np.where(batch.is_cls_BL, 0, segments)
    found.append(by_cell(states, segments))
  assert len(found[0]) == sum(LENGTHS) + 3 * config.use_cls
  assert_close(*found)
  assert found[0].std() > 0.1


@pytest.mark.parametrize('name', ['whole', 'bare'])
def test_losses_and_gradients_of_a_packed_row_equal_one_cell_a_row(name):
  config = VARIANTS[name]
  params, knowledge = params_of(config), knowledge_of(config)
  results = []
  for batch in (packed_batch(), apart_batch()):
    (loss, slots), grads = loss_and_grads(config, params, batch, knowledge)
    used = batch.id_weights_BK > 0
    slots = [np.asarray(s)[used] for s in slots if s is not None]
    assert len(slots) == 1 + config.use_values
    results.append((loss, slots, grads))
  assert_close(*results)
  assert results[0][0] > 0.1


def test_padding_changes_nothing():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  cells = apart_batch().cells
  states = hidden_states(TINY, params, cells, knowledge)
  is_pad = cells.segments_BL == 0
  rng = np.random.default_rng(0)
  dirty = dataclasses.replace(
    cells,
    gene_ids_BL=np.where(is_pad, rng.integers(0, V), cells.gene_ids_BL),
    values_BL=np.where(is_pad, np.float32(1e6), cells.values_BL),
    positions_BL=np.where(is_pad, 11, cells.positions_BL),
    species_BL=np.where(is_pad, 1, cells.species_BL),
  )
  again = hidden_states(TINY, params, dirty, knowledge)
  np.testing.assert_array_equal(states[~is_pad], again[~is_pad])
  short = apart_batch(slots=max(LENGTHS) + 1).cells
  np.testing.assert_allclose(
    by_cell(hidden_states(TINY, params, short, knowledge), short.segments_BL),
    states[~is_pad],
    atol=1e-5,
  )


def test_the_order_of_rows_changes_nothing():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  cells = apart_batch().cells
  states = hidden_states(TINY, params, cells, knowledge)
  turned = jax.tree.map(lambda x: x[::-1], cells)
  np.testing.assert_array_equal(
    hidden_states(TINY, params, turned, knowledge)[::-1], states
  )


def test_a_gene_never_reaches_another_cell():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  batch = packed_batch().cells

  @jax.jit
  def influence(values_BL, weights_BL):
    def total(values_BL):
      cells = dataclasses.replace(batch, values_BL=values_BL)
      states = model.bind(TINY, params)(cells, knowledge)
      return jnp.einsum('BLD,BL->', states**2, weights_BL)

    return jax.grad(total)(values_BL)

  segments = batch.segments_BL
  for cell in (1, 2, 3):
    inside = segments == cell
    grads = influence(batch.values_BL, inside.astype(np.float32))
    assert not np.asarray(grads)[~inside].any()
    genes = inside & ~batch.is_cls_BL
    assert (np.asarray(grads)[genes] != 0).all()
    assert not np.asarray(grads)[batch.is_cls_BL].any()


def test_a_hidden_value_never_reaches_its_prediction():
  cells = cells_of()
  batch = packed_batch(cells)
  hidden = masking.mask_cells(
    cells,
    np.arange(3),
    config=masking.MaskConfig(rate=0.4),
    seed=0,
    epoch=0,
    random_tokens=np.arange(2, V, dtype=np.int32),
    vocabulary_size=V,
  ).is_masked_N
  values_N = cells.values_N.copy()
  for a, b in zip(cells.starts_C1, cells.starts_C1[1:]):
    lowest = np.append(values_N[a + 1 : b], 0.5)
    middle = (values_N[a:b] + lowest) / 2  # between its neighbours in rank
    values_N[a:b] = np.where(hidden[a:b], middle, values_N[a:b])
  other = packed_batch(dataclasses.replace(cells, values_N=values_N))
  changed = np.asarray(batch.value_labels_BK != other.value_labels_BK)
  assert (changed == (batch.value_weights_BK > 0)).all()
  jax.tree.map(np.testing.assert_array_equal, batch.cells, other.cells)
  np.testing.assert_array_equal(batch.id_labels_BK, other.id_labels_BK)
  slots = batch.masked_slots_BK[batch.id_weights_BK > 0]
  assert (batch.cells.values_BL[0, slots] == masking.HIDDEN_VALUE).all()


# Knowledge


@functools.partial(jax.jit, static_argnums=0)
def fused(config, params, gene_ids, values, species, knowledge, scale=1.0):
  embedding = model.bind(config, params).embedding
  return embedding.fused(
    gene_ids, values, species, knowledge, prior_scale=scale
  )


def fused_tokens(config, params, knowledge, species, scale=1.0):
  """Embeddings of all tokens at one value, [V, D]."""
  tokens = np.arange(V, dtype=np.int32)[None]
  values = np.ones((1, V), np.float32)
  codes = np.full((1, V), species, np.int32)
  return np.asarray(
    fused(config, params, tokens, values, codes, knowledge, scale)
  )[0]


def test_a_missing_prior_is_learned_or_zero():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  released = dataclasses.replace(TINY, missing_prior='released')
  plain = {
    **params,
    'embedding': {
      **params['embedding'],
      'priors': {
        name: {**prior, 'missing': np.zeros_like(prior['missing'])}
        for name, prior in params['embedding']['priors'].items()
      },
    },
  }
  shared = jax.tree.map(lambda x: x, plain)
  for prior in shared['embedding']['priors'].values():
    del prior['missing']
  zero = fused_tokens(released, shared, knowledge, 0)
  np.testing.assert_array_equal(fused_tokens(TINY, plain, knowledge, 0), zero)
  learned = fused_tokens(TINY, params, knowledge, 0)
  has = knowledge.has_vector['a'][:V] & knowledge.has_vector['b'][:V]
  assert 3 < has.sum() < V - 3
  assert has[:2].all()  # hidden is not the same as unknown
  np.testing.assert_array_equal((learned == zero).all(1), has)


def test_a_mouse_cell_reads_the_rows_of_mouse_genes():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  human = fused_tokens(TINY, params, knowledge, 0)
  mouse = fused_tokens(TINY, params, knowledge, 1)
  same = (human == mouse).all(1)
  np.testing.assert_array_equal(
    same, knowledge.row_SV[0] == knowledge.row_SV[1]
  )
  rows_of_mouse = dataclasses.replace(
    knowledge, row_SV=knowledge.row_SV[[1, 1]]
  )
  np.testing.assert_array_equal(
    fused_tokens(TINY, params, rows_of_mouse, 0), mouse
  )


def test_prior_scale_multiplies_the_projected_prior_and_its_bias():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  halved = jax.tree.map(lambda x: x, params)
  for prior in halved['embedding']['priors'].values():
    prior['project'] = jax.tree.map(lambda x: x / 2, prior['project'])
  np.testing.assert_allclose(
    fused_tokens(TINY, params, knowledge, 1, 0.5),
    fused_tokens(TINY, halved, knowledge, 1),
    atol=1e-6,
  )
  none = dataclasses.replace(TINY, priors=())
  np.testing.assert_allclose(
    fused_tokens(TINY, params, knowledge, 1, 0.0),
    fused_tokens(none, _without_priors(params), knowledge, 1),
    atol=1e-6,
  )
  cells = apart_batch().cells
  scaled = dataclasses.replace(TINY, prior_scale=0.5)
  np.testing.assert_array_equal(
    hidden_states(scaled, params, cells, knowledge),
    hidden_states(TINY, params, cells, knowledge, prior_scale=0.5),
  )


def _without_priors(params):
  embedding = {
    **params['embedding'],
    'priors': {},
    'fuse_priors': {},
  }
  return {**params, 'embedding': embedding}


# Dropout, precision, recomputation


def test_dropout_follows_its_key_and_is_off_without():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  cells = apart_batch().cells

  def run(config=TINY, key=None):
    keys_B = key
    if key is not None:
      keys_B = layers.keys_of_rows(key, np.arange(len(cells.segments_BL)))
    return np.asarray(
      hidden_states(config, params, cells, knowledge, dropout_keys_B=keys_B)
    )

  first = run(key=jax.random.key(0))
  np.testing.assert_array_equal(run(key=jax.random.key(0)), first)
  assert np.abs(run(key=jax.random.key(1)) - first).max() > 0.1
  no_rates = dataclasses.replace(
    TINY, hidden_dropout=0.0, attention_dropout=0.0
  )
  np.testing.assert_array_equal(run(no_rates, jax.random.key(0)), run())


def test_recomputation_changes_no_gradient():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  remat = dataclasses.replace(TINY, remat='full')
  results = [
    loss_and_grads(config, params, packed_batch(), knowledge)
    for config in (TINY, remat)
  ]
  assert_close(*results, atol=1e-6)


def test_what_attention_made_is_kept(capsys):
  """Output, highest scores and sums; the rest of a block is made anew."""
  config = dataclasses.replace(
    TINY,
    remat='attention',
    attention='chunked',
    hidden_dropout=0.0,
    attention_dropout=0.0,
  )
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  batch = packed_batch()
  jax.ad_checkpoint.print_saved_residuals(
    lambda params: hidden_states(config, params, batch.cells, knowledge).sum(),
    params,
  )
  said = [
    line.split()[0]
    for line in capsys.readouterr().out.splitlines()
    if 'argument' not in line and line.startswith(f'f32[{TINY.num_layers},')
  ]
  of_rows = '3,40'
  of_queries = f'{TINY.num_layers},1,3,{TINY.num_heads},40'  # one chunk
  head_dim = TINY.width // TINY.num_heads
  expected = [
    *[f'f32[{of_queries}]'] * 2,
    f'f32[{of_queries},{head_dim}]',
    f'f32[{TINY.num_layers},{of_rows},{TINY.width}]',
  ]
  assert sorted(said) == sorted(expected)
  plain = dataclasses.replace(config, remat='none')
  results = [
    loss_and_grads(config, params, batch, knowledge)
    for config in (plain, config)
  ]
  assert_close(*results, atol=1e-6)


def test_bfloat16_is_close_and_gives_float32():
  config = dataclasses.replace(TINY, dtype='bfloat16')
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  batch = apart_batch()
  exact = hidden_states(TINY, params, batch.cells, knowledge)
  close = hidden_states(config, params, batch.cells, knowledge)
  assert close.dtype == jnp.float32
  a, b = (np.asarray(x)[batch.cells.segments_BL > 0] for x in (exact, close))
  cosine = (
    (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
  )
  assert cosine.min() > 0.999
  assert np.abs(a - b).max() > 0
  results = loss_and_grads.eval_shape(config, params, batch, knowledge)
  assert {x.dtype for x in jax.tree.leaves(results)} == {np.dtype('float32')}


def test_logits_in_pieces_change_nothing(monkeypatch):
  """24 predictions of 30 tokens in three rows: one at a time, or in pieces."""
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  batch = packed_batch()
  expected = loss_and_grads(TINY, params, batch, knowledge)
  made = []
  logits = model.token_logits
  for pieces in (24, 6):
    limit = 3 * 24 // pieces * V * 4
    monkeypatch.setattr(scoring, '_LOGITS_BYTES', limit)
    monkeypatch.setattr(
      model,
      'token_logits',
      lambda *args: made.append(logits(*args).shape) or logits(*args),
    )
    # A config of its own: traced anew.
    config = dataclasses.replace(TINY, prior_scale=1.0 + pieces * 1e-12)
    found = loss_and_grads(config, params, batch, knowledge)
    assert set(made) == {(3, 24 // pieces, V)}
    made.clear()
    assert_close(found, expected, atol=1e-6)


def test_every_layer_starts_with_the_embedding_and_ends_with_the_output():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  cells = apart_batch().cells
  layers = hidden_states(TINY, params, cells, knowledge, every_layer=True)
  assert layers.shape == (3, 3, SLOTS, 16)
  np.testing.assert_array_equal(
    layers[-1], hidden_states(TINY, params, cells, knowledge)
  )
  cls = params['embedding']['cls'][cells.species_BL[:, 0]]
  np.testing.assert_array_equal(layers[0, :, 0], cls)


# Heads


@pytest.mark.parametrize('use_cls', [True, False])
def test_task_heads(use_cls):
  sequence = dataclasses.replace(
    TINY, head='sequence', num_labels=3, use_cls=use_cls
  )
  token = dataclasses.replace(sequence, head='token')
  h_BLD = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)
  network = model.bind(token, params_of(token))
  params = params_of(token)['classifier']
  np.testing.assert_allclose(
    network.class_logits(h_BLD),
    h_BLD @ params['kernel'] + params['bias'],
    atol=1e-5,
  )
  network = model.bind(sequence, params_of(sequence))
  params = params_of(sequence)
  pooled = np.tanh(
    h_BLD[:, 0 if use_cls else 1] @ params['pooler']['kernel']
    + params['pooler']['bias']
  )
  np.testing.assert_allclose(
    network.class_logits(h_BLD),
    pooled @ params['classifier']['kernel'] + params['classifier']['bias'],
    atol=1e-5,
  )


def test_a_pad_token_that_is_looked_up_trains_only_as_an_output():
  params, knowledge = params_of(TINY), knowledge_of(TINY)
  batch = packed_batch()
  _, grads = loss_and_grads(TINY, params, batch, knowledge)
  hidden = hidden_states(TINY, params, batch.cells, knowledge)

  @jax.jit
  def decoder_only(word_VD):
    network = model.bind(TINY, params)
    h_BKD = jnp.take_along_axis(hidden, batch.masked_slots_BK[..., None], 1)
    logits = network.id_head(h_BKD, word_VD)
    id_BK = losses.id_losses(logits, batch.id_labels_BK)
    weights = batch.id_weights_BK
    return 0.2 * (id_BK * weights).sum() / weights.sum()

  decoder = jax.grad(decoder_only)(params['embedding']['word'])
  word = grads['embedding']['word']
  np.testing.assert_allclose(word[0], decoder[0], atol=1e-6)
  assert np.abs(word[1] - decoder[1]).max() > 1e-4
