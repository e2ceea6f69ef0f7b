"""Are embeddings of real cells the same however they are computed?

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
    python experiments/benchmarks/embed_equality.py --data FOLDER \\
    [--genes 25000] [--width 64] [--layers 4] [--checkpoint DIR] \\
    [--poolings cls,mean]

FOLDER holds <name>/<name>.h5ad (docs/real_data.md). Of every h5ad in it so many
random cells are taken that they express --genes genes together (at most 2,048
count of a cell); sets that cannot be read are named with the reason. Without --checkpoint each set
gets a model of random weights over its own genes, with matrices as large as those
of the released width (so that a block changes its states as much as there).
Embeddings of both poolings, in one order, batches of 8 on one device,
are compared with those of another order of cells, another order of genes,
chunks of 5 cells, batches of 3, and 2 and 8 devices: the largest difference
of any number, and in bfloat16 the lowest cosine with float32.
"""

import argparse
import glob
import os
import platform
import sys
import warnings

import anndata
import jax
import numpy as np
import scipy.sparse

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
from genecompass_jax.prepare import sources

RELEASED_WIDTH = 768
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
BF16 = 'bf16 cosine'


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', required=True)
  parser.add_argument('--genes', type=int, default=25_000)
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--checkpoint', default='')
  parser.add_argument('--poolings', default='cls,mean')
  args = parser.parse_args()
  warnings.filterwarnings('ignore')
  progress.is_shown = False
  print(
    f'{platform.processor() or platform.machine()}, {jax.device_count()} '
    f'devices, jax {jax.__version__}, {args.checkpoint or "random weights"}, '
    f'{args.layers} layers of {args.width}\n'
  )
  names = [BF16]
  print('| set | cells | longest | pooling | largest | ' + ' | '.join(
    (*_variants(None), *names)) + ' |')  # fmt: skip
  print('|' + '---|' * (5 + len(_variants(None)) + len(names)))
  # Small files first: their cells are short.
  for path in sorted(
    glob.glob(os.path.join(args.data, '*', '*.h5ad')), key=os.path.getsize
  ):
    name = os.path.basename(path).removesuffix('.h5ad')
    adata = anndata.read_h5ad(path)
    adata = some_cells(adata, args.genes)
    reading = READING.get(name, {})
    try:
      source = sources.from_anndata(adata, sources.SourceConfig(**reading))
    except errors.UserError as error:
      print(f'| {name} | refused: {error} |')
      continue
    if args.checkpoint:
      model = gc.load(args.checkpoint)
    else:
      model = random_model(source, args.width, args.layers)
    for pooling in args.poolings.split(','):
      compare(name, adata, model, pooling, reading)


def some_cells(adata, num_genes):
  """Random cells, in order, of so many expressed genes together."""
  matrix = scipy.sparse.csr_matrix(adata.X)
  order = np.random.default_rng(0).permutation(adata.n_obs)
  genes = np.minimum(np.diff(matrix.indptr)[order], 2048).cumsum()
  number = max(int(np.searchsorted(genes, num_genes)), 10)
  return adata[np.sort(order[:number])].copy()


def compare(name, adata, model, pooling, reading) -> None:
  """Prints one line of the table."""
  devices = jax.devices()

  def run(cells, *, on=1, **options):
    jax.local_devices = lambda: devices[:on]
    options = {'batch_size': 8, 'pooling': pooling, **reading, **options}
    return gc.embed_cells(cells, model, **options)

  first = run(adata, dtype='float32')
  expected = first.embeddings_CD
  found = {}
  for label, variant in _variants(adata.n_obs).items():
    found[label] = np.abs(variant(run, adata) - expected).max()
  rounded = run(adata, dtype='bfloat16').embeddings_CD
  norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(rounded, axis=1)
  cosine = ((expected * rounded).sum(1) / np.maximum(norms, 1e-30)).min()
  longest = first.obs['gc_n_genes_used'].max()
  print(
    f'| {name} | {adata.n_obs} | {longest} | {pooling} | '
    f'{np.abs(expected).max():.1f} | '
    + ' | '.join(f'{value:.1e}' for value in found.values())
    + f' | {cosine:.6f} |'
  )
  sys.stdout.flush()


def _variants(num_cells):
  """Ways to compute the same, by name: (run, cells) -> embeddings."""

  def reordered(run, adata):
    order = np.random.default_rng(1).permutation(num_cells)
    found = run(adata[order].copy(), dtype='float32').embeddings_CD
    result = np.empty_like(found)
    result[order] = found
    return result

  def other_genes(run, adata):
    order = np.random.default_rng(2).permutation(adata.n_vars)
    other = anndata.AnnData(adata.X[:, order], adata.obs, adata.var.iloc[order])
    if adata.raw is not None or adata.layers:
      chosen = run(adata[:1].copy()).uns['layer']
      matrix = {'X': adata.X}.get(chosen)
      if matrix is None:
        matrix = (
          adata.raw.X
          if chosen == 'raw'
          else adata.layers[chosen.removeprefix('layers/')]
        )
      var = adata.raw.var if chosen == 'raw' else adata.var
      order = np.random.default_rng(2).permutation(len(var))
      other = anndata.AnnData(matrix[:, order], adata.obs, var.iloc[order])
    return run(other, dtype='float32').embeddings_CD

  def chunked(run, adata):
    chunks = sources.CellStream.chunks
    sources.CellStream.chunks = lambda self: chunks(self, cells=5)
    try:
      return run(adata, dtype='float32').embeddings_CD
    finally:
      sources.CellStream.chunks = chunks

  def with_options(**options):
    return lambda run, adata: (
      run(adata, dtype='float32', **options).embeddings_CD
    )

  return {
    'order': reordered,
    'genes': other_genes,
    'chunk': chunked,
    'batch': with_options(batch_size=3),
    '2 devices': with_options(on=2),
    '8 devices': with_options(on=8),
  }


def random_model(source: sources.Source, width: int, num_layers: int):
  """A model of random weights over the genes of a source."""
  vocab = vocabulary.Vocabulary.default()
  known = sorted(source.gene_ids() & set(vocab.genes.gene_ids))
  vocab = vocab.restrict(known)
  config = model_lib.ModelConfig(
    vocabulary_size=vocab.size,
    width=width,
    num_layers=num_layers,
    num_heads=max(width // 16, 1),
    feed_forward=4 * width,
    priors=(),
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
    knowledge.empty(len(vocab.species), vocab.size),
    vocab,
    medians.Medians.ones(vocab, encode.mode),
    encode,
  )
  return gc.PretrainedModel(config, params, assets, source='random')


if __name__ == '__main__':
  main()
