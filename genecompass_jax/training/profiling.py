"""A window of training steps under the profiler of JAX.

The traces are read by TensorBoard's profile plug-in, xprof or Perfetto.
"""

import logging
import os
import tempfile

import jax

from genecompass_jax import errors, paths

FOLDER = 'profile'


def check_steps(steps: tuple[int, ...]) -> None:
  """Refuses a window that is none.

  Raises:
    UserError: neither empty, nor one step, nor a first step and one that is
      not before it.
  """
  are_steps = len(steps) <= 2 and all(type(step) is int for step in steps)
  if steps and not (are_steps and 1 <= steps[0] <= steps[-1]):
    raise errors.UserError(
      f'profile_steps={steps} must be empty, or the first and the last step to '
      "profile, from 1 on: --config.profile_steps='(100, 104)', or 100 alone"
    )


def local_folder(workdir: paths.PathLike, name: str) -> str:
  """WORKDIR/name; a new local folder for what cannot be written to a URL."""
  folder = paths.join(workdir, name)
  if not paths.is_url(folder):
    return folder
  return os.path.join(tempfile.mkdtemp(prefix='genecompass-'), name)


class Window:
  """Profiles process 0 from the begin of a step to the end of another.

  Attributes:
    folder: where the traces are.
  """

  def __init__(self, workdir: paths.PathLike, steps: tuple[int, ...]):
    """A window from the first of `steps` to the last; () is none.

    A run that is resumed inside it profiles what is left of it.
    """
    self._steps = steps if jax.process_index() == 0 else ()
    self.folder = local_folder(workdir, FOLDER) if self._steps else ''
    self._open = False
    self._step: jax.profiler.StepTraceAnnotation | None = None

  @property
  def last(self) -> int | None:
    """The last step of an open window."""
    return self._steps[-1] if self._open else None

  def opens_at(self, step: int) -> bool:
    """Whether `before` this step opens the window."""
    return not self._open and self._holds(step)

  def before(self, step: int) -> None:
    """To be called before every step."""
    self._leave_step()
    if self.opens_at(step):
      os.makedirs(self.folder, exist_ok=True)
      # Without Python's own calls: its hooks have crashed a process whose
      # threads came and went, and their records are most of a trace.
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0
      jax.profiler.start_trace(self.folder, profiler_options=options)
      self._open = True
    if self._holds(step):
      self._step = jax.profiler.StepTraceAnnotation('train', step_num=step)
      self._step.__enter__()

  def _holds(self, step: int) -> bool:
    return bool(self._steps) and self._steps[0] <= step <= self._steps[-1]

  def close(self) -> None:
    """Ends an open window; the steps in it must be done on the devices."""
    self._leave_step()
    if not self._open:
      return
    self._open = False
    try:
      jax.profiler.stop_trace()
    except (RuntimeError, OSError) as error:  # a full disk; training goes on
      logging.warning('the profile is lost: %s', errors.first_line(error))
      return
    first, last = self._steps[0], self._steps[-1]
    logging.info('profile of steps %d to %d: %s', first, last, self.folder)

  def _leave_step(self) -> None:
    if self._step is not None:
      self._step.__exit__(None, None, None)
      self._step = None
