"""`genecompass perturb`: its flags, and what it says."""

import argparse
import os
from collections.abc import Callable

from genecompass_jax import errors
from genecompass_jax.analysis import embed_command, group_flags
from genecompass_jax.prepare import flags, readers

_KINDS = {
  'delete': 'delete',
  'fold': 'fold',
  'over-express': 'over_express',
  'over_express': 'over_express',
}

# Lines of the header that say what a column is.
_RULE = {'score': 'z', 'shift': 'shift', 'toward': 'toward'}


def add_arguments(
  parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], None]:
  """Adds the flags; returns what runs the command."""
  parser.epilog = (
    'Example, what deleting two genes does beyond matched genes, by cell type: '
    f'{parser.prog} cells.h5ad --checkpoint RUN --genes STAT1,IRF9 --group-by '
    'cell_type --donor-key donor -o found.parquet. Every number is an association learned from expression, not a causal '
    'estimate. An interrupted command goes on when it is given again. '
    'docs/perturbation.md says what is done to counts, and what is tested.'
  )
  embed_command.add_cells(parser)
  parser.add_argument(
    '-o',
    '--output',
    required=True,
    metavar='NAME.parquet',
    help='table to write; NAME.tsv, plots and the rest beside it',
  )
  embed_command.add_checkpoint(parser)
  _add_question(parser)
  group_flags.add_arguments(parser, max_cells=500, min_cells=3)
  _add_statistics(parser)
  work = parser.add_argument_group('work')
  work.add_argument(
    '--dtype',
    default='',
    choices=('float32', 'bfloat16'),
    help='to compute in; without it as the model was trained',
  )
  work.add_argument(
    '--shard',
    default='0/1',
    metavar='I/N',
    help='run every N-th part from the I-th on, beside other machines with the '
    'same folder; the command without it then writes the table',
  )
  work.add_argument(
    '--overwrite', action='store_true', help='replace NAME.parquet'
  )
  flags.add_cell_flags(parser)
  readers.add_arguments(parser)
  return _run


def _add_question(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group('what is done, to which cells')
  group.add_argument(
    '--genes',
    default='all',
    metavar='A,B,C+D',
    help='genes by any identifier, or all; C+D are changed at once',
  )
  group.add_argument(
    '--top',
    type=int,
    default=0,
    metavar='K',
    help='run only the K genes that a first-order estimate puts highest',
  )
  group.add_argument(
    '--kind', default='delete', choices=[*_KINDS][:3], help='of intervention'
  )
  group.add_argument(
    '--factor',
    type=float,
    default=0.5,
    help='of a fold: counts are multiplied by it',
  )
  group.add_argument(
    '--level',
    default='median',
    choices=('median', 'max'),
    help='of an over-expression: that of the reference cells that express it',
  )
  group.add_argument(
    '--reference',
    default='',
    metavar='VALUE',
    help='group of the reference cells; the goal, or the perturbed cells',
  )
  group.add_argument(
    '--renormalise',
    action='store_true',
    help='let library sizes follow the changed counts, in a model of library '
    'mode',
  )
  group.add_argument(
    '--start', default='', metavar='VALUE', help='group that is perturbed'
  )
  group.add_argument(
    '--goal',
    default='',
    metavar='VALUE',
    help='group that the start is to come nearer to',
  )
  group.add_argument(
    '--pooling',
    default='mean',
    choices=('cls', 'mean'),
    help='state of the species slot, or mean over the genes that cell and '
    'variant share',
  )
  group.add_argument(
    '--left-out',
    '--left_out',
    default='',
    metavar='A,B',
    help='genes that are in no score and on no axis, such as those that the '
    'groups are told apart by; the model still reads them',
  )
  group.add_argument(
    '--responses',
    action='store_true',
    help='also the effects on every other gene, as NAME.answers.h5ad',
  )


def _add_statistics(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group('statistics')
  group.add_argument(
    '--measure',
    default='',
    choices=('shift', 'gene_shift', 'toward'),
    help='what is tested; toward where there is a goal, else shift',
  )
  group.add_argument(
    '--min-detection',
    '--min_detection',
    type=float,
    default=0.05,
    metavar='SHARE',
    help='of the cells that must show a gene, for it to be among all genes or '
    'null of another',
  )
  group.add_argument(
    '--calipers',
    type=float,
    nargs=3,
    default=(0.5, 0.5, 0.5),
    metavar=('DETECTION', 'RANK', 'LENGTH'),
    help='furthest that a null may be from its target, in standard deviations',
  )
  group.add_argument(
    '--nulls', type=int, default=50, help='most nulls of a target'
  )
  group.add_argument(
    '--fewest-nulls',
    '--fewest_nulls',
    type=int,
    default=10,
    help='with fewer a target gets no z',
  )
  group.add_argument(
    '--never-null',
    '--never_null',
    default='',
    metavar='A,B',
    help='genes that are null of no other, such as those of the pathway',
  )
  group.add_argument(
    '--expected',
    default='',
    metavar='A,B',
    help='symbols to point out in the plots',
  )


def _run(args: argparse.Namespace) -> None:
  # Imported late: help is to answer at once.
  from genecompass_jax import pretrained
  from genecompass_jax.analysis.perturbation import perturb, results
  from genecompass_jax.prepare import h5ad_copy
  from genecompass_jax.training import compiles

  stem, ending = os.path.splitext(args.output)
  if ending != '.parquet':
    raise errors.UserError(f'-o {args.output}: give a name ending in .parquet')
  h5ad_copy.check_output(args.output, args.overwrite)
  shard = _shard(args.shard)
  genes = group_flags.listed(args.genes)
  if not genes:  # such as a variable of the shell that is not set
    raise errors.UserError(f'--genes {args.genes!r} names no gene; or give all')
  compiles.keep_programs(small_too=True)
  found = perturb.perturb_file(
    args.cells,
    args.output,
    pretrained.load(args.checkpoint),
    'all' if genes == ('all',) else genes,
    shard=shard,
    overwrite=args.overwrite,
    dtype=args.dtype,
    reading=embed_command.reading(args),
    top=args.top,
    kind=_KINDS[args.kind],
    factor=args.factor,
    level=args.level,
    reference=args.reference,
    renormalise=args.renormalise,
    start=args.start,
    goal=args.goal,
    pooling=args.pooling,
    responses=args.responses,
    measure=args.measure,
    min_detection=args.min_detection,
    calipers=tuple(args.calipers),
    nulls=args.nulls,
    fewest_nulls=args.fewest_nulls,
    never_null=group_flags.listed(args.never_null),
    left_out=group_flags.listed(args.left_out),
    **group_flags.fields(args),
  )
  if found is None:
    print(f'shard {args.shard} is done; without --shard the table is written')
    return
  print(f'{found.header["what"]}\n{_signs(found)}\n')
  for group in found.table['group'].unique():
    print(f'{group}\n{found.genes_df(group).head(10).to_string(index=False)}\n')
  for line in results.gaps(found):
    print(line)
  print(f'{args.output}: {len(found.table):,} targets; {stem}.tsv for people')
  _draw(found, stem, group_flags.listed(args.expected))


def _signs(found) -> str:
  """How to read the columns that are shown, a line each."""
  shown = ['score', 'shift', 'toward']
  if not found.table['toward'].notna().any():
    shown.remove('toward')
  rules = [f'{name} is {found.header[_RULE[name]]}' for name in shown]
  return '\n'.join([*rules, f'q is {found.header["q"]}'])


def _draw(found, stem: str, expected: tuple[str, ...]) -> None:
  """Plots of every group, where there is something to draw."""
  from genecompass_jax.analysis import perturbation_figures
  from genecompass_jax.analysis.perturbation import result_files

  groups = list(found.table['group'].unique())
  tails = result_files.tails_of(groups, unsafe=r'[/\0]')
  for group in groups:
    tail = tails[group]
    title = f'{found.header["done"].partition(":")[0]}, {group}'
    for name, draw in (
      ('rank', perturbation_figures.rank_plot),
      ('volcano', perturbation_figures.volcano),
    ):
      try:
        figure = draw(found, title=title, group=group, expected=expected)
      except errors.UserError as error:
        print(f'no {name} plot of {group}: {error}')
        continue
      figure.savefig(f'{stem}{tail}.{name}.png', dpi=150)
      print(f'{stem}{tail}.{name}.png')


def _shard(text: str) -> tuple[int, int]:
  index, _, number = text.partition('/')
  if not (index.isdecimal() and number.isdecimal()):
    raise errors.UserError(f'--shard {text}: give I/N, such as 0/4')
  return int(index), int(number)
