"""What the headers of an http answer say of the file that it carries.

Servers send what they like: a number that is none is as good as not said.
"""

import contextlib
import email.utils
import re
import time
from collections.abc import Mapping
from typing import Any

from genecompass_jax import paths

_NUMBER = r'[0-9]{1,18}'


def facts_of(answer: Any, url: str) -> dict[str, Any]:
  """What tells one content of an address from another.

  Returns:
    url, final_url, etag and last_modified, '' if not said, and length, which
    is not filled in.
  """
  return {
    'url': url,
    'final_url': answer.geturl(),
    'etag': answer.headers.get('ETag') or '',
    'last_modified': answer.headers.get('Last-Modified') or '',
    'length': None,
  }


def read_facts(path: str) -> dict[str, Any]:
  """Facts that were kept in a file; none where it is not ours."""
  try:
    facts = paths.read_json(path)
  except (OSError, ValueError):
    return {}
  if not isinstance(facts, dict):
    return {}
  words = [facts.get(k) for k in ('url', 'final_url', 'etag', 'last_modified')]
  length = facts.get('length')
  if not all(isinstance(w, str) and w.isascii() for w in words):
    return {}
  if not (length is None or type(length) is int):
    return {}
  # they go into headers
  return facts if all(w.isprintable() for w in words) else {}


def same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
  """Whether nothing shows that two answers are of different contents."""
  return all(
    not old.get(key) or not new.get(key) or old[key] == new[key]
    for key in ('etag', 'last_modified', 'length')
  )


def condition(facts: Mapping[str, Any]) -> str:
  """By which a server knows that content again; '' of none.

  A weak tag may stand for other bytes.
  """
  tag = facts.get('etag') or ''
  if tag and not tag.startswith('W/'):
    return tag
  return facts.get('last_modified') or ''


def length(text: str | None) -> int | None:
  """A Content-Length."""
  return int(text) if text and re.fullmatch(_NUMBER, text) else None


def part_of(text: str | None) -> tuple[int, int | None]:
  """(first byte, total) of a Content-Range; (-1, None) of anything else."""
  match = re.fullmatch(
    rf'bytes ({_NUMBER})-{_NUMBER}/({_NUMBER}|\*)', (text or '').strip()
  )
  if not match:
    return -1, None
  return int(match[1]), None if match[2] == '*' else int(match[2])


def total(text: str | None) -> int | None:
  """The length that a refused range says."""
  match = re.fullmatch(rf'bytes \*/({_NUMBER})', (text or '').strip())
  return int(match[1]) if match else None


def retry_after(text: str | None) -> float:
  """Seconds to wait, 0 if it says nothing."""
  text = text or ''
  if re.fullmatch(_NUMBER, text):
    return float(text)
  with contextlib.suppress(TypeError, ValueError, OverflowError):
    then = email.utils.parsedate_to_datetime(text)
    return max(then.timestamp() - time.time(), 0.0)
  return 0.0
