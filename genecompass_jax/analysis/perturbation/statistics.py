"""Targets against matched nulls, in the same units.

One number a target and unit. In every cell that shows the target, the mean
effect of those of its nulls that the cell shows too is taken from the effect of
the target: all acted in the same cell, so that what depends on the cell (its
length, its donor) goes out of the difference. These contrasts are averaged over
the cells of a unit, and then over units. The nulls of the target go through the
same.

Within the calipers ranks still differ, and effects go with the rank. So a line
is fitted through the contrasts of the nulls, over the ranks at which they stood
in these cells, and the target is held against what the line says at its own
rank. Then

  z = (contrast of the target - what the line says) / (sd of the nulls about it)

for each unit, and for the mean over units; the sd is made wider where the target
stands at the edge of its nulls. The nulls' spread of the mean over units holds
both that genes differ and that units do, so it is what a target is measured by;
a t test of the target's own units asks whether its contrast is other than zero,
which it is for nearly every gene (docs/perturbation.md has the measurement). Two
ways from z to p:

  p_normal     as Student's t of one new value against K nulls about a line
  p_empirical  the share of nulls that are as far from the other nulls of their
               target, over all targets of the family together

`p` is one of them (`Config.p_from`). Where targets are nulls of each other, as in
a screen of all genes, the second is little more than a rank: every gene that
truly stands out is also a null that does. There it is the first. With one unit
there is no p: ranks only. Below six units nothing is said beyond every unit's
value, see `MIN_UNITS`.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.stats

from genecompass_jax import errors
from genecompass_jax.analysis.perturbation import (
  contrasts,
  effects as effects_lib,
  matching,
  null_line,
)

SHIFT, GENE_SHIFT, TOWARD = MEASURES = ('shift', 'gene_shift', 'toward')
GREATER, TWO_SIDED = ALTERNATIVES = null_line.ALTERNATIVES
NORMAL, EMPIRICAL = P_FROM = ('normal', 'empirical')
MIN_UNITS = 6  # fewer independent units get no interval and no verdict
ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Config:
  """How targets are tested.

  Attributes:
    measure: one of `MEASURES`.
    alternative: 'greater' (more than matched nulls) or 'two-sided'; '' takes
      two-sided for `toward`, which has a direction, and greater for the shifts,
      which have none.
    min_cells: cells of a unit that target and null must each have.
    p_from: one of `P_FROM`: what `p` and q are made of. '': 'normal' where a
      target is null of another, else 'empirical' (`resolve`).
  """

  measure: str = SHIFT
  alternative: str = ''
  min_cells: int = 3
  p_from: str = ''

  def __post_init__(self):
    if self.measure not in MEASURES:
      raise errors.UserError(
        f'measure {self.measure!r}: give one of {", ".join(MEASURES)}'
      )
    if self.alternative not in ('', *ALTERNATIVES):
      raise errors.UserError(
        f'alternative {self.alternative!r}: give {" or ".join(ALTERNATIVES)}'
      )
    if self.min_cells < 1:
      raise errors.UserError(f'min_cells {self.min_cells} must be positive')
    if self.p_from not in ('', *P_FROM):
      raise errors.UserError(
        f'p from {self.p_from!r}: give one of {", ".join(P_FROM)}'
      )

  @property
  def side(self) -> str:
    """The alternative in force."""
    if self.alternative:
      return self.alternative
    return TWO_SIDED if self.measure == TOWARD else GREATER


def resolve(config: Config, family: Iterable[matching.Matches]) -> Config:
  """The same with `p_from` decided, alike for all groups of a family."""
  if config.p_from:
    return config
  overlap = any(
    np.isin(matches.target_T, matches.nulls()).any() for matches in family
  )
  return dataclasses.replace(config, p_from=NORMAL if overlap else EMPIRICAL)


@dataclasses.dataclass(frozen=True)
class Tests:
  """T targets against their nulls, over U units.

  Attributes:
    target_T: int64 numbers of the variants.
    units_U: names of the units.
    effect_TU: float64 mean effect in each unit; NaN without enough cells.
    cells_TU: int64 cells of the unit in which the variant acted.
    null_mean_TU: what the nulls would have in these cells, at the target's
      rank: the effect less the contrast, set against that of the nulls.
    null_sd_TU: spread of the nulls' contrasts about their line in the unit.
    z_TU: of each unit.
    effect_T, null_mean_T, null_sd_T, z_T: of the mean over units.
    contrast_low_T, contrast_high_T: 95 % interval of effect less null mean over
      units (Student's t); NaN below `MIN_UNITS` units.
    cells_T: int64 cells in which the variant acted.
    num_units_T: int64 units that the mean is over.
    num_null_T: int64 nulls with enough cells in more than half of them.
    num_above_T: int64 of these nulls, how many lie above the target.
    null_z_low, null_z_high: 2.5 and 97.5 % quantiles of the z of all nulls, of
      each by mean and sd of its target's nulls; NaN without nulls.
    p_normal_T, p_empirical_T: NaN with one unit, or too few nulls.
    p_T, q_T: the chosen one, and by Benjamini and Hochberg over all targets.
    config: how, `p_from` decided.
  """

  target_T: np.ndarray
  units_U: np.ndarray
  effect_TU: np.ndarray
  cells_TU: np.ndarray
  null_mean_TU: np.ndarray
  null_sd_TU: np.ndarray
  z_TU: np.ndarray
  effect_T: np.ndarray
  null_mean_T: np.ndarray
  null_sd_T: np.ndarray
  z_T: np.ndarray
  contrast_low_T: np.ndarray
  contrast_high_T: np.ndarray
  cells_T: np.ndarray
  num_units_T: np.ndarray
  num_null_T: np.ndarray
  num_above_T: np.ndarray
  null_z_low: float
  null_z_high: float
  p_normal_T: np.ndarray
  p_empirical_T: np.ndarray
  p_T: np.ndarray
  q_T: np.ndarray
  config: Config


def values(effects: effects_lib.CellEffects, measure: str) -> np.ndarray:
  """A measure of all effects, float64 [N]."""
  return np.asarray(getattr(effects, f'{measure}_N'), np.float64)


def test(
  effects: effects_lib.CellEffects,
  matches: matching.Matches,
  unit_of: np.ndarray,
  units: Sequence[str],
  config: Config = Config(),
) -> Tests:
  """Tests every target against its matched nulls.

  Args:
    effects: of targets and nulls.
    matches: their nulls, by numbers of variants.
    unit_of: number of the unit of every cell of the source; -1 leaves a cell
      out (cells of other groups, cells without a donor).
    units: names of the units.
    config: how.

  Raises:
    UserError: a variant has two effects in one cell.
  """
  U, T = len(units), len(matches.target_T)
  config = resolve(config, [matches])
  data = contrasts.by_variant(
    effects, values(effects, config.measure), unit_of, U
  )
  by_unit = np.full((4, T, U), np.nan)
  effect_TU, null_mean_TU, null_sd_TU, z_TU = by_unit
  over_units = np.full((6, T), np.nan)
  effect_T, null_mean_T, null_sd_T, z_T, low_T, high_T = over_units
  cells_TU = np.zeros((T, U), np.int64)
  num_null_T, num_units_T = np.zeros(T, np.int64), np.zeros(T, np.int64)
  num_above_T = np.zeros(T, np.int64)
  p_normal_T = np.full(T, np.nan)
  null_p: list[np.ndarray] = []
  null_z: list[np.ndarray] = [np.empty(0)]
  for t, target in enumerate(matches.target_T.tolist()):
    span = data.of(target)
    unit_n = data.unit_C[data.place_N[span]]
    mean_1U, cells_1U = contrasts.means(
      np.zeros(len(unit_n), np.int64), unit_n, data.value_N[span],
      np.ones(len(unit_n), bool), 1, U,
    )  # fmt: skip
    cells_TU[t] = cells_1U[0]
    nulls = matches.null_TK[t][matches.null_TK[t] >= 0]
    found = contrasts.of_target(data, target, nulls)
    # Without nulls there is no contrast, and yet there are units.
    of_U = found.cells_U if len(nulls) else cells_1U[0]
    used_U = of_U >= config.min_cells
    num_units_T[t] = used_U.sum()
    effect_TU[t] = np.where(cells_1U[0] >= config.min_cells, mean_1U[0], np.nan)
    if not used_U.any():
      continue
    effect_T[t] = effect_TU[t][used_U].mean()
    # Only units of the target. A null may lack some, where a gene is rare and
    # units are many: asking for all would keep those of most cells.
    is_there_KU = found.null_cells_KU[:, used_U] >= config.min_cells
    enough_K = 2 * is_there_KU.sum(1) > used_U.sum()
    num_null_T[t] = enough_K.sum()
    if num_null_T[t] < matches.config.fewest:
      continue
    null_KU, rank_KU = (
      np.where(is_there_KU, x_KU[:, used_U], np.nan)[enough_K]
      for x_KU in (found.null_KU, found.null_rank_KU)
    )
    contrast_U, rank_U = found.target_U[used_U], found.rank_U[used_U]
    for u, unit in enumerate(np.flatnonzero(used_U)):
      has_K = np.isfinite(null_KU[:, u])
      line = null_line.fit(null_KU[has_K, u], rank_KU[has_K, u], rank_U[u])
      null_mean_TU[t, unit] = (
        effect_TU[t, unit] - contrast_U[u] + line.at_target
      )
      null_sd_TU[t, unit] = line.sd
      z_TU[t, unit] = null_line.divided(contrast_U[u] - line.at_target, line.sd)
    null_K, contrast = np.nanmean(null_KU, 1), contrast_U.mean()
    line = null_line.fit(null_K, np.nanmean(rank_KU, 1), rank_U.mean())
    null_mean_T[t] = effect_T[t] - contrast + line.at_target
    null_sd_T[t] = line.sd
    num_above_T[t] = (line.apart_K > contrast - line.at_target).sum()
    null_z.append(null_line.divided(line.apart_K, null_line.spread(line)))
    z_T[t] = null_line.divided(contrast - line.at_target, line.sd)
    number = used_U.sum()
    if number >= MIN_UNITS:
      apart_U = effect_TU[t, used_U] - null_mean_TU[t, used_U]
      half = scipy.stats.t.ppf(1 - ALPHA / 2, number - 1) * (
        apart_U.std(ddof=1) / np.sqrt(number)
      )
      low_T[t], high_T[t] = apart_U.mean() - half, apart_U.mean() + half
    if number > 1:
      t_value = z_T[t] / np.sqrt(1 + 1 / len(null_K))
      p_normal_T[t] = null_line.p_of(t_value, line.freedom, config.side)
      null_p.append(null_line.left_out(line, config.side))
  pooled_z = np.concatenate(null_z)
  pooled_z = pooled_z[np.isfinite(pooled_z)]
  band = (np.nan, np.nan)
  if len(pooled_z):
    band = np.quantile(pooled_z, [ALPHA / 2, 1 - ALPHA / 2])
  p_empirical_T = _empirical(p_normal_T, null_p)
  p_T = p_empirical_T if config.p_from == EMPIRICAL else p_normal_T
  return Tests(
    target_T=matches.target_T,
    units_U=np.asarray(units),
    effect_TU=effect_TU,
    cells_TU=cells_TU,
    null_mean_TU=null_mean_TU,
    null_sd_TU=null_sd_TU,
    z_TU=z_TU,
    effect_T=effect_T,
    null_mean_T=null_mean_T,
    null_sd_T=null_sd_T,
    z_T=z_T,
    contrast_low_T=low_T,
    contrast_high_T=high_T,
    cells_T=cells_TU.sum(1),
    num_units_T=num_units_T,
    num_null_T=num_null_T,
    num_above_T=num_above_T,
    null_z_low=float(band[0]),
    null_z_high=float(band[1]),
    p_normal_T=p_normal_T,
    p_empirical_T=p_empirical_T,
    p_T=p_T,
    q_T=false_discovery_rate(p_T),
    config=config,
  )


def _empirical(p_T: np.ndarray, null_p: list[np.ndarray]) -> np.ndarray:
  """Share of all nulls whose p is as small, counting the target itself."""
  pooled = np.sort(np.concatenate([*null_p, np.empty(0)]))
  pooled = pooled[np.isfinite(pooled)]
  found = np.searchsorted(pooled, p_T, side='right')
  return np.where(np.isfinite(p_T), (1 + found) / (1 + len(pooled)), np.nan)


def false_discovery_rate(p_T: np.ndarray, num_more: int = 0) -> np.ndarray:
  """q by Benjamini and Hochberg over all finite p; NaN stays NaN.

  Args:
    p_T: of what was tested.
    num_more: further members of the family, which were looked at and not
      chosen to be tested; their p counts as 1. Leaving them out would call most
      of what was chosen by the same cells.
  """
  p_T = np.asarray(p_T, np.float64)
  q_T = np.full(p_T.shape, np.nan)
  where = np.flatnonzero(np.isfinite(p_T))
  if len(where):
    family = np.concatenate([p_T[where], np.ones(num_more)])
    found = scipy.stats.false_discovery_control(family, method='bh')
    q_T[where] = found[: len(where)]
  return q_T


def unit_means(
  effects: effects_lib.CellEffects,
  measure: str,
  unit_of: np.ndarray,
  num_units: int,
  min_cells: int,
) -> dict[int, np.ndarray]:
  """Mean of a measure in each unit, by variant; NaN with fewer cells."""
  value_N = values(effects, measure)
  unit_N = np.asarray(unit_of)[effects.cell_N]
  kept_N = np.isfinite(value_N) & (unit_N >= 0)
  variants, row_N = np.unique(effects.variant_N[kept_N], return_inverse=True)
  mean_VU, number_VU = contrasts.means(
    row_N, unit_N[kept_N], value_N[kept_N], np.ones(len(row_N), bool),
    len(variants), num_units,
  )  # fmt: skip
  mean_VU = np.where(number_VU >= min_cells, mean_VU, np.nan)
  return dict(zip(variants.tolist(), mean_VU))
