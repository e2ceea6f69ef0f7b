"""What the experiments are: sizes, seeds, and a toy of them for tests."""

import dataclasses

from genecompass_jax import simulate
from genecompass_jax.analysis.perturbation import matching as matching_lib

HUMAN = 0
FAR = 1 << 20  # index of the first cell that is perturbed: none was trained on


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that decides what is run.

  Attributes:
    atlas: what cells are drawn from. Cells of less noise than real ones (three
      times the molecules of the default atlas, a sixth of its overdispersion):
      what is not there to be learned cannot be tested for.
    training_cells: human cells that the model and co-expression see.
    cells_per_donor: cells that are perturbed, of each donor.
    steps: updates of four cells each.
    seed: of the model; `random_seed` of the one that is not trained.
    least_fold: mean absolute log2 fold over types from which a gene counts as
      a true answer; those between it and exactly 0 are left out.
    matching: of targets with null genes.
  """

  atlas: simulate.AtlasConfig = simulate.AtlasConfig(
    num_genes=600,
    num_tfs=60,
    num_cycle_genes=30,
    one_to_many=10,
    panel_genes=150,
    num_drugs=2,
    assays=('deep', 'shallow', 'deep'),
    deep_umis=10_000.0,
    shallow_umis=5_000.0,
    dispersion=20.0,
  )
  training_cells: int = 3000
  cells_per_donor: int = 10
  steps: int = 4000
  seed: int = 0
  random_seed: int = 1000
  least_fold: float = 0.05
  matching: matching_lib.MatchingConfig = matching_lib.MatchingConfig()


SMOKE = Settings(
  atlas=simulate.AtlasConfig(
    num_genes=200,
    num_tfs=24,
    num_masters=6,
    num_cycle_genes=10,
    one_to_many=4,
    num_types=6,
    num_trajectories=1,
    panel_genes=40,
    num_drugs=2,
    assays=('deep', 'shallow'),
  ),
  training_cells=120,
  cells_per_donor=5,
  steps=4,
  matching=matching_lib.MatchingConfig(calipers=(2.0, 2.0, 2.0), fewest=5),
)
