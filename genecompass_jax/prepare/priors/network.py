"""Regulatory networks: tables merged, lifted over, and rewired for a control."""

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

  Each species by itself. Weights and sources stay with the regulator's end.

  Returns:
    Pairs of the same degrees, and the share of edges that are the old ones.
  """
  b_N = pairs.b_N.copy()
  share = {}
  for s, name in enumerate(gene_table.SPECIES):
    mine = np.flatnonzero(genes.species_G[pairs.a_N] == s)
    if not len(mine):
      continue
    tfs, tf_N = np.unique(pairs.a_N[mine], return_inverse=True)
    targets, target_N = np.unique(pairs.b_N[mine], return_inverse=True)
    is_edge = np.zeros((len(tfs), len(targets)), bool)
    is_edge[tf_N, target_N] = True
    old = is_edge.copy()
    # A swap must not make a gene its own target.
    own_T = np.searchsorted(targets, tfs)
    own_T[own_T == len(targets)] = 0
    own_T = np.where(targets[own_T] == tfs, own_T, -1)
    target_N = target_N.astype(np.int64)
    _swap(
      tf_N.astype(np.int64),
      target_N,
      own_T.astype(np.int64),
      is_edge,
      SWAPS_PER_EDGE * len(mine),
      kernels.fold(seed, s),
    )
    b_N[mine] = targets[target_N]
    share[name] = float(old[tf_N, target_N].mean())
  rewired = pairs_lib.Pairs(
    pairs.a_N, b_N, pairs.weight_N, pairs.source_N, pairs.is_lifted_N,
    pairs.sources,
  )  # fmt: skip
  return rewired, {'share_of_edges_kept': share}


@kernels.compiled
def _swap(tf_N, target_N, own_T, is_edge, number, state):
  """Tries swaps (t1, g1), (t2, g2) -> (t1, g2), (t2, g1), in place."""
  size = np.uint64(len(tf_N))
  for _ in range(number):
    state += kernels.GOLDEN
    i = np.int64(kernels.mix64(state) % size)
    state += kernels.GOLDEN
    j = np.int64(kernels.mix64(state) % size)
    t, u, g, h = tf_N[i], tf_N[j], target_N[i], target_N[j]
    if t == u or g == h or is_edge[t, h] or is_edge[u, g]:
      continue
    if own_T[t] == h or own_T[u] == g:
      continue
    is_edge[t, g] = is_edge[u, h] = False
    is_edge[t, h] = is_edge[u, g] = True
    target_N[i], target_N[j] = h, g
