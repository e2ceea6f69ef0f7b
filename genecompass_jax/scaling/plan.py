"""One row of a plan: a configuration on a machine, compiled or estimated.

What the compiler says (memory, collectives) is called compiled, arithmetic is
called estimated, and time is an assumption about utilisation. Nothing here was
measured. The compiler's own guess of time counts bodies of loops once and
kernels not at all: it is never read.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from genecompass_jax import (
  attention,
  errors,
  flops,
  model,
  packing,
)
from genecompass_jax.scaling import (
  compilation,
  compile_worker,
  estimates,
  topologies,
)
from genecompass_jax.training import (
  train_config,
  train_step,
)

# States of a row.
FITS, ESTIMATED = 'fits', 'estimated, not compiled'
NO_MEMORY, REFUSED = compile_worker.NO_MEMORY, compile_worker.REFUSED
TOO_SLOW, FAILED = compilation.TOO_SLOW, compile_worker.FAILED
# Rows of a group that are worth trying, in the search for the largest.
SIZES = (
  *(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
)
GIB = 2**30
DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked of every configuration and machine.

  Attributes:
    cells: of the corpus: a run over all of them once.
    mean_genes: genes of a cell, on average, after the cut to max_genes.
    utilisation: share of the peak that the products of padded slots reach; an
      assumption.
    price: of a chip for an hour, in any currency; None if not given.
    time_limit: seconds that one compilation may take.
    search: compilations to find the largest batch with; 0 for none.
    rows: rows of a group to plan with; 0 for those of the configuration.
    prior_rows: rows of prior tables; 0 for one a token.
  """

  cells: int = 100_000_000
  mean_genes: float = 1200.0
  utilisation: float = 0.4
  price: float | None = None
  time_limit: float = 600.0
  search: int = 3
  rows: int = 0
  prior_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
  """A configuration on a machine.

  Attributes:
    config: its name.
    topology: as it was asked for.
    status: one of this module's.
    devices: JAX devices.
    mesh: axis -> devices, axes of one device left out.
    rows: of the global batch.
    group_rows: of a group of devices that shares a row (mesh.context x
      mesh.tensor; one device where both are 1), all microbatches together.
    slots: of a row.
    device_slots: slots of a batch by device.
    parameters: of the model.
    memory: bytes on a device by use, and `total`; compiled or estimated.
    limit: bytes that a program may take there; None if not known.
    largest: largest group_rows that was found to fit; None if not looked for,
      0 if none.
    step_flops: of a step on all devices, by hand.
    counted: the compiler's FLOPs over ours, on one layer; None if not counted.
    traffic: collectives of a step by kind, on one device; None if not known.
    network_s: seconds of a step that its collectives take at the least, all
      links of a device busy and nothing else; None if not known.
    step_s: seconds of a step, at the assumed utilisation.
    cells_per_s: of all devices.
    days: for the corpus.
    cost: of that, in the currency of the price.
    compile_s: seconds, on this machine as it was loaded.
    attention: the kernel that the devices compute attention with.
    remat: what is computed again in the backward pass.
    message: what the compiler or the checks said.
    notes: what a reader must know about the row.
    advice: what to do about a row that does not fit.
  """

  config: str
  topology: str
  status: str
  devices: int = 0
  mesh: dict[str, int] = dataclasses.field(default_factory=dict)
  rows: int = 0
  group_rows: int = 0
  slots: int = 0
  device_slots: int = 0
  parameters: int = 0
  memory: dict[str, int] = dataclasses.field(default_factory=dict)
  limit: int | None = None
  largest: int | None = None
  step_flops: float = 0.0
  counted: float | None = None
  traffic: list[dict[str, Any]] | None = None
  network_s: float | None = None
  step_s: float | None = None
  cells_per_s: float | None = None
  days: float | None = None
  cost: float | None = None
  compile_s: float | None = None
  attention: str = ''
  remat: str = ''
  message: str = ''
  notes: tuple[str, ...] = ()
  advice: str = ''


def largest_slots(config: train_config.TrainConfig) -> int:
  """Slots of the longest rows that a configuration trains on."""
  return max(config.data.shapes(config.encoding.max_genes))


def with_rows(
  config: train_config.TrainConfig, rows: int
) -> train_config.TrainConfig:
  """The configuration with another global batch."""
  streams = math.gcd(config.data.streams, rows)
  data = dataclasses.replace(config.data, rows_per_batch=rows, streams=streams)
  return dataclasses.replace(config, data=data)


def group_of(config: train_config.TrainConfig) -> int:
  """Devices that share a row."""
  return config.mesh.context * config.mesh.tensor


def make_row(
  name: str,
  config: train_config.TrainConfig,
  topology: topologies.Topology,
  question: Question,
  tell: Callable[[str], None] = lambda text: None,
) -> Row:
  """Plans one row: compiles, searches, and does the arithmetic.

  Args:
    name: of the configuration.
    config: with vocabulary size and priors filled in.
    topology: the machine.
    question: what is asked.
    tell: takes lines about what is going on.
  """
  devices = topology.num_devices or compilation.count_here()
  groups = devices // group_of(config)
  fixed, rows, notes = _fixed(config, topology, devices, groups, question)
  if fixed.status == REFUSED:
    return dataclasses.replace(fixed, config=name)
  planned = with_rows(config, rows)
  row = dataclasses.replace(
    fixed,
    config=name,
    rows=rows,
    group_rows=rows // groups,
    device_slots=rows * fixed.slots // devices,
  )
  if topology.is_compiled:
    row = _compiled(row, planned, topology, question, tell, counts=True)
    row = _largest(row, config, groups, topology, question, tell)
  else:
    row = _estimated(row, planned, topology)
  row = _timed(row, planned, topology, question)
  notes += _memory_of_gpus(row, topology)
  return dataclasses.replace(row, notes=(*notes, *row.notes))


def _memory_of_gpus(row: Row, topology) -> tuple[str, ...]:
  """A note where a run has to ask for more of a GPU than JAX takes unasked."""
  if topology.is_here or topology.is_tpu:
    return ()
  unasked = topologies.UNASKED * topology.chip.limit
  if row.memory.get('total', 0) <= unasked and not row.largest:
    return ()
  return (
    f'JAX takes {topologies.UNASKED:.0%} of a GPU, {unasked / GIB:.1f} GiB: '
    f'XLA_PYTHON_CLIENT_MEM_FRACTION={topologies.GPU_SHARE} gives it what is '
    'planned with here',
  )


def _fixed(config, topology, devices, groups, question):
  """The row as far as it does not depend on the batch, the rows, and notes."""
  slots = largest_slots(config)
  row = Row(
    config='',
    topology=topology.text,
    status='',
    devices=devices,
    slots=slots,
    remat=config.model.remat,
    parameters=model.count_parameters(config.model)['total'],
    limit=topology.limit,
  )
  mesh, shared = config.mesh, config.mesh.shared
  if min(shared, devices) < 1 or devices % shared or groups < 1:
    return _refused(row, f'mesh.fsdp x mesh.context x mesh.tensor = {shared} '
                    f'does not divide {devices} devices'), 0, ()  # fmt: skip
  if mesh.data not in (-1, devices // shared):
    return _refused(row, f'mesh.data={mesh.data} x {shared} devices that share '
                    f'weights or rows are not {devices}; set it to -1'), 0, ()  # fmt: skip
  axes = {'data': devices // shared, 'fsdp': mesh.fsdp}
  axes |= {'context': mesh.context, 'tensor': mesh.tensor}
  row = dataclasses.replace(
    row, mesh={axis: size for axis, size in axes.items() if size > 1}
  )
  notes, asked = (), config.data.rows_per_batch
  rows = question.rows * groups or asked
  step = groups * config.microbatches
  if rows % step:
    rows = -(-rows // step) * step
    notes = (f'{asked} rows do not divide by {step}; planned with {rows}',)
  return row, rows, notes


def _refused(row: Row, message: str) -> Row:
  return dataclasses.replace(row, status=REFUSED, message=message)


def _compiled(
  row: Row, config, topology, question: Question, tell, *, counts: bool
) -> Row:
  """The row with what the compiler says."""
  tell(
    f'{row.config} on {row.topology}: compiling {config.data.rows_per_batch} '
    f'rows of {row.slots} slots'
  )
  request = {
    'config': dataclasses.asdict(config),
    'topology': topology.text,
    'slots': row.slots,
    'num_rows': question.prior_rows or config.model.vocabulary_size,
    'counts': counts,
  }
  result = compilation.compile_apart(request, topology, question.time_limit)
  status = result['status']
  row = dataclasses.replace(
    row,
    compile_s=result.get('compile_s'),
    attention=result.get('attention', ''),
    message=result.get('message', ''),
    traffic=result.get('traffic'),
    memory=result.get('memory', {}),
    limit=result.get('limit') or row.limit,
  )
  if 'flops' in result:
    counted = result['flops']['compiler'] / result['flops']['by_hand']
    row = dataclasses.replace(row, counted=counted)
  if status == compile_worker.COMPILED:
    used, limit = row.memory['total'], row.limit
    status = NO_MEMORY if limit is not None and used > limit else FITS
  if status == NO_MEMORY:
    if result.get('used'):
      row = dataclasses.replace(row, memory={'total': result['used']})
    row = dataclasses.replace(
      row, advice=advice(config), message=_largest_arrays(result)
    )
  return dataclasses.replace(row, status=status)


def _largest_arrays(result: dict[str, Any]) -> str:
  arrays = [
    f'{a["shape"].split("{")[0]} {a["size"]}' for a in result.get('largest', ())
  ]
  return f'largest: {", ".join(arrays[:3])}' if arrays else ''


def advice(config: train_config.TrainConfig) -> str:
  """What makes a step smaller, most harmless first."""
  steps = []
  if config.model.remat == 'none':
    steps.append('--config.model.remat=attention')
  elif config.model.remat == 'attention':
    steps.append('--config.model.remat=full')
  steps.append(f'--config.microbatches={2 * config.microbatches}')
  steps.append('fewer rows a device (--config.data.rows_per_batch)')
  if config.mesh.fsdp < 16:
    wider = 8 if config.mesh.fsdp < 8 else 16
    steps.append(f'--config.mesh.fsdp={wider}')
  return 'try ' + ', '.join(steps)


def _largest(
  row: Row, config, groups: int, topology, question: Question, tell
) -> Row:
  """Looks for the largest batch that fits, by a few compilations.

  Memory grows by about the same amount a row: two sizes predict a third, which
  is compiled to be sure.
  """
  limit = row.limit
  if not question.search or limit is None or not row.memory:
    return row
  part = config.microbatches
  used = {row.group_rows: row.memory['total']}
  fits = {row.group_rows: row.status == FITS}
  kept = row.memory.get('arguments', 0)
  ran_out = ''
  for _ in range(question.search):
    size = _next_size(used, fits, kept, limit, part)
    if size is None:
      break
    tried = _compiled(
      dataclasses.replace(row, memory={}, status=''),
      with_rows(config, size * groups),
      *(topology, question, tell),
      counts=False,
    )
    if tried.status not in (FITS, NO_MEMORY):
      ran_out = f'{size} rows: {tried.message or tried.status}'
      break
    fits[size] = tried.status == FITS
    if tried.memory:
      used[size] = tried.memory['total']
  best = max((size for size, fit in fits.items() if fit), default=0)
  notes = (*row.notes, ran_out) if ran_out else row.notes
  return dataclasses.replace(row, largest=best, notes=notes)


def _next_size(used, fits, kept: int, limit: int, part: int) -> int | None:
  """The size to try next; None when the largest is known as well as it can.

  Args:
    used: rows -> bytes, as compiled.
    fits: rows -> whether that is within the limit.
    kept: bytes that do not depend on rows.
    limit: bytes.
    part: rows must be a multiple of it.
  """
  sizes = [size for size in SIZES if size % part == 0 and size not in fits]
  low = max((s for s, fit in fits.items() if fit), default=0)
  high = min((s for s, fit in fits.items() if not fit), default=math.inf)
  sizes = [size for size in sizes if low < size < high]
  if not sizes or not used:
    return None
  known = sorted(used)
  if len(known) > 1:
    a, b = known[0], known[-1]
    slope = (used[b] - used[a]) / (b - a)
  else:
    a = known[0]
    slope = (used[a] - kept) / a
  if slope <= 0:
    return None
  expected = [s for s in sizes if used[a] + slope * (s - a) <= limit]
  return max(expected) if expected else min(sizes)


def _estimated(row: Row, config, topology) -> Row:
  """Memory by arithmetic, for machines that are not compiled for here."""
  try:
    model_config = train_step.for_platform(config, 'gpu').model
    memory = estimates.memory(config, row.slots, row.devices)
  except errors.UserError as error:
    return _refused(row, str(error))
  kind = model_config.attention
  told = 'memory by arithmetic: expect it to be off by a third'
  if topology.is_described_gpu:
    told += '; docs/plans.md says how to compile for it'
  if config.mesh.context > 1 and kind in attention.FUSED:
    return _refused(
      row,
      f'attention {kind!r} takes whole rows: set --config.mesh.context=1, or '
      '--config.model.attention=chunked',
    )
  limit = topology.limit
  fits = memory['total'] <= limit
  return dataclasses.replace(
    row,
    status=ESTIMATED,
    memory=memory,
    limit=limit,
    attention=kind,
    advice='' if fits else advice(config),
    notes=(*row.notes, told),
  )


def _timed(row: Row, config, topology, question: Question) -> Row:
  """The row with FLOPs, and with time and cost at the assumed utilisation."""
  if row.status == REFUSED:
    return row
  work = flops.padded_work(
    row.rows, row.slots, config.data.num_masked(row.slots)
  )
  total = sum(flops.training(config.model, work).values())
  row = dataclasses.replace(row, step_flops=total)
  if topology.chip is None or row.status not in (FITS, ESTIMATED):
    return row
  if row.status == ESTIMATED and row.advice:
    return row  # it does not fit
  if row.traffic is not None:
    # A sum over devices passes the links twice: parts to sum, sums to spread.
    sent = sum(
      t['bytes'] * (2 if t['kind'] == 'all-reduce' else 1) for t in row.traffic
    )
    row = dataclasses.replace(row, network_s=sent / topology.chip.link)
  peak = getattr(topology.chip, config.model.dtype) * row.devices
  step_s = total / (peak * question.utilisation)
  cells = row.rows * estimates.cells_per_row(
    config, row.slots, question.mean_genes
  )
  rate = cells / step_s
  days = question.cells / rate / DAY
  cost = None
  if question.price is not None:
    chips = row.devices / topology.chip.devices
    cost = days * 24 * chips * question.price
  notes = row.notes
  if config.data.layout != packing.PACKED:
    notes = (*notes, 'time as if every cell needed the longest bucket')
  return dataclasses.replace(
    row, step_s=step_s, cells_per_s=rate, days=days, cost=cost, notes=notes
  )
