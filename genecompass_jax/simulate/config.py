"""The knobs of the simulated atlas, and its source of randomness."""

import dataclasses
import hashlib
import json

import numpy as np

from genecompass_jax import errors

ASSAYS = ('deep', 'shallow', 'panel')


@dataclasses.dataclass(frozen=True)
class AtlasConfig:
  """Everything that decides what an atlas is; two equal configs, one atlas.

  Numbers without a source were tuned until the cells met the bounds in
  tests/test_simulate.py against real cells (Kang 2018, Zheng 2017, Nowotschin
  2019), and then frozen: that test holds their sha256. Logarithms are natural.

  Attributes:
    seed: of all randomness.
    num_genes: genes of each species, of which `one_to_one` is the share with
      exactly one orthologue, and `one_to_many` the number of groups of one
      gene here and two there.
    num_tfs: transcription factors of a species; `num_masters` of them have no
      regulator and set the cell type.
    housekeeping, unregulated, silent: share of the other genes that no TF
      reaches, named apart because analyses treat them apart; silent genes are
      not expressed. `num_cycle_genes` follow the cell cycle alone.
    family_share: share of genes in families of 2 to 20.
    baseline_sd, baseline_cap: log expression is normal, cut at the cap.
    baseline_drift: sd of its change between orthologues.
    mean_regulators: per regulated gene; in-degree is 1 + geometric, at most 10.
    out_degree_sd: sd of the log chance of a TF to be drawn as a regulator;
      masters are drawn `master_degree` times as often.
    repressors: share of TFs that repress; one edge in ten goes against.
    weight, response: a gene responds with response * tanh(sum of weight *
      (activity - 1/2)), in log expression.
    feedback: chance that a regulator of a TF may stand below it.
    family_pull: chance that a regulator is drawn from those of the family.
    paralogue_pull: chance that a paralogue joins a TF as a regulator.
    siblings_per_tf: genes given exactly the regulators of a TF.
    conserved: chance that mouse keeps a human edge between genes with one
      orthologue each; a little less of the edges are then shared by both.
    num_types: cell types, in a tree. The last ones have the `rare_shares`; the
      one before them exists in human only.
    num_trajectories: edges of the type tree with cells in `transit` (share of
      the cells of both types) along it.
    master_on, master_off: log expression of a master, against its baseline.
    tf_noise, activity_noise: sd per cell of the log expression of a TF, and of
      its activity beyond expression.
    dispersion, dispersion_sd: median and log sd of the size parameter of the
      negative binomial (its variance is m + m^2 / size).
    cycle_amplitude: of cell-cycle genes. `cycling`: mean share of cells.
    assays: of each study, in order.
    donors_per_study, batches_per_donor, num_tissues: the design.
    composition_sd: log sd of the shares of common types, by donor and tissue.
    study_sd, donor_sd, batch_sd: log sd of a shift per gene.
    ambient: mean share of a batch's molecules from its ambient profile.
    deep_umis, shallow_umis: molecules of a mean cell with every gene measured;
      a panel has the efficiency of `deep`. `library_sd`: log sd per cell.
    panel_genes: number of genes that a panel measures.
    num_drugs: drugs that inhibit one to three TFs.

  Raises:
    UserError: a value is out of range.
  """

  seed: int = 0
  num_genes: int = 2000
  one_to_one: float = 0.8
  one_to_many: int = 30
  num_tfs: int = 120
  num_masters: int = 14
  housekeeping: float = 0.1
  unregulated: float = 0.15
  silent: float = 0.05
  num_cycle_genes: int = 60
  family_share: float = 0.5
  baseline_sd: float = 1.45
  baseline_cap: float = 3.0
  baseline_drift: float = 0.4
  mean_regulators: float = 3.0
  out_degree_sd: float = 1.0
  master_degree: float = 3.0
  repressors: float = 0.25
  weight: float = 1.5
  response: float = 1.6
  feedback: float = 0.1
  family_pull: float = 0.5
  paralogue_pull: float = 0.3
  siblings_per_tf: int = 2
  conserved: float = 0.73
  num_types: int = 12
  rare_shares: tuple[float, ...] = (0.01, 0.0005)
  num_trajectories: int = 3
  transit: float = 0.3
  master_on: float = 1.0
  master_off: float = -2.0
  tf_noise: float = 0.6
  activity_noise: float = 0.3
  dispersion: float = 3.5
  dispersion_sd: float = 0.4
  cycle_amplitude: float = 1.0
  cycling: float = 0.15
  assays: tuple[str, ...] = (
    'deep',
    'shallow',
    'deep',
    'shallow',
    'shallow',
    'panel',
  )
  donors_per_study: int = 3
  batches_per_donor: int = 2
  num_tissues: int = 3
  composition_sd: float = 0.4
  study_sd: float = 0.2
  donor_sd: float = 0.1
  batch_sd: float = 0.08
  ambient: float = 0.05
  deep_umis: float = 3300.0
  shallow_umis: float = 1750.0
  library_sd: float = 0.4
  panel_genes: int = 300
  num_drugs: int = 24

  def __post_init__(self):
    for assay in self.assays:
      if assay not in ASSAYS:
        raise errors.UserError(f'assays: {assay!r} is none of {ASSAYS}')
    if not 1 < self.num_masters < self.num_tfs < self.num_genes // 4:
      raise errors.UserError(
        'num_masters, num_tfs: masters are some of the TFs, and TFs are less '
        f'than a quarter of num_genes={self.num_genes}'
      )
    if self.num_types < len(self.rare_shares) + 2:
      raise errors.UserError(
        f'num_types={self.num_types} leaves no common types; raise it'
      )
    if self.num_types > 2 ** (self.num_masters - 2):
      raise errors.UserError(
        f'num_masters={self.num_masters} masters have too few states for '
        f'num_types={self.num_types}; raise num_masters'
      )
    if not 0 < self.panel_genes <= self.num_genes:
      raise errors.UserError(
        f'panel_genes={self.panel_genes} is not in 1..num_genes'
      )

  @property
  def sha256(self) -> str:
    """Digest of all values: what a result says it was made on."""
    values = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
  """A counter-based stream that depends on nothing but its arguments."""
  name = '/'.join(map(str, (seed, purpose, *index)))
  key = hashlib.blake2b(name.encode(), digest_size=16).digest()
  return np.random.Generator(np.random.Philox(key=np.frombuffer(key, '<u8')))
