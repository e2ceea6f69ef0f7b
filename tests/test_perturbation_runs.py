"""Screens in folders: killed, continued, shared among machines."""

import dataclasses
import os

import numpy as np
import pytest

from genecompass_jax import errors
from genecompass_jax.analysis import model_cells
from genecompass_jax.analysis.perturbation import (
  cell_set,
  effects,
  interventions,
  response_sums,
  runs,
  screen,
)
from tests.conftest import tiny_cells

FACTS = {'model': 'abc'}


@pytest.fixture(scope='module')
def cells(model):
  adata = tiny_cells(10, seed=5)
  return cell_set.read(model_cells.open_cells(adata, model), model)


@pytest.fixture
def make(cells, placed, monkeypatch):
  """A screen of several groups, made anew."""
  monkeypatch.setattr(screen, '_GROUP_VARIANTS', 80)
  tokens = np.unique(cells.counts.gene_rows_N)[::2]

  def made(**rest):
    done = [
      interventions.Intervention('delete', (int(t),), (f't{t}',))
      for t in tokens
    ]
    done = rest.pop('done', done)
    return screen.Screen(placed, rest.pop('cells', cells), done, **rest)

  return made


def equal(a, b):
  for field in dataclasses.fields(effects.CellEffects):
    np.testing.assert_array_equal(
      getattr(a, field.name), getattr(b, field.name)
    )


def sums_of(work):
  genes = np.unique(work.base.gene_ids_N)
  wanted = response_sums.Wanted(
    np.arange(len(work.done)),
    genes,
    np.arange(10),
    np.arange(10) % 2,
    ['a', 'b'],
  )
  return response_sums.ResponseSums([wanted])


def test_a_killed_run_goes_on(make, tmp_path, monkeypatch):
  work = make()
  assert len(work.groups) > 3
  expected_sums = sums_of(work)
  expected = runs.run(work, sums=expected_sums)
  folder = str(tmp_path / 'screen')
  # Its batches are no part of the work.
  monkeypatch.setattr(runs, 'estimate', lambda *work: 'not measured')
  ran = []
  run_group = screen.Screen.run

  def dying(self, group, sums=None, **more):
    if len(ran) == 2:
      raise KeyboardInterrupt
    ran.append(group)
    return run_group(self, group, sums, **more)

  monkeypatch.setattr(screen.Screen, 'run', dying)
  monkeypatch.setattr(runs, '_SECONDS_BETWEEN_SAVES', 0.0)
  with pytest.raises(KeyboardInterrupt):
    work = make()
    runs.run(work, runs.Folder(folder, work, FACTS), sums=sums_of(work))
  # A part that was being written, and one that the disk lost the end of.
  parts = sorted(os.listdir(f'{folder}/parts'))
  with open(f'{folder}/parts/{parts[-1]}', 'r+b') as file:
    file.truncate(100)
  counted = []

  def counting(self, group, sums=None, **more):
    counted.append(group)
    return run_group(self, group, sums, **more)

  monkeypatch.setattr(screen.Screen, 'run', counting)
  work = make()
  sums = sums_of(work)
  found = runs.run(work, runs.Folder(folder, work, FACTS), sums=sums)
  equal(found, expected)
  assert len(counted) == len(work.groups) - 1
  np.testing.assert_allclose(sums.sum_N, expected_sums.sum_N, atol=1e-6)
  # What is whole already is not run again.
  counted.clear()
  equal(runs.run(make(), runs.Folder(folder, make(), FACTS)), expected)
  assert not counted


def test_shards_meet_in_a_folder(make, tmp_path):
  work = make()
  expected = runs.run(work)
  folder = runs.Folder(str(tmp_path / 'screen'), work, FACTS)
  assert runs.run(work, folder, shard=(0, 2)) is None
  with pytest.raises(errors.UserError, match='not there yet'):
    folder.joined()
  assert runs.run(make(), folder, shard=(1, 2)) is None
  equal(folder.joined(), expected)
  for shard in ((2, 2), (-1, 2)):
    with pytest.raises(errors.UserError, match='give I/N'):
      runs.run(work, folder, shard=shard)
  with pytest.raises(errors.UserError, match='give one'):
    runs.run(work, shard=(0, 2))


def test_another_screen_is_not_mixed_in(make, cells, tmp_path):
  folder = str(tmp_path / 'screen')
  runs.Folder(folder, make(), FACTS)
  runs.Folder(folder, make(), FACTS)
  with pytest.raises(errors.UserError, match='its model is another'):
    runs.Folder(folder, make(), {'model': 'abd'})
  for name, other in (
    ('cells', make(cells=cells.take(np.arange(9)))),
    ('options', make(config=screen.ScreenConfig(pooling='cls'))),
    ('interventions', make(done=make().done[:-1])),
  ):
    with pytest.raises(errors.UserError, match=f'its {name} are others'):
      runs.Folder(folder, other, FACTS)
  (tmp_path / 'screen/settings.json').write_text('{')
  with pytest.raises(errors.UserError, match='cannot be read'):
    runs.Folder(folder, make(), FACTS)


def test_an_estimate_names_the_work(make):
  work = make()
  said = runs.estimate(work, work.groups)
  assert said.variants == work.num_variants and said.cells == 10
  assert said.seconds > 0 and said.compile_seconds >= 0
  assert f'{work.num_variants:,} variants of 10 cells' in str(said)


def test_damaged_files_of_a_folder(make, tmp_path):
  """Parts and sums are made again; settings are told of in one line."""
  work = make()
  sums = sums_of(work)
  expected = runs.run(work, runs.Folder(str(tmp_path), work, FACTS), sums=sums)
  part, responses = tmp_path / 'parts/000000.npz', tmp_path / 'responses.npz'
  whole = part.read_bytes()
  for data in (b'', whole[:99], whole[:8] + b'\xff' * 4 + whole[12:], b'{}'):
    part.write_bytes(data)
    responses.write_bytes(data)
    again = sums_of(work)
    found = runs.run(work, runs.Folder(str(tmp_path), work, FACTS), sums=again)
    np.testing.assert_array_equal(found.shift_N, expected.shift_N)
    np.testing.assert_array_equal(again.cells_N, sums.cells_N)
  np.savez(responses, sums=np.zeros(3))
  again = sums_of(work)
  assert not runs.Folder(str(tmp_path), work, FACTS).load_responses(again)
  for text in ('', '[]', '[' * 100_000, '{"model": '):
    (tmp_path / 'settings.json').write_text(text)
    with pytest.raises(errors.UserError, match='cannot be read'):
      runs.Folder(str(tmp_path), work, FACTS)


def test_sums_of_two_groups_keep_apart():
  """Each with its own variants, genes and units; all else is left out."""
  a = response_sums.Wanted(
    np.array([0, 2]),
    np.array([4, 9]),
    np.array([1, 3]),
    np.array([0, 1]),
    ['p', 'q'],
  )
  b = response_sums.Wanted(
    np.array([1]), np.array([4, 5, 6]), np.array([2]), np.array([0]), ['r']
  )
  sums = response_sums.ResponseSums([a, b])
  assert response_sums.num_bytes([a, b]) == 12 * (2 * 2 * 2 + 3)
  variant_B, cell_B = np.array([2, 1, 1, 9, 0]), np.array([3, 2, 3, 1, 7])
  token_BL = np.array([[4, 9, 90], [6, 4, 0]] + [[4, 9, 5]] * 3)
  response_BL = np.full((5, 3), 0.5, np.float32)
  response_BL[1, 1] = -1
  for _ in range(2):
    sums.add(variant_B, cell_B, token_BL, response_BL)
  of_a, of_b = sums.responses()
  assert of_a.token_G.tolist() == [4, 9] and of_b.token_G.tolist() == [6]
  assert of_a.units_U.tolist() == ['p', 'q']
  expected = np.zeros((2, 2, 2))
  expected[1, 1] = 1.0
  np.testing.assert_array_equal(of_a.sum_TUG, expected)
  np.testing.assert_array_equal(of_a.cells_TUG, 2 * expected)
  assert of_b.sum_TUG.tolist() == [[[1.0]]]
