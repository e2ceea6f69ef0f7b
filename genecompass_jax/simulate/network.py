"""The signed, weighted TF -> target network and its fixed point.

A TF's activity is (1 + tanh(d)) / 2, where d is its log expression against its
baseline plus noise; the log expression of a gene is its baseline plus
response * tanh(sum over regulators of weight * (activity - 1/2)). Regulators of
TFs mostly stand above them. The few edges of feedback are weakened until the
map contracts, so that there is one fixed point, whatever the start.
"""

import dataclasses
import functools

import numpy as np
from scipy import sparse

from genecompass_jax.simulate import (
  config as config_lib,
  genes as genes_lib,
  perturb as perturb_lib,
)

MAX_REGULATORS = 10
# Bound on the spectral radius of the absolute gain between TFs.
MAX_GAIN = 0.8
# Sweeps that reach the fixed point to the precision of a type; a bound on the
# error is MAX_GAIN ** sweeps, but real slopes are far below their bound.
SWEEPS = {np.dtype(np.float32): 32, np.dtype(np.float64): 200}


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """E edges of one species; TFs are numbered 0..T-1 in the order of rows.

  Attributes:
    tf_rows_T: gene row of each TF.
    tf_E, target_E: TF number and gene row of an edge, sorted by target.
    weight_E: signed; positive activates.
    conserved_E: the other species has the edge between the orthologues.
    response: largest change of log expression.
    num_genes: R.
  """

  tf_rows_T: np.ndarray
  tf_E: np.ndarray
  target_E: np.ndarray
  weight_E: np.ndarray
  conserved_E: np.ndarray
  response: float
  num_genes: int

  @functools.cached_property
  def weights(self) -> sparse.csr_matrix:
    """Weights as a matrix, float64."""
    shape = (self.num_genes, len(self.tf_rows_T))
    return sparse.csr_matrix(
      (self.weight_E, (self.target_E, self.tf_E)), shape=shape
    )

  @functools.cached_property
  def tf_weights(self) -> sparse.csr_matrix:
    """The rows of `weights` whose target is a TF."""
    return self.weights[self.tf_rows_T]

  @functools.cached_property
  def reach(self) -> np.ndarray:
    """True where a gene lies downstream of a TF, over any number of edges."""
    one_TT = (self.tf_weights != 0).T.astype(np.int32)  # from, to
    reach_TT = one_TT.toarray() > 0
    while True:
      more_TT = reach_TT | ((one_TT @ reach_TT.astype(np.int32)) > 0)
      if np.array_equal(more_TT, reach_TT):
        break
      reach_TT = more_TT
    start_TT = reach_TT | np.eye(len(reach_TT), dtype=bool)
    direct_TR = (self.weights != 0).T.astype(np.int32)
    return np.asarray(start_TT.astype(np.int32) @ direct_TR.toarray() > 0)

  @functools.cached_property
  def regulators(self) -> tuple[frozenset[tuple[int, int]], ...]:
    """(TF number, sign) of every regulator of every gene."""
    found = [set() for _ in range(self.num_genes)]
    for t, r, weight in zip(self.tf_E, self.target_E, self.weight_E):
      found[r].add((int(t), int(np.sign(weight))))
    return tuple(map(frozenset, found))


def activity(
  network: Network,
  drive_TC: np.ndarray,
  edit: perturb_lib.Edit | None = None,
  noise_TC: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Deviations and activities of the TFs at the fixed point.

  Args:
    network: of the species.
    drive_TC: log expression that is imposed on each TF of each of C cells:
      state of the masters plus noise of expression. Its dtype is kept.
    edit: of expression and activity.
    noise_TC: noise of activity beyond expression.

  Returns:
    `(deviation_TC, activity_TC)`: log expression against baseline, and
    activity in 0..1.
  """
  dtype = drive_TC.dtype
  tf_weights = network.tf_weights.astype(dtype)
  half, response = dtype.type(0.5), dtype.type(network.response)

  def read(d_TC):
    if edit is not None:
      d_TC = edit.expression(d_TC)
    a_TC = d_TC if noise_TC is None else d_TC + noise_TC
    a_TC = half + half * np.tanh(a_TC)
    return d_TC, a_TC if edit is None else edit.activity(a_TC)

  d_TC = drive_TC
  for _ in range(SWEEPS[dtype]):
    before_TC = d_TC
    d_TC = drive_TC + response * np.tanh(tf_weights @ (read(d_TC)[1] - half))
    # Further sweeps would change nothing, not even the last bit.
    if np.array_equal(d_TC, before_TC):
      break
  return read(d_TC)


def draw(
  genes: tuple[genes_lib.Genes, genes_lib.Genes],
  config: config_lib.AtlasConfig,
) -> tuple[Network, Network]:
  """The networks of human and mouse; that of mouse takes after the human."""
  human = _draw(genes[0], config)
  mouse = _draw(genes[1], config, (genes[0], human))
  return (
    _mark_conserved(human, genes[0], mouse, genes[1]),
    _mark_conserved(mouse, genes[1], human, genes[0]),
  )


def _draw(genes, config, human=None) -> Network:
  rng = config_lib.generator(config.seed, 'network', genes.species)
  tf_rows_T = np.flatnonzero(genes.role_R == genes_lib.TF)
  tfs = _Tfs.draw(genes, tf_rows_T, config, human)
  known = _inherited(genes, tf_rows_T, config, rng, human)
  edges: list[dict[int, float]] = [{} for _ in range(len(genes))]
  for r in range(len(genes)):
    is_tf = genes.role_R[r] == genes_lib.TF
    if genes.is_master_R[r] or not (
      is_tf or genes.role_R[r] == genes_lib.REGULATED
    ):
      continue
    kept, number = known.get(r, ({}, 0))
    number = number or min(
      rng.geometric(1 / config.mean_regulators), MAX_REGULATORS
    )
    edges[r] = _fill(rng, tfs, genes, r, dict(kept), number, config)
  # A sibling has the regulators of its TF, with weights of its own.
  number_of = {int(row): t for t, row in enumerate(tf_rows_T)}
  for r in np.flatnonzero(genes.sibling_of_R >= 0):
    tf_row = int(genes.sibling_of_R[r])
    edges[r] = {
      t: np.sign(w) * _size(rng, config)
      for t, w in edges[tf_row].items()
      if t != number_of[tf_row]
    }
  return _contract(_assemble(edges, tf_rows_T, len(genes), config), genes)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tfs:
  """What decides how TFs are drawn as regulators."""

  chance_T: np.ndarray
  sign_T: np.ndarray
  level_T: np.ndarray
  is_master_T: np.ndarray
  paralogues: tuple[tuple[int, ...], ...]
  pools: dict[int, np.ndarray]

  @classmethod
  def draw(cls, genes, tf_rows_T, config, human) -> '_Tfs':
    # Drawn once per human gene and once per mouse gene; a shared gene takes
    # the human value, so the stream does not depend on the species.
    chance_R, sign_R = cls._values(config, 0, len(genes))
    if human is not None:
      new_chance_R, new_sign_R = cls._values(config, 1, len(genes))
      taken_R = genes.human_R
      chance_R = np.where(taken_R >= 0, chance_R[taken_R], new_chance_R)
      sign_R = np.where(taken_R >= 0, sign_R[taken_R], new_sign_R)
    is_master_T = genes.is_master_R[tf_rows_T]
    chance_T = chance_R[tf_rows_T]
    chance_T = np.where(is_master_T, config.master_degree, 1) * chance_T
    family_T = genes.family_R[tf_rows_T]
    paralogues = tuple(
      tuple(
        int(o) for o in np.flatnonzero((family_T == f) & (f >= 0)) if o != t
      )
      for t, f in enumerate(family_T)
    )
    pools = {}
    key_T = genes.human_R[tf_rows_T]
    for f in np.unique(genes.family_R[genes.family_R >= 0]):
      rng = config_lib.generator(config.seed, 'pool', int(f))
      # A score per human gene, so that both species choose the same TFs.
      score_R = rng.gumbel(size=len(genes))
      score_T = np.log(chance_T) + np.where(key_T >= 0, score_R[key_T], -np.inf)
      pools[int(f)] = np.argsort(-score_T)[:4]
    return cls(
      chance_T,
      sign_R[tf_rows_T],
      genes.level_R[tf_rows_T],
      is_master_T,
      paralogues,
      pools,
    )

  @staticmethod
  def _values(config, species, number):
    rng = config_lib.generator(config.seed, 'tf', species)
    chance = np.exp(config.out_degree_sd * rng.standard_normal(number))
    sign = np.where(rng.random(number) < config.repressors, -1.0, 1.0)
    return chance, sign


def _size(rng, config) -> float:
  return config.weight * np.exp(0.3 * rng.standard_normal())


def _fill(rng, tfs, genes, r, edges, number, config) -> dict[int, float]:
  """Adds regulators to a gene until it has `number` of them."""
  allowed_T = np.ones(len(tfs.chance_T), bool)
  if genes.role_R[r] == genes_lib.TF:
    allowed_T = tfs.is_master_T | (tfs.level_T < genes.level_R[r])
    if rng.random() < config.feedback * number:
      # From a little below, so that loops stay small.
      below_T = tfs.level_T - genes.level_R[r]
      allowed_T |= (below_T > 0) & (below_T < 0.1)
  pool = tfs.pools.get(int(genes.family_R[r]), np.zeros(0, int))

  def add(t):
    sign = tfs.sign_T[t] * (1 if rng.random() < 0.9 else -1)
    edges[int(t)] = sign * _size(rng, config)
    allowed_T[t] = False

  allowed_T[list(edges)] = False
  while len(edges) < number and allowed_T.any():
    choices = pool[allowed_T[pool]]
    if not len(choices) or rng.random() > config.family_pull:
      choices = np.flatnonzero(allowed_T)
    chance = np.cumsum(tfs.chance_T[choices])
    t = choices[np.searchsorted(chance, rng.random() * chance[-1])]
    add(t)
    for other in tfs.paralogues[t]:
      if (
        len(edges) < number
        and allowed_T[other]
        and rng.random() < config.paralogue_pull
      ):
        add(other)
        edges[other] = np.sign(edges[int(t)]) * abs(edges[other])
  return edges


def _inherited(genes, tf_rows_T, config, rng, human):
  """Edges kept from human, and the in-degree, by mouse row."""
  if human is None:
    return {}
  human_genes, human_network = human
  number_of = {
    int(genes.human_R[row]): t
    for t, row in enumerate(tf_rows_T)
    if genes.human_R[row] >= 0
  }
  by_target = {}
  for t, r, w in zip(
    human_network.tf_E, human_network.target_E, human_network.weight_E
  ):
    row = int(human_network.tf_rows_T[t])
    by_target.setdefault(int(r), []).append((row, w))
  known = {}
  for r, h in enumerate(genes.human_R):
    found = by_target.get(int(h), []) if h >= 0 else []
    kept = {
      number_of[row]: np.sign(w) * _size(rng, config)
      for row, w in found
      if row in number_of and rng.random() < config.conserved
    }
    if found:
      known[r] = (kept, len(found))
  return known


def _assemble(edges, tf_rows_T, num_genes, config) -> Network:
  target_E = np.repeat(np.arange(num_genes), [len(e) for e in edges])
  tf_E = np.array([t for e in edges for t in sorted(e)], np.int64)
  weight_E = np.array([e[t] for e in edges for t in sorted(e)])
  return Network(
    tf_rows_T=tf_rows_T,
    tf_E=tf_E,
    target_E=target_E,
    weight_E=weight_E,
    conserved_E=np.zeros(len(tf_E), bool),
    response=config.response,
    num_genes=num_genes,
  )


def gain(network: Network) -> float:
  """Spectral radius of the largest possible gain between TFs."""
  # d activity / d deviation is at most 1/2, d tanh at most 1.
  gain_TT = 0.5 * network.response * abs(network.tf_weights)
  return float(np.max(np.abs(np.linalg.eigvals(gain_TT.toarray()))))


def _contract(network, genes) -> Network:
  """Weakens feedback until the fixed point is unique."""
  level_E = genes.level_R[network.tf_rows_T[network.tf_E]]
  back_E = level_E >= genes.level_R[network.target_E]
  while gain(network) > MAX_GAIN:
    weight_E = np.where(back_E, 0.7, 1.0) * network.weight_E
    network = dataclasses.replace(network, weight_E=weight_E)
  return network


def _mark_conserved(network, genes, other, other_genes) -> Network:
  """Marks the edges that the other species has too, with the same sign."""

  def keys(net, gene_set):
    rows = gene_set.human_R
    tf_E, target_E = rows[net.tf_rows_T[net.tf_E]], rows[net.target_E]
    return list(zip(tf_E, target_E, np.sign(net.weight_E)))

  theirs = set(keys(other, other_genes))
  conserved_E = np.array(
    [k in theirs and min(k[0], k[1]) >= 0 for k in keys(network, genes)]
  )
  return dataclasses.replace(network, conserved_E=conserved_E)
