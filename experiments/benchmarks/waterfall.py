"""A training step from the original's computation to ours, change by change.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python \
      experiments/benchmarks/waterfall.py --corpus CORPUS --cells 16
  python experiments/benchmarks/waterfall.py --size base --genes 1200 --cells 1
  python experiments/benchmarks/waterfall.py --size base --corpus CORPUS \
      --cells 256 --batch 32 --from-arm 4           # on an accelerator

Every arm is the one before it with one change:

  straight port   straight_port.py: the released computation in JAX, rows of
                  2,048 genes, logits at every position
  masked head     logits at masked positions alone
  composition     prior projections multiplied into the fusion, once a step
  row lengths     rows of the cell's length bucket (exact; PyTorch could too)
  blocks          the training step of this package: scanned layers, attention
                  and element-wise parts made anew in the backward pass
  attention       scores of some queries at a time ('chunked'), or the fused
                  kernel of the device
  batch           `--batch` cells a step: the optimiser runs less often
  packing         the same cells packed in rows of 2,304 slots
  precision       bfloat16 products and states

All have the same parameters, cells, masks and optimiser, without dropout and
at a learning rate of 0, so that every pass has the same loss. The mean loss
over all cells must agree to 1e-5 between the float32 arms, or the program
fails. Four random prior tables of 768 columns. Cells are training cells of a
corpus at their own lengths, or random ones of `--genes` genes.

CPU seconds are user + system of this process over all threads: wall time
depends on who else is on the machine. `temporaries` is what the compiler
reserves, the largest over the shapes in use. On a CPU the wall and system time
of large programs is for a good part page faults of XLA's temporaries, which
glibc gives back and asks for anew at every step; with transparent huge pages
on `madvise`, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment makes
that cheaper. It must be set before Python starts, and it is printed. On an
accelerator wall time is what counts, and two utilisations stand beside it, of
the peak of the device in bfloat16, by FLOPs counted by hand (flops.py): of the
slots computed, and of the genes in them.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import straight_port
import waterfall_cells

from genecompass_jax import (
  chips,
  data,
  flops,
  knowledge as knowledge_lib,
  model,
  optimizer,
  schemas,
)
from genecompass_jax.convert import names
from genecompass_jax.training import (
  train_config,
  train_step,
)

RELEASED_GENES, RELEASED_VOCABULARY, PRIOR_WIDTH = 2048, 50_558, 768
PACKED_SLOTS = 2304
# CPU seconds of the PyTorch original, float32, batch 1, on two nearly quiet
# cores: another time and another state of the machine. Base alone was timed.
PYTORCH = {'padded to 2,048': 60.3, 'trimmed to 1,200': 24.7}
PYTORCH_TRIMMED = 1200
TOLERANCE = 1e-5

Batches = list[Any]
Step = Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way of doing a pass over all cells.

  Attributes:
    name: of the change.
    make: () -> (state, frozen tables).
    step: (state, batch, tables) -> (state, {'loss', 'grad_norm'}).
    batches: what a pass goes through.
    masked: genes hidden in each batch: the weight of its loss.
    work: what a pass computes, padding included.
  """

  name: str
  make: Callable[[], tuple[Any, Any]]
  step: Step
  batches: Batches
  masked: list[float]
  work: flops.Work


@dataclasses.dataclass
class Result:
  """What one arm cost."""

  name: str
  cells: int
  loss: float = 0.0
  cpu: float = 0.0
  system: float = 0.0
  wall: float = 0.0
  temporaries: int = 0
  padded_flops: float = 0.0


def measure(arm: Arm, cells: int, passes: int) -> Result:
  """Compiles a step for every shape, then times some passes over the cells.

  Args:
    arm: what to run.
    cells: of a pass.
    passes: timed; one more goes before, to page in code and parameters.
  """
  state, tables = arm.make()
  jitted = jax.jit(arm.step, donate_argnums=0)
  result = Result(arm.name, cells * passes)
  compiled = {}
  todo = []
  for batch in arm.batches:
    shape = tuple(np.shape(x) for x in jax.tree.leaves(batch))
    if shape not in compiled:
      compiled[shape] = jitted.lower(state, batch, tables).compile()
      memory = compiled[shape].memory_analysis()
      result.temporaries = max(result.temporaries, memory.temp_size_in_bytes)
    todo.append((compiled[shape], jax.device_put(batch)))
  found = []
  for run, batch in todo:
    state, values = run(state, batch, tables)
    found.append(values['loss'])
  found = np.array([float(x) for x in found])
  result.loss = float(np.average(found, weights=arm.masked))
  before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
  for _ in range(passes):
    for run, batch in todo:
      state, values = run(state, batch, tables)
  jax.block_until_ready((state, values))
  after = resource.getrusage(resource.RUSAGE_SELF)
  result.wall = time.perf_counter() - wall
  result.system = after.ru_stime - before.ru_stime
  result.cpu = after.ru_utime - before.ru_utime + result.system
  return result


def arms(
  config: train_config.TrainConfig,
  cells: list[schemas.PretrainingBatch],
  batch: int,
) -> list[Arm]:
  """The arms in order; each makes its own state, and frees it."""
  size, priors = config.model.vocabulary_size, config.model.priors
  params = jax.tree.map(np.asarray, model.init(config.model, 0))
  keys = jax.random.split(jax.random.key(1), len(priors))
  tables = {
    name: np.asarray(jax.random.normal(key, (size, PRIOR_WIDTH)) / 30)
    for key, (name, _) in zip(keys, priors)
  }
  knowledge = knowledge_lib.Knowledge(
    row_SV=np.tile(np.arange(size, dtype=np.int32), (2, 1)),
    tables=tables,
    has_vector={name: np.ones(size, bool) for name in tables},
  )
  transform = optimizer.make_optimizer(config.optimizer)

  def port_step(state, batch, tables, **changes):
    weights, moments = state
    value, grads = jax.value_and_grad(straight_port.loss)(
      weights,
      tables,
      batch,
      num_layers=config.model.num_layers,
      num_heads=config.model.num_heads,
      **changes,
    )
    updates, moments = transform.update(grads, moments, weights)
    values = {'loss': value, 'grad_norm': optax.tree.norm(grads)}
    return (optax.apply_updates(weights, updates), moments), values

  def make_port():
    weights = names.params_to_original(params, config.model)
    weights = jax.tree.map(jnp.array, weights)
    named = {original: tables[ours] for ours, original, _ in names.PRIORS}
    return (weights, transform.init(weights)), jax.device_put(named)

  def make_ours(dtype):
    own = jax.tree.map(jnp.array, params)
    zeros = {
      field.name: jnp.zeros((), jnp.int32)
      for field in dataclasses.fields(train_step.TrainState)
      if field.name not in ('params', 'opt_state')
    }
    state = train_step.TrainState(
      params=own, opt_state=transform.init(own), **zeros
    )
    return state, jax.device_put(knowledge_lib.rounded(knowledge, dtype))

  def port(name, batches, **changes):
    slots = sum(b['input_ids'].shape[1] + 1 for b in batches)
    squares = sum((b['input_ids'].shape[1] + 1) ** 2 for b in batches)
    picks = sum(
      b['masked'].shape[1] if changes.get('masked_only') else RELEASED_GENES
      for b in batches
    )
    step = functools.partial(port_step, **changes)
    work = flops.Work(slots, squares, picks)
    masked = [float(b['used'].sum()) for b in batches]
    return Arm(name, make_port, step, batches, masked, work)

  def ours(name, batches, **changes):
    own = dataclasses.replace(
      config, model=dataclasses.replace(config.model, **changes)
    )
    step = functools.partial(train_step.train_step, config=own)
    make = functools.partial(make_ours, own.model.dtype)
    masked = [float(b.id_weights_BK.sum()) for b in batches]
    work = sum(
      (
        flops.padded_work(
          *b.cells.segments_BL.shape, b.masked_slots_BK.shape[1]
        )
        for b in batches
      ),
      start=flops.Work(0, 0, 0),
    )
    return Arm(name, make, step, batches, masked, work)

  full = [waterfall_cells.for_port(c, RELEASED_GENES) for c in cells]
  trim = [
    waterfall_cells.for_port(
      c, min(c.cells.segments_BL.shape[1] - 1, RELEASED_GENES)
    )
    for c in cells
  ]
  together = waterfall_cells.together(cells, batch)
  packed = waterfall_cells.packed(cells, PACKED_SLOTS, batch)
  device = jax.devices()[0].platform
  fused = {'tpu': 'splash', 'gpu': 'pallas', 'cuda': 'pallas'}.get(device)
  small = {'masked_only': True, 'composed': True}
  found = [
    port('straight port', full),
    port('masked head', full, masked_only=True),
    port('composition', full, **small),
    port('row lengths', trim, **small),
    ours('blocks', cells, attention='xla'),
    ours('attention: chunked', cells, attention='chunked'),
    ours(f'batch of {batch}', together, attention='chunked'),
    ours('packing', packed, attention='chunked'),
    ours('precision: bfloat16', packed, attention='chunked', dtype='bfloat16'),
  ]
  if fused:
    name = f'attention: {fused}'
    found.append(ours(name, packed, attention=fused, dtype='bfloat16'))
  return found


def table(results: list[Result], real_flops: float, peak: float | None) -> str:
  """Ratios are to the first arm, and to the arm before."""
  first = results[0]
  lines = [
    '| arm | CPU s/cell | of it system | first / this | before / this | wall'
    ' s/cell | first / this | temporaries MiB | first / this | loss |'
    + ' padded | real |'
    * bool(peak),
    '|---|---|---|---|---|---|---|---|---|---|' + '---|---|' * bool(peak),
  ]
  for before, r in zip([first, *results], results):
    cpu, wall = r.cpu / r.cells, r.wall / r.cells
    line = (
      f'| {r.name} | {cpu:.3f} | {r.system / r.cells:.3f} |'
      f' {first.cpu / first.cells / cpu:.2f} |'
      f' {before.cpu / before.cells / cpu:.2f} | {wall:.3f} |'
      f' {first.wall / first.cells / wall:.2f} |'
      f' {r.temporaries / 2**20:,.0f} |'
      f' {first.temporaries / r.temporaries:.2f} | {r.loss:.6f} |'
    )
    if peak:
      line += f' {r.padded_flops / r.wall / peak:.1%} |'
      line += f' {real_flops * r.cells / r.wall / peak:.1%} |'
    lines.append(line)
  return '\n'.join(lines)


def facts() -> str:
  """Machine, load, allocator and versions in one line."""
  versions = ' '.join(
    f'{name} {importlib.metadata.version(name)}'
    for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
  )
  devices = jax.devices()
  return (
    f'{platform.machine()}, {os.cpu_count()} cores, load'
    f' {os.getloadavg()[0]:.1f}, {len(devices)} x {devices[0].device_kind},'
    f' GLIBC_TUNABLES={os.environ.get("GLIBC_TUNABLES", "")!r}, Python'
    f' {platform.python_version()}, {versions}'
  )


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--size', default='small', choices=('tiny', 'small', 'base')
  )
  parser.add_argument('--genes', type=int, default=1200)
  parser.add_argument('--corpus', help='cells of it, in place of --genes')
  parser.add_argument('--cells', type=int, default=4)
  parser.add_argument('--batch', type=int, default=4, help='cells of a step')
  parser.add_argument('--passes', type=int, default=1, help='over the cells')
  parser.add_argument(
    '--from-arm', type=int, default=0, help='leave so many arms out'
  )
  return parser.parse_args()


def main() -> None:
  """Times the arms and prints one table."""
  args = _arguments()
  if args.corpus:
    cells, size = waterfall_cells.of_corpus(args.corpus, args.cells)
  else:
    size = RELEASED_VOCABULARY
    cells = waterfall_cells.random(args.cells, args.genes, size)
  config = train_config.TrainConfig(
    corpus='',
    model=model.named_config(
      args.size,
      vocabulary_size=size,
      priors=tuple((name, PRIOR_WIDTH) for name, _, _ in names.PRIORS),
      missing_prior='released',
      hidden_dropout=0.0,
      attention_dropout=0.0,
    ),
    optimizer=optimizer.OptimizerConfig(learning_rate=0.0),
    data=data.DataConfig(),
  )
  lengths = [int((b.cells.segments_BL > 0).sum()) for b in cells]
  slots = sorted({b.cells.segments_BL.shape[1] for b in cells})
  print(
    f'{args.size}: {model.count_parameters(config.model)["total"]:,}'
    f' parameters, {len(cells)} cells of {np.mean(lengths) - 1:.0f} genes, rows'
    f' of {", ".join(map(str, slots))} slots, vocabulary {size:,}'
  )
  real = flops.Work(
    sum(lengths),
    sum(n * n for n in lengths),
    sum(float(b.id_weights_BK.sum()) for b in cells),
  )
  real_flops = sum(flops.training(config.model, real).values()) / len(cells)
  peak = chips.peak_flops(jax.devices()[0].device_kind, 'bfloat16')
  results = []
  with jax.default_matmul_precision('highest'):
    for arm in arms(config, cells, args.batch)[args.from_arm :]:
      result = measure(arm, len(cells), args.passes)
      of_pass = sum(flops.training(config.model, arm.work).values())
      result.padded_flops = of_pass * args.passes
      results.append(result)
      gc.collect()
      print(f'  {result}', flush=True)
  print()
  print(table(results, real_flops, peak))
  print(f'\n{facts()}')
  if args.size == 'base' and not args.corpus:
    best = min(r.cpu / r.cells for r in results)
    for name, cpu in PYTORCH.items():
      if name == 'padded to 2,048' or args.genes == PYTORCH_TRIMMED:
        print(
          f'record of the PyTorch original {name}: {cpu} CPU s, {cpu / best:.1f}'
          ' times the best arm (another state of the machine)'
        )
  for r in results:
    difference = abs(r.loss / results[0].loss - 1)
    if difference > TOLERANCE and 'bfloat16' not in r.name:
      raise SystemExit(
        f'{r.name}: loss {r.loss} differs from {results[0].loss} by'
        f' {difference:.1e}'
      )
  print(f'losses of the float32 arms agree within {TOLERANCE}')


if __name__ == '__main__':
  main()
