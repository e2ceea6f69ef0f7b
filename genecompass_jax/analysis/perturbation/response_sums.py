"""Effects on other genes, added up while a screen runs."""

import hashlib
from collections.abc import Sequence

import numpy as np

from genecompass_jax.analysis.perturbation import effects


class ResponseSums:
  """Adds up responses of genes by variant and unit.

  Args:
    num_variants: T.
    unit_of: number of the unit of every cell of the source.
    units: names of the units.
    size: tokens of the vocabulary.
  """

  def __init__(
    self,
    num_variants: int,
    unit_of: np.ndarray,
    units: Sequence[str],
    size: int,
  ):
    shape = num_variants, len(units), size
    self._unit_of, self._units = unit_of, np.array(units)
    self.sum_TUV = np.zeros(shape, np.float64)
    self.cells_TUV = np.zeros(shape, np.int32)

  @property
  def sha256(self) -> str:
    """Digest of the units and of which cells are theirs."""
    digest = hashlib.sha256('\n'.join(self._units).encode())
    digest.update(np.asarray(self._unit_of, np.int64).tobytes())
    return digest.hexdigest()

  def add(
    self,
    variant_B: np.ndarray,
    cell_B: np.ndarray,
    token_BL: np.ndarray,
    response_BL: np.ndarray,
  ) -> None:
    """Adds a batch, but for slots that were not compared."""
    shape = self.sum_TUV.shape
    place_B = variant_B * shape[1] + self._unit_of[cell_B]
    place_BL = place_B[:, None].astype(np.int64) * shape[2] + token_BL
    is_compared_BL = response_BL >= 0
    place_N = place_BL[is_compared_BL]
    # A gene is once in a row, but a variant in many.
    np.add.at(self.sum_TUV.reshape(-1), place_N, response_BL[is_compared_BL])
    np.add.at(self.cells_TUV.reshape(-1), place_N, 1)

  def responses(self) -> effects.Responses:
    """The sums, for the genes that any of the cells has."""
    token_G = np.flatnonzero(self.cells_TUV.any((0, 1)))
    return effects.Responses(
      variant_T=np.arange(len(self.sum_TUV), dtype=np.int32),
      token_G=token_G.astype(np.int32),
      units_U=self._units,
      sum_TUG=self.sum_TUV[:, :, token_G].astype(np.float32),
      cells_TUG=self.cells_TUV[:, :, token_G],
    )
