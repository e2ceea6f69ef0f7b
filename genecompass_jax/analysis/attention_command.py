"""`genecompass attention`: its flags, and what it says."""

import argparse
import os
from collections.abc import Callable

from genecompass_jax import errors
from genecompass_jax.analysis import embed_command, group_flags
from genecompass_jax.prepare import flags, readers

_ENDING = '.parquet'
KEY = 'genecompass_attention'


def add_arguments(
  parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], None]:
  """Adds the flags; returns what runs the command."""
  parser.epilog = (
    'Example, whom two genes attend to and who attends to them, by cell type: '
    f'{parser.prog} cells.h5ad --checkpoint RUN --genes STAT1,IRF9 --group-by '
    'cell_type --donor-key donor -o found.parquet. Every number is an '
    'association learned from expression, not a causal estimate, and no '
    'measure of regulation. docs/embedding.md says more.'
  )
  embed_command.add_cells(parser)
  parser.add_argument(
    '-o',
    '--output',
    required=True,
    metavar='NAME.parquet',
    help='table of partners to write; NAME.tsv, a table of units, and figures '
    'beside it',
  )
  embed_command.add_checkpoint(parser)
  parser.add_argument(
    '--genes',
    default='',
    metavar='A,B',
    help='genes that are asked about, by any identifier; without it the CLS '
    'slot alone, which is asked besides',
  )
  parser.add_argument(
    '--layers',
    default='-1',
    metavar='N,M',
    help='blocks of the model: 1 the first, -1 the last (--layer is a matrix of '
    'counts)',
  )
  parser.add_argument(
    '--heads',
    default='mean',
    metavar='mean|all|N,M',
    help='their mean, all, or some by their numbers from 0',
  )
  parser.add_argument(
    '--top',
    type=int,
    default=20,
    metavar='K',
    help='partners of a gene, direction and group; those of one group are told '
    'of all',
  )
  group_flags.add_arguments(parser, max_cells=0, min_cells=10)
  work = parser.add_argument_group('work')
  work.add_argument(
    '--dtype',
    default='',
    choices=('float32', 'bfloat16'),
    help='to compute states in; without it as the model was trained',
  )
  work.add_argument(
    '--batch-size',
    '--batch_size',
    type=int,
    default=32,
    help='cells that run together; changes the speed, not the result',
  )
  work.add_argument(
    '--memory-gib',
    '--memory_gib',
    type=float,
    default=2.0,
    metavar='GIB',
    help='for the sums',
  )
  work.add_argument(
    '--overwrite', action='store_true', help='replace NAME.parquet'
  )
  flags.add_cell_flags(parser)
  readers.add_arguments(parser)
  return _run


def _run(args: argparse.Namespace) -> None:
  # Imported late: help is to answer at once.
  from genecompass_jax import pretrained
  from genecompass_jax.analysis import attention_partners
  from genecompass_jax.prepare import h5ad_copy
  from genecompass_jax.training import compiles

  stem, ending = os.path.splitext(args.output)
  if ending != _ENDING:
    raise errors.UserError(f'-o {args.output}: give a name ending in {_ENDING}')
  h5ad_copy.check_output(args.output, args.overwrite)
  genes = group_flags.listed(args.genes)
  if args.genes and not genes:
    raise errors.UserError(f'--genes {args.genes!r} names no gene')
  layers = _numbers('--layers', args.layers)
  heads = args.heads
  if heads not in ('mean', 'all'):
    heads = _numbers('--heads', heads)
  compiles.keep_programs(small_too=True)
  found = attention_partners.attention_partners(
    args.cells,
    pretrained.load(args.checkpoint),
    genes,
    layers=layers,
    heads=heads,
    top=args.top,
    dtype=args.dtype,
    batch_size=args.batch_size,
    memory_gib=args.memory_gib,
    reading=embed_command.reading(args),
    **group_flags.fields(args),
  )
  _write(found, stem)
  _print(found)
  print(f'{args.output}: {len(found.table):,} lines; {stem}.tsv for people')
  _draw(found, stem)


def _write(found, stem: str) -> None:
  """All files, the table last."""
  from genecompass_jax import paths
  from genecompass_jax.analysis import tables

  units = tables.parquet(found.units, found.header, KEY)
  paths.write_bytes(f'{stem}.units{_ENDING}', units)
  paths.write_text(f'{stem}.tsv', tables.text(found.table, found.header))
  table = tables.parquet(found.table, found.header, KEY)
  paths.write_bytes(f'{stem}{_ENDING}', table)


def _print(found) -> None:
  """The first partners of every gene, direction and group."""
  for (layer, head, gene), own in found.table.groupby(
    ['layer', 'head', 'gene'], sort=False
  ):
    head = 'mean of the heads' if head == 'mean' else f'head {head}'
    print(f'{gene}, block {layer}, {head}; times even attention')
    for (direction, group), lines in own.groupby(
      ['direction', 'group'], sort=False
    ):
      first = [
        f'{partner} {times:.3g}'
        for partner, times in lines.head(5)[
          ['partner', 'times_even']
        ].itertuples(index=False)
      ]
      print(f'  {direction:<8}  {group}: {", ".join(first)}')
    print()


def _draw(found, stem: str) -> None:
  """A figure of every gene, of the last layer and first head."""
  from genecompass_jax.analysis import attention_figures

  for gene in dict.fromkeys(found.table['gene']):
    try:
      figure = attention_figures.partners_plot(found, gene)
    except errors.UserError as error:
      print(f'no figure of {gene}: {error}')
      continue
    name = f'{stem}.{gene.replace(os.sep, "_")}.png'
    figure.savefig(name, dpi=150)
    print(name)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
  try:
    found = tuple(int(word) for word in group_flags.listed(text))
  except ValueError:
    found = ()
  if not found:
    raise errors.UserError(f'{flag} {text}: give numbers, such as 1,2')
  return found
