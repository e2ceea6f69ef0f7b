"""Downloads from a server that misbehaves in every way that is known."""

import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from genecompass_jax import cli, errors
from genecompass_jax.prepare.fetching import downloads, transfers
from tests.conftest import ROOT

# Random bytes do not compress: the file is as long as its text.
BODY = b''.join(hashlib.sha256(str(i).encode()).digest() for i in range(20_000))
GZIP = gzip.compress(BODY, 1, mtime=0)
HURRY = transfers.Patience(attempts=4, timeout=0.4, first_wait=0.01)


class Server(http.server.ThreadingHTTPServer):
  """Serves `files`; `faults` of a path are used up, one a request.

  A fault is a dict: status, headers, send (bytes of the body that go out),
  length (say Content-Length), ranges (know Range), flip (a byte of the body),
  etag, sleep, redirect, chunked, body.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.files = {'/a.bin': BODY, '/a.gz': GZIP}
    self.faults = {}
    self.requests = []
    self.always = {}

  def url(self, path='/a.bin'):
    return f'http://127.0.0.1:{self.server_port}{path}'

  def handle_error(self, request, client_address):
    pass  # clients that leave


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def do_GET(self):  # noqa: N802
    server = self.server
    server.requests.append((self.path, dict(self.headers)))
    faults = server.faults.get(self.path) or []
    fault = faults.pop(0) if faults else server.always.get(self.path, {})
    body = fault.get('body', server.files.get(self.path))
    time.sleep(fault.get('sleep', 0))
    if 'redirect' in fault:
      self.send_response(302)
      self.send_header('Location', fault['redirect'])
      self.send_header('Content-Length', '0')
      self.end_headers()
      return
    status = fault.get('status', 404 if body is None else 200)
    if status >= 400:
      self.send_response(status)
      for name, value in fault.get('headers', {}).items():
        self.send_header(name, value)
      self.send_header('Content-Length', '0')
      self.end_headers()
      return
    etag = fault.get('etag', '"' + hashlib.md5(body).hexdigest() + '"')
    first, total = 0, len(body)
    asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
    if asked and fault.get('ranges', True):
      condition = self.headers.get('If-Range', etag)
      if condition == etag or fault.get('ignore_if_range'):
        first = int(asked[1])
        if first >= total:
          self.send_response(416)
          self.send_header('Content-Range', f'bytes */{total}')
          if etag:
            self.send_header('ETag', etag)
          self.send_header('Content-Length', '0')
          self.end_headers()
          return
        status = 206
    data = bytearray(body[first:])
    if 'flip' in fault:
      data[fault['flip']] ^= 1
    self.send_response(status)
    if etag:
      self.send_header('ETag', etag)
    if fault.get('modified'):
      self.send_header('Last-Modified', fault['modified'])
    if status == 206:
      self.send_header('Content-Range', f'bytes {first}-{total - 1}/{total}')
    if fault.get('chunked'):
      self.send_header('Transfer-Encoding', 'chunked')
    elif fault.get('length', True):
      self.send_header('Content-Length', str(len(data)))
    else:
      self.send_header('Connection', 'close')
    self.end_headers()
    send = data[: fault.get('send', len(data))]
    if fault.get('chunked'):
      self.wfile.write(b'%x\r\n' % len(send) + bytes(send) + b'\r\n')
      if len(send) == len(data):
        self.wfile.write(b'0\r\n\r\n')
    elif 'slowly' in fault:
      for i in range(0, len(send), 1 << 15):
        self.wfile.write(send[i : i + (1 << 15)])
        self.wfile.flush()
        time.sleep(fault['slowly'])
    else:
      self.wfile.write(send)
    self.wfile.flush()
    time.sleep(fault.get('hang', 0))
    self.close_connection = True

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  with Server() as running:
    thread = threading.Thread(
      target=running.serve_forever, kwargs={'poll_interval': 0.02}
    )
    thread.start()
    yield running
    running.shutdown()
    thread.join()


def wanted(server, path='/a.bin', **fields):
  return transfers.Wanted(
    server.url(path), path.strip('/').replace('/', '_'), **fields
  )


def fetch(server, folder, path='/a.bin', patience=HURRY, **fields):
  options = {k: fields.pop(k) for k in ('check', 'again') if k in fields}
  one = wanted(server, path, **fields)
  with downloads.locked(str(folder)):
    return downloads.fetch(one, str(folder), patience, **options)


def names(folder):
  return sorted(os.listdir(folder))


def ranges(server):
  return [headers.get('Range') for _, headers in server.requests]


SHA256 = hashlib.sha256(BODY).hexdigest()


def test_a_file_comes_whole_and_is_recorded(server, tmp_path):
  line = fetch(server, tmp_path, sha256=SHA256)
  assert 'sha256 as expected' in line
  assert (tmp_path / 'a.bin').read_bytes() == BODY
  assert names(tmp_path) == ['a.bin', 'downloads.json']
  entry = downloads.read_record(str(tmp_path))['a.bin']
  assert entry['sha256'] == SHA256
  assert entry['size'] == len(BODY)
  assert entry['url'] == entry['final_url'] == server.url()
  assert entry['etag']
  assert re.fullmatch(r'\d{4}-\d\d-\d\dT[\d:]{8}Z', entry['time'])


FAULTS = {
  'drops': [{'send': 200_000}, {'send': 100_000}],
  'drops at once': [{'send': 0}, {'send': 0}],
  'drops without a length': [{'send': 200_000, 'chunked': True}],
  '503 then 200': [{'status': 503}, {'status': 500}, {'status': 429}],
  'hangs before an answer': [{'sleep': 0.8}],
  'hangs in the middle': [{'send': 150_000, 'hang': 0.8}],
  'ignores Range': [{'send': 200_000}, {'ranges': False}],
  'drops, then 416 without reason': [
    {'send': 200_000},
    {'status': 416, 'headers': {'Content-Range': 'bytes */7'}},
  ],
  'no validator': [{'send': 200_000, 'etag': ''}, {'etag': ''}],
  'weak validator': [{'send': 200_000, 'etag': 'W/"1"'}, {'etag': 'W/"1"'}],
}


@pytest.mark.parametrize('faults', FAULTS.values(), ids=FAULTS)
def test_passing_faults_are_overcome(server, tmp_path, faults):
  server.faults['/a.bin'] = [dict(fault) for fault in faults]
  fetch(server, tmp_path, sha256=SHA256)
  assert (tmp_path / 'a.bin').read_bytes() == BODY
  assert names(tmp_path) == ['a.bin', 'downloads.json']
  assert not server.faults['/a.bin']


def test_what_arrived_is_not_fetched_again(server, tmp_path):
  server.faults['/a.bin'] = [{'send': 200_000}, {'send': 100_000}]
  fetch(server, tmp_path)
  assert ranges(server) == [None, 'bytes=200000-', 'bytes=300000-']
  assert all('If-Range' in headers for _, headers in server.requests[1:])


@pytest.mark.parametrize('ignores', [False, True])
def test_a_file_that_changes_is_begun_anew(server, tmp_path, ignores):
  """Two releases are never glued together, whatever the server does."""
  old = bytes(reversed(BODY))
  server.faults['/a.bin'] = [
    {'send': 200_000, 'body': old},
    {'ignore_if_range': ignores},
  ]
  fetch(server, tmp_path)
  assert (tmp_path / 'a.bin').read_bytes() == BODY


@pytest.mark.parametrize('etag', ['', 'W/"1"'])
@pytest.mark.parametrize('size', [len(BODY), 200_000])
def test_a_file_that_cannot_be_told_from_another_is_begun_anew(
  server, tmp_path, etag, size
):
  other = BODY[::-1][:size]
  server.faults['/a.bin'] = [{'send': 200_000, 'etag': etag}]
  server.always['/a.bin'] = {'body': other, 'etag': etag}
  fetch(server, tmp_path)
  assert (tmp_path / 'a.bin').read_bytes() == other
  assert ranges(server) == [None, None]


def test_no_validator_but_data_that_check_themselves(server, tmp_path):
  server.faults['/a.gz'] = [{'send': 200_000, 'etag': ''}, {'etag': ''}]
  fetch(server, tmp_path, '/a.gz')
  assert (tmp_path / 'a.gz').read_bytes() == GZIP
  assert ranges(server) == [None, 'bytes=200000-']


@pytest.mark.parametrize(
  ('fault', 'message'),
  [
    ({'status': 206, 'body': BODY[5000:]}, 'the server says 206'),
    ({'status': 202, 'body': b'come later'}, 'the server says 202'),
    ({'status': 204, 'body': b''}, 'the server says 204'),
    ({'status': 503, 'headers': {'Retry-After': '\xb2'}}, '503'),
    (
      {'status': 503, 'headers': {'Retry-After': 'x, 1 Jan 1 0:0 -0000'}},
      '503',
    ),
    ({'redirect': 'http://[bad/'}, 'another address that is none'),
    ({'redirect': 'http://a..b/x'}, 'another address that is none'),
    ({'redirect': 'http://127.0.0.1:abc/x'}, 'another address that is none'),
    ({'redirect': 'file:///etc/passwd'}, 'not allowed'),
  ],
)
def test_answers_that_are_not_the_file(server, tmp_path, fault, message):
  server.always['/a.bin'] = fault
  with pytest.raises(
    (errors.UserError, errors.RetryableError), match=message
  ) as error:
    fetch(server, tmp_path)
  assert '\n' not in str(error.value)
  assert names(tmp_path) == []


def test_numbers_that_are_none_are_as_good_as_not_said(server, tmp_path):
  server.faults['/a.bin'] = [
    {'send': 200_000},
    {'status': 416, 'headers': {'Content-Range': 'bytes */' + '9' * 5000}},
  ]
  fetch(server, tmp_path)
  assert (tmp_path / 'a.bin').read_bytes() == BODY


@pytest.mark.parametrize(
  'facts',
  [
    '[' * 100_000,
    '{"url": URL, "etag": 5}',
    '{"url": URL, "final_url": "", "etag": "a\\nb", "last_modified": ""}',
    '{"url": URL, "final_url": "", "etag": "\\u4e00", "last_modified": ""}',
    '{"url": URL, "final_url": "", "etag": "", "last_modified": "x", '
    '"length": "7"}',
  ],
)
def test_facts_of_a_part_that_are_not_ours(server, tmp_path, facts):
  (tmp_path / 'a.bin.part').write_bytes(b'x' * 1000)
  facts = facts.replace('URL', json.dumps(server.url()))
  (tmp_path / 'a.bin.part.json').write_text(facts)
  fetch(server, tmp_path)
  assert (tmp_path / 'a.bin').read_bytes() == BODY
  assert ranges(server) == [None]


@pytest.mark.parametrize(
  'record',
  [
    '[' * 100_000,
    '{"a":' * 100_000,
    '[]',
    '{"a.bin": "sha256 url"}',
    '{"a.bin": {"url": "x", "sha256": "y"}}',
    '{"a.bin": {"url": "x", "sha256": 1, "size": 1, "time": ""}}',
  ],
)
def test_a_damaged_record_is_one_line(server, tmp_path, record):
  (tmp_path / 'downloads.json').write_text(record)
  for again in (False, True):
    with pytest.raises(errors.UserError, match='is damaged'):
      fetch(server, tmp_path, again=again)
  assert not server.requests


def test_a_shorter_file_in_its_place(server, tmp_path):
  server.faults['/a.bin'] = [{'send': 200_000}, {'send': 0}]
  with pytest.raises(errors.RetryableError):
    fetch(server, tmp_path, patience=transfers.Patience(1, 0.4, 0.01))
  assert names(tmp_path) == ['a.bin.part', 'a.bin.part.json']
  server.files['/a.bin'] = BODY[:100_000]
  fetch(server, tmp_path)
  assert (tmp_path / 'a.bin').read_bytes() == BODY[:100_000]


def test_giving_up_keeps_what_arrived(server, tmp_path):
  server.always['/a.bin'] = {'send': 0}
  server.faults['/a.bin'] = [{'send': 200_000}]
  with pytest.raises(errors.RetryableError, match='run the command again'):
    fetch(server, tmp_path)
  assert names(tmp_path) == ['a.bin.part', 'a.bin.part.json']
  assert len(server.requests) == 1 + HURRY.attempts
  server.always.clear()
  fetch(server, tmp_path, sha256=SHA256)
  assert ranges(server)[-1] == 'bytes=200000-'


def test_a_server_that_never_gets_far_is_given_up(server, tmp_path):
  server.always['/a.bin'] = {'send': 5_000, 'ranges': False}
  with pytest.raises(errors.RetryableError):
    fetch(server, tmp_path)
  assert len(server.requests) <= 2 + HURRY.attempts


def test_a_part_of_another_address_is_not_used(server, tmp_path):
  (tmp_path / 'a.bin.part').write_bytes(b'x' * 1000)
  fetch(server, tmp_path, sha256=SHA256)
  assert ranges(server) == [None]


def test_a_whole_part_is_finished_without_fetching(server, tmp_path):
  """A kill between the last byte and the name."""
  etag = '"' + hashlib.md5(BODY).hexdigest() + '"'
  (tmp_path / 'a.bin.part').write_bytes(BODY)
  facts = {'url': server.url(), 'final_url': server.url(), 'etag': etag}
  facts |= {'last_modified': '', 'length': len(BODY)}
  (tmp_path / 'a.bin.part.json').write_text(json.dumps(facts))
  fetch(server, tmp_path, sha256=SHA256)
  assert len(server.requests) == 1
  assert names(tmp_path) == ['a.bin', 'downloads.json']


@pytest.mark.parametrize('status', [401, 403, 404, 410])
def test_final_answers_are_not_asked_twice(server, tmp_path, status):
  server.always['/a.bin'] = {'status': status}
  with pytest.raises(errors.UserError, match=f'{status}') as caught:
    fetch(server, tmp_path)
  assert '\n' not in str(caught.value)
  assert len(server.requests) == 1
  assert names(tmp_path) == []


def test_redirects(server, tmp_path):
  server.always['/old'] = {'redirect': server.url()}
  server.faults['/a.bin'] = [{'send': 200_000}]
  fetch(server, tmp_path, '/old', sha256=SHA256)
  entry = downloads.read_record(str(tmp_path))['old']
  assert entry['url'] == server.url('/old')
  assert entry['final_url'] == server.url()
  assert ranges(server)[-1] == 'bytes=200000-'
  server.always['/loop'] = {'redirect': server.url('/loop')}
  with pytest.raises(errors.UserError, match='redirect') as caught:
    fetch(server, tmp_path, '/loop')
  assert '\n' not in str(caught.value)


def test_corruption_once_is_fetched_again(server, tmp_path, capsys):
  server.faults['/a.bin'] = [{'flip': 1000}]
  fetch(server, tmp_path, sha256=SHA256)
  assert (tmp_path / 'a.bin').read_bytes() == BODY
  assert 'once more' in capsys.readouterr().err


def test_corruption_twice_leaves_nothing(server, tmp_path):
  server.always['/a.bin'] = {'flip': 1000}
  with pytest.raises(errors.UserError, match='was expected') as caught:
    fetch(server, tmp_path, sha256=SHA256)
  assert '\n' not in str(caught.value)
  assert len(server.requests) == 2
  assert names(tmp_path) == []


def test_a_corrupt_part_of_an_earlier_run(server, tmp_path):
  server.always['/a.bin'] = {'send': 0}
  server.faults['/a.bin'] = [{'send': 200_000, 'flip': 5}]
  with pytest.raises(errors.RetryableError):
    fetch(server, tmp_path)
  server.always.clear()
  fetch(server, tmp_path, sha256=SHA256)
  assert ranges(server)[-2:] == ['bytes=200000-', None]


@pytest.mark.parametrize(
  'fault',
  [
    {'flip': 300_000},
    {'send': 200_000, 'length': False, 'etag': ''},
    {'body': GZIP[:-9]},
    {'body': b'<!DOCTYPE html><html>log in</html>'},
    {'body': b'version https://git-lfs.github.com/spec/v1\n'},
  ],
  ids=['flipped', 'truncated unseen', 'short', 'web page', 'lfs'],
)
def test_gzip_files_are_unpacked(server, tmp_path, fault):
  server.always['/a.gz'] = fault
  with pytest.raises(errors.UserError, match='gzip data') as caught:
    fetch(server, tmp_path, '/a.gz')
  assert names(tmp_path) == []
  if fault.get('body', b'')[:1] in (b'<', b'v'):
    assert 'the server sent' in str(caught.value)
  server.always.clear()
  fetch(server, tmp_path, '/a.gz')
  assert gzip.decompress((tmp_path / 'a.gz').read_bytes()) == BODY


def test_gzip_of_several_members(server, tmp_path):
  """As bgzip writes; a member lost at the end of the file is not seen."""
  members = [
    gzip.compress(BODY[i : i + 70_000]) for i in range(0, 640_000, 70_000)
  ]
  server.files['/b.gz'] = b''.join(members) + b'\0' * 300
  server.faults['/b.gz'] = [{'send': len(members[0]) + 10}]
  fetch(server, tmp_path, '/b.gz')
  assert gzip.decompress((tmp_path / 'b.gz').read_bytes()) == BODY
  server.files['/c.gz'] = b''.join(members)[:-4]
  with pytest.raises(errors.UserError, match='gzip data'):
    fetch(server, tmp_path, '/c.gz')


def test_a_web_page_is_no_table(server, tmp_path):
  server.files['/t.tsv'] = b'\n<html><body>maintenance</body></html>'
  with pytest.raises(errors.UserError, match='web page'):
    fetch(server, tmp_path, '/t.tsv')
  assert names(tmp_path) == []


def test_an_empty_file_is_no_file(server, tmp_path):
  server.files['/t.tsv'] = b''
  with pytest.raises(errors.UserError, match='empty'):
    fetch(server, tmp_path, '/t.tsv')
  assert names(tmp_path) == []


def test_a_body_of_unknown_size_says_so(server, tmp_path):
  server.always['/a.bin'] = {'length': False}
  assert 'named no size' in fetch(server, tmp_path)


def bsd_sum(data):
  """Independent of the package: as in the manual of `sum`."""
  total = 0
  for byte in data:
    total = (total >> 1) + ((total & 1) << 15) + byte & 0xFFFF
  return total


@pytest.mark.parametrize('kind', ['sum', 'md5'])
def test_published_checksums(server, tmp_path, kind):
  line = {
    'sum': f'{bsd_sum(GZIP):05d} {-(-len(GZIP) // 1024):5d} a.gz',
    'md5': f'{hashlib.md5(GZIP).hexdigest()}  ./a.gz',
  }[kind]
  server.files['/LIST'] = f'1 2 other.gz\n{line}\n'.encode()
  server.faults['/LIST'] = [{'status': 503}]
  fields = {'checksums': server.url('/LIST'), 'checksum_kind': kind}
  assert f'{kind} as published' in fetch(server, tmp_path, '/a.gz', **fields)
  server.files['/a.gz'] = gzip.compress(BODY[::-1])
  with pytest.raises(errors.UserError, match='is published'):
    fetch(server, tmp_path, '/a.gz', again=True, **fields)
  assert (tmp_path / 'a.gz').read_bytes() == GZIP  # the old one stays
  del server.files['/LIST']
  line = fetch(server, tmp_path, '/a.gz', again=True, **fields)
  assert 'no published checksum' in line


def test_a_list_of_checksums_that_is_none(server, tmp_path):
  server.files['/LIST'] = b'abc def a.gz\n'
  fields = {'checksums': server.url('/LIST'), 'checksum_kind': 'sum'}
  with pytest.raises(errors.UserError, match='abc def is published'):
    fetch(server, tmp_path, '/a.gz', **fields)
  assert names(tmp_path) == []


def test_files_that_are_there(server, tmp_path):
  fetch(server, tmp_path)
  before = len(server.requests)
  assert 'is there' in fetch(server, tmp_path)
  assert 'as recorded' in fetch(server, tmp_path, check=True)
  assert len(server.requests) == before
  data = bytearray(BODY)
  data[7] ^= 1
  (tmp_path / 'a.bin').write_bytes(data)
  assert 'is there' in fetch(server, tmp_path)  # its size alone was looked at
  for options, message in (
    ({'check': True}, 'was changed'),
    ({'sha256': '0' * 64}, 'not 0000'),
  ):
    with pytest.raises(errors.UserError, match=message):
      fetch(server, tmp_path, **options)
  (tmp_path / 'a.bin').write_bytes(BODY[:9])
  with pytest.raises(errors.UserError, match='9 bytes'):
    fetch(server, tmp_path)
  assert 'not what' not in fetch(server, tmp_path, again=True)
  assert (tmp_path / 'a.bin').read_bytes() == BODY
  server.files['/a.bin'] = BODY[::-1]
  assert 'not what was fetched on' in fetch(server, tmp_path, again=True)


def test_files_of_others_are_left_alone(server, tmp_path):
  (tmp_path / 'a.bin').write_bytes(BODY)
  with pytest.raises(errors.UserError, match='not fetched by this command'):
    fetch(server, tmp_path)
  assert 'as expected' in fetch(server, tmp_path, sha256=SHA256)
  assert not server.requests
  fetch(server, tmp_path, '/a.gz')
  server.files['/x/a.gz'] = GZIP
  other = transfers.Wanted(server.url('/x/a.gz'), 'a.gz')
  with pytest.raises(errors.UserError, match='came from'):
    downloads.fetch(other, str(tmp_path), HURRY)
  (tmp_path / 'downloads.json').write_text('{')
  with pytest.raises(errors.UserError, match='damaged'):
    fetch(server, tmp_path, '/a.gz')


def test_a_full_disk_is_one_line(server, tmp_path, monkeypatch):
  class Usage:
    free = 1000

  monkeypatch.setattr(transfers.shutil, 'disk_usage', lambda path: Usage)
  with pytest.raises(errors.UserError, match='room for 1,000'):
    fetch(server, tmp_path)
  monkeypatch.undo()
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  real = open

  class Full:
    def __init__(self, file):
      self._file = file

    def __getattr__(self, name):
      return getattr(self._file, name)

    def __enter__(self):
      return self

    def __exit__(self, *exc):
      self._file.close()

    def write(self, data):
      if self._file.tell() > 100_000:
        raise OSError(28, 'No space left on device')
      return self._file.write(data[:100_001])

  monkeypatch.setattr(
    transfers,
    'open',
    lambda path, mode='r', **k: (
      Full(real(path, mode, **k))
      if mode in ('wb', 'ab')
      else real(path, mode, **k)
    ),
    raising=False,
  )
  with pytest.raises(errors.UserError, match='No space left.*free room') as e:
    fetch(server, tmp_path)
  assert '\n' not in str(e.value)
  assert not (tmp_path / 'a.bin').exists()
  monkeypatch.delattr(transfers, 'open')
  fetch(server, tmp_path, sha256=SHA256)


@pytest.mark.parametrize(
  ('url', 'message'),
  [
    ('file:///etc/passwd', 'https://'),
    ('ftp://x.org/a', 'https://'),
    ('a.gz', 'https://'),
    ('http://no-such-host.invalid/a', 'no host|resolution'),
    ('http://a..b/x', 'and a host'),
    ('http://[bad/x', 'and a host'),
    ('http://x.org:abc/x', 'and a host'),
    ('http://x.org:99999/x', 'and a host'),
    ('http:///x', 'and a host'),
    ('http://x.org/\xe4', '%XX'),
    ('http://x.org/a b', '%XX'),
    ('http://x.org/a\nb', '%XX'),
  ],
)
def test_addresses_that_cannot_be(tmp_path, url, message, monkeypatch):
  for name in ('http_proxy', 'HTTP_PROXY', 'https_proxy', 'HTTPS_PROXY'):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises((errors.UserError, errors.RetryableError), match=message):
    downloads.fetch(transfers.Wanted(url, 'a'), str(tmp_path), HURRY)
  assert names(tmp_path) == []


def test_nobody_listens(tmp_path, monkeypatch):
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  with Server() as closed:
    url = closed.url()
  with pytest.raises(errors.RetryableError, match='refused'):
    downloads.fetch(transfers.Wanted(url, 'a'), str(tmp_path), HURRY)


def command(*words):
  return ['prep', 'download', *map(str, words)]


def environment():
  path = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
  return {**os.environ, 'no_proxy': '127.0.0.1', 'PYTHONPATH': path}


def test_killed_runs_go_on_and_two_at_once_are_refused(server, tmp_path):
  server.faults['/a.bin'] = [{'slowly': 0.1}]
  words = command(
    '--url', server.url(), '-o', tmp_path / 'f', '--sha256', SHA256
  )
  code = (
    f'import sys; from genecompass_jax import cli; sys.exit(cli.main({words}))'
  )
  run = subprocess.Popen(
    [sys.executable, '-c', code], env=environment(), stderr=subprocess.PIPE
  )
  part = tmp_path / 'f' / 'a.bin.part'
  end = time.monotonic() + 30
  while not (part.exists() and part.stat().st_size > 60_000):
    assert time.monotonic() < end and run.poll() is None, run.stderr.read()
    time.sleep(0.01)
  with pytest.raises(errors.UserError, match='another process'):
    fetch(server, tmp_path / 'f')
  run.send_signal(signal.SIGKILL)
  run.wait()
  run.stderr.close()
  size = part.stat().st_size
  assert 0 < size < len(BODY)
  assert cli.main(words) == 0
  assert (tmp_path / 'f/a.bin').read_bytes() == BODY
  assert ranges(server)[-1] == f'bytes={size}-'
  # the lock of a dead process is no lock, and one's own leaves no trace
  assert names(tmp_path / 'f') == ['a.bin', 'downloads.json']


def test_the_command_goes_on_after_a_failure(
  server, tmp_path, capsys, monkeypatch
):
  import dataclasses

  from genecompass_jax.prepare.fetching import official

  row = dataclasses.replace(
    official.FILES[0],
    url=server.url('/{release}/a.bin'),
    checksums='',
    key='k',
    assemblies=(),
    name='',
  )
  other = dataclasses.replace(row, key='gone', url=server.url('/gone'))
  monkeypatch.setattr(official, 'FILES', (row, other))
  server.files['/7/a.bin'] = BODY
  code = cli.main(command('gone', 'k', '--release', 7, '-o', tmp_path))
  output = capsys.readouterr()
  assert code == errors.EXIT_USAGE
  assert '404' in output.err
  assert output.err.splitlines()[-1].startswith('1 of 2 files')
  assert 'a.bin: 640,000 bytes' in output.out
  assert downloads.read_record(str(tmp_path))['a.bin']['key'] == 'k'


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ((), 'no file was named'),
    (('hgnc',), '-o FOLDER'),
    (('hgnc', '-o', 'gs://bucket/x'), 'local folder'),
    (('hgcn', '-o', 'f'), 'no official file'),
    (('hgnc@', '-o', 'f'), 'behind @'),
    (('hgnc@../x', '-o', 'f'), 'no release'),
    (('mgi_homology@3', '-o', 'f'), 'no releases'),
    (('ensembl_gtf_rat', 'hgnc', '--release', '3', '-o', 'f'), 'KEY@RELEASE'),
    (('ensembl_gtf_rat@x', '-o', 'f'), 'no number'),
    (('ensembl_gtf_rat@3', '-o', 'f'), 'before 46'),
    (('genecompass_5m_mouse', '-o', 'f'), 'browser'),
    (('hgnc', 'mgi_homology', '-o', 'f', '--name', 'x'), 'one file'),
    (('--url', 'https://x.org/', '-o', 'f'), '--name'),
    (('--url', 'https://x.org/a', '--name', '../a', '-o', 'f'), 'no name'),
    (('--url', 'https://x.org/a', '--sha256', 'xyz', '-o', 'f'), '64 digits'),
    (('hgnc', '-o', 'f', '--attempts', '0'), 'more than 0'),
    (('hgnc', '-o', 'f', '--timeout', 'inf'), 'at most 86400 seconds'),
    (('--url', 'http://[x/a', '-o', 'f'), 'and a host'),
  ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(command(*words)) == errors.EXIT_USAGE
  output = capsys.readouterr()
  (line,) = output.err.strip().splitlines()
  assert message in line
  assert not output.out
