"""What a training loop tells: a line of metrics every few steps, progress.

Values are fetched one step late, so that devices never wait for a reader.
"""

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from genecompass_jax import metrics, paths, progress, schemas


class TrainingLog:
  """Metrics of the loop, fetched one step late so that devices never wait."""

  def __init__(
    self,
    folder: paths.PathLike,
    first_step: int,
    total_steps: int,
    log_every: int,
  ):
    """A log of the steps after `first_step`; process 0 alone writes.

    Args:
      folder: workdir.
      first_step: steps that are done already.
      total_steps: of the run.
      log_every: steps between lines; the last has one always.
    """
    self._total, self._log_every = total_steps, log_every
    self._file = None
    if jax.process_index() == 0:
      self._file = metrics.MetricsFile(folder)
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._bar: progress.Progress | None = None
    self._done = first_step
    self._reset()

  def _reset(self) -> None:
    self._started = time.perf_counter()
    self._cells = self._real_slots = self._slots = 0
    self._waited = 0.0

  def progress(self) -> progress.Progress:
    """The progress bar of the loop; use as a context."""
    left = self._total - self._done
    self._bar = progress.Progress(left, 'steps', 'training')
    return self._bar

  def event(self, name: str, **values: Any) -> None:
    """A line that is no measurement."""
    if self._file is not None:
      self._file.write(event=name, **values)
      self._file.flush()

  def batches(
    self, batches: Iterator[schemas.HostBatch]
  ) -> Iterator[schemas.HostBatch]:
    """The batches, the wait for each remembered."""
    while True:
      self._asked = time.perf_counter()
      batch = next(batches)
      self._wait = time.perf_counter() - self._asked
      self._waited += self._wait
      yield batch

  def step(
    self,
    step: int,
    host_batch: schemas.HostBatch,
    values: dict[str, jax.Array],
  ) -> None:
    """Takes the numbers of a step; writes those of the step before."""
    self._write()
    segments_BL = host_batch.batch.cells.segments_BL
    self._cells += int((host_batch.cell_index_BS >= 0).sum())
    self._real_slots += int((segments_BL > 0).sum())
    self._slots += segments_BL.size
    self._pending = step, values

  def catch_up(self) -> None:
    """Waits for the last step and writes it, if it is due.

    Raises:
      FloatingPointError: loss or gradient are not finite.
    """
    if self._pending is not None:
      # The line before was written while this step ran: its time began there.
      self._started = min(self._started, self._asked)
      self._waited = max(self._waited, self._wait)
      self._write(check=True)

  def _write(self, check: bool = False) -> None:
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    is_due = progress.is_due(step, self._log_every) or step == self._total
    line = {}
    if is_due or check:
      line = {k: float(v) for k, v in jax.device_get(values).items()}
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(line.get(name, 0.0)):
        self.event('not_finite', step=step)
        raise FloatingPointError(
          f'{name} is {line[name]} at step {step}; lower '
          'optimizer.learning_rate and use a new --workdir'
        )
    if not is_due:
      self._bar.update(1)
      return
    elapsed = max(time.perf_counter() - self._started, 1e-9)
    line |= {
      'cells_per_s': self._cells / elapsed,
      'real_token_share': self._real_slots / max(self._slots, 1),
      'data_wait_share': self._waited / elapsed,
    }
    if self._file is not None:
      self._file.write(step=step, **line)
      self._file.flush()
    self._bar.update(1, note=f'loss {line["loss"]:.4f}')
    self._reset()

  def evaluation(self, step: int, line: dict[str, Any]) -> None:
    """An evaluation line."""
    logging.info(
      'step %d: held-out id loss %.4f (%s), value loss %.4f (%s)',
      step,
      line['eval_id_loss'],
      _strongest(line, 'null_id_'),
      line.get('eval_value_loss', math.nan),
      _strongest(line, 'null_value_'),
    )
    if self._file is not None:
      self._file.write(step=step, **line)
      self._file.flush()
    self._reset()  # the time of an evaluation is not that of training

  def close(self) -> None:
    """Writes what is held back and closes the file."""
    self.catch_up()
    if self._file is not None:
      self._file.close()


def _strongest(line: dict[str, Any], prefix: str) -> str:
  """Name and loss of the strongest null: what a model has to beat."""
  found = {k: v for k, v in line.items() if k.startswith(prefix)}
  if not found:
    return 'no null models'
  name = min(found, key=found.__getitem__)
  return f'{name.removeprefix(prefix).replace("_", " ")} {found[name]:.4f}'
