"""The training loop, from a restored state to the end, a stop, or a roll-back.

The host knows what a step did one step later: that keeps the devices busy. It
therefore counts ahead, takes the step back when it hears that a batch was not
accepted, and waits for the news before anything that depends on it.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from genecompass_jax import (
  data as data_lib,
  evaluate as evaluate_lib,
  knowledge as knowledge_lib,
  progress,
  sharding,
)
from genecompass_jax.training import (
  guard as guard_lib,
  interruption,
  train_config,
  train_step,
  training_log,
  watchdog,
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What the loop works with.

  Attributes:
    config: of the run, resolved.
    mesh: of the devices.
    loader: of the rows that this process holds.
    knowledge: prior tables on the devices.
    step_fn: (state, batch, knowledge) -> (state, values), compiled.
    evaluate: held-out losses; None where nothing is evaluated.
    save: (state, step, memory of the guard) -> starts a checkpoint.
    check: raises what went wrong with the last one, or that the workdir is
      another run's by now: with `now`, after a look.
    guard: looks at losses.
    left_out: batches that are not trained on.
    log: opened at the step of the state.
    watch: wants signs of life.
    signals: say when to stop.
  """

  config: train_config.TrainConfig
  mesh: jax.sharding.Mesh
  loader: data_lib.Loader
  knowledge: knowledge_lib.Knowledge
  step_fn: Callable[..., Any]
  evaluate: evaluate_lib.Evaluator | None
  save: Callable[[train_step.TrainState, int, dict[str, Any]], None]
  check: Callable[..., None]
  guard: guard_lib.Guard
  left_out: list[range]
  log: training_log.TrainingLog
  watch: watchdog.Watchdog
  signals: interruption.StopSignals

  def train(
    self, state: train_step.TrainState, *, is_new: bool
  ) -> tuple[int, bool]:
    """Trains to the end or to a signal; the last step is saved.

    A step is saved before it is evaluated: a machine that is taken away may
    have half a minute, which is too short for an evaluation. One that was not
    done, or not to its end, is done by the run that goes on.

    Args:
      state: to begin with; it is given up.
      is_new: whether to evaluate it first.

    Returns:
      The number of updates done, and whether nothing is left to do.

    Raises:
      RollBack: the guard wants to go back to a checkpoint.
    """
    total = self.config.optimizer.total_steps
    step = saved = int(state.step)
    next_batch = int(state.next_batch)
    lacks = stops = False
    if is_new:
      saved = -1
    if self._evaluates(step) and (is_new or not self.log.is_evaluated(step)):
      lacks = stops = not self._evaluate(state, step)
    iterator = self.loader.iterate(next_batch, skip=self.left_out)
    ahead: tuple[int, dict[str, jax.Array]] | None = None
    with self.log.progress(), contextlib.closing(iterator):
      batches = self.log.batches(iterator)
      while step < total and not stops:
        host_batch = next(batches)
        if host_batch.index != next_batch:
          state = self._jump(state, next_batch, host_batch.index)
        next_batch = host_batch.index + 1
        self.watch.expect(host_batch.batch.cells.segments_BL.shape)
        state, values = self.step_fn(
          state, self._put(host_batch), self.knowledge
        )
        accepted = values.pop('accepted')
        if ahead is not None:
          found = self.log.fetch(ahead[1])
          step -= not self._look(ahead[0], found, step)
        step += 1
        self.log.step(step, host_batch, values)
        ahead = host_batch.index, {**values, 'accepted': accepted}
        # Read once: what stops is saved. All processes stop at this batch.
        stops = self.signals.reached_stop()
        evaluates = self._evaluates(step)
        saves = step == total or progress.is_due(
          step, self.config.checkpoint_every
        )
        if evaluates or saves or stops:
          if not self._look(host_batch.index, jax.device_get(ahead[1]), step):
            step -= 1
            evaluates = saves = False
          ahead = None
          # A step that is saved already is not saved again behind a batch
          # that was not accepted: that comes to the same when it is repeated.
          if saves or (stops and step != saved):
            self._save(state, step)
            saved = step
          if evaluates:
            lacks = stops or not self._evaluate(state, step)
            if lacks and step != saved:
              self._save(state, step)
            stops = lacks
        self.check()
    return step, step >= total and not lacks

  def _evaluates(self, step: int) -> bool:
    """Whether a step is to be evaluated."""
    is_last = step == self.config.optimizer.total_steps
    return self.evaluate is not None and (
      is_last or progress.is_due(step, self.config.eval_every)
    )

  def _save(self, state: train_step.TrainState, step: int) -> None:
    self.check(now=True)  # metrics, too, are another run's then
    with self.log.checkpoint(step):
      self.save(state, step, self.guard.memory())

  def _put(self, host_batch) -> Any:
    rows = self.config.data.rows_per_batch
    return sharding.put_batch(host_batch.batch, self.mesh, rows)

  def _jump(self, state, expected: int, batch: int) -> train_step.TrainState:
    """Goes over batches that are left out."""
    self.log.event('left_out', first=expected, stop=batch, step=int(state.step))
    next_batch = sharding.put_everywhere(np.int32(batch), self.mesh)
    return dataclasses.replace(state, next_batch=next_batch)

  def _look(self, batch: int, found: dict[str, Any], step: int) -> bool:
    """Takes what a batch did; whether it was accepted, as this step."""
    self.watch.beat()
    accepted = bool(found['accepted'])
    if not accepted:
      self.log.forget()
      self.log.event(
        'not_finite',
        step=step - 1,
        batch=batch,
        loss=repr(float(found['loss'])),
        grad_norm=repr(float(found['grad_norm'])),
      )
    self.guard.look(batch, float(found['loss']), accepted)
    return accepted

  def _evaluate(self, state: train_step.TrainState, step: int) -> bool:
    """Evaluates a step; whether that came to its end before a signal."""
    self.log.catch_up()
    self.watch.beat(compiles=True)

    def on_batch(shape: tuple[int, ...]) -> None:
      self.watch.expect(('evaluate', *shape))
      if self.signals.reached_stop():
        raise interruption.Stopped

    try:
      with self.log.spent('evaluate'):
        line = self.evaluate(state.params, self.knowledge, self.mesh, on_batch)
    except interruption.Stopped:
      return False
    self.log.evaluation(step, line)
    return True
