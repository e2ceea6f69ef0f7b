"""Identifiers as files hold them -> genes of the default table."""

import anndata
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from genecompass_jax import errors, gene_ids, gene_table

HUMAN, MOUSE = 0, 1
TABLE = gene_table.GeneTable.default()
ROWS = [np.flatnonzero(TABLE.species_G == s) for s in (HUMAN, MOUSE)]


def symbol_of(gene_id: str | None) -> str | None:
  return None if gene_id is None else TABLE.symbols[TABLE.row_of[gene_id]]


@pytest.mark.parametrize(
  ('identifier', 'species', 'symbol', 'how'),
  [
    ('TP53', HUMAN, 'TP53', 'symbol'),
    (' TP53 ', HUMAN, 'TP53', 'symbol'),
    ('tp53', HUMAN, 'TP53', 'symbol'),
    ('p53', HUMAN, 'TP53', 'alias'),
    ('7157', HUMAN, 'TP53', 'entrez'),
    ('7157.0', HUMAN, 'TP53', 'entrez'),
    ('ENSG00000141510', HUMAN, 'TP53', 'ensembl'),
    ('ENSG00000141510.18', HUMAN, 'TP53', 'ensembl'),
    ('ensg00000141510', HUMAN, 'TP53', 'ensembl'),
    ('TP53_ENSG00000141510', HUMAN, 'TP53', 'ensembl'),
    ('ENSG00000002586.20_PAR_Y', HUMAN, 'CD99', 'ensembl'),
    ('Trp53', MOUSE, 'Trp53', 'symbol'),
    ('ENSMUSG00000059552.14', MOUSE, 'Trp53', 'ensembl'),
    ('22059', MOUSE, 'Trp53', 'entrez'),
    ('mt-Co1', MOUSE, 'mt-Co1', 'symbol'),
    # Former symbols: renamed genes of older references.
    ('SEPT1', HUMAN, 'SEPTIN1', 'alias'),
    ('FAM46C', HUMAN, 'TENT5C', 'alias'),
    ('C1orf112', HUMAN, 'FIRRM', 'alias'),
    ('MLL2', HUMAN, 'KMT2D', 'alias'),  # and a nickname of KMT2B
    ('Gnb2l1', MOUSE, 'Rack1', 'alias'),
    # Retired and alternative-haplotype ids.
    ('ENSG00000148362', HUMAN, 'PAXX', 'alias'),
    ('ENSG00000223532', HUMAN, 'HLA-B', 'alias'),
    # Only on an alternate locus.
    ('GSTT1', HUMAN, 'GSTT1', 'symbol'),
    ('NOV', HUMAN, 'CCN3', 'alias'),
    ('ASP', HUMAN, None, 'ambiguous'),
    ('', HUMAN, None, 'lost'),
    ('no such gene', HUMAN, None, 'lost'),
    ('ENSG00000141510', MOUSE, None, 'lost'),
    ('1-Mar', HUMAN, None, 'lost'),  # what a spreadsheet makes of MARCHF1
  ],
)
def test_one_identifier(identifier, species, symbol, how):
  resolution = gene_ids.resolve([identifier], species, TABLE)
  assert symbol_of(resolution.gene_ids[0]) == symbol
  assert resolution.how == (how,)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.sampled_from([HUMAN, MOUSE]), st.data())
def test_a_current_name_always_wins(species, data):
  g = int(ROWS[species][data.draw(st.integers(0, len(ROWS[species]) - 1))])
  gene_id, symbol = TABLE.gene_ids[g], TABLE.symbols[g]
  names = [
    gene_id,
    f'{gene_id}.7',
    symbol,
    *filter(None, TABLE.entrez[g].split('|')),
  ]
  found = gene_ids.resolve(names, species, TABLE)
  assert set(found.gene_ids) == {gene_id}
  for alias in TABLE.aliases[g]:
    (found_id,), (how,) = (
      (r := gene_ids.resolve([alias], species, TABLE)).gene_ids,
      r.how,
    )
    assert (found_id, how) in {(gene_id, 'alias'), (None, 'ambiguous')}


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.lists(st.text(max_size=12), max_size=5))
def test_any_text_is_answered(names):
  for species in (HUMAN, MOUSE):
    resolution = gene_ids.resolve(names, species, TABLE)
    assert len(resolution.gene_ids) == len(resolution.how) == len(names)
    for gene_id, how in zip(resolution.gene_ids, resolution.how):
      assert how in gene_ids.HOW
      assert (gene_id is None) == (how in ('lost', 'ambiguous'))
  try:
    assert gene_ids.infer_species(names, TABLE) in (HUMAN, MOUSE)
  except errors.UserError as error:
    assert '--species' in str(error) and '\n' not in str(error)


def test_small_table_precedence_and_letter_case():
  table = gene_table.GeneTable(
    gene_ids=('ENSG00000000001', 'ENSG00000000002', 'ENSG00000000003'),
    symbols=('Ab', 'AB', 'C'),
    aliases=(('C', 'N', 'M'), ('M',), ('X',)),
    entrez=('5', '5', '6'),
    species_G=np.zeros(3, np.int8),
    biotypes=('',) * 3,
    orthologue_groups=('',) * 3,
  )
  names = ['Ab', 'AB', 'ab', 'C', 'c', 'n', 'M', 'm', '5', '6', 'x']
  found = gene_ids.resolve(names, HUMAN, table)
  rows = [None if i is None else int(i[-1]) for i in found.gene_ids]
  assert rows == [1, 2, None, 3, 3, 1, None, None, None, 3, 3]
  ambiguous = [n for n, h in zip(names, found.how) if h == 'ambiguous']
  assert ambiguous == ['ab', 'M', 'm', '5']


def test_report_counts_duplicates_and_umis():
  names = ['TP53', 'p53', '7157', 'ASP', 'unknown', 'more unknown']
  resolution = gene_ids.resolve(names, HUMAN, TABLE)
  report = resolution.report([10, 5, 5, 20, 20, 40])
  assert report['genes'] == 1
  assert report['duplicates'] == 2
  assert report['share_mapped'] == pytest.approx(0.5)
  assert report['share_umis_lost'] == pytest.approx(0.8)
  assert report['examples_lost'] == ['more unknown', 'unknown']
  assert report['examples_ambiguous'] == ['ASP']
  assert sum(report[how] for how in gene_ids.HOW) == report['inputs'] == 6
  assert resolution.report()['examples_lost'] == ['unknown', 'more unknown']
  with pytest.raises(ValueError, match='6 identifiers'):
    resolution.report([1, 2])
  empty = gene_ids.resolve([], HUMAN, TABLE).report([])
  assert empty['share_mapped'] == empty['share_umis_lost'] == 0


def test_too_few_known_is_refused():
  resolution = gene_ids.resolve(['TP53', 'q1', 'q2', 'q3'], HUMAN, TABLE)
  with pytest.raises(errors.UserError, match='25% of 4 .*q1, q2, q3.*--ids-of'):
    gene_ids.check_share_known(resolution)
  gene_ids.check_share_known(resolution, minimum=0.25)


def test_human_identifiers_in_mouse_cells():
  names = ['TP53', 'SOX2', 'ENSG00000141510', 'GAPDH', 'Trp53']
  found = gene_ids.resolve(names, MOUSE, TABLE, ids_of=HUMAN)
  assert list(map(symbol_of, found.gene_ids)) == [
    *('Trp53', 'Sox2', 'Trp53'),
    *(None, None),  # GAPDH has three mouse orthologues
  ]
  assert found.how[:3] == ('symbol', 'symbol', 'ensembl')
  assert found.species == MOUSE
  same = gene_ids.resolve(names, HUMAN, TABLE, ids_of=HUMAN)
  assert same == gene_ids.resolve(names, HUMAN, TABLE)


def symbols(species, n=4000, seed=0):
  rows = [
    g
    for g in ROWS[species]
    if TABLE.biotypes[g] == 'protein_coding'
    and TABLE.symbols[g] != TABLE.gene_ids[g]
  ]
  picks = np.random.default_rng(seed).choice(rows, n, replace=False)
  return [TABLE.symbols[g] for g in picks]


@pytest.mark.parametrize('species', [HUMAN, MOUSE])
def test_species_of_clear_cases(species):
  rows = ROWS[species][:3000]
  ids = [TABLE.gene_ids[g] for g in rows]
  assert gene_ids.infer_species(ids, TABLE) == species
  assert gene_ids.infer_species([f'{i}.3' for i in ids], TABLE) == species
  names = symbols(species)
  for case in (str, str.upper, str.lower, str.title):  # case decides nothing
    assert gene_ids.infer_species(list(map(case, names)), TABLE) == species
  entrez = [TABLE.entrez[g].split('|')[0] for g in ROWS[species]]
  entrez = [number for number in entrez if number][:3000]
  assert gene_ids.infer_species(entrez, TABLE) == species
  # Stable ids of unnamed genes outweigh the letter case of the others.
  mixed = ids[:50] + list(map(str.upper, symbols(1 - species, 500)))
  assert gene_ids.infer_species(mixed, TABLE) == species


def test_species_in_doubt_is_refused():
  human, mouse = ([TABLE.gene_ids[g] for g in r[:100]] for r in ROWS)
  mouse_names = {TABLE.symbols[g].casefold() for g in ROWS[MOUSE]}
  shared = [
    TABLE.symbols[g]
    for g in ROWS[HUMAN]
    if TABLE.symbols[g].casefold() in mouse_names
  ]
  for names in (
    [],
    ['nan', ''],
    ['unknown', 'names'],
    [str(i) for i in range(20_000)],
    human + mouse,
    shared,
    symbols(HUMAN, 200) + symbols(MOUSE, 200),
  ):
    with pytest.raises(errors.UserError, match='--species'):
      gene_ids.infer_species(names, TABLE)
  with pytest.raises(errors.UserError, match='ENSRNOG'):
    gene_ids.infer_species(['ENSRNOG00000000001'] * 20, TABLE)


def test_choice_of_identifiers():
  rows = ROWS[HUMAN][:2000]
  stable = [TABLE.gene_ids[g] for g in rows]
  other = {
    'feature_types': ['Gene Expression'] * 2000,
    'chromosome': [str(i % 22 + 1) for i in range(2000)],
    'n_cells': [str(i % 900) for i in range(2000)],
  }
  choice = gene_ids.choose_identifiers(
    list(map(str, range(2000))), {**other, 'gene_ids': stable}, TABLE
  )
  assert (choice.column, choice.species) == ('gene_ids', HUMAN)
  choice = gene_ids.choose_identifiers(
    [TABLE.symbols[g] for g in rows], {**other, 'gene_ids': stable}, TABLE
  )
  assert (choice.column, choice.contradicts_index) == ('gene_ids', False)
  choice = gene_ids.choose_identifiers(stable, other, TABLE)
  assert (choice.column, choice.species) == (None, HUMAN)
  # Shifted by one: the index names other genes than the column.
  choice = gene_ids.choose_identifiers(
    [TABLE.symbols[g] for g in np.roll(rows, 1)], {'ids': stable}, TABLE
  )
  assert (choice.column, choice.contradicts_index) == ('ids', True)
  assert f'{len(rows):,} of {len(rows):,} genes differ' in choice.reason
  with pytest.raises(errors.UserError, match='--ids-of human'):
    gene_ids.choose_identifiers(stable, {}, TABLE, species=MOUSE)
  mouse = [TABLE.gene_ids[g] for g in ROWS[MOUSE][:2000]]
  with pytest.raises(errors.UserError, match='disagree.*--species'):
    gene_ids.choose_identifiers(stable, {'mouse': mouse}, TABLE)
  with pytest.raises(errors.UserError, match='--species'):
    gene_ids.choose_identifiers(list(map(str, range(2000))), other, TABLE)


def test_mouse_ids_beside_symbols_in_human_letters_are_no_contradiction():
  rows = [g for g in ROWS[MOUSE][:2000] if TABLE.symbols[g] in TABLE.symbols]
  choice = gene_ids.choose_identifiers(
    [TABLE.symbols[g].upper() for g in rows],
    {'ids': [TABLE.gene_ids[g] for g in rows]},
    TABLE,
  )
  assert (choice.column, choice.species) == ('ids', MOUSE)
  assert 'names the same genes, in the letter case of human' in choice.reason


def test_row_numbers_are_no_entrez_ids():
  # Most of the first 50 numbers are human genes.
  for first in (0, 1):
    numbers = [str(k) for k in range(first, first + 50)]
    for columns in ({}, {'old_index': numbers}):
      with pytest.raises(errors.UserError, match='have no names'):
        gene_ids.choose_identifiers(numbers, columns, TABLE, species=HUMAN)
    symbols = [TABLE.symbols[g] for g in ROWS[HUMAN][:30]] + ['?'] * 20
    choice = gene_ids.choose_identifiers(
      numbers, {'symbol': symbols}, TABLE, species=HUMAN
    )
    assert (choice.column, choice.contradicts_index) == ('symbol', False)
  some = ['1', '2', '9', '10', '12', '13', '14', '15']
  assert (
    gene_ids.choose_identifiers(some, {}, TABLE, species=HUMAN).column is None
  )


# Data set, species, identifiers used, and lower bounds of what is known: share
# of identifiers, share of counts. What is lost: pseudogenes, mitochondrial
# rRNA and other biotypes outside the table.
REAL = [
  ('kang_pbmc_ifnb_scgen', HUMAN, None, 0.98, 0.999),
  ('kang_pbmc_ifnb_harmony', HUMAN, None, 0.99, 0.998),
  ('kang_pbmc_ifnb_muscat', HUMAN, None, 0.998, 0.999),
  ('pbmc68k_reduced_counts', HUMAN, None, 0.99, 0.998),
  ('sc_mixology_lung_lines', HUMAN, None, 0.70, 0.83),
  ('mouse_brain_merfish', MOUSE, None, 0.997, 0.994),
  ('mouse_embryo_E35_E45', MOUSE, 'ensembl_id', 0.93, 0.968),
  ('perturb_fish_astrocytes', HUMAN, None, 1.0, 1.0),
]


@pytest.mark.parametrize(('name', 'species', 'column', 'ids', 'counts'), REAL)
def test_real_data(real_data, name, species, column, ids, counts):
  data = anndata.read_h5ad(real_data / name / f'{name}.h5ad')
  columns = {key: list(data.var[key].astype(str)) for key in data.var}
  choice = gene_ids.choose_identifiers(list(data.var_names), columns, TABLE)
  print(name, choice)
  assert (choice.species, choice.column) == (species, column)
  assert choice.contradicts_index == (column is not None)
  used = data.var_names if column is None else columns[column]
  resolution = gene_ids.resolve(list(used), species, TABLE)
  gene_ids.check_share_known(resolution)
  report = resolution.report(np.asarray(data.X.sum(0)).ravel())
  print(report)
  assert report['share_mapped'] >= ids
  assert 1 - report['share_umis_lost'] >= counts
  # Letter case alone never changes the species that is inferred.
  for case in (str.upper, str.title):
    names = list(map(case, data.var_names))
    assert gene_ids.infer_species(names, TABLE) == species


def test_mouse_cells_with_human_identifiers(real_data):
  name = 'baron_pancreas_human_mouse'
  data = anndata.read_h5ad(real_data / name / f'{name}.h5ad')
  index = list(data.var_names)
  columns = {key: list(data.var[key].astype(str)) for key in data.var}
  # An index of orthologues with old symbols leaves the species in doubt.
  with pytest.raises(errors.UserError, match='--species'):
    gene_ids.infer_species(index, TABLE)
  with pytest.raises(errors.UserError, match='--ids-of human'):
    gene_ids.choose_identifiers(index, columns, TABLE, species=MOUSE)
  choice = gene_ids.choose_identifiers(index, columns, TABLE, species=HUMAN)
  assert choice.column is None
  human = gene_ids.resolve(index, HUMAN, TABLE)
  mouse = gene_ids.resolve(index, MOUSE, TABLE, ids_of=HUMAN)
  umis = np.asarray(data.X[(data.obs['species'] == 'mouse').values].sum(0))
  report = mouse.report(umis.ravel())
  print(human.share_mapped, report)
  assert human.share_mapped > 0.99
  assert mouse.share_mapped > 0.96
  assert all(i is None or i.startswith('ENSMUSG') for i in mouse.gene_ids)


def rat_table() -> gene_table.GeneTable:
  """The genes of the default table, those of mouse once more as rat's.

  Every tenth symbol is rat's own, as is every Entrez id.
  """
  keep = np.zeros(len(TABLE), bool)
  for rows in ROWS:
    keep[rows[:6000]] = True
  two = TABLE.subset(keep)
  mouse = np.flatnonzero(two.species_G == MOUSE).tolist()

  def with_rat(values, change):
    return (*values, *(change(i, values[g]) for i, g in enumerate(mouse)))

  return gene_table.GeneTable(
    gene_ids=with_rat(
      two.gene_ids, lambda i, x: x.replace('ENSMUSG', 'ENSRNOG')
    ),
    symbols=with_rat(
      two.symbols,
      lambda i, x: (
        x.replace('ENSMUSG', 'ENSRNOG')
        if x.startswith('ENS')
        else x
        if i % 10
        else f'RGD{i}'
      ),
    ),
    aliases=with_rat(two.aliases, lambda i, x: ()),
    entrez=with_rat(two.entrez, lambda i, x: f'{900_000 + i}'),
    species_G=np.append(two.species_G, np.full(len(mouse), 2)),
    biotypes=with_rat(two.biotypes, lambda i, x: x),
    orthologue_groups=with_rat(two.orthologue_groups, lambda i, x: x),
    species=('human', 'mouse', 'rat'),
  )


def test_a_third_species_is_learned_from_the_table():
  table = rat_table()
  rows = [np.flatnonzero(table.species_G == s) for s in range(3)]
  for species in range(3):
    ids = [table.gene_ids[g] for g in rows[species]]
    assert gene_ids.infer_species(ids, table) == species
    numbers = [n for g in rows[species] if (n := table.entrez[g])][:500]
    numbers = [n.split('|')[0] for n in numbers]
    assert gene_ids.infer_species(numbers, table) == species
    names = [
      table.symbols[g]
      for g in rows[species]
      if table.symbols[g] != table.gene_ids[g]
    ]
    assert gene_ids.infer_species(names, table) == species
    choice = gene_ids.choose_identifiers(names, {}, table)
    assert choice.species == species
  # Mouse and rat write most symbols alike: those alone leave a doubt.
  both = {table.symbols[g] for g in rows[1]} & {
    table.symbols[g] for g in rows[2]
  }
  with pytest.raises(
    errors.UserError, match='--species mouse or --species rat'
  ):
    gene_ids.infer_species(sorted(both), table)
  with pytest.raises(errors.UserError, match='neither human nor mouse nor rat'):
    gene_ids.infer_species(['ENSDARG00000000001'] * 9, table)
  with pytest.raises(errors.UserError, match='--ids-of rat'):
    gene_ids.choose_identifiers(
      [table.gene_ids[g] for g in rows[2]], {}, table, species=0
    )


def test_rat_identifiers_in_human_cells_and_back():
  table = rat_table()
  rats = {
    table.orthologue_groups[r]: r
    for r in np.flatnonzero(table.species_G == 2)
    if table.is_one_to_one(r)
  }
  g, rat = next(
    (g, rats[group])
    for g, group in enumerate(table.orthologue_groups)
    if group in rats
  )
  found = gene_ids.resolve([table.gene_ids[rat]], 0, table, ids_of=2)
  assert found.gene_ids == (table.gene_ids[g],)
  back = gene_ids.resolve([table.gene_ids[g]], 2, table, ids_of=0)
  assert back.gene_ids == (table.gene_ids[rat],)
  assert back.report()['species'] == 'rat'


def test_identifiers_of_other_databases():
  table = gene_table.GeneTable(
    gene_ids=('ENSG00000000001', 'FBgn0000008', 'FBgn0000014'),
    symbols=('A', 'a', 'abd-A'),
    aliases=((),) * 3,
    entrez=('',) * 3,
    species_G=np.array([0, 1, 1]),
    biotypes=('',) * 3,
    orthologue_groups=('',) * 3,
    species=('human', 'fly'),
  )
  assert gene_ids.infer_species(['FBgn0000008', 'FBgn0999999'], table) == 1
  found = gene_ids.resolve(['FBgn0000014', 'FBgn0999999'], 1, table)
  assert found.gene_ids == ('FBgn0000014', None)
  assert found.how == ('ensembl', 'lost')


def test_a_small_table_still_knows_the_prefixes_of_its_species():
  human = TABLE.subset(TABLE.species_G == HUMAN)
  assert gene_ids.infer_species(['ENSMUSG00000059552'], human) == MOUSE
