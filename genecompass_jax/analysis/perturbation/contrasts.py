"""Effects of targets and nulls in the same cells, by unit.

In every cell the mean of those nulls that it shows is taken from the effect of
the target and from those of the nulls: what depends on the cell goes out.
"""

import dataclasses

import numpy as np

from genecompass_jax import errors
from genecompass_jax.analysis.perturbation import effects as effects_lib


@dataclasses.dataclass(frozen=True)
class ByVariant:
  """Effects sorted by variant; cells numbered without gaps.

  Attributes:
    start_V1: int64 where the effects of each variant start, and their end.
    place_N: int64 number of the cell.
    value_N: float64 effect.
    rank_N: float64 rank of the gene in the cell; -1 where it was not there.
    unit_C: int64 unit of each cell.
    num_units: U.
  """

  start_V1: np.ndarray
  place_N: np.ndarray
  value_N: np.ndarray
  rank_N: np.ndarray
  unit_C: np.ndarray
  num_units: int

  def of(self, variant: int) -> slice:
    """Where the effects of a variant are."""
    if not 0 <= variant < len(self.start_V1) - 1:
      return slice(0, 0)
    return slice(self.start_V1[variant], self.start_V1[variant + 1])

  @property
  def num_cells(self) -> int:
    """Cells with an effect."""
    return len(self.unit_C)


def by_variant(
  effects: effects_lib.CellEffects,
  value_N: np.ndarray,
  unit_of: np.ndarray,
  num_units: int,
) -> ByVariant:
  """Sorts effects; those without a value or a unit are left out.

  Args:
    effects: of targets and nulls.
    value_N: the measure that is tested, NaN where it says nothing.
    unit_of: unit of every cell of the source, -1 for none.
    num_units: units.

  Raises:
    UserError: a variant has two effects in one cell.
  """
  unit_N = np.asarray(unit_of)[effects.cell_N]
  kept_N = np.flatnonzero(np.isfinite(value_N) & (unit_N >= 0))
  variant_N = np.asarray(effects.variant_N, np.int64)[kept_N]
  cell_N = np.asarray(effects.cell_N)[kept_N]
  order_N = np.lexsort((cell_N, variant_N))
  kept_N, variant_N = kept_N[order_N], variant_N[order_N]
  cells, place_N = np.unique(cell_N[order_N], return_inverse=True)
  twice = (np.diff(variant_N) == 0) & (np.diff(place_N) == 0)
  if twice.any():
    raise errors.UserError(
      'statistics: a variant has two effects in one cell; join the parts of a '
      'screen once each'
    )
  last = int(variant_N.max(initial=-1))
  return ByVariant(
    start_V1=np.searchsorted(variant_N, np.arange(last + 2)),
    place_N=place_N,
    value_N=value_N[kept_N],
    rank_N=np.asarray(effects.rank_N, np.float64)[kept_N],
    unit_C=np.asarray(unit_of)[cells].astype(np.int64),
    num_units=num_units,
  )


@dataclasses.dataclass(frozen=True)
class Contrasts:
  """Of one target and its K nulls, by unit: means over its cells.

  Attributes:
    target_U: effect of the target less the mean of the nulls of the cell.
    rank_U: its rank less theirs; zeros where a gene was put into cells that
      lacked it, and so stood nowhere.
    cells_U: cells behind both.
    null_KU, null_rank_KU, null_cells_KU: the same of every null.
  """

  target_U: np.ndarray
  rank_U: np.ndarray
  cells_U: np.ndarray
  null_KU: np.ndarray
  null_rank_KU: np.ndarray
  null_cells_KU: np.ndarray


def of_target(data: ByVariant, target: int, nulls: np.ndarray) -> Contrasts:
  """Contrasts of a target and of its nulls, in the cells that show them."""
  spans = [data.of(int(k)) for k in nulls]
  index_M = np.concatenate([np.arange(s.start, s.stop) for s in spans] or [[]])
  index_M = index_M.astype(np.int64)
  place_M = data.place_N[index_M]
  null_M = np.repeat(np.arange(len(nulls)), [s.stop - s.start for s in spans])
  number_C = np.bincount(place_M, minlength=data.num_cells)
  span = data.of(target)
  place_n = data.place_N[span]
  found = []
  for of_N in (data.value_N, data.rank_N):
    sum_C = np.bincount(place_M, of_N[index_M], data.num_cells)
    with np.errstate(invalid='ignore', divide='ignore'):
      mean_C = sum_C / number_C
    # A null by itself in a cell is compared with nothing.
    found += means(
      null_M, data.unit_C[place_M], of_N[index_M] - mean_C[place_M],
      number_C[place_M] > 1, len(nulls), data.num_units,
    )  # fmt: skip
    found += means(
      np.zeros(len(place_n), np.int64), data.unit_C[place_n],
      of_N[span] - mean_C[place_n], number_C[place_n] > 0, 1, data.num_units,
    )  # fmt: skip
  null_KU, null_cells_KU, target_1U, cells_1U = found[:4]
  null_rank_KU, _, rank_1U, _ = found[4:]
  # Put into cells that lack it, a gene stood nowhere.
  if (
    min(data.rank_N[span].min(initial=0), data.rank_N[index_M].min(initial=0))
    < 0
  ):
    null_rank_KU, rank_1U = np.zeros_like(null_KU), np.zeros_like(target_1U)
  return Contrasts(
    target_1U[0], rank_1U[0], cells_1U[0], null_KU, null_rank_KU, null_cells_KU
  )


def means(
  row_M: np.ndarray,
  unit_M: np.ndarray,
  value_M: np.ndarray,
  kept_M: np.ndarray,
  rows: int,
  units: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Means by row and unit, and how many values they are of."""
  place = (row_M * units + unit_M)[kept_M]
  number = np.bincount(place, minlength=rows * units)
  with np.errstate(invalid='ignore', divide='ignore'):
    mean = np.bincount(place, value_M[kept_M], rows * units) / number
  return mean.reshape(rows, units), number.reshape(rows, units)
