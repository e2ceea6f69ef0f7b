"""A run that everything happens to, beside one that nothing happens to.

  python experiments/benchmarks/soak.py --folder soak --steps 300 --faults 12

Faults come at random, by a seed: a process is killed, one gets SIGTERM, a bit of
the newest checkpoint is turned, a shard of the corpus is cut (the run must say
so in one line and exit with 2; then it is mended), and some batches are not
finite. The disturbed run must end in the bits of one that was told to skip
those batches. Then, from its last checkpoint but 20 steps, it goes on on another
mesh: losses must agree within 1e-5. Prints a JSON line of figures; exits with 1
where something differs. Two CPU cores: about 10 s for each fault.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
RETRIED = (42, 134, 137)
FAULTS = ('kill', 'sigterm', 'checkpoint', 'shard')
EVERY = 10  # steps between checkpoints
LAST = 20  # steps on another mesh


def as_run(bad: set[int]) -> None:
  """Becomes the training command, with some batches that are not finite."""
  import dataclasses
  import runpy

  from genecompass_jax import data

  make = data.Loader._batch

  def poisoned(self, index, *args, **kwargs):
    made = make(self, index, *args, **kwargs)
    if index not in bad:
      return made
    nothing = np.full_like(made.batch.cells.values_BL, np.nan)
    cells = dataclasses.replace(made.batch.cells, values_BL=nothing)
    batch = dataclasses.replace(made.batch, cells=cells)
    return dataclasses.replace(made, batch=batch)

  data.Loader._batch = poisoned
  runpy.run_module('genecompass_jax.main', run_name='__main__')


class Job:
  """The processes of a run, each with CPU devices of its own."""

  def __init__(self, workdir, corpus, steps, bad=(), processes=1, devices=2,
               **changes):  # fmt: skip
    values = {
      'corpus': corpus, 'model.width': 32, 'model.num_heads': 2,
      'model.feed_forward': 64, 'model.max_genes': 63,
      'encoding.max_genes': 63, 'data.buckets': '(64,)',
      'data.rows_per_batch': 8, 'optimizer.total_steps': steps,
      'optimizer.warmup_steps': 10, 'log_every': 1, 'eval_every': 0,
      'checkpoint_every': EVERY, 'keep_checkpoints': 4, **changes,
    }  # fmt: skip
    with socket.socket() as server:
      server.bind(('127.0.0.1', 0))
      port = server.getsockname()[1]
    environment = {
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': '--xla_backend_optimization_level=0 '
      f'--xla_force_host_platform_device_count={devices}',
    }
    join = []
    if processes > 1:
      join = [
        f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}',
        '--heartbeat_s=10',
      ]  # fmt: skip
    self.processes = [
      subprocess.Popen(
        [
          sys.executable, __file__, 'run', json.dumps(sorted(bad)),
          f'--config={ROOT}/experiments/tiny.py:smoke',
          f'--workdir={workdir}', *join,
          *([f'--process_id={i}'] if join else []),
          *(f'--config.{key}={value}' for key, value in values.items()),
        ],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
      )
      for i in range(processes)
    ]  # fmt: skip

  def is_running(self) -> bool:
    """Whether all of its processes are."""
    return all(process.poll() is None for process in self.processes)

  def end(self) -> tuple[list[int], str]:
    """Exit codes as a shell tells them, and all that was said."""
    said = [process.communicate()[1] for process in self.processes]
    codes = [process.returncode for process in self.processes]
    return [128 - c if c < 0 else c for c in codes], '\n'.join(said)


def newest(workdir: pathlib.Path) -> int:
  """The newest sealed step, 0 for none."""
  seals = workdir.glob('checkpoints/*.sha256.json')
  return max((int(p.name.split('.')[0]) for p in seals), default=0)


def turn_a_bit(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def largest(folder: pathlib.Path) -> pathlib.Path:
  files = [f for f in folder.rglob('*') if f.is_file()]
  return max(files, key=lambda f: f.stat().st_size)


def disturb(options, rng, workdir, corpus, bad) -> dict:
  """Runs to the end through faults; returns how many there were of each."""
  count = collections.Counter(restarts=0)
  left = list(FAULTS) * -(-options.faults // len(FAULTS))
  rng.shuffle(left)
  left = left[: options.faults]
  while True:
    job = Job(workdir, corpus, options.steps, bad, options.processes)
    fault = left.pop() if left else None
    goal = newest(workdir) + EVERY * rng.randint(0, 1)
    began = time.monotonic()
    while fault and job.is_running() and newest(workdir) <= goal:
      time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.2) if fault else 0)
    victim = rng.choice(job.processes)
    asked = fault if fault and job.is_running() else None
    if asked:
      victim.send_signal(
        signal.SIGTERM if fault == 'sigterm' else signal.SIGKILL
      )
      if fault != 'sigterm':  # what a launcher does when one is lost
        for process in job.processes:
          process.kill()
    codes, said = job.end()
    print(
      f'{fault}: {codes} at {newest(workdir)} in '
      f'{time.monotonic() - began:.1f} s',
      file=sys.stderr, flush=True,
    )  # fmt: skip
    if set(codes) == {0}:
      return dict(count)
    if not set(codes) <= {*RETRIED}:
      raise SystemExit(f'{fault} ended with {codes}: {said}')
    if asked is None:
      # Of itself, and to be tried again: a connection or a heartbeat that came
      # too late on a busy machine, say.
      count['by itself'] += 1
      count['restarts'] += 1
      last = [x for x in said.splitlines() if x and not x.startswith('[Gloo]')]
      print(last[-1:], file=sys.stderr, flush=True)
      left += [fault] if fault else []
      continue
    if fault == 'sigterm' and set(codes) != {42}:
      raise SystemExit(f'SIGTERM ended with {codes}: {said}')
    count['restarts'] += 1
    count[fault] += 1
    if fault == 'checkpoint' and newest(workdir):
      turn_a_bit(largest(workdir / 'checkpoints' / str(newest(workdir))))
    if fault == 'shard':
      shard = largest(corpus / 'train')
      whole = shard.read_bytes()
      shard.write_bytes(whole[:-100])
      codes, said = Job(
        workdir, corpus, options.steps, bad, options.processes
      ).end()
      lines = [x for x in said.splitlines() if x and not x.startswith('[Gloo]')]
      if set(codes) != {2} or len(lines) != 1 or shard.name not in lines[0]:
        raise SystemExit(f'a cut shard ended with {codes}: {said}')
      shard.write_bytes(whole)


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, by name."""
  import jax
  import orbax.checkpoint as ocp

  found = {}
  for item in ('params', 'training'):
    place = (workdir / 'checkpoints' / str(step) / item).resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      # As NumPy arrays: this process has other devices than the run.
      asked = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        checkpointer.metadata(place).item_metadata.tree,
      )
      tree = checkpointer.restore(
        place, args=ocp.args.PyTreeRestore(restore_args=asked)
      )
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
      found[item + jax.tree_util.keystr(path)] = np.asarray(array)
  return found


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Loss of every step, each of which must stand once."""
  found = {}
  for text in (workdir / 'metrics.jsonl').read_text().splitlines():
    line = json.loads(text)
    if 'loss' in line and 'event' not in line:
      if line['step'] in found:
        raise SystemExit(f'step {line["step"]} stands twice')
      found[line['step']] = line['loss']
  return found


def soak(options: argparse.Namespace) -> dict:
  """The whole of it; figures."""
  from genecompass_jax.prepare import simulated

  began = time.monotonic()
  rng = random.Random(options.seed)
  folder = pathlib.Path(options.folder).resolve()
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  corpus = pathlib.Path(simulated.corpus(folder, num_cells=400))
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'programs'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
  bad = set(rng.sample(range(options.steps), options.bad_batches))

  told, hit = folder / 'told', folder / 'hit'
  skip = f'({"".join(f"{b}," for b in sorted(bad))})'
  job = Job(
    told, corpus, options.steps, processes=options.processes,
    skip_batches=skip,
  )  # fmt: skip
  codes, said = job.end()
  if set(codes) != {0}:
    raise SystemExit(f'the undisturbed run ended with {codes}: {said}')
  undisturbed_s = time.monotonic() - began
  faults = disturb(options, rng, hit, corpus, bad)
  ours, theirs = arrays(hit, options.steps), arrays(told, options.steps)
  same = ours.keys() == theirs.keys() and all(
    array.tobytes() == theirs[name].tobytes() for name, array in ours.items()
  )
  same = same and losses(hit) == losses(told)

  # The same run from LAST steps before its end, on another mesh.
  other = folder / 'other'
  shutil.copytree(hit, other)
  for path in (other / 'checkpoints').iterdir():
    if int(re.match(r'\d+', path.name)[0]) > options.steps - LAST:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  layout = {'processes': 3 - min(options.processes, 2), 'devices': 2}
  codes, said = Job(
    other, corpus, options.steps, bad, **layout, **{'mesh.fsdp': 2}
  ).end()
  if set(codes) != {0}:
    raise SystemExit(f'another mesh ended with {codes}: {said}')
  after, before = losses(other), losses(hit)
  apart = max(abs(after[step] - before[step]) for step in before)
  return {
    'steps': options.steps, 'processes': options.processes,
    'seed': options.seed, 'bad_batches': len(bad), 'faults': faults,
    'same_bits': same, 'other_mesh_loss_apart': apart,
    'undisturbed_s': round(undisturbed_s, 1),
    'all_s': round(time.monotonic() - began, 1),
  }  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--folder', required=True, help='is emptied')
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--faults', type=int, default=12)
  parser.add_argument('--bad-batches', type=int, default=4)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  figures = soak(parser.parse_args())
  print(json.dumps(figures))
  return 0 if figures['same_bits'] and (
    figures['other_mesh_loss_apart'] <= 1e-5
  ) else 1  # fmt: skip


if __name__ == '__main__':
  if sys.argv[1:2] == ['run']:
    bad_batches = set(json.loads(sys.argv[2]))
    sys.argv = ['main', *sys.argv[3:]]
    as_run(bad_batches)
  else:
    sys.exit(main())
