"""Cells that stand in several sources, with other genes, are found."""

import dataclasses
import itertools
import os

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from genecompass_jax import gene_table
from genecompass_jax.prepare import pipeline, quality, reports, sources
from genecompass_jax.prepare.building import copies, fingerprints

OFF = quality.QualityConfig.off()
GENES = 2000
NAMES = ('scgen', 'harmony', 'muscat')
KANG = {  # cells that two of the extracts share, counted by hand
  ('scgen', 'harmony'): 125,
  ('harmony', 'muscat'): 114,
  ('scgen', 'muscat'): 104,
}


def genes():
  table = gene_table.GeneTable.default()
  rows = np.flatnonzero(table.species_G == 0)[: 20 * GENES : 20]
  return [table.gene_ids[g] for g in rows]


def counts(num_cells, seed):
  rng = np.random.default_rng(seed)
  level = rng.lognormal(-1.5, 1.5, GENES)
  depth = rng.lognormal(0, 0.3, num_cells)
  return rng.poisson(depth[:, None] * level).astype(np.float32)


def source(matrix, columns, name, **kwargs):
  obs = pd.DataFrame(index=[f'{name}-{i}' for i in range(len(matrix))])
  var = pd.DataFrame(index=np.array(genes())[columns])
  adata = anndata.AnnData(scipy.sparse.csr_matrix(matrix[:, columns]), obs, var)
  config = sources.SourceConfig(name=name, assay='umi', **kwargs)
  return sources.from_anndata(adata, config)


def prepare(opened, out, **kwargs):
  config = pipeline.PrepareConfig(
    vocabulary='measured', filters=OFF, validation_share=0, **kwargs
  )
  return pipeline.prepare(opened, out, config)


@pytest.fixture
def three():
  """Sources of 200 cells; 30 of `wide` in `narrow`, 20 of it in `shifted`."""
  wide, narrow, shifted = (counts(200, seed) for seed in range(3))
  narrow[:30] = wide[50:80]
  shifted[100:120] = wide[70:90]
  columns = np.arange(GENES)
  return [
    source(wide, columns, 'wide'),
    source(narrow, columns[:900], 'narrow'),
    source(shifted, columns[500:1500], 'shifted'),
  ]


def test_copies_are_found_across_gene_lists(three, tmp_path):
  made = prepare(three, tmp_path / 'c')
  found = made.manifest['copies']
  shared = {tuple(s['sources']): s['cells'] for s in found['shared']}
  assert shared == {
    ('wide', 'narrow'): 30,
    ('wide', 'shifted'): 20,
    ('narrow', 'shifted'): 10,
  }
  assert made.num_cells('train') == 600 - 50
  assert found['removed'] == 50
  names = made.store('train', 0).cell_names()
  assert {f'wide-{i}' for i in range(200)} <= set(names)  # the wider copy stays
  assert made.manifest['split']['joined_units'] == [
    ['wide', 'narrow', 'shifted']
  ]
  text = reports.describe(reports.read(tmp_path / 'c'))
  assert 'wide and narrow share 30 cells: one unit' in text
  assert not made.verify()


def test_units_that_share_cells_are_held_out_together(three, tmp_path):
  other = source(counts(200, 9), np.arange(GENES), 'other')
  config = pipeline.PrepareConfig(
    vocabulary='measured', filters=OFF, validation_units=('narrow',)
  )
  made = pipeline.prepare([*three, other], tmp_path / 'c', config)
  assert made.manifest['split']['validation_units'] == ['wide+narrow+shifted']
  assert made.num_cells('validation') == 550
  assert made.num_cells('train') == 200
  store = made.store('validation', 0)
  units = {store.categories('unit')[code] for code in store.obs('unit')}
  assert units == {'wide+narrow+shifted'}


def test_donors_of_one_file_that_share_cells_are_one_unit(tmp_path):
  matrix = counts(120, 5)
  matrix[60:80] = matrix[:20]
  donor = np.repeat(['p', 'q', 'r'], 40)
  donor[60:80] = 'q'
  opened = source(matrix, np.arange(GENES), 'file', unit='donor')
  opened = dataclasses.replace(opened, obs=opened.obs.assign(donor=donor))
  made = pipeline.prepare(
    [opened],
    tmp_path / 'c',
    pipeline.PrepareConfig(
      vocabulary='measured', filters=OFF, validation_units=('q',)
    ),
  )
  split = made.manifest['split']
  assert split['validation_units'] == ['file:p+file:q']
  assert split['joined_units'] == [['file:p', 'file:q']]
  assert made.num_cells('train') == 40
  text = reports.describe(reports.read(tmp_path / 'c'))
  assert 'file:p and file:q share cells of one file: one unit' in text


def test_copies_may_be_kept(three, tmp_path):
  made = prepare(three, tmp_path / 'c', keep_copies=True)
  assert made.num_cells('train') == 600
  assert made.manifest['copies'] == {'searched': False}


def test_copies_within_a_source(tmp_path):
  matrix = counts(100, 0)
  matrix[90:] = matrix[:10]
  made = prepare([source(matrix, np.arange(GENES), 'a')], tmp_path / 'c')
  assert made.num_cells('train') == 90
  assert made.manifest['copies']['shared'] == [
    {'sources': ['a', 'a'], 'cells': 10}
  ]


def test_a_discordant_gene_does_not_hide_a_copy(tmp_path):
  wide = counts(100, 0)
  again = wide.copy()
  again[:, 7] += 3  # a symbol that the two files resolve to different genes
  columns = np.arange(GENES)
  opened = [source(wide, columns, 'a'), source(again, columns[:1500], 'b')]
  assert prepare(opened, tmp_path / 'c').num_cells('train') == 100


@pytest.mark.parametrize('reason', ['few genes', 'few counts', 'alike'])
def test_what_is_no_copy_stays(tmp_path, reason):
  matrix = counts(100, 0)
  other = matrix.copy()
  columns = other_columns = np.arange(GENES)
  if reason == 'few genes':  # a panel says too little
    other_columns = columns[:299]
  elif reason == 'few counts':
    matrix = np.minimum(matrix, 1) * (np.cumsum(matrix > 0, axis=1) <= 90)
    other = matrix.copy()
  else:  # a twin that differs in one gene of twenty
    rng = np.random.default_rng(1)
    other += rng.random(other.shape) < 0.05
  opened = [source(matrix, columns, 'a'), source(other, other_columns, 'b')]
  assert prepare(opened, tmp_path / 'c').num_cells('train') == 200


def test_a_copy_that_the_filters_refuse_is_no_reason_to_drop_the_other(
  tmp_path,
):
  wide = counts(200, 0)
  wide[:40, 1000:] = 0  # few genes in the wide source
  columns = np.arange(GENES)
  opened = [
    source(wide, columns, 'wide'),
    source(wide[:40], columns[:900], 'narrow'),
  ]
  expressed = (wide > 0).sum(axis=1)
  config = pipeline.PrepareConfig(
    vocabulary='measured',
    filters=quality.QualityConfig(
      min_genes=int(20_000 * (expressed[:40].max() + 1) / GENES),
      min_coding=0,
      max_mito=1.0,
      max_sd=0.0,
      min_cells=0,
    ),
    validation_share=0,
  )
  made = pipeline.prepare(opened, tmp_path / 'c', config)
  found = {s['name']: s for s in reports.read(tmp_path / 'c')['sources']}
  assert made.manifest['copies']['removed'] == found['narrow']['copies']
  passed = found['wide']['kept'] + found['narrow']['kept']
  assert passed == made.num_cells('train')
  assert {tuple(s['sources']) for s in made.manifest['copies']['shared']} == {
    ('wide', 'narrow')
  }


def test_many_gene_lists_fit_a_word():
  rng = np.random.default_rng(0)
  measured = rng.random((90, 3000)) < 0.8
  sets = fingerprints.GeneSets.of(measured)
  used = int(np.bitwise_or.reduce(sets.sets_Src))
  assert 0 < used.bit_count() <= fingerprints.MAX_SETS
  for s in range(used.bit_length()):
    member_R = sets.member_R & np.uint64(1 << s) > 0
    for source_number in np.flatnonzero(sets.sets_Src & np.uint64(1 << s)):
      assert measured[source_number][member_R].all()


@pytest.mark.parametrize(('share', 'found'), [(0.01, True), (0.04, False)])
def test_copies_differ_in_few_genes(share, found):
  rows = np.arange(0, 1200, 2)
  mine = np.random.default_rng(0).integers(1, 5, len(rows)).astype(np.uint32)
  theirs = mine.copy()
  theirs[: int(share * len(rows))] += 1
  common = np.ones(GENES, bool)
  assert fingerprints.agree((rows, mine), (rows, theirs), common) == found


@pytest.mark.parametrize('number', [6, fingerprints.MAX_KINDS])
def test_every_pair_of_few_gene_lists_has_its_set(number):
  rng = np.random.default_rng(0)
  measured = rng.random((number, 6000)) < 0.5
  panels = np.zeros((5, 6000), bool)  # of some genes, and sources of mice
  panels[:4, :280] = rng.random((4, 280)) < 0.9
  sets = fingerprints.GeneSets.of(np.concatenate([panels, measured])[::-1])
  sets = fingerprints.GeneSets(sets.member_R, sets.sets_Src[::-1][5:])
  for a, b in itertools.combinations_with_replacement(range(number), 2):
    both = int(sets.sets_Src[a] & sets.sets_Src[b])
    found = [
      ((sets.member_R & np.uint64(1 << s)) > 0).sum()
      for s in range(both.bit_length())
      if both >> s & 1
    ]
    assert max(found) == (measured[a] & measured[b]).sum()


@pytest.mark.parametrize('number', range(7, 16))
def test_pairs_of_gene_lists_are_searched_or_said_not_to_be(number):
  rng = np.random.default_rng(number)
  measured = rng.random((number, 3000)) < 0.8
  sets = fingerprints.GeneSets.of(measured)
  assert not len(sets.unsearched(measured))
  measured = rng.random((number, 3000)) < 0.35
  sets = fingerprints.GeneSets.of(measured)
  missed = {
    (a, b)
    for a, b in itertools.combinations_with_replacement(range(number), 2)
    if (measured[a] & measured[b]).sum() >= fingerprints.MIN_GENES
    and not sets.sets_Src[a] & sets.sets_Src[b]
  }
  assert set(map(tuple, sets.unsearched(measured).tolist())) == missed
  assert missed or number <= fingerprints.MAX_KINDS


def test_which_copy_stays():
  pairs = np.array([[[0, 5], [1, 7]], [[1, 7], [2, 2]], [[0, 1], [0, 3]]])
  keep = [np.ones(10, bool) for _ in range(3)]
  gone, shared = copies.drop(pairs, [100, 300, 300], keep)
  assert sorted(gone) == [(0, 3), (0, 5), (2, 2)]
  assert shared == {(0, 0): 1, (0, 1): 1, (0, 2): 1, (1, 2): 1}
  keep[1][7] = False
  gone, _ = copies.drop(pairs, [100, 300, 300], keep)
  assert sorted(gone) == [(0, 3), (0, 5)]


def test_kang_extracts_share_the_known_cells(tmp_path, real_data):
  folders = {n: real_data / f'kang_pbmc_ifnb_{n}' for n in NAMES}
  configs = [
    sources.SourceConfig(
      str(folder / f'{folder.name}.h5ad'), name=n, species='human'
    )
    for n, folder in folders.items()
  ]
  if not all(os.path.exists(c.path) for c in configs):
    pytest.skip('the Kang extracts are absent')
  made = pipeline.prepare(
    configs, tmp_path / 'c', pipeline.PrepareConfig(validation_share=0)
  )
  shared = made.manifest['copies']['shared']
  assert {tuple(s['sources']): s['cells'] for s in shared} == KANG


def test_the_report_says_what_was_not_searched(tmp_path, monkeypatch):
  monkeypatch.setattr(fingerprints, 'MAX_KINDS', 1)
  columns = np.arange(GENES)
  lists = columns[:800], columns[500:1400], columns[1000:]
  opened = [
    source(counts(60, seed), some, name)
    for seed, (name, some) in enumerate(zip('abc', lists))
  ]
  prepare(opened, tmp_path / 'c')
  text = reports.describe(reports.read(tmp_path / 'c'))
  assert 'pairs of sources, a and a among them, were not searched' in text
