"""Cells in the released layout of GeneCompass: tokens, values, orthologues."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse

from experiments.benchmarks import formats
from genecompass_jax import (
  encoding,
  errors,
  gene_table,
  medians as medians_lib,
  vocabulary,
)
from genecompass_jax.prepare import sources
from genecompass_jax.prepare.readers import dictionaries
from tests.test_prepare_sources import check, counts, gather, human_ids

TABLE = gene_table.GeneTable.default()
VOCAB = vocabulary.Vocabulary.default()
CELLS, GENES = 90, 60


def pairs(num):
  """Genes of both species that are one-to-one orthologues."""
  human, mouse = [], []
  by_group = {}
  for g, group in enumerate(TABLE.orthologue_groups):
    if group and not group.startswith(gene_table.MANY_PREFIX):
      by_group.setdefault(group, []).append(g)
  for genes in by_group.values():
    if TABLE.species_G[genes].tolist() == [0, 1] and len(human) < num:
      human.append(TABLE.gene_ids[genes[0]])
      mouse.append(TABLE.gene_ids[genes[1]])
  return human, mouse


def alone(species, num):
  """Genes of a species without any orthologue."""
  rows = [
    g
    for g in np.flatnonzero(TABLE.species_G == species)
    if not TABLE.orthologue_groups[g]
  ]
  return [TABLE.gene_ids[g] for g in rows[:num]]


def dictionary(*ids):
  genes = [gene for part in ids for gene in part]
  return {'<pad>': 0, '<mask>': 1} | {g: 2 + k for k, g in enumerate(genes)}


def medians_of(ids, seed=0):
  rng = np.random.default_rng(seed)
  # as medians of counts are: whole and half numbers
  return {i: float(m) for i, m in zip(ids, rng.integers(2, 12, len(ids)) / 2)}


def write(tmp_path, matrix=None, ids=None, species=0, **kwargs):
  """A released data set with its dictionary and medians."""
  matrix = counts() if matrix is None else matrix
  ids = human_ids() if ids is None else ids
  tokens, table = dictionary(ids), medians_of(ids)
  columns = formats.ranked_cells(
    matrix,
    np.array([tokens[i] for i in ids]),
    np.array([table[i] for i in ids]),
    species,
  )
  formats.write_arrow(columns, str(tmp_path / 'set'), rows_each=20, **kwargs)
  (tmp_path / 'tokens.json').write_text(json.dumps(tokens))
  (tmp_path / 'medians.json').write_text(json.dumps(table))
  return sources.SourceConfig(
    str(tmp_path / 'set'),
    tokens=str(tmp_path / 'tokens.json'),
    medians=str(tmp_path / 'medians.json'),
  )


@pytest.mark.parametrize('parquet', [False, True])
def test_counts_come_back_exactly(tmp_path, parquet):
  source = sources.open_source(write(tmp_path, parquet=parquet))
  assert not source.is_float and not source.is_divided
  assert 'asserted to be whole' in source.layer_reason
  assert '0 of 90 cells have 2048 genes or more' in source.layer_reason
  check(source.bind(VOCAB), counts())
  stream = source.bind(VOCAB)
  for first, stop in ((44, 47), (0, 1), (89, 90), (15, 70)):
    (chunk,) = stream.read(first, stop)
    np.testing.assert_array_equal(
      chunk.cells.totals_C, counts().toarray()[first:stop].sum(axis=1)
    )


def test_large_counts_come_back_or_are_refused(tmp_path):
  matrix = counts().tolil()
  matrix[3, 4] = 65_537
  matrix[5, 6] = 200_003
  matrix = matrix.tocsr()
  check(sources.open_source(write(tmp_path, matrix)).bind(VOCAB), matrix)
  matrix[7, 8] = 3_000_001
  with pytest.raises(errors.UserError, match='row 7: .* too many to come back'):
    list(sources.open_source(write(tmp_path, matrix)).bind(VOCAB).chunks())


def test_wrong_medians_are_refused(tmp_path):
  config = write(tmp_path)
  wrong = medians_of(human_ids(), seed=1)
  (tmp_path / 'medians.json').write_text(json.dumps(wrong))
  with pytest.raises(errors.UserError, match='these are not the medians'):
    sources.open_source(config)
  right = medians_of(human_ids())
  right[human_ids()[0]] *= 1.01  # one of them only
  (tmp_path / 'medians.json').write_text(json.dumps(right))
  with pytest.raises(errors.UserError, match='these are not the medians'):
    list(sources.open_source(config).bind(VOCAB).chunks())


def test_quotients_keep_the_released_order(tmp_path):
  """Without medians: quotients, and with medians of 1 the same ranking."""
  config = dataclasses.replace(write(tmp_path), medians='')
  source = sources.open_source(config)
  assert source.is_float and source.is_divided
  assert 'no medians were given' in source.layer_reason
  stream = source.bind(VOCAB)
  table = np.array([medians_of(human_ids())[i] for i in human_ids()])
  found, _ = gather(stream)
  np.testing.assert_allclose(
    found[human_ids()], counts().toarray() / table, rtol=1e-5
  )
  shape = 2, VOCAB.size
  ones = medians_lib.Medians(
    encoding.RELEASED,
    np.full(shape, np.nan),
    np.zeros(shape, np.int64),
    VOCAB.is_shared_V(),
  )
  encoder = encoding.CellEncoder(
    encoding.EncodingConfig(max_genes=2048), stream.tokens(0), ones.divisor_V(0)
  )
  (chunk,) = stream.chunks()
  encoded = encoder.encode(chunk.cells)
  gene_of = {t: i for i, t in dictionary(human_ids()).items()}
  with pa.memory_map(str(tmp_path / 'set' / 'data-00000-of-00002.arrow')) as f:
    released = pa.ipc.open_stream(f).read_all()
  for cell in range(len(released)):
    part = slice(*encoded.starts_C1[cell : cell + 2])
    num = released['length'][cell][0].as_py()
    values = np.array(released['values'][cell].as_py()[:num])
    np.testing.assert_allclose(encoded.values_N[part], values, rtol=1e-5)
    ids = [gene_of[t] for t in released['input_ids'][cell].as_py()[:num]]
    same = np.array(VOCAB.tokens(ids)) == encoded.gene_ids_N[part]
    tied = np.isclose(values[:-1], values[1:])
    assert (same | np.append(tied, False) | np.insert(tied, 0, False)).all()


def test_mouse_cells_get_their_own_genes_back(tmp_path):
  human, mouse = pairs(30)
  own, other = alone(1, 20), alone(0, 10)
  tokens = dictionary(human, other, mouse, own)
  matrix = counts(CELLS, 60, seed=3)
  # as released: orthologues under human tokens, a few without a partner
  written = [*human, *other, *own]
  columns = formats.ranked_cells(
    matrix, np.array([tokens[i] for i in written]), np.ones(60), 1
  )
  formats.write_arrow(columns, str(tmp_path / 'set'))
  with open(tmp_path / 'tokens.pickle', 'wb') as file:
    pickle.dump(tokens, file, protocol=4)
  table = '\n'.join(f'{g}\t1.0' for g in tokens if g[0] != '<')
  (tmp_path / 'medians.tsv').write_text(f'gene_id\tmedian\n{table}\n')
  source = sources.open_source(
    sources.SourceConfig(
      str(tmp_path / 'set'),
      tokens=str(tmp_path / 'tokens.pickle'),
      medians=str(tmp_path / 'medians.tsv'),
    )
  )
  assert set(source.species_C) == {1}
  stream = source.bind(VOCAB)
  found, totals = gather(stream)
  dense = matrix.toarray()
  np.testing.assert_array_equal(found[mouse].to_numpy(), dense[:, :30])
  np.testing.assert_array_equal(found[own].to_numpy(), dense[:, 40:])
  assert found.to_numpy().sum() == dense[:, :30].sum() + dense[:, 40:].sum()
  np.testing.assert_array_equal(totals, dense.sum(axis=1))
  report = stream.report()['mouse']
  assert report['share_umis_lost'] == pytest.approx(
    dense[:, 30:40].sum() / dense.sum()
  )
  assert 'one-to-one' in source.identifier_reason


def test_both_species_in_one_set(tmp_path):
  human, mouse = pairs(30)
  tokens = dictionary(human, mouse)
  first, second = counts(40, 30), counts(50, 30, seed=5)
  parts = [
    formats.ranked_cells(
      m, np.array([tokens[i] for i in human]), np.ones(30), s
    )
    for s, m in enumerate((first, second))
  ]
  columns = {name: parts[0][name] + parts[1][name] for name in parts[0]}
  columns['tissue'] = ['lung'] * 40 + ['brain'] * 50
  formats.write_arrow(columns, str(tmp_path / 'set'))
  (tmp_path / 'tokens.tsv').write_text(
    ''.join(f'{g}\t{t}\n' for g, t in tokens.items())
  )
  config = sources.SourceConfig(
    str(tmp_path / 'set'), tokens=str(tmp_path / 'tokens.tsv')
  )
  source = sources.open_source(config)
  assert source.codes('tissue')[1] == ['brain', 'lung']
  chunks = list(source.bind(VOCAB).chunks())
  assert [(c.species, len(c.index_C)) for c in chunks] == [(0, 40), (1, 50)]
  rows = VOCAB.gene_rows(1)
  names = {VOCAB.genes.gene_ids[rows[r]] for r in chunks[1].cells.gene_rows_N}
  assert names <= set(mouse)
  with pytest.raises(errors.UserError, match='says otherwise of 50 cells'):
    sources.open_source(dataclasses.replace(config, species='human'))


def columns_of(change):
  def make(tmp_path):
    config = write(tmp_path)
    ids, table = human_ids(), medians_of(human_ids())
    tokens = dictionary(ids)
    columns = formats.ranked_cells(
      counts(),
      np.array([tokens[i] for i in ids]),
      np.array([table[i] for i in ids]),
      0,
    )
    change(columns)
    formats.write_arrow(columns, str(tmp_path / 'set'))
    return config

  return make


def set_to(name, cell, place, value):
  def change(columns):
    columns[name][cell][place] = value

  return change


def cut(where):
  def make(tmp_path):
    config = write(tmp_path)
    path = tmp_path / 'set' / 'data-00001-of-00002.arrow'
    path.write_bytes(path.read_bytes()[:where])
    return config

  return make


def without(name):
  def make(tmp_path):
    config = write(tmp_path)
    (tmp_path / 'set' / name).unlink()
    return config

  return make


def fields(**kwargs):
  def make(tmp_path):
    return dataclasses.replace(write(tmp_path), **kwargs)

  return make


def tokens_as(name, text):
  def make(tmp_path):
    config = write(tmp_path)
    (tmp_path / name).write_text(text)
    return dataclasses.replace(config, tokens=str(tmp_path / name))

  return make


def dataset_dict(tmp_path):
  config = write(tmp_path)
  (tmp_path / 'dict').mkdir()
  (tmp_path / 'dict' / 'train').mkdir()
  (tmp_path / 'dict' / 'dataset_dict.json').write_text('{"splits": ["train"]}')
  return dataclasses.replace(config, path=str(tmp_path / 'dict'))


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (cut(-8), 'cut short'),
    (cut(-9000), 'cut short'),
    (cut(0), 'cut short'),
    (without('data-00001-of-00002.arrow'), 'data-00001.* is missing'),
    (columns_of(set_to('input_ids', 8, 0, 9999)), 'row 8 holds token 9999'),
    (columns_of(set_to('input_ids', 8, 0, 1)), 'row 8 holds token 1,'),
    (columns_of(set_to('input_ids', 8, 0, -5)), 'row 8 holds token -5'),
    (columns_of(set_to('input_ids', 8, 0, 0)), 'row 8 has .* genes and says'),
    (columns_of(set_to('length', 8, 0, 3)), 'row 8 has .* genes and says 3'),
    (columns_of(set_to('values', 8, 0, np.nan)), 'a value that no count has'),
    (columns_of(set_to('values', 8, 0, -1)), 'a value that no count has'),
    (columns_of(set_to('values', 8, 0, 3.3)), 'row 8: ENSG.* not the medians'),
    (columns_of(set_to('species', 8, 0, 2)), 'other things than 0 and 1'),
    (fields(tokens=''), '--tokens FILE'),
    (fields(tokens='none.json'), 'none.json: no such file'),
    (fields(medians='none.json'), 'none.json: no such file'),
    (tokens_as('t.json', '{"ENSG00000000003": 2'), 'no json'),
    (tokens_as('t.json', '[1, 2]'), 'an object of genes'),
    (tokens_as('t.json', '{"a": 2, "a": 3}'), "'a' stands there twice"),
    (tokens_as('t.json', '{"a": 2, "b": 2}'), 'a token stands for two genes'),
    (tokens_as('t.json', '{"a": 2.5}'), 'no whole number'),
    (tokens_as('t.json', '{"a": 0}'), 'token 0 is the padding'),
    (tokens_as('t.tsv', 'a\tb\tc\n1\t2\t3\n'), '3 columns, none named token'),
    (tokens_as('t.tsv', ''), 'no table'),
    (tokens_as('t.csv', 'a,x\nb,y\n'), "with 'y', no number"),
    (tokens_as('t.pickle', 'cos\nsystem\n(S"x"\ntR.'), 'pickle'),
    (dataset_dict, 'name one of its folders: train'),
  ],
)
def test_faults_are_one_line(tmp_path, make, match):
  config = make(tmp_path)
  with pytest.raises(errors.UserError, match=match) as error:
    list(sources.open_source(config).bind(VOCAB).chunks())
  assert '\n' not in str(error.value)


def test_what_datasets_writes(tmp_path):
  pytest.importorskip('datasets')
  config = write(tmp_path)
  ids, table = human_ids(), medians_of(human_ids())
  tokens = dictionary(ids)
  columns = formats.ranked_cells(
    counts(),
    np.array([tokens[i] for i in ids]),
    np.array([table[i] for i in ids]),
    0,
  )
  formats.save_to_disk(columns, str(tmp_path / 'official'))
  config = dataclasses.replace(config, path=str(tmp_path / 'official'))
  check(sources.open_source(config).bind(VOCAB), counts())


def test_cells_of_no_gene(tmp_path):
  empty = scipy.sparse.csr_matrix((2, GENES))
  matrix = scipy.sparse.vstack([counts(10), empty, counts(3)], 'csr')
  check(sources.open_source(write(tmp_path, matrix)).bind(VOCAB), matrix)


@pytest.mark.parametrize(
  ('name', 'data'),
  [
    ('t.json', b'{"TP53": 1' + b'0' * 400 + b'}'),
    ('t.json', b'[' * 200_000),
    ('t.json', b'{"a":' * 900 + b'1' + b'}' * 900),
    ('t.pickle', pickle.dumps({'TP53': 10**400})),
    ('t.pickle', pickle.dumps({10**6000: 1})),
    ('t.tsv', b'a\t1\n' + b'"' + b'x' * 200_000 + b'"\t2\n'),
  ],
)
def test_broken_dictionaries_are_one_line(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(errors.UserError) as error:
    dictionaries.load(str(path), ('token',))
  assert '\n' not in str(error.value) and str(path) in str(error.value)
  assert len(str(error.value)) < 500


def test_a_dictionary_with_a_byte_order_mark(tmp_path):
  path = tmp_path / 't.json'
  path.write_bytes(b'\xef\xbb\xbf{"TP53": 1}')
  assert dictionaries.load(str(path), ('token',)) == {'TP53': 1}
