"""Labels of all cells as codes, and which units go to which split."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from genecompass_jax import errors
from genecompass_jax.prepare import assays, sources

SLACK = 1.5  # held-out cells may exceed the share asked for by this factor


class Labels:
  """Integer codes for all labels, the same in all sources.

  Attributes:
    columns: obs columns of the corpus, `source` and `unit` first.
    species: names of the species.
    split_by_cell: for each source, whether single cells are its units.
  """

  def __init__(self, carried: Sequence[str], species: Sequence[str]):
    """Without a source yet.

    Args:
      carried: obs columns that any source carries.
      species: names of the species, in the order of their codes.

    Raises:
      UserError: the corpus has a column of that name anyway.
    """
    carried = dict.fromkeys(carried)
    clash = {'source', 'unit', 'dataset', 'source_row'} & set(carried)
    if clash:
      raise errors.UserError(
        f'--obs {sorted(clash)[0]}: the corpus has a column of that name'
      )
    self.columns = ('source', 'unit', 'dataset', *carried)
    self._code_of: dict[str, dict[str, int]] = {c: {} for c in self.columns}
    self.species = tuple(species)
    self.split_by_cell: list[bool] = []
    self._units: list[np.ndarray] = []  # of each source
    self._unit_of: list[int] = []  # of each unit, the unit it belongs to
    self._members: list[tuple[str, ...]] = []  # names of each unit
    self._unit_with: dict[str, int] = {}  # one that has a name among its own
    self._cells: list[list[int]] = []  # of each unit that stay, by species
    self._assay: list[int] = []

  def add(self, source: sources.Source) -> np.ndarray:
    """Int32 codes [columns, cells] of the cells of the next source.

    Raises:
      UserError: a column that the source does not have.
    """
    codes = np.stack([self._column(source, name) for name in self.columns])
    by_cell = source.config.unit == sources.CELL
    self.split_by_cell.append(by_cell)
    num_species = len(self.species)
    names = list(self._code_of['unit'])
    for unit in range(len(self._unit_of), len(names)):
      self._unit_of.append(unit)
      self._cells.append([0] * num_species)
      self._assay.append(0)
      # a unit that a corpus has joined is one with each that it was joined of
      members = source.unit_members.get(names[unit], (names[unit],))
      self._members.append(members)
      self._unite(
        {self._unit_with.setdefault(n, unit) for n in members} | {unit}
      )
    units = np.unique(codes[1])
    self._units.append(units)
    assay_U = np.full(len(names), np.iinfo(np.int8).max, np.int8)
    np.minimum.at(assay_U, codes[1], source.assay_C)  # there may be many units
    for unit in units:
      self._assay[unit] = int(assay_U[unit])
    return codes

  def count(
    self, number: int, unit_C: np.ndarray, species_C: np.ndarray
  ) -> None:
    """Counts the cells of a source that stay, for `cells_by_unit`.

    Args:
      number: of the source, in the order of `add`.
      unit_C: code of the unit of each of these cells, as `add` gave it.
      species_C: of each.
    """
    if self.split_by_cell[number]:
      return
    for species in range(len(self.species)):
      of_U = np.bincount(unit_C[species_C == species])
      for unit in np.flatnonzero(of_U):
        self._cells[unit][species] += int(of_U[unit])

  def join(
    self,
    links: Sequence[tuple[int, int]],
    units: Sequence[tuple[int, int]] = (),
  ) -> None:
    """Makes one unit of all units of sources that share cells.

    Args:
      links: pairs of sources.
      units: pairs of units that share cells within a source.
    """
    for one, other in links:
      self._unite(np.union1d(self._units[one], self._units[other]).tolist())
    for pair in units:
      self._unite(pair)

  def _unite(self, units: Iterable[int]) -> None:
    roots = {self._unit_of[u] for u in units}
    if len(roots) > 1:
      first = min(roots)
      self._unit_of = [first if u in roots else u for u in self._unit_of]

  @property
  def joined_units(self) -> list[list[str]]:
    """Names of the units in each group that was joined, here or before."""
    return [names for names in self._groups().values() if len(names) > 1]

  def _groups(self) -> dict[int, list[str]]:
    """Names, each once, of the units that belong to one."""
    groups: dict[int, dict[str, None]] = {}
    for unit, root in enumerate(self._unit_of):
      groups.setdefault(root, {}).update(dict.fromkeys(self._members[unit]))
    return {root: list(names) for root, names in groups.items()}

  @property
  def unit_U(self) -> np.ndarray:
    """int32 [U]: the unit that each unit belongs to; itself where not joined."""
    return np.array(self._unit_of, np.int32)

  @property
  def categories(self) -> dict[str, list[str]]:
    """Names behind the codes of every column, by first appearance.

    A unit of joined ones has the names of all of them.
    """
    found = {name: list(codes) for name, codes in self._code_of.items()}
    for root, names in self._groups().items():
      found['unit'][root] = '+'.join(names)
    return found

  def names(self, column: str) -> tuple[str, ...]:
    """Names behind the codes of a column, as the sources gave them."""
    return tuple(self._code_of[column])

  def cells_by_unit(self) -> tuple[np.ndarray, np.ndarray]:
    """int64 [species, U] cells and int64 [U] assays; joined units as one.

    Cells that are split one by one are in no unit, and those that filters or
    the search for copies removed are not counted (`count`).
    """
    num_units = len(self._unit_of)
    cells_SU = np.zeros((len(self.species), num_units), np.int64)
    assay_U = np.array(self._assay, np.int64)
    for unit, root in enumerate(self._unit_of):
      cells_SU[:, root] += self._cells[unit]
      assay_U[root] = min(assay_U[root], self._assay[unit])
    return cells_SU, assay_U

  def _column(self, source: sources.Source, name: str) -> np.ndarray:
    unit = source.config.unit
    if name == 'source':
      return self._constant(name, source.name, source.num_cells)
    if name == 'dataset' or (name == 'unit' and unit in ('', sources.CELL)):
      return self._constant(name, source.dataset, source.num_cells)
    if name == 'unit':
      codes_C, names = source.codes(unit)
      # cells without a unit are one, and are never scattered over splits
      if not source.config.member:  # a corpus has given them whole
        names = [f'{source.dataset}:{n}' for n in names]
      names = [*names, f'{source.dataset}:unknown']
      codes_C = np.where(codes_C < 0, len(names) - 1, codes_C)
    elif name in source.obs:
      codes_C, names = source.codes(name)
    elif name in source.config.obs:
      source.codes(name)  # raises
    else:  # another source has it
      return np.full(source.num_cells, -1, np.int32)
    used = np.unique(codes_C[codes_C >= 0])
    table = np.full(len(names) + 1, -1, np.int32)
    for code in used:
      table[code] = self._code(name, names[code])
    return table[codes_C]  # the last entry, -1, for code -1

  def _constant(self, name: str, value: str, num_cells: int) -> np.ndarray:
    return np.full(num_cells, self._code(name, value), np.int32)

  def _code(self, column: str, value: str) -> int:
    known = self._code_of[column]
    return known.setdefault(value, len(known))


def choose_splits(
  labels: Labels,
  *,
  validation_share: float,
  validation_units: Sequence[str],
  test_units: Sequence[str],
  seed: int,
) -> tuple[np.ndarray, list[str]]:
  """Index into `corpus.SPLITS` of every unit, and lines for the report.

  Raises:
    UserError: a unit that is not there, or none left to train on or hold out.
  """
  names = list(labels.names('unit'))
  unit_U = labels.unit_U
  cells_SU, assay_U = labels.cells_by_unit()
  has_cells_U = cells_SU.any(axis=0)
  split_U = np.zeros(len(names), np.int8)
  notes = []
  both = sorted(set(validation_units) & set(test_units))
  if both:
    raise errors.UserError(
      f'{both[0]!r} is in --validation_units and in --test_units; give one'
    )
  if (validation_units or test_units) and all(labels.split_by_cell):
    raise errors.UserError(
      '--unit cell has no units to name: take a column of donors or studies, '
      'or leave --validation_units and --test_units out'
    )
  for split, asked in ((1, validation_units), (2, test_units)):
    empty = []
    for name in asked:
      units = [
        unit_U[u]
        for u, n in enumerate(names)
        if name in (n, n.partition(':')[2])
      ]
      if not units:
        shown = ', '.join(names[:8]) + (' ...' if len(names) > 8 else '')
        raise errors.UserError(f'no unit {name!r}; there are: {shown}')
      for unit in units:
        if split_U[unit] not in (0, split):
          raise errors.UserError(
            f'{name!r} shares cells with a unit of the other split: '
            f'{labels.categories["unit"][unit]} are one unit; hold out all of '
            'it in one split'
          )
      split_U[units] = split
      if not has_cells_U[units].any():
        empty.append(name)
        notes.append(
          f'no cell of {name} is left: filters or copies took all, none is '
          'held out'
        )
    if asked and len(empty) == len(asked):
      raise errors.UserError(
        f'no cell of {", ".join(empty)} is left to hold out: filters or copies '
        'took all; name other units, or lower the filters'
      )
  # no cell is counted for a unit that was joined to another
  left = ((split_U == 0) & has_cells_U).any() or any(labels.split_by_cell)
  not_held = []
  if validation_units or not validation_share:
    if not left:
      raise errors.UserError('every unit is held out; none is left to train on')
    return split_U, notes
  if not left:
    raise errors.UserError('every unit is held out; none is left to train on')
  cells_SU = cells_SU * (split_U == 0)
  for species, cells_U in enumerate(cells_SU):
    if not cells_U.any():
      continue
    chosen = _hold_out(cells_U, assay_U, names, validation_share, seed)
    split_U[chosen] = 1
    if not len(chosen):
      held = ', '.join(
        labels.categories['unit'][u] for u in np.flatnonzero(cells_U)[:3]
      )
      not_held.append(
        f'no {labels.species[species]} unit can be held out: all cells '
        f'are of {held}'
      )
  notes += not_held
  if not (split_U == 1).any() and not any(labels.split_by_cell):
    raise errors.UserError(
      f'{not_held[0]}; name the column of donors or studies with --unit COLUMN, '
      'add another source, do without validation (--validation_share 0), or '
      'split single cells knowingly (--unit cell, marked leaky)'
    )
  return split_U, notes


def _hold_out(
  cells_U: np.ndarray,
  assay_U: np.ndarray,
  names: Sequence[str],
  share: float,
  seed: int,
) -> np.ndarray:
  """Units to hold out: in order of a hash, while they fit the share.

  The last unit of an assay stays in training, or its medians would be lost.
  Where no unit fits, the smallest is taken, if it is no more than half.
  """

  def rank(unit: int) -> str:
    return hashlib.sha256(f'{seed}:{names[unit]}'.encode()).hexdigest()

  units = sorted(np.flatnonzero(cells_U), key=rank)
  total = cells_U.sum()
  left = np.bincount(assay_U[units], minlength=len(assays.KINDS))
  chosen, held = [], 0
  for unit in units:
    fits = held + cells_U[unit] <= SLACK * share * total
    if fits and left[assay_U[unit]] > 1:
      chosen.append(unit)
      left[assay_U[unit]] -= 1
      held += cells_U[unit]
    if held >= share * total:
      break
  spare = [unit for unit in units if left[assay_U[unit]] > 1]
  if not chosen and spare:
    smallest = min(spare, key=lambda u: (cells_U[u], rank(u)))
    if 2 * cells_U[smallest] <= total:
      chosen = [smallest]
  return np.array(chosen, np.int64)


def split_facts(
  labels: Labels, split_U: np.ndarray, validation_share: float
) -> dict:
  """What the manifest says of the splits."""
  names = labels.categories['unit']
  has_cells_U = labels.cells_by_unit()[0].any(axis=0)  # none of joined ones
  leaky = any(labels.split_by_cell)

  def of(split: int) -> list[str]:
    return [names[u] for u in np.flatnonzero((split_U == split) & has_cells_U)]

  return {
    'unit': sources.CELL if leaky else 'unit',
    'leaky': leaky,
    'units': len(np.unique(labels.unit_U)),
    'validation_units': of(1),
    'test_units': of(2),
    'validation_share': validation_share,
  }
