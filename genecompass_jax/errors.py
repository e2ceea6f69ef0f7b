"""Errors that a user can cause, and the exit codes of the commands."""

EXIT_OK = 0
EXIT_FAILED = 1  # permanent: do not restart
EXIT_USAGE = 2  # the user can mend it: one line says how
EXIT_RETRY = 42  # preempted or transient: a launcher starts the job again


class UserError(ValueError):
  """A mistake that the user can mend.

  The message is one line: what is wrong, where, and what to do. The command
  line prints it without a traceback and exits with `EXIT_USAGE`.
  """


class RetryableError(RuntimeError):
  """A passing fault (preemption, transient I/O): exit with `EXIT_RETRY`."""
