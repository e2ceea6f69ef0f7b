"""Medians are of one kind of assay, cell by cell where a file has several."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from genecompass_jax import gene_table
from genecompass_jax.prepare import assays, merging
from tests import test_prepare_pipeline as pipelines

GENES = 5_200  # fewer are taken as a panel


@pytest.mark.parametrize(
  'name, kind',
  [
    ("10x 3' v3", 'umi'), ('Drop-seq', 'umi'), ('CEL-seq2', 'umi'),
    ('STRT-seq', 'umi'), ('sci-RNA-seq', 'umi'), ('Seq-Well S3', 'umi'),
    ('microwell-seq', 'umi'), ('10x multiome', 'umi'), ('', 'umi'),
    ('Smart-seq2', 'full_length'), ('Smart-seq v4', 'full_length'),
    ('SMART-Seq', 'full_length'), ('Smart-like', 'full_length'),
    ('smartseq2', 'full_length'), ('Fluidigm C1-based library', 'full_length'),
    ('SMARTer', 'full_length'), ('C1', 'full_length'),
    ('full length single cell RNA sequencing', 'full_length'),
    ('Quartz-seq', 'full_length'), ('FLASH-seq', 'full_length'),
  ],
)  # fmt: skip
def test_names_of_assays(name, kind):
  assert assays.kind_of(name) == kind


def make(num_cells=240, seed=0):
  """Molecules, and reads twenty times as many."""
  rng = np.random.default_rng(seed)
  table = gene_table.GeneTable.default()
  ids = [table.gene_ids[g] for g in np.flatnonzero(table.species_G == 0)]
  matrix = scipy.sparse.random(
    num_cells, GENES, 0.1, format='csr', random_state=rng,
    data_rvs=lambda n: rng.geometric(0.3, n).astype(np.float32),
  )  # fmt: skip
  is_read_C = rng.random(num_cells) < 0.5
  matrix = scipy.sparse.diags(np.where(is_read_C, 20.0, 1.0)) @ matrix
  obs = pd.DataFrame(
    {
      'donor': rng.choice(['d0', 'd1', 'd2', 'd3'], num_cells),
      'assay': np.where(is_read_C, 'Smart-seq2', "10x 3' v3"),
    },
    index=[f'c{i}' for i in range(num_cells)],
  )
  var = pd.DataFrame(index=ids[:GENES])
  return anndata.AnnData(matrix.tocsr().astype(np.float32), obs, var), is_read_C


@pytest.mark.parametrize('medians', ['histogram', 'exact'])
def test_medians_of_a_mixed_file_are_those_of_its_molecules(tmp_path, medians):
  adata, is_read_C = make()
  options = {'validation_share': 0.0, 'medians': medians}
  mixed = pipelines.prepare(
    [pipelines.source(adata, obs=('assay',))], tmp_path / 'mixed', **options
  )
  alone = pipelines.prepare(
    [pipelines.source(adata[~is_read_C].copy())], tmp_path / 'alone', **options
  )
  assert mixed.manifest['medians_of'] == {'human': 'umi'}
  assert mixed.manifest['sources'][0]['assay'] == assays.MIXED
  assert mixed.num_cells('train') == len(is_read_C)
  for mode in ('released', 'library'):
    one, other = (built.medians(mode) for built in (mixed, alone))
    ids = mixed.vocabulary.genes.gene_ids
    at = alone.vocabulary.tokens(ids)
    own = mixed.vocabulary.tokens(ids)
    known = at >= 0
    np.testing.assert_array_equal(
      one.support_SV[0, own[known]], other.support_SV[0, at[known]]
    )
    np.testing.assert_array_equal(
      one.median_SV[0, own[known]], other.median_SV[0, at[known]]
    )
  # Merged, the column of the cells tells them apart again.
  more, _ = make(60, seed=1)
  more.obs['assay'] = 'Smart-seq2'
  pipelines.prepare(
    [pipelines.source(more, 'more', obs=('assay',), dataset='more')],
    tmp_path / 'more', **options,
  )  # fmt: skip
  merging.merge(
    [str(tmp_path / 'mixed'), str(tmp_path / 'more')], str(tmp_path / 'merged')
  )
  merged = pipelines.corpus.Corpus.open(tmp_path / 'merged')
  assert [s['assay'] for s in merged.manifest['sources']] == [
    assays.MIXED,
    assays.FULL_LENGTH,
  ]
  assert merged.medians('released').support_SV.sum() == (
    mixed.medians('released').support_SV.sum()
  )


def test_a_word_of_the_user_holds_for_all_cells(tmp_path):
  adata, is_read_C = make()
  built = pipelines.prepare(
    [pipelines.source(adata, assay='umi')], tmp_path / 'c', validation_share=0.0
  )
  assert built.manifest['sources'][0]['assay'] == 'umi'
  both = built.medians('released').support_SV.sum()
  assert both == adata.X.nnz


def test_the_last_unit_of_an_assay_stays_in_training(tmp_path):
  """Of a mixed file too: its molecules are not all held out."""
  adata, is_read_C = make()
  adata.obs['donor'] = np.where(
    is_read_C, [f'r{i % 4}' for i in range(len(is_read_C))], 'molecules'
  )
  for seed in range(4):
    built = pipelines.prepare(
      [pipelines.source(adata)], tmp_path / f'c{seed}', seed=seed,
      validation_share=0.5,
    )  # fmt: skip
    assert built.manifest['medians_of'] == {'human': 'umi'}


def test_molecules_that_are_all_held_out_give_no_medians(tmp_path):
  adata, is_read_C = make()
  adata.obs['donor'] = np.where(is_read_C, 'reads', 'molecules')
  built = pipelines.prepare(
    [pipelines.source(adata, 'a')], tmp_path / 'c',
    validation_units=('a:molecules',),
  )  # fmt: skip
  assert built.manifest['medians_of'] == {'human': 'full_length'}
  assert built.medians('released').support_SV.sum() == adata.X[is_read_C].nnz
