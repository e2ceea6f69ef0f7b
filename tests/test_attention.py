"""Attention: all ways of computing it agree, and each is chosen where it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import attention, chunked_attention, errors, layers

B, L, H, K = 2, 256, 2, 64


@pytest.fixture(autouse=True)
def three_chunks(monkeypatch):
  """The last of them with two queries of padding."""
  monkeypatch.setattr(chunked_attention, 'CHUNK', 100)


def inputs(dtype=np.float32, seed=0):
  """Queries, keys, values and weights of the outputs."""
  rng = np.random.default_rng(seed)
  draw = lambda: jnp.asarray(rng.normal(size=(B, L, H, K)), dtype)  # noqa: E731
  return draw(), draw(), draw(), draw()


def segments(one_cell=False):
  """Row 0 holds three cells and padding, row 1 one cell and padding."""
  segments_BL = np.zeros((B, L), np.int32)
  segments_BL[0, :90], segments_BL[0, 90:150] = 1, 1 if one_cell else 2
  segments_BL[0, 150:201] = 1 if one_cell else 3
  segments_BL[1, :130] = 1
  return segments_BL


@functools.partial(jax.jit, static_argnames=('kind', 'interpret'))
def outputs(query, key, value, weights, segments_BL, kind, interpret=False):
  """Attended values of the cells, and gradients of a weighted sum of them."""
  is_cell = (segments_BL > 0)[..., None, None]

  def attended(query, key, value):
    out = attention.attend(
      query, key, value, segments_BL, kind=kind, interpret=interpret
    )
    return jnp.where(is_cell, out, 0).astype(jnp.float32)

  def total(*arrays):
    return jnp.sum(attended(*arrays) * weights)

  return attended(query, key, value), jax.grad(total, (0, 1, 2))(
    query, key, value
  )


def by_hand(query, key, value, segments_BL):
  """Cell by cell, in float64."""
  out = np.zeros(query.shape)
  for row, segment in np.argwhere(np.ones((B, segments_BL.max() + 1))):
    at = np.flatnonzero(segments_BL[row] == segment)
    if segment == 0 or not len(at):
      continue
    q, k, v = (
      np.asarray(x, np.float64)[row, at].swapaxes(0, 1)
      for x in (query, key, value)
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(K)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    out[row, at] = (probs @ v).swapaxes(0, 1)
  return out


def test_plain_attention_is_softmax_inside_each_cell():
  query, key, value, weights = inputs()
  out, _ = outputs(query, key, value, weights, segments(), 'xla')
  expected = by_hand(query, key, value, segments())
  np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize('kind', ['chunked', 'splash', 'pallas'])
def test_every_way_gives_the_same_values_and_gradients(kind):
  arrays = inputs()
  expected = outputs(*arrays, segments(), 'xla')
  found = outputs(*arrays, segments(), kind, interpret=True)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize('kind', ['xla', 'chunked', 'splash', 'pallas'])
def test_bfloat16_is_as_near_as_its_rounding(kind):
  exact = outputs(*inputs(), segments(), 'xla')
  rounded = inputs(jnp.bfloat16)
  found = outputs(*rounded, segments(), kind, interpret=True)
  assert found[1][0].dtype == jnp.bfloat16
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact)):
    a, b = np.asarray(a, np.float32), np.asarray(b)
    assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_chunks_need_not_divide_a_row():
  arrays = [x[:, : L - 7] for x in inputs()]
  cut = segments()[:, : L - 7]
  expected, found = (outputs(*arrays, cut, k) for k in ('xla', 'chunked'))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize('kind', ['xla', 'chunked'])
def test_dropout_keeps_the_mean(kind):
  query, key, value, _ = inputs()

  @jax.jit
  def once(key_):
    return attention.attend(
      query,
      key,
      jnp.ones_like(value),
      segments(),
      kind=kind,
      dropout_rate=0.5,
      dropout_keys_B=layers.keys_of_rows(key_, np.arange(len(query))),
    )

  found = np.asarray(once(jax.random.key(0)))[segments() > 0]
  assert abs(found.mean() - 1) < 0.01
  assert found.std() > 0.05


def test_the_derivative_of_chunks_knows_dropout():
  """Beside plain attention of the queries of each chunk, with its keys."""
  *arrays, weights = inputs()
  keys_B = layers.keys_of_rows(jax.random.key(0), np.arange(B))
  rate, chunk = 0.3, 86

  def chunked(*arrays):
    return attention.attend(
      *arrays,
      segments(),
      kind='chunked',
      dropout_rate=rate,
      dropout_keys_B=keys_B,
    )

  def plain(query, key, value):
    pad = (0, 0), (0, 3 * chunk - L)
    query = jnp.pad(query, (*pad, (0, 0), (0, 0)))
    own = jnp.pad(segments(), pad)
    parts = [
      attention._plain(
        *(query[:, i * chunk : (i + 1) * chunk], key, value),
        *(own[:, i * chunk : (i + 1) * chunk], segments()),
        layers.fold_in(keys_B, i),
        scale=K**-0.5,
        rate=rate,
      )
      for i in range(3)
    ]
    return jnp.concatenate(parts, 1)[:, :L]

  def run(way):
    def total(*arrays):
      is_cell = segments()[..., None, None] > 0
      return jnp.sum(jnp.where(is_cell, way(*arrays), 0) * weights)

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*arrays)

  for a, b in zip(*map(jax.tree.leaves, (run(chunked), run(plain)))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_rows_draw_by_their_number():
  keys_B = layers.keys_of_rows(jax.random.key(0), np.arange(6))
  x_B = jnp.ones((6, 40, 33))
  whole = layers.dropout(x_B, 0.25, keys_B)
  np.testing.assert_array_equal(
    layers.dropout(x_B[:2], 0.25, keys_B[4:]), whole[4:]
  )
  assert not (whole[0] == whole[1]).all()
  assert abs(float(whole.mean()) - 1) < 0.02
  assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.75)}


def test_what_auto_is():
  choose = functools.partial(attention.choose, 'auto', one_cell_a_row=False)
  assert choose(platform='tpu', dtype='bfloat16') == 'splash'
  assert choose(platform='gpu', dtype='bfloat16') == 'pallas'
  assert choose(platform='cpu', dtype='bfloat16') == 'auto'
  for platform in ('tpu', 'gpu', 'cpu'):
    assert choose(platform=platform, dtype='float32') == 'auto'
  buckets = attention.choose(
    'auto', platform='cuda', dtype='bfloat16', one_cell_a_row=True
  )
  assert buckets == 'cudnn'


@pytest.mark.parametrize(
  ('kind', 'platform', 'dtype', 'words'),
  [
    ('splash', 'cpu', 'bfloat16', 'does not run on cpu'),
    ('pallas', 'tpu', 'bfloat16', 'does not run on tpu'),
    ('cudnn', 'gpu', 'float32', 'in bfloat16'),
    ('cudnn', 'gpu', 'bfloat16', 'one cell a row'),
  ],
)
def test_what_cannot_run_is_said(kind, platform, dtype, words):
  with pytest.raises(errors.UserError, match=words):
    attention.choose(
      kind, platform=platform, dtype=dtype, one_cell_a_row=dtype == 'float32'
    )


def test_blocks_divide_rows():
  assert attention.block_size(2304) == 384
  assert attention.block_size(2048) == 512
  assert attention.block_size(2176) == 128
  with pytest.raises(errors.UserError, match='2049 slots'):
    attention.block_size(2049)
