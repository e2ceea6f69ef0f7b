"""What a fetched file must be, checked while its bytes come.

Its digests, that gzip data unpack to their end, and that it is no web page or
pointer in place of the file.
"""

import hashlib
import zlib

import numpy as np

from genecompass_jax import kernels


class DamagedError(Exception):
  """A whole body with wrong content."""


class Content:
  """Checks a body while it comes.

  Args:
    name: of the file; `.gz` must be gzip data.
    checksum_kind: 'sum' or 'md5', to be compared with what is published; ''
      for none.
  """

  def __init__(self, name: str, checksum_kind: str):
    self._is_gzip = is_packed(name)
    self._kind = checksum_kind
    self._restart()

  def _restart(self) -> None:
    self.size = 0
    self._head = b''
    self._sha256 = hashlib.sha256()
    self._md5 = hashlib.md5(usedforsecurity=False)
    self._sum = 0
    self._unpacker = zlib.decompressobj(wbits=31) if self._is_gzip else None

  @property
  def is_checked(self) -> bool:
    """Whether `check` would find a file that is put together of two."""
    return self._is_gzip or bool(self._kind)

  @property
  def sha256(self) -> str:
    """Hex digest of the bytes so far."""
    return self._sha256.hexdigest()

  def read_until(self, part: str, size: int) -> None:
    """Starts anew from the first bytes of a file, unless just these were seen.

    Raises:
      DamagedError: they are no gzip data.
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
      DamagedError: they are no gzip data.
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
      raise DamagedError(
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
      DamagedError: something differs.
    """
    page = _page(self._head)
    if not self.size:
      raise DamagedError('the server sent an empty file')
    if self._unpacker is not None and not self._unpacker.eof:
      raise DamagedError(f'the gzip data ends in the middle{page}')
    if digest and self.sha256 != digest:
      raise DamagedError(
        f'sha256 {self.sha256}, but {digest} was expected{page}'
      )
    found = (
      self._md5.hexdigest()
      if self._kind == 'md5'
      else f'{self._sum} {-(-self.size // 1024)}'
    )
    if listed and found != listed:
      raise DamagedError(
        f'{self._kind} {found}, but {listed} is published{page}'
      )
    if page:
      raise DamagedError(page.strip(' ;'))


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


def is_packed(name: str) -> bool:
  """Whether a name is one of gzip data."""
  return name.endswith(('.gz', '.bgz'))
