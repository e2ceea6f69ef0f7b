"""Deletions by a model, and by principal components, in the same form."""

import dataclasses
import io
from collections.abc import Sequence

import anndata
import numpy as np
import scipy.sparse

from genecompass_jax import paths, pretrained
from genecompass_jax.analysis import model_cells, placed_model
from genecompass_jax.analysis.perturbation import (
  cell_set,
  effects as effects_lib,
  interventions,
  response_sums,
  screen as screen_lib,
)
from genecompass_jax.prepare import sources


@dataclasses.dataclass(frozen=True)
class Deleted:
  """What deletions of single genes did, in the same cells by every method.

  Attributes:
    token_T: deleted tokens; their places are the numbers of the variants.
    effects: on cells.
    responses: of other genes.
  """

  token_T: np.ndarray
  effects: effects_lib.CellEffects
  responses: effects_lib.Responses


def read(
  adata: anndata.AnnData,
  model: pretrained.PretrainedModel,
  config: sources.SourceConfig,
) -> cell_set.CellSet:
  """The cells as the model reads them."""
  return cell_set.read(model_cells.open_cells(adata, model, config), model)


def of_tokens(
  tokens: Sequence[int] | np.ndarray,
) -> list[interventions.Intervention]:
  """A deletion of each gene, alone."""
  return [
    interventions.Intervention(interventions.DELETE, (int(t),), (str(t),))
    for t in tokens
  ]


def of_model(
  cells: cell_set.CellSet,
  model: pretrained.PretrainedModel,
  tokens: Sequence[int],
  unit_of: np.ndarray,
  units: Sequence[str],
) -> Deleted:
  """Every gene deleted in every cell that shows it to the model."""
  done = of_tokens(tokens)
  screen = screen_lib.Screen(placed_model.place(model), cells, done)
  wanted = response_sums.Wanted(
    np.arange(len(done)),
    np.unique(screen.base.gene_ids_N),
    cells.row_C,
    unit_of[cells.row_C],
    units,
  )
  sums = response_sums.ResponseSums([wanted])
  found = screen_lib.joined([screen.run(g, sums) for g in screen.groups])
  (responses,) = sums.responses()
  return Deleted(np.asarray(tokens), found, responses)


def save(path: str, deleted: Deleted, facts: str) -> None:
  """Keeps deletions, with what they depend on."""
  arrays = {f'effects.{k}': v for k, v in vars(deleted.effects).items()}
  arrays |= {f'responses.{k}': v for k, v in vars(deleted.responses).items()}
  buffer = io.BytesIO()
  np.savez(buffer, facts=facts, token_T=deleted.token_T, **arrays)
  paths.write_bytes(path, buffer.getvalue())


def load(path: str, facts: str) -> Deleted | None:
  """What `save` kept; None where there is nothing, or of other facts."""
  if not paths.exists(path):
    return None
  with np.load(io.BytesIO(paths.read_bytes(path))) as arrays:
    if str(arrays['facts']) != facts:
      return None

    def part(cls, name):
      return cls(
        **{f.name: arrays[f'{name}.{f.name}'] for f in dataclasses.fields(cls)}
      )

    return Deleted(
      arrays['token_T'],
      part(effects_lib.CellEffects, 'effects'),
      part(effects_lib.Responses, 'responses'),
    )


def logs(cells: cell_set.CellSet) -> np.ndarray:
  """log(1 + counts of 10,000) by token, float64 [C, V]."""
  counts = cells.counts
  counts_CV = scipy.sparse.csr_matrix(
    (counts.counts_N.astype(np.float64), counts.gene_rows_N, counts.starts_C1),
    shape=(cells.num_cells, len(cells.divisor_V)),
  ).toarray()
  return np.log1p(counts_CV / counts.totals_C[:, None] * 1e4)


def of_components(
  cells: cell_set.CellSet,
  like: Deleted,
  unit_of: np.ndarray,
  units: Sequence[str],
  num_components: int = 50,
) -> Deleted:
  """The same deletions, where the state of a cell is its principal components.

  Log-normalised counts, the size factor that of the observed cell; components
  are fitted on these very cells. A gene answers by the change of its
  reconstruction. Cells, ranks and lengths are those of `like`.
  """
  log_CV = logs(cells)
  centred_CV = log_CV - log_CV.mean(0)
  _, value_D, axes_DV = np.linalg.svd(centred_CV, full_matrices=False)
  most = min(num_components, int((value_D > 1e-9 * value_D[0]).sum()))
  axes_VD = axes_DV[:most].T
  state_CD = centred_CV @ axes_VD
  place_of = np.full(int(cells.row_C.max()) + 1, -1)
  place_of[cells.row_C] = np.arange(cells.num_cells)
  cell_N = place_of[like.effects.cell_N]
  token_N = like.token_T[like.effects.variant_N]
  before_ND = state_CD[cell_N]
  after_ND = before_ND - log_CV[cell_N, token_N][:, None] * axes_VD[token_N]
  cosine_N = (before_ND * after_ND).sum(1) / (
    np.linalg.norm(before_ND, axis=1) * np.linalg.norm(after_ND, axis=1)
  )
  shift_N = (1 - cosine_N).astype(np.float32)
  none_N = np.full(len(shift_N), np.nan, np.float32)
  token_G = like.responses.token_G
  moves_TG = np.abs(axes_VD[like.token_T] @ axes_VD[token_G].T)
  shape = len(like.token_T), len(units), len(token_G)
  sum_TUG, cells_TUG = np.zeros(shape), np.zeros(shape, np.int32)
  for u in range(len(units)):
    of_unit = unit_of[cells.row_C] == u
    has_CG = log_CV[of_unit][:, token_G] > 0
    log_CT = log_CV[of_unit][:, like.token_T]
    sum_TUG[:, u] = (log_CT.T @ has_CG) * moves_TG
    cells_TUG[:, u] = (log_CT > 0).T.astype(np.int32) @ has_CG
  itself_TG = like.token_T[:, None] == token_G
  cells_TUG[np.broadcast_to(itself_TG[:, None], shape)] = 0
  return Deleted(
    like.token_T,
    dataclasses.replace(
      like.effects, shift_N=shift_N, gene_shift_N=none_N, toward_N=none_N
    ),
    effects_lib.Responses(
      like.responses.variant_T,
      token_G,
      like.responses.units_U,
      sum_TUG.astype(np.float32),
      cells_TUG,
    ),
  )


def of_scores(score_UT: np.ndarray) -> effects_lib.CellEffects:
  """One number a gene and unit in the form of effects: a unit is a cell."""
  U, T = score_UT.shape
  variant_N = np.repeat(np.arange(T, dtype=np.int32), U)
  none_N = np.full(T * U, np.nan, np.float32)
  zero_N = np.zeros(T * U, np.int32)
  return effects_lib.CellEffects(
    variant_N=variant_N,
    cell_N=np.tile(np.arange(U), T),
    rank_N=zero_N,
    length_N=zero_N,
    entered_N=zero_N,
    shift_N=score_UT.T.reshape(-1),
    gene_shift_N=none_N,
    toward_N=none_N,
  )
