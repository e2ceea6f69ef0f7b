"""Files of a web server, to read: http:// and https://.

Corpora and models that lie on a web server or behind a CDN as plain files. A
server lists no folders, so what is read must be named by a file that is known:
the manifest of a corpus, the seal of a checkpoint.
"""

import errno
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from genecompass_jax import errors

T = TypeVar('T')

SCHEMES = ('http', 'https')
TRIES = 5  # waits of 0.5, 1, 2 and 4 s lie between them
TIMEOUT = 20.0  # seconds without an answer or without a byte of it
_PASSING = (408, 425, 429, 500, 502, 503, 504)


def is_web(name: str | os.PathLike) -> bool:
  """Whether this is the address of a file or folder on a web server."""
  return os.fspath(name).partition('://')[0] in SCHEMES


def check(name: str) -> None:
  """Refuses an address to which no file name can be added.

  Raises:
    UserError: it has a query, as signed addresses do, or a fragment.
  """
  if '?' in name or '#' in name:
    raise errors.UserError(
      f'{name}: an address with ? or # names one file, no folder; make the '
      'folder public, or copy it to this machine'
    )


def exists(url: str) -> bool:
  """Whether a file is there."""
  try:
    size(url)
  except FileNotFoundError:
    return False
  return True


def size(url: str) -> int:
  """Bytes of a file.

  Raises:
    FileNotFoundError: there is none.
    UserError: the server refuses it, or does not tell.
    RetryableError: it does not answer.
  """

  def length(answer: http.client.HTTPResponse) -> str | None:
    return answer.headers.get('Content-Length')

  found = _ask('HEAD', url, length)
  if found is None:
    raise errors.UserError(
      f'{url}: the server does not say how long the file is (Content-Length), '
      'so it cannot be checked; copy the folder to this machine'
    )
  return int(found)


def read(url: str) -> bytes:
  """The whole content of a file; raises as `size`."""
  return _ask('GET', url, lambda answer: answer.read())


def consume(url: str, take: Callable[[bytes], None], piece: int) -> None:
  """Hands over the content of a file in pieces, each once.

  A connection that is cut goes on where it was, so memory holds one piece.
  Raises as `size`.
  """
  done = 0

  def rest(answer: http.client.HTTPResponse) -> None:
    nonlocal done
    skip = done if answer.status == 200 else 0  # the server knows no ranges
    while skip:
      skip -= len(answer.read(min(skip, piece)))
    wanted = answer.length  # of what is left
    while data := answer.read(piece):
      take(data)
      done += len(data)
    if wanted and answer.length:
      raise http.client.IncompleteRead(b'', answer.length)

  _ask('GET', url, rest, lambda: {'Range': f'bytes={done}-'} if done else {})


def _ask(
  method: str,
  url: str,
  use: Callable[[http.client.HTTPResponse], T],
  headers: Callable[[], dict[str, str]] = dict,
) -> T:
  """What `use` makes of the answer, after a few tries."""
  quoted = urllib.parse.quote(url, safe=':/%~@!$&()*+,;=')
  for left in reversed(range(TRIES)):
    asked = urllib.request.Request(quoted, method=method, headers=headers())
    try:
      with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
        return use(answer)
    except urllib.error.HTTPError as error:
      if error.code in (404, 410):
        raise FileNotFoundError(errno.ENOENT, 'no such file', url) from None
      if error.code in (401, 403):
        raise errors.UserError(
          f'{url}: the server refuses it (HTTP {error.code}): it is not '
          'public, or not there'
        ) from None
      fault = f'HTTP {error.code}'
      if error.code not in _PASSING:
        raise errors.UserError(f'{url}: the server answers {fault}') from None
    except (OSError, http.client.HTTPException) as error:
      fault = errors.first_line(getattr(error, 'reason', None) or error)
    if left:
      time.sleep(0.5 * 2 ** (TRIES - 1 - left))
  raise errors.RetryableError(
    f'{url}: {fault}, in {TRIES} tries; check the address and the network, '
    'and start the same command again'
  )
