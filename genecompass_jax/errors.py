"""Errors that a user can cause, and the exit codes of the commands."""

import errno
import numbers

EXIT_OK = 0
EXIT_FAILED = 1  # permanent: do not restart
EXIT_USAGE = 2  # the user can mend it: one line says how
EXIT_INTERRUPTED = 130  # by Ctrl-C
EXIT_RETRY = 42  # preempted or transient: a launcher starts the job again
_LONGEST = 2000  # characters of an error of a library


class UserError(ValueError):
  """A mistake that the user can mend.

  The message is one line: what is wrong, where, and what to do. The command
  line prints it without a traceback and exits with `EXIT_USAGE`.
  """


class RetryableError(RuntimeError):
  """A passing fault (preemption, transient I/O): exit with `EXIT_RETRY`."""


def first_line(error: BaseException) -> str:
  """What an error of a library says, in one line.

  A long one is cut: some tell all the bytes of a damaged file.
  """
  lines = str(error).strip().splitlines()
  if not lines:
    return type(error).__name__
  return lines[0] if len(lines[0]) <= _LONGEST else f'{lines[0][:_LONGEST]} ...'


def check_at_least(where: str, config: object, **lows: float) -> None:
  """Refuses fields of a configuration that are too small.

  Args:
    where: the group that the message names, such as 'optimizer'.
    config: what has the fields.
    **lows: the least value of each field.

  Raises:
    UserError: one is smaller, or no number.
  """
  for name, low in lows.items():
    value = getattr(config, name)
    if not value >= low:  # NaN included
      raise UserError(f'{where}.{name}={value} must be at least {low:g}')


def check_whole(**values: object) -> None:
  """Refuses what is no whole number: 0.5, text, True.

  Args:
    **values: by the names that the message gives them.

  Raises:
    UserError: one is none.
  """
  for name, value in values.items():
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
      raise UserError(f'{name}={value!r} must be a whole number')


def is_mistake(error: OSError) -> bool:
  """Whether a fault of the system is one of a path that the user gave."""
  return error.errno in (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR),
    *(errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
  )
