"""What the study is: sizes, seeds, margins; and a toy of it for tests."""

import dataclasses

from experiments.knowledge_study import arms
from genecompass_jax import simulate

PILOT, FIDELITY, PRIMARY = 'pilot', 'fidelity', 'primary'
SECONDARY, REAL, EXPLORATORY = 'secondary', 'real', 'exploratory'
SCORE_FORMAT = 5  # of score.json; others are made again, without training
STAGES = (PILOT, FIDELITY, PRIMARY, SECONDARY, REAL, EXPLORATORY)

# Cells of less noise than real ones: ten times the molecules of the default
# atlas, a sixth of its overdispersion, forty types for twelve. In the default
# atlas the genes of the 63 highest ranks are mostly noise: who knows the type of
# each cell guesses a hidden one by 0.17 nats better than who does not, and here
# by 0.71 (room.py). What is not there to be known, no knowledge can teach.
ATLAS = simulate.AtlasConfig(
  deep_umis=33_000.0, shallow_umis=17_500.0, dispersion=20.0, num_types=40
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that decides what is run and what may be concluded.

  Attributes:
    atlas: what the simulated cells are drawn from; frozen by its sha256.
    sizes: training cells of the corpora.
    other_sizes: those of the arms beside the pair.
    control_size: at which the study's own controls and the pilot are run.
    held_out_cells: of each species.
    steps: of every run.
    objective: of masking.
    pilot_seeds: of the two runs of each arm of the pair that give the spread;
      not used again.
    least_seeds: of the primary pair and of the controls that are tested.
    most_seeds: of those; what they cannot detect is then stated.
    other_seeds: of every other arm of the atlas.
    real_seeds: of the runs on real cells.
    detect: relative difference in id loss that is to be detected.
    alpha, power: of that.
    margins: relative differences that do not matter, by endpoint.
    folds: studies of the real cells that are held out, in turn.
    real_arms: of those runs.
    real_genes: tokens of the real corpora, at most.
    fidelities: of the study's own controls, see `arms.py`.
  """

  atlas: simulate.AtlasConfig = ATLAS
  sizes: tuple[int, ...] = (1024, 4096, 16384, 65536)
  other_sizes: tuple[int, ...] = (4096,)
  control_size: int = 4096
  held_out_cells: int = 768
  steps: int = 2000
  objective: str = 'split'
  pilot_seeds: tuple[int, ...] = (100, 101)
  least_seeds: int = 5
  most_seeds: int = 6  # more would not fit beside the other arms
  other_seeds: int = 3
  real_seeds: int = 2
  detect: float = 0.01
  alpha: float = 0.05
  power: float = 0.8
  margins: tuple[tuple[str, float], ...] = (('id', 0.01), ('value', 0.02))
  folds: tuple[str, ...] = ('kang', 'lung_lines', 'baron', 'mouse_embryo')
  real_arms: tuple[str, ...] = ('none', *arms.PAIR)
  real_genes: int = 4000
  fidelities: tuple[str, ...] = arms.FIDELITIES

  def seeds_of(self, fidelity: str, primary: int) -> int:
    """Seeds of a control: the ends of the scale are tested, others ordered."""
    return primary if fidelity in ('0', '1') else self.other_seeds


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
  ),
  sizes=(192,),
  other_sizes=(192,),
  control_size=192,
  held_out_cells=48,
  steps=4,
  least_seeds=2,
  most_seeds=2,
  other_seeds=1,
  folds=(),
  fidelities=(),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run of the study.

  Attributes:
    stage: it was planned for; other stages may use it too.
    arm: see `arms.py`.
    place: its corpus: a number of cells, or a study of real cells held out.
    seed: of parameters, order, masks and dropout.
  """

  stage: str
  arm: str
  place: str
  seed: int


def plan(settings: Settings, seeds: int) -> list[Run]:
  """All runs, in the order in which they are worth most.

  Args:
    settings: of the study.
    seeds: of the primary pair and the controls, as registered.
  """
  size = str(settings.control_size)
  runs = [
    Run(PILOT, arm, size, seed)
    for seed in settings.pilot_seeds
    for arm in arms.PAIR
  ]
  # The ends of the scale first: without them no other run says anything.
  order = sorted(settings.fidelities, key=('1', '0', '0.5', '0.25').index)
  for some in filter(None, (order[:2], order[2:])):
    runs += [
      Run(FIDELITY, f'{name}_{p}', size, seed)
      for seed in range(settings.seeds_of(some[0], seeds))
      for p in some
      for name in ('fidelity', 'permuted_fidelity')
    ]
  runs += [
    Run(PRIMARY, arm, str(cells), seed)
    for seed in range(seeds)
    for cells in settings.sizes
    for arm in arms.PAIR
  ]
  others = [arm for arm in arms.MAIN if arm not in arms.PAIR]
  runs += [
    Run(SECONDARY, arm, str(cells), seed)
    for seed in range(settings.other_seeds)
    for cells in settings.other_sizes
    for arm in others
  ]
  runs += [
    Run(REAL, arm, fold, seed)
    for seed in range(settings.real_seeds)
    for fold in settings.folds
    for arm in settings.real_arms
  ]
  runs += [
    Run(EXPLORATORY, arm, str(cells), seed)
    for seed in range(settings.other_seeds)
    for cells in settings.other_sizes
    for arm in arms.EXPLORATORY
  ]
  return runs
