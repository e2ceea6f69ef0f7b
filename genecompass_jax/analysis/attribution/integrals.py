"""Sharing a difference out: along a path, by the gradient, or by leaving out.

Integrated gradients (Sundararajan 2017) along the straight line from all parts
at their baselines (t = 0) to the cell as it is (t = 1):

  score of a part of a gene = change . integral over t of df / d sum

Scores add up to f(cell) - f(baseline): completeness. The integral is a sum over
the points of Gauss and Legendre, which is exact for polynomials of degree
2 n - 1; what it lacks to completeness is its error, and n is doubled until that
is small enough. A cell's n depends on that cell alone.

Points are worked on one after the other: memory is that of one gradient,
whatever n. Computed in float32, without dropout.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import knowledge as knowledge_lib, model as model_lib
from genecompass_jax.analysis.attribution import parts as parts_lib, targets

FIRST_POINTS = 16  # with fewer, an error may be small by chance
MAX_POINTS = 256
TOLERANCE = 1e-3
# f is a float32 number: differences below some units in its last place are
# rounding, which no further point takes away.
_ROUNDING = 1e-6
_POINTS = 4  # of one call: FIRST_POINTS and its doubles are multiples


@dataclasses.dataclass(frozen=True)
class Integral:
  """Integrated gradients of B rows.

  Attributes:
    scores_BLK: float32 score of each part of each slot.
    at_input_B: f of the cell.
    at_baseline_B: f with all parts that were varied at their baselines.
    error_B: sum of the scores less (at_input - at_baseline).
    points_B: int32 points on the path.
    is_close_B: whether the error came below the tolerance; where not, the
      scores are those of most points.
  """

  scores_BLK: np.ndarray
  at_input_B: np.ndarray
  at_baseline_B: np.ndarray
  error_B: np.ndarray
  points_B: np.ndarray
  is_close_B: np.ndarray


def integrate(
  params: model_lib.Params,
  parts: parts_lib.Parts,
  readout: targets.Readout,
  config: model_lib.ModelConfig,
  *,
  tolerance: float = TOLERANCE,
  max_points: int = MAX_POINTS,
) -> Integral:
  """Integrated gradients with as many points as the error asks for.

  Args:
    params: of the model.
    parts: of a batch.
    readout: the number that is explained.
    config: of the model, in float32.
    tolerance: of the error, relative to the sum of absolute scores.
    max_points: after which the last scores are taken as they are.
  """
  ends_2B = ends(params, parts, readout, config)
  wanted_B = ends_2B[1] - ends_2B[0]
  rounding_B = _ROUNDING * np.maximum(np.abs(ends_2B).max(0), 1.0)
  shape = parts.change_KBLD.shape
  scores_BLK = np.zeros((*shape[1:3], shape[0]), np.float32)
  points_B = np.zeros(shape[1], np.int32)
  is_close_B = np.zeros(shape[1], bool)
  points = FIRST_POINTS
  while not is_close_B.all() and (points <= max_points or not points_B.all()):
    found_BLK = _integral(params, parts, readout, config, points)
    scores_BLK[~is_close_B] = found_BLK[~is_close_B]
    points_B[~is_close_B] = points
    error_B = np.abs(_sum(found_BLK) - wanted_B)
    allowed_B = np.maximum(tolerance * _sum(np.abs(found_BLK)), rounding_B)
    is_close_B |= error_B <= allowed_B
    points *= 2
  return Integral(
    scores_BLK=scores_BLK,
    at_input_B=ends_2B[1],
    at_baseline_B=ends_2B[0],
    error_B=_sum(scores_BLK) - wanted_B,
    points_B=points_B,
    is_close_B=is_close_B,
  )


def ends(
  params: model_lib.Params,
  parts: parts_lib.Parts,
  readout: targets.Readout,
  config: model_lib.ModelConfig,
) -> np.ndarray:
  """f at the baseline and at the cell, float32 [2, B]."""
  ends_2 = np.arange(2, dtype=np.float32)
  return np.asarray(_along(params, *_line(parts), readout, ends_2, config))


def gradient_times_input(
  params: model_lib.Params,
  parts: parts_lib.Parts,
  readout: targets.Readout,
  config: model_lib.ModelConfig,
) -> np.ndarray:
  """Change times the gradient at the cell itself, float32 [B, L, K].

  What is left out to first order; it does not add up to anything.
  """
  at_P = np.ones(_POINTS, np.float32)
  weights_P = np.eye(1, _POINTS, dtype=np.float32)[0]  # the program of paths
  gradient_BLD = _gradients(
    params, *_line(parts), readout, at_P, weights_P, config
  )
  return np.asarray(_shared_out(parts.change_KBLD, gradient_BLD))


def leave_out_parts(
  params: model_lib.Params,
  parts: parts_lib.Parts,
  readout: targets.Readout,
  config: model_lib.ModelConfig,
) -> np.ndarray:
  """f(cell) - f(cell with one part of all genes at its baseline), [B, K].

  Exact for the question "what if this were not known", K passes; parts that
  stand in for each other each look useless.
  """
  return np.asarray(_without_parts(params, parts, readout, config)).T


def leave_out_genes(
  params: model_lib.Params,
  parts: parts_lib.Parts,
  readout: targets.Readout,
  config: model_lib.ModelConfig,
) -> np.ndarray:
  """f(cell) - f(cell with all parts of one gene at baseline), [B, L].

  L passes. The gene keeps its slot and its rank: it is not a deletion.
  """
  return np.asarray(_without_genes(params, *_line(parts), readout, config)).T


def nodes(num_points: int) -> tuple[np.ndarray, np.ndarray]:
  """Points on [0, 1] and weights of Gauss and Legendre, float64."""
  at_P, weights_P = np.polynomial.legendre.leggauss(num_points)
  return (at_P + 1) / 2, weights_P / 2


def _line(parts: parts_lib.Parts):
  """The batch, where the path ends, and the way there from its beginning."""
  return parts.batch, parts.sum_BLD, parts.changes_BLD


def _sum(scores_BLK: np.ndarray) -> np.ndarray:
  return scores_BLK.sum((1, 2), dtype=np.float64)


def _integral(params, parts, readout, config, num_points) -> np.ndarray:
  at_P, weights_P = (x.astype(np.float32) for x in nodes(num_points))
  gradient_BLD = 0.0
  for first in range(0, num_points, _POINTS):
    some = slice(first, first + _POINTS)
    gradient_BLD += _gradients(
      params, *_line(parts), readout, at_P[some], weights_P[some], config
    )
  return np.asarray(_shared_out(parts.change_KBLD, gradient_BLD))


def _answer(params, batch, readout, config, sum_BLD):
  network = model_lib.bind(config, params)
  with model_lib.full_precision(config):
    hidden_BLD = network(batch, knowledge_lib.AtSlots(sum_BLD))
    return readout(network, batch, hidden_BLD)


# Of the parts only their sum is given: one program serves any number of them.
@functools.partial(jax.jit, static_argnames='config')
def _along(params, batch, sum_BLD, changes_BLD, readout, at_P, config):
  """f at points of the path, [P, B]."""
  ask = functools.partial(_answer, params, batch, readout, config)
  return jax.lax.map(lambda t: ask(sum_BLD - (1.0 - t) * changes_BLD), at_P)


@functools.partial(jax.jit, static_argnames='config')
def _gradients(
  params, batch, sum_BLD, changes_BLD, readout, at_P, weights_P, config
):
  """Weighted sum over points of the gradient with respect to the sum."""

  def total(x_BLD):  # rows do not see each other
    return _answer(params, batch, readout, config, x_BLD).sum()

  def add(gradient_BLD, point):
    t, weight = point
    here_BLD = jax.grad(total)(sum_BLD - (1.0 - t) * changes_BLD)
    return gradient_BLD + weight * here_BLD, None

  zeros_BLD = jnp.zeros_like(sum_BLD)
  return jax.lax.scan(add, zeros_BLD, (at_P, weights_P))[0]


@jax.jit
def _shared_out(change_KBLD, gradient_BLD):
  return jnp.einsum(
    'KBLD,BLD->BLK',
    change_KBLD,
    gradient_BLD,
    precision=jax.lax.Precision.HIGHEST,
  )


@functools.partial(jax.jit, static_argnames='config')
def _without_parts(params, parts, readout, config):
  ask = functools.partial(_answer, params, parts.batch, readout, config)
  return ask(parts.sum_BLD) - jax.lax.map(
    lambda change_BLD: ask(parts.sum_BLD - change_BLD), parts.change_KBLD
  )


@functools.partial(jax.jit, static_argnames='config')
def _without_genes(params, batch, sum_BLD, changes_BLD, readout, config):
  ask = functools.partial(_answer, params, batch, readout, config)
  slots = jnp.arange(sum_BLD.shape[1])

  def without(slot):
    here_L1 = (slots == slot)[:, None]
    return ask(sum_BLD - jnp.where(here_L1, changes_BLD, 0.0))

  return ask(sum_BLD) - jax.lax.map(without, slots)
