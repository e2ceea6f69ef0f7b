"""Accelerators: what a chip can do at most, and what it holds.

Figures are the vendor's, dense (without structured sparsity). One JAX device of
v4 and v5p is a chip: its two cores work as one ("megacore"). One of TPU7x is
half a chip, so that its figures here are half of the page's.

Sources: TPUs, the pages "System architecture" of docs.cloud.google.com/tpu/docs
(v4, v5e, v5p, v6e, tpu7x). GPUs, the data sheets of nvidia.com (A100, H100,
H200, L4, L40S, A10) and of HGX B200; a data sheet that gives only figures with
sparsity is halved. Usable memory of TPUs: the limit that the TPU compiler names
when a program does not fit (libtpu 0.0.42, deviceless). Memory of GPUs: the
total that nvidia-smi shows (github.com/modal-labs/modal-client/pull/2797; H100
NVL, GH200, H200 and B200 from outputs of it in public repositories).
"""

import dataclasses

_GIB, _MIB = 2**30, 2**20
_T = 1e12
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, as one JAX device.

  Attributes:
    name: short name, as in `--topology`.
    kinds: beginnings of `jax.Device.device_kind`, longest match first.
    bfloat16: FLOP/s of matrix products of bfloat16, summed in float32.
    float32: FLOP/s of matrix products of float32 as JAX computes them where
      nothing else is asked for: by one pass of bfloat16 on TPUs, by TF32 on
      NVIDIA from Ampere on.
    memory: bytes of device memory.
    usable: bytes of it that a program may take; None where not known.
    link: bytes/s that a chip can send to others of its slice or node, one
      direction (half of a "bidirectional" figure): ICI, NVLink, else PCIe.
    devices: JAX devices of a chip; shapes of slices and prices count chips.
  """

  name: str
  kinds: tuple[str, ...]
  bfloat16: float
  float32: float
  memory: int
  usable: int | None
  link: float
  devices: int = 1

  @property
  def limit(self) -> int:
    """Bytes that a program may take; all of them where that is not known."""
    return self.memory if self.usable is None else self.usable


def _tpu(name, kinds, peak, memory, usable, link, devices=1) -> Chip:
  usable = None if usable is None else int(usable * _GIB)
  return Chip(
    *(name, kinds, peak * _T, peak * _T),
    *(int(memory * _GIB), usable, link * _GB, devices),
  )


def _gpu(name, kinds, bfloat16, float32, memory, link) -> Chip:
  # A gigabyte of NVIDIA's names and data sheets is about 2**30 bytes, less what
  # firmware and the error correction of GDDR6 (a sixteenth: A10, L4, L40S)
  # keep: so the driver's total. JAX takes 75 % of it unless
  # XLA_PYTHON_CLIENT_MEM_FRACTION says more: what is usable is a choice.
  return Chip(
    *(name, kinds, bfloat16 * _T, float32 * _T),
    *(memory * _MIB, None, link * _GB),
  )


CHIPS: tuple[Chip, ...] = (
  # name, kinds; TFLOP/s, GiB, usable GiB, GB/s one way.
  _tpu('v4', ('TPU v4',), 275, 32, 30.75, 300),
  _tpu('v5e', ('TPU v5 lite', 'TPU v5e'), 197, 16, 15.75, 200),
  _tpu('v5p', ('TPU v5p', 'TPU v5'), 459, 95, 95, 600),
  _tpu('v6e', ('TPU v6 lite', 'TPU v6e'), 918, 32, 31.25, 400),
  _tpu('v7x', ('TPU7x', 'TPU v7x'), 1153.5, 96, None, 300, 2),
  # name, kinds; TFLOP/s bfloat16, TF32, MiB, GB/s one way.
  _gpu('a100-40', ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-PCIE-40GB'),
       312, 156, 40_960, 300),
  _gpu('a100-80', ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100 80GB PCIe'),
       312, 156, 81_920, 300),
  _gpu('h100', ('NVIDIA H100 80GB HBM3', 'NVIDIA H100 SXM'),
       989.4, 494.7, 81_559, 450),
  _gpu('h100-pcie', ('NVIDIA H100 PCIe',), 756, 378, 81_559, 300),
  _gpu('h100-nvl', ('NVIDIA H100 NVL',), 835.5, 417.5, 95_830, 300),
  _gpu('gh200', ('NVIDIA GH200',), 989.4, 494.7, 97_871, 450),
  _gpu('h200', ('NVIDIA H200',), 989.4, 494.7, 143_771, 450),
  _gpu('b200', ('NVIDIA B200',), 2250, 1125, 183_359, 900),
  _gpu('l4', ('NVIDIA L4',), 121, 60, 23_034, 32),
  _gpu('l40s', ('NVIDIA L40S',), 362, 183, 46_068, 32),
  _gpu('a10', ('NVIDIA A10',), 125, 62.5, 23_028, 32),
)  # fmt: skip
NAMES = tuple(chip.name for chip in CHIPS)


def by_name(name: str) -> Chip | None:
  """The chip of a short name ('v5e', 'h100'), in any case; None if unknown."""
  wanted = name.lower()
  return next((chip for chip in CHIPS if chip.name == wanted), None)


def by_kind(device_kind: str) -> Chip | None:
  """The chip that JAX calls `device_kind`; None if it is not in the table.

  The longest beginning that matches wins: 'NVIDIA L40S' is no L4. A letter or
  digit after it makes it another chip ('NVIDIA A10G' is no A10).
  """
  found, length = None, 0
  for chip in CHIPS:
    for kind in chip.kinds:
      after = device_kind[len(kind) :]
      fits = device_kind.startswith(kind) and not after[:1].isalnum()
      fits = fits and after != ' lite'  # a smaller chip of the same generation
      if fits and len(kind) > length:
        found, length = chip, len(kind)
  return found


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Most FLOP/s of one JAX device in matrix products.

  Args:
    device_kind: of `jax.Device`, such as 'TPU v5 lite'.
    dtype: 'bfloat16' or 'float32', that of the operands; see `Chip.float32`.

  Returns:
    FLOP/s (a multiply-add counts two); None for a device that is not in the
    table, such as a CPU: there is no utilisation to speak of.

  Raises:
    ValueError: another dtype.
  """
  if dtype not in ('bfloat16', 'float32'):
    raise ValueError(f'{dtype=} must be bfloat16 or float32')
  chip = by_kind(device_kind)
  return None if chip is None else getattr(chip, dtype)
