"""The gene table: its file format, and what the shipped one holds."""

import collections
import dataclasses
import gzip
import importlib.resources
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from genecompass_jax import errors, gene_table
from tests.conftest import ROOT

RESOURCE = (
  importlib.resources.files('genecompass_jax') / 'resources/genes.tsv.gz'
)
TEXT = st.text(
  st.characters(
    codec='utf-8', exclude_characters='\t\n|', exclude_categories=['Cs']
  ),
  min_size=1,
  max_size=6,
)


def small_table() -> gene_table.GeneTable:
  return gene_table.GeneTable(
    gene_ids=('ENSG1', 'ENSG2', 'ENSMUSG1'),
    symbols=('A', 'ENSG2', 'a'),
    aliases=(('x', 'y'), (), ('z',)),
    entrez=('1|2', '', '3'),
    species_G=np.array([0, 0, 1]),
    biotypes=('protein_coding', 'lncRNA', 'protein_coding'),
    orthologue_groups=('1', '', '1'),
    header={'release': 'a: b'},
  )


def assert_same(a: gene_table.GeneTable, b: gene_table.GeneTable):
  assert a.columns() == b.columns()
  assert a.header == b.header


@pytest.mark.parametrize('name', ['genes.tsv', 'genes.tsv.gz'])
def test_round_trip_and_same_bytes(tmp_path, name):
  table = small_table()
  table.save(tmp_path / name)
  loaded = gene_table.GeneTable.load(tmp_path / name)
  assert_same(loaded, table)
  assert loaded.species_G.dtype == np.int8
  time.sleep(1.1 if name.endswith('gz') else 0)  # gzip headers hold seconds
  loaded.save(tmp_path / f'again-{name}')
  again = (tmp_path / f'again-{name}').read_bytes()
  assert again == (tmp_path / name).read_bytes()


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(TEXT, unique=True, max_size=8), st.data())
def test_any_text_comes_back(tmp_path_factory, ids, data):
  path = tmp_path_factory.mktemp('t') / 'genes.tsv'
  n = len(ids)

  def column(values):
    return tuple(data.draw(st.lists(values, min_size=n, max_size=n)))

  table = gene_table.GeneTable(
    gene_ids=tuple(ids),
    symbols=column(TEXT),
    aliases=tuple(map(tuple, column(st.lists(TEXT, max_size=3)))),
    entrez=column(st.sampled_from(['', '7', '7|8'])),
    species_G=np.sort(np.array(column(st.sampled_from([0, 1])), int)),
    biotypes=column(st.sampled_from(['', *gene_table.BIOTYPES])),
    orthologue_groups=column(st.sampled_from(['', '1', 'many2'])),
  )
  table.save(path)
  assert_same(gene_table.GeneTable.load(path), table)


@pytest.mark.parametrize('name', ['genes.tsv', 'genes.tsv.gz'])
def test_every_flipped_or_missing_byte_is_one_line(tmp_path, name):
  small_table().save(tmp_path / name)
  whole = (tmp_path / name).read_bytes()
  good = small_table().columns()
  bad = tmp_path / f'bad-{name}'
  for i in range(len(whole)):
    flipped = bytearray(whole)
    flipped[i] ^= 0x15
    for data in (bytes(flipped), whole[:i]):
      bad.write_bytes(data)
      try:  # a byte of the gzip header may be of no consequence
        assert gene_table.GeneTable.load(bad).columns() == good
        assert name.endswith('gz') and i < 10
      except errors.UserError as error:
        assert '\n' not in str(error)
        assert str(bad) in str(error)


def test_other_version_kind_and_absence_are_named(tmp_path):
  path = tmp_path / 'genes.tsv'
  columns = small_table().columns()
  gene_table.write_table(path, 'gene_table', {}, columns, version=2)
  with pytest.raises(errors.UserError, match='format version 1'):
    gene_table.GeneTable.load(path)
  gene_table.write_table(path, 'vocabulary', {}, columns)
  with pytest.raises(errors.UserError, match='not a gene_table file'):
    gene_table.GeneTable.load(path)
  with pytest.raises(errors.UserError, match='no such'):
    gene_table.GeneTable.load(tmp_path / 'none.tsv')
  path.write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
  with pytest.raises(errors.UserError, match='git-lfs'):
    gene_table.GeneTable.load(path)


@pytest.mark.parametrize('value', ['a\tb', 'a\nb'])
def test_values_that_would_break_the_file_are_refused(tmp_path, value):
  columns = {'gene': [value]}
  with pytest.raises(ValueError, match='tab or a line end'):
    gene_table.write_table(tmp_path / 't.tsv', 'kind', {}, columns)
  assert not (tmp_path / 't.tsv').exists()


def test_tables_that_cannot_be_are_refused():
  good = small_table()
  for change, message in (
    ({'symbols': ('A',)}, 'length'),
    ({'gene_ids': ('E', 'E', 'F')}, 'twice'),
    ({'species_G': np.array([0, 1, 0])}, 'before mouse'),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(good, **change)


def test_subset_keeps_order():
  table = small_table().subset(np.array([True, False, True]))
  assert table.gene_ids == ('ENSG1', 'ENSMUSG1')
  assert table.aliases == (('x', 'y'), ('z',))


def test_default_is_small_and_cached():
  assert len(RESOURCE.read_bytes()) < 2.5e6
  default = gene_table.GeneTable.default
  assert default() is default()


def test_default_holds_both_species():
  table = gene_table.GeneTable.default()
  counts = collections.Counter(zip(table.species_G.tolist(), table.biotypes))
  print(dict(counts))
  for (species, biotype), n in counts.items():
    key = f'{gene_table.SPECIES[species]} {biotype}'
    assert table.header[key] == str(n)
  assert 19_500 < counts[0, 'protein_coding'] < 20_500
  assert 21_000 < counts[1, 'protein_coding'] < 22_500
  assert min(counts.values()) > 1_800
  assert set(table.biotypes) == set(gene_table.BIOTYPES)
  for species, prefix in enumerate(('ENSG', 'ENSMUSG')):
    rows = np.flatnonzero(table.species_G == species)
    assert all(table.gene_ids[g].startswith(prefix) for g in rows)
    symbols = [table.symbols[g] for g in rows]
    assert len(set(symbols)) == len(symbols)
    current = set(symbols)
    assert not any(a in current for g in rows for a in table.aliases[g])
    numbers = [n for g in rows for n in table.entrez[g].split('|') if n]
    assert len(set(numbers)) == len(numbers)


def test_default_orthologues():
  table = gene_table.GeneTable.default()
  row = {
    (s, int(k)): g
    for g, (s, k) in enumerate(zip(table.symbols, table.species_G))
  }
  groups = collections.defaultdict(list)
  for g, group in enumerate(table.orthologue_groups):
    groups[group].append(g)
  del groups['']
  pairs = [g for g in groups if not g.startswith(gene_table.MANY_PREFIX)]
  assert len(pairs) == int(table.header['one2one orthologues']) > 16_500
  for group in pairs:
    assert table.species_G[groups[group]].tolist() == [0, 1]
  for human, mouse in (('TP53', 'Trp53'), ('ACTB', 'Actb'), ('SOX2', 'Sox2')):
    assert (
      table.orthologue_groups[row[human, 0]]
      == table.orthologue_groups[row[mouse, 1]]
      in pairs
    )
  mitochondrial = [s for s, k in row if k == 0 and s.startswith('MT-')]
  assert len(mitochondrial) == 13
  for name in mitochondrial:
    assert table.orthologue_groups[row[name, 0]] in pairs
  # PRAMEF and the like: many-to-many groups share nothing by default.
  many = [g for g in groups if g.startswith(gene_table.MANY_PREFIX)]
  assert len(many) > 500


def test_one2one_agrees_with_homologene(real_data):
  """An older, independent source: HomoloGene, where both have the gene."""
  table = gene_table.GeneTable.default()
  partner = {}
  for g, group in enumerate(table.orthologue_groups):
    if group and not group.startswith(gene_table.MANY_PREFIX):
      partner.setdefault(group, []).append(table.gene_ids[g])
  mouse_of = {pair[0]: pair[1] for pair in partner.values()}
  path = real_data / 'orthologs_human_mouse/homologene_human_mouse.tsv.gz'
  lines = gzip.decompress(path.read_bytes()).decode().splitlines()
  rows = [line.split('\t') for line in lines[1:]]
  both = [
    mouse_of[r[3]] == r[6]
    for r in rows
    if r[7] == 'one2one' and r[3] in mouse_of and r[6]
  ]
  print(f'{np.mean(both):.4f} of {len(both)} pairs agree')
  assert len(both) > 14_000
  assert np.mean(both) > 0.99


@pytest.mark.slow  # 15 s
def test_rebuilding_gives_the_same_bytes(real_data, tmp_path):
  annotation = real_data / 'gene_annotation_ensembl'
  orthologues = real_data / 'orthologs_human_mouse'
  out = tmp_path / 'genes.tsv.gz'
  subprocess.run(
    [
      sys.executable,
      ROOT / 'data_prep/make_gene_table.py',
      *('--human_gencode', annotation / 'human_gencode_biotypes.csv.gz'),
      *('--mouse_gencode', annotation / 'mouse_gencode_biotypes.csv.gz'),
      *('--human_ensembl', annotation / 'grch38.tsv.gz'),
      annotation / 'grch37.tsv.gz',
      *('--mouse_ensembl', annotation / 'grcm38.tsv.gz'),
      *('--hgnc', real_data / 'hgnc_genes_and_groups/hgnc_genes.tsv.gz'),
      *('--mgi', orthologues / 'HOM_MouseHumanSequence.rpt.gz'),
      *('--homologene', orthologues / 'homologene_human_mouse.tsv.gz'),
      *('--out', out),
    ],
    check=True,
    env={'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '7'},
  )
  # Compressors may differ between builds of zlib; the text may not.
  assert gzip.decompress(out.read_bytes()) == gzip.decompress(
    RESOURCE.read_bytes()
  )
  assert str(tmp_path) not in gzip.decompress(out.read_bytes()).decode()


def test_a_table_names_its_species(tmp_path):
  table = dataclasses.replace(small_table(), species=('human', 'rat'))
  path = tmp_path / 'genes.tsv.gz'
  table.save(path)
  loaded = gene_table.GeneTable.load(path)
  assert loaded.species == ('human', 'rat')
  assert_same(loaded, table)
  assert loaded.columns()['species'] == ['human', 'human', 'rat']
  assert loaded.subset(np.ones(3, bool)).species == ('human', 'rat')
  # Human and mouse are not named: the bytes of older files stay as they are.
  assert 'species' not in small_table().file_header()
  gene_table.write_table(path, 'gene_table', {}, table.columns())
  with pytest.raises(errors.UserError, match="genes of 'rat'"):
    gene_table.GeneTable.load(path)
  for species, message in (
    (('human',), 'outside'),
    (('human', 'human'), 'different names'),
    (('human', 'a b'), 'different names'),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(small_table(), species=species)
