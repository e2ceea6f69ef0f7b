"""A screen in a folder: finished parts stay, and a killed run goes on.

  settings.json    what is run: cells, model, interventions, groups
  stages/          what comes before it (`stages`)
  parts/N.npz      effects of group N, written whole or not at all
  responses.npz    sums of responses, and which groups are in them

Several machines may share the folder: each takes every n-th group. Whoever
comes last finds all parts there.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import errors, progress
from genecompass_jax.analysis.perturbation import (
  array_files,
  effects,
  response_sums,
  screen as screen_lib,
)

SETTINGS = 'settings.json'
_PARTS = 'parts'
_RESPONSES = 'responses.npz'
_SECONDS_BETWEEN_SAVES = 60.0
# In the order in which one brings the next.
_DIGESTS = ('cells', 'options', 'start and goal', 'interventions', 'batches')
_SAVING = 0.05  # most of the time that goes into saving sums of responses
_FIELDS = tuple(f.name for f in dataclasses.fields(effects.CellEffects))


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a screen will take.

  Attributes:
    variants: forward passes of one cell each.
    cells: unperturbed cells.
    lengths: slots of the rows that are compiled.
    seconds: estimated from a few batches of every length, compiling not counted.
    compile_seconds: that compiling took.
  """

  variants: int
  cells: int
  lengths: tuple[int, ...]
  seconds: float
  compile_seconds: float

  def __str__(self) -> str:
    return (
      f'{self.variants:,} variants of {self.cells:,} cells in rows of '
      f'{", ".join(map(str, self.lengths))} slots: about '
      f'{progress.duration(self.seconds)} (measured on a few batches of each '
      f'length; compiled in {progress.duration(self.compile_seconds)})'
    )


def estimate(
  screen: screen_lib.Screen, groups: Sequence[screen_lib.Group]
) -> Estimate:
  """Runs some batches of every length twice: how long will groups take?"""
  seconds, compiling = 0.0, 0.0
  lengths = sorted({g.slots for g in groups})
  for slots in lengths:
    start = time.perf_counter()
    screen.measure(slots)
    between = time.perf_counter()
    base_s, batch_s = screen.measure(slots)
    compiling += max(2 * between - start - time.perf_counter(), 0.0)
    of_length = [g for g in groups if g.slots == slots]
    seconds += base_s * len(of_length)
    seconds += batch_s * sum(map(screen.batches, of_length))
  return Estimate(
    variants=sum(len(g.row_P) for g in groups),
    cells=len({int(c) for g in groups for c in g.cell_C}),
    lengths=tuple(lengths),
    seconds=seconds,
    compile_seconds=compiling,
  )


def check(folder: str, facts: Mapping[str, object]) -> bool:
  """Whether a folder holds a screen.

  Args:
    folder: which need not exist.
    facts: of `Folder`, those that are known.

  Raises:
    UserError: it holds a screen of other facts.
  """
  path = os.path.join(folder, SETTINGS)
  try:
    with open(path, encoding='utf-8') as file:
      before = json.load(file)
    if not isinstance(before, dict):
      raise ValueError('it holds no JSON object')
  except FileNotFoundError:
    return False
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f'{path}: cannot be read ({errors.first_line(error)}); remove {folder} '
      'to begin anew, or give another name'
    ) from error
  wanted = json.loads(json.dumps(facts))
  # The first that differs: other cells have other nulls and groups too, and a
  # model with another part is another model.
  last = ('model', *_DIGESTS)
  keys = [*sorted({*wanted} - {*last}), *(k for k in last if k in wanted)]
  other = next((k for k in keys if before.get(k) != wanted[k]), None)
  if other is not None:
    raise errors.UserError(
      f'{folder} holds another screen (its {other} '
      f'{"are others" if other in _DIGESTS else "is another"}); remove it, '
      'give another name with -o, or the same cells, model and options'
    )
  return True


class Folder:
  """Parts of one screen on a disk.

  Args:
    folder: made if it is not there.
    screen: what is run.
    facts: of model and cells, such as their hashes: what else a result depends
      on.

  Raises:
    UserError: the folder holds another screen.
  """

  def __init__(
    self,
    folder: str,
    screen: screen_lib.Screen,
    facts: Mapping[str, object],
  ):
    self.folder, self._screen = folder, screen
    self._settings = {**facts, **_digests(screen)}
    os.makedirs(os.path.join(folder, _PARTS), exist_ok=True)
    if not check(folder, self._settings):
      text = json.dumps(self._settings, indent=1, sort_keys=True) + '\n'
      _write(os.path.join(folder, SETTINGS), text.encode())

  def has(self, group: int) -> bool:
    """Whether the part of a group is there and whole."""
    return self._read(group) is not None

  def save(self, group: int, found: effects.CellEffects) -> None:
    """Writes the part of a group."""
    columns = {name: getattr(found, name) for name in _FIELDS}
    array_files.write(self._part(group), columns)

  def joined(self) -> effects.CellEffects:
    """All parts as one, by variant, then cell.

    Raises:
      UserError: parts are missing.
    """
    numbers = range(len(self._screen.groups))
    parts = [self._read(n) for n in numbers]
    missing = [n for n in numbers if parts[n] is None]
    if missing:
      raise errors.UserError(
        f'{self.folder}: {len(missing):,} of {len(parts):,} parts are not there '
        'yet; run the other shards, or the same command again'
      )
    return screen_lib.joined([p for p in parts if p is not None])

  def load_responses(self, sums: response_sums.ResponseSums) -> set[int]:
    """Puts saved sums in; the groups that they hold."""
    path = os.path.join(self.folder, _RESPONSES)
    found = array_files.read(path)
    wanted = {'sums': sums.sum_N, 'cells': sums.cells_N}
    if found is None or {*found} != {*wanted, 'groups'}:
      return set()
    if any(
      (found[name].shape, found[name].dtype) != (x.shape, x.dtype)
      for name, x in wanted.items()
    ):
      return set()
    sums.sum_N[:] = found['sums']
    sums.cells_N[:] = found['cells']
    return {int(n) for n in found['groups']}

  def save_responses(
    self, sums: response_sums.ResponseSums, groups: set[int]
  ) -> None:
    """Writes sums and the groups that they hold, together."""
    array_files.write(
      os.path.join(self.folder, _RESPONSES),
      {
        'sums': sums.sum_N,
        'cells': sums.cells_N,
        'groups': np.array(sorted(groups), np.int64),
      },
    )

  def _part(self, group: int) -> str:
    return os.path.join(self.folder, _PARTS, f'{group:06d}.npz')

  def _read(self, group: int) -> effects.CellEffects | None:
    found = array_files.read(self._part(group))
    number = len(self._screen.groups[group].row_P)
    if found is None or {*found} != {*_FIELDS}:
      return None
    if any(len(found[name]) != number for name in _FIELDS):
      return None
    return effects.CellEffects(**found)


def run(
  screen: screen_lib.Screen,
  folder: Folder | None = None,
  *,
  sums: response_sums.ResponseSums | None = None,
  shard: tuple[int, int] = (0, 1),
  label: str = 'perturbing',
) -> effects.CellEffects | None:
  """Runs what is not there yet, after saying how long it will take.

  Args:
    screen: what to run.
    folder: where parts are kept; None: in memory alone.
    sums: of responses, added to.
    shard: (i, n): every n-th group from i on.
    label: of the progress.

  Returns:
    The effects of all groups; None for a shard of several.

  Raises:
    UserError: responses of several shards, which are not added up.
  """
  index, number = shard
  if not 0 <= index < number:
    raise errors.UserError(
      f'shard {index}/{number}: give I/N with I from 0 to N - 1'
    )
  if number > 1 and folder is None:
    raise errors.UserError('shards meet in a folder: give one')
  if number > 1 and sums is not None:
    raise errors.UserError(
      'responses of other genes are added up by one machine: leave the shard '
      'out, or share the genes out'
    )
  mine = range(index, len(screen.groups), number)
  in_sums = set()
  if folder is not None and sums is not None:
    in_sums = folder.load_responses(sums)

  def is_summed(n: int) -> bool:
    return sums is None or n in in_sums

  left = [
    n for n in mine if folder is None or not (is_summed(n) and folder.has(n))
  ]
  if left:
    said = estimate(screen, [screen.groups[n] for n in left])
    print(f'{label}: {said}', file=sys.stderr)
  total = sum(len(screen.groups[n].row_P) for n in mine)
  parts = []
  next_save = time.monotonic() + _SECONDS_BETWEEN_SAVES
  with progress.Progress(total, 'variants', label) as bar:
    bar.skip(total - sum(len(screen.groups[n].row_P) for n in left))
    for n in left:
      group = screen.groups[n]
      found = screen.run(group, None if is_summed(n) else sums, tell=bar.update)
      if folder is None:
        parts.append(found)
      else:
        folder.save(n, found)
        if not is_summed(n):
          in_sums.add(n)
          begun = time.monotonic()
          if begun > next_save:
            folder.save_responses(sums, in_sums)
            ended = time.monotonic()
            next_save = ended + max(
              _SECONDS_BETWEEN_SAVES, (ended - begun) / _SAVING
            )
  if folder is None:
    return screen_lib.joined(parts)
  if sums is not None:
    folder.save_responses(sums, in_sums)
  return folder.joined() if number == 1 else None


def _digests(screen: screen_lib.Screen) -> dict[str, str]:
  """Hashes of what is run: what a folder's screen differs in, by name."""
  axis = screen.axis
  levels = [
    sorted(screen.levels[name].items()) for name in sorted(screen.levels)
  ]
  what = {
    'cells': (screen.cells.sha256,),
    'options': (screen.config,),
    # The axis itself differs in the last bit with the number of devices.
    'start and goal': ()
    if axis is None
    else (axis.made_of or axis.direction_D,),
    'interventions': ([dataclasses.astuple(done) for done in screen.done], levels),
    'batches': tuple(
      x for g in screen.groups for x in (g.cell_C, np.array([g.slots]))
    ),
  }  # fmt: skip
  return {name: _digest(what[name]) for name in _DIGESTS}


def _digest(values: Sequence[object]) -> str:
  digest = hashlib.sha256()
  for value in values:
    is_array = hasattr(value, 'dtype')
    digest.update(
      np.ascontiguousarray(value).tobytes()
      if is_array
      else repr(value).encode()
    )
  return digest.hexdigest()


def _write(path: str, data: bytes) -> None:
  staging = f'{path}.tmp-{os.getpid()}'
  with open(staging, 'wb') as file:
    file.write(data)
  os.replace(staging, path)
