"""`genecompass gene-embeddings`: its flags, and what it says."""

import argparse
from collections.abc import Callable

from genecompass_jax import errors
from genecompass_jax.analysis import embed_command
from genecompass_jax.prepare import flags, readers


def add_arguments(
  parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], None]:
  """Adds the flags; returns what runs the command."""
  parser.epilog = (
    'OUT.zarr is an AnnData whose rows are the genes of each group: X means, '
    "layers['variance'], obs group, gene_id, symbol, token, n_cells. Averages "
    'are by gene, not by position. docs/embedding.md says more.'
  )
  embed_command.add_cells(parser)
  parser.add_argument(
    '-o',
    '--output',
    required=True,
    metavar='OUT.zarr',
    help='folder to write',
  )
  parser.add_argument(
    '--by',
    default='',
    metavar='COLUMN',
    help='obs column of the groups; without it all cells are one',
  )
  parser.add_argument(
    '--genes',
    default='',
    metavar='GENE,...',
    help='genes that are averaged, by any identifier; without it all',
  )
  parser.add_argument(
    '--memory-gib',
    '--memory_gib',
    type=float,
    default=2.0,
    metavar='GIB',
    help='for the averages; groups that do not fit together are made in turn',
  )
  embed_command.add_model_flags(parser)
  flags.add_cell_flags(parser)
  readers.add_arguments(parser)
  return _run


def _run(args: argparse.Namespace) -> None:
  from genecompass_jax import pretrained
  from genecompass_jax.analysis import gene_embeddings
  from genecompass_jax.training import compiles

  genes = [g.strip() for g in args.genes.split(',') if g.strip()]
  if args.genes and not genes:
    raise errors.UserError(f'--genes {args.genes!r} names no gene')
  if not args.output.rstrip('/').endswith('.zarr'):
    # Under another ending nothing else would read the folder.
    raise errors.UserError(
      f'-o {args.output}: give a name ending in .zarr, the AnnData is a zarr '
      'folder'
    )
  compiles.keep_programs(small_too=True)
  found = gene_embeddings.gene_embeddings(
    args.cells,
    pretrained.load(args.checkpoint),
    args.by,
    path=args.output,
    genes=genes,
    block=args.block,
    dtype=args.dtype,
    species=args.species,
    ids_of=args.ids_of,
    layer=args.layer,
    batch_size=args.batch_size,
    allow_noninteger=args.allow_noninteger,
    reading=embed_command.reading(args),
    memory_gib=args.memory_gib,
  )
  rows, width = found.mean_ND.shape
  print(
    f'{args.output}: {rows:,} rows x {width}, {len(found.genes):,} genes in '
    f'{len(found.groups)} groups (counts from {found.uns["layer"]})'
  )
