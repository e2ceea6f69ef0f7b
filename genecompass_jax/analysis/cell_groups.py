"""Groups of cells by an obs column: what averages are taken over."""

import dataclasses
import logging

import numpy as np

from genecompass_jax import errors
from genecompass_jax.prepare import sources

ALL = 'all'  # the one group, where no column is named


@dataclasses.dataclass(frozen=True)
class CellGroups:
  """G groups of C cells.

  Attributes:
    column: obs column; '' for one group of all cells.
    names: of the groups, sorted.
    code_C: int32 group of every cell, -1 for those without a value.
  """

  column: str
  names: tuple[str, ...]
  code_C: np.ndarray

  def code(self, source: str, name: str) -> int:
    """Code of a group of the cells of a source.

    Raises:
      UserError: there is no such group.
    """
    if name not in self.names:
      raise errors.UserError(
        f'{source}: no cells with {self.column} = {name!r}; there are: '
        + ', '.join(self.names[:10])
      )
    return self.names.index(name)

  @classmethod
  def of(cls, stream: sources.CellStream, column: str) -> 'CellGroups':
    """Groups of the cells of a stream.

    Raises:
      UserError: no such column, or one without any value.
    """
    source = stream.source
    if not column:
      return cls('', (ALL,), np.zeros(source.num_cells, np.int32))
    code_C, names = source.codes(column)
    without = int((code_C < 0).sum())
    if without == len(code_C):
      raise errors.UserError(
        f'{source.name}: obs column {column!r} has no value for any cell'
      )
    if without:
      logging.warning(
        '%s: %d cells without a value of %r are left out',
        *(source.name, without, column),
      )
    return cls(column, tuple(names), code_C)
