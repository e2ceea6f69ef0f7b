"""`genecompass attribute`: its flags, and what it says."""

import argparse
import os
from collections.abc import Callable

from genecompass_jax import errors
from genecompass_jax.analysis import embed_command, group_flags
from genecompass_jax.prepare import flags, readers


def add_arguments(
  parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], None]:
  """Adds the flags; returns what runs the command."""
  parser.epilog = (
    'Example, which prior mattered for two genes, in which cell type: '
    f'{parser.prog} cells.h5ad --checkpoint RUN --genes LYZ,ISG15 --group-by '
    'cell_type --donor-key donor -o found.parquet. Every number is an '
    'association learned from expression, not a causal estimate. An '
    'interrupted command goes on when it is given again. docs/attribution.md '
    'says what is shared out, and from which baseline.'
  )
  embed_command.add_cells(parser)
  parser.add_argument(
    '-o',
    '--output',
    required=True,
    metavar='NAME.parquet',
    help='table of parts to write; NAME.tsv, tables of genes, cells and units, '
    'and figures beside it',
  )
  embed_command.add_checkpoint(parser)
  _add_target(parser)
  _add_method(parser)
  group_flags.add_arguments(parser, max_cells=200, min_cells=3)
  work = parser.add_argument_group('work')
  work.add_argument(
    '--batch-size',
    '--batch_size',
    type=int,
    default=8,
    help='cells that run together; changes the speed, not the result',
  )
  work.add_argument(
    '--overwrite',
    action='store_true',
    help='replace NAME.parquet, and cells that another command left unfinished',
  )
  flags.add_cell_flags(parser)
  readers.add_arguments(parser)
  return _run


def _add_target(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group('what is explained: one of three')
  group.add_argument(
    '--genes',
    default='',
    metavar='A,B',
    help='predictions of these genes, by any identifier, one after the other',
  )
  group.add_argument(
    '--ask',
    default='id',
    choices=('id', 'value'),
    help='of a gene: how likely the model finds it at the slot that hides it, '
    'or the value that it predicts',
  )
  group.add_argument(
    '--logit',
    action='store_true',
    help='of an id: its logit, in place of its log-probability in nats',
  )
  group.add_argument(
    '--start',
    default='',
    metavar='VALUE',
    help='group of --group-by: where the cells lie on the way from its centroid',
  )
  group.add_argument(
    '--goal', default='', metavar='VALUE', help='to that of this group'
  )
  group.add_argument(
    '--pooling',
    default='cls',
    choices=('cls', 'mean'),
    help='of the embeddings on that way',
  )
  group.add_argument(
    '--classes',
    default='',
    metavar='N,M',
    help='scores of classes by their numbers, of a model with a sequence head',
  )


def _add_method(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group('how it is shared out')
  group.add_argument(
    '--over',
    default='parts',
    choices=('parts', 'values', 'all'),
    help='over word vector and priors of the genes, their values, or all',
  )
  group.add_argument(
    '--method',
    default='integrated',
    choices=('integrated', 'gradient', 'occlusion'),
    help='integrated gradients, which add up; the gradient alone; or leaving '
    'out, a pass a gene',
  )
  group.add_argument(
    '--baseline',
    default='mean',
    choices=('mean', 'zero'),
    help='what word and priors are when nothing is known: their mean over '
    'genes, or nothing at all',
  )
  group.add_argument(
    '--tolerance',
    type=float,
    default=1e-3,
    help='of what is lacking to the sum, as a share of the absolute scores',
  )
  group.add_argument(
    '--max-points',
    '--max_points',
    type=int,
    default=256,
    help='gradients along the path; 16 at first',
  )
  group.add_argument(
    '--top',
    type=int,
    default=50,
    metavar='K',
    help='genes of a target and group in the table of genes',
  )


def _run(args: argparse.Namespace) -> None:
  # Imported late: help is to answer at once.
  from genecompass_jax import pretrained
  from genecompass_jax.analysis.attribution import by_group, group_files
  from genecompass_jax.prepare import h5ad_copy
  from genecompass_jax.training import compiles

  stem = group_files.stem(args.output)
  h5ad_copy.check_output(args.output, args.overwrite)
  asked = _targets(args)
  compiles.keep_programs(small_too=True)
  found = by_group.attribute_groups(
    args.cells,
    pretrained.load(args.checkpoint),
    asked,
    over=args.over,
    method=args.method,
    baseline=args.baseline,
    tolerance=args.tolerance,
    max_points=args.max_points,
    top=args.top,
    batch_size=args.batch_size,
    output=args.output,
    overwrite=args.overwrite,
    reading=embed_command.reading(args),
    write=lambda found: group_files.write(found, args.output),
    **group_flags.fields(args),
  )
  _print(found)
  print(
    f'{args.output}: {len(found.cells):,} cells asked; {stem}.tsv and '
    f'{stem}.genes.tsv for people'
  )
  _draw(found, stem)


def _targets(args: argparse.Namespace) -> list:
  """What the flags ask for: genes, an axis, or classes."""
  from genecompass_jax.analysis.attribution import group_axis, targets

  genes, classes = (
    group_flags.listed(text) for text in (args.genes, args.classes)
  )
  is_axis = bool(args.start or args.goal)
  if bool(genes) + bool(classes) + is_axis != 1:
    raise errors.UserError(
      'attribute: give one of --genes, --start with --goal, or --classes'
    )
  if is_axis:
    return [group_axis.GroupAxis(args.start, args.goal, args.pooling)]
  if classes:
    if not all(c.isdecimal() for c in classes):
      raise errors.UserError(
        f'--classes {args.classes}: give numbers from 0, such as 0,1'
      )
    return [targets.ClassLogit(int(c)) for c in classes]
  if args.ask == 'value':
    return [targets.GeneValue(gene) for gene in genes]
  scale = targets.LOGIT if args.logit else targets.LOG_PROBABILITY
  return [targets.GeneId(gene, scale) for gene in genes]


def _print(found) -> None:
  """Parts of every group, and the first genes."""
  for target, of_target in found.parts.groupby('target', sort=False):
    wide = of_target.pivot(index='group', columns='part', values='score')
    wide = wide[list(dict.fromkeys(of_target['part']))]
    facts = of_target.drop_duplicates('group').set_index('group')
    wide.insert(0, 'n_cells', facts['n_cells'])
    wide.insert(1, 'n_units', facts['n_units'])
    print(
      f'{target}, score of a mean cell\n{wide.to_string(float_format=_short)}'
    )
    genes = found.genes[
      (found.genes['target'] == target) & (found.genes['part'] == 'all')
    ]
    for group, of_group in genes.groupby('group', sort=False):
      first = [
        f'{symbol or gene_id} {score:+.3g}'
        for symbol, gene_id, score in of_group.head(5)[
          ['symbol', 'gene_id', 'score']
        ].itertuples(index=False)
      ]
      print(f'  {group}: {", ".join(first)}')
    print()


def _short(x: float) -> str:
  return f'{x:+.3g}'


def _draw(found, stem: str) -> None:
  """Figures of every target, where there is something to draw."""
  from genecompass_jax.analysis import attribution_figures

  labels = list(dict.fromkeys(found.parts['target']))
  for label in labels:
    tail = ''
    if len(labels) > 1:
      tail = '.' + label.replace(os.sep, '_').replace(' ', '_')
    for name, draw in (
      ('parts', attribution_figures.parts_plot),
      ('genes', attribution_figures.genes_plot),
    ):
      try:
        figure = draw(found, label)
      except errors.UserError as error:
        print(f'no figure of {name}: {error}')
        continue
      figure.savefig(f'{stem}{tail}.{name}.png', dpi=150)
      print(f'{stem}{tail}.{name}.png')
