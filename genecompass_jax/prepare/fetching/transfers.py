"""One file over http: attempts that go on where the last one ended.

NAME.part holds what arrived, NAME.part.json what it is a part of: address,
validators, length. Nothing is appended to a part unless the server shows that
the rest is of the same file, or the whole is compared with a digest.
"""

import contextlib
import dataclasses
import errno
import http.client
import os
import random
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, NoReturn

import genecompass_jax
from genecompass_jax import errors, paths, progress
from genecompass_jax.prepare.fetching import answers, contents

_CHUNK = 1 << 18
_LONGEST_WAIT = 60.0  # seconds between two attempts
# Answers that may be others the next time; the rest of 400 to 599 are final.
_PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True)
class Wanted:
  """One file to fetch.

  Attributes:
    url: http or https address.
    name: local file name.
    sha256: expected digest; '' where none is known.
    checksums: address of a list of checksums that names the file.
    checksum_kind: 'sum' (BSD checksum and 1,024-byte blocks) or 'md5'.
    key: recorded with it.
  """

  url: str
  name: str
  sha256: str = ''
  checksums: str = ''
  checksum_kind: str = ''
  key: str = ''


@dataclasses.dataclass(frozen=True)
class Patience:
  """When to give up.

  Attributes:
    attempts: connections to one file without a new byte between them.
    timeout: seconds without an answer or a byte.
    first_wait: seconds before the second attempt; doubled for each further
      one, up to a minute, and scattered so that many machines do not return
      together.
  """

  attempts: int = 6
  timeout: float = 60.0
  first_wait: float = 1.0


class _PassingError(Exception):
  """A fault that another attempt may not meet; `wait` if the server says."""

  def __init__(self, message: str, wait: float = 0.0):
    super().__init__(message)
    self.wait = wait


def until_whole(
  wanted: Wanted, place: str, patience: Patience, content: contents.Content
) -> dict[str, Any]:
  """Attempts until the body is whole.

  Args:
    wanted: the file.
    place: where it is to go; the part is beside it.
    patience: when to give up.
    content: is fed with the bytes.

  Returns:
    url, final_url, etag, last_modified and length, None if not said.

  Raises:
    UserError: the address is wrong.
    RetryableError: too many attempts in vain; what arrived is kept.
    DamagedError: the bytes are no gzip data though the name says so.
  """
  in_vain, most = 0, size(place + '.part')
  while True:
    try:
      return _attempt(wanted, place, patience, content)
    except _PassingError as fault:
      arrived = size(place + '.part')
      in_vain = 0 if arrived > most else in_vain + 1
      most = max(most, arrived)
      if in_vain >= patience.attempts:
        raise errors.RetryableError(
          f'{wanted.url}: {fault}, {patience.attempts} times; what arrived '
          f'({arrived:,} bytes) is kept: run the command again to go on'
        ) from None
      wait = min(patience.first_wait * 2 ** min(in_vain, 9), _LONGEST_WAIT)
      wait = max(wait * random.uniform(0.5, 1.0), min(fault.wait, 600.0))
      say(
        f'{wanted.name}: {fault} at {arrived:,} bytes; going on in {wait:.1f} s'
      )
      time.sleep(wait)


def _attempt(
  wanted: Wanted, place: str, patience: Patience, content: contents.Content
) -> dict[str, Any]:
  """One connection; returns the facts of a body that is whole."""
  part = place + '.part'
  start, facts = size(part), answers.read_facts(place + '.part.json')
  if start and facts.get('url') != wanted.url:
    start = 0  # of another address, or of nobody knows what
  condition = answers.condition(facts)
  if not (condition or wanted.sha256 or content.is_checked):
    start = 0  # the rest might be of another file, and nobody would know
  headers = {}
  if start:
    headers['Range'] = f'bytes={start}-'
    if condition:
      headers['If-Range'] = condition
  try:
    answer = _open(wanted.url, headers, patience.timeout)
  except urllib.error.HTTPError as error:
    with error:
      if error.code == 416 and start:
        total = answers.total(error.headers.get('Content-Range'))
        now = {**answers.facts_of(error, wanted.url), 'length': total}
        if total == start and answers.same(facts, now):
          return {**facts, 'length': total}  # nothing was missing
        forget(place)
        raise _PassingError('the file there is another one now') from None
      _refuse(error, wanted.url)
  except (
    http.client.InvalidURL,
    ValueError,
  ) as error:  # a redirect to what is no address
    raise errors.UserError(
      f'{wanted.url}: the server names another address that is none '
      f'({errors.first_line(error)}); check the address'
    ) from None
  except (OSError, http.client.HTTPException) as error:
    raise _broken(error, wanted.url) from None
  with answer:
    return _receive(answer, wanted, place, start, facts, content)


def _broken(error: Exception, url: str) -> Exception:
  """What a broken connection is for the user, or for another attempt."""
  reason = getattr(error, 'reason', error)
  host = urllib.parse.urlsplit(url).hostname
  if isinstance(reason, socket.gaierror) and (
    reason.errno == socket.EAI_NONAME
  ):
    return errors.UserError(
      f'{url}: no host {host} is known; check the address and the network'
    )
  if isinstance(reason, ssl.SSLCertVerificationError):
    return errors.UserError(
      f'{url}: {host} cannot prove who it is ({reason.verify_message}); '
      'nothing is taken from it'
    )
  if isinstance(reason, TimeoutError):
    return _PassingError('no answer in time')
  if isinstance(reason, http.client.IncompleteRead):
    return _PassingError('the connection ended early')
  text = str(reason).strip() or type(reason).__name__
  return _PassingError(text.splitlines()[0])


def _receive(
  answer: Any,
  wanted: Wanted,
  place: str,
  start: int,
  facts: dict[str, Any],
  content: contents.Content,
) -> dict[str, Any]:
  """Writes a body to the part, from its beginning or where it ended."""
  now = answers.facts_of(answer, wanted.url)
  packed = answer.headers.get('Content-Encoding', 'identity').lower()
  if packed != 'identity' and not contents.is_packed(wanted.name):
    raise errors.UserError(
      f'{wanted.url}: the server sends it packed ({packed}) though it was asked '
      'not to; fetch it by hand'
    )
  length = answers.length(answer.headers.get('Content-Length'))
  if answer.status not in (200, 206) or (answer.status == 206 and not start):
    raise _PassingError(f'the server says {answer.status}, not the whole file')
  if answer.status == 206:
    offset, now['length'] = answers.part_of(answer.headers.get('Content-Range'))
    if offset != start or not answers.same(facts, now):
      forget(place)
      raise _PassingError('the file there is another one now')
    now['length'] = now['length'] or (length and start + length)
  else:
    if start:
      say(f'{wanted.name}: the server does not go on; from the beginning')
    start = 0
    now['length'] = length
  _check_space(place, now['length'], start)
  # What the part is of is known before its first byte is: a kill between the
  # two leaves facts without a part, which are of no consequence.
  if not start:
    _forget_part(place)
    paths.write_json(place + '.part.json', now)
  content.read_until(place + '.part', start)
  scale, unit = (1e6, 'MB') if (now['length'] or 1e9) >= 1e7 else (1e3, 'kB')
  total = now['length'] and round(now['length'] / scale, 1)
  try:
    with (
      open(place + '.part', 'ab' if start else 'wb') as file,
      progress.Progress(total, unit, wanted.name) as bar,
    ):
      bar.skip(start / scale)
      while chunk := _read(answer, wanted.url):
        file.write(chunk)
        content.feed(chunk)
        bar.update(len(chunk) / scale)
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise errors.UserError(
        f'{place}: {error.strerror}; free room and run the command again: it '
        'goes on from what arrived'
      ) from None
    raise
  arrived = size(place + '.part')
  if now['length'] is not None and arrived != now['length']:
    if arrived > now['length']:
      forget(place)
    raise _PassingError(f'the connection ended before {now["length"]:,} bytes')
  return now


def _read(answer: Any, url: str) -> bytes:
  try:
    return answer.read1(_CHUNK)
  except (OSError, http.client.HTTPException) as error:
    raise _broken(error, url) from None


def listed_checksum(wanted: Wanted, patience: Patience) -> str:
  """The published checksum of a file; '' with a line where there is none.

  Raises:
    RetryableError: the list cannot be had now.
  """
  name = urllib.parse.unquote(urllib.parse.urlsplit(wanted.url).path)
  name = name.rpartition('/')[2]
  for attempt in range(min(patience.attempts, 3)):
    try:
      with _open(wanted.checksums, {}, patience.timeout) as answer:
        text = answer.read(1 << 24).decode('utf-8', 'replace')
      break
    except (OSError, http.client.HTTPException) as error:
      reason = errors.first_line(error)
      if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code not in _PASSING:
          text = ''
          break
    time.sleep(patience.first_wait * 2**attempt)
  else:
    raise errors.RetryableError(
      f'{wanted.checksums}: {reason}; run the command again'
    )
  for line in text.splitlines():
    words = line.split()
    if len(words) >= 2 and words[-1].lstrip('*./') == name:
      if wanted.checksum_kind == 'sum' and len(words) == 3:
        return ' '.join(word.lstrip('0') or '0' for word in words[:2])
      return words[0].lower()
  say(f'{wanted.checksums} does not name {name}: it cannot be checked')
  return ''


def _open(url: str, headers: Mapping[str, str], timeout: float) -> Any:
  request = urllib.request.Request(
    url,
    headers={
      'User-Agent': f'genecompass_jax/{genecompass_jax.__version__}',
      'Accept-Encoding': 'identity',
      **headers,
    },
  )
  return urllib.request.urlopen(request, timeout=timeout)


def check_url(url: str) -> None:
  """Refuses what is no http address, with a UserError."""
  try:
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or '').encode('idna')
    is_address = parts.scheme in ('http', 'https') and bool(host)
    is_address = is_address and parts.port != 0  # read, or there is no such
  except ValueError:
    is_address = False
  if not is_address:
    raise errors.UserError(
      f'{url}: give an address that begins with https:// or http:// and a host'
    )
  if not (url.isascii() and url.isprintable()) or ' ' in url:
    raise errors.UserError(
      f'{url!r}: an address is of plain letters; write others as %XX'
    )


def _refuse(error: urllib.error.HTTPError, url: str) -> NoReturn:
  """Tells passing answers from final ones."""
  reason = (str(error.reason).splitlines() or [''])[0]
  says = f'the server says {error.code} {reason}'.rstrip()
  if error.code in _PASSING:
    raise _PassingError(
      says, answers.retry_after(error.headers.get('Retry-After'))
    )
  advice = {
    401: 'the file needs an account',
    403: 'it is not given to everyone',
    404: 'check the release and the address',
    410: 'it was taken away',
  }.get(error.code, 'check the address')
  raise errors.UserError(f'{url}: {says}; {advice}') from None


def _check_space(place: str, length: int | None, start: int) -> None:
  free = shutil.disk_usage(os.path.dirname(place) or '.').free
  if length is not None and length - start > free:
    raise errors.UserError(
      f'{place}: {length - start:,} bytes are to come, the disk has room for '
      f'{free:,}; free room, or name another folder'
    )


def forget(place: str) -> None:
  """Takes away a part and what is known of it."""
  _forget_part(place)
  with contextlib.suppress(FileNotFoundError):
    os.unlink(place + '.part.json')


def _forget_part(place: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.unlink(place + '.part')


def size(path: str) -> int:
  """Bytes of a file, 0 where there is none."""
  try:
    return os.path.getsize(path)
  except FileNotFoundError:
    return 0


def say(line: str) -> None:
  """One line for the user, beside the progress."""
  print(line, file=sys.stderr, flush=True)
