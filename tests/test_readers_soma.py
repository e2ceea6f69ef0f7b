"""SOMA experiments and censuses, made here as the Census lays them out."""

import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse

from experiments.benchmarks import formats
from genecompass_jax import errors, vocabulary
from genecompass_jax.prepare import sources
from tests.test_prepare_sources import check, counts, human_ids
from tests.test_readers import adata_of, mouse_ids

tiledbsoma = pytest.importorskip('tiledbsoma')

VOCAB = vocabulary.Vocabulary.default()
GENES = 60


def config_of(path, **fields):
  return sources.SourceConfig(str(path), **fields)


def test_a_plain_experiment(tmp_path):
  adata = adata_of(kind=['a', 'b', 'c'] * 30)
  formats.write_soma(adata, str(tmp_path / 'cells.soma'))
  config = config_of(tmp_path / 'cells.soma')
  assert sources.expand(config) == [config]
  source = sources.open_source(config)
  assert source.layer == 'X' and source.species_C.tolist() == [0] * 90
  assert source.cell_names()[:2].tolist() == ['BARCODE0000-1', 'BARCODE0001-1']
  assert source.codes('kind')[1] == ['a', 'b', 'c']
  check(source.bind(VOCAB), counts())
  assert source.sha256 == sources.open_source(config).sha256
  some = dataclasses.replace(config, obs_filter="kind == 'b'")
  part = sources.open_source(some)
  check(part.bind(VOCAB), counts()[1::3])
  with pytest.raises(errors.UserError, match='no cells match'):
    sources.open_source(dataclasses.replace(config, obs_filter="kind == 'z'"))
  with pytest.raises(errors.UserError, match='cannot be read') as error:
    sources.open_source(dataclasses.replace(config, obs_filter='kind = = 1'))
  assert '\n' not in str(error.value)


def test_logarithms_in_an_experiment_are_refused(tmp_path):
  formats.write_soma(adata_of(counts().log1p()), str(tmp_path / 'cells.soma'))
  with pytest.raises(errors.UserError, match='log-transformed'):
    sources.open_source(config_of(tmp_path / 'cells.soma'))


@pytest.fixture(scope='module')
def census(tmp_path_factory):
  """Two human datasets of different genes, and one of mouse."""
  path = str(tmp_path_factory.mktemp('census') / 'soma')
  human = scipy.sparse.vstack([counts(50), counts(40, seed=1)], 'csr').tolil()
  human[:50, 40:] = 0  # dataset a measured 40 genes
  human[50:, :10] = 0  # dataset b the last 50
  human = human.tocsr()
  human.eliminate_zeros()
  mouse = counts(30, seed=2)
  with tiledbsoma.Collection.create(path) as top:
    info = top.add_new_collection('census_info')
    datasets = pd.DataFrame(
      {'soma_joinid': [0, 1, 2], 'dataset_id': ['a', 'b', 'm']}
    )
    table = pa.Table.from_pandas(datasets, preserve_index=False)
    info.add_new_dataframe(
      'datasets', schema=table.schema, domain=[[0, 2]]
    ).write(table)
    data = top.add_new_collection('census_data')
    _experiment(
      data, 'homo_sapiens', human, human_ids(), ['a'] * 50 + ['b'] * 40, {
        0: range(40), 1: range(10, 60),
      },
    )  # fmt: skip
    _experiment(
      data, 'mus_musculus', mouse, mouse_ids(), ['m'] * 30, {2: range(60)}
    )
  return path, human, mouse


def _experiment(data, name, matrix, ids, datasets, present):
  num_cells, num_genes = matrix.shape
  experiment = data.add_new_collection(name, tiledbsoma.Experiment)
  obs = pa.Table.from_pandas(
    pd.DataFrame(
      {
        'soma_joinid': np.arange(num_cells),
        'dataset_id': datasets,
        'is_primary_data': np.arange(num_cells) % 5 != 4,
        'tissue_general': np.where(np.arange(num_cells) % 2, 'lung', 'brain'),
        'donor_id': [f'd{k % 3}' for k in range(num_cells)],
      }
    ),
    preserve_index=False,
  )
  experiment.add_new_dataframe(
    'obs', schema=obs.schema, domain=[[0, num_cells - 1]]
  ).write(obs)
  rna = experiment.add_new_collection('ms').add_new_collection(
    'RNA', tiledbsoma.Measurement
  )
  var = pa.Table.from_pandas(
    pd.DataFrame(
      {
        'soma_joinid': np.arange(num_genes),
        'feature_id': ids,
        'feature_name': [f'name{k}' for k in range(num_genes)],
      }
    ),
    preserve_index=False,
  )
  rna.add_new_dataframe(
    'var', schema=var.schema, domain=[[0, num_genes - 1]]
  ).write(var)
  raw = rna.add_new_collection('X').add_new_sparse_ndarray(
    'raw', type=pa.float32(), shape=matrix.shape
  )
  coo = matrix.astype(np.float32).tocoo()
  raw.write(pa.SparseCOOTensor.from_scipy(coo))
  presence = np.zeros((3, num_genes), np.uint8)
  for dataset, genes in present.items():
    presence[dataset, list(genes)] = 1
  rna.add_new_sparse_ndarray(
    'feature_dataset_presence_matrix', type=pa.uint8(), shape=presence.shape
  ).write(pa.SparseCOOTensor.from_scipy(scipy.sparse.coo_matrix(presence)))


def test_a_census_becomes_its_datasets(census):
  path, human, mouse = census
  parts = sources.expand(config_of(path))
  assert [(p.dataset, p.species) for p in parts] == [
    ('a', 'human'), ('b', 'human'), ('m', 'mouse'),
  ]  # fmt: skip
  primary = np.arange(90) % 5 != 4
  for part, rows, genes in (
    (parts[0], np.flatnonzero(primary[:50]), range(40)),
    (parts[1], 50 + np.flatnonzero(primary[50:]), range(10, 60)),
  ):
    source = sources.open_source(part)
    assert source.layer == 'raw' and source.name == part.dataset
    assert f'{len(genes)} of 60 genes were measured' in source.layer_reason
    stream = source.bind(VOCAB)
    ids = [human_ids()[g] for g in genes]
    check(stream, human[rows][:, list(genes)], ids)
    measured = {
      VOCAB.genes.gene_ids[VOCAB.gene_rows(0)[r]]
      for r in np.flatnonzero(stream.measured(0))
    }
    assert measured == set(ids)
    assert source.codes('donor_id')[1] == ['d0', 'd1', 'd2']
  source = sources.open_source(parts[2])
  check(source.bind(VOCAB), mouse[np.arange(30) % 5 != 4], mouse_ids())
  assert len({sources.open_source(p).sha256 for p in parts}) == 3


def test_a_part_of_a_census(census):
  path, human, _ = census
  config = config_of(
    path, species='human', obs_filter="tissue_general == 'lung'"
  )
  parts = sources.expand(config)
  assert len(parts) == 2
  rows = [r for r in range(50) if r % 5 != 4 and r % 2]
  source = sources.open_source(parts[0])
  check(source.bind(VOCAB), human[rows][:, :40], human_ids(40))
  with pytest.raises(errors.UserError, match='cells of 2 datasets.*dataset_id'):
    sources.open_source(config)
  with pytest.raises(errors.UserError, match='--species human or'):
    sources.open_source(config_of(path))
  with pytest.raises(errors.UserError, match='no cell is primary'):
    sources.expand(dataclasses.replace(config, obs_filter="donor_id == 'x'"))


def test_columns_that_a_census_lacks(census):
  source = sources.open_source(
    dataclasses.replace(
      sources.expand(config_of(census[0]))[0], obs=('no_such',)
    )
  )
  with pytest.raises(errors.UserError, match='no obs column'):
    source.codes('no_such')


def test_a_damaged_experiment_is_one_line(tmp_path):
  formats.write_soma(adata_of(), str(tmp_path / 'cells.soma'))
  files = [f for f in (tmp_path / 'cells.soma').rglob('*.tdb') if f.is_file()]
  for file in sorted(files, key=lambda f: -f.stat().st_size)[:3]:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.UserError) as error:
      source = sources.open_source(config_of(tmp_path / 'cells.soma'))
      list(source.bind(VOCAB).chunks())
    assert '\n' not in str(error.value)
    file.write_bytes(data)


def test_counts_of_genes_that_are_not_listed_are_not_dropped(tmp_path):
  path = str(tmp_path / 'cells.soma')
  with tiledbsoma.Collection.create(path) as top:
    info = top.add_new_collection('census_info')
    datasets = pd.DataFrame({'soma_joinid': [0], 'dataset_id': ["o'b"]})
    table = pa.Table.from_pandas(datasets, preserve_index=False)
    info.add_new_dataframe(
      'datasets', schema=table.schema, domain=[[0, 0]]
    ).write(table)
    data = top.add_new_collection('census_data')
    _experiment(
      data, 'homo_sapiens', counts(50), human_ids(), ["o'b"] * 50,
      {0: range(20)},
    )  # fmt: skip
  (part,) = sources.expand(config_of(path))
  with pytest.raises(errors.UserError, match='lists of genes lack'):
    list(sources.open_source(part).bind(VOCAB).chunks())


def test_cells_that_are_not_primary(tmp_path):
  path = str(tmp_path / 'cells.soma')
  with tiledbsoma.Collection.create(path) as top:
    data = top.add_new_collection('census_data')
    _experiment(
      data, 'homo_sapiens', counts(4), human_ids(), ['a'] * 4, {0: range(60)}
    )
  with tiledbsoma.open(f'{path}/census_data/homo_sapiens/obs', 'w') as obs:
    with tiledbsoma.open(f'{path}/census_data/homo_sapiens/obs') as old:
      table = old.read().concat().to_pandas()
    table['is_primary_data'] = False
    obs.write(pa.Table.from_pandas(table, preserve_index=False))
  with pytest.raises(errors.UserError, match='no cell is primary .* species'):
    sources.expand(config_of(path))


def test_a_census_that_does_not_answer_may_be_asked_again(monkeypatch):
  census = pytest.importorskip('cellxgene_census')

  def fail(**kwargs):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr(census, 'open_soma', fail)
  with pytest.raises(errors.RetryableError, match='no route.*again') as error:
    sources.expand(config_of('census:2025-01-30'))
  assert '\n' not in str(error.value)
