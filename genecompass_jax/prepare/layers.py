"""Which of several matrices holds counts.

A matrix is judged by a sample of its values: whole and not negative is counts;
logarithms are recognised once they are undone.
"""

import numpy as np

from genecompass_jax import errors
from genecompass_jax.prepare import (
  matrices,
  turning,
)

LOG_MAX = 20.0  # log1p and log2 of counts and TPM stay below
_SAMPLED_ROWS = 256
_BASES = (np.e, 2.0, 10.0)  # of logarithms in use


COUNTS = 'counts'
NON_INTEGER = 'non-integer values'
LOG = 'log-transformed values'
# Taken for logarithms, unless the user says that they are corrected counts.
SMALL = 'small non-integer values, log-transformed or corrected counts'
# Names of layers of counts, the likeliest first: beside them others are whole
# numbers too (ambiguous and unspliced ones, masks), and of the same width.
_NAMES = (
  *('counts', 'raw_counts', 'raw', 'count', 'umi', 'umis', 'umi_counts'),
  *('matrix', 'spliced'),
)


def kind_of(matrix: matrices.Matrix) -> str:
  """What a sample of the values looks like: counts, or what is wrong."""
  dtype = matrix.dtype
  if dtype.kind not in 'biuf' or len(matrix.shape) != 2:
    return f'values of type {dtype} in {len(matrix.shape)} dimensions'
  values = matrix.sample()
  if not np.isfinite(values).all():
    return 'values that are not finite'
  if (values < 0).any():
    return 'negative values (scaled data?)'
  if (values % 1 == 0).all():
    return COUNTS
  if values.max(initial=0) >= LOG_MAX:
    return NON_INTEGER
  return LOG if _looks_log(matrix) else SMALL


def _looks_log(matrix: matrices.Matrix) -> bool:
  """Whether values below `LOG_MAX` are logarithms, by a sample of rows.

  Logarithms of UMI counts show once they are undone: the values of a cell are whole
  multiples of its smallest one (also where genes were selected, and where they
  were rounded), or all cells have one sum. Corrected counts do neither.
  """
  rows = _sample_rows(matrix)
  for base in _BASES:
    undone = [np.power(base, row) - 1 for row in rows]
    sums = np.array([row.sum() for row in undone])
    if len(sums) > 9 and sums.std() < 0.02 * sums.mean():
      return True
    if rows and _whole_share(undone) > max(0.8, _whole_share(rows)):
      return True
  return False


def _whole_share(rows: list[np.ndarray]) -> float:
  """Share of values that are a whole multiple, from 2 to 20, of the least."""
  ratios = np.concatenate([row / row.min() for row in rows])
  ratios = ratios[(ratios > 1.5) & (ratios < 20.5)]
  if not len(ratios):
    return 0.0
  return float((np.abs(ratios - np.rint(ratios)) < 0.05).mean())


def _sample_rows(matrix: matrices.Matrix) -> list[np.ndarray]:
  """Non-zero values of some rows, whole rows, from several places."""
  if matrices.is_turned(matrix):
    if matrix.num_entries > turning.TURN_IN_MEMORY // 16:
      return []
    matrix = matrix.by_rows()
  num = min(_SAMPLED_ROWS, matrix.shape[0])
  chosen = np.unique(np.linspace(0, matrix.shape[0] - 1, num).astype(int))
  rows = [matrix.read(r, r + 1).data for r in chosen]
  rows = [row[row > 0].astype(np.float64) for row in rows]
  return [row for row in rows if len(row)]


def choose_layer(
  name: str, found: dict[str, tuple], asked: str, allow_noninteger: bool
) -> tuple[str, str, bool]:
  """The matrix to read, why, and whether its values are no integers.

  Args:
    name: of the source, for messages.
    found: X, raw and the layers of a file, by name; a matrix comes first.
    asked: one of them, with or without `layers/`; '' takes what looks like
      counts, the widest first; of equal ones X, raw, then layers by name.
    allow_noninteger: take corrected counts as they are.

  Raises:
    UserError: none holds counts, or not the one that was asked for.
  """
  if not found:
    raise errors.UserError(f'{name}: no X, raw or layer')
  kinds = {key: kind_of(matrix) for key, (matrix, _) in found.items()}
  good = [key for key, kind in kinds.items() if kind == COUNTS]
  if asked and asked not in found:
    if f'layers/{asked}' not in found:
      raise errors.UserError(
        f'{name}: no layer {asked!r}; there are: {", ".join(found)}'
      )
    asked = f'layers/{asked}'
  accepted = [COUNTS] + [NON_INTEGER, SMALL] * allow_noninteger
  if asked:
    if kinds[asked] in accepted:
      reason = f'{asked}, as asked: {kinds[asked]}'
      return asked, reason, kinds[asked] != COUNTS
    raise errors.UserError(
      f'{name}: {asked} holds {kinds[asked]}; {_advice(kinds[asked], good)}'
    )
  usable = good or [key for key, kind in kinds.items() if kind in accepted]
  if not usable:
    described = ', '.join(f'{key} holds {kind}' for key, kind in kinds.items())
    only = next(iter(kinds.values())) if len(kinds) == 1 else ''
    worth = next((k for k in (NON_INTEGER, SMALL) if k in kinds.values()), only)
    raise errors.UserError(
      f'{name}: no counts here: {described}; {_advice(worth, good)}'
    )
  best = max(  # the first of equal ones
    usable, key=lambda key: (found[key][0].shape[1], _likeliness(key))
  )
  others = ', '.join(f'{key} {kinds[key]}' for key in kinds if key != best)
  reason = f'{best} looks like {kinds[best]}'
  reason += f' (besides: {others})' if others else ''
  return best, reason, kinds[best] != COUNTS


def _likeliness(key: str) -> int:
  """Higher for what is more often counts, by its name."""
  if not key.startswith('layers/'):
    return 1
  name = key.removeprefix('layers/').casefold()
  return -_NAMES.index(name) if name in _NAMES else -len(_NAMES)


def _advice(kind: str, good: list[str]) -> str:
  if good:
    return f'{" and ".join(good)} looks like counts: pass --layer {good[0]}'
  if kind == NON_INTEGER:
    return 'pass --allow_noninteger if they are corrected counts'
  if kind == SMALL:
    return (
      'a file with the raw counts is needed, or --allow_noninteger if they are '
      'corrected counts'
    )
  return 'a file with the raw counts is needed'
