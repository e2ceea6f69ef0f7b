"""What is worked out before a screen, and kept in its folder.

A screen depends on an axis, and on which genes an estimate puts highest. Both
differ in the last bit with the number of devices, and the second takes long. So
they are worked out once: a run that goes on, and every shard, reads them.

  stages/NAME-KEY.npz   KEY: digest of all that it is made of
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import numpy as np

from genecompass_jax import locks
from genecompass_jax.analysis.perturbation import array_files

_FOLDER = 'stages'


class Stage:
  """Arrays under one name, as long as what they are made of stays.

  Args:
    path: of the file; '' keeps nothing.
  """

  def __init__(self, path: str = ''):
    self._path = path

  def load(self) -> dict[str, np.ndarray] | None:
    """The arrays; None where there are none that are whole."""
    return array_files.read(self._path) if self._path else None

  def save(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, whole or not at all."""
    if self._path:
      array_files.write(self._path, arrays)


class Stages:
  """The stages of a question.

  Args:
    folder: where they are kept; '' keeps nothing.
    facts: what all of them depend on, such as digests of the model.
  """

  def __init__(
    self, folder: str = '', facts: Mapping[str, object] | None = None
  ):
    self._folder, self._facts = folder, dict(facts or {})

  @contextlib.contextmanager
  def stage(self, name: str, **made_of: object) -> Iterator[Stage]:
    """One stage, for one process at a time; others wait for it.

    Args:
      name: in words.
      **made_of: what it depends on, beside the facts, as JSON holds it.
    """
    if not self._folder:
      yield Stage()
      return
    text = json.dumps({**self._facts, **made_of}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    stem = os.path.join(
      self._folder, _FOLDER, f'{name.replace(" ", "-")}-{key}'
    )
    os.makedirs(os.path.dirname(stem), exist_ok=True)
    said = f'{self._folder}: another process works out the {name}; waiting'
    with locks.waited(f'{stem}.lock', said):
      yield Stage(f'{stem}.npz')


NOWHERE = Stages()  # keeps nothing
NO_STAGE = Stage()
