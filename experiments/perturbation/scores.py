"""Methods against the truth: type I error, power, and who answers."""

import dataclasses

import numpy as np
import scipy.stats

from experiments.perturbation import atlas_cells
from genecompass_jax.analysis.perturbation import statistics

ALPHA = statistics.ALPHA
KINDS = (
  *(atlas_cells.EASY, atlas_cells.SIBLING, atlas_cells.CYCLE),
  atlas_cells.REGULATOR,
)


def area(score: np.ndarray, is_true: np.ndarray) -> float:
  """AUROC, ties counting half; NaN without both kinds. NaN scores are out."""
  kept = np.isfinite(score)
  score, is_true = score[kept], is_true[kept]
  positive, negative = is_true.sum(), (~is_true).sum()
  if not positive or not negative:
    return np.nan
  ranks = scipy.stats.rankdata(score)
  above = ranks[is_true].sum() - positive * (positive + 1) / 2
  return float(above / positive / negative)


@dataclasses.dataclass(frozen=True)
class CellScore:
  """How a method does on cells as a whole.

  Attributes:
    called: by kind and p (`p_normal`, `p_empirical`): share of genes below
      `ALPHA`; NaN without p.
    tested: by kind: genes with a z.
    too_few: by kind: genes without enough nulls.
    auroc: regulators against leaf genes, by z.
    auroc_raw: the same by the bare effect.
    spearman: z and true total effect among regulators.
  """

  called: dict[tuple[str, str], float]
  tested: dict[str, int]
  too_few: dict[str, int]
  auroc: float
  auroc_raw: float
  spearman: float


def of_cells(
  tests: statistics.Tests, kind_T: np.ndarray, total_T: np.ndarray
) -> CellScore:
  """Scores targets of known kind."""
  called, tested, too_few = {}, {}, {}
  for kind in KINDS:
    z = tests.z_T[kind_T == kind]
    tested[kind] = int(np.isfinite(z).sum())
    too_few[kind] = int((~np.isfinite(z)).sum())
    for name in ('p_normal', 'p_empirical'):
      p = getattr(tests, f'{name}_T')[kind_T == kind]
      p = p[np.isfinite(p)]
      called[kind, name] = float((p < ALPHA).mean()) if len(p) else np.nan
  is_true_T = kind_T == atlas_cells.REGULATOR
  pair_T = is_true_T | (kind_T == atlas_cells.EASY)
  of_true = is_true_T & np.isfinite(tests.z_T)
  return CellScore(
    called=called,
    tested=tested,
    too_few=too_few,
    auroc=area(tests.z_T[pair_T], is_true_T[pair_T]),
    auroc_raw=area(tests.effect_T[pair_T], is_true_T[pair_T]),
    spearman=float(
      scipy.stats.spearmanr(tests.z_T[of_true], total_T[of_true]).statistic
    )
    if of_true.sum() > 2
    else np.nan,
  )


@dataclasses.dataclass(frozen=True)
class AnswerScore:
  """How a method ranks the genes that answer; one value a regulator.

  Attributes:
    true_N: AUROC of true answers against genes that are truly untouched.
    sibling_N: AUROC of siblings against them: .5 is right, more is fooled.
  """

  true_N: np.ndarray
  sibling_N: np.ndarray


def of_answers(
  score_NG: np.ndarray, answer_NG: np.ndarray, sibling_NG: np.ndarray
) -> AnswerScore:
  """Scores N regulators.

  Args:
    score_NG: of a method, more is answering.
    answer_NG: 1 true, 0 untouched, -1 left out.
    sibling_NG: bool.
  """
  true_N, sibling_N = [], []
  for score_G, answer_G, sibling_G in zip(score_NG, answer_NG, sibling_NG):
    untouched_G = (answer_G == 0) & ~sibling_G
    for found, positive_G in (
      (true_N, answer_G == 1),
      (sibling_N, sibling_G & (answer_G == 0)),
    ):
      kept_G = positive_G | untouched_G
      found.append(area(score_G[kept_G], positive_G[kept_G]))
  return AnswerScore(np.array(true_N), np.array(sibling_N))


def interval(values_N: np.ndarray) -> tuple[float, float, float, int]:
  """Mean, 95 % bootstrap over regulators, and how many have a value."""
  values = values_N[np.isfinite(values_N)]
  if len(values) < statistics.MIN_UNITS:
    mean = float(values.mean()) if len(values) else np.nan
    return mean, np.nan, np.nan, len(values)
  rng = np.random.Generator(np.random.Philox(0))
  draws = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
  low, high = np.quantile(draws, [0.025, 0.975])
  return float(values.mean()), float(low), float(high), len(values)
