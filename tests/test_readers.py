"""Cells of every format: the same counts, or one line."""

import gzip
import multiprocessing
import pickle
import shutil
import zipfile

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from experiments.benchmarks import formats
from genecompass_jax import errors, gene_table, vocabulary
from genecompass_jax.prepare import (
  anndatas,
  matrices,
  pipeline,
  quality,
  sources,
)
from tests.test_prepare_sources import check, counts, gather, human_ids

CELLS, GENES = 90, 60
TABLE = gene_table.GeneTable.default()


@pytest.fixture(scope='module')
def vocab():
  return vocabulary.Vocabulary.default()


def mouse_ids(num=GENES):
  first = int(np.argmax(TABLE.species_G == 1))
  return [TABLE.gene_ids[g] for g in range(first, first + 300 * num, 300)]


def adata_of(matrix=None, ids=None, **obs):
  matrix = counts() if matrix is None else matrix
  ids = human_ids(matrix.shape[1]) if ids is None else ids
  names = [f'BARCODE{i:04d}-1' for i in range(matrix.shape[0])]
  symbols = [TABLE.symbols[TABLE.row_of[i.rpartition('_')[2]]] for i in ids]
  return anndata.AnnData(
    matrix,
    pd.DataFrame(obs, index=names),
    pd.DataFrame({'gene_name': symbols}, index=ids),
  )


def written(tmp_path, kind, adata=None):
  stem = str(tmp_path / 'cells')
  formats.WRITERS[kind](adata_of() if adata is None else adata, stem)
  return stem + formats.PATHS[kind]


def opened(path, **fields):
  return sources.open_source(sources.SourceConfig(str(path), **fields))


@pytest.mark.parametrize('kind', formats.WRITERS)
def test_counts_are_the_same_in_every_format(tmp_path, vocab, kind):
  path = written(tmp_path, kind)
  stream = sources.cells_of(path, vocab)
  check(stream, counts())
  assert stream.source.can_reopen
  assert len(stream.source.sha256) == 64
  names = stream.source.cell_names()
  assert names[[0, -1]].tolist() == [
    'BARCODE0000-1',
    f'BARCODE{CELLS - 1:04d}-1',
  ]
  by_rows = stream.by_rows(str(tmp_path / 'turned'))
  for first, stop in ((80, 200), (0, 1), (33, 34)):  # in any order
    (chunk,) = by_rows.read(first, stop)
    dense = counts().toarray()[first:stop]
    np.testing.assert_array_equal(chunk.cells.totals_C, dense.sum(axis=1))


def test_a_column_of_species_that_is_not_followed_is_named(tmp_path, caplog):
  """Mouse cells under human names would pass for human without a word."""
  number = counts().shape[0]
  for label, said in (('Mus musculus', True), ('human', False), ('?', False)):
    caplog.clear()
    adata = adata_of(Organism=[label] * 3 + ['human'] * (number - 3))
    path = written(tmp_path, 'h5ad', adata)
    opened(path, species='auto')
    assert ('3 cells are of another species (mouse)' in caplog.text) == said
    assert ('--species obs:Organism' in caplog.text) == said
    caplog.clear()
    opened(path, species='human')  # as was asked
    assert not caplog.text


def reread(config):
  source = sources.open_source(config)
  (chunk,) = source.bind(vocabulary.Vocabulary.default()).read(10, 20)
  return source.sha256, chunk.cells.totals_C.tolist()


def test_a_source_opens_again_in_another_process(tmp_path):
  config = sources.SourceConfig(written(tmp_path, '10x 3'))
  again = pickle.loads(pickle.dumps(config))
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    assert pool.map(reread, [again]) == [reread(config)]
  assert not sources.from_anndata(adata_of()).can_reopen


@pytest.mark.parametrize('version', [2, 3])
@pytest.mark.parametrize('kind', ['csr', 'csc', 'dense'])
@pytest.mark.parametrize('place', ['X', 'raw', 'layers/umis'])
def test_zarr_matrices_wherever_they_are(tmp_path, vocab, version, kind, place):
  matrix = counts()
  stored = {'csr': matrix, 'csc': matrix.tocsc(), 'dense': matrix.toarray()}
  if place == 'X':
    adata = adata_of(stored[kind])
  else:
    adata = adata_of(matrix.log1p())
    if place == 'raw':
      adata.raw = adata_of(stored[kind])
    else:
      adata.layers['umis'] = stored[kind]
  formats.write_zarr(adata, str(tmp_path / 'cells.zarr'), version)
  stream = sources.cells_of(tmp_path / 'cells.zarr', vocab)
  assert stream.source.layer == place
  check(stream, matrix)


def test_labels_of_all_kinds(tmp_path):
  obs = {
    'category': pd.Categorical(list('ab') * 45),
    'truth': [True, False] * 45,
    'maybe': pd.array([True, None] * 45, dtype='boolean'),
    'whole': pd.array([1, None, 3] * 30, dtype='Int64'),
    'text': ['x', 'y', 'z'] * 30,
    'number': np.arange(90) / 2,
  }
  expected = {
    'category': (['a', 'b'], [0, 1, 0]),
    'truth': (['False', 'True'], [1, 0, 1]),
    'maybe': (['True'], [0, -1, 0]),
    'whole': (['1', '3'], [0, -1, 1]),
    'text': (['x', 'y', 'z'], [0, 1, 2]),
  }
  for kind in ('h5ad', 'zarr2', 'zarr3'):
    source = opened(written(tmp_path, kind, adata_of(**obs)))
    for column, (names, codes) in expected.items():
      found, categories = source.codes(column)
      assert categories == names
      assert found[:3].tolist() == codes


def test_more_labels_from_a_table(tmp_path):
  path = written(tmp_path, '10x 3')
  adata = adata_of()
  frame = pd.DataFrame({'cell_type': ['T', 'B', 'NK'] * 30}, adata.obs_names)
  frame.index.name = 'barcode'
  frame = frame[::-1].iloc[:80]  # in another order, some cells are not named
  frame.to_csv(tmp_path / 'labels.csv')
  frame.to_csv(tmp_path / 'labels.tsv.gz', sep='\t')
  for name in ('labels.csv', 'labels.tsv.gz'):
    source = opened(path, obs_table=str(tmp_path / name))
    codes, names = source.codes('cell_type')
    assert names == ['B', 'NK', 'T']
    assert codes[:10].tolist() == [-1] * 10
    assert codes[10:13].tolist() == [0, 1, 2]
  for text, match in (
    ('barcode,x\nother,1\n', 'names none of these cells; it has other, the'),
    ('barcode,x\nBARCODE0001-1,1\nBARCODE0001-1,2\n', 'stands there twice'),
    ('barcode\nBARCODE0001-1\n', 'one column'),
    ('', 'it is empty'),
    ('barcode,x\n', 'without rows'),
    (
      'barcode,x\nBARCODE0001-1,T cell, CD4+\n',
      '3 columns below a header of 2',
    ),
    ('barcode,x,y\nBARCODE0001-1,a,b\nBARCODE0002-1,a\n', 'line 3 has 2'),
    ('barcode,x\nBARCODE0001-1,"T\nBARCODE0002-1,"B\n', 'several lines'),
    ('barcode,x\nBARCODE0001-1,T\0c\n', 'line 2 has a zero byte'),
    (None, 'no such file'),
  ):
    table = tmp_path / 'bad.csv'
    table.unlink(missing_ok=True)
    if text is not None:
      table.write_text(text)
    with pytest.raises(errors.UserError, match=match) as error:
      opened(path, obs_table=str(table))
    assert '\n' not in str(error.value)


def test_labels_of_a_table_are_text(tmp_path):
  path = written(tmp_path, '10x 3')
  names = adata_of().obs_names
  table = tmp_path / 'labels.tsv'
  donors = ['1', '01', '9007199254740993', '9007199254740992', 'NA', '']
  rows = [f'{n}\t{d}' for n, d in zip(names, donors)]
  for head in ('cell\tdonor', 'donor'):  # R names no column of row names
    table.write_text('\n'.join([head, *rows]) + '\n')
    source = opened(path, obs_table=str(table))
    codes, found = source.codes('donor')
    assert [found[c] if c >= 0 else '' for c in codes[:6]] == donors[:4] + [
      ''
    ] * 2


def test_whole_numbers_are_one_label_however_stored(tmp_path):
  adata = adata_of()
  adata.obs['whole'] = np.arange(len(adata)) % 3
  adata.obs['some'] = (
    adata.obs['whole'].astype(float).where(adata.obs['whole'] > 0)
  )
  source = sources.from_anndata(adata)
  assert source.codes('whole')[1] == ['0', '1', '2']
  assert source.codes('some')[1] == ['1', '2']
  adata.obs['some'] = adata.obs['some'] + 0.5
  assert sources.from_anndata(adata).codes('some')[1] == ['1.5', '2.5']


def barnyard(tmp_path, how, cells=slice(None)):
  """30 human, 20 mouse cells, 10 of both, or some of them; antibodies."""
  human = scipy.sparse.random(60, 40, 0.5, 'csr', random_state=1)
  mouse = scipy.sparse.random(60, 30, 0.5, 'csr', random_state=2)
  for part, own in ((human, slice(0, 30)), (mouse, slice(30, 50))):
    part.data = np.ceil(part.data * 2)
    weight = np.zeros(60)
    weight[own] = 50
    weight[50:] = 20
    part.data *= weight[np.repeat(np.arange(60), np.diff(part.indptr))]
    part.data += 1
  tags = scipy.sparse.csr_matrix(np.full((60, 3), 1000))
  matrix = scipy.sparse.hstack([human, tags, mouse], format='csr')
  human_names, mouse_names = human_ids(40), mouse_ids(30)
  ids = [f'GRCh38_{i}' for i in human_names] + ['CD3', 'CD4', 'CD8']
  ids += [f'mm10___{i}' for i in mouse_names]
  genomes = ['GRCh38'] * 40 + [''] * 3 + ['mm10'] * 30
  kinds = ['Gene Expression'] * 73
  kinds[40:43] = ['Antibody Capture'] * 3
  symbols = [
    g + '_' * (3 if g == 'mm10' else 1) + f's{k}' if g else f's{k}'
    for k, g in enumerate(genomes)
  ]
  adata = anndata.AnnData(
    matrix,
    pd.DataFrame(index=[f'B{i}' for i in range(60)]),
    pd.DataFrame({'gene_name': symbols}, index=ids),
  )[cells].copy()
  if how == '10x':
    path = tmp_path / 'mix.h5'
    formats.write_10x(adata, str(path), genomes, kinds)
  else:
    path = tmp_path / 'mix'
    formats.write_mtx(adata, str(path), kinds=kinds)
  return path, human[:30], mouse[30:50]


def test_a_genome_without_cells_is_told(tmp_path):
  """Cells of one species, counted on the genomes of two."""
  path, human, _ = barnyard(tmp_path, '10x', slice(0, 30))
  with pytest.raises(
    errors.UserError, match='no cell.*on mm10; read GRCh38 al'
  ):
    opened(path, genome='mm10')
  assert opened(path, genome='GRCh38').num_cells == len(human.toarray())


@pytest.mark.parametrize('how', ['10x', 'mtx'])
def test_genomes_of_a_mixed_set_are_sources(tmp_path, vocab, how):
  path, human, mouse = barnyard(tmp_path, how)
  with pytest.raises(errors.UserError, match='GRCh38, mm10; .*--genome GRCh38'):
    opened(path)
  with pytest.raises(errors.UserError, match="no genome 'hg19'; there are: G"):
    opened(path, genome='hg19')
  parts = sources.expand(sources.SourceConfig(str(path)))
  assert [p.genome for p in parts] == ['GRCh38', 'mm10']
  first, second = (sources.open_source(p) for p in parts)
  assert (first.name, second.name) == ('mix-GRCh38', 'mix-mm10')
  assert first.sha256 != second.sha256
  assert set(first.species_C) == {0} and set(second.species_C) == {1}
  check(first.bind(vocab), human, human_ids(40))
  check(second.bind(vocab), mouse, mouse_ids(30))
  assert '30 of 60 cells' in first.layer_reason
  assert '3 of Antibody Capture' in first.layer_reason
  assert second.cell_names().tolist() == [f'B{i}' for i in range(30, 50)]


def test_genomes_of_cell_ranger_2_are_groups(tmp_path, vocab):
  path = tmp_path / 'raw_gene_bc_matrices_h5.h5'
  human, mouse = counts(30), counts(20, seed=1)
  parts = {
    'hg19': adata_of(human),
    'mm10': adata_of(mouse, mouse_ids()),
  }
  formats.write_10x_v2(parts, str(path))
  with pytest.raises(errors.UserError, match='genomes hg19, mm10'):
    opened(path)
  found = sources.expand(sources.SourceConfig(str(path)))
  assert [p.genome for p in found] == ['hg19', 'mm10']
  check(sources.open_source(found[0]).bind(vocab), human)
  check(sources.open_source(found[1]).bind(vocab), mouse, mouse_ids())


def test_only_genes_are_read(tmp_path, vocab):
  matrix = counts()
  kinds = ['Gene Expression'] * GENES
  for place in (3, 20, 59):
    kinds[place] = 'Antibody Capture'
  kinds[30] = 'Peaks'
  keep = np.array([k == 'Gene Expression' for k in kinds])
  ids = np.array(human_ids())
  formats.write_10x(adata_of(), str(tmp_path / 'multi.h5'), kinds=kinds)
  formats.write_mtx(adata_of(), str(tmp_path / 'multi'), kinds=kinds)
  for name in ('multi.h5', 'multi'):
    source = opened(tmp_path / name)
    assert '3 of Antibody Capture, 1 of Peaks' in source.layer_reason
    check(
      source.bind(vocab), matrix[:, np.flatnonzero(keep)], ids[keep].tolist()
    )
  formats.write_10x(
    adata_of(), str(tmp_path / 'atac.h5'), kinds=['Peaks'] * GENES
  )
  with pytest.raises(errors.UserError, match="'Gene Expression'; .*: Peaks"):
    opened(tmp_path / 'atac.h5')


def test_duplicated_symbols_are_summed(tmp_path, vocab):
  adata = adata_of()
  adata.var_names = [TABLE.symbols[TABLE.row_of[i]] for i in human_ids()]
  names = adata.var_names.tolist()
  names[6] = names[7]
  adata.var_names = names
  adata.var = adata.var[[]]
  formats.write_10x(adata, str(tmp_path / 'twice.h5'))
  formats.write_mtx(adata, str(tmp_path / 'twice'), packed=False, version=2)
  dense = counts().toarray()
  for name in ('twice.h5', 'twice'):
    found, totals = gather(sources.cells_of(tmp_path / name, vocab))
    np.testing.assert_array_equal(
      found[human_ids()[7]], dense[:, 6] + dense[:, 7]
    )
    np.testing.assert_array_equal(totals, dense.sum(axis=1))


def rewrite(folder, change, name='matrix.mtx'):
  path = folder / name
  path.write_text(change(path.read_text()))


def shuffled(text):
  lines = text.splitlines()
  rng = np.random.default_rng(0)
  return '\n'.join([*lines[:3], *rng.permutation(lines[3:])])  # no last newline


def transposed(text):
  lines = text.splitlines()
  turn = [' '.join([*(p := line.split())[1::-1], p[2]]) for line in lines[2:]]
  return '\n'.join([*lines[:2], *turn]) + '\n'


def loose(text):
  lines = text.replace(' ', '\t ').splitlines()
  lines[0] = lines[0].replace('\t ', '   ')
  return '\r\n'.join([lines[0].upper(), '%', '', *lines[1:], '', ''])


def real(text):
  return text.replace('integer', 'real').replace('\n5 ', '\n5 ', 1)


def split_in_two(text):
  """Every entry twice: one of it, and the rest."""
  lines = text.splitlines()
  sizes = lines[2].split()
  sizes[2] = str(2 * int(sizes[2]))
  more = []
  for line in lines[3:]:
    gene, cell, count = line.split()
    more += [f'{gene} {cell} 1', f'{gene} {cell} {int(count) - 1}']
  return '\n'.join([*lines[:2], ' '.join(sizes), *more]) + '\n'


@pytest.mark.parametrize(
  'change', [shuffled, transposed, loose, real, split_in_two]
)
def test_mtx_as_others_write_it(tmp_path, vocab, monkeypatch, change):
  from genecompass_jax.prepare.readers import mtx

  formats.write_mtx(adata_of(), str(tmp_path / 'm'), packed=False)
  rewrite(tmp_path / 'm', change)
  check(sources.cells_of(tmp_path / 'm', vocab), counts())
  monkeypatch.setattr(mtx, '_BLOCK', 256)  # in many blocks and parts
  monkeypatch.setattr(mtx, '_SLAB', 100)
  check(sources.cells_of(tmp_path / 'm', vocab), counts())


def test_mtx_patterns_are_ones(tmp_path, vocab):
  formats.write_mtx(adata_of(), str(tmp_path / 'm'), packed=False)

  def pattern(text):
    lines = text.replace('integer', 'pattern').splitlines()
    return '\n'.join([*lines[:3], *(x.rpartition(' ')[0] for x in lines[3:])])

  rewrite(tmp_path / 'm', pattern)
  check(sources.cells_of(tmp_path / 'm', vocab), counts().sign())


def test_a_folder_of_several_samples(tmp_path, vocab):
  folder = tmp_path / 'GSE1'
  for k in range(3):
    adata = adata_of(counts(20 + k, seed=k))
    formats.write_mtx(adata, str(folder), f'GSM{k}_lung_', packed=k != 1)
  with pytest.raises(errors.UserError, match='holds 3 matrices .GSM0_lung_'):
    opened(folder)
  parts = sources.expand(sources.SourceConfig(str(folder)))
  assert [p.label for p in parts] == ['GSM0_lung', 'GSM1_lung', 'GSM2_lung']
  for k, part in enumerate(parts):
    check(sources.open_source(part).bind(vocab), counts(20 + k, seed=k))


@pytest.mark.parametrize(
  ('path', 'label'),
  [
    ('a/lung.h5ad', 'lung'),
    ('a/S7/outs/filtered_feature_bc_matrix.h5', 'S7'),
    ('a/S7/outs/raw_feature_bc_matrix/', 'S7'),
    ('a/S8/filtered_gene_bc_matrices/GRCh38/matrix.mtx', 'S8'),
    ('GSM5_tumour_matrix.mtx.gz', 'GSM5_tumour'),
    ('GSM5_filtered_feature_bc_matrix.h5', 'GSM5'),
    ('cells.zarr.zip', 'cells'),
    ('matrix.mtx', 'matrix.mtx'),
    ('', 'cells'),
  ],
)
def test_names_of_sources(path, label):
  assert sources.SourceConfig(path).label == label


# Faults: each makes a place, and the line that is to come says why.
def lfs_mtx(tmp_path):
  folder = tmp_path / 'm'
  formats.write_mtx(adata_of(), str(folder), packed=False)
  (folder / 'features.tsv').write_text(
    'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'
  )
  return folder


def mtx_with(change, name='matrix.mtx'):
  def make(tmp_path):
    formats.write_mtx(adata_of(), str(tmp_path / 'm'), packed=False)
    rewrite(tmp_path / 'm', change, name)
    return tmp_path / 'm'

  return make


def mtx_without(name):
  def make(tmp_path):
    formats.write_mtx(adata_of(), str(tmp_path / 'm'), packed=False)
    (tmp_path / 'm' / name).unlink()
    return tmp_path / 'm'

  return make


def cut_gzip(tmp_path):
  formats.write_mtx(adata_of(), str(tmp_path / 'm'))
  path = tmp_path / 'm' / 'matrix.mtx.gz'
  path.write_bytes(path.read_bytes()[:-400])
  return tmp_path / 'm'


def flipped_gzip(tmp_path):
  formats.write_mtx(adata_of(), str(tmp_path / 'm'))
  path = tmp_path / 'm' / 'matrix.mtx.gz'
  data = bytearray(path.read_bytes())
  data[-6] ^= 1  # of the checksum at the end
  path.write_bytes(data)
  return tmp_path / 'm'


def tenx_with(change):
  def make(tmp_path):
    path = tmp_path / 'cells.h5'
    formats.write_10x(adata_of(), str(path))
    with h5py.File(path, 'a') as file:
      change(file['matrix'])
    return path

  return make


def delete(name):
  def change(group):
    del group[name]

  return change


def replace(name, values):
  def change(group):
    del group[name]
    group[name] = values

  return change


def wrong_place(group):
  group['indices'][5] = GENES


def gzipped_h5ad(tmp_path):
  adata_of().write_h5ad(tmp_path / 'c.h5ad')
  path = tmp_path / 'c.h5ad.gz'
  path.write_bytes(gzip.compress((tmp_path / 'c.h5ad').read_bytes()))
  return path


def tarred(tmp_path):
  formats.write_mtx(adata_of(), str(tmp_path / 'm'))
  return shutil.make_archive(str(tmp_path / 'm'), 'tar', tmp_path / 'm')


def tarred_gz(tmp_path):
  formats.write_mtx(adata_of(), str(tmp_path / 'm'))
  return shutil.make_archive(str(tmp_path / 'm'), 'gztar', tmp_path / 'm')


def zipped(tmp_path):
  formats.write_mtx(adata_of(), str(tmp_path / 'm'))
  return shutil.make_archive(str(tmp_path / 'm'), 'zip', tmp_path / 'm')


def empty_file(tmp_path):
  (tmp_path / 'cells.h5').touch()
  return tmp_path / 'cells.h5'


def empty_folder(tmp_path):
  (tmp_path / 'empty').mkdir()
  return tmp_path / 'empty'


def outs(tmp_path):
  (tmp_path / 'outs').mkdir()
  formats.write_10x(adata_of(), str(tmp_path / 'outs' / 'f.h5'))
  return tmp_path / 'outs'


def cell_ranger(tmp_path):
  folder = tmp_path / 'run' / 'outs' / 'filtered_feature_bc_matrix'
  folder.mkdir(parents=True)
  return tmp_path / 'run'


def zarr_without(pattern, version):
  def make(tmp_path):
    path = tmp_path / 'cells.zarr'
    formats.write_zarr(adata_of(), str(path), version)
    (chunk,) = path.glob(pattern)
    chunk.unlink()
    return path

  return make


def not_anndata(tmp_path):
  import zarr

  zarr.open_group(tmp_path / 'other.zarr', mode='w')
  return tmp_path / 'other.zarr'


def flipped_zip(tmp_path):
  path = tmp_path / 'cells.zarr.zip'
  formats.write_zarr(adata_of(), str(path))
  with zipfile.ZipFile(path) as file:
    info = file.getinfo('X/data/c/0')
  data = bytearray(path.read_bytes())
  data[info.header_offset + 60] ^= 1
  path.write_bytes(data)
  return path


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lfs_mtx, 'features.tsv: a Git LFS pointer'),
    (mtx_without('barcodes.tsv'), 'no barcodes.tsv or .tsv.gz beside it'),
    (mtx_without('features.tsv'), 'no features.tsv'),
    (mtx_with(lambda t: ''), 'no Matrix Market'),
    (mtx_with(lambda t: t[:4000]), 'm: matrix.mtx is damaged'),
    (mtx_with(lambda t: t[: t[:4000].rfind('\n')]), 'is cut short or damaged'),
    (mtx_with(lambda t: t + '1 1 1\n'), 'holds .* entries and says'),
    (
      mtx_with(lambda t: t.replace('general', 'symmetric')),
      'general is needed',
    ),
    (mtx_with(lambda t: t.replace('integer', 'complex')), 'complex values'),
    (mtx_with(lambda t: t + '999 1 1\n'), 'outside of its shape'),
    (mtx_with(lambda t: t + '0 1 1\n'), 'outside of its shape'),
    (mtx_with(lambda t: t + '1 1\n'), 'matrix.mtx is damaged'),
    (mtx_with(lambda t: t + '1 1 x\n'), 'matrix.mtx is damaged'),
    (mtx_with(lambda t: t[:75]), 'no line of sizes'),
    (mtx_with(lambda t: 'x\n' + t, 'barcodes.tsv'), '60 features and 91 bar'),
    (mtx_with(lambda t: t + 'a\tb\n', 'features.tsv'), 'lines of .2, 3. col'),
    (cut_gzip, 'matrix.mtx.gz is cut short or damaged'),
    (flipped_gzip, 'matrix.mtx.gz is cut short or damaged .CRC'),
    (tenx_with(delete('barcodes')), 'has no barcodes|no 10x'),
    (tenx_with(delete('features')), 'matrix/features cannot be read'),
    (tenx_with(delete('data')), 'matrix cannot be read'),
    (tenx_with(replace('shape', np.array([3, 4]))), 'is .3, 4. with 91 offs'),
    (tenx_with(replace('indptr', np.arange(91))), 'broken offsets'),
    (tenx_with(replace('data', np.ones(7))), '.7,. values in'),
    (tenx_with(wrong_place), 'outside of its shape'),
    (gzipped_h5ad, 'unpack it with gunzip'),
    (tarred, 'tar -xf'),
    (tarred_gz, 'tar -xzf'),
    (zipped, 'unzip'),
    (empty_file, 'an empty file; copy it again'),
    (empty_folder, 'a folder, not an h5ad file'),
    (outs, 'name what is in it: .*outs/f.h5'),
    (cell_ranger, 'in it: .*run/outs/filtered_feature_bc_matrix$'),
    (zarr_without('X/data/c/0', 3), '1 of 1 chunks of X/data are missing'),
    (zarr_without('X/indices/c/0', 3), 'chunks of X/indices are missing'),
    (zarr_without('X/indptr/0', 2), 'chunks of X/indptr are missing'),
    (not_anndata, 'without obs'),
    (flipped_zip, 'X/data/c/0 is damaged|cannot be read'),
  ],
)
def test_faults_are_one_line(tmp_path, vocab, make, match):
  with pytest.raises(errors.UserError, match=match) as error:
    list(sources.cells_of(make(tmp_path), vocab).chunks())
  assert '\n' not in str(error.value)


def _swap(group, key, **fields):
  attributes = dict(group[key].attrs)
  del group[key]
  group.create_dataset(key, **fields)
  group[key].attrs.update(attributes)


@pytest.mark.parametrize('kind', ['h5ad', '10x 3'])
@pytest.mark.parametrize('part', ['names', 'offsets', 'entries'])
def test_arrays_that_were_never_written_fill_no_memory(tmp_path, kind, part):
  path = written(tmp_path, kind)
  with h5py.File(path, 'r+') as file:
    group = file['matrix' if kind == '10x 3' else 'X']
    if part == 'names' and kind == 'h5ad':
      _swap(file, f'obs/{file["obs"].attrs["_index"]}', shape=(10**10,),
            dtype=h5py.string_dtype(), chunks=(1000,))  # fmt: skip
    elif part == 'names':
      _swap(group, 'barcodes', shape=(10**10,), dtype='S16', chunks=(1000,))
    elif part == 'offsets':
      _swap(group, 'indptr', shape=(10**10,), dtype='i8', chunks=(1000,))
    else:
      indptr = group['indptr'][:].astype(np.int64)
      indptr[-1] = 10**12
      _swap(group, 'indptr', data=indptr)
      for name in ('data', 'indices'):
        _swap(group, name, shape=(10**12,), dtype='i4', chunks=(1000,))
  with pytest.raises(errors.UserError, match='damaged') as error:
    opened(path)
  assert str(error.value).startswith(str(path))


def test_a_format_can_be_named(tmp_path, vocab):
  path = written(tmp_path, '10x 3')
  check(opened(path, format='10x').bind(vocab), counts())
  with pytest.raises(errors.UserError, match='a 10x h5 file; read it with'):
    opened(path, format='h5ad')
  with pytest.raises(errors.UserError, match='give one of h5ad, zarr'):
    sources.SourceConfig(path, format='loom')


@pytest.mark.parametrize('module', ['zarr', 'tiledbsoma', 'cellxgene_census'])
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, module):
  path, fields = 'census:2025-01-30', {'species': 'human'}
  if module == 'zarr':
    path = written(tmp_path, 'zarr3')
  if module == 'cellxgene_census':
    pytest.importorskip('tiledbsoma')
  monkeypatch.setitem(__import__('sys').modules, module, None)
  with pytest.raises(errors.UserError, match='pip install') as error:
    opened(path, **fields)
  assert '\n' not in str(error.value)


def test_a_census_is_pinned():
  for path in ('census:stable', 'census:latest', 'census:'):
    with pytest.raises(errors.UserError, match='census:2025-01-30'):
      opened(path, species='human')


def test_selected_rows_and_columns():
  matrix = counts(200)
  rng = np.random.default_rng(0)
  for rows in (None, np.arange(50, 70), np.flatnonzero(rng.random(200) < 0.1)):
    for columns in (None, np.array([0, 7, 59])):
      part = matrices.Selected(matrices.wrapped(matrix), rows, columns)
      expected = matrix if rows is None else matrix[rows]
      expected = expected if columns is None else expected[:, columns]
      assert part.shape == expected.shape
      found = [
        part.read(a, min(a + 7, part.shape[0]))
        for a in range(0, part.shape[0], 7)
      ]
      np.testing.assert_array_equal(
        scipy.sparse.vstack(found).toarray(), expected.toarray()
      )


@pytest.mark.parametrize('place', [16, 400, 2000])
def test_texts_without_an_end_are_refused(tmp_path, place):
  """Zeros in a heap of texts: libhdf5 would read them for ever."""
  path = tmp_path / 'cells.h5ad'
  adata_of().write_h5ad(path)
  data = bytearray(path.read_bytes())
  at = data.index(b'GCOL')
  data[at + place : at + place + 64] = bytes(64)
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match='damaged HDF5|cannot be read'):
    opened(path)


def test_a_corpus_is_the_same_from_every_format(tmp_path):
  config = pipeline.PrepareConfig(
    vocabulary='measured',
    validation_share=0.0,
    filters=quality.QualityConfig.off(),
  )
  found = set()
  for kind in ('h5ad', 'zarr2', '10x 3', 'mtx.gz'):
    path = written(tmp_path, kind)
    source = sources.open_source(
      sources.SourceConfig(path, name='cells', assay='umi')
    )
    corpus = pipeline.prepare([source], tmp_path / kind, config)
    folder = tmp_path / kind / 'train' / 'human'
    files = sorted(f for f in folder.rglob('*') if f.is_file())
    found.add(tuple((f.name, f.read_bytes()) for f in files))
    held = anndatas.held_out_cells(corpus, path, split='train', max_cells=9)
    rows = np.arange(9) * CELLS // 9
    np.testing.assert_array_equal(held.X.toarray(), counts()[rows].toarray())
  assert len(found) == 1


def test_texts_of_no_known_kind_are_refused(tmp_path):
  """Their value is never asked for: libhdf5 dies of it."""
  path = tmp_path / 'c.h5ad'
  adata_of(counts(6)).write_h5ad(path)
  data = bytearray(path.read_bytes())
  # Class 9, version 1, a text of variable length in UTF-8; of all of them.
  kind, other = b'\x19\x01\x01\x00', b'\x19\x25\x01\x00'
  assert data.count(kind) > 4
  path.write_bytes(data.replace(kind, other))
  with pytest.raises(errors.UserError, match='of a type that there is not'):
    sources.open_source(sources.SourceConfig(path=str(path)))
