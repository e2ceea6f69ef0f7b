"""Products and element-wise parts: derivatives, precision, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genecompass_jax import layers

BF16 = layers.Precision('bfloat16')
CASES = [
  ('BLD,DF->BLF', (2, 5, 8), (8, 6), (6,)),
  ('BLD,DHK->BLHK', (2, 5, 8), (8, 2, 3), (2, 3)),
  ('BLHK,HKD->BLD', (2, 5, 2, 3), (2, 3, 8), (8,)),
  ('BKD,VD->BKV', (2, 5, 8), (11, 8), None),
]


def inputs(x_shape, kernel_shape, bias_shape, seed=0):
  rng = np.random.default_rng(seed)

  def draw(shape):  # numbers that bfloat16 holds exactly
    return None if shape is None else rng.integers(-4, 5, shape) / 4.0

  arrays = [draw(s) for s in (x_shape, kernel_shape, bias_shape)]
  return [a if a is None else jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize(('equation', 'x', 'kernel', 'bias'), CASES)
def test_the_written_derivative_is_that_of_the_product(
  equation, x, kernel, bias
):
  """On numbers without rounding both precisions give the same, exactly."""
  arrays = inputs(x, kernel, bias)

  def total(precision):
    def summed(*arrays):
      y = layers.product(equation, *arrays, precision=precision)
      return jnp.sum(jnp.asarray(y, jnp.float32))

    used = [i for i, a in enumerate(arrays) if a is not None]
    return jax.value_and_grad(summed, used)(*arrays)

  exact, found = total(layers.Precision()), total(BF16)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact)):
    assert a.dtype == b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=2**-7)


@pytest.mark.parametrize('gradient_dtype', ['float32', 'bfloat16'])
def test_derivatives_are_products_of_bfloat16(gradient_dtype):
  """None of the three products of a step has a float32 factor."""
  precision = layers.Precision('bfloat16', gradient_dtype)
  x, kernel, bias = inputs((2, 5, 8), (8, 6), (6,))

  def summed(x, kernel, bias):
    y = layers.product('BLD,DF->BLF', x, kernel, bias, precision=precision)
    return jnp.sum(y.astype(jnp.float32))

  jaxpr = jax.make_jaxpr(jax.grad(summed, (0, 1, 2)))(x, kernel, bias)
  dots = [
    equation
    for equation in _equations(jaxpr.jaxpr)
    if equation.primitive.name == 'dot_general'
  ]
  assert len(dots) == 3
  for dot in dots:
    assert {v.aval.dtype for v in dot.invars} == {jnp.dtype('bfloat16')}
  results = {d.outvars[0].aval.shape: d.outvars[0].aval.dtype for d in dots}
  of_kernel = results.get((8, 6), results.get((6, 8)))
  assert of_kernel == jnp.dtype(gradient_dtype)


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def test_logits_are_not_rounded():
  x, kernel, _ = inputs((1, 1, 64), (3, 64), None)
  kernel = kernel.at[1].set(kernel[0]).at[1, 0].add(2.0**-6)
  y = layers.product('BKD,VD->BKV', x + 1, kernel, precision=BF16, rounds=False)
  assert y.dtype == jnp.float32
  rounded = layers.product('BKD,VD->BKV', x + 1, kernel, precision=BF16)
  assert rounded.dtype == jnp.bfloat16


def test_a_norm_of_a_sum_adds_in_float32():
  """bfloat16 would lose the small term beside the large one."""
  x = jnp.full((1, 4), 256.0, jnp.bfloat16)
  small = jnp.asarray([[0.5, -0.5, 0.5, -0.5]], jnp.bfloat16)
  norm = {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}
  y = layers.layer_norm(x, norm, 1e-12, add=small)
  np.testing.assert_allclose(y, np.sign(small))


def test_nothing_inside_an_element_wise_part_is_kept():
  """The backward pass of a GELU holds its bfloat16 input, no float32."""
  x = jnp.ones((4, 8), jnp.bfloat16)
  _, pullback = jax.vjp(layers.gelu, x)
  kept = [r for r in jax.tree.leaves(pullback) if getattr(r, 'size', 0) >= 32]
  assert kept
  assert {r.dtype for r in kept} == {jnp.dtype('bfloat16')}
