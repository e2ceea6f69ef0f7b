"""A training step on one cell: the original's computation against ours.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python \
      experiments/benchmarks/train_step.py --size small --genes 1200
  python experiments/benchmarks/train_step.py --size base --cells 1 --steps 1
  python experiments/benchmarks/train_step.py --corpus DIR --cells 16

Arms, each with the gain of the one before: `straight port` (straight_port.py:
the released computation in JAX, every row padded to 2,048 genes), `trimmed`
(the same at the bucket's length; exact, and PyTorch could do it too), `masked
head` (logits at masked positions alone), and `ours`, the training step of this
package. All have the same parameters, cells, masks and optimiser, in float32,
without dropout, one cell a step. The losses of the first cell must agree to
1e-5, or the program fails; gradient norms stand beside them. Four random prior
tables of 768 columns; cells are random ones of `--genes` genes in a vocabulary
of the release's size, or held-out cells of a corpus at their own lengths.

CPU seconds are user + system of this process over all threads: wall time
depends on who else is on the machine. `temporaries` is what the compiler
reserves, the largest over the shapes in use. On a CPU the wall and system time
of large programs is for a good part page faults of XLA's temporaries, which
glibc gives back and asks for anew at every step; with transparent huge pages
on `madvise`, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment makes
that cheaper (figures in experiments/README.md). It must be set before Python
starts, and it is printed.
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

import jax
import jax.numpy as jnp
import numpy as np
import optax
import straight_port

from genecompass_jax import (
  convert,
  corpus as corpus_lib,
  data,
  encoding,
  knowledge as knowledge_lib,
  masking,
  model,
  optimizer,
  schemas,
  train_config,
  train_step,
)

RELEASED_GENES, RELEASED_VOCABULARY, PRIOR_WIDTH = 2048, 50_558, 768
BUCKETS = data.DataConfig().buckets
# CPU seconds of the PyTorch original, float32, batch 1, on two nearly quiet
# cores: another time and another state of the machine. Base alone was timed.
PYTORCH = {'padded to 2,048': 60.3, 'trimmed to 1,200': 24.7}
PYTORCH_TRIMMED = 1200


@dataclasses.dataclass
class Result:
  """What one arm cost."""

  name: str
  loss: float = 0.0
  grad_norm: float = 0.0
  cpu: float = 0.0
  system: float = 0.0
  wall: float = 0.0
  cells: int = 0
  temporaries: int = 0


def random_cells(
  num_cells: int, num_genes: int, vocabulary_size: int
) -> list[schemas.PretrainingBatch]:
  """Cells of random genes and falling values in the smallest bucket."""
  rng = np.random.default_rng(0)
  tokens = np.arange(2, vocabulary_size, dtype=np.int32)
  ids_N = np.concatenate(
    [rng.choice(tokens, num_genes, replace=False) for _ in range(num_cells)]
  )
  values_N = np.concatenate(
    [np.sort(rng.gamma(2, 1, num_genes))[::-1] for _ in range(num_cells)]
  ).astype(np.float32)
  cells = encoding.EncodedCells(
    ids_N,
    values_N,
    np.arange(num_cells + 1) * num_genes,
    np.zeros(num_cells, np.uint64),
    np.full(num_cells, num_genes, np.int32),
  )
  masked = masking.mask_cells(
    cells,
    np.arange(num_cells),
    config=masking.MaskConfig(),
    seed=0,
    epoch=0,
    random_tokens=tokens,
    vocabulary_size=vocabulary_size,
  )
  slots = BUCKETS[np.searchsorted(BUCKETS, num_genes + 1)]
  picks = data.DataConfig(layout='buckets').num_masked(slots)
  return [
    _one_cell(
      *(
        array[cell * num_genes : (cell + 1) * num_genes]
        for array in (
          ids_N,
          values_N,
          masked.gene_ids_N,
          masked.values_N,
          masked.is_masked_N,
        )
      ),
      slots,
      picks,
    )
    for cell in range(num_cells)
  ]


def _one_cell(ids, values, shown_ids, shown_values, is_masked, slots, picks):
  n = len(ids)
  integers, reals = np.zeros((4, 1, slots), np.int32), np.zeros((1, slots))
  gene_ids, positions, segments, species = integers
  gene_ids[0, 1 : n + 1] = shown_ids
  positions[0, 1 : n + 1] = np.arange(n)
  segments[0, : n + 1] = 1
  reals[0, 1 : n + 1] = shown_values
  hidden = np.flatnonzero(is_masked)
  at, labels = np.zeros((2, 1, picks), np.int32)
  truth, weights = np.zeros((2, 1, picks), np.float32)
  used = slice(len(hidden))
  at[0, used], labels[0, used] = hidden + 1, ids[hidden]
  truth[0, used], weights[0, used] = values[hidden], 1
  cells = schemas.CellBatch(
    gene_ids,
    reals.astype(np.float32),
    positions,
    segments,
    species,
    np.arange(slots)[None] == 0,
  )
  return schemas.PretrainingBatch(cells, at, labels, weights, truth, weights)


def corpus_cells(
  path: str, num_cells: int
) -> tuple[list[schemas.PretrainingBatch], int]:
  """Evenly spaced training cells of a corpus, and its vocabulary's size."""
  corpus = corpus_lib.Corpus.open(path)
  config = data.DataConfig(layout='buckets', rows_per_batch=1)
  batches = data.evaluation_batches(
    corpus, encoding.EncodingConfig(), config, 'train', max_cells=num_cells
  )
  return [b.batch for b in batches], corpus.vocabulary.size


def for_port(
  batch: schemas.PretrainingBatch, num_genes: int
) -> dict[str, np.ndarray]:
  """The same cell as the original takes it, padded to `num_genes`."""
  cells = batch.cells

  def genes(x_BL):
    x_BL = x_BL[:, 1 : num_genes + 1]
    return np.pad(x_BL, ((0, 0), (0, num_genes - x_BL.shape[1])))

  used = batch.id_weights_BK > 0
  masked = np.where(used, batch.masked_slots_BK - 1, 0)
  labels = np.full((1, num_genes), straight_port.IGNORED, np.int32)
  label_values = np.zeros((1, num_genes), np.float32)
  labels[0, masked[used]] = batch.id_labels_BK[used]
  label_values[0, masked[used]] = batch.value_labels_BK[used]
  return {
    'input_ids': genes(cells.gene_ids_BL),
    'values': genes(cells.values_BL),
    'attention_mask': genes((cells.segments_BL > 0).astype(np.int32)),
    'species': cells.species_BL[:, :1],
    'labels': labels,
    'labels_values': label_values,
    'masked': masked,
    'used': used,
  }


def measure(name, make, step, batches, steps) -> Result:
  """Compiles a step for every shape, then times `steps` passes of the cells.

  Args:
    name: of the arm.
    make: () -> (state, frozen tables).
    step: (state, batch, tables) -> (state, {'loss', 'grad_norm'}).
    batches: one cell each.
    steps: passes over the cells.
  """
  state, tables = make()
  jitted = jax.jit(step, donate_argnums=0)
  result = Result(name)
  compiled = {}
  for batch in batches:
    shape = tuple(np.shape(x) for x in jax.tree.leaves(batch))
    if shape not in compiled:
      compiled[shape] = jitted.lower(state, batch, tables).compile()
      memory = compiled[shape].memory_analysis()
      result.temporaries = max(result.temporaries, memory.temp_size_in_bytes)
  todo = [
    (compiled[tuple(np.shape(x) for x in jax.tree.leaves(b))], b)
    for b in batches
  ]
  run, batch = todo[0]
  state, values = run(state, batch, tables)  # pages in code and parameters
  result.loss, result.grad_norm = (
    float(values['loss']),
    float(values['grad_norm']),
  )
  before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
  for _ in range(steps):
    for run, batch in todo:
      state, values = run(state, batch, tables)
  jax.block_until_ready((state, values))
  after = resource.getrusage(resource.RUSAGE_SELF)
  result.wall = time.perf_counter() - wall
  result.system = after.ru_stime - before.ru_stime
  result.cpu = after.ru_utime - before.ru_utime + result.system
  result.cells = steps * len(todo)
  return result


def arms(config: train_config.TrainConfig, params, batches, steps):
  """The arms in order; each frees its state before the next begins."""
  size = config.model.vocabulary_size
  keys = jax.random.split(jax.random.key(1), len(config.model.priors))
  tables = {
    name: jax.random.normal(key, (size, PRIOR_WIDTH)) / 30
    for key, (name, _) in zip(keys, config.model.priors)
  }
  transform = optimizer.make_optimizer(config.optimizer)

  def port_step(state, batch, tables, *, masked_only):
    weights, moments = state
    value, grads = jax.value_and_grad(straight_port.loss)(
      weights,
      tables,
      batch,
      num_layers=config.model.num_layers,
      num_heads=config.model.num_heads,
      masked_only=masked_only,
    )
    updates, moments = transform.update(grads, moments, weights)
    values = {'loss': value, 'grad_norm': optax.tree.norm(grads)}
    return (optax.apply_updates(weights, updates), moments), values

  def make_port():
    weights = convert.params_to_original(params, config.model)
    weights = jax.tree.map(jnp.array, weights)
    named = {original: tables[ours] for ours, original, _ in convert.PRIORS}
    return (weights, transform.init(weights)), named

  def make_ours():
    own = jax.tree.map(jnp.array, params)
    zero = jnp.zeros((), jnp.int32)
    knowledge = knowledge_lib.Knowledge(
      row_SV=np.tile(np.arange(size, dtype=np.int32), (2, 1)),
      tables=tables,
      has_vector={name: np.ones(size, bool) for name in tables},
    )
    state = train_step.TrainState(zero, zero + 0, own, transform.init(own))
    return state, jax.device_put(knowledge)

  full = [for_port(b, RELEASED_GENES) for b in batches]
  trim = [for_port(b, b.cells.gene_ids_BL.shape[1] - 1) for b in batches]
  for name, cells, masked_only in (
    ('straight port', full, False),
    ('trimmed', trim, False),
    ('masked head', trim, True),
  ):
    step = functools.partial(port_step, masked_only=masked_only)
    yield lambda n=name, c=cells, s=step: measure(n, make_port, s, c, steps)
  ours = functools.partial(train_step.train_step, config=config)
  yield lambda: measure('ours', make_ours, ours, batches, steps)


def table(results: list[Result]) -> str:
  """Ratios are to the first arm."""
  first = results[0]
  lines = [
    '| arm | CPU s/cell | of it system | ratio | wall s/cell | ratio |'
    ' temporaries MiB | ratio | loss | gradient norm |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  lines.extend(
    f'| {r.name} | {r.cpu / r.cells:.2f} | {r.system / r.cells:.2f} |'
    f' {first.cpu / first.cells * r.cells / r.cpu:.2f} |'
    f' {r.wall / r.cells:.2f} |'
    f' {first.wall / first.cells * r.cells / r.wall:.2f} |'
    f' {r.temporaries / 2**20:,.0f} |'
    f' {first.temporaries / r.temporaries:.2f} | {r.loss:.6f} |'
    f' {r.grad_norm:.5f} |'
    for r in results
  )
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


def main() -> None:
  """Times the arms asked for and prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--size', default='small', choices=('tiny', 'small', 'base')
  )
  parser.add_argument('--genes', type=int, default=1200)
  parser.add_argument('--corpus', help='cells of it, in place of --genes')
  parser.add_argument('--cells', type=int, default=2)
  parser.add_argument('--steps', type=int, default=2, help='passes over them')
  parser.add_argument(
    '--first', type=int, default=0, help='skip this many arms'
  )
  args = parser.parse_args()
  if args.corpus:
    batches, size = corpus_cells(args.corpus, args.cells)
  else:
    size = RELEASED_VOCABULARY
    batches = random_cells(args.cells, args.genes, size)
  config = train_config.TrainConfig(
    corpus='',
    model=model.named_config(
      args.size,
      vocabulary_size=size,
      priors=tuple((name, PRIOR_WIDTH) for name, _, _ in convert.PRIORS),
      missing_prior='released',
      hidden_dropout=0.0,
      attention_dropout=0.0,
    ),
    optimizer=optimizer.OptimizerConfig(),
    data=data.DataConfig(),
  )
  params = jax.tree.map(np.asarray, model.init(config.model, 0))
  lengths = [int((b.cells.segments_BL > 0).sum()) - 1 for b in batches]
  slots = sorted({b.cells.segments_BL.shape[1] for b in batches})
  print(
    f'{args.size}: {model.count_parameters(config.model)["total"]:,}'
    f' parameters, {len(batches)} cells of {np.mean(lengths):.0f} genes, rows of'
    f' {", ".join(map(str, slots))} slots, vocabulary {size:,}'
  )
  results = []
  with jax.default_matmul_precision('highest'):
    for arm in list(arms(config, params, batches, args.steps))[args.first :]:
      results.append(arm())
      gc.collect()
      print(f'  {results[-1]}', flush=True)
  print()
  print(table(results))
  print(f'\n{facts()}')
  if args.size == 'base' and not args.corpus:
    ours = results[-1].cpu / results[-1].cells
    for name, cpu in PYTORCH.items():
      if name == 'padded to 2,048' or args.genes == PYTORCH_TRIMMED:
        print(
          f'record of the PyTorch original {name}: {cpu} CPU s, {cpu / ours:.1f}'
          ' times ours (another state of the machine)'
        )
  for r in results[1:]:
    difference = abs(r.loss / results[0].loss - 1)
    if difference > 1e-5:
      raise SystemExit(
        f'{r.name}: loss {r.loss} differs from {results[0].loss} by'
        f' {difference:.1e}'
      )
  print('losses agree within 1e-5')


if __name__ == '__main__':
  main()
