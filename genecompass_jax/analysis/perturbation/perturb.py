"""From cells, a model and a question to a table: all of a perturbation.

Genes that are asked about are run beside genes matched with them, in the same
cells; what is said of a gene is how far it stands from these (`statistics`).
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence

import anndata
import jax
import numpy as np

import genecompass_jax
from genecompass_jax import errors, locks, paths, pretrained
from genecompass_jax.analysis import gene_tokens, model_cells, placed_model
from genecompass_jax.analysis.perturbation import (
  answers as answers_lib,
  design as design_lib,
  effects as effects_lib,
  interventions,
  matching,
  question as question_lib,
  response_sums,
  result_files,
  results as results_lib,
  runs,
  screen as screen_lib,
  stages,
  statistics,
)
from genecompass_jax.prepare import h5ad_copy, sources

ALL_GENES = 'all'
_RESPONSE_BYTES = 4 << 30
# Held while parts are made, and until the output is there.
_PARTS_LOCK, _OUTPUT_LOCK = 'parts.lock', 'lock'


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
  elif not len(genes):
    raise errors.UserError("genes: an empty list; name some, or give 'all'")
  asked = question_lib.Question(genes=tuple(genes), **question)
  fields = {
    'species': species,
    'ids_of': ids_of,
    'layer': layer,
    'allow_noninteger': allow_noninteger,
  }
  with _held(folder, shard, _PARTS_LOCK) if folder else _nothing():
    stream = model_cells.open_cells(
      data, model, reading, **{k: v for k, v in fields.items() if v}
    )
    placed = placed_model.place(model, dtype=dtype)
    facts = _facts(model, placed) if folder else {}
    if folder:
      runs.check(folder, facts)
    design = design_lib.Design(
      stream, model, placed, asked, stages.Stages(folder, facts)
    )
    work = _Work(design, placed)
    sums = work.new_sums() if asked.responses else None
    kept = None
    if folder:
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
  overwrite: bool = False,
  **rest,
) -> results_lib.Results | None:
  """`perturb` from a file to the files of `result_files`; goes on if stopped.

  Args:
    source: file or folder of cells.
    output: NAME.parquet; NAME.unfinished holds parts until it is there.
    model: a restored model.
    genes: as for `perturb`.
    shard: as for `perturb`.
    overwrite: replace the output.
    **rest: as for `perturb`.

  Raises:
    UserError: as `perturb`; the output has another ending, is there, or cannot
      be written; or another process makes it.
  """
  output = os.fspath(output)
  stem = result_files.stem_of(output)
  h5ad_copy.check_output(output, overwrite)
  unfinished = f'{stem}.unfinished'
  with _held(unfinished, shard, _OUTPUT_LOCK):
    found = perturb(
      source, model, genes, folder=unfinished, shard=shard, **rest
    )
    if found is not None:
      result_files.write(found, output)
      shutil.rmtree(unfinished)
  return found


_nothing = contextlib.nullcontext


def _facts(
  model: pretrained.PretrainedModel, placed: placed_model.PlacedModel
) -> dict[str, object]:
  """What effects depend on beside cells and question."""
  return {
    'model': model.fingerprint,
    'vocabulary': model.vocabulary.sha256,
    'medians': model.assets.medians.sha256,
    'encoding': dataclasses.asdict(model.assets.encoding),
    'dtype': placed.config.dtype,
    'genecompass_jax': genecompass_jax.__version__,
    'jax': jax.__version__,
    'numpy': np.__version__,
  }


@contextlib.contextmanager
def _held(folder: str, shard: tuple[int, int], name: str) -> Iterator[None]:
  """Holds a folder: shards beside each other, a run of all parts alone."""
  is_new = not os.path.isdir(folder)
  os.makedirs(folder, exist_ok=True)
  index, number = shard
  busy = (
    f'{folder}: another process, or a shard, is at work there; wait until it '
    'has ended, and give the command again'
  )
  own = f'{folder}: another process runs shard {index}/{number}; wait for it'
  try:
    with contextlib.ExitStack() as stack:
      lock = os.path.join(folder, name)
      stack.enter_context(locks.held(lock, busy, shared=number > 1))
      if number > 1:
        lock = f'{lock}.{index}-{number}'
        stack.enter_context(locks.held(lock, own))
      yield
  finally:
    if is_new:  # nothing came of it, such as a gene that is not known
      with contextlib.suppress(OSError):
        os.rmdir(folder)


class _Work:
  """A design, its screen, and what comes of it."""

  def __init__(
    self, design: design_lib.Design, placed: placed_model.PlacedModel
  ):
    self.design = design
    self.screen = screen_lib.Screen(
      placed,
      design.cells,
      design.done,
      screen_lib.ScreenConfig(
        pooling=design.asked.pooling,
        renormalise=design.asked.renormalise,
        left_out=design.left_out,
      ),
      axis=design.axis,
      reference=design.reference,
    )

  def new_sums(self) -> response_sums.ResponseSums:
    """Sums of responses: in each group of its targets, nulls and units.

    Raises:
      UserError: they would not fit.
    """
    wanted = [self._wanted(group) for group in self.design.group_codes]
    need = response_sums.num_bytes(wanted)
    if need > _RESPONSE_BYTES:
      variants = sum(len(w.variant_T) for w in wanted)
      raise errors.UserError(
        f'responses of {variants:,} variants, by group and unit, take '
        f'{need / 2**30:.0f} GiB, and {_RESPONSE_BYTES / 2**30:.0f} GiB are '
        'allowed: ask about fewer genes, or fewer groups at a time, or leave '
        'responses out'
      )
    return response_sums.ResponseSums(wanted)

  def _wanted(self, group: int) -> response_sums.Wanted:
    """Targets and nulls of a group, its units, and the genes that answer."""
    design, base = self.design, self.screen.base
    row_C = design.cells.row_C
    is_own_C = design.groups.code_C[row_C] == group
    is_own_N = np.repeat(is_own_C, np.diff(base.starts_C1))
    sets = [s for t, nulls in design.nulls[group].items() for s in (t, *nulls)]
    row_C = row_C[is_own_C]
    units, unit_C = np.unique(design.units.code_C[row_C], return_inverse=True)
    return response_sums.Wanted(
      variant_T=np.unique([design.number_of[s] for s in sets]).astype(np.int64),
      token_G=np.setdiff1d(base.gene_ids_N[is_own_N], design.left_out),
      row_C=row_C,
      unit_C=unit_C,
      units_U=[design.units.names[u] for u in units.tolist()],
    )

  def results(
    self,
    effects: effects_lib.CellEffects,
    sums: response_sums.ResponseSums | None,
  ) -> results_lib.Results:
    """The table of all groups."""
    asked, vocab = self.design.asked, self.design.model.vocabulary
    owns, unit_of, profiles, matches = {}, {}, {}, {}
    for group in self.design.group_codes:
      name = self.design.groups.names[group]
      in_group_C = self.design.groups.code_C == group
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
      number = int(in_group_C[self.design.cells.row_C].sum())
      matches[name] = self._matches(group, own)
      profiles[name] = matching.of_effects(own, number)
      unit_of[name] = np.where(in_group_C, self.design.units.code_C, -1)
      owns[name] = own
    if not owns:
      raise errors.UserError(
        f'{self.design.cells.name}: no cell shows any of the genes to the model'
      )
    tested = statistics.resolve(asked.tested, matches.values())
    tests = {
      name: statistics.test(
        own, matches[name], unit_of[name], self.design.units.names, tested
      )
      for name, own in owns.items()
    }
    gene_ids = gene_tokens.gene_ids_of(vocab, self.design.cells.species)
    found = results_lib.tabulate(
      self.design.done, effects, tests, unit_of, profiles, gene_ids,
      self._header(tested), num_not_chosen=self.design.num_not_chosen * len(tests),
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
    config = self.design.asked.matched
    acted = set(np.unique(own.variant_N).tolist())
    lines = {}
    for target, nulls in self.design.nulls[group].items():
      number = self.design.number_of[target]
      if number in acted:
        of_nulls = [self.design.number_of[s] for s in nulls]
        lines[number] = [n for n in of_nulls if n in acted]
    null_TK = np.full((len(lines), config.most), -1, np.int64)
    for t, row in enumerate(lines.values()):
      null_TK[t, : len(row)] = row
    return matching.Matches(
      target_T=np.array([*lines], np.int64),
      null_TK=null_TK,
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
    of_groups = dict(zip(self.design.group_codes, sums.responses()))
    answers = {}
    for name, of_group in matches.items():
      scored = answers_lib.score(
        of_groups[self.design.groups.names.index(name)],
        of_group,
        min_cells=self.design.asked.min_cells,
      )
      answers[name] = result_files.answers_adata(
        found, name, self.design.done, scored, self.design.symbols, gene_ids
      )
    return answers

  def _left_out(self) -> str:
    """What the header says of genes that are in no score."""
    symbols = self.design.symbols
    names = [symbols.get(t, str(t)) for t in self.design.left_out]
    if not names:
      return 'none'
    return 'in no score and on no axis: ' + ', '.join(sorted(names))

  def _header(self, tested: statistics.Config) -> dict[str, str]:
    asked, source = self.design.asked, self.design.stream.source
    family = f'{len(self.design.targets):,} targets'
    if asked.top:
      family += (
        ', chosen by the first-order estimate in the same cells from '
        f'{len(self.design.targets) + self.design.num_not_chosen:,} genes, all '
        'of which are in the family, those that were not chosen with a p of 1'
      )
    if asked.group_by:
      family += f', in each of {len(self.design.group_codes)} groups'
    acts = {
      interventions.DELETE: 'counts become 0, in cells that show the gene',
      interventions.FOLD: f'counts times {asked.factor:g}',
      interventions.OVER_EXPRESS: f'counts raised to the {asked.level} of the '
      f'{asked.reference or asked.goal or "perturbed"} cells that express it',
    }
    size = ''
    if self.design.is_divided:
      kept = (
        'follows' if asked.renormalise else 'stays that of the observed cell'
      )
      size = f'; the library size {kept}'
    return results_lib.header(
      model=self.design.model,
      source=source.name,
      matched=asked.matched,
      tested=tested,
      unit=asked.donor_key,
      family=family,
      done=f'{asked.kind}: {acts[asked.kind]}{size}',
      cells=f'{self.design.cells.num_cells:,}, at most {asked.max_cells:,} a group, '
      'drawn by the seed'
      if asked.max_cells
      else f'{self.design.cells.num_cells:,}',
      groups=asked.group_by or 'all cells are one group',
      axis=f'{asked.start} -> {asked.goal}' if asked.goal else 'none',
      matched_in='the reference cells, detection and rank also in the cells of '
      'the group'
      if asked.kind == interventions.OVER_EXPRESS
      else 'the cells of the group',
      pooling=asked.pooling,
      left_out=self._left_out(),
      dtype=self.screen.placed.config.dtype,
      layer=source.layer,
      seed=asked.seed,
    )
