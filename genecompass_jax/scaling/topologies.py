"""Machines that a run may be planned for, and their devices.

TPUs are compiled for without being there: libtpu describes a slice, and its
compiler runs on any x86 host. GPUs are known from the table of chips alone.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from genecompass_jax import chips, errors

HERE = 'here'
EXAMPLES = 'v5e:16x16, v4:4x4x8, 2xv5p:4x4x4 (two slices), h100:8 or here'
# Names a libtpu.so for plans alone: where JAX can import the package, or finds
# TPU_LIBRARY_PATH, every process looks for a TPU.
LIBTPU = 'GENECOMPASS_LIBTPU'
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
  def is_here(self) -> bool:
    """Whether these are the devices of this host."""
    return self.chip is None

  @property
  def is_tpu(self) -> bool:
    """Whether libtpu compiles for it."""
    return self.chip is not None and self.chip.name in _AXES


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


def devices(topology: Topology) -> list[Any]:
  """JAX devices to make a mesh of; those of a TPU slice cannot be run on.

  Raises:
    UserError: libtpu knows no such slice.
  """
  import jax
  from jax.experimental import topologies

  if topology.is_here:
    return jax.devices()
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
  try:
    description = topologies.get_topology_desc(
      platform='tpu', topology_name=f'{name}:{shape}', **kwargs
    )
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    raise errors.UserError(
      f'--topology {topology.text}: libtpu knows no such slice '
      f'({errors.first_line(error)[:200]})'
    ) from error
  return list(description.devices)
