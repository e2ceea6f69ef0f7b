"""Files from the net, whole or not at all.

A file is read into NAME.part beside its place, which a dropped connection or
a killed process leaves for the next attempt to go on from, and takes its name
only when its size, its checksums and its own (gzip) are right. Every file is
recorded in `downloads.json` of its folder: address, sha256, size, time.

The standard library does it: what is asked for here (going on where a
connection dropped, and believing nothing that cannot be checked) is what the
well-kept clients leave to their callers as well.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from genecompass_jax import errors, locks, paths
from genecompass_jax.prepare.fetching import contents, transfers

RECORD = 'downloads.json'
LOCK = '.downloads.lock'
_RECORDED = {'url': str, 'sha256': str, 'size': int, 'time': str}


def fetch(
  wanted: transfers.Wanted,
  folder: str,
  patience: transfers.Patience = transfers.Patience(),  # noqa: B008
  check: bool = False,
  again: bool = False,
) -> str:
  """Brings a file into a folder whose lock is held, and records it.

  Args:
    wanted: the file.
    folder: where it goes.
    patience: when to give up.
    check: hash a file that is there already, instead of its size alone.
    again: fetch it even if it is there.

  Returns:
    One line: what was done.

  Raises:
    UserError: the address is wrong, the content is not what was expected, or
      another file has the name; nothing is left under the name that was not.
    RetryableError: the network failed; what arrived is kept for the next run.
  """
  transfers.check_url(wanted.url)
  if wanted.sha256 and not re.fullmatch('[0-9a-f]{64}', wanted.sha256):
    raise errors.UserError(
      f'sha256 {wanted.sha256!r} is not 64 digits 0-9 and a-f'
    )
  place = os.path.join(folder, wanted.name)
  known = read_record(folder).get(wanted.name)
  if os.path.isdir(place):
    raise errors.UserError(f'{place} is a folder; name another place with -o')
  if os.path.exists(place) and not again:
    return _already_there(wanted, place, known, check)
  digest = wanted.sha256
  listed = ''
  if wanted.checksums and not digest:
    listed = transfers.listed_checksum(wanted, patience)
  content = contents.Content(
    wanted.name, wanted.checksum_kind if listed else ''
  )
  for last in (False, True):  # damage on the way may not happen twice
    try:
      facts = transfers.until_whole(wanted, place, patience, content)
      content.read_until(place + '.part', transfers.size(place + '.part'))
      content.check(digest, listed)
      break
    except contents.DamagedError as error:
      transfers.forget(place)
      if last:
        raise errors.UserError(f'{wanted.url}: {error}') from None
      transfers.say(f'{wanted.name}: {error}; fetching it once more')
  facts |= {'sha256': content.sha256, 'size': content.size}
  _record(folder, wanted, facts)  # before the name: a named file is recorded
  os.replace(place + '.part', place)
  transfers.forget(place)
  checked = (
    'sha256 as expected'
    if digest
    else f'{wanted.checksum_kind} as published'
    if listed
    else 'no published checksum'
  )
  if not facts['length']:
    checked += '; the server named no size'
  of_url = known is not None and known['url'] == wanted.url
  if of_url and known['sha256'] != content.sha256:
    checked += f'; not what was fetched on {known["time"][:10]}'
  return f'{place}: {facts["size"]:,} bytes, {checked}'


def read_record(folder: str) -> dict[str, dict[str, Any]]:
  """What was fetched into a folder, by file name.

  Raises:
    UserError: the record is damaged.
  """
  path = os.path.join(folder, RECORD)
  if not os.path.exists(path):
    return {}
  try:
    record = paths.read_json(path)
    if all(
      isinstance(entry.get(name), kind)
      for entry in record.values()
      for name, kind in _RECORDED.items()
    ):
      return record
  except (OSError, ValueError, AttributeError):
    pass
  raise errors.UserError(
    f'{path} is damaged; move it away, and its files, or name another folder'
  )


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
  """Keeps a second download out of a folder, which is made.

  Raises:
    UserError: another process fetches into it.
  """
  os.makedirs(folder, exist_ok=True)
  busy = (
    f'{folder}: another process is downloading here; wait for it, or use '
    'another folder'
  )
  with locks.held(os.path.join(folder, LOCK), busy):
    yield


def _already_there(
  wanted: transfers.Wanted,
  place: str,
  known: Mapping[str, Any] | None,
  check: bool,
) -> str:
  """Accepts a file that is as recorded or expected."""
  size = os.path.getsize(place)
  if known is None and not wanted.sha256:
    raise errors.UserError(
      f'{place} is there but was not fetched by this command; move it away, '
      'give its --sha256, or fetch it --again'
    )
  if known is not None and known['url'] != wanted.url:
    raise errors.UserError(
      f'{place} came from {known["url"]}, not {wanted.url}; name another '
      'folder with -o, or replace it with --again'
    )
  expected = wanted.sha256 or known['sha256']
  if known is not None and known['sha256'] != expected:
    raise errors.UserError(
      f'{place} has sha256 {known["sha256"]}, not {expected}; replace it with '
      '--again'
    )
  if known is not None and known['size'] != size:
    raise errors.UserError(
      f'{place} has {size:,} bytes, {known["size"]:,} were recorded; replace '
      'it with --again'
    )
  if not check and known is not None:
    return f'{place}: is there ({size:,} bytes)'
  if paths.sha256_file(place) != expected:
    raise errors.UserError(
      f'{place} was changed after it was fetched (its sha256 differs); replace '
      'it with --again'
    )
  return f'{place}: is there, sha256 as {"expected" if known is None else "recorded"}'


def _record(
  folder: str, wanted: transfers.Wanted, facts: Mapping[str, Any]
) -> None:
  entry = {
    'key': wanted.key,
    'url': wanted.url,
    **{
      name: facts[name]
      for name in ('final_url', 'sha256', 'size', 'etag', 'last_modified')
    },
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
  }
  record = {**read_record(folder), wanted.name: entry}
  paths.write_json(os.path.join(folder, RECORD), record)
