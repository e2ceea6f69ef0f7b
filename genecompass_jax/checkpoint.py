"""Checkpoints on disk: the only file that imports Orbax.

A training checkpoint is a folder CHECKPOINTS/<step> with the items `params`,
`training` (optimiser, step, next batch) and `metadata` (JSON). Beside it,
CHECKPOINTS/<step>.sha256.json seals it: hashes of every file, written when all
of them are complete. Orbax restores a flipped bit without a word, so a step
counts only when its seal is there and holds; otherwise the step before it is
taken.
"""

import concurrent.futures
import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from orbax import checkpoint as ocp

from genecompass_jax import (
  checkpoint_copies,
  errors,
  paths,
  processes,
  scratch,
)

PARAMS = 'params'
TRAINING = 'training'
METADATA = 'metadata'
_SEAL = '.sha256.json'
_UNFINISHED = '.orbax-checkpoint-tmp'  # in the names that Orbax writes under


class Checkpoints:
  """The checkpoints of one run, newest good one first.

  Saving returns as soon as the arrays are copied; files and seal are written
  in the background. In several processes all call the same methods: each
  writes the parts of arrays that it holds, process 0 does the rest, and what
  it finds to be the newest good step is so for all.
  """

  def __init__(
    self,
    folder: paths.PathLike,
    *,
    keep: int = 3,
    check_lock: Callable[[], None] = lambda: None,
  ):
    """Opens (and makes) a folder of checkpoints.

    Args:
      folder: local or a URL.
      keep: how many of the newest stay.
      check_lock: raises where the folder is another run's by now; process 0
        asks before it removes anything, and before it seals.
    """
    self.folder = str(folder)
    self._check_lock = check_lock
    if processes.is_first():
      check_lock()
      paths.make_folder(folder)
      for name in paths.listdir(folder):
        if _UNFINISHED in name:  # of a process that was killed
          paths.remove_tree(paths.join(folder, name))
    # Where Orbax writes: here, or where files are copied up from.
    self._local: str | None = None
    if checkpoint_copies.is_needed(folder):
      if processes.count() > 1:
        raise errors.UserError(
          f'{folder}: checkpoints of several processes go to gs:// or to a '
          'folder that all of them see, not to s3://; name one with --workdir'
        )
      self._local = checkpoint_copies.new_folder()
    processes.barrier('checkpoints')
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(),
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        # Named one by one, they wait for each other without the devices.
        active_processes=set(range(processes.count()))
        if processes.count() > 1
        else None,
      ),
    )
    self._keep = keep
    self._sealer = concurrent.futures.ThreadPoolExecutor(1, 'seal')
    self._pending: concurrent.futures.Future | None = None

  def save(
    self, step: int, params: Any, training: Any, metadata: dict[str, Any]
  ) -> None:
    """Starts to save a step; waits for the save before it."""
    self.wait()
    with _storage_faults(self.folder):
      if processes.is_first():
        self._check_lock()
        for later in all_steps(self.folder):
          if later >= step:  # its seal did not hold, or it was rolled back
            _delete(self.folder, later)
      processes.barrier('save')
      self._checkpointer.save(
        _absolute(self._local or self.folder) / str(step),
        args=ocp.args.Composite(
          **{
            PARAMS: ocp.args.StandardSave(params),
            TRAINING: ocp.args.StandardSave(training),
            METADATA: ocp.args.JsonSave(metadata),
          }
        ),
      )
    self._pending = self._sealer.submit(self._seal, step)

  def check(self) -> None:
    """Raises at once what went wrong in the background, and does not wait."""
    if self._pending is not None and self._pending.done():
      self.wait()

  def wait(self) -> None:
    """Returns when everything saved so far is complete and sealed."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      with _storage_faults(self.folder):
        pending.result()

  def close(self) -> None:
    """Completes what is under way, in all processes."""
    self.wait()
    processes.barrier('close')  # process 0 has sealed the last step
    self._sealer.shutdown()
    self._checkpointer.close()
    if self._local is not None:
      scratch.remove(self._local)

  def latest(self) -> int | None:
    """The newest step whose seal holds, None where there is none."""
    self.wait()
    return processes.from_first(lambda: latest_step(self.folder))

  def restore(self, step: int, params: Any, training: Any) -> tuple[Any, Any]:
    """Reads a step back; `read_metadata` says first what it is of.

    Args:
      step: one that `latest` names.
      params: tree of shapes, dtypes and shardings to restore into.
      training: likewise.

    Returns:
      (params, training).

    Raises:
      RetryableError: a file is not what `latest` has just seen: the next start
        looks again, and may take the step before.
    """
    place = paths.join(self.folder, str(step))
    with _readable(place, damaged=errors.RetryableError) as source:
      restored = self._checkpointer.restore(
        source,
        args=ocp.args.Composite(
          **{
            PARAMS: ocp.args.StandardRestore(params),
            TRAINING: ocp.args.StandardRestore(training),
          }
        ),
      )
    return restored[PARAMS], restored[TRAINING]

  def _seal(self, step: int) -> None:
    # A step takes its name when the parts of all processes are complete.
    self._checkpointer.wait_until_finished()
    if not processes.is_first():
      return
    place = paths.join(self.folder, str(step))
    self._check_lock()  # what another run has here is not to be harmed
    if self._local is None:
      seal(place)
    else:
      local = paths.join(self._local, str(step))
      hashes = _hashes(local)
      checkpoint_copies.upload(local, place)
      paths.remove_tree(local)
      self._check_lock()
      paths.write_json(f'{place}{_SEAL}', hashes)
    self._check_lock()
    # Older steps go only when this one is whole: a kill leaves a good one.
    for old in all_steps(self.folder)[: -self._keep]:
      _delete(self.folder, old)
    kept = {str(s) for s in all_steps(self.folder)}
    for name in paths.listdir(self.folder):
      if name.endswith(_SEAL) and name.removesuffix(_SEAL) not in kept:
        paths.remove(paths.join(self.folder, name))


def _delete(folder: str, step: int) -> None:
  """Removes a step, its seal first: what is half removed is not whole."""
  paths.remove(f'{paths.join(folder, str(step))}{_SEAL}')
  paths.remove_tree(paths.join(folder, str(step)))


def _absolute(folder: paths.PathLike) -> epath.Path:
  """A path that Orbax takes; a URL is one, and epath would put a folder before."""
  place = paths.path(folder)
  return place if paths.is_url(folder) else place.resolve()


@contextlib.contextmanager
def _readable(
  folder: paths.PathLike,
  under: str = '',
  damaged: type[Exception] = errors.UserError,
) -> Iterator[epath.Path]:
  """A sealed folder, or a local copy of a part of it, for Orbax to read.

  Args:
    folder: has a seal.
    under: what the names of the files that are copied begin with.
    damaged: raised where a file, fetched twice, is not what the seal says.
  """
  if not checkpoint_copies.is_needed(folder):
    yield _absolute(folder)
    return
  try:
    hashes = paths.read_json(f'{folder}{_SEAL}')
  except (OSError, ValueError):
    raise errors.UserError(
      f'{folder}{_SEAL} is missing or damaged: it names the files to read; '
      'copy the folder again with its .sha256.json files'
    ) from None
  hashes = {n: x for n, x in hashes.items() if n.startswith(under)}
  with checkpoint_copies.downloaded(folder, hashes) as local:
    for name, sha256 in hashes.items():
      place = paths.join(local, name)
      if paths.sha256_file(place) == sha256:
        continue
      paths.download(paths.join(folder, name), place)  # it may pass
      if paths.sha256_file(place) != sha256:
        remedy = 'copy it there again, or use another checkpoint'
        if damaged is errors.RetryableError:
          remedy = 'start the same command again'
        raise damaged(
          f'{paths.join(folder, name)} did not come as it was written, twice; '
          f'{remedy}'
        )
    yield _absolute(local)


@contextlib.contextmanager
def _storage_faults(folder: str) -> Iterator[None]:
  """A full disk or a store out of reach passes: the run can be started again."""
  try:
    yield
  except (errors.UserError, errors.RetryableError):
    raise
  except (OSError, ValueError) as error:  # TensorStore raises ValueError
    line = errors.first_line(error)[:200]
    is_far = paths.is_url(folder)
    remedy = 'see that the store answers' if is_far else 'make room'
    raise errors.RetryableError(
      f'{folder}: a checkpoint cannot be written ({line}); {remedy} and start '
      'the same command again: it goes on from the checkpoint before'
    ) from error


def all_steps(folder: paths.PathLike) -> list[int]:
  """Steps that have a folder, ascending, whether good or not."""
  return sorted(
    int(n) for n in paths.listdir(folder) if re.fullmatch(r'\d+', n)
  )


def latest_step(folder: paths.PathLike) -> int | None:
  """The newest step whose seal holds; says which ones it passes over.

  Returns:
    None where no step was ever completed.

  Raises:
    UserError: steps were completed, and none of them is whole.
  """
  problems = {}
  for step in reversed(all_steps(folder)):
    place = paths.join(folder, str(step))
    problem = check_seal(place)
    if problem is None:
      return step
    logging.warning('checkpoint %d is passed over: %s', step, problem)
    problems[step] = problem
  # A run that was killed at its first checkpoint leaves one without a seal.
  sealed = [s for s in problems if paths.exists(f'{folder}/{s}{_SEAL}')]
  if sealed or len(problems) > 1:
    step = max(sealed or problems)
    raise errors.UserError(
      f'{folder}: no checkpoint is whole, of step {step} {problems[step]}; copy '
      'the folder again with its .sha256.json files, or remove it to start anew'
    )
  return None


def seal(folder: paths.PathLike) -> None:
  """Writes FOLDER.sha256.json: the hash of every file of a folder."""
  paths.write_json(f'{folder}{_SEAL}', _hashes(folder))


def _hashes(folder: paths.PathLike) -> dict[str, str]:
  names = paths.files_below(folder)
  return {n: paths.sha256_file(paths.join(folder, n)) for n in names}


def check_seal(folder: paths.PathLike) -> str | None:
  """What is wrong with a sealed folder, None when it is whole."""
  try:
    hashes = paths.read_json(f'{folder}{_SEAL}')
  except OSError:
    return 'it was never completed (its seal is missing)'
  except ValueError:  # no text, or no JSON
    return 'its seal is damaged'
  if not isinstance(hashes, dict) or not hashes:
    return 'its seal is damaged'
  for name, sha256 in hashes.items():
    file = paths.join(folder, name)
    if not paths.exists(file):
      return f'{name} is missing'
    if paths.sha256_file(file) != sha256:
      return f'{name} was changed after it was written'
  return None


def read_metadata(folder: paths.PathLike) -> dict[str, Any]:
  """The metadata of a step folder, without opening its arrays."""
  return paths.read_json(paths.join(folder, METADATA, METADATA))


def seal_sha256(folder: paths.PathLike) -> str:
  """One hash that names the content of a sealed folder."""
  return paths.sha256_file(f'{folder}{_SEAL}')


def save_params(folder: paths.PathLike, params: Any) -> None:
  """Writes parameters alone (FOLDER/params) and their seal."""
  target = paths.join(folder, PARAMS)
  if not checkpoint_copies.is_needed(folder):
    _save_params(_absolute(target), params)
    seal(_absolute(target))
    return
  with checkpoint_copies.downloaded(target, ()) as scratch:
    local = paths.join(scratch, PARAMS)
    _save_params(_absolute(local), params)
    hashes = _hashes(local)
    checkpoint_copies.upload(local, target)
  paths.write_json(f'{target}{_SEAL}', hashes)


def _save_params(target: epath.Path, params: Any) -> None:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(target, params, force=True)


def restore_params(folder: paths.PathLike, params: Any) -> Any:
  """Reads FOLDER/params into a tree of shapes and shardings.

  Args:
    folder: a step of a run, or an export.
    params: tree of `jax.ShapeDtypeStruct` with shardings.

  Raises:
    UserError: the parameters do not fit, or cannot be read.
  """
  source = paths.join(folder, PARAMS)
  is_step = paths.exists(f'{folder}{_SEAL}')  # an export seals params alone
  with _readable(*((folder, f'{PARAMS}/') if is_step else (source,))) as place:
    try:
      with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(
          place / PARAMS if is_step else place, params
        )
    except (ValueError, KeyError, OSError) as error:
      line = errors.first_line(error)
      raise errors.UserError(
        f'{source}: parameters do not fit the model of config.json ({line}); '
        'the folder mixes files of two models'
      ) from error
