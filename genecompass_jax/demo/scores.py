"""Features of held-out cells, their scores, and the tables that are printed."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import anndata
import numpy as np

from genecompass_jax import corpus as corpus_lib, model as model_lib, pretrained
from genecompass_jax.analysis import embeddings
from genecompass_jax.demo import plans
from genecompass_jax.prepare import anndatas
from genecompass_jax.tasks import cell_types

PCA = 'PCA of log counts'
CLS, MEAN = 'pretrained, CLS', 'pretrained, mean'
RANDOM = 'random weights, mean'
CONFIG = cell_types.ProbeConfig()
_RANDOM_SEED = 1000  # away from the seeds of training


@dataclasses.dataclass(frozen=True)
class Embedded:
  """Held-out cells of a probe.

  Attributes:
    cells: AnnData with the model's embeddings.
    features: by method.
    labels: class of each cell, '' for none; None where there is no column.
    units: donor of each cell; None where cells are of one unit.
  """

  cells: anndata.AnnData
  features: dict[str, cell_types.Features]
  labels: np.ndarray | None
  units: np.ndarray | None


def embed(
  probe: plans.Probe,
  corpus: corpus_lib.Corpus,
  model: pretrained.PretrainedModel,
) -> Embedded:
  """Features of a probe's held-out cells: baseline, model, random weights."""
  cells = anndatas.held_out_cells(
    corpus, probe.cells, source=probe.source, max_cells=probe.max_cells
  )
  labels = _text(cells, probe.label) if probe.label else None
  units = _text(cells, probe.unit) if probe.unit else None

  def embedded(one: pretrained.PretrainedModel, pooling: str) -> np.ndarray:
    return embeddings.embed(
      cells,
      one,
      pooling=pooling,
      species=probe.config.species,
      ids_of=probe.config.ids_of,
      layer=probe.config.layer,
      allow_noninteger=probe.config.allow_noninteger,
    )

  def of_model(pooling: str) -> cell_types.Features:
    return cell_types.Features(
      embedded(model, pooling), model.sha256, model.step
    )

  counts_CV = anndatas.token_counts(cells, model.vocabulary, probe.config)
  features = {PCA: cell_types.Features(cell_types.pca(counts_CV))}
  mean = of_model('mean')  # warns about the cells, where that is needed
  with _without_warnings():  # which would be the same
    if labels is not None:
      draws = [
        model.replace(params=model_lib.init(model.config, _RANDOM_SEED + seed))
        for seed in CONFIG.seeds
      ]
      values = np.stack([embedded(draw, 'mean') for draw in draws])
      features[RANDOM] = cell_types.Features(values)
    features |= {MEAN: mean, CLS: of_model('cls')}
  cells.obsm[embeddings.KEY] = features[CLS].values
  cells.obsm[f'{embeddings.KEY}_mean'] = features[MEAN].values
  return Embedded(cells, features, labels, units)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
  logger = logging.getLogger()
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(before)


def _text(cells: anndata.AnnData, column: str) -> np.ndarray:
  """An obs column as text, '' where it has no value."""
  values = cells.obs[column].astype(object)
  return values.where(values.notna(), '').astype(str).to_numpy()


def score(probe: plans.Probe, found: Embedded) -> list[cell_types.Row]:
  """Scores of a probe; none where there are no two classes of enough cells."""
  if found.labels is None or not cell_types.eligible(found.labels).any():
    return []
  return cell_types.probe(
    found.features,
    found.labels,
    dataset=probe.dataset,
    units=found.units,
    contaminated=not probe.unit,
    config=CONFIG,
  )


def table(
  probe: plans.Probe, found: Embedded, rows: Sequence[cell_types.Row]
) -> str:
  """What is printed of a probe: the table, and what it is."""
  if not rows:
    wanted = ', '.join(plans.LABEL_COLUMNS[:4])
    return (
      f'     {probe.dataset}: no obs column of cell types ({wanted}, ...) with '
      f'two classes of {CONFIG.min_cells} held-out cells, so no table; name one '
      'with --label'
    )
  keep_C = cell_types.eligible(found.labels)
  classes = len(np.unique(found.labels[keep_C]))
  lines = [
    f'{probe.dataset}: macro-F1 of {classes} classes of obs[{probe.label!r}] '
    f'with at least {CONFIG.min_cells} cells; {keep_C.sum():,} cells; kNN with '
    f'k={CONFIG.k}, logistic regression with C={CONFIG.inverse_penalty:g}',
    *cell_types.table(rows, probe.dataset).splitlines(),
  ]
  baseline = [row for row in rows if row.method == PCA and not row.unit]
  if max(row.value for row in baseline) > cell_types.CEILING:
    lines.append('Ceiling: the baseline leaves nothing to compare.')
  if rows[0].split == cell_types.LEAVE_UNIT_OUT:
    lines += _differences(probe.dataset, rows)
  return '\n'.join(f'     {line}' for line in [*lines, *probe.notes])


def _differences(dataset: str, rows: Sequence[cell_types.Row]) -> list[str]:
  """The model against the baseline, and against random weights, over units."""
  lines = []
  for other in (PCA, RANDOM):
    parts = []
    for metric, name in (
      (cell_types.KNN, 'kNN'),
      (cell_types.LINEAR, 'linear probe'),
    ):
      gap, low, high, units = cell_types.difference(
        rows, dataset, metric, MEAN, other
      )
      interval = f' [{low:+.3f}, {high:+.3f}]' if np.isfinite(low) else ''
      parts.append(f'{name} {gap:+.3f}{interval}')
    lines.append(f'{MEAN} - {other}: {", ".join(parts)}; {units} units')
  return lines
