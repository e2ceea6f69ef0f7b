"""The `genecompass` command.

Subcommands are imported when they are called: `genecompass --help` answers at
once, and preparation never loads JAX. Exit codes: 0 done, 1 failed, 2 wrong
usage (one line says what to do), 42 stopped and to be started again.
"""

import argparse
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from genecompass_jax import errors
from genecompass_jax.prepare import flags


class _Help(argparse.ArgumentDefaultsHelpFormatter):
  """Says the default of an option where there is one to say."""

  def _get_help_string(self, action: argparse.Action) -> str | None:
    is_number = type(action.default) in (int, float)
    if action.default or is_number:
      return super()._get_help_string(action)
    return action.help

  def _format_action_invocation(self, action: argparse.Action) -> str:
    """Options are shown with dashes; --ids_of does what --ids-of does."""
    shown = [s for s in action.option_strings if '_' not in s]
    if not shown or len(shown) == len(action.option_strings):
      return super()._format_action_invocation(action)
    every, action.option_strings = action.option_strings, shown
    try:
      return super()._format_action_invocation(action)
    finally:
      action.option_strings = every


# Commands that keep what is finished; prep has kinds that do not.
_GO_ON = ('attribute', 'demo', 'embed', 'perturb')


class _Parser(argparse.ArgumentParser):
  """A parser whose help has defaults, and whose complaints are one line."""

  def __init__(self, **kwargs: Any):
    super().__init__(**{**kwargs, 'formatter_class': _Help})

  def error(self, message: str) -> NoReturn:
    print(f'{self.prog}: {message}; see {self.prog} --help', file=sys.stderr)
    sys.exit(errors.EXIT_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand; returns its exit code."""
  is_command = argv is None
  argv = sys.argv[1:] if is_command else argv
  words = [*(a for a in argv if not a.startswith('-')), '', '']
  if words[0] == 'plan':
    # Fields of the configuration: any name may follow --config.
    argv = [f'--set={a}' if a.startswith('--config.') else a for a in argv]
  if words[0] == 'launch' and '--' in argv:
    at = [*argv].index('--')  # what is behind it is for another command
    argv = [*argv[:at], *(f'--flag={a}' for a in argv[at + 1 :])]
  parser = _parser(words[0], words[1])
  args = parser.parse_args(argv)
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  if sys.stdout is None:  # closed by the caller
    sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115
  try:
    with _unwound_when_ended():
      code = args.run(args) or errors.EXIT_OK
    sys.stdout.flush()  # here, where a reader that left is known
    return code
  except KeyboardInterrupt:
    goes_on = '; the same command goes on' if words[0] in _GO_ON else ''
    print(f'{parser.prog}: interrupted{goes_on}', file=sys.stderr)
    if is_command and 'jax' in sys.modules:
      # At once: an interpreter that ends while XLA compiles may crash.
      for stream in (sys.stdout, sys.stderr):
        stream.flush()
      os._exit(errors.EXIT_INTERRUPTED)
    return errors.EXIT_INTERRUPTED
  except ImportError as error:  # a package for some kind of URL
    print(f'{parser.prog}: {error}', file=sys.stderr)
    return errors.EXIT_USAGE
  except errors.UserError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_USAGE
  except errors.RetryableError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_RETRY
  except BrokenPipeError:  # the reader of our output left, as `| head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return errors.EXIT_OK
  except OSError as error:  # no permission, a full disk, a file for a folder
    print(f'{parser.prog}: {error}', file=sys.stderr)
    is_user = errors.is_mistake(error)
    return errors.EXIT_USAGE if is_user else errors.EXIT_FAILED


@contextlib.contextmanager
def _unwound_when_ended() -> Iterator[None]:
  """SIGTERM unwinds like an exit, so that staging folders go.

  The handler of a program that calls `main` is back when it returns.
  """

  def end(number: int, frame: object) -> NoReturn:
    del frame
    sys.exit(128 + number)

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, end)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _parser(chosen: str, step: str) -> argparse.ArgumentParser:
  """The parser; only the chosen command is filled in, and imported.

  Args:
    chosen: the command.
    step: the word behind it: `prep` has steps as well as files.
  """
  import genecompass_jax

  parser = _Parser(
    prog='genecompass',
    description='GeneCompass in JAX: prepare cells, use trained models. '
    'Training: python -m genecompass_jax.main --help',
  )
  parser.add_argument(
    '--version', action='version', version=genecompass_jax.__version__
  )
  commands = parser.add_subparsers(
    title='commands', metavar='COMMAND', required=True
  )
  for name, help_text, fill in (
    ('demo', 'the whole way on real cells, in minutes', _demo),
    (
      'prep',
      'files of cells -> a corpus; also official files, gene tables',
      functools.partial(_prep, step),
    ),
    ('prior', 'public knowledge of genes -> prior tables', _prior),
    ('embed', 'cells -> embeddings in an h5ad file', _embed),
    ('reference', 'training cells, to measure `gc_ood` against', _reference),
    (
      'gene-embeddings',
      'cells -> mean states of genes, by groups of cells',
      _gene_embeddings,
    ),
    ('perturb', 'what changing genes does to cells, in silico', _perturb),
    (
      'attribute',
      'which priors and genes predictions came from, by groups of cells',
      _attribute,
    ),
    (
      'attention',
      'whom genes attend to, and who to them, by groups of cells',
      _attention,
    ),
    ('convert', 'weights of the original <-> models, exports', _convert),
    ('plan', 'does a run fit a pod, and what will it cost?', _plan),
    ('report', 'held-out losses of a run beside the null models', _report),
    ('watch', 'runs while they train, in the terminal', _watch),
    ('launch', 'a training in several processes, started again', _launch),
    ('corpus', 'check, describe, merge or convert corpora', _corpus),
    ('doctor', 'is everything here in order?', _doctor),
  ):
    command = commands.add_parser(name, help=help_text, description=help_text)
    if name == chosen:
      command.set_defaults(run=fill(command))
  return parser


Runner = Callable[[argparse.Namespace], int | None]


def _prep(step: str, parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.prepare import command, steps

  if step not in steps.STEPS:
    command.add_arguments(parser)
    parser.epilog = steps.epilog(parser.prog)
    return command.run
  return steps.add_step(step, parser)


def _prior(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.prepare.priors import command

  return command.add_arguments(parser)


def _embed(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.analysis import embed_command

  return embed_command.add_arguments(parser)


def _reference(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.analysis import reference_command

  return reference_command.add_arguments(parser)


def _perturb(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.analysis.perturbation import command

  return command.add_arguments(parser)


def _attention(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.analysis import attention_command

  return attention_command.add_arguments(parser)


def _attribute(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.analysis.attribution import command

  return command.add_arguments(parser)


def _gene_embeddings(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.analysis import gene_embeddings_command

  return gene_embeddings_command.add_arguments(parser)


def _convert(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.convert import command

  return command.add_arguments(parser)


def _report(parser: argparse.ArgumentParser) -> Runner:
  parser.add_argument('workdir', metavar='DIR', help='workdir of a run')
  parser.add_argument(
    '-o', '--output', metavar='CURVES.png', help='also draw the loss curves'
  )

  def run(args: argparse.Namespace) -> None:
    from genecompass_jax.analysis import report

    print(report.table(args.workdir))
    if args.output:
      from genecompass_jax import metrics
      from genecompass_jax.analysis import figures

      figure = figures.learning_curves(
        metrics.read(args.workdir), title=f'Pretraining losses, {args.workdir}'
      )
      try:
        figure.savefig(args.output, dpi=150)
      except ValueError as error:  # an ending that is no format of pictures
        raise errors.UserError(
          f'{args.output}: {errors.first_line(error)}'
        ) from error
      print(f'\n{args.output}: the loss curves')

  return run


def _watch(parser: argparse.ArgumentParser) -> Runner:
  parser.add_argument(
    'workdirs', nargs='+', metavar='DIR', help='workdirs of runs, or URLs'
  )
  parser.add_argument(
    '--once',
    action='store_true',
    help='print the state once, as is done where the output is no terminal',
  )
  parser.add_argument(
    '--every', type=float, default=2.0, metavar='SECONDS', help='between looks'
  )

  def run(args: argparse.Namespace) -> None:
    from genecompass_jax import watch

    if not args.every > 0:
      raise errors.UserError(f'--every {args.every} must be more than 0')
    watch.watch(args.workdirs, once=args.once, every=args.every)

  return run


def _launch(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax import launch

  return launch.add_arguments(parser)


def _corpus(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.prepare import corpus_command

  actions = parser.add_subparsers(
    title='actions', metavar='ACTION', required=True
  )
  for name, help_text, fill, run in (
    ('verify', 'hash and read every file', _add_corpus, _verify),
    ('stats', 'what a corpus holds', _add_corpus, _stats),
    ('bench', 'what loading it costs on this machine', _add_bench, _bench),
    (
      'merge',
      'several corpora -> one, shuffled anew, without copies',
      corpus_command.add_merge,
      corpus_command.merge,
    ),
    (
      'convert',
      'h5ad files, or the layout that GeneCompass released',
      corpus_command.add_convert,
      corpus_command.convert,
    ),
  ):
    action = actions.add_parser(name, help=help_text, description=help_text)
    fill(action)
    action.set_defaults(act=run)
  return lambda args: args.act(args)


def _add_bench(parser: argparse.ArgumentParser) -> None:
  _add_corpus(parser)
  parser.add_argument(
    '--layout',
    default='packed',
    choices=('packed', 'buckets', 'raw'),
    help='raw stops at decoded counts',
  )
  parser.add_argument(
    '--seconds', type=float, default=10.0, help='seconds to measure for'
  )
  parser.add_argument(
    '--threads', type=int, default=2, help='threads that make batches'
  )
  parser.add_argument('--rows', type=int, default=32, help='rows of a batch')
  parser.add_argument(
    '--slots', type=int, default=2304, help='slots of a packed row'
  )
  parser.add_argument(
    '--max-genes', type=int, default=2048, help='genes that a cell keeps'
  )
  parser.add_argument(
    '--label',
    default='',
    metavar='COLUMN',
    help='obs column whose mixing is measured (default: the first that is '
    'there of cell_type, dataset, unit, source)',
  )
  parser.add_argument(
    '--cold',
    action='store_true',
    help='have the system forget the files, again every quarter of an epoch',
  )
  parser.add_argument(
    '--json', action='store_true', help='figures by name, in place of a table'
  )


def _bench(args: argparse.Namespace) -> None:
  import json

  from genecompass_jax import corpus, corpus_bench

  figures = corpus_bench.measure(
    corpus.Corpus.open(args.corpus),
    layout=args.layout,
    rows=args.rows,
    slots=args.slots,
    threads=args.threads,
    seconds=args.seconds,
    max_genes=args.max_genes,
    label=args.label,
    cold=args.cold,
  )
  if args.json:
    print(json.dumps(figures))
    return
  name = f'{args.layout}, {args.threads} thread(s)' + ', cold' * args.cold
  print(corpus_bench.table([(name, figures)]))
  print(f'\n{figures["cells"]:,} cells; {corpus_bench.machine()}')


def _add_corpus(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('corpus', metavar='CORPUS', help='folder of a corpus')


def _plan(parser: argparse.ArgumentParser) -> Runner:
  from genecompass_jax.scaling import plan_command

  plan_command.add_arguments(parser)

  def run(args: argparse.Namespace) -> int:
    from genecompass_jax import main

    return plan_command.run(args, main.read_config)

  return run


def _stats(args: argparse.Namespace) -> None:
  from genecompass_jax import corpus, doctor

  print('\n'.join(doctor.describe_corpus(corpus.Corpus.open(args.corpus))))


def _verify(args: argparse.Namespace) -> int:
  from genecompass_jax import corpus

  opened = corpus.Corpus.open(args.corpus)
  problems = opened.verify()
  print('\n'.join(problems) or f'{args.corpus}: every file is as written')
  if not opened.is_sealed:
    print(
      f'{args.corpus}/manifest.json has no hash of its own, as those of earlier '
      'versions: whether it was changed is not known'
    )
  return errors.EXIT_FAILED if problems else errors.EXIT_OK


def _doctor(parser: argparse.ArgumentParser) -> Runner:
  parser.add_argument(
    'folders',
    nargs='*',
    metavar='DIR',
    help='corpora, runs and models to check',
  )

  def run(args: argparse.Namespace) -> int:
    from genecompass_jax import doctor

    return doctor.run(args.folders)

  return run


def _demo(parser: argparse.ArgumentParser) -> Runner:
  parser.add_argument(
    '-o',
    '--output',
    default='demo_output',
    metavar='DIR',
    help='folder to write; one of an earlier demo is continued or replaced',
  )
  parser.add_argument(
    '--data',
    default='',
    metavar='CELLS.h5ad',
    help='your own cells (default: 700 blood cells that come with scanpy, and '
    'simulated cells); the options about columns, species and counts are for '
    'them',
  )
  parser.add_argument(
    '--steps',
    type=int,
    default=0,
    help='training steps; 0: 5,000, fewer for cells of many genes',
  )
  parser.add_argument('--seed', type=int, default=0, help='of everything')
  parser.add_argument(
    '--unit',
    default='',
    metavar='COLUMN',
    help='obs column of donors or batches to hold out whole (default: found '
    'by its name, such as donor_id)',
  )
  parser.add_argument(
    '--label',
    default='',
    metavar='COLUMN',
    help='obs column of cell types to score and draw (default: found by its '
    'name, such as cell_type)',
  )
  flags.add_cell_flags(parser)

  def run(args: argparse.Namespace) -> None:
    from genecompass_jax import demo

    demo.run(args)

  return run


if __name__ == '__main__':
  sys.exit(main())
