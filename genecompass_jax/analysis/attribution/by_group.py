"""What predictions came from, by group of cells: which prior, which genes.

Scores of cells are averaged within a unit (donor, sample), then over units;
`unit_means` says when there is an interval. Cells are asked once, in a stream,
and what is finished is kept until the tables are there (`asked_cells`).
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import anndata

import genecompass_jax
from genecompass_jax import errors, paths, pretrained, scratch
from genecompass_jax.analysis import (
  cell_choice,
  model_cells,
  unfinished,
)
from genecompass_jax.analysis.attribution import (
  asked_cells,
  group_axis,
  group_tables,
  integrals,
  parts as parts_lib,
  questions,
  targets,
)
from genecompass_jax.analysis.perturbation import (
  results as results_lib,
  statistics,
)
from genecompass_jax.prepare import sources

MAX_CELLS = 200
TOP = 50  # genes of a target and group

Asked = targets.Target | group_axis.GroupAxis


def attribute_groups(
  cells: anndata.AnnData | paths.PathLike,
  model: pretrained.PretrainedModel,
  asked: Asked | Sequence[Asked],
  *,
  group_by: str = '',
  groups: Sequence[str] = (),
  donor_key: str = '',
  max_cells: int = MAX_CELLS,
  min_cells: int = 3,
  seed: int = 0,
  over: str = parts_lib.PARTS,
  method: str = questions.INTEGRATED,
  baseline: str = parts_lib.MEAN,
  tolerance: float = integrals.TOLERANCE,
  max_points: int = integrals.MAX_POINTS,
  top: int = TOP,
  batch_size: int = 8,
  output: str = '',
  overwrite: bool = False,
  write: Callable[[group_tables.AttributionByGroup], None] | None = None,
  reading: sources.SourceConfig = sources.SourceConfig(),
  **fields: str | bool,
) -> group_tables.AttributionByGroup:
  """Says what predictions came from, averaged over groups of cells.

  It tells what the model used; that is learned from expression and no causal
  estimate.

  Args:
    cells: an AnnData or a file with counts; a file is streamed.
    model: a restored model.
    asked: targets, and axes between two groups.
    group_by: obs column of the groups; '' for one group of all cells.
    groups: only these values of it; empty: all, or the ends of the axes where
      there are axes alone.
    donor_key: obs column of donors or samples, the units; '' for one unit.
    max_cells: most cells of a group that are asked, drawn by the seed from
      those that hold the gene; 0: all.
    min_cells: fewest cells of a unit that has a mean.
    seed: of the cells that are drawn.
    over, method, baseline, tolerance, max_points: as for
      `attribute.attribute`.
    top: genes of each target and group that are in the table of genes.
    batch_size: rows that run together over all local devices.
    output: file that is to be made; finished cells lie in OUTPUT.unfinished,
      and the same call goes on with them. '' keeps nothing.
    write: what is done with the tables before finished cells go.
    overwrite: throw away finished cells of other settings.
    reading: species, layer and what else a format needs.
    **fields: those of `reading` that are others.

  Raises:
    UserError: a target that the model has no answer to, a gene that no cell
      holds, no such column or group, an unknown word, cells that cannot be
      read, or a disk without room.
  """
  choice = cell_choice.ChoiceConfig(
    group_by, groups, donor_key, max_cells, min_cells, seed
  )
  errors.check_whole(top=top, batch_size=batch_size)
  wanted = [asked] if not isinstance(asked, Sequence) else list(asked)
  if not wanted or top < 0 or batch_size < 1:
    raise errors.UserError(
      f'attribution of {len(wanted)} targets, {top=}, {batch_size=}: give at '
      'least one target, and positive numbers'
    )
  axes = [w for w in wanted if isinstance(w, group_axis.GroupAxis)]
  if len(axes) == len(wanted) and not choice.groups:
    ends = dict.fromkeys(e for axis in axes for e in (axis.start, axis.goal))
    choice = dataclasses.replace(choice, groups=tuple(ends))
  for target in wanted:  # what the model cannot answer is said at once
    if not isinstance(target, group_axis.GroupAxis):
      targets.check(target, model.config)
  stream = model_cells.open_cells(cells, model, reading, **fields)
  chosen = cell_choice.ChosenCells.of(stream, choice)
  found = _Targets.of(wanted, stream, model, choice)
  question = questions.Question.of(
    model,
    found.targets[0],
    over=over,
    method=method,
    baseline=baseline,
    tolerance=tolerance,
    max_points=max_points,
  )
  if group_tables.ALL in question.chosen:
    raise errors.UserError(
      f'a prior of this model is called {group_tables.ALL!r}, as all parts together are: '
      'attributions could not be told apart'
    )
  to_ask = asked_cells.AskedCells.of(stream, model, found.targets, chosen)
  dtype = asked_cells.record_type(question, to_ask.longest)
  place, folder = output, ''
  if not output:
    folder = scratch.new_folder('attribution')
    place = os.path.join(folder, 'scores')
  try:
    asked_cells.check_room(place, len(to_ask.row_N), dtype)
    with unfinished.records(
      place,
      asked_cells.settings(question, found.words, stream, to_ask),
      len(to_ask.row_N),
      dtype,
      anew=overwrite,
    ) as records:
      before = asked_cells.run(
        question, found.targets, stream, to_ask, records, batch_size
      )
      tables = group_tables.Tables(
        question, found.labels, stream, chosen, to_ask, top
      )
      result = dataclasses.replace(
        tables.made(records),
        header=_header(question, found, stream, choice, top),
        num_before=before,
      )
      if write is not None:
        write(result)
      return result
  finally:
    if folder:
      scratch.remove(folder)


@dataclasses.dataclass(frozen=True)
class _Targets:
  """Targets, their names in tables, and in words that tell them apart."""

  targets: tuple[targets.Target, ...]
  labels: tuple[str, ...]
  words: tuple[str, ...]

  @classmethod
  def of(cls, wanted, stream, model, choice) -> '_Targets':
    found, labels, words = [], [], []
    for one in wanted:
      if isinstance(one, group_axis.GroupAxis):
        found.append(one.target(stream, model, choice.group_by, choice.seed))
        labels.append(f'{one.start} -> {one.goal}')
        words.append(f'{one!r}, {choice.group_by}, seed {choice.seed}')
        continue
      found.append(one)
      labels.append(targets.label(one))
      words.append(targets.in_words(one))
      if isinstance(one, targets.CellAxis):
        words[-1] += f' {paths.sha256_bytes(one.axis_D.tobytes())}'
    if len(set(labels)) < len(labels):
      raise errors.UserError(
        f'targets are named twice: {", ".join(labels)}; give each once'
      )
    return cls(tuple(found), tuple(labels), tuple(words))


def _header(
  question: questions.Question,
  found: _Targets,
  stream: sources.CellStream,
  choice: cell_choice.ChoiceConfig,
  top: int,
) -> dict[str, str]:
  model, source = question.model, stream.source
  units = {
    label: targets.unit(target)
    for label, target in zip(found.labels, found.targets)
  }
  adds_up = {
    questions.INTEGRATED: 'integrated gradients: scores of the parts add up to '
    f'at_input - at_baseline, within {question.tolerance:g} of their sizes '
    f'or flagged {group_tables.NOT_CLOSE}',
    questions.GRADIENT: 'change times the gradient at the cell: does not add up',
    questions.OCCLUSION: 'exact change when one part of all genes, or all parts '
    'of one gene, are put to the baseline: does not add up',
  }
  baseline = {
    parts_lib.MEAN: "mean of the part over the species' genes",
    parts_lib.ZERO: 'a factor of 0',
  }
  has_values = parts_lib.VALUE in question.chosen
  has_parts = parts_lib.WORD in question.chosen
  return {
    'what': f'attribution: {results_lib.STATEMENT}; it tells what the model used',
    'targets': '; '.join(f'{label} ({unit})' for label, unit in units.items()),
    'hidden': 'an asked gene is hidden as in pretraining; cells that do not '
    'hold it are left out',
    'score': 'positive: raised the target above the baseline, in its unit; of a '
    'mean cell. In the table of genes 0 counts where a cell lacks the gene; '
    'score_held is over the cells that hold it',
    'part': f"'word', 'value' and the priors; {group_tables.ALL!r}: all together, "
    'at_input - at_baseline',
    'size, share': 'mean absolute score of a cell, and its share of those of all '
    'parts: how much is moved, whatever the sign',
    'baseline': '; '.join(
      [f'word and priors: {baseline[question.baseline]}'] * has_parts
      + ['values: 0'] * has_values
    ),
    'method': adds_up[question.method],
    **choice.header(),
    'few units': f'below {statistics.MIN_UNITS} units: every unit in the table '
    'of units, no interval',
    'genes': f'the {top} of the highest absolute score of a target and group',
    'source': source.name,
    'source_sha256': source.sha256,
    'layer': source.layer,
    'model': model.source,
    'model_sha256': model.sha256,
    'model_step': str(model.step),
    'vocabulary': model.vocabulary.sha256,
    'medians': model.assets.medians.sha256,
    'genecompass_jax': genecompass_jax.__version__,
  }
