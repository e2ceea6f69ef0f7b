"""Fixtures shared by the tests: real cells, recorded numbers, tiny runs."""

import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_SLOW_LIMIT_S = 3600.0

# A run of seconds: what experiments/tiny.py:smoke is changed to.
TINY_RUN = {
  'model.width': 32,
  'model.num_heads': 2,
  'model.feed_forward': 64,
  'model.max_genes': 63,
  'encoding.max_genes': 63,
  'data.buckets': (64,),
  'data.rows_per_batch': 8,
  'optimizer.total_steps': 40,
  'optimizer.warmup_steps': 4,
  'log_every': 1,
  'eval_every': 20,
  'eval_cells': 16,
  'checkpoint_every': 5,
  'keep_checkpoints': 10,
}


def pytest_configure(config):
  """Compiling is most of the time of tests: do it once, and quickly."""
  # Jobs in the background of a shell, and all they start, are deaf to Ctrl-C.
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
  if _CACHE not in os.environ:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix='genecompass-tests-')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
    config.add_cleanup(
      lambda: shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True)
    )


def pytest_collection_modifyitems(items):
  """Slow tests may take longer before they count as hanging."""
  for item in items:
    if item.get_closest_marker('slow') and not item.get_closest_marker(
      'timeout'
    ):
      item.add_marker(pytest.mark.timeout(_SLOW_LIMIT_S))


def _folder(variable: str, default: str) -> pathlib.Path:
  folder = pathlib.Path(os.environ.get(variable, ROOT.parent / default))
  if not folder.is_dir():
    pytest.skip(f'{variable} is not set and {default} is not beside the code')
  return folder


@pytest.fixture
def stop_clock(monkeypatch):
  """stop_clock(module) -> [seconds]: the time that this module is told.

  The clock of no other: a loop of some store's client that runs in a thread of
  this process would wait for ever beside a `time.monotonic` that stands still.
  """

  def stop(module, seconds: float = 0.0) -> list[float]:
    now = [seconds]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(module, 'time', clock)
    return now

  return stop


@pytest.fixture(scope='session')
def served():
  """An object store, and the variables that lead its clients to it.

  One for all: epath keeps the client that it made first, with its address.
  """
  from tests import object_store

  with (
    object_store.ObjectStore() as store,
    pytest.MonkeyPatch.context() as set_,
  ):
    for name, value in object_store.environment(store.url).items():
      set_.setenv(name, value)
    yield store


@pytest.fixture
def store(served, monkeypatch):
  """The store, empty and in order, and clients that give up soon."""
  from genecompass_jax import shards, web

  served.objects.clear()
  served.delay, served.fault = 0.0, lambda request: None
  served.forget()
  soon = {**shards._RETRIES, 'max_retries': 1}
  monkeypatch.setattr(shards, '_RETRIES', soon)
  monkeypatch.setattr(web, 'TRIES', 2)
  yield served
  served.delay, served.fault = 0.0, lambda request: None


@pytest.fixture(scope='session')
def real_data() -> pathlib.Path:
  """Folder of real data sets; tests that need it skip where it is absent."""
  return _folder('GENECOMPASS_DATA', 'shared/data')


@pytest.fixture(scope='session')
def oracle() -> pathlib.Path:
  """Folder of outputs recorded from the original model; skips if absent."""
  return _folder('GENECOMPASS_ORACLE', 'shared/oracle')


@pytest.fixture(scope='session')
def simulated_knowledge(tmp_path_factory):
  """An atlas of 600 genes a species, and the folder of tables about it."""
  from genecompass_jax import simulate

  folder = tmp_path_factory.mktemp('knowledge')
  atlas = simulate.Atlas(
    simulate.AtlasConfig(
      num_genes=600, num_tfs=60, num_cycle_genes=20, one_to_many=10,
      panel_genes=200,
    )
  )  # fmt: skip
  simulate.write_knowledge(
    atlas, folder, precision=0.9, recall=0.9, withheld=0.0
  )
  return atlas, folder


def tiny_genes(species: int, num: int = 90) -> list[str]:
  """Genes of a species, half of them with their one-to-one orthologue."""
  from genecompass_jax import gene_table

  table = gene_table.GeneTable.default()
  in_group = np.array([group != '' for group in table.orthologue_groups])
  mine = table.species_G == species
  group_of = {}
  for g in np.flatnonzero(in_group):
    group_of.setdefault(table.orthologue_groups[g], []).append(g)
  pairs = [
    genes
    for genes in group_of.values()
    if sorted(table.species_G[genes]) == [0, 1]
  ][: num // 2]
  shared = [g for genes in pairs for g in genes if mine[g]]
  alone = np.flatnonzero(mine & ~in_group)[: num - len(shared)]
  return [table.gene_ids[g] for g in (*shared, *alone)]


def tiny_cells(num_cells: int, species: int = 0, seed: int = 0):
  """An AnnData of counts: 90 genes, some 40 a cell, two kinds of cells."""
  import anndata
  import pandas as pd
  import scipy.sparse

  rng = np.random.default_rng([seed, species])
  genes = tiny_genes(species)
  kind_C = rng.integers(0, 2, num_cells)
  rate_KR = rng.gamma(0.6, 3.0, (2, len(genes)))
  counts = rng.poisson(rate_KR[kind_C] * rng.gamma(4, 0.25, (num_cells, 1)))
  obs = pd.DataFrame(
    {
      'donor': [f'd{i}' for i in rng.integers(0, 8, num_cells)],
      'cell_type': np.array(['A', 'B'])[kind_C],
    },
    index=[f'cell{i}' for i in range(num_cells)],
  )
  return anndata.AnnData(
    scipy.sparse.csr_matrix(counts.astype(np.float32)),
    obs,
    pd.DataFrame(index=genes),
  )


@pytest.fixture(scope='session')
def tiny_corpus(tmp_path_factory) -> pathlib.Path:
  """A corpus of 480 human and 240 mouse cells; not to be changed."""
  from genecompass_jax.prepare import pipeline, quality, sources

  path = tmp_path_factory.mktemp('tiny') / 'corpus'
  opened = [
    sources.from_anndata(
      tiny_cells(num, species),
      sources.SourceConfig(
        name=name, unit='donor', assay='umi', obs=('cell_type',)
      ),
    )
    for species, (name, num) in enumerate((('human', 480), ('mouse', 240)))
  ]
  pipeline.prepare(
    opened,
    path,
    pipeline.PrepareConfig(
      vocabulary='measured', filters=quality.QualityConfig.off()
    ),
  )
  return path


@pytest.fixture(scope='session')
def train_command(tiny_corpus):
  """Makes the command of a tiny run: (workdir, corpus=..., changes)."""

  def make(workdir, changes=(), corpus=tiny_corpus) -> list[str]:
    values = {'corpus': corpus, **TINY_RUN, **dict(changes)}
    return [
      *(sys.executable, '-m', 'genecompass_jax.main'),
      f'--config={ROOT}/experiments/tiny.py:smoke',
      f'--workdir={workdir}',
      *(f'--config.{key}={value}' for key, value in values.items()),
    ]

  return make


@pytest.fixture(scope='session')
def trained(train_command, tmp_path_factory) -> pathlib.Path:
  """The workdir of a tiny run that nothing disturbed; not to be changed."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  result = subprocess.run(
    train_command(workdir), cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  return workdir


@pytest.fixture(scope='session')
def model(trained):
  """What that run left, restored."""
  import genecompass_jax as gc

  return gc.load(trained)


@pytest.fixture(scope='session')
def placed(model):
  """The same on the devices."""
  from genecompass_jax.analysis import placed_model

  return placed_model.place(model)


@pytest.fixture(scope='session')
def tiny_run(tiny_corpus):
  """Does a tiny run in this process: (workdir, changes, corpus=...)."""
  import ml_collections

  from genecompass_jax import main

  get_config = runpy.run_path(str(ROOT / 'experiments/tiny.py'))['get_config']

  def run(workdir, changes=(), corpus=tiny_corpus) -> None:
    config = get_config('smoke').unlock()
    for key, value in {**TINY_RUN, **dict(changes)}.items():
      *groups, name = key.split('.')
      part = config
      for group in groups:
        if group not in part:
          part[group] = ml_collections.ConfigDict()
        part = part[group]
      part[name] = value
    config.corpus = str(corpus)
    main.run(config, str(workdir))

  return run
