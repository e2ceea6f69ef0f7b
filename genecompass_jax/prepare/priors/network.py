"""Regulatory networks: tables merged, lifted over, and rewired for a control."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from genecompass_jax import errors, gene_table, kernels
from genecompass_jax.prepare.priors import (
  edges as edges_lib,
  holdout,
  names,
  pairs as pairs_lib,
)

LIFTS = ('none', 'human', 'mouse', 'both')
SWAPS_PER_EDGE = 10  # of rewiring; more change nothing that can be measured


def build(
  tables: Sequence[edges_lib.Edges],
  genes: gene_table.GeneTable,
  held: holdout.HeldOut,
  merge: str = 'max',
  lift: str = 'none',
) -> tuple[pairs_lib.Pairs, dict]:
  """One network of both species.

  Args:
    tables: edges of the sources.
    genes: the gene table.
    held: genes that no edge may touch; their edges go first of all.
    merge: how repeated edges are weighed; see `pairs.collect`.
    lift: 'human': edges known of human genes are also given to their mouse
      one-to-one orthologues; 'mouse': the other way; 'both'. Lifted edges are
      marked, unless a source of that species has them too.

  Returns:
    Directed pairs (regulator, target), and facts.

  Raises:
    UserError: nothing is left.
  """
  if lift not in LIFTS:
    raise errors.UserError(f'lift {lift!r}: give one of {", ".join(LIFTS)}')
  partner_G = names.orthologue_rows(genes)
  parts, facts = [], {'sources': []}
  for number, table in enumerate(tables):
    keep_N = ~(held.is_held_G[table.tf_N] | held.is_held_G[table.target_N])
    tf_N, target_N = table.tf_N[keep_N], table.target_N[keep_N]
    weight_N = table.weight_N[keep_N]
    own = table.facts | {'edges_held_out': int((~keep_N).sum())}
    parts.append((tf_N, target_N, weight_N, number, False))
    if lift in ('both', gene_table.SPECIES[table.species]):
      other_N, partners_N = partner_G[tf_N], partner_G[target_N]
      both_N = (other_N >= 0) & (partners_N >= 0)
      parts.append(
        (other_N[both_N], partners_N[both_N], weight_N[both_N], number, True)
      )
      own['edges_lifted'] = int(both_N.sum())
      own['edges_without_orthologues'] = int((~both_N).sum())
    facts['sources'].append(own)
  sizes = [len(part[0]) for part in parts]
  found = pairs_lib.collect(
    *(np.concatenate([part[i] for part in parts]) for i in range(3)),
    np.repeat([part[3] for part in parts], sizes),
    np.repeat([part[4] for part in parts], sizes),
    [table.facts['file'] for table in tables],
    merge,
  )
  if not len(found):
    raise errors.UserError('no edge is left; check what is held out')
  # A gene that is lifted to itself by way of a held-out orthologue cannot be:
  # orthologues are held out together.
  if held.is_held_G[found.a_N].any() or held.is_held_G[found.b_N].any():
    raise ValueError('a held-out gene has an edge')
  facts['edges'] = {
    name: {
      'edges': int((genes.species_G[found.a_N] == s).sum()),
      'lifted_only': int(
        found.is_lifted_N[genes.species_G[found.a_N] == s].sum()
      ),
      'regulators': len(np.unique(found.a_N[genes.species_G[found.a_N] == s])),
      'targets': len(np.unique(found.b_N[genes.species_G[found.a_N] == s])),
    }
    for s, name in enumerate(gene_table.SPECIES)
  }
  return found, facts


def rewire(
  pairs: pairs_lib.Pairs, genes: gene_table.GeneTable, seed: int
) -> tuple[pairs_lib.Pairs, dict]:
  """Swaps targets between edges: every gene keeps its in- and out-degree.

  Edges are swapped within a species. One that stands in both, between
  one-to-one orthologues, as lifted ones do, is swapped in both at once: what
  the species share is shared after it, and is no mark of the true network.
  Weights and sources stay with the regulator's end.

  Returns:
    Pairs of the same degrees, and the share of edges that are the old ones.
  """
  sheets = {
    s: _Sheet.of(pairs, genes.species_G[pairs.a_N] == s)
    for s in range(len(gene_table.SPECIES))
    if (genes.species_G[pairs.a_N] == s).any()
  }
  first_P, second_P = _in_both(pairs, genes)
  is_shared = np.zeros(len(pairs), bool)
  is_shared[first_P] = is_shared[second_P] = True
  groups = [((s,), (sheet.edges_N[~is_shared[sheet.edges_N]],), s)
            for s, sheet in sheets.items()]  # fmt: skip
  if len(first_P):
    groups.append(((0, 1), (first_P, second_P), len(sheets)))
  target_N = np.zeros(len(pairs), np.int64)
  tf_N = np.zeros(len(pairs), np.int64)
  for sheet in sheets.values():
    tf_N[sheet.edges_N], target_N[sheet.edges_N] = sheet.places_2N
  for species, edges, stream in groups:
    one, other = sheets[species[0]], sheets[species[-1]]
    targets_KN = np.stack([target_N[e] for e in edges])
    _swap(
      np.stack([tf_N[e] for e in edges]),
      targets_KN,
      (one.own_T, other.own_T),
      (one.is_edge, other.is_edge),
      SWAPS_PER_EDGE * len(edges[0]),
      kernels.fold(seed, stream),
    )
    for e, after_N in zip(edges, targets_KN):
      target_N[e] = after_N
  b_N = pairs.b_N.copy()
  share = {}
  for s, sheet in sheets.items():
    own_N = target_N[sheet.edges_N]
    b_N[sheet.edges_N] = sheet.targets_G[own_N]
    kept = sheet.was_edge[sheet.places_2N[0], own_N]
    share[gene_table.SPECIES[s]] = float(kept.mean())
  rewired = pairs_lib.Pairs(
    pairs.a_N, b_N, pairs.weight_N, pairs.source_N, pairs.is_lifted_N,
    pairs.sources,
  )  # fmt: skip
  facts = {'share_of_edges_kept': share, 'edges_in_both': len(first_P)}
  return rewired, facts


@dataclasses.dataclass(frozen=True)
class _Sheet:
  """The network of one species as a table of regulators and targets.

  Attributes:
    edges_N: places among the pairs.
    places_2N: int64 regulator and target of each, as places in the table.
    targets_G: genes of its columns.
    own_T: column that is the regulator itself, -1 for none.
    is_edge: bool, changed in place.
    was_edge: the same before.
  """

  edges_N: np.ndarray
  places_2N: np.ndarray
  targets_G: np.ndarray
  own_T: np.ndarray
  is_edge: np.ndarray
  was_edge: np.ndarray

  @classmethod
  def of(cls, pairs: pairs_lib.Pairs, mine_N: np.ndarray) -> '_Sheet':
    edges_N = np.flatnonzero(mine_N)
    tfs, tf_N = np.unique(pairs.a_N[edges_N], return_inverse=True)
    targets, target_N = np.unique(pairs.b_N[edges_N], return_inverse=True)
    is_edge = np.zeros((len(tfs), len(targets)), bool)
    is_edge[tf_N, target_N] = True
    own_T = np.searchsorted(targets, tfs)
    own_T[own_T == len(targets)] = 0
    own_T = np.where(targets[own_T] == tfs, own_T, -1).astype(np.int64)
    places_2N = np.stack([tf_N, target_N]).astype(np.int64)
    return cls(edges_N, places_2N, targets, own_T, is_edge, is_edge.copy())


def _in_both(
  pairs: pairs_lib.Pairs, genes: gene_table.GeneTable
) -> tuple[np.ndarray, np.ndarray]:
  """Places of pairs of the first species, and of their orthologous pairs."""
  partner_G = names.orthologue_rows(genes)
  key_N = pairs.a_N.astype(np.int64) << 32 | pairs.b_N
  order = np.argsort(key_N, kind='stable')
  a_N, b_N = partner_G[pairs.a_N], partner_G[pairs.b_N]
  wanted_N = a_N.astype(np.int64) << 32 | np.maximum(b_N, 0)
  at_N = np.searchsorted(key_N, wanted_N, sorter=order)
  at_N = order[np.minimum(at_N, len(order) - 1)]
  is_there = (a_N >= 0) & (b_N >= 0) & (key_N[at_N] == wanted_N)
  first_P = np.flatnonzero(is_there & (genes.species_G[pairs.a_N] == 0))
  return first_P, at_N[first_P]


@kernels.compiled
def _swap(tf_KN, target_KN, own_T, is_edge, number, state):
  """Tries swaps (t1, g1), (t2, g2) -> (t1, g2), (t2, g1), in place.

  In the tables of K species at once, or in none. A swap must not make an edge
  twice, nor a gene its own target.
  """
  size = np.uint64(tf_KN.shape[1])
  for _ in range(number):
    state += kernels.GOLDEN
    i = np.int64(kernels.mix64(state) % size)
    state += kernels.GOLDEN
    j = np.int64(kernels.mix64(state) % size)
    fits = True
    for k in range(len(tf_KN)):
      t, u, g, h = tf_KN[k, i], tf_KN[k, j], target_KN[k, i], target_KN[k, j]
      fits &= t != u and g != h
      fits &= not is_edge[k][t, h] and not is_edge[k][u, g]
      fits &= own_T[k][t] != h and own_T[k][u] != g
    if not fits:
      continue
    for k in range(len(tf_KN)):
      t, u, g, h = tf_KN[k, i], tf_KN[k, j], target_KN[k, i], target_KN[k, j]
      is_edge[k][t, g] = is_edge[k][u, h] = False
      is_edge[k][t, h] = is_edge[k][u, g] = True
      target_KN[k, i], target_KN[k, j] = h, g
