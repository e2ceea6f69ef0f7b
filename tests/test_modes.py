"""Both modes of encoding from training to embeddings, each with its nulls."""

import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import genecompass_jax as gc
from genecompass_jax import encoding, masking, metrics, nulls, workdir
from genecompass_jax.analysis import report
from tests import conftest

MODES = encoding.MODES


@pytest.fixture(scope='module')
def runs(tiny_run, tmp_path_factory):
  """{(objective, mode): workdir} of ten steps on one corpus."""
  made = {}
  for objective in masking.OBJECTIVES:
    for mode in MODES:
      made[objective, mode] = tmp_path_factory.mktemp('modes') / 'run'
      tiny_run(
        made[objective, mode],
        {
          'encoding.mode': mode,
          'data.mask.objective': objective,
          'optimizer.total_steps': 10,
          'eval_every': 10,
          'checkpoint_every': 10,
        },
      )
  return made


def test_every_run_is_evaluated_beside_nulls_of_its_own(runs):
  lines = {
    key: [x for x in metrics.read(folder) if 'eval_loss' in x][-1]
    for key, folder in runs.items()
  }
  for (objective, mode), folder in runs.items():
    models = nulls.NullModels.load(folder / workdir.NULLS)
    assert models.encoding.mode == mode
    assert models.mask.objective == objective
    line = lines[objective, mode]
    assert {k for k in line if k.startswith('null_')} == set(models.names)
    assert f'{line["null_id_rank_bracket"]:.4g}' in report.table(folder)
  for objective in masking.OBJECTIVES:
    # Medians of library mode tell genes apart: its bracket is stronger.
    bracket = {m: lines[objective, m]['null_id_rank_bracket'] for m in MODES}
    assert bracket['library'] < bracket['released'] - 0.2
    marginal = {m: lines[objective, m]['null_id_marginal'] for m in MODES}
    assert marginal['library'] == pytest.approx(marginal['released'], abs=0.3)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('objective', masking.OBJECTIVES)
def test_embeddings_are_of_cells_encoded_as_in_training(runs, objective, mode):
  """And the library is that of the file, unknown genes included."""
  model = gc.load(runs[objective, mode])
  assert model.assets.encoding.mode == model.assets.medians.mode == mode
  cells = conftest.tiny_cells(12, seed=9)
  got = gc.embed(cells, model, species='human', pooling='mean')
  counts = cells.X.tocsr()
  tokens = model.vocabulary.tokens(list(cells.var_names))
  encoder = encoding.CellEncoder(
    model.assets.encoding,
    np.asarray(tokens, np.int32),
    model.assets.medians.divisor_V(0),
  )
  encoded = encoder.encode(
    encoding.RaggedCells(
      counts.indices.astype(np.int32),
      counts.data,
      counts.indptr.astype(np.int64),
      np.asarray(counts.sum(1), np.float64).ravel(),
    )
  )
  for c, (a, b) in enumerate(zip(encoded.starts_C1, encoded.starts_C1[1:])):
    batch = gc.cell_batch(
      encoded.gene_ids_N[None, a:b], encoded.values_N[None, a:b], 'human'
    )
    mean = np.asarray(model.hidden_states(batch))[0, 1:].mean(0)
    np.testing.assert_allclose(got[c], mean, atol=2e-5)
  more = anndata.AnnData(
    scipy.sparse.hstack([counts, np.full((12, 1), 500.0, np.float32)], 'csr'),
    cells.obs,
    pd.DataFrame(index=[*cells.var_names, 'ENSG99999999999']),
  )
  again = gc.embed(more, model, species='human', pooling='mean')
  change = np.abs(again - got).max()
  assert (change > 1e-3) == (mode == 'library')


def test_commands_take_a_run_of_either_mode(runs, tmp_path):
  path = tmp_path / 'cells.h5ad'
  conftest.tiny_cells(20, seed=9).write_h5ad(path)
  folder = runs['split', 'library']
  for command in (
    ('report', str(folder)),
    (
      'embed',
      str(path),
      '--checkpoint',
      str(folder),
      '-o',
      str(tmp_path / 'o.h5ad'),
    ),
  ):
    result = subprocess.run(
      [sys.executable, '-m', 'genecompass_jax.cli', *command],
      capture_output=True,
      text=True,
    )
    assert result.returncode == 0, result.stderr
  done = anndata.read_h5ad(tmp_path / 'o.h5ad')
  assert np.isfinite(done.obsm['X_genecompass']).all()
  assert 'library' in str(done.uns['genecompass'])


def test_an_unknown_mode_is_refused(tiny_run, tmp_path):
  with pytest.raises(gc.UserError, match='encoding mode'):
    tiny_run(tmp_path, {'encoding.mode': 'total'})
