"""The recipe of docs/genes.md: rat cells, from annotation to embeddings.

Nothing in the package knows rat: its genes come from a GTF, its orthologues
from a homology table, its cells from an h5ad file.
"""

import json
import subprocess

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from genecompass_jax import cli, corpus
from tests.conftest import ROOT
from tests.test_prepare_genes import (
  compara,
  ensembl_gtf,
  gene_id,
  tsv,
  write,
)

NUM = 120
SPECIES = ('human', 'mouse', 'rat')
NAMES = {'human': str.upper, 'mouse': str.capitalize, 'rat': str.capitalize}


def annotation(species):
  """Genes 1 to NUM; 1 to 60 have orthologues in all species."""
  return [
    (n, NAMES[species](f'gene{n}x'), 'protein_coding', '1', 100 * n)
    for n in range(1, NUM + 1)
  ]


def homologies():
  pairs = [
    ('human', n, other, n) for other in ('mouse', 'rat') for n in range(1, 61)
  ]
  return compara(*pairs)


def cells(species, num_cells, seed):
  rng = np.random.default_rng(seed)
  rate = rng.gamma(0.6, 3.0, (2, NUM))[rng.integers(0, 2, num_cells)]
  matrix = scipy.sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
  ids = [gene_id(species, n) for n in range(1, NUM + 1)]
  obs = pd.DataFrame(
    {'donor': [f'{species}{d}' for d in rng.integers(0, 6, num_cells)]},
    index=[f'{species}-cell{i}' for i in range(num_cells)],
  )
  return anndata.AnnData(matrix, obs, pd.DataFrame(index=ids))


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp('species')
  gtfs = [
    f'{species}='
    + write(
      folder / f'{species}.gtf.gz', ensembl_gtf(species, annotation(species))
    )
    for species in SPECIES
  ]
  table = write(folder / 'homologies.tsv.gz', homologies())
  arguments = ['prep', 'genes', '-o', str(folder / 'genes.tsv.gz')]
  arguments += ['--vocabulary', str(folder / 'vocabulary.tsv.gz')]
  arguments += ['--annotation', *gtfs, '--orthologues', table]
  assert cli.main(arguments) == 0
  files = []
  for seed, species in enumerate(SPECIES):
    files.append(str(folder / f'{species}.h5ad'))
    cells(species, 300, seed).write_h5ad(files[-1])
  arguments = ['prep', *files, '-o', str(folder / 'corpus'), '--unit', 'donor']
  arguments += ['--vocabulary', str(folder / 'vocabulary.tsv.gz')]
  assert cli.main([*arguments, '--no-filters', '--assay', 'umi']) == 0
  return folder


def test_a_corpus_of_three_species(built):
  made = corpus.Corpus.open(built / 'corpus')
  assert made.vocabulary.species == SPECIES
  assert not made.verify()
  sizes = {s.species_name: s.num_cells for s in made.stores('train')}
  held = {s.species_name: s.num_cells for s in made.stores('validation')}
  assert {n: sizes[n] + held[n] for n in SPECIES} == dict.fromkeys(SPECIES, 300)
  token = [made.tokens(species) for species in range(3)]
  assert (token[0][:60] == token[2][:60]).all()  # orthologues share a token
  assert not set(token[2][60:]) & set(token[0])
  values = made.medians('released')
  np.testing.assert_array_equal(  # shared tokens have the human median
    values.divisor_V(2)[token[2][:60]], values.divisor_V(0)[token[0][:60]]
  )


@pytest.mark.slow  # 15 s
def test_it_trains_evaluates_and_embeds(built, train_command, tmp_path):
  # knowledge of genes of all three is one more table, by gene id
  rng = np.random.default_rng(0)
  rows = [
    (gene_id(species, n), *rng.normal(size=8).round(3))
    for species in SPECIES
    for n in range(1, 81)
  ]
  header = ('gene_id', *(f'v{k}' for k in range(8)))
  vectors = write(tmp_path / 'vectors.tsv', tsv(header, *rows))
  prior = tmp_path / 'extra.parquet'
  arguments = ['prior', 'table', vectors, '-o', str(prior), '--species', 'both']
  vocabulary = str(built / 'vocabulary.tsv.gz')
  assert cli.main([*arguments, '--vocabulary', vocabulary]) == 0
  facts = json.loads(prior.with_suffix('.json').read_text())
  assert {
    n: c['with_vector'] for n, c in facts['coverage'].items()
  } == dict.fromkeys(SPECIES, 80)
  workdir = tmp_path / 'run'
  changes = {'model.num_species': 3, 'priors': f"(('extra', '{prior}'),)"}
  command = train_command(workdir, changes, corpus=built / 'corpus')
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  lines = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  last = [line for line in lines if 'eval_id_loss' in line][-1]
  assert np.isfinite(last['eval_id_loss'])
  assert any('rat' in key for key in json.dumps(last).split('"'))
  out = tmp_path / 'out.h5ad'
  arguments = ['embed', str(built / 'rat.h5ad'), '-o', str(out)]
  assert cli.main([*arguments, '--checkpoint', str(workdir)]) == 0
  adata = anndata.read_h5ad(out)
  assert set(adata.obs['gc_species']) == {'rat'}
  assert np.isfinite(adata.obsm['X_genecompass']).all()


def test_too_few_species_in_the_model_is_said(built, train_command, tmp_path):
  command = train_command(tmp_path / 'run', corpus=built / 'corpus')
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 2
  assert 'model.num_species=2' in run.stderr
  assert 'set it to 3' in run.stderr
