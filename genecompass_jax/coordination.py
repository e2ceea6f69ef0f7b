"""The coordination service of `jax.distributed`: its port, and its client.

Process 0 serves it and all talk through it. The runtime aborts, or crashes,
where it cannot be reached: so it is looked at before.
"""

import errno
import socket
import time
from typing import Any

from genecompass_jax import errors

_JOIN_S = 300.0  # to wait for process 0, as jax.distributed does

# What is asked of the client.
_CALLS = (
  *('wait_at_barrier', 'key_value_set', 'key_value_delete'),
  *('blocking_key_value_get', 'key_value_dir_get'),
)


def state() -> Any:
  """What `jax.distributed` knows of the job; None where it is not found.

  The client has no public name (jax 0.10.2), and what has one
  (jax.experimental.multihost_utils) talks through the devices: a wait would
  stand behind the steps that are under way. So it is looked at before it is
  used: another version may keep it elsewhere.
  """
  try:
    from jax._src import distributed
  except ImportError:
    return None
  found = getattr(distributed, 'global_state', None)
  client = getattr(found, 'client', None)
  known = all(hasattr(client, name) for name in _CALLS) and all(
    type(getattr(found, name, None)) is int
    for name in ('num_processes', 'process_id')
  )
  return found if known else None


def check_port(address: str) -> None:
  """Looks whether process 0 can serve the others, before the runtime tries.

  Where another one listens, jaxlib 0.10 crashes; if that is a run like this
  one, which lets others listen beside it, the processes of both are mixed.

  Args:
    address: HOST:PORT of process 0, which this one is.

  Raises:
    RetryableError: the port is in use.
    UserError: it may not be opened.
  """
  port = int(address.rpartition(':')[2])
  for family, host in ((socket.AF_INET6, '::'), (socket.AF_INET, '')):
    try:
      with socket.socket(family, socket.SOCK_STREAM) as server:
        # Connections of a run that has just ended are no reason.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
    except OSError as error:
      if error.errno == errno.EADDRINUSE:
        raise errors.RetryableError(
          f'port {port} of the coordinator {address} is in use by another '
          'process here: end it, or choose another port for all processes'
        ) from error
      if error.errno == errno.EACCES:
        raise errors.UserError(
          f'port {port} of the coordinator {address} may not be opened: '
          'choose one above 1023 for all processes'
        ) from error


def await_first(address: str) -> None:
  """Waits until process 0 listens: the runtime would abort with its stacks.

  Args:
    address: HOST:PORT of process 0.

  Raises:
    RetryableError: it has not answered for 300 s.
  """
  host, _, port = address.rpartition(':')
  deadline = time.monotonic() + _JOIN_S
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 10.0).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise errors.RetryableError(
          f'process 0 has not answered at {address} for {_JOIN_S:.0f} s '
          f'({error}): see that it was started, and that the address is its own'
        ) from error
      time.sleep(0.2)
