"""What a table of paired differences allows one to say.

A difference is one number for each seed and held-out unit: the loss of one arm
less that of another, of the same seed, on the same cells and masks of the unit.
Cells are never resampled: those of a unit are not independent.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, stats

MIN_UNITS = 6  # below it values are printed, and nothing is concluded
MIN_SEEDS = 2
DRAWS = 2000

HELPS = 'helps'
HARMS = 'harms'
LESS = ', by less than the margin'
MIXED = ', but not in every study'
EQUIVALENT = 'equivalent within the margin'
UNDERPOWERED = 'underpowered'
NO_VERDICT = 'no verdict'
CANNOT = 'this study cannot answer'


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean difference and how far it can be trusted.

  Attributes:
    mean, low, high: of the difference.
    p: two-sided, of a difference of 0.
    seeds, units: how many it rests on.
  """

  mean: float
  low: float
  high: float
  p: float
  seeds: int
  units: int

  @property
  def is_supported(self) -> bool:
    """Whether there are enough seeds and units for an interval."""
    return self.seeds >= MIN_SEEDS and self.units >= MIN_UNITS


def interval(
  difference_SU: np.ndarray, level: float = 0.95, draws: int = DRAWS
) -> Interval:
  """Mean over seeds and units, and its interval.

  Seeds and units are drawn anew together (the crossed bootstrap of Owen 2007,
  which is a little wide). Of few seeds the spread comes out too small by
  (n - 1) / n and its tails too thin: the variance of each kind is divided by
  that, and quantiles are those of Student's t with the degrees of freedom of
  Welch and Satterthwaite.

  Args:
    difference_SU: one number a seed and unit.
    level: of the interval.
    draws: of the bootstrap.

  Raises:
    ValueError: a number is missing: pairs that were not run are left out.
  """
  difference_SU = np.asarray(difference_SU, np.float64)
  if difference_SU.ndim != 2 or not np.isfinite(difference_SU).all():
    raise ValueError(f'differences must be whole, {difference_SU.shape=}')
  S, U = difference_SU.shape
  mean = float(difference_SU.mean())
  if S < MIN_SEEDS or U < 2:
    return Interval(mean, -math.inf, math.inf, 1.0, S, U)
  # Weights how often a seed or unit was drawn, scaled about 1 so that the
  # variance of each kind is the unbiased one.
  rng = np.random.default_rng(0)
  seeds_NS = rng.multinomial(S, np.full(S, 1 / S), draws) / S - 1 / S
  units_NU = rng.multinomial(U, np.full(U, 1 / U), draws) / U - 1 / U
  seeds_NS = 1 / S + seeds_NS * math.sqrt(S / (S - 1))
  units_NU = 1 / U + units_NU * math.sqrt(U / (U - 1))
  mean_N = np.einsum('ns,su,nu->n', seeds_NS, difference_SU, units_NU)
  error = float(mean_N.std())
  by_seed = difference_SU.mean(1).var(ddof=1) / S
  by_unit = difference_SU.mean(0).var(ddof=1) / U
  freedom = (by_seed + by_unit) ** 2 / max(
    by_seed**2 / (S - 1) + by_unit**2 / (U - 1), 1e-300
  )
  if error == 0:
    return Interval(mean, mean, mean, float(mean == 0), S, U)
  reach = float(stats.t.ppf(0.5 + level / 2, freedom)) * error
  p = float(2 * stats.t.sf(abs(mean) / error, freedom))
  return Interval(mean, mean - reach, mean + reach, p, S, U)


def holm(p_values: Sequence[float]) -> list[float]:
  """p-values of a family after Holm's step-down, in the order given."""
  order = np.argsort(p_values, kind='stable')
  adjusted, highest = [0.0] * len(p_values), 0.0
  for place, i in enumerate(order):
    highest = max(highest, (len(p_values) - place) * p_values[i])
    adjusted[i] = min(highest, 1.0)
  return adjusted


def verdict(
  found: Interval,
  margin: float,
  p: float | None = None,
  alpha: float = 0.05,
  clusters: Sequence[float] = (),
) -> str:
  """What may be concluded of a loss: a difference below 0 is a help.

  Args:
    found: interval of the difference.
    margin: differences within it do not matter; declared before the runs.
    p: adjusted for a family; that of the interval if None.
    alpha: of the test.
    clusters: mean differences of groups of units that have something in
      common, as donors of one study: too few to draw from, but an effect that
      is not in all of them is said to be so.
  """
  p = found.p if p is None else p
  if not found.is_supported:
    return NO_VERDICT
  if p < alpha and (found.high < 0 or found.low > 0):
    said = HELPS if found.high < 0 else HARMS
    if any(mean * found.mean <= 0 for mean in clusters):
      said += MIXED
    return said + (LESS if _within(found, margin) else '')
  return EQUIVALENT if _within(found, margin) else UNDERPOWERED


def _within(found: Interval, margin: float) -> bool:
  return -margin < found.low and found.high < margin


def controls(
  effects: Mapping[float, Interval],
  detectable: float,
  margin: float,
  alpha: float = 0.05,
) -> tuple[bool | None, str]:
  """Whether the study can answer, from its own controls.

  Args:
    effects: fidelity of the knowledge -> difference of loss.
    detectable: the smallest difference that the seeds of a control detect;
      means of neighbours that differ by less are not told apart.
    margin: an effect at fidelity 0 that is within it is none.
    alpha: of each test.

  Returns:
    (True, why) where full fidelity helps, none does not, and the means fall
    with fidelity; (False, why) where one of these fails; (None, why) where
    something is missing.
  """
  wanted = (0.0, 0.25, 0.5, 1.0)
  missing = [
    f'{p:g}' for p in wanted if p not in effects or not effects[p].is_supported
  ]
  if missing:
    return None, f'fidelity {", ".join(missing)}: not run yet'
  faults = []
  if verdict(effects[1.0], 0.0, alpha=alpha) != HELPS:
    faults.append('no effect at fidelity 1')
  if effects[0.0].p < alpha and not _within(effects[0.0], margin):
    faults.append('an effect at fidelity 0')
  means = [effects[p].mean for p in wanted]
  if any(b > a + detectable for a, b in zip(means, means[1:])):
    faults.append('not monotone in fidelity')
  if faults:
    return False, f'{CANNOT}: {"; ".join(faults)}'
  return True, 'an effect at fidelity 1, none at 0, monotone between'


def power(effect: float, sd: float, number: int, alpha: float = 0.05) -> float:
  """Of a paired t-test over seeds."""
  if number < 2:
    return 0.0
  if sd == 0:
    return 1.0
  limit = stats.t.ppf(1 - alpha / 2, number - 1)
  shift = abs(effect) / sd * math.sqrt(number)
  above = stats.nct.sf(limit, number - 1, shift)
  below = stats.nct.cdf(-limit, number - 1, shift)
  return float(np.nan_to_num(above, nan=1.0) + np.nan_to_num(below))


def seeds_needed(
  effect: float,
  sd: float,
  wanted: float = 0.8,
  alpha: float = 0.05,
  most: int = 1000,
) -> int | None:
  """Fewest seeds that detect an effect; None above `most`."""
  numbers = range(2, most + 1)
  return next(
    (n for n in numbers if power(effect, sd, n, alpha) >= wanted), None
  )


def smallest_effect(
  sd: float, number: int, wanted: float = 0.8, alpha: float = 0.05
) -> float:
  """What so many seeds detect, units and their differences left aside."""
  if sd == 0 or number < 2:
    return 0.0 if number >= 2 else math.inf
  return optimize.brentq(
    lambda effect: power(effect, sd, number, alpha) - wanted, 0.0, 100 * sd
  )


def worth(
  cells: Sequence[int], with_it: Sequence[float], without: Sequence[float]
) -> list[tuple[str, float]]:
  """How many times the cells each loss would have cost without.

  The curve without is made falling (means of neighbours that rise are pooled)
  and interpolated over the logarithm of the cells.

  Args:
    cells: sizes, ascending.
    with_it: loss at each size.
    without: loss at each size.

  Returns:
    (sign, x) for each size: the loss with it at N cells is that without at x *
    N; the sign is '<' or '>' where the curve ends before, with x its end.
  """
  logs = np.log(np.asarray(cells, np.float64))
  curve = _falling(np.asarray(without, np.float64))
  found = []
  for log, loss in zip(logs, with_it):
    if loss > curve[0]:
      found.append(('<', float(np.exp(logs[0] - log))))
    elif loss < curve[-1]:
      found.append(('>', float(np.exp(logs[-1] - log))))
    else:
      at = np.interp(-loss, -curve, logs)
      found.append(('', float(np.exp(at - log))))
  return found


def _falling(loss: np.ndarray) -> np.ndarray:
  fitted = optimize.isotonic_regression(loss, increasing=False).x
  return fitted - 1e-12 * np.arange(len(fitted))
