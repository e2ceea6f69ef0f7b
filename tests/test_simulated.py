"""Simulated cells leave as AnnData, h5ad files and a corpus."""

import shutil

import anndata
import numpy as np
import pytest

from genecompass_jax import corpus, errors, simulate
from genecompass_jax.prepare import simulated


@pytest.fixture(scope='module')
def atlas():
  return simulate.Atlas()


def test_files_hold_the_cells_and_leave_out_what_was_not_measured(
  atlas, tmp_path
):
  names = simulated.write_h5ad(atlas, str(tmp_path), 600)
  assert len(names) == 4
  cells = atlas.sample(600, species=1)
  for name, is_panel in (('mouse', False), ('mouse_panel', True)):
    adata = anndata.read_h5ad(tmp_path / f'{name}.h5ad')
    expected = cells.select((cells.obs['assay'] == 'panel') == is_panel)
    assert adata.shape == (len(expected), 300 if is_panel else 2000)
    assert adata.uns['simulated_atlas'] == atlas.config.sha256
    rows = [cells.gene_ids.index(gene) for gene in adata.var_names]
    assert abs(adata.X - expected.counts[:, rows]).nnz == 0
    for column, values in expected.obs.items():
      np.testing.assert_array_equal(
        adata.obs[column].to_numpy(values.dtype), values
      )


def test_a_corpus_is_made_once(tmp_path):
  path = simulated.corpus(tmp_path, num_cells=800)
  found = corpus.Corpus.open(path)
  number = sum(found.num_cells(split) for split in found.splits)
  assert 700 < number <= 800
  assert len(found.gene_ids(0)) == len(found.gene_ids(1)) == 2000
  assert not found.verify()
  assert simulated.corpus(tmp_path, num_cells=800) == path
  shutil.rmtree(path)  # killed before the corpus was there: built again
  assert simulated.corpus(tmp_path, num_cells=800) == path
  with pytest.raises(errors.UserError, match='another workdir'):
    simulated.corpus(tmp_path, num_cells=801)
