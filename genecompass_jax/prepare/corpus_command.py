"""`genecompass corpus merge | convert`: what is made of finished corpora."""

import argparse

from genecompass_jax import errors
from genecompass_jax.prepare import flags


def add_merge(parser: argparse.ArgumentParser) -> None:
  """Adds what `merge` reads."""
  parser.add_argument(
    'corpora', nargs='+', metavar='CORPUS', help='folders of corpora'
  )
  parser.add_argument(
    '-o', '--output', required=True, metavar='NEW', help='folder to write'
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace a corpus that is there'
  )
  parser.add_argument('--seed', type=int, default=0, help='of the order')
  parser.add_argument(
    '--exact-medians',
    '--exact_medians',
    action='store_true',
    help='medians of the genes from all values, in two more passes',
  )
  parser.add_argument(
    '--keep-copies',
    '--keep_copies',
    action='store_true',
    help='do not look for cells that stand in the corpora more than once',
  )
  flags.add_work_flags(parser)


def merge(args: argparse.Namespace) -> int:
  """Builds one corpus of several; exit code 0."""
  from genecompass_jax.prepare import merging, pipeline, reports

  merging.merge(
    args.corpora,
    args.output,
    pipeline.PrepareConfig(
      seed=args.seed,
      overwrite=args.overwrite,
      medians='exact' if args.exact_medians else 'histogram',
      keep_copies=args.keep_copies,
      **flags.work_fields(args),
    ),
  )
  print(reports.describe_corpus(args.output))
  return errors.EXIT_OK


def add_convert(parser: argparse.ArgumentParser) -> None:
  """Adds what `convert` reads."""
  parser.add_argument('corpus', metavar='CORPUS', help='folder of a corpus')
  parser.add_argument(
    '-o', '--output', required=True, metavar='FOLDER', help='folder to write'
  )
  parser.add_argument(
    '--to',
    default='h5ad',
    choices=('h5ad', 'arrow'),
    help='h5ad: a file of counts a source; arrow: ranked and padded cells as '
    'GeneCompass released them, with their tokens and medians',
  )
  parser.add_argument(
    '--split', default='', help='train, validation or test; all without it'
  )


def convert(args: argparse.Namespace) -> int:
  """Writes the cells of a corpus in another format; exit code 0."""
  from genecompass_jax.prepare import exports

  write = exports.to_h5ad if args.to == 'h5ad' else exports.to_arrow
  for name, cells in write(args.corpus, args.output, args.split):
    print(f'{name}: {cells:,} cells')
  return errors.EXIT_OK
