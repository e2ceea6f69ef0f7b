"""gc_ood: how far a cell is from a sample of training cells."""

import shutil

import anndata
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import cli, corpus, errors
from genecompass_jax.analysis import reference_sample
from tests.conftest import tiny_cells

FILE = reference_sample.FILE


@pytest.fixture(scope='module')
def run(trained, tiny_corpus, tmp_path_factory):
  """A workdir with a reference sample."""
  folder = tmp_path_factory.mktemp('reference') / 'run'
  shutil.copytree(trained, folder)
  arguments = [str(tiny_corpus), '--checkpoint', str(folder)]
  assert cli.main(['reference', *arguments, '--cells', '150']) == 0
  return folder


def test_the_sample_is_of_training_cells_of_all_species(run, tiny_corpus):
  model = gc.load(run)
  found, name = reference_sample.find(model, 'cls', True)
  opened = corpus.Corpus.open(tiny_corpus)
  stores = opened.stores('train')
  assert '150 training cells' in name
  assert found.unit_RD.shape == (150, model.config.width)
  np.testing.assert_allclose(
    np.linalg.norm(found.unit_RD, axis=1), 1, atol=1e-6
  )
  # The first of them by hand.
  (cells,) = stores[0].read_blocks([0])
  a, b = cells.starts_C1[:2]
  tokens = opened.tokens(0)[cells.gene_rows_N[a:b]]
  gene_ids = model.vocabulary.token_gene_ids()
  matrix = cells.counts_N[None, a:b].astype(np.float32)
  one = anndata.AnnData(matrix)
  one.var_names = [gene_ids[token] for token in tokens]
  expected = gc.embed(one, model, species='human')
  np.testing.assert_allclose(
    found.unit_RD[0], reference_sample.unit(expected)[0], atol=1e-5
  )
  share = round(150 * stores[0].num_cells / opened.num_cells('train'))
  chunks = reference_sample.training_cells(tiny_corpus, model, 150)[1]
  human = sum(len(c.index_C) for c in chunks if c.species == 0)
  assert human == share


def test_percentiles_are_those_of_the_distances(run):
  rng = np.random.default_rng(0)
  sample = reference_sample.ReferenceSample(
    'x', reference_sample.unit(rng.normal(size=(300, 8)) + 2)
  )
  cells = rng.normal(size=(40, 8)) + 2
  found = sample.percentiles(cells)

  def distances(x, nth):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    gaps = np.linalg.norm(x[:, None] - sample.unit_RD[None], axis=2)
    return np.sort(gaps, axis=1)[:, nth - 1]

  own = distances(sample.unit_RD, 11)  # the first is the cell itself
  expected = [100 * (own < d).mean() for d in distances(cells, 10)]
  np.testing.assert_allclose(found, expected, atol=100 / 300 + 1e-3)
  assert 20 < np.median(found) < 80
  # The length of an embedding is no distance; another direction is.
  np.testing.assert_allclose(sample.percentiles(3 * cells), found, atol=0.4)
  assert (sample.percentiles(-cells) == 100).all()


def test_strange_cells_are_far(run):
  model = gc.load(run)
  usual = tiny_cells(40, seed=0)
  strange = usual.copy()
  few = np.zeros(usual.shape, np.float32)
  few[:, :3] = 500  # three genes, where usual cells have some 40
  strange.X = few
  found = [gc.embed_cells(x, model).obs['gc_ood'] for x in (usual, strange)]
  assert found[0].dtype == np.float32
  assert 20 < np.median(found[0]) < 80
  assert np.median(found[1]) > 95


def test_the_file_has_the_column_and_says_of_what(run, tmp_path, capsys):
  cells = tiny_cells(20, seed=4)
  cells.write_h5ad(tmp_path / 'in.h5ad')
  arguments = [str(tmp_path / 'in.h5ad'), '-o', str(tmp_path / 'out.h5ad')]
  arguments += ['--checkpoint', str(run)]
  assert cli.main(['embed', *arguments]) == 0
  assert 'left out' not in capsys.readouterr().out
  found = anndata.read_h5ad(tmp_path / 'out.h5ad')
  expected = gc.embed_cells(cells, gc.load(run))
  np.testing.assert_allclose(found.obs['gc_ood'], expected.obs['gc_ood'], 1e-3)
  assert '150 training cells' in found.uns['genecompass']['reference']
  # Of another step, another block, or without a sample: no column.
  earlier = gc.load(run / 'checkpoints' / '5')
  for model, options, why in (
    (earlier, {}, 'of another step'),
    (gc.load(run), {'block': 1}, 'of the last block'),
    (gc.load(run).replace(source=''), {}, 'from no folder'),
  ):
    result = gc.embed_cells(cells, model, **options)
    assert 'gc_ood' not in result.obs
    assert 'gc_ood left out' in result.uns['reference']
    assert why in result.uns['reference']


def test_a_model_without_a_sample_says_so(trained, tmp_path, capsys):
  tiny_cells(5).write_h5ad(tmp_path / 'in.h5ad')
  arguments = [str(tmp_path / 'in.h5ad'), '-o', str(tmp_path / 'out.h5ad')]
  assert cli.main(['embed', *arguments, '--checkpoint', str(trained)]) == 0
  assert 'gc_ood left out: no reference sample' in capsys.readouterr().out
  assert 'gc_ood' not in anndata.read_h5ad(tmp_path / 'out.h5ad').obs


def test_mistakes_are_one_line(run, trained, tiny_corpus, tmp_path, capsys):
  def refused(*arguments):
    assert cli.main(['reference', *map(str, arguments)]) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    return line

  few = tmp_path / 'few.h5ad'
  tiny_cells(30).write_h5ad(few)
  checkpoint = ['--checkpoint', trained]
  assert 'give 100 or more' in refused(tiny_corpus, *checkpoint, '--cells', 9)
  assert '30 cells' in refused(few, *checkpoint)
  assert not (trained / FILE).exists()
  damaged = tmp_path / 'run'
  shutil.copytree(run, damaged)
  (damaged / FILE).write_bytes(b'PK' + bytes(100))
  with pytest.raises(errors.UserError, match='is damaged'):
    gc.embed(tiny_cells(5), gc.load(damaged))
