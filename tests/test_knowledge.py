import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from genecompass_jax import errors, knowledge, vocabulary

# human A, B; mouse a (orthologue of A), c
LISTS = (('ENSG01', 'ENSG02'), ('ENSMUSG01', 'ENSMUSG03'))


@pytest.fixture(scope='module')
def vocab():
  return vocabulary.Vocabulary.from_lists(*LISTS, {'ENSMUSG01': 'ENSG01'})


def vectors(*rows):
  return np.array(rows, np.float32)


def test_a_shared_token_reads_the_gene_of_its_species(vocab):
  aligned = knowledge.align(
    vocab,
    {'p': (('ENSMUSG01', 'ENSG01', 'ELSE'), vectors([1, 2], [3, 4], [9, 9]))},
  )
  (token,) = vocab.tokens(['ENSG01'])
  assert token in vocab.species_tokens(1)
  table = aligned.tables['p']
  np.testing.assert_array_equal(table[aligned.row_SV[0, token]], [3, 4])
  np.testing.assert_array_equal(table[aligned.row_SV[1, token]], [1, 2])
  assert aligned.widths == (('p', 2),)
  assert knowledge.coverage(aligned) == {'p': 0.5}


def test_genes_without_a_vector_are_marked_and_special_tokens_are_not(vocab):
  aligned = knowledge.align(vocab, {'p': (('ENSG02',), vectors([5.0]))})
  (known,) = vocab.tokens(['ENSG02'])
  for species in range(2):
    for token in vocab.species_tokens(species):
      row = aligned.row_SV[species, token]
      assert row >= vocabulary.NUM_SPECIAL
      assert aligned.has_vector['p'][row] == (token == known)
      assert aligned.tables['p'][row] == (5.0 if token == known else 0.0)
    for token in (vocabulary.PAD, vocabulary.MASK):
      row = aligned.row_SV[species, token]
      assert row == token
      assert aligned.has_vector['p'][row]
      assert aligned.tables['p'][row] == 0.0


@pytest.mark.parametrize(
  'genes, table, message',
  [
    (('ENSG01',), vectors([np.nan]), 'not finite'),
    (('ENSG01', 'ENSG01'), vectors([1], [2]), 'names a gene twice'),
    (('ENSG01', 'ENSG02'), vectors([1]), '2 gene ids for vectors'),
    (('ENSG01',), np.float32([1]), '1 gene ids for vectors'),
  ],
)
def test_tables_that_cannot_be_right_are_refused(vocab, genes, table, message):
  with pytest.raises(errors.UserError, match=f"prior 'p'.*{message}"):
    knowledge.align(vocab, {'p': (genes, table)})


def write(path, **columns):
  pyarrow.parquet.write_table(pyarrow.table(columns), path)
  return path


def test_a_table_is_read_from_parquet(tmp_path):
  path = write(
    tmp_path / 'p.parquet', gene_id=['x', 'y'], vector=[[1.0, 2.0], [3.0, 4.0]]
  )
  genes, table = knowledge.read_table(path)
  assert genes == ('x', 'y')
  assert table.dtype == np.float32
  np.testing.assert_array_equal(table, [[1, 2], [3, 4]])


def test_files_that_are_no_tables_are_one_line(tmp_path):
  text = tmp_path / 'text.parquet'
  text.write_text('gene_id\tvector\n')
  ragged = write(
    tmp_path / 'r.parquet', gene_id=['x', 'y'], vector=[[1.0], [3.0, 4.0]]
  )
  other = write(tmp_path / 'o.parquet', gene=['x'], vector=[[1.0]])
  flat = write(tmp_path / 'f.parquet', gene_id=['x'], vector=[1.0])
  empty = write(
    tmp_path / 'e.parquet',
    gene_id=pyarrow.array([], pyarrow.string()),
    vector=pyarrow.array([], pyarrow.list_(pyarrow.float32())),
  )
  null = write(tmp_path / 'n.parquet', gene_id=['x'], vector=[[None]])
  for path in (tmp_path / 'none', text, ragged, other, flat, empty):
    with pytest.raises(errors.UserError) as error:
      knowledge.read_table(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
  vocab = vocabulary.Vocabulary.from_lists(('x',), (), {})
  with pytest.raises(errors.UserError, match='not finite'):
    knowledge.align(vocab, {'p': knowledge.read_table(null)})
