"""Contextual gene embeddings: averages by token, however they are computed."""

import os
import subprocess
import sys
import textwrap

import anndata
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import cli, errors
from genecompass_jax.analysis import gene_embeddings, model_cells
from tests.conftest import tiny_cells

NUM = 50
KINDS = ['x', 'y', 'x', 'x', None] * (NUM // 5)


@pytest.fixture(scope='module')
def cells():
  adata = tiny_cells(NUM, seed=11)
  adata.obs['kind'] = KINDS
  return adata


@pytest.fixture(scope='module')
def states(cells, model):
  """(cell, token) -> state, each cell laid out by hand."""
  found = {}
  for chunk in model_cells.encode(model_cells.open_cells(cells, model), model):
    starts = chunk.cells.starts_C1
    ids = np.zeros((len(chunk.index_C), 63), np.int32)
    values = np.zeros((len(chunk.index_C), 63), np.float32)
    for c, (a, b) in enumerate(zip(starts, starts[1:])):
      ids[c, : b - a] = chunk.cells.gene_ids_N[a:b]
      values[c, : b - a] = chunk.cells.values_N[a:b]
    hidden = np.asarray(model.hidden_states(gc.cell_batch(ids, values)))
    for c, cell in enumerate(chunk.index_C):
      for slot in range(starts[c + 1] - starts[c]):
        found[cell, ids[c, slot]] = hidden[c, slot + 1].astype(np.float64)
  return found


def by_hand(states, kinds):
  """(group, token) -> count, mean, variance."""
  rows = {}
  for (cell, token), state in states.items():
    if kinds[cell] is not None:
      rows.setdefault((kinds[cell], token), []).append(state)
  return {
    key: (len(x), np.mean(x, 0), np.var(x, 0, ddof=1) if len(x) > 1 else None)
    for key, x in rows.items()
  }


def check(found, expected, atol=1e-5):
  tokens = found.genes.token_T[found.gene_N]
  keys = [(found.groups[g], t) for g, t in zip(found.group_N, tokens)]
  assert set(keys) == set(expected)
  assert len(keys) == len(set(keys))
  for n, key in enumerate(keys):
    count, mean, variance = expected[key]
    assert found.count_N[n] == count
    np.testing.assert_allclose(found.mean_ND[n], mean, atol=atol)
    if variance is None:
      assert np.isnan(found.variance_ND[n]).all()
    else:
      np.testing.assert_allclose(found.variance_ND[n], variance, atol=atol)


def test_averages_are_of_the_gene_wherever_it_stands(cells, model, states):
  found = gc.gene_embeddings(cells, model, by='kind', batch_size=8)
  kinds = KINDS
  check(found, by_hand(states, kinds))
  assert found.groups == ('x', 'y')
  # A gene has no rank of its own: averages by position would be others.
  places, means = found.of('x')
  assert len(places) == len(means) > 20
  assert found.mean_ND.dtype == found.variance_ND.dtype == np.float32
  with pytest.raises(errors.UserError, match='there are: x, y'):
    found.of('z')


def test_groups_that_do_not_fit_are_made_in_turn(cells, model, states, caplog):
  found = gc.gene_embeddings(
    cells, model, by='cell_type', memory_gib=1.2 * 90 * 32 * 12 / 2**30
  )
  assert 'read 2 times' in caplog.text
  check(found, by_hand(states, cells.obs['cell_type'].tolist()))
  with pytest.raises(errors.UserError, match='name fewer genes'):
    gc.gene_embeddings(cells, model, memory_gib=1e-6)


def test_some_genes_of_all_cells(cells, model, states):
  wanted = [cells.var_names[i] for i in (3, 40)]
  found = gc.gene_embeddings(cells, model, genes=wanted, batch_size=50)
  tokens = set(model.vocabulary.tokens(wanted).tolist())
  everyone = by_hand(states, ['all'] * NUM)
  check(found, {k: v for k, v in everyone.items() if k[1] in tokens})
  assert set(found.table()['gene_id']) <= set(wanted)
  assert 'all cells' in repr(found) and len(repr(found)) < 200
  symbols = found.genes.symbols
  again = gc.gene_embeddings(cells, model, genes=symbols, batch_size=50)
  np.testing.assert_array_equal(again.mean_ND, found.mean_ND)
  with pytest.raises(errors.UserError, match="gene 'NONE1' is not known"):
    gc.gene_embeddings(cells, model, genes=['NONE1'])
  with pytest.raises(errors.UserError, match="no obs column 'none'"):
    gc.gene_embeddings(cells, model, by='none')


def test_mouse_genes_have_mouse_names(model):
  mouse = tiny_cells(20, species=1, seed=2)
  found = gc.gene_embeddings(mouse, model)
  assert set(found.genes.gene_ids) <= set(mouse.var_names)
  assert all(name.startswith('ENSMUSG') for name in found.genes.gene_ids)


def test_small_differences_of_large_states_are_kept():
  """Welford by cells, in float32, against float64."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from genecompass_jax import schemas

  rng = np.random.default_rng(0)
  # Mean 1000, deviation 0.1: squares in float32 would leave nothing.
  x_NBLD = 1000 + 0.1 * rng.standard_normal((300, 8, 2, 4)).astype(np.float32)
  mesh = Mesh(np.array(jax.devices()[:1]), ('data',))
  by_width = NamedSharding(mesh, PartitionSpec(None, 'data'))
  ones = np.ones((8, 2), np.int32)
  batch = schemas.CellBatch(
    ones * np.array([5, 6], np.int32), ones, ones, ones, ones, ones == 0
  )
  sums = {name: jnp.zeros((2, 4)) for name in ('mean', 'lost', 'squares')} | {
    'count': jnp.zeros(2, jnp.int32)
  }
  place_V = np.full(9, -1, np.int32)
  place_V[[5, 6]] = 0, 1

  def states(config, params, batch, knowledge):
    return knowledge

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gene_embeddings.model_lib, 'evaluate', states)
    for x_BLD in x_NBLD:
      sums = gene_embeddings._added(
        *(sums, None, batch, x_BLD, place_V, np.zeros(8, np.int32)),
        *('config', 2, by_width),
      )
  count_T, mean_TD, variance_TD = gene_embeddings._finished(sums, 0, 2)
  exact = x_NBLD.astype(np.float64).reshape(-1, 2, 4)
  assert count_T.tolist() == [2400, 2400]
  np.testing.assert_allclose(mean_TD, exact.mean(0), rtol=1e-7)
  np.testing.assert_allclose(variance_TD, exact.var(0, ddof=1), rtol=1e-4)


DEVICES = textwrap.dedent("""
  import sys
  import jax, numpy as np
  import genecompass_jax as gc

  model, devices = gc.load(sys.argv[1]), jax.devices()
  for number in (1, 3, 8):
    jax.local_devices = lambda: devices[:number]
    found = gc.gene_embeddings(
      sys.argv[2], model, by='kind', batch_size=number
    )
    np.savez(
      f'{sys.argv[3]}/{number}.npz', mean=found.mean_ND, count=found.count_N,
      variance=found.variance_ND,
    )
""")


def test_devices_and_batches_change_nothing(trained, cells, model, tmp_path):
  cells.write_h5ad(tmp_path / 'cells.h5ad')
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8'
  arguments = [str(trained), f'{tmp_path}/cells.h5ad', str(tmp_path)]
  subprocess.run(
    [sys.executable, '-c', DEVICES, *arguments],
    env={**os.environ, 'XLA_FLAGS': flags},
    check=True,
  )
  expected = gc.gene_embeddings(cells, model, by='kind')
  for number in (1, 3, 8):
    found = np.load(tmp_path / f'{number}.npz')
    np.testing.assert_array_equal(found['count'], expected.count_N)
    for name in ('mean', 'variance'):
      np.testing.assert_allclose(
        found[name], getattr(expected, f'{name}_ND'), atol=1e-5
      )


def test_the_command_writes_an_anndata(cells, model, trained, tmp_path, capsys):
  cells.write_h5ad(tmp_path / 'in.h5ad')
  out = tmp_path / 'genes.zarr'
  arguments = [
    *('gene-embeddings', str(tmp_path / 'in.h5ad'), '-o', str(out)),
    *('--checkpoint', str(trained), '--by', 'kind'),
  ]
  assert cli.main(arguments) == 0
  assert f'{out}: ' in capsys.readouterr().out
  expected = gc.gene_embeddings(cells, model, by='kind')
  found = anndata.read_zarr(out)
  np.testing.assert_allclose(found.X, expected.mean_ND, atol=1e-6)
  np.testing.assert_allclose(
    found.layers['variance'], expected.variance_ND, atol=1e-6
  )
  np.testing.assert_array_equal(found.obs['n_cells'], expected.count_N)
  table = expected.table()
  for name in ('group', 'gene_id', 'symbol', 'token'):
    assert list(found.obs[name]) == list(table[name])
  assert found.uns['genecompass']['checkpoint'] == model.sha256
  assert expected.to_anndata().shape == found.shape
  assert sorted(os.listdir(tmp_path)) == ['genes.zarr', 'in.h5ad']
  capsys.readouterr()
  assert cli.main(arguments) == errors.EXIT_USAGE
  assert 'exists' in capsys.readouterr().err
  arguments[3] = str(tmp_path / 'other.zarr')
  assert cli.main([*arguments[:-1], 'none']) == errors.EXIT_USAGE
  assert sorted(os.listdir(tmp_path)) == ['genes.zarr', 'in.h5ad']


def test_a_path_keeps_numbers_on_disk(cells, model, states, tmp_path):
  found = gc.gene_embeddings(
    cells, model, by='kind', path=tmp_path / 'out.zarr'
  )
  assert not isinstance(found.mean_ND, np.ndarray)
  check(found, by_hand(states, KINDS))


def test_what_cannot_be_asked_is_one_line(cells, model, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where a folder 's3:' would be made
  for options, message in (
    ({'path': 's3://bucket/genes.zarr'}, 'local disks only'),
    ({'path': ''}, 'give another name'),
    ({'memory_gib': np.nan}, 'must be positive'),
    ({'genes': 'NOSUCH'}, "gene 'NOSUCH' is not known"),
  ):
    with pytest.raises(errors.UserError, match=message):
      gc.gene_embeddings(cells, model, **options)
  gene = cells.var_names[2]
  found = gc.gene_embeddings(cells, model, genes=gene, memory_gib=np.inf)
  assert found.genes.gene_ids == (gene,)
  assert not os.listdir(tmp_path)
