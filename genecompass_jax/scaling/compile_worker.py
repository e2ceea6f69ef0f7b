"""Compiles one training step and writes what it takes: a process of its own.

  python -m genecompass_jax.scaling.compile_worker REQUEST.json RESULT.json

A compiler that crashes, runs out of host memory or never ends takes this
process with it and nothing else. The result is written as soon as the step is
compiled, and again with what else could be read from the program.
"""

import dataclasses
import json
import os
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from genecompass_jax import (
  config_values,
  errors,
  flops,
  knowledge as knowledge_lib,
  sharding,
)
from genecompass_jax.scaling import collectives, topologies
from genecompass_jax.training import (
  train_config,
  train_step,
)

COMPILED, NO_MEMORY, FAILED, REFUSED = (
  *('compiled', 'out of memory', 'failed', 'refused'),
)
# Both forms are met in libtpu 0.0.42 and earlier.
_USED = re.compile(
  r'(?:Used |\()([\d.]+)([KMGT]?)(?: of |\) exceeds available HBM \()'
  r'([\d.]+)([KMGT]?)(?: hbm|\))'
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_LARGE = re.compile(
  r'\d+\. Size: ([\d.]+[KMGT]?)\s+(?:Operator: ([^\n]*)\s+)?Shape: (\S+)'
)


def abstract_knowledge(
  config: train_config.TrainConfig, num_rows: int
) -> knowledge_lib.Knowledge:
  """Shapes of prior tables, in the precision that a run reads them in.

  Args:
    config: names and widths are those of `config.model.priors`.
    num_rows: rows of every table.
  """
  shape = jax.ShapeDtypeStruct
  model = config.model
  size = (model.num_species, model.vocabulary_size)
  return knowledge_lib.Knowledge(
    row_SV=shape(size, jnp.int32),
    tables={
      name: shape((num_rows, width), jnp.dtype(model.dtype))
      for name, width in model.priors
    },
    has_vector={
      name: shape((num_rows,), jnp.bool_) for name, _ in model.priors
    },
  )


def memory(compiled: jax.stages.Compiled, platform: str) -> dict[str, int]:
  """Bytes of device memory by use, and their `total`.

  Results that take the place of arguments (donated state) count once. The
  compiler's peak is what it holds against the limit of a TPU (tried with
  libtpu 0.0.42: the figure of its refusal); its sum of temporaries is up to a
  sixth more for a training step, which compiles all the same. On a GPU a run
  asks for the sum, in one piece, and holds it for all of the step.
  """
  sizes = compiled.memory_analysis()
  parts = {
    'arguments': sizes.argument_size_in_bytes,
    'temporaries': sizes.temp_size_in_bytes,
    'results': sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    'program': sizes.generated_code_size_in_bytes,
  }
  peak = getattr(sizes, 'peak_memory_in_bytes', 0)
  if peak and platform != 'gpu':
    held = parts['arguments'] + parts['results']
    parts['temporaries'] = max(0, peak - held)
  return {**parts, 'total': sum(parts.values())}


def out_of_memory(message: str) -> dict[str, Any] | None:
  """What a compiler says that found too little memory; None for other errors.

  Returns:
    used and limit in bytes where they are named, and the `largest` arrays.
  """
  if 'RESOURCE_EXHAUSTED' not in message and 'Ran out of memory' not in message:
    return None
  found: dict[str, Any] = {'used': None, 'limit': None, 'largest': []}
  match = _USED.search(message)
  if match is not None:
    used, used_unit, limit, limit_unit = match.groups()
    found['used'] = int(float(used) * _UNITS[used_unit])
    found['limit'] = int(float(limit) * _UNITS[limit_unit])
  for size, operator, shape in _LARGE.findall(message)[:8]:
    name = re.search(r'op_name="([^"]*)"', operator or '')
    found['largest'].append(
      {'size': size, 'shape': shape, 'op': name.group(1) if name else ''}
    )
  return found


def count_by_compiler(
  config: train_config.TrainConfig, slots: int, num_rows: int
) -> dict[str, float]:
  """FLOPs of a row in a model of one layer: the compiler's count and ours.

  Loops hide their trips from the compiler's count, and kernels their work:
  both are left out, and a row is cut to 2,304 slots, so that the head need not
  go through it in pieces. Scores of attention are computed twice there, and counted
  twice here. The compiler counts element-wise work besides.

  Returns:
    `compiler` and `by_hand`.
  """
  slots = min(slots, 2304)
  model = dataclasses.replace(
    config.model,
    num_layers=1,
    attention='xla',
    remat='none',
    hidden_dropout=0.0,
    attention_dropout=0.0,
  )
  data = dataclasses.replace(config.data, rows_per_batch=1, streams=1)
  config = dataclasses.replace(
    config, model=model, data=data, microbatches=1, id_bias='zeros'
  )
  params = jax.eval_shape(lambda: train_step.init_state(config)).params
  lowered = jax.jit(
    lambda params, batch, tables: train_step.gradients(
      *(params, batch, tables, config, None, jax.random.key(0))
    )
  ).lower(
    params,
    train_step.batch_shapes(config, slots),
    abstract_knowledge(config, num_rows),
  )
  work = flops.padded_work(1, slots, data.num_masked(slots))
  by_hand = sum(flops.training(model, work).values())
  by_hand += 2.0 * model.width * work.attended
  return {
    'compiler': float(lowered.cost_analysis()['flops']),
    'by_hand': by_hand,
  }


def run(request: dict[str, Any], save: Any) -> None:
  """Does what is asked, and saves results as they come.

  Args:
    request: `config` (a TrainConfig as JSON), `topology`, `slots`, `num_rows`
      of prior tables, `counts` (whether the compiler counts FLOPs too).
    save: takes the result so far.
  """
  config = config_values.to_dataclass(
    train_config.TrainConfig, request['config']
  )
  slots, num_rows = request['slots'], request['num_rows']
  result: dict[str, Any] = {'jax': jax.__version__}
  try:
    topology = topologies.parse(request['topology'])
    devices = topologies.devices(topology)
    result |= {
      'device_kind': devices[0].device_kind,
      'platform': devices[0].platform,
      'num_devices': len(devices),
    }
    if topology.is_here:
      stats = devices[0].memory_stats() or {}  # none on a CPU
      result['limit'] = stats.get('bytes_limit')
    mesh = sharding.make_mesh(config.mesh, devices)
    result['mesh'] = {k: v for k, v in mesh.shape.items() if v > 1}
    start = time.monotonic()
    tables = abstract_knowledge(config, num_rows)
    lowered = train_step.lower(config, mesh, slots, tables)
    attention = train_step.for_devices(config, mesh).model.attention
    result |= {
      'attention': attention,
      'lower_s': time.monotonic() - start,
    }
  except errors.UserError as error:
    save({**result, 'status': REFUSED, 'message': str(error)})
    return
  except RuntimeError as error:  # a part of the compiler is not there: cuDNN
    message = f'{errors.first_line(error)} (docs/plans.md says what it needs)'
    save({**result, 'status': FAILED, 'message': message})
    return
  if request.get('counts'):
    result['flops'] = count_by_compiler(config, slots, num_rows)
    save({**result, 'status': FAILED, 'message': 'the compiler crashed'})
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    result['compile_s'] = time.monotonic() - start
    lack = out_of_memory(str(error))
    if lack is not None:
      save({**result, 'status': NO_MEMORY, **lack})
    else:
      message = ' '.join(str(error).split())[:400]
      save({**result, 'status': FAILED, 'message': message})
    return
  result |= {
    'status': COMPILED,
    'compile_s': time.monotonic() - start,
    'memory': memory(compiled, devices[0].platform),
  }
  save(result)
  # Printing a program crashes some versions of the compiler: last.
  traffic = collectives.parse(compiled.as_text())
  save({**result, 'traffic': [dataclasses.asdict(t) for t in traffic]})


def main(argv: list[str]) -> None:
  """Reads the request and writes the result."""
  request, result = argv

  def save(values: dict[str, Any]) -> None:
    with open(f'{result}.part', 'w', encoding='utf-8') as file:
      json.dump(values, file)
    os.replace(f'{result}.part', result)

  with open(request, encoding='utf-8') as file:
    run(json.load(file), save)


if __name__ == '__main__':
  main(sys.argv[1:])
