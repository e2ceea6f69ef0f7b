"""From cells, a model and a question to a table: all of a perturbation.

Genes that are asked about are run beside genes matched with them, in the same
cells; what is said of a gene is how far it stands from these (`statistics`).
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping, Sequence

import anndata
import numpy as np

from genecompass_jax import errors, kernels, paths, pretrained
from genecompass_jax.analysis import cell_groups, model_cells, placed_model
from genecompass_jax.analysis.perturbation import (
  answers as answers_lib,
  axes,
  cell_set,
  effects as effects_lib,
  first_order,
  interventions,
  matching,
  question as question_lib,
  response_sums,
  result_files,
  results as results_lib,
  runs,
  screen as screen_lib,
  statistics,
)
from genecompass_jax.prepare import sources

ALL_GENES = 'all'
_CENTROID_CELLS = 2_000  # most of a group that a centroid is made of
_RESPONSE_BYTES = 4 << 30


def perturb(
  data: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  genes: str | Sequence[str] = ALL_GENES,
  *,
  dtype: str = '',
  folder: str = '',
  shard: tuple[int, int] = (0, 1),
  species: str = '',
  ids_of: str = '',
  layer: str = '',
  allow_noninteger: bool = False,
  reading: sources.SourceConfig = sources.SourceConfig(),
  **question,
) -> results_lib.Results | None:
  """Changes genes in silico, and says what that does beyond matched genes.

    found = gc.perturb(adata, model, ['STAT1', 'IRF9'],
                       group_by='cell_type', donor_key='donor')
    found.genes_df('CD14+ Monocytes')

  Every number is an association learned from expression, not a causal estimate.

  Args:
    data: cells with counts.
    model: a restored model.
    genes: identifiers, or 'all'.
    dtype: 'float32' or 'bfloat16' to compute in; '': as the model says.
    folder: where a run that is stopped goes on from; '' keeps nothing.
    shard: (i, n): this machine runs every n-th part, in the folder of all.
    species: 'human', 'mouse' or 'obs:COLUMN'; '' is that of `reading`: auto.
    ids_of: 'human' where mouse cells carry human identifiers.
    layer: 'X', 'raw' or 'layers/NAME'; '' takes the one that looks like counts.
    allow_noninteger: take corrected counts.
    reading: what else a format needs.
    **question: further fields of `question.Question`.

  Returns:
    Table, units and header; with `responses` the answers of genes by group.
    None for a shard of several.

  Raises:
    UserError: what is asked cannot be done with these cells or this model.
  """
  if isinstance(genes, str):
    genes = () if genes == ALL_GENES else (genes,)
  asked = question_lib.Question(genes=tuple(genes), **question)
  fields = {
    'species': species,
    'ids_of': ids_of,
    'layer': layer,
    'allow_noninteger': allow_noninteger,
  }
  stream = model_cells.open_cells(
    data, model, reading, **{k: v for k, v in fields.items() if v}
  )
  placed = placed_model.place(model, dtype=dtype)
  work = _Work(stream, model, placed, asked)
  sums = work.new_sums() if asked.responses else None
  kept = None
  if folder:
    facts = {'model': model.sha256, 'dtype': placed.config.dtype}
    if sums is not None:
      facts['units'] = sums.sha256
    kept = runs.Folder(folder, work.screen, facts)
  found = runs.run(work.screen, kept, sums=sums, shard=shard)
  return None if found is None else work.results(found, sums)


def perturb_file(
  source: str,
  output: str,
  model: pretrained.PretrainedModel,
  genes: str | Sequence[str] = ALL_GENES,
  *,
  shard: tuple[int, int] = (0, 1),
  **rest,
) -> results_lib.Results | None:
  """`perturb` from a file to the files of `result_files`; goes on if stopped.

  Args:
    source: file or folder of cells.
    output: NAME.parquet; NAME.unfinished holds parts until it is there.
    model: a restored model.
    genes: as for `perturb`.
    shard: as for `perturb`.
    **rest: as for `perturb`.
  """
  unfinished = os.path.splitext(output)[0] + '.unfinished'
  found = perturb(source, model, genes, folder=unfinished, shard=shard, **rest)
  if found is not None:
    result_files.write(found, output)
    shutil.rmtree(unfinished)
  return found


class _Work:
  """Cells, targets, nulls and the screen of one question."""

  def __init__(
    self,
    stream: sources.CellStream,
    model: pretrained.PretrainedModel,
    placed: placed_model.PlacedModel,
    asked: question_lib.Question,
  ):
    self.asked, self._model, self._stream = asked, model, stream
    self._groups = cell_groups.CellGroups.of(stream, asked.group_by)
    self._units = cell_groups.CellGroups.of(stream, asked.donor_key)
    self._group_codes = self._wanted_groups()
    rows = np.concatenate([self._drawn(g) for g in self._group_codes])
    self._cells = cell_set.read(stream, model, np.sort(rows))
    self._axis = self._make_axis(placed)
    self._encoded = self._cells.encode()
    self._symbols = interventions.token_names(
      model.vocabulary, self._cells.species
    )
    self._never_null = self._known(asked.never_null)
    self._reference = self._make_reference()
    self._targets = self._choose_targets(placed)
    self._check_levels()
    # By group, target -> its null sets of tokens.
    self._nulls = {
      group: self._choose_nulls(group) for group in self._group_codes
    }
    sets = dict.fromkeys(self._targets)
    for of_target in self._nulls.values():
      for nulls in of_target.values():
        sets |= dict.fromkeys(nulls)
    self._number_of = {tokens: n for n, tokens in enumerate(sets)}
    self.screen = screen_lib.Screen(
      placed,
      self._cells,
      [self._intervention(tokens) for tokens in sets],
      screen_lib.ScreenConfig(
        pooling=asked.pooling, renormalise=asked.renormalise
      ),
      axis=self._axis,
      reference=self._reference,
    )

  def _wanted_groups(self) -> list[int]:
    asked = self.asked
    wanted = (asked.start,) if asked.goal else asked.groups
    if not wanted:
      return list(range(len(self._groups.names)))
    return [self._group(name) for name in wanted]

  def _group(self, name: str) -> int:
    if name not in self._groups.names:
      raise errors.UserError(
        f'{self._stream.source.name}: no cells with {self._groups.column} = '
        f'{name!r}; there are: {", ".join(self._groups.names[:10])}'
      )
    return self._groups.names.index(name)

  def _drawn(self, group: int, most: int | None = None) -> np.ndarray:
    """Rows of a group, at most `max_cells`, drawn by the seed."""
    most = self.asked.max_cells if most is None else most
    rows = np.flatnonzero(
      (self._groups.code_C == group) & (self._units.code_C >= 0)
    )
    if not most or len(rows) <= most:
      return rows
    # By the row alone: another group, or more cells, do not change a draw.
    order = np.array([kernels.fold(self.asked.seed, int(r)) for r in rows])
    return np.sort(rows[np.argsort(order, kind='stable')[:most]])

  def _make_axis(self, placed: placed_model.PlacedModel) -> axes.Axis | None:
    asked = self.asked
    if not asked.goal:
      return None
    start, goal = (
      (name, self._read(self._group(name), _CENTROID_CELLS))
      for name in (asked.start, asked.goal)
    )
    return axes.between(placed, start, goal, asked.pooling)

  def _read(self, group: int, most: int) -> cell_set.CellSet:
    return cell_set.read(self._stream, self._model, self._drawn(group, most))

  def _make_reference(self) -> cell_set.CellSet:
    """Cells whose levels over-expression raises genes to."""
    asked = self.asked
    name = asked.reference or asked.goal
    if asked.kind != interventions.OVER_EXPRESS or not name:
      return self._cells
    return self._read(self._group(name), 0)

  def _known(self, names: Sequence[str]) -> set[int]:
    """Tokens of a list; what the cells or the model lack is no null anyway."""
    tokens, without = set(), []
    for name in names:
      try:
        tokens |= {
          *interventions.tokens_of([name], self._model.vocabulary, self._cells)
        }
      except errors.UserError:
        without.append(name)
    if without:
      logging.warning(
        'never_null: %d of %d genes are not in these cells or this model: %s',
        *(len(without), len(names), ', '.join(without[:5])),
      )
    return tokens

  def _has_level(self, token: int) -> bool:
    """Whether over-expression has a level to raise a gene to."""
    is_raised = self.asked.kind == interventions.OVER_EXPRESS
    return not is_raised or len(self._reference.expressing(token)) > 0

  def _check_levels(self) -> None:
    for token in (t for tokens in self._targets for t in tokens):
      if not self._has_level(token):
        raise errors.UserError(
          f'{self._symbols[token]}: no cell of the reference expresses it, so '
          'there is no level to raise it to; give another reference, or a fold'
        )

  def _choose_targets(
    self, placed: placed_model.PlacedModel
  ) -> list[tuple[int, ...]]:
    asked, cells = self.asked, self._cells
    if asked.genes:
      found = [
        tuple(
          sorted(
            interventions.tokens_of(
              [name.strip() for name in text.split('+')],
              self._model.vocabulary,
              cells,
            )
          )
        )
        for text in asked.genes
      ]
      found = list(dict.fromkeys(found))
    else:
      profiles = matching.of_cells(
        self._reference.encode()
        if asked.kind == interventions.OVER_EXPRESS
        else self._encoded
      )
      found = [(t,) for t in self._shown(profiles)]
    if not asked.top or asked.top >= len(found):
      return found
    if any(len(tokens) > 1 for tokens in found):
      raise errors.UserError(
        'the first-order estimate is of single genes: leave top out for sets'
      )
    return self._highest(placed, found)

  def _highest(
    self, placed: placed_model.PlacedModel, found: list[tuple[int, ...]]
  ) -> list[tuple[int, ...]]:
    asked = self.asked
    is_toward = asked.tested.measure == statistics.TOWARD
    estimate = first_order.score(
      placed,
      self._cells,
      pooling=asked.pooling,
      axis=self._axis,
      probes=0 if is_toward else first_order.PROBES,
      seed=asked.seed,
    )
    # As the exact effects are judged: among nulls of the same ranks. The largest
    # effects by themselves are those of the highest ranks.
    guess = first_order.as_effects(estimate, self._cells)
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
      guess, matches, self._units.code_C, self._units.names, tested
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
    shown = {int(k) for k in profiles.key_G}
    candidates = self._shown(profiles)
    targets = [t for t in self._targets if shown.issuperset(t)]
    lost = [t for t in self._targets if not shown.issuperset(t)]
    if lost and self.asked.genes:
      logging.warning(
        '%s: no cell shows %s to the model, so there is no line for it',
        self._groups.names[group],
        ', '.join(self._intervention(t).name for t in lost[:5]),
      )
    single = [t for (t,) in (s for s in targets if len(s) == 1)]
    found = {}
    matches = matching.match(
      profiles, single, candidates, excluded=self._never_null, config=config
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
          config=config,
        )
        found[tokens] = [tuple(sorted(s)) for s in sets]
    return found

  def _shown(self, profiles: matching.Profiles) -> list[int]:
    """Tokens of genes that enough of the cells show to the model."""
    asked = self.asked
    enough_G = profiles.cells_G >= asked.min_cells
    enough_G &= profiles.detection_G >= asked.min_detection
    return [t for t in profiles.key_G[enough_G].tolist() if self._has_level(t)]

  def _encoded_of(self, group: int):
    """Cells in which targets and nulls are matched.

    Over-expression brings genes to where they stand in the reference, whether
    the group expresses them or not: there they are alike or not.
    """
    if self.asked.kind == interventions.OVER_EXPRESS:
      return self._reference.encode()
    is_in_C = self._groups.code_C[self._cells.row_C] == group
    return self._cells.take(np.flatnonzero(is_in_C)).encode()

  def _intervention(
    self, tokens: tuple[int, ...]
  ) -> interventions.Intervention:
    asked = self.asked
    return interventions.Intervention(
      kind=asked.kind,
      tokens=tokens,
      names=tuple(self._symbols.get(t, str(t)) for t in tokens),
      factor=asked.factor if asked.kind == interventions.FOLD else 0.0,
      level=asked.level if asked.kind == interventions.OVER_EXPRESS else '',
    )

  def new_sums(self) -> response_sums.ResponseSums:
    """Sums of responses by group and unit.

    Raises:
      UserError: they would not fit.
    """
    names = [f'{g}\t{u}' for g in self._groups.names for u in self._units.names]
    size = len(self._cells.divisor_V)
    need = 12 * len(self.screen.done) * len(names) * size
    if need > _RESPONSE_BYTES:
      raise errors.UserError(
        f'responses of {len(self.screen.done):,} variants in {len(names)} groups '
        f'and units take {need / 2**30:.0f} GiB; ask about fewer genes, or '
        'leave responses out'
      )
    codes = self._groups.code_C * len(self._units.names) + self._units.code_C
    return response_sums.ResponseSums(len(self.screen.done), codes, names, size)

  def results(
    self,
    effects: effects_lib.CellEffects,
    sums: response_sums.ResponseSums | None,
  ) -> results_lib.Results:
    """The table of all groups."""
    asked, vocab = self.asked, self._model.vocabulary
    tests, unit_of, profiles, matches = {}, {}, {}, {}
    for group in self._group_codes:
      name = self._groups.names[group]
      in_group_C = self._groups.code_C == group
      is_own_N = in_group_C[effects.cell_N]
      own = dataclasses.replace(
        effects,
        **{
          f.name: getattr(effects, f.name)[is_own_N]
          for f in dataclasses.fields(effects)
        },
      )
      if not len(own.cell_N):
        continue
      number = int(in_group_C[self._cells.row_C].sum())
      matches[name] = self._matches(group, own)
      profiles[name] = matching.of_effects(own, number)
      unit_of[name] = np.where(in_group_C, self._units.code_C, -1)
      tests[name] = statistics.test(
        own, matches[name], unit_of[name], self._units.names, asked.tested
      )
    if not tests:
      raise errors.UserError(
        f'{self._cells.name}: no cell shows any of the genes to the model'
      )
    gene_ids = results_lib.gene_ids_of(vocab, self._cells.species)
    found = results_lib.tabulate(
      self.screen.done, effects, tests, unit_of, profiles, gene_ids,
      self._header(),
    )  # fmt: skip
    if sums is None:
      return found
    return dataclasses.replace(
      found, answers=self._answers(found, sums, matches, gene_ids)
    )

  def _matches(
    self, group: int, own: effects_lib.CellEffects
  ) -> matching.Matches:
    """Targets and nulls of a group by the numbers of their variants."""
    config = self.asked.matched
    acted = set(np.unique(own.variant_N).tolist())
    lines = {}
    for target, nulls in self._nulls[group].items():
      number = self._number_of[target]
      if number in acted:
        of_nulls = [self._number_of[s] for s in nulls]
        lines[number] = [n for n in of_nulls if n in acted]
    null_TK = np.full((len(lines), config.most), -1, np.int64)
    for t, row in enumerate(lines.values()):
      null_TK[t, : len(row)] = row
    return matching.Matches(
      target_T=np.array([*lines], np.int64),
      null_TK=null_TK,
      distance_TK=np.full(null_TK.shape, np.nan),
      within_T=(null_TK >= 0).sum(1),
      config=config,
    )

  def _answers(
    self,
    found: results_lib.Results,
    sums: response_sums.ResponseSums,
    matches: Mapping[str, matching.Matches],
    gene_ids: Mapping[int, str],
  ) -> dict[str, anndata.AnnData]:
    responses, number = sums.responses(), len(self._units.names)
    answers = {}
    for name, of_group in matches.items():
      first = self._groups.names.index(name) * number
      span = slice(first, first + number)
      own = dataclasses.replace(
        responses,
        units_U=np.array(self._units.names),
        sum_TUG=responses.sum_TUG[:, span],
        cells_TUG=responses.cells_TUG[:, span],
      )
      scored = answers_lib.score(own, of_group, min_cells=self.asked.min_cells)
      answers[name] = result_files.answers_adata(
        found, name, self.screen.done, scored, self._symbols, gene_ids
      )
    return answers

  def _header(self) -> dict[str, str]:
    asked, source = self.asked, self._stream.source
    family = f'{len(self._targets):,} targets'
    if asked.top:
      family += ', chosen by the first-order estimate in the same cells'
    if asked.group_by:
      family += f', in each of {len(self._group_codes)} groups'
    acts = {
      interventions.DELETE: 'counts become 0, in cells that show the gene',
      interventions.FOLD: f'counts times {asked.factor:g}',
      interventions.OVER_EXPRESS: f'counts raised to the {asked.level} of the '
      f'{asked.reference or asked.goal or "perturbed"} cells that express it',
    }
    size = 'follows' if asked.renormalise else 'stays that of the observed cell'
    return results_lib.header(
      model=self._model,
      source=source.name,
      matched=asked.matched,
      tested=asked.tested,
      unit=asked.donor_key,
      family=family,
      done=f'{asked.kind}: {acts[asked.kind]}; the library size {size}',
      cells=f'{self._cells.num_cells:,}, at most {asked.max_cells:,} a group'
      if asked.max_cells
      else f'{self._cells.num_cells:,}',
      groups=asked.group_by or 'all cells are one group',
      axis=f'{asked.start} -> {asked.goal}' if asked.goal else 'none',
      matched_in='the reference cells'
      if asked.kind == interventions.OVER_EXPRESS
      else 'the cells of the group',
      pooling=asked.pooling,
      dtype=self.screen.placed.config.dtype,
      layer=source.layer,
      seed=asked.seed,
    )
