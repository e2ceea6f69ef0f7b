"""Flags of the command line that say which cells are asked, by which group."""

import argparse
from typing import Any


def add_arguments(
  parser: argparse.ArgumentParser, max_cells: int, min_cells: int
) -> None:
  """Adds the flags of a `cell_choice.ChoiceConfig`, in a group of their own.

  Args:
    parser: of a command.
    max_cells: cells of a group, where no other number is given.
    min_cells: likewise, of a unit.
  """
  group = parser.add_argument_group('which cells, and what means are over')
  group.add_argument(
    '--group-by',
    '--group_by',
    default='',
    metavar='COLUMN',
    help='obs column whose groups are told apart; without it all cells are one',
  )
  group.add_argument(
    '--groups', default='', metavar='V1,V2', help='only these groups'
  )
  group.add_argument(
    '--donor-key',
    '--donor_key',
    default='',
    metavar='COLUMN',
    help='obs column of donors or samples, the units: means are over them, with '
    'an interval from six on; without it there is one unit, and no interval or p',
  )
  group.add_argument(
    '--max-cells',
    '--max_cells',
    type=int,
    default=max_cells,
    metavar='N',
    help=f'most cells of a group, drawn by the seed: {max_cells or "all"} if not '
    'given; 0: all',
  )
  group.add_argument(
    '--min-cells',
    '--min_cells',
    type=int,
    default=min_cells,
    metavar='N',
    help='fewest cells of a unit that counts',
  )
  group.add_argument('--seed', type=int, default=0, help='of all draws')


def fields(args: argparse.Namespace) -> dict[str, Any]:
  """Fields of a `ChoiceConfig` from these flags."""
  return {
    'group_by': args.group_by,
    'groups': listed(args.groups),
    'donor_key': args.donor_key,
    'max_cells': args.max_cells,
    'min_cells': args.min_cells,
    'seed': args.seed,
  }


def listed(text: str) -> tuple[str, ...]:
  """Words between commas."""
  return tuple(word.strip() for word in text.split(',') if word.strip())
