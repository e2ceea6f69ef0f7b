"""What a reader gives: labels in memory, matrices where they lie."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from genecompass_jax import gene_ids, gene_table
from genecompass_jax.prepare import matrices

Identified = tuple[tuple[str, ...], dict[int, gene_ids.Resolution], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
  """The cells of one place, before it is known which matrix holds counts.

  Attributes:
    obs: columns of the cells, in the order of the rows.
    layers: matrix and its genes by name: `X`, `raw`, `layers/NAME`.
    files: what was read.
    digest: of what came from no file.
    notes: lines for the report.
    layer: the matrix, the reason and whether its values are no counts, where
      the format leaves no choice; None: a look at the values decides.
    species_C: int8 species of the cells, where the format says so.
    identify: where the columns lead, by a gene table, where the format says
      so; None: names are looked up.
    is_divided: whether the values are counts divided by medians.
    unit_members: of a unit that was joined before: what it was joined of.
  """

  obs: pd.DataFrame
  layers: dict[str, tuple[matrices.Matrix, pd.DataFrame]]
  files: tuple[str, ...] = ()
  digest: str = ''
  notes: tuple[str, ...] = ()
  layer: tuple[str, str, bool] | None = None
  species_C: np.ndarray | None = None
  identify: Callable[[gene_table.GeneTable], Identified] | None = None
  is_divided: bool = False
  unit_members: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
