"""Null models: each against a slow reference, and against Bayes' rule."""

import collections
import dataclasses
import math

import anndata
import numpy as np
import pytest

from genecompass_jax import (
  encoding,
  errors,
  masking,
  nulls,
  schemas,
)
from genecompass_jax.nulls import compiled, counts as counts_lib

FIRST = 2  # first gene token
SIZE = 42  # V
TOKENS = np.arange(FIRST, SIZE, dtype=np.int32)
# Shared divisors make ties across genes, also between different counts.
DIVISOR_V = np.array([1.0, 1.0, *np.resize([1, 1, 2, 1, 3, 1, 1.5], 40)])
DEFAULT = masking.MaskConfig()
ONLY_MASK = masking.MaskConfig(mask_share=1.0, random_share=0.0)


def gene_counts(seed, num_cells):
  """Counts of independent genes [C, 40]: rare and frequent, low and high."""
  rng = np.random.default_rng(seed)
  present = rng.random((num_cells, 40)) < np.linspace(0.1, 0.95, 40)
  counts = rng.geometric(np.resize([0.8, 0.5, 0.25], 40), (num_cells, 40))
  counts[:, 7] += 300  # a gene whose counts are binned
  return np.where(present, counts, 0)


def encode(counts, config):
  """Encoded cells of a table of counts."""
  cell, gene = np.nonzero(counts)
  starts = np.concatenate([[0], np.cumsum(np.bincount(cell))])
  cells = encoding.RaggedCells(
    gene.astype(np.int32),
    counts[cell, gene].astype(np.float64),
    starts.astype(np.int64),
    counts.sum(1).astype(np.float64),
  )
  return encoding.CellEncoder(config, TOKENS, DIVISOR_V).encode(cells)


def fit(counts, config, mask, num_chunks=3, **changes):
  """Null models of the counts, with some choices set by hand."""
  model = nulls.NullModels.fit(
    [
      nulls.TrainingCells(0, encode(part, config))
      for part in np.array_split(counts, num_chunks)
    ],
    encoding_config=config,
    mask=mask,
    divisor_SV=DIVISOR_V[None],
    species_tokens=[TOKENS],
  )
  choices = dataclasses.replace(model.choices[0], **changes)
  return dataclasses.replace(model, choices=(choices,))


def hide(cells, mask, seed=0):
  """What the model sees of the cells."""
  return masking.mask_cells(
    cells,
    np.arange(cells.num_cells),
    config=mask,
    seed=seed,
    epoch=masking.EVALUATION_EPOCH,
    random_tokens=TOKENS,
    vocabulary_size=SIZE,
  )


def batch_of(cells, masked, cells_per_row=1, slots=128, labels_N=None):
  """A batch of the cells, `cells_per_row` packed into a row."""
  num_rows = -(-cells.num_cells // cells_per_row)
  integers = np.zeros((8, num_rows, slots), np.int32)
  ids, positions, segments, is_cls, masked_slots, labels, used, _ = integers
  values, truth = np.zeros((2, num_rows, slots), np.float32)
  labels_N = cells.gene_ids_N if labels_N is None else labels_N
  fill = np.zeros(num_rows, int)
  num_masked = np.zeros(num_rows, int)
  for cell in range(cells.num_cells):
    row = cell // cells_per_row
    a, b = cells.starts_C1[cell : cell + 2]
    start = fill[row] + 1
    where = slice(start, start + b - a)
    is_cls[row, start - 1] = 1
    segments[row, start - 1 : where.stop] = cell % cells_per_row + 1
    ids[row, where] = masked.gene_ids_N[a:b]
    values[row, where] = masked.values_N[a:b]
    positions[row, where] = np.arange(b - a)
    fill[row] = where.stop
    for i in np.flatnonzero(masked.is_masked_N[a:b]):
      k = num_masked[row]
      masked_slots[row, k] = start + i
      labels[row, k] = labels_N[a + i]
      truth[row, k] = cells.values_N[a + i]
      used[row, k] = 1
      num_masked[row] += 1
  weights = used.astype(np.float32)
  return schemas.HostBatch(
    0,
    schemas.PretrainingBatch(
      schemas.CellBatch(
        ids, values, positions, segments, np.zeros_like(ids), is_cls > 0
      ),
      masked_slots,
      labels,
      weights,
      truth,
      weights,
    ),
    np.zeros((num_rows, cells_per_row), np.int32),
  )


def flat(losses, host_batch):
  """{name: [masked genes]} in the order of the cells."""
  used = host_batch.batch.id_weights_BK > 0
  return {name: losses[name][used] for name in nulls.NAMES}


class Reference:
  """The same predictors, written from their definitions with dictionaries."""

  def __init__(self, train, model):
    self.model, self.choices = model, model.choices[0]
    self.mask = model.mask
    self.keep = 1 - self.mask.mask_share - self.mask.random_share
    if self.mask.policy == 'released':
      self.keep = 0.0
    self.random = self.mask.random_share / len(TOKENS)
    config = model.encoding
    self.library = config.mode == 'library'
    self.pairs = collections.Counter()
    self.bins = collections.Counter()
    self.cells = collections.Counter()
    values = collections.defaultdict(list)
    encoded = encode(train, config)
    for cell, (a, b) in enumerate(
      zip(encoded.starts_C1, encoded.starts_C1[1:])
    ):
      for i, token in enumerate(encoded.gene_ids_N[a:b].tolist()):
        self.pairs[token, self.atoms(train[cell, token - FIRST])] += 1
        self.bins[token, i * 32 // (b - a)] += 1
        self.cells[token] += 1
        values[token].append(float(encoded.values_N[a + i]))
    self.mean = {t: np.mean(v) for t, v in values.items()}
    odds = 1 - self.mask.rate
    self.seen = {t: len(train) - odds * self.cells[t] for t in TOKENS.tolist()}
    all_cells = sum(self.cells.values()) + 0.5 * len(TOKENS)
    self.marginal = {
      t: (self.cells[t] + 0.5) / all_cells for t in TOKENS.tolist()
    }

  @staticmethod
  def atoms(count):
    """The counts that stand for a count: itself, or four of its bin."""
    if count < 64:
      return (int(count),)
    octave = math.floor(16 * (math.log2(count) - 6))
    inside = [
      c
      for c in range(64, 2000)
      if math.floor(16 * (math.log2(c) - 6)) == octave
    ]
    n = min(4, len(inside))
    return tuple(inside[int((k + 0.5) * len(inside) / n)] for k in range(n))

  def bracket_weights(self, cell_counts, tokens, hidden, i):
    """{(token, key): weight} of the pairs that fit at position i."""
    keys = [cell_counts[t - FIRST] / DIVISOR_V[t] for t in tokens]
    visible = [j for j in range(len(tokens)) if not hidden[j]]
    before = max((j for j in visible if j < i), default=None)
    after = min((j for j in visible if j > i), default=None)
    high = math.inf if before is None else keys[before]
    low = 0.0 if after is None else keys[after]

    def end_weight(level):
      places = [j for j in visible if keys[j] == level]
      return 1 / (max(places) - min(places) + 2)

    weights = {}
    for (token, atoms), number in self.pairs.items():
      for count in atoms:
        key = count / DIVISOR_V[token]
        if self.model.encoding.ties == 'token':
          if before is not None and (-key, token) <= (-high, tokens[before]):
            continue
          if after is not None and (-key, token) >= (-low, tokens[after]):
            continue
          weight = 1.0
        else:
          if not low <= key <= high:
            continue
          weight = 1.0
          if low != high and key in (low, high):
            weight = end_weight(key)
        mass = number / len(atoms) / self.seen[token]
        weights[token, key] = weights.get((token, key), 0) + weight * mass
    return weights

  def posterior(self, mass_of, i, places, shown, unseen, mix):
    """{token: probability} at position i; mass_of(place) -> {token: mass}."""

    def share(place, taken):
      mass = {t: m * (1 - taken.get(t, 0)) for t, m in mass_of(place).items()}
      total = sum(mass.values())
      back = {t: self.marginal[t] / unseen[1] for t in unseen[0]}
      if total <= 0:
        return back
      return {
        t: (1 - mix) * mass.get(t, 0) / total + mix * back[t] for t in back
      }

    def given(p, s):
      if s is None:
        return p
      p = {t: q * (self.keep * (t == s) + self.random) for t, q in p.items()}
      total = sum(p.values())
      return {t: q / total for t, q in p.items()}

    true = {
      j: given(share(j, {}), shown[j])[shown[j]]
      for j in places
      if shown[j] is not None
    }
    taken = collections.Counter()
    for j, probability in true.items():
      if j != i:
        taken[shown[j]] += probability
    taken = {t: min(p, 1.0) for t, p in taken.items()}
    return given(share(i, taken), shown[i])

  def cell(self, cell_counts, tokens, values, shown_ids, shown_values):
    """Losses {name: [hidden genes]} of one cell."""
    hidden = shown_values < 0
    places = np.flatnonzero(hidden).tolist()
    visible = {t for t, h in zip(tokens, hidden) if not h}
    rest = [t for t in TOKENS.tolist() if t not in visible]
    unseen = rest, sum(self.marginal[t] for t in rest)
    shown = {
      j: int(shown_ids[j])
      if self.keep > 0 and shown_ids[j] >= FIRST and shown_ids[j] not in visible
      else None
      for j in places
    }
    scale = 1e4 / cell_counts.sum() if self.library else 1.0
    brackets = {}
    for j in places:
      weights = self.bracket_weights(cell_counts, tokens, hidden, j)
      brackets[j] = {k: w for k, w in weights.items() if k[0] in rest}

    def bin_mass(j):
      at = j * 32 // len(tokens)
      return {t: self.bins[t, at] / self.seen[t] for t in rest}

    def bracket_mass(j):
      mass = dict.fromkeys(rest, 0.0)
      for (token, _), weight in brackets[j].items():
        mass[token] += weight
      return mass

    out = collections.defaultdict(list)
    for i in places:
      label = tokens[i]
      p = dict(self.marginal)
      if self.keep > 0 and shown_ids[i] >= FIRST:
        s = shown_ids[i]
        p = {t: q * (self.keep * (t == s) + self.random) for t, q in p.items()}
      out['null_id_marginal'].append(-math.log(p[label] / sum(p.values())))
      p = self.posterior(
        bin_mass, i, places, shown, unseen, self.choices.mix_rank_bin
      )
      out['null_id_rank_bin'].append(-math.log(p[label]))
      mix = self.choices.mix_rank_bracket
      p = self.posterior(bracket_mass, i, places, shown, unseen, mix)
      out['null_id_rank_bracket'].append(-math.log(p[label]))

      out['null_value_gene_mean'].append((self.mean[label] - values[i]) ** 2)
      seen = np.flatnonzero(~hidden)
      line = np.interp(i, seen, values[seen])  # 'nearest' at the ends
      out['null_value_interpolation'].append((line - values[i]) ** 2)
      if self.choices.mix_rank_bracket == 0:  # p is then that of the pairs
        mass = bracket_mass(i)
        mean = sum(
          p[t] * w / mass[t] * np.log2(k if self.library else 1 + k)
          for (t, k), w in brackets[i].items()
          if mass[t] > 0
        )
        mean = np.log2(1 + scale * 2**mean) if self.library else mean
        out['null_value_bracket_mean'].append((mean - values[i]) ** 2)
    return out


def assert_as_reference(config, mask, names=nulls.NAMES, **choices):
  train, test = gene_counts(0, 60), gene_counts(1, 14)
  choices = {
    'pseudo_cells': 0.0,
    'top': 'nearest',
    'bottom': 'nearest',
  } | choices
  model = fit(train, config, mask, **choices)
  reference = Reference(train, model)
  cells = encode(test, config)
  masked = hide(cells, mask)
  host_batch = batch_of(cells, masked, cells_per_row=3)
  got = flat(model.losses(host_batch), host_batch)
  want = collections.defaultdict(list)
  for c, (a, b) in enumerate(zip(cells.starts_C1, cells.starts_C1[1:])):
    losses = reference.cell(
      test[c],
      cells.gene_ids_N[a:b].tolist(),
      cells.values_N[a:b].astype(float),
      masked.gene_ids_N[a:b],
      masked.values_N[a:b],
    )
    for name, values in losses.items():
      want[name] += values
  shown = masked.gene_ids_N[masked.is_masked_N]
  assert (shown > 1).sum() > 10
  for name in names:
    np.testing.assert_allclose(
      got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name
    )


@pytest.mark.parametrize('ties', encoding.TIES)
@pytest.mark.parametrize('mode', encoding.MODES)
def test_equals_the_reference(mode, ties):
  many = dataclasses.replace(DEFAULT, rate=0.4, mask_share=0.5)
  config = encoding.EncodingConfig(mode, ties)
  ids = [name for name in nulls.NAMES if name != 'null_value_bracket_mean']
  assert_as_reference(config, many, ids)


@pytest.mark.parametrize('mode', encoding.MODES)
def test_bracket_mean_equals_the_reference(mode):
  config = encoding.EncodingConfig(mode)
  mask = dataclasses.replace(DEFAULT, rate=0.3, mask_share=0.6)
  train, test = gene_counts(0, 4000), gene_counts(1, 6)
  model = fit(train, config, mask, pseudo_cells=0.0, mix_rank_bracket=0.0)
  reference = Reference(train, model)
  cells = encode(test, config)
  masked = hide(cells, mask)
  host_batch = batch_of(cells, masked)
  got = flat(model.losses(host_batch), host_batch)
  want = []
  for c, (a, b) in enumerate(zip(cells.starts_C1, cells.starts_C1[1:])):
    want += reference.cell(
      test[c],
      cells.gene_ids_N[a:b].tolist(),
      cells.values_N[a:b].astype(float),
      masked.gene_ids_N[a:b],
      masked.values_N[a:b],
    )['null_value_bracket_mean']
  got = got['null_value_bracket_mean']
  np.testing.assert_allclose(np.sqrt(got), np.sqrt(want), atol=1e-5)


@pytest.mark.parametrize('ties', encoding.TIES)
@pytest.mark.parametrize('mask_share', [0.8, 0.4])
def test_probabilities_sum_to_one(mask_share, ties):
  random_share = (1 - mask_share) / 2
  mask = masking.MaskConfig(0.4, mask_share, random_share)
  config = encoding.EncodingConfig('released', ties)
  model = fit(gene_counts(0, 80), config, mask)
  cells = encode(gene_counts(1, 6), config)
  masked = hide(cells, mask)
  total = collections.Counter()
  of_cell = np.repeat(np.arange(cells.num_cells), np.diff(cells.starts_C1))
  hidden_cell = of_cell[masked.is_masked_N]
  for token in TOKENS:
    labels = np.full(len(cells.gene_ids_N), token)
    host_batch = batch_of(cells, masked, labels_N=labels)
    losses = flat(model.losses(host_batch), host_batch)
    visible = [
      token in cells.gene_ids_N[(of_cell == c) & ~masked.is_masked_N]
      for c in range(cells.num_cells)
    ]
    candidate = ~np.array(visible)[hidden_cell]
    total['marginal'] += np.exp(-losses['null_id_marginal'])
    for name in nulls.ID_NAMES[1:]:
      total[name] += np.exp(-losses[name]) * candidate
  for name, sums in total.items():
    np.testing.assert_allclose(sums, 1.0, atol=1e-9, err_msg=name)


def bayes_loss(present_G, chance_GN, counts, tokens, i):
  """-log P(hidden gene) of independent genes, from all cells it could be."""
  known = [t for j, t in enumerate(tokens) if j != i]
  keys = [counts[t - FIRST] / DIVISOR_V[t] for t in known]
  weights = collections.Counter()
  for token in TOKENS.tolist():
    if token in known:
      continue
    g = token - FIRST
    for count, chance in enumerate(chance_GN[g], 1):
      key = count / DIVISOR_V[token]
      order = [*keys[:i], key, *keys[i:]]
      if all(x >= y for x, y in zip(order, order[1:])):
        ways = math.prod(
          math.factorial(n) for n in collections.Counter(order).values()
        )
        odds = present_G[g] * chance / (1 - present_G[g])
        weights[token] += odds / ways
  return -math.log(weights[tokens[i]] / sum(weights.values()))


def test_bracket_is_the_bayes_predictor_of_independent_genes():
  rng = np.random.default_rng(0)
  present_G = np.linspace(0.1, 0.95, 40)
  rates_G = np.resize([0.8, 0.5, 0.25], 40)
  numbers = np.arange(1, 60)
  chance_GN = rates_G[:, None] * (1 - rates_G[:, None]) ** (numbers - 1)

  def draw(num_cells):
    present = rng.random((num_cells, 40)) < present_G
    return present * rng.geometric(rates_G, (num_cells, 40))

  config = encoding.EncodingConfig()
  one = dataclasses.replace(ONLY_MASK, rate=0.0)  # odds p : (1 - p)
  model = fit(draw(30_000), config, ONLY_MASK, mix_rank_bracket=1e-4)
  model = dataclasses.replace(model, mask=one)
  test = draw(400)
  cells = encode(test, config)
  ids_N, values_N = cells.gene_ids_N.copy(), cells.values_N.copy()
  is_masked_N = np.zeros(len(ids_N), bool)
  want = []
  for c, (a, b) in enumerate(zip(cells.starts_C1, cells.starts_C1[1:])):
    i = int(rng.integers(b - a))
    tokens = cells.gene_ids_N[a:b].tolist()
    want.append(bayes_loss(present_G, chance_GN, test[c], tokens, i))
    is_masked_N[a + i] = True
  ids_N[is_masked_N], values_N[is_masked_N] = 1, -1
  masked = masking.MaskedCells(ids_N, values_N, is_masked_N)
  host_batch = batch_of(cells, masked)
  got = flat(model.losses(host_batch), host_batch)
  bracket = got['null_id_rank_bracket']
  # Fitted on 30,000 cells, it differs from the truth by sampling alone.
  assert abs(bracket.mean() - np.mean(want)) < 0.01
  np.testing.assert_allclose(bracket, want, atol=0.35)
  assert bracket.mean() < got['null_id_rank_bin'].mean() - 0.1
  assert got['null_id_rank_bin'].mean() < got['null_id_marginal'].mean() - 0.1


def test_released_policy_keeps_what_it_shows():
  mask = masking.MaskConfig(
    rate=0.4, mask_share=0.3, random_share=0.3, policy='released'
  )
  config = encoding.EncodingConfig()
  names = [n for n in nulls.NAMES if n != 'null_value_bracket_mean']
  train = gene_counts(0, 60)
  model = fit(train, config, mask)
  cells = encode(gene_counts(1, 20), config)
  masked = hide(cells, mask)
  host_batch = batch_of(cells, masked)
  got = flat(model.losses(host_batch), host_batch)
  kept = masked.values_N[masked.is_masked_N] >= 0
  assert 5 < kept.sum() < len(kept) - 5
  for name in (*nulls.ID_NAMES, *nulls.VALUE_NAMES[1:]):
    assert np.all(got[name][kept] == 0), name
    assert np.all(np.isfinite(got[name])), name
  # A random id without a value says nothing: the loss is that of `<mask>`.
  blank_N = np.where(masked.values_N < 0, 1, masked.gene_ids_N)
  blank = dataclasses.replace(masked, gene_ids_N=blank_N.astype(np.int32))
  other_batch = batch_of(cells, blank)
  other = flat(model.losses(other_batch), other_batch)
  for name in names:
    np.testing.assert_allclose(other[name], got[name], err_msg=name)


def test_packing_changes_nothing():
  config = encoding.EncodingConfig('library')
  model = fit(gene_counts(0, 60), config, DEFAULT)
  cells = encode(gene_counts(1, 12), config)
  masked = hide(cells, DEFAULT)
  alone, packed = batch_of(cells, masked), batch_of(cells, masked, 3)
  a = flat(model.losses(alone), alone)
  b = flat(model.losses(packed), packed)
  for name in nulls.NAMES:
    np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize('mode', encoding.MODES)
def test_extreme_cells_have_finite_losses(mode):
  config = encoding.EncodingConfig(mode)
  train, test = gene_counts(0, 40), gene_counts(1, 8)
  train[:, 3] = 0  # a gene that no training cell expresses
  train[:, 39] = 1  # one that all express
  test[:, 3] = 5
  test[0] *= 2  # no count of one
  test[1, :] = 0
  test[1, 0] = 1  # a single gene
  model = fit(train, config, DEFAULT)
  cells = encode(test, config)
  n = len(cells.gene_ids_N)
  everything = masking.MaskedCells(
    np.ones(n, np.int32), np.full(n, -1, np.float32), np.ones(n, bool)
  )
  for masked in (hide(cells, DEFAULT), everything):
    host_batch = batch_of(cells, masked)
    for name, losses in model.losses(host_batch).items():
      assert np.all(np.isfinite(losses) & (losses >= 0)), name


def test_scale_of_a_cell_is_read_off_its_visible_values():
  config = encoding.EncodingConfig('library')
  for counts in ([1, 2, 7, 40], [2, 3, 9, 1500], [6, 10, 15, 4000]):
    table = np.zeros((1, 40), int)
    table[0, [2, 5, 11, 7]] = counts
    cells = encode(table, config)
    count_n = np.empty(4)
    scale = compiled.scaled_counts(
      cells.gene_ids_N, cells.values_N, DIVISOR_V, True, count_n
    )
    np.testing.assert_allclose(scale, 1e4 / sum(counts), rtol=1e-5)
    np.testing.assert_array_equal(
      count_n, table[0, cells.gene_ids_N - FIRST].astype(float)
    )


def test_pseudo_cells_keep_the_cells_of_a_gene():
  pairs = np.random.default_rng(0).poisson(1.0, (50, compiled.NUM_BINS))
  pairs[3] = 0
  smooth = counts_lib.smoothed(pairs, 10.0)
  np.testing.assert_allclose(smooth.sum(1), pairs.sum(1))
  assert np.all(smooth[3] == 0)


def test_unmeasured_is_not_zero():
  config = encoding.EncodingConfig()
  counts = gene_counts(0, 100)
  counts[50:, :20] = 0  # half of the cells did not measure half of the genes
  halves = [encode(counts[:50], config), encode(counts[50:], config)]
  measured = np.where(np.arange(SIZE) < FIRST + 20, 0.0, 50.0)
  chunks = [
    nulls.TrainingCells(0, halves[0]),
    nulls.TrainingCells(0, halves[1], measured),
  ]
  model = nulls.NullModels.fit(
    chunks,
    encoding_config=config,
    mask=DEFAULT,
    divisor_SV=DIVISOR_V[None],
    species_tokens=[TOKENS],
  )
  assert model.counts[0].measured_T.tolist() == [50.0] * 20 + [100.0] * 20
  assert model.counts[0].num_cells == 100
  assert model._rules(0, model.choices[0]).random == 0.1 / 30


def test_a_gene_that_few_measured_is_weighed_by_those():
  """Expressed by 40 of the 50 that measured it, not of 100."""
  ranks = np.zeros((2, compiled.NUM_RANK_BINS), np.uint32)
  ranks[:, 3] = 40
  pairs = np.zeros((2, compiled.NUM_BINS), np.uint32)
  pairs[:, 0] = 40
  made = counts_lib.tables(
    counts_lib.SpeciesCounts(
      TOKENS[:2], 100, np.array([50.0, 100.0]), pairs, ranks, np.full(2, 40.0)
    ),
    DIVISOR_V,
    pseudo_cells=0.0,
    mask_rate=0.15,
    library=False,
    mean_value=1.0,
  )
  # where it is not visible: 40 / (cells that measured - shown)
  expected = 40 / (np.array([50, 100]) - 0.85 * 40)
  np.testing.assert_allclose(made.rank_TQ[:, 3], expected)
  np.testing.assert_allclose(np.diff(made.gene_mass_A1), expected)


def test_chunks_do_not_matter_and_files_come_back(tmp_path):
  config = encoding.EncodingConfig('library', 'token')
  counts = gene_counts(0, 64)
  model, whole = (fit(counts, config, DEFAULT, n) for n in (8, 1))
  for name in ('pairs_TN', 'ranks_TQ'):
    np.testing.assert_array_equal(
      getattr(model.counts[0], name), getattr(whole.counts[0], name)
    )
  path = tmp_path / 'nulls.npz'
  model.save(path)
  again = nulls.NullModels.load(path)
  assert again.digest == model.digest
  assert (again.encoding, again.mask, again.choices) == (
    config,
    DEFAULT,
    model.choices,
  )
  cells = encode(gene_counts(1, 6), config)
  host_batch = batch_of(cells, hide(cells, DEFAULT))
  want = model.losses(host_batch)
  for name, losses in again.losses(host_batch).items():
    np.testing.assert_array_equal(losses, want[name])
  data = path.read_bytes()
  for damaged in (
    b'',
    data[: len(data) // 2],
    b'text',
    data[:400] + data[420:],
  ):
    path.write_bytes(damaged)
    with pytest.raises(errors.UserError, match='fit them again'):
      nulls.NullModels.load(path)
  with pytest.raises(errors.UserError, match='no null models'):
    nulls.NullModels.load(tmp_path / 'none.npz')


def test_a_species_without_training_cells_is_guessed_evenly():
  config = encoding.EncodingConfig()
  model = nulls.NullModels.fit(
    [nulls.TrainingCells(1, encode(gene_counts(0, 40), config))],
    encoding_config=config,
    mask=ONLY_MASK,
    divisor_SV=np.stack([DIVISOR_V] * 2),
    species_tokens=[TOKENS, TOKENS],
  )
  cells = encode(gene_counts(1, 6), config)
  host_batch = batch_of(cells, hide(cells, ONLY_MASK))
  losses = flat(model.losses(host_batch), host_batch)
  np.testing.assert_allclose(losses['null_id_marginal'], np.log(40))
  for name in nulls.NAMES:
    assert np.all(np.isfinite(losses[name])), name


def test_foreign_tokens_are_refused():
  config = encoding.EncodingConfig()
  cells = encode(gene_counts(0, 8), config)
  with pytest.raises(errors.UserError, match='another vocabulary'):
    nulls.NullModels.fit(
      [nulls.TrainingCells(0, cells)],
      encoding_config=config,
      mask=DEFAULT,
      divisor_SV=DIVISOR_V[None],
      species_tokens=[TOKENS[:30]],
    )
  model = fit(gene_counts(0, 40), config, DEFAULT)
  few = dataclasses.replace(
    model,
    counts=(counts_lib.no_counts(TOKENS[:10]),),
    choices=(nulls.Choices(),),
  )
  with pytest.raises(errors.UserError, match='another vocabulary'):
    few.losses(batch_of(cells, hide(cells, DEFAULT)))


def test_real_cells_token_order_and_medians_leak_the_id(real_data):
  name = 'pbmc68k_reduced_counts'
  counts = anndata.read_h5ad(real_data / name / f'{name}.h5ad').X.tocsr()
  num_genes = counts.shape[1]
  tokens = np.arange(FIRST, FIRST + num_genes, dtype=np.int32)
  divisor = np.ones(FIRST + num_genes)

  def bracket_loss(config):
    def cells_of(table):
      return encoding.CellEncoder(config, tokens, divisor).encode(
        encoding.RaggedCells(
          table.indices,
          table.data,
          table.indptr.astype(np.int64),
          np.asarray(table.sum(1), np.float64).ravel(),
        )
      )

    model = nulls.NullModels.fit(
      [nulls.TrainingCells(0, cells_of(counts[100:]))],
      encoding_config=config,
      mask=ONLY_MASK,
      divisor_SV=divisor[None],
      species_tokens=[tokens],
    )
    cells = cells_of(counts[:100])
    masked = masking.mask_cells(
      cells,
      np.arange(100),
      config=ONLY_MASK,
      seed=0,
      epoch=masking.EVALUATION_EPOCH,
      random_tokens=tokens,
      vocabulary_size=len(divisor),
    )
    host_batch = batch_of(cells, masked, slots=1024)
    losses = flat(model.losses(host_batch), host_batch)
    line = losses['null_value_interpolation'].mean()
    assert losses['null_value_gene_mean'].mean() > 20 * line
    return losses['null_id_rank_bracket'].mean()

  by_hash = bracket_loss(encoding.EncodingConfig())
  by_token = bracket_loss(encoding.EncodingConfig(ties='token'))
  assert by_hash - by_token > 2
