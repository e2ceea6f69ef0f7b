"""Fixtures shared by the tests: where real cells and recorded numbers lie."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _folder(variable: str, default: str) -> pathlib.Path:
  folder = pathlib.Path(os.environ.get(variable, ROOT.parent / default))
  if not folder.is_dir():
    pytest.skip(f'{variable} is not set and {default} is not beside the code')
  return folder


@pytest.fixture(scope='session')
def real_data() -> pathlib.Path:
  """Folder of real data sets; tests that need it skip where it is absent."""
  return _folder('GENECOMPASS_DATA', 'shared/data')


@pytest.fixture(scope='session')
def oracle() -> pathlib.Path:
  """Folder of outputs recorded from the original model; skips if absent."""
  return _folder('GENECOMPASS_ORACLE', 'shared/oracle')
