"""Readers of cells: one file for each format, one interface for all.

A reader opens a place and gives its labels and its matrices (`opened.Opened`).
Here are their flags, and no imports that take time; `formats` finds the reader.
"""

import argparse
from typing import Any


def add_arguments(group: argparse._ActionsContainer) -> None:
  """Adds the flags that formats need; `config_fields` reads them."""
  group.add_argument(
    '--obs-table',
    '--obs_table',
    default='',
    metavar='FILE',
    help='csv or tsv with obs columns; its first column names the cells',
  )
  group.add_argument(
    '--genome',
    default='',
    help='10x: the genome to read where a file holds several',
  )
  group.add_argument(
    '--obs-filter',
    '--obs_filter',
    default='',
    metavar='CONDITION',
    help='SOMA and Census: such as "tissue_general == \'lung\'"',
  )
  group.add_argument(
    '--tokens',
    default='',
    metavar='FILE',
    help='released cells: their dictionary of tokens (pickle, json, tsv)',
  )
  group.add_argument(
    '--medians',
    default='',
    metavar='FILE,...',
    help='released cells: the medians that gave their values; counts come '
    'back exactly, without them quotients are kept',
  )


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
  """Fields of a `SourceConfig` from the flags of `add_arguments`."""
  names = ('obs_table', 'genome', 'obs_filter', 'tokens', 'medians')
  return {name: getattr(args, name) for name in names}
