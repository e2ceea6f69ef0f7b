"""python -m genecompass_jax.main --config=FILE.py[:variant] --workdir=DIR.

Trains, or resumes what is in DIR. Exit codes: 0 done, 1 permanent failure, 2
wrong usage, 42 stopped and to be started again.
"""

import dataclasses
import logging
import os
import sys
import typing
from typing import Any

from absl import app, flags, logging as absl_logging
from ml_collections import config_flags

from genecompass_jax import errors

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Configuration: experiments/FILE.py[:variant].'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder or URL of the run; a run that is there goes on.'
)
flags.mark_flags_as_required(['config', 'workdir'])

SIMULATED = 'simulated'


def to_dataclass(cls: type, values: Any, where: str = 'config') -> Any:
  """Builds a (nested) frozen dataclass from a mapping.

  Raises:
    UserError: a key is not a field of the dataclass, or one is missing.
  """
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  arguments = {}
  for key, value in values.items():
    if key not in fields:
      raise errors.UserError(
        f'{where}.{key} is not known; fields are {", ".join(fields)}'
      )
    if dataclasses.is_dataclass(hints[key]):
      value = to_dataclass(hints[key], value, f'{where}.{key}')
    elif isinstance(value, list | tuple):
      value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    arguments[key] = value
  for name, field in fields.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and name not in arguments:
      raise errors.UserError(f'{where}.{name} is missing')
  return cls(**arguments)


def run(config: Any, workdir: str) -> None:
  """Trains a run from a mapping of configuration values."""
  # Imported late: wrong flags must be reported in a moment, not after JAX.
  from genecompass_jax import train

  values = {key: config[key] for key in config}
  atlas = values.pop('simulated_cells', 0)
  if values.get('corpus') == SIMULATED:
    if not atlas:
      raise errors.UserError(
        'config.corpus is simulated but config.simulated_cells is 0'
      )
    from genecompass_jax.prepare import simulated

    values['corpus'] = simulated.corpus(workdir, num_cells=atlas)
  elif not values.get('corpus'):
    raise errors.UserError(
      'no corpus: give --config.corpus=DIR; genecompass prep makes one from '
      'h5ad files, or try the :smoke variant, which simulates cells'
    )
  train.train_and_evaluate(to_dataclass(train.TrainConfig, values), workdir)


def main(argv: list[str]) -> None:
  """The command: flags in, exit code out."""
  if len(argv) > 1:
    _exit(errors.EXIT_USAGE, f'unknown arguments: {" ".join(argv[1:])}')
  absl_logging.use_absl_handler()
  logging.getLogger().setLevel(logging.INFO)
  logging.getLogger('absl').setLevel(logging.WARNING)  # Orbax tells each write
  logging.getLogger('jax').setLevel(logging.WARNING)
  try:
    run(_CONFIG.value, os.path.expanduser(_WORKDIR.value))
  except errors.UserError as error:
    _exit(errors.EXIT_USAGE, str(error))
  except errors.RetryableError as error:
    _exit(errors.EXIT_RETRY, str(error))
  except FloatingPointError as error:
    _exit(errors.EXIT_FAILED, str(error))


def _exit(code: int, message: str) -> None:
  print(message, file=sys.stderr)
  sys.exit(code)


if __name__ == '__main__':
  app.run(main)
