"""Which genes answer a perturbation, beyond what answers any.

Genes that stand low in a cell move whatever is deleted, and a deletion that
moves the whole cell moves all of them. Both are taken out as far as they add up
(double centring): from each deletion its mean over the genes that answer, and
from each gene its mean over the deletions that the target was matched with. What
is left is given in units of its spread over these matched deletions.
"""

import dataclasses

import numpy as np

from genecompass_jax import errors
from genecompass_jax.analysis.perturbation import (
  effects as effects_lib,
  matching,
)

_ROUNDS = 50  # of centring; where nothing is missing one is enough
_CLOSE = 1e-10


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers of G genes to T targets.

  Attributes:
    target_T: int64 numbers of the variants.
    token_G: int32 tokens.
    z_TG: float64; NaN for perturbed genes, and where target or nulls have too
      few cells with the gene.
    mean_TG: mean response over units; NaN likewise.
    cells_TG: int64 cells that have the gene.
    num_null_TG: int64 matched deletions behind each z.
  """

  target_T: np.ndarray
  token_G: np.ndarray
  z_TG: np.ndarray
  mean_TG: np.ndarray
  cells_TG: np.ndarray
  num_null_TG: np.ndarray


def means(responses: effects_lib.Responses, min_cells: int = 3) -> np.ndarray:
  """Mean response over cells within a unit, then over units: [T, G].

  Units with fewer than `min_cells` cells for a pair do not count; NaN where
  none is left.
  """
  sum_TUG = np.asarray(responses.sum_TUG, np.float64)
  cells_TUG = responses.cells_TUG
  enough_TUG = cells_TUG >= min_cells
  mean_TUG = np.where(enough_TUG, sum_TUG / np.maximum(cells_TUG, 1), 0.0)
  number_TG = enough_TUG.sum(1)
  with np.errstate(invalid='ignore'):
    return np.where(
      number_TG > 0, mean_TUG.sum(1) / np.maximum(number_TG, 1), np.nan
    )


def score(
  responses: effects_lib.Responses,
  matches: matching.Matches,
  *,
  min_cells: int = 3,
) -> Answers:
  """Answers of all genes to all targets, double-centred, as z.

  Args:
    responses: of targets and their nulls.
    matches: by numbers of variants.
    min_cells: cells of a unit that have the gene.

  Raises:
    UserError: responses of a target are missing.
  """
  mean_RG = means(responses, min_cells)
  row_of = {v: r for r, v in enumerate(responses.variant_T.tolist())}
  missing = [t for t in matches.target_T.tolist() if t not in row_of]
  if missing:
    raise errors.UserError(
      f'answers: variant {missing[0]} is a target without responses'
    )
  shape = len(matches.target_T), len(responses.token_G)
  z_TG, num_null_TG = np.full(shape, np.nan), np.zeros(shape, np.int64)
  row_T = [row_of[t] for t in matches.target_T.tolist()]
  for t, row in enumerate(row_T):
    nulls = [row_of[k] for k in matches.null_TK[t].tolist() if k in row_of]
    if len(nulls) < matches.config.fewest:
      continue
    centred_KG = centre(mean_RG[[row, *nulls]])
    target_G, null_KG = centred_KG[0], centred_KG[1:]
    is_there_KG = np.isfinite(null_KG)
    number_G = is_there_KG.sum(0)
    null_KG = np.where(is_there_KG, null_KG, 0.0)
    with np.errstate(invalid='ignore', divide='ignore'):
      middle_G = null_KG.sum(0) / number_G
      apart_KG = np.where(is_there_KG, null_KG - middle_G, 0.0)
      sd_G = np.sqrt((apart_KG**2).sum(0) / (number_G - 1))
      z_G = (target_G - middle_G) / sd_G
    enough_G = (number_G >= matches.config.fewest) & (sd_G > 0)
    z_TG[t] = np.where(enough_G, z_G, np.nan)
    num_null_TG[t] = number_G
  return Answers(
    target_T=matches.target_T,
    token_G=responses.token_G,
    z_TG=z_TG,
    mean_TG=mean_RG[row_T],
    cells_TG=responses.cells_TUG.sum(1)[row_T].astype(np.int64),
    num_null_TG=num_null_TG,
  )


def centre(value_RG: np.ndarray) -> np.ndarray:
  """Values less the effects of their row and of their column.

  The additive fit by rows and columns, the first row (the target) left out of
  the columns: what a gene does whatever is deleted is learned from the nulls.
  Missing values stay NaN and are in no mean.
  """
  left_RG = np.array(value_RG, np.float64)
  is_there_RG = np.isfinite(left_RG)
  # A gene that no null has says nothing about the rows.
  of_nulls_G = is_there_RG[1:].any(0)
  weight_RG = (is_there_RG & of_nulls_G).astype(np.float64)
  left_RG[~is_there_RG] = 0.0
  for _ in range(_ROUNDS):
    row_R = (left_RG * weight_RG).sum(1) / np.maximum(weight_RG.sum(1), 1)
    left_RG -= row_R[:, None]
    column_G = (left_RG * weight_RG)[1:].sum(0) / np.maximum(
      weight_RG[1:].sum(0), 1
    )
    left_RG -= column_G
    if np.abs(column_G).max(initial=0) + np.abs(row_R).max(
      initial=0
    ) <= _CLOSE * np.abs(left_RG).max(initial=1e-30):
      break
  return np.where(is_there_RG, left_RG, np.nan)
