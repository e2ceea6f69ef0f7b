"""Cell types from frozen features: a kNN and a linear probe, baselines beside.

All methods see the same cells, the same folds, the same k and the same
regularisation. Where cells come from several units (donors), a fold is a unit;
cells of one unit are split by themselves, which leaks, and the table says so.
"""

import dataclasses
import statistics
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse

from genecompass_jax import errors

TASK = 'cell_type_annotation'
KNN, LINEAR = 'knn_macro_f1', 'linear_macro_f1'
LEAVE_UNIT_OUT = 'leave one unit out'
WITHIN_SAMPLE = 'cells of one unit (leaky)'
MIN_UNITS = 6  # fewer independent units get no interval (SCIENCE rules)
CEILING = 0.97  # a baseline above it leaves nothing to compare
_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """How features are scored.

  Attributes:
    k: neighbours of the kNN probe; Euclidean, features as they are.
    inverse_penalty: C of the multinomial logistic regression on standardised
      features; fixed, not tuned.
    min_cells: classes with fewer cells are left out.
    folds: stratified folds, where cells are of one unit.
    seeds: of the folds, and of methods that are random themselves.
  """

  k: int = 15
  inverse_penalty: float = 1.0
  min_cells: int = 15
  folds: int = 5
  seeds: tuple[int, ...] = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Row:
  """A result; reports are group-bys over them.

  Attributes:
    task: name of the task.
    dataset: name of the cells.
    split: how training and test cells were kept apart.
    unit: the unit the value is of; '' for the mean over units, or where the
      cells are of one unit.
    seed: of folds and of random methods.
    method: features.
    checkpoint: hash of the model's parameters; '' for methods without one.
    step: training step of the checkpoint, -1 for none.
    metric: `knn_macro_f1` or `linear_macro_f1`.
    value: of the metric.
    n: units behind a mean over units, else cells.
    ci_low, ci_high: 95 % bootstrap over units; nan below six units.
    contaminated: whether the cells share a unit with the pretraining cells.
  """

  task: str
  dataset: str
  split: str
  unit: str
  seed: int
  method: str
  checkpoint: str
  step: int
  metric: str
  value: float
  n: int
  ci_low: float
  ci_high: float
  contaminated: bool


@dataclasses.dataclass(frozen=True)
class Features:
  """What a method makes of C cells.

  Attributes:
    values: float [C, D]; or [seeds, C, D] for a method that is random itself,
      one for each of `ProbeConfig.seeds`.
    checkpoint: hash of the parameters; '' for none.
    step: of the checkpoint.
  """

  values: np.ndarray
  checkpoint: str = ''
  step: int = -1


def pca(
  counts_CG: scipy.sparse.spmatrix | np.ndarray,
  *,
  num_components: int = 50,
  num_genes: int = 2000,
  target_sum: float = 1e4,
) -> np.ndarray:
  """The baseline: principal components of log-normalised counts.

  It is fitted on all cells given, without labels: it sees the test cells,
  which a pretrained model does not.

  Args:
    counts_CG: counts, cells x genes.
    num_components: at most.
    num_genes: the genes of largest variance are kept.
    target_sum: counts of a cell after normalisation.

  Returns:
    float64 [C, num_components or fewer].
  """
  counts_CG = scipy.sparse.csr_matrix(counts_CG, dtype=np.float64)
  totals_C = np.asarray(counts_CG.sum(1)).ravel()
  scale_C = target_sum / np.maximum(totals_C, 1.0)
  logs_CG = scipy.sparse.diags(scale_C) @ counts_CG
  logs_CG.data = np.log1p(logs_CG.data)
  mean_G = np.asarray(logs_CG.mean(0)).ravel()
  variance_G = np.asarray(logs_CG.power(2).mean(0)).ravel() - mean_G**2
  kept = np.sort(np.argsort(-variance_G, kind='stable')[:num_genes])
  dense_CG = logs_CG[:, kept].toarray() - mean_G[kept]
  left_CN, values_N, _ = np.linalg.svd(dense_CG, full_matrices=False)
  size = min(num_components, int((values_N > 1e-9 * values_N[0]).sum()))
  return left_CN[:, :size] * values_N[:size]


def eligible(
  labels: Sequence[str], config: ProbeConfig = ProbeConfig()
) -> np.ndarray:
  """Bool [C]: cells of classes with enough cells; none if one class is left."""
  names, code_C = np.unique(np.asarray(labels, str), return_inverse=True)
  enough = (np.bincount(code_C) >= config.min_cells) & (names != '')
  return enough[code_C] & (enough.sum() > 1)


def probe(
  features: Mapping[str, Features | np.ndarray],
  labels: Sequence[str],
  *,
  dataset: str,
  units: Sequence[str] | None = None,
  contaminated: bool = False,
  config: ProbeConfig = ProbeConfig(),
) -> list[Row]:
  """Scores features by macro-F1 on held-out cells.

  Args:
    features: by name of the method, for the same C cells; [C, D] will do.
    labels: class of each cell [C]; '' for none.
    dataset: name for the rows.
    units: donor or study of each cell [C]. With two or more of them a fold is
      a unit, the value the mean over units of the macro-F1 over the classes
      that occur in the unit. Without, stratified folds of cells, and one
      macro-F1 over all of them.
    contaminated: whether the cells share a unit with the pretraining cells.
    config: how to score.

  Returns:
    Rows, by method, metric and seed: means first, then single units.

  Raises:
    UserError: scikit-learn is missing, or fewer than two classes are left.
  """
  keep_C = eligible(labels, config)
  if not keep_C.any():
    raise errors.UserError(
      f'{dataset}: fewer than two classes of {config.min_cells} cells, nothing '
      'to probe'
    )
  labels_C = np.asarray(labels, str)[keep_C]
  units_C = None if units is None else np.asarray(units, str)[keep_C]
  by_unit = units_C is not None and len(np.unique(units_C)) > 1
  rows = []
  for method, given in features.items():
    if not isinstance(given, Features):
      given = Features(np.asarray(given))
    is_random = given.values.ndim == 3
    for i, seed in enumerate(config.seeds):
      if by_unit and i and not is_random:
        break  # neither folds nor features depend on the seed
      values_CD = given.values[i] if is_random else given.values
      values_CD = np.asarray(values_CD, np.float64)[keep_C]
      fold_C = units_C if by_unit else _folds(labels_C, config.folds, seed)
      for metric, predict in ((KNN, _knn), (LINEAR, _linear)):
        predicted_C = _out_of_fold(predict, values_CD, labels_C, fold_C, config)
        common = {
          'task': TASK,
          'dataset': dataset,
          'split': LEAVE_UNIT_OUT if by_unit else WITHIN_SAMPLE,
          'seed': seed,
          'method': method,
          'checkpoint': given.checkpoint,
          'step': given.step,
          'metric': metric,
          'contaminated': contaminated,
        }
        rows += _rows(
          labels_C, predicted_C, units_C if by_unit else None, common
        )
  return rows


def difference(
  rows: Sequence[Row], dataset: str, metric: str, method: str, other: str
) -> tuple[float, float, float, int]:
  """Mean over units of a method's value minus another's, seeds averaged.

  Returns:
    (difference, low, high, units): the 95 % interval is a paired bootstrap
    over units, nan below six of them; units is 0 where there are none.
  """
  values: dict[str, dict[str, list[float]]] = {method: {}, other: {}}
  for row in rows:
    is_wanted = row.dataset == dataset and row.metric == metric
    if is_wanted and row.method in values:
      values[row.method].setdefault(row.unit, []).append(row.value)
  units = sorted(values[method].keys() - {''})
  names = units or ['']
  gap_U = np.array(
    [
      statistics.fmean(values[method][u]) - statistics.fmean(values[other][u])
      for u in names
    ]
  )
  low, high = _interval(gap_U if units else gap_U[:0])
  return float(gap_U.mean()), low, high, len(units)


def table(rows: Sequence[Row], dataset: str) -> str:
  """Methods x metrics in plain text: the mean, and the range over seeds.

  Methods stand in the order in which they were given, not by their score.
  """
  mine = [row for row in rows if row.dataset == dataset and not row.unit]
  methods = list(dict.fromkeys(row.method for row in mine))
  width = max(map(len, methods))
  lines = [f'{"":{width}}  {"kNN":>21}  {"linear probe":>21}']
  for method in methods:
    cells = []
    for metric in (KNN, LINEAR):
      found = [
        row for row in mine if (row.method, row.metric) == (method, metric)
      ]
      values = [row.value for row in found]
      text = f'{statistics.fmean(values):.3f}'
      if len(values) > 1:
        text += f' ({min(values):.3f}-{max(values):.3f})'
      elif np.isfinite(found[0].ci_low):
        text += f' [{found[0].ci_low:.3f}, {found[0].ci_high:.3f}]'
      cells.append(f'{text:>21}')
    lines.append(f'{method:{width}}  ' + '  '.join(cells))
  return '\n'.join(lines)


def _rows(labels_C, predicted_C, units_C, common) -> list[Row]:
  nan = float('nan')
  if units_C is None:
    value = _macro_f1(labels_C, predicted_C)
    n = len(labels_C)
    return [Row(**common, unit='', value=value, n=n, ci_low=nan, ci_high=nan)]
  singles = []
  for unit in np.unique(units_C):
    mine_C = units_C == unit
    value = _macro_f1(labels_C[mine_C], predicted_C[mine_C])
    n = int(mine_C.sum())
    singles.append(
      Row(**common, unit=str(unit), value=value, n=n, ci_low=nan, ci_high=nan)
    )
  value_U = np.array([row.value for row in singles])
  low, high = _interval(value_U)
  mean = Row(
    **common,
    unit='',
    value=float(value_U.mean()),
    n=len(value_U),
    ci_low=low,
    ci_high=high,
  )
  return [mean, *singles]


def _interval(value_U: np.ndarray) -> tuple[float, float]:
  """95 % bootstrap of the mean over units; nan below six."""
  if len(value_U) < MIN_UNITS:
    return float('nan'), float('nan')
  rng = np.random.Generator(np.random.Philox(0))
  draws = rng.integers(len(value_U), size=(_RESAMPLES, len(value_U)))
  low, high = np.quantile(value_U[draws].mean(1), (0.025, 0.975))
  return float(low), float(high)


def _macro_f1(labels_C: np.ndarray, predicted_C: np.ndarray) -> float:
  """Mean F1 over the classes that occur among the labels."""
  scores = []
  for name in np.unique(labels_C):
    right = int(((labels_C == name) & (predicted_C == name)).sum())
    named = int((labels_C == name).sum()) + int((predicted_C == name).sum())
    scores.append(2 * right / named)
  return statistics.fmean(scores)


def _folds(labels_C: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
  """Fold of each cell: classes are dealt out evenly, in random order."""
  rng = np.random.Generator(np.random.Philox(seed))
  fold_C = np.zeros(len(labels_C), np.int64)
  dealt = 0
  for name in np.unique(labels_C):
    mine = rng.permutation(np.flatnonzero(labels_C == name))
    fold_C[mine] = (np.arange(len(mine)) + dealt) % num_folds
    dealt += len(mine)  # or the first folds would get every remainder
  return fold_C


def _out_of_fold(predict, values_CD, labels_C, fold_C, config) -> np.ndarray:
  predicted_C = labels_C.copy()
  for fold in np.unique(fold_C):
    test_C = fold_C == fold
    predicted_C[test_C] = predict(
      values_CD[~test_C], labels_C[~test_C], values_CD[test_C], config
    )
  return predicted_C


def _knn(train_CD, labels_C, test_CD, config) -> np.ndarray:
  neighbors = _sklearn('neighbors')
  k = min(config.k, len(train_CD))
  model = neighbors.KNeighborsClassifier(k, algorithm='brute')
  return model.fit(train_CD, labels_C).predict(test_CD)


def _linear(train_CD, labels_C, test_CD, config) -> np.ndarray:
  linear_model = _sklearn('linear_model')
  mean_D, sd_D = train_CD.mean(0), train_CD.std(0)
  sd_D = np.where(sd_D > 1e-12, sd_D, 1.0)
  model = linear_model.LogisticRegression(
    C=config.inverse_penalty, max_iter=1000, tol=1e-3
  )
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # near the optimum is near enough
    model.fit((train_CD - mean_D) / sd_D, labels_C)
  return model.predict((test_CD - mean_D) / sd_D)


def _sklearn(module: str):
  import importlib

  try:
    return importlib.import_module(f'sklearn.{module}')
  except ImportError as error:
    raise errors.UserError(
      'scikit-learn is not installed: pip install ".[demo]" in the folder of '
      'the repository'
    ) from error
