"""Compiling apart: one process a step, with a time limit."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from genecompass_jax import children, errors
from genecompass_jax.scaling import compile_worker, topologies

TOO_SLOW = 'did not compile in time'
_COUNT_S = 300.0  # for a process to say what devices are here
WORKER = ('-m', 'genecompass_jax.scaling.compile_worker')


def count_here() -> int:
  """Devices of this host, counted in a process of its own.

  Raises:
    UserError: JAX finds none, or looks for them without end.
  """
  try:
    found = subprocess.run(
      [sys.executable, '-c', 'import jax; print(jax.device_count())'],
      env=_environment(topologies.parse(topologies.HERE)),
      capture_output=True,
      text=True,
      check=False,
      timeout=_COUNT_S,
    )
  except subprocess.TimeoutExpired:
    raise errors.UserError(
      f'--topology here: JAX finds no device in {_COUNT_S:g} s; look what holds '
      'them, or set JAX_PLATFORMS=cpu'
    ) from None
  if found.returncode:
    line = found.stderr.strip().splitlines()[-1:] or ['no word why']
    raise errors.UserError(f'--topology here: JAX finds no device ({line[0]})')
  return int(found.stdout.split()[-1])


def compile_apart(
  request: dict[str, Any], topology: topologies.Topology, time_limit: float
) -> dict[str, Any]:
  """Runs `compile_worker` in a process of its own.

  Returns:
    Its result; `status` is TOO_SLOW after `time_limit` seconds, and FAILED,
    with the exit code, where the compiler took the process with it.
  """
  with tempfile.TemporaryDirectory(prefix='genecompass_plan_') as folder:
    question, answer = (pathlib.Path(folder) / n for n in ('ask', 'answer'))
    question.write_text(json.dumps(request), encoding='utf-8')
    with open(pathlib.Path(folder) / 'log', 'w+', encoding='utf-8') as log:
      process = subprocess.Popen(
        children.bound([sys.executable, *WORKER, question, answer]),
        stdout=log,
        stderr=log,
        env=_environment(topology),
        start_new_session=True,
      )
      too_slow = False
      try:
        code = process.wait(time_limit)
      except subprocess.TimeoutExpired:
        too_slow, code = True, None
      finally:
        children.kill(process)
      log.seek(0)
      lines = [line for line in log.read().splitlines() if line.strip()]
    result = None
    if answer.exists():
      result = json.loads(answer.read_text(encoding='utf-8'))
  if result is not None and result['status'] != compile_worker.FAILED:
    return result
  if too_slow:
    text = f'did not compile in {time_limit:.0f} s'
    return {**(result or {}), 'status': TOO_SLOW, 'message': text}
  if result is not None and code == 0:
    return result
  if code < 0 or code > 127:
    text = f'the compiler crashed (exit code {code})'
  else:
    text = lines[-1][:300] if lines else f'exit code {code}'
  return {**(result or {}), 'status': compile_worker.FAILED, 'message': text}


# What a process needs to compile for devices that are not there: JAX itself
# stays on the CPU, libtpu asks no server what machine this is, and several
# processes may hold it.
_ABSENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def _environment(topology: topologies.Topology) -> dict[str, str]:
  given = dict(os.environ)
  # The package is found from any folder, the plugin for CUDA where it is used.
  root = str(pathlib.Path(__file__).resolve().parents[2])
  cuda = given.get(topologies.CUDA, '') if topology.is_described_gpu else ''
  given['PYTHONPATH'] = os.pathsep.join(
    p for p in (root, cuda, given.get('PYTHONPATH', '')) if p
  )
  if topology.is_here:
    return given
  if given.get(topologies.LIBTPU):
    given['TPU_LIBRARY_PATH'] = given[topologies.LIBTPU]
  return {**given, **_ABSENT}
