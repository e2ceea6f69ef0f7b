"""Builds that are interrupted, run by several processes, or run out of disk."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from genecompass_jax import corpus, errors, staging
from genecompass_jax.prepare import pipeline, quality, sources
from genecompass_jax.prepare.building import builds, engines, pieces
from tests.test_prepare_pipeline import make

ROOT = pathlib.Path(__file__).resolve().parents[1]
OFF = quality.QualityConfig.off()

# a build of many small tasks, in a process of its own
BUILD = """
import sys
from genecompass_jax.prepare import pipeline, quality, sources
from genecompass_jax.prepare.building import pieces

def main(out, engine, jobs, *files):
  pieces.MIN_ENTRIES = 3000
  pipeline.prepare(
    [sources.SourceConfig(file, unit='donor') for file in files], out,
    pipeline.PrepareConfig(
      vocabulary='measured', filters=quality.QualityConfig.off(),
      engine=engine, jobs=int(jobs), bucket_bytes=100_000,
      shard_elements=20_000, medians='exact', weigh_by=('unit',)))

if __name__ == '__main__':
  main(*sys.argv[1:])
"""


def start(folder, out, engine='pool', jobs=1):
  script = folder / 'build.py'
  script.write_text(BUILD)
  files = sorted(str(path) for path in folder.glob('*.h5ad'))
  return subprocess.Popen(
    [sys.executable, str(script), str(out), engine, str(jobs), *files],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )


def results(out):
  """Results of finished tasks, by name, with when they were written."""
  found = {}
  # what is listed may be gone before it is looked at: the build has just ended
  with contextlib.suppress(FileNotFoundError):
    for path in pathlib.Path(f'{out}.building').glob('*/*.json'):
      if path.stem.isdigit():
        name = path.relative_to(f'{out}.building')
        found[name] = path.stat().st_mtime_ns
  return found


def content(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in pathlib.Path(folder).rglob('*')
    if path.is_file() and path.name != 'build.json'
  }


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cells')
  make(1500, 0).write_h5ad(folder / 'a.h5ad')
  make(900, 1, species=1).write_h5ad(folder / 'b.h5ad')
  process = start(folder, folder / 'whole')
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err.decode()
  return folder, content(folder / 'whole')


def test_processes_give_the_same_bytes(cells):
  folder, whole = cells
  process = start(folder, folder / 'pool', jobs=2)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err.decode()
  assert content(folder / 'pool') == whole


def test_beam_gives_the_same_bytes(cells):
  pytest.importorskip('apache_beam', reason='pip install ".[beam]"')
  folder, whole = cells
  process = start(folder, folder / 'beam', 'beam')
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err.decode()
  assert content(folder / 'beam') == whole


@pytest.mark.slow  # 20 s
def test_killed_again_and_again_it_goes_on(cells):
  folder, whole = cells
  out = folder / 'killed'
  rng = random.Random(0)
  kills = 0
  while True:
    before = results(out)
    wanted = len(before) + (rng.randrange(1, 40) if kills < 3 else 10**9)
    process = start(folder, out, jobs=1 + kills % 2)
    while process.poll() is None and len(results(out)) < wanted:
      time.sleep(0.01)
    if process.poll() is not None:
      assert process.returncode == 0, process.stderr.read().decode()
      break
    process.kill()
    process.wait()
    kills += 1
    after = results(out)
    assert {name: after[name] for name in before} == before  # none repeated
    assert not out.exists()
    with pytest.raises(errors.UserError, match='no corpus here'):
      corpus.Corpus.open(out)
    with pytest.raises(errors.UserError, match='no corpus here'):
      corpus.Corpus.open(f'{out}.building/corpus')
  assert kills == 3
  assert content(out) == whole
  assert not os.path.exists(f'{out}.building')


def prepare(folder, out, **kwargs):
  config = sources.SourceConfig(str(folder / 'a.h5ad'), unit='donor')
  return pipeline.prepare(
    [config],
    out,
    pipeline.PrepareConfig(vocabulary='measured', filters=OFF, **kwargs),
  )


def stop_after(monkeypatch, stage, error):
  """A build that ends with an error in the first task of a stage."""
  run = builds.run_stage

  def stop(engine, at, *rest):
    if at.name == stage:
      raise error
    return run(engine, at, *rest)

  monkeypatch.setattr(builds, 'run_stage', stop)
  return lambda: monkeypatch.setattr(builds, 'run_stage', run)


def test_another_build_in_its_place_starts_anew(cells, tmp_path, monkeypatch):
  folder, _ = cells
  out = tmp_path / 'c'
  go_on = stop_after(monkeypatch, 'runs', KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt):
    prepare(folder, out)
  done = results(out)
  assert done
  with pytest.raises(KeyboardInterrupt):
    prepare(folder, out)
  assert results(out) == done
  with pytest.raises(KeyboardInterrupt):
    prepare(folder, out, seed=1)
  assert results(out).keys() == done.keys()
  assert not set(results(out).values()) & set(done.values())
  go_on()
  made = prepare(folder, out)
  assert not made.verify()
  assert os.listdir(tmp_path) == ['c']


def test_a_full_disk_is_told_and_the_rest_kept(cells, tmp_path, monkeypatch):
  folder, _ = cells
  out = tmp_path / 'c'
  go_on = stop_after(monkeypatch, 'shards', OSError(28, 'No space left'))
  with pytest.raises(errors.RetryableError, match='is full; what is finished'):
    prepare(folder, out)
  assert not out.exists()
  done = results(out)
  assert done
  go_on()
  assert not prepare(folder, out).verify()


def test_one_build_at_a_time(cells, tmp_path):
  folder, _ = cells
  out = tmp_path / 'c'
  with (
    builds.opened(f'{out}.building', None),
    pytest.raises(errors.UserError, match='another process builds here'),
  ):
    prepare(folder, out)


def test_a_dead_worker_is_told(tmp_path):
  with (
    engines.opened('pool', 2, ()) as engine,
    pytest.raises(errors.RetryableError, match='a worker process died'),
  ):
    engine.run(os._exit, [1], lambda cells: None)


def test_unknown_engines_are_refused():
  with pytest.raises(errors.UserError, match='--engine flink'):
    pipeline.PrepareConfig(engine='flink')


def test_pieces_cover_every_cell_once():
  cut = pieces.cut([10**9, 5, 3 * 10**7], [700_000, 1, 20_000])
  for source, num_cells in enumerate([700_000, 1, 20_000]):
    mine = [p for p in cut if p.source == source]
    assert mine[0].first == 0
    assert mine[-1].stop == num_cells
    assert all(a.stop == b.first for a, b in zip(mine, mine[1:]))
  assert len(cut) > 100


def test_buckets_and_pieces_do_not_change_the_corpus(
  cells, tmp_path, monkeypatch
):
  folder, _ = cells
  prepare(folder, tmp_path / 'one', medians='exact')
  monkeypatch.setattr(pieces, 'MIN_ENTRIES', 2000)
  prepare(folder, tmp_path / 'many', medians='exact', bucket_bytes=10_000)
  assert content(tmp_path / 'one') == content(tmp_path / 'many')


def test_weights_of_rare_kinds_are_in_the_manifest(cells, tmp_path):
  folder, _ = cells
  made = prepare(folder, tmp_path / 'c', weigh_by=('unit',))
  weights = made.manifest['weights']
  cells_K = np.array([kind['cells'] for kind in weights['kinds']])
  weight_K = np.array([kind['weight'] for kind in weights['kinds']])
  assert weights['by'] == ['unit']
  assert cells_K.sum() == made.num_cells('train')
  assert (weight_K * cells_K).sum() == pytest.approx(cells_K.sum(), rel=1e-4)
  np.testing.assert_allclose(
    weight_K / weight_K[0], (cells_K / cells_K[0]) ** -0.5, rtol=1e-4
  )
  with pytest.raises(errors.UserError, match='--weigh_by tissue'):
    prepare(folder, tmp_path / 'd', weigh_by=('tissue',))


def test_the_identity_of_a_build_is_json():
  config = pipeline.PrepareConfig()
  assert json.loads(json.dumps(config.result_fields()))


class Killed(BaseException):
  """Nothing in the package catches it, as nothing catches kill -9."""


def kill_at(monkeypatch, module, name, after=False):
  """Ends the process, as it were, before or after a call; undone by the result."""
  real = getattr(module, name)

  def die(*args):
    if after:
      real(*args)
    raise Killed

  monkeypatch.setattr(module, name, die)
  return lambda: monkeypatch.setattr(module, name, real)


def test_killed_after_it_took_its_name_it_is_written_again(
  cells, tmp_path, monkeypatch
):
  folder, _ = cells
  out = tmp_path / 'c'
  prepare(folder, out)
  go_on = kill_at(monkeypatch, staging, 'swap', after=True)
  with pytest.raises(Killed):
    prepare(folder, out, seed=1, overwrite=True)
  go_on()
  whole = content(out)
  made = prepare(folder, out, seed=1, overwrite=True)
  assert not made.verify()
  assert content(out) == whole


@pytest.mark.parametrize('name', ['rmtree', '_remove'])
def test_killed_while_it_cleans_up_it_starts_anew(
  cells, tmp_path, monkeypatch, name
):
  folder, _ = cells
  out = tmp_path / 'c'
  stop = stop_after(monkeypatch, 'shards', KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt):
    prepare(folder, out)
  stop()
  # other settings clear the place; a kill among the files leaves some results
  module = shutil if name == 'rmtree' else builds
  go_on = kill_at(monkeypatch, module, name, after=True)
  with pytest.raises(Killed):
    prepare(folder, out, seed=1)
  go_on()
  assert not prepare(folder, out).verify()


def test_a_corpus_of_other_settings_beside_the_scratch_is_not_taken(
  cells, tmp_path, monkeypatch
):
  folder, _ = cells
  out, scratch = tmp_path / 'c', str(tmp_path / 'scratch')
  go_on = kill_at(monkeypatch, staging, 'swap')
  with pytest.raises(Killed):
    prepare(folder, out, seed=1, scratch=scratch)
  go_on()
  assert os.path.exists(f'{out}.staging/manifest.json')
  made = prepare(folder, out, seed=2, scratch=scratch)
  assert made.manifest['seed'] == 2
  prepare(folder, tmp_path / 'd', seed=2)
  assert content(out) == content(tmp_path / 'd')


def test_a_file_that_is_named_beside_the_cells_is_part_of_the_build(
  cells, tmp_path, monkeypatch
):
  folder, _ = cells
  known = prepare(folder, tmp_path / 'known').vocabulary
  chosen = tmp_path / 'chosen.tsv.gz'
  ids = list(known.genes.gene_ids)
  config = sources.SourceConfig(str(folder / 'a.h5ad'), unit='donor')

  def build(out):
    settings = pipeline.PrepareConfig(vocabulary=str(chosen), filters=OFF)
    return pipeline.prepare([config], out, settings)

  known.restrict(ids[::2]).save(chosen)
  go_on = stop_after(monkeypatch, 'runs', KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt):
    build(tmp_path / 'c')
  go_on()
  known.restrict(ids[1::2]).save(chosen)  # as many genes, but others
  build(tmp_path / 'c')
  build(tmp_path / 'd')
  assert content(tmp_path / 'c') == content(tmp_path / 'd')


def test_files_that_cells_depend_on(tmp_path):
  for name in ('a_matrix.mtx', 'a_barcodes.tsv', 'a_genes.tsv.gz'):
    (tmp_path / name).write_text('')
  config = sources.SourceConfig(
    str(tmp_path / 'a_matrix.mtx'), obs_table='t.csv', medians='m1,m2'
  )
  found = [os.path.basename(name) for name in sources.named_files(config)]
  assert found == [
    'a_matrix.mtx', 't.csv', 'm1', 'm2', 'a_barcodes.tsv', 'a_genes.tsv.gz',
  ]  # fmt: skip
