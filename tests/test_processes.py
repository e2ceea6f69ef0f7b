"""Several processes as one run: joining, the same losses, ending together."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types

import jax
import numpy as np
import pytest

from genecompass_jax import (
  assets,
  checkpoint,
  coordination,
  corpus as corpus_lib,
  data,
  errors,
  knowledge,
  metrics,
  model,
  optimizer,
  processes,
)
from genecompass_jax.training import (
  opening,
  train_config,
)
from tests.test_train import ROOT, STEPS, lines


def free_port() -> int:
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


class Job:
  """Processes that train together, each with CPU devices of its own."""

  def __init__(self, commands, devices=2, heartbeat_s=10):
    flags = os.environ.get('XLA_FLAGS', '')
    flags += f' --xla_force_host_platform_device_count={devices}'
    join = (
      f'--coordinator=127.0.0.1:{free_port()}',
      f'--num_processes={len(commands)}',
      f'--heartbeat_s={heartbeat_s}',
    )
    self.processes = [
      subprocess.Popen(
        [*command, *join, f'--process_id={i}'],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'XLA_FLAGS': flags},
      )
      for i, command in enumerate(commands)
    ]

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    for process in self.processes:
      process.kill()
      process.communicate()

  def wait_for(self, path):
    while not path.exists():
      codes = [process.poll() for process in self.processes]
      assert codes == [None] * len(codes), self.end()
      time.sleep(0.02)

  def end(self) -> tuple[list[int], list[str]]:
    """Exit codes and what was said, when all have ended."""
    said = [p.communicate(timeout=300)[1] for p in self.processes]
    return [p.returncode for p in self.processes], said


# Joining


def test_a_process_knows_what_job_it_is_of():
  def detect(*given, tpu=False, **environment):
    return processes.detect(
      *given, environment=environment, tpu_devices=lambda: tpu
    )

  assert detect() is None
  assert detect(SLURM_PROCID='0', SLURM_NTASKS='4') is None  # sbatch's script
  assert detect(SLURM_STEP_NUM_TASKS='1') is None
  assert detect(SLURM_STEP_NUM_TASKS='4').found_by == 'SLURM'
  mpi = {'OMPI_COMM_WORLD_SIZE': '2'}
  assert detect(**mpi, OMPI_MCA_orte_hnp_uri='1.0;tcp://h:1').found_by == (
    'OpenMPI'
  )
  assert detect(tpu=True).found_by == 'TPU'
  assert detect(tpu=True, JAX_PLATFORMS='cpu') is None
  assert detect(tpu=True, TPU_SKIP_MDS_QUERY='1') is None
  job = detect('host:1', 2, 1, tpu=True, SLURM_STEP_NUM_TASKS='4')
  assert job == processes.Job('host:1', 2, 1, 'flags')
  environment = {
    'JAX_COORDINATOR_ADDRESS': '[::1]:9', 'JAX_NUM_PROCESSES': '3',
    'JAX_PROCESS_ID': '2',
  }  # fmt: skip
  job = detect(**environment)
  assert job == processes.Job('[::1]:9', 3, 2, 'environment')


@pytest.mark.parametrize(
  'given, environment, message',
  [
    (('host:1', 2, None), {}, 'needs --coordinator, --num_processes and'),
    ((None, 2, 0), {}, 'needs --coordinator'),
    (('host:1', 2, 2), {}, 'process 2 of 2'),
    (('host', 2, 0), {}, 'give HOST:PORT'),
    (('host:70000', 2, 0), {}, 'give HOST:PORT'),
    ((), {'JAX_NUM_PROCESSES': '2'}, 'needs JAX_COORDINATOR_ADDRESS'),
    ((), {'JAX_PROCESS_ID': '0'}, 'JAX_NUM_PROCESSES is not'),
    ((), {'JAX_NUM_PROCESSES': 'x'}, "JAX_NUM_PROCESSES='x'"),
    ((), {'OMPI_COMM_WORLD_SIZE': '2'}, 'does not name its first host'),
  ],
)
def test_half_a_job_is_one_line(given, environment, message):
  with pytest.raises(errors.UserError, match=message) as error:
    processes.detect(*given, environment=environment, tpu_devices=lambda: False)
  assert '\n' not in str(error.value)


def test_alone_nothing_is_waited_for():
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.is_first()
  processes.barrier('none')
  assert processes.gather({'a': 1}) == [{'a': 1}]
  assert processes.gather(3, sum) == 3
  assert processes.from_first(lambda: 3) == 3
  processes.check_equal('this', 1)
  processes.leave()


@pytest.mark.parametrize(
  'text, is_lost',
  [
    ('UNKNOWN: Gloo AllReduce failed: Connection closed by peer', True),
    ('INTERNAL: NCCL operation ncclAllReduce failed: remote process', True),
    ('UNAVAILABLE: Socket closed', True),
    ('INTERNAL: Autotuning failed', False),
    ('RESOURCE_EXHAUSTED: Out of memory', False),
  ],
)
def test_a_broken_connection_is_told_from_other_faults(text, is_lost):
  assert processes.is_lost_peer(jax.errors.JaxRuntimeError(text)) == is_lost
  assert not processes.is_lost_peer(RuntimeError(text))


def test_a_coordinator_that_cannot_be_is_one_line(monkeypatch):
  """Found before the runtime tries, which would crash or abort."""
  monkeypatch.setattr(coordination, '_JOIN_S', 0.0)
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{server.getsockname()[1]}'
    with pytest.raises(errors.RetryableError, match='has not answered at'):
      processes.join(processes.Job(address, 2, 1))
    server.listen()
    with pytest.raises(errors.RetryableError, match='is in use by another'):
      processes.join(processes.Job(address, 2, 0))


TOLD = textwrap.dedent("""
  import sys, time
  from genecompass_jax import errors, processes

  address, number, index = sys.argv[1:]
  try:
    processes.join(processes.Job(address, int(number), int(index)))
    time.sleep(300)  # until the other one ends it
  except errors.UserError as error:
    processes.fail(errors.EXIT_USAGE, str(error))
""")


def test_processes_that_were_told_different_numbers_end():
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{server.getsockname()[1]}'
  both = [
    subprocess.Popen(
      [sys.executable, '-c', TOLD, address, str(2 + index), str(index)],
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = [process.communicate(timeout=300)[1] for process in both]
  assert [process.returncode for process in both] == 2 * [errors.EXIT_USAGE]
  assert 'told of 3 processes, process 0 of 2' in said[1]


def test_a_jax_that_keeps_its_client_elsewhere_is_one_line(monkeypatch):
  from jax._src import distributed

  joined = []
  monkeypatch.setattr(coordination, 'await_first', lambda address: None)
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **kwargs: joined.append(kwargs)
  )
  job = processes.Job('host:1', 2, 1)
  for state in (
    types.SimpleNamespace(),
    types.SimpleNamespace(client=object(), num_processes=2, process_id=1),
    None,
  ):
    if state is None:
      monkeypatch.delattr(distributed, 'global_state')
    else:
      monkeypatch.setattr(distributed, 'global_state', state)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(errors.UserError, match=f'jax {jax.__version__}') as e:
      processes.join(job)
    assert '\n' not in str(e.value)
    monkeypatch.setattr(jax, 'process_count', lambda: 1)  # a TPU of one host
    processes.join(processes.Job(found_by='TPU'))
    assert processes.count() == 1
  assert len(joined) == 6


# Training


def test_processes_are_one_run_through_sigterm_and_another_number(
  train_command, trained, tmp_path
):
  """Two jobs of one run: 2 processes, then 4, two and two with the same rows."""
  workdir = tmp_path / 'run'
  command = train_command(workdir)
  with Job([command] * 2) as job:
    job.wait_for(workdir / 'checkpoints' / '5.sha256.json')
    job.processes[1].terminate()
    codes, said = job.end()
  assert codes == [errors.EXIT_RETRY] * 2, said
  stopped = checkpoint.latest_step(workdir / 'checkpoints')
  assert 5 < stopped < STEPS
  assert [
    line['step']
    for line in metrics.read(workdir)
    if line.get('event') == 'stopped'
  ] == [stopped]
  assert sum('stopped by a signal' in text for text in said) == 1

  command = train_command(workdir, {'mesh.tensor': 2})
  with Job([command] * 4, devices=1) as job:
    codes, said = job.end()
  assert codes == [0] * 4, said
  assert_close(lines(workdir), lines(trained))


def assert_close(ours, theirs):
  """The same lines, numbers within 1e-5, every step once."""
  assert [line['step'] for line in ours] == [line['step'] for line in theirs]
  for mine, other in zip(ours, theirs):
    assert mine.keys() == other.keys()
    for name in mine.keys() - {'by', 'grad_norm'}:
      np.testing.assert_allclose(mine[name], other[name], atol=1e-5, rtol=0)
    for group, values in mine.get('by', {}).items():
      for name, value in values.items():
        np.testing.assert_allclose(
          value, other['by'][group][name], atol=1e-5, rtol=0
        )


@pytest.mark.slow  # 30 s: 10 s of them until the runtime misses the killed one
def test_a_lost_process_ends_the_others(train_command, tmp_path):
  workdir = tmp_path / 'run'
  with Job([train_command(workdir)] * 2) as job:
    job.wait_for(workdir / 'checkpoints' / '5.sha256.json')
    job.processes[1].kill()
    codes, _ = job.end()
  # The other one is stopped by the runtime, or sees the connection break.
  assert codes[1] == -signal.SIGKILL
  assert codes[0] in (-signal.SIGABRT, errors.EXIT_RETRY)


# Mistakes


def test_a_mistake_of_one_process_ends_all_with_one_line(
  train_command, tiny_corpus, tmp_path
):
  good = train_command(tmp_path / 'run')
  nowhere = train_command(tmp_path / 'run', corpus=tmp_path / 'nowhere')
  other = train_command(tmp_path / 'run', {'seed': 3})
  for commands, message in (
    ([good, nowhere], 'nowhere'),
    ([good, other], 'the configuration of process 1 is not that of process 0'),
    ([nowhere, nowhere], 'nowhere'),
  ):
    with Job(commands, devices=1) as job:
      codes, said = job.end()
    assert codes == [errors.EXIT_USAGE] * 2, said
    text = [
      line
      for line in ''.join(said).splitlines()
      if line and not line.startswith('[Gloo]')
    ]
    assert len(text) == 1 and message in text[0], said
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_processes_compare_what_their_prior_tables_hold(
  tiny_corpus, monkeypatch
):
  """Each puts its own on its devices; their places may differ."""
  corpus = corpus_lib.Corpus.open(tiny_corpus)
  monkeypatch.setattr(processes, 'count', lambda: 2)

  def compared(value: float, place: str):
    found = {}
    monkeypatch.setattr(processes, 'check_equal', found.__setitem__)
    config = train_config.TrainConfig(
      corpus='here',
      model=model.ModelConfig(),
      optimizer=optimizer.OptimizerConfig(),
      data=data.DataConfig(),
      priors=(('grn', place),),
    )
    tables = {'grn': (('ENSG00000000003',), np.full((1, 2), value, np.float32))}
    aligned = knowledge.align(corpus.vocabulary, tables)
    opening.check_processes(config, corpus, assets.Assets(aligned))
    return found

  here, there, other = compared(1, 'a'), compared(1, 'b'), compared(2, 'a')
  assert here == there
  assert [what for what in here if here[what] != other[what]] == [
    'what the prior tables hold'
  ]
