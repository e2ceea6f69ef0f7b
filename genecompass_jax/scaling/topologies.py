"""Machines that a run may be planned for, and their devices.

Both are compiled for without being there, on any x86 host: libtpu describes a
slice of TPUs, JAX's plugin for CUDA takes a description of a GPU. Where the
plugin is not installed GPUs are known from the table of chips alone.
"""

import dataclasses
import glob
import importlib.util
import math
import os
import re
from typing import Any

from genecompass_jax import chips, errors
from genecompass_jax.scaling import gpu_targets

HERE = 'here'
EXAMPLES = 'v5e:16x16, v4:4x4x8, 2xv5p:4x4x4 (two slices), h100:8 or here'
# Names a libtpu.so for plans alone: where JAX can import the package, or finds
# TPU_LIBRARY_PATH, every process looks for a TPU.
LIBTPU = 'GENECOMPASS_LIBTPU'
# Names the folder of JAX's plugin for CUDA, for plans alone: where JAX can
# import it, every process looks for a GPU.
CUDA = 'GENECOMPASS_CUDA'
# Most of a GPU's memory that a run is taken to get; it has to be asked for by
# XLA_PYTHON_CLIENT_MEM_FRACTION, and JAX takes UNASKED otherwise.
GPU_SHARE, UNASKED = 0.95, 0.75
_SHAPE = re.compile(r'(?:(\d+)x)?([a-z][a-z0-9-]*):(\d+(?:x\d+)*)', re.I | re.A)
_DIGITS = 6  # of a million devices along an axis, which nobody has
# Axes of a slice: v4 and v5p are cubes, v5e and v6e are squares.
_AXES = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2, 'v7x': 3}
_NAMES = {'v7x': 'tpu7x'}  # what libtpu calls it, if it is another name


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices of one kind.

  Attributes:
    text: as it was asked for.
    chip: of the table; None for `here`, until the devices are seen.
    shape: of a slice or node, in chips; empty for `here`.
    slices: slices or nodes, joined by a slower network.
  """

  text: str
  chip: chips.Chip | None
  shape: tuple[int, ...] = ()
  slices: int = 1

  @property
  def num_devices(self) -> int:
    """Devices of all slices; 0 for `here`, where they are counted later."""
    if self.is_here:
      return 0
    return self.slices * math.prod(self.shape) * self.chip.devices

  @property
  def limit(self) -> int | None:
    """Bytes of a device that a program may take; None for `here`.

    Of a GPU `GPU_SHARE`: the rest is taken to be CUDA's and NCCL's own.
    """
    if self.is_here:
      return None
    return int(self.chip.limit * (1 if self.is_tpu else GPU_SHARE))

  @property
  def is_here(self) -> bool:
    """Whether these are the devices of this host."""
    return self.chip is None

  @property
  def is_tpu(self) -> bool:
    """Whether libtpu compiles for it."""
    return self.chip is not None and self.chip.name in _AXES

  @property
  def is_described_gpu(self) -> bool:
    """Whether it is a GPU that JAX's plugin for CUDA can compile for."""
    return self.chip is not None and self.chip.name in gpu_targets.NAMES

  @property
  def is_compiled(self) -> bool:
    """Whether its step is compiled, and not only estimated."""
    if self.is_described_gpu:
      return has_cuda()
    return self.is_here or self.is_tpu


def parse(text: str) -> Topology:
  """The topology that a text such as 'v5e:16x16' names.

  Raises:
    UserError: it is written otherwise, or the chip is not known.
  """
  text = text.strip()
  if text == HERE:
    return Topology(text, None)
  match = _SHAPE.fullmatch(text)
  if match is None:
    raise errors.UserError(
      f'--topology {text!r} is not of the form CHIP:SHAPE; give such as '
      f'{EXAMPLES}'
    )
  slices, name, shape = match.groups()
  chip = chips.by_name(name)
  if chip is None:
    raise errors.UserError(
      f'--topology {text!r}: the chip {name!r} is not known; choose one of '
      f'{", ".join(chips.NAMES)}'
    )
  if max(map(len, (slices or '', *shape.split('x')))) > _DIGITS:
    raise errors.UserError(
      f'--topology {text[:40]!r}: no machine is as large; give such as '
      f'{EXAMPLES}'
    )
  sizes = tuple(int(size) for size in shape.split('x'))
  axes = _AXES.get(chip.name, 1)
  if len(sizes) != axes or min(sizes) < 1 or slices == '0':
    example = 'x'.join(['4'] * axes)
    raise errors.UserError(
      f'--topology {text!r}: {chip.name} has {axes} '
      f'{"axis" if axes == 1 else "axes"}, as in {chip.name}:{example}'
    )
  return Topology(text, chip, sizes, int(slices or 1))


def check_libtpu() -> None:
  """Refuses to plan for TPUs without their compiler.

  Raises:
    UserError: there is no libtpu.
  """
  file = os.environ.get(LIBTPU) or os.environ.get('TPU_LIBRARY_PATH')
  if file and not os.path.exists(file):
    raise errors.UserError(
      f'{LIBTPU} or TPU_LIBRARY_PATH names {file}, which does not exist'
    )
  if not file and importlib.util.find_spec('libtpu') is None:
    raise errors.UserError(
      'planning for TPUs needs libtpu: pip install --no-deps --target '
      f'.venv/plan libtpu; export {LIBTPU}=$PWD/.venv/plan/libtpu/libtpu.so '
      '(docs/plans.md)'
    )


def has_cuda() -> bool:
  """Whether JAX's plugin for CUDA can be found.

  Raises:
    UserError: the folder that is named has none.
  """
  folder = os.environ.get(CUDA)
  if not folder:
    return any(
      importlib.util.find_spec(name) is not None
      for name in ('jax_cuda12_plugin', 'jax_cuda13_plugin')
    )
  if not glob.glob(os.path.join(glob.escape(folder), 'jax_cuda1*_plugin')):
    raise errors.UserError(
      f'{CUDA} names {folder}, where no plugin is: pip install --no-deps '
      f'--target {folder} jax-cuda12-plugin jax-cuda12-pjrt '
      'nvidia-cuda-nvcc-cu12 (docs/plans.md)'
    )
  return True


def devices(topology: Topology) -> list[Any]:
  """JAX devices to make a mesh of; absent ones cannot be run on.

  Raises:
    UserError: the compiler knows no such devices.
  """
  import jax

  if topology.is_here:
    return jax.devices()
  describe = _gpus if topology.is_described_gpu else _slice
  compiler = "JAX's plugin for CUDA" if topology.is_described_gpu else 'libtpu'
  try:
    return list(describe(topology).devices)
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    raise errors.UserError(
      f'--topology {topology.text}: {compiler} knows no such machine '
      f'({errors.first_line(error)[:200]})'
    ) from error


def _gpus(topology: Topology) -> Any:
  """Nodes that NVLink does not join, hosts of a node, GPUs of a host."""
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    platform='cuda',
    topology=f'{topology.slices}x1x{topology.shape[0]}',
    target_config=gpu_targets.describe(topology.chip),
  )


def _slice(topology: Topology) -> Any:
  from jax.experimental import topologies

  kwargs: dict[str, Any] = {}
  name = _NAMES.get(topology.chip.name, topology.chip.name)
  if topology.slices > 1:
    kwargs['num_slices'] = topology.slices
  if topology.chip.name == 'v4':
    # Two cores are one device; without the bounds libtpu asks a host for them.
    kwargs['chip_config_name'] = 'megacore'
    kwargs['chips_per_host_bounds'] = (2, 2, 1)
    kwargs.setdefault('num_slices', 1)
  shape = 'x'.join(map(str, topology.shape))
  return topologies.get_topology_desc(
    platform='tpu', topology_name=f'{name}:{shape}', **kwargs
  )
