"""Are embeddings of real cells the same however they are computed?

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
    python -m experiments.benchmarks.embed_equality --data FOLDER \\
    [--checkpoint DIR | --size small [--prior-width 768]] \\
    [--sets NAME,NAME] [--whole 3000] [--cells 300] [--batch-size 16] \\
    [--ways order,genes,chunk,batch,2,8]

FOLDER holds <name>/<name>.h5ad (docs/real_data.md). Sets of at most --whole
cells are taken whole, of larger ones --cells evenly spaced cells; those that
cannot be read are named with the reason. The model is --checkpoint, or one of
random weights of a named size over the genes of the sets, with four prior tables
of random numbers and with matrices as large as those of the released width (so
that a block changes its states as much as there).

Both poolings are taken from one run of the model; that they are what `gc.embed`
gives is printed first. Embeddings on one device are compared with those of
another order of cells, another order of genes, chunks of 5 cells, batches of 3,
and 2 and 8 devices: the largest difference of any number, for each way, and over
all ways between vectors scaled to unit length. In bfloat16: the cosine with
float32, the lowest with the number of genes of that cell, the first percentile
over cells, and the cells below 0.9999. Cells of no known gene have no mean and are
left out of it. `--ways ''` compares bfloat16 alone.
"""

import argparse
import contextlib
import functools
import glob
import os
import platform
import sys
import warnings

import anndata
import jax
import jax.numpy as jnp
import numpy as np

import genecompass_jax as gc
from genecompass_jax import (
  assets as assets_lib,
  encoding,
  errors,
  knowledge,
  medians,
  model as model_lib,
  progress,
  vocabulary,
)
from genecompass_jax.analysis import (
  embeddings,
  model_batches,
  model_cells,
  placed_model,
  reference_sample,
)
from genecompass_jax.prepare import sources

RELEASED_WIDTH = 768
PRIORS = ('grn', 'promoter', 'family', 'coexpression')
# What has to be said of some sets: species of a column, identifiers of another.
READING = {
  'baron_pancreas_human_mouse': {'species': 'obs:species', 'ids_of': 'human'},
  # No counts: normalised, and the last two of logarithms. Their embeddings mean
  # nothing; that they are equal can be tried all the same.
  'day2_590x16990': {'allow_noninteger': True},
  'day5_500x5000': {'allow_noninteger': True},
  'fate_mouse_dc_ginhoux': {'allow_noninteger': True},
  'mDC_TFs500_expression': {'allow_noninteger': True, 'species': 'mouse'},
}
WAYS = ('order', 'genes', 'chunk', 'batch', '2', '8')  # numbers of devices
ONE, ROUNDED = '1', 'bfloat16'
ASKED = 0.9999


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', required=True)
  parser.add_argument('--checkpoint', default='')
  parser.add_argument('--size', default='small', choices=[*model_lib.SIZES])
  parser.add_argument('--prior-width', type=int, default=RELEASED_WIDTH)
  parser.add_argument('--sets', default='', help='by default all')
  parser.add_argument('--whole', type=int, default=3000)
  parser.add_argument('--cells', type=int, default=300)
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--ways', default=','.join(WAYS))
  args = parser.parse_args()
  ways = [way for way in args.ways.split(',') if way]
  if not set(ways) <= set(WAYS):
    parser.error(f'--ways are of {", ".join(WAYS)}')
  warnings.filterwarnings('ignore')
  progress.is_shown = False
  sets = dict(read_sets(args.data, args.sets, args.whole, args.cells))
  if args.checkpoint:
    model = gc.load(args.checkpoint)
  else:
    gene_ids = set().union(*(source.gene_ids() for _, source in sets.values()))
    model = random_model(
      gene_ids, args.prior_width, **model_lib.SIZES[args.size]
    )
  print(
    f'{platform.processor() or platform.machine()}, {jax.device_count()} '
    f'devices, jax {jax.__version__}, {os.environ.get("XLA_FLAGS", "")}\n{model}'
  )
  placed = {ROUNDED: place(model, 1, dtype='bfloat16')}
  for number in (ONE, '2', '8'):
    if number == ONE or number in ways:
      placed[number] = place(model, int(number))
  print_check(sets, model, placed[ONE], args.batch_size)
  header = ['set', 'cells', 'longest', 'pooling', 'largest']
  header += [f'{way} devices' if way.isdigit() else way for way in ways]
  header += ['unit length', 'bf16, lowest', 'its genes', 'bf16, 1 %', 'below']
  print('| ' + ' | '.join(header) + ' |\n' + '|---' * len(header) + '|')
  for name, (adata, _) in sets.items():
    compare(name, adata, model, placed, ways, args.batch_size)


def read_sets(folder, names, whole, num_cells):
  """Yields (name, (cells, source)); small files first: their cells are short."""
  paths = glob.glob(os.path.join(folder, '*', '*.h5ad'))
  for path in sorted(paths, key=os.path.getsize):
    name = os.path.basename(path).removesuffix('.h5ad')
    if names and name not in names.split(','):
      continue
    adata = anndata.read_h5ad(path)
    if adata.n_obs > whole:
      spaced = np.linspace(0, adata.n_obs - 1, min(num_cells, adata.n_obs))
      adata = adata[np.unique(spaced.astype(int))].copy()
    config = sources.SourceConfig(**READING.get(name, {}))
    try:
      yield name, (adata, sources.from_anndata(adata, config))
    except errors.UserError as error:
      print(f'{name}: refused: {error}')


def print_check(sets, model, placed, batch_size) -> None:
  """Prints how far `gc.embed` is from what is compared here."""
  name, (adata, _) = next(iter(sets.items()))
  few, reading = adata[:batch_size].copy(), READING.get(name, {})
  found_PCD, _ = states(few, model, placed, batch_size, reading)
  options = {'dtype': 'float32', 'batch_size': batch_size, **reading}
  with local_devices(1):
    apart = [
      np.abs(gc.embed(few, model, pooling=pooling, **options) - x_CD).max()
      for pooling, x_CD in zip(poolings_of(model), found_PCD)
    ]
  print(f'gc.embed of {len(few)} cells of {name}: within {max(apart):.1e}\n')


def compare(name, adata, model, placed, ways, batch_size) -> None:
  """Prints the lines of a set."""
  reading = READING.get(name, {})
  num_cells = adata.n_obs
  order_C = np.random.default_rng(1).permutation(num_cells)

  def run(way=ONE):
    cells, rows = adata, 3 if way == 'batch' else batch_size
    if way == 'order':
      cells = adata[order_C].copy()
    elif way == 'genes':
      cells = with_columns(adata, model, reading)
    with chunks_of(5) if way == 'chunk' else contextlib.nullcontext():
      return states(cells, model, placed.get(way, placed[ONE]), rows, reading)

  expected_PCD, genes_C = run()
  found = {way: run(way)[0] for way in ways}
  if 'order' in found:
    found['order'] = found['order'][:, np.argsort(order_C)]
  rounded_PCD = run(ROUNDED)[0]
  for p, pooling in enumerate(poolings_of(model)):
    expected_CD = expected_PCD[p]
    unit_CD = reference_sample.unit(expected_CD)
    apart = [np.abs(found[way][p] - expected_CD).max() for way in ways]
    unit_apart = [
      np.abs(reference_sample.unit(found[way][p]) - unit_CD).max()
      for way in ways
    ]
    is_there_C = np.abs(expected_CD).max(1) > 0
    rounded_CD = reference_sample.unit(rounded_PCD[p]).astype(np.float64)
    cosine_C = (unit_CD.astype(np.float64) * rounded_CD).sum(1)[is_there_C]
    worst = cosine_C.argmin()
    print(
      f'| {name} | {num_cells} | {genes_C.max()} | {pooling} | '
      f'{np.abs(expected_CD).max():.1f} | '
      + ''.join(f'{x:.1e} | ' for x in apart)
      + f'{max(unit_apart, default=0):.1e} | {cosine_C[worst]:.6f} | '
      f'{genes_C[is_there_C][worst]} | {np.percentile(cosine_C, 1):.6f} | '
      f'{(cosine_C < ASKED).sum()} |'
    )
  sys.stdout.flush()


def place(model, num_devices: int, dtype: str = 'float32'):
  """The model on some of the local devices."""
  with local_devices(num_devices):
    return placed_model.place(model, dtype=dtype)


def states(adata, model, placed, batch_size, reading):
  """Embeddings of every pooling, [P, C, D], and the genes of each cell, [C]."""
  stream = model_cells.open_cells(adata, model, **reading)
  chunks = list(model_cells.encode(stream, model))
  genes_C = np.zeros(adata.n_obs, int)
  for chunk in chunks:
    genes_C[chunk.index_C] = np.diff(chunk.cells.starts_C1)
  return states_of_chunks(chunks, adata.n_obs, placed, batch_size), genes_C


def states_of_chunks(chunks, num_cells, placed, batch_size):
  """Embeddings of every pooling, float32 [P, C, D]."""
  poolings = poolings_of(placed)
  found_PCD = np.zeros(
    (len(poolings), num_cells, placed.config.width), np.float32
  )
  num_rows = placed.num_rows(batch_size)
  for batch in model_batches.of_chunks(chunks, placed.buckets, num_rows):
    pooled_PBD = _pooled(
      placed.params,
      placed.put(batch.cells),
      placed.knowledge,
      placed.config,
      poolings,
    )
    found_PCD[:, batch.index_C] = pooled_PBD[:, : len(batch.index_C)]
  return found_PCD


@functools.partial(jax.jit, static_argnums=(3, 4))
def _pooled(params, batch, tables, config, poolings):
  hidden_BLD = model_lib.evaluate(config, params, batch, tables)
  return jnp.stack([embeddings.pool(hidden_BLD, batch, p) for p in poolings])


def poolings_of(model) -> tuple[str, ...]:
  return embeddings.POOLINGS if model.config.use_cls else ('mean',)


def with_columns(adata, model, reading):
  """The same counts with their columns in another order."""
  layer = model_cells.open_cells(adata, model, **reading).source.layer
  matrix, var = adata.X, adata.var
  if layer == 'raw':
    matrix, var = adata.raw.X, adata.raw.var
  elif layer != 'X':
    matrix = adata.layers[layer.removeprefix('layers/')]
  order = np.random.default_rng(2).permutation(len(var))
  return anndata.AnnData(matrix[:, order], adata.obs, var.iloc[order])


@contextlib.contextmanager
def local_devices(number: int):
  """Only so many devices, for what asks for the local ones."""
  local, devices = jax.local_devices, jax.devices()[:number]
  jax.local_devices = lambda: devices
  try:
    yield
  finally:
    jax.local_devices = local


@contextlib.contextmanager
def chunks_of(cells: int):
  """Cells are read so many at a time."""
  chunks = sources.CellStream.chunks
  sources.CellStream.chunks = lambda self: chunks(self, cells=cells)
  try:
    yield
  finally:
    sources.CellStream.chunks = chunks


def random_model(
  gene_ids: set[str], prior_width: int = 0, *, width: int, **sizes: int
) -> gc.PretrainedModel:
  """A model of random weights.

  Args:
    gene_ids: its genes, so far as the default vocabulary knows them.
    prior_width: columns of each of four tables of random numbers, which miss a
      gene in ten; 0: no priors.
    width: of the model.
    **sizes: num_layers, num_heads and feed_forward.
  """
  vocab = vocabulary.Vocabulary.default()
  vocab = vocab.restrict(sorted(gene_ids & set(vocab.genes.gene_ids)))
  rng = np.random.default_rng(0)
  tables = knowledge.empty(len(vocab.species), vocab.size)
  if prior_width:
    known = vocab.genes.gene_ids

    def table():
      kept = np.flatnonzero(rng.random(len(known)) < 0.9)
      vectors = rng.standard_normal((len(kept), prior_width), np.float32)
      return [known[i] for i in kept], vectors

    tables = knowledge.align(vocab, {name: table() for name in PRIORS})
  config = model_lib.ModelConfig(
    vocabulary_size=vocab.size, width=width, priors=tables.widths, **sizes
  )
  scale = (RELEASED_WIDTH / width) ** 0.5

  def scaled(path, x):
    names = [str(getattr(key, 'key', key)) for key in path]
    is_matrix = names[-1] == 'kernel' or names[-1].startswith('fuse_')
    return x * scale if is_matrix else x

  params = jax.tree_util.tree_map_with_path(
    scaled, model_lib.init(config, seed=0)
  )
  encode = encoding.EncodingConfig(max_genes=config.max_genes)
  assets = assets_lib.Assets(
    tables, vocab, medians.Medians.ones(vocab, encode.mode), encode
  )
  return gc.PretrainedModel(config, params, assets, source='random')


if __name__ == '__main__':
  main()
