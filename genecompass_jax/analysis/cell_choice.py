"""Which cells are asked: some of each group, with the unit that each is of."""

import dataclasses

import numpy as np

from genecompass_jax import errors, kernels
from genecompass_jax.analysis import cell_groups
from genecompass_jax.prepare import sources


def draw(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
  """At most `most` rows of cells, ascending; all if it is 0.

  A row is drawn by itself: another group, or more cells, do not change that.
  """
  if not most or len(rows) <= most:
    return rows
  order = np.array([kernels.fold(seed, int(r)) for r in rows])
  return np.sort(rows[np.argsort(order, kind='stable')[:most]])


@dataclasses.dataclass(frozen=True)
class ChoiceConfig:
  """Groups, units, and how many cells.

  Attributes:
    group_by: obs column of the groups; '' for one group of all cells.
    groups: only these values of it; empty: all.
    donor_key: obs column of donors or samples, the units of means; '' where
      all cells are one unit.
    max_cells: most cells of a group, drawn by the seed; 0: all.
    min_cells: fewest cells of a unit that has a mean.
    seed: of the draw.
  """

  group_by: str = ''
  groups: tuple[str, ...] = ()
  donor_key: str = ''
  max_cells: int = 500
  min_cells: int = 3
  seed: int = 0

  def __post_init__(self):
    groups = self.groups
    groups = (groups,) if isinstance(groups, str) else tuple(groups)
    if not all(isinstance(name, str) for name in groups):
      raise errors.UserError(f'groups={groups!r}: give names as text')
    object.__setattr__(self, 'groups', groups)
    counts = 'max_cells', 'min_cells', 'seed'
    errors.check_whole(**{name: getattr(self, name) for name in counts})
    if self.groups and not self.group_by:
      raise errors.UserError(
        'groups are values of an obs column: name it with group_by'
      )
    if min(self.max_cells, self.seed) < 0 or self.min_cells < 1:
      raise errors.UserError(
        f'max_cells={self.max_cells}, seed={self.seed}, '
        f'min_cells={self.min_cells}: give numbers from 0, 0 and 1 on'
      )

  def header(self) -> dict[str, str]:
    """What is said of it above a table."""
    from_group = (
      f'at most {self.max_cells:,} a group, drawn by seed {self.seed}'
    )
    return {
      'groups': f'obs[{self.group_by!r}]'
      if self.group_by
      else 'all cells are one group',
      'cells': from_group if self.max_cells else 'all of a group',
      'unit': f'obs[{self.donor_key!r}]: means are over the units of at least '
      f'{self.min_cells} cells, of their means over cells'
      if self.donor_key
      else f'all cells are one unit, of at least {self.min_cells} cells: no '
      'interval',
    }


@dataclasses.dataclass(frozen=True)
class ChosenCells:
  """Cells of a stream by group and unit.

  Attributes:
    config: what was asked.
    groups: of all cells.
    units: likewise.
    codes: of the groups that are asked, in the order of the names.
  """

  config: ChoiceConfig
  groups: cell_groups.CellGroups
  units: cell_groups.CellGroups
  codes: tuple[int, ...]

  @classmethod
  def of(
    cls, stream: sources.CellStream, config: ChoiceConfig
  ) -> 'ChosenCells':
    """Reads the columns.

    Raises:
      UserError: no such column or group.
    """
    groups = cell_groups.CellGroups.of(stream, config.group_by)
    units = cell_groups.CellGroups.of(stream, config.donor_key)
    codes = {groups.code(stream.source.name, name) for name in config.groups}
    return cls(
      config,
      groups,
      units,
      tuple(sorted(codes or range(len(groups.names)))),
    )

  def can_be_asked(self) -> np.ndarray:
    """Bool [C]: cells of these groups that have a unit."""
    return np.isin(self.groups.code_C, self.codes) & (self.units.code_C >= 0)

  def rows(self, group: int, can_C: np.ndarray) -> np.ndarray:
    """Rows of a group that are asked, by unit, then ascending.

    Args:
      group: code of the group.
      can_C: bool, cells to draw from.
    """
    is_of_C = (self.groups.code_C == group) & (self.units.code_C >= 0)
    found = draw(
      np.flatnonzero(is_of_C & can_C), self.config.max_cells, self.config.seed
    )
    return found[np.argsort(self.units.code_C[found], kind='stable')]
