import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from genecompass_jax import errors, gene_table, vocabulary
from genecompass_jax.prepare import (
  layers,
  matrices,
  pipeline,
  sources,
  sparse,
  turning,
)

GENES, CELLS = 60, 90


@pytest.fixture(scope='module')
def vocab():
  return vocabulary.Vocabulary.default()


def human_ids(num=GENES):
  table = gene_table.GeneTable.default()
  mito = [g for g, s in enumerate(table.symbols) if s == 'MT-CO1']
  rows = [*mito, *range(0, 20_000, 300)]
  return [table.gene_ids[g] for g in rows[:num]]


def counts(num_cells=CELLS, num_genes=GENES, seed=0):
  rng = np.random.default_rng(seed)
  return scipy.sparse.random(
    num_cells,
    num_genes,
    0.3,
    format='csr',
    random_state=rng,
    data_rvs=lambda n: rng.geometric(0.3, n).astype(np.float32),
  )


def adata_of(matrix, ids=None, **kwargs):
  ids = human_ids(matrix.shape[1]) if ids is None else ids
  return anndata.AnnData(
    matrix,
    pd.DataFrame(index=[f'cell{i}' for i in range(matrix.shape[0])]),
    pd.DataFrame(index=ids),
    **kwargs,
  )


def save(tmp_path, adata, name='cells.h5ad'):
  path = tmp_path / name
  adata.write_h5ad(path)
  return path


def gather(stream, cells=32):
  """All cells over the columns' genes: matrix, totals, names of the genes."""
  (species,) = stream.species
  rows = stream.vocabulary.gene_rows(species)
  found = np.zeros((stream.source.num_cells, len(rows)))
  totals = np.full(stream.source.num_cells, np.nan)
  for chunk in stream.chunks(cells):
    ragged = chunk.cells
    for c, cell in enumerate(chunk.index_C):
      part = slice(ragged.starts_C1[c], ragged.starts_C1[c + 1])
      assert (np.diff(ragged.gene_rows_N[part].astype(int)) > 0).all()
      found[cell, ragged.gene_rows_N[part]] = ragged.counts_N[part]
    totals[chunk.index_C] = ragged.totals_C
  ids = [stream.vocabulary.genes.gene_ids[g] for g in rows]
  return pd.DataFrame(found, columns=ids), totals


def check(stream, matrix, ids=None):
  found, totals = gather(stream)
  ids = human_ids() if ids is None else ids
  dense = matrix.toarray()
  np.testing.assert_array_equal(found[ids].to_numpy(), dense)
  assert found.to_numpy().sum() == dense.sum()
  np.testing.assert_array_equal(totals, dense.sum(axis=1))


@pytest.mark.parametrize('dtype', [np.int32, np.int64, np.float32, np.uint16])
@pytest.mark.parametrize('kind', ['csr', 'csc', 'dense'])
@pytest.mark.parametrize('place', ['X', 'raw', 'layers/umis'])
def test_counts_wherever_they_are(tmp_path, vocab, dtype, kind, place):
  matrix = counts()
  stored = {
    'csr': matrix.astype(dtype),
    'csc': matrix.tocsc().astype(dtype),
    'dense': matrix.toarray().astype(dtype),
  }[kind]
  if place == 'X':
    adata = adata_of(stored)
  else:
    adata = adata_of(matrix.log1p())
    if place == 'raw':
      adata.raw = adata_of(stored)
    else:
      adata.layers['umis'] = stored
  stream = sources.cells_of(save(tmp_path, adata), vocab)
  assert stream.source.layer == place
  check(stream, matrix)
  check(sources.cells_of(adata, vocab), matrix)
  if place == 'X':
    backed = anndata.read_h5ad(tmp_path / 'cells.h5ad', backed='r')
    check(sources.cells_of(backed, vocab), matrix)


def test_a_large_csc_matrix_is_turned_on_disk(tmp_path, vocab, monkeypatch):
  monkeypatch.setattr(turning, 'TURN_IN_MEMORY', 200)
  matrix = counts(500)
  path = save(tmp_path, adata_of(matrix.tocsc()))
  folder = tmp_path / 'turned'
  stream = sources.cells_of(path, vocab).by_rows(str(folder))
  chunks = list(stream.chunks(32))
  assert [c.index_C[0] for c in chunks] == list(range(0, 500, 32))
  check(stream, matrix)
  check(sources.cells_of(path, vocab), matrix)  # in a folder of its own
  files = {file.name for file in folder.iterdir()}
  assert files == {'data.bin', 'indices.bin', 'indptr.npy'}


def test_a_turned_matrix_is_used_again_if_it_is_whole(tmp_path, vocab):
  matrix = counts(500)
  path = save(tmp_path, adata_of(matrix.tocsc()))
  folder = tmp_path / 'turned'
  turned = sources.cells_of(path, vocab).by_rows(str(folder))
  written = (folder / 'data.bin').stat().st_mtime_ns
  check(sources.cells_of(path, vocab).by_rows(str(folder)), matrix)
  assert (folder / 'data.bin').stat().st_mtime_ns == written
  (folder / 'indptr.npy').unlink()  # killed before the end
  (folder / 'data.bin').write_bytes(b'half')
  check(sources.cells_of(path, vocab).by_rows(str(folder)), matrix)
  del turned


def test_the_widest_counts_win_and_it_says_so(tmp_path, vocab):
  matrix = counts()
  adata = adata_of(matrix[:, :40], human_ids(40))
  adata.raw = adata_of(matrix)
  stream = sources.cells_of(save(tmp_path, adata), vocab)
  assert stream.source.layer == 'raw'
  assert 'raw looks like counts' in stream.source.layer_reason
  check(stream, matrix)
  config = sources.SourceConfig(layer='X')
  assert sources.cells_of(adata, vocab, config).source.layer == 'X'


@pytest.mark.parametrize('name', ['counts', 'raw_counts', 'spliced'])
def test_of_layers_of_whole_numbers_the_one_named_so(vocab, name):
  """Others come first in a file: it sorts its layers by name."""
  matrix = counts()
  adata = adata_of(matrix.log1p())
  adata.layers['ambiguous'] = matrix > 3
  adata.layers['is_detected'] = matrix > 0
  adata.layers[name] = matrix
  adata.layers['unspliced'] = matrix
  stream = sources.cells_of(adata, vocab)
  assert stream.source.layer == f'layers/{name}'
  assert 'layers/ambiguous' in stream.source.layer_reason
  check(stream, matrix)


def test_other_symbols_versions_and_duplicates(vocab):
  table = gene_table.GeneTable.default()
  ids = human_ids()
  names = [f'{i}.{n}' for n, i in enumerate(ids)]
  names[5] = table.symbols[table.row_of[ids[5]]]
  names[6] = ids[7]  # a duplicate: counts are summed
  names[8] = 'no such gene'
  matrix = counts()
  adata = adata_of(matrix, names)
  stream = sources.cells_of(adata, vocab)
  found, totals = gather(stream)
  dense = matrix.toarray()
  np.testing.assert_array_equal(found[ids[7]], dense[:, 6] + dense[:, 7])
  np.testing.assert_array_equal(found[ids[5]], dense[:, 5])
  assert (found[ids[6]] == 0).all()
  np.testing.assert_array_equal(totals, dense.sum(axis=1))  # lost ones too
  report = stream.report()['human']
  assert (report['duplicates'], report['lost']) == (1, 1)
  assert report['examples_lost'] == ['no such gene']
  assert report['share_umis_lost'] == pytest.approx(
    dense[:, 8].sum() / dense.sum()
  )
  measured_R = stream.measured(0)
  assert measured_R.sum() == GENES - 2
  assert not stream.measured(1).any()


def test_statistics_are_over_all_columns(vocab):
  ids = human_ids()
  ids[3], ids[4] = 'no such gene', 'ENSG00000210082'  # MT-RNR2
  matrix = counts()
  stream = sources.cells_of(adata_of(matrix, ids), vocab)
  (chunk,) = stream.chunks()
  dense = matrix.toarray()
  stats = chunk.statistics
  np.testing.assert_array_equal(stats.genes_C, (dense > 0).sum(axis=1))
  np.testing.assert_array_equal(stats.total_C, dense.sum(axis=1))
  np.testing.assert_array_equal(stats.mito_C, dense[:, 0] + dense[:, 4])
  table = gene_table.GeneTable.default()
  coding = [
    i in table.row_of
    and table.biotypes[table.row_of[i]] in ('protein_coding', 'miRNA')
    for i in ids
  ]
  np.testing.assert_array_equal(
    stats.coding_C, (dense[:, coding] > 0).sum(axis=1)
  )
  assert stream.source.has_flag(0) == (True, True)


def test_stored_zeros_are_no_expression(vocab):
  matrix = counts()
  expected = matrix.copy()
  expected.data[::3] = 0
  stream = sources.cells_of(adata_of(expected), vocab)
  (chunk,) = stream.chunks()
  assert (chunk.cells.counts_N > 0).all()
  check(stream, expected)


def test_repeated_cell_names_are_fine(tmp_path, vocab):
  adata = adata_of(counts())
  adata.obs.index = ['same'] * CELLS
  stream = sources.cells_of(save(tmp_path, adata), vocab)
  check(stream, counts())
  assert set(stream.source.cell_names()) == {'same'}


def test_library_size_from_obs(vocab):
  matrix = counts()
  adata = adata_of(matrix)
  sums = np.asarray(matrix.sum(axis=1)).ravel()
  adata.obs['all'] = sums + 1000
  adata.obs['less'] = sums - 1
  adata.obs['text'] = 'x'
  adata.obs['huge'] = sums + 2.0**32
  config = sources.SourceConfig(total='all')
  _, totals = gather(sources.cells_of(adata, vocab, config))
  np.testing.assert_array_equal(totals, sums + 1000)
  for column, match in (
    ('less', 'less than the counts of cell cell0'),
    ('text', 'no library size'),
    ('huge', "'huge' holds a library size above 4,294,967,295"),
    ('none', "no obs column 'none'; there are: all, less, text"),
  ):
    config = sources.SourceConfig(total=column)
    with pytest.raises(errors.UserError, match=match):
      list(sources.cells_of(adata, vocab, config).chunks())


def test_more_genes_than_two_bytes_count_are_refused(tmp_path):
  number = 70_000
  table = gene_table.GeneTable(
    gene_ids=tuple(f'ENSG{g:011d}' for g in range(number)),
    symbols=tuple(f'GENE{g}' for g in range(number)),
    aliases=((),) * number,
    entrez=('',) * number,
    species_G=np.zeros(number, np.int8),
    biotypes=('lncRNA',) * number,
    orthologue_groups=('',) * number,
  )
  wide = vocabulary.Vocabulary.from_genes(table)
  adata = adata_of(counts(), table.gene_ids[-GENES:])
  config = sources.SourceConfig(species='human')
  match = '70,000 human genes in the vocabulary, cells take 65,535'
  with pytest.raises(errors.UserError, match=match):
    sources.cells_of(adata, wide, config)  # their rows would be those of others
  wide.save(tmp_path / 'v.tsv.gz')
  settings = pipeline.PrepareConfig(vocabulary=str(tmp_path / 'v.tsv.gz'))
  with pytest.raises(errors.UserError, match=match):
    pipeline.prepare(
      [sources.from_anndata(adata, config, table)], tmp_path / 'c', settings
    )
  assert sorted(path.name for path in tmp_path.iterdir()) == ['v.tsv.gz']


@pytest.mark.parametrize('base', [np.e, 2, 10])
@pytest.mark.parametrize(
  'to', [scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, np.asarray]
)
@pytest.mark.parametrize('how', ['of counts', 'normalised', 'rounded', 'few'])
def test_logarithms_are_known_by_what_they_are_of(base, to, how):
  values = counts().toarray().astype(np.float64)
  if how != 'of counts':
    values *= 1e4 / values.sum(1, keepdims=True)
  if how == 'few':
    values = values[:, ::2]
  values = np.log1p(values) / np.log(base)
  if how == 'rounded':
    values = values.round(3)
  assert layers.kind_of(matrices.wrapped(to(values))) == layers.LOG
  for factor in (0.73, 0.31):
    small = matrices.wrapped(to(np.minimum(counts().toarray() * factor, 15)))
    assert layers.kind_of(small) == layers.SMALL


def test_a_gene_stored_twice_in_a_cell_is_one_gene(vocab):
  adata = adata_of(counts())
  once = list(sources.cells_of(adata, vocab).chunks())
  matrix = adata.X.tocoo()
  more = matrix.data > 1
  adata.X = scipy.sparse.csr_matrix(matrix.shape)
  adata.X.data = np.concatenate([matrix.data - more, np.ones(more.sum())])
  rows = np.concatenate([matrix.row, matrix.row[more]])
  order = np.argsort(rows, kind='stable')
  adata.X.data = adata.X.data[order]
  columns = np.concatenate([matrix.col, matrix.col[more]])[order]
  adata.X.indices = columns.astype(np.int32)
  adata.X.indptr = np.searchsorted(
    rows[order], np.arange(matrix.shape[0] + 1)
  ).astype(np.int32)
  before = adata.X.data.copy()
  for a, b in zip(once, sources.cells_of(adata, vocab).chunks(), strict=True):
    for name in ('genes_C', 'coding_C', 'mito_C', 'total_C'):
      np.testing.assert_array_equal(
        getattr(a.statistics, name), getattr(b.statistics, name)
      )
    np.testing.assert_array_equal(a.cells.counts_N, b.cells.counts_N)
  np.testing.assert_array_equal(adata.X.data, before)


def test_a_cell_of_too_many_counts_is_one_line(vocab):
  matrix = counts().astype(np.float64)
  matrix.data[matrix.indptr[77] : matrix.indptr[77] + 2] = 3e9
  stream = sources.cells_of(adata_of(matrix), vocab)
  with pytest.raises(errors.UserError, match='more than 4,294,967,295.*cell77'):
    list(stream.chunks())


def scaled(adata):
  adata.X = adata.X.toarray() - 0.5


def logged(adata):
  adata.X = adata.X.log1p()


def logged_with_counts(adata):
  adata.layers['counts'] = adata.X.copy()
  adata.X = adata.X.log1p()


def broken(adata):
  adata.X.data *= 10.3


def negative_late(adata):
  adata.X.data[-1] = -1


def infinite(adata):
  adata.X.data[7] = np.inf


def not_a_number(adata):
  adata.X.data[-7] = np.nan


def unknown_genes(adata):
  adata.var.index = [f'unheard of {i}' for i in range(GENES)]


@pytest.mark.parametrize(
  ('spoil', 'kwargs', 'match'),
  [
    (scaled, {}, 'negative values .scaled data.*raw counts is needed'),
    (logged, {}, 'log-transformed values; a file with the raw counts'),
    (
      logged_with_counts,
      {'layer': 'X'},
      'X holds log-transformed values; layers/counts looks like counts: pass '
      '--layer layers/counts',
    ),
    (logged, {'allow_noninteger': True}, 'log-transformed'),
    (broken, {}, 'non-integer values; pass --allow_noninteger'),
    (negative_late, {}, 'negative'),
    (infinite, {}, 'not finite'),
    (not_a_number, {}, 'not finite'),
    (unknown_genes, {'species': 'human'}, 'only 0% of 60 identifiers'),
    (unknown_genes, {}, 'cannot tell the species.*--species human'),
    (None, {'species': 'obs:kind'}, 'no such obs column'),
    (None, {'layer': 'spliced'}, "no layer 'spliced'; there are: X"),
    (None, {'species': 'mouse'}, '--ids-of human'),
  ],
)
def test_bad_values_are_one_line(tmp_path, vocab, spoil, kwargs, match):
  adata = adata_of(counts())
  if spoil:
    spoil(adata)
  for data in (adata, save(tmp_path, adata)):
    with pytest.raises(errors.UserError, match=match) as error:
      config = sources.SourceConfig(**kwargs)
      list(sources.cells_of(data, vocab, config).chunks())
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('value', 'match'),
  [
    (-2.0, 'a negative value, in cell cell77 .row 77.'),
    (np.nan, 'not finite, in cell cell77'),
    (1.25, 'not an integer .*never rounded.*cell77'),
    (2.0**33, 'above 4,294,967,295, in cell cell77'),
  ],
)
def test_values_that_the_sample_missed(vocab, monkeypatch, value, match):
  matrix = counts()
  matrix.data[matrix.indptr[77]] = value
  monkeypatch.setattr(layers, 'kind_of', lambda _: layers.COUNTS)
  stream = sources.cells_of(adata_of(matrix), vocab)
  with pytest.raises(errors.UserError, match=match):
    list(stream.chunks(50))


def test_corrected_counts_are_taken_as_they_are(tmp_path, vocab):
  matrix = counts()
  matrix.data = (matrix.data * 10.3).astype(np.float32)
  config = sources.SourceConfig(allow_noninteger=True)
  stream = sources.cells_of(save(tmp_path, adata_of(matrix)), vocab, config)
  assert stream.source.is_float
  found, _ = gather(stream)
  np.testing.assert_array_equal(found[human_ids()], matrix.toarray())
  few = matrix.copy()  # corrected, and all below what logarithms reach
  few.data = np.minimum(few.data / 10.3 * 0.73, 15).astype(np.float32)
  stream = sources.cells_of(adata_of(few), vocab, config)
  assert stream.source.is_float
  whole = sources.cells_of(adata_of(counts()), vocab, config)
  assert not whole.source.is_float  # nothing broken in it


def test_corrected_counts_that_no_float32_holds_are_zero(vocab):
  matrix = counts()
  matrix.data *= 10.3
  matrix.data[:3] = 1e-50, 1e-40, 1e-30
  config = sources.SourceConfig(allow_noninteger=True)
  stream = sources.cells_of(adata_of(matrix), vocab, config)
  first = stream.read(0, 64)[0]
  assert first.cells.counts_N.min() == np.float32(1e-30)
  assert first.statistics.genes_C.sum() == len(first.cells.counts_N)
  assert len(first.cells.counts_N) == matrix[:64].nnz - 2


def lfs_pointer(path):
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')


def text(path):
  path.write_text('gene,cell1\nACTB,3\n')


def nothing(path):
  path.write_bytes(b'')


def cut_short(path):
  adata_of(counts()).write_h5ad(path)
  path.write_bytes(path.read_bytes()[:3000])


def ten_x(path):
  with h5py.File(path, 'w') as file:
    file.create_group('matrix')


def other_hdf5(path):
  with h5py.File(path, 'w') as file:
    file['x'] = 1


def no_cells(path):
  adata_of(counts()[:0]).write_h5ad(path)


def no_genes(path):
  adata_of(counts()[:, :0], []).write_h5ad(path)


def no_matrix(path):
  adata_of(counts()).write_h5ad(path)
  with h5py.File(path, 'a') as file:
    del file['X']


def old_anndata(path):
  with h5py.File(path, 'w') as file:
    for name in ('obs', 'var'):
      file[name] = np.zeros(3, [('index', 'S3')])


def folder(path):
  path.mkdir()


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lfs_pointer, 'Git LFS pointer.*git lfs pull'),
    (text, 'not an h5ad.*table of text.*write_h5ad'),
    (nothing, 'an empty file; copy it again'),
    (cut_short, 'damaged HDF5'),
    (ten_x, '10x h5.*write_h5ad'),
    (other_hdf5, 'no AnnData'),
    (no_cells, 'no cells'),
    (no_genes, 'no genes'),
    (no_matrix, 'no X, raw or layer'),
    (old_anndata, 'before 0.7'),
    (folder, 'a folder'),
    (None, 'no such file'),
  ],
)
def test_bad_files_are_one_line(tmp_path, make, match):
  path = tmp_path / 'cells.h5ad'
  if make:
    make(path)
  with pytest.raises(errors.UserError, match=match) as error:
    sources.open_h5ad(sources.SourceConfig(str(path)))
  assert '\n' not in str(error.value)
  assert 'cells' in str(error.value)


def test_a_sparse_matrix_that_lies(tmp_path, vocab):
  path = save(tmp_path, adata_of(counts()))
  with h5py.File(path, 'a') as file:
    file['X/indices'][5] = GENES
  with pytest.raises(errors.UserError, match='cells.h5ad: .* outside of its'):
    list(sources.cells_of(path, vocab).chunks())


@pytest.mark.parametrize(
  'kwargs', [{'species': 'rat'}, {'assay': 'atac'}, {'ids_of': 'rat'}]
)
def test_impossible_choices(tmp_path, vocab, kwargs):
  path = save(tmp_path, adata_of(counts()))
  with pytest.raises(errors.UserError, match='give '):
    sources.cells_of(path, vocab, sources.SourceConfig(**kwargs))


def test_two_species_with_human_identifiers(real_data, vocab):
  path = real_data / 'baron_pancreas_human_mouse'
  path = path / 'baron_pancreas_human_mouse.h5ad'
  config = sources.SourceConfig(species='obs:species', ids_of='human')
  stream = sources.cells_of(path, vocab, config)
  assert stream.species == (0, 1)
  adata = anndata.read_h5ad(path)
  is_mouse = adata.obs['species'].astype(str).str.contains('mouse').to_numpy()
  seen = np.zeros(350, int)
  for chunk in stream.chunks(100):
    seen[chunk.index_C] += 1
    assert (is_mouse[chunk.index_C] == bool(chunk.species)).all()
    np.testing.assert_array_equal(
      chunk.statistics.total_C,
      np.asarray(adata.X[chunk.index_C].sum(axis=1)).ravel(),
    )
  assert (seen == 1).all()
  # INS in a mouse cell is counted for the mouse gene Ins2 or for none
  table = gene_table.GeneTable.default()
  genes = {
    table.species_G[table.row_of[g]]
    for g in stream.source.resolutions[1].gene_ids
    if g
  }
  assert genes == {1}


def test_real_sums_agree(real_data, vocab):
  for name, share in (
    ('mouse_brain_merfish', 0.99),
    ('kang_pbmc_ifnb_harmony', 0.99),
    ('mouse_embryo_E35_E45', 0.95),
  ):
    path = real_data / name / f'{name}.h5ad'
    stream = sources.cells_of(path, vocab)
    mapped = totals = 0.0
    for chunk in stream.chunks():
      mapped += chunk.cells.counts_N.sum(dtype=float)
      totals += chunk.cells.totals_C.sum()
    assert totals == anndata.read_h5ad(path).X.sum(dtype=float)
    assert mapped > share * totals
    (report,) = stream.report().values()
    assert 1 - report['share_umis_lost'] == pytest.approx(mapped / totals)


def test_normalised_real_sets_are_refused(real_data):
  for name, match in (
    ('fate_ipsc_cardio_scgps/day2_590x16990', 'non-integer'),
    ('fate_mouse_dc_ginhoux/fate_mouse_dc_ginhoux', 'log-transformed'),
    ('l1000_cmap_drugs/l1000_3drugs_272sig', 'negative'),
  ):
    with pytest.raises(errors.UserError, match=match):
      sources.open_h5ad(sources.SourceConfig(str(real_data / f'{name}.h5ad')))


@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.uint16, np.float32])
def test_small_types_hold_the_sum_of_a_gene_stored_twice(tmp_path, dtype):
  data = np.array([100, 100, 100, 5], dtype)
  places, offsets = np.array([1, 1, 1, 0]), np.array([0, 4])
  by_rows = sparse.Rows(data, places, offsets, (1, 3))
  by_columns = matrices.Columns(
    np.array([5, 100, 100, 100], dtype),
    np.zeros(4, np.int32),
    np.array([0, 1, 4, 4]),
    (1, 3),
  )
  for matrix in (
    by_rows,
    by_columns.by_rows(),
    by_columns.by_rows(str(tmp_path / 'turned')),
  ):
    assert matrix.read(0, 1).toarray().tolist() == [[5, 300, 0]]
