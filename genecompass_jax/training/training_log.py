"""What a training loop tells: lines of metrics, events, the account of time.

Values are fetched one step late, so that devices never wait for a reader.
docs/logging.md explains every field and every event.
"""

import contextlib
import dataclasses
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax

from genecompass_jax import (
  errors,
  goodput,
  metrics,
  paths,
  processes,
  progress,
  schemas,
)
from genecompass_jax.training import (
  compiles,
  profiling,
  train_config,
  utilisation,
  writers,
)

# Between checkpoints, the account of time is written so often: what a kill
# leaves unaccounted for counts as lost.
SECONDS_BETWEEN_ACCOUNTS = 300.0


class TrainingLog:
  """Metrics of the loop, fetched one step late so that devices never wait.

  Its clock runs from its creation. Use as a context, from before the first
  program is compiled, and `open` it once it is known where the run begins, and
  again where it goes back to a checkpoint; all processes call the same methods,
  process 0 alone writes.
  """

  def __init__(self, folder: paths.PathLike):
    """A log of the run in a workdir; nothing is written yet."""
    self._folder = folder
    self._clock = goodput.Clock()
    self._compiles = compiles.Counter(
      lambda seconds: self._clock.move(seconds, 'compile')
    )
    self._file: metrics.MetricsFile | None = None
    self._peak: utilisation.Peak | None = None
    self._profile: profiling.Window | None = None
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._bar: progress.Progress | None = None
    self._blocked = False  # whether the last values had to be waited for
    self._evaluated: set[int] = set()  # steps, known to process 0
    # Shapes that a step has met, and the programs that it took.
    self._shapes: set[tuple[int, ...]] = set()
    self._programs: set[str] = set()

  def __enter__(self) -> 'TrainingLog':
    self._compiles.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._compiles.stop()
    # An error is on its way, else `end` was called: nothing may hide it.
    with contextlib.suppress(Exception):
      self.close()

  def close(self) -> None:
    """Ends without the last step: it is not of the run that goes on."""
    self._pending = None
    if self._file is None:
      return
    try:
      self._close_profile()
      self.account(self._step)
      self._file.close()
    finally:
      self._file = None

  @contextlib.contextmanager
  def given_up_unless(self, held: Callable[..., None]) -> Iterator[None]:
    """An error inside leaves the file alone where it is another run's now.

    Args:
      held: as `workdir.locked` yields it. What it raises comes in the place of
        the error: that may be no more than what the other run has caused.
    """
    try:
      yield
    except BaseException:
      with contextlib.suppress(errors.RetryableError, OSError):
        try:
          held(now=True)
        except errors.UserError:
          self.abandon()
          raise
      raise

  def abandon(self) -> None:
    """Writes no more: another process does."""
    if self._file is not None:
      self._file.abandon()
      self._file = None

  def open(
    self, config: train_config.TrainConfig, first_step: int, *, is_new: bool
  ) -> None:
    """Begins after `first_step`, and forgets lines of later steps.

    Args:
      config: of the run, resolved.
      first_step: steps that are done already.
      is_new: whether the run begins, maybe again; else it is resumed.
    """
    self._config = config
    self._step = first_step
    self._profile = profiling.Window(self._folder, config.profile_steps)
    self._reducer = None
    if jax.process_count() > 1:
      self._reducer = utilisation.Reducer()
    if self._peak is None:
      self._peak = utilisation.find_peak(config.model.dtype)
    self._reset(time.perf_counter())
    if jax.process_index() == 0:
      self._open_file(config, first_step, is_new)

  def _open_file(self, config, first_step: int, is_new: bool) -> None:
    facts, run_id = _facts_before(self._folder)
    folder = ''
    if config.writers:  # of a store it is a new one, which stays
      folder = os.path.dirname(profiling.local_folder(self._folder, 'x'))
    followers = writers.open_writers(
      config.writers,
      folder=folder,
      run_id=run_id,
      title=os.path.basename(os.fspath(self._folder).rstrip('/')),
      config=dataclasses.asdict(config),
      step=first_step,
    )
    # A run without a checkpoint starts again, with its evaluation at step 0.
    kept = metrics.cut_after(self._folder, -1 if is_new else first_step)
    self._evaluated = {line['step'] for line in kept if 'eval_loss' in line}
    self._file = metrics.MetricsFile(self._folder, followers)
    self._account_written = time.monotonic()
    device = jax.devices()[0]
    peak = {'peak_flops': self._peak.flops} if self._peak.flops else {}
    self.event(
      'start' if is_new else 'resume',
      step=first_step,
      run_id=run_id,
      began=round(self._clock.began, 3),
      **facts,
      devices=jax.device_count(),
      processes=jax.process_count(),
      device_kind=device.device_kind,
      **peak,
      peak_source=self._peak.source,
      memory_source=utilisation.memory_peak()[1],
    )
    total = config.optimizer.total_steps
    if first_step >= total:
      logging.info('done already: step %d of %d', first_step, total)
      return
    if not is_new:
      logging.info('goes on from step %d of %d', first_step, total)
    logging.info('utilisation is of: %s', self._peak.source)

  def _reset(self, now: float) -> None:
    self._started = now
    self._amount, self._steps = utilisation.Amount(), 0
    self._waited = 0.0

  @contextlib.contextmanager
  def progress(self) -> Iterator[None]:
    """The loop: its progress bar, and its time is that of training."""
    total = self._config.optimizer.total_steps
    if self._step >= total:  # nothing to do, and no rate of it
      yield
      return
    self._clock.enter('train')
    try:
      with progress.Progress(total, 'steps', 'training') as self._bar:
        self._bar.skip(self._step)  # of a run that goes on
        yield
    finally:
      self._clock.enter('checkpoint')  # what is still being written

  @contextlib.contextmanager
  def spent(self, kind: str) -> Iterator[None]:
    """Time inside is of a kind of `goodput.KINDS`, not of training."""
    begin = time.perf_counter()
    with self._clock.spent(kind):
      yield
    if self._profile is not None:  # open: rates are those of training
      self._started += time.perf_counter() - begin

  @contextlib.contextmanager
  def checkpoint(self, step: int) -> Iterator[None]:
    """Saving what a step has left; what it claims is written before."""
    self.catch_up()
    with self.spent('checkpoint'):
      if self._file is not None:
        self._file.sync()
      yield
    self.account(step)

  def event(self, name: str, **values: Any) -> None:
    """A line that is no measurement."""
    if self._file is not None:
      self._file.write(event=name, **values)
      self._file.flush()

  def account(self, step: int) -> None:
    """Writes how the time of this process was spent so far."""
    if self._file is not None:
      self._account_written = time.monotonic()
      self.event(goodput.EVENT, step=step, seconds=self._clock.seconds())

  def end(self, name: str, step: int) -> None:
    """Writes what is held back, the account and an event; closes the file."""
    self.catch_up()
    self._close_profile()
    self.account(step)
    self.event(name, step=step)
    if self._file is not None:
      self._file.sync()
      self._file.close()
      self._file = None

  def batches(
    self, batches: Iterator[schemas.HostBatch]
  ) -> Iterator[schemas.HostBatch]:
    """The batches, the wait for each remembered."""
    while True:
      self._move_profile()
      self._asked = time.perf_counter()
      batch = next(batches)
      self._wait = time.perf_counter() - self._asked
      self._waited += self._wait
      if self._pending is None or _is_done(self._pending[1]):
        # Nothing was left to do. While the devices are busy, to wait is no
        # loss: it goes on counting as training.
        self._clock.move(self._wait, 'data_wait')
      self._compiled = self._compiles.programs.copy()
      self._compile_s = self._compiles.seconds
      yield batch

  def step(
    self,
    step: int,
    host_batch: schemas.HostBatch,
    values: dict[str, jax.Array],
  ) -> None:
    """Takes the numbers of a step; writes those of the step before."""
    self._write()
    self._step = step
    self._check_programs(step, host_batch)
    self._amount += utilisation.amount(host_batch)
    self._steps += 1
    if self._reducer is not None and self._is_due(step):
      # Summed behind the step, and read with its values.
      values = {**values, _SUMS: self._reducer.sum(self._amount.numbers())}
    self._pending = step, values

  def fetch(self, values: dict[str, jax.Array]) -> dict[str, Any]:
    """Waits for the values of the step before, and remembers if it had to."""
    self._blocked = not _is_done(values)
    return jax.device_get(values)

  def forget(self) -> None:
    """Drops the numbers of the last step: its batch was not accepted."""
    self._pending = None
    self._step -= 1

  def _check_programs(self, step: int, host_batch: schemas.HostBatch) -> None:
    """Says when the step was compiled again for a shape it has met."""
    batch = host_batch.batch
    shape = (*batch.cells.segments_BL.shape, *batch.masked_slots_BK.shape)
    new = set(self._compiles.programs - self._compiled)
    if shape not in self._shapes:
      self._shapes.add(shape)
      self._programs |= new
      return
    again = sorted(new & self._programs)
    if again:
      seconds = self._compiles.seconds - self._compile_s
      logging.warning(
        'step %d: %s compiled again after warm-up, %.1f s; each time it costs '
        'as much',
        *(step, ' and '.join(again), seconds),
      )
      self.event(
        'recompiled', step=step, programs=again, seconds=round(seconds, 3)
      )

  def catch_up(self) -> None:
    """Waits for the last step and writes it, if it is due."""
    if self._pending is not None:
      # The line before was written while this step ran. The time of this one
      # began when the step before ended: that is known if it was waited for,
      # else it was before its batch came.
      if not self._blocked:
        self._started = min(self._started, self._asked)
        self._waited = max(self._waited, self._wait)
      self._write()

  def _is_due(self, step: int) -> bool:
    is_last = step == self._config.optimizer.total_steps
    return is_last or progress.is_due(step, self._config.log_every)

  def _write(self) -> None:
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    if not self._is_due(step):
      self._bar.update(1)
      return
    values = jax.device_get(values)
    now = time.perf_counter()
    sums = values.pop(_SUMS, None)
    line = {k: float(v) for k, v in values.items()}
    line |= self._rates(now, sums)
    if self._file is not None:
      self._file.write(step=step, **line)
      self._file.flush()
      since = time.monotonic() - self._account_written
      if since >= SECONDS_BETWEEN_ACCOUNTS:
        self.account(step)
    self._bar.update(1, note=f'loss {line["loss"]:.4f}')
    self._reset(now)

  def _rates(self, now: float, sums: Any) -> dict[str, float]:
    """What the clock says of the steps since the line before."""
    elapsed = max(now - self._started, 1e-9)
    amount = self._amount
    if sums is not None:
      # Rows that several processes hold were counted by each of them.
      amount = utilisation.Amount.of_numbers(sums)
      rows = self._config.data.rows_per_batch * self._steps
      amount = amount.times(rows / amount.rows)
    line = {
      'cells_per_s': amount.cells / elapsed,
      'real_token_share': amount.real.tokens / max(amount.padded.tokens, 1),
      'real_tokens_per_s': amount.real.tokens / elapsed,
      'padded_tokens_per_s': amount.padded.tokens / elapsed,
    }
    if self._peak.flops:
      for name, work in (('', amount.padded), ('real_', amount.real)):
        flops = utilisation.training_flops(
          self._config.model, work, self._steps
        )
        share = flops / elapsed / self._peak.flops
        line[f'{name}model_flops_utilisation'] = share
    line['data_wait_share'] = self._waited / elapsed
    line['memory_peak_bytes'] = utilisation.memory_peak()[0]
    if self._compiles.number is not None:
      line['compiles'] = self._compiles.number
      line['compile_s'] = round(self._compiles.seconds, 3)
    return line

  def is_evaluated(self, step: int) -> bool:
    """Whether there was a line of it when the log was opened."""
    return processes.from_first(lambda: step in self._evaluated)

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

  def _move_profile(self) -> None:
    """Opens and closes the window between two steps."""
    if self._step == self._profile.last:
      self.catch_up()
      self._close_profile()
    step = self._step + 1
    if not self._profile.opens_at(step):
      self._profile.before(step)
      return
    with self.spent('profile'):
      self._profile.before(step)
    self.event('profile', step=step, folder=self._profile.folder)

  def _close_profile(self) -> None:
    if self._profile is not None and self._profile.last is not None:
      with self.spent('profile'):
        self._profile.close()


_SUMS = '_sums_over_processes'
_BEGIN = ('start', 'resume')


def _is_done(values: dict[str, jax.Array]) -> bool:
  """Whether a step has ended on the devices, as far as it can be seen."""
  return all(
    value.is_ready() for value in values.values() if hasattr(value, 'is_ready')
  )


def _facts_before(folder: paths.PathLike) -> tuple[dict[str, Any], str]:
  """How far an earlier process came, before its lines are cut; id of the run.

  Steps that are done again, and the time until this process, cannot be known
  from what is left afterwards.
  """
  if not paths.exists(paths.join(folder, metrics.FILE)):
    return {}, uuid.uuid4().hex[:12]
  lines = metrics.read(folder)
  run_id = next(
    (line['run_id'] for line in lines if 'run_id' in line),
    uuid.uuid4().hex[:12],
  )
  times = [line['time'] for line in lines if 'time' in line]
  if not times:
    return {}, run_id
  begin = max(
    (i for i, line in enumerate(lines) if line.get('event') in _BEGIN),
    default=0,
  )
  # Of the last process: an earlier one may have been further.
  last_step = max(line.get('step', 0) for line in lines[begin:])
  return {'last_time': max(times), 'last_step': last_step}, run_id


def _strongest(line: dict[str, Any], prefix: str) -> str:
  """Name and loss of the strongest null, in words."""
  found = metrics.strongest_null(line, prefix)
  return 'no null models' if found is None else f'{found[0]} {found[1]:.4f}'
