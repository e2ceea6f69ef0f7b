"""`genecompass embed`: its flags, and what it says."""

import argparse
from collections.abc import Callable

from genecompass_jax import errors
from genecompass_jax.prepare import flags, readers


def add_arguments(
  parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], None]:
  """Adds the flags; returns what runs the command."""
  parser.epilog = (
    'An interrupted command goes on when it is given again: finished cells are '
    'in OUT.h5ad.unfinished until then. docs/embedding.md says more.'
  )
  add_cells(parser)
  parser.add_argument(
    '-o',
    '--output',
    required=True,
    metavar='OUT.h5ad',
    help='file to write: a copy of an h5ad file, or a new one',
  )
  parser.add_argument(
    '--limit',
    type=int,
    default=0,
    metavar='N',
    help='embed the first N cells alone, into a file without counts',
  )
  parser.add_argument(
    '--overwrite',
    action='store_true',
    help='replace OUT.h5ad, and cells that another command left unfinished',
  )
  parser.add_argument(
    '--pooling',
    default='cls',
    choices=('cls', 'mean'),
    help='state of the species slot, as in the paper, or mean over genes, '
    'which small models do better with',
  )
  add_model_flags(parser)
  flags.add_cell_flags(parser)
  readers.add_arguments(parser)
  return _run


def add_cells(parser: argparse.ArgumentParser) -> None:
  """Adds the argument that names the cells."""
  parser.add_argument(
    'cells',
    metavar='CELLS',
    help='h5ad, zarr, 10x, mtx, SOMA or Arrow; the format is found',
  )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
  """Adds the flag that names the model."""
  parser.add_argument(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='workdir, checkpoints/STEP folder or exported model',
  )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
  """Adds flags that say which model runs, and how."""
  add_checkpoint(parser)
  parser.add_argument(
    '--block',
    type=int,
    default=-1,
    metavar='N',
    help='block of the model whose output is taken: 1 the first, -1 the last, '
    '-2 the one before it',
  )
  parser.add_argument(
    '--dtype',
    default='',
    choices=('float32', 'bfloat16'),
    help='to compute in; without it as the model was trained',
  )
  parser.add_argument(
    '--batch-size',
    '--batch_size',
    type=int,
    default=32,
    help='cells that run together; changes the speed, not the result',
  )


def reading(args: argparse.Namespace):
  """The `SourceConfig` of the flags for cells."""
  from genecompass_jax.prepare import sources

  return sources.SourceConfig(
    species=args.species,
    ids_of=args.ids_of,
    layer=args.layer,
    allow_noninteger=args.allow_noninteger,
    **readers.config_fields(args),
  )


def _run(args: argparse.Namespace) -> None:
  # Imported late: help is to answer at once.
  from genecompass_jax import pretrained
  from genecompass_jax.analysis import embedding_files, embeddings
  from genecompass_jax.prepare import h5ad_copy
  from genecompass_jax.training import compiles

  if args.limit < 0:
    raise errors.UserError(f'--limit {args.limit} must be positive')
  if not args.output.endswith('.h5ad'):
    raise errors.UserError(
      f'-o {args.output}: give a name ending in .h5ad, that is what is written'
    )
  h5ad_copy.check_output(args.output, args.overwrite)
  compiles.keep_programs(small_too=True)
  written = embedding_files.embed_file(
    args.cells,
    args.output,
    pretrained.load(args.checkpoint),
    states=embeddings.StateConfig(
      args.pooling, args.block, args.dtype, args.batch_size
    ),
    reading=reading(args),
    limit=args.limit,
    overwrite=args.overwrite,
  )
  print(
    f'{args.output}: obsm[{embeddings.KEY!r}] of {written.num_cells} cells x '
    f'{written.width} ({args.pooling}; counts from {written.uns["layer"]})'
  )
  if not written.has_ood:
    print(f'  {written.uns[embeddings.REFERENCE]}')
