"""What is done to which genes of a cell, and what that means in counts.

  delete        the gene's count becomes 0; cells that do not express it are
                left out, and so are those that express it behind the cut at
                max_genes, where the model does not see it
  fold          the count is multiplied by a factor, before the log; a factor
                below 1 is a knock-down, which leaves out the same cells
  over_express  the count becomes the non-zero median, or the maximum, of that
                gene in a named group of cells, in those cells too that do not
                express it; a cell that has more keeps its own count

Counts of other genes are untouched, and the size factor stays that of the
observed cell: in `library` mode values of other genes do not change either.
`renormalise` gives the compositional version instead. Levels of a group are
taken in scaled counts (counts, or counts of the target library size), so that
deep and shallow cells get the same value. The variant is ranked anew with the
key of its cell: ties stay as they were, and where a gene leaves a cell that was
cut at max_genes, the next one comes in.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from genecompass_jax import encoding, errors
from genecompass_jax.analysis.perturbation import cell_set

DELETE, FOLD, OVER_EXPRESS = KINDS = ('delete', 'fold', 'over_express')
MEDIAN, MAXIMUM = LEVELS = ('median', 'max')


@dataclasses.dataclass(frozen=True)
class Intervention:
  """One thing done to the genes of a set, all at once.

  Attributes:
    kind: one of `KINDS`.
    tokens: of the genes.
    names: of the genes, as they are shown; a token that several genes of the
      species share names all of them.
    factor: of `fold`.
    level: of `over_express`: one of `LEVELS`.
  """

  kind: str
  tokens: tuple[int, ...]
  names: tuple[str, ...]
  factor: float = 0.0
  level: str = ''

  def __post_init__(self):
    if self.kind not in KINDS:
      raise errors.UserError(f'{self.kind!r}: give one of {", ".join(KINDS)}')
    if not self.tokens or len(set(self.tokens)) != len(self.tokens):
      raise errors.UserError(
        f'{"+".join(self.names) or "no gene"}: a perturbation takes one gene '
        'or several different ones'
      )
    if self.kind == FOLD and not 0 <= self.factor < np.inf:
      raise errors.UserError(
        f'a fold of {self.factor}: give a number from 0 on, below 1 to knock '
        'down'
      )
    if self.kind == FOLD and self.factor == 1:
      raise errors.UserError(
        'a fold of 1 changes nothing: give a factor below 1 to knock down, or '
        'above'
      )
    if self.kind == OVER_EXPRESS and self.level not in LEVELS:
      raise errors.UserError(
        f'over-expression to {self.level!r}: give one of {", ".join(LEVELS)}'
      )

  @property
  def name(self) -> str:
    """As it is shown in tables: the genes joined by +."""
    return '+'.join(self.names)

  @property
  def amount(self) -> str:
    """Factor or level as text; '' of a deletion."""
    return f'{self.factor:g}' if self.kind == FOLD else self.level


def levels(
  cells: cell_set.CellSet, level: str, tokens: Iterable[int]
) -> dict[int, float]:
  """Scaled counts that over-expression raises genes to.

  Args:
    cells: the named group.
    level: one of `LEVELS`, over the cells of the group that express the gene.
    tokens: of the genes.

  Raises:
    UserError: no cell of the group expresses a gene.
  """
  wanted = np.unique(np.fromiter(tokens, np.int64))
  counts = cells.counts
  token_N = counts.gene_rows_N
  is_wanted_N = np.isin(token_N, wanted)
  cell_N = np.repeat(np.arange(cells.num_cells), np.diff(counts.starts_C1))
  scaled_N = counts.counts_N[is_wanted_N] / _unit(cells)[cell_N[is_wanted_N]]
  found = {}
  order_N = np.argsort(token_N[is_wanted_N], kind='stable')
  token_N, scaled_N = token_N[is_wanted_N][order_N], scaled_N[order_N]
  for token in wanted.tolist():
    first, stop = np.searchsorted(token_N, [token, token + 1])
    if first == stop:
      raise errors.UserError(
        f'token {token}: no cell of the group expresses the gene, so there is '
        f'no {level} to over-express it to; name another group, or use a fold'
      )
    of_gene = scaled_N[first:stop]
    found[token] = float(
      np.median(of_gene) if level == MEDIAN else of_gene.max()
    )
  return found


def _unit(cells: cell_set.CellSet) -> np.ndarray:
  """Counts of a cell that make one scaled count, float64 [C]."""
  if cells.config.mode == encoding.LIBRARY:
    return cells.counts.totals_C / cells.config.target_sum
  return np.ones(cells.num_cells)


def acts_on(cells: cell_set.CellSet, intervention: Intervention) -> np.ndarray:
  """Cells, ascending, in which an intervention does anything.

  Deletion and fold act where at least one gene of the set is expressed.
  """
  if intervention.kind == OVER_EXPRESS:
    return np.arange(cells.num_cells)
  has_any = [cells.expressing(token) for token in intervention.tokens]
  return np.unique(np.concatenate(has_any))


def edit(
  cells: cell_set.CellSet,
  cell_P: np.ndarray,
  interventions: Sequence[Intervention],
  *,
  levels_of: Mapping[str, Mapping[int, float]] | None = None,
  renormalise: bool = False,
) -> encoding.RaggedCells:
  """Counts of P variants: intervention p done to cell `cell_P[p]`.

  Args:
    cells: the cells as they were observed.
    cell_P: a cell of each variant.
    interventions: P of them.
    levels_of: level -> token -> scaled count, for over-expression.
    renormalise: library sizes follow the changed counts.

  Returns:
    Counts by token, ascending tokens.
  """
  counts, unit_C = cells.counts, _unit(cells)
  tokens, values = [], []
  totals_P = counts.totals_C[cell_P].astype(np.float64)
  for p, (c, done) in enumerate(zip(cell_P.tolist(), interventions)):
    first, stop = counts.starts_C1[c], counts.starts_C1[c + 1]
    token_n = counts.gene_rows_N[first:stop]
    count_n = counts.counts_N[first:stop].astype(np.float64)
    before = count_n.sum()
    for token in done.tokens:
      place = int(np.searchsorted(token_n, token))
      is_there = place < len(token_n) and token_n[place] == token
      if done.kind == OVER_EXPRESS:
        count = levels_of[done.level][token] * unit_C[c]
        if is_there:
          count_n[place] = max(count_n[place], count)
        else:
          token_n = np.insert(token_n, place, token)
          count_n = np.insert(count_n, place, count)
      elif is_there:
        count_n[place] *= done.factor if done.kind == FOLD else 0.0
    kept_n = count_n > 0
    tokens.append(token_n[kept_n])
    values.append(count_n[kept_n])
    if renormalise:
      totals_P[p] += count_n.sum() - before
  lengths_P = np.array([len(t) for t in tokens], np.int64)
  return encoding.RaggedCells(
    np.concatenate([*tokens, np.empty(0, np.int32)]).astype(np.int32),
    np.concatenate([*values, np.empty(0)]),
    np.concatenate([[0], np.cumsum(lengths_P)]),
    totals_P,
  )
