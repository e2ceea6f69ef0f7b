"""In-silico perturbation: speed, what bfloat16 keeps, what the estimate finds.

  python experiments/benchmarks/perturbation.py recall --checkpoint DIR \\
    --cells CELLS.h5ad [--number 10]
  python experiments/benchmarks/perturbation.py speed --cells CELLS.h5ad \\
    [--size small] [--variants 16]

`recall` deletes every gene of some cells with a trained model, and says how much
of the highest effects the first-order estimate finds, beside ranking by expression,
by rank, by detection and at random: of shifts as they are, and of their z among
matched nulls, which is what `--top` goes by; and how bfloat16 agrees with float32.

`speed` takes random weights, for they cost the same, and one cell of median
length. Its first arm is the loop of the original: rows padded to the longest
cell, priors projected for every gene of every row, one variant at a time, cosines
on the host. Every further arm adds one thing. CPU-seconds are of all threads.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
import time

import jax
import numpy as np
import scipy.stats

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import genecompass_jax as gc  # noqa: E402
from genecompass_jax import (  # noqa: E402
  assets as assets_lib,
  encoding,
  knowledge,
  medians,
  model as model_lib,
  pretrained,
  rows,
  vocabulary,
)
from genecompass_jax.analysis import model_cells, placed_model  # noqa: E402
from genecompass_jax.analysis.perturbation import (  # noqa: E402
  cell_set,
  first_order,
  interventions,
  matching,
  runs,
  screen,
  statistics,
)

SHARES = (0.01, 0.05, 0.1)
FEWEST = 3  # cells that show a gene


def deletions(tokens) -> list[interventions.Intervention]:
  """The deletion of each token."""
  return [
    interventions.Intervention('delete', (int(t),), (str(t),)) for t in tokens
  ]


def mean_by_token(token_N, value_N, size: int) -> np.ndarray:
  """Mean of values by token; -inf where few cells show it."""
  number_V = np.bincount(token_N, minlength=size)
  sum_V = np.bincount(token_N, value_N, size)
  return np.where(number_V >= FEWEST, sum_V / np.maximum(number_V, 1), -np.inf)


def recall(args: argparse.Namespace) -> None:
  """Prints what the estimate and bfloat16 keep of the exact effects."""
  model = gc.load(args.checkpoint)
  stream = model_cells.open_cells(args.cells, model)
  rng = np.random.default_rng(args.seed)
  chosen = rng.choice(stream.source.num_cells, args.number, replace=False)
  cells = cell_set.read(stream, model, chosen)
  placed = placed_model.place(model)
  size = len(cells.divisor_V)
  print(f'{model!r}\n{args.number} cells of {stream.source.name}\n')
  columns = ['estimate', 'expression', 'rank', 'detection', 'random']
  print(f'| pooling | of | share | K | {" | ".join(columns)} |')
  print('|---|---|---|---|' + '---|' * len(columns))
  lines = []
  encoded = cells.encode()
  value_V = mean_by_token(encoded.gene_ids_N, encoded.values_N, size)
  profiles = matching.of_cells(encoded)
  enough = profiles.key_G[profiles.cells_G >= FEWEST]
  matches = matching.match(profiles, enough, enough)
  # The cells are one unit: z, and no p.
  unit_of = np.zeros(stream.source.num_cells, np.int64)

  def z_by_token(effects) -> np.ndarray:
    found_V = np.full(size, -np.inf)
    z_T = statistics.test(effects, matches, unit_of, ['cells']).z_T
    found_V[enough] = np.where(np.isfinite(z_T), z_T, -np.inf)
    return found_V

  for pooling in screen.POOLINGS:
    start = time.process_time()
    estimate = first_order.score(placed, cells, pooling=pooling)
    between = time.process_time()
    tokens = np.unique(estimate.token_N)
    config = screen.ScreenConfig(pooling=pooling)
    exact = runs.run(screen.Screen(placed, cells, deletions(tokens), config))
    stop = time.process_time()
    token_N = tokens[exact.variant_N]
    by_token = dataclasses.replace(exact, variant_N=token_N.astype(np.int32))
    guess = first_order.as_effects(estimate, cells)
    pairs = {
      'shift': (
        mean_by_token(token_N, exact.shift_N, size),
        mean_by_token(estimate.token_N, estimate.shift_N, size),
      ),
      'z': (z_by_token(by_token), z_by_token(guess)),
    }
    for of, (exact_V, estimate_V) in pairs.items():
      number = int(np.isfinite(exact_V).sum())
      others = {
        'expression': value_V,
        'rank': mean_by_token(
          estimate.token_N, -estimate.rank_N.astype(float), size
        ),
        'detection': np.bincount(estimate.token_N, minlength=size),
        'random': rng.random(size),
      }
      ways = [estimate_V] + [
        np.where(np.isfinite(exact_V), way, -np.inf) for way in others.values()
      ]
      for share in SHARES:
        K = max(1, round(share * number))
        top = {*np.argsort(-exact_V)[:K].tolist()}
        found = [
          len(top & {*np.argsort(-way)[:K].tolist()}) / K for way in ways
        ]
        shown = ' | '.join(f'{x:.2f}' for x in found)
        print(f'| {pooling} | {of} | {share:.0%} | {K} | {shown} |', flush=True)
    lines.append(
      f'{pooling}: {len(exact.cell_N):,} deletions; estimate '
      f'{between - start:.1f} CPU-s, exact {stop - between:.1f} CPU-s '
      '(both with compiling)'
    )
    half = placed_model.place(model, dtype='bfloat16')
    rough = runs.run(screen.Screen(half, cells, deletions(tokens), config))
    for name, least in (('all', 0.0), ('highest 5 %', 0.95)):
      kept = exact.shift_N >= np.quantile(exact.shift_N, least)
      agreement = scipy.stats.spearmanr(
        exact.shift_N[kept], rough.shift_N[kept]
      )[0]
      lines.append(f'{pooling}: bfloat16, Spearman, {name}: {agreement:.4f}')
  print('\n' + '\n'.join(lines))
  print(machine())


def random_model(size: str) -> pretrained.PretrainedModel:
  """Random weights and priors over the default vocabulary."""
  vocab = vocabulary.Vocabulary.default()
  rng = np.random.default_rng(0)
  ids = list(vocab.genes.gene_ids)
  names = ('promoter', 'coexpression', 'gene_family', 'grn')
  width = model_lib.SIZES[size]['width']
  tables = {
    name: (ids, rng.standard_normal((len(ids), width), np.float32))
    for name in names
  }
  config = dataclasses.replace(
    model_lib.named_config(size, vocabulary_size=vocab.size),
    priors=tuple((name, width) for name in names),
  )
  return pretrained.PretrainedModel(
    config,
    model_lib.init(config, 0),
    assets_lib.Assets(
      vocabulary=vocab,
      medians=medians.Medians.ones(vocab, encoding.RELEASED),
      encoding=encoding.EncodingConfig(),
      knowledge=knowledge.align(vocab, tables),
    ),
  )


def speed(args: argparse.Namespace) -> None:
  """Prints CPU-seconds a variant, from the original's loop to the screen."""
  model = random_model(args.size)
  stream = model_cells.open_cells(args.cells, model)
  everything = cell_set.read(stream, model)
  lengths_C = np.diff(everything.encode().starts_C1)
  middle = int(np.argsort(lengths_C)[len(lengths_C) // 2])
  cells = everything.take(np.array([middle]))
  base = cells.encode()
  length = len(base.gene_ids_N)
  longest = model.assets.encoding.max_genes + 1
  fitting = -(-(length + 1) // 64) * 64
  placed = placed_model.place(model)
  tokens = np.sort(base.gene_ids_N)[:: max(1, length // args.variants)]
  tokens = tokens[: args.variants]

  def one_by_one(config, knowledge_given, slots):
    @jax.jit
    def states(params, batch, tables):
      return model_lib.bind(config, params)(batch, tables)

    def loop():
      shifts = []
      batch = rows.cell_batch_rows(base, np.array([cells.species]), slots)
      before_LD = np.asarray(states(model.params, batch, knowledge_given))[0]
      for token in tokens:
        kept = np.flatnonzero(base.gene_ids_N != token)
        variant = dataclasses.replace(
          base,
          gene_ids_N=base.gene_ids_N[kept],
          values_N=base.values_N[kept],
          starts_C1=np.array([0, len(kept)]),
        )
        batch = rows.cell_batch_rows(variant, np.array([cells.species]), slots)
        after_LD = np.asarray(states(model.params, batch, knowledge_given))[0]
        a, b = after_LD[1 : len(kept) + 1], before_LD[1 + kept]
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1)
        shifts.append(1 - (cosine / np.linalg.norm(b, axis=1)).mean())
      return np.array(shifts)

    return loop

  plain = dataclasses.replace(model.config, attention='xla')
  tables = jax.device_put(model.assets.knowledge)

  def screened():
    config = screen.ScreenConfig(batch_slots=args.batch_slots)
    work = screen.Screen(placed, cells, deletions(tokens), config)
    return runs.run(work).gene_shift_N

  arms = [
    ("the original's loop", one_by_one(plain, tables, longest)),
    ('+ row of its length', one_by_one(plain, tables, fitting)),
    ('+ folded priors', one_by_one(plain, placed.knowledge, fitting)),
    (
      '+ attention in chunks',
      one_by_one(model.config, placed.knowledge, fitting),
    ),
    ('+ batches on the device (the screen)', screened),
  ]
  print(
    f'{args.size}, random weights, four priors; one cell of {length:,} genes, '
    f'{len(tokens)} deletions, rows of {fitting} slots\n'
  )
  print('| arm | CPU-s a variant | s | times as fast |')
  print('|---|---|---|---|')
  first, expected = None, None
  for name, run in arms:
    found = run()  # compiles
    start, cpu = time.perf_counter(), time.process_time()
    found = run()
    wall = (time.perf_counter() - start) / len(tokens)
    cpu = (time.process_time() - cpu) / len(tokens)
    first = first or cpu
    expected = found if expected is None else expected
    if not np.allclose(found, expected, atol=1e-5):
      raise SystemExit(f'{name}: effects differ from those of the first arm')
    print(
      f'| {name} | {cpu:.3f} | {wall:.3f} | {first / cpu:.2f} |', flush=True
    )
  print(machine())


def machine() -> str:
  """What the figures were made on."""
  load = os.getloadavg()[0]
  return (
    f'{os.cpu_count()} cores, load {load:.1f}; Python '
    f'{platform.python_version()}, jax {jax.__version__}, '
    f'{jax.devices()[0].device_kind}'
  )


def main() -> None:
  """Runs one of the two."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('what', choices=('recall', 'speed'))
  parser.add_argument('--cells', required=True)
  parser.add_argument('--checkpoint', default='')
  parser.add_argument('--number', type=int, default=10, help='cells')
  parser.add_argument('--size', default='small')
  parser.add_argument('--variants', type=int, default=16)
  parser.add_argument(
    '--batch_slots', type=int, default=0, help='of the screen'
  )
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  {'recall': recall, 'speed': speed}[args.what](args)


if __name__ == '__main__':
  main()
