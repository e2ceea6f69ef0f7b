"""Plans: machines, what compilers say, rows, the command."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time

import pytest

from genecompass_jax import (
  chips,
  cli,
  data,
  errors,
  model,
  optimizer,
  sharding,
)
from genecompass_jax.scaling import (
  collectives,
  compilation,
  compile_worker,
  gpu_targets,
  plan,
  plan_table,
  topologies,
)
from genecompass_jax.training import train_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASE = f'--config={ROOT / "experiments/base.py"}'


has_cuda = topologies.has_cuda


@pytest.fixture(autouse=True)
def gpus_are_estimated(monkeypatch):
  """Whatever is installed here; what is about compiling for GPUs says so."""
  monkeypatch.setattr(topologies, 'has_cuda', lambda: False)


def tiny_config(**changes) -> train_config.TrainConfig:
  return train_config.TrainConfig(
    corpus='none',
    model=model.named_config(
      'tiny', vocabulary_size=300, max_genes=127, priors=(('a', 16),)
    ),
    optimizer=optimizer.OptimizerConfig(total_steps=10),
    data=data.DataConfig(rows_per_batch=4, streams=2, slots=128),
    encoding=dataclasses.replace(
      train_config.TrainConfig.encoding, max_genes=127
    ),
    **changes,
  )


def for_kernels(config: train_config.TrainConfig) -> train_config.TrainConfig:
  """The same with heads and a precision that fused attention takes."""
  wide = dataclasses.replace(
    config.model, width=128, num_heads=2, dtype='bfloat16'
  )
  return dataclasses.replace(config, model=wide)


@pytest.mark.parametrize(
  'text, devices, slices',
  [
    ('v5e:16x16', 256, 1),
    ('v4:4x4x8', 128, 1),
    ('2xv5p:4x4x4', 128, 2),
    ('v7x:2x2x1', 8, 1),  # two devices a chip
    ('H100:8', 8, 1),
    ('2xh100-pcie:4', 8, 2),
  ],
)
def test_topologies_are_read(text, devices, slices):
  found = topologies.parse(text)
  assert (found.num_devices, found.slices) == (devices, slices)
  assert found.is_tpu == text.lstrip('2x').startswith('v')


@pytest.mark.parametrize(
  'text, says',
  [
    ('v5e', 'CHIP:SHAPE'),
    ('v5e:16', '2 axes'),
    ('v4:4x4', '3 axes'),
    ('v9:4x4', "'v9' is not known"),
    ('h100:2x4', '1 axis'),
    ('0xv5e:4x4', '2 axes'),
  ],
)
def test_wrong_topologies_are_refused(text, says):
  with pytest.raises(errors.UserError, match=says):
    topologies.parse(text)


HLO = textwrap.dedent("""\
  HloModule jit_train_step, is_scheduled=true

  %add (a: f32[], b: f32[]) -> f32[] {
    ROOT %c = f32[] add(%a, %b)
  }

  %inner_cond (p: (s32[], f32[8])) -> pred[] {
    %n = s32[] constant(3)
    ROOT %lt = pred[] compare(%i, %n), direction=LT
  }

  %inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
    %kernel = f32[8] custom-call(%x), backend_config={"body":"
  "xprof":"{of its own lines
  }}, metadata={op_name="kernel"}
    %r = (f32[8]{0:T(128)}, bf16[2,4]{1,0}) all-reduce(%x), to_apply=%add
  }

  %outer_cond (p: (s32[], f32[8])) -> pred[] {
    ROOT %lt = pred[] compare(%i, %n), direction=LT
  }

  %outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
    %w = (s32[], f32[8]) while(%t), condition=%inner_cond, body=%inner
  }

  %wrapped (p: f32[2]) -> f32[16] {
    ROOT %g = f32[16]{0} all-gather(%p), replica_groups=[2,8]<=[16]
  }

  %little (p: f32[8]) -> f32[8] {
    ROOT %b = f32[2]{0} all-to-all(%p)
  }

  %much (p: f32[8]) -> f32[8] {
    ROOT %b = f32[32]{0} all-to-all(%p)
  }

  %begun (p: bf16[8]) -> bf16[16] {
    ROOT %p1 = bf16[16]{0} collective-permute(%p), channel_id=7, frontend_attributes={chain_id="2"}
  }

  %overlapped (p: bf16[8]) -> bf16[16] {
    ROOT %p2 = bf16[16]{0} collective-permute(%p), channel_id=7, frontend_attributes={chain_id="2"}
  }

  ENTRY %main (p: f32[8]) -> f32[8] {
    %k = f32[8] conditional(%i, %p, %p), branch_computations={%little, %much}
    %l = f32[8] conditional(%i, %p, %p), true_computation=%much, false_computation=%little
    %w = (s32[], f32[8]) while(%t), condition=%outer_cond, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
    %s = (f32[2], f32[16], u32[]) async-start(%p), calls=%wrapped
    %d = f32[16] async-done(%s), calls=%wrapped.2
    %q = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
    %m = f32[4]{0} reduce-scatter(%p), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}
    %h = (f32[4], f32[64]) all-gather-start(%p), dimensions={0}
    %z = f32[64] all-gather-done(%h)
    %j = ((f32[2]{0}, bf16[2,2]{1,0}), (f32[8]{0}, /*index=1*/bf16[4,4]{1,0})) all-gather-start(%p, %q), dimensions={0}
    %n = ((f32[8]{0}, f32[8,2]{1,0}), (f32[2]{0}, f32[2,2]{1,0})) reduce-scatter-start(%p, %q), replica_groups={{0,1,2,3}}
    %y = (bf16[8], bf16[16]) fusion(%p), kind=kCustom, calls=%begun
    %x = bf16[16] fusion(%y), kind=kOutput, calls=%overlapped
  }
  """)  # fmt: skip # noqa: E501


def test_collectives_are_counted_with_the_trips_of_their_loops():
  found = {t.kind: (t.count, t.bytes) for t in collectives.parse(HLO)}
  assert found == {
    'all-reduce': (15, 15 * (8 * 4 + 8 * 2)),
    'all-gather': (3, 16 * 4 + 64 * 4 + (8 * 4 + 16 * 2)),
    'reduce-scatter': (3, 4 * 4 * 4 + 4 * 4 * 2 + (8 + 16) * 4),
    'all-to-all': (2, 2 * 32 * 4),  # of two branches one runs
    'collective-permute': (1, 16 * 2),  # one, overlapped with two fusions
  }


def test_what_a_compiler_lacks_is_read():
  message = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in '
    'memory space hbm. Used 21.50G of 15.75G hbm. Exceeded hbm capacity by '
    '5.75G.\n\n  Largest program allocations in hbm:\n\n  1. Size: 2.25G\n     '
    'Operator: op_name="jit(train_step)/while/body/dot" source_file="a.py"\n'
    '     Shape: bf16[12,8,2048,3072]{3,2,1,0:T(8,128)(2,1)}\n     Unpadded '
    'size: 2.25G\n  2. Size: 512.0M\n     Shape: f32[8,4]{1,0}\n'
  )
  found = compile_worker.out_of_memory(message)
  assert found['used'] == int(21.5 * 2**30)
  assert found['limit'] == int(15.75 * 2**30)
  assert [a['size'] for a in found['largest']] == ['2.25G', '512.0M']
  assert found['largest'][0]['op'] == 'jit(train_step)/while/body/dot'
  short = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (16.32G) exceeds available HBM (15.75G).'
  )
  found = compile_worker.out_of_memory(short)
  assert found['used'] == int(16.32 * 2**30)
  assert found['limit'] == int(15.75 * 2**30)
  assert compile_worker.out_of_memory('INVALID_ARGUMENT: no') is None


@pytest.mark.parametrize('most', [1, 5, 16, 40, 700])
@pytest.mark.parametrize('start', [1, 12, 64])
def test_the_search_finds_the_largest_size(most, start):
  kept, a_row = 2.0e9, 1.0e8
  limit = kept + a_row * most

  def used_by(rows):  # not quite linear
    return kept + a_row * rows + 1e5 * (rows % 7)

  used = {start: used_by(start)}
  fits = {start: used[start] <= limit}
  for _ in range(20):
    size = plan._next_size(used, fits, kept, limit, 1)
    if size is None:
      break
    assert size not in fits
    used[size] = used_by(size)
    fits[size] = used[size] <= limit
  best = max((s for s in fits if fits[s]), default=0)
  wanted = [s for s in (*plan.SIZES, start) if used_by(s) <= limit]
  assert best == max(wanted, default=0)
  assert len(fits) <= 6  # of 18: a few compilations


def answered(monkeypatch, result):
  monkeypatch.setattr(compilation, 'compile_apart', lambda *_: dict(result))


def test_too_little_memory_is_a_row_with_advice(monkeypatch):
  answered(
    monkeypatch,
    {
      'status': 'out of memory',
      'used': 20 * 2**30,
      'limit': 16 * 2**30,
      'largest': [{'shape': 'f32[8,4]{1,0}', 'size': '2G', 'op': ''}],
    },
  )
  question = plan.Question(search=2)
  row = plan.make_row('x', tiny_config(), topologies.parse('v5e:2x2'), question)
  assert row.status == plan.NO_MEMORY
  assert row.memory['total'] == 20 * 2**30
  assert row.largest == 0
  assert 'remat=attention' in row.advice and 'microbatches=2' in row.advice
  text = plan_table.table([row], question)
  assert '20.0 of 16' in text and 'f32[8,4] 2G' in text
  assert row.step_s is None and row.days is None


def test_a_row_that_fits_has_time_and_cost_by_assumption(monkeypatch):
  memory = {'arguments': 2**30, 'temporaries': 2**30, 'total': 2**31}
  answered(
    monkeypatch,
    {
      'status': 'compiled',
      'memory': memory,
      'compile_s': 3.0,
      'traffic': [{'kind': 'all-reduce', 'count': 3, 'bytes': 5 * 2**20}],
      'flops': {'compiler': 101.0, 'by_hand': 100.0},
    },
  )
  question = plan.Question(
    cells=1000, mean_genes=62, price=2.0, utilisation=0.5, search=0
  )
  machine = topologies.parse('v5e:2x2')
  row = plan.make_row('x', tiny_config(), machine, question)
  assert row.status == plan.FITS
  assert row.rows == 4 and row.device_slots == 128
  assert row.step_s == pytest.approx(row.step_flops / (4 * 197e12 * 0.5))
  cells_a_row = 0.98 * 128 / 63
  assert row.cells_per_s == pytest.approx(4 * cells_a_row / row.step_s)
  assert row.days == pytest.approx(1000 / row.cells_per_s / 86_400)
  assert row.cost == pytest.approx(row.days * 24 * 4 * 2.0)
  assert row.counted == pytest.approx(1.01)
  assert row.network_s == pytest.approx(2 * 5 * 2**20 / 200e9)
  text = plan_table.table([row], question)
  assert 'ASSUMED' in text and '50%' in text and 'reduce 5.00 MiB' in text
  without = plan_table.table([row], dataclasses.replace(question, price=None))
  assert 'give --price' in without


def test_rows_that_do_not_divide_are_said():
  question = plan.Question(search=0)
  machine = topologies.parse('h100:6')
  row = plan.make_row('x', tiny_config(), machine, question)
  assert row.rows == 6 and '4 rows do not divide by 6' in row.notes[0]
  shared = tiny_config(mesh=sharding.MeshConfig(fsdp=4))
  row = plan.make_row('x', shared, machine, question)
  assert row.status == plan.REFUSED
  assert 'does not divide 6 devices' in row.message
  uneven = tiny_config(mesh=sharding.MeshConfig(data=5))
  row = plan.make_row('x', uneven, machine, question)
  assert row.status == plan.REFUSED
  assert 'mesh.data=5' in row.message and 'not 6' in row.message


@pytest.mark.parametrize(
  'script, status, says',
  [
    ('import os; os.abort()', plan.FAILED, 'crashed'),
    ('raise ValueError("so it is")', plan.FAILED, 'so it is'),
    ('import time; time.sleep(60)', plan.TOO_SLOW, 'did not compile in 2 s'),
  ],
)
def test_a_worker_that_ends_badly_is_a_row(monkeypatch, script, status, says):
  monkeypatch.setattr(compilation, 'WORKER', ('-c', script))
  found = compilation.compile_apart({}, topologies.parse('v5e:2x2'), 2)
  assert found['status'] == status and says in found['message']


def test_the_step_of_this_host_is_compiled(monkeypatch):
  # Two groups that share weights: 15 s.
  flag = '--xla_force_host_platform_device_count=4'
  monkeypatch.setenv('XLA_FLAGS', flag)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  config = tiny_config(mesh=sharding.MeshConfig(fsdp=2))
  question = plan.Question(search=0, time_limit=300)
  row = plan.make_row('x', config, topologies.parse('here'), question)
  assert row.status == plan.FITS, row.message
  assert row.devices == 4 and row.mesh == {'data': 2, 'fsdp': 2}
  held = row.memory['arguments']
  whole = 3 * 4 * row.parameters
  assert whole / 2 < held < whole  # most of the state is shared by two
  assert row.memory['total'] > held
  sent = {t['kind']: t['bytes'] for t in row.traffic}
  # Every gradient is summed over devices once, and weights are gathered.
  assert sent['all-reduce'] + sent.get('reduce-scatter', 0) > row.parameters
  assert sent['all-gather'] > row.parameters
  assert row.counted == pytest.approx(1.0, abs=0.4)  # 64 wide: much else
  assert row.step_s is None  # no peak is known, and none is made up


def test_the_command_estimates_gpus(tmp_path, capsys):
  code = cli.main(
    [
      *('plan', BASE, '--config.data.rows_per_batch=64', '--topology'),
      *('h100:8,a100-40:8', '--cells', '1e6', '--price', '3'),
      *('--json', str(tmp_path / 'p.json'), '-o', str(tmp_path / 'p.png')),
    ]
  )
  out = capsys.readouterr().out
  assert code == 0
  assert out.count('estimated, not compiled') == 2
  assert 'cost at 3 a chip' in out and '50,558 tokens' in out
  found = json.loads((tmp_path / 'p.json').read_text())
  assert [row['rows'] for row in found['rows']] == [64, 64]
  assert found['question']['cells'] == 1_000_000
  a, b = (row['step_s'] for row in found['rows'])
  assert b / a == pytest.approx(989.4 / 312)
  assert (tmp_path / 'p.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  'words, says',
  [
    (['--topology', 'v5e:16x16'], '--config'),
    ([BASE], '--topology'),
    ([BASE, '--topology', 'tpu'], 'CHIP:SHAPE'),
    ([BASE, '--topology', 'h100:8', '--utilisation', '40'], 'a share'),
    ([BASE, '--topology', 'h100:8', '--cells', '0'], 'at least 1'),
    (['--config=nowhere.py', '--topology', 'h100:8'], 'no such file'),
    ([BASE, '--config.model.wide=3', '--topology', 'h100:8'], 'model.wide'),
    ([BASE, '--topology', 'h100:8', '-o', 'p.nothing'], '.png'),
    ([BASE, '--topology', 'h100:8', '-o', '.'], 'no name of a file'),
    ([BASE, '--topology', 'h100:8', '--json', '.'], 'no name of a file'),
    ([BASE, '--topology', 'h100:8', '--json', 'http://a/b'], 'read only'),
    ([BASE, '--topology', ','], 'is empty'),
    ([BASE, '--topology', f'h100:{"9" * 5000}'], 'no machine'),
    ([BASE, '--topology', 'h100:8', '--cells', 'inf'], 'at most'),
    ([BASE, '--topology', 'h100:8', '--price', 'inf'], '--price'),
    ([BASE, '--topology', 'h100:8', '--vocabulary-size', '9' * 20], 'at most'),
    ([BASE, '--topology', 'h100:8', '--config.priors=3'], 'pairs of a name'),
    ([BASE, '--topology', 'h100:8', f'--config.seed={"9" * 20}'], '64 bits'),
  ],
)
def test_wrong_use_is_one_line(words, says, capsys):
  try:
    code = cli.main(['plan', *words])
  except SystemExit as stop:
    code = stop.code
  err = capsys.readouterr().err.strip()
  assert code == 2
  assert says in err.splitlines()[-1]
  assert 'Traceback' not in err


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
  for name in (topologies.LIBTPU, 'TPU_LIBRARY_PATH'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert cli.main(['plan', BASE, '--topology', 'h100:8,v5e:4x4']) == 2
  said = capsys.readouterr().err
  assert 'pip install --no-deps' in said
  assert f'{topologies.LIBTPU}=' in said
  monkeypatch.setenv(topologies.LIBTPU, 'nowhere.so')
  assert cli.main(['plan', BASE, '--topology', 'v5e:4x4']) == 2
  assert 'nowhere.so, which does not exist' in capsys.readouterr().err


def test_kernels_that_take_whole_rows_are_said_before_they_run():
  config = tiny_config(mesh=sharding.MeshConfig(context=2))
  bfloat16 = dataclasses.replace(config.model, dtype='bfloat16')
  config = dataclasses.replace(config, model=bfloat16)
  row = plan.make_row('x', config, topologies.parse('h100:8'), plan.Question())
  assert row.status == plan.REFUSED and 'mesh.context=1' in row.message


def test_estimates_share_what_a_run_shares():
  def plan_on(machine, **axes):
    config = tiny_config(mesh=sharding.MeshConfig(**axes))
    question = plan.Question(price=1.0, mean_genes=62)
    return plan.make_row('x', config, topologies.parse(machine), question)

  alone = plan_on('h100:1').memory['state']
  assert alone == pytest.approx(16 * plan_on('h100:1').parameters, abs=100)
  # Tables of tokens lie whole on devices that share heads.
  tables = 16 * 300 * 64
  heads = plan_on('h100:2', tensor=2).memory['state']
  assert (alone + tables) / 2 < heads < alone
  assert plan_on('h100:2', fsdp=2).memory['state'] < 0.6 * alone
  for axes, words in (
    ({'tensor': 8}, 'model.num_heads=4'),
    ({'data': 2, 'fsdp': 2}, 'mesh.data=2 x 2'),
  ):
    row = plan_on('h100:8', **axes)
    assert row.status == plan.REFUSED and words in row.message


def test_a_chip_of_two_devices_is_paid_for_once(monkeypatch):
  answered(monkeypatch, {'status': 'compiled', 'memory': {'total': 2**30}})
  question = plan.Question(price=1.0, search=0)
  row = plan.make_row(
    'x', tiny_config(), topologies.parse('v7x:2x2x1'), question
  )
  assert row.devices == 8
  assert row.cost == pytest.approx(row.days * 24 * 4)


def has_libtpu() -> bool:
  if os.environ.get(topologies.LIBTPU):
    return True
  return importlib.util.find_spec('libtpu') is not None


@pytest.mark.slow  # a minute on two quiet cores
@pytest.mark.skipif(not has_libtpu(), reason='needs the extra plan')
def test_a_step_is_compiled_for_a_tpu_that_is_not_there():
  config = for_kernels(tiny_config())
  question = plan.Question(search=0, time_limit=900)
  row = plan.make_row('x', config, topologies.parse('v5e:2x2'), question)
  assert row.status == plan.FITS, row.message
  assert row.attention == 'splash'
  assert 0 < row.memory['total'] < row.limit
  assert sum(t['bytes'] for t in row.traffic) > 2 * row.parameters
  assert row.step_s > 0


@pytest.mark.slow  # half a minute on two quiet cores
@pytest.mark.skipif(not has_cuda(), reason='needs the extra plan-gpu')
def test_a_step_is_compiled_for_gpus_that_are_not_there(monkeypatch):
  monkeypatch.setattr(topologies, 'has_cuda', has_cuda)
  config = for_kernels(tiny_config(mesh=sharding.MeshConfig(fsdp=2)))
  question = plan.Question(search=0, time_limit=900)
  row = plan.make_row('x', config, topologies.parse('h100:4'), question)
  assert row.status == plan.FITS, row.message
  assert row.attention == 'pallas'
  held = row.memory['arguments']
  whole = 3 * 4 * row.parameters
  assert whole / 2 < held < whole < row.limit
  sent = {t['kind']: t['bytes'] for t in row.traffic}
  assert sent['all-reduce'] + sent['reduce-scatter'] > 2 * row.parameters
  assert sent['all-gather'] > row.parameters
  assert row.counted is not None and row.step_s > 0


def test_gpus_that_the_compiler_knows_are_compiled_for(monkeypatch, tmp_path):
  asked = []

  def compile_apart(request, topology, time_limit):
    asked.append(compilation._environment(topology)['PYTHONPATH'])
    return {'status': 'compiled', 'memory': {'total': 70 * 10**9}}

  monkeypatch.setattr(compilation, 'compile_apart', compile_apart)
  monkeypatch.setattr(topologies, 'has_cuda', has_cuda)
  monkeypatch.setenv(topologies.CUDA, str(tmp_path))
  question = plan.Question(search=0)

  def row_of(machine):
    return plan.make_row(
      'x', tiny_config(), topologies.parse(machine), question
    )

  with pytest.raises(errors.UserError, match=f'{tmp_path}, where no plugin'):
    row_of('h100:4')
  (tmp_path / 'jax_cuda12_plugin').mkdir()
  row = row_of('h100:4')
  assert row.status == plan.FITS and row.step_s > 0
  assert row.limit < 0.96 * chips.by_name('h100').memory
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' in row.notes[0]  # 70 GB of 80
  assert not row_of('h200:4').notes
  assert all(str(tmp_path) in path.split(os.pathsep) for path in asked)
  assert row_of('l4:4').status == plan.ESTIMATED  # nobody describes it
  row_of('v5e:2x2')
  assert len(asked) == 3 and str(tmp_path) not in asked[2]


@pytest.mark.parametrize('name', gpu_targets.NAMES)
def test_gpus_are_described_as_what_they_are(name):
  chip = chips.by_name(name)
  text = gpu_targets.describe(chip)
  told = dict(re.findall(r'(\w+): (\S+)', text))
  assert int(told['device_memory_size']) == chip.memory
  assert chips.by_kind(re.search(r' name: "(.*)"', text).group(1)) == chip
  assert text.count('{') == text.count('}')
  pinned = (ROOT / 'constraints.txt').read_text()
  for library, field in (
    ('cudnn', 'dnn_version_info'), ('cuda-nvcc', 'runtime_version'),
  ):  # fmt: skip
    pin = re.search(rf'nvidia-{library}-cu12==(\d+)\.(\d+)', pinned)
    found = re.search(field + r' { major: (\d+) minor: (\d+) }', text)
    assert found.groups() == pin.groups()
  # The peak of the data sheet, from what is told here: products of bfloat16 of
  # a multiprocessor and clock are a power of two, which boost blurs.
  a_clock = chip.bfloat16 / int(told['core_count']) / 1e9
  a_clock /= float(told['clock_rate_ghz'])
  major = int(re.search(r'cuda_compute_capability {\s+major: (\d+)', text)[1])
  known = {8: 2048, 9: 4096, 10: 8192}[major]
  assert a_clock == pytest.approx(known, rel=0.12)


@pytest.mark.parametrize(
  'text, says',
  [
    ('return 3', 'must return'),
    ('raise RuntimeError("boom")', 'boom'),
    ('return C(corpus="", model=3, optimizer={}, data={})', 'a group of'),
    ('import sys; sys.exit(0)', 'ends the program (sys.exit(0))'),
    ('return C(corpus=config_dict.required_placeholder(str))', 'placeholder'),
  ],
)
def test_a_config_that_cannot_be_used_is_one_line(text, says, tmp_path, capsys):
  (tmp_path / 'bad.py').write_text(
    'from ml_collections import config_dict\n'
    'C = lambda **values: config_dict.ConfigDict(values)\n'
    f'def get_config():\n  {text}\n'
  )
  words = [f'--config={tmp_path / "bad.py"}', '--topology', 'h100:8']
  test_wrong_use_is_one_line(words, says, capsys)


def test_a_killed_plan_leaves_no_compiler(tmp_path, monkeypatch):
  (tmp_path / 'worker.py').write_text(
    'import os, pathlib, time\n'
    f'pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))\n'
    'time.sleep(500)\n'
  )
  script = (
    'from genecompass_jax.scaling import compilation, topologies\n'
    f'compilation.WORKER = ({str(tmp_path / "worker.py")!r},)\n'
    'compilation.compile_apart({}, topologies.parse("v5e:4x4"), 600)\n'
  )
  root = pathlib.Path(__file__).resolve().parents[1]
  process = subprocess.Popen([sys.executable, '-c', script], cwd=root)
  pid = tmp_path / 'pid'
  while not pid.exists() or not pid.read_text():
    assert process.poll() is None
    time.sleep(0.05)
  process.kill()
  process.wait()
  status = pathlib.Path('/proc', pid.read_text(), 'status')
  for _ in range(100):
    if not status.exists() or 'State:\tZ' in status.read_text():
      return
    time.sleep(0.1)
  raise AssertionError('the compiler lives')
