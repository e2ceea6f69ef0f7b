"""The study of what knowledge is worth: every run, and the table.

  python -m experiments.knowledge_study.study ROOT --only pilot
  python -m experiments.knowledge_study.study ROOT --register
  python -m experiments.knowledge_study.study ROOT --budget 60

Started again, it goes on where it was: corpora, priors and finished runs are
kept under ROOT, a run that was stopped continues from its checkpoint. After the
pilot `--register` writes endpoints, margins and seeds to registered.json beside
this file; the other stages refuse to start without it, or when the settings
have changed since. ROOT/report.md and ROOT/results.parquet are written at the
end of every call, also of a partial study.

Hardware: two CPU cores. Time: see README.md beside this file.
"""

import argparse
import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from experiments.knowledge_study import (
  arms,
  config as config_lib,
  materials,
  real_cells,
  registration,
  report,
  results,
  runs as runs_lib,
  settings as settings_lib,
)
from genecompass_jax import errors, paths, progress, simulate

HERE = pathlib.Path(__file__).resolve().parent
SPEC = 'spec.json'
_SECONDS = 180.0  # of a run, until one was timed
_GRACE = 30.0  # for a run to save itself


def main(argv: list[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('root', metavar='ROOT', help='folder of the study')
  parser.add_argument(
    '--only',
    action='append',
    choices=('materials', *settings_lib.STAGES, 'report'),
    help='some stages; again for more (default: all of the atlas, and real '
    'where --data is given)',
  )
  parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
  parser.add_argument(
    '--budget', type=float, metavar='MINUTES', help='stop cleanly after it'
  )
  parser.add_argument('--data', default='', help='folder of the real cells')
  parser.add_argument(
    '--register', action='store_true', help='write what the pilot decides'
  )
  parser.add_argument(
    '--registered',
    default=str(registration.REGISTERED),
    help='file of the registration',
  )
  parser.add_argument(
    '--smoke', action='store_true', help='a toy of the study, in a minute'
  )
  parser.add_argument('--one', metavar='RUN', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  settings = settings_lib.SMOKE if args.smoke else settings_lib.Settings()
  if args.smoke and args.registered == str(registration.REGISTERED):
    args.registered = os.path.join(args.root, 'registered.json')
  if args.smoke:  # nearly all of its time is compiling
    os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
  try:
    if args.one:
      return _one(args.root, args.one, settings)
    if args.register:
      registration.register(args.root, args.registered, settings)
      return errors.EXIT_OK
    if args.smoke and not args.only:
      return _smoke(args, settings)
    return _study(args, settings)
  except errors.UserError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_USAGE
  except errors.RetryableError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_RETRY


def _smoke(args, settings) -> int:
  """Pilot, registration, runs and report in one process."""
  args.only = [settings_lib.PILOT]
  code = _study(args, settings)
  if code == errors.EXIT_OK:
    registration.register(args.root, args.registered, settings)
    args.only = [settings_lib.FIDELITY, settings_lib.PRIMARY]
    code = _study(args, settings)
  return code


def _study(args, settings) -> int:
  stages = args.only or [
    s for s in settings_lib.STAGES if s != settings_lib.REAL or args.data
  ]
  seeds = settings.least_seeds
  needs = set(stages) & set(settings_lib.STAGES[1:])
  if needs:
    seeds = registration.check(args.registered, settings)['seeds']['primary']
  elif os.path.exists(args.registered):
    seeds = paths.read_json(args.registered)['seeds']['primary']
  if settings_lib.REAL in stages and not args.data:
    raise errors.UserError('--only real needs --data FOLDER of the real cells')
  planned = settings_lib.plan(settings, seeds)
  chosen = [run for run in planned if run.stage in stages]
  code = errors.EXIT_OK
  started = time.monotonic()
  if stages != ['report']:
    end = started + 60 * args.budget if args.budget else float('inf')
    wanted = planned if stages == ['materials'] else chosen
    code = execute(args, settings, wanted, end, stages != ['materials'])
  report.write(args.root, settings, planned, args.registered)
  return code


def execute(args, settings, runs, end: float, train: bool) -> int:
  """Makes what runs need and runs what is missing, until `end`."""
  todo, done = {}, 0
  for run in runs:
    name = runs_lib.key(run, settings)
    if results.read_score(runs_lib.folder_of(args.root, name)) is not None:
      done += 1
    elif name not in todo:
      todo[name] = run
  stop, making = threading.Event(), threading.Lock()
  failed: list[str] = []
  pids: set[subprocess.Popen] = set()

  def ask_to_stop(number=None, _=None):
    why = 'the budget is spent' if number is None else f'signal {number}'
    print(f'stopping: {why}; the same command goes on', file=sys.stderr)
    stop.set()
    for child in list(pids):
      child.send_signal(signal.SIGTERM)

  old = {s: signal.signal(s, ask_to_stop) for s in (15, 2)}
  timer = None
  if end < float('inf'):
    timer = threading.Timer(
      max(end - time.monotonic() - _GRACE, 0), ask_to_stop
    )
    timer.daemon = True
    timer.start()
  try:
    with progress.Progress(len(todo) + done, 'runs', 'study') as bar:
      bar.skip(done)

      def work(item):
        name, run = item
        if stop.is_set():
          return
        with making:  # runs share them; others train meanwhile
          _materials(args, settings, run)
        if not train or stop.is_set():
          return
        note = f'{run.stage} {run.arm} {run.place} seed {run.seed}'
        code = _start(args, settings, name, run, pids)
        if code == errors.EXIT_OK:
          bar.update(note=note)
        elif not stop.is_set() or code not in (errors.EXIT_RETRY, -15):
          failed.append(f'{note} ({name}): exit {code}, see log.txt there')

      with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo.items()))
  finally:
    if timer is not None:
      timer.cancel()
    for number, handler in old.items():
      signal.signal(number, handler)
  for line in failed:
    print(line, file=sys.stderr)
  if failed:
    return errors.EXIT_FAILED
  return errors.EXIT_RETRY if stop.is_set() else errors.EXIT_OK


def _materials(args, settings, run) -> None:
  """Corpus and prior tables of a run."""
  arm = arms.ARMS[run.arm]
  if not run.place.isdecimal():
    real_cells.corpus(args.root, args.data, run.place, settings)
    real_cells.priors(args.root, args.data, run.place, settings, arm, run.seed)
    return
  size = int(run.place)
  materials.corpus(args.root, size, settings)
  materials.knowledge(args.root, settings)  # names the TFs that are held out
  materials.priors(args.root, size, settings, arm, run.seed)


def _start(args, settings, name, run, pids) -> int:
  """Runs one, in a process of its own; in this one for a toy."""
  folder = runs_lib.folder_of(args.root, name)
  os.makedirs(folder, exist_ok=True)
  spec = {
    **dataclasses.asdict(run),
    'identity': runs_lib.identity(run, settings),
  }
  paths.write_json(os.path.join(folder, SPEC), spec)
  if args.smoke:
    return _one(args.root, name, settings)
  environment = {
    'JAX_COMPILATION_CACHE_DIR': os.path.join(args.root, 'compiled'),
    **os.environ,
  }
  with open(os.path.join(folder, 'log.txt'), 'a', encoding='utf-8') as log:
    child = subprocess.Popen(
      [sys.executable, '-m', 'experiments.knowledge_study.study']
      + [args.root, '--one', name],
      stdout=log,
      stderr=log,
      env=environment,
      cwd=HERE.parents[1],
    )
    pids.add(child)
    code = child.wait()
    pids.discard(child)
  return code


def _one(root: str, name: str, settings: settings_lib.Settings) -> int:
  """Trains and scores one run."""
  from experiments.knowledge_study import scores
  from genecompass_jax import main as training

  logging.getLogger().setLevel(logging.INFO)
  for noisy in ('absl', 'jax'):
    logging.getLogger(noisy).setLevel(logging.WARNING)
  folder = runs_lib.folder_of(root, name)
  spec = paths.read_json(os.path.join(folder, SPEC))
  run = settings_lib.Run(
    *(spec[f.name] for f in dataclasses.fields(settings_lib.Run))
  )
  config = config_lib.get_config(runs_lib.variant(root, run, settings))
  began, used = time.time(), time.process_time()
  try:
    training.run(dict(config.items()), folder)
  except errors.RetryableError as error:
    print(error, file=sys.stderr)
    _spent(folder, time.time() - began, time.process_time() - used)
    return errors.EXIT_RETRY
  atlas = simulate.Atlas(settings.atlas) if run.place.isdecimal() else None
  found = scores.score(folder, config.corpus, root, atlas)
  found |= _spent(folder, time.time() - began, time.process_time() - used)
  paths.write_json(os.path.join(folder, results.SCORE), found)
  return errors.EXIT_OK


def _spent(folder: str, seconds: float, cpu_seconds: float) -> dict[str, float]:
  """Adds to the time that a run took, over all its starts."""
  place = os.path.join(folder, 'time.json')
  spent = {'seconds': 0.0, 'cpu_seconds': 0.0}
  if os.path.exists(place):
    spent = paths.read_json(place)
  spent['seconds'] += seconds
  spent['cpu_seconds'] += cpu_seconds
  paths.write_json(place, spent)
  return spent


if __name__ == '__main__':
  sys.exit(main())
