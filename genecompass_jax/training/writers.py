"""TensorBoard and Weights & Biases, as followers of metrics.jsonl.

They are told every line that is written there, and nothing else. Both packages
are optional. A writer that fails is left out with a warning: a run does not end
for want of a second copy of its numbers.
"""

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from genecompass_jax import errors, metrics

# Name in the configuration -> package that must be there.
PACKAGES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}
# Bookkeeping of lines, not measurements.
_NO_CURVES = ('step', 'time')


def check(names: Sequence[str]) -> None:
  """Refuses writers that are not known or not installed.

  Raises:
    UserError: says what to install.
  """
  for name in names:
    if name not in PACKAGES:
      raise errors.UserError(
        f'writers: {name!r} is not known; choose from {", ".join(PACKAGES)}'
      )
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
      raise errors.UserError(
        f'writers: {name} needs {package}, which is not installed: pip install '
        f'{package}, or pip install ".[{name}]" in the folder of the repository'
      )


def open_writers(
  names: Sequence[str],
  *,
  folder: str,
  run_id: str,
  title: str,
  config: Mapping[str, Any],
  step: int,
) -> list[metrics.Follower]:
  """Opens the writers of a run.

  Args:
    names: of `PACKAGES`.
    folder: local folder; each writes below it, into one of its name.
    run_id: the same whenever the run is resumed.
    title: how the run is called in lists.
    config: of the run, to be shown beside it.
    step: steps that are done; what an earlier process told of later ones is
      replaced.

  Raises:
    UserError: W&B has no account and was not told to work offline.
  """
  found: list[metrics.Follower] = []
  if 'tensorboard' in names:
    found.append(_Guarded('tensorboard', _TensorBoard(folder, step)))
  if 'wandb' in names:
    found.append(_Guarded('wandb', _Wandb(folder, run_id, title, config)))
  return found


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
  """The curves that a line adds a point to: name -> value.

  Names are those of metrics.jsonl below `train/` and `evaluation/`; events have
  none, and neither have the groups of an evaluation.
  """
  if 'event' in line:
    return {}
  kind = 'evaluation' if 'eval_loss' in line else 'train'
  return {
    f'{kind}/{name}': float(value)
    for name, value in line.items()
    if type(value) in (int, float) and name not in _NO_CURVES
  }


class _Guarded:
  """A writer that is left out once it failed."""

  def __init__(self, name: str, writer: metrics.Follower):
    self._name = name
    self._writer: metrics.Follower | None = writer

  def _do(self, method: str, *args: Any) -> None:
    if self._writer is None:
      return
    try:
      getattr(self._writer, method)(*args)
    except Exception as error:  # whatever a package of others raises
      self._writer = None
      logging.warning(
        '%s failed and is left out; %s', self._name, errors.first_line(error)
      )

  def write(self, line: Mapping[str, Any]) -> None:
    self._do('write', line)

  def flush(self) -> None:
    self._do('flush')

  def close(self) -> None:
    self._do('close')


class _TensorBoard:
  """Event files in FOLDER/tensorboard, a further one for every process."""

  def __init__(self, folder: str, step: int):
    import tensorboardX

    # Events of an earlier process beyond `step` are void from here on.
    self._writer = tensorboardX.SummaryWriter(
      os.path.join(folder, 'tensorboard'), purge_step=step + 1 if step else None
    )

  def write(self, line: Mapping[str, Any]) -> None:
    for name, value in scalars(line).items():
      self._writer.add_scalar(name, value, line['step'], line.get('time'))
    if 'event' in line:
      text = ', '.join(f'{k}: {v}' for k, v in line.items() if k != 'time')
      self._writer.add_text(
        'events', text, line.get('step', 0), line.get('time')
      )

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _Wandb:
  """A run of Weights & Biases; WANDB_* variables say where and how."""

  def __init__(
    self, folder: str, run_id: str, title: str, config: Mapping[str, Any]
  ):
    import wandb

    os.makedirs(folder, exist_ok=True)
    try:
      self._run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'genecompass_jax'),
        name=os.environ.get('WANDB_NAME', title),
        id=run_id,
        resume='allow',
        dir=folder,
        config=dict(config),
      )
    except Exception as error:  # no account, no network
      raise errors.UserError(
        f'writers: wandb does not start ({errors.first_line(error)}); set '
        'WANDB_MODE=offline, or do wandb login'
      ) from error

  def write(self, line: Mapping[str, Any]) -> None:
    found = scalars(line)
    if found:
      # Steps that it has already are refused, not doubled; a resumed run
      # tells the same values again.
      self._run.log(found, step=line['step'])

  def flush(self) -> None:
    pass  # it sends by itself

  def close(self) -> None:
    self._run.finish()
