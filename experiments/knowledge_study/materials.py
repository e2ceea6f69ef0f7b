"""Corpora and priors of the study: made once, found again.

    ROOT/corpora/N        N training cells of the atlas and the held-out ones
    ROOT/knowledge/P[/S]  what is stated about the atlas, as raw tables; of a
                          fidelity P drawn anew for every seed S
    ROOT/priors/N/FOLDER  prior tables by the real pipeline, and in folders of
                          their own the controls (see `arms.py`)

Training cells of a small corpus are among those of a larger one. The held-out
cells are those of two whole studies of both species, the same in all corpora,
in the same order, so that their masks are the same too.
"""

import contextlib
import io

import numpy as np

from experiments.knowledge_study import arms, settings as settings_lib
from genecompass_jax import cli, errors, gene_table, paths, simulate
from genecompass_jax.prepare import pipeline, quality, simulated, sources

HELD_OUT_STUDIES = (2, 4)  # a deep and a shallow one, of three donors each
FAR = 1 << 20  # index of the first held-out cell: no training cell is there
WIDTH = 64  # of prior vectors: that of the model
# The release's r of 0.8 within donors is reached by no pair of these cells.
COEXPRESSION = ('--matrix=study', '--min-r=0.5')
_DONE = 'done.txt'
_CHUNK = 1 << 13


def is_whole(folder: paths.PathLike) -> bool:
  """Whether a corpus or a set of priors was finished."""
  return any(
    paths.exists(paths.join(folder, name)) for name in ('manifest.json', _DONE)
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


def knowledge(
  root: str,
  settings: settings_lib.Settings,
  fidelity: str = '',
  seed: int = 0,
) -> str:
  """Raw tables; without a fidelity those of the atlas, whatever the seed."""
  output = paths.join(root, 'knowledge', 'default')
  knobs = {}
  if fidelity:
    output = paths.join(root, 'knowledge', fidelity, str(seed))
    share = float(fidelity)
    knobs = {'precision': share, 'recall': share, 'draw': seed}
  if not is_whole(output):
    simulate.write_knowledge(simulate.Atlas(settings.atlas), output, **knobs)
  return output


def held_tfs(root: str) -> tuple[str, ...]:
  """TFs that the table of TFs leaves out; the same at every fidelity."""
  place = paths.join(root, 'knowledge', 'default', 'manifest.json')
  return tuple(paths.read_json(place)['withheld_tfs'])


def priors(
  root: str,
  num_cells: int,
  settings: settings_lib.Settings,
  arm: arms.Arm,
  seed: int,
) -> None:
  """The prior tables of a run, made if they are not there."""
  if not arm.kinds:
    return
  raw = knowledge(root, settings, arm.fidelity, seed)
  cells = corpus(root, num_cells, settings)
  folder = paths.join(root, 'priors', str(num_cells))
  output = paths.join(folder, arm.tables(seed))
  if not is_whole(output):
    given = stated(raw)
    if not arm.fidelity:
      given['coexpression'] = [cells, *COEXPRESSION]
    build(output, given)
  if arm.control:
    control(output, arm, paths.join(folder, arm.folder(seed)), cells, seed)


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


def build(output: str, given: dict[str, list[str]]) -> None:
  """Prior tables of one folder; `done.txt` comes last.

  Args:
    output: the folder.
    given: arguments of `genecompass prior KIND`, by kind.
  """
  missing = []
  for kind, argv in given.items():
    name = paths.join(output, f'{kind}.parquet')
    argv = ['prior', kind, *argv, '-o', name, '--overwrite']
    code, text = _quiet([*argv, '--width', str(WIDTH)])
    if kind == 'coexpression' and code and 'no pair of genes' in text:
      missing.append(kind)  # too few cells: the arm has a table of no gene
      _empty(name)
    elif code:
      raise errors.UserError(f'{kind}: {text.strip()}')
  paths.write_text(
    paths.join(output, _DONE),
    ''.join(f'{kind}: no pair passes the rule\n' for kind in missing),
  )


def control(
  tables: str, arm: arms.Arm, output: str, cells: str, seed: int
) -> None:
  """A control of the tables of a folder, made if it is not there.

  Args:
    tables: folder that `build` made.
    arm: whose control it is.
    output: its folder.
    cells: corpus: expression to match on.
    seed: of the draw.
  """
  if is_whole(output):
    return
  said = paths.read_text(paths.join(tables, _DONE))
  missing = [k for k in arm.controlled if f'{k}: no pair' in said]
  made = [
    paths.join(tables, f'{kind}.parquet')
    for kind in arm.controlled
    if kind not in missing
  ]
  code, text = _quiet(
    ['prior', 'control', arm.control, *made, '-o', output]
    + ['--expression', cells, '--seed', str(seed), '--overwrite']
  )
  if code:
    raise errors.UserError(f'{arm.control}: {text.strip()}')
  for kind in missing:
    _empty(paths.join(output, f'{kind}.parquet'))
  paths.write_text(paths.join(output, _DONE), '')


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
