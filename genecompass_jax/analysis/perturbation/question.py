"""What is asked of a model about genes of cells."""

import dataclasses
import numbers

from genecompass_jax import errors
from genecompass_jax.analysis.perturbation import (
  interventions,
  matching,
  statistics,
)


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked.

  Attributes:
    genes: identifiers; 'A+B' is a set that is changed at once; empty for all
      genes that enough cells show.
    top: of these, only so many that the first-order estimate puts highest
      among their nulls are run; 0: all.
    kind: one of `interventions.KINDS`.
    factor: of a fold.
    level: of an over-expression: 'median' or 'max' of the `reference` cells.
    group_by: obs column; every group gets its own table.
    groups: the groups to perturb; empty: all. With a goal, `start` alone.
    donor_key: obs column of donors or samples: the units of the statistics.
    start: group that is perturbed, where there is a goal.
    goal: group that the start is compared with.
    reference: group whose levels over-expression raises genes to; '' for the
      goal, or without one the perturbed cells.
    pooling: 'mean' over shared genes, or 'cls'.
    measure: what is tested: 'shift', 'gene_shift' or 'toward'; '' is 'toward'
      where there is a goal, else 'shift'.
    max_cells: most cells of a group, drawn by the seed; 0: all.
    min_cells: cells of a unit that must show target and null.
    min_detection: share of the cells that must show a gene for it to be among
      'all' genes, or null of another: of rarer ones a few cells say little.
    calipers: furthest that a null may be from its target in detection, rank and
      length, in standard deviations of all genes; wider ones find more nulls,
      and less alike.
    nulls: most nulls of a target.
    fewest_nulls: with fewer a target gets no z.
    never_null: genes that are null of no other, such as those of the pathway.
    left_out: genes that are in no score, on no axis and among no responses, such
      as those whose change is what the groups differ by; the model reads them,
      and they may be perturbed, and be nulls unless they are `never_null` too.
    responses: also the effects on every other gene.
    renormalise: library sizes follow the changed counts (compositional), in a
      model of `library` mode; no other divides by them.
    seed: of the cells that are drawn, of directions, and of ties in matching.
  """

  genes: tuple[str, ...] = ()
  top: int = 0
  kind: str = interventions.DELETE
  factor: float = 0.5
  level: str = interventions.MEDIAN
  group_by: str = ''
  groups: tuple[str, ...] = ()
  donor_key: str = ''
  start: str = ''
  goal: str = ''
  reference: str = ''
  pooling: str = 'mean'
  measure: str = ''
  max_cells: int = 500
  min_cells: int = 3
  min_detection: float = 0.05
  calipers: tuple[float, float, float] = (0.5, 0.5, 0.5)
  nulls: int = 50
  fewest_nulls: int = 10
  never_null: tuple[str, ...] = ()
  left_out: tuple[str, ...] = ()
  responses: bool = False
  renormalise: bool = False
  seed: int = 0

  def __post_init__(self):
    for name in ('genes', 'groups', 'never_null', 'left_out'):
      words = getattr(self, name)
      words = (words,) if isinstance(words, str) else tuple(words)
      if not all(isinstance(word, str) for word in words):
        raise errors.UserError(f'{name}={words!r}: give names as text')
      object.__setattr__(self, name, words)
    counts = 'top', 'max_cells', 'min_cells', 'nulls', 'fewest_nulls', 'seed'
    errors.check_whole(**{name: getattr(self, name) for name in counts})
    for name in ('factor', 'min_detection'):
      if not isinstance(getattr(self, name), numbers.Real):
        raise errors.UserError(
          f'{name}={getattr(self, name)!r} must be a number'
        )
    if bool(self.start) != bool(self.goal):
      raise errors.UserError(
        'a start needs a goal and a goal a start; give both'
      )
    if (self.goal or self.groups or self.reference) and not self.group_by:
      raise errors.UserError(
        'start, goal, groups and reference are values of an obs column: name '
        'it with group_by (--group-by)'
      )
    if self.goal and self.groups:
      raise errors.UserError(
        'with a goal the start is perturbed: give no groups'
      )
    if self.left_out and self.pooling == 'cls':
      raise errors.UserError(
        'left_out takes genes out of a mean over genes, and the CLS state is '
        "none: use pooling 'mean', or leave left_out out"
      )
    if self.measure == statistics.TOWARD and not self.goal:
      raise errors.UserError("measure 'toward' needs a start and a goal")
    if min(self.top, self.max_cells, self.seed) < 0:
      raise errors.UserError('top, max_cells and seed are numbers from 0 on')
    if not 0 <= self.min_detection <= 1:
      raise errors.UserError(
        f'min_detection={self.min_detection} is a share, from 0 to 1'
      )
    # Complaints of what they make come before any work.
    _ = self.tested, self.matched
    if self.top and self.kind != interventions.DELETE:
      raise errors.UserError(
        'the first-order estimate is of deletions: leave top out'
      )

  @property
  def tested(self) -> statistics.Config:
    """How targets are tested."""
    measure = self.measure or (
      statistics.TOWARD if self.goal else statistics.SHIFT
    )
    return statistics.Config(measure=measure, min_cells=self.min_cells)

  @property
  def matched(self) -> matching.MatchingConfig:
    """How nulls are chosen."""
    return matching.MatchingConfig(
      calipers=tuple(self.calipers),
      most=self.nulls,
      fewest=self.fewest_nulls,
      seed=self.seed,
    )
