"""A line through nulls over their ranks, and what it says of a target.

Within the calipers of matching ranks still differ, and effects go with them.
"""

import dataclasses

import numpy as np
import scipy.stats

GREATER, TWO_SIDED = ALTERNATIVES = ('greater', 'two-sided')
_FEWEST_FOR_LINE = 6  # nulls: four are left to say how they spread about it


@dataclasses.dataclass(frozen=True)
class NullLine:
  """What nulls say of a target, by a line over ranks.

  Attributes:
    at_target: the line at the target's rank.
    sd: of the nulls about the line, wider for a target at their edge, so that
      apart / sd is Student's t times sqrt(1 + 1 / K).
    apart_K: nulls less the line.
    leverage_K: of each null.
    freedom: degrees of freedom of `sd`.
  """

  at_target: float
  sd: float
  apart_K: np.ndarray
  leverage_K: np.ndarray
  freedom: int


def fit(null_K: np.ndarray, rank_K: np.ndarray, rank: float) -> NullLine:
  """Fits a line through contrasts of nulls by least squares.

  Without spread of ranks, or with few nulls, the line is level.

  Args:
    null_K: contrasts.
    rank_K: of ranks.
    rank: that of the target.
  """
  number = len(null_K)
  middle = null_K.mean() if number else np.nan
  leverage_K, leverage, slope = np.full(number, 1 / max(number, 1)), 0.0, 0.0
  from_K, freedom = rank_K - rank_K.mean() if number else rank_K, number - 1
  squares = (from_K**2).sum()
  tilts = number >= _FEWEST_FOR_LINE and squares > 1e-12 * number
  if tilts:
    slope = (from_K * null_K).sum() / squares
    leverage_K = leverage_K + from_K**2 / squares
    leverage = (rank - rank_K.mean()) ** 2 / squares
    freedom -= 1
  apart_K = null_K - middle - slope * from_K
  with np.errstate(invalid='ignore', divide='ignore'):
    sd = np.sqrt((apart_K**2).sum() / freedom) if freedom > 0 else np.nan
    sd *= np.sqrt(1 + leverage / (1 + 1 / number)) if number else np.nan
  at_target = middle + (slope * (rank - rank_K.mean()) if tilts else 0.0)
  return NullLine(at_target, sd, apart_K, leverage_K, freedom)


def spread(line: NullLine) -> float:
  """Of the nulls about their line, as a sample."""
  if line.freedom < 1:
    return np.nan
  return float(np.sqrt((line.apart_K**2).sum() / line.freedom))


def divided(apart: np.ndarray | float, sd: np.ndarray | float) -> np.ndarray:
  """Apart in units of sd; NaN where the nulls do not differ at all."""
  with np.errstate(invalid='ignore', divide='ignore'):
    return np.where(sd > 0, apart / sd, np.nan)


def p_of(t: np.ndarray | float, freedom: int, side: str) -> np.ndarray:
  """p of Student's t."""
  if side == TWO_SIDED:
    return 2 * scipy.stats.t.sf(np.abs(t), freedom)
  return scipy.stats.t.sf(t, freedom)


def left_out(line: NullLine, side: str) -> np.ndarray:
  """p_normal of every null against the line of the others."""
  # As for a target: what the others say at its rank, and their spread. Both
  # follow from the line of all (studentised residuals).
  rest_K = 1 - line.leverage_K
  freedom = line.freedom - 1
  with np.errstate(invalid='ignore', divide='ignore'):
    squares_K = (line.apart_K**2).sum() - line.apart_K**2 / rest_K
    sd_K = np.sqrt(np.maximum(squares_K, 0) / freedom)
    t_K = divided(line.apart_K, sd_K * np.sqrt(rest_K))
  return p_of(t_K, freedom, side)
