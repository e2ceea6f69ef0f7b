"""Sources -> a corpus: filters, splits, a thorough shuffle, medians.

One pass reads the sources, takes what the filters need, and scatters all cells
over buckets on disk; a second one loads each bucket, drops what the filters
refuse, sorts the rest by a hash of (seed, source, row), and writes shards. The
buckets are ranges of that hash, so the order is a shuffle of the whole corpus
and does not depend on the size of the buckets. Memory holds one bucket, the
shards being filled, and the labels of one source and some bytes a cell.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from genecompass_jax import (
  corpus,
  corpus_writer,
  encoding,
  errors,
  kernels,
  medians,
  paths,
  progress,
  staging,
  vocabulary,
)
from genecompass_jax.prepare import (
  buckets as buckets_lib,
  labels as labels_lib,
  matrices,
  quality,
  sources,
)

VOCABULARIES = ('default', 'measured')
BUCKET_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """What a corpus is made with.

  Attributes:
    vocabulary: `default`, all genes of the default table; `measured`, those
      that any source measured; or the name of a vocabulary file.
    filters: thresholds of the quality filters.
    validation_share: share of cells to hold out, by whole units; 0 for none.
    validation_units: units to hold out, by name, in place of a share.
    test_units: units for the split `test`.
    seed: of the order of cells and the choice of units.
    overwrite: replace a corpus that is there.
    scratch: folder for the buckets; beside the output where ''.
    bucket_bytes: size of a bucket, about.
    shard_elements: elements of a shard.
  """

  vocabulary: str = 'default'
  filters: quality.QualityConfig = quality.QualityConfig()
  validation_share: float = 0.1
  validation_units: tuple[str, ...] = ()
  test_units: tuple[str, ...] = ()
  seed: int = 0
  overwrite: bool = False
  scratch: str = ''
  bucket_bytes: int = BUCKET_BYTES
  shard_elements: int = corpus_writer.SHARD_ELEMENTS

  def __post_init__(self):
    if not 0 <= self.validation_share <= 0.5:
      raise errors.UserError(
        f'--validation_share {self.validation_share:g} must be between 0 and '
        '0.5'
      )


def prepare(
  configs: Sequence[sources.SourceConfig | sources.Source],
  output: paths.PathLike,
  config: PrepareConfig = PrepareConfig(),
) -> corpus.Corpus:
  """Builds a corpus; the same inputs and seed give the same bytes.

  Args:
    configs: h5ad files, or sources that are open already (`from_anndata`).
    output: folder or URL of the corpus.
    config: how to build it.

  Returns:
    The corpus, opened. `report.json` in it says what was lost and why.

  Raises:
    UserError: anything about the inputs that the user can mend; then nothing
      is left at `output` that looks like a corpus.
  """
  output = staging.real(os.fspath(output))
  corpus_writer.check_output(output, config.overwrite)
  if not configs:
    raise errors.UserError('no sources were given')
  opened = _named_apart(
    [
      c if isinstance(c, sources.Source) else sources.open_h5ad(c)
      for c in configs
    ]
  )
  is_float = _check_one_kind(opened)
  vocab = _vocabulary(opened, config.vocabulary)
  streams = [source.bind(vocab) for source in opened]
  labels = labels_lib.Labels(opened)
  split_U, notes = labels_lib.choose_splits(
    opened,
    labels,
    validation_share=config.validation_share,
    validation_units=config.validation_units,
    test_units=config.test_units,
    seed=config.seed,
  )
  scratch = _scratch_folder(output, config.scratch)
  try:
    buckets = buckets_lib.Buckets(
      opened,
      labels.codes,
      scratch,
      is_float=is_float,
      seed=config.seed,
      bucket_bytes=config.bucket_bytes,
    )
    keeps, reports = _scatter(streams, labels, buckets, config)
    _check_some_left(keeps, reports)
    return _write(
      streams, labels, split_U, notes, buckets, keeps, reports, output, config
    )
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _named_apart(opened: Sequence[sources.Source]) -> list[sources.Source]:
  """Sources of one name get numbers: the manifest tells them apart."""
  seen: dict[str, int] = {}
  named = []
  for source in opened:
    seen[source.name] = seen.get(source.name, 0) + 1
    if seen[source.name] > 1:
      name = f'{source.name}-{seen[source.name]}'
      source = dataclasses.replace(source, name=name)
    named.append(source)
  return named


def _check_one_kind(opened: Sequence[sources.Source]) -> bool:
  floats = [source.name for source in opened if source.is_float]
  if floats and len(floats) < len(opened):
    raise errors.UserError(
      f'{floats[0]} holds corrected counts and others whole counts; they are '
      'not mixed in a corpus: prepare one corpus of each'
    )
  return bool(floats)


def _vocabulary(
  opened: Sequence[sources.Source], name: str
) -> vocabulary.Vocabulary:
  if name not in VOCABULARIES:
    return vocabulary.Vocabulary.load(name)
  vocab = vocabulary.Vocabulary.default()
  if name == 'measured':
    measured = set().union(*(source.gene_ids() for source in opened))
    vocab = vocab.restrict(sorted(measured))
  return vocab


def _scratch_folder(output: str, scratch: str) -> str:
  if scratch:
    os.makedirs(scratch, exist_ok=True)
    return tempfile.mkdtemp(prefix='buckets-', dir=scratch)
  if '://' in output:
    return tempfile.mkdtemp(prefix='genecompass-buckets-')
  return staging.folder(f'{os.path.abspath(output)}.buckets')


def _scatter(
  streams: Sequence[sources.CellStream],
  labels: labels_lib.Labels,
  buckets: buckets_lib.Buckets,
  config: PrepareConfig,
) -> tuple[list[np.ndarray], list[dict]]:
  """Reads every source once -> which cells pass, and a report of each."""
  total = sum(stream.source.num_cells for stream in streams)
  keeps, reports = [], []
  with progress.Progress(total, 'cells', 'reading') as bar:
    for number, stream in enumerate(streams):
      source = stream.source
      names = source.cell_names()
      parts: dict[int, list[quality.CellStatistics]] = {}
      indices: dict[int, list[np.ndarray]] = {}
      lengths_C = np.zeros(source.num_cells, np.int32)
      for chunk in stream.chunks():
        parts.setdefault(chunk.species, []).append(chunk.statistics)
        indices.setdefault(chunk.species, []).append(chunk.index_C)
        lengths_C[chunk.index_C] = np.diff(chunk.cells.starts_C1)
        buckets.add(number, chunk, names[chunk.index_C])
        bar.update(len(chunk.index_C), source.name)
      sample_C = _samples(source, labels.codes[number][1])
      keep_C = np.zeros(source.num_cells, bool)
      filters = {}
      for species, statistics in parts.items():
        index_C = np.concatenate(indices[species])
        has_coding, has_mito = source.has_flag(species)
        keep_C[index_C], report = quality.keep_cells(
          quality.CellStatistics.concatenate(statistics),
          sample_C[index_C],
          config.filters,
          measured=source.num_columns,
          has_coding=has_coding,
          has_mito=has_mito,
        )
        filters[vocabulary.SPECIES[species]] = report
      unknown = int((keep_C & (lengths_C == 0)).sum())
      keep_C &= lengths_C > 0
      keeps.append(keep_C)
      reports.append(
        {
          'name': source.name,
          'cells': source.num_cells,
          'kept': int(keep_C.sum()),
          'layer': source.layer_reason,
          'identifiers': source.identifier_reason,
          'assay': source.assay,
          'genes': stream.report(),
          'quality': filters,
          'cells_without_known_genes': unknown,
        }
      )
  return keeps, reports


def _samples(source: sources.Source, unit_C: np.ndarray) -> np.ndarray:
  """Codes of the samples that the filters compare within."""
  if not source.config.sample:
    return unit_C
  codes_C, names = source.codes(source.config.sample)
  return np.where(codes_C < 0, len(names), codes_C)


def _check_some_left(
  keeps: Sequence[np.ndarray], reports: Sequence[Mapping]
) -> None:
  if any(keep_C.any() for keep_C in keeps):
    return
  filters = [
    f for r in reports for q in r['quality'].values() for f in q['filters']
  ]
  worst = max(filters, key=lambda f: f['removed'], default={'removed': 0})
  if not worst['removed']:
    cells = sum(report['cells'] for report in reports)
    raise errors.UserError(
      f'none of {cells} cells expresses a gene that is known here; check that '
      'the matrix holds counts, and --species and --ids-of'
    )
  raise errors.UserError(
    f'no cell passed the filters; {worst["name"]} (threshold '
    f'{worst["threshold"]}) removed {worst["removed"]}: lower it with '
    f'--{worst["name"]}'
  )


def _write(
  streams: Sequence[sources.CellStream],
  labels: labels_lib.Labels,
  split_U: np.ndarray,
  notes: list[str],
  buckets: buckets_lib.Buckets,
  keeps: Sequence[np.ndarray],
  reports: Sequence[dict],
  output: str,
  config: PrepareConfig,
) -> corpus.Corpus:
  """Buckets -> shards, medians, report, manifest."""
  opened = [stream.source for stream in streams]
  vocab = streams[0].vocabulary
  num_species = len(vocabulary.SPECIES)
  writer = corpus_writer.CorpusWriter(
    output,
    vocab,
    sources=[_source_facts(source, r) for source, r in zip(opened, reports)],
    measured={
      species: np.stack([stream.measured(species) for stream in streams])
      for species in range(num_species)
    },
    categories=labels.categories,
    value_dtype='float32' if opened[0].is_float else 'uint16',
    overwrite=config.overwrite,
    shard_elements=config.shard_elements,
  )
  kept = sum(int(keep_C.sum()) for keep_C in keeps)
  histograms: dict[str, dict[int, medians.MedianHistogram]] = {
    mode: {} for mode in encoding.MODES
  }
  assays = {}
  with writer, progress.Progress(kept, 'cells', 'writing') as bar:
    for species in range(num_species):
      if not any(species in stream.species for stream in streams):
        continue
      train = _Training(opened, keeps, labels, split_U, species, config)
      token_R = streams[0].tokens(species)
      counted = [
        medians.MedianHistogram(mode, token_R, vocab.size)
        for mode in encoding.MODES
      ]
      for cells, order_C in buckets.read(species):
        for split, piece in _pieces(
          cells, order_C, keeps, labels, split_U, config
        ):
          store = writer.store(corpus.SPLITS[split], species)
          codes = piece.records_C['codes']
          obs = {name: codes[:, k] for k, name in enumerate(labels.columns)}
          obs['source_row'] = piece.records_C['source_row']
          ragged = piece.ragged()
          store.append(ragged, obs, piece.names)
          if split == 0:
            mine_C = train.gives_medians(codes[:, 0])
            if not mine_C.all():
              ragged = piece.take(np.flatnonzero(mine_C)).ragged()
            for histogram in counted:
              histogram.add(ragged)
          bar.update(len(piece.records_C))
      if train.assay:
        assays[vocabulary.SPECIES[species]] = train.assay
        for histogram in counted:
          histograms[histogram.mode][species] = histogram
    for mode in encoding.MODES:
      if histograms[mode]:
        writer.write_medians(
          medians.Medians.from_histograms(vocab, histograms[mode])
        )
    rule = labels_lib.split_facts(labels, split_U, config.validation_share)
    report = {'sources': list(reports), 'split': rule, 'notes': notes}
    writer.write_json('report.json', report)
    writer.commit(
      {
        'seed': config.seed,
        'split': rule,
        'medians_of': assays,
        'quality': dataclasses.asdict(config.filters),
        'vocabulary_choice': (
          config.vocabulary if config.vocabulary in VOCABULARIES else 'file'
        ),
      }
    )
  return corpus.Corpus.open(output)


class _Training:
  """Whose cells give the medians of a species: those of one kind of assay."""

  def __init__(self, opened, keeps, labels, split_U, species, config):
    kinds = set()
    for number, source in enumerate(opened):
      mine_C = keeps[number] & (source.species_C == species)
      unit_C = labels.codes[number][1][mine_C]
      by_cell = labels.split_by_cell[number]
      if len(unit_C) and (by_cell or (split_U[unit_C] == 0).any()):
        kinds.add(source.assay)
    self.assay = next((a for a in labels_lib.ASSAY_ORDER if a in kinds), '')
    self._is_mine = np.array([s.assay == self.assay for s in opened])

  def gives_medians(self, source_C: np.ndarray) -> np.ndarray:
    """Bool [C] for cells of these sources."""
    return self._is_mine[source_C]


def _pieces(
  cells: buckets_lib.Cells,
  order_C: np.ndarray,
  keeps: Sequence[np.ndarray],
  labels: labels_lib.Labels,
  split_U: np.ndarray,
  config: PrepareConfig,
) -> Iterator[tuple[int, buckets_lib.Cells]]:
  """Yields (split, cells) in small portions, without the refused cells."""
  records_C = cells.records_C
  source_C = records_C['codes'][:, 0]
  split_C = split_U[records_C['codes'][:, 1]].copy()
  keep_C = np.zeros(len(records_C), bool)
  for number in np.unique(source_C):
    mine = np.flatnonzero(source_C == number)
    keep_C[mine] = keeps[number][records_C['source_row'][mine]]
    if labels.split_by_cell[number]:
      # another hash than the order's, or a split would be a range of it
      draw = kernels.mix64_all(records_C['key'][mine] + kernels.GOLDEN)
      share = draw.astype(np.float64) / 2.0**64
      split_C[mine] = share < config.validation_share
  for split in range(len(corpus.SPLITS)):
    index_C = order_C[(keep_C & (split_C == split))[order_C]]
    for a in range(0, len(index_C), matrices.CHUNK_CELLS):
      yield split, cells.take(index_C[a : a + matrices.CHUNK_CELLS])


def _source_facts(source: sources.Source, report: Mapping) -> dict:
  """What the manifest says of a source; no path and no time."""
  return {
    'name': source.name,
    'file': os.path.basename(source.config.path),
    'sha256': source.sha256,
    'dataset': source.dataset,
    'licence': source.config.licence,
    'layer': source.layer,
    'assay': source.assay,
    'species': sorted(vocabulary.SPECIES[s] for s in source.resolutions),
    'ids_of': source.config.ids_of,
    'unit': source.config.unit,
    'measured_columns': source.num_columns,
    'total': (
      f'obs column {source.config.total}'
      if source.config.total
      else 'sum over all columns of the source, before any vocabulary'
    ),
    'cells': report['cells'],
    'kept': report['kept'],
  }
