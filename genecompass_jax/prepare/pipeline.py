"""Sources -> a corpus: filters, splits, a thorough shuffle, medians.

One pass reads the sources, takes what the filters need, and scatters all cells
over buckets on disk; a second one loads each bucket, drops what the filters
refuse, sorts the rest by a hash of (seed, source, row), and writes shards. The
buckets are ranges of that hash, so the order is a shuffle of the whole corpus
and does not depend on the size of the buckets. Memory holds one bucket, the
shards being filled, and the labels of one source and some bytes a cell.
"""

import dataclasses
import functools
import hashlib
import json
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
  medians,
  paths,
  progress,
  staging,
  vocabulary,
)
from genecompass_jax.prepare import matrices, quality, sources

VOCABULARIES = ('default', 'measured')
ASSAY_ORDER = ('umi', 'full_length', 'panel')  # whose cells give the medians
BUCKET_BYTES = 256 << 20
FLUSH_ELEMENTS = 1 << 22  # gathered before the buckets are written to
FLUSH_EACH = 1 << 15  # and for each bucket, so that writes do not get tiny
SLACK = 1.5  # held-out cells may exceed the share asked for by this factor


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
  output = os.fspath(output)
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
  labels = _Labels(opened)
  split_U, notes = _splits(opened, labels, config)
  scratch = _scratch_folder(output, config.scratch)
  try:
    buckets = _Buckets(opened, labels, scratch, is_float, config)
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


class _Labels:
  """Integer codes for all labels, the same in all sources.

  Attributes:
    columns: obs columns of the corpus, `source` and `unit` first.
    categories: names behind the codes, in order of first appearance.
    codes: for each source, int32 [columns, cells].
    split_by_cell: for each source, whether single cells are its units.
  """

  def __init__(self, opened: Sequence[sources.Source]):
    carried = dict.fromkeys(
      name for source in opened for name in source.config.obs
    )
    clash = {'source', 'unit', 'dataset', 'source_row'} & set(carried)
    if clash:
      raise errors.UserError(
        f'--obs {sorted(clash)[0]}: the corpus has a column of that name'
      )
    self.columns = ('source', 'unit', 'dataset', *carried)
    self._code_of: dict[str, dict[str, int]] = {c: {} for c in self.columns}
    self.codes: list[np.ndarray] = []
    self.split_by_cell: list[bool] = []
    for source in opened:
      self.codes.append(
        np.stack([self._column(source, name) for name in self.columns])
      )
      self.split_by_cell.append(source.config.unit == sources.CELL)

  @property
  def categories(self) -> dict[str, list[str]]:
    return {name: list(codes) for name, codes in self._code_of.items()}

  def _column(self, source: sources.Source, name: str) -> np.ndarray:
    unit = source.config.unit
    if name == 'source':
      return self._constant(name, source.name, source.num_cells)
    if name == 'dataset' or (name == 'unit' and unit in ('', sources.CELL)):
      return self._constant(name, source.dataset, source.num_cells)
    if name == 'unit':
      codes_C, names = source.codes(unit)
      # cells without a unit are one, and are never scattered over splits
      names = [f'{source.dataset}:{n}' for n in [*names, 'unknown']]
      codes_C = np.where(codes_C < 0, len(names) - 1, codes_C)
    elif name in source.obs:
      codes_C, names = source.codes(name)
    elif name in source.config.obs:
      source.codes(name)  # raises
    else:  # another source has it
      return np.full(source.num_cells, -1, np.int32)
    used = np.unique(codes_C[codes_C >= 0])
    table = np.full(len(names) + 1, -1, np.int32)
    for code in used:
      table[code] = self._code(name, names[code])
    return table[codes_C]  # the last entry, -1, for code -1

  def _constant(self, name: str, value: str, num_cells: int) -> np.ndarray:
    return np.full(num_cells, self._code(name, value), np.int32)

  def _code(self, column: str, value: str) -> int:
    known = self._code_of[column]
    return known.setdefault(value, len(known))


def _splits(
  opened: Sequence[sources.Source], labels: _Labels, config: PrepareConfig
) -> tuple[np.ndarray, list[str]]:
  """Index into `corpus.SPLITS` of every unit, and lines for the report."""
  names = labels.categories['unit']
  cells_SU = np.zeros((len(vocabulary.SPECIES), len(names)), np.int64)
  assay_U = np.zeros(len(names), np.int64)
  for source, codes, by_cell in zip(opened, labels.codes, labels.split_by_cell):
    assay_U[np.unique(codes[1])] = ASSAY_ORDER.index(source.assay)
    if not by_cell:
      np.add.at(cells_SU, (source.species_C, codes[1]), 1)
  split_U = np.zeros(len(names), np.int8)
  notes = []
  for split, asked in ((1, config.validation_units), (2, config.test_units)):
    for name in asked:
      units = [
        u for u, n in enumerate(names) if name in (n, n.partition(':')[2])
      ]
      if not units:
        shown = ', '.join(names[:8]) + (' ...' if len(names) > 8 else '')
        raise errors.UserError(f'no unit {name!r}; there are: {shown}')
      split_U[units] = split
  if config.validation_units or not config.validation_share:
    if not (split_U == 0).any() and not any(labels.split_by_cell):
      raise errors.UserError('every unit is held out; none is left to train on')
    return split_U, notes
  cells_SU = cells_SU * (split_U == 0)
  for species, cells_U in enumerate(cells_SU):
    if not cells_U.any():
      continue
    chosen = _hold_out(
      cells_U, assay_U, names, config.validation_share, config.seed
    )
    split_U[chosen] = 1
    if not len(chosen):
      held = ', '.join(names[u] for u in np.flatnonzero(cells_U)[:3])
      notes.append(
        f'no {vocabulary.SPECIES[species]} unit can be held out: all cells '
        f'are of {held}'
      )
  if not (split_U == 1).any() and not any(labels.split_by_cell):
    raise errors.UserError(
      f'{notes[0]}; name the column of donors or studies with --unit COLUMN, '
      'add another source, do without validation (--validation_share 0), or '
      'split single cells knowingly (--unit cell, marked leaky)'
    )
  return split_U, notes


def _hold_out(
  cells_U: np.ndarray,
  assay_U: np.ndarray,
  names: Sequence[str],
  share: float,
  seed: int,
) -> np.ndarray:
  """Units to hold out: in order of a hash, while they fit the share.

  The last unit of an assay stays in training, or its medians would be lost.
  Where no unit fits, the smallest is taken, if it is no more than half.
  """

  def rank(unit: int) -> str:
    return hashlib.sha256(f'{seed}:{names[unit]}'.encode()).hexdigest()

  units = sorted(np.flatnonzero(cells_U), key=rank)
  total = cells_U.sum()
  left = np.bincount(assay_U[units], minlength=len(ASSAY_ORDER))
  chosen, held = [], 0
  for unit in units:
    fits = held + cells_U[unit] <= SLACK * share * total
    if fits and left[assay_U[unit]] > 1:
      chosen.append(unit)
      left[assay_U[unit]] -= 1
      held += cells_U[unit]
    if held >= share * total:
      break
  if not chosen:
    smallest = min(units, key=lambda u: (cells_U[u], rank(u)))
    if 2 * cells_U[smallest] <= total:
      chosen = [smallest]
  return np.array(chosen, np.int64)


def _scratch_folder(output: str, scratch: str) -> str:
  if scratch:
    os.makedirs(scratch, exist_ok=True)
    return tempfile.mkdtemp(prefix='buckets-', dir=scratch)
  if '://' in output:
    return tempfile.mkdtemp(prefix='genecompass-buckets-')
  return staging.folder(f'{os.path.abspath(output)}.buckets')


@encoding.compiled
def _take(rows_N, counts_N, starts_C1, index_C, out_rows_N, out_counts_N):
  out = 0
  for c in range(len(index_C)):
    a, b = starts_C1[index_C[c]], starts_C1[index_C[c] + 1]
    out_rows_N[out : out + b - a] = rows_N[a:b]
    out_counts_N[out : out + b - a] = counts_N[a:b]
    out += b - a


@dataclasses.dataclass(frozen=True)
class _Cells:
  """Cells on their way: counts, and a record and a name for each."""

  rows_N: np.ndarray
  counts_N: np.ndarray
  records_C: np.ndarray
  names: np.ndarray

  @functools.cached_property
  def starts_C1(self) -> np.ndarray:  # noqa: N802
    starts_C1 = np.zeros(len(self.records_C) + 1, np.int64)
    np.cumsum(self.records_C['length'], out=starts_C1[1:])
    return starts_C1

  def take(self, index_C: np.ndarray) -> '_Cells':
    records_C = self.records_C[index_C]
    size = int(records_C['length'].sum(dtype=np.int64))
    rows_N = np.empty(size, self.rows_N.dtype)
    counts_N = np.empty(size, self.counts_N.dtype)
    _take(self.rows_N, self.counts_N, self.starts_C1, index_C, rows_N, counts_N)
    return _Cells(rows_N, counts_N, records_C, self.names[index_C])

  def ragged(self) -> encoding.RaggedCells:
    totals_C = self.records_C['total']
    return encoding.RaggedCells(
      self.rows_N, self.counts_N, self.starts_C1, totals_C
    )


class _Buckets:
  """Files of cells, one for each range of the hash that orders the corpus."""

  def __init__(
    self,
    opened: Sequence[sources.Source],
    labels: _Labels,
    folder: str,
    is_float: bool,
    config: PrepareConfig,
  ):
    self._folder = folder
    self._counts_dtype = np.dtype('<f4' if is_float else '<u4')
    self._record = np.dtype(
      [
        ('key', '<u8'),
        ('source_row', '<i8'),
        ('total', '<f8'),
        ('length', '<i4'),
        ('codes', '<i4', (len(labels.columns),)),
      ]
    )
    self._seed = config.seed
    entries = sum(source.num_entries for source in opened)
    self._bits = max(0, int(np.ceil(np.log2(max(
      6 * entries / config.bucket_bytes, 1
    )))))  # fmt: skip
    self._labels = labels
    self._waiting: dict[int, list[_Cells]] = {}

  def add(self, source: int, chunk: sources.Chunk, names: np.ndarray) -> None:
    """Takes the cells of a chunk that have any known gene."""
    records_C = np.zeros(len(chunk.index_C), self._record)
    base = encoding.fold(self._seed, source)
    with np.errstate(over='ignore'):
      records_C['key'] = encoding.mix64.py_func(
        base + chunk.index_C.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
      )
    records_C['source_row'] = chunk.index_C
    records_C['total'] = chunk.cells.totals_C
    records_C['length'] = np.diff(chunk.cells.starts_C1)
    records_C['codes'] = self._labels.codes[source][:, chunk.index_C].T
    cells = _Cells(
      chunk.cells.gene_rows_N, chunk.cells.counts_N, records_C, names
    )
    waiting = self._waiting.setdefault(chunk.species, [])
    waiting.append(cells)
    enough = max(FLUSH_ELEMENTS, FLUSH_EACH << self._bits)
    if sum(len(c.rows_N) for c in waiting) >= enough:
      self._flush(chunk.species)

  def _flush(self, species: int) -> None:
    cells = _concatenate(self._waiting.pop(species, []))
    if cells is None:
      return
    bucket_C = self._bucket(cells.records_C['key'])
    if self._bits:
      order_C = np.argsort(bucket_C, kind='stable')
      cells, bucket_C = cells.take(order_C), bucket_C[order_C]
    starts_C1 = cells.starts_C1
    for bucket in np.unique(bucket_C):
      a, b = np.searchsorted(bucket_C, (bucket, bucket + 1))
      elements = slice(starts_C1[a], starts_C1[b])
      text = '\n'.join(cells.names[a:b]) + '\n'
      for kind, data in (
        ('rows', cells.rows_N[elements]),
        ('counts', cells.counts_N[elements]),
        ('records', cells.records_C[a:b]),
        ('names', np.frombuffer(text.encode('utf-8'), np.uint8)),
      ):
        with open(self._file(species, int(bucket), kind), 'ab') as file:
          data.tofile(file)

  def _bucket(self, key_C: np.ndarray) -> np.ndarray:
    if not self._bits:
      return np.zeros(len(key_C), np.int64)
    return (key_C >> np.uint64(64 - self._bits)).astype(np.int64)

  def _file(self, species: int, bucket: int, kind: str) -> str:
    return os.path.join(self._folder, f'{species}-{bucket}.{kind}')

  def read(self, species: int) -> Iterator[tuple[_Cells, np.ndarray]]:
    """Yields the buckets in order, each with the order of its cells."""
    self._flush(species)
    for bucket in range(2**self._bits):
      if os.path.exists(self._file(species, bucket, 'records')):
        cells = self._load(species, bucket)
        yield cells, np.argsort(cells.records_C['key'], kind='stable')

  def _load(self, species: int, bucket: int) -> _Cells:
    read = {}
    for kind, dtype in (
      ('rows', np.uint16),
      ('counts', self._counts_dtype),
      ('records', self._record),
    ):
      name = self._file(species, bucket, kind)
      read[kind] = np.fromfile(name, dtype)
      os.remove(name)
    name = self._file(species, bucket, 'names')
    with open(name, encoding='utf-8', newline='\n') as file:
      names = np.array(file.read().split('\n')[:-1], object)
    os.remove(name)
    return _Cells(read['rows'], read['counts'], read['records'], names)


def _concatenate(parts: Sequence[_Cells]) -> _Cells | None:
  if len(parts) < 2:
    return parts[0] if parts else None
  fields = [field.name for field in dataclasses.fields(_Cells)]
  return _Cells(
    *(np.concatenate([getattr(p, name) for p in parts]) for name in fields)
  )


def _scatter(
  streams: Sequence[sources.CellStream],
  labels: _Labels,
  buckets: _Buckets,
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
      for chunk in stream.chunks(scratch=buckets._folder):
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
  worst = max(
    (f for r in reports for q in r['quality'].values() for f in q['filters']),
    key=lambda f: f['removed'],
  )
  raise errors.UserError(
    f'no cell passed the filters; {worst["name"]} (threshold '
    f'{worst["threshold"]}) removed {worst["removed"]}: lower it with '
    f'--{worst["name"]}'
  )


def _write(
  streams: Sequence[sources.CellStream],
  labels: _Labels,
  split_U: np.ndarray,
  notes: list[str],
  buckets: _Buckets,
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
    rule = _split_facts(labels, split_U, config)
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
    self.assay = next((a for a in ASSAY_ORDER if a in kinds), '')
    self._is_mine = np.array([s.assay == self.assay for s in opened])

  def gives_medians(self, source_C: np.ndarray) -> np.ndarray:
    """Bool [C] for cells of these sources."""
    return self._is_mine[source_C]


def _pieces(
  cells: _Cells,
  order_C: np.ndarray,
  keeps: Sequence[np.ndarray],
  labels: _Labels,
  split_U: np.ndarray,
  config: PrepareConfig,
) -> Iterator[tuple[int, _Cells]]:
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
      with np.errstate(over='ignore'):
        draw = encoding.mix64.py_func(
          records_C['key'][mine] + np.uint64(0x9E3779B97F4A7C15)
        )
      share = draw.astype(np.float64) / 2.0**64
      split_C[mine] = share < config.validation_share
  for split in range(len(corpus.SPLITS)):
    index_C = order_C[(keep_C & (split_C == split))[order_C]]
    for a in range(0, len(index_C), matrices.CHUNK_CELLS):
      yield split, cells.take(index_C[a : a + matrices.CHUNK_CELLS])


def _split_facts(
  labels: _Labels, split_U: np.ndarray, config: PrepareConfig
) -> dict:
  names = labels.categories['unit']
  leaky = any(labels.split_by_cell)
  return {
    'unit': sources.CELL if leaky else 'unit',
    'leaky': leaky,
    'units': len(names),
    'validation_units': [n for n, s in zip(names, split_U) if s == 1],
    'test_units': [n for n, s in zip(names, split_U) if s == 2],
    'validation_share': config.validation_share,
  }


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


def read_report(path: paths.PathLike) -> dict:
  """The report of a corpus."""
  return json.loads(paths.read_text(paths.join(path, 'report.json')))


def describe(report: Mapping) -> str:
  """The report of a corpus in plain text."""
  lines = []
  for source in report['sources']:
    lines.append(
      f'{source["name"]}: {source["kept"]:,} of {source["cells"]:,} cells kept '
      f'({source["assay"]})'
    )
    lines.append(f'  counts: {source["layer"]}')
    lines.append(f'  identifiers: {source["identifiers"]}')
    for species, genes in source['genes'].items():
      lines.append(
        f'  {species} genes: {genes["genes"]:,} from {genes["inputs"]:,} '
        f'columns ({genes["alias"]:,} by an alias, {genes["duplicates"]:,} '
        f'duplicates summed), {genes["lost"]:,} lost, {genes["ambiguous"]:,} '
        f'ambiguous; {genes.get("share_umis_lost", 0):.2%} of counts lost'
      )
      if genes['examples_lost']:
        lines.append(f'    lost: {", ".join(genes["examples_lost"][:5])}')
    for species, filtered in source['quality'].items():
      for f in filtered['filters']:
        if f['threshold'] is None:
          lines.append(f'  {species} {f["name"]}: skipped, {f["note"]}')
        else:
          note = f' ({f["note"]})' if 'note' in f else ''
          lines.append(
            f'  {species} {f["name"]} {f["threshold"]:g}{note}: '
            f'{f["removed"]:,} cells removed'
          )
      lines += [f'  WARNING {line}' for line in filtered['warnings']]
    if source['cells_without_known_genes']:
      lines.append(
        f'  {source["cells_without_known_genes"]:,} cells without a known gene '
        'left out'
      )
  split = report['split']
  held = ', '.join(split['validation_units'][:5]) or 'none'
  if len(split['validation_units']) > 5:
    held += ' ...'
  if split['leaky']:
    held += '; single cells are split: LEAKY'
  lines.append(f'validation: {held} (of {split["units"]:,} units)')
  return '\n'.join([*lines, *report['notes']])
