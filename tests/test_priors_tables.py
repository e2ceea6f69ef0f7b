"""Files of priors, tables from elsewhere, released pickles, controls."""

import json
import os
import pathlib
import pickle
import re

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st

from genecompass_jax import cli, errors, knowledge, prior_tables, vocabulary
from genecompass_jax.prepare.priors import (
  assembly,
  controls,
  pairs as pairs_lib,
  released,
  strata,
  validation,
  vectors,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCAB = vocabulary.Vocabulary.default()
GENES = VOCAB.genes
HUMAN = np.flatnonzero(
  (GENES.species_G == 0)
  & np.array([b == 'protein_coding' for b in GENES.biotypes])
)
SYMBOLS = [GENES.symbols[g] for g in HUMAN[:60]]


def matrix(rows=60, width=4, seed=0):
  return np.random.default_rng(seed).normal(size=(rows, width))


def run(*argv, code=0, capsys=None):
  assert cli.main(['prior', *map(str, argv)]) == code
  if capsys is None:
    return ''
  out, err = capsys.readouterr()
  if code:
    assert err.count('\n') == 1, err
    assert 'Traceback' not in err
  return out + err


# ---- files


def test_a_prior_is_written_whole_and_read_by_the_model(tmp_path):
  path = tmp_path / 'p.parquet'
  facts = prior_tables.write(path, ['a', 'b'], matrix(2), {'kind': 'x'})
  first = path.read_bytes(), (tmp_path / 'p.json').read_bytes()
  genes, table = knowledge.read_table(path)
  assert genes == ('a', 'b')
  np.testing.assert_array_equal(table, matrix(2).astype(np.float32))
  assert prior_tables.read(path).facts == facts
  prior_tables.write(path, ['a', 'b'], matrix(2), {'kind': 'x'})
  assert first == (path.read_bytes(), (tmp_path / 'p.json').read_bytes())
  (tmp_path / 'p.json').unlink()  # the table speaks for itself
  assert prior_tables.read(path).facts['kind'] == 'x'
  assert sorted(f.name for f in tmp_path.iterdir()) == ['p.parquet']


def test_damage_and_mismatch_are_one_line(tmp_path):
  path, other = tmp_path / 'p.parquet', tmp_path / 'q.parquet'
  prior_tables.write(path, ['a', 'b'], matrix(2), {})
  prior_tables.write(other, ['a', 'b'], matrix(2, seed=1), {})
  for break_it in (
    lambda: (tmp_path / 'p.json').write_bytes(
      (tmp_path / 'q.json').read_bytes()
    ),
    lambda: (tmp_path / 'p.json').write_text('{"format": '),
  ):
    break_it()
    for read in (knowledge.read_table, prior_tables.read):
      with pytest.raises(errors.UserError, match='p.(parquet|json)') as error:
        read(path)
      assert '\n' not in str(error.value)
  (tmp_path / 'p.json').unlink()
  data = bytearray(path.read_bytes())
  data[60] ^= 1  # a flipped bit in a page
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match='not a prior table'):
    prior_tables.read(path)
  with pytest.raises(ValueError, match='not finite'):
    prior_tables.write(other, ['a'], [[np.nan]], {})
  with pytest.raises(ValueError, match='stands twice'):
    prior_tables.write(other, ['a', 'a'], matrix(2), {})
  with pytest.raises(errors.UserError, match='ends in .parquet'):
    prior_tables.write(tmp_path / 'p.csv', ['a'], matrix(1), {})


def test_facts_name_files_not_places(tmp_path):
  frame = pd.DataFrame(matrix(), index=SYMBOLS)
  for folder in ('a', 'b'):
    (tmp_path / folder).mkdir()
    frame.to_csv(tmp_path / folder / 'x.csv')
    run('table', tmp_path / folder / 'x.csv', '-o',
        tmp_path / folder / 'p.parquet', '--licence', 'CC0')  # fmt: skip
  a, b = (
    [(tmp_path / f / n).read_bytes() for n in ('p.parquet', 'p.json')]
    for f in 'ab'
  )
  assert a == b
  facts = json.loads(a[1])
  assert str(tmp_path) not in a[1].decode()
  assert facts['sources'][0]['licence'] == 'CC0'
  assert facts['coverage']['human']['with_vector'] == 60
  assert set(facts['norms']) >= {'mean', 'sd', 'q50'}
  assert set(facts['versions']) >= {'numpy', 'scipy', 'pyarrow'}


# ---- tables from elsewhere


def test_every_format_gives_the_same_vectors(tmp_path):
  values = matrix().round(3)
  frame = pd.DataFrame(values, index=SYMBOLS)
  frame.to_csv(tmp_path / 'a.csv')
  frame.to_csv(tmp_path / 'b.tsv.gz', sep='\t', index_label='gene')
  frame.columns = [f'd{i}' for i in range(4)]
  frame.reset_index(names='symbol').to_parquet(tmp_path / 'c.parquet')
  table = pyarrow.table({'gene': SYMBOLS, 'vector': values.tolist()})
  pyarrow.parquet.write_table(table, tmp_path / 'd.parquet')
  np.savez(tmp_path / 'e.npz', genes=np.array(SYMBOLS), x=values)
  lines = [' '.join([n, *map(str, v)]) for n, v in zip(SYMBOLS, values)]
  (tmp_path / 'f.txt').write_text('60 4\n' + '\n'.join(lines) + '\n')
  for path in sorted(tmp_path.iterdir()):
    names, found = vectors.read(path)
    assert names == SYMBOLS, path
    np.testing.assert_allclose(found, values)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('x.csv', b'', 'not a table'),
    ('x.csv', b'g,a\nMYC,1\nTERT,x\n', "'TERT' is not finite"),
    ('x.csv', b'g,a\nMYC,1\nTERT,1e39\n', "'TERT' is not finite in float32"),
    ('x.csv', b'g,a\nMYC,0\nTERT,1e-60\n', 'every vector is zero'),
    (
      'x.csv',
      b'g,a\n' + b''.join(b'%d,%d\n' % (k, k % 3) for k in range(1, 30)),
      'only the numbers 1, 2, 3',
    ),
    ('x.csv', b'g\nMYC\n', 'names for vectors'),
    ('x.parquet', b'PAR1', 'not parquet'),
    ('x.npz', b'PK', 'not an npz'),
    ('x.txt', b'MYC 1 2\nTERT 1\n', 'line 2: 1 numbers'),
    ('x.txt', b'MYC one\n', 'line 1'),
    ('x.h5', b'', 'give csv'),
    ('x.csv', b'g,a\nFOO1,1\nFOO2,2\nFOO3,3\n', 'human genes'),
  ],
)
def test_damaged_tables_are_one_line(tmp_path, capsys, name, content, message):
  (tmp_path / name).write_bytes(content)
  out = tmp_path / 'p.parquet'
  said = run('table', tmp_path / name, '--species', 'human', '-o', out,
             code=2, capsys=capsys)  # fmt: skip
  assert re.search(message, said)
  assert not out.exists()


def test_objects_in_npz_are_not_unpickled(tmp_path):
  np.savez(tmp_path / 'x.npz', genes=np.array(SYMBOLS, object), x=matrix())
  with pytest.raises(errors.UserError, match='array of str'):
    vectors.read(tmp_path / 'x.npz')


def test_rows_of_one_gene_are_averaged_and_orthologues_added():
  names = ['TP53', 'ENSG00000141510.5', '7157', 'TERT', 'FOO1']
  values = np.array([[1.0], [2], [6], [5], [7]])
  rows, found, facts = vectors.by_gene(names, values, GENES, 'human')
  assert dict(zip((GENES.symbols[r] for r in rows), found[:, 0])) == {
    'TP53': 3, 'TERT': 5,
  }  # fmt: skip
  assert facts['rows_lost'] == 1
  assert facts['rows_averaged_into_others'] == 2
  rows, found, lifted = vectors.with_orthologues(rows, found, GENES)
  assert lifted == 2
  assert {GENES.symbols[r] for r in rows} == {'TP53', 'TERT', 'Trp53', 'Tert'}
  both = ['ENSG00000141510', 'ENSMUSG00000059552']
  rows, _, _ = vectors.by_gene(both, values[:2], GENES)
  assert len(rows) == 2  # stable ids of both species


def test_the_recipe_of_the_documentation(tmp_path, monkeypatch):
  """docs/priors.md, "A prior of your own", word for word."""
  text = (ROOT / 'docs/priors.md').read_text()
  part = text.split('## A prior of your own')[1].split('\n## ')[0]
  blocks = re.findall(r'```(\w+)\n(.*?)```', part, re.DOTALL)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(ROOT))
  ran = []
  for language, block in blocks:
    if language == 'python':
      exec(block, {})
    for line in block.replace('\\\n', ' ').splitlines():
      if line.startswith('genecompass prior'):
        argv = line.split('  #')[0].split()[2:]
        run(*argv)
        ran.append(argv[0])
  assert ran[:1] == ['table']
  genes, table = knowledge.read_table(tmp_path / 'protein.parquet')
  assert len(genes) == len(table) > 0


# ---- released pickles


def test_released_pickles(tmp_path, capsys):
  rng = np.random.default_rng(0)
  low = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 768))
  noise = rng.normal(size=(200, 768))
  symbols = [GENES.symbols[g] for g in HUMAN[:600]]
  table = dict(zip(symbols, np.concatenate([low, noise]).astype(np.float32)))
  table['FOO1'] = table[SYMBOLS[0]]
  path = tmp_path / 'Human_dim_768_gene_61_random.pickle'
  path.write_bytes(pickle.dumps(table))
  said = run('released', path, '--species', 'human', '-o', tmp_path / 'out',
             capsys=capsys)  # fmt: skip
  assert '200 rows look random' in said
  assert '1 duplicate' in said
  prior = prior_tables.read(tmp_path / 'out' / f'{path.stem}.parquet')
  assert prior.vectors_GP.shape == (600, 768)
  np.testing.assert_array_equal(
    prior.vectors_GP[0], table[GENES.symbols[GENES.row_of[prior.gene_ids[0]]]]
  )
  assert prior.facts['sources'][0]['identifiers']['examples_lost'] == ['FOO1']
  run('released', path, '--species', 'human', '-o', tmp_path / 'less',
      '--drop-random')  # fmt: skip
  less = prior_tables.read(tmp_path / 'less' / f'{path.stem}.parquet')
  assert len(less.gene_ids) == 400


@pytest.mark.parametrize(
  'content, message',
  [
    (b'version https://git-lfs.github.com/spec/v1\noid\n', 'Git-LFS'),
    (pickle.dumps([1]), 'holds a list'),
    (pickle.dumps({'MYC': [1.0], 'TERT': [1.0, 2.0]}), 'one width'),
    (pickle.dumps({'MYC': ['x']}), 'one width'),
    (pickle.dumps({'MYC': [float('nan')]}), 'not finite'),
    (pickle.dumps({'MYC': print}), 'names builtins.print'),
    (b'\x80\x04', 'damaged pickle'),
  ],
)
def test_bad_pickles_are_one_line(tmp_path, capsys, content, message):
  path = tmp_path / 'x.pickle'
  path.write_bytes(content)
  said = run('released', path, '--species', 'human', '-o', tmp_path / 'out',
             code=2, capsys=capsys)  # fmt: skip
  assert message in said
  assert not (tmp_path / 'out').exists()


def test_the_current_symbol_wins():
  # H2AX was H2AFX
  rows, taken, _ = released.by_gene(['H2AFX', 'H2AX'], 0, GENES)
  assert taken.tolist() == [1]
  assert GENES.symbols[rows[0]] == 'H2AX'


# ---- controls


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 80), st.integers(1, 12))
def test_what_controls_keep(seed, number, width):
  rng = np.random.default_rng(seed)
  given_NP = (rng.normal(size=(number, width)) * rng.gamma(2, 1, width)).astype(
    np.float32
  )
  strata_N = rng.integers(0, 3, number)
  found, _ = controls.shuffled(given_NP, strata_N, seed)
  for s in range(3):
    one, other = given_NP[strata_N == s], found[strata_N == s]
    assert sorted(map(tuple, one.tolist())) == sorted(
      map(tuple, other.tolist())
    )
  # Two species; half of the tokens are shared by both.
  species_N = np.arange(number) % 2
  token_N = np.where(np.arange(number) < number // 2, np.arange(number) // 2,
                     100 + np.arange(number))  # fmt: skip
  own_N = strata_N + 3 * species_N
  found, facts = controls.shuffled_pairs(
    given_NP, own_N, species_N, token_N, seed
  )
  place = {tuple(row): n for n, row in enumerate(given_NP.tolist())}
  from_N = np.array([place[tuple(row)] for row in found.tolist()])
  assert sorted(from_N) == list(range(number))
  assert (species_N[from_N] == species_N).all()
  for n in range(number):
    others = np.flatnonzero((token_N == token_N[n]) & (np.arange(number) != n))
    theirs = np.flatnonzero(
      (token_N == token_N[from_N[n]]) & (np.arange(number) != from_N[n])
    )
    assert from_N[others].tolist() == theirs.tolist()
    if not len(others) or species_N[n] == 0:
      assert own_N[from_N[n]] == own_N[n]
  found, facts = controls.random(given_NP, strata_N, seed)
  for s in range(3):
    np.testing.assert_allclose(
      np.sort(np.linalg.norm(found[strata_N == s], axis=1)),
      np.sort(np.linalg.norm(given_NP[strata_N == s], axis=1)),
      rtol=1e-4,
    )
  spectrum = np.linalg.svd(given_NP, compute_uv=False)
  error = np.abs(np.linalg.svd(found, compute_uv=False) - spectrum).max()
  assert error / spectrum[0] <= facts['largest_error_of_spectrum'] + 1e-4
  found, _ = controls.constant(given_NP)
  assert np.ptp(found, axis=0).max() == 0
  assert np.linalg.norm(found[0]) == pytest.approx(
    np.linalg.norm(given_NP, axis=1).mean(), rel=1e-4
  )


def test_random_rows_match_the_spectrum_of_a_real_shape():
  rng = np.random.default_rng(0)
  low = rng.normal(size=(400, 20)) * np.linspace(5, 0.2, 20)
  _, facts = controls.random(low, np.zeros(400, int), 0)
  assert facts['largest_error_of_spectrum'] < 1e-3


def test_controls_from_the_command(simulated_knowledge, tiny_corpus, tmp_path,
                                   capsys):  # fmt: skip
  _, folder = simulated_knowledge
  grn = tmp_path / 'grn.parquet'
  run('grn', '--human', f'trrust={folder}/tf_target.human.tsv', '--mouse',
      f'trrust={folder}/tf_target.mouse.tsv', '-o', grn, '--width', 16)  # fmt: skip
  for kind in controls.KINDS:
    run(
      'control', kind, grn, '-o', tmp_path / kind, '--expression', tiny_corpus
    )
    one, other = (
      prior_tables.read(p) for p in (grn, tmp_path / kind / 'grn.parquet')
    )
    assert one.gene_ids == other.gene_ids, kind
    assert one.vectors_GP.shape == other.vectors_GP.shape
    assert (one.vectors_GP != other.vectors_GP).any()
    assert other.facts['kind'] == f'control {kind}'
  again = tmp_path / 'again'
  run('control', 'rewired', grn, '-o', again)
  assert (again / 'grn.parquet').exists()
  for argv, message in (
    (('control', 'shuffled', grn, '-o', tmp_path), 'grn.parquet is there'),
    (('control', 'shuffled', grn, '-o', tmp_path, '--overwrite'), 'is the prior'),
    (('control', 'rewired', tmp_path / 'shuffled/grn.parquet', '-o',
      tmp_path / 'x'), 'only a regulatory network'),
    (('control', 'shuffled', grn, '-o', tmp_path / 'x', '--expression',
      tmp_path / 'none'), 'no such corpus'),
  ):  # fmt: skip
    capsys.readouterr()
    assert message in run(*argv, code=2, capsys=capsys)
  (tmp_path / 'grn.pairs.parquet').unlink()
  said = run('control', 'rewired', grn, '-o', tmp_path / 'y', code=2,
             capsys=capsys)  # fmt: skip
  assert 'grn.pairs.parquet is missing' in said


# ---- validation


def truth_of(rows, sets):
  set_M = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
  gene_M = rows[np.concatenate(sets)]
  regulator = np.full(len(sets), -1)
  return validation.Truth('t', 0, gene_M, set_M, regulator, {})


def test_a_gene_is_no_pair_with_itself():
  """Where strata are small the pairs drawn apart would often be one gene."""
  rows, rng = HUMAN[:60], np.random.default_rng(0)
  truth = truth_of(rows, [np.arange(6 * k, 6 * k + 6) for k in range(10)])
  value_G = np.zeros(len(GENES))
  value_G[rows] = 1 + np.arange(60)  # a set is a decile
  known = np.zeros(0, np.int64)
  found = [
    validation.score(
      truth, rows, rng.normal(size=(60, 8)), value_G, GENES, 1, k, known
    )
    for k in range(10)
  ]
  for name in ('auroc', 'auroc_new'):
    assert np.mean([f[name] for f in found]) == pytest.approx(0.5, abs=0.02)


def test_scores_find_what_is_there_and_nothing_else():
  rows, rng = HUMAN[:300], np.random.default_rng(0)
  sets = [np.arange(10 * k, 10 * k + 10) for k in range(30)]
  truth = truth_of(rows, sets)
  centre = np.repeat(rng.normal(size=(30, 8)), 10, 0)
  planted = centre + 0.5 * rng.normal(size=(300, 8))
  found = validation.score(truth, rows, planted, None, GENES, 50)
  assert found['z'] > 20
  assert found['auroc'] > 0.9
  assert found['p'] == pytest.approx(1 / 51)
  known = truth.pair_keys()
  assert len(known) == 30 * 45
  p = [
    validation.score(truth, rows, rng.normal(size=(300, 8)), None, GENES, 19)['p']
    for _ in range(40)
  ]  # fmt: skip
  assert 0.2 < np.mean(p) < 0.8
  found = validation.score(truth, rows, planted, None, GENES, 5, 0, known)
  assert found['share_own_pairs'] == 1
  assert found['auroc_new'] is None
  # Expression alone is no knowledge: permuted inside deciles it goes.
  value_G = np.zeros(len(GENES))
  value_G[rows] = 1 + np.arange(300)
  level = np.repeat(rng.normal(size=(10, 8)), 30, 0)  # one per decile
  level = level + 0.01 * rng.normal(size=(300, 8))
  loose = validation.score(truth, rows, level, None, GENES, 50)
  strict = validation.score(truth, rows, level, value_G, GENES, 50)
  assert loose['z'] > 10 > 3 > abs(strict['z'])
  assert validation.score(truth, HUMAN[-9:], level[:9], None, GENES, 5) is None


def test_check_reports_coverage_validation_and_overlap(
  simulated_knowledge, tmp_path, capsys
):
  _, folder = simulated_knowledge
  grn, family = tmp_path / 'grn.parquet', tmp_path / 'family.parquet'
  table = f'{folder}/tf_target.human.tsv'
  run('grn', '--human', f'trrust={table}', '-o', grn, '--width', 32)
  run('family', '--groups', f'{folder}/gene_groups.human.tsv', '-o', family)
  lines = (folder / 'tf_target.human.tsv').read_text().splitlines()
  half = tmp_path / 'half.tsv'
  half.write_text('\n'.join(lines[::2]) + '\n')
  sets = tmp_path / 's.gmt'
  sets.write_text(
    ''.join(
      f'S{k}\tx\t' + '\t'.join(SYMBOLS[k : k + 8]) + '\n' for k in range(5)
    )
  )
  capsys.readouterr()
  said = run('check', grn, family, '--edges', f'human:half:trrust={half}',
             '--sets', f'human:sets={sets}', '--permutations', 20,
             '-o', tmp_path / 'r.json', capsys=capsys)  # fmt: skip
  assert 'Coverage' in said
  report = json.loads((tmp_path / 'r.json').read_text())
  (overlap,) = [r for r in report['overlap'] if r['truth'] == 'half']
  assert overlap['grn'] == 1.0
  assert overlap['family'] < 0.2
  scored = {(r['prior'], r['truth']): r for r in report['validation']}
  assert scored['grn', 'half']['p'] < 0.05
  assert scored['grn', 'half']['auroc_edges'] > 0.6
  assert report['coverage'][0]['with vector'] > 300
  for argv, message in (
    (('--sets', 'human=x'), 'give SPECIES:NAME=FILE.gmt'),
    (('--edges', 'human:x=y'), 'give SPECIES:NAME:FORMAT=FILE'),
    (('--sets', f'human:x={tmp_path}/none'), 'no such file'),
    (('--sets', f'human:x={half}'), 'are human genes'),
  ):
    assert message in run('check', grn, *argv, code=2, capsys=capsys)


# ---- the commands, and training


def test_commands_say_what_is_wrong(tmp_path, capsys, simulated_knowledge):
  _, folder = simulated_knowledge
  out = tmp_path / 'p.parquet'
  trrust = f'trrust={folder}/tf_target.human.tsv'
  fasta, table = tmp_path / 'g.fa', tmp_path / 't.csv'
  fasta.write_text('>TP53\nACGTACGTACGT\n>MYC\nACGTTTGTACGA\n')
  table.write_text('gene,a,b\nTP53,1,2\nMYC,3,4\n')
  for argv, message in (
    (('grn', '-o', out), 'no edges were given'),
    (('grn', '--human', 'x', '-o', out), 'say the format first'),
    (('grn', '--human', trrust, '-o', tmp_path / 'p'), 'ends in .parquet'),
    (('grn', '--human', trrust, '--hold-out', 'MYC', '-o', out), 'needs --paralogues'),
    (('promoter', '-o', out), 'no sequences were given'),
    (('promoter', '--human-genome', 'x', '-o', out), 'together'),
    (('coexpression', tmp_path, '-o', out), 'no corpus here'),
    (('grn', '--human', trrust, '--width', 0, '-o', out), 'width=0'),
    (('grn', '--human', trrust, '--shift', 1000, '-o', out), 'more than chance'),
    (('promoter', '--human-sequences', fasta, '--strip', '(', '-o', out), '--strip ('),
    (('promoter', '--human-sequences', fasta, '--encoder', 'os:getcwd', '-o', out),
     'os:getcwd failed on'),
    (('promoter', '--human-sequences', fasta, '--batch', 0, '-o', out), '--batch 0'),
    (('table', table, '--species', 'human', '--width', -5, '-o', out), '--width -5'),
    (('table', table, '--species', 'human', '--rms', 'nan', '-o', out), '--rms nan'),
    (('control', 'shuffled', out, '-o', tmp_path / 'c', '--seed', -1), '--seed -1'),
    (('check', out, '--seed', -1), '--seed -1'),
  ):  # fmt: skip
    assert message in run(*argv, code=2, capsys=capsys)
    assert not out.exists()
  with pytest.raises(SystemExit):
    cli.main(['prior', '--help'])
  for kind in ('grn', 'promoter', 'family', 'coexpression', 'table', 'check'):
    with pytest.raises(SystemExit):
      cli.main(['prior', kind, '--help'])
    assert len(capsys.readouterr().out) > 200


def test_all_four_from_simulated_files(simulated_knowledge, tiny_corpus,
                                       tmp_path):  # fmt: skip
  _, folder = simulated_knowledge
  kinds = {
    'grn': ['--human', f'trrust={folder}/tf_target.human.tsv', '--lift', 'both',
            '--hold-out', SYMBOLS[0], '--paralogues', 'none'],
    'family': ['--groups', f'{folder}/gene_groups.human.tsv'],
    'promoter': ['--human-genome', f'{folder}/genome.human.fa.gz',
                 '--human-genes', f'{folder}/genes.human.gtf.gz',
                 '--mouse-genome', f'{folder}/genome.mouse.fa.gz',
                 '--mouse-genes', f'{folder}/genes.mouse.gtf.gz', '--k', '4'],
    'coexpression': [tiny_corpus, '--min-r', 0.2, '--rule', 'released'],
  }  # fmt: skip
  for kind, argv in kinds.items():
    bytes_ = []
    for name in ('a', 'b'):
      path = tmp_path / name / f'{kind}.parquet'
      run(kind, *argv, '-o', path, '--width', 8)
      bytes_.append(path.read_bytes())
    assert bytes_[0] == bytes_[1], kind
    genes, table = knowledge.read_table(path)
    assert table.shape[1] == 8
    species = {GENES.species_G[GENES.row_of[g]] for g in genes}
    assert species == {0, 1}, kind
  facts = json.loads((tmp_path / 'a/grn.json').read_text())
  assert facts['held_out']['asked_for'] == [SYMBOLS[0]]


@pytest.mark.slow  # 15 s each
@pytest.mark.parametrize('missing', ['learned', 'released'])
def test_a_built_table_trains(missing, tiny_corpus, tiny_run, tmp_path):
  path = tmp_path / 'co.parquet'
  run('coexpression', tiny_corpus, '--min-r', 0.2, '--rule', 'released',
      '-o', path, '--width', 8)  # fmt: skip
  changes = {
    'priors': (('co', str(path)),),
    'model.missing_prior': missing,
    'optimizer.total_steps': 4,
    'optimizer.warmup_steps': 2,
    'eval_every': 4,
    'checkpoint_every': 4,
  }
  tiny_run(tmp_path / 'run', changes)
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line)['loss'] for line in lines if '"loss"' in line]
  assert np.isfinite(losses).all()
  config = json.loads((tmp_path / 'run/config.json').read_text())
  assert config['run']['model']['priors'] == [['co', 8]]
  assert config['run']['model']['missing_prior'] == missing


@pytest.mark.parametrize(
  'rows',
  ['MYC,nan\nTERT,nan', 'FOO,1\nBAR,2', 'MYC,0\nTERT,-1', 'MYC,inf\nTERT,1'],
)
def test_expression_that_says_nothing(tmp_path, rows):
  (tmp_path / 'e.csv').write_text(f'gene,value\n{rows}\n')
  with pytest.raises(errors.UserError, match='above 0|no number') as error:
    strata.expression(tmp_path / 'e.csv', VOCAB)
  assert '\n' not in str(error.value)


def test_controls_of_nothing_and_a_report_in_place_of_a_folder(
  tmp_path, capsys
):
  gene_ids = [VOCAB.genes.gene_ids[g] for g in range(5)]
  path = tmp_path / 'zeros.parquet'
  prior_tables.write(path, gene_ids, np.zeros((5, 3)), {})
  for kind in ('shuffled', 'shuffled_pairs', 'random', 'constant'):
    out = tmp_path / kind
    said = run('control', kind, path, '-o', out, code=2, capsys=capsys)
    assert 'every vector is zero' in said
  prior_tables.write(path, gene_ids, np.ones((5, 3)), {})
  before = sorted(os.listdir(tmp_path))
  said = run('check', path, '-o', tmp_path, code=2, capsys=capsys)
  assert 'is a folder' in said
  assert sorted(os.listdir(tmp_path)) == before


def test_expression_of_a_table(tmp_path):
  path = tmp_path / 'e.tsv'
  path.write_text('gene\tvalue\nTP53\t3\nTrp53\t2\nFOO1\t1\n')
  value_G = strata.expression(path, VOCAB)
  assert value_G[GENES.symbols.index('TP53')] == 3
  assert value_G[GENES.symbols.index('Trp53')] == 2
  path.write_text('gene\tvalue\nTP53\tx\n')
  with pytest.raises(errors.UserError, match="'x' is no number"):
    strata.expression(path, VOCAB)


def test_coverage_counts_species_apart():
  found = assembly.coverage(HUMAN[:10], VOCAB)
  assert found['human']['with_vector'] == 10
  assert found['mouse']['with_vector'] == 0
  assert found['human']['coding_with_vector'] == 10


def test_new_edges_are_those_that_the_prior_does_not_state():
  truth = validation.from_edges(
    't', 0, np.array([0, 0, 1, 1]), np.array([5, 6, 5, 7]), {}
  )
  # a pair is known whichever of the two regulates
  known = pairs_lib.keys(np.array([6, 1, 5]), np.array([0, 7, 7]))
  new = validation.without_known(truth, known)
  edges = list(zip(new.regulator_K[new.set_M].tolist(), new.gene_M.tolist()))
  assert edges == [(0, 5), (1, 5)]


@pytest.mark.parametrize(
  ('ids', 'vectors', 'meta', 'message'),
  [
    (['A', 'B'], [[1.0, float('nan')], [3.0, 4.0]], None, 'not finite'),
    (['A', 'B'], [[1.0, None], [3.0, 4.0]], None, 'not finite'),
    (['A', 'B'], [[1e300, 1.0], [3.0, 4.0]], None, 'not finite'),
    (['A', 'A'], [[1.0, 2.0], [3.0, 4.0]], None, 'twice'),
    (['A', None], [[1.0, 2.0], [3.0, 4.0]], None, 'no text'),
    ([1, 2], [[1.0, 2.0], [3.0, 4.0]], None, 'no text'),
    (['A', 'B'], [[1.0, 2.0], [3.0, 4.0]], b'{"x', 'not a prior'),
    (['A', 'B'], [[1.0, 2.0], [3.0, 4.0]], b'[' * 200_000, 'not a prior'),
    (['A', 'B'], [[1.0, 2.0], [3.0, 4.0]], b'[1]', 'no JSON of names'),
  ],
)
def test_priors_of_others_are_checked(tmp_path, ids, vectors, meta, message):
  import pyarrow
  import pyarrow.parquet

  from genecompass_jax import prior_tables

  table = pyarrow.table({'gene_id': ids, 'vector': pyarrow.array(vectors)})
  if meta is not None:
    table = table.replace_schema_metadata({b'genecompass_prior': meta})
  pyarrow.parquet.write_table(table, tmp_path / 'p.parquet')
  with pytest.raises(errors.UserError, match=message) as error:
    prior_tables.read(tmp_path / 'p.parquet')
  assert '\n' not in str(error.value)
