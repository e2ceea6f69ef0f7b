"""`genecompass demo`: the whole way on real cells, in minutes.

Cells -> corpus -> pretraining -> restored model -> embeddings -> tables and
pictures. By default the cells are the blood cells that scanpy carries and
simulated cells of two species; `--data` does the same with one's own file.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from typing import Any

from genecompass_jax import (
  checkpoint,
  corpus as corpus_lib,
  errors,
  metrics,
  paths,
)
from genecompass_jax.analysis import figures
from genecompass_jax.demo import files, plans, pretraining, scores
from genecompass_jax.prepare import pipeline, reports, sources


def run(args: argparse.Namespace) -> None:
  """Runs the demo; the same command again goes on from what is done.

  Args:
    args: `output`, `data`, `steps` (0: the default), `seed`, and
      for one's own `data` `species`, `ids_of`, `layer`, `allow_noninteger`,
      `unit` and `label`.

  Raises:
    UserError: cells that cannot be used, or a folder that is not a demo's;
      then nothing is left behind.
    RetryableError: it was stopped; the same command goes on.
  """
  if args.steps < 0:
    raise errors.UserError(f'--steps {args.steps} must not be negative')
  _check_extras()

  _say('1/6  Cells')
  plan = plans.own(args) if args.data else plans.default(args)
  for source in plan.opened:
    _say(
      f'     {source.name}: {source.num_cells:,} cells x '
      f'{source.num_columns:,} genes; {source.layer_reason}'
    )
  is_new, what = files.open_folder(
    args.output, plan.facts | {'steps': args.steps}
  )
  _say(f'     {what}')

  _say('2/6  Corpus: raw counts, a split, medians of the training cells')
  corpus = _corpus(plan, args.output, is_new)
  steps = args.steps or pretraining.default_steps(corpus)

  workdir = paths.join(args.output, files.RUN)
  done = checkpoint.all_steps(paths.join(workdir, 'checkpoints'))
  start = f'step {max(done):,}' if done else 'random weights'
  _say(f'3/6  Pretraining: {steps:,} steps of a tiny model, from {start}')
  model = pretraining.pretrain(
    corpus,
    workdir,
    steps=steps,
    seed=args.seed,
    source_weights=plan.source_weights,
  )
  lines = metrics.read(workdir)
  _say_losses(lines, plan.curves)

  _say(f'4/6  Embeddings by the restored model, step {model.step:,}')
  embedded = []
  for probe in plan.probes:
    embedded.append(scores.embed(probe, corpus, model))
    _say(f'     {probe.dataset}: {embedded[-1].cells.n_obs:,} held-out cells')

  _say('5/6  Cell types from frozen features, on cells not pretrained on')
  rows = []
  for probe, cells in zip(plan.probes, embedded):
    found = scores.score(probe, cells)
    rows += found
    _say(scores.table(probe, cells, found) + '\n')

  _say('6/6  Pictures and files')
  written = files.write(
    args.output, plan, corpus, model, lines, rows, embedded[0], args.seed
  )
  for name, what in written.items():
    _say(f'     {paths.join(args.output, name):32} {what}')
  _say(f'     {workdir:32} the model, for gc.load and --checkpoint')
  _say(_next_steps(args, workdir))


def _corpus(plan: plans.Plan, folder: str, is_new: bool) -> corpus_lib.Corpus:
  """The corpus, built if it is not there; a new folder goes if that fails."""
  path = paths.join(folder, files.CORPUS)
  if paths.exists(paths.join(path, 'manifest.json')):
    corpus = corpus_lib.Corpus.open(path)
  else:
    try:
      corpus = pipeline.prepare(plan.opened, path, plan.prepare)
    except errors.UserError:
      if is_new:
        files.remove(folder)
      raise
  described = reports.describe(reports.read(path)).splitlines()
  for line in described:
    if ': 0 cells removed' in line:
      continue
    if 'cells removed' in line:
      _say(f'       {line.strip()}')
    elif any(w in line for w in ('kept', 'genes: ', 'WARNING', 'validation:')):
      _say(f'     {line.strip()}')
  split = ' and '.join(f'{corpus.num_cells(s):,} {s}' for s in corpus.splits)
  _say(f'     {path}: {split} cells, {corpus.vocabulary.size:,} tokens')
  if corpus.manifest['split']['leaky']:
    leaky = ', '.join(
      s.name for s in plan.opened if s.config.unit == sources.CELL
    )
    _say(
      f'     {leaky}: no other donor to hold out, so single cells are held '
      'out: LEAKY'
    )
  return corpus


def _say_losses(lines: list[dict[str, Any]], curves: dict[str, str]) -> None:
  """Held-out losses at the end, beside those of counting."""
  last = [line for line in lines if 'eval_id_loss' in line][-1:]
  for line in last:
    for group, title in curves.items():
      values = line['by'].get(group, {}) if group else line
      nulls = ', '.join(
        f'{label} {values[name]:.2f}'.replace('\n', ' ')
        for name, label in figures.ID_NULLS.items()
        if name in values
      )
      if nulls:
        _say(
          f'     {title}: id loss {values["eval_id_loss"]:.2f} nats; by '
          f'counting: {nulls}'
        )


def _next_steps(args: argparse.Namespace, workdir: str) -> str:
  """What can be done with the model; the user's cells need the same flags."""
  activate = os.path.join(sys.prefix, 'bin', 'activate')
  if not shutil.which('genecompass') and os.path.exists(activate):
    below = os.path.relpath(activate)
    activate = activate if below.startswith(os.pardir) else below
    first = f'Go on, after `source {activate}`:'
  else:
    first = 'Go on:'
  data = args.data or 'CELLS.h5ad'
  flags = call = ''
  if args.data:
    asked = {
      '--species': args.species if args.species != 'auto' else '',
      '--ids-of': args.ids_of,
      '--layer': args.layer,
    }
    asked = {k: v for k, v in asked.items() if v}
    flags = ''.join(f' {k} {shlex.quote(v)}' for k, v in asked.items())
    call = ''.join(
      f', {k.lstrip("-").replace("-", "_")}={v!r}' for k, v in asked.items()
    )
    if args.allow_noninteger:
      flags += ' --allow-noninteger'
      call += ', allow_noninteger=True'
  return '\n'.join(
    (
      first,
      f'  genecompass embed {shlex.quote(data)} -o OUT.h5ad --checkpoint '
      f'{workdir}{flags}',
      f'  genecompass prep {shlex.quote(data)} --unit DONOR_COLUMN '
      f'--vocabulary measured -o CORPUS{flags}',
      '  python -m genecompass_jax.main --config=experiments/tiny.py '
      '--workdir=DIR --config.corpus=CORPUS',
      f'  import genecompass_jax as gc; model = gc.load({workdir!r}); '
      f"adata.obsm['X_genecompass'] = gc.embed(adata, model{call})",
    )
  )


def _check_extras() -> None:
  """Refuses before the work, not after it."""
  for module in ('sklearn', 'umap', 'matplotlib'):
    if importlib.util.find_spec(module) is None:
      raise errors.UserError(
        f'the demo needs {module}: pip install ".[demo]" in the folder of the '
        'repository'
      )


def _say(text: str) -> None:
  print(text, flush=True)
