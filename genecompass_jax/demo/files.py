"""The folder of a demo: what it writes, and what it removes."""

import dataclasses
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

import genecompass_jax
from genecompass_jax import corpus as corpus_lib, errors, paths, pretrained
from genecompass_jax.analysis import figures
from genecompass_jax.demo import plans, scores
from genecompass_jax.tasks import cell_types

MARKER = 'demo.json'
CORPUS, RUN = 'corpus', 'run'
FILES = {
  'results.json': 'losses and all scores',
  'results.parquet': 'the scores as a table',
  'embeddings.h5ad': 'held-out cells with obsm["X_genecompass"]',
  'umap.png': 'held-out cells: PCA beside the model',
  'learning.png': 'what was learned, beside what counting predicts',
}


def open_folder(folder: str, facts: dict[str, object]) -> tuple[bool, str]:
  """Makes the demo's folder, or takes up the one that is there.

  Args:
    folder: to make; one of a demo of other facts is emptied.
    facts: all that decides the result.

  Returns:
    Whether it starts from nothing, and what is done, in one line.

  Raises:
    UserError: the folder holds something that is not of a demo.
  """
  facts = {'version': genecompass_jax.__version__, **facts}
  marker = os.path.join(folder, MARKER)
  what = f'{folder} is new'
  if os.path.exists(marker):
    if _read(marker) == facts:
      return False, f'{folder} is there: this goes on from what is done'
    what = f'{folder} was of other cells, steps or seed: started anew'
    remove(folder)
  elif os.path.exists(folder) and (
    not os.path.isdir(folder) or os.listdir(folder)
  ):
    raise errors.UserError(
      f'{folder} is there and not of a demo; give another folder with -o'
    )
  paths.write_text(marker, json.dumps(facts, indent=1) + '\n')
  return True, what


def _read(marker: str) -> object:
  try:
    return paths.read_json(marker)
  except ValueError:  # damaged: as a demo of other facts
    return None


def remove(folder: str) -> None:
  """Removes what a demo wrote in its folder, and the folder if it is empty."""
  for name in (CORPUS, RUN):
    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
  for name in (*FILES, MARKER):
    if os.path.exists(os.path.join(folder, name)):
      os.remove(os.path.join(folder, name))
  if not os.listdir(folder):
    os.rmdir(folder)


def write(
  folder: str,
  plan: plans.Plan,
  corpus: corpus_lib.Corpus,
  model: pretrained.PretrainedModel,
  lines: Sequence[dict[str, Any]],
  rows: Sequence[cell_types.Row],
  drawn: scores.Embedded,
  seed: int,
) -> dict[str, str]:
  """Writes results and pictures.

  Args:
    folder: of the demo.
    plan: what it ran on; its first probe is drawn.
    corpus: of the run.
    model: that was trained.
    lines: of the run's metrics.jsonl.
    rows: all scores.
    drawn: cells of the first probe.
    seed: of UMAP.

  Returns:
    File -> what it is.
  """
  evaluations = [line for line in lines if 'eval_id_loss' in line]
  table = [dataclasses.asdict(row) for row in rows]
  results = {
    **plan.facts,
    'checkpoint': model.sha256,
    'step': model.step,
    'leaky': corpus.manifest['split']['leaky'],
    'held_out': evaluations[-1] if evaluations else None,
    'notes': {probe.dataset: probe.notes for probe in plan.probes},
    'rows': [
      {k: None if v != v else v for k, v in row.items()} for row in table
    ],
  }
  text = json.dumps(results, indent=1) + '\n'
  paths.write_text(paths.join(folder, 'results.json'), text)
  written = ['results.json']
  if rows:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), buffer)
    paths.write_bytes(paths.join(folder, 'results.parquet'), buffer.getvalue())
    written.append('results.parquet')
  figure = _map(plan.probes[0], drawn, seed)
  _save(folder, 'embeddings.h5ad', drawn.cells.write_h5ad)
  _save(folder, 'umap.png', figure.savefig)
  written += ['embeddings.h5ad', 'umap.png']
  if evaluations:
    figure = figures.learning_curves(
      lines,
      title=f'Pretraining, {model.step:,} steps: losses on held-out cells',
      note='15 % of the genes of a cell are hidden. Dashed: predictors that '
      'only count, and see the same visible genes as the model.',
      groups=plan.curves,
    )
    _save(folder, 'learning.png', figure.savefig)
    written.append('learning.png')
  return {name: FILES[name] for name in written}


def _save(folder: str, name: str, write_to: Callable[[str], None]) -> None:
  """Writes a file that appears under its name only when it is whole."""
  staging = os.path.join(folder, f'.part.{name}')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      write_to(staging)
    os.replace(staging, os.path.join(folder, name))
  finally:
    if os.path.exists(staging):
      os.remove(staging)


def _map(probe: plans.Probe, drawn: scores.Embedded, seed: int):
  """The picture of the held-out cells of a probe."""
  if drawn.labels is None and drawn.units is not None:
    colour, colour_name = drawn.units, probe.unit
    what = f', coloured by {probe.unit}'
  elif drawn.labels is None:
    colour = np.log10(1 + drawn.cells.obs['gc_n_genes_used'].to_numpy(float))
    colour_name, what = 'log10 of genes that the model saw', ''
  else:
    colour = np.where(drawn.labels == '', 'no label', drawn.labels)
    colour_name, what = probe.label, f', coloured by {probe.label}'
  panels = {
    scores.PCA: drawn.features[scores.PCA].values,
    'Pretrained model, mean over genes': drawn.features[scores.MEAN].values,
  }
  return figures.cell_map(
    {
      title: figures.umap(values, seed=seed) for title, values in panels.items()
    },
    colour,
    title=f'{probe.dataset}: {drawn.cells.n_obs:,} cells that were not pretrained on{what}',
    note='UMAP (15 neighbours, fixed seed) of features made without labels. '
    'Distances between groups mean little.',
    colour_name=colour_name,
  )
