"""Object stores: which there are, what they need, how long they may take.

Small files reach a store through fsspec (by epath), arrays through TensorStore.
Here are the waits of the former, and one line for each way in which it fails;
`shards` has the latter.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import fsspec

from genecompass_jax import errors

SCHEMES = ('gs', 's3')
_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}  # extras of setup.cfg name them too
_HOW_TO_LOG_IN = {
  's3': 'set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run: aws configure',
  'gs': 'run: gcloud auth application-default login, or set '
  'GOOGLE_APPLICATION_CREDENTIALS',
}

# Where TensorFlow is installed, epath would take it for the two: it is slow to
# load, and its s3:// needs one more package.
os.environ.setdefault('EPATH_USE_TF', 'false')


def scheme(name: str) -> str:
  """The kind of a URL; '' of a local name."""
  first, found, _ = name.partition('://')
  return first if found else ''


def check(name: str) -> None:
  """Makes ready for a store.

  Raises:
    UserError: its package is not installed, or no bucket is named.
  """
  kind = scheme(name)
  if not _make_ready(kind):
    raise errors.UserError(
      f'{name}: {kind}:// needs a package: pip install {_PACKAGES[kind]}'
    )
  if not name.partition('://')[2].strip('/'):
    raise errors.UserError(f'{name}: names no bucket')


@functools.cache
def _make_ready(kind: str) -> bool:
  """Ends what would wait without end, and the loggers that print tracebacks.

  Returns False where the package is not installed. By itself gcsfs waits for ever on a connection that falls silent. Set in
  fsspec's configuration, as epath makes the same client.
  """
  if importlib.util.find_spec(_PACKAGES[kind]) is None:
    return False
  values = fsspec.config.conf.setdefault('gcs' if kind == 'gs' else kind, {})
  # TensorStore writes too: a listing that is remembered would not show it.
  values.setdefault('use_listings_cache', False)
  if kind == 'gs':
    import aiohttp

    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    values.setdefault(
      'requests_timeout', aiohttp.ClientTimeout(sock_connect=10, sock_read=30)
    )
  else:
    for noisy in ('botocore', 'aiobotocore'):  # they tell where keys come from
      logging.getLogger(noisy).setLevel(logging.WARNING)
    tries = {'mode': 'standard', 'max_attempts': 3}
    values.setdefault('config_kwargs', {'retries': tries})
  return True


def client(name: str) -> fsspec.AbstractFileSystem:
  """The client of a store, the one that epath has."""
  return fsspec.filesystem(scheme(name))


@contextlib.contextmanager
def faults(name: str) -> Iterator[None]:
  """Says in one line what went wrong with a store; local files as they are.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: credentials, rights or the bucket are not as they must be.
    RetryableError: the store did not answer, after all tries of its client.
  """
  try:
    yield
  except (errors.UserError, errors.RetryableError):
    raise
  except Exception as error:  # each client has a family of its own
    if not scheme(name):
      raise
    raise _told(name, error) from None


def _told(name: str, error: Exception) -> Exception:
  """The error to raise for one of a client."""
  line = errors.first_line(error)[:200]
  kind = f'{type(error).__name__} {line}'.lower()
  status = _status(error)
  if 'bucket does not exist' in kind or 'nosuchbucket' in kind:
    return errors.UserError(
      f'{name}: there is no such bucket; check the name, or make it'
    )
  if isinstance(error, FileNotFoundError):
    return FileNotFoundError(errno.ENOENT, 'no such file', name)
  if 'credential' in kind or 'anonymous caller' in kind:
    return errors.UserError(
      f'{name}: no valid credentials ({line}); {_HOW_TO_LOG_IN[name[:2]]}'
    )
  if isinstance(error, PermissionError) or status in (401, 403):
    return errors.UserError(
      f'{name}: the store refuses it ({line}); check the rights of these '
      'credentials on the bucket'
    )
  if isinstance(error, ImportError) or (status and 400 <= status < 408):
    return errors.UserError(f'{name}: {line}')
  if isinstance(error, LookupError | TypeError | AttributeError):
    return error  # a fault of ours
  return errors.RetryableError(
    f'{name}: the store does not answer ({type(error).__name__}: {line}); '
    'check the network, and start the same command again'
  )


def _status(error: Exception) -> int | None:
  """The HTTP status behind an error of s3fs or gcsfs."""
  if 'Forbidden' in str(error):  # gcsfs keeps no more of it
    return 403
  response = getattr(error.__cause__, 'response', None)
  if isinstance(response, dict):
    return response.get('ResponseMetadata', {}).get('HTTPStatusCode')
  try:
    return int(getattr(error, 'code', None))
  except (TypeError, ValueError):
    return None
