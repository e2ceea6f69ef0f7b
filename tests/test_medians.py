"""Histogram medians against numpy.median; the table and its divisors."""

import numpy as np
import pytest

from genecompass_jax import encoding, errors, gene_table, medians, vocabulary

TOKENS = np.arange(2, 42, dtype=np.int32)


def from_dense(counts_CR):
  rows_c, rows_r = np.nonzero(counts_CR)
  starts = np.concatenate([[0], np.cumsum((counts_CR > 0).sum(axis=1))])
  return encoding.RaggedCells(
    rows_r.astype(np.uint16),
    counts_CR[rows_c, rows_r],
    starts.astype(np.int64),
    counts_CR.sum(axis=1).astype(np.float64),
  )


def histogram(mode, counts_CR, token_R=TOKENS):
  result = medians.MedianHistogram(mode, token_R, 42)
  result.add(from_dense(counts_CR))
  return result


def true_medians(values_CR):
  """Median over the non-zero cells, with NaN for the special tokens."""
  return np.array(
    [np.nan, np.nan]
    + [np.median(x[x > 0]) if (x > 0).any() else np.nan for x in values_CR.T]
  )


def umi_counts(seed=0, num_cells=800):
  rng = np.random.default_rng(seed)
  means = rng.gamma(0.5, 6, 40)
  means[0] = 0
  means[1] = 300
  return rng.poisson(rng.gamma(2, 0.5, (num_cells, 1)) * means)


@pytest.mark.parametrize('num_cells', [1, 2, 7, 100, 801])
def test_integer_counts_are_exact(num_cells):
  """The mean of the two middle counts included."""
  counts = np.minimum(umi_counts(num_cells, num_cells), 512)
  for dtype in (np.uint16, np.float32, np.int64):
    got = histogram('released', counts.astype(dtype))
    np.testing.assert_array_equal(got.support_V()[2:], (counts > 0).sum(axis=0))
    want = true_medians(counts)
    np.testing.assert_array_equal(got.median_V(), want)


@pytest.mark.parametrize(
  ('num_cells', 'mean', 'most'),
  [(101, 6e-3, 1.6e-2), (10000, 1e-3, 5e-3), (50000, 5e-4, 2e-3)],
)
def test_error_of_logarithmic_bins(num_cells, mean, most):
  rng = np.random.default_rng(1)
  values = np.exp(rng.normal(rng.normal(1, 1.5, 40), 1.2, (num_cells, 40)))
  values = np.minimum(values, 9999)
  cells = from_dense(values)
  cells = encoding.RaggedCells(
    cells.gene_rows_N, cells.counts_N, cells.starts_C1, np.full(num_cells, 1e4)
  )
  got = medians.MedianHistogram('library', TOKENS, 42)
  got.add(cells)
  error = np.abs(got.median_V() / true_medians(values) - 1)[2:]
  assert error.mean() < mean
  assert error.max() < most
  sampling = 1.2 * np.sqrt(np.pi / 2 / num_cells)
  assert error.mean() < sampling / 10


def test_library_mode_of_real_sized_counts():
  counts = umi_counts(2, 3000)
  counts = counts[counts.sum(axis=1) > 0]
  values = counts / counts.sum(axis=1, keepdims=True) * 1e4
  error = histogram('library', counts).median_V() / true_medians(values) - 1
  assert np.nanmax(np.abs(error)) < 8e-3  # half a bin
  np.testing.assert_array_equal(np.isnan(error), np.isnan(true_medians(values)))


def test_large_and_fractional_counts_in_released_mode():
  rng = np.random.default_rng(3)
  counts = np.exp(rng.normal(np.linspace(-2, 9, 40), 0.7, (2000, 40)))
  error = histogram('released', counts).median_V() / true_medians(counts) - 1
  assert np.nanmax(np.abs(error)) < 0.03
  whole = np.ceil(counts)  # integers on both sides of the last exact bin
  error = histogram('released', whole).median_V() / true_medians(whole) - 1
  assert np.nanmax(np.abs(error)) < 0.03


def test_rows_that_share_a_token_are_summed_in_each_cell():
  counts = umi_counts(4)
  token_R = TOKENS.copy()
  token_R[3] = token_R[4]
  token_R[5] = -1
  got = histogram('released', counts, token_R)
  joined = counts.copy()
  joined[:, 4] += joined[:, 3]
  joined[:, [3, 5]] = 0
  np.testing.assert_array_equal(got.median_V(), true_medians(joined))


@pytest.mark.parametrize('mode', encoding.MODES)
def test_parts_merge_in_any_order_to_the_whole(mode):
  counts = umi_counts(5) + 1
  whole = histogram(mode, counts)
  for order in ([0, 1, 2], [2, 0, 1]):
    parts = [histogram(mode, counts[i::3]) for i in order]
    parts[1].merge(parts[2])
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].median_V(), whole.median_V())
    np.testing.assert_array_equal(parts[0].support_V(), whole.support_V())


@pytest.mark.parametrize('mode', encoding.MODES)
def test_cells_are_counted_alike_in_pieces_of_any_size(mode, monkeypatch):
  counts = umi_counts(6) + 1
  whole = histogram(mode, counts)
  for size in (1, 41, 1000):
    monkeypatch.setattr(medians, '_PIECE', size)
    got = histogram(mode, counts)
    np.testing.assert_array_equal(got.median_V(), whole.median_V())
    np.testing.assert_array_equal(got.support_V(), whole.support_V())


def test_broken_starts_are_one_line():
  cells = from_dense(np.ones((4, 40)))
  for starts in ([0, 90, 60, 120, 160], [0, 40, 80, 120, 10**12], [-9, 0, 1]):
    broken = encoding.RaggedCells(
      cells.gene_rows_N, cells.counts_N, np.array(starts), cells.totals_C
    )
    with pytest.raises(errors.UserError, match='outside the stored counts'):
      medians.MedianHistogram('released', TOKENS, 42).add(broken)


def test_histograms_of_different_kinds_do_not_merge():
  first = medians.MedianHistogram('released', TOKENS, 42)
  for other in (
    medians.MedianHistogram('library', TOKENS, 42),
    medians.MedianHistogram('released', TOKENS[:-1], 42),
  ):
    with pytest.raises(ValueError, match='do not merge'):
      first.merge(other)


def test_bad_counts_are_one_line():
  with pytest.raises(errors.UserError, match='negative'):
    cells = from_dense(np.ones((2, 40)))
    cells.counts_N[3] = -1
    medians.MedianHistogram('released', TOKENS, 42).add(cells)
  with pytest.raises(errors.UserError, match='library size'):
    cells = from_dense(np.ones((2, 40)))
    cells.totals_C[1] = 0
    medians.MedianHistogram('library', TOKENS, 42).add(cells)


def table(mode):
  """Shared: human supported, human thin, mouse alone; mouse's own: supported,
  thin."""
  return medians.Medians(
    mode,
    np.array(
      [
        [np.nan, np.nan, 2, 7, np.nan, np.nan, np.nan],
        [np.nan, np.nan, 3, 4, 6, 5, 9],
      ]
    ),
    np.array([[0, 0, 100, 99, 0, 0, 0], [0, 0, 500, 500, 500, 100, 99]]),
    np.array([False, False, True, True, True, False, False]),
  )


def test_divisors_of_released_mode():
  np.testing.assert_array_equal(
    table('released').divisor_V(0), [1, 1, 2, 1, 1, 1, 1]
  )
  np.testing.assert_array_equal(
    table('released').divisor_V(1), [1, 1, 2, 1, 1, 5, 1]
  )
  mouse_alone = table('released')
  mouse_alone.median_SV[0], mouse_alone.support_SV[0] = np.nan, 0
  np.testing.assert_array_equal(mouse_alone.divisor_V(1), [1, 1, 3, 4, 6, 5, 1])


def test_divisors_of_library_mode():
  np.testing.assert_array_equal(table('library').divisor_V(0), [2] * 7)
  np.testing.assert_array_equal(
    table('library').divisor_V(1), [4.5, 4.5, 3, 4, 6, 5, 4.5]
  )
  small = table('library')
  small.support_SV[:] = np.minimum(small.support_SV, 5)
  np.testing.assert_array_equal(small.divisor_V(1), np.full(7, 5))
  small.median_SV[:] = np.nan
  np.testing.assert_array_equal(small.divisor_V(1), np.ones(7))


@pytest.fixture(scope='module')
def vocab():
  known = gene_table.GeneTable.default()
  keep_G = np.zeros(len(known.gene_ids), bool)
  keep_G[:30] = True
  keep_G[-30:] = True
  return vocabulary.Vocabulary.from_genes(known.subset(keep_G))


def counted(vocab):
  result = {}
  for species in (0, 1):
    token_R = vocab.species_tokens(species)
    result[species] = medians.MedianHistogram('library', token_R, vocab.size)
    counts = np.random.default_rng(species).poisson(2, (50, len(token_R)))
    result[species].add(from_dense(counts))
  return medians.Medians.from_histograms(vocab, result)


def test_save_and_load(vocab, tmp_path):
  values = counted(vocab)
  assert np.isfinite(values.median_SV).any(axis=0)[2:].all()
  for name in ('medians.tsv', 'medians.tsv.gz'):
    values.save(tmp_path / name, vocab)
    loaded = medians.Medians.load(tmp_path / name, vocab)
    assert loaded.mode == 'library'
    np.testing.assert_array_equal(loaded.median_SV, values.median_SV)
    np.testing.assert_array_equal(loaded.support_SV, values.support_SV)


def test_load_for_another_vocabulary(vocab, tmp_path):
  values = counted(vocab)
  values.save(tmp_path / 'medians.tsv', vocab)
  names = vocab.token_gene_ids()
  fewer = vocab.restrict(names[5:20])
  loaded = medians.Medians.load(tmp_path / 'medians.tsv', fewer)
  old = [names.index(i) for i in fewer.token_gene_ids()]
  np.testing.assert_array_equal(loaded.median_SV, values.median_SV[:, old])


def test_damage_is_one_line(vocab, tmp_path):
  path = tmp_path / 'medians.tsv'
  counted(vocab).save(path, vocab)
  text = path.read_text()
  path.write_text(text.replace('\t', '\t9', 9))
  with pytest.raises(errors.UserError, match='medians.tsv') as caught:
    medians.Medians.load(path, vocab)
  assert '\n' not in str(caught.value)
  path.write_text(text[: len(text) // 2])
  with pytest.raises(errors.UserError, match='medians.tsv'):
    medians.Medians.load(path, vocab)
  with pytest.raises(errors.UserError):
    medians.Medians.load(tmp_path / 'absent.tsv', vocab)


def test_a_third_species(tmp_path):
  """Shared tokens have the median of the species that names them."""
  table = gene_table.GeneTable(
    gene_ids=('H', 'm1', 'm2', 'r1', 'r2'),
    symbols=('H', 'm1', 'm2', 'r1', 'r2'),
    aliases=((),) * 5,
    entrez=('',) * 5,
    species_G=np.array([0, 1, 1, 2, 2]),
    biotypes=('',) * 5,
    orthologue_groups=('1', '1', '2', '1', '2'),
    species=('human', 'mouse', 'rat'),
  )
  vocab = vocabulary.Vocabulary.from_genes(table)
  median_SV = np.array(
    [[np.nan, np.nan, 2, np.nan], [np.nan] * 4, [np.nan] * 4]
  )
  median_SV[1:, 2:] = [[3, 5], [7, 11]]
  values = medians.Medians(
    'released',
    median_SV,
    np.where(np.isnan(median_SV), 0, 500),
    vocab.is_shared_V(),
    vocab.naming_species_V(),
  )
  path = tmp_path / 'medians.tsv'
  values.save(path, vocab)
  loaded = medians.Medians.load(path, vocab)
  assert 'rat_median' in path.read_text()
  for table in (values, loaded):
    assert table.divisor_V(2).tolist() == [1, 1, 2, 5]
    assert table.divisor_V(0).tolist() == [1, 1, 2, 5]
  assert loaded.sha256 == values.sha256
