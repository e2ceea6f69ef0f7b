"""Embeddings do not depend on how they were computed; `genecompass embed`."""

import os
import subprocess
import sys

import anndata
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import cli, errors
from genecompass_jax.prepare import sources
from tests.conftest import _tiny_cells as tiny_cells

TOLERANCE = 1e-5
SPECIES = ('human', 'mouse')


@pytest.fixture(scope='module')
def model(trained):
  return gc.load(trained)


@pytest.mark.parametrize('pooling', ['cls', 'mean'])
@pytest.mark.parametrize('species', [0, 1])
def test_order_batch_and_chunk_change_nothing(
  model, species, pooling, monkeypatch
):
  adata = tiny_cells(40, species, seed=5)
  asked = {'species': SPECIES[species], 'pooling': pooling}
  embedded = gc.embed(adata, model, **asked)
  assert embedded.shape == (40, model.config.width)
  assert np.isfinite(embedded).all() and embedded.std(0).min() > 0
  order = np.random.default_rng(0).permutation(40)
  shuffled = gc.embed(adata[order].copy(), model, **asked, batch_size=7)
  np.testing.assert_allclose(shuffled, embedded[order], atol=TOLERANCE)
  chunks = sources.CellStream.chunks
  monkeypatch.setattr(sources.CellStream, 'chunks', lambda s: chunks(s, 3))
  one_by_one = gc.embed(adata, model, **asked, batch_size=1)
  np.testing.assert_allclose(one_by_one, embedded, atol=TOLERANCE)


def test_a_file_gives_what_memory_gives_and_keeps_its_order(
  model, trained, tmp_path
):
  adata = tiny_cells(30, 0, seed=6)
  adata.write_h5ad(tmp_path / 'cells.h5ad')
  out = tmp_path / 'out.h5ad'
  code = cli.main(
    ['embed', str(tmp_path / 'cells.h5ad'), '-o', str(out)]
    + ['--checkpoint', str(trained), '--species', 'human']
  )
  assert code == 0
  written = anndata.read_h5ad(out)
  assert list(written.obs_names) == list(adata.obs_names)
  np.testing.assert_array_equal(written.X.toarray(), adata.X.toarray())
  expected = gc.embed(adata, model, species='human')
  np.testing.assert_allclose(
    written.obsm['X_genecompass'], expected, atol=TOLERANCE
  )
  for name in (
    *('gc_n_genes_used', 'gc_share_umi_mapped'),
    *('gc_share_umi_truncated', 'gc_species'),
  ):
    assert list(written.obs[name]) == list(adata.obs[name]), name
  facts = written.uns['genecompass']
  assert facts['checkpoint'] == model.sha256
  assert facts['vocabulary'] == model.vocabulary.sha256
  assert (written.obs['gc_n_genes_used'] <= 63).all()
  assert written.obs['gc_share_umi_mapped'].between(0, 1).all()


def test_genes_outside_of_the_vocabulary_are_left_out(model):
  """A model of few genes takes a file of many; no symbol goes astray."""
  adata = tiny_cells(12, 0, seed=7)
  table = gc.GeneTable.default()
  rows = np.flatnonzero(
    (table.species_G == 0) & (np.array(table.biotypes) == 'protein_coding')
  )
  known = set(adata.var_names)
  others = [table.gene_ids[r] for r in rows if table.gene_ids[r] not in known]
  wide = anndata.concat(
    [
      adata,
      anndata.AnnData(
        np.ones((12, 5000), np.float32),
        adata.obs,
        adata.var.iloc[:0].reindex(others[:5000]),
      ),
    ],
    axis=1,
  )
  np.testing.assert_allclose(
    gc.embed(wide, model, species='human'),
    gc.embed(adata, model, species='human'),
    atol=TOLERANCE,
  )


DEVICES = """
import sys
import anndata, jax, numpy as np
import genecompass_jax as gc
assert len(jax.devices()) == int(sys.argv[1])
adata = anndata.read_h5ad(sys.argv[2])
np.save(sys.argv[4], gc.embed(adata, gc.load(sys.argv[3]), species='human'))
"""


def test_devices_change_nothing(trained, tmp_path):
  tiny_cells(30, 0, seed=8).write_h5ad(tmp_path / 'cells.h5ad')
  found = {}
  for devices in (1, 2, 8):
    out = tmp_path / f'{devices}.npy'
    flags = os.environ.get('XLA_FLAGS', '')
    flags += f' --xla_force_host_platform_device_count={devices}'
    subprocess.run(
      [sys.executable, '-c', DEVICES, str(devices)]
      + [str(tmp_path / 'cells.h5ad'), str(trained), str(out)],
      check=True,
      env={**os.environ, 'XLA_FLAGS': flags},
    )
    found[devices] = np.load(out)
  np.testing.assert_allclose(found[2], found[1], atol=TOLERANCE)
  np.testing.assert_allclose(found[8], found[1], atol=TOLERANCE)


def _bad(kind: str, path) -> None:
  adata = tiny_cells(10, 0, seed=9)
  matrix = adata.X.toarray()
  if kind == 'log':
    adata.X = np.log1p(matrix)
    adata.layers['counts'] = matrix
  elif kind == 'negative':
    adata.X = matrix - 3.0
  elif kind == 'not finite':
    matrix[0, 0] = np.nan
    adata.X = matrix
  elif kind == 'unknown genes':
    adata.var_names = [f'gene{i}' for i in range(adata.n_vars)]
  elif kind == 'empty':
    adata = adata[:0].copy()
  if kind == 'not an h5ad':
    path.write_text('hello')
  else:
    adata.write_h5ad(path)


@pytest.mark.parametrize(
  ('kind', 'flags', 'says'),
  [
    ('not an h5ad', [], 'not an h5ad'),
    ('empty', [], 'no cells'),
    ('log', ['--layer', 'X'], 'layers/counts'),
    ('negative', [], 'negative'),
    ('not finite', [], 'finite'),
    ('unknown genes', ['--species', 'human'], ''),
    ('fine', ['--species', 'mouse'], '--species human'),
    ('fine', ['--checkpoint', 'nowhere'], 'no model here'),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
  kind, flags, says, trained, tmp_path, capsys
):
  _bad(kind, tmp_path / 'cells.h5ad')
  out = tmp_path / 'out.h5ad'
  code = cli.main(
    ['embed', str(tmp_path / 'cells.h5ad'), '-o', str(out)]
    + ['--checkpoint', str(trained), *flags]
  )
  said = capsys.readouterr().err.strip()
  assert code == errors.EXIT_USAGE, said
  assert len(said.splitlines()) == 1
  assert says in said
  assert [p.name for p in tmp_path.iterdir()] == ['cells.h5ad']


def test_an_output_that_is_there_is_kept(trained, tmp_path, capsys):
  _bad('fine', tmp_path / 'cells.h5ad')
  (tmp_path / 'out.h5ad').write_text('mine')
  command = ['embed', str(tmp_path / 'cells.h5ad')]
  command += ['-o', str(tmp_path / 'out.h5ad'), '--checkpoint', str(trained)]
  assert cli.main(command) == errors.EXIT_USAGE
  assert '--overwrite' in capsys.readouterr().err
  assert (tmp_path / 'out.h5ad').read_text() == 'mine'
