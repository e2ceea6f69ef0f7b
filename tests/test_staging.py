import os

from genecompass_jax import staging


def test_staging_of_dead_runs_is_cleared(tmp_path):
  alive = staging.folder(str(tmp_path / 'c'))
  stem, _, pid = alive.rpartition('-')
  assert int(pid) == os.getpid()
  dead = f'{stem}-999999999'
  os.mkdir(dead)
  other_host = str(tmp_path / 'c.staging-elsewhere-999999999')
  os.mkdir(other_host)
  staging.folder(str(tmp_path / 'c'))
  assert not os.path.exists(dead)
  assert os.path.exists(other_host)


def test_a_finished_folder_takes_the_place_of_an_old_one(tmp_path):
  for text in ('old', 'new'):
    folder = staging.folder(str(tmp_path / 'c'))
    with open(os.path.join(folder, text), 'w'):
      pass
    staging.swap(folder, str(tmp_path / 'c'))
  assert os.listdir(tmp_path) == ['c']
  assert os.listdir(tmp_path / 'c') == ['new']
