"""`genecompass prep FILE... -o CORPUS`: files of cells -> a corpus.

What does the work is imported when it starts: help and mistakes come at once.
"""

import argparse

from genecompass_jax import errors, paths
from genecompass_jax.prepare import (
  assays,
  flags,
  perturbed,
  quality,
  readers,
  source_config,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds what `run` reads; flags of a source hold for every FILE."""
  parser.add_argument(
    'files',
    nargs='+',
    metavar='[FORMAT] FILE',
    help='files or folders of cells; the format is found, or named before them '
    f'({", ".join(source_config.FORMATS)})',
  )
  parser.add_argument(
    '-o', '--output', required=True, metavar='CORPUS', help='folder to write'
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace a corpus that is there'
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='of the order and of what is held out'
  )
  flags.add_work_flags(parser)

  cells = parser.add_argument_group('cells')
  flags.add_cell_flags(cells)
  cells.add_argument(
    '--assay',
    default='auto',
    choices=assays.CHOICES,
    help='medians are taken from one kind, UMI first; auto: a panel below '
    '5,000 genes, else by the obs column assay',
  )
  cells.add_argument(
    '--total', default='', metavar='COLUMN', help='obs column with the library '
    'size, where the genes of a file were selected',
  )  # fmt: skip
  cells.add_argument(
    '--obs',
    default='',
    metavar='COLUMN,...',
    help='obs columns to carry, such as cell_type,tissue',
  )
  cells.add_argument(
    '--dataset',
    default='',
    help='label of the study; without it the name of the file',
  )
  cells.add_argument(
    '--licence', default='', help='of the data, for the manifest'
  )
  cells.add_argument(
    '--vocabulary',
    default='default',
    metavar='default|measured|FILE',
    help='gene lists: all genes, those measured here, or those of a file',
  )

  readers.add_arguments(cells)
  cells.add_argument(
    '--controls',
    default='',
    metavar='COLUMN=VALUE,...|all',
    help='cells of a screen that nothing was done to, the only ones taken; '
    'found where obs has a column such as perturbation or sgRNA',
  )
  cells.add_argument(
    '--exact-medians',
    '--exact_medians',
    action='store_true',
    help='medians of the genes from all values, in two more passes; from '
    'histograms they are off by 1.6 %% at most in library mode; in released '
    'mode not at all up to 512 counts, by 4.6 %% at most above',
  )
  cells.add_argument(
    '--keep-copies',
    '--keep_copies',
    action='store_true',
    help='do not look for cells that stand in the sources more than once',
  )
  cells.add_argument(
    '--weigh-by',
    '--weigh_by',
    default='',
    metavar='COLUMN,...',
    help='carried columns, such as tissue,dataset: the manifest gets weights '
    'by which cells of rare combinations are seen more often',
  )

  split = parser.add_argument_group('split')
  split.add_argument(
    '--unit',
    default='',
    metavar='COLUMN',
    help='obs column that is never split (donor, study); a file without one '
    'is one unit; "cell" splits single cells and marks the corpus leaky',
  )
  split.add_argument(
    '--validation-share',
    '--validation_share',
    type=float,
    default=0.1,
    help='share of cells to hold out, by whole units; 0 for none',
  )
  split.add_argument(
    '--validation-units',
    '--validation_units',
    default='',
    metavar='UNIT,...',
    help='units to hold out, in place of a share; a name that holds a comma in '
    'double quotes',
  )
  split.add_argument(
    '--test-units',
    '--test_units',
    default='',
    metavar='UNIT,...',
    help='units to keep for a final test',
  )

  filters = parser.add_argument_group(
    'filters (the value in brackets switches it off)'
  )
  default = quality.QualityConfig()
  filters.add_argument(
    '--min-genes',
    '--min_genes',
    type=int,
    default=default.min_genes,
    help='expressed genes of a cell; scaled to a panel of genes [0]',
  )
  filters.add_argument(
    '--min-coding',
    '--min_coding',
    type=int,
    default=default.min_coding,
    help='expressed protein-coding or miRNA genes [0]',
  )
  filters.add_argument(
    '--max-mito',
    '--max_mito',
    type=float,
    default=default.max_mito,
    help='share of mitochondrial counts [1]',
  )
  filters.add_argument(
    '--max-sd',
    '--max_sd',
    type=float,
    default=default.max_sd,
    help='SDs that the number of expressed genes may lie from the mean of the '
    'sample [0]',
  )
  filters.add_argument(
    '--min-cells',
    '--min_cells',
    type=int,
    default=default.min_cells,
    help='cells of a sample [0]',
  )
  filters.add_argument(
    '--no-filters', '--no_filters', action='store_true', help='keep all cells'
  )
  filters.add_argument(
    '--sample',
    default='',
    metavar='COLUMN',
    help='obs column of samples; without it that of --unit',
  )


def run(args: argparse.Namespace) -> int:
  """Builds the corpus and prints what was kept and lost; exit code 0.

  Raises:
    UserError: one line for the user; nothing that looks like a corpus is left.
  """
  from genecompass_jax.prepare import pipeline, reports, sources

  kind, files = '', args.files
  if files[0] in source_config.FORMATS:
    kind, files = files[0], files[1:]
  if not files:
    raise errors.UserError(f'no files were given: genecompass prep {kind} FILE')
  if args.no_filters:
    filters = quality.QualityConfig.off()
  else:
    filters = quality.QualityConfig(
      min_genes=args.min_genes,
      min_coding=args.min_coding,
      max_mito=args.max_mito,
      max_sd=args.max_sd,
      min_cells=args.min_cells,
    )
  if args.dataset and not args.unit and len(files) > 1:
    raise errors.UserError(
      '--dataset makes one unit of all files; name their units with --unit'
    )
  configs = [
    sources.SourceConfig(
      path=path,
      species=args.species,
      ids_of=args.ids_of,
      layer=args.layer,
      unit=args.unit,
      sample=args.sample,
      total=args.total,
      assay=args.assay,
      controls=args.controls,
      dataset=args.dataset,
      obs=perturbed.names(args.obs),
      allow_noninteger=args.allow_noninteger,
      licence=args.licence,
      format=kind,
      **readers.config_fields(args),
    )
    for path in files
  ]
  config = pipeline.PrepareConfig(
    vocabulary=args.vocabulary,
    filters=filters,
    validation_share=args.validation_share,
    validation_units=perturbed.names(args.validation_units),
    test_units=perturbed.names(args.test_units),
    apart=True,
    seed=args.seed,
    overwrite=args.overwrite,
    medians='exact' if args.exact_medians else 'histogram',
    keep_copies=args.keep_copies,
    weigh_by=perturbed.names(args.weigh_by),
    **flags.work_fields(args),
  )
  pipeline.prepare(configs, args.output, config)
  print(reports.describe_corpus(args.output))
  for path in files:
    if paths.exists(paths.join(path, 'manifest.json')):
      print(
        f'{path} is a corpus: what it held out was split anew with the rest; '
        'genecompass corpus merge keeps its splits'
      )
  return errors.EXIT_OK
