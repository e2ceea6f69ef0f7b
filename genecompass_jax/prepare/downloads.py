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
import dataclasses
import email.utils
import errno
import fcntl
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

import genecompass_jax
from genecompass_jax import errors, kernels, paths, progress

RECORD = 'downloads.json'
LOCK = '.downloads.lock'
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


class _DamagedError(Exception):
  """A whole body with wrong content."""


def fetch(
  wanted: Wanted,
  folder: str,
  patience: Patience = Patience(),  # noqa: B008
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
  _check_url(wanted.url)
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
    listed = _listed_checksum(wanted, patience)
  content = _Content(wanted, listed)
  for last in (False, True):  # damage on the way may not happen twice
    try:
      facts = _until_whole(wanted, place, patience, content)
      content.read_until(place + '.part', _size(place + '.part'))
      content.check(digest, listed)
      break
    except _DamagedError as error:
      _forget(place)
      if last:
        raise errors.UserError(f'{wanted.url}: {error}') from None
      _say(f'{wanted.name}: {error}; fetching it once more')
  facts |= {'sha256': content.sha256, 'size': content.size}
  _record(folder, wanted, facts)  # before the name: a named file is recorded
  os.replace(place + '.part', place)
  _forget(place)
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
    record = json.loads(paths.read_text(path))
    if all('sha256' in entry and 'url' in entry for entry in record.values()):
      return record
  except (ValueError, AttributeError, TypeError):
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
  path = os.path.join(folder, LOCK)
  with open(path, 'w', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      mine = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
      mine = False  # held, or given up and unlinked just now
    if not mine:
      raise errors.UserError(
        f'{folder}: another process is downloading here; wait for it, or use '
        'another folder'
      )
    try:
      yield
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _already_there(
  wanted: Wanted, place: str, known: Mapping[str, Any] | None, check: bool
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


def _until_whole(
  wanted: Wanted, place: str, patience: Patience, content: '_Content'
) -> dict[str, Any]:
  """Attempts until the body is whole; gives up after so many in vain."""
  in_vain, most = 0, _size(place + '.part')
  while True:
    try:
      return _attempt(wanted, place, patience, content)
    except _PassingError as fault:
      arrived = _size(place + '.part')
      in_vain = 0 if arrived > most else in_vain + 1
      most = max(most, arrived)
      if in_vain >= patience.attempts:
        raise errors.RetryableError(
          f'{wanted.url}: {fault}, {patience.attempts} times; what arrived '
          f'({arrived:,} bytes) is kept: run the command again to go on'
        ) from None
      wait = min(patience.first_wait * 2**in_vain, _LONGEST_WAIT)
      wait = max(wait * random.uniform(0.5, 1.0), min(fault.wait, 600.0))
      _say(
        f'{wanted.name}: {fault} at {arrived:,} bytes; going on in {wait:.1f} s'
      )
      time.sleep(wait)


def _attempt(
  wanted: Wanted, place: str, patience: Patience, content: '_Content'
) -> dict[str, Any]:
  """One connection; returns the facts of a body that is whole."""
  part = place + '.part'
  start, facts = _size(part), _read_facts(place)
  if start and facts.get('url') != wanted.url:
    start = 0  # of another address, or of nobody knows what
  headers = {}
  if start:
    headers['Range'] = f'bytes={start}-'
    if condition := facts.get('etag') or facts.get('last_modified'):
      # A weak tag may stand for other bytes: such a file is begun anew.
      if condition.startswith('W/'):
        condition = facts.get('last_modified')
      if condition:
        headers['If-Range'] = condition
  try:
    answer = _open(wanted.url, headers, patience.timeout)
  except urllib.error.HTTPError as error:
    with error:
      if error.code == 416 and start:
        total = _total(error.headers.get('Content-Range', ''))
        if total == start and _same(facts, _facts(error, wanted.url)):
          return {**facts, 'length': total}  # nothing was missing
        _forget(place)
        raise _PassingError('the file there is another one now') from None
      _refuse(error, wanted.url)
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
  content: '_Content',
) -> dict[str, Any]:
  """Writes a body to the part, from its beginning or where it ended."""
  now = _facts(answer, wanted.url)
  packed = answer.headers.get('Content-Encoding', 'identity').lower()
  if packed != 'identity' and not wanted.name.endswith(('.gz', '.bgz')):
    raise errors.UserError(
      f'{wanted.url}: the server sends it packed ({packed}) though it was asked '
      'not to; fetch it by hand'
    )
  length = answer.headers.get('Content-Length')
  length = int(length) if length and length.isdigit() else None
  if start and answer.status == 206:
    offset, total = _range(answer.headers.get('Content-Range', ''))
    if (
      offset != start
      or not _same(facts, now)
      or (facts.get('length') and total and facts['length'] != total)
    ):
      _forget(place)
      raise _PassingError('the file there is another one now')
    now['length'] = total or (length and start + length)
  else:
    if start:
      _say(f'{wanted.name}: the server does not go on; from the beginning')
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
  arrived = _size(place + '.part')
  if now['length'] is not None and arrived != now['length']:
    if arrived > now['length']:
      _forget(place)
    raise _PassingError(f'the connection ended before {now["length"]:,} bytes')
  return now


def _read(answer: Any, url: str) -> bytes:
  try:
    return answer.read1(_CHUNK)
  except (OSError, http.client.HTTPException) as error:
    raise _broken(error, url) from None


class _Content:
  """Checks a body while it comes: its digests, and that gzip data unpack."""

  def __init__(self, wanted: Wanted, listed: str):
    self._is_gzip = wanted.name.endswith(('.gz', '.bgz'))
    self._kind = wanted.checksum_kind if listed else ''
    self._restart()

  def _restart(self) -> None:
    self.size = 0
    self._head = b''
    self._sha256 = hashlib.sha256()
    self._md5 = hashlib.md5(usedforsecurity=False)
    self._sum = 0
    self._unpacker = zlib.decompressobj(wbits=31) if self._is_gzip else None

  @property
  def sha256(self) -> str:
    return self._sha256.hexdigest()

  def read_until(self, part: str, size: int) -> None:
    """Starts anew from the first bytes of a file, unless just these were seen.

    Raises:
      _DamagedError: they are no gzip data.
    """
    if self.size == size:
      return
    self._restart()
    if not size:
      return
    with open(part, 'rb') as file:
      while self.size < size:
        chunk = file.read(min(1 << 22, size - self.size))
        if not chunk:
          break
        self.feed(chunk)

  def feed(self, chunk: bytes) -> None:
    """Takes the next bytes.

    Raises:
      _DamagedError: they are no gzip data.
    """
    self._head = self._head or chunk[:200]
    self.size += len(chunk)
    self._sha256.update(chunk)
    if self._kind == 'md5':
      self._md5.update(chunk)
    elif self._kind == 'sum':
      self._sum = int(_bsd_sum(np.frombuffer(chunk, np.uint8), self._sum))
    try:
      if self._unpacker is not None:
        self._unpack(chunk)
    except zlib.error as error:
      raise _DamagedError(
        f'damaged gzip data ({error}){_page(self._head)}'
      ) from None

  def _unpack(self, chunk: bytes) -> None:
    """Feeds gzip data, of one member or several, and drops what comes out."""
    while chunk:
      if self._unpacker.eof:  # a further member, or zeros that fill a block
        chunk = chunk.lstrip(b'\0')
        if not chunk:
          return
        self._unpacker = zlib.decompressobj(wbits=31)
      self._unpacker.decompress(chunk, 1 << 24)
      while self._unpacker.unconsumed_tail:
        self._unpacker.decompress(self._unpacker.unconsumed_tail, 1 << 24)
      chunk = self._unpacker.unused_data

  def check(self, digest: str, listed: str) -> None:
    """Compares a whole body with what was expected.

    Raises:
      _DamagedError: something differs.
    """
    page = _page(self._head)
    if not self.size:
      raise _DamagedError('the server sent an empty file')
    if self._unpacker is not None and not self._unpacker.eof:
      raise _DamagedError(f'the gzip data ends in the middle{page}')
    if digest and self.sha256 != digest:
      raise _DamagedError(
        f'sha256 {self.sha256}, but {digest} was expected{page}'
      )
    found = (
      self._md5.hexdigest()
      if self._kind == 'md5'
      else f'{self._sum} {-(-self.size // 1024)}'
    )
    if listed and found != listed:
      raise _DamagedError(
        f'{self._kind} {found}, but {listed} is published{page}'
      )
    if page:
      raise _DamagedError(page.strip(' ;'))


def _page(head: bytes) -> str:
  """What is said of content that only looks like a file."""
  start = head.lstrip()[:100].lower()
  if start.startswith((b'<!doctype html', b'<html')):
    return '; the server sent a web page, not the file'
  if start.startswith(b'version https://git-lfs'):
    return '; the server sent a git-lfs pointer, not the file'
  return ''


@kernels.compiled
def _bsd_sum(data, total):
  """The 16-bit checksum of the `sum` command, gone on from `total`."""
  for byte in data:
    total = ((total >> 1) + ((total & 1) << 15) + byte) & 0xFFFF
  return total


def _listed_checksum(wanted: Wanted, patience: Patience) -> str:
  """The published checksum of a file; '' with a line where there is none."""
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
        return f'{int(words[0])} {int(words[1])}'
      return words[0].lower()
  _say(f'{wanted.checksums} does not name {name}: it cannot be checked')
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


def _check_url(url: str) -> None:
  parts = urllib.parse.urlsplit(url)
  if parts.scheme not in ('http', 'https') or not parts.netloc:
    raise errors.UserError(
      f'{url}: give an address that begins with https:// or http://'
    )


def _refuse(error: urllib.error.HTTPError, url: str) -> NoReturn:
  """Tells passing answers from final ones."""
  reason = (str(error.reason).splitlines() or [''])[0]
  says = f'the server says {error.code} {reason}'.rstrip()
  if error.code in _PASSING:
    raise _PassingError(
      says, _retry_after(error.headers.get('Retry-After', ''))
    )
  advice = {
    401: 'the file needs an account',
    403: 'it is not given to everyone',
    404: 'check the release and the address',
    410: 'it was taken away',
  }.get(error.code, 'check the address')
  raise errors.UserError(f'{url}: {says}; {advice}') from None


def _retry_after(text: str) -> float:
  if text.isdigit():
    return float(text)
  with contextlib.suppress(TypeError, ValueError):
    then = email.utils.parsedate_to_datetime(text)
    return max(then.timestamp() - time.time(), 0.0)
  return 0.0


def _facts(answer: Any, url: str) -> dict[str, Any]:
  """What tells one content of an address from another."""
  return {
    'url': url,
    'final_url': answer.geturl(),
    'etag': answer.headers.get('ETag') or '',
    'last_modified': answer.headers.get('Last-Modified') or '',
    'length': None,
  }


def _same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
  return all(
    not old.get(key) or not new.get(key) or old[key] == new[key]
    for key in ('etag', 'last_modified')
  )


def _range(text: str) -> tuple[int, int | None]:
  """(first byte, total) of a Content-Range; (-1, None) of anything else."""
  match = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', text.strip())
  if not match:
    return -1, None
  return int(match[1]), None if match[2] == '*' else int(match[2])


def _total(text: str) -> int | None:
  match = re.fullmatch(r'bytes \*/(\d+)', text.strip())
  return int(match[1]) if match else None


def _check_space(place: str, length: int | None, start: int) -> None:
  free = shutil.disk_usage(os.path.dirname(place) or '.').free
  if length is not None and length - start > free:
    raise errors.UserError(
      f'{place}: {length - start:,} bytes are to come, the disk has room for '
      f'{free:,}; free room, or name another folder'
    )


def _read_facts(place: str) -> dict[str, Any]:
  try:
    facts = json.loads(paths.read_text(place + '.part.json'))
    return facts if isinstance(facts, dict) else {}
  except (OSError, ValueError):
    return {}


def _record(folder: str, wanted: Wanted, facts: Mapping[str, Any]) -> None:
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


def _forget(place: str) -> None:
  """Takes away a part and what is known of it."""
  _forget_part(place)
  with contextlib.suppress(FileNotFoundError):
    os.unlink(place + '.part.json')


def _forget_part(place: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.unlink(place + '.part')


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except FileNotFoundError:
    return 0


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
