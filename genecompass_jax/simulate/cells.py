"""Cell types, the design of the studies, and cells drawn from both."""

import dataclasses

import numpy as np
from scipy import sparse

from genecompass_jax import gene_table
from genecompass_jax.simulate import (
  config as config_lib,
  genes as genes_lib,
  network as network_lib,
  perturb as perturb_lib,
)

# Cells are drawn in whole blocks of this size, so that a cell does not depend
# on where a chunk starts or ends.
BLOCK = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Types:
  """Y cell types, as states of M masters, in a tree.

  Attributes:
    names: of the types.
    parent_Y: the type each came from, -1 for the first.
    active_YM: True where a master is on; masters in the order of
      the human genes.
    share_SY: of each species' cells; 0 where a species lacks the type.
    is_rare_Y: its share is the same in every donor.
    trajectories: (start, goal) pairs of types; no type stands in two.
    cycling_Y: share of cells in the cell cycle.
  """

  names: tuple[str, ...]
  parent_Y: np.ndarray
  active_YM: np.ndarray
  share_SY: np.ndarray
  is_rare_Y: np.ndarray
  trajectories: tuple[tuple[int, int], ...]
  cycling_Y: np.ndarray


def draw_types(config: config_lib.AtlasConfig) -> Types:
  """A tree in which a type differs from its parent by one to three masters."""
  rng = config_lib.generator(config.seed, 'types')
  Y, M = config.num_types, config.num_masters
  active_YM = np.zeros((Y, M), bool)
  parent_Y = np.full(Y, -1)
  active_YM[0, rng.permutation(M)[: min(3, M // 2)]] = True
  for y in range(1, Y):
    while True:
      parent_Y[y] = rng.integers(y)
      state_M = active_YM[parent_Y[y]].copy()
      off = rng.permutation(np.flatnonzero(~state_M))
      state_M[off[: rng.integers(1, 3)]] = True
      if rng.random() < 0.8:
        state_M[rng.choice(np.flatnonzero(state_M))] = False
      if not (active_YM[:y] == state_M).all(1).any():
        break
    active_YM[y] = state_M
  rare = np.array(config.rare_shares)
  common = Y - len(rare)
  share_SY = np.zeros((2, Y))
  share_SY[:, common:] = rare
  weight_Y = 0.25 + rng.dirichlet(np.full(common, 2.0)) * common
  for s in range(2):
    weight_sY = weight_Y.copy()
    weight_sY[-1] *= s == 0  # the last common type exists in human only
    share_SY[s, :common] = (1 - rare.sum()) * weight_sY / weight_sY.sum()
  return Types(
    names=tuple(f'type_{y:02d}' for y in range(Y)),
    parent_Y=parent_Y,
    active_YM=active_YM,
    share_SY=share_SY,
    is_rare_Y=np.arange(Y) >= common,
    trajectories=_draw_trajectories(rng, parent_Y, common - 1, config),
    cycling_Y=rng.beta(1, 1 / config.cycling - 1, Y),
  )


def _draw_trajectories(rng, parent_Y, num_shared, config):
  """Edges of the tree between types of both species, no type in two."""
  best = []
  for _ in range(100):
    used, chosen = set(), []
    for y in 1 + rng.permutation(num_shared - 1):
      pair = (int(parent_Y[y]), int(y))
      if not used & set(pair) and len(chosen) < config.num_trajectories:
        chosen.append(pair)
        used |= set(pair)
    best = max(best, chosen, key=len)
  return tuple(best)


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
  """The U batches of one species: what a library is and how it distorts.

  Attributes:
    study_U, donor_U, batch_U, tissue_U, assay_U: names.
    cumulative_UY: cumulated shares of the types.
    capture_UR: factor on the expression of each gene; 0 where not measured.
    ambient_UR: what each gene gets from the ambient profile.
    umis_U: molecules of a mean cell, were every gene measured.
    measured: by study, bool [R].
  """

  study_U: np.ndarray
  donor_U: np.ndarray
  batch_U: np.ndarray
  tissue_U: np.ndarray
  assay_U: np.ndarray
  cumulative_UY: np.ndarray
  capture_UR: np.ndarray
  ambient_UR: np.ndarray
  umis_U: np.ndarray
  measured: dict[str, np.ndarray]


def draw_design(
  config: config_lib.AtlasConfig,
  species: int,
  types: Types,
  mean_YR: np.ndarray,
  baseline_R: np.ndarray,
) -> Design:
  """Studies, donors and batches of a species.

  Args:
    config: of the atlas.
    species: its code.
    types: of the atlas.
    mean_YR: expression of each type, 1 in sum for a mean cell.
    baseline_R: -inf for silent genes, which no panel measures.
  """
  rng = config_lib.generator(config.seed, 'design', species)
  Y, R = mean_YR.shape
  panel_R = np.zeros(R, bool)
  open_R = rng.permutation(np.flatnonzero(np.isfinite(baseline_R)))
  # Panels leave out what they cannot see: genes of the lower third.
  low = np.quantile(baseline_R[open_R], 1 / 3)
  order = np.argsort(baseline_R[open_R] < low, kind='stable')
  panel_R[open_R[order[: config.panel_genes]]] = True
  prefix = gene_table.SPECIES[species]
  tissue_log_VY = config.composition_sd * rng.standard_normal(
    (config.num_tissues, Y)
  )
  columns = {
    name: [] for name in ('study', 'donor', 'batch', 'tissue', 'assay')
  }
  cumulative, capture, ambient, umis, measured = [], [], [], [], {}
  for z, assay in enumerate(config.assays):
    study = f'{prefix}_study{z}'
    measured[study] = panel_R if assay == 'panel' else np.ones(R, bool)
    study_R = config.study_sd * rng.standard_normal(R)
    tissue = z % config.num_tissues
    for d in range(config.donors_per_study):
      donor_R = study_R + config.donor_sd * rng.standard_normal(R)
      log_Y = config.composition_sd * rng.standard_normal(Y)
      share_Y = types.share_SY[species] * np.where(
        types.is_rare_Y, 1, np.exp(log_Y + tissue_log_VY[tissue])
      )
      rare = share_Y[types.is_rare_Y].sum()
      share_Y[~types.is_rare_Y] *= (1 - rare) / share_Y[~types.is_rare_Y].sum()
      for b in range(config.batches_per_donor):
        factor_R = np.exp(donor_R + config.batch_sd * rng.standard_normal(R))
        dirt = config.ambient * np.exp(0.5 * rng.standard_normal() - 0.125)
        soup_R = (share_Y @ mean_YR) * factor_R
        capture.append((1 - dirt) * factor_R * measured[study])
        ambient.append(dirt * soup_R * measured[study])
        cumulative.append(np.cumsum(share_Y))
        level = config.shallow_umis if assay == 'shallow' else config.deep_umis
        umis.append(level * np.exp(0.1 * rng.standard_normal()))
        columns['study'].append(study)
        columns['donor'].append(f'{study}_donor{d}')
        columns['batch'].append(f'{study}_donor{d}_batch{b}')
        columns['tissue'].append(f'tissue{tissue}')
        columns['assay'].append(assay)
  return Design(
    **{f'{name}_U': np.array(values) for name, values in columns.items()},
    cumulative_UY=np.array(cumulative),
    capture_UR=np.array(capture, np.float32),
    ambient_UR=np.array(ambient, np.float32),
    umis_U=np.array(umis, np.float32),
    measured=measured,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class SimulatedCells:
  """C cells of one species.

  Attributes:
    species: its code.
    gene_ids, symbols: the R genes.
    counts: int32 [C, R]; 0 where a gene was not measured.
    measured: by study, bool [R]; where False, 0 says nothing.
    obs: columns of C values: species, cell_type, study, donor, batch, tissue,
      assay, perturbation, dose, pseudotime (nan for types that stand in no
      trajectory), phase.
  """

  species: int
  gene_ids: tuple[str, ...]
  symbols: tuple[str, ...]
  counts: sparse.csr_matrix
  measured: dict[str, np.ndarray]
  obs: dict[str, np.ndarray]

  def __len__(self) -> int:
    return self.counts.shape[0]

  @property
  def totals(self) -> np.ndarray:
    """Counts of each cell over the measured genes, float64."""
    return np.asarray(self.counts.sum(1), np.float64).ravel()

  def select(self, cells: np.ndarray) -> 'SimulatedCells':
    """Some cells, by index or bool mask."""
    return dataclasses.replace(
      self,
      counts=self.counts[cells],
      obs={name: values[cells] for name, values in self.obs.items()},
    )


def concatenate(parts: list[SimulatedCells]) -> SimulatedCells:
  """Cells of one species, one part after the other."""
  return dataclasses.replace(
    parts[0],
    counts=sparse.vstack([p.counts for p in parts], 'csr'),
    obs={
      name: np.concatenate([p.obs[name] for p in parts])
      for name in parts[0].obs
    },
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """The latent state of BLOCK cells: what a perturbation does not change."""

  batch_C: np.ndarray
  type_C: np.ndarray
  pseudotime_C: np.ndarray
  phase_C: np.ndarray  # in radians; nan outside the cycle
  drive_TC: np.ndarray
  activity_noise_TC: np.ndarray
  library_C: np.ndarray


def draw_block(
  config: config_lib.AtlasConfig,
  species: int,
  index: int,
  types: Types,
  design: Design,
  num_tfs: int,
  masters: np.ndarray,
) -> Block:
  """Block `index` of the cells of a species.

  `masters` are TF numbers, in the order of the types' states.
  """
  rng = config_lib.generator(config.seed, 'cells', species, index)
  T = num_tfs
  batch_C = rng.integers(len(design.study_U), size=BLOCK)
  passed_CY = rng.random(BLOCK)[:, None] >= design.cumulative_UY[batch_C]
  type_C = np.minimum(passed_CY.sum(1), len(types.names) - 1)
  moving_C = rng.random(BLOCK) < config.transit
  way_C = rng.random(BLOCK) / 2
  goal_Y = np.arange(len(types.names))
  start_Y = goal_Y.copy()
  for start, goal in types.trajectories:
    start_Y[goal], goal_Y[start] = start, goal
  time_C = np.full(BLOCK, np.nan, np.float32)
  on_way_C = start_Y[type_C] != goal_Y[type_C]
  is_goal_C = goal_Y[type_C] == type_C
  time_C[on_way_C] = np.where(
    is_goal_C,
    np.where(moving_C, 1 - way_C, 1.0),
    np.where(moving_C, way_C, 0.0),
  )[on_way_C]
  drive_YM = np.where(types.active_YM, config.master_on, config.master_off)
  part_C = np.nan_to_num(time_C)[:, None]
  drive_CM = (1 - part_C) * drive_YM[start_Y[type_C]]
  drive_CM += part_C * drive_YM[goal_Y[type_C]]
  noise_TC = rng.standard_normal((2, T, BLOCK), np.float32)
  drive_TC = np.float32(config.tf_noise) * noise_TC[0]
  drive_TC[masters] += drive_CM.T.astype(np.float32)
  phase_C = np.where(
    rng.random(BLOCK) < types.cycling_Y[type_C],
    rng.uniform(0, 2 * np.pi, BLOCK),
    np.nan,
  )
  return Block(
    batch_C=batch_C,
    type_C=type_C,
    pseudotime_C=time_C,
    phase_C=phase_C,
    drive_TC=drive_TC,
    activity_noise_TC=np.float32(config.activity_noise) * noise_TC[1],
    library_C=np.exp(
      config.library_sd * rng.standard_normal(BLOCK, np.float32)
    ),
  )


def expression(
  config: config_lib.AtlasConfig,
  genes: genes_lib.Genes,
  network: network_lib.Network,
  drive_TC: np.ndarray,
  noise_TC: np.ndarray | None = None,
  phase_C: np.ndarray | None = None,
  edit: perturb_lib.Edit | None = None,
) -> np.ndarray:
  """Expression of R genes in C cells, before any technical effect.

  Absolute, not a share of the cell: a gene that a perturbation does not reach
  keeps its value to the last bit.
  """
  dtype = drive_TC.dtype
  d_TC, a_TC = network_lib.activity(network, drive_TC, edit, noise_TC)
  log_RC = network.weights.astype(dtype) @ (a_TC - dtype.type(0.5))
  np.tanh(log_RC, out=log_RC)
  log_RC *= dtype.type(network.response)
  log_RC[network.tf_rows_T] = d_TC
  if phase_C is not None:
    rows = np.flatnonzero(genes.role_R == genes_lib.CYCLE)
    angle_RC = phase_C - genes.peak_R[rows][:, None]
    wave_RC = np.where(np.isnan(angle_RC), -1.0, np.cos(angle_RC))
    log_RC[rows] = config.cycle_amplitude * wave_RC
  log_RC += genes.baseline_R.astype(dtype)[:, None]
  np.exp(log_RC, out=log_RC)
  if edit is not None:
    # TFs carry their edit already.
    is_other = genes.role_R[edit.rows] != genes_lib.TF
    rows = edit.rows[is_other]
    base_RC = np.exp(genes.baseline_R[rows]).astype(dtype)[:, None]
    log_RC[rows] = (
      log_RC[rows] * edit.scale[is_other] + base_RC * edit.added[is_other]
    )
  return log_RC


def draw_counts(
  rng: np.random.Generator, mean_RC: np.ndarray, size_R: np.ndarray
) -> np.ndarray:
  """Negative binomial counts, uint16, from one uniform number each.

  Inverting the distribution, not a rejection sampler: the same stream gives
  the same count wherever the mean is the same, and a larger one where the
  mean is larger. That is what pairs a cell with its perturbed self.

  Args:
    rng: its next R * C float32 numbers are used.
    mean_RC: float32 means.
    size_R: size parameter; the variance is mean + mean^2 / size.
  """
  uniform_RC = rng.random(mean_RC.shape, np.float32)
  size_R = size_R.astype(np.float32)[:, None]
  # P(0) = (1 + mean / size)^-size
  zero_RC = np.exp(-size_R * np.log1p(mean_RC / size_R))
  counts_RC = np.zeros(mean_RC.shape, np.uint16)
  flat = np.flatnonzero(uniform_RC >= zero_RC)
  size = size_R[flat // mean_RC.shape[1], 0].astype(np.float64)
  mean = mean_RC.ravel()[flat].astype(np.float64)
  odds = mean / (mean + size)
  chance = zero_RC.ravel()[flat].astype(np.float64)
  left = uniform_RC.ravel()[flat] - chance
  counts = counts_RC.ravel()
  k = 0
  while len(flat) and k < np.iinfo(np.uint16).max:
    chance = chance * odds * (k + size) / (k + 1)
    k += 1
    counts[flat] = k
    left = left - chance
    go = left >= 0
    # Past the mean, a chance below the grain of the uniform ends the search.
    go &= (chance > 1e-9) | (k < mean)
    flat, size, mean = flat[go], size[go], mean[go]
    odds, chance, left = odds[go], chance[go], left[go]
  return counts_RC
