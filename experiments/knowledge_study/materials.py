"""Corpora and priors of the study: made once, found again.

    ROOT/corpora/N        N training cells of the atlas and the held-out ones
    ROOT/knowledge/P      what is stated about the atlas, as raw tables
    ROOT/priors/N/FOLDER  prior tables by the real pipeline (see `arms.py`)

Training cells of a small corpus are among those of a larger one. The held-out
cells are those of two whole studies of both species, the same in all corpora,
in the same order, so that their masks are the same too.
"""

import contextlib
import io
import json

import numpy as np

from experiments.knowledge_study import settings as settings_lib
from genecompass_jax import cli, errors, gene_table, paths, simulate
from genecompass_jax.prepare import pipeline, quality, simulated, sources

HELD_OUT_STUDIES = (2, 4)  # a deep and a shallow one, of three donors each
FAR = 1 << 20  # index of the first held-out cell: no training cell is there
WIDTH = 64  # of prior vectors: that of the model
# The release's r of 0.8 within donors is reached by no pair of these cells.
COEXPRESSION = ('--matrix=study', '--min-r=0.5')
CONTROLS = ('shuffled', 'rewired', 'constant', 'random')
_CHUNK = 1 << 13


def is_whole(folder: paths.PathLike) -> bool:
  """Whether a corpus or a set of priors was finished."""
  return any(
    paths.exists(paths.join(folder, name))
    for name in ('manifest.json', 'done.txt')
  )


def corpus(root: str, num_cells: int, settings: settings_lib.Settings) -> str:
  """ROOT/corpora/N, made if it is not there."""
  output = paths.join(root, 'corpora', str(num_cells))
  if is_whole(output):
    return output
  whole = simulate.Atlas(settings.atlas)
  opened = [
    sources.from_anndata(
      simulated.to_anndata(cells),
      sources.SourceConfig(
        name=f'{part}_{species}',
        species=species,
        unit='donor',
        dataset='atlas',
        assay='umi',
        obs=('study',),
        licence='simulated',
      ),
    )
    for part, number in (
      ('training', -(-num_cells // 2)),
      ('heldout', settings.held_out_cells),
    )
    for species in gene_table.SPECIES
    for cells in [draw(whole, part, species, number)]
  ]
  held = {
    f'atlas:{donor}'
    for source in opened[2:]
    for donor in source.codes('donor')[1]
  }
  pipeline.prepare(
    opened,
    output,
    pipeline.PrepareConfig(
      vocabulary='measured',
      validation_units=tuple(sorted(held)),
      # Sizes are exact, and nothing depends on cells that are not drawn.
      filters=quality.QualityConfig.off(),
      keep_copies=True,
      jobs=1,
    ),
  )
  return output


def draw(
  whole: simulate.Atlas, part: str, species: str, wanted: int
) -> simulate.SimulatedCells:
  """The first cells of the training studies, or of the held-out ones."""
  code = gene_table.SPECIES.index(species)
  design = whole.designs[code]
  names = list(dict.fromkeys(design.study_U.tolist()))
  held = [names[i] for i in HELD_OUT_STUDIES]
  is_training = part == 'training'
  first, found, number = (0 if is_training else FAR), [], 0
  while number < wanted:
    cells = whole.sample(min(_CHUNK, 4 * wanted), code, first)
    first += len(cells)
    chosen_C = cells.obs['assay'] != 'panel'
    chosen_C &= np.isin(cells.obs['study'], held) != is_training
    found.append(cells.select(np.flatnonzero(chosen_C)[: wanted - number]))
    number += len(found[-1])
  return simulate.concatenate(found)


def knowledge(root: str, fidelity: str, settings: settings_lib.Settings) -> str:
  """ROOT/knowledge/P: raw tables; 'default' is the atlas' own fidelity."""
  output = paths.join(root, 'knowledge', fidelity)
  if not is_whole(output):
    knobs = {}
    if fidelity != 'default':
      knobs = {'precision': float(fidelity), 'recall': float(fidelity)}
    simulate.write_knowledge(simulate.Atlas(settings.atlas), output, **knobs)
  return output


def held_tfs(root: str) -> tuple[str, ...]:
  """TFs that the table of TFs leaves out; the same at every fidelity."""
  place = paths.join(root, 'knowledge', 'default', 'manifest.json')
  return tuple(json.loads(paths.read_text(place))['withheld_tfs'])


def priors(
  root: str,
  num_cells: int,
  settings: settings_lib.Settings,
  fidelity: str = 'default',
) -> str:
  """ROOT/priors/N/FOLDER with its controls, made if they are not there."""
  folder = 'tables' if fidelity == 'default' else f'fidelity_{fidelity}'
  output = paths.join(root, 'priors', str(num_cells), folder)
  if is_whole(output):
    return output
  raw = knowledge(root, fidelity, settings)
  cells = corpus(root, num_cells, settings)
  build(output, stated(raw), cells, with_cells=fidelity == 'default')
  return output


def stated(raw: str) -> dict[str, list[str]]:
  """Arguments of `genecompass prior` for what the simulator writes."""
  table = '{}=trrust={}/tf_target.{}.tsv'
  return {
    'grn': [
      table.format(f'--{species}', raw, species)
      for species in gene_table.SPECIES
    ],
    'promoter': [
      f'--{species}-{what}={raw}/{file}.{species}.{ending}.gz'
      for species in gene_table.SPECIES
      for what, file, ending in (
        ('genome', 'genome', 'fa'),
        ('genes', 'genes', 'gtf'),
      )
    ],
    'family': [
      f'--groups={raw}/gene_groups.human.tsv',
      f'--mouse-groups={raw}/gene_groups.mouse.tsv',
    ],
  }


def build(
  output: str,
  given: dict[str, list[str]],
  cells: str,
  with_cells: bool = True,
  coexpression: tuple[str, ...] = COEXPRESSION,
) -> None:
  """Tables and their controls; `done.txt` comes last.

  Args:
    output: folder of the tables.
    given: arguments of `genecompass prior KIND`, by kind.
    cells: corpus: expression to match controls on; co-expression from its
      training cells.
    with_cells: whether to make co-expression. Without it the tables are of the
      study's own controls, which need `shuffled` alone.
    coexpression: its arguments.
  """
  kinds = dict(given)
  if with_cells:
    kinds['coexpression'] = [cells, *coexpression]
  made, missing = [], []
  for kind, argv in kinds.items():
    name = paths.join(output, f'{kind}.parquet')
    argv = ['prior', kind, *argv, '-o', name, '--overwrite']
    code, text = _quiet([*argv, '--width', str(WIDTH)])
    if code == 0:
      made.append(name)
    elif kind == 'coexpression' and 'no pair of genes' in text:
      missing.append(kind)  # too few cells: the arm has a table of no gene
      _empty(name)
    else:
      raise errors.UserError(f'{kind}: {text.strip()}')
  for control in CONTROLS if with_cells else CONTROLS[:1]:
    chosen = [
      p for p in made if control != 'rewired' or p.endswith('/grn.parquet')
    ]
    folder = paths.join(output, control)
    code, text = _quiet(
      ['prior', 'control', control, *chosen, '-o', folder]
      + ['--expression', cells, '--overwrite']
    )
    if code:
      raise errors.UserError(f'{control}: {text.strip()}')
    for kind in missing if control != 'rewired' else ():
      _empty(paths.join(folder, f'{kind}.parquet'))
  paths.write_text(
    paths.join(output, 'done.txt'),
    ''.join(f'{kind}: no pair passes the rule\n' for kind in missing),
  )


def _empty(name: str) -> None:
  """A table that says nothing: one gene outside of every vocabulary."""
  from genecompass_jax import prior_tables

  prior_tables.write(
    name, ['none'], np.zeros((1, WIDTH), np.float32), {'kind': 'empty'}
  )


def _quiet(argv: list[str]) -> tuple[int, str]:
  """Runs a command of the package: its exit code, and what it said."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
      code = cli.main(argv)
    except SystemExit as stop:
      code = int(stop.code or 0)
  if code in (errors.EXIT_RETRY, errors.EXIT_INTERRUPTED):
    raise errors.RetryableError(
      f'genecompass {argv[0]} {argv[1]} was stopped; start the study again to '
      'go on'
    )
  return code, said.getvalue()
