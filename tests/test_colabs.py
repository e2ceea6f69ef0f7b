"""Notebooks run from top to bottom, and are committed without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

COLABS = pathlib.Path(__file__).resolve().parents[1] / 'colabs'
NOTEBOOKS = sorted(path.name for path in COLABS.glob('*.ipynb'))
PUBLIC_ONLY = ('from genecompass_jax', 'import genecompass_jax.')


def test_there_are_notebooks():
  assert 'quick_start.ipynb' in NOTEBOOKS


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook_is_stripped_and_uses_the_public_surface(name):
  notebook = nbformat.read(COLABS / name, as_version=4)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None
      assert not any(text in cell.source for text in PUBLIC_ONLY)


def execute(name, folder):
  notebook = nbformat.read(COLABS / name, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name='python3',
    resources={'metadata': {'path': folder}},
  )
  client.execute()
  return notebook


def kinds(notebook):
  """Media types of what the cells showed."""
  outputs = [o for c in notebook.cells for o in c.get('outputs', ())]
  return {kind for o in outputs for kind in o.get('data', {})}


# Those whose few steps take a minute are slow too.
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=[pytest.mark.slow] * n.startswith('analyse'))
    for n in NOTEBOOKS
  ],
)
def test_notebook_runs(name, tmp_path, monkeypatch):
  monkeypatch.setenv('GENECOMPASS_SMOKE', '1')
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  notebook = execute(name, tmp_path)
  assert 'image/png' in kinds(
    notebook
  )  # pictures are shown where they are made


@pytest.mark.slow  # minutes: the whole notebook, not a few steps of it
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_whole_notebook_runs(name, tmp_path, monkeypatch):
  monkeypatch.delenv('GENECOMPASS_SMOKE', raising=False)
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  notebook = execute(name, tmp_path)
  assert 'image/png' in kinds(notebook)
