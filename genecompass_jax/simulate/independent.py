"""Cells whose genes know nothing of each other: nothing is there to learn.

Each gene is expressed by a draw of its own, with a count of its own (a hurdle
Poisson); cells have no type, no depth and no batch. What a model predicts here
beyond gene frequencies and the order of ranks comes from the encoding, not
from expression.
"""

import numpy as np
from scipy import sparse

from genecompass_jax import gene_table
from genecompass_jax.simulate import cells as cells_lib, config as config_lib

NUM_GENES = 240
NUM_DONORS = 10


def independent(num_cells: int, seed: int = 0) -> cells_lib.SimulatedCells:
  """Human cells of about 48 out of 240 protein-coding genes.

  A gene is expressed in 5 to 35 % of cells, by a uniform draw, with counts of
  1 + Poisson(m), m exponential of mean 0.2: most medians are 1 and most ranks
  ties, as in UMI data. Donors are labels that mean nothing.
  """
  rng = config_lib.generator(seed, 'independent')
  table = gene_table.GeneTable.default()
  is_human_G = np.asarray(table.species_G) == 0
  is_coding_G = np.array([b == 'protein_coding' for b in table.biotypes])
  coding = np.flatnonzero(is_human_G & is_coding_G)
  rows = coding[np.arange(NUM_GENES) * len(coding) // NUM_GENES]
  share_R = rng.uniform(0.05, 0.35, NUM_GENES)
  mean_R = rng.exponential(0.2, NUM_GENES)
  shape = num_cells, NUM_GENES
  is_on_CR = rng.random(shape) < share_R
  counts_CR = is_on_CR * (1 + rng.poisson(mean_R, shape))
  donor_C = np.arange(num_cells) % NUM_DONORS
  return cells_lib.SimulatedCells(
    species=0,
    gene_ids=tuple(table.gene_ids[g] for g in rows),
    symbols=tuple(table.symbols[g] for g in rows),
    counts=sparse.csr_matrix(counts_CR.astype(np.int32)),
    measured={'independent': np.ones(NUM_GENES, bool)},
    obs={
      'study': np.full(num_cells, 'independent'),
      'donor': np.array([f'donor {d}' for d in donor_C]),
    },
  )
