"""A small object store in memory, for tests: S3, Google's JSON API, plain HTTP.

One set of objects is served in three dialects, as far as TensorStore, s3fs,
gcsfs, Orbax and `paths` use them:

  /BUCKET/KEY                       S3 with the bucket in the path, and plain
                                    HTTP (GET, HEAD, Range)
  /storage/v1/..., /upload/..., /download/..., /batch/...   Google's JSON API

Signatures are not checked. Every request is recorded, may be delayed, and may
be answered with a fault.
"""

import base64
import contextlib
import dataclasses
import email.parser
import hashlib
import http.server
import itertools
import json
import pathlib
import re
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from xml.sax import saxutils

BUCKET = 'bucket'


@dataclasses.dataclass(frozen=True)
class Request:
  """What was asked: method, path without query, query, range, body size."""

  method: str
  path: str
  query: dict[str, str]
  range: str
  size: int

  @property
  def key(self) -> str:
    """Name of the object that is read or written, in either dialect."""
    parts = re.split(r'/b/[^/]+/o/?', self.path, maxsplit=1)
    if len(parts) == 2:
      return urllib.parse.unquote(parts[1]) or self.query.get('name', '')
    return urllib.parse.unquote(self.path).lstrip('/').partition('/')[2]


# Seconds to wait and a status to answer with; a status of None is no fault.
Fault = Callable[[Request], int | None]


class ObjectStore:
  """Objects by bucket and key, and how to serve them.

  Attributes:
    buckets: bucket -> key -> content.
    requests: all so far, in order.
    delay: seconds that every answer is held back.
    fault: called with each request; a status that it returns is the answer. 0
      cuts the connection, -1 never answers.
    cut_after: bytes after which one answer is cut; once.
    most_at_once: most requests that were held at a time.
  """

  def __init__(self, port: int = 0):
    self.buckets: dict[str, dict[str, bytes]] = {BUCKET: {}}
    self.requests: list[Request] = []
    self.delay = 0.0
    self.cut_after: int | None = None
    self.fault: Fault = lambda request: None
    self.most_at_once = self._at_once = 0
    self.lock = threading.RLock()
    self.uploads: dict[str, tuple[str, str, dict[int, bytes]]] = {}
    self.generations = itertools.count(1)
    self.generation: dict[tuple[str, str], int] = {}
    self.closing = threading.Event()
    handler = type('Handler', (_Handler,), {'store': self})
    self._server = _Server(('127.0.0.1', port), handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}'

  @property
  def objects(self) -> dict[str, bytes]:
    """The objects of the bucket that tests use."""
    return self.buckets[BUCKET]

  def put(self, bucket: str, key: str, data: bytes) -> None:
    """Stores an object whole."""
    with self.lock:
      self.buckets[bucket][key] = data
      self.generation[bucket, key] = next(self.generations)

  def upload(self, folder: pathlib.Path, prefix: str) -> None:
    """Copies a folder in, as objects PREFIX/..."""
    for file in sorted(folder.rglob('*')):
      if file.is_file():
        name = f'{prefix}/{file.relative_to(folder).as_posix()}'
        self.put(BUCKET, name, file.read_bytes())

  def listed(self, bucket: str, prefix: str, delimiter: str):
    """(keys, prefixes) below a prefix, as stores list them."""
    with self.lock:
      names = sorted(k for k in self.buckets[bucket] if k.startswith(prefix))
    keys, prefixes = [], {}
    for name in names:
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes[prefix + rest.partition(delimiter)[0] + delimiter] = None
      else:
        keys.append(name)
    return keys, list(prefixes)

  def forget(self) -> None:
    """Starts a new record of requests."""
    with self.lock:
      self.requests, self.most_at_once = [], 0

  @contextlib.contextmanager
  def held(self, request: Request) -> Iterator[None]:
    """Records a request while it is answered."""
    with self.lock:
      self.requests.append(request)
      self._at_once += 1
      self.most_at_once = max(self.most_at_once, self._at_once)
    try:
      yield
    finally:
      with self.lock:
        self._at_once -= 1

  def __enter__(self) -> 'ObjectStore':
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *exc: object) -> None:
    self.closing.set()
    self._server.shutdown()
    self._server.server_close()


def environment(url: str) -> dict[str, str]:
  """Variables that lead S3 and Google clients to a store, with false keys."""
  return {
    'AWS_ENDPOINT_URL': url,
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'AWS_EC2_METADATA_DISABLED': 'true',
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    'GOOGLE_CLOUD_PROJECT': 'project',
  }


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
  daemon_threads = True
  block_on_close = False
  request_queue_size = 128

  def handle_error(self, request, client_address):
    pass  # a client that went away


class _Handler(http.server.BaseHTTPRequestHandler):
  store: ObjectStore
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, *args):
    pass

  def _handle(self):
    path, _, query = self.path.partition('?')
    self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    self.body = self._body()
    asked = Request(
      self.command,
      path,
      self.query,
      self.headers.get('Range', ''),
      len(self.body),
    )
    with self.store.held(asked):
      time.sleep(self.store.delay)
      status = self.store.fault(asked)
      if status == -1:
        self.store.closing.wait()
        status = 0
      if status == 0:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
      elif status is not None:
        self._refuse(status, path)
      elif re.match(r'/(storage|upload|download|batch)/', path):
        self._google(path)
      else:
        self._s3(path)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle  # noqa: N815

  def _refuse(self, status, path):
    """A fault, in the words of the store that is asked."""
    if re.match(r'/(storage|upload|download|batch)/', path):
      self._fault(status, 'a fault')
      return
    code = {401: 'InvalidAccessKeyId', 403: 'AccessDenied', 404: 'NoSuchKey'}
    kind = code.get(status, 'InternalError')
    text = f'<Error><Code>{kind}</Code><Message>a fault</Message></Error>'
    self._answer(status, text.encode())

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() == 'chunked':
      data = b''
      while size := int(self.rfile.readline().split(b';')[0], 16):
        data += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    else:
      data = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    if 'aws-chunked' in self.headers.get('Content-Encoding', ''):
      plain = b''
      while data:
        head, _, data = data.partition(b'\r\n')
        size = int(head.split(b';')[0], 16)
        if not size:
          break
        plain, data = plain + data[:size], data[size + 2 :]
      return plain
    return data

  def _answer(self, status, data=b'', kind='application/xml', **headers):
    self.send_response(status)
    self.send_header('Content-Type', kind)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    if 'Content_Length' not in headers:
      self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if self.command != 'HEAD' and status not in (204, 304):
      cut, self.store.cut_after = self.store.cut_after, None
      self.wfile.write(data[:cut])
      self.close_connection |= cut is not None

  def _content(self, bucket, key, **headers):
    """An object, or the part of it that is asked for."""
    data = self.store.buckets[bucket].get(key)
    if data is None:
      self._answer(404, b'<Error><Code>NoSuchKey</Code></Error>')
      return
    etag = f'"{hashlib.md5(data).hexdigest()}"'
    headers |= {
      'ETag': etag,
      'Accept_Ranges': 'bytes',
      'Last_Modified': 'Mon, 02 Jan 2023 00:00:00 GMT',
    }
    if self.command == 'HEAD':
      self._answer(200, Content_Length=str(len(data)), **headers)
      return
    if self.headers.get('If-None-Match') == etag:
      self._answer(304, **headers)
      return
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not asked:
      self._answer(200, data, 'application/octet-stream', **headers)
      return
    first, last = asked.groups()
    if first:
      start, stop = int(first), min(int(last or len(data)) + 1, len(data))
    else:
      start, stop = max(len(data) - int(last), 0), len(data)
    if start >= len(data) and data:
      self._answer(416, Content_Range=f'bytes */{len(data)}')
      return
    headers['Content_Range'] = f'bytes {start}-{stop - 1}/{len(data)}'
    part = data[start:stop]
    self._answer(206, part, 'application/octet-stream', **headers)

  # S3

  def _s3(self, path):
    bucket, _, key = urllib.parse.unquote(path).lstrip('/').partition('/')
    store, query = self.store, self.query
    if bucket not in store.buckets:
      self._answer(
        404,
        b'<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not '
        b'exist</Message></Error>',
      )
    elif not key and self.command == 'HEAD':
      self._answer(200, x_amz_bucket_region='us-east-1')
    elif not key and self.command == 'PUT':
      self._answer(200)
    elif not key and self.command == 'GET':
      self._s3_list(bucket)
    elif self.command in ('GET', 'HEAD'):
      self._content(bucket, key)
    elif self.command == 'DELETE':
      with store.lock:
        store.buckets[bucket].pop(key, None)
      self._answer(204)
    elif 'delete' in query:
      names = re.findall(rb'<Key>(.*?)</Key>', self.body)
      with store.lock:
        for name in names:
          store.buckets[bucket].pop(saxutils.unescape(name.decode()), None)
      self._answer(200, b'<DeleteResult></DeleteResult>')
    elif 'uploads' in query:
      number = str(next(store.generations))
      store.uploads[number] = (bucket, key, {})
      self._answer(
        200,
        f'<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{key}'
        f'</Key><UploadId>{number}</UploadId></InitiateMultipartUploadResult>'.encode(),
      )
    elif 'partNumber' in query:
      parts = store.uploads[query['uploadId']][2]
      parts[int(query['partNumber'])] = self.body
      self._answer(200, ETag=f'"{query["partNumber"]}"')
    elif 'uploadId' in query:
      parts = store.uploads.pop(query['uploadId'])[2]
      store.put(bucket, key, b''.join(parts[n] for n in sorted(parts)))
      self._answer(
        200,
        b'<CompleteMultipartUploadResult><ETag>"x"</ETag>'
        b'</CompleteMultipartUploadResult>',
      )
    elif 'x-amz-copy-source' in self.headers:
      source = urllib.parse.unquote(self.headers['x-amz-copy-source'])
      of, _, name = source.lstrip('/').partition('/')
      store.put(bucket, key, store.buckets[of][name])
      self._answer(
        200, b'<CopyObjectResult><ETag>"x"</ETag></CopyObjectResult>'
      )
    else:
      store.put(bucket, key, self.body)
      self._answer(200, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

  def _s3_list(self, bucket):
    keys, prefixes = self.store.listed(
      bucket, self.query.get('prefix', ''), self.query.get('delimiter', '')
    )
    most = int(self.query.get('max-keys', 1000))
    lines = [
      f'<Contents><Key>{saxutils.escape(key)}</Key><Size>'
      f'{len(self.store.buckets[bucket].get(key, b""))}</Size><ETag>"x"</ETag>'
      '<LastModified>2023-01-02T00:00:00.000Z</LastModified></Contents>'
      for key in keys[:most]
    ]
    lines += [
      f'<CommonPrefixes><Prefix>{saxutils.escape(p)}</Prefix></CommonPrefixes>'
      for p in prefixes
    ]
    self._answer(
      200,
      (
        '<?xml version="1.0"?><ListBucketResult '
        'xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f'<Name>{bucket}</Name><KeyCount>{len(lines)}</KeyCount>'
        f'<IsTruncated>false</IsTruncated>{"".join(lines)}</ListBucketResult>'
      ).encode(),
    )

  # Google's JSON API

  def _json(self, content, status=200, **headers):
    data = json.dumps(content).encode()
    self._answer(status, data, 'application/json', **headers)

  def _fault(self, status, message):
    self._json({'error': {'code': status, 'message': message}}, status)

  def _facts(self, bucket, key):
    data = self.store.buckets[bucket][key]
    name = urllib.parse.quote(key, safe='')
    md5 = hashlib.md5(data).digest()
    return {
      'kind': 'storage#object',
      'bucket': bucket,
      'name': key,
      'size': str(len(data)),
      'generation': str(self.store.generation[bucket, key]),
      'metageneration': '1',
      'md5Hash': base64.b64encode(md5).decode(),
      'timeCreated': '2023-01-02T00:00:00.000Z',
      'updated': '2023-01-02T00:00:00.000Z',
      'mediaLink': (
        f'{self.store.url}/download/storage/v1/b/{bucket}/o/{name}?alt=media'
      ),
    }

  def _google(self, path):
    if path.startswith('/batch/'):
      self._google_batch()
      return
    found = re.fullmatch(
      r'/(?:(upload|download)/)?storage/v1/b(?:/([^/]+)(?:/(o)(?:/(.*))?)?)?'
      r'(?:/storageLayout)?',
      path,
    )
    if not found or not found[2]:
      self._fault(404, f'no such service: {path}')
      return
    way, bucket, of_objects, name = found.groups()
    bucket = urllib.parse.unquote(bucket)
    key = urllib.parse.unquote(name or '')
    if bucket not in self.store.buckets:
      self._fault(404, 'The specified bucket does not exist.')
    elif way == 'upload':
      self._google_upload(bucket)
    elif not of_objects:
      self._json(
        {
          'kind': 'storage#bucket', 'id': bucket, 'name': bucket,
          'location': 'US', 'locationType': 'region',
        }
      )  # fmt: skip
    elif not key:
      self._google_list(bucket)
    elif '/copyTo/' in name or '/rewriteTo/' in name:
      source, _, target = re.split('/(copyTo|rewriteTo)/b/', name)
      to, _, new = target.partition('/o/')
      data = self.store.buckets[bucket][urllib.parse.unquote(source)]
      new = urllib.parse.unquote(new)
      self.store.put(to, new, data)
      facts = self._facts(to, new)
      self._json({'done': True, 'resource': facts, **facts})
    elif self.command == 'DELETE':
      self._google_delete(bucket, key)
    elif key not in self.store.buckets[bucket]:
      self._fault(404, f'No such object: {bucket}/{key}')
    elif self.query.get('alt') == 'media' or way == 'download':
      generation = self.store.generation[bucket, key]
      if self.query.get('ifGenerationNotMatch') == str(generation):
        self._answer(304)
        return
      self._content(bucket, key, X_Goog_Generation=str(generation))
    else:
      self._json(self._facts(bucket, key))

  def _google_delete(self, bucket, key):
    with self.store.lock:
      found = self.store.buckets[bucket].pop(key, None)
    if found is None:
      self._fault(404, f'No such object: {bucket}/{key}')
    else:
      self._answer(204)

  def _google_list(self, bucket):
    keys, prefixes = self.store.listed(
      bucket, self.query.get('prefix', ''), self.query.get('delimiter', '')
    )
    start, end = self.query.get('startOffset', ''), self.query.get('endOffset')
    keys = [k for k in keys if k >= start and (not end or k < end)]
    most = int(self.query.get('maxResults', 1000))
    content = {'kind': 'storage#objects'}
    with self.store.lock:
      content['items'] = [
        self._facts(bucket, k)
        for k in keys[:most]
        if k in self.store.buckets[bucket]
      ]
    if prefixes:
      content['prefixes'] = prefixes
    self._json(content)

  def _google_upload(self, bucket):
    kind = self.query.get('uploadType')
    store = self.store
    if kind == 'media':
      key, data = self.query['name'], self.body
    elif kind == 'multipart':
      head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
      whole = email.parser.BytesParser().parsebytes(head + self.body)
      facts, _ = whole.get_payload()
      edge = f'--{whole.get_boundary()}'.encode()
      second = self.body.split(edge)[2]
      data = second.split(b'\n\n' if b'\r\n\r\n' not in second else b'\r\n\r\n',
                          1)[1]  # fmt: skip
      data = data.removesuffix(b'\n').removesuffix(b'\r')
      key = json.loads(facts.get_payload())['name']
    elif 'upload_id' in self.query:
      self._google_resumable(bucket)
      return
    elif kind == 'resumable':
      name = self.query.get('name') or json.loads(self.body)['name']
      number = str(next(store.generations))
      store.uploads[number] = (bucket, name, {0: b''})
      place = f'{store.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}'
      self._answer(200, Location=place)
      return
    else:
      self._fault(400, f'uploadType {kind}')
      return
    wanted = self.query.get('ifGenerationMatch')
    held = store.generation.get((bucket, key), 0)
    if key not in store.buckets[bucket]:
      held = 0
    if wanted is not None and int(wanted) != held:
      self._fault(412, 'conditionNotMet')
      return
    store.put(bucket, key, data)
    self._json(self._facts(bucket, key))

  def _google_resumable(self, bucket):
    number = self.query['upload_id']
    _, key, parts = self.store.uploads[number]
    parts[0] += self.body
    total = self.headers.get('Content-Range', '/*').rpartition('/')[2]
    if total != '*' and len(parts[0]) >= int(total):
      self.store.put(bucket, key, parts[0])
      del self.store.uploads[number]
      self._json(self._facts(bucket, key))
    else:
      self._answer(308, Range=f'bytes=0-{max(len(parts[0]) - 1, 0)}')

  def _google_batch(self):
    head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
    whole = email.parser.BytesParser().parsebytes(head + self.body)
    answers = []
    for part in whole.get_payload():
      text = part.get_payload()
      asked = re.search(r'DELETE \S*/b/([^/]+)/o/(\S+)', text)
      bucket, key = (urllib.parse.unquote(x) for x in asked.groups())
      with self.store.lock:
        found = self.store.buckets[bucket].pop(key.partition('?')[0], None)
      status = '204 No Content' if found is not None else '404 Not Found'
      answers.append(
        '--edge\r\nContent-Type: application/http\r\n'
        f'Content-ID: <response-{part["Content-ID"]}>\r\n\r\n'
        f'HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n'
      )
    data = (''.join(answers) + '--edge--\r\n').encode()
    self._answer(200, data, 'multipart/mixed; boundary=edge')
