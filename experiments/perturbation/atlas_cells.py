"""Cells of the atlas, the model trained on them, and what each gene truly is."""

import dataclasses
import os

import anndata
import numpy as np

from experiments.perturbation import settings as settings_lib
from genecompass_jax import pretrained, simulate
from genecompass_jax.demo import pretraining
from genecompass_jax.prepare import anndatas, simulated
from genecompass_jax.simulate import genes as genes_lib

REGULATOR, EASY, SIBLING, CYCLE, POOL = (
  *('regulator', 'leaf', 'sibling', 'cell_cycle', 'pool'),
)


def training_cells(
  atlas: simulate.Atlas, settings: settings_lib.Settings
) -> anndata.AnnData:
  """What model and co-expression see."""
  return simulated.to_anndata(
    atlas.sample(settings.training_cells, settings_lib.HUMAN)
  )


def perturbed_cells(
  atlas: simulate.Atlas, settings: settings_lib.Settings
) -> anndata.AnnData:
  """As many cells of every donor, none of which was trained on."""
  design = atlas.designs[settings_lib.HUMAN]
  donors = np.unique(design.donor_U)
  wanted = settings.cells_per_donor
  cells = atlas.sample(
    8 * wanted * len(donors), settings_lib.HUMAN, settings_lib.FAR
  )
  rows = [
    np.flatnonzero(cells.obs['donor'] == donor)[:wanted] for donor in donors
  ]
  return simulated.to_anndata(cells.select(np.sort(np.concatenate(rows))))


def train(
  root: str, cells: anndata.AnnData, settings: settings_lib.Settings
) -> pretrained.PretrainedModel:
  """The model, trained if it is not there; a call that was stopped goes on."""
  corpus = os.path.join(root, 'corpus')
  if not os.path.exists(os.path.join(corpus, 'manifest.json')):
    anndatas.build_corpus(
      cells, corpus, species='human', unit='donor', overwrite=True
    )
  return pretraining.pretrain(
    corpus,
    os.path.join(root, 'run'),
    steps=settings.steps,
    seed=settings.seed,
  )


@dataclasses.dataclass(frozen=True)
class Truth:
  """What deletion of a gene truly does to the R human genes.

  Attributes:
    gene_ids: R of them.
    kind_R: '' for genes that are in no set (silent ones, TFs without an effect).
    total_R: mean over types of the summed absolute log2 fold of all others;
      exactly 0 but for TFs.
    answers: of each regulator, by row: 1 a true answer, 0 none at all, -1 too
      small to say, or the gene itself; [R].
    siblings: of each regulator, by row: bool [R], correlated but not caused.
  """

  gene_ids: tuple[str, ...]
  kind_R: np.ndarray
  total_R: np.ndarray
  answers: dict[int, np.ndarray]
  siblings: dict[int, np.ndarray]


def truth(atlas: simulate.Atlas, settings: settings_lib.Settings) -> Truth:
  """Kinds of genes, fixed before any model is trained.

  Leaf genes regulate nothing, so their deletion truly does nothing to others.
  Half of the easy ones are tested, the other half is the pool that nulls are
  drawn from; siblings of TFs and cell-cycle genes are tested only.
  """
  genes = atlas.genes[settings_lib.HUMAN]
  network = atlas.networks[settings_lib.HUMAN]
  role_R = genes.role_R
  kind_R = np.full(len(genes), '', 'U12')
  of_tfs = {network.regulators[r] for r in network.tf_rows_T} - {frozenset()}
  shares_R = np.array([r in of_tfs for r in network.regulators])
  is_leaf_R = ~np.isin(role_R, [genes_lib.TF, genes_lib.SILENT])
  is_sibling_R = is_leaf_R & (shares_R | (genes.sibling_of_R >= 0))
  is_cycle_R = role_R == genes_lib.CYCLE
  easy = np.flatnonzero(is_leaf_R & ~is_sibling_R & ~is_cycle_R)
  mixed = np.random.Generator(np.random.Philox(0)).permutation(easy)
  kind_R[mixed[: len(mixed) // 3]] = EASY
  kind_R[mixed[len(mixed) // 3 :]] = POOL
  kind_R[is_sibling_R] = SIBLING
  kind_R[is_cycle_R] = CYCLE
  total_R, answers, siblings = np.zeros(len(genes)), {}, {}
  for row in network.tf_rows_T.tolist():
    found = atlas.effects(
      simulate.knock_out(genes.gene_ids[row]), settings_lib.HUMAN
    )
    fold_R = np.abs(found.log2_fold_YR).mean(0)
    fold_R[row] = 0.0
    fold_R = np.nan_to_num(fold_R)
    total_R[row] = fold_R.sum()
    if total_R[row] == 0:
      continue
    kind_R[row] = REGULATOR
    is_answer_R = fold_R >= settings.least_fold
    answers[row] = np.where(is_answer_R, 1, np.where(fold_R == 0, 0, -1))
    answers[row][found.is_perturbed_R | (role_R == genes_lib.SILENT)] = -1
    siblings[row] = found.is_sibling_R
  return Truth(genes.gene_ids, kind_R, total_R, answers, siblings)
