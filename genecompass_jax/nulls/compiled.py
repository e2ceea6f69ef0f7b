"""The compiled part of the null models: counting cells, and scoring them.

The package says what the predictors are; this is how they are computed, one cell
at a time. Genes are numbered 0..T-1 here, in the order of the tokens of one
species; a pair is a (gene, count), its key count / divisor. In a cell of n
positions (`_n`), H are hidden (`_h`) and show U distinct genes that could be
true (`_U`); the H positions fall into G groups of the same candidates (`_G`).
"""

from typing import NamedTuple

import numpy as np

from genecompass_jax import kernels, vocabulary

NUM_RANK_BINS = 32
EXACT_COUNTS = 64  # counts below have a bin each
PER_OCTAVE = 16
NUM_BINS = EXACT_COUNTS - 1 + PER_OCTAVE * 14  # to 2^20
ENDS = ('nearest', 'linear', 'log_rank')

_MAX_SCALE_DIVISOR = 16
_NARROW = 24  # walking a pair takes this much less than summing up a gene
_END_REACH = 4


class Tables(NamedTuple):
  """What the kernels look up, for one species; A atoms = (gene, count) pairs.

  Genes are numbered 0..T-1 here. `gene_*` are grouped by gene, by rising key
  inside; `key_*` are sorted by (key, gene). `*_A1` are running sums.
  """

  gene_V: np.ndarray
  divisor_V: np.ndarray
  marginal_T: np.ndarray
  mean_T: np.ndarray
  rank_TQ: np.ndarray
  rank_total_Q: np.ndarray
  first_T1: np.ndarray
  gene_key_A: np.ndarray
  gene_mass_A1: np.ndarray
  gene_value_A1: np.ndarray
  key_key_A: np.ndarray
  key_gene_A: np.ndarray
  key_mass_A1: np.ndarray
  key_value_A1: np.ndarray


class Rules(NamedTuple):
  """What the kernels do, for one species."""

  library: bool
  by_token: bool
  keep: float  # share of hidden positions that show their own id
  random: float  # share that show one given id that is random
  mix_rank_bin: float
  mix_rank_bracket: float
  top: int
  bottom: int


@kernels.compiled
def bin_of(count):
  """Bin of a count: one each below 64, then 16 an octave."""
  whole = max(np.rint(count), 1.0)
  if whole < EXACT_COUNTS:
    return np.int64(whole) - 1
  log_bin = np.int64(PER_OCTAVE * (np.log2(whole) - 6))
  return min(EXACT_COUNTS - 1 + log_bin, NUM_BINS - 1)


@kernels.compiled
def scaled_counts(ids_n, values_n, divisor_V, library, count_n):
  """count_n = counts of visible genes, -1 elsewhere -> scale of the cell.

  value = log2(1 + scale * count / divisor); the scale is 1 in `released` mode.
  """
  smallest = np.inf
  for i in range(len(ids_n)):
    if values_n[i] > 0 and ids_n[i] >= vocabulary.NUM_SPECIAL:
      quotient = np.exp2(np.float64(values_n[i])) - 1.0
      count_n[i] = quotient * divisor_V[ids_n[i]]
      smallest = min(smallest, count_n[i])
    else:
      count_n[i] = -1.0
  scale = 1.0
  if library and smallest < np.inf:
    scale = smallest
    for divisor in range(1, _MAX_SCALE_DIVISOR + 1):
      whole = True
      for i in range(len(ids_n)):
        count = count_n[i] * divisor / smallest
        if count > 0 and count < 1e3 and abs(count - np.rint(count)) > 0.02:
          whole = False
          break
      if whole:
        scale = smallest / divisor
        break
  for i in range(len(ids_n)):
    if count_n[i] > 0:
      count = count_n[i] / scale
      whole = np.rint(count)
      # float32 values leave an error of 1e-6 of the count
      near = abs(count - whole) < 0.02 + 2e-6 * count
      count_n[i] = whole if near and whole > 0 else count
  return scale


@kernels.compiled
def add_cells(
  ids_N, values_N, starts_C1, gene_V, divisor_V, library,
  pairs_TN, ranks_TQ, value_sum_T,
):  # fmt: skip
  """Counts whole cells into the tables -> tokens foreign to the species."""
  foreign = 0
  for cell in range(len(starts_C1) - 1):
    start = starts_C1[cell]
    n = starts_C1[cell + 1] - start
    ids_n = ids_N[start : start + n]
    values_n = values_N[start : start + n]
    count_n = np.empty(n)
    scaled_counts(ids_n, values_n, divisor_V, library, count_n)
    for i in range(n):
      gene = gene_V[ids_n[i]]
      if gene < 0:
        foreign += 1
        continue
      pairs_TN[gene, bin_of(count_n[i])] += 1
      ranks_TQ[gene, i * NUM_RANK_BINS // n] += 1
      value_sum_T[gene] += values_n[i]
  return foreign


@kernels.compiled
def _left(key_A, low, high, key):
  """First place in [low, high) whose key is not below `key`."""
  while low < high:
    middle = (low + high) >> 1
    if key_A[middle] < key:
      low = middle + 1
    else:
      high = middle
  return low


@kernels.compiled
def _right(key_A, low, high, key):
  """First place in [low, high) whose key is above `key`."""
  while low < high:
    middle = (low + high) >> 1
    if key_A[middle] <= key:
      low = middle + 1
    else:
      high = middle
  return low


class _Bracket(NamedTuple):
  """Where the pair of a hidden gene must lie.

  With hash ties, pairs at an end carry its weight. With token ties the gene
  must be below `low_gene` at the low end and above `high_gene` at the high end.
  """

  low: float
  high: float
  low_weight: float
  high_weight: float
  low_gene: int
  high_gene: int
  by_token: bool


@kernels.compiled
def _gene_mass(gene, bracket, tables):
  """Mass of a gene's pairs in a bracket, and mass times value."""
  first = tables.first_T1[gene]
  last = tables.first_T1[gene + 1]
  a = _left(tables.gene_key_A, first, last, bracket.low)
  b = _right(tables.gene_key_A, a, last, bracket.high)
  if a == b:
    return 0.0, 0.0
  at_low = bracket.low_weight
  at_high = bracket.high_weight
  if bracket.by_token:
    at_low = 1.0 if gene < bracket.low_gene else 0.0
    at_high = 1.0 if gene > bracket.high_gene else 0.0
  mass_A1 = tables.gene_mass_A1
  value_A1 = tables.gene_value_A1
  mass = mass_A1[b] - mass_A1[a]
  value = value_A1[b] - value_A1[a]
  if bracket.low == bracket.high:
    both = at_low * at_high if bracket.by_token else 1.0
    return both * mass, both * value
  if tables.gene_key_A[a] == bracket.low:
    mass -= (1.0 - at_low) * (mass_A1[a + 1] - mass_A1[a])
    value -= (1.0 - at_low) * (value_A1[a + 1] - value_A1[a])
  if tables.gene_key_A[b - 1] == bracket.high:
    mass -= (1.0 - at_high) * (mass_A1[b] - mass_A1[b - 1])
    value -= (1.0 - at_high) * (value_A1[b] - value_A1[b - 1])
  return max(mass, 0.0), value


@kernels.compiled
def _bracket_mass(bracket, visible_v, is_visible_T, tables):
  """Mass of the pairs of all genes not visible, and mass times value.

  Walks the pairs of a narrow bracket; of a wide one takes running sums and
  subtracts the visible genes.
  """
  key_A = tables.key_key_A
  mass_A1 = tables.key_mass_A1
  value_A1 = tables.key_value_A1
  low_from = _left(key_A, 0, len(key_A), bracket.low)
  low_to = inner_from = _right(key_A, low_from, len(key_A), bracket.low)
  high_from = inner_to = _left(key_A, low_from, len(key_A), bracket.high)
  high_to = _right(key_A, high_from, len(key_A), bracket.high)
  if bracket.by_token:
    gene_A = tables.key_gene_A
    low_to = _left(gene_A, low_from, low_to, bracket.low_gene)
    high_from = _right(gene_A, high_from, high_to, bracket.high_gene)
  at_low = bracket.low_weight
  if bracket.low == bracket.high:  # one level on both sides
    at_low = 1.0
    low_from = high_from
    low_to = max(low_to, low_from) if bracket.by_token else high_to
    inner_from = inner_to = high_from = high_to
  parts = (
    (low_from, low_to, at_low),
    (inner_from, inner_to, 1.0),
    (high_from, high_to, bracket.high_weight),
  )
  width = 0
  for begin, end, _ in parts:
    width += max(end - begin, 0)
  narrow = width <= _NARROW * len(visible_v)
  mass = 0.0
  value = 0.0
  for begin, end, weight in parts:
    if narrow:
      for at in range(begin, end):
        if not is_visible_T[tables.key_gene_A[at]]:
          mass += weight * (mass_A1[at + 1] - mass_A1[at])
          value += weight * (value_A1[at + 1] - value_A1[at])
    else:
      mass += weight * (mass_A1[end] - mass_A1[begin])
      value += weight * (value_A1[end] - value_A1[begin])
  if not narrow:
    all_mass = mass
    for gene in visible_v:
      gene_mass, gene_value = _gene_mass(gene, bracket, tables)
      mass -= gene_mass
      value -= gene_value
    if mass <= 1e-11 * all_mass:  # rounding of the running sums
      return 0.0, 0.0
  return mass, value


@kernels.compiled
def _bracket_at(i, before_n, after_n, gene_n, key_n, level_n, by_token):
  """Bracket of a position, from the nearest visible genes before and after.

  `level_n` is the number of positions between the first and the last visible
  gene of a visible gene's tie, both included.
  """
  low = 0.0
  high = np.inf
  low_weight = high_weight = 1.0
  low_gene = high_gene = -1
  a = before_n[i]
  b = after_n[i]
  if a >= 0:
    high = key_n[a]
    high_gene = gene_n[a]
  if b >= 0:
    low = key_n[b]
    low_gene = gene_n[b]
  if by_token:
    return _Bracket(low, high, 1.0, 1.0, low_gene, high_gene, True)
  if low != high:
    high_weight = 1.0 / (level_n[a] + 1) if a >= 0 else 1.0
    low_weight = 1.0 / (level_n[b] + 1) if b >= 0 else 1.0
  return _Bracket(low, high, low_weight, high_weight, -1, -1, False)


@kernels.compiled
def _share(mass, taken, total, mix, backoff):
  """Probability of a gene with this mass, as far as it is not taken."""
  if total <= 0.0:
    return backoff
  return (1.0 - mix) * min(mass * (1.0 - taken) / total, 1.0) + mix * backoff


@kernels.compiled
def _posteriors(
  group_h, hidden, label_mass_h, mass_G, value_G, shown_mass_UG,
  shown_value_UG, marginal_T, mix, rules, loss_h, mean_h,
):  # fmt: skip
  """Loss of the labels and mean value of the hidden positions of a cell.

  Positions of one group have the same candidates, of mass `mass_G`, from which
  the genes shown at hidden positions are not yet taken.
  """
  num_shown, num_groups = shown_mass_UG.shape
  taken_U = np.zeros(num_shown)
  true_h = np.zeros(len(group_h))
  for h in range(len(group_h)):
    u = hidden.shown_h[h]
    if u >= 0:
      p = _share(
        shown_mass_UG[u, group_h[h]], 0.0, mass_G[group_h[h]], mix,
        marginal_T[hidden.shown_gene_U[u]] / hidden.unseen,
      )  # fmt: skip
      true_h[h] = p * (rules.keep + rules.random)
      true_h[h] /= p * rules.keep + rules.random
      taken_U[u] += true_h[h]
  left_G = mass_G.copy()
  left_value_G = value_G.copy()
  for u in range(num_shown):
    for g in range(num_groups):
      left_G[g] -= min(taken_U[u], 1.0) * shown_mass_UG[u, g]
      left_value_G[g] -= min(taken_U[u], 1.0) * shown_value_UG[u, g]
  for h in range(len(group_h)):
    g = group_h[h]
    u = hidden.shown_h[h]
    mass = left_G[g]
    value = left_value_G[g]
    shown_mass = shown_value = taken = 0.0
    if u >= 0:  # the gene shown here is not taken from itself
      taken = min(max(taken_U[u] - true_h[h], 0.0), 1.0)
      back = min(taken_U[u], 1.0) - taken
      mass += back * shown_mass_UG[u, g]
      value += back * shown_value_UG[u, g]
      shown_mass = (1.0 - taken) * shown_mass_UG[u, g]
      shown_value = (1.0 - taken) * shown_value_UG[u, g]
    if mass <= 1e-11 * mass_G[g]:
      mass = 0.0
    mass = max(mass, shown_mass)
    if hidden.label_gene_h[h] >= 0:
      v = hidden.label_h[h]
      label_taken = 0.0
      if v >= 0:
        label_taken = taken if v == u else min(taken_U[v], 1.0)
      mass = max(mass, (1.0 - label_taken) * label_mass_h[h])
      p = _share(
        label_mass_h[h], label_taken, mass, mix,
        marginal_T[hidden.label_gene_h[h]] / hidden.unseen,
      )  # fmt: skip
      if u >= 0:
        p_shown = _share(
          shown_mass_UG[u, g], taken, mass, mix,
          marginal_T[hidden.shown_gene_U[u]] / hidden.unseen,
        )  # fmt: skip
        p *= (rules.keep if u == v else 0.0) + rules.random
        p /= rules.keep * p_shown + rules.random
      loss_h[h] = -np.log(p)
    mean_h[h] = np.nan
    if mass > 0.0:
      mean_h[h] = value / mass
      if u >= 0:
        mean_h[h] = rules.keep * shown_value + rules.random * value
        mean_h[h] /= rules.keep * shown_mass + rules.random * mass


@kernels.compiled
def _beyond(rule, i, a, b, value_a, value_b):
  """Value at position i beyond the visible positions a (nearest) and b."""
  if rule == 0 or b < 0:
    return value_a
  if rule == 1:
    share = (i - a) / (b - a)
  else:
    share = np.log((i + 1.0) / (a + 1.0)) / np.log((b + 1.0) / (a + 1.0))
  return max(value_a + share * (value_b - value_a), 0.0)


@kernels.compiled
def interpolate(values_n, rules, default, out_n):
  """Values of all positions from the visible ones: linear in position."""
  n = len(values_n)
  seen_v = np.flatnonzero(values_n >= 0.0)
  count = len(seen_v)
  for i in range(n):
    out_n[i] = values_n[i] if count else default
  if count == 0:
    return
  for k in range(count - 1):
    a = seen_v[k]
    b = seen_v[k + 1]
    for i in range(a + 1, b):
      step = (values_n[b] - values_n[a]) / (b - a)
      out_n[i] = values_n[a] + step * (i - a)
  for side in range(2):
    rule = rules.bottom if side else rules.top
    a = seen_v[count - 1] if side else seen_v[0]
    b = -1
    if count > _END_REACH:
      b = seen_v[count - 1 - _END_REACH] if side else seen_v[_END_REACH]
    begin, end = (a + 1, n) if side else (0, a)
    for i in range(begin, end):
      value_b = values_n[b] if b >= 0 else values_n[a]
      out_n[i] = _beyond(rule, i, a, b, values_n[a], value_b)


class Hidden(NamedTuple):
  """The H hidden positions of a cell: value, id or both are not shown.

  Attributes:
    place_h: position.
    label_gene_h: true gene, -1 where not scored.
    label_h: which of the U shown genes that is, -1 for none.
    shown_h: which of them is shown here, -1 for none.
    shown_gene_U: genes shown at hidden positions that could be true.
    visible_v: genes visible elsewhere in the cell.
    unseen: marginal of all genes not visible.
  """

  place_h: np.ndarray
  label_gene_h: np.ndarray
  label_h: np.ndarray
  shown_h: np.ndarray
  shown_gene_U: np.ndarray
  visible_v: np.ndarray
  unseen: float


@kernels.compiled
def _find_hidden(ids_n, count_n, labels_n, tables, rules, is_visible_T):
  """Hidden positions; marks the visible genes in `is_visible_T`."""
  place_h = np.flatnonzero(count_n <= 0)
  visible_v = tables.gene_V[ids_n[count_n > 0]]
  visible_v = visible_v[visible_v >= 0]
  unseen = 1.0
  for gene in visible_v:
    is_visible_T[gene] = True
    unseen -= tables.marginal_T[gene]
  label_gene_h = np.full(len(place_h), -1)
  label_h = np.full(len(place_h), -1)
  shown_h = np.full(len(place_h), -1)
  shown_gene_U = np.empty(len(place_h), np.int64)
  num_shown = 0
  for h in range(len(place_h)):
    i = place_h[h]
    if labels_n[i] >= 0:
      label_gene_h[h] = tables.gene_V[labels_n[i]]
    gene = tables.gene_V[ids_n[i]]
    if rules.keep > 0 and gene >= 0 and not is_visible_T[gene]:
      u = 0
      while u < num_shown and shown_gene_U[u] != gene:
        u += 1
      shown_gene_U[u] = gene
      num_shown = max(num_shown, u + 1)
      shown_h[h] = u
  shown_gene_U = shown_gene_U[:num_shown]
  for h in range(len(place_h)):
    for u in range(num_shown):
      if label_gene_h[h] == shown_gene_U[u]:
        label_h[h] = u
  return Hidden(
    place_h, label_gene_h, label_h, shown_h, shown_gene_U, visible_v,
    max(unseen, 1e-300),
  )  # fmt: skip


@kernels.compiled
def find_brackets(ids_n, values_n, count_n, scale, hidden, tables, rules):
  """Distinct brackets, and which of them each hidden position has."""
  n = len(ids_n)
  key_n = count_n / tables.divisor_V[ids_n]
  gene_n = tables.gene_V[ids_n]
  level_n = np.ones(n, np.int64)
  before_n = np.empty(n, np.int64)
  after_n = np.empty(n, np.int64)
  last = -1
  first_of_level = 0
  for i in range(n):
    before_n[i] = last
    if count_n[i] > 0:
      if last < 0 or key_n[i] != key_n[last]:
        first_of_level = i
      level_n[i] = i - first_of_level + 1
      last = i
  last = -1
  for i in range(n - 1, -1, -1):
    after_n[i] = last
    if count_n[i] > 0:
      if last >= 0 and key_n[i] == key_n[last]:
        level_n[i] = level_n[last]
      last = i
  group_h = np.empty(len(hidden.place_h), np.int64)
  brackets = [_Bracket(0.0, 0.0, 0.0, 0.0, 0, 0, False) for _ in range(0)]
  for h in range(len(hidden.place_h)):
    i = hidden.place_h[h]
    if values_n[i] >= 0:  # the id alone is hidden; float32 moves the key
      key = (np.exp2(np.float64(values_n[i])) - 1.0) / scale
      bracket = _Bracket(
        key * (1 - 2e-6), key * (1 + 2e-6), 1.0, 1.0, -1, -1, False
      )
    else:
      bracket = _bracket_at(
        i, before_n, after_n, gene_n, key_n, level_n, rules.by_token
      )
    if h == 0 or bracket != brackets[-1]:
      brackets.append(bracket)
    group_h[h] = len(brackets) - 1
  return brackets, group_h


@kernels.compiled
def score_rank_bin(n, hidden, tables, rules, loss_h, mean_h):
  """Losses of the rank-bin null at the hidden positions."""
  group_h = hidden.place_h * NUM_RANK_BINS // n
  mass_Q = tables.rank_total_Q.copy()
  for gene in hidden.visible_v:
    for q in range(NUM_RANK_BINS):
      mass_Q[q] -= tables.rank_TQ[gene, q]
  for q in range(NUM_RANK_BINS):
    if mass_Q[q] <= 1e-11 * tables.rank_total_Q[q]:
      mass_Q[q] = 0.0
  label_mass_h = np.zeros(len(group_h))
  for h in range(len(group_h)):
    if hidden.label_gene_h[h] >= 0:
      label_mass_h[h] = tables.rank_TQ[hidden.label_gene_h[h], group_h[h]]
  shown_mass_UQ = np.empty((len(hidden.shown_gene_U), NUM_RANK_BINS))
  for u in range(len(shown_mass_UQ)):
    shown_mass_UQ[u] = tables.rank_TQ[hidden.shown_gene_U[u]]
  _posteriors(
    group_h, hidden, label_mass_h, mass_Q, np.zeros_like(mass_Q),
    shown_mass_UQ, np.zeros_like(shown_mass_UQ), tables.marginal_T,
    rules.mix_rank_bin, rules, loss_h, mean_h,
  )  # fmt: skip


@kernels.compiled
def score_bracket(
  brackets, group_h, hidden, is_visible_T, tables, rules, loss_h, mean_h
):
  """Losses and mean values of the rank-bracket null."""
  shape = len(hidden.shown_gene_U), len(brackets)
  mass_G = np.empty(len(brackets))
  value_G = np.empty(len(brackets))
  shown_mass_UG = np.empty(shape)
  shown_value_UG = np.empty(shape)
  for g in range(len(brackets)):
    mass_G[g], value_G[g] = _bracket_mass(
      brackets[g], hidden.visible_v, is_visible_T, tables
    )
    for u in range(shape[0]):
      shown_mass_UG[u, g], shown_value_UG[u, g] = _gene_mass(
        hidden.shown_gene_U[u], brackets[g], tables
      )
  label_mass_h = np.zeros(len(group_h))
  for h in range(len(group_h)):
    if hidden.label_gene_h[h] >= 0:
      label_mass_h[h], _ = _gene_mass(
        hidden.label_gene_h[h], brackets[group_h[h]], tables
      )
  _posteriors(
    group_h, hidden, label_mass_h, mass_G, value_G, shown_mass_UG,
    shown_value_UG, tables.marginal_T, rules.mix_rank_bracket, rules, loss_h,
    mean_h,
  )  # fmt: skip


@kernels.compiled
def _score_cell(
  ids_n, values_n, labels_n, tables, rules, default, is_visible_T, loss_3n,
  value_3n,
):  # fmt: skip
  """Id losses and predicted values at the positions of one cell.

  `labels_n` is the true token of scored positions, -1 elsewhere.
  """
  n = len(ids_n)
  count_n = np.empty(n)
  scale = scaled_counts(
    ids_n, values_n, tables.divisor_V, rules.library, count_n
  )
  hidden = _find_hidden(ids_n, count_n, labels_n, tables, rules, is_visible_T)
  # Where a position shows all, the loss is 0 and the value its own.
  loss_3n[:] = 0.0
  interpolate(values_n, rules, default, value_3n[1])
  value_3n[2] = value_3n[1]
  for i in range(n):
    value_3n[0, i] = default
    if labels_n[i] >= 0:
      value_3n[0, i] = tables.mean_T[tables.gene_V[labels_n[i]]]

  loss_h = np.zeros(len(hidden.place_h))
  mean_h = np.empty(len(hidden.place_h))
  score_rank_bin(n, hidden, tables, rules, loss_h, mean_h)
  for h in range(len(loss_h)):
    loss_3n[1, hidden.place_h[h]] = loss_h[h]
  brackets, group_h = find_brackets(
    ids_n, values_n, count_n, scale, hidden, tables, rules
  )
  score_bracket(
    brackets, group_h, hidden, is_visible_T, tables, rules, loss_h, mean_h
  )
  for h in range(len(loss_h)):
    i = hidden.place_h[h]
    loss_3n[2, i] = loss_h[h]
    if values_n[i] < 0 and not np.isnan(mean_h[h]):
      mean = mean_h[h]
      if rules.library:  # of log2 keys
        mean = np.log2(1.0 + scale * np.exp2(mean))
      value_3n[2, i] = mean
    # The marginal knows the shown id, not what else is in the cell.
    label = hidden.label_gene_h[h]
    if label >= 0:
      p = tables.marginal_T[label]
      shown = tables.gene_V[ids_n[i]]
      if rules.keep > 0 and shown >= 0:
        p *= (rules.keep if shown == label else 0.0) + rules.random
        p /= rules.keep * tables.marginal_T[shown] + rules.random
      loss_3n[0, i] = -np.log(p)
  for gene in hidden.visible_v:
    is_visible_T[gene] = False


@kernels.compiled
def score_cells(
  ids_N, values_N, labels_N, first_C, last_C, tables, rules, default, loss_3N,
  value_3N,
):  # fmt: skip
  """Scores the cells first_C:last_C of flat storage."""
  is_visible_T = np.zeros(len(tables.marginal_T), np.bool_)
  for cell in range(len(first_C)):
    a = first_C[cell]
    b = last_C[cell]
    _score_cell(
      ids_N[a:b], values_N[a:b], labels_N[a:b], tables, rules, default,
      is_visible_T, loss_3N[:, a:b], value_3N[:, a:b],
    )  # fmt: skip
