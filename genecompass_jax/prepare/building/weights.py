"""How often training cells of each kind should be seen."""

from collections.abc import Sequence

import numpy as np

from genecompass_jax import errors
from genecompass_jax.prepare import labels as labels_lib

POWER = 0.5  # of the number of cells of a kind


def check(columns: Sequence[str], labels: labels_lib.Labels) -> None:
  """Refuses columns that no cell has.

  Raises:
    UserError: one is not among the labels.
  """
  unknown = [name for name in columns if name not in labels.columns]
  if unknown:
    raise errors.UserError(
      f'--weigh_by {unknown[0]}: carry that column with --obs; there are: '
      + ', '.join(labels.columns)
    )


def of_kinds(
  columns: Sequence[str], labels: labels_lib.Labels, results: Sequence[dict]
) -> dict | None:
  """How often training cells of each kind should be seen, on average once.

  A kind of n cells is seen n ** `POWER` times in proportion, so that
  the large ones do not drown the rare.

  Args:
    columns: that make a kind; of none there are no weights.
    labels: of the cells.
    results: of the tasks that sorted them.
  """
  if not columns:
    return None
  cells: dict[tuple[int, ...], int] = {}
  for result in results:
    for kind, number in result['kinds']:
      cells[tuple(kind)] = cells.get(tuple(kind), 0) + number
  kinds = sorted(cells)
  number_K = np.array([cells[kind] for kind in kinds], np.float64)
  weight_K = number_K ** (POWER - 1)
  weight_K *= number_K.sum() / max((weight_K * number_K).sum(), 1e-300)
  names = [labels.categories[column] for column in columns]

  def named(kind: tuple[int, ...]) -> list[str]:
    return [of[code] if code >= 0 else '' for of, code in zip(names, kind)]

  return {
    'by': list(columns),
    'power': POWER,
    'kinds': [
      {'values': named(kind), 'cells': cells[kind], 'weight': round(w, 6)}
      for kind, w in zip(kinds, weight_K.tolist())
    ],
  }
