"""Starts a run in several processes on this host, and again when it stops.

The small supervisor: what a cluster's launcher does for many hosts, for one.
It starts processes that join each other, passes signals on, and starts *all* of
them again when one was lost or asks for it; a run cannot go on with some.

Nothing survives it: the processes end with it, even if it is killed itself.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from genecompass_jax import children, errors, paths, workdir as workdir_lib

MODULE = 'genecompass_jax.main'
# Between starts that came no further; doubled each time up to the second.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
# Processes end together by themselves; who does not in time is killed.
_GRACE_S = 30.0
# After SIGTERM: the time that a step and a checkpoint may take.
_GRACE_STOP_S = 600.0
_CHECK_S = 0.05
# To read what ended processes have left in their pipes.
_GRACE_OUTPUT_S = 5.0
_LONGEST_LINE = 1 << 16  # bytes; longer ones are broken, not remembered
# More would take the memory of a host long before they are ready to train.
_MOST_A_CORE = 16
_DEVICES = '--xla_force_host_platform_device_count'


def add_arguments(
  parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], int]:
  """Adds the flags of `genecompass launch`; returns what runs it."""
  parser.add_argument(
    'where', choices=['local'], help='where: processes on this host'
  )
  parser.add_argument(
    '-n', '--processes', type=int, default=1, metavar='P', help='processes'
  )
  parser.add_argument(
    '--devices-per-process',
    type=int,
    default=0,
    metavar='D',
    help='CPU devices that each makes of its cores; 0: as JAX finds them',
  )
  parser.add_argument(
    '--max-restarts',
    type=int,
    default=10,
    metavar='R',
    help='starts in a row that bring no new checkpoint, before it gives up',
  )
  parser.add_argument(
    '--flag',
    dest='flags',
    action='append',
    default=[],
    metavar='FLAG',
    help=f'a flag of python -m {MODULE}; all that is behind -- is taken so',
  )
  parser.epilog = (
    'example: genecompass launch local -n 2 -- --config=experiments/tiny.py '
    '--workdir=RUN --config.corpus=CORPUS'
  )
  return run


def run(arguments: argparse.Namespace) -> int:
  """Runs the command; returns its exit code.

  Raises:
    UserError: a number is wrong, or no run is named.
  """
  for name, low in (
    ('processes', 1), ('devices_per_process', 0), ('max_restarts', 0),
  ):  # fmt: skip
    if getattr(arguments, name) < low:
      flag = name.replace('_', '-')
      raise errors.UserError(
        f'--{flag}={getattr(arguments, name)} must be at least {low}'
      )
  most = _MOST_A_CORE * (os.cpu_count() or 1)
  if arguments.processes > most:
    raise errors.UserError(
      f'--processes={arguments.processes}: this host has {os.cpu_count()} '
      f'cores; give at most {most}, or start some on other hosts'
    )
  flags = arguments.flags
  found = re.search(r'(?:^|\0)--?workdir[=\0]([^\0]*)', '\0'.join(flags))
  if not found:
    raise errors.UserError(
      'no run is named: give the flags of the training behind --, such as -- '
      '--config=experiments/tiny.py --workdir=RUN'
    )
  supervisor = Supervisor(
    [sys.executable, '-m', MODULE, *flags],
    os.path.expanduser(found.group(1)),
    num_processes=arguments.processes,
    devices=arguments.devices_per_process,
    max_restarts=arguments.max_restarts,
  )
  return supervisor.run()


class Supervisor:
  """Starts the processes of a run, again and again until it is done."""

  def __init__(
    self,
    command: Sequence[str],
    workdir: str,
    *,
    num_processes: int,
    devices: int = 0,
    max_restarts: int = 10,
  ):
    """A supervisor of a command.

    Args:
      command: of every process; they find each other by their environment.
      workdir: whose checkpoints tell progress.
      num_processes: to start.
      devices: CPU devices of each; 0: as JAX finds them.
      max_restarts: in a row without a new checkpoint.
    """
    self._command, self._workdir = list(command), workdir
    self._num, self._devices = num_processes, devices
    self._max_restarts = max_restarts
    self._asked: int | None = None  # the signal that asked to stop
    self._passed_on = False
    self._seen: list[str] = []  # checkpoints, at the last look

  def run(self) -> int:
    """Runs to the end.

    Returns:
      0 when all are done, 1 or 2 where one failed so, 42 where a signal has
      stopped them or they came no further.
    """
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      before[number] = signal.signal(number, self._stop)
    if before[signal.SIGHUP] == signal.SIG_IGN:  # as nohup wants it
      signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
      return self._run()
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _run(self) -> int:
    useless = 0
    while True:
      progress = self._progress()
      codes = self._attempt()
      code = verdict(codes)
      if code != errors.EXIT_RETRY or self._asked is not None:
        return code
      useless = 0 if self._progress() != progress else useless + 1
      shown = ', '.join(str(c) for c in codes)
      if useless > self._max_restarts:
        self._say(
          f'ended with {shown}; {self._max_restarts} restarts brought no new '
          'checkpoint: giving up'
        )
        return code
      wait = 0.0
      if useless:
        wait = min(_FIRST_WAIT_S * 2 ** (useless - 1), _LONGEST_WAIT_S)
      self._say(f'ended with {shown}; starting all again in {wait:g} s')
      deadline = time.monotonic() + wait
      while time.monotonic() < deadline:
        time.sleep(_CHECK_S)
        if self._asked is not None:
          return errors.EXIT_RETRY

  def _attempt(self) -> list[int]:
    """Starts all processes once; returns their exit codes when all ended."""
    processes = []
    try:
      port = _free_port()
      self._passed_on = False
      # One by one: what is started is ended, whatever comes in between.
      processes.extend(self._start(i, port) for i in range(self._num))
      readers = [
        threading.Thread(target=_copy, args=(i, stream, out), daemon=True)
        for i, process in enumerate(processes)
        for stream, out in (
          (process.stdout, sys.stdout.buffer),
          (process.stderr, sys.stderr.buffer),
        )
      ]
      for reader in readers:
        reader.start()
      self._wait(processes)
      _kill(processes)  # and what they have left behind
      deadline = time.monotonic() + _GRACE_OUTPUT_S
      for reader in readers:
        reader.join(max(deadline - time.monotonic(), 0.0))
    finally:
      _kill(processes)
    return [_code(process.returncode) for process in processes]

  def _start(self, index: int, port: int) -> subprocess.Popen:
    environment = dict(os.environ)
    for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'):
      environment.pop(f'JAX_{name}', None)  # of another job
    if self._num > 1:
      environment |= {
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': str(self._num),
        'JAX_PROCESS_ID': str(index),
      }
    if self._devices:
      flags = environment.get('XLA_FLAGS', '')
      kept = [f for f in flags.split() if not f.startswith(_DEVICES)]
      flags = ' '.join([*kept, f'{_DEVICES}={self._devices}'])
      environment |= {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(
      children.bound(self._command),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=environment,
      # Ctrl-C comes to this process alone, which passes on what is polite.
      start_new_session=True,
    )

  def _wait(self, processes: Sequence[subprocess.Popen]) -> None:
    """Until all have ended; after the first fault the others have a while."""
    deadline = None
    while True:
      codes = [process.poll() for process in processes]
      if None not in codes:
        return
      now = time.monotonic()
      if self._asked is not None and not self._passed_on:
        self._passed_on = True
        deadline = now + _GRACE_STOP_S
        for process in processes:  # all join in one stop: to each its own
          if process.poll() is None:
            process.send_signal(signal.SIGTERM)
      failed = [code for code in codes if code]
      if failed:
        # One that was lost leaves others in the middle of a step: they know
        # nothing, and wait for their heartbeat in vain.
        lost = any(_code(code) >= 127 for code in failed)
        limit = now if lost else now + _GRACE_S
        deadline = limit if deadline is None else min(deadline, limit)
      if deadline is not None and now >= deadline:
        return
      time.sleep(_CHECK_S)

  def _stop(self, number: int, frame: Any) -> None:
    del frame
    if self._asked is not None and number == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice: now
    self._asked = number

  def _progress(self) -> list[str]:
    """Sealed checkpoints: another list is progress."""
    folder = paths.join(self._workdir, workdir_lib.CHECKPOINTS)
    try:
      names = paths.listdir(folder) if paths.exists(folder) else []
    except (errors.RetryableError, OSError) as error:
      # A store that is away for a while must not end the supervisor, too.
      self._say(errors.first_line(error))
      return self._seen
    self._seen = [name for name in names if name.endswith('.sha256.json')]
    return self._seen

  def _say(self, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens: no reason to end
      print(f'launch: {text}', file=sys.stderr, flush=True)


def verdict(codes: Sequence[int]) -> int:
  """One exit code of those of all processes.

  A mistake or a failure is final; what a lost process makes of the others is
  not, nor is a wish to be started again.
  """
  for code in (errors.EXIT_USAGE, errors.EXIT_FAILED, errors.EXIT_INTERRUPTED):
    if code in codes:
      return code
  if any(code == errors.EXIT_RETRY or code >= 127 for code in codes):
    return errors.EXIT_RETRY
  return max(codes)


def _code(returncode: int) -> int:
  """An exit code as a shell tells it: 128 and the number of a signal."""
  return 128 - returncode if returncode < 0 else returncode


def _kill(processes: Sequence[subprocess.Popen]) -> None:
  """Ends all, the first one last: the others would tell that it is gone."""
  for process in reversed(processes):
    children.kill(process)


def _free_port() -> int:
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


def _copy(index: int, stream: Any, out: Any) -> None:
  """Passes lines on, with the number of their process before them.

  It goes on reading when nobody takes them any more (`| head`, a closed
  terminal, a full disk): a process whose lines nobody reads would wait.
  """
  while line := stream.readline(_LONGEST_LINE):
    end = b'' if line.endswith(b'\n') else b'\n'
    with contextlib.suppress(OSError):
      _write(out.fileno(), b'[%d] ' % index + line + end)


def _write(file: int, data: bytes) -> None:
  """Writes without a buffer, which would be tried again at the end."""
  while data:
    data = data[os.write(file, data) :]
