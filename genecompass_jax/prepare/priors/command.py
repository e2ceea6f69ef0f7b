"""`genecompass prior KIND ...`: raw files -> prior tables, and their controls.

What does the work is imported when it starts: help and mistakes come at once.
"""

import argparse
from collections.abc import Callable

Runner = Callable[[argparse.Namespace], int | None]
_SPECIES = ('human', 'mouse')
# Of flags that go to no configuration which looks at them.
_LOWS = {'seed': 0, 'batch': 1, 'width': 0, 'rms': 0, 'permutations': 1}


def add_arguments(parser: argparse.ArgumentParser) -> Runner:
  """Adds a command for each kind of prior; returns what runs the chosen one."""
  kinds = parser.add_subparsers(title='kinds', metavar='KIND', required=True)
  for name, help_text, fill in (
    ('grn', 'TF-target tables -> a prior of the regulatory network', _grn),
    (
      'promoter',
      'genome and annotation, or ready sequences -> a prior',
      _promoter,
    ),
    ('family', 'groups of related genes -> a prior', _family),
    (
      'coexpression',
      'genes that vary together in training cells',
      _coexpression,
    ),
    ('table', 'any table of vectors: ESM-2, GenePT, gene2vec, ...', _table),
    ('released', 'a prior pickle of the original', _released),
    ('control', 'priors without the knowledge', _control),
    ('check', 'coverage, validation and overlap of priors', _check),
  ):
    kind = kinds.add_parser(name, help=help_text, description=help_text)
    fill(kind)
    kind.set_defaults(kind=name)
  return run


def run(args: argparse.Namespace) -> int | None:
  """Runs one command; prints what was written and what was lost."""
  from genecompass_jax import errors
  from genecompass_jax.prepare.priors import builds, reports

  for name, low in _LOWS.items():
    if not getattr(args, name, low) >= low:  # NaN included
      raise errors.UserError(
        f'--{name} {getattr(args, name):g} must be at least {low}'
      )
  functions = {
    'grn': builds.grn,
    'promoter': builds.promoter,
    'family': builds.family,
    'coexpression': builds.coexpression,
    'table': builds.table,
    'released': builds.released,
    'control': builds.control,
    'check': reports.check,
  }
  return functions[args.kind](args)


def _output(
  parser: argparse.ArgumentParser,
  metavar: str = 'NAME.parquet',
  what: str = 'the table; NAME.json beside it says what it was made of',
) -> None:
  parser.add_argument(
    '-o', '--output', required=True, metavar=metavar, help=what
  )
  _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--overwrite', action='store_true', help='replace what is there'
  )
  _vocabulary(parser)
  parser.add_argument(
    '--licence',
    action='append',
    default=[],
    metavar='[FILE_NAME=]TEXT',
    help='origin and licence of a source, or of all; kept with the table',
  )


def _vocabulary(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--vocabulary',
    default='default',
    metavar='default|FILE',
    help='genes that get vectors, and over which coverage is counted',
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='of all that is drawn at random'
  )


def _embedding(
  parser: argparse.ArgumentParser, method: str, window: int = 1
) -> None:
  group = parser.add_argument_group('embedding')
  group.add_argument(
    '--method',
    default=method,
    choices=('svd', 'projection', 'skipgram'),
    help='svd: of PPMI; projection: random, of PPMI rows; skipgram: gensim',
  )
  _width(group)
  group.add_argument(
    '--window',
    type=int,
    default=window,
    help='steps of a walk that pair two genes; 1: the pairs themselves',
  )
  group.add_argument(
    '--smoothing',
    type=float,
    default=0.75,
    help='power that frequencies of partners are raised to in PPMI',
  )
  group.add_argument(
    '--shift',
    type=float,
    default=0.0,
    help='taken off the mutual information of every pair',
  )
  for name, kind, value, text in (
    ('walks', int, 10, 'walks from each gene (skipgram, window above 1)'),
    ('length', int, 20, 'steps of a walk'),
    ('return-weight', float, 1.0, "node2vec's 1/p"),
    ('in-out-weight', float, 1.0, "node2vec's 1/q"),
    ('epochs', int, 5, 'passes of skipgram over the pairs'),
    ('negatives', int, 5, 'false pairs beside each true one (skipgram)'),
  ):
    group.add_argument(f'--{name}', type=kind, default=value, help=text)


def _width(group: argparse._ActionsContainer) -> None:
  group.add_argument(
    '--width', type=int, default=256, help='most entries of a vector'
  )
  group.add_argument(
    '--power',
    type=float,
    default=0.5,
    help='power that singular values are raised to',
  )
  _rms(group, 0.67)


def _rms(group: argparse._ActionsContainer, value: float) -> None:
  group.add_argument(
    '--rms',
    type=float,
    default=value,
    help='root mean square of the entries, by one factor, as in the '
    'released tables; 0 leaves them',
  )


def _grn(parser: argparse.ArgumentParser) -> None:
  _output(parser)
  for species in _SPECIES:
    parser.add_argument(
      f'--{species}',
      action='append',
      default=[],
      metavar='FORMAT=FILE[@WEIGHT]',
      help=f'a table of {species} edges: collectri, dorothea, trrust or table '
      '(see --columns); again for more',
    )
  parser.add_argument(
    '--confidence', default='ABC', help='letters of DoRothEA that are kept'
  )
  parser.add_argument(
    '--columns',
    default='1,2',
    metavar='TF,TARGET[,WEIGHT]',
    help='of FORMAT table: names, or numbers from 1',
  )
  parser.add_argument(
    '--no-header',
    action='store_true',
    help='the first line of FORMAT table is an edge',
  )
  parser.add_argument(
    '--complexes',
    default='',
    metavar='FILE',
    help='complex and part, one row a part, without header (NFKB and AP1 are '
    'known)',
  )
  parser.add_argument(
    '--merge',
    default='max',
    choices=('max', 'sum'),
    help='weight of an edge in several tables; max: curated tables that hold '
    'each other count once',
  )
  parser.add_argument(
    '--lift',
    default='none',
    choices=('none', 'human', 'mouse', 'both'),
    help='edges of this species also go to one-to-one orthologues, marked',
  )
  parser.add_argument(
    '--hold-out',
    default='',
    metavar='TF,...|FILE',
    help='TFs that leave every table, with paralogues and orthologues',
  )
  parser.add_argument(
    '--paralogues',
    default='',
    metavar='FILE|none',
    help='groups of human genes (HGNC); needed with --hold-out',
  )
  parser.add_argument(
    '--max-paralogues',
    type=int,
    default=120,
    help='groups of more genes are no paralogues',
  )
  _embedding(parser, 'svd', window=3)


def _promoter(parser: argparse.ArgumentParser) -> None:
  _output(parser)
  for species in _SPECIES:
    parser.add_argument(
      f'--{species}-genome', default='', metavar='FASTA', help='plain or gzip'
    )
    parser.add_argument(
      f'--{species}-genes', default='', metavar='GTF', help='plain or gzip'
    )
    parser.add_argument(
      f'--{species}-sequences',
      default='',
      metavar='FILE',
      help='ready sequences, FASTA or a table, in place of a genome',
    )
  parser.add_argument('--upstream', type=int, default=500, help='bases')
  parser.add_argument('--downstream', type=int, default=2000, help='bases')
  parser.add_argument(
    '--tss',
    default='canonical',
    choices=('canonical', 'longest', 'upstream'),
    help='transcript whose start counts; canonical: as tagged, else the '
    'longest',
  )
  parser.add_argument(
    '--skip-soft-masked', action='store_true', help='read lower case as N'
  )
  parser.add_argument(
    '--gene-column',
    default='',
    metavar='NAME,...',
    help='of a table of sequences; the first that leads to a gene counts',
  )
  parser.add_argument(
    '--sequence-column', default='sequence', help='of a table of sequences'
  )
  parser.add_argument(
    '--strip',
    default='',
    metavar='REGEX',
    help='taken off the end of identifiers, such as _[0-9]+',
  )
  parser.add_argument('--k', default='4,5,6', help='lengths of words')
  parser.add_argument(
    '--stranded',
    action='store_true',
    help='a word and its reverse complement are two',
  )
  parser.add_argument(
    '--encoder',
    default='',
    metavar='MODULE:FUNCTION',
    help='list of sequences -> array, in place of words',
  )
  parser.add_argument(
    '--batch', type=int, default=64, help='sequences a call of the encoder'
  )
  _width(parser)


def _family(parser: argparse.ArgumentParser) -> None:
  _output(parser)
  parser.add_argument(
    '--groups',
    action='append',
    required=True,
    metavar='FILE',
    help='human groups: HGNC, FamPlex relations.csv, or group and gene',
  )
  parser.add_argument(
    '--mouse-groups',
    action='append',
    default=[],
    metavar='FILE',
    help='mouse groups (default: human ones of one-to-one orthologues)',
  )
  parser.add_argument(
    '--all-groups',
    action='store_true',
    help='keep groups of names and classes of RNA',
  )
  _embedding(parser, 'projection')


def _coexpression(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'corpus', metavar='CORPUS', help='its training cells are counted'
  )
  _output(parser)
  parser.add_argument(
    '--matrix',
    default='unit',
    help='obs column; correlations are within the cells of one value',
  )
  parser.add_argument(
    '--max-cells',
    type=int,
    default=3000,
    help='most cells of one value, drawn at random',
  )
  parser.add_argument(
    '--min-r', type=float, default=0.8, help='least correlation of a pair'
  )
  parser.add_argument(
    '--min-cells',
    type=int,
    default=50,
    help='cells in which both genes have a count',
  )
  parser.add_argument(
    '--rule',
    default='fdr',
    choices=('fdr', 'released'),
    help='released: r alone, from three cells on',
  )
  parser.add_argument(
    '--fdr', type=float, default=0.05, help='largest share of false pairs'
  )
  parser.add_argument(
    '--permutations',
    type=int,
    default=2,
    help='times that cells are permuted to count false pairs',
  )
  parser.add_argument(
    '--value',
    default='log',
    choices=('log', 'count', 'normalised'),
    help='log2(1 + count), the count, or log2(1 + count per 10,000)',
  )
  _embedding(parser, 'svd')


def _table(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'file', metavar='FILE', help='csv, tsv, parquet, npz or word2vec text'
  )
  _output(parser)
  parser.add_argument(
    '--species',
    default='auto',
    metavar='SPECIES|both|auto',
    help='of the identifiers; both: stable ids of all species of the '
    'vocabulary',
  )
  parser.add_argument(
    '--gene-column',
    default='',
    help='column of identifiers; without it the first column of text',
  )
  parser.add_argument(
    '--lift',
    action='store_true',
    help='one-to-one orthologues without a vector take that of their partner',
  )
  parser.add_argument(
    '--width',
    type=int,
    default=0,
    help='principal components to keep; 0 keeps the vectors',
  )
  _rms(parser, 0.67)


def _released(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'file', metavar='FILE.pickle', help='read by a restricted reader'
  )
  parser.add_argument(
    '--species', required=True, choices=_SPECIES, help='of its genes'
  )
  _output(parser, 'DIR', 'folder that gets the tables')
  parser.add_argument(
    '--drop-random',
    action='store_true',
    help='genes whose rows look random count as missing',
  )


def _control(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'control',
    choices=('shuffled', 'shuffled_pairs', 'random', 'constant', 'rewired'),
    help='rows permuted; orthologues permuted together; random rows of the same norms and singular values; '
    'every row the same; a network of the same degrees (grn only)',
  )
  _priors(parser)
  parser.add_argument(
    '--expression',
    default='',
    metavar='CORPUS|FILE',
    help='deciles that rows stay in; a table has gene and value',
  )
  _output(parser, 'DIR', 'folder that gets the tables')


def _priors(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'priors',
    nargs='+',
    metavar='PRIOR.parquet',
    help='tables that genecompass prior made',
  )


def _check(parser: argparse.ArgumentParser) -> None:
  _priors(parser)
  parser.add_argument(
    '--sets',
    action='append',
    default=[],
    metavar='SPECIES:NAME=FILE.gmt',
    help='gene sets that belong together; again for more',
  )
  parser.add_argument(
    '--edges',
    action='append',
    default=[],
    metavar='SPECIES:NAME:FORMAT=FILE',
    help='regulators and targets; FORMAT as of genecompass prior grn, or '
    'table(COLUMN,COLUMN)',
  )
  parser.add_argument(
    '--expression',
    default='',
    metavar='CORPUS|FILE',
    help='deciles in which rows are permuted',
  )
  parser.add_argument(
    '--permutations',
    type=int,
    default=200,
    help='times that rows are permuted; p is at least 1 / (times + 1)',
  )
  _vocabulary(parser)
  parser.add_argument(
    '-o', '--output', default='', metavar='REPORT.json', help='all figures'
  )
