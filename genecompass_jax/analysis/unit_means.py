"""Means over independent units, with an interval where there are enough.

Cells of one donor are no independent observations: numbers are averaged within
a unit first, then over units. From six units on there is a 95 % interval
(Student's t); with fewer there is none, and each unit's value is to be shown.
"""

import dataclasses

import numpy as np
import scipy.stats

from genecompass_jax.analysis.perturbation import statistics


@dataclasses.dataclass(frozen=True)
class UnitMeans:
  """Means of arrays [...] over U units.

  Attributes:
    mean: over the units that have a value; NaN where none has.
    low, high: 95 % interval; NaN below `statistics.MIN_UNITS` units.
    number: int64, units that have a value.
  """

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  number: np.ndarray


def over(value_U: np.ndarray) -> UnitMeans:
  """Means over the first axis, float64 [U, ...]; NaN is no value."""
  value_U = np.asarray(value_U, np.float64)
  is_there_U = np.isfinite(value_U)
  number = is_there_U.sum(0)
  with np.errstate(invalid='ignore', divide='ignore'):
    mean = np.where(is_there_U, value_U, 0.0).sum(0) / number
    apart_U = np.where(is_there_U, value_U - mean, 0.0)
    sd = np.sqrt((apart_U**2).sum(0) / (number - 1))
    at = scipy.stats.t.ppf(1 - statistics.ALPHA / 2, np.maximum(number - 1, 1))
    half = np.where(number >= statistics.MIN_UNITS, at * sd, np.nan)
    half = half / np.sqrt(number)
  return UnitMeans(mean, mean - half, mean + half, number)
