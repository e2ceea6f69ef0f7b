"""Effects on other genes, added up while a screen runs.

Added up is what is asked for alone: in each group its targets and their nulls,
its own units, and the genes that its cells show to the model.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from genecompass_jax.analysis.perturbation import effects

_BYTES = 12  # of a sum and a number of cells


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Responses that are added up in one group of C cells.

  Attributes:
    variant_T: numbers of the variants, ascending.
    token_G: tokens of the genes that may answer, ascending.
    row_C: int64 rows of the cells in the source, which are in no other group.
    unit_C: number of the unit of each.
    units_U: names of the units.
  """

  variant_T: np.ndarray
  token_G: np.ndarray
  row_C: np.ndarray
  unit_C: np.ndarray
  units_U: Sequence[str]

  @property
  def shape(self) -> tuple[int, int, int]:
    """(T, U, G)."""
    return len(self.variant_T), len(self.units_U), len(self.token_G)


def num_bytes(wanted: Sequence[Wanted]) -> int:
  """Memory that the sums of some groups take."""
  return _BYTES * sum(int(np.prod(w.shape, dtype=object)) for w in wanted)


class ResponseSums:
  """Adds up responses of genes by group, variant and unit.

  Args:
    wanted: groups that share no cell.

  Attributes:
    sum_N: float64, [T, U, G] of the first group, then of the next.
    cells_N: int32 cells behind each sum.
  """

  def __init__(self, wanted: Sequence[Wanted]):
    self._wanted = tuple(wanted)
    sizes = [int(np.prod(w.shape, dtype=object)) for w in self._wanted]
    self._starts = np.cumsum([0, *sizes])
    self.sum_N = np.zeros(self._starts[-1], np.float64)
    self.cells_N = np.zeros(self._starts[-1], np.int32)
    # Places in a group by variant and by token, -1 where it is not wanted.
    self._variant_of = [_places(w.variant_T) for w in self._wanted]
    self._token_of = [_places(w.token_G) for w in self._wanted]
    rows = 2 + max((int(w.row_C.max(initial=-1)) for w in wanted), default=-1)
    self._group_of = np.full(rows, -1, np.int32)
    self._unit_of = np.full(rows, -1, np.int32)
    for number, group in enumerate(self._wanted):
      self._group_of[group.row_C] = number
      self._unit_of[group.row_C] = group.unit_C

  @property
  def sha256(self) -> str:
    """Digest of all that is wanted."""
    digest = hashlib.sha256()
    for group in self._wanted:
      digest.update('\n'.join([*group.units_U, '']).encode())
      for array in (group.variant_T, group.token_G, group.row_C, group.unit_C):
        digest.update(np.asarray(array, np.int64).tobytes())
        digest.update(b'|')
    return digest.hexdigest()

  def add(
    self,
    variant_B: np.ndarray,
    cell_B: np.ndarray,
    token_BL: np.ndarray,
    response_BL: np.ndarray,
  ) -> None:
    """Adds a batch, but for slots that were not compared.

    Args:
      variant_B: numbers of the variants.
      cell_B: rows of their cells in the source.
      token_BL: genes.
      response_BL: of each; negative where it was not compared.
    """
    group_B = _at(self._group_of, cell_B)
    for number in np.unique(group_B[group_B >= 0]).tolist():
      _, units, genes = self._wanted[number].shape
      variant_b = _at(self._variant_of[number], variant_B)
      rows_b = np.flatnonzero((group_B == number) & (variant_b >= 0))
      place_b = variant_b[rows_b] * units + self._unit_of[cell_B[rows_b]]
      gene_bL = _at(self._token_of[number], token_BL[rows_b])
      response_bL = response_BL[rows_b]
      is_added_bL = (response_bL >= 0) & (gene_bL >= 0)
      place_bL = self._starts[number] + place_b[:, None] * genes + gene_bL
      place_N = place_bL[is_added_bL]
      # A gene is once in a row, but a variant in many.
      np.add.at(self.sum_N, place_N, response_bL[is_added_bL])
      np.add.at(self.cells_N, place_N, 1)

  def responses(self) -> list[effects.Responses]:
    """The sums of each group, for the genes that any of its cells has."""
    found = []
    for number, group in enumerate(self._wanted):
      own = slice(*self._starts[number : number + 2])
      sum_TUG = self.sum_N[own].reshape(group.shape)
      cells_TUG = self.cells_N[own].reshape(group.shape)
      is_there_G = cells_TUG.any((0, 1))
      found.append(
        effects.Responses(
          variant_T=np.asarray(group.variant_T, np.int32),
          token_G=np.asarray(group.token_G[is_there_G], np.int32),
          units_U=np.array(group.units_U),
          sum_TUG=sum_TUG[:, :, is_there_G].astype(np.float32),
          cells_TUG=cells_TUG[:, :, is_there_G],
        )
      )
    return found


def _places(numbers: np.ndarray) -> np.ndarray:
  """Place of each number among some, int64; -1 for all others, the last too."""
  place = np.full(2 + int(numbers.max(initial=-1)), -1, np.int64)
  place[numbers] = np.arange(len(numbers))
  return place


def _at(place: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Places of numbers, any of which may be beyond the known."""
  return place[np.minimum(numbers, len(place) - 1)]
