"""Small files, local or by URL: the one module for them.

gs:// and s3:// are read and written, http:// and https:// are read. Arrays go
through TensorStore and checkpoints through Orbax; everything else that is read
or written whole comes through here. docs/stores.md says how to reach a store.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from genecompass_jax import errors, stores, web

PathLike = str | os.PathLike
_PIECE = 1 << 22  # bytes of a file that are hashed at a time
_STAGING = '.tmp-'  # in the name of a file, with the process that writes it


def is_url(name: PathLike) -> bool:
  """Whether a place is behind a URL."""
  return '://' in os.fspath(name)


def local(name: PathLike) -> str:
  """The name of a place that can only be local.

  Raises:
    UserError: it is a URL.
  """
  if is_url(name):
    raise errors.UserError(
      f'{os.fspath(name)}: this is written to local disks only; name a local '
      'file or folder with -o, and copy it there'
    )
  return os.fspath(name)


def check(name: PathLike) -> None:
  """Refuses a URL that nothing here reads.

  Raises:
    UserError: it is of another kind, names no bucket, or needs a package that
      is not installed.
  """
  name = os.fspath(name)
  scheme = stores.scheme(name)
  if scheme in web.SCHEMES:
    web.check(name)
  elif scheme in stores.SCHEMES:
    stores.check(name)
  elif scheme:
    raise errors.UserError(
      f'{name}: URLs may begin with {", ".join(stores.SCHEMES)} (and http, '
      'https for what is only read); give local files by their plain names'
    )


def check_writable(name: PathLike) -> None:
  """Refuses a place to which nothing can be written; raises as `check`."""
  check(name)
  if web.is_web(name):
    raise errors.UserError(
      f'{os.fspath(name)}: a web server is read only; name a local folder, or '
      f'one of {" and ".join(f"{s}://" for s in stores.SCHEMES)}'
    )


def path(name: PathLike) -> epath.Path:
  """The path object of a local name, or of a store that can be written.

  Raises:
    UserError: a URL of another kind.
  """
  check_writable(name)
  return epath.Path(name)


def join(first: PathLike, *rest: str) -> str:
  """Joins path parts; URLs stay URLs."""
  check(first)
  if web.is_web(first):
    return '/'.join([os.fspath(first).rstrip('/'), *rest])
  return os.fspath(epath.Path(first).joinpath(*rest))


def exists(name: PathLike) -> bool:
  """Whether a file or folder is there; of a web server, a file."""
  check(name)
  if web.is_web(name):
    return web.exists(os.fspath(name))
  with stores.faults(os.fspath(name)):
    return epath.Path(name).exists()


def size(name: PathLike) -> int:
  """Bytes of a file.

  Raises:
    FileNotFoundError: there is none.
  """
  check(name)
  if web.is_web(name):
    return web.size(os.fspath(name))
  with stores.faults(os.fspath(name)):
    return epath.Path(name).stat().length


def sizes_below(folder: PathLike) -> dict[str, int] | None:
  """Bytes of every file of a folder, by relative name, by one listing.

  Returns:
    None where the folder is local or on a web server: ask for each file.
  """
  check(folder)
  name = os.fspath(folder).rstrip('/')
  if not is_url(name) or web.is_web(name):
    return None
  with stores.faults(os.fspath(name)):
    found = stores.client(name).find(name, detail=True)
  start = len(name.partition('://')[2]) + 1
  return {key[start:]: int(facts['size']) for key, facts in found.items()}


def listdir(name: PathLike) -> list[str]:
  """Names in a folder, sorted; empty where there is no folder.

  Raises:
    UserError: it is on a web server, which lists nothing.
  """
  folder = _listed(name)
  with stores.faults(os.fspath(name)):
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _listed(name: PathLike) -> epath.Path:
  """A folder that can be listed."""
  check(name)
  if web.is_web(name):
    raise errors.UserError(
      f'{os.fspath(name)}: a web server lists no folders; give a corpus, a '
      'checkpoints/STEP folder or an exported model, or copy it here'
    )
  return epath.Path(name)


def files_below(folder: PathLike) -> list[str]:
  """Relative names of all files of a folder and of those in it, sorted."""

  def walk(place: epath.Path, inner: str) -> Iterator[str]:
    for child in place.iterdir():
      name = f'{inner}{child.name}'
      if child.is_dir():
        yield from walk(child, f'{name}/')
      else:
        yield name

  with stores.faults(os.fspath(folder)):
    return sorted(walk(_listed(folder), ''))


def read_bytes(name: PathLike) -> bytes:
  """The whole content of a file.

  Raises:
    FileNotFoundError: there is none.
  """
  check(name)
  if web.is_web(name):
    return web.read(os.fspath(name))
  with stores.faults(os.fspath(name)):
    if is_url(
      name
    ):  # one request, where a file that is opened needs up to five
      return stores.client(name).cat_file(os.fspath(name))
    return epath.Path(name).read_bytes()


def read_text(name: PathLike) -> str:
  """The whole content of a UTF-8 file."""
  return read_bytes(name).decode('utf-8')


def write_bytes(name: PathLike, data: bytes) -> None:
  """Writes a file whole, making its folder.

  A local file appears under its name only when it is complete, so that a
  killed process leaves the old content or the new one. Object stores commit
  whole objects by themselves.
  """
  target = path(name)
  local = os.fspath(target)
  if is_url(name):
    with stores.faults(os.fspath(name)):
      target.write_bytes(data)
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  staging = f'{local}{_STAGING}{os.getpid()}'
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


def remove_unfinished(folder: str) -> None:
  """Removes what killed processes were writing in a local folder.

  To be called where no other process writes.
  """
  if not os.path.isdir(folder):
    return
  for name in os.listdir(folder):
    if re.fullmatch(rf'.+{re.escape(_STAGING)}\d+', name):
      with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, name))


def upload(local: str, name: PathLike) -> None:
  """Copies a local file to a store; memory holds a part of it."""
  check_writable(name)
  with stores.faults(os.fspath(name)):
    stores.client(os.fspath(name)).put_file(local, os.fspath(name))


def download(name: PathLike, local: str) -> None:
  """Copies a file of a store or a web server to a local folder that is there.

  Raises:
    FileNotFoundError: there is none.
  """
  check(name)
  if web.is_web(name):
    with open(local, 'wb') as file:
      web.consume(os.fspath(name), file.write, _PIECE)
    return
  with stores.faults(os.fspath(name)):
    stores.client(os.fspath(name)).get_file(os.fspath(name), local)


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


def make_folder(name: PathLike) -> None:
  """Makes a local folder and those above; stores have none to make."""
  place = path(name)
  if not is_url(name):  # a client might make the bucket, too
    place.mkdir(parents=True, exist_ok=True)


def remove(name: PathLike) -> None:
  """Removes a file, if it is there."""
  place = path(name)
  with stores.faults(os.fspath(name)):
    place.unlink(missing_ok=True)


def remove_tree(name: PathLike) -> None:
  """Removes a folder and all in it, if it is there."""
  place = path(name)
  with stores.faults(os.fspath(name)):
    place.rmtree(missing_ok=True)


def sha256_bytes(data: bytes) -> str:
  """Hex digest of some bytes."""
  return hashlib.sha256(data).hexdigest()


def sha256_file(name: PathLike) -> str:
  """Hex digest of a file, read in pieces of 4 MiB."""
  check(name)
  digest = hashlib.sha256()
  if web.is_web(name):
    web.consume(os.fspath(name), digest.update, _PIECE)
    return digest.hexdigest()
  with stores.faults(os.fspath(name)), epath.Path(name).open('rb') as file:
    while chunk := file.read(_PIECE):
      digest.update(chunk)
  return digest.hexdigest()
