import numpy as np
import pytest

from genecompass_jax import errors, gene_table, vocabulary
from genecompass_jax.prepare import quality, sources


def statistics(genes, coding=100, mito=0.0, total=1000.0):
  genes_C = np.asarray(genes, np.int32)
  full = np.ones(len(genes_C))
  return quality.CellStatistics(
    genes_C,
    (full * coding).astype(np.int32),
    full * np.asarray(mito),
    full * total,
  )


def keep(stats, sample_C=None, config=None, measured=20_000, **kwargs):
  if sample_C is None:
    sample_C = np.zeros(len(stats.genes_C), int)
  flags = {'has_coding': True, 'has_mito': True} | kwargs
  return quality.keep_cells(
    stats,
    np.asarray(sample_C),
    config or quality.QualityConfig(),
    measured=measured,
    **flags,
  )


def removed(report):
  return {f['name']: f['removed'] for f in report['filters']}


def test_thresholds_keep_what_stands_on_them():
  keep_C, report = keep(statistics([199, 200, 201, 250, 230, 220]))
  assert keep_C.tolist() == [False, True, True, True, True, True]
  assert removed(report)['min_genes'] == 1
  keep_C, _ = keep(statistics([500] * 6, coding=np.array([6, 7, 8, 9, 9, 9])))
  assert keep_C.tolist() == [False] + [True] * 5
  mito = np.array([150.0, 150.1, 0, 0, 0, 0])
  keep_C, report = keep(statistics([500] * 6, mito=mito))
  assert keep_C.tolist() == [True, False] + [True] * 4
  assert report['kept'] == 5


def test_mitochondria_among_selected_genes_are_said_to_be():
  stats = statistics([500] * 6, mito=300.0)
  for measured, said in ((3998, 'of the 3998 measured genes'), (20_000, '')):
    _, report = keep(stats, measured=measured)
    entry = {f['name']: f for f in report['filters']}['max_mito']
    assert entry['removed'] == 6 and said in entry.get('note', '')
    assert ('note' in entry) == bool(said)


def test_outliers_within_their_own_sample():
  rng = np.random.default_rng(0)
  small, large = rng.integers(290, 310, 50), rng.integers(4900, 5100, 50)
  genes = np.concatenate([small, [5000], large, [300]])
  sample_C = np.repeat([0, 1], 51)
  keep_C, report = keep(statistics(genes), sample_C)
  assert np.flatnonzero(~keep_C).tolist() == [50, 101]
  assert removed(report)['max_sd'] == 2
  for sample in range(2):  # the rule, written plainly
    mine = genes[sample_C == sample]
    far = abs(mine - mine.mean()) > 3 * mine.std()
    np.testing.assert_array_equal(~keep_C[sample_C == sample], far)


def test_equal_cells_are_no_outliers():
  keep_C, _ = keep(statistics([333] * 1000))
  assert keep_C.all()


def test_samples_are_counted_after_the_other_filters():
  genes = [300, 300, 300, 300, 300, 300, 300, 100]
  keep_C, report = keep(statistics(genes), [0] * 4 + [1] * 4)
  assert keep_C.tolist() == [True] * 4 + [False] * 4
  assert removed(report)['min_cells'] == 3


def test_each_filter_can_be_switched_off():
  stats = statistics([1, 1, 1, 10_000], coding=0, mito=900.0)
  keep_C, report = keep(stats, config=quality.QualityConfig.off())
  assert keep_C.all()
  assert all(f['note'] == 'off' for f in report['filters'])
  bad = statistics([1, 300, 300, 300, 300], coding=np.array([9, 0, 9, 9, 9]))
  for name, value in (('min_genes', 0), ('min_coding', 0)):
    config = quality.QualityConfig(**{name: value})
    _, report = keep(bad, config=config)
    assert removed(report)[name] == 0
    assert sum(removed(report).values()) == 1


def test_what_cannot_be_judged_is_skipped_and_said():
  stats = statistics([500] * 9, coding=0, mito=0.0)
  keep_C, report = keep(stats, has_coding=False, has_mito=False)
  assert keep_C.all()
  notes = {f['name']: f.get('note', '') for f in report['filters']}
  assert notes['max_mito'] == 'no mitochondrial gene is measured'
  assert 'protein-coding' in notes['min_coding']


@pytest.mark.parametrize(
  ('measured', 'needed'),
  [(5000, 200), (60_000, 200), (4999, 50), (1122, 12), (277, 3), (1, 1)],
)
def test_a_panel_needs_a_share_of_itself(measured, needed):
  assert quality.min_genes(quality.QualityConfig(), measured) == needed


def test_a_filter_that_takes_most_cells_is_a_warning():
  _, report = keep(statistics([10] * 6 + [300] * 5))
  assert report['warnings'] == ['filter min_genes removed 6 of 11 cells']


def test_impossible_thresholds():
  with pytest.raises(errors.UserError, match='between 0 and 1'):
    quality.QualityConfig(max_mito=15)
  with pytest.raises(errors.UserError, match='negative'):
    quality.QualityConfig(min_genes=-1)


def real(path, config=None, **kwargs):
  source = sources.open_h5ad(sources.SourceConfig(str(path), **kwargs))
  vocab = vocabulary.Vocabulary.from_genes(gene_table.GeneTable.default())
  chunks = list(source.bind(vocab).chunks())
  (species,) = source.resolutions
  has_coding, has_mito = source.has_flag(species)
  return quality.keep_cells(
    quality.CellStatistics.concatenate([c.statistics for c in chunks]),
    np.zeros(source.num_cells, int),
    config or quality.QualityConfig(),
    measured=source.num_columns,
    has_coding=has_coding,
    has_mito=has_mito,
  )


def test_kang_numbers_by_hand(real_data):
  import anndata

  path = real_data / 'kang_pbmc_ifnb_harmony' / 'kang_pbmc_ifnb_harmony.h5ad'
  genes_C = np.diff(anndata.read_h5ad(path).X.tocsr().indptr)
  few = genes_C < 200
  left = genes_C[~few]
  far = abs(left - left.mean()) > 3 * left.std()
  keep_C, report = real(path)
  assert removed(report) == {
    'min_genes': few.sum(),
    'min_coding': 0,
    'max_mito': 0,
    'max_sd': far.sum(),
    'min_cells': 0,
  }
  assert keep_C.sum() == 2000 - few.sum() - far.sum()
  assert few.sum() == 12


def test_merfish_is_not_thrown_away(real_data):
  path = real_data / 'mouse_brain_merfish' / 'mouse_brain_merfish.h5ad'
  keep_C, report = real(path)
  assert keep_C.mean() > 0.97
  assert removed(report)['min_genes'] == 3  # 918 by the rule as it stands
  assert not report['warnings']


def test_perturb_fish_is_not_thrown_away(real_data):
  path = real_data / 'perturb_fish_astrocytes' / 'perturb_fish_astrocytes.h5ad'
  keep_C, _ = real(path)
  assert keep_C.mean() > 0.95


def test_mitochondrial_share_of_lung_lines(real_data):
  import anndata

  path = real_data / 'sc_mixology_lung_lines' / 'sc_mixology_lung_lines.h5ad'
  adata = anndata.read_h5ad(path)
  is_mito = adata.var['gene_name'].astype(str).str.startswith('MT-').to_numpy()
  share_C = np.asarray(adata.X[:, is_mito].sum(1)).ravel()
  share_C = share_C / np.asarray(adata.X.sum(1)).ravel()
  _, report = real(path)
  assert removed(report)['max_mito'] == (share_C > 0.15).sum()
