"""GPUs as XLA's compiler wants them described, so that none need be there.

Figures are facts of the hardware, as XLA's own descriptions of these devices
give them (openxla/xla, xla/backends/gpu/target_config/specs). Memory and name
are those of the table of chips. Other GPUs of that table are not described
there, and are not compiled for.
"""

import dataclasses

from genecompass_jax import chips


@dataclasses.dataclass(frozen=True)
class _Generation:
  """What multiprocessors of one compute capability have.

  Attributes:
    capability: major and minor.
    extension: of its instructions: 'NONE', or those of one generation alone.
    units: of float32, by multiprocessor.
    shared: bytes of shared memory of a multiprocessor.
    block: most bytes of it that one block of threads may ask for.
  """

  capability: tuple[int, int]
  extension: str
  units: int
  shared: int
  block: int


_AMPERE = _Generation((8, 0), 'NONE', 64, 167_936, 166_912)
_HOPPER = _Generation((9, 0), 'ACCELERATED_FEATURES', 128, 233_472, 232_448)
_BLACKWELL = _Generation((10, 0), 'ACCELERATED_FEATURES', 128, 233_472, 232_448)
# Chip -> generation, multiprocessors, GHz, bytes/s of memory, bytes of L2.
_GPUS = {
  'a100-40': (_AMPERE, 108, 1.41, 1_555_200_000_000, 41_943_040),
  'a100-80': (_AMPERE, 108, 1.41, 2_039_040_000_000, 41_943_040),
  'h100': (_HOPPER, 132, 1.98, 3_352_320_000_000, 52_428_800),
  'h100-pcie': (_HOPPER, 114, 1.755, 2_039_040_000_000, 52_428_800),
  'h200': (_HOPPER, 132, 1.98, 4_800_000_000_000, 52_428_800),
  'b200': (_BLACKWELL, 148, 1.965, 7_672_320_000_000, 132_644_864),
}
NAMES = tuple(_GPUS)


def describe(chip: chips.Chip) -> str:
  """A chip of `NAMES` as text of XLA's GpuTargetConfigProto.

  The versions are of CUDA and cuDNN as constraints.txt names them: a host of
  the project's own would have these.
  """
  made, cores, clock, bandwidth, cache = _GPUS[chip.name]
  name = chip.kinds[0]
  major, minor = made.capability
  return f"""
    gpu_device_info {{
      name: "{name}"
      cuda_compute_capability {{
        major: {major} minor: {minor} feature_extension: {made.extension}
      }}
      core_count: {cores}
      fpus_per_core: {made.units}
      clock_rate_ghz: {clock}
      device_memory_size: {chip.memory}
      memory_bandwidth: {bandwidth}
      l2_cache_size: {cache}
      shared_memory_per_core: {made.shared}
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {made.block}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      threads_per_core_limit: 2048
      threads_per_block_limit: 1024
      threads_per_warp: 32
      thread_dim_limit_x: 1024
      thread_dim_limit_y: 1024
      thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 28 }}
    runtime_version {{ major: 12 minor: 9 }}
    device_description_str: "{name}"
  """
