"""Tokens: shared by orthologues, in either layout, and kept on disk."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from genecompass_jax import errors, gene_table, vocabulary

# Three human and four mouse genes: A-x one-to-one, B-{y, z} one-to-many.
TABLE = gene_table.GeneTable(
  gene_ids=('A', 'B', 'C', 'x', 'y', 'w', 'z'),
  symbols=('a', 'b', 'c', 'X', 'Y', 'W', 'Z'),
  aliases=((),) * 7,
  entrez=('',) * 7,
  species_G=np.array([0, 0, 0, 1, 1, 1, 1]),
  biotypes=('',) * 7,
  orthologue_groups=('1', 'many2', '', '1', 'many2', '', 'many2'),
)


def build(orthologues, layout):
  return vocabulary.Vocabulary.from_genes(TABLE, orthologues, layout)


@pytest.mark.parametrize(
  ('orthologues', 'layout', 'tokens', 'size'),
  [
    ('one2one', 'compact', [2, 3, 4, 2, 5, 6, 7], 8),
    ('one2one', 'released', [2, 3, 4, 2, 6, 7, 8], 9),
    ('released', 'compact', [2, 3, 4, 2, 3, 5, 3], 6),
    ('released', 'released', [2, 3, 4, 2, 3, 7, 3], 9),
    ('none', 'compact', [2, 3, 4, 5, 6, 7, 8], 9),
    ('none', 'released', [2, 3, 4, 5, 6, 7, 8], 9),
  ],
)
def test_numbering(tmp_path, orthologues, layout, tokens, size):
  vocab = build(orthologues, layout)
  assert vocab.token_G.tolist() == tokens
  assert vocab.size == size
  assert vocab.tokens(['z', 'nothing', 'A']).tolist() == [tokens[6], -1, 2]
  assert vocab.tokens([]).tolist() == []
  vocab.save(tmp_path / 'v.tsv.gz')
  loaded = vocabulary.Vocabulary.load(tmp_path / 'v.tsv.gz')
  assert loaded.sha256 == vocab.sha256
  assert loaded.genes.columns() == vocab.genes.columns()
  assert loaded.token_gene_ids() == vocab.token_gene_ids()
  assert (loaded.layout, loaded.orthologues) == (layout, orthologues)


def test_names_priors_and_species():
  vocab = build('released', 'released')
  names = ('<pad>', '<mask>', *TABLE.gene_ids)
  assert vocab.token_gene_ids() == names
  assert vocab.token_symbols()[2:] == TABLE.symbols
  # Shared tokens take the mouse gene's prior in mouse cells, the last of
  # several; all other tokens their own.
  human, mouse = vocab.prior_rows_SV()
  assert human.tolist() == [-1, -1, 0, 1, 2, 3, 4, 5, 6]
  assert mouse.tolist() == [-1, -1, 3, 6, 2, 3, 4, 5, 6]
  assert vocab.species_tokens(0).tolist() == [2, 3, 4]
  assert vocab.species_tokens(1).tolist() == [2, 3, 7]
  compact = build('one2one', 'compact')
  assert compact.token_gene_ids()[2:] == ('A', 'B', 'C', 'y', 'w', 'z')
  assert compact.prior_rows_SV()[1].tolist() == [-1, -1, 3, 1, 2, 4, 5, 6]


@pytest.mark.parametrize('layout', vocabulary.LAYOUTS)
@pytest.mark.parametrize('orthologues', vocabulary.ORTHOLOGUES)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(kept=st.sets(st.sampled_from(TABLE.gene_ids)))
def test_restrict_keeps_what_shares_a_token(layout, orthologues, kept):
  vocab = build(orthologues, layout)
  small = vocab.restrict(sorted(kept))
  shared = np.isin(vocab.token_G, vocab.tokens(sorted(kept)))
  expected = {TABLE.gene_ids[g] for g in np.flatnonzero(shared)}
  assert set(small.genes.gene_ids) == expected >= kept
  # Two genes share a token afterwards if and only if they did before.
  ids = small.genes.gene_ids
  before, after = vocab.tokens(ids), small.tokens(ids)
  assert np.array_equal(before[:, None] == before, after[:, None] == after)
  rows = len(ids) if layout == 'released' else len(set(after.tolist()))
  assert small.size == vocabulary.NUM_SPECIAL + rows
  assert small.restrict(ids).sha256 == small.sha256


def test_restrict_refuses_unknown_genes():
  with pytest.raises(errors.UserError, match="'Q' is not in the vocabulary"):
    build('one2one', 'compact').restrict(['A', 'Q'])


def test_released_layout_has_50558_tokens(tmp_path):
  """The original's sizes: 23,113 + 27,443 genes, 17,465 shared, many-to-one."""
  human = [f'ENSG{i:011}' for i in range(23_113)]
  mouse = [f'ENSMUSG{i:011}' for i in range(27_443)]
  rng = np.random.default_rng(0)
  sharing = rng.permutation(27_443)[:17_465]
  mapped = {mouse[m]: human[rng.integers(15_000)] for m in sharing}
  vocab = vocabulary.Vocabulary.from_lists(human, mouse, mapped)
  assert vocab.size == 50_558
  assert vocab.token_gene_ids() == ('<pad>', '<mask>', *human, *mouse)
  assert vocab.tokens(human).tolist() == list(range(2, 23_115))
  own = dict(zip(mouse, range(23_115, 50_558)))
  at_human = dict(zip(human, range(2, 23_115)))
  expected = [at_human[mapped[m]] if m in mapped else own[m] for m in mouse]
  assert vocab.tokens(mouse).tolist() == expected
  priors = vocab.prior_rows_SV()
  assert np.array_equal(priors[0, 2:], np.arange(50_556))
  last = {mapped[m]: 23_113 + i for i, m in enumerate(mouse) if m in mapped}
  shift = [last.get(name, i) for i, name in enumerate((*human, *mouse))]
  assert priors[1, 2:].tolist() == shift
  vocab.save(tmp_path / 'v.tsv.gz')
  loaded = vocabulary.Vocabulary.load(tmp_path / 'v.tsv.gz')
  assert loaded.sha256 == vocab.sha256
  assert np.array_equal(loaded.prior_rows_SV(), priors)


def test_lists_keep_their_order_and_gain_symbols():
  human = ['ENSG00000181449', 'ENSG00000141510']
  mouse = ['ENSMUSG00000059552']
  vocab = vocabulary.Vocabulary.from_lists(human, mouse, {mouse[0]: human[1]})
  assert vocab.token_symbols()[2:] == ('SOX2', 'TP53', 'Trp53')
  assert vocab.token_G.tolist() == [2, 3, 3]
  with pytest.raises(errors.UserError, match='not in the lists'):
    vocabulary.Vocabulary.from_lists(human, mouse, {'ENSMUSG1': human[0]})
  with pytest.raises(errors.UserError, match='twice'):
    vocabulary.Vocabulary.from_lists(human + human, mouse, {})


def test_default():
  vocab = vocabulary.Vocabulary.default()
  assert vocab is vocabulary.Vocabulary.default()
  one2one = int(vocab.genes.header['one2one orthologues'])
  assert vocab.size == len(vocab.genes) - one2one + vocabulary.NUM_SPECIAL
  shared = np.intersect1d(vocab.species_tokens(0), vocab.species_tokens(1))
  assert len(shared) == one2one
  every = np.union1d(vocab.species_tokens(0), vocab.species_tokens(1))
  assert np.array_equal(every, np.arange(2, vocab.size))
  many = vocabulary.Vocabulary.from_genes(vocab.genes, 'released')
  assert many.size < vocab.size
  assert many.sha256 != vocab.sha256


def test_a_better_symbol_is_not_another_vocabulary():
  other = dataclasses.replace(TABLE, symbols=('n',) * 7)
  assert (
    vocabulary.Vocabulary.from_genes(other).sha256
    == vocabulary.Vocabulary.from_genes(TABLE).sha256
  )


def test_damage_and_other_kinds_are_one_line(tmp_path):
  path = tmp_path / 'v.tsv'
  build('one2one', 'compact').save(path)
  text = path.read_text()
  path.write_text(text.replace('layout: compact', 'layout: released'))
  with pytest.raises(errors.UserError, match='damaged'):
    vocabulary.Vocabulary.load(path)
  path.write_text(text[:-10])
  with pytest.raises(errors.UserError, match='damaged'):
    vocabulary.Vocabulary.load(path)
  TABLE.save(path)
  with pytest.raises(errors.UserError, match='not a vocabulary'):
    vocabulary.Vocabulary.load(path)


@pytest.mark.parametrize('name', ['layout', 'orthologues'])
def test_choices_are_checked(name):
  with pytest.raises(ValueError, match=name):
    vocabulary.Vocabulary.from_genes(TABLE, **{name: 'other'})


def three_species() -> gene_table.GeneTable:
  """Human A-D, mouse a-d, rat p-u.

  A-a-p one-to-one in all three; B-b pairs, with two rat genes q and r; C has
  two mice c and d and pairs with rat s; no human gene has the pair e-t; D and
  u are alone.
  """
  rows = (
    *(('A', 0, '1'), ('B', 0, '2'), ('C', 0, '3'), ('D', 0, '')),
    *(('a', 1, '1'), ('b', 1, '2'), ('c', 1, 'many3'), ('d', 1, 'many3')),
    *(('e', 1, '4'), ('p', 2, '1'), ('q', 2, 'many2'), ('r', 2, 'many2')),
    *(('s', 2, '3'), ('t', 2, '4'), ('u', 2, '')),
  )
  ids, codes, groups = zip(*rows)
  return gene_table.GeneTable(
    gene_ids=ids,
    symbols=tuple(f'{i}_' for i in ids),
    aliases=((),) * len(ids),
    entrez=('',) * len(ids),
    species_G=np.array(codes),
    biotypes=('',) * len(ids),
    orthologue_groups=groups,
    species=('human', 'mouse', 'rat'),
  )


def test_three_species_share_tokens(tmp_path):
  table = three_species()
  vocab = vocabulary.Vocabulary.from_genes(table)
  token = dict(zip(table.gene_ids, vocab.token_G.tolist()))
  assert token['A'] == token['a'] == token['p']
  assert token['B'] == token['b']
  assert token['C'] == token['s']
  assert token['e'] == token['t']
  assert len(set(token.values())) == len(table) - 5 == vocab.size - 2
  assert vocab.token_gene_ids()[2:] == (
    *('A', 'B', 'C', 'D', 'c', 'd', 'e', 'q', 'r', 'u'),
  )
  # What a third species adds changes no sharing of the first two.
  two = vocabulary.Vocabulary.from_genes(table.subset(table.species_G < 2))
  assert two.tokens(['a', 'b', 'e']).tolist() == [2, 3, 8]
  many = vocabulary.Vocabulary.from_genes(table, 'released')
  token = dict(zip(table.gene_ids, many.token_G.tolist()))
  assert token['B'] == token['b'] == token['q'] == token['r']
  assert token['C'] == token['c'] == token['d'] == token['s']
  assert vocabulary.Vocabulary.from_genes(table, 'none').size == len(table) + 2

  path = tmp_path / 'v.tsv.gz'
  vocab.save(path)
  loaded = vocabulary.Vocabulary.load(path)
  assert loaded.species == vocab.species == ('human', 'mouse', 'rat')
  assert loaded.sha256 == vocab.sha256
  assert loaded.genes.header == table.header
  small = loaded.restrict(['p', 't'])
  assert small.genes.gene_ids == ('A', 'a', 'e', 'p', 't')
  assert small.species == vocab.species
  other = dataclasses.replace(table, species=('human', 'mouse', 'pig'))
  assert vocabulary.Vocabulary.from_genes(other).sha256 != vocab.sha256


def test_three_species_look_up_their_own_priors():
  table = three_species()
  vocab = vocabulary.Vocabulary.from_genes(table)
  rows_SV = vocab.prior_rows_SV()
  assert rows_SV.shape == (3, vocab.size)
  row = table.row_of
  for name, rows in (
    ('A', [row['A'], row['a'], row['p']]),
    ('C', [row['C'], row['C'], row['s']]),
    ('e', [row['e'], row['e'], row['t']]),
  ):
    assert rows_SV[:, vocab.tokens([name])[0]].tolist() == rows
  shared = vocab.is_shared_V()
  assert shared[vocab.tokens(['A', 'B', 'C', 'e'])].all()
  assert not shared[vocab.tokens(['D', 'c', 'q', 'u'])].any()
  assert vocab.naming_species_V().tolist() == [0] * 6 + [1] * 3 + [2] * 3
  assert (
    vocab.species_tokens(2).tolist()
    == vocab.tokens(['A', 'C', 'e', 'q', 'r', 'u']).tolist()
  )
