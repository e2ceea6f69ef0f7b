"""Promoters: where genes begin, what is cut out, and what words tell."""

import gzip
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from genecompass_jax import errors, gene_table
from genecompass_jax.prepare.priors import (
  kmers,
  names,
  sequences,
  starts,
)
from genecompass_jax.simulate import knowledge as knowledge_lib

GENES = gene_table.GeneTable.default()
MYC, TERT, TP53 = 'ENSG00000136997', 'ENSG00000164362', 'ENSG00000141510'


def line(feature, start, end, strand, gene, transcript='', tags='', chrom='1'):
  notes = f'gene_id "{gene}"; gene_name "x";'
  if transcript:
    notes += f' transcript_id "{transcript}";'
  notes += ''.join(f' tag "{tag}";' for tag in tags.split())
  return f'{chrom}\tt\t{feature}\t{start}\t{end}\t.\t{strand}\t.\t{notes}\n'


GTF = (
  '#!comment\n'
  + line('gene', 101, 400, '+', MYC + '.7')
  + line('transcript', 101, 400, '+', MYC + '.7', 'a', 'basic')
  + line('exon', 101, 150, '+', MYC + '.7', 'a')
  + line('transcript', 151, 380, '+', MYC + '.7', 'b', 'basic')
  + line('exon', 151, 380, '+', MYC + '.7', 'b')
  + line('transcript', 121, 300, '+', MYC + '.7', 'c', 'Ensembl_canonical')
  + line('gene', 501, 700, '-', TERT)
  + line('transcript', 501, 650, '-', TERT, 'd')
  + line('transcript', 501, 700, '-', TERT, 'e')
  + line('gene', 5, 9, '+', TP53, chrom='chrM')
)


@pytest.fixture
def gtf(tmp_path):
  path = tmp_path / 'g.gtf.gz'
  path.write_bytes(gzip.compress(GTF.encode()))
  return path


@pytest.mark.parametrize(
  'choice, myc, tert',
  [('canonical', 120, 699), ('longest', 150, 699), ('upstream', 100, 699)],
)
def test_which_start(gtf, choice, myc, tert):
  found = starts.read(gtf, 0, GENES, choice)
  at = dict(zip((GENES.gene_ids[g] for g in found.row_N), found.position_N))
  assert at == {MYC: myc, TERT: tert, TP53: 4}
  assert found.facts['genes_without_transcripts'] == 1


def test_genes_that_are_known_by_their_symbol_are_counted(tmp_path):
  path = tmp_path / 'g.gtf'
  lines = [line('gene', 1, 9, '+', gene) for gene in (MYC, TERT, TP53)]
  # an id of another release with the symbol of a gene that the table has, of
  # one that is there by its id already, and of none
  for gene, symbol in (('8', 'GATA1'), ('7', 'MYC'), ('6', 'NOSUCH')):
    named = line('gene', 1, 9, '+', f'ENSG9999999999{gene}')
    lines.append(named.replace('"x"', f'"{symbol}"'))
  path.write_text(''.join(lines))
  found = starts.read(path, 0, GENES)
  assert len(found.row_N) == 4
  assert found.facts['genes_by_symbol'] == 1


def test_windows_are_cut_from_both_strands(gtf, tmp_path):
  rng = np.random.default_rng(0)
  base = rng.choice(list('ACGTacgtN'), 720)
  chromosome = ''.join(base)
  fasta = tmp_path / 'g.fa'
  wrapped = '\n'.join(
    chromosome[i : i + 50] for i in range(0, len(chromosome), 50)
  )
  fasta.write_text(f'>chr1 test\n{wrapped}\n>2\nACGT\n>MT\nACGTACGTAC\n')
  found = sequences.windows(
    fasta, starts.read(gtf, 0, GENES, 'upstream'), 30, 60
  )
  texts = dict(zip((GENES.gene_ids[g] for g in found.row_N), found.texts))
  upper = chromosome.upper()
  assert texts[MYC].decode() == upper[70:160]
  swap = str.maketrans('ACGT', 'TGCA')
  assert texts[TERT].decode() == upper[640:720].translate(swap)[::-1]
  assert texts[TP53] == b'ACGTACGTAC'  # cut at both ends
  assert found.facts[1]['windows_cut_at_an_end'] == 2
  hard = sequences.windows(
    fasta, starts.read(gtf, 0, GENES, 'upstream'), 30, 60, True
  )
  masked = ''.join(c if c.isupper() else 'N' for c in chromosome[70:160])
  assert hard.texts[list(found.texts).index(texts[MYC])].decode() == masked


@pytest.mark.parametrize(
  'fasta, message',
  [
    ('', 'empty FASTA'),
    ('ACGT\n', 'begins without >'),
    ('>1\nAC1T\n', 'no DNA sequence'),
    ('>other\nACGT\n', 'no sequence that the GTF names'),
  ],
)
def test_damaged_fasta_is_one_line(gtf, tmp_path, fasta, message):
  path = tmp_path / 'bad.fa'
  path.write_text(fasta)
  with pytest.raises(errors.UserError, match=message) as error:
    sequences.windows(path, starts.read(gtf, 0, GENES), 5, 5)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'text, message',
  [
    ('1\tt\tgene\t1\n', 'line 1: 4 columns'),
    (GTF.replace('gene_id', 'ID='), 'line 2: not GTF'),
    ('#nothing\n', 'no genes and no transcripts'),
    (GTF.replace('501\t650', '501\tx'), 'line 9: not GTF'),
    (
      line('gene', 1, 9, '+', 'FOO1') + line('gene', 1, 9, '+', 'FOO2'),
      'are human genes',
    ),
  ],
)
def test_damaged_gtf_is_one_line(tmp_path, text, message):
  path = tmp_path / 'bad.gtf'
  path.write_text(text)
  with pytest.raises(errors.UserError, match=message) as error:
    starts.read(path, 0, GENES)
  assert '\n' not in str(error.value)


def test_a_cut_genome_is_one_line(gtf, tmp_path):
  path = tmp_path / 'g.fa.gz'
  whole = gzip.compress(b'>1\n' + b'ACGTTGCA' * 9000)
  path.write_bytes(whole[:-40])
  with pytest.raises(errors.UserError, match='damaged file'):
    sequences.windows(path, starts.read(gtf, 0, GENES))


def test_ready_sequences(tmp_path):
  table = tmp_path / 's.tsv'
  table.write_text(
    'promoter\tid\tsequence\nMYC_1\t\tacgu\nMYC_2\t\tGGGG\n'
    f'x\t{TERT}\tACGTN\nFOO_1\t\tAAAA\n'
  )
  found = sequences.ready(table, 0, GENES, ('id', 'promoter'), strip='_[0-9]+')
  assert [GENES.symbols[g] for g in found.row_N] == ['MYC', 'MYC', 'TERT']
  assert found.texts == (b'ACGT', b'GGGG', b'ACGTN')
  assert found.facts[0]['sequences_lost'] == 1
  fasta = tmp_path / 's.fa'
  fasta.write_text(f'>{MYC}.3|MYC some words\nACGT\n>x|TERT\nCC\nGG\n')
  found = sequences.ready(fasta, 0, GENES)
  assert found.texts == (b'ACGT', b'CCGG')
  table.write_text('id\tsequence\nMYC\tAC!T\n')
  with pytest.raises(errors.UserError, match='no DNA sequence'):
    sequences.ready(table, 0, GENES)
  with pytest.raises(errors.UserError, match="no column 'dna'"):
    sequences.ready(table, 0, GENES, sequence_column='dna')


@settings(max_examples=40, deadline=None)
@given(st.text('ACGTN', min_size=1, max_size=60), st.integers(1, 4))
def test_words_are_counted(text, k):
  swap = str.maketrans('ACGT', 'TGCA')
  for is_stranded in (True, False):
    index, number = kmers.words(k, is_stranded)
    counts = np.zeros(number, np.float32)
    code = kmers._CODE[np.frombuffer(text.encode(), np.uint8)]
    kmers._count(code, k, index, counts)
    for n, letters in enumerate(itertools.product('ACGT', repeat=k)):
      word = ''.join(letters)
      both = {word} if is_stranded else {word, word.translate(swap)[::-1]}
      expected = sum(text[i : i + k] in both for i in range(len(text)))
      assert counts[index[n]] == expected


@pytest.fixture(scope='module')
def promoters(simulated_knowledge):
  """Windows of the simulated human genome."""
  _, folder = simulated_knowledge
  where = starts.read(folder / 'genes.human.gtf.gz', 0, GENES)
  return sequences.windows(folder / 'genome.human.fa.gz', where)


def test_windows_of_the_simulator_carry_its_motifs(
  simulated_knowledge, promoters
):
  atlas, _ = simulated_knowledge
  assert len(promoters.texts) == 600
  assert {len(text) for text in promoters.texts} == {2500}
  motif = knowledge_lib.motifs(atlas, 0)
  net, genes = atlas.networks[0], atlas.genes[0]
  text_of = dict(zip(promoters.row_N.tolist(), promoters.texts))
  words = [np.array(list('ACGT'))[m].tolist() for m in motif]
  hits = {True: [], False: []}
  edges = set(zip(net.tf_E.tolist(), net.target_E.tolist()))
  swap = str.maketrans('ACGT', 'TGCA')
  for t in range(20):
    word = ''.join(words[t])
    for r, gene in enumerate(genes.gene_ids):
      text = text_of[GENES.row_of[gene]].decode()
      found = word in text or word.translate(swap)[::-1] in text
      hits[(t, r) in edges].append(found)
  assert np.mean(hits[True]) > 0.3 > 0.02 > np.mean(hits[False])


def test_promoters_of_shared_motifs_are_nearer(simulated_knowledge, promoters):
  atlas, _ = simulated_knowledge
  config = kmers.KmerConfig((4, 5, 6), width=64)
  found = kmers.embed(promoters, config)
  again = kmers.embed(promoters, config)
  assert found.vectors_NP.tobytes() == again.vectors_NP.tobytes()
  x = found.vectors_NP / np.linalg.norm(found.vectors_NP, axis=1)[:, None]
  at = {g: n for n, g in enumerate(found.rows_N.tolist())}
  net, genes = atlas.networks[0], atlas.genes[0]
  place = np.array([at[GENES.row_of[i]] for i in genes.gene_ids])
  groups = [place[net.target_E[net.tf_E == t]] for t in range(60)]
  near = x @ x.T

  def mean(order):
    return np.mean(
      [near[np.ix_(order[g], order[g])].mean() for g in groups if len(g) > 4]
    )

  rng = np.random.default_rng(0)
  null = [mean(rng.permutation(len(x))) for _ in range(50)]
  assert (mean(np.arange(len(x))) - np.mean(null)) / np.std(null) > 4


def test_unknown_bases_are_left_out():
  rows, _ = names.rows(['MYC', 'TERT', 'TP53'], 0, GENES)
  found = sequences.Sequences(
    rows, (b'ACGTTGCAGG', b'N' * 10, b'ACGTTTTTAA'), []
  )
  kept = kmers.embed(found, kmers.KmerConfig((2,)))
  assert len(kept.rows_N) == 2
  assert kept.facts['sequences_mostly_unknown'] == 1
  with pytest.raises(errors.UserError, match='no gene has a sequence'):
    kmers.embed(
      sequences.Sequences(rows[:1], (b'NNNN',), []), kmers.KmerConfig()
    )
  with pytest.raises(errors.UserError, match='from 1 to 6'):
    kmers.KmerConfig((7,))


def test_an_encoder_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / 'my_encoder.py').write_text(
    'import numpy as np\n'
    'def shares(texts):\n'
    '  return np.array([[t.count(c) / len(t) for c in "ACGT"] for t in texts])\n'
    'def wrong(texts):\n  return np.zeros(len(texts))\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  rows, _ = names.rows(['MYC', 'TERT', 'MYC'], 0, GENES)
  found = sequences.Sequences(rows, (b'AAAAAA', b'CCCCCC', b'GGGGGG'), [])
  embedded = kmers.encode(found, 'my_encoder:shares', batch=2, rms=0)
  by_row = dict(zip(embedded.rows_N.tolist(), embedded.vectors_NP.tolist()))
  assert by_row[int(rows[0])] == [0.5, 0, 0.5, 0]  # the mean of two
  for encoder, message in (
    ('my_encoder:wrong', 'returned float64 of shape'),
    ('my_encoder:none', 'none'),
    ('no_such_module:f', 'no_such_module'),
    ('my_encoder', 'give module:function'),
  ):
    with pytest.raises(errors.UserError, match=message):
      kmers.encode(found, encoder, batch=2)
  sys.modules.pop('my_encoder')


def test_handed_promoters(real_data):
  folder = real_data / 'promoter_sequences_epd60'
  found = sequences.ready(
    folder / 'promoters_human_epd_60bp.tsv.gz',
    0,
    GENES,
    ('ensembl_id', 'promoter'),
    strip='_[0-9]+',
  )
  assert found.facts[0]['sequences_lost'] < 300
  assert len(np.unique(found.row_N)) > 16_000
