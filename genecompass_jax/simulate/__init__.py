"""A two-species atlas with known regulation, for tests, demos and calibration.

NumPy and SciPy only, deterministic from a seed. It is ground truth for
software and statistics; it is not evidence about biology, and every figure
made on it says so.

Axes: R genes of one species, T TFs, E edges, C cells, Y cell types, M masters,
U batches (libraries), S species.
"""

from genecompass_jax.simulate.atlas import Atlas
from genecompass_jax.simulate.cells import SimulatedCells, concatenate
from genecompass_jax.simulate.config import AtlasConfig
from genecompass_jax.simulate.independent import independent
from genecompass_jax.simulate.knowledge import write_knowledge, write_truth
from genecompass_jax.simulate.perturb import (
  Drug,
  Effects,
  Perturbation,
  combine,
  knock_down,
  knock_out,
  over_express,
)

__all__ = [
  'Atlas',
  'AtlasConfig',
  'Drug',
  'Effects',
  'Perturbation',
  'SimulatedCells',
  'combine',
  'concatenate',
  'independent',
  'knock_down',
  'knock_out',
  'over_express',
  'write_knowledge',
  'write_truth',
]
