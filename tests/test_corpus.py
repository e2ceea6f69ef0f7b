"""The format of corpora, written by `corpus_writer` and read by `corpus`."""

import json
import os
import pathlib

import hypothesis
import numpy as np
import pytest
import scipy.sparse
from hypothesis import strategies as st

from genecompass_jax import (
  cli,
  corpus,
  corpus_writer,
  encoding,
  errors,
  gene_table,
  medians,
  vocabulary,
)

GENES = 300
SHARD = 4096  # many shards from few cells


@pytest.fixture(scope='module')
def vocab():
  ids = [f'ENSG{i:011d}' for i in range(GENES)]
  ids += [f'ENSMUSG{i:011d}' for i in range(GENES)]
  table = gene_table.GeneTable(
    gene_ids=tuple(ids),
    symbols=tuple(ids),
    aliases=((),) * len(ids),
    entrez=('',) * len(ids),
    species_G=np.repeat([0, 1], GENES),
    biotypes=('protein_coding',) * len(ids),
    orthologue_groups=('',) * len(ids),
  )
  return vocabulary.Vocabulary.from_genes(table)


def random_counts(num_cells, seed=0, density=0.2):
  rng = np.random.default_rng(seed)
  return scipy.sparse.random(
    num_cells,
    GENES,
    density,
    format='csr',
    random_state=rng,
    data_rvs=lambda n: rng.geometric(0.3, n).astype(float),
  )


def ragged(matrix):
  return encoding.RaggedCells(
    matrix.indices.astype(np.uint16),
    matrix.data,
    matrix.indptr.astype(np.int64),
    np.asarray(matrix.sum(axis=1), np.float64).ravel(),
  )


def write(path, vocab, matrix, chunk=100, facts=None, **kwargs):
  measured = {s: np.ones((2, GENES), bool) for s in range(2)}
  measured[0][1, 7:] = False
  with corpus_writer.CorpusWriter(
    path,
    vocab,
    sources=[{'name': 'a'}, {'name': 'b'}],
    measured=measured,
    categories={'source': ['a', 'b'], 'unit': ['u'], 'type': ['T', 'B']},
    shard_elements=SHARD,
    **kwargs,
  ) as writer:
    store = writer.store('train', 0)
    for a in range(0, matrix.shape[0], chunk):
      part = matrix[a : a + chunk]
      rows = np.arange(a, a + part.shape[0])
      obs = {
        'source': rows % 2,
        'unit': np.zeros(len(rows), int),
        'type': rows % 3 - 1,
        'source_row': rows,
      }
      store.append(ragged(part), obs, [f'cell {i}' for i in rows])
    writer.commit(facts or {'seed': 0})
  return corpus.Corpus.open(path)


def read(store):
  """All cells of a store as one matrix, and their totals."""
  blocks = store.read_blocks(range(store.num_blocks))
  matrix = scipy.sparse.vstack(
    [
      scipy.sparse.csr_matrix(
        (b.counts_N.astype(float), b.gene_rows_N.astype(int), b.starts_C1),
        shape=(b.num_cells, GENES),
      )
      for b in blocks
    ]
  ).tocsr()
  return matrix, np.concatenate([b.totals_C for b in blocks])


def assert_equal(a, b):
  assert a.shape == b.shape
  assert abs(a - b).nnz == 0


def files_of(path):
  root = pathlib.Path(path)
  return {
    str(p.relative_to(root)): p.read_bytes()
    for p in sorted(root.rglob('*'))
    if p.is_file()
  }


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  num_cells=st.integers(1, 400),
  chunk=st.integers(1, 400),
  density=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
  seed=st.integers(0, 9),
)
def test_round_trip_equals_csr(
  tmp_path_factory, vocab, num_cells, chunk, density, seed
):
  matrix = random_counts(num_cells, seed, density)
  place = tmp_path_factory.mktemp('c') / 'corpus'
  built = write(place, vocab, matrix, chunk)
  store = built.store('train', 0)
  found, totals = read(store)
  assert_equal(found, matrix)
  np.testing.assert_array_equal(totals, np.asarray(matrix.sum(1)).ravel())
  np.testing.assert_array_equal(store.length_N, np.diff(matrix.indptr))
  assert store.cell_names() == [f'cell {i}' for i in range(num_cells)]
  assert not built.verify()


def test_labels_splits_and_gene_lists(tmp_path, vocab):
  built = write(tmp_path / 'c', vocab, random_counts(500))
  store = built.store('train', 0)
  assert built.splits == ('train',)
  assert built.store('validation', 0) is None
  assert built.store('train', 1) is None
  assert built.num_cells('train') == 500
  assert built.gene_ids(1)[0] == 'ENSMUSG00000000000'
  np.testing.assert_array_equal(
    built.tokens(0), vocab.tokens(built.gene_ids(0))
  )
  rows = np.arange(500)
  np.testing.assert_array_equal(store.obs('source'), rows % 2)
  np.testing.assert_array_equal(store.obs('unit'), 0)  # zeros are stored too
  np.testing.assert_array_equal(store.obs('type'), rows % 3 - 1)
  np.testing.assert_array_equal(store.obs('source_row'), rows)
  assert store.categories('type') == ('T', 'B')
  assert store.measured_SrcR.shape == (2, GENES)
  assert store.measured_SrcR.sum(axis=1).tolist() == [GENES, 7]
  measured_PR, panel_Src = store.panels
  assert measured_PR.sum(axis=1)[panel_Src].tolist() == [GENES, 7, GENES]
  assert len(measured_PR) == 2
  with pytest.raises(errors.UserError, match=r"no obs column 'donor'"):
    store.obs('donor')
  histogram = built.manifest['stores']['train']['human']['length_histogram']
  assert sum(histogram['cells']) == 500


def test_blocks_in_any_order(tmp_path, vocab):
  matrix = random_counts(3000)
  store = write(tmp_path / 'c', vocab, matrix, chunk=77).store('train', 0)
  assert (store.block_cells, store.num_blocks) == (64, 47)
  for block, cells in zip([46, 0, 9, 0], store.read_blocks([46, 0, 9, 0])):
    part = matrix[block * 64 : block * 64 + 64]
    np.testing.assert_array_equal(cells.gene_rows_N, part.indices)
    np.testing.assert_array_equal(cells.counts_N, part.data)
    assert cells.gene_rows_N.dtype == cells.counts_N.dtype == np.uint16
  with pytest.raises(ValueError, match='47 blocks'):
    store.read_blocks([47])


@pytest.mark.parametrize(
  ('num_cells', 'expected'),
  [
    (1, 32),
    (1024, 32),
    (2048, 64),
    (32_767, 512),
    (32_768, 1024),
    (9**9, 1024),
  ],
)
def test_small_stores_have_small_blocks(num_cells, expected):
  assert corpus_writer.block_size(num_cells) == expected


def test_large_counts(tmp_path, vocab):
  matrix = random_counts(300)
  large = [65_534, 65_535, 65_536, 1_000_000, 3_000_000_000]
  matrix.data[100:105] = large
  matrix.data[-1] = 70_000
  matrix.data[matrix.indptr[40] : matrix.indptr[41]] = 1
  built = write(tmp_path / 'c', vocab, matrix, chunk=33)
  assert_equal(read(built.store('train', 0))[0], matrix)
  assert built.manifest['stores']['train']['human']['num_overflow'] == 5
  assert not built.verify()


def test_corrected_counts(tmp_path, vocab):
  matrix = random_counts(300)
  matrix.data = (matrix.data * 0.37).astype(np.float32).astype(float)
  built = write(tmp_path / 'c', vocab, matrix, value_dtype='float32')
  (cells,) = built.store('train', 0).read_blocks([1])
  assert cells.counts_N.dtype == np.float32
  assert_equal(read(built.store('train', 0))[0], matrix)
  assert built.manifest['value_dtype'] == 'float32'
  assert not built.verify()


def test_rows_are_put_in_order(tmp_path, vocab):
  matrix = random_counts(64)
  shuffled = matrix[:, np.random.default_rng(0).permutation(GENES)]
  shuffled.has_sorted_indices = False
  found, _ = read(write(tmp_path / 'c', vocab, shuffled).store('train', 0))
  assert_equal(found, shuffled)


@pytest.mark.parametrize(
  ('rows', 'counts', 'match'),
  [
    ([1, 1], [1, 1], 'stands twice'),
    ([1, GENES], [1, 1], 'beyond the gene list'),
    ([1, 2], [1, 0], 'not positive'),
    ([1, 2], [1, -3], 'not positive'),
    ([1, 2], [1, np.nan], 'not positive'),
    ([1, 2], [1, 1.5], 'not whole'),
    ([1, 2], [1, 2.0**32], 'not whole'),
  ],
)
def test_impossible_cells_are_refused(tmp_path, vocab, rows, counts, match):
  matrix = random_counts(2)
  matrix.indptr = np.array([0, 2, 2])
  matrix.indices, matrix.data = np.array(rows), np.array(counts, float)
  matrix.sum = lambda axis: np.array([2.0, 0.0])
  with pytest.raises(ValueError, match=match):
    with corpus_writer.CorpusWriter(
      tmp_path / 'c',
      vocab,
      sources=[{}],
      measured={},
      categories={'source': ['a'], 'unit': ['u']},
    ) as writer:
      obs = {k: np.zeros(2, int) for k in ('source', 'unit', 'source_row')}
      writer.store('train', 0).append(ragged(matrix), obs, ['a', 'b'])
  assert not list(tmp_path.iterdir())


def test_same_cells_same_bytes(tmp_path, vocab):
  matrix = random_counts(700)
  write(tmp_path / 'a', vocab, matrix, chunk=700)
  write(tmp_path / 'b', vocab, matrix, chunk=13)
  a, b = files_of(tmp_path / 'a'), files_of(tmp_path / 'b')
  del a['build.json'], b['build.json']
  assert a == b


def first_shard(path):
  return path / 'train' / 'human' / 'counts' / 'c' / '0' / '0'


def test_a_flipped_bit_is_an_error(tmp_path, vocab):
  write(tmp_path / 'c', vocab, random_counts(900))
  shard = first_shard(tmp_path / 'c')
  data = bytearray(shard.read_bytes())
  data[len(data) // 3] ^= 8
  shard.write_bytes(data)
  built = corpus.Corpus.open(tmp_path / 'c')
  with pytest.raises(errors.UserError) as error:
    built.store('train', 0).read_blocks([0])
  assert 'counts/c/0/0' in str(error.value)
  assert 'again' in str(error.value)
  assert '\n' not in str(error.value)
  assert any('counts/c/0/0' in line for line in built.verify())


@pytest.mark.parametrize(
  'name',
  [
    'counts/c/0/0',
    'counts/zarr.json',
    'length/c/0',
    'block_start/zarr.json',
    'obs/categories.json',
  ],
)
def test_every_flipped_bit_is_one_line_or_harmless(tmp_path, vocab, name):
  write(tmp_path / 'c', vocab, random_counts(200))
  path = tmp_path / 'c' / 'train' / 'human' / name
  whole = path.read_bytes()

  def content():
    built = corpus.Corpus.open(tmp_path / 'c')
    store = built.store('train', 0)
    (cells,) = store.read_blocks([0])
    return (
      *(cells.gene_rows_N.tobytes(), cells.counts_N.tobytes()),
      *(cells.starts_C1.tobytes(), store.categories('unit')),
    )

  expected = content()
  rng = np.random.default_rng(0)
  found = 0
  for bit in rng.choice(8 * len(whole), min(120, 8 * len(whole)), False):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
      same = content() == expected
    except errors.UserError as error:
      found += 1
      assert '\n' not in str(error)
    else:
      assert same
      assert corpus.Corpus.open(tmp_path / 'c').verify()
  assert found > 100


@pytest.mark.parametrize('how', ['cut', 'gone'])
def test_a_lost_shard_is_found_at_open(tmp_path, vocab, how):
  built = write(tmp_path / 'c', vocab, random_counts(900))
  shard = first_shard(tmp_path / 'c')
  if how == 'cut':
    shard.write_bytes(shard.read_bytes()[:-100])
  else:
    shard.unlink()
  with pytest.raises(errors.UserError, match=r'counts/c/0/0 .*again'):
    corpus.Corpus.open(tmp_path / 'c')
  # and never read as zeros by one who had it open already
  with pytest.raises(errors.UserError, match='counts/c/0/0'):
    built.store('train', 0).read_blocks([0])


@pytest.mark.parametrize(
  'name',
  [
    'vocabulary.tsv.gz',
    'train/human/cells.tsv.gz',
    'train/human/length/c/0',
  ],
)
def test_verify_reads_every_file(tmp_path, vocab, name):
  built = write(tmp_path / 'c', vocab, random_counts(100))
  assert not built.verify()
  path = tmp_path / 'c' / name
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  assert any(name in line for line in built.verify())


def test_not_a_corpus(tmp_path, vocab):
  with pytest.raises(errors.UserError, match='no corpus here'):
    corpus.Corpus.open(tmp_path)
  write(tmp_path / 'c', vocab, random_counts(10))
  path = tmp_path / 'c' / 'manifest.json'
  manifest = json.loads(path.read_text())
  for text, match in (
    ('{"format":', 'damaged'),
    ('{"format": "other"}', 'not that of a corpus'),
    (json.dumps(manifest | {'format_version': 99}), 'format 99'),
  ):
    path.write_text(text)
    with pytest.raises(errors.UserError, match=match):
      corpus.Corpus.open(tmp_path / 'c')


@pytest.mark.parametrize(
  'change',
  [
    lambda m: m.update(seed=m.get('seed', 0) + 1),
    lambda m: m['sources'][0].update(name='other'),
    lambda m: m['files'].pop('vocabulary.tsv.gz'),
    lambda m: m.update(split={'leaky': True}),
    lambda m: m.update(sha256=None),
  ],
)
def test_a_manifest_of_the_right_shape_that_was_edited(
  tmp_path, vocab, change, capsys
):
  folder = str(tmp_path / 'c')
  opened = write(folder, vocab, random_counts(10))
  assert opened.is_sealed and 'sha256' not in opened.manifest
  path = tmp_path / 'c' / 'manifest.json'
  text = path.read_text()
  manifest = json.loads(text)
  path.write_text(json.dumps(manifest))  # other spaces, the same content
  assert corpus.Corpus.open(folder).manifest == opened.manifest
  change(manifest)
  path.write_text(json.dumps(manifest))
  for words in (['corpus', 'verify'], ['corpus', 'stats'], ['doctor']):
    assert cli.main([*words, folder])
    seen = capsys.readouterr()
    (line,) = [
      line
      for line in (seen.out + seen.err).splitlines()
      if 'was changed after it was written' in line
    ]
    assert 'manifest.json' in line and 'again' in line


def test_a_manifest_without_a_hash_says_so(tmp_path, vocab, capsys):
  folder = str(tmp_path / 'c')
  opened = write(folder, vocab, random_counts(10))
  assert cli.main(['corpus', 'verify', folder]) == 0
  assert len(capsys.readouterr().out.splitlines()) == 1
  path = tmp_path / 'c' / 'manifest.json'
  manifest = json.loads(path.read_text())
  del manifest['sha256']
  path.write_text(json.dumps(manifest))
  old = corpus.Corpus.open(folder)
  assert not old.is_sealed and old.manifest == opened.manifest
  assert cli.main(['corpus', 'verify', folder]) == 0
  _, line = capsys.readouterr().out.splitlines()
  assert 'has no hash of its own' in line


def test_categories_nested_too_deep(tmp_path, vocab):
  folder = tmp_path / 'c'
  write(folder, vocab, random_counts(10))
  name = 'train/human/obs/categories.json'
  (folder / name).write_text('{"unit":' + '[' * 200_000)
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  del manifest['sha256']
  manifest['files'][name] = corpus_writer.file_facts(str(folder / name))
  path.write_text(json.dumps(manifest))
  store = corpus.Corpus.open(folder).store('train', 0)
  with pytest.raises(errors.UserError, match='damaged.*nested too deep'):
    store.categories('unit')


def test_nothing_is_replaced_by_accident(tmp_path, vocab):
  write(tmp_path / 'c', vocab, random_counts(50), facts={'seed': 1})
  with pytest.raises(errors.UserError, match='--overwrite'):
    write(tmp_path / 'c', vocab, random_counts(10))
  built = write(
    tmp_path / 'c', vocab, random_counts(20), overwrite=True, facts={'seed': 2}
  )
  assert (built.manifest['seed'], built.num_cells('train')) == (2, 20)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('')
  with pytest.raises(errors.UserError, match='left alone'):
    write(tmp_path / 'mine', vocab, random_counts(10), overwrite=True)
  assert os.listdir(tmp_path / 'mine') == ['thesis.txt']


def test_failure_leaves_nothing_and_the_old_corpus(tmp_path, vocab):
  write(tmp_path / 'c', vocab, random_counts(50))
  before = files_of(tmp_path / 'c')
  with pytest.raises(RuntimeError):
    with corpus_writer.CorpusWriter(
      tmp_path / 'c',
      vocab,
      sources=[{}],
      measured={},
      categories={'source': ['a'], 'unit': ['u']},
      overwrite=True,
    ) as writer:
      writer.store('train', 0)
      raise RuntimeError
  assert files_of(tmp_path / 'c') == before
  assert os.listdir(tmp_path) == ['c']


def test_medians_travel_with_the_corpus(tmp_path, vocab):
  values = medians.Medians.from_histograms(
    vocab, {0: medians.MedianHistogram('released', np.zeros(0), vocab.size)}
  )
  with corpus_writer.CorpusWriter(
    tmp_path / 'c',
    vocab,
    sources=[{}],
    measured={0: np.ones((1, GENES), bool)},
    categories={'source': ['a'], 'unit': ['u']},
  ) as writer:
    obs = {k: np.zeros(5, int) for k in ('source', 'unit', 'source_row')}
    cells = ragged(random_counts(5))
    writer.store('train', 0).append(cells, obs, ['n'] * 5)
    writer.write_medians(values)
    writer.commit({})
  built = corpus.Corpus.open(tmp_path / 'c')
  np.testing.assert_array_equal(
    built.medians('released').support_SV, values.support_SV
  )
  with pytest.raises(errors.UserError, match="no medians of mode 'library'"):
    built.medians('library')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda m: m.pop('files'), 'files is missing'),
    (lambda m: m['files'].update({'../x': {'size': 1, 'sha256': ''}}),
     'outside of the corpus'),
    (lambda m: m['files'].update({'report.json': 7}), 'report.json holds no'),
    (lambda m: m.update(vocabulary=[]), 'vocabulary holds no names'),
    (lambda m: m['stores'].update(train={'human': 'x'}), 'train/human holds'),
    (lambda m: next(iter(m['stores']['train'].values())).update(num_cells=-1),
     'num_cells is not a number'),
    (lambda m: next(iter(m['stores']['train'].values())).update(block_cells=0),
     'below one'),
    (lambda m: next(iter(m['stores']['train'].values())).update(num_cells=1),
     'the manifest says 1 cells'),
    (lambda m: next(iter(m['stores']['train'].values())).update(
      num_elements=10**15), 'the manifest says'),
    (lambda m: m.update(sources=[None]), 'sources/0 holds no names'),
  ],
)  # fmt: skip
def test_an_edited_manifest_is_one_line(tmp_path, vocab, change, message):
  folder = tmp_path / 'c'
  write(folder, vocab, random_counts(10))
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  del manifest['sha256']  # as those of earlier versions
  change(manifest)
  path.write_text(json.dumps(manifest))
  with pytest.raises(errors.UserError, match=message) as error:
    opened = corpus.Corpus.open(folder)
    for split in opened.splits:
      opened.stores(split)
  assert '\n' not in str(error.value)
  path.write_text('[' * 200_000)
  with pytest.raises(errors.UserError, match='damaged'):
    corpus.Corpus.open(folder)
