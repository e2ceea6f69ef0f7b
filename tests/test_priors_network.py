"""Networks: what tables say, what is lost, held out, lifted and rewired."""

import gzip
import runpy
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from genecompass_jax import errors, gene_table
from genecompass_jax.prepare.priors import (
  edges,
  families,
  holdout,
  names,
  network,
  pairs as pairs_lib,
)
from tests.conftest import ROOT

GENES = gene_table.GeneTable.default()


def row(symbol, species=0):
  (found,), _ = names.rows([symbol], species, GENES)
  assert found >= 0
  return int(found)


def written(path, text):
  data = text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


def said(found):
  """Edges as symbols."""
  return {
    (GENES.symbols[a], GENES.symbols[b])
    for a, b in zip(found.tf_N, found.target_N)
  }


def test_collectri_with_complexes_and_losses(tmp_path):
  path = written(
    tmp_path / 'collectri.csv.gz',
    '"source","target","weight"\n"MYC","TERT",1\n"NFKB","TNF",-1\n'
    '"AP1","hsa-miR-98-5p",1\n"NFKB","IL6",0.5\n',
  )
  found = edges.read(edges.EdgeTable(path, 0, 'collectri'), GENES)
  parts = set(edges.COMPLEXES['NFKB'])
  assert said(found) == {('MYC', 'TERT')} | {
    (p, t) for p in parts for t in ('TNF', 'IL6')
  }
  assert set(found.weight_N) == {1.0, 0.5}  # signs are dropped
  assert found.facts['edges_in_file'] == 4
  assert found.facts['edges_after_complexes'] == 1 + 5 + 5 + 7
  assert found.facts['edges_kept'] == 11
  assert found.facts['targets']['examples_lost'] == ['hsa-miR-98-5p']
  assert len(found.facts['sha256']) == 64


def test_dorothea_trrust_and_any_table(tmp_path):
  dorothea = written(
    tmp_path / 'd.tsv',
    'tf\tconfidence\ttarget\tmor\nGata1\tA\tHba-a1\t1.0\nGata1\tE\tActb\t1\n',
  )
  found = edges.read(edges.EdgeTable(dorothea, 1, 'dorothea'), GENES)
  assert said(found) == {('Gata1', 'Hba-a1')}
  with pytest.raises(errors.UserError, match='no edge of confidence B'):
    edges.read(edges.EdgeTable(dorothea, 1, 'dorothea', confidence='B'), GENES)
  trrust = written(tmp_path / 't.tsv', 'AATF\tBAX\tRepression\t22909821\n')
  found = edges.read(edges.EdgeTable(trrust, 0, 'trrust'), GENES)
  assert said(found) == {('AATF', 'BAX')}
  plain = written(
    tmp_path / 'p.tsv', 'score\tgene\treg\n2\t596\tENSG00000136997.5\n'
  )
  source = edges.EdgeTable(
    plain, 0, 'table', weight=0.5, columns=('reg', '2', 'score')
  )
  found = edges.read(source, GENES)  # Ensembl id with version, and Entrez
  assert said(found) == {('MYC', 'BCL2')}
  assert found.weight_N.tolist() == [1.0]
  joined = written(tmp_path / 'j.tsv', 'a\tb\nJUN::FOS\tMYC\n')
  found = edges.read(edges.EdgeTable(joined, 0, 'table'), GENES)
  assert said(found) == {('JUN', 'MYC'), ('FOS', 'MYC')}


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'not a table'),
    ('source,target,weight\n', 'without rows'),
    ('a,b\nMYC,TERT\n', "no column 'source'"),
    ('source,target,weight\nMYC,TERT,x\n', "'x' is no number"),
    ('source,target,weight\nFOO1,BAR1,1\nBAR2,BAR3,1\n',
     'are human genes'),
    ('source,target,weight\nMYC,TERT,1\na,b,c,d,e\n', 'not a table'),
  ],
)  # fmt: skip
def test_damaged_edges_are_one_line(tmp_path, text, message):
  path = written(tmp_path / 'e.csv', text)
  with pytest.raises(errors.UserError, match=message) as error:
    edges.read(edges.EdgeTable(path, 0, 'collectri'), GENES)
  assert '\n' not in str(error.value)
  assert 'e.csv' in str(error.value)


def test_a_cut_file_and_an_unknown_format_are_one_line(tmp_path):
  whole = gzip.compress(b'AATF\tBAX\n' * 9000)
  (tmp_path / 'e.tsv.gz').write_bytes(whole[: len(whole) // 2])
  path = str(tmp_path / 'e.tsv.gz')
  with pytest.raises(errors.UserError, match='damaged file'):
    edges.read(edges.EdgeTable(path, 0, 'trrust'), GENES)
  with pytest.raises(errors.UserError, match='no format of edges'):
    edges.EdgeTable(path, 0, 'regnetwork')
  with pytest.raises(errors.UserError, match='no such file'):
    edges.read(edges.EdgeTable(str(tmp_path / 'no'), 0, 'trrust'), GENES)


def table(rows, species=0, name='t'):
  tf, target, weight = zip(*rows)
  return edges.Edges(
    np.array(tf, np.int32),
    np.array(target, np.int32),
    np.array(weight, float),
    species,
    {'file': name},
  )


def test_merging_and_lifting():
  myc, tert, mouse = row('TP53'), row('TERT'), row('Trp53', 1)
  tables = [
    table([(myc, tert, 1.0), (myc, myc, 1.0)]),
    table([(myc, tert, 0.5)], name='u'),
    table([(mouse, row('Tert', 1), 0.2)], 1, 'm'),
  ]
  none = holdout.none(GENES)
  found, _ = network.build(tables, GENES, none)
  assert found.weight_N.tolist() == [1.0, 0.2]  # max; no self-loop
  assert found.source_N.tolist() == [0b011, 0b100]
  found, _ = network.build(tables, GENES, none, merge='sum')
  assert found.weight_N.tolist() == [1.5, 0.2]
  found, facts = network.build(tables, GENES, none, lift='both')
  assert found.source_N.tolist() == [0b111, 0b111]
  assert not found.is_lifted_N.any()  # each is known in its own species
  found, facts = network.build(tables[:1], GENES, none, lift='human')
  assert found.is_lifted_N.tolist() == [False, True]
  assert facts['edges']['mouse']['lifted_only'] == 1
  assert facts['sources'][0]['edges_lifted'] == 2


@pytest.fixture(scope='module')
def groups(tmp_path_factory):
  rows = ['group_id\tgroup_name\tsymbol\tensembl_gene_id']
  rows += [f'1\tGATA family\tGATA{i}\t' for i in range(1, 7)]
  rows += [f'2\tlarge\t{GENES.symbols[g]}\t' for g in range(300)]
  rows += ['2\tlarge\tMYC\t', '3\tMicroRNA host genes\tMYC\t',
           '3\tMicroRNA host genes\tTERT\t']  # fmt: skip
  path = tmp_path_factory.mktemp('groups') / 'groups.tsv'
  return families.read(written(path, '\n'.join(rows)), 0, GENES)


def test_paralogues_and_orthologues_are_held_out(groups):
  held = holdout.choose(['Gata1'], groups, GENES)  # named by the mouse symbol
  why = {(g['symbol'], g['species']): g['why'] for g in held.facts['genes']}
  assert why['Gata1', 'mouse'] == 'named'
  assert why['GATA1', 'human'] == 'orthologue'
  assert why['GATA2', 'human'] == 'paralogue'
  assert why['Gata6', 'mouse'] == 'orthologue'
  assert len(why) == 12
  held = holdout.choose(['MYC'], groups, GENES)
  assert held.facts['without_known_paralogues'] == ['MYC']
  assert held.facts['groups_too_large_for_paralogues'] == ['large']
  symbols = {GENES.symbols[g] for g in np.flatnonzero(held.is_held_G)}
  assert symbols == {'MYC', 'Myc', 'Bmyc'}  # orthologues of every kind
  with pytest.raises(errors.UserError, match="'FOO1'.*not a known"):
    holdout.choose(['FOO1'], groups, GENES)


def test_no_edge_touches_what_is_held_out(groups):
  gata, targets = row('GATA2'), [row('HBA1'), row('TP53')]
  tables = [
    table([(gata, t, 1.0) for t in targets] + [(row('TP53'), gata, 1.0)]),
    table([(row('Gata3', 1), row('Trp53', 1), 1.0)], 1),
    table([(row('SPI1'), row('TP53'), 1.0)]),
  ]
  held = holdout.choose(['GATA1'], groups, GENES)
  found, facts = network.build(tables, GENES, held, lift='both')
  assert [s['edges_held_out'] for s in facts['sources']] == [3, 1, 0]
  assert {GENES.symbols[g] for g in (*found.a_N, *found.b_N)} == {
    'SPI1', 'TP53', 'Spi1', 'Trp53',
  }  # fmt: skip
  with pytest.raises(errors.UserError, match='no edge is left'):
    network.build(tables[:2], GENES, held)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(10, 200))
def test_rewiring_keeps_degrees(seed, num_tfs, num_edges):
  rng = np.random.default_rng(seed)
  rows = np.flatnonzero(GENES.species_G == seed % 2)[:80].astype(np.int32)
  a_N, b_N = rng.choice(rows[:num_tfs], num_edges), rng.choice(rows, num_edges)
  zeros = np.zeros(num_edges, int)
  before = pairs_lib.collect(
    a_N, b_N, rng.random(num_edges) + 0.1, zeros, zeros.astype(bool), ['x']
  )
  after, _ = network.rewire(before, GENES, seed)
  for one, other in ((before.a_N, after.a_N), (before.b_N, after.b_N)):
    np.testing.assert_array_equal(np.sort(one), np.sort(other))
  assert (after.a_N != after.b_N).all()
  edges_after = set(zip(after.a_N.tolist(), after.b_N.tolist()))
  assert len(edges_after) == len(before)  # none stands twice
  again, _ = network.rewire(before, GENES, seed)
  np.testing.assert_array_equal(after.b_N, again.b_N)


def test_what_species_share_is_rewired_together(simulated_knowledge):
  """A lifted network is, rewired, one of a rewired network lifted over."""
  _, folder = simulated_knowledge
  path = str(folder / 'tf_target.human.tsv')
  found = edges.read(edges.EdgeTable(path, 0, 'trrust'), GENES)
  before, _ = network.build([found], GENES, holdout.none(GENES), lift='both')
  partner_G = names.orthologue_rows(GENES)

  def in_both(pairs):
    human = GENES.species_G[pairs.a_N] == 0
    mine = set(zip(pairs.a_N[human].tolist(), pairs.b_N[human].tolist()))
    return sum(
      (partner_G[a], partner_G[b]) in mine
      for a, b in zip(pairs.a_N[~human], pairs.b_N[~human])
    )

  mouse = int((GENES.species_G[before.a_N] == 1).sum())
  after, facts = network.rewire(before, GENES, 0)
  assert in_both(before) == in_both(after) == mouse == facts['edges_in_both']
  assert 0 < mouse < len(before) / 2  # some have no orthologue
  assert max(facts['share_of_edges_kept'].values()) < 0.3
  for one, other in ((before.a_N, after.a_N), (before.b_N, after.b_N)):
    np.testing.assert_array_equal(np.sort(one), np.sort(other))
  assert len(set(zip(after.a_N.tolist(), after.b_N.tolist()))) == len(before)


def test_a_large_network_is_rewired_thoroughly(simulated_knowledge):
  _, folder = simulated_knowledge
  path = str(folder / 'tf_target.human.tsv')
  found = edges.read(edges.EdgeTable(path, 0, 'trrust'), GENES)
  before, _ = network.build([found], GENES, holdout.none(GENES))
  _, facts = network.rewire(before, GENES, 0)
  assert facts['share_of_edges_kept']['human'] < 0.3


def test_families_leave_out_names_and_rna(tmp_path):
  table = written(
    tmp_path / 'hgnc.tsv',
    'symbol\tgene_group\tgene_group_id\tensembl_gene_id\n'
    'GATA1\tGATA family|CD molecules\t1|9\t\nGATA2\tGATA family\t1\t\n'
    'MYC\tCD molecules\t9\t\nMIR1-1\tMicroRNA MIR1 family\t5\t\n'
    'MIR1-2\tMicroRNA MIR1 family\t5\t\nMIR21\tMicroRNAs\t6\t\n'
    'MIR22\tMicroRNAs\t6\t\nH19\tsome RNAs\t7\t\nXIST\tsome RNAs\t7\t\n'
    'TP53\t\t\t\nFOO1\tGATA family\t1\t\n',
  )
  groups = families.read(table, 0, GENES)
  kept = families.meaningful(groups, GENES)
  symbols = {GENES.symbols[g] for g in kept.gene_M}
  assert symbols == {'GATA1', 'GATA2', 'MIR1-1', 'MIR1-2'}
  assert kept.facts['groups_kept'] == 2
  assert kept.facts['members']['examples_lost'] == ['FOO1']
  assert kept.facts['left_out_by_name']['groups'] == 2
  assert kept.facts['left_out_as_rna']['largest'] == ['some RNAs (2)']
  mouse = families.by_orthology(kept, GENES)
  assert {'Gata1', 'Gata2'} <= {GENES.symbols[g] for g in mouse.gene_M}
  found = families.to_pairs([kept, mouse], ['h', 'm'], [False, True])
  assert found.weight_N.max() == 0.5  # 1/size
  assert found.is_lifted_N.sum() >= 1
  relations = written(
    tmp_path / 'relations.csv',
    'HGNC,FOS,isa,FPLX,FOS_family\nHGNC,JUN,isa,FPLX,JUN_family\n'
    'FPLX,FOS_family,partof,FPLX,AP1\nFPLX,JUN_family,partof,FPLX,AP1\n',
  )
  above = families.read(relations, 0, GENES)
  assert len(above.gene_M) == 4  # each in its family and in AP1
  other = written(tmp_path / 'x.tsv', 'a\tb\tc\n1\t2\t3\n')
  with pytest.raises(errors.UserError, match='not a table of groups'):
    families.read(other, 0, GENES)


def test_real_tables(real_data):
  source = edges.EdgeTable(
    str(real_data / 'grn_collectri/collectri_human.csv.gz'), 0, 'collectri'
  )
  found = edges.read(source, GENES)
  assert found.facts['regulators']['lost'] == 0
  assert found.facts['targets']['share_mapped'] > 0.99
  hgnc = str(real_data / 'hgnc_genes_and_groups/hgnc_group_members.tsv.gz')
  kept = families.meaningful(families.read(hgnc, 0, GENES), GENES)
  assert kept.facts['groups_kept'] > 1500
  assert np.bincount(kept.group_M).max() < 1000  # one has 2,346 members


def test_the_script_holds_no_tf_out_without_its_paralogues(
  tmp_path, monkeypatch, capsys
):
  script = runpy.run_path(str(ROOT / 'data_prep' / 'build_priors.py'))
  argv = ['--data', tmp_path, '-o', tmp_path / 'P', '--hold-out', 'GATA1']
  monkeypatch.setattr(sys, 'argv', ['build_priors.py', *map(str, argv)])
  assert script['main']() == 2
  assert 'needs the groups of HGNC' in capsys.readouterr().err
