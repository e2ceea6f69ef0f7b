"""What a run does about losses that are not finite, and about spikes.

A batch whose loss or gradient is not finite changes nothing: the devices leave
parameters, moments and step as they were and go on to the next batch. After
too many in a row, or where the loss jumps, the run goes back to its newest good
checkpoint and on with the batches behind the trouble. That decision is written
into WORKDIR/rollbacks.json before the run goes on, so that a run that is killed
then, even one that falls back to an older checkpoint, takes it again.

Everything here follows from the losses alone, which are the same on every
process and in every repetition.
"""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from genecompass_jax import errors, paths

FILE = 'rollbacks.json'
_MOST_BATCHES = 2**31  # devices count them in 32 bits
# Losses that a spike is judged by, at least.
_FEWEST = 16
# Deviation of a normal distribution over its median absolute deviation.
_SCALE = 1.4826


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """When a run goes back, and when it gives up.

  Attributes:
    max_not_finite: batches in a row without a finite loss and gradient, after
      which the run goes back to its last good checkpoint.
    spike_z: robust deviations above the median of the last losses from which a
      loss is a spike; 0, the default, for none: batches differ in their cells
      and lengths, and what is a spike depends on them. 10 to 20 is a start for
      batches of hundreds of cells.
    spike_window: last losses that a spike is judged by.
    max_rollbacks: times a run goes back to the same step before it fails.
    hang_after_s: seconds without a sign of life after which all stacks are
      shown and the process ends, to be started again; four times as many while
      programs are compiled, a checkpoint is read or the last one completed. 0
      for never.
  """

  max_not_finite: int = 10
  spike_z: float = 0.0
  spike_window: int = 128
  max_rollbacks: int = 3
  hang_after_s: float = 1800.0

  def __post_init__(self):
    errors.check_at_least(
      'guard',
      self,
      max_not_finite=1,
      spike_z=0,
      spike_window=_FEWEST,
      max_rollbacks=0,
      hang_after_s=0,
    )


class RollBack(Exception):  # noqa: N818
  """Go back to the last good checkpoint, and on behind a batch: a decision.

  Attributes:
    reason: 'not_finite' or 'spike'.
    stop: number of the first batch that is trained on again.
  """

  def __init__(self, reason: str, stop: int):
    super().__init__(reason)
    self.reason, self.stop = reason, stop


class Guard:
  """Looks at the loss of every batch, in order."""

  def __init__(
    self, config: GuardConfig, memory: Mapping[str, Any] | None = None
  ):
    """A guard that knows what an earlier one knew: its `memory`."""
    self._config = config
    memory = memory or {}
    self._losses = collections.deque(
      memory.get('losses', ()), maxlen=config.spike_window
    )
    self._in_a_row = memory.get('not_finite_in_a_row', 0)

  def memory(self) -> dict[str, Any]:
    """What a checkpoint keeps: a run that goes on from it decides the same.

    As JSON: the last losses, and how many batches in a row were not finite
    (some, where a signal stopped the run among them).
    """
    return {
      'losses': list(self._losses),
      'not_finite_in_a_row': self._in_a_row,
    }

  def look(self, batch: int, loss: float, accepted: bool) -> None:
    """Takes the loss of a batch.

    Args:
      batch: its number.
      loss: of the batch.
      accepted: whether the devices have changed the parameters.

    Raises:
      RollBack: too many in a row were not accepted, or this one is a spike.
    """
    if not accepted:
      self._in_a_row += 1
      if self._in_a_row >= self._config.max_not_finite:
        raise RollBack('not_finite', batch + 1)
      return
    self._in_a_row = 0
    if self._config.spike_z and len(self._losses) >= _FEWEST:
      middle = statistics.median(self._losses)
      spread = statistics.median(abs(x - middle) for x in self._losses)
      # Losses that are all but equal must not make a spike of the last bit.
      spread = max(_SCALE * spread, 1e-3 * abs(middle))
      if loss > middle + self._config.spike_z * spread:
        raise RollBack('spike', batch + 1)
    self._losses.append(loss)


def left_out(
  folder: paths.PathLike, skip_batches: Sequence[int] = ()
) -> list[range]:
  """Batches that a run does not train on.

  Args:
    folder: its workdir.
    skip_batches: those that its configuration names.
  """
  told = [range(batch, batch + 1) for batch in skip_batches]
  return told + [range(d['first'], d['stop']) for d in _read(folder)]


def commit(
  folder: paths.PathLike,
  config: GuardConfig,
  decision: RollBack,
  step: int,
  first: int,
) -> dict[str, Any]:
  """Writes down a decision before it is carried out.

  Args:
    folder: workdir.
    config: of the guard.
    decision: what was decided.
    step: the step that the run goes back to.
    first: the batch that came next at that step.

  Returns:
    What was written: step, reason, and the batches that are left out.

  Raises:
    FloatingPointError: the run has gone back to this step often enough.
  """
  decisions = _read(folder)
  times = sum(d['step'] == step for d in decisions)
  if times >= config.max_rollbacks:
    why = {
      'not_finite': f'loss or gradient were not finite in '
      f'{config.max_not_finite} batches in a row',
      'spike': 'the loss jumped',
    }[decision.reason]
    raise FloatingPointError(
      f'{why}, before batch {decision.stop}, and going back to step {step} has '
      f'not helped {times} times; lower optimizer.learning_rate and use a new '
      '--workdir, or look at the batches named in metrics.jsonl'
    )
  new = {
    'step': step,
    'reason': decision.reason,
    'first': first,
    'stop': decision.stop,
  }
  paths.write_json(paths.join(folder, FILE), {'rollbacks': [*decisions, new]})
  return new


def _read(folder: paths.PathLike) -> list[dict[str, Any]]:
  path = paths.join(folder, FILE)
  if not paths.exists(path):
    return []
  try:
    found = paths.read_json(path)['rollbacks']
    if all(
      type(d['first']) is type(d['stop']) is type(d['step']) is int
      and 0 <= d['first'] < d['stop'] < _MOST_BATCHES
      for d in found
    ):
      return found
  except (ValueError, KeyError, TypeError):
    pass
  raise errors.UserError(
    f'{path} is damaged: it says which batches the run left out; restore it '
    'from a copy, or use another --workdir'
  )
