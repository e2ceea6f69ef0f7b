"""The release's dictionaries: tokens, orthologues and medians of genes."""

import json
import pickle
import re

import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import cli, encoding, errors, vocabulary
from genecompass_jax.convert import names
from tests.conftest import tiny_cells, tiny_genes
from tests.test_convert import HEADS, random_weights

HUMAN, MOUSE = tiny_genes(0), tiny_genes(1)


def dictionary(ids):
  return {'<pad>': 0, '<mask>': 1} | {g: 2 + k for k, g in enumerate(ids)}


class Release:
  """Files as they come with the release; tests change what they want."""

  def __init__(self, folder, ids=(*HUMAN, *MOUSE)):
    self.folder = folder
    self.tokens = dictionary(ids)
    # the first 45 of each list are pairs; two mouse genes of one human gene
    self.pairs = {
      self.tokens[m]: self.tokens[h] for h, m in zip(HUMAN[:45], MOUSE[:45])
    }
    self.pairs[self.tokens[MOUSE[60]]] = self.tokens[HUMAN[0]]
    rng = np.random.default_rng(0)
    self.medians = [
      {g: float(x) for g, x in zip(genes, rng.integers(1, 9, len(genes)) / 2)}
      for genes in (HUMAN, MOUSE)
    ]
    self.weights = random_weights(len(self.tokens))
    homologs = np.arange(len(self.tokens))
    for mouse, human in self.pairs.items():
      homologs[human] = mouse  # the last one stays
    self.weights[names.HOMOLOGS] = homologs

  def write(self, as_json=False):
    """Writes all; the flags that name them."""
    np.savez(self.folder / 'w.npz', **self.weights)
    config = {'num_attention_heads': HEADS}
    (self.folder / 'config.json').write_text(json.dumps(config))
    flags = []
    for flag, content in (
      ('--tokens', self.tokens),
      ('--orthologues', self.pairs),
      ('--medians', self.medians[0]),
      ('--medians', self.medians[1]),
    ):
      suffix = 'json' if as_json else 'pickle'
      path = self.folder / f'{len(flags)}.{suffix}'
      if as_json:
        path.write_text(json.dumps(content))
      else:
        path.write_bytes(pickle.dumps(content))
      flags += [flag, str(path)]
    return flags


@pytest.fixture
def release(tmp_path):
  return Release(tmp_path)


@pytest.fixture
def convert(tmp_path, capsys):
  """Runs the command -> (code, output, lines of errors)."""

  def run(flags):
    words = ['convert', 'pytorch', str(tmp_path / 'w.npz'), *flags]
    code = cli.main([*words, '-o', str(tmp_path / 'model')])
    out, err = capsys.readouterr()
    return code, out, err.strip().splitlines()

  return run


def shuffled():
  """Genes of both species in no order, as a dictionary might have them."""
  rng = np.random.default_rng(3)
  return [str(g) for g in rng.permutation([*HUMAN, *MOUSE])]


@pytest.mark.parametrize('as_json', [False, True])
@pytest.mark.parametrize('order', ['by species', 'shuffled'])
def test_counts_are_encoded_as_the_release_does(
  tmp_path, convert, as_json, order
):
  ids = (*HUMAN, *MOUSE) if order == 'by species' else shuffled()
  release = Release(tmp_path, ids)
  code, out, err = convert(release.write(as_json))
  assert code == 0, err
  assert '182 tokens: 90 human and 90 mouse genes, 46 of which' in out
  assert 'medians: 90 of 90 tokens of human cells' in out
  model = gc.load(tmp_path / 'model')
  vocab = model.vocabulary
  assert vocab.token_gene_ids()[2:] == tuple(ids)
  # a mouse gene with an orthologue is read as the human token
  (pair, double, alone) = vocab.tokens([MOUSE[3], MOUSE[60], MOUSE[70]])
  assert pair == release.tokens[HUMAN[3]]
  assert double == release.tokens[HUMAN[0]]
  assert alone == release.tokens[MOUSE[70]]
  # and its prior is that of the mouse gene, as in the original
  np.testing.assert_array_equal(
    model.assets.knowledge.row_SV[1], release.weights[names.HOMOLOGS]
  )
  medians = model.assets.medians
  assert medians.mode == encoding.RELEASED
  divisor_V = medians.divisor_V(1)
  assert divisor_V[pair] == release.medians[0][HUMAN[3]]
  assert divisor_V[alone] == release.medians[1][MOUSE[70]]
  embedded = gc.embed(tiny_cells(6, 1), model)
  assert embedded.shape == (6, 8) and np.isfinite(embedded).all()


def test_values_and_ranks_are_those_of_the_formula(release, tmp_path, convert):
  """count / median, log2(1 + x), highest first, from the files alone."""
  assert convert(release.write())[0] == 0
  model = gc.load(tmp_path / 'model')
  adata = tiny_cells(5, 1, seed=1)
  from genecompass_jax.analysis import model_cells

  stream = model_cells.open_cells(adata, model)
  (chunk,) = model_cells.encode(stream, model)
  human_of = {
    m: h for h, m in zip(HUMAN[:45], MOUSE[:45])
  } | {MOUSE[60]: HUMAN[0]}  # fmt: skip
  counts = adata.X.toarray()
  for cell in range(5):
    expected = {}
    for gene, count in zip(adata.var_names, counts[cell]):
      name = human_of.get(gene, gene)
      token = release.tokens[name]
      expected[token] = expected.get(token, 0) + count
    name_of = {token: name for name, token in release.tokens.items()}
    both = release.medians[0] | release.medians[1]
    expected = {
      t: np.log2(1 + n / both[name_of[t]]) for t, n in expected.items() if n
    }
    start, stop = chunk.cells.starts_C1[cell : cell + 2]
    ids = chunk.cells.gene_ids_N[start:stop].tolist()
    values = chunk.cells.values_N[start:stop]
    assert sorted(ids) == sorted(expected)
    np.testing.assert_allclose(values, [expected[t] for t in ids], rtol=1e-6)
    assert (np.diff(values) <= 0).all()


def test_pairs_are_read_back_from_the_weights(release, tmp_path, convert):
  flags = release.write()
  code, out, _ = convert([*flags[:2], *flags[4:]])
  assert code == 0 and '45 pairs of orthologues read back' in out
  vocab = gc.load(tmp_path / 'model').vocabulary
  tokens = vocab.tokens([MOUSE[3], MOUSE[60], MOUSE[0]])
  human = [release.tokens[HUMAN[3]], release.tokens[HUMAN[0]]]
  assert tokens.tolist() == [*human, release.tokens[MOUSE[0]]]  # the last won


def test_names_without_medians(release, tmp_path, convert):
  code, out, _ = convert(release.write()[:4])
  assert code == 0 and 'no counts' in out
  model = gc.load(tmp_path / 'model')
  assert model.vocabulary.size == 182
  with pytest.raises(errors.UserError, match='--medians'):
    gc.embed(tiny_cells(3), model)


def test_medians_of_mouse_alone(release, tmp_path, convert):
  flags = release.write()
  code, out, _ = convert([*flags[:4], *flags[6:]])
  assert code == 0 and 'share: mouse, for lack of human ones' in out
  medians = gc.load(tmp_path / 'model').assets.medians
  token = release.tokens[HUMAN[3]]
  assert medians.divisor_V(1)[token] == release.medians[1][MOUSE[3]]


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
  release = Release(tmp_path, shuffled())
  genes = {g: t for g, t in release.tokens.items() if t > 1}
  vocab = vocabulary.Vocabulary.from_tokens(genes, {MOUSE[2]: HUMAN[2]})
  vocab.save(tmp_path / 'v.tsv.gz')
  again = vocabulary.Vocabulary.load(tmp_path / 'v.tsv.gz')
  assert again.token_gene_ids() == vocab.token_gene_ids()
  assert again.token_gene_ids()[2:] == tuple(shuffled())
  few = again.restrict([HUMAN[2], MOUSE[5]])
  assert set(few.token_gene_ids()[2:]) == {HUMAN[2], MOUSE[2], MOUSE[5]}
  assert few.tokens([MOUSE[2]]) == few.tokens([HUMAN[2]])


def _drop_gene(release):
  del release.tokens[MOUSE[-1]]


def _renamed(release):
  release.tokens['ERCC-1'] = release.tokens.pop(MOUSE[-1])


def _mask(release):
  release.tokens['<mask>'] = release.tokens[HUMAN[0]]
  release.tokens[HUMAN[0]] = 1


def _twice(release):
  release.tokens[HUMAN[0]] = release.tokens[HUMAN[1]]


def _fraction(release):
  release.tokens[HUMAN[0]] = 2.5


def _turned(release):
  release.pairs = {human: mouse for mouse, human in release.pairs.items()}


def _other_pairs(release):
  release.pairs[release.tokens[MOUSE[5]]] = release.tokens[HUMAN[70]]


def _pair_outside(release):
  release.pairs[5000] = 3


def _zero_median(release):
  release.medians[0][HUMAN[4]] = 0.0


def _two_medians(release):
  release.medians[1][HUMAN[4]] = 77.0


def _foreign_medians(release):
  release.medians = [{'TP53': 1.0}, {'Trp53': 2.0}]


def _no_dict(release):
  release.tokens = [1, 2]


def _homologs_short(release):
  release.weights[names.HOMOLOGS] = release.weights[names.HOMOLOGS][:-1]


def _table_long(release):
  name = names.knowledge_name('peca_grn')
  table = release.weights[name]
  release.weights[name] = np.concatenate([table, table[:3]])


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (_drop_gene, r'181 tokens, the weights have 182 \(rows of the word'),
    (_renamed, "neither human .* nor mouse .* 'ERCC-1' for one"),
    (_mask, '<mask> must be token 1'),
    (_twice, 'no gene has token 2, so another'),
    (_fraction, 'no token'),
    (_turned, 'another orthologue than in homologous_index'),
    (_other_pairs, 'another orthologue than in homologous_index'),
    (_pair_outside, 'token 5000 is that of no gene'),
    (_zero_median, 'has 0.0; medians'),
    (_two_medians, 'has 77.0, in a file before'),
    (_foreign_medians, 'keys are Ensembl ids'),
    (_no_dict, 'no dict of genes'),
    (_homologs_short, 'word_embeddings.weight 182, .*homologous_index 181'),
    (_table_long, 'word_embeddings.weight 182, .*peca_grn_knowledge 185'),
  ],
)  # fmt: skip
def test_files_that_do_not_fit_are_one_line(
  release, tmp_path, convert, change, match
):
  change(release)
  code, _, err = convert(release.write())
  assert code == errors.EXIT_USAGE and len(err) == 1
  assert re.search(match, err[0]), err
  assert not (tmp_path / 'model').exists()


def test_pointers_and_programs(release, tmp_path, convert):
  flags = release.write()
  good = (tmp_path / '0.pickle').read_bytes()
  for content, match in (
    (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    (b"cos\nsystem\n(S'touch hacked'\ntR.", 'names os.system'),
    (good[:100], 'damaged pickle'),
  ):
    (tmp_path / '0.pickle').write_bytes(content)
    code, _, (line,) = convert(flags)
    assert code == errors.EXIT_USAGE and match in line


@pytest.mark.parametrize(
  ('flags', 'match'),
  [
    (['--vocabulary', 'v', '--tokens', 't'], '--vocabulary or --tokens'),
    (['--orthologues', 'o'], 'give --tokens too'),
    (['--medians', 'm'], 'together'),
    (['--vocabulary', 'v'], 'together'),
  ],
)
def test_flags_that_do_not_go_together(release, convert, flags, match):
  release.write()
  code, _, (line,) = convert(flags)
  assert code == errors.EXIT_USAGE and match in line
