"""Every source is opened once, to see what it is; little of it stays in memory.

What does stay grows with the number of sources. What grows with their cells,
labels and species, goes to the folder of the build.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genecompass_jax import errors, gene_ids, gene_table, paths, vocabulary
from genecompass_jax.prepare import labels as labels_lib, sources
from genecompass_jax.prepare.building import builds, engines, plans


@dataclasses.dataclass(frozen=True)
class Opened:
  """What a build keeps of a source.

  Attributes:
    number: of the source.
    config: with the name that the manifest gives it.
    held: the source itself, where it is an object in memory.
    dataset: label of the study.
    assay: kind of assay, or `mixed`.
    controls: a line on the cells that are taken of a screen; '' of no screen.
    num_cells: in the source.
    num_columns: genes that it measured, known or not.
    num_entries: stored entries.
    layer: the matrix that is read, and why.
    identifiers: which were used.
    is_float: whether values are corrected counts.
    is_divided: whether they are counts divided by medians already.
    resolutions: for each species, where the columns lead.
    flags: for each species, whether coding and mitochondrial genes are known.
  """

  number: int
  config: sources.SourceConfig
  held: Any
  dataset: str
  assay: str
  controls: str
  num_cells: int
  num_columns: int
  num_entries: int
  layer: tuple[str, str]
  identifiers: str
  is_float: bool
  is_divided: bool
  resolutions: dict[int, gene_ids.Resolution]
  flags: dict[int, tuple[bool, bool]]

  @property
  def name(self) -> str:
    """Of the source."""
    return self.config.name

  def gene_ids(self) -> set[str]:
    """Genes that the source measured in any of its species."""
    return {
      gene_id
      for resolution in self.resolutions.values()
      for gene_id in resolution.gene_ids
      if gene_id is not None
    }

  def measured(self, vocab: vocabulary.Vocabulary, species: int) -> np.ndarray:
    """Bool [R]: genes of a species' list that the source measured."""
    rows_R = vocab.gene_rows(species)
    if species not in self.resolutions:
      return np.zeros(len(rows_R), bool)
    mine = set(self.resolutions[species].gene_ids)
    ids = vocab.genes.gene_ids
    return np.array([ids[g] in mine for g in rows_R], bool)


def open_sources(
  configs: Sequence[sources.SourceConfig | sources.Source],
  labels: labels_lib.Labels,
  folder: str,
  apart: bool,
  table: gene_table.GeneTable,
) -> list[Opened]:
  """Opens the sources in turn, and leaves their labels in a folder.

  Args:
    configs: files, or sources that are open already.
    labels: is told of every source.
    folder: of the build; `codes/N.npy`, `species/N.npy`, `samples/N.npy`,
      `assays/N.npy` and `perturbed/N.npy` are made for source N.
    table: genes to look identifiers up in.
    apart: refuse a unit of one name in two sources of no named dataset.

  Raises:
    UserError: a source that cannot be read, whole counts and corrected ones
      together, or a unit in two sources.
  """
  opened: list[Opened] = []
  seen: dict[str, int] = {}
  units: dict[str, str] = {}
  for number, each in enumerate(configs):
    source = each if isinstance(each, sources.Source) else None
    held = source if source is not None and not source.can_reopen else None
    if source is None:
      source = sources.open_source(each, table)
    name = source.name
    seen[name] = seen.get(name, 0) + 1
    if seen[name] > 1:
      name = f'{name}-{seen[name]}'
    config = dataclasses.replace(source.config, name=name)
    source = dataclasses.replace(source, name=name, config=config)
    codes = labels.add(source)
    perturbed_C, controls = _perturbed(source)
    if apart:
      _check_units(source, units)
    for what, array in (
      ('codes', codes),
      ('species', source.species_C),
      ('samples', _samples(source, codes[1])),
      ('assays', source.assay_C),
      ('perturbed', perturbed_C),
    ):
      place = os.path.join(folder, what, f'{number}.npy')
      os.makedirs(os.path.dirname(place), exist_ok=True)
      np.save(place, array)
    opened.append(
      Opened(
        number,
        config,
        source if held is not None else None,
        source.dataset,
        source.assay,
        controls,
        source.num_cells,
        source.num_columns,
        source.num_entries,
        (source.layer, source.layer_reason),
        source.identifier_reason,
        source.is_float,
        source.is_divided,
        source.resolutions,
        {s: source.has_flag(s) for s in source.resolutions},
      )
    )
  for kind in ('is_float', 'is_divided'):
    _check_alike(opened, kind)
  return opened


def _check_alike(opened: Sequence[Opened], kind: str) -> None:
  """Refuses values of several kinds."""
  mine = [source.name for source in opened if getattr(source, kind)]
  if mine and len(mine) < len(opened):
    what = {
      'is_float': 'corrected counts and others whole counts',
      'is_divided': 'counts divided by medians and others not',
    }
    raise errors.UserError(
      f'{mine[0]} holds {what[kind]}; they are not mixed in a corpus: prepare '
      'one corpus of each'
    )


def _check_units(source: sources.Source, seen: dict[str, str]) -> None:
  """Refuses units of one name in two sources: one donor, or two?"""
  config = source.config
  if config.dataset or config.unit in ('', sources.CELL):
    return
  for name in source.codes(config.unit)[1]:
    if name in seen:
      raise errors.UserError(
        f'{config.unit} {name!r} is in {seen[name]} and in {source.name}: if '
        'it is the same one, name their study with --dataset NAME, else '
        'rename it in one file; it must not be split between training and '
        'validation'
      )
    seen[name] = source.name


def _samples(source: sources.Source, unit_C: np.ndarray) -> np.ndarray:
  """Codes of the samples that the filters compare within."""
  if not source.config.sample:
    return unit_C
  codes_C, names = source.codes(source.config.sample)
  return np.where(codes_C < 0, len(names), codes_C)


def _perturbed(source: sources.Source) -> tuple[np.ndarray, str]:
  """Cells that something was done to; a corpus has left them out already."""
  if source.config.member:
    return np.zeros(source.num_cells, bool), ''
  return source.perturbed()


def hash_source(plan: plans.Plan, task: int, folder: str) -> dict:
  """sha256 of a source: a task of its own, for large files take a while."""
  del folder
  if plan.held[task] is not None:
    return {'sha256': plan.held[task].sha256}
  return {'sha256': plan.stream(task).source.sha256}


def hashes(
  engine: engines.Engine,
  plan: plans.Plan,
  opened: Sequence[Opened],
) -> list[str]:
  """sha256 of every source, '' for those that came from no file.

  Raises:
    UserError: two files are the same.
  """
  results = builds.run_stage(
    engine,
    plan.stage('hashes'),
    hash_source,
    plan,
    [0] * len(opened),
    'hashing',
  )
  digests = [result['sha256'] for result in results]
  seen: dict[str, str] = {}
  for source, digest in zip(opened, digests):
    path = source.config.path
    if source.config.member:  # corpora may have files in common
      continue
    if source.held is None and digest in seen:
      raise errors.UserError(
        f'{path} is the same file as {seen[digest]}; give it once, or its '
        'cells would be held out from themselves'
      )
    seen[digest] = path
  return digests


def manifest_facts(
  source: Opened, report: Mapping, sha256: str, species: Sequence[str]
) -> dict:
  """What the manifest says of a source; no path and no time."""
  config = source.config
  facts = {
    'name': source.name,
    'file': os.path.basename(config.path),
    'sha256': sha256,
    'dataset': source.dataset,
    'licence': config.licence,
    'layer': source.layer[0],
    'assay': source.assay,
    'species': sorted(species[s] for s in source.resolutions),
    'ids_of': config.ids_of,
    'unit': config.unit,
    'measured_columns': source.num_columns,
    'total': (
      f'obs column {config.total}'
      if config.total
      else 'sum over all columns of the source, before any vocabulary'
    ),
    'cells': report['cells'],
    'kept': report['kept'],
  }
  if config.obs_table:  # a split may hang on its columns
    facts['obs_table'] = {
      'file': os.path.basename(config.obs_table),
      'sha256': paths.sha256_file(config.obs_table),
    }
  return facts
