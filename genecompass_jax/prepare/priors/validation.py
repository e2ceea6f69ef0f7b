"""Does a prior know something it was not built from?

A truth is a list of sets of genes that belong together: a pathway, or the
targets of one regulator. The question is whether the vectors of a set are
nearer to each other than those of other genes alike in species and expression
that have this prior: the same statistic after the rows were permuted within
these strata, many times.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse, stats

from genecompass_jax import errors, gene_table, paths
from genecompass_jax.prepare import raw_files
from genecompass_jax.prepare.priors import (
  files,
  names,
  pairs as pairs_lib,
  strata,
)

SMALLEST, LARGEST = 5, 200  # genes of a set with the prior, to be counted
_PAIRS = 100_000  # drawn for the AUROC


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
  """Sets of genes that belong together.

  Attributes:
    name: of the truth.
    species: code.
    gene_M, set_M: memberships: row of the gene table, number of the set.
    regulator_K: row of the regulator of each set; -1 in sets without.
    facts: the file and what was lost.
  """

  name: str
  species: int
  gene_M: np.ndarray
  set_M: np.ndarray
  regulator_K: np.ndarray
  facts: dict

  def pair_keys(self, most: int = 0) -> np.ndarray:
    """Keys of edges, or of all pairs of members of a set of `most` at most."""
    of_K = self.regulator_K[self.set_M]
    edges = of_K >= 0
    found = [pairs_lib.keys(of_K[edges], self.gene_M[edges])]
    size_K = np.bincount(self.set_M, minlength=len(self.regulator_K))
    order = np.argsort(self.set_M, kind='stable')
    ends = np.cumsum(size_K)
    for k in np.flatnonzero((self.regulator_K < 0) & (size_K > 1)):
      if not most or size_K[k] <= most:
        members = self.gene_M[order[ends[k] - size_K[k] : ends[k]]]
        one, other = np.triu_indices(len(members), 1)
        found.append(pairs_lib.keys(members[one], members[other]))
    return np.unique(np.concatenate(found))


def read_sets(
  name: str,
  path: paths.PathLike,
  species: int,
  genes: gene_table.GeneTable,
) -> Truth:
  """Gene sets of a GMT file.

  Raises:
    UserError: no such file, not GMT, or names of another species.
  """
  listed: list[tuple[str, int]] = []
  number = 0
  for number, line in enumerate(raw_files.lines(path), 1):
    parts = line.split('\t')
    if line and len(parts) < 3:
      raise errors.UserError(
        f'{path} line {number}: GMT has a name, a link and genes, separated by '
        'tabs'
      )
    listed += [(gene, number - 1) for gene in parts[2:] if gene]
  if not listed:
    raise errors.UserError(f'{path}: no gene sets')
  row_M, report = names.rows([gene for gene, _ in listed], species, genes)
  names.check_known(path, report)
  set_M = np.array([k for _, k in listed], np.int32)
  both = np.unique(np.stack([set_M, row_M], 1)[row_M >= 0], axis=0)
  facts = files.source(path) | {'sets': number, 'genes': report}
  regulator_K = np.full(number, -1, np.int32)
  return Truth(name, species, both[:, 1], both[:, 0], regulator_K, facts)


def from_edges(
  name: str, species: int, tf_N: np.ndarray, target_N: np.ndarray, facts: dict
) -> Truth:
  """The targets of each regulator as a set."""
  both = np.unique(np.stack([tf_N, target_N], 1), axis=0)
  regulators, set_M = np.unique(both[:, 0], return_inverse=True)
  return Truth(
    name, species, both[:, 1], set_M.astype(np.int32),
    regulators.astype(np.int32), facts,
  )  # fmt: skip


def without_known(truth: Truth, known: np.ndarray) -> Truth:
  """Targets that the prior's own pairs do not give; sets stay as they are.

  Args:
    truth: sets of targets are thinned; sets without regulator are kept.
    known: keys of the prior's pairs.
  """
  of_M = truth.regulator_K[truth.set_M]
  is_known = np.isin(pairs_lib.keys(of_M, truth.gene_M), known) & (of_M >= 0)
  return dataclasses.replace(
    truth, gene_M=truth.gene_M[~is_known], set_M=truth.set_M[~is_known]
  )


def score(
  truth: Truth,
  rows_N: np.ndarray,
  vectors_NP: np.ndarray,
  value_G: np.ndarray | None,
  genes: gene_table.GeneTable,
  permutations: int = 200,
  seed: int = 0,
  known: np.ndarray | None = None,
) -> dict | None:
  """Mean cosine inside sets against permuted rows; None with too few sets.

  Args:
    truth: the sets.
    rows_N: genes of the prior.
    vectors_NP: their vectors; the mean of the species is taken off first.
    value_G: expression, for the strata.
    genes: the gene table.
    permutations: of the rows.
    seed: of permutations and of the pairs drawn.
    known: keys of the prior's own pairs; pairs among them are left out of
      `auroc_new`.

  Returns:
    `sets`, `genes`; `cosine` (mean over sets of the mean cosine of pairs) and
    `permuted` (its mean over permutations); `z` and `p` of the difference;
    `auroc`: the chance that a pair of a set is nearer than a pair of others
    from the same strata; `auroc_new`: of pairs that are not the prior's own;
    `auroc_edges`: of regulators and their targets.
  """
  mine = np.flatnonzero(genes.species_G[rows_N] == truth.species)
  rows_N, x_NP = rows_N[mine], vectors_NP[mine].astype(np.float64)
  at_G = np.full(len(genes), -1, np.int64)
  at_G[rows_N] = np.arange(len(rows_N))
  gene_M, set_M = at_G[truth.gene_M], truth.set_M
  set_M, gene_M = set_M[gene_M >= 0], gene_M[gene_M >= 0]
  size_K = np.bincount(set_M, minlength=len(truth.regulator_K))
  good_K = (size_K >= SMALLEST) & (size_K <= LARGEST)
  keep = good_K[set_M]
  if good_K.sum() < 3:
    return None
  number_K = np.cumsum(good_K) - 1
  gene_M, set_M = gene_M[keep], number_K[set_M[keep]]
  size_K = size_K[good_K].astype(np.float64)
  x_NP = x_NP - x_NP.mean(0)
  norm_N = np.linalg.norm(x_NP, axis=1, keepdims=True)
  x_NP = (x_NP / np.maximum(norm_N, 1e-12)).astype(np.float32)
  is_zero = norm_N[:, 0] <= 1e-12
  member_KN = sparse.csr_array(
    (np.ones(len(set_M), np.float32), (set_M, gene_M)),
    (len(size_K), len(rows_N)),
  )

  def mean_cosine(x):
    sums = np.square(member_KN @ x, dtype=np.float64).sum(1)
    return float(((sums - size_K) / (size_K * (size_K - 1))).mean())

  rng = np.random.default_rng([seed, 20])
  strata_N = strata.of(rows_N, value_G, genes)
  observed = mean_cosine(x_NP)
  null = []
  for _ in range(permutations):
    order = strata.permutation(strata_N, rng)
    null.append(mean_cosine(x_NP[order]))
  null = np.array(null)
  one, other = _drawn(member_KN, rng)
  order, again = (strata.permutation(strata_N, rng) for _ in range(2))
  near = (x_NP[one] * x_NP[other]).sum(1)
  far = _far(x_NP, order[one], again[other])
  found = {
    'sets': len(size_K),
    'genes': len(np.unique(gene_M)),
    'cosine': round(observed, 4),
    'permuted': round(float(null.mean()), 4),
    'z': round(float((observed - null.mean()) / max(null.std(), 1e-12)), 1),
    'p': float((1 + (null >= observed).sum()) / (1 + permutations)),
    'auroc': round(_auroc(near, far[~np.isnan(far)]), 3),
    'zero_vectors': int(is_zero.sum()),
  }
  if (truth.regulator_K >= 0).any():
    found['auroc_edges'] = _edges(truth, at_G, x_NP, order, again)
  if known is not None:
    is_own = np.isin(pairs_lib.keys(rows_N[one], rows_N[other]), known)
    found['share_own_pairs'] = round(float(is_own.mean()), 3)
    new, others = near[~is_own], far[~is_own & ~np.isnan(far)]
    found['auroc_new'] = (
      round(_auroc(new, others), 3) if len(new) and len(others) else None
    )
  return found


def overlap(
  truth_keys: np.ndarray, own: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Share of the truth's pairs that each source states.

  Args:
    truth_keys: from `Truth.pair_keys`.
    own: keys of the pairs of each prior or source.
  """
  return {
    name: round(float(np.isin(truth_keys, keys).mean()), 4)
    if len(truth_keys)
    else 0.0
    for name, keys in own.items()
  }


def keys_by_source(
  found: pairs_lib.Pairs, with_lifted: bool = True
) -> dict[str, np.ndarray]:
  """Keys of all pairs, under '', and of each source under its name."""
  if not with_lifted:
    found = found.select(~found.is_lifted_N)
  keys = pairs_lib.keys(found.a_N, found.b_N)
  of = {'': np.unique(keys)}
  for i, name in enumerate(found.sources):
    of[name] = np.unique(keys[(found.source_N >> i & 1) > 0])
  return of


def table(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
  """Rows as a Markdown table; '' stands for what a row does not have."""

  def cell(value):
    if value is None:
      return ''
    if isinstance(value, float):
      return f'{value:.4g}'
    return f'{value:,}' if isinstance(value, int) else str(value)

  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  lines += [
    '| ' + ' | '.join(cell(row.get(name)) for name in columns) + ' |'
    for row in rows
  ]
  return '\n'.join(lines)


def _drawn(member_KN, rng) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of members of a set, each set as often as any other."""
  size_K = np.diff(member_KN.indptr)
  k = rng.integers(0, len(size_K), _PAIRS)
  first = (rng.random(_PAIRS) * size_K[k]).astype(np.int64)
  step = 1 + (rng.random(_PAIRS) * (size_K[k] - 1)).astype(np.int64)
  second = (first + step) % size_K[k]
  start = member_KN.indptr[k]
  return member_KN.indices[start + first], member_KN.indices[start + second]


def _edges(truth, at_G, x_NP, order, again) -> float | None:
  one = at_G[truth.regulator_K[truth.set_M]]
  other = at_G[truth.gene_M]
  both = (one >= 0) & (other >= 0)
  if both.sum() < 10:
    return None
  one, other = one[both], other[both]
  near = (x_NP[one] * x_NP[other]).sum(1)
  far = _far(x_NP, order[one], again[other])
  return round(_auroc(near, far[~np.isnan(far)]), 3)


def _far(x_NP, one, other) -> np.ndarray:
  """Cosines of pairs that were drawn apart; a gene with itself is none."""
  return np.where(one == other, np.nan, (x_NP[one] * x_NP[other]).sum(1))


def _auroc(high: np.ndarray, low: np.ndarray) -> float:
  rank = stats.rankdata(np.concatenate([high, low]))[: len(high)].sum()
  return float(
    (rank - len(high) * (len(high) + 1) / 2) / (len(high) * len(low))
  )
