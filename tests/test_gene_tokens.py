"""Genes by name: one way to tokens, and one set of words where there is none."""

import anndata
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import errors, vocabulary
from genecompass_jax.analysis import gene_tokens, token_table
from genecompass_jax.prepare import sources
from tests.conftest import tiny_cells, tiny_genes

HUMAN, MOUSE = 0, 1


@pytest.fixture(scope='module')
def vocab():
  return vocabulary.Vocabulary.default().restrict(
    [*tiny_genes(HUMAN), *tiny_genes(MOUSE)]
  )


def test_every_identifier_leads_to_the_token(vocab):
  table = gc.GeneTable.default()
  ids = tiny_genes(HUMAN)[:5]
  symbols = [table.symbols[table.row_of[i]] for i in ids]
  tokens = vocab.tokens(ids).tolist()
  for names in (ids, symbols, [s.lower() for s in symbols]):
    assert gene_tokens.tokens_of(names, vocab, HUMAN) == tokens


@pytest.mark.parametrize(
  'name, message',
  [
    ('NOGENE', "'NOGENE' is not known in human; give its Ensembl id"),
    ('GATA1', r"'GATA1' \(ENSG00000102145\) is none that this model knows"),
    ('first', 'was not measured in blood: nothing can be said of it'),
  ],
)
def test_words_where_there_is_no_token(vocab, name, message):
  first = tiny_genes(HUMAN)[0]
  measured_V = np.ones(vocab.size, bool)
  measured_V[vocab.tokens([first])] = False
  with pytest.raises(errors.UserError, match=message):
    gene_tokens.tokens_of(
      [first if name == 'first' else name],
      vocab,
      HUMAN,
      measured_V=measured_V,
      source='blood',
    )


def test_species_that_do_not_have_a_gene_are_left_out(vocab):
  """Of a file of two species: the token by the name in each."""
  human, mouse = (tiny_cells(3, species) for species in (HUMAN, MOUSE))
  mouse.obs_names = [f'm{name}' for name in mouse.obs_names]
  both = anndata.concat([human, mouse], join='outer', fill_value=0)
  both.obs['kind'] = ['human'] * 3 + ['mouse'] * 3
  stream = sources.cells_of(
    both, vocab, sources.SourceConfig(species='obs:kind')
  )
  gene = human.var_names[-1]  # it shares no token
  (token,) = vocab.tokens([gene]).tolist()
  assert gene_tokens.by_species(gene, stream, vocab) == {HUMAN: token}
  assert token_table.TokenTable.of(stream, [gene]).token_T.tolist() == [token]
  with pytest.raises(errors.UserError, match='NOGENE.* not known in human'):
    gene_tokens.by_species('NOGENE', stream, vocab)
  unmeasured = sources.cells_of(human[:, :-1], vocab)
  for ask in (
    lambda: gene_tokens.by_species(gene, unmeasured, vocab),
    lambda: token_table.TokenTable.of(unmeasured, [gene]),
  ):
    with pytest.raises(errors.UserError, match='was not measured in'):
      ask()


def test_a_shared_token_has_the_names_of_all_its_members():
  table = gc.GeneTable.default()
  vocab = vocabulary.Vocabulary.from_genes(table, orthologues='released')
  symbols = gene_tokens.symbols_of(vocab, MOUSE)
  ids = gene_tokens.gene_ids_of(vocab, MOUSE)
  token = next(t for t, name in symbols.items() if '/' in name)
  members = ids[token].split('/')
  assert len(members) == len(symbols[token].split('/')) > 1
  assert set(vocab.tokens(members).tolist()) == {token}
