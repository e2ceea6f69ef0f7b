"""The atlas: its truth, and any number of cells from it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from genecompass_jax import errors, gene_table
from genecompass_jax.simulate import (
  cells as cells_lib,
  config as config_lib,
  genes as genes_lib,
  network as network_lib,
  perturb as perturb_lib,
)


class Atlas:
  """Cells of two species whose regulation is known.

  It is no evidence about biology, and every figure made on it says so.

  Attributes:
    config: what it was made of; `config.sha256` names it.
    genes: by species.
    networks: by species.
    types: cell types, shared by the species.
    designs: by species.
    drugs: inhibitors of TFs.
  """

  def __init__(
    self,
    config: config_lib.AtlasConfig | None = None,
    table: gene_table.GeneTable | None = None,
  ):
    """Draws the truth; takes about a second.

    Args:
      config: the default if None.
      table: gene table to draw genes from; the default one if None.

    Raises:
      UserError: the table holds too few genes.
    """
    self.config = config = config or config_lib.AtlasConfig()
    table = table or gene_table.GeneTable.default()
    self.genes = genes_lib.draw(table, config)
    self.networks = network_lib.draw(self.genes, config)
    self.types = types = cells_lib.draw_types(config)
    # TF numbers of the masters, orthologues in the same place.
    self._masters = tuple(
      np.array(
        sorted(
          np.flatnonzero(g.is_master_R[n.tf_rows_T]),
          key=lambda t, g=g, n=n: g.human_R[n.tf_rows_T[t]],
        )
      )
      for g, n in zip(self.genes, self.networks)
    )
    # Scale expression so that a mean cell has 1 in all.
    self.genes = tuple(
      dataclasses.replace(
        g,
        baseline_R=g.baseline_R
        - np.log(self.mean_expression(s).sum(1) @ types.share_SY[s]),
      )
      for s, g in enumerate(self.genes)
    )
    self.designs = tuple(
      cells_lib.draw_design(
        config, s, types, self.mean_expression(s), g.baseline_R
      )
      for s, g in enumerate(self.genes)
    )
    self.drugs = _draw_drugs(config, self.genes)

  def mean_expression(
    self, species: int, perturbation: perturb_lib.Perturbation | None = None
  ) -> np.ndarray:
    """Expression at the noise-free state of each type, float64.

    Absolute; the sum over genes is 1 for a mean cell. Cells outside the cell
    cycle.
    """
    num_tfs = len(self.networks[species].tf_rows_T)
    drive_TY = np.zeros((num_tfs, self.config.num_types))
    drive_TY[self._masters[species]] = np.where(
      self.types.active_YM, self.config.master_on, self.config.master_off
    ).T
    return self._expression(
      species,
      drive_TY,
      phase_C=np.full(self.config.num_types, np.nan),
      edit=self._edit(species, perturbation, np.float64),
    ).T

  def sample(
    self,
    num_cells: int,
    species: int,
    start: int = 0,
    perturbation: perturb_lib.Perturbation | None = None,
  ) -> cells_lib.SimulatedCells:
    """Cells `start` to `start + num_cells` of a species.

    A cell depends on the configuration and its index alone, so an atlas of
    any size can be streamed in chunks (multiples of 256 waste nothing). With
    a perturbation these are the same latent cells, with the same noise of
    measurement: genes that it does not reach keep their counts.

    Args:
      num_cells: how many.
      species: 0 human, 1 mouse.
      start: index of the first.
      perturbation: what is done to all of them.

    Raises:
      UserError: a negative index or number, or a perturbation without a gene
        of this species.
    """
    first, stop = _blocks(num_cells, start)
    edit = self._edit(species, perturbation, np.float32)
    columns, counts = [], []
    for index in range(first, stop):
      block, mean_RC = self._block(species, index, edit)
      design = self.designs[species]
      scale_C = design.umis_U[block.batch_C] * block.library_C
      mean_RC *= np.take(design.capture_UR.T, block.batch_C, 1)
      mean_RC += np.take(design.ambient_UR.T, block.batch_C, 1)
      mean_RC *= scale_C
      rng = config_lib.generator(self.config.seed, 'counts', species, index)
      counts_RC = cells_lib.draw_counts(
        rng, mean_RC, self.genes[species].size_R
      )
      low = max(start - index * cells_lib.BLOCK, 0)
      high = min(start + num_cells - index * cells_lib.BLOCK, cells_lib.BLOCK)
      counts.append(_to_csr(counts_RC[:, low:high]))
      columns.append(
        {k: v[low:high] for k, v in self._obs(species, block).items()}
      )
    number = sum(len(c['species']) for c in columns)
    name, dose = 'control', 0.0
    if perturbation is not None:
      name, dose = perturbation.name, perturbation.dose
    empty = sparse.csr_matrix((0, len(self.genes[species])), dtype=np.int32)
    obs = {k: np.concatenate([c[k] for c in columns]) for k in columns[0]}
    obs['perturbation'] = np.full(number, name)
    obs['dose'] = np.full(number, dose, np.float32)
    return cells_lib.SimulatedCells(
      species=species,
      gene_ids=self.genes[species].gene_ids,
      symbols=self.genes[species].symbols,
      counts=sparse.vstack(counts, 'csr') if counts else empty,
      measured=self.designs[species].measured,
      obs=obs,
    )

  def expression(
    self,
    num_cells: int,
    species: int,
    start: int = 0,
    perturbation: perturb_lib.Perturbation | None = None,
  ) -> np.ndarray:
    """Latent expression of the cells that `sample` gives, float32 [C, R].

    Before capture, ambient RNA and library size; the sum over genes is 1 for
    a mean cell.
    """
    first, stop = _blocks(num_cells, start)
    edit = self._edit(species, perturbation, np.float32)
    parts = [
      self._block(species, index, edit)[1].T for index in range(first, stop)
    ]
    offset = start - first * cells_lib.BLOCK
    return np.concatenate(parts)[offset : offset + num_cells]

  def counterfactual(
    self,
    perturbation: perturb_lib.Perturbation,
    num_cells: int,
    species: int,
    start: int = 0,
  ) -> tuple[cells_lib.SimulatedCells, cells_lib.SimulatedCells, np.ndarray]:
    """Cells, the same cells perturbed, and the true effect in each.

    Returns:
      `(control, perturbed, log2_fold_CR)`; the fold is that of the latent
      expression: 0 where nothing changes, -inf for a gene knocked out, nan
      for silent genes.
    """
    arguments = (num_cells, species, start)
    return (
      self.sample(*arguments),
      self.sample(*arguments, perturbation),
      _log2_fold(
        self.expression(*arguments, perturbation), self.expression(*arguments)
      ),
    )

  def screen(
    self,
    perturbations: Sequence[perturb_lib.Perturbation],
    cells_each: int,
    species: int,
    start: int = 0,
  ) -> cells_lib.SimulatedCells:
    """A perturbation experiment: controls first, no cell twice."""
    return cells_lib.concatenate(
      [
        self.sample(cells_each, species, start + i * cells_each, perturbation)
        for i, perturbation in enumerate([None, *perturbations])
      ]
    )

  def effects(
    self, perturbation: perturb_lib.Perturbation, species: int
  ) -> perturb_lib.Effects:
    """The true effect on each type of a species, and which genes it reaches."""
    genes, network = self.genes[species], self.networks[species]
    R = len(genes)
    rows = self._edit(species, perturbation, np.float64).rows
    tfs = np.flatnonzero(np.isin(network.tf_rows_T, rows))
    is_perturbed_R = np.isin(np.arange(R), rows)
    is_direct_R = np.zeros(R, bool)
    is_direct_R[network.target_E[np.isin(network.tf_E, tfs)]] = True
    is_descendant_R = network.reach[tfs].any(0)
    # Masters have no regulators, and so no siblings.
    wanted = {network.regulators[r] for r in rows} - {frozenset()}
    is_sibling_R = np.array([s in wanted for s in network.regulators])
    is_sibling_R &= ~is_descendant_R & ~is_perturbed_R
    present_Y = self.types.share_SY[species] > 0
    fold_YR = _log2_fold(
      self.mean_expression(species, perturbation),
      self.mean_expression(species),
    )
    return perturb_lib.Effects(
      gene_ids=genes.gene_ids,
      types=tuple(np.array(self.types.names)[present_Y].tolist()),
      log2_fold_YR=fold_YR[present_Y],
      is_perturbed_R=is_perturbed_R,
      is_direct_R=is_direct_R,
      is_descendant_R=is_descendant_R,
      is_sibling_R=is_sibling_R,
      is_null_R=~(is_descendant_R | is_sibling_R | is_perturbed_R),
    )

  def _edit(self, species, perturbation, dtype) -> perturb_lib.Edit | None:
    if perturbation is None:
      return None
    return perturb_lib.Edit(
      perturbation,
      self.genes[species].gene_ids,
      self.networks[species].tf_rows_T,
      dtype,
    )

  def _expression(self, species, drive_TC, **rest) -> np.ndarray:
    return cells_lib.expression(
      self.config,
      self.genes[species],
      self.networks[species],
      drive_TC,
      **rest,
    )

  def _block(self, species, index, edit):
    """Latent state of a block of cells, and its expression [R, BLOCK]."""
    block = cells_lib.draw_block(
      self.config,
      species,
      index,
      self.types,
      self.designs[species],
      len(self.networks[species].tf_rows_T),
      self._masters[species],
    )
    expression_RC = self._expression(
      species,
      block.drive_TC,
      noise_TC=block.activity_noise_TC,
      phase_C=block.phase_C,
      edit=edit,
    )
    return block, expression_RC

  def _obs(self, species, block) -> dict[str, np.ndarray]:
    design = self.designs[species]
    phase = np.where(block.phase_C < np.pi, 'S', 'G2M')
    return {
      'species': np.full(cells_lib.BLOCK, gene_table.SPECIES[species]),
      'cell_type': np.array(self.types.names)[block.type_C],
      'study': design.study_U[block.batch_C],
      'donor': design.donor_U[block.batch_C],
      'batch': design.batch_U[block.batch_C],
      'tissue': design.tissue_U[block.batch_C],
      'assay': design.assay_U[block.batch_C],
      'pseudotime': block.pseudotime_C,
      'phase': np.where(np.isnan(block.phase_C), 'G1', phase),
    }


def _blocks(num_cells: int, start: int) -> tuple[int, int]:
  if num_cells < 1 or start < 0:
    raise errors.UserError(
      f'{num_cells=} must be positive and {start=} not negative'
    )
  return start // cells_lib.BLOCK, -(-(start + num_cells) // cells_lib.BLOCK)


def _to_csr(counts_RC: np.ndarray) -> sparse.csr_matrix:
  counts_CR = np.ascontiguousarray(counts_RC.T)
  flat = np.flatnonzero(counts_CR)
  C, R = counts_CR.shape
  starts = np.searchsorted(flat, np.arange(C + 1) * R)
  return sparse.csr_matrix(
    (
      counts_CR.ravel()[flat].astype(np.int32),
      (flat % R).astype(np.int32),
      starts.astype(np.int32),
    ),
    shape=(C, R),
  )


def _log2_fold(after: np.ndarray, before: np.ndarray) -> np.ndarray:
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.log2(after / before)


def _draw_drugs(config, genes) -> tuple[perturb_lib.Drug, ...]:
  """Drugs against TFs that both species have."""
  rng = config_lib.generator(config.seed, 'drugs')
  human, mouse = genes
  row_of = {int(h): r for r, h in enumerate(mouse.human_R) if h >= 0}
  tfs = np.flatnonzero((human.role_R == genes_lib.TF) & human.one_to_one_R)
  drugs = []
  for i in range(config.num_drugs):
    rows = rng.choice(tfs, rng.integers(1, 4), replace=False)
    drugs.append(
      perturb_lib.Drug(
        name=f'drug_{i:02d}',
        gene_ids=(
          *(human.gene_ids[r] for r in rows),
          *(mouse.gene_ids[row_of[int(r)]] for r in rows),
        ),
        half_dose=float(np.exp(rng.standard_normal())),
        hill=float(rng.uniform(1, 2)),
      )
    )
  return tuple(drugs)
