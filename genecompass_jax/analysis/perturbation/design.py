"""What a question needs: which cells, which genes, and which nulls."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from genecompass_jax import encoding, errors, pretrained
from genecompass_jax.analysis import (
  cell_choice,
  cell_groups,
  gene_tokens,
  placed_model,
)
from genecompass_jax.analysis.perturbation import (
  axes,
  cell_set,
  first_order,
  interventions,
  matching,
  question as question_lib,
  stages,
  statistics,
)
from genecompass_jax.prepare import sources

_CENTROID_CELLS = 2_000  # most of a group that a centroid is made of


class Design:
  """Cells, targets and nulls of one question; nothing is perturbed yet.

  Attributes:
    asked: the question.
    model: that is asked.
    stream: all cells.
    groups: of the cells, by the column that was asked for.
    units: likewise, by donors.
    group_codes: of the groups that are perturbed.
    cells: that are perturbed.
    left_out: tokens that are in no score and on no axis.
    axis: from start to goal, if there are any.
    symbols: of tokens.
    reference: cells whose levels over-expression raises genes to.
    targets: sets of tokens.
    nulls: by group and target, null sets of tokens, nearest first.
    number_of: the number of each set among `done`.
    done: the interventions, targets first.
  """

  def __init__(
    self,
    stream: sources.CellStream,
    model: pretrained.PretrainedModel,
    placed: placed_model.PlacedModel,
    asked: question_lib.Question,
    kept: stages.Stages = stages.NOWHERE,
  ):
    """Draws cells, chooses targets and matches nulls.

    Args:
      stream: opened with `model_cells.open_cells`.
      model: that opened it.
      placed: the same on the devices.
      asked: the question.
      kept: where the axis and the first-order estimates are kept.

    Raises:
      UserError: what is asked cannot be done with these cells.
    """
    self.asked, self.model, self.stream = asked, model, stream
    if asked.renormalise and not self.is_divided:
      raise errors.UserError(
        f'{model.source}: this model reads counts in `released` mode, which '
        'divides by no library size, so that none could follow: leave '
        'renormalise out'
      )
    self._kept = kept
    self.groups = cell_groups.CellGroups.of(stream, asked.group_by)
    self.units = cell_groups.CellGroups.of(stream, asked.donor_key)
    self.group_codes = self._wanted_groups()
    rows = np.concatenate([self._drawn(g) for g in self.group_codes])
    self._tell_drawn(len(rows))
    self.cells = cell_set.read(stream, model, np.sort(rows))
    self._encoded = self.cells.encode()
    self.left_out = self._make_left_out()
    self.axis = self._make_axis(placed)
    self.symbols = gene_tokens.symbols_of(model.vocabulary, self.cells.species)
    self._never_null = self._known('never_null')
    self.reference = self._make_reference()
    self.targets = self._choose_targets(placed)
    self._check_levels()
    # By group, target -> its null sets of tokens.
    self.nulls = {
      group: self._choose_nulls(group) for group in self.group_codes
    }
    self._check_lines()
    sets = dict.fromkeys(self.targets)
    for of_target in self.nulls.values():
      for nulls in of_target.values():
        sets |= dict.fromkeys(nulls)
    self.number_of = {tokens: n for n, tokens in enumerate(sets)}
    self.done = [self._intervention(tokens) for tokens in sets]

  @property
  def is_divided(self) -> bool:
    """Whether the model reads counts divided by the library size."""
    return self.model.assets.encoding.mode == encoding.LIBRARY

  def _wanted_groups(self) -> list[int]:
    asked = self.asked
    wanted = (asked.start,) if asked.goal else asked.groups
    if not wanted:
      return list(range(len(self.groups.names)))
    return [self._group(name) for name in dict.fromkeys(wanted)]

  def _group(self, name: str) -> int:
    return self.groups.code(self.stream.source.name, name)

  def _drawn(self, group: int, most: int | None = None) -> np.ndarray:
    """Rows of a group, at most `max_cells`, drawn by the seed."""
    most = self.asked.max_cells if most is None else most
    rows = np.flatnonzero(
      (self.groups.code_C == group) & (self.units.code_C >= 0)
    )
    return cell_choice.draw(rows, most, self.asked.seed)

  def _tell_drawn(self, drawn: int) -> None:
    """Says that there are more cells, which are left out."""
    most = self.asked.max_cells
    has_unit_C = self.units.code_C >= 0
    there = np.isin(self.groups.code_C[has_unit_C], self.group_codes).sum()
    if drawn < there:
      logging.warning(
        '%s: %d of %d cells are perturbed, at most %d of a group, drawn by the '
        'seed; max_cells says how many, 0 takes all',
        *(self.stream.source.name, drawn, there, most),
      )

  def _make_axis(self, placed: placed_model.PlacedModel) -> axes.Axis | None:
    asked = self.asked
    if not asked.goal:
      return None
    start, goal = (
      (name, self._read(self._group(name), _CENTROID_CELLS))
      for name in (asked.start, asked.goal)
    )
    made_of = axes.made_of(start[1], goal[1], asked.pooling, self.left_out)
    with self._kept.stage('axis', made_of=made_of) as stage:
      found = stage.load()
      if found is None:
        axis = axes.between(placed, start, goal, asked.pooling, self.left_out)
        stage.save({'direction_D': axis.direction_D})
        return axis
    return axes.Axis(found['direction_D'], start[0], goal[0], made_of)

  def _read(self, group: int, most: int) -> cell_set.CellSet:
    return cell_set.read(self.stream, self.model, self._drawn(group, most))

  def _make_reference(self) -> cell_set.CellSet:
    """Cells whose levels over-expression raises genes to."""
    asked = self.asked
    name = asked.reference or asked.goal
    if asked.kind != interventions.OVER_EXPRESS or not name:
      return self.cells
    return self._read(self._group(name), 0)

  def _make_left_out(self) -> tuple[int, ...]:
    """Tokens of the genes that are in no score.

    Raises:
      UserError: none of them is known, or no other gene is left.
    """
    left_out = self._known('left_out')
    if not self.asked.left_out:
      return ()
    if not left_out:
      raise errors.UserError(
        f'left_out: none of {", ".join(self.asked.left_out[:5])} is a gene of '
        'these cells and this model; name others, or leave left_out out'
      )
    if not self.cells.is_scored(left_out)[self._encoded.gene_ids_N].any():
      raise errors.UserError(
        f'{self.cells.name}: left_out names every gene that the cells show to '
        'the model: no state is left to score; leave out fewer'
      )
    return tuple(sorted(left_out))

  def _known(self, field: str) -> set[int]:
    """Tokens of a list of genes; those that cells or model lack do nothing."""
    names: Sequence[str] = getattr(self.asked, field)
    tokens, without = set(), []
    for name in names:
      try:
        tokens |= {*self.cells.tokens_of([name], self.model.vocabulary)}
      except errors.UserError:
        without.append(name)
    if without:
      logging.warning(
        '%s: %d of %d genes are not in these cells or this model: %s',
        *(field, len(without), len(names), ', '.join(without[:5])),
      )
    return tokens

  def _has_level(self, token: int) -> bool:
    """Whether over-expression has a level to raise a gene to."""
    is_raised = self.asked.kind == interventions.OVER_EXPRESS
    return not is_raised or len(self.reference.expressing(token)) > 0

  def _check_levels(self) -> None:
    for token in (t for tokens in self.targets for t in tokens):
      if not self._has_level(token):
        raise errors.UserError(
          f'{self.symbols[token]}: no cell of the reference expresses it, so '
          'there is no level to raise it to; give another reference, or a fold'
        )

  def _choose_targets(
    self, placed: placed_model.PlacedModel
  ) -> list[tuple[int, ...]]:
    asked = self.asked
    if asked.genes:
      found = self._asked_for()
      found = list(dict.fromkeys(found))
    else:
      profiles = matching.of_cells(
        self.reference.encode()
        if asked.kind == interventions.OVER_EXPRESS
        else self._encoded
      )
      found = [(t,) for t in self._shown(profiles)]
    self.num_not_chosen = max(len(found) - asked.top, 0) if asked.top else 0
    if not asked.top or asked.top >= len(found):
      return found
    if any(len(tokens) > 1 for tokens in found):
      raise errors.UserError(
        'the first-order estimate is of single genes: leave top out for sets'
      )
    return self._highest(placed, found)

  def _asked_for(self) -> list[tuple[int, ...]]:
    """Tokens of the genes and sets that were named; all wrong ones at once."""
    found, wrong = [], {}
    for text in self.asked.genes:
      names = [name.strip() for name in text.split('+')]
      try:
        tokens = self.cells.tokens_of(names, self.model.vocabulary)
        found.append(tuple(sorted(tokens)))
      except errors.UserError as error:
        wrong[text] = error
    if len(wrong) > 1:
      others = [*wrong][1:]
      raise errors.UserError(
        f'{next(iter(wrong.values()))}; nor can {len(others):,} more of '
        f'{len(self.asked.genes):,} be asked about: {", ".join(others[:20])}'
        + (', ...' if len(others) > 20 else '')
      )
    for error in wrong.values():
      raise error
    return found

  def _highest(
    self, placed: placed_model.PlacedModel, found: list[tuple[int, ...]]
  ) -> list[tuple[int, ...]]:
    asked = self.asked
    is_toward = asked.tested.measure == statistics.TOWARD
    settings = {
      'pooling': asked.pooling,
      'probes': 0 if is_toward else first_order.PROBES,
      'seed': asked.seed,
      'left_out': self.left_out,
    }
    made_of = {
      **settings,
      'points': first_order.POINTS,
      'cells': self.cells.sha256,
      'axis': '' if self.axis is None else self.axis.made_of,
    }
    with self._kept.stage('first-order estimate', **made_of) as stage:
      estimate = first_order.score(
        placed, self.cells, **settings, axis=self.axis, stage=stage
      )
    # As the exact effects are judged: among nulls of the same ranks. The largest
    # effects by themselves are those of the highest ranks.
    guess = first_order.as_effects(estimate, self.cells)
    profiles = matching.of_cells(self._encoded)
    shown = set(profiles.key_G.tolist())
    tokens = [t for (t,) in found if t in shown]
    matches = matching.match(
      profiles,
      tokens,
      self._shown(profiles),
      excluded=self._never_null,
      config=asked.matched,
    )
    tested = dataclasses.replace(
      asked.tested,
      measure=statistics.TOWARD if is_toward else statistics.SHIFT,
    )
    z_T = statistics.test(
      guess, matches, self.units.code_C, self.units.names, tested
    ).z_T
    score_T = np.abs(z_T) if is_toward else z_T
    order = np.argsort(-np.nan_to_num(score_T, nan=-np.inf), kind='stable')
    return [(int(t),) for t in np.sort(np.array(tokens)[order[: asked.top]])]

  def _choose_nulls(
    self, group: int
  ) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Null sets of every target, matched in the cells of one group."""
    config = self.asked.matched
    profiles = matching.of_cells(self._encoded_of(group))
    also = None
    if self.asked.kind == interventions.OVER_EXPRESS:
      also = matching.of_cells(self._cells_of(group))
    shown = {int(k) for k in profiles.key_G}
    candidates = self._shown(profiles)
    targets = [t for t in self.targets if shown.issuperset(t)]
    lost = [t for t in self.targets if not shown.issuperset(t)]
    if lost and self.asked.genes:
      unseen = dict.fromkeys(t for s in lost for t in s if t not in shown)
      logging.warning(
        '%s: no cell shows %s to the model, so there is no line for %s',
        self.groups.names[group],
        ', '.join(self.symbols.get(t, str(t)) for t in [*unseen][:5]),
        'it' if max(map(len, lost)) == 1 else 'it or a set with it',
      )
    single = [t for (t,) in (s for s in targets if len(s) == 1)]
    found = {}
    matches = matching.match(
      profiles,
      single,
      candidates,
      excluded=self._never_null,
      also=also,
      config=config,
    )
    for target, row in zip(single, matches.null_TK):
      found[(target,)] = [(int(k),) for k in row[row >= 0]]
    for tokens in targets:
      if len(tokens) > 1:
        sets = matching.null_sets(
          profiles,
          tokens,
          config.most,
          candidates,
          excluded=self._never_null,
          also=also,
          config=config,
        )
        found[tokens] = [tuple(sorted(s)) for s in sets]
    return found

  def _check_lines(self) -> None:
    """Refuses a question of which no group would have a line."""
    if any(self.nulls.values()):
      return
    if self.asked.genes:
      why = (
        'no cell shows any of the genes to the model (of a set, every gene '
        'must be shown by some cell): name genes that these cells express'
      )
    else:
      why = (
        f'no gene is shown to the model by {self.asked.min_cells} cells and '
        f'{self.asked.min_detection:.0%} of them: take more cells, or lower '
        'min_cells and min_detection'
      )
    raise errors.UserError(f'{self.cells.name}: {why}')

  def _shown(self, profiles: matching.Profiles) -> list[int]:
    """Tokens of genes that enough of the cells show to the model."""
    asked = self.asked
    enough_G = profiles.cells_G >= asked.min_cells
    enough_G &= profiles.detection_G >= asked.min_detection
    return [t for t in profiles.key_G[enough_G].tolist() if self._has_level(t)]

  def _encoded_of(self, group: int) -> encoding.EncodedCells:
    """Cells in which targets and nulls are matched.

    Over-expression brings genes to where they stand in the reference, whether
    the group expresses them or not: there they are to be alike, and in the
    group as well.
    """
    if self.asked.kind == interventions.OVER_EXPRESS:
      return self.reference.encode()
    return self._cells_of(group)

  def _cells_of(self, group: int) -> encoding.EncodedCells:
    """Cells of a group."""
    is_in_C = self.groups.code_C[self.cells.row_C] == group
    return self.cells.take(np.flatnonzero(is_in_C)).encode()

  def _intervention(
    self, tokens: tuple[int, ...]
  ) -> interventions.Intervention:
    asked = self.asked
    return interventions.Intervention(
      kind=asked.kind,
      tokens=tokens,
      names=tuple(self.symbols.get(t, str(t)) for t in tokens),
      factor=asked.factor if asked.kind == interventions.FOLD else 0.0,
      level=asked.level if asked.kind == interventions.OVER_EXPRESS else '',
    )
