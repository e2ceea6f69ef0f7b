"""Folders that take their name only when they are whole."""

import os
import shutil
import socket


def is_local(path: str) -> bool:
  """Whether a path is no URL."""
  return '://' not in path


def real(path: str) -> str:
  """A local path without links and dots: what is beside it has its disk."""
  return os.path.realpath(path) if path and is_local(path) else path


def overlap(one: str, other: str) -> bool:
  """Whether one of two places is the other, or lies in it."""
  one, other = (f'{real(path).rstrip("/")}/' for path in (one, other))
  return one.startswith(other) or other.startswith(one)


def folder(path: str) -> str:
  """Makes a folder beside a local output, and clears those of dead runs."""
  path = os.path.abspath(path)
  stem = f'{os.path.basename(path)}.staging-{socket.gethostname()}-'
  parent = os.path.dirname(path)
  os.makedirs(parent, exist_ok=True)
  for name in os.listdir(parent):
    pid = name.removeprefix(stem)
    if name.startswith(stem) and pid.isdigit() and not _is_alive(int(pid)):
      shutil.rmtree(os.path.join(parent, name))
  staging = os.path.join(parent, f'{stem}{os.getpid()}')
  shutil.rmtree(staging, ignore_errors=True)
  os.makedirs(staging)
  return staging


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def swap(staging: str, path: str) -> None:
  """Gives a finished folder its name; an old corpus goes last."""
  old = f'{staging}-old'
  if os.path.exists(path):
    os.rename(path, old)
  os.rename(staging, path)
  shutil.rmtree(old, ignore_errors=True)
