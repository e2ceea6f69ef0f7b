"""Several processes as one run: they join, wait, agree, and end together.

A run on several hosts, or on one host in several processes, is the same
program everywhere. Process 0 alone writes files; what it decides the others
are told. All of this goes through the coordination service of
`jax.distributed` and never through the devices, so that a wait for a host does
not stand in the way of a step.

**Ending together.** The first process that fails says so (`fail`), with its
exit code and one line, which it alone prints. The others, wherever they wait,
end with the same code. A process that dies without a word (kill -9, a lost
machine) is found out by its missing heartbeat, and the runtime aborts all
others with exit code 134; if process 0 dies, at once.
"""

import contextlib
import dataclasses
import glob
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from genecompass_jax import coordination, errors

HEARTBEAT_S = 100  # of jax.distributed: a silent process is given up after it
_FAILURE = 'genecompass/failure'
_LEFT = 'genecompass/left'
_COUNT = 'genecompass/count'
_DONE = {'code': None}
_GRACE_S = 10.0  # for the others to hear of a failure before process 0 goes
_LONG_MS = 7 * 24 * 3600 * 1000  # process 0 may count null models for hours


@dataclasses.dataclass(frozen=True)
class Job:
  """What a process has to know to join.

  Attributes:
    coordinator: HOST:PORT of process 0; empty where the cluster says it.
    num_processes: of the job; 0 likewise.
    process_id: of this one, from 0.
    found_by: what said so: 'flags', 'environment', 'SLURM', 'OpenMPI', 'TPU'.
  """

  coordinator: str = ''
  num_processes: int = 0
  process_id: int = 0
  found_by: str = 'flags'


def detect(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  environment: Mapping[str, str] = os.environ,
  tpu_devices: Callable[[], bool] | None = None,
) -> Job | None:
  """The job that this process is of; None where it is alone.

  Only variables that a launcher sets are looked at, and a TPU only where its
  device files are: a laptop is alone without asking anybody.

  Args:
    coordinator: HOST:PORT, by flag.
    num_processes: by flag.
    process_id: by flag.
    environment: of the process. Beside the flags it may give
      JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as
      `genecompass launch local` does; SLURM's srun and OpenMPI's mpirun have
      variables of their own.
    tpu_devices: whether this host has TPUs; by default looks at /dev.

  Raises:
    UserError: a part is missing, or cannot be.
  """
  given = (coordinator, num_processes, process_id)
  if any(value is not None for value in given):
    return _checked(
      Job(coordinator or '', num_processes or 0, process_id or 0),
      given,
      '--coordinator, --num_processes and --process_id',
    )
  names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  if environment.get('JAX_NUM_PROCESSES'):
    found = [environment.get(name) for name in names]
    try:
      numbers = [int(value or 0) for value in found[1:]]
    except ValueError:
      raise errors.UserError(
        f'{names[1]}={found[1]!r} and {names[2]}={found[2]!r} must be whole '
        'numbers'
      ) from None
    return _checked(
      Job(found[0] or '', *numbers, 'environment'), found, ', '.join(names)
    )
  for name in (names[0], names[2]):
    if environment.get(name):  # else each would train alone, in one workdir
      raise errors.UserError(
        f'{name} is set, but JAX_NUM_PROCESSES is not: set '
        f'{", ".join(names)}, or none of them'
      )
  # srun sets the first; the script of sbatch itself is one process.
  if _number(environment, 'SLURM_STEP_NUM_TASKS') > 1:
    return Job(found_by='SLURM')
  if _number(environment, 'OMPI_COMM_WORLD_SIZE') > 1:
    if 'OMPI_MCA_orte_hnp_uri' not in environment:
      raise errors.UserError(
        'this mpirun does not name its first host (OpenMPI 5 does not): give '
        '--coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE '
        '--process_id=$OMPI_COMM_WORLD_RANK'
      )
    return Job(found_by='OpenMPI')
  platforms = environment.get('JAX_PLATFORMS', '')
  may_be_tpu = (not platforms or 'tpu' in platforms) and (
    'TPU_SKIP_MDS_QUERY' not in environment
  )
  if may_be_tpu and (tpu_devices or _has_tpu_devices)():
    return Job(found_by='TPU')
  return None


def _checked(job: Job, given, names: str) -> Job:
  if None in given or '' in given:
    raise errors.UserError(f'a process that joins others needs {names}: all')
  if not 0 <= job.process_id < job.num_processes:
    raise errors.UserError(
      f'process {job.process_id} of {job.num_processes}: processes are '
      'numbered from 0'
    )
  host, _, port = job.coordinator.rpartition(':')
  if not host or not port.isdecimal() or int(port) > 65535:
    raise errors.UserError(
      f'coordinator {job.coordinator!r}: give HOST:PORT of process 0'
    )
  return job


def _number(environment: Mapping[str, str], name: str) -> int:
  text = environment.get(name, '')
  return int(text) if text.isdecimal() else 0


def _has_tpu_devices() -> bool:
  """Whether the device files of a TPU are here, and the library to use it."""
  if not (glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')):
    return False
  import importlib.util

  return importlib.util.find_spec('libtpu') is not None


class _Joined:
  """The job that this process has joined."""

  def __init__(self):
    self.count, self.index = 1, 0
    self.client: Any = None
    self.rounds = 0
    self.monitor: threading.Thread | None = None


_joined = _Joined()


def join(job: Job | None, heartbeat_s: int = HEARTBEAT_S) -> None:
  """Joins a job; does nothing where there is none.

  Args:
    job: as `detect` says.
    heartbeat_s: seconds of silence after which a process counts as lost.

  Raises:
    RetryableError: not all processes came.
    UserError: the cluster does not say what it should, or this version of JAX
      is not known to keep its client where it is looked for.
  """
  if job is None or _joined.client is not None:
    return
  import jax

  arguments = {}
  if job.num_processes:
    if job.process_id == 0:
      coordination.check_port(job.coordinator)
    else:
      coordination.await_first(job.coordinator)
    arguments = {
      'coordinator_address': job.coordinator,
      'num_processes': job.num_processes,
      'process_id': job.process_id,
      'cluster_detection_method': 'deactivate',
    }
  try:
    jax.distributed.initialize(
      **arguments, heartbeat_timeout_seconds=heartbeat_s
    )
  except (ValueError, KeyError) as error:
    if job.found_by == 'TPU':  # a TPU of one host needs nobody
      print(
        f'no other TPU host is known ({errors.first_line(error)}): alone',
        file=sys.stderr,
      )
      return
    raise errors.UserError(
      f'the processes of {job.found_by} cannot be joined '
      f'({errors.first_line(error)}): give --coordinator, --num_processes and '
      '--process_id'
    ) from error
  except RuntimeError as error:
    raise errors.RetryableError(
      f'the other processes were not found ({errors.first_line(error)[:200]})'
    ) from error
  state = coordination.state()
  if state is None:
    if jax.process_count() == 1:  # who is alone asks nobody
      return
    raise errors.UserError(
      f'jax {jax.__version__} keeps the client of its coordination service '
      'where it is not looked for, so that several processes cannot wait for '
      'each other: install jax 0.10.2, or train in one process'
    )
  _joined.client = state.client
  _joined.count, _joined.index = state.num_processes, state.process_id
  if _joined.count == 1:
    return
  _joined.monitor = threading.Thread(
    target=_await_failure, daemon=True, name='genecompass-failures'
  )
  _joined.monitor.start()
  if is_first():
    _joined.client.key_value_set(_COUNT, str(_joined.count))
    return
  told = int(_joined.client.blocking_key_value_get(_COUNT, _LONG_MS))
  if told != _joined.count:
    raise errors.UserError(
      f'this process was told of {_joined.count} processes, process 0 of '
      f'{told}: give all the same number'
    )


def count() -> int:
  """Processes of the run."""
  return _joined.count


def index() -> int:
  """Number of this process, from 0."""
  return _joined.index


def is_first() -> bool:
  """Whether this process writes files and metrics."""
  return _joined.index == 0


def barrier(name: str) -> None:
  """Waits until every process is here; all call the same, in one order."""
  if _joined.count > 1:
    _joined.rounds += 1
    _joined.client.wait_at_barrier(
      f'genecompass/{_joined.rounds}/{name}', _LONG_MS
    )


def from_first(make: Callable[[], Any]) -> Any:
  """What `make` returns on process 0, as JSON; the others wait for it."""
  if _joined.count == 1:
    return make()
  _joined.rounds += 1
  key = f'genecompass/{_joined.rounds}/first'
  if is_first():
    value = make()
    _joined.client.key_value_set(key, json.dumps(value))
    return json.loads(json.dumps(value))
  return json.loads(_joined.client.blocking_key_value_get(key, _LONG_MS))


def gather(value: Any, combine: Callable[[list[Any]], Any] = list) -> Any:
  """JSON values of all processes, in their order, or what is made of them.

  Args:
    value: of this process.
    combine: is called with all values on process 0 alone: its result goes to
      everyone, and it may be smaller.
  """
  if _joined.count == 1:
    return combine([value])
  folder = f'genecompass/{_joined.rounds + 1}/all/'
  _joined.client.key_value_set(
    f'{folder}{_joined.index:08d}', json.dumps(value)
  )
  barrier('all')

  def collect():  # one process asks for all: not everyone everyone
    found = dict(_joined.client.key_value_dir_get(folder))
    _joined.client.key_value_delete(folder)
    return combine([json.loads(found[key]) for key in sorted(found)])

  return from_first(collect)


def check_equal(what: str, value: Any) -> None:
  """Refuses processes that were given different things.

  Raises:
    UserError: on every process, naming the first that differs.
  """
  values = gather(value)
  for number, other in enumerate(values):
    if other != values[0]:
      raise errors.UserError(
        f'{what} of process {number} is not that of process 0: start all '
        'processes with the same command'
      )


def is_lost_peer(error: Exception) -> bool:
  """Whether an error of the runtime is that of a connection that broke."""
  text = str(error)
  return type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError') and (
    'Gloo' in text
    or 'NCCL' in text  # INTERNAL, whatever happened to the other side
    or text.startswith(('UNAVAILABLE', 'ABORTED', 'CANCELLED', 'DEADLINE'))
  )


def fail(code: int, message: str) -> NoReturn:
  """Ends this process, and with it all others.

  The first failure of a job counts: its line is printed, once, and its code
  is that of every process.
  """
  if _joined.count == 1:
    print(message, file=sys.stderr)
    sys.exit(code)
  mine = {'code': code, 'process': _joined.index}
  try:
    _joined.client.key_value_set(_FAILURE, json.dumps(mine))
    where = '' if is_first() else f'process {_joined.index}: '
    print(f'{where}{message}', file=sys.stderr)
  except Exception:  # there is one already; or nobody to ask any more
    with contextlib.suppress(Exception):
      text = _joined.client.blocking_key_value_get(_FAILURE, 1000)
      code = json.loads(text)['code'] or code
  _exit_together(code)


def leave() -> None:
  """Ends a job that is done: waits for all, and stops listening."""
  global _joined
  if _joined.count == 1:
    return
  barrier('done')
  if is_first():
    _joined.client.key_value_set(_FAILURE, json.dumps(_DONE))
  _joined.monitor.join()
  import jax

  jax.distributed.shutdown()
  _joined = _Joined()


def _await_failure() -> None:
  """Ends this process when another one has failed."""
  try:
    text = _joined.client.blocking_key_value_get(_FAILURE, _LONG_MS)
  except Exception:  # the service is gone: the runtime ends this process
    return
  failure = json.loads(text)
  if failure['code'] is not None and failure['process'] != _joined.index:
    _exit_together(failure['code'])


_exiting = threading.Lock()


def _exit_together(code: int) -> NoReturn:
  """Ends at once; process 0, which the others talk to, after them."""
  _exiting.acquire()  # never given back: one thread ends the process
  with contextlib.suppress(Exception):
    _joined.client.key_value_set(f'{_LEFT}/{_joined.index}', '')
    deadline = time.monotonic() + _GRACE_S
    while is_first() and time.monotonic() < deadline:
      if len(_joined.client.key_value_dir_get(_LEFT)) == _joined.count:
        break
      time.sleep(0.05)
  sys.stdout.flush()
  sys.stderr.flush()
  # Not by sys.exit: the runtime would wait for those that are gone.
  os._exit(code)
