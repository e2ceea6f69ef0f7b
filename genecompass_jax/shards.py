"""Arrays on disk or behind a URL: zarr3 in whole shards of checked chunks.

Every chunk and every index has a crc32c: a flipped bit is an error, and so is a
missing shard, which plain zarr would read as zeros. This is the only module
that imports tensorstore.
"""

import os
from collections.abc import Sequence

import numpy as np

# Seconds to wait for a connection, and without a byte of an answer: TensorStore
# itself would wait without end. Read when it is loaded; a user's own values stay.
for _name, _seconds in (('CONNECT_TIMEOUT', 10), ('LOW_SPEED_TIME', 30)):
  os.environ.setdefault(f'TENSORSTORE_CURL_{_name}_SECONDS', str(_seconds))
os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')

import tensorstore as ts  # noqa: E402

from genecompass_jax import errors, paths  # noqa: E402

INNER_CHUNK = 65_536  # elements: about 55 cells; the unit of reading
CACHE_BYTES = 64 << 20
# Seven tries with about 20 s of waits between them. TensorStore's own 32 take a
# quarter of an hour, of which a user would see nothing.
_RETRIES = {'max_retries': 6, 'initial_delay': '500ms', 'max_delay': '8s'}
_TRANSIENT = ('UNAVAILABLE', 'DEADLINE', 'ABORTED', 'RESOURCE_EXHAUSTED')
HINT = 'build the corpus again or copy it again'

Array = ts.TensorStore
Context = ts.Context
Future = ts.Future


def new_context() -> Context:
  """What the arrays of a corpus share: a cache, of shard indices above all."""
  retries = {f'{kind}_request_retries': _RETRIES for kind in _STORES}
  return ts.Context(
    {'cache_pool': {'total_bytes_limit': CACHE_BYTES}, **retries}
  )


_STORES = ('gcs', 's3', 'http')


def _kvstore(*parts: str) -> dict | str:
  """The TensorStore place of a local folder or a URL."""
  name = paths.join(*parts)
  if not paths.is_url(name):
    return {'driver': 'file', 'path': f'{os.path.abspath(name)}/'}
  scheme, _, rest = name.partition('://')
  if scheme == 's3':
    return _s3(*rest.partition('/')[::2])
  return f'{name}/'


def _s3(bucket: str, path: str) -> dict:
  """A place in S3, or in a store that speaks S3.

  TensorStore does not read the variable of the endpoint; the other clients do.
  """
  spec = {'driver': 's3', 'bucket': bucket, 'path': f'{path}/'}
  if 'AWS_ACCESS_KEY_ID' in os.environ:  # nor does it look for files then
    spec['aws_credentials'] = {'type': 'environment'}
  for name in ('AWS_ENDPOINT_URL_S3', 'AWS_ENDPOINT_URL'):
    if os.environ.get(name):
      region = os.environ.get('AWS_REGION') or os.environ.get(
        'AWS_DEFAULT_REGION', 'us-east-1'
      )
      return {
        **spec,
        'endpoint': os.environ[name].rstrip('/'),
        'aws_region': region,
      }
  return spec


def _array_metadata(shape: Sequence[int], dtype: str, shard: int) -> dict:
  """zarr3 metadata: whole shards of small checked chunks, index at the end."""
  lead = list(shape[:-1])
  little = {'name': 'bytes', 'configuration': {'endian': 'little'}}
  crc = {'name': 'crc32c'}
  blosc = {
    'cname': 'lz4',
    'clevel': 5,
    'shuffle': 'bitshuffle',
    'typesize': np.dtype(dtype).itemsize,
  }
  sharding = {
    'chunk_shape': lead + [min(INNER_CHUNK, shard)],
    'codecs': [little, {'name': 'blosc', 'configuration': blosc}, crc],
    'index_codecs': [little, crc],
    'index_location': 'end',
  }
  return {
    'shape': list(shape),
    'data_type': dtype,
    'fill_value': 0,
    'chunk_grid': {
      'name': 'regular',
      'configuration': {'chunk_shape': lead + [shard]},
    },
    'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
  }


def open_array(context: Context, *parts: str) -> Future:
  """Opens an array for reading; never fills what is missing with zeros."""
  spec = {
    'driver': 'zarr3',
    'kvstore': _kvstore(*parts),
    # both are needed, or every block costs a second request for its index
    'recheck_cached_data': False,
    'recheck_cached_metadata': False,
    'fill_missing_data_reads': False,
  }
  return ts.open(spec, read=True, context=context)


def result(future: Future) -> np.ndarray | Array:
  """Waits for an array or a read of it.

  Raises:
    UserError: a file is damaged, cut short, missing or not to be read.
    RetryableError: the storage does not answer.
  """
  try:
    return future.result()
  except (ValueError, OSError) as error:
    text = ' '.join(str(error).split()).partition(' [http_response')[0]
    if any(k in text for k in _TRANSIENT):
      raise errors.RetryableError(
        f'reading the corpus: {text}; start the same command again when the '
        'store answers'
      ) from None
    if 'PERMISSION_DENIED' in text or 'UNAUTHENTICATED' in text:
      raise errors.UserError(
        f'the store refuses to give a shard of the corpus, check credentials '
        f'and rights: {text}'
      ) from None
    if 'ignored by server' in text:
      raise errors.UserError(
        'the web server of the corpus answers no byte ranges, as python -m '
        'http.server does not; take another server, or copy the corpus here'
      ) from None
    # A flipped bit shows as DATA_LOSS, or as FAILED_PRECONDITION where blosc or
    # the JSON of an array stumbles over it first.
    raise errors.UserError(
      f'a shard of the corpus is damaged or missing, {HINT}: {text}'
    ) from None


def read_metrics() -> dict[str, int]:
  """Requests and bytes read from storage by this process so far."""

  def total(ending: str) -> int:
    found = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/')
    return sum(
      int(value['value'])
      for metric in found
      if metric['name'].endswith(ending)
      for value in metric['values']
    )

  return {'requests': total('/batch_read'), 'bytes': total('/bytes_read')}


def read_into(source: Array, out: np.ndarray) -> Future:
  """Reads an array, or a part of one, to memory that is there already."""
  return ts.array(out, copy=False)[...].write(source)


def create_array(
  shape: Sequence[int], dtype: str, shard: int, *place: str
) -> None:
  """Makes an array of a known size, for `write_shard` to fill.

  Args:
    shape: whole; the last axis is cut in shards.
    dtype: of the elements.
    shard: elements of a shard along the last axis.
    *place: parts of its folder.
  """
  metadata = _array_metadata(shape, dtype, shard)
  spec = {'driver': 'zarr3', 'kvstore': _kvstore(*place), 'metadata': metadata}
  ts.open(spec, create=True, delete_existing=True).result()


def write_shard(data: np.ndarray, number: int, shard: int, *place: str) -> str:
  """Writes one shard, whole, of an array that `create_array` made.

  Shards may be written by several processes at a time.

  Returns:
    The name of its file below the folder of the array.
  """
  spec = {
    'driver': 'zarr3',
    'kvstore': _kvstore(*place),
    'store_data_equal_to_fill_value': True,  # as `ArrayWriter` says
  }
  array = ts.open(spec, open=True).result()
  first = number * shard
  whole = array[..., first : first + data.shape[-1]]
  # a shard is large: no copy of it is made before it is encoded
  whole.write(data, can_reference_source_data_indefinitely=True).result()
  return '/'.join(['c', *['0'] * (data.ndim - 1), str(number)])


class ArrayWriter:
  """An array that grows along its last axis and is written in whole shards."""

  def __init__(self, shape: Sequence[int], dtype: str, shard: int, *place: str):
    self.size = 0
    self._lead, self._dtype, self._shard = list(shape), np.dtype(dtype), shard
    self._buffer: np.ndarray | None = None  # a shard, touched as it fills
    self._held = 0
    self._pending: Future | None = None
    spec = {
      'driver': 'zarr3',
      'kvstore': _kvstore(*place),
      'metadata': _array_metadata([*shape, 2**60], dtype, shard),
      # or a chunk of zeros writes no file, and no file looks like a lost one
      'store_data_equal_to_fill_value': True,
    }
    self._array = ts.open(spec, create=True, delete_existing=True).result()

  def append(self, data: np.ndarray) -> None:
    """Adds elements; a shard is written as soon as it is full."""
    done = 0
    while done < data.shape[-1]:
      if self._buffer is None:
        self._buffer = np.empty([*self._lead, self._shard], self._dtype)
      size = min(data.shape[-1] - done, self._shard - self._held)
      piece = data[..., done : done + size]
      self._buffer[..., self._held : self._held + size] = piece
      done += size
      self._held += size
      if self._held == self._shard:
        self._write(self._buffer)

  def _write(self, data: np.ndarray) -> None:
    if self._pending is not None:  # one shard in flight bounds the memory
      self._pending.result()
    stop = self.size + data.shape[-1]
    self._pending = self._array[..., self.size : stop].write(data)
    self.size, self._buffer, self._held = stop, None, 0

  def close(self) -> None:
    """Writes what is left and waits for it."""
    end = [None] * len(self._lead) + [self.size + self._held]
    self._array = self._array.resize(
      exclusive_max=end, resize_metadata_only=True
    ).result()
    if self._held:
      self._write(self._buffer[..., : self._held])
    if self._pending is not None:
      self._pending.result()
