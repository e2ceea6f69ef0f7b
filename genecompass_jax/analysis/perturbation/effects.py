"""What variants of cells did to the model's states.

Sign conventions (`SIGNS`), also in the header of every table. The perturbed
genes are left out of both sides, and so is a gene that a deletion let in at the
cut: states of shared genes are compared.
"""

import dataclasses

import numpy as np

SIGNS = {
  'shift': 'half the squared distance between the unit vectors of the pooled '
  'states, which is 1 - cosine: 0 is no effect, 2 the largest',
  'gene_shift': 'mean of 1 - cosine over the genes that cell and variant share',
  'toward': "change of the unit vector along the axis from the start's to the "
  "goal's centroid: positive is towards the goal; NaN without goal",
  'response': "1 - cosine of one other gene's state, before and after",
}


@dataclasses.dataclass(frozen=True)
class CellEffects:
  """Effects on whole cells, one element a variant and cell.

  Attributes:
    variant_N: int32 number of the variant, in the list that it was made from.
    cell_N: int64 row of the cell in the source.
    rank_N: int32 rank of the perturbed gene in the unperturbed cell, from 0;
      of a set, its best ranked; -1 where none was expressed.
    length_N: int32 genes of the unperturbed cell that entered the model.
    entered_N: int32 genes that came in at the cut because others left.
    shift_N: float32; NaN, as the others, where it is of genes that cell and
      variant share and there are none.
    gene_shift_N: float32.
    toward_N: float32, NaN without a goal.
  """

  variant_N: np.ndarray
  cell_N: np.ndarray
  rank_N: np.ndarray
  length_N: np.ndarray
  entered_N: np.ndarray
  shift_N: np.ndarray
  gene_shift_N: np.ndarray
  toward_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Responses:
  """Effects of T variants on other genes, summed over the cells of U units.

  Attributes:
    variant_T: int32 numbers of the variants.
    token_G: int32 tokens of the genes that answer.
    units_U: names of the units (donors or samples).
    sum_TUG: float32 sum of responses over the cells that have the gene.
    cells_TUG: int32 number of these cells; 0 for the perturbed gene itself.
  """

  variant_T: np.ndarray
  token_G: np.ndarray
  units_U: np.ndarray
  sum_TUG: np.ndarray
  cells_TUG: np.ndarray
