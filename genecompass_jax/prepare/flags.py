"""Flags of the command line that several commands share."""

import argparse
from typing import Any

from genecompass_jax.prepare.building import engines


def add_cell_flags(parser: argparse._ActionsContainer) -> None:
  """Adds flags that say what the cells of a file are.

  Args:
    parser: a parser or a group of one.
  """
  parser.add_argument(
    '--species',
    default='auto',
    metavar='human|mouse|...|auto|obs:COLUMN',
    help='species of the cells; auto: by their gene identifiers',
  )
  parser.add_argument(
    '--ids-of',
    '--ids_of',
    default='',
    metavar='SPECIES',
    help='species of the gene identifiers, where it is not that of the cells',
  )
  parser.add_argument(
    '--layer',
    default='',
    help='X, raw or layers/NAME; without it the one that looks like counts',
  )
  parser.add_argument(
    '--allow-noninteger',
    '--allow_noninteger',
    action='store_true',
    help='take corrected counts as they are',
  )


def add_work_flags(parser: argparse.ArgumentParser) -> None:
  """Adds flags that say who does the work of a build, and where."""
  work = parser.add_argument_group(
    'work (the corpus does not depend on it; a build that was killed is '
    'continued by the same command)'
  )
  work.add_argument(
    '--jobs',
    type=int,
    default=0,
    help='processes; 0: one a core, one for little work',
  )
  work.add_argument(
    '--engine',
    default='pool',
    choices=engines.ENGINES,
    help='pool: processes here; beam: Apache Beam, on any of its runners',
  )
  work.add_argument(
    '--beam-options',
    '--beam_options',
    default='',
    metavar='"--runner=FlinkRunner ..."',
    help='flags of Beam; workers must see the files under the same names',
  )
  work.add_argument(
    '--scratch',
    default='',
    metavar='DIR',
    help='folder for the build, some 10 bytes an entry; without it beside the '
    'corpus',
  )


def work_fields(args: argparse.Namespace) -> dict[str, Any]:
  """Fields of a `PrepareConfig` from the flags of `add_work_flags`."""
  return {
    'jobs': args.jobs,
    'engine': args.engine,
    'beam_options': tuple(args.beam_options.split()),
    'scratch': args.scratch,
  }
