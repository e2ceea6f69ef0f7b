"""Flags of the command line that several commands share."""

import argparse

from genecompass_jax import gene_table


def add_cell_flags(parser: argparse._ActionsContainer) -> None:
  """Adds flags that say what the cells of a file are.

  Args:
    parser: a parser or a group of one.
  """
  parser.add_argument(
    '--species',
    default='auto',
    metavar='human|mouse|auto|obs:COLUMN',
    help='species of the cells; auto: by their gene identifiers',
  )
  parser.add_argument(
    '--ids-of',
    '--ids_of',
    default='',
    choices=gene_table.SPECIES,
    help='species of the gene identifiers, where it is not that of the cells',
  )
  parser.add_argument(
    '--layer',
    default='',
    help='X, raw or layers/NAME; none: what looks like counts',
  )
  parser.add_argument(
    '--allow-noninteger',
    '--allow_noninteger',
    action='store_true',
    help='take corrected counts as they are',
  )
