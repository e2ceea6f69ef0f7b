"""Null models of the objective `split`: what a shown value or id gives away.

The package says what the predictors are. Where an id is hidden, value and rank are
shown: the value is a count over the divisor of the gene, so the gene is one of
those for which value times divisor is a whole number. Where a value is hidden,
the id is shown and no rank: the value is that of the gene in training cells,
moved by what the other genes of the cell tell of its depth.

Names and shapes as in `compiled`; X features of a cell.
"""

from typing import NamedTuple

import numpy as np

from genecompass_jax import kernels, vocabulary
from genecompass_jax.nulls import compiled

NUM_FEATURES = 4
# Moments of a gene: cells, sum y, sums x, sums x x (upper half), sums x y.
NUM_MOMENTS = 2 + NUM_FEATURES + NUM_FEATURES * (NUM_FEATURES + 3) // 2
_UPPER = np.triu_indices(NUM_FEATURES)
_WHOLE = 2e-6  # float32 values and the scale leave this much of a count
_OFFSET_CELLS = 1.0  # weight of the mean of all genes in that of one


class Lines(NamedTuple):
  """Value of a gene as a line in the features of its cell.

  value = offset_T + slope_TX . (x - centre_TX)
  """

  offset_T: np.ndarray
  slope_TX: np.ndarray
  centre_TX: np.ndarray


class Rules(NamedTuple):
  """What the kernel does, for one species, beside `compiled.Rules`."""

  mix_value_bracket: float
  library: bool
  by_token: bool
  # Which id losses are wanted: brackets are dear, and a calibration looks at one.
  rank_bin: bool = True
  rank_bracket: bool = True
  value_bracket: bool = True


@kernels.compiled
def _features(mean_value, lowest_value, num_genes, scale, x_X):
  x_X[0] = mean_value
  x_X[1] = lowest_value
  x_X[2] = np.log2(num_genes)
  x_X[3] = np.log2(scale)


@kernels.compiled
def add_moments(
  ids_N, values_N, starts_C1, gene_V, divisor_V, library, moments_TM
):
  """Adds the moments of whole cells; a gene sees only the others."""
  x_X = np.empty(NUM_FEATURES)
  for cell in range(len(starts_C1) - 1):
    start = starts_C1[cell]
    n = starts_C1[cell + 1] - start
    if n < 2:
      continue
    ids_n = ids_N[start : start + n]
    values_n = values_N[start : start + n]
    scale = compiled.scaled_counts(
      ids_n, values_n, divisor_V, library, np.empty(n)
    )
    total = 0.0
    for i in range(n):
      total += values_n[i]
    lowest, second = np.partition(values_n, 1)[:2]
    for i in range(n):
      gene = gene_V[ids_n[i]]
      if gene < 0:
        continue
      y = np.float64(values_n[i])
      others = second if values_n[i] == lowest else lowest
      _features((total - y) / (n - 1), others, n, scale, x_X)
      moments_m = moments_TM[gene]
      moments_m[0] += 1
      moments_m[1] += y
      at = 2 + NUM_FEATURES
      for a in range(NUM_FEATURES):
        moments_m[2 + a] += x_X[a]
        for b in range(a, NUM_FEATURES):
          moments_m[at] += x_X[a] * x_X[b]
          at += 1
      for a in range(NUM_FEATURES):
        moments_m[at + a] += x_X[a] * y


def lines(
  moments_TM: np.ndarray, pseudo_cells: float, mean_value: float
) -> Lines:
  """A line for every gene, its slopes drawn towards those of all genes.

  Args:
    moments_TM: as `add_moments` sums them.
    pseudo_cells: weight of the common slopes, in cells.
    mean_value: offset where there are no cells at all.
  """
  n_T, y_T = moments_TM[:, 0], moments_TM[:, 1]
  x_TX = moments_TM[:, 2 : 2 + NUM_FEATURES]
  upper_TU = moments_TM[:, 2 + NUM_FEATURES : -NUM_FEATURES]
  xx_TXX = np.empty((len(n_T), NUM_FEATURES, NUM_FEATURES))
  xx_TXX[:, _UPPER[0], _UPPER[1]] = upper_TU
  xx_TXX[:, _UPPER[1], _UPPER[0]] = upper_TU
  cells_T = np.maximum(n_T, 1.0)
  within_TXX = xx_TXX - np.einsum('TX,TY,T->TXY', x_TX, x_TX, 1 / cells_T)
  within_TX = moments_TM[:, -NUM_FEATURES:] - x_TX * (y_T / cells_T)[:, None]
  total = max(n_T.sum(), 1.0)
  # A feature that never changes, as the scale in `released` mode, has slope 0.
  ridge_XX = 1e-6 * np.eye(NUM_FEATURES)
  common_XX = within_TXX.sum(0) / total + ridge_XX
  common_X = np.linalg.solve(common_XX, within_TX.sum(0) / total)
  slope_TX = np.linalg.solve(
    within_TXX + pseudo_cells * common_XX + ridge_XX,
    (within_TX + pseudo_cells * (common_XX @ common_X))[..., None],
  )[..., 0]
  mean_X = x_TX.sum(0) / total
  centre_TX = np.where(n_T[:, None] > 0, x_TX / cells_T[:, None], mean_X)
  prior_T = y_T.sum() / total if n_T.any() else mean_value
  prior_T = prior_T + (centre_TX - mean_X) @ common_X
  offset_T = (y_T + _OFFSET_CELLS * prior_T) / (n_T + _OFFSET_CELLS)
  return Lines(offset_T, slope_TX, centre_TX)


def no_moments(num_genes: int) -> np.ndarray:
  """Before any cell."""
  return np.zeros((num_genes, NUM_MOMENTS))


@kernels.compiled
def _count_range(whole):
  """Counts [low, high) that share the bin of a count."""
  if whole < compiled.EXACT_COUNTS:
    return whole, whole + 1.0
  k = compiled.bin_of(whole) - (compiled.EXACT_COUNTS - 1)
  low = np.ceil(2.0 ** (6.0 + k / compiled.PER_OCTAVE) - 1e-9)
  high = np.ceil(2.0 ** (6.0 + (k + 1) / compiled.PER_OCTAVE) - 1e-9)
  return low, high


@kernels.compiled
def _mass_at(gene, whole, divisor, tables):
  """Mass of a gene at one count; counts of a bin share its mass evenly."""
  low, high = _count_range(whole)
  first = tables.first_T1[gene]
  last = tables.first_T1[gene + 1]
  while first < last:  # the first pair of the bin
    middle = (first + last) >> 1
    if tables.gene_key_A[middle] < (low - 0.5) / divisor:
      first = middle + 1
    else:
      last = middle
  mass = 0.0
  stop = tables.first_T1[gene + 1]
  while first < stop and tables.gene_key_A[first] < (high - 0.5) / divisor:
    mass += tables.gene_mass_A1[first + 1] - tables.gene_mass_A1[first]
    first += 1
  return max(mass, 0.0) / (high - low)


@kernels.compiled
def _gene_mass(gene, key, exact, divisor_T, tables):
  """Mass of a gene at a key, -1 where its count would not be whole.

  Not `exact`, any count does: the mass is then a density, and a step of one
  count is 1 / divisor of key.
  """
  count = key * divisor_T[gene]
  whole = max(np.rint(count), 1.0)
  if not exact:
    return divisor_T[gene] * _mass_at(gene, whole, divisor_T[gene], tables)
  if abs(count - whole) > _WHOLE * count:
    return -1.0
  return _mass_at(gene, whole, divisor_T[gene], tables)


@kernels.compiled
def _pairs_mass(key, low_gene, high_gene, divisor_T, is_visible_T, tables):
  """Mass of all pairs at a key whose counts have a bin of their own."""
  key_A = tables.key_key_A
  at = np.searchsorted(key_A, key * (1 - _WHOLE))
  highest = key * (1 + _WHOLE)
  mass = 0.0
  while at < len(key_A) and key_A[at] <= highest:
    gene = tables.key_gene_A[at]
    is_single = key * divisor_T[gene] < compiled.EXACT_COUNTS - 0.5
    if is_single and not is_visible_T[gene] and low_gene < gene < high_gene:
      mass += tables.key_mass_A1[at + 1] - tables.key_mass_A1[at]
    at += 1
  return mass


@kernels.compiled
def _total_mass(key, low_gene, high_gene, divisor_T, is_visible_T, tables):
  """Mass of all genes between two at a key, and whether counts are whole.

  If no gene has a whole count there, as with corrected counts, any count does.
  """
  total = _pairs_mass(key, low_gene, high_gene, divisor_T, is_visible_T, tables)
  binned = (compiled.EXACT_COUNTS - 0.5) / key
  found = total > 0.0
  if not found or divisor_T.max() >= binned:
    for gene in range(low_gene + 1, high_gene):
      if not is_visible_T[gene] and (not found or divisor_T[gene] >= binned):
        mass = _gene_mass(gene, key, True, divisor_T, tables)
        if mass >= 0.0:
          found = True
          if divisor_T[gene] >= binned:
            total += mass
  if found:
    return total, True
  for gene in range(low_gene + 1, high_gene):
    if not is_visible_T[gene]:
      total += _gene_mass(gene, key, False, divisor_T, tables)
  return total, False


@kernels.compiled
def _score_value_bracket(
  ids_n, values_n, key_n, scale, hidden, divisor_T, is_visible_T, tables, rules,
  loss_h,
):  # fmt: skip
  """Losses of the value-bracket null; equal keys are looked up once."""
  num_genes = len(divisor_T)
  last_key = -1.0
  total = 0.0
  exact = True
  for h in range(len(hidden.place_h)):
    i = hidden.place_h[h]
    label = hidden.label_gene_h[h]
    if label < 0:
      continue
    key = (np.exp2(np.float64(values_n[i])) - 1.0) / scale
    low_gene = -1
    high_gene = num_genes
    if rules.by_token:  # equal keys ascend by token
      j = i - 1
      while j >= 0 and (key_n[j] <= 0 or abs(key_n[j] - key) <= _WHOLE * key):
        if key_n[j] > 0:
          low_gene = tables.gene_V[ids_n[j]]
          break
        j -= 1
      j = i + 1
      while j < len(ids_n) and (
        key_n[j] <= 0 or abs(key_n[j] - key) <= _WHOLE * key
      ):
        if key_n[j] > 0:
          high_gene = tables.gene_V[ids_n[j]]
          break
        j += 1
    if rules.by_token or abs(key - last_key) > _WHOLE * key:
      total, exact = _total_mass(
        key, low_gene, high_gene, divisor_T, is_visible_T, tables
      )
      last_key = key
    backoff = tables.marginal_T[label] / hidden.unseen
    p = backoff
    if total > 0.0:
      mass = 0.0
      if low_gene < label < high_gene:
        mass = max(_gene_mass(label, key, exact, divisor_T, tables), 0.0)
      mix = rules.mix_value_bracket
      p = (1.0 - mix) * min(mass / total, 1.0) + mix * backoff
    loss_h[h] = -np.log(p)


@kernels.compiled
def _mean_at_scale(gene, scale, tables, default):
  """Mean value of a gene's training counts, seen in a cell of this scale."""
  mass = 0.0
  value = 0.0
  for at in range(tables.first_T1[gene], tables.first_T1[gene + 1]):
    own = tables.gene_mass_A1[at + 1] - tables.gene_mass_A1[at]
    mass += own
    value += own * np.log2(1.0 + scale * tables.gene_key_A[at])
  return value / mass if mass > 0.0 else default


@kernels.compiled
def _score_cell(
  ids_n, values_n, labels_n, unranked, divisor_T, tables, rank_rules, rules,
  lines, default, is_visible_T, loss_4n, value_3n,
):  # fmt: skip
  """Id losses and predicted values of one cell; its last genes are unranked."""
  n = len(ids_n)
  ranked = n - unranked
  count_n = np.empty(n)
  scale = compiled.scaled_counts(
    ids_n, values_n, tables.divisor_V, rules.library, count_n
  )
  visible_v = tables.gene_V[ids_n[ids_n >= vocabulary.NUM_SPECIAL]]
  visible_v = visible_v[visible_v >= 0]
  unseen = 1.0
  for gene in visible_v:
    is_visible_T[gene] = True
    unseen -= tables.marginal_T[gene]
  place_h = np.flatnonzero(ids_n[:ranked] == vocabulary.MASK)
  none_h = np.full(len(place_h), -1)
  label_gene_h = none_h.copy()
  for h in range(len(place_h)):
    if labels_n[place_h[h]] >= 0:
      label_gene_h[h] = tables.gene_V[labels_n[place_h[h]]]
  hidden = compiled.Hidden(
    place_h, label_gene_h, none_h, none_h, np.empty(0, np.int64), visible_v,
    max(unseen, 1e-300),
  )  # fmt: skip

  loss_4n[:] = 0.0
  loss_h = np.zeros(len(place_h))
  mean_h = np.empty(len(place_h))
  for h in range(len(place_h)):
    if label_gene_h[h] >= 0:
      loss_4n[0, place_h[h]] = -np.log(tables.marginal_T[label_gene_h[h]])
  if len(place_h) and rules.rank_bin:
    compiled.score_rank_bin(ranked, hidden, tables, rank_rules, loss_h, mean_h)
    loss_4n[1, :ranked][place_h] = loss_h
  if len(place_h) and rules.rank_bracket:
    # The bracket by rank does not look at the value of its own position.
    other_n = values_n[:ranked].copy()
    other_n[place_h] = -1.0
    brackets, group_h = compiled.find_brackets(
      ids_n[:ranked], other_n, count_n[:ranked], scale, hidden, tables,
      rank_rules,
    )  # fmt: skip
    compiled.score_bracket(
      brackets, group_h, hidden, is_visible_T, tables, rank_rules, loss_h,
      mean_h,
    )  # fmt: skip
    loss_4n[2, :ranked][place_h] = loss_h
  if len(place_h) and rules.value_bracket:
    loss_h[:] = 0.0
    key_n = count_n[:ranked] / tables.divisor_V[ids_n[:ranked]]
    _score_value_bracket(
      ids_n[:ranked], values_n[:ranked], key_n, scale, hidden, divisor_T,
      is_visible_T, tables, rules, loss_h,
    )  # fmt: skip
    loss_4n[3, :ranked][place_h] = loss_h

  total = 0.0
  for i in range(ranked):
    total += values_n[i]
  x_X = np.empty(NUM_FEATURES)
  if ranked:
    lowest = np.min(values_n[:ranked])
    _features(total / ranked, lowest, n, scale, x_X)
  for i in range(ranked, n):
    gene = tables.gene_V[ids_n[i]]
    value_3n[:, i] = tables.mean_T[gene]
    if ranked:
      if rules.library:  # the only mode in which it is asked for
        value_3n[1, i] = _mean_at_scale(gene, scale, tables, default)
      value = lines.offset_T[gene]
      for a in range(NUM_FEATURES):
        step = x_X[a] - lines.centre_TX[gene, a]
        value += lines.slope_TX[gene, a] * step
      value_3n[2, i] = max(value, 0.0)
  for gene in visible_v:
    is_visible_T[gene] = False


@kernels.compiled
def score_cells(
  ids_N, values_N, labels_N, first_C, last_C, unranked_C, divisor_T, tables,
  rank_rules, rules, lines, default, loss_4N, value_3N,
):  # fmt: skip
  """Scores the cells first_C:last_C of flat storage.

  Ids: marginal, rank bin, rank bracket, value bracket. Values: mean of the
  gene, of its counts at the scale of the cell, and its line.
  """
  is_visible_T = np.zeros(len(tables.marginal_T), np.bool_)
  for cell in range(len(first_C)):
    a = first_C[cell]
    b = last_C[cell]
    _score_cell(
      ids_N[a:b], values_N[a:b], labels_N[a:b], unranked_C[cell], divisor_T,
      tables, rank_rules, rules, lines, default, is_visible_T,
      loss_4N[:, a:b], value_3N[:, a:b],
    )  # fmt: skip
