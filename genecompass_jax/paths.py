"""Small files, local or by URL (gs://, s3://, ...): the one module for them.

Arrays go through TensorStore and checkpoints through Orbax, which take URLs
natively; everything else that is read or written whole comes through here.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from genecompass_jax import errors

PathLike = str | os.PathLike
SCHEMES = ('gs', 's3')


def path(name: PathLike) -> epath.Path:
  """The path object of a local name or a URL.

  Raises:
    UserError: a URL of a kind that nothing here reads.
  """
  scheme, found, _ = os.fspath(name).partition('://')
  if found and scheme not in SCHEMES:
    raise errors.UserError(
      f'{os.fspath(name)}: URLs may begin with {", ".join(SCHEMES)}; give '
      'local files by their plain names'
    )
  return epath.Path(name)


def join(first: PathLike, *rest: str) -> str:
  """Joins path parts; URLs stay URLs."""
  return os.fspath(path(first).joinpath(*rest))


def exists(name: PathLike) -> bool:
  """Whether a file or folder is there."""
  return path(name).exists()


def listdir(name: PathLike) -> list[str]:
  """Names in a folder, sorted; empty where there is no folder."""
  folder = path(name)
  return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def files_below(folder: PathLike) -> list[str]:
  """Relative names of all files of a folder and of those in it, sorted."""

  def walk(place: epath.Path, inner: str) -> Iterator[str]:
    for child in place.iterdir():
      name = f'{inner}{child.name}'
      if child.is_dir():
        yield from walk(child, f'{name}/')
      else:
        yield name

  return sorted(walk(path(folder), ''))


def read_bytes(name: PathLike) -> bytes:
  """The whole content of a file."""
  return path(name).read_bytes()


def read_text(name: PathLike) -> str:
  """The whole content of a UTF-8 file."""
  return path(name).read_bytes().decode('utf-8')


def write_bytes(name: PathLike, data: bytes) -> None:
  """Writes a file whole, making its folder.

  A local file appears under its name only when it is complete, so that a
  killed process leaves the old content or the new one. Object stores commit
  whole objects by themselves.
  """
  target = path(name)
  target.parent.mkdir(parents=True, exist_ok=True)
  local = os.fspath(target)
  if '://' in local:
    target.write_bytes(data)
    return
  staging = f'{local}.tmp-{os.getpid()}'
  try:
    with open(staging, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(staging, local)
  except BaseException:  # a full disk, a folder of that name
    with contextlib.suppress(OSError):
      os.unlink(staging)
    raise


def write_text(name: PathLike, text: str) -> None:
  """Writes a UTF-8 file whole, making its folder."""
  write_bytes(name, text.encode('utf-8'))


def write_json(name: PathLike, content: object) -> None:
  """Writes JSON, keys in order: equal content gives equal bytes."""
  text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
  write_text(name, f'{text}\n')


def parse_json(text: str | bytes) -> Any:
  """What a JSON text says.

  Raises:
    JSONDecodeError: it is no JSON, or nested so deep that nothing writes it.
  """
  try:
    return json.loads(text)
  except RecursionError:
    raise json.JSONDecodeError('nested too deep to be read', '', 0) from None


def read_json(name: PathLike) -> Any:
  """What a JSON file says.

  Raises:
    JSONDecodeError: as `parse_json`.
    UnicodeDecodeError: no text.
  """
  return parse_json(read_text(name))


def sha256_bytes(data: bytes) -> str:
  """Hex digest of some bytes."""
  return hashlib.sha256(data).hexdigest()


def sha256_file(name: PathLike) -> str:
  """Hex digest of a file, read in pieces of 4 MiB."""
  digest = hashlib.sha256()
  with path(name).open('rb') as file:
    while chunk := file.read(1 << 22):
      digest.update(chunk)
  return digest.hexdigest()
