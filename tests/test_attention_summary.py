"""Attention averaged over cells, against a plain softmax of each cell."""

import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import errors, model as model_lib
from genecompass_jax.analysis import attention_weights, model_cells
from tests.conftest import tiny_cells

NUM = 24
KINDS = ['x', 'y', 'x', None] * (NUM // 4)


@pytest.fixture(scope='module')
def cells():
  adata = tiny_cells(NUM, seed=5)
  adata.obs['kind'] = KINDS
  return adata


def plain(cells, model, block):
  """(tokens, probs [H, L, L], CLS first) of every cell, in NumPy."""
  (chunk,) = model_cells.encode(model_cells.open_cells(cells, model), model)
  starts = chunk.cells.starts_C1
  ids = np.zeros((NUM, 63), np.int32)
  values = np.zeros((NUM, 63), np.float32)
  for c, (a, b) in enumerate(zip(starts, starts[1:])):
    ids[c, : b - a] = chunk.cells.gene_ids_N[a:b]
    values[c, : b - a] = chunk.cells.values_N[a:b]
  states = model.hidden_states(gc.cell_batch(ids, values), every_layer=True)
  states = np.asarray(states, np.float64)[block - 1]
  first = int(model.config.use_cls)
  return [
    (ids[c, :n], probs_of(states[c, : n + first], model, block))
    for c, n in enumerate(np.diff(starts))
  ]


def probs_of(x, model, block):
  config, encoder = model.config, model.params['encoder']
  if config.norm_order == 'pre':
    assert block == 1  # behind others the last norm is on every layer
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + config.norm_epsilon
    )

  def project(name):
    weights = encoder[name]
    product = np.einsum('LD,DHK->LHK', x, weights['kernel'][block - 1])
    return product + np.asarray(weights['bias'][block - 1])

  scores = np.einsum('LHK,MHK->HLM', project('query'), project('key'))
  weights = np.exp(scores / np.sqrt(config.head_dim))
  return weights / weights.sum(-1, keepdims=True)


def averaged(found, tokens, group):
  """Means over the cells of a group: [H, A, A], [H, A], pairs, cells."""
  A = len(tokens)
  H = found[0][1].shape[0]
  pair, cls = np.zeros((H, A, A)), np.zeros((H, A))
  pairs, number = np.zeros((A, A), int), np.zeros(A, int)
  for kind, (ids, probs) in zip(KINDS, found):
    if kind != group:
      continue
    slot = {token: s + 1 for s, token in enumerate(ids.tolist())}
    for i, a in enumerate(tokens):
      if a in slot:
        cls[:, i] += probs[:, 0, slot[a]]
        number[i] += 1
        for j, b in enumerate(tokens):
          if b in slot:
            pair[:, i, j] += probs[:, slot[a], slot[b]]
            pairs[i, j] += 1
  return pair / pairs, cls / number, pairs, number


@pytest.mark.parametrize('heads', ['mean', 'all', [1]])
def test_it_is_the_mean_of_plain_softmax(cells, model, heads, monkeypatch):
  monkeypatch.setattr(attention_weights, '_QUERIES', 4)
  genes = list(cells.var_names[[1, 4, 9, 30, 50, 70]])
  found = gc.attention_summary(
    cells, model, genes, by='kind', layers=(1, -1), heads=heads, batch_size=5
  )
  assert found.layers == (1, 2)
  assert found.groups == ('x', 'y')
  tokens = found.genes.token_T.tolist()
  assert tokens == sorted(model.vocabulary.tokens(genes).tolist())
  for n, block in enumerate(found.layers):
    probs = plain(cells, model, block)
    for g, group in enumerate(found.groups):
      pair, cls, pairs, number = averaged(probs, tokens, group)
      if heads == 'mean':
        pair, cls = pair.mean(0, keepdims=True), cls.mean(0, keepdims=True)
      elif heads != 'all':
        pair, cls = pair[heads], cls[heads]
      np.testing.assert_array_equal(found.pairs_GAA[g], pairs)
      np.testing.assert_array_equal(found.cells_GA[g], number)
      np.testing.assert_allclose(found.gene_NHGAA[n, :, g], pair, atol=1e-6)
      np.testing.assert_allclose(found.cls_NHGA[n, :, g], cls, atol=1e-6)
      slots = [len(p[0]) + 1 for p, k in zip(probs, KINDS) if k == group]
      assert found.mean_slots_G[g] == pytest.approx(np.mean(slots))
  # Weights of a trained model are not even: the test could fail.
  assert np.nanstd(found.gene_NHGAA) > 1e-4


def test_norms_before_and_no_cls(cells, model):
  for changes in ({'norm_order': 'pre'}, {'use_cls': False}):
    config = model_lib.ModelConfig(**{**model.config.__dict__, **changes})
    params = model_lib.init(config, seed=0)
    params['encoder']['query']['kernel'] *= 30
    other = model.replace(config=config, params=params)
    genes = list(cells.var_names[[1, 4, 9]])
    found = gc.attention_summary(
      cells, other, genes, by='kind', layers=(1,), heads='all'
    )
    probs = plain(cells, other, 1) if config.use_cls else without_cls(
      cells, other
    )  # fmt: skip
    pair, cls, _, _ = averaged(probs, found.genes.token_T.tolist(), 'y')
    np.testing.assert_allclose(found.gene_NHGAA[0, :, 1], pair, atol=1e-6)
    if config.use_cls:
      np.testing.assert_allclose(found.cls_NHGA[0, :, 1], cls, atol=1e-6)
    else:
      assert found.cls_NHGA is None
      assert 'CLS' not in set(found.table()['from'])


def without_cls(cells, model):
  """As `plain`, whose states have no CLS; a row of zeros stands for it."""
  found = []
  for ids, probs in plain(cells, model, 1):
    assert probs.shape[1] == len(ids)
    found.append((ids, np.pad(probs, ((0, 0), (1, 0), (1, 0)))))
  return found


def test_a_tidy_table(cells, model):
  genes = list(cells.var_names[[1, 4]])
  found = gc.attention_summary(cells, model, genes)
  table = found.table()
  assert list(table.columns) == [
    *('layer', 'head', 'group', 'from', 'to', 'weight', 'n_cells')
  ]
  assert set(table['group']) == {'all'}
  assert '2 genes' in repr(found) and len(repr(found)) < 200
  assert set(table['from']) == {'CLS', *found.genes.symbols}
  row = table[(table['from'] == 'CLS')].iloc[0]
  assert row['weight'] == found.cls_NHGA[0, 0, 0, 0]
  assert row['n_cells'] == found.cells_GA[0, 0]
  assert found.uns['checkpoint'] == model.sha256


def test_mistakes_are_one_line(cells, model):
  gene = cells.var_names[1]
  for arguments, message in (
    (([],), 'give a list of genes'),
    ((gene,), 'give a list of genes'),
    ((['NONE1'],), "gene 'NONE1' is not known"),
    (([gene], 'none'), "no obs column 'none'"),
  ):
    with pytest.raises(errors.UserError, match=message):
      gc.attention_summary(cells, model, *arguments)
  for options, message in (
    ({'layers': (3,)}, 'block 3: this model has 2'),
    ({'layers': ()}, 'of layers'),
    ({'heads': [2]}, 'this model has 0 to 1'),
    ({'heads': 'max'}, "give 'mean', 'all' or numbers"),
    ({'heads': (0.5,)}, 'head=0.5 must be a whole number'),
    ({'heads': (True,)}, 'head=True must be a whole number'),
    ({'layers': ('a',)}, "block='a' must be a whole number"),
    ({'batch_size': 1.5}, 'batch_size=1.5 must be a whole number'),
    ({'memory_gib': 1e-9}, 'name fewer genes'),
    ({'memory_gib': np.nan}, 'name fewer genes'),
  ):
    with pytest.raises(errors.UserError, match=message):
      gc.attention_summary(cells, model, [gene], **options)
