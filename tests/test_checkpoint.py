"""Saving, sealing, and passing over what is damaged."""

import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from genecompass_jax import checkpoint, errors, locks
from tests.faults import flip_a_bit, largest


def state(step):
  params = {'a': {'kernel': np.full((4, 3), step, np.float32)}}
  training = {'step': np.int32(step), 'moment': np.arange(5.0) + step}
  return jax.tree.map(jax.numpy.asarray, (params, training))


def shapes():
  return jax.eval_shape(lambda: state(0))


def save(folder, steps, keep=3):
  checkpoints = checkpoint.Checkpoints(folder, keep=keep)
  for step in steps:
    checkpoints.save(step, *state(step), {'step': step})
  checkpoints.close()


def test_what_is_saved_comes_back(tmp_path):
  save(tmp_path, [2, 4])
  opened = checkpoint.Checkpoints(tmp_path)
  assert opened.latest() == 4
  for step in (2, 4):
    restored = opened.restore(step, *shapes())
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    assert checkpoint.read_metadata(tmp_path / str(step)) == {'step': step}
  opened.close()
  assert checkpoint.latest_step(tmp_path / 'none') is None


def test_the_newest_are_kept_with_their_seals(tmp_path):
  save(tmp_path, [1, 2, 3, 4], keep=2)
  assert checkpoint.all_steps(tmp_path) == [3, 4]
  seals = [n for n in os.listdir(tmp_path) if n.endswith('.json')]
  assert sorted(seals) == ['3.sha256.json', '4.sha256.json']


@pytest.fixture
def overtaken(tmp_path):
  """Opened by a run; what lets another take its lease over; a folder."""
  path, folder = tmp_path / 'lease.json', tmp_path / 'checkpoints'
  path.write_text('{"owner": "me"}')
  save(folder, [1, 2, 3])
  lease = locks.Lease(str(path), 'busy', 'me', None, 60.0)
  opened = checkpoint.Checkpoints(
    folder, keep=1, check_lock=functools.partial(lease.check, now=True)
  )
  yield opened, lambda: path.write_text('{"owner": "another"}'), folder
  assert checkpoint.latest_step(folder) == 3
  for step in (1, 2, 3):
    assert checkpoint.check_seal(folder / str(step)) is None
  opened.close()


def test_another_run_keeps_its_later_steps(overtaken):
  opened, take_over, folder = overtaken
  take_over()
  with pytest.raises(errors.UserError, match='busy .another took it over'):
    opened.save(2, *state(2), {})
  with pytest.raises(errors.UserError, match='busy .another took it over'):
    checkpoint.Checkpoints(folder, check_lock=opened._check_lock)


def test_another_run_keeps_its_older_steps(overtaken, monkeypatch):
  opened, take_over, folder = overtaken
  finish = opened._checkpointer.wait_until_finished

  def finishes():  # in the background
    finish()
    take_over()

  with monkeypatch.context() as change:
    change.setattr(opened._checkpointer, 'wait_until_finished', finishes)
    opened.save(4, *state(4), {})
    with pytest.raises(errors.UserError, match='busy .another took it over'):
      opened.wait()
  assert 'never completed' in checkpoint.check_seal(folder / '4')


def test_a_flipped_bit_a_lost_file_and_a_lost_seal_are_seen(tmp_path, caplog):
  save(tmp_path, [1, 2, 3, 4])
  flip_a_bit(largest(tmp_path / '4'))
  largest(tmp_path / '3').unlink()
  assert checkpoint.latest_step(tmp_path) == 2
  assert 'was changed after it was written' in caplog.text
  assert 'is missing' in caplog.text
  (tmp_path / '2.sha256.json').unlink()
  assert 'never completed' in checkpoint.check_seal(tmp_path / '2')
  # Steps were completed and none is whole: never as if nothing had been.
  with pytest.raises(errors.UserError, match='of step 4 .* was changed'):
    checkpoint.latest_step(tmp_path)
  for name in ('3.sha256.json', '4.sha256.json'):
    (tmp_path / name).write_text('[1]')
  for damage in (b'', b'\xff{', b'{}', b'[]', b'null', b'{"a"'):
    (tmp_path / '1.sha256.json').write_bytes(damage)
    assert checkpoint.check_seal(tmp_path / '1') == 'its seal is damaged'
  with pytest.raises(errors.UserError, match='its seal is damaged'):
    checkpoint.latest_step(tmp_path)


def test_lost_seals_are_no_new_run_but_a_kill_at_the_first_step_is(tmp_path):
  save(tmp_path, [1, 2])
  for step in (1, 2):
    (tmp_path / f'{step}.sha256.json').unlink()
  with pytest.raises(errors.UserError, match='with its .sha256.json files'):
    checkpoint.latest_step(tmp_path)
  shutil.rmtree(tmp_path / '2')
  assert checkpoint.latest_step(tmp_path) is None


def test_every_file_of_a_step_is_under_its_seal(tmp_path):
  save(tmp_path, [1])
  sealed = json.loads((tmp_path / '1.sha256.json').read_text())
  on_disk = [f for f in (tmp_path / '1').rglob('*') if f.is_file()]
  assert {str(f.relative_to(tmp_path / '1')) for f in on_disk} == set(sealed)
  before = checkpoint.seal_sha256(tmp_path / '1')
  for file in on_disk:
    data = file.read_bytes()
    file.write_bytes(data + b'x')
    assert checkpoint.check_seal(tmp_path / '1') is not None
    file.write_bytes(data)
  assert checkpoint.check_seal(tmp_path / '1') is None
  assert checkpoint.seal_sha256(tmp_path / '1') == before


def test_training_goes_on_before_a_damaged_step(tmp_path):
  save(tmp_path, [4, 8])
  flip_a_bit(largest(tmp_path / '8'))
  opened = checkpoint.Checkpoints(tmp_path)
  assert opened.latest() == 4
  opened.restore(4, *shapes())
  for step in (6, 8):  # another period than before, and the damaged step
    opened.save(step, *state(step), {'step': step})
    opened.wait()
    assert opened.latest() == step
  opened.close()
  assert checkpoint.all_steps(tmp_path) == [4, 6, 8]


def test_parameters_alone_come_back_or_say_why_not(tmp_path):
  params, _ = state(3)
  checkpoint.save_params(tmp_path, params)
  assert checkpoint.check_seal(tmp_path / 'params') is None
  target = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      s.shape,
      s.dtype,
      sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    ),
    shapes()[0],
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    checkpoint.restore_params(tmp_path, target),
    params,
  )
  wrong = {'b': target['a']}
  with pytest.raises(errors.UserError, match='do not fit the model') as error:
    checkpoint.restore_params(tmp_path, wrong)
  assert '\n' not in str(error.value)
  grown = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((7, 3), s.dtype, sharding=s.sharding), target
  )
  with pytest.raises(errors.UserError, match='do not fit the model'):
    checkpoint.restore_params(tmp_path, grown)
