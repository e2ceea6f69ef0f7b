"""Sources -> a corpus: filters, copies, splits, a thorough shuffle, medians.

Four stages, each a list of independent tasks: `pieces` reads ranges of the
sources and scatters their cells over buckets on disk, `copies` finds cells that
stand in several sources, `runs` sorts each bucket by a hash of (seed, source,
row), `shards` writes the files of the corpus. Between them this process decides
which cells stay and which units are held out. The buckets are ranges of the
hash, so the order is a shuffle of the whole corpus and does not depend on how
the work was cut, nor on who did it. Memory holds a piece or a bucket for every
task that runs, the labels of one source, and a few bytes a cell of one source.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import (
  corpus,
  corpus_writer,
  errors,
  paths,
  staging,
  vocabulary,
)
from genecompass_jax.prepare import (
  labels as labels_lib,
  quality,
  sources,
)
from genecompass_jax.prepare.building import (
  builds,
  decisions,
  engines,
  fingerprints,
  opening,
  pieces,
  plans,
  runs,
  sorting,
  stores,
  weights,
)

VOCABULARIES = ('default', 'measured')
BUCKET_BYTES = 256 << 20
SMALL = 1 << 23  # entries below which processes do not pay
MEDIANS = ('histogram', 'exact')
_CREATED = 'created'  # the mark that the arrays of this build are made


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """What a corpus is made with.

  Attributes:
    vocabulary: `default`, all genes of the default table; `measured`, those
      that any source measured; or the name of a vocabulary file.
    filters: thresholds of the quality filters.
    keep_copies: leave cells that stand in the sources more than once.
    validation_share: share of cells to hold out, by whole units; 0 for none.
    validation_units: units to hold out, by name, in place of a share.
    test_units: units for the split `test`.
    apart: refuse a unit of one name in two sources without a `dataset`: it
      may be the same donor, or another one.
    weigh_by: label columns; training cells of rare combinations get weights
      in the manifest, which a loader may use.
    medians: `histogram`, one pass, or `exact`, two more passes over the runs.
    seed: of the order of cells and the choice of units.
    overwrite: replace a corpus that is there.
    scratch: folder for the build; beside the output where ''.
    engine: `pool` or `beam`.
    jobs: processes of the pool; 0 takes one a core, one for little work.
    beam_options: flags of Beam.
    bucket_bytes: size of a bucket, about.
    shard_elements: elements of a shard.
  """

  vocabulary: str = 'default'
  filters: quality.QualityConfig = quality.QualityConfig()
  keep_copies: bool = False
  validation_share: float = 0.1
  validation_units: tuple[str, ...] = ()
  test_units: tuple[str, ...] = ()
  apart: bool = False
  weigh_by: tuple[str, ...] = ()
  medians: str = 'histogram'
  seed: int = 0
  overwrite: bool = False
  scratch: str = ''
  engine: str = 'pool'
  jobs: int = 0
  beam_options: tuple[str, ...] = ()
  bucket_bytes: int = BUCKET_BYTES
  shard_elements: int = corpus_writer.SHARD_ELEMENTS

  def __post_init__(self):
    if not 0 <= self.validation_share <= 0.5:
      raise errors.UserError(
        f'--validation_share {self.validation_share:g} must be between 0 and '
        '0.5'
      )
    if self.medians not in MEDIANS:
      raise errors.UserError(
        f'--medians {self.medians}: give one of {", ".join(MEDIANS)}'
      )
    if self.engine not in engines.ENGINES:
      raise errors.UserError(
        f'--engine {self.engine}: give one of {", ".join(engines.ENGINES)}'
      )
    if self.jobs < 0:
      raise errors.UserError(f'--jobs {self.jobs} must not be negative')

  def result_fields(self) -> dict:
    """The fields that the corpus depends on, as JSON."""
    fields = dataclasses.asdict(self)
    for name in ('overwrite', 'scratch', 'engine', 'jobs', 'beam_options'):
      del fields[name]
    return fields


def prepare(
  configs: Sequence[sources.SourceConfig | sources.Source],
  output: paths.PathLike,
  config: PrepareConfig = PrepareConfig(),
) -> corpus.Corpus:
  """Builds a corpus; the same inputs and seed give the same bytes.

  A build that was killed is continued when it is called again with the same
  arguments, unless a source is an object in memory.

  Args:
    configs: files of cells, or sources that are open already
      (`from_anndata`).
    output: folder or URL of the corpus.
    config: how to build it.

  Returns:
    The corpus, opened. `report.json` in it says what was lost and why.

  Raises:
    UserError: anything about the inputs that the user can mend; then nothing
      is left at `output` that looks like a corpus.
    RetryableError: a worker died; call again to continue.
  """
  output = staging.real(os.fspath(output))
  if not configs:
    raise errors.UserError('no sources were given')
  folder = builds.folder_of(output, config.scratch)
  if not _is_half_written(output, folder):
    corpus_writer.check_output(output, config.overwrite)
  identity = _identity(configs, config)
  with builds.opened(folder, identity):
    _build(configs, output, config, folder)
  return corpus.Corpus.open(output)


def _is_half_written(output: str, folder: str) -> bool:
  """Whether an earlier call of this build left its arrays behind a URL."""
  return (
    not staging.is_local(output)
    and os.path.exists(os.path.join(folder, _CREATED))
    and not paths.exists(paths.join(output, 'manifest.json'))
  )


def _identity(configs: Sequence, config: PrepareConfig) -> dict | None:
  """All that the result depends on; None for objects in memory."""
  found = []
  for each in configs:
    if isinstance(each, sources.Source):
      return None
    files = [
      builds.identity_of_file(name)
      for name in sources.named_files(each)
      if os.path.exists(name)
    ]
    found.append([dataclasses.asdict(each), files])
  chosen: list = []
  if os.path.exists(config.vocabulary):
    chosen = builds.identity_of_file(config.vocabulary)
  text = json.dumps(
    {
      'version': builds.version(),
      'sources': found,
      'config': config.result_fields(),
      'vocabulary': chosen,
    }
  )
  return json.loads(text)


def _build(
  configs: Sequence, output: str, config: PrepareConfig, folder: str
) -> None:
  """The whole way, as far as it has not been gone already."""
  started = time.time()
  place = output
  if staging.is_local(output):
    place = f'{output}.staging' if config.scratch else f'{folder}/corpus'
  is_ours = os.path.exists(os.path.join(folder, _CREATED))
  finished = paths.join(place, 'manifest.json')
  if place != output and is_ours and paths.exists(finished):
    staging.swap(place, output)  # killed between the two
    return
  given = None
  if config.vocabulary not in VOCABULARIES:
    given = vocabulary.Vocabulary.load(config.vocabulary)
  table = sources.table_of(given)
  configs = _expanded(configs)
  labels = labels_lib.Labels(_carried(configs), table.species)
  opened = opening.open_sources(configs, labels, folder, config.apart, table)
  vocab = given or _vocabulary(opened, config.vocabulary)
  vocab.check_rows()
  weights.check(config.weigh_by, labels)
  plan = _plan(opened, labels, vocab, config, folder)
  jobs = config.jobs or _jobs(opened)
  with engines.opened(config.engine, jobs, config.beam_options) as engine:
    hashes = opening.hashes(engine, plan, opened)
    read = builds.run_stage(
      engine,
      plan.stage(pieces.NAME),
      pieces.scatter,
      plan,
      [piece.stop - piece.first for piece in plan.pieces],
      'reading',
    )
    reports = decisions.apply_filters(plan, opened, config.filters)
    found = decisions.NO_COPIES
    if not config.keep_copies:
      found = decisions.remove_copies(
        engine, plan, opened, labels, sum(r['prints'] for r in read), reports
      )
    sorting.count_units(plan, opened, labels)
    split_U, notes = labels_lib.choose_splits(
      labels,
      validation_share=config.validation_share,
      validation_units=config.validation_units,
      test_units=config.test_units,
      seed=config.seed,
    )
    plan.save('splits', split_U[labels.unit_U])
    plan.save('units', labels.unit_U)
    paths.write_json(plan.file('categories.json'), labels.categories)
    kept = sorting.kept_by_species(plan, opened)
    kinds, context = sorting.tasks(plan, opened, labels, split_U)
    results = builds.run_stage(
      engine,
      plan.stage(runs.NAME),
      runs.sort,
      context,
      sorting.cells_of_buckets(plan, context.buckets, kept),
      'sorting',
    )
    written, parts, cells = _writing(plan, place, labels, context, results)
    made = builds.run_stage(
      engine, plan.stage(stores.NAME), stores.write, written, cells, 'writing'
    )
    counted = sorting.count_medians(engine, context, kinds, config.medians)
  vocab.save(paths.join(place, corpus.VOCABULARY))
  for mode, values in counted.items():
    values.save(paths.join(place, f'medians_{mode}.tsv.gz'), vocab)
  split = labels_lib.split_facts(labels, split_U, config.validation_share)
  split['joined_units'] = labels.joined_units
  report = {
    'sources': reports,
    'split': split,
    'copies': found['report'],
    'notes': [*found['notes'], *notes],
  }
  paths.write_json(paths.join(place, 'report.json'), report)
  known: dict[str, dict] = {}
  for result in made:
    known |= result['files']
  corpus_writer.commit(
    place,
    output,
    vocab,
    {
      'seed': config.seed,
      'split': split,
      'copies': found['report'],
      'medians_of': kinds,
      'medians_by': 'source' if plan.is_divided else config.medians,
      'quality': dataclasses.asdict(config.filters),
      'vocabulary_choice': (
        config.vocabulary if config.vocabulary in VOCABULARIES else 'file'
      ),
      'weights': weights.of_kinds(config.weigh_by, labels, results),
      'value_dtype': 'float32' if plan.is_float else 'uint16',
      'sources': [
        opening.manifest_facts(source, report, digest, vocab.species)
        for source, report, digest in zip(opened, reports, hashes)
      ],
      'stores': _store_facts(written, parts, made, vocab),
    },
    seconds=time.time() - started,
    known=known,
  )


def _expanded(configs: Sequence) -> list:
  """A census becomes its datasets, a folder of samples the samples."""
  found: list = []
  for each in configs:
    if isinstance(each, sources.Source):
      found.append(each)
    else:
      found += sources.expand(each)
  return found


def _carried(configs: Sequence) -> list[str]:
  carried: list[str] = []
  for each in configs:
    one = each.config if isinstance(each, sources.Source) else each
    carried += one.obs
  return carried


def _vocabulary(
  opened: Sequence[opening.Opened], name: str
) -> vocabulary.Vocabulary:
  """The default vocabulary, or what of it the sources measured."""
  vocab = vocabulary.Vocabulary.default()
  if name == 'measured':
    measured = set().union(*(source.gene_ids() for source in opened))
    vocab = vocab.restrict(sorted(measured))
  return vocab


def _jobs(opened: Sequence[opening.Opened]) -> int:
  """Processes that pay: one for little work, and for objects in memory."""
  if any(source.held is not None for source in opened):
    return 1
  if sum(source.num_entries for source in opened) < SMALL:
    return 1
  return len(os.sched_getaffinity(0))


def _plan(
  opened: Sequence[opening.Opened],
  labels: labels_lib.Labels,
  vocab: vocabulary.Vocabulary,
  config: PrepareConfig,
  folder: str,
) -> plans.Plan:
  """Cuts the work, and leaves beside it what all tasks read."""
  entries = [source.num_entries for source in opened]
  plan = plans.Plan(
    folder=folder,
    configs=tuple(source.config for source in opened),
    held=tuple(source.held for source in opened),
    is_float=opened[0].is_float,
    is_divided=opened[0].is_divided,
    num_labels=len(labels.columns),
    seed=config.seed,
    bits=pieces.bucket_bits(sum(entries), config.bucket_bytes),
    pieces=pieces.cut(entries, [source.num_cells for source in opened]),
    shard_elements=config.shard_elements,
    weigh_by=config.weigh_by,
    validation_share=config.validation_share,
  )
  vocab.save(plan.file('vocabulary.tsv.gz'))
  plans.forget()
  for species in range(len(vocab.species)):
    measured = np.stack([source.measured(vocab, species) for source in opened])
    plan.save(f'measured/{species}', measured)
    sets = fingerprints.GeneSets.of(measured)
    if config.keep_copies:
      sets = dataclasses.replace(sets, sets_Src=np.zeros_like(sets.sets_Src))
    plan.save(f'sets/member-{species}', sets.member_R)
    plan.save(f'sets/sources-{species}', sets.sets_Src)
  plan.save(
    'weigh_columns',
    np.array([labels.columns.index(n) for n in config.weigh_by], np.int64),
  )
  return plan


def _writing(
  plan: plans.Plan,
  place: str,
  labels: labels_lib.Labels,
  context: runs.Sort,
  results: list[dict],
) -> tuple[stores.Write, list[tuple[int, str, int]], list[int]]:
  """The stores to write, cut into tasks; their arrays are made, once."""
  found = stores.stores_of(plan.vocabulary().species, context.buckets, results)
  parts, cells = stores.parts_of(found, plan.shard_elements)
  written = stores.Write(plan, place, found, labels.columns, tuple(parts))
  mark = plan.file(_CREATED)
  is_there = paths.exists(place)
  if not (is_there and os.path.exists(mark)):
    if os.path.exists(mark):  # it took its name, and the build was killed then
      os.remove(mark)
    plan.stage(stores.NAME).forget()
    if is_there:
      # an old corpus behind a URL, or a dead try: what is half removed is none
      paths.remove(paths.join(place, 'manifest.json'))
      paths.remove_tree(place)
    stores.create(written)
    paths.write_text(mark, '')
  return written, parts, cells


def _store_facts(
  written: stores.Write,
  parts: Sequence[tuple[int, str, int]],
  made: Sequence[Mapping],
  vocab: vocabulary.Vocabulary,
) -> dict:
  """What the manifest says of the stores, by split and species."""
  facts: dict[str, dict] = {}
  for (number, what, _), result in zip(parts, made):
    if what == 'rest':
      store = written.stores[number]
      facts.setdefault(store.split, {})[store.species_name] = stores.facts(
        written,
        store,
        np.array(result['histogram']),
        len(vocab.gene_rows(store.species)),
      )
  return facts
