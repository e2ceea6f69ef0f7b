"""Gene tables from the files of any release and species."""

import collections
import gzip
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from genecompass_jax import cli, errors, gene_ids, gene_table, vocabulary
from genecompass_jax.prepare.genes import (
  gene_formats,
  gene_reports,
  gene_tables,
  orthology,
)

HUMAN = (  # number, symbol, biotype, chromosome, start
  (1, 'AAA', 'protein_coding', '1', 100),
  (2, 'BBB', 'protein_coding', '1', 200),
  (3, 'CCC', 'lncRNA', '2', 300),
  (4, '', 'lncRNA', '2', 400),
  (5, 'EEE', 'processed_pseudogene', '3', 500),
  (6, 'DDD', 'protein_coding', 'X', 600),
  (7, 'FFF', 'protein_coding', '4', 700),
)
MOUSE = (
  (1, 'Aaa', 'protein_coding', '1', 100),
  (2, 'Bbb', 'protein_coding', '1', 200),
  (3, 'Bbb2', 'protein_coding', '1', 300),
  (6, 'Ddd', 'protein_coding', 'X', 600),
  (7, 'Fff', 'protein_coding', '4', 700),
  (8, 'Gm8', 'miRNA', '5', 800),
  (9, 'Rod', 'protein_coding', '6', 900),
)
RAT = (
  (1, 'Aaa', 'protein_coding', '1', 100),
  (2, 'Bbb', 'protein_coding', '1', 200),
  (6, 'Ddd', 'protein_coding', 'X', 600),
  (7, 'Fff1', 'protein_coding', '4', 700),
  (17, 'Fff2', 'protein_coding', '4', 1700),
  (9, 'Rod', 'protein_coding', '6', 900),
)
PREFIX = {'human': 'ENSG', 'mouse': 'ENSMUSG', 'rat': 'ENSRNOG'}


def gene_id(species, number):
  return f'{PREFIX[species]}{number:011}'


def ensembl_gtf(species, genes, genes_lines=True):
  lines = ['#!genome-build X', '#!genome-version X7']
  for number, symbol, biotype, chromosome, start in genes:
    name = f' gene_name "{symbol}";' if symbol else ''
    last = (
      f'gene_id "{gene_id(species, number)}"; gene_version "3";{name} '
      f'gene_source "ensembl"; gene_biotype "{biotype}";'
    )
    place = f'{start}\t{start + 50}\t.\t+\t.\t{last}'
    if genes_lines:
      lines.append(f'{chromosome}\tensembl\tgene\t{place}')
    lines.append(f'{chromosome}\tensembl\texon\t{place} exon_number "1";')
    place = f'{start + 20}\t{start + 90}\t.\t+\t.\t{last}'
    lines.append(f'{chromosome}\tensembl\texon\t{place} exon_number "2";')
  return '\n'.join(lines) + '\n'


def gencode_gtf(species, genes):
  text = ensembl_gtf(species, genes)
  text = text.replace('gene_biotype', 'gene_type').replace(
    '"; gene_v', '.3"; v'
  )
  lines = ['##description: evidence-based annotation, version 47 (Ensembl 113)']
  lines += [f'chr{x}' for x in text.splitlines() if x[0] != '#']
  return '\n'.join(lines) + '\n'


def write(path, text):
  data = text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


def tsv(*rows):
  return '\n'.join('\t'.join(map(str, row)) for row in rows) + '\n'


HGNC = tsv(
  (
    *('hgnc_id', 'symbol', 'name', 'locus_type', 'status', 'location'),
    *('alias_symbol', 'prev_symbol', 'entrez_id', 'ensembl_gene_id'),
    *('date_modified', 'gene_group'),
  ),
  (
    *('HGNC:1', 'AAA', 'a', 'gene with protein product', 'Approved', '1p1'),
    *('"NICK|NOCK"', 'OLDA', 11, gene_id('human', 1), '2025-06-01', ''),
  ),
  (
    *('HGNC:2', 'BBB', 'b', 'gene with protein product', 'Approved', '1p1'),
    *('', '"OLDB|WAS-B"', 12, gene_id('human', 2), '2024-01-01', '"x|y"'),
  ),
  (
    *('HGNC:6', 'DDD', 'd', 'gene with protein product', 'Approved', 'Xp1'),
    *('', '', 16, gene_id('human', 6), '2024-01-01', ''),
  ),
  (
    *('HGNC:7', 'FFF', 'f', 'gene with protein product', 'Approved', '4p1'),
    *('', '', 17, gene_id('human', 7), '2024-01-01', ''),
  ),
  (
    *('HGNC:8', 'ALT1', 'x', 'gene with protein product', 'Approved'),
    *('5q alternate reference locus', '', '', 18, gene_id('human', 8)),
    *('2024-01-01', ''),
  ),
  (
    *('HGNC:9', 'GONE', 'x', 'unknown', 'Entry Withdrawn', '', '', ''),
    *('', gene_id('human', 3), '2026-01-01', ''),
  ),
  ('HGNC:10', 'NOID', 'x', 'unknown', 'Approved', '', '', '', 99, '', '', ''),
)
MRK_LIST2 = tsv(
  (
    *('MGI Accession ID', 'Chr', 'cM Position', 'genome coordinate start'),
    *('genome coordinate end', 'strand', 'Marker Symbol', 'Status'),
    *('Marker Name', 'Marker Type', 'Feature Type'),
    'Marker Synonyms (pipe-separated)',
  ),
  (
    *('MGI:1', '1', '1.0', '100', '150', '+', 'Aaa', 'O', 'a'),
    *('Gene', 'protein coding gene', 'Aname|Aname2'),
  ),
  (*('MGI:99', '1', '', '', '', '', 'Aname2', 'O', 'a qtl'), 'QTL', 'QTL', ''),
)
MRK_ENSEMBL = tsv(
  ('MGI:2', 'Bbb', 'b', '1.0', '1', gene_id('mouse', 2), 'ENSMUST1', '', 'x')
)
RGD = (
  '# RGD-PIPELINE: ftp-file-extracts\n#\n#COLUMN INFORMATION:\n# 1  GENE_RGD_ID'
  ' the RGD_ID of the gene\n'
) + tsv(
  (
    *('GENE_RGD_ID', 'SYMBOL', 'NAME', 'NCBI_GENE_ID', 'OLD_SYMBOL'),
    *('GENE_TYPE', 'ENSEMBL_ID'),
  ),
  (61, 'Aaa', 'a 5" b', 31, 'Olda;Oldie', 'protein-coding', gene_id('rat', 1)),
  (62, 'Bbb', 'b', 32, '', 'protein-coding', f'{gene_id("rat", 2)};ENSRNOG99'),
)
GENE_INFO = tsv(
  (
    *('#tax_id', 'GeneID', 'Symbol', 'LocusTag', 'Synonyms', 'dbXrefs'),
    'chromosome',
  ),
  (10116, 31, 'Aaa', '-', 'Q1|Q2', f'RGD:61|Ensembl:{gene_id("rat", 1)}', '1'),
  (10116, 36, 'Ddd', '-', '-', f'RGD:66|Ensembl:{gene_id("rat", 6)}', 'X'),
  (10116, 39, 'Rod', '-', '-', f'Ensembl:{gene_id("rat", 9)}', '6'),
)

COMPARA_HEAD = (
  *('gene_stable_id', 'protein_stable_id', 'species', 'identity'),
  *('homology_type', 'homology_gene_stable_id', 'homology_protein_stable_id'),
  *('homology_species', 'homology_identity', 'dn', 'ds', 'goc_score'),
  *('wga_coverage', 'is_high_confidence', 'homology_id'),
)
LATIN = {
  'human': 'homo_sapiens',
  'mouse': 'mus_musculus',
  'rat': 'rattus_norvegicus',
}


def compara(*pairs):
  """Pairs ('human', 1, 'mouse', 1[, confident]) as Ensembl writes them."""
  rows = [COMPARA_HEAD]
  for one, number, other, partner, *confident in pairs:
    rows.append(
      (
        *(gene_id(one, number), 'P1', LATIN[one], 90, 'ortholog_one2one'),
        *(gene_id(other, partner), 'P2', LATIN[other], 80, 'NULL', 'NULL'),
        *(100, 99.5, *(confident or [1]), 7),
      )
    )
  x = gene_id('human', 1)
  rows.append((x, 'P', LATIN['human'], 30, 'within_species_paralog',
               gene_id('human', 2), 'P', LATIN['human'], *['NULL'] * 5, 0, 8))  # fmt: skip
  rows.append((x, 'P', LATIN['human'], 30, 'ortholog_one2one',
               'ENSDARG00000000001', 'P', 'danio_rerio', *['NULL'] * 5, 1, 9))  # fmt: skip
  return tsv(*rows)


PAIRS = (
  ('human', 1, 'mouse', 1),
  ('human', 1, 'rat', 1),
  ('human', 2, 'mouse', 2),  # one2many
  ('human', 2, 'mouse', 3),
  ('human', 2, 'rat', 2),  # one2one all the same
  ('human', 6, 'mouse', 6, 0),  # not of high confidence
  ('human', 6, 'rat', 6),
  ('human', 7, 'mouse', 7),
  ('human', 7, 'rat', 7),  # one2many
  ('human', 7, 'rat', 17),
  ('mouse', 9, 'rat', 9),  # rodents only
)


@pytest.fixture
def files(tmp_path):
  def put(name, text):
    return write(tmp_path / name, text)

  return {
    'human': put('human.gtf.gz', ensembl_gtf('human', HUMAN)),
    'mouse': put('mouse.gtf.gz', gencode_gtf('mouse', MOUSE)),
    'rat': put('rat.gtf', ensembl_gtf('rat', RAT)),
    'hgnc': put('hgnc.txt', HGNC),
    'mrk': put('MRK_List2.rpt', MRK_LIST2),
    'mrk_ensembl': put('MRK_ENSEMBL.rpt', MRK_ENSEMBL),
    'rgd': put('GENES_RAT.txt', RGD),
    'gene_info': put('rat.gene_info.gz', GENE_INFO),
    'compara': put('compara.tsv.gz', compara(*PAIRS)),
  }


def species(files, name, *names, older=()):
  return gene_tables.SpeciesSources(
    name, files[name], older, tuple(files[n] for n in names)
  )


def build(files, *orthologues, **fields):
  every = (
    species(files, 'human', 'hgnc'),
    species(files, 'mouse', 'mrk', 'mrk_ensembl'),
    species(files, 'rat', 'rgd', 'gene_info'),
  )
  return gene_tables.build_recipe(
    gene_tables.Recipe(every, orthologues or (files['compara'],), **fields)
  )


def groups(table):
  return {
    symbol: table.orthologue_groups[g]
    for g, symbol in enumerate(f'{s} {table.species[k]}' for s, k in
                               zip(table.symbols, table.species_G))
  }  # fmt: skip


def test_three_species(files):
  table = build(files)
  assert table.species == ('human', 'mouse', 'rat')
  assert table.gene_ids == (
    *(gene_id('human', i) for i in (1, 2, 3, 4, 6, 7, 8)),
    *(gene_id('mouse', i) for i in (1, 2, 3, 6, 7, 8, 9)),
    *(gene_id('rat', i) for i in (1, 2, 6, 7, 9, 17)),
  )
  of = dict(zip(table.gene_ids, range(len(table))))
  a, unnamed, alt = (of[gene_id('human', i)] for i in (1, 4, 8))
  assert table.aliases[a] == ('NICK', 'NOCK', 'OLDA')
  assert table.entrez[a] == '11'
  assert table.symbols[unnamed] == gene_id('human', 4)
  assert table.entrez[unnamed] == ''  # not that of a symbol without an id
  assert table.symbols[alt] == 'ALT1'  # on an alternate locus only
  rat = of[gene_id('rat', 1)]
  assert table.entrez[rat] == '31'
  # Former symbols of RGD, nicknames of NCBI; Olda from both sides.
  assert table.aliases[rat] == ('Olda', 'Oldie', 'Q1', 'Q2')
  # A mouse gene gets the former symbols of its human orthologue; a QTL of
  # MGI's list takes no name away.
  assert table.aliases[of[gene_id('mouse', 1)]] == ('Aname', 'Aname2', 'Olda')
  assert table.header['rat protein_coding'] == '6'
  assert 'sha256' in table.header['source 1']
  assert any('Ensembl 113' in value for value in table.header.values())
  assert any(
    'last change 2026-01-01' in value for value in table.header.values()
  )

  found = groups(table)
  assert found['AAA human'] == found['Aaa mouse'] == found['Aaa rat'] == '1'
  # One rat gene and two mice: the rat's shares, the mice are many.
  assert found['BBB human'] == found['Bbb rat'] == '2'
  assert found['Bbb mouse'] == found['Bbb2 mouse'] == 'many2'
  assert found['FFF human'] == found['Fff mouse']
  assert found['Fff1 rat'] == found['Fff2 rat'] == f'many{found["FFF human"]}'
  assert found['Rod mouse'] == found['Rod rat'] != ''
  assert table.header['human-mouse one2one'] == '3'
  assert table.header['human-mouse one2many'] == '1'
  assert table.header['human-rat one2many'] == '1'
  assert table.header['mouse-rat one2one'] == '1'
  lines = '\n'.join(gene_reports.describe(table))
  assert 'human-rat orthologues: 3 one2one, 1 one2many; 3 tokens' in lines
  # and the rest of the package takes it
  ids = [gene_id('rat', 1), 'ENSRNOG00000000002.5']
  assert gene_ids.infer_species(ids, table) == 2
  vocab = vocabulary.Vocabulary.from_genes(table)
  assert vocab.tokens([gene_id('human', 1)]) == vocab.tokens(
    [gene_id('rat', 1)]
  )


def test_cells_of_a_third_species_find_their_genes(files):
  import pandas as pd

  from genecompass_jax.prepare import identifiers

  table = build(files)
  for code, prefix in enumerate(('ENSG', 'ENSMUSG', 'ENSRNOG')):
    var = pd.DataFrame(index=[i for i in table.gene_ids if prefix in i])
    names, found, _ = identifiers.resolve('cells', var, '', (), table)
    assert set(found) == {code}
    assert found[code].share_mapped == 1
  obs = pd.DataFrame({'organism': ['Homo sapiens', 'rat', 'mouse']})
  codes = identifiers.species_of_cells('a', obs, 'obs:organism', table)
  assert codes.tolist() == [0, 2, 1]
  with pytest.raises(errors.UserError, match='none of human, mouse'):
    identifiers.species_of_cells(
      'a', obs, 'obs:organism', gene_table.GeneTable.default()
    )


def test_only_confident_pairs(files):
  found = groups(build(files, one_to_one='confident'))
  assert found['DDD human'] == found['Ddd rat']
  assert found['Ddd mouse'] == f'many{found["DDD human"]}'
  assert found['AAA human'] == found['Aaa mouse']


def test_a_species_more_changes_nothing_else(files):
  three = build(files)
  two = gene_tables.build_recipe(
    gene_tables.Recipe(
      (
        species(files, 'human', 'hgnc'),
        species(files, 'mouse', 'mrk', 'mrk_ensembl'),
      ),
      (files['compara'],),
    )
  )
  assert two.species == gene_table.SPECIES
  first = three.subset(three.species_G < 2)
  assert first.aliases == two.aliases

  def sharing(table):
    token_G = vocabulary.Vocabulary.from_genes(table).token_G
    return token_G[:, None] == token_G

  assert np.array_equal(sharing(first), sharing(two))


def test_formats_of_annotation(tmp_path, files):
  plain = gene_formats.read_annotation(files['human'])
  assert plain.release == 'X7'
  assert len(plain.rows) == 7
  exons = write(tmp_path / 'e.gtf', ensembl_gtf('human', HUMAN, False))
  by_exon = gene_formats.read_annotation(exons).rows
  assert by_exon[0] == {**plain.rows[0], 'end': '190'}
  mouse = gene_formats.read_annotation(files['mouse'])
  assert mouse.release.endswith('version 47 (Ensembl 113)')
  assert mouse.rows[0]['gene_id'] == f'{gene_id("mouse", 1)}.3'
  assert mouse.rows[0]['chromosome'] == 'chr1'
  table = write(
    tmp_path / 'a.tsv',
    tsv(
      ('ensgene', 'entrez', 'symbol', 'chr', 'start', 'end', 'biotype'),
      (gene_id('human', 1), '11.0', 'AAA', '1', 1, 2, 'lincRNA'),
      (gene_id('human', 2), '11.0', 'AAA', 'CHR_HG7_PATCH', 1, 2, 'lincRNA'),
    ),
  )
  rows = gene_formats.read_annotation(table)
  assert rows.rows[0]['biotype'] == 'lncRNA'  # as older releases wrote it
  assert [row['gene_id'] for row in rows.alternates] == [gene_id('human', 2)]
  made = gene_tables.build_recipe(
    gene_tables.Recipe((gene_tables.SpeciesSources('human', table),))
  )
  assert made.gene_ids == (gene_id('human', 1),)
  assert made.aliases == ((gene_id('human', 2),),)
  assert made.entrez == ('11',)


def test_pseudoautosomal_genes(tmp_path):
  genes = ((1, 'PAR', 'protein_coding', 'X', 9), (2, 'PAR', 'protein_coding', 'Y', 9))  # fmt: skip
  new = write(tmp_path / 'new.gtf', ensembl_gtf('human', genes))
  recipe = gene_tables.Recipe((gene_tables.SpeciesSources('human', new),))
  table = gene_tables.build_recipe(recipe)
  assert table.gene_ids == (gene_id('human', 1),)
  assert table.aliases == ((gene_id('human', 2),),)
  text = gencode_gtf('human', genes).replace(
    f'{gene_id("human", 2)}.3', f'{gene_id("human", 1)}.3_PAR_Y'
  )
  old = write(tmp_path / 'old.gtf', text)
  recipe = gene_tables.Recipe((gene_tables.SpeciesSources('human', old),))
  assert gene_tables.build_recipe(recipe).gene_ids == (gene_id('human', 1),)


def test_older_releases_leave_names_and_retired_ids(tmp_path, files):
  older = (
    (1, 'ZZZ', 'protein_coding', '1', 100),  # renamed
    (71, 'BBB', 'protein_coding', '1', 200),  # another id
    (72, 'NOBODY', 'protein_coding', '1', 300),
  )
  path = write(tmp_path / 'old.gtf.gz', ensembl_gtf('human', older))
  one = species(files, 'human', 'hgnc', older=(path,))
  table = gene_tables.build_recipe(gene_tables.Recipe((one,)))
  assert 'ZZZ' in table.aliases[0]
  assert gene_id('human', 71) in table.aliases[1]
  assert not any(gene_id('human', 72) in names for names in table.aliases)
  changed = list(gene_reports.changes(gene_table.GeneTable.default(), table))
  kinds = collections.Counter(change.kind for change in changed)
  assert kinds['removed'] > 50_000


ORTHOLOGUES = {
  'gene_orthologs.gz': tsv(
    ('#tax_id', 'GeneID', 'relationship', 'Other_tax_id', 'Other_GeneID'),
    (9606, 11, 'Ortholog', 10116, 31),
    (9606, 12, 'Ortholog', 10116, 32),
    (9606, 12, 'Ortholog', 10116, 4444),  # a gene that the table lacks
    (9606, 16, 'Potential readthrough sibling', 10116, 36),
    (9606, 17, 'Ortholog', 7955, 5555),
  ),
  'homologene.data': tsv(
    (3, 9606, 11, 'AAA', 7, 'NP_1'),
    (3, 10116, 31, 'Aaa', 8, 'NP_2'),
    (4, 9606, 12, 'BBB', 7, 'NP_1'),
    (4, 10116, 32, 'Bbb', 8, 'NP_2'),
    (4, 10116, 4444, 'Bbb7', 8, 'NP_2'),
    (4, 7955, 5555, 'bbb', 8, 'NP_2'),
  ),
  'RGD_ORTHOLOGS.txt': '# comments\n# and more\n'
  + tsv(
    (
      *('RAT_GENE_SYMBOL', 'RAT_GENE_RGD_ID', 'RAT_GENE_NCBI_GENE_ID'),
      *('HUMAN_ORTHOLOG_SYMBOL', 'HUMAN_ORTHOLOG_RGD'),
      *('HUMAN_ORTHOLOG_NCBI_GENE_ID', 'HUMAN_ORTHOLOG_SOURCE'),
      *('MOUSE_ORTHOLOG_SYMBOL', 'MOUSE_ORTHOLOG_RGD'),
      *('MOUSE_ORTHOLOG_NCBI_GENE_ID', 'MOUSE_ORTHOLOG_MGI'),
      *('MOUSE_ORTHOLOG_SOURCE', 'HUMAN_ORTHOLOG_HGNC_ID'),
    ),
    ('Aaa', 61, 31, 'AAA', 1, 11, 'HGNC', 'Aaa', 3, 21, 'MGI:1', 'x', 'HGNC:1'),
    ('Bbb', 62, 32, 'BBB', 1, 12, 'HGNC', '', '', '', '', '', 'HGNC:2'),
    ('Bbb7', 69, 4444, 'BBB', 1, 12, 'HGNC', '', '', '', '', '', 'HGNC:2'),
  ),
  'mart_export.txt': tsv(
    (
      *('Gene stable ID', 'Gene name', 'Rat gene stable ID', 'Rat gene name'),
      *('Rat homology type', 'Rat orthology confidence [0 low, 1 high]'),
    ),
    (gene_id('human', 1), 'AAA', gene_id('rat', 1), 'Aaa', 'one2one', 1),
    (gene_id('human', 2), 'BBB', gene_id('rat', 2), 'Bbb', 'one2many', 1),
    (gene_id('human', 2), 'BBB', 'ENSRNOG00000077777', 'X', 'one2many', 1),
    (gene_id('human', 3), 'CCC', '', '', '', ''),
  ),
  'mgi_like.rpt': tsv(
    (
      *('DB Class Key', 'Common Organism Name', 'NCBI Taxon ID', 'Symbol'),
      *('EntrezGene ID', 'Mouse MGI ID', 'HGNC ID'),
    ),
    (1, 'human', 9606, 'AAA', 11, '', 'HGNC:1'),
    (1, 'rat', 10116, 'Aaa', 31, '', ''),
    (2, 'human', 9606, 'BBB', 12, '', 'HGNC:2'),
    (2, 'rat', 10116, 'Bbb', 32, '', ''),
    (2, 'rat', 10116, 'Bbb7', 4444, '', ''),
  ),
}


@pytest.mark.parametrize('name', ORTHOLOGUES)
def test_formats_of_orthologues(tmp_path, files, name):
  """Each says: AAA-Aaa one-to-one, BBB-Bbb not, for a gene not in the table."""
  path = write(tmp_path / name, ORTHOLOGUES[name])
  every = (species(files, 'human', 'hgnc'), species(files, 'rat', 'rgd', 'gene_info'))  # fmt: skip
  table = gene_tables.build_recipe(gene_tables.Recipe(every, (path,)))
  found = groups(table)
  assert found['AAA human'] == found['Aaa rat'] == '1'
  assert found['BBB human'] == found['Bbb rat'] == 'many2'
  assert sum(map(bool, found.values())) == 4


def test_the_first_table_is_trusted_most(tmp_path, files):
  wrong = write(
    tmp_path / 'wrong.tsv',
    compara(('human', 1, 'mouse', 9), ('human', 3, 'mouse', 8)),
  )
  found = groups(build(files, files['compara'], wrong))
  assert found['AAA human'] == found['Aaa mouse']
  assert found['CCC human'] == found['Gm8 mouse'] != ''


KEYS = st.tuples(st.integers(0, 2), st.integers(0, 5))
CLASSES = st.lists(st.sets(KEYS, min_size=2, max_size=3), max_size=8)


def lookups(num):
  return [
    orthology.Lookup(
      f's{s}', {('gene_id', f'{s}-{i}'): f'{s}-{i}' for i in range(5)},
      frozenset(),
    )
    for s in range(num)
  ]  # fmt: skip


def as_table(classes):
  return orthology.Table(
    tuple(
      tuple(
        orthology.Member(f's{s}', (('gene_id', f'{s}-{i}'),), f'{s}-{i}')
        for s, i in sorted(members)
      )
      for members in classes
    )
  )


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(CLASSES)
def test_groups_of_any_classes(classes):
  """One-to-one groups have a gene a species; a third species adds, no more."""
  every = [*classes, *({(s, i)} for s in range(3) for i in range(5))]
  found, _ = orthology.group([as_table(every)], lookups(3))
  members = collections.defaultdict(list)
  for gene, name in found.items():
    if not name.startswith(gene_table.MANY_PREFIX):
      members[name].append(gene[0])
  for species_of in members.values():
    assert len(set(species_of)) == len(species_of) > 1
  for name in found.values():
    base = name.removeprefix(gene_table.MANY_PREFIX)
    of = {g[0] for g, n in found.items() if n.endswith(base) and n.removeprefix(gene_table.MANY_PREFIX) == base}  # fmt: skip
    assert len(of) > 1
  # Pairs of the first two species do not depend on the third.
  two, _ = orthology.group([as_table(every)], lookups(2))

  def pairs(groups):
    plain = {g: n for g, n in groups.items() if not n.startswith('many')}
    return {
      (a, b)
      for a in plain
      for b in plain
      if a[0] == '0' and b[0] == '1' and plain[a] == plain[b]
    }

  assert pairs(found) == pairs(two)


def command(*words):
  return ['prep', 'genes', *map(str, words)]


def test_the_command(files, tmp_path, capsys):
  out, vocab, changes = (
    tmp_path / n for n in ('g.tsv.gz', 'v.tsv.gz', 'c.tsv')
  )
  words = command(
    *('-o', out, '--vocabulary', vocab, '--changes', changes),
    *('--annotation', f'human={files["human"]}', f'mouse={files["mouse"]}'),
    *('--annotation', f'rat={files["rat"]}'),
    *('--names', f'human={files["hgnc"]}', f'rat={files["rgd"]}'),
    *('--orthologues', files['compara'], '--biotypes', 'protein_coding'),
  )
  assert cli.main(words) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f'{out}: 17 genes'
  assert 'human: 5 genes: 5 protein_coding' in lines
  assert 'rat: only here' in lines
  table = gene_table.GeneTable.load(out)
  assert table.species == ('human', 'mouse', 'rat')
  assert vocabulary.Vocabulary.load(vocab).species == table.species
  head, first, *_ = changes.read_text().splitlines()
  assert head.split('\t')[2:] == ['change', 'before', 'after']
  assert first.split('\t')[0] == 'human'
  same = out.read_bytes()
  assert cli.main(words) == errors.EXIT_USAGE
  assert '--overwrite' in capsys.readouterr().err
  words += ['--overwrite', '--compare', str(out)]
  assert cli.main(words) == 0
  assert 'human: 0 genes added, 0 removed' in capsys.readouterr().out
  assert out.read_bytes() == same


@pytest.mark.parametrize(
  'name', ['MRK_List2.rpt', 'GENES_RAT.txt', 'gene_info']
)
def test_a_row_that_was_cut_is_one_line(tmp_path, name):
  text = {
    'MRK_List2.rpt': MRK_LIST2, 'GENES_RAT.txt': RGD, 'gene_info': GENE_INFO,
  }[name]  # fmt: skip
  path = tmp_path / name
  path.write_text(text + '\n')  # a blank line is none
  assert gene_formats.read_names(str(path), {'Aaa'})[0]
  lines = text.splitlines()
  path.write_text('\n'.join([*lines[:-1], lines[-1].rpartition('\t')[0]]))
  with pytest.raises(
    errors.UserError, match=f'line {len(lines)} has .* columns'
  ):
    gene_formats.read_names(str(path), {'Aaa'})
  with pytest.raises(
    errors.UserError, match=f'line {len(lines)} has .* columns'
  ):
    list(gene_formats.rows(str(path)))


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--annotation', 'human.gtf.gz'), 'SPECIES=FILE'),
    (('--annotation', 'Human=human.gtf.gz'), 'small letters'),
    (('--annotation', 'human=none.gtf'), 'no such file'),
    (('--annotation', 'human=cut.gtf.gz'), 'damaged file'),
    (('--annotation', 'human=hgnc.txt'), 'no GTF'),
    (('--annotation', 'human=short.gtf'), '8 columns'),
    (('--annotation', 'human=human.gtf.gz', 'human=rat.gtf'), 'twice'),
    (('--annotation', 'human=rat.gtf', 'rat=rat.gtf'), 'each species its own'),
    (
      ('--annotation', 'human=human.gtf.gz', '--names', 'rat=GENES_RAT.txt'),
      'no --annotation',
    ),
    (
      ('--annotation', 'human=human.gtf.gz', '--names', 'human=rat.gtf'),
      'no naming table',
    ),
    (
      ('--annotation', 'human=human.gtf.gz', 'mouse=mouse.gtf.gz')
      + ('--orthologues', 'hgnc.txt'),
      'no table of orthologues',
    ),
    (
      ('--annotation', 'human=human.gtf.gz', 'rat=rat.gtf')
      + ('--orthologues', 'other.tsv'),
      'relates no genes',
    ),
    (
      ('--annotation', 'human=human.gtf.gz', '--biotypes', 'IG_C_gene'),
      'no gene of the biotypes IG_C_gene; it has lncRNA',
    ),
    (('--annotation', 'human=bytes.gtf'), 'no text'),
  ],
)
def test_mistakes_are_one_line(
  files, tmp_path, words, message, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  whole = (tmp_path / 'human.gtf.gz').read_bytes()
  (tmp_path / 'cut.gtf.gz').write_bytes(whole[: len(whole) // 2])
  line = ensembl_gtf('human', HUMAN).splitlines()[2]
  bad = line.rpartition('\t')[0]
  write(tmp_path / 'short.gtf', f'{line}\n{bad}\n')
  write(tmp_path / 'other.tsv', compara(('human', 1, 'mouse', 1)))
  (tmp_path / 'bytes.gtf').write_bytes(b'\xff\xfe\x00' * 50)
  before = sorted(p.name for p in tmp_path.iterdir())
  assert cli.main(command('-o', 'out.tsv', *words)) == errors.EXIT_USAGE
  (error,) = capsys.readouterr().err.strip().splitlines()
  assert message in error
  assert sorted(p.name for p in tmp_path.iterdir()) == before


def _cell(text, line, column, value):
  lines = text.splitlines()
  cells = lines[line].split('\t')
  cells[column] = value
  lines[line] = '\t'.join(cells)
  return '\n'.join(lines) + '\n'


@pytest.mark.parametrize(
  ('name', 'flag', 'damage', 'message'),
  [
    (
      'hgnc',
      'names',
      lambda t: t.rstrip()[:-12].rpartition('\t')[0],
      'columns',
    ),
    ('hgnc', 'names', lambda t: _cell(t, 1, 2, 'x' * 200_000), 'line 2'),
    ('hgnc', 'names', lambda t: t.replace('locus_type', 'type'), 'locus_type'),
    (
      'gene_info',
      'names',
      lambda t: t.replace('Synonyms', 'Others'),
      'Synonyms',
    ),
    ('human', 'annotation', lambda t: _cell(t, 5, 3, '12x'), "'12x'"),
    (
      'human',
      'annotation',
      lambda t: (
        t.replace('\tgene\t', '\tgene\t\0').encode().replace(b'\0', b'\xe9')
      ),
      'is no text',
    ),
    (
      'compara',
      'orthologues',
      lambda t: t.replace('homology_type', 'type'),
      'homology_type',
    ),
  ],
)
def test_damaged_tables_are_one_line(
  files, tmp_path, name, flag, damage, message, capsys
):
  data = pathlib.Path(files[name]).read_bytes()
  data = gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data
  text = damage(data.decode())
  bad = tmp_path / 'bad.tsv'
  bad.write_bytes(text if isinstance(text, bytes) else text.encode())
  given = {
    'annotation': f'human={files["human"]}',
    'names': '',
    'orthologues': '',
  }
  given[flag] = str(bad) if flag == 'orthologues' else f'human={bad}'
  words = ['--annotation', given['annotation'], f'mouse={files["mouse"]}']
  words += ['--names', given['names']] * bool(given['names'])
  words += ['--orthologues', given['orthologues']] * bool(given['orthologues'])
  out = tmp_path / 'out.tsv'
  assert cli.main(command('-o', str(out), *words)) == errors.EXIT_USAGE
  (error,) = capsys.readouterr().err.strip().splitlines()
  assert message in error and str(bad) in error
  assert not out.exists()


def test_a_byte_order_mark_changes_nothing(files, tmp_path):
  table = build(files)
  for name, path in files.items():
    data = pathlib.Path(path).read_bytes()
    data = gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data
    if name != 'mrk_ensembl':
      pathlib.Path(path).write_bytes(b'\xef\xbb\xbf' + data)
  assert build(files).columns() == table.columns()


def test_real_tables_as_gtf(real_data, tmp_path):
  """An Ensembl release as GTF beside HGNC and MGI: what the default holds."""
  annotation = real_data / 'gene_annotation_ensembl'
  orthologues = real_data / 'orthologs_human_mouse'
  gtf = {}
  for name, source in (('human', 'grch38'), ('mouse', 'grcm38')):
    rows = gene_formats.read_table(str(annotation / f'{source}.tsv.gz'))
    lines, seen = [], set()
    for row in rows:
      if row['ensgene'] not in seen and row['biotype'] == 'protein_coding':
        seen.add(row['ensgene'])
        lines.append(
          f'{row["chr"]}\thavana\tgene\t{row["start"]}\t{row["end"]}\t.\t+\t.\t'
          f'gene_id "{row["ensgene"]}"; gene_name "{row["symbol"]}"; '
          f'gene_biotype "{row["biotype"]}";'
        )
    gtf[name] = write(tmp_path / f'{name}.gtf.gz', '\n'.join(lines) + '\n')
  mgi = str(orthologues / 'HOM_MouseHumanSequence.rpt.gz')
  hgnc = str(real_data / 'hgnc_genes_and_groups/hgnc_genes.tsv.gz')
  table = gene_tables.build_recipe(
    gene_tables.Recipe(
      (
        gene_tables.SpeciesSources('human', gtf['human'], (), (hgnc,)),
        gene_tables.SpeciesSources('mouse', gtf['mouse'], (), (mgi,)),
      ),
      (mgi,),
    )
  )
  print('\n'.join(gene_reports.describe(table)))
  assert 19_500 < int(table.header['human protein_coding']) < 20_500
  assert int(table.header['human-mouse one2one']) > 16_000
  default = gene_table.GeneTable.default()
  found = list(gene_reports.changes(default, table))
  counts = collections.Counter((c.species, c.kind) for c in found)
  print(counts)
  assert 100 < counts['human', 'symbol'] < 500
  # Alternative haplotypes are names of the genes, not genes.
  row = next(g for g, s in enumerate(table.symbols) if s == 'HLA-B')
  assert 'ENSG00000223532' in table.aliases[row]
