"""The parts that all blocks are made of: products, norms, dropout.

A product runs in the precision of the model, accumulates in float32 and gives
the precision of the model. In bfloat16 its derivative is written by hand: left
to itself, JAX multiplies a float32 cotangent with bfloat16 inputs, and
accelerators do that at a fraction of their speed.

Element-wise parts are recomputed in the backward pass from inputs that the
products keep anyway: their float32 interiors are then never kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

INIT_STD = 0.02

# Inside of a scan over layers nothing merges the two computations.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@dataclasses.dataclass(frozen=True)
class Precision:
  """Of products.

  Attributes:
    dtype: of factors and result, 'float32' or 'bfloat16'; sums are float32.
    gradient_dtype: of the gradients of weights as they leave their product,
      and so of their sum over devices. 'bfloat16' halves what crosses the
      network and keeps 8 bits of each device's share.
  """

  dtype: str = 'float32'
  gradient_dtype: str = 'float32'


class Linear(nnx.Module):
  """x @ kernel + bias; a leading axis of layers in the encoder."""

  def __init__(
    self,
    shape,
    axes,
    *,
    rngs: nnx.Rngs,
    num_in: int = 1,
    std: float = INIT_STD,
  ):
    """Shapes of kernel [in..., out...]; the bias takes the out axes.

    Args:
      shape: kernel shape, possibly with a leading 'layer' axis.
      axes: logical names of its axes.
      rngs: source of the initial values.
      num_in: number of input axes (after 'layer').
      std: deviation of the initial kernel.
    """
    self.kernel = normal(shape, axes, rngs, std)
    layer = axes[0] == 'layer'
    cut = layer + num_in
    bias_shape = shape[:layer] + shape[cut:]
    bias_axes = axes[:layer] + axes[cut:]
    self.bias = constant(0.0, bias_shape, bias_axes)


class Norm(nnx.Module):
  """LayerNorm parameters: scale and bias."""

  def __init__(self, width: int, num_layers: int | None = None):
    """One norm, or one a layer."""
    shape, axes = (width,), ('norm',)
    if num_layers is not None:
      shape, axes = (num_layers, width), ('layer', 'norm')
    self.scale = constant(1.0, shape, axes)
    self.bias = constant(0.0, shape, axes)


def normal(shape, axes, rngs: nnx.Rngs, std: float = INIT_STD) -> nnx.Param:
  """A parameter drawn from normal(0, std); `axes` name its axes."""
  value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
  return nnx.Param(value, logical_axes=axes)


def constant(value: float, shape, axes) -> nnx.Param:
  """A parameter that starts from one number."""
  return nnx.Param(jnp.full(shape, value, jnp.float32), logical_axes=axes)


def product(
  equation: str,
  x: Array,
  kernel: Array,
  bias: Array | None = None,
  *,
  precision: Precision,
  rounds: bool = True,
) -> Array:
  """einsum(equation, x, kernel) + bias in the model's precision.

  Args:
    equation: of two inputs. Every axis of an input is in the other input or in
      the result, and the bias takes the last axes of the result.
    x: states, any float type.
    kernel: float32 weights.
    bias: float32, or None.
    precision: of factors, result and gradients.
    rounds: whether the float32 sums are rounded to the precision of the model.
  """
  if bias is None:
    bias = jnp.zeros((), jnp.float32)
  kernel = jnp.asarray(kernel)
  if precision.dtype == 'float32':
    return jnp.einsum(equation, x, kernel) + bias
  x = jnp.asarray(x, precision.dtype)
  return _product(equation, precision, rounds, x, kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(equation, precision, rounds, x, kernel, bias):
  kernel = kernel.astype(precision.dtype)
  y = jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)
  y += bias
  return y.astype(precision.dtype) if rounds else y


def _product_forward(equation, precision, rounds, x, kernel, bias):
  y = _product(equation, precision, rounds, x, kernel, bias)
  return y, (x, kernel, jnp.shape(bias))


def _product_backward(equation, precision, rounds, kept, gradient):
  del rounds
  x, kernel, bias_shape = kept
  inputs, out = equation.split('->')
  x_axes, kernel_axes = inputs.split(',')
  x_gradient = jnp.einsum(
    f'{out},{kernel_axes}->{x_axes}',
    gradient.astype(precision.dtype),
    kernel.astype(precision.dtype),
    preferred_element_type=jnp.float32,
  ).astype(x.dtype)
  kernel_gradient = jnp.einsum(
    f'{x_axes},{out}->{kernel_axes}',
    x,
    gradient.astype(precision.dtype),
    preferred_element_type=jnp.dtype(precision.gradient_dtype),
  ).astype(kernel.dtype)
  summed = tuple(range(gradient.ndim - len(bias_shape)))
  bias_gradient = jnp.zeros(bias_shape, jnp.float32)
  if bias_shape:
    bias_gradient = jnp.sum(gradient, summed, dtype=jnp.float32)
  return x_gradient, kernel_gradient, bias_gradient


_product.defvjp(_product_forward, _product_backward)


def norm_weights(norm: 'Norm | dict[str, Array]') -> dict[str, Array]:
  """Arrays of a `Norm`, or of the dict of one layer."""
  if isinstance(norm, Norm):
    return {'scale': norm.scale[...], 'bias': norm.bias[...]}
  return norm


def layer_norm(
  x: Array,
  norm: 'Norm | dict[str, Array]',
  epsilon: float,
  *,
  add: Array | None = None,
) -> Array:
  """Normalises the last axis of x, or of x + add, in float32.

  Args:
    x: states; the result has their type.
    norm: scale and bias.
    epsilon: added to the variance.
    add: what is added before, so that the sum is never rounded nor kept.
  """
  return _layer_norm(x, add, norm_weights(norm), epsilon)


@functools.partial(recomputed, static_argnums=3)
def _layer_norm(x, add, norm, epsilon):
  dtype = x.dtype
  x = x.astype(jnp.float32)
  if add is not None:
    x += add.astype(jnp.float32)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  centred = x - mean
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  x = centred * jax.lax.rsqrt(variance + epsilon) * norm['scale'] + norm['bias']
  return x.astype(dtype)


@recomputed
def gelu(x: Array) -> Array:
  """The exact GELU (erf), in float32; the result has the type of x."""
  return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@recomputed
def quick_gelu(x: Array) -> Array:
  """x sigmoid(1.702 x), as in the release's fusion block."""
  wide = x.astype(jnp.float32)
  return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def keys_of_rows(key: Array, rows_B: Array) -> Array:
  """A key a row, by its number in the batch.

  What a row draws then depends neither on the devices that share a batch nor
  on the parts that it is worked on in.
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)


def fold_in(keys_B: Array | None, index: Array | int) -> Array | None:
  """`jax.random.fold_in` of every row's key; None stays None."""
  if keys_B is None:
    return None
  return jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)


def dropout(x_B: Array, rate: float, keys_B: Array | None) -> Array:
  """Zeroes a share of every row and scales the rest; nothing without keys."""
  if keys_B is None or rate == 0.0:
    return x_B
  *shape, last = x_B.shape[1:]

  def keep(key: Array) -> Array:
    # 16 bits decide: two draws of a word, whose making is most of the work. The
    # rate is right within 2**-17. Answers are joined, not words: a quarter of
    # the memory.
    words = jax.random.bits(key, (*shape, -(-last // 2)), jnp.uint32)
    least = round(rate * 65536)
    halves = [(words & 0xFFFF) >= least, (words >> 16) >= least]
    return jnp.concatenate(halves, axis=-1)[..., :last]

  keep_B = jax.vmap(keep)(keys_B)
  return jnp.where(keep_B, x_B / (1.0 - rate), 0.0).astype(x_B.dtype)
