"""What a demo runs on: the embedded cells, or a file of one's own."""

import argparse
import dataclasses

import numpy as np

from genecompass_jax import errors, simulate, vocabulary
from genecompass_jax.prepare import (
  anndatas,
  pbmc68k,
  pipeline,
  simulated,
  sources,
)
from genecompass_jax.tasks import cell_types

BLOOD, BLOOD_DATASET = 'pbmc68k', 'blood cells'
# Cells of about 200 of 600 genes, as short as the blood cells: an eighth of
# the work of the default atlas. Six studies of three donors in each species;
# one donor of each is held out, so that there are six units to compare over.
ATLAS = simulate.AtlasConfig(
  num_genes=600,
  deep_umis=900.0,
  shallow_umis=500.0,
  assays=('deep', 'shallow') * 3,
)
SIMULATED_CELLS = 3000  # of each species
HELD_OUT_DONORS = tuple(
  f'{species}_study{study}_donor{study % 3}'
  for species in vocabulary.SPECIES
  for study in range(len(ATLAS.assays))
)
BLOOD_WEIGHT = 6.0  # a third of what is seen, and not a twelfth: cells are few
OWN_PROBE_CELLS = 2000  # at most, of one's own file
PROBE_CELLS = 500  # of each of the default ones
MIN_CELLS = 100
# Columns of an own file, the first that is there.
LABEL_COLUMNS = (
  *('cell_type', 'celltype', 'cell_types', 'cell_ontology_class'),
  *('annotation', 'bulk_labels', 'cell_label', 'labels', 'label'),
  *('louvain', 'leiden', 'seurat_clusters', 'clusters', 'cluster'),
)
CLUSTER_COLUMNS = LABEL_COLUMNS[-5:]
UNIT_COLUMNS = (
  *('donor_id', 'donor', 'patient', 'individual', 'subject', 'sample_id'),
  *('sample', 'orig.ident', 'library', 'batch'),
)


@dataclasses.dataclass(frozen=True)
class Probe:
  """Held-out cells to embed and score.

  Attributes:
    source: name in the corpus.
    dataset: name in tables.
    cells: AnnData or path.
    config: how they are read.
    label: obs column of classes; '' for none.
    unit: obs column of donors; '' for one unit.
    max_cells: to embed.
    notes: what the table is, and what it is not.
  """

  source: str
  dataset: str
  cells: anndatas.Cells
  config: sources.SourceConfig
  label: str
  unit: str
  max_cells: int
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a demo runs on.

  Attributes:
    opened: sources of the corpus.
    prepare: how it is built.
    probes: held-out cells; the first is drawn.
    curves: group of held-out cells -> title of its learning curves.
    facts: what decides the result; a demo of other facts starts anew.
    source_weights: (source, times its cells are seen in an epoch).
  """

  opened: tuple[sources.Source, ...]
  prepare: pipeline.PrepareConfig
  probes: tuple[Probe, ...]
  curves: dict[str, str]
  facts: dict[str, object]
  source_weights: tuple[tuple[str, float], ...] = ()


def default(args: argparse.Namespace) -> Plan:
  """Blood cells of one donor, and simulated cells of both species."""
  blood = pbmc68k.blood_cells()
  cells = {
    BLOOD: (
      blood,
      sources.SourceConfig(
        name=BLOOD,
        species='human',
        unit=sources.CELL,
        total='total',
        assay='umi',
        dataset=BLOOD_DATASET,
        obs=('cell_type',),
        licence='CC BY 4.0 (10x Genomics), by way of scanpy (BSD-3)',
      ),
    )
  }
  atlas = simulate.Atlas(ATLAS)
  for name, sampled in simulated.to_anndatas(atlas, SIMULATED_CELLS).items():
    cells[f'simulated {name}'] = (
      sampled,
      sources.SourceConfig(
        name=f'simulated {name}',
        species=name,
        unit='donor',
        assay='umi',
        dataset='simulated',
        obs=('cell_type',),
        licence='simulated',
      ),
    )
  probes = []
  for name, (each, source) in cells.items():
    is_real = name == BLOOD
    probes.append(
      Probe(
        source=name,
        dataset=BLOOD_DATASET if is_real else name,
        cells=each,
        config=source,
        label='cell_type',
        unit='' if is_real else 'donor',
        max_cells=PROBE_CELLS,
        notes=_BLOOD_NOTES if is_real else _SIMULATED_NOTES,
      )
    )
  return Plan(
    opened=tuple(sources.from_anndata(*pair) for pair in cells.values()),
    prepare=pipeline.PrepareConfig(
      vocabulary='measured',
      validation_share=0.5,  # of the blood cells; donors are named
      validation_units=HELD_OUT_DONORS,
      seed=args.seed,
    ),
    probes=tuple(probes),
    curves={
      'dataset=simulated': 'Simulated cells: held-out donors',
      f'dataset={BLOOD_DATASET}': 'Real blood cells: held-out cells (leaky)',
    },
    facts={
      'data': '10x_pbmc68k_reduced of scanpy and simulated cells',
      'atlas': ATLAS.sha256,
      'seed': args.seed,
    },
    source_weights=((BLOOD, BLOOD_WEIGHT),),
  )


_BLOOD_NOTES = (
  'What this is: cells of one donor, 765 selected genes, labels by correlation '
  'with bulk samples.',
  'Probe cells were not pretrained on, but their donor was (leaky). Five '
  'stratified folds, the same folds and k for all; mean (range) of three seeds.',
  'One unit: no interval, and no winner is announced.',
)
_SIMULATED_NOTES = (
  'What this is: simulated cells, no evidence about biology. Donors that were '
  'not pretrained on; each in turn is the test, the others train the probe.',
  'Mean over donors [95 % bootstrap over donors]; random weights: mean (range) '
  'of three draws.',
)


def own(args: argparse.Namespace) -> Plan:
  """A file of one's own; labels and donors are found by name.

  Raises:
    UserError: the file cannot be used.
  """
  source_config = sources.SourceConfig(
    path=args.data,
    species=args.species,
    ids_of=args.ids_of,
    layer=args.layer,
    allow_noninteger=args.allow_noninteger,
  )
  source = sources.open_h5ad(source_config)
  if source.num_cells < MIN_CELLS:
    raise errors.UserError(
      f'{args.data}: {source.num_cells} cells; the demo needs at least '
      f'{MIN_CELLS}'
    )
  for column in (args.label, args.unit):
    if column:
      source.codes(column)  # raises
  label = args.label or _label_column(source)
  unit = args.unit or _unit_column(source)
  # Which columns to carry is known only now; counts stay where they are.
  source = dataclasses.replace(
    source,
    config=dataclasses.replace(
      source_config,
      unit=unit or sources.CELL,
      obs=(label,) if label else (),
    ),
  )
  # Whole units may exceed it by a half: most cells are left to train on.
  share = min(1 / 3, OWN_PROBE_CELLS / source.num_cells)
  probe = Probe(
    source=source.name,
    dataset=source.name,
    cells=args.data,
    config=source_config,
    label=label,
    unit=unit,
    max_cells=OWN_PROBE_CELLS,
    notes=_own_notes(label, unit),
  )
  held_out = f'held-out {unit}' if unit else 'held-out cells (leaky)'
  return Plan(
    opened=(source,),
    prepare=pipeline.PrepareConfig(
      vocabulary='measured', validation_share=share, seed=args.seed
    ),
    probes=(probe,),
    curves={'': f'{source.name}: {held_out}'},
    facts={
      'data': source.sha256,
      'seed': args.seed,
      'species': args.species,
      'ids_of': args.ids_of,
      'layer': args.layer,
      'allow_noninteger': args.allow_noninteger,
      'label': label,
      'unit': unit,
    },
  )


def _own_notes(label: str, unit: str) -> tuple[str, ...]:
  """What the table of one's own cells is."""
  if unit:
    held_out = (
      f'Whole units of obs[{unit!r}] were held out of pretraining; each in turn '
      'is the test, the others train the probe. Mean over units, with a 95 % '
      f'bootstrap over units from {cell_types.MIN_UNITS} units on.'
    )
  else:
    held_out = (
      'The cells were held out of pretraining one by one (leaky: their donor '
      'was not). Five stratified folds, the same for all; range over three '
      'seeds. One unit: no interval and no winner.'
    )
  if label in CLUSTER_COLUMNS:
    return (
      held_out,
      f'obs[{label!r}] holds clusters of these very cells: whatever they were '
      'computed from has an advantage.',
    )
  return (held_out,)


def _label_column(source: sources.Source) -> str:
  """The obs column of classes, '' where none is found."""
  for column in _named(source, LABEL_COLUMNS):
    codes_C, names = source.codes(column)
    named = np.array(names, str)[codes_C[codes_C >= 0]]
    if len(named) and cell_types.eligible(named).any():
      return column
  return ''


def _unit_column(source: sources.Source) -> str:
  """The obs column of donors with two units or more in every species."""
  for column in _named(source, UNIT_COLUMNS):
    codes_C, _ = source.codes(column)
    enough = [
      len(np.unique(codes_C[source.species_C == species])) > 1
      for species in source.resolutions
    ]
    is_unit = len(np.unique(codes_C)) <= source.num_cells / 10
    if all(enough) and is_unit:
      return column
  return ''


def _named(source: sources.Source, wanted: tuple[str, ...]) -> list[str]:
  """Columns of a source by name, whatever the case."""
  by_name = {str(c).casefold(): str(c) for c in reversed(source.obs.columns)}
  return [by_name[name] for name in wanted if name in by_name]
