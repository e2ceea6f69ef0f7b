"""What `genecompass prep` does besides making a corpus of files of cells.

`prep` takes files directly, so its steps are no subcommands of argparse's
until one is named: `genecompass prep download ...`.
"""

import argparse
import importlib
from collections.abc import Callable

# Step -> the module with its `add_arguments` and `run`, and its help.
STEPS = {
  'download': (
    'fetching.download_command',
    'official files: annotation, networks, ...',
  ),
  'genes': ('genes.genes_command', 'a gene table of any release or species'),
}


def add_step(
  step: str, parser: argparse.ArgumentParser
) -> Callable[[argparse.Namespace], int | None]:
  """Makes the parser one of a step; returns what runs it."""
  name, help_text = STEPS[step]
  module = importlib.import_module(f'genecompass_jax.prepare.{name}')
  commands = parser.add_subparsers(metavar='STEP', required=True)
  own = commands.add_parser(step, help=help_text)
  module.add_arguments(own)
  return module.run


def epilog(prog: str) -> str:
  """Where the steps are named in the help of `prep`."""
  lines = (f'{prog} {name}: {text}' for name, (_, text) in STEPS.items())
  return f'Other steps, each with its own --help: {"; ".join(lines)}.'
