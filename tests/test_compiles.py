"""Compiled programs are counted, and kept over restarts."""

import os

import jax
import numpy as np
import pytest
from jax import monitoring

from genecompass_jax.training import compiles


def program(scale):
  return jax.jit(lambda x: x * scale)


def test_programs_are_counted_once_and_while_it_listens():
  pieces = []
  counter = compiles.Counter(pieces.append)
  assert counter.number is None
  function, x = program(2.0), np.ones(3, np.float32)
  counter.start()
  function(x)
  function(x)
  first = counter.number
  function(np.ones(4, np.float32))
  counter.stop()
  program(3.0)(x)
  assert first == 1
  assert counter.number == 2
  assert set(counter.programs.values()) == {2}
  assert counter.seconds == pytest.approx(sum(pieces))
  assert counter.seconds > 0


def test_the_time_of_what_runs_inside_is_counted_once(stop_clock):
  now = stop_clock(compiles)
  counter = compiles.Counter()
  trace, lower, compiled = compiles._PARTS

  def tell(at, duration, event):
    now[0] = at
    counter._listen(event, duration, fun_name='f')

  tell(1.0, 0.5, trace)  # 0.5 .. 1.0
  tell(2.0, 0.5, compiled)  # 1.5 .. 2.0
  tell(3.0, 3.0, trace)  # 0.0 .. 3.0: both were inside
  tell(4.0, 1.0, lower)
  tell(9.0, 4.0, compiled)
  tell(9.5, 4.0, '/jax/something/else')
  assert counter.seconds == pytest.approx(8.0)
  assert counter.number == 2


def test_a_jax_that_tells_nothing_does_no_harm(monkeypatch):
  for name in (
    'register_event_duration_secs_listener',
    'unregister_event_duration_listener',
  ):
    monkeypatch.delattr(monitoring, name)
  counter = compiles.Counter()
  counter.start()
  program(5.0)(np.ones(3, np.float32))
  counter.stop()
  assert counter.number is None


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
  """As where nobody has chosen a place; what was chosen is put back."""
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', None)
  yield tmp_path
  jax.config.update('jax_compilation_cache_dir', before)


def test_programs_are_kept_by_kind_of_host(no_cache):
  compiles.keep_programs()
  folder = compiles.cache_folder()
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert folder.is_relative_to(no_cache)
  old, new = folder / 'old-cache', folder / 'new-cache'
  for path in (old, new):
    path.touch()
  os.utime(old, (0, 0))
  jax.config.update('jax_compilation_cache_dir', None)
  compiles.keep_programs()
  assert [path.name for path in folder.iterdir()] == ['new-cache']


def test_what_the_user_chose_stays(no_cache, monkeypatch):
  jax.config.update('jax_compilation_cache_dir', 'mine')
  compiles.keep_programs()
  assert jax.config.jax_compilation_cache_dir == 'mine'
  jax.config.update('jax_compilation_cache_dir', None)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')
  compiles.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  compiles.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None
