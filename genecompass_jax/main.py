"""python -m genecompass_jax.main --config=FILE.py[:variant] --workdir=DIR.

Trains, or resumes what is in DIR. Any field of the configuration is a flag,
such as --config.optimizer.total_steps=200; `TrainConfig` in
training/train_config.py says what the fields are. Exit codes: 0 done, 1
permanent failure, 2 wrong usage, 42 stopped and to be started again.
"""

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging as absl_logging
from ml_collections import config_dict, config_flags

from genecompass_jax import config_values, errors, paths, processes, progress

# Any field of TrainConfig can be set, whether or not the file names it.
_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Configuration: experiments/FILE.py[:variant].',
  lock_config=False,
  accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder or URL of the run; a run that is there goes on.'
)
flags.mark_flags_as_required(['config', 'workdir'])
# A run of several processes; found out on TPU pods, under srun and mpirun.
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where several train together.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes train together.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0.'
)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_s',
  processes.HEARTBEAT_S,
  'Seconds of silence after which a process counts as lost.',
  lower_bound=2,
)

# Corpora that a run makes for itself, of config.simulated_cells cells.
SIMULATED = 'simulated'
INDEPENDENT = 'independent'


def run(config: Mapping[str, Any], workdir: str) -> None:
  """Trains a run from a mapping of configuration values.

  Args:
    config: fields of `TrainConfig`, and `simulated_cells`, the number of cells
      of a corpus called 'simulated' or 'independent'.
    workdir: folder or URL of the run; a run that is there goes on.

  Raises:
    UserError: a value is wrong, there is no corpus, or `workdir` is of another
      run.
    RetryableError: it was stopped; the same call goes on.
  """
  # Imported late: wrong flags must be reported in a moment, not after JAX.
  from genecompass_jax import train
  from genecompass_jax.training import train_config

  paths.path(workdir)  # refuses URLs of other kinds
  values = dict(config)
  atlas = values.pop('simulated_cells', 0)
  name = values.get('corpus')
  if name:  # a misspelled field is told before a corpus is made
    config_values.to_dataclass(train_config.TrainConfig, values)
  if name in (SIMULATED, INDEPENDENT):
    if not atlas:
      raise errors.UserError(
        f'config.corpus is {name} but config.simulated_cells is 0'
      )
    from genecompass_jax.prepare import simulated

    make = simulated.corpus
    if name == INDEPENDENT:
      make = simulated.independent_corpus
    values['corpus'] = processes.from_first(
      lambda: make(workdir, num_cells=atlas)
    )
  elif not name:
    raise errors.UserError(
      'no corpus: give --config.corpus=DIR; genecompass prep makes one from '
      'h5ad files, or try the :smoke variant, which simulates cells'
    )
  train.train_and_evaluate(
    config_values.to_dataclass(train_config.TrainConfig, values), workdir
  )


def read_config(arguments: list[str]) -> dict[str, Any]:
  """The values of a configuration file, as the flags of a run give them.

  Args:
    arguments: '--config=FILE.py[:variant]', '--config.KEY=VALUE', ...

  Raises:
    SystemExit: as in a run: one line, code 2.
  """
  argv = ['genecompass', *arguments]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    'config',
    None,
    'Configuration: experiments/FILE.py[:variant].',
    flag_values=values,
    lock_config=False,
    accept_new_attributes=True,
    sys_argv=argv,
  )
  _parse(argv, values)
  return _values(config)


def _values(config: flags.FlagHolder) -> dict[str, Any]:
  try:
    return dict(config.value.items())
  except OSError as error:  # the parser defers it to the first use
    _exit(errors.EXIT_USAGE, ' '.join(str(error).split()))
  except AttributeError:
    _exit(errors.EXIT_USAGE, '--config: get_config must return a ConfigDict')
  except config_dict.RequiredValueError:
    _exit(
      errors.EXIT_USAGE,
      '--config: the file has a required_placeholder without a value; give it '
      'as --config.KEY=VALUE',
    )


def main(argv: list[str]) -> None:
  """The command: flags in, exit code out."""
  if len(argv) > 1:
    _exit(errors.EXIT_USAGE, f'unknown arguments: {" ".join(argv[1:])}')
  absl_logging.use_absl_handler()
  logging.getLogger().setLevel(logging.INFO)
  # Orbax tells each write, and of one that fails in every thread, with
  # tracebacks; it raises too, and that is told in one line.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = _told_once
  logging.getLogger('jax').setLevel(logging.WARNING)
  try:
    job = processes.detect(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    processes.join(job, _HEARTBEAT.value)
    if not processes.is_first():  # one tells, all warn
      progress.is_shown = False
      logging.getLogger().setLevel(logging.WARNING)
  except errors.UserError as error:
    _exit(errors.EXIT_USAGE, str(error))
  except errors.RetryableError as error:
    _exit(errors.EXIT_RETRY, str(error))
  if not _WORKDIR.value:
    _exit(errors.EXIT_USAGE, '--workdir is empty; name a folder')
  config = _values(_CONFIG)
  interrupted = 'stopped before training; nothing is lost'
  try:
    run(config, os.path.expanduser(_WORKDIR.value))
    interrupted = 'the run is done; nothing is lost'
    processes.leave()
  except errors.UserError as error:
    _exit(errors.EXIT_USAGE, str(error))
  except errors.RetryableError as error:
    _exit(errors.EXIT_RETRY, str(error))
  except FloatingPointError as error:
    _exit(errors.EXIT_FAILED, str(error))
  except KeyboardInterrupt as stop:
    line = str(stop) or interrupted
    if processes.count() > 1:
      _exit(errors.EXIT_INTERRUPTED, line)
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: an interpreter that ends while XLA compiles may crash.
    os._exit(errors.EXIT_INTERRUPTED)
  except ImportError as error:  # a package for some kind of URL
    _exit(errors.EXIT_USAGE, str(error))
  except OSError as error:  # a full disk or a store out of reach may pass
    if errors.is_mistake(error):
      _exit(errors.EXIT_USAGE, str(error))
    _exit(
      errors.EXIT_RETRY,
      f'{_WORKDIR.value}: {error}; when that is mended (a full disk, a file '
      'system that is away), start the same command again',
    )
  except Exception as error:
    if processes.count() == 1:
      raise
    _fail_unexpectedly(error)


def _told_once(found: Any) -> None:
  """Leaves out what TensorStore's threads print behind a write that failed."""
  if str(found.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(found)


def _fail_unexpectedly(error: Exception) -> None:
  """Ends all processes after what nobody thought of, or a lost connection."""
  line = errors.first_line(error)[:200]
  if processes.is_lost_peer(error):
    _exit(errors.EXIT_RETRY, f'another process was lost ({line})')
  traceback.print_exc()
  _exit(errors.EXIT_FAILED, f'{type(error).__name__}: {line}')


_HELP = ('help', '?', 'helpshort', 'helpfull', 'helpxml')  # flags of absl


def _parse(
  argv: list[str], values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Parses flags; what is wrong is one line and exit code 2."""
  for name, after in zip(argv, [*argv[1:], '']):
    flag, _, value = name.lstrip('-').partition('=')
    file = (value or after).partition(':')[0]
    if name.startswith('-') and flag == 'config' and not os.path.exists(file):
      _exit(
        errors.EXIT_USAGE,
        f'--config={file}: no such file here; the configs are in the folder '
        'experiments of the repository',
      )
  try:
    return values(argv)
  except SystemExit as end:
    if any(arg.lstrip('-') in _HELP for arg in argv[1:]):  # absl exits with 1
      sys.exit(errors.EXIT_OK)
    _exit(
      errors.EXIT_USAGE,
      f'--config: the file ends the program (sys.exit({end.code!r})); it must '
      'only define get_config',
    )
  except flags.Error as error:
    # An error in the file comes with its traceback: the last line says it.
    _exit(errors.EXIT_USAGE, str(error).strip().splitlines()[-1])
  except KeyError as error:
    _exit(
      errors.EXIT_USAGE,
      f'--config.KEY=value: the config file has no group {error.args[0]}; name '
      'it there, be it empty: config.GROUP = {}',
    )
  except Exception as error:  # whatever the config file itself raises
    lines = str(error).strip().splitlines() or ['']
    _exit(
      errors.EXIT_USAGE,
      f'--config: the file cannot be used, {type(error).__name__}: {lines[-1]}',
    )


def _exit(code: int, message: str) -> None:
  processes.fail(code, message)


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=_parse)
  except SystemExit as end:
    if end.code == errors.EXIT_RETRY:
      # All is saved or cannot be. At once: threads that wrote to a full disk
      # print tracebacks while the interpreter ends.
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(errors.EXIT_RETRY)
    raise
