"""`genecompass prep download KEY... -o FOLDER`: official files, checked.

The files are those of `official`; --url fetches any other the same way.
"""

import argparse
import os
import re
import sys
import urllib.parse

from genecompass_jax import errors, staging
from genecompass_jax.prepare.fetching import official

_LONGEST = 86_400


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds what `run` reads."""
  parser.description = (
    'Fetches official files and checks them. What a dropped connection or a '
    'killed run left is gone on from; FOLDER/downloads.json records address, '
    'sha256 and time of every file.'
  )
  parser.add_argument(
    'keys',
    nargs='*',
    metavar='KEY[@RELEASE]',
    help='files of the table (see --list), such as ensembl_gtf_rat@112',
  )
  parser.add_argument(
    '-o',
    '--output',
    default='',
    metavar='FOLDER',
    help='where files go; needed unless --list',
  )
  parser.add_argument(
    '--release',
    default='',
    help='of all KEYs, which must then be of one source; without it the '
    'pinned release that --list shows',
  )
  parser.add_argument(
    '--list',
    action='store_true',
    help='show the table, or the addresses and licences of the KEYs',
  )
  parser.add_argument('--url', default='', help='a file that has no KEY')
  parser.add_argument(
    '--sha256', default='', help='expected digest of the one file'
  )
  parser.add_argument('--name', default='', help='local name of the one file')
  parser.add_argument(
    '--check',
    action='store_true',
    help='hash files that are there already, and compare with the record',
  )
  parser.add_argument(
    '--again', action='store_true', help='fetch files that are there already'
  )
  parser.add_argument(
    '--attempts',
    type=int,
    default=6,
    help='connections in vain before a file is given up',
  )
  parser.add_argument(
    '--timeout',
    type=float,
    default=60.0,
    help='seconds without an answer or a byte',
  )


def run(args: argparse.Namespace) -> int:
  """Fetches the files one by one; a file that fails does not stop the others.

  Raises:
    UserError: a mistake, or some files could not be had.
    RetryableError: the network failed for some; run the command again.
  """
  chosen = [_choose(text, args.release) for text in args.keys]
  families = {file.family for file, _ in chosen if file.release}
  if args.release and len(families) != 1:
    raise errors.UserError(
      f'--release {args.release} is for files of one source, not of '
      f'{len(families)}; write KEY@RELEASE for each'
    )
  if args.list:
    print('\n'.join(_details(chosen) if chosen else _table()))
    return errors.EXIT_OK
  if not chosen and not args.url:
    raise errors.UserError(
      'no file was named; genecompass prep download --list shows the keys'
    )
  if not args.output:
    raise errors.UserError('name a folder with -o FOLDER')
  if not staging.is_local(args.output):
    raise errors.UserError(
      f'{args.output}: downloads go to a local folder; copy them from there'
    )
  if (args.sha256 or args.name) and len(chosen) + bool(args.url) != 1:
    raise errors.UserError('--sha256 and --name are for one file at a time')
  for number, option in (
    (args.attempts, 'attempts'),
    (args.timeout, 'timeout'),
  ):
    if not number > 0:
      raise errors.UserError(f'--{option} {number:g} must be more than 0')
  if args.timeout > _LONGEST:
    raise errors.UserError(
      f'--timeout {args.timeout:g} must be at most {_LONGEST} seconds, a day'
    )
  return _fetch_all(args, chosen)


def _fetch_all(
  args: argparse.Namespace,
  chosen: list[tuple[official.OfficialFile, str]],
) -> int:
  from genecompass_jax.prepare.fetching import downloads, transfers

  wanted = []
  for file, release in chosen:
    address = fill(file, file.url, release)
    if file.manual:
      raise errors.UserError(f'{file.key}: {address}: {file.manual}')
    pinned = release == file.release
    wanted.append(
      transfers.Wanted(
        url=address,
        name=args.name
        or (fill(file, file.name, release) if file.name else _name_of(address)),
        sha256=args.sha256.lower() or (file.sha256 if pinned else ''),
        checksums=fill(file, file.checksums, release),
        checksum_kind=file.checksum_kind,
        key=file.key,
      )
    )
  if args.url:
    transfers.check_url(args.url)
    name = args.name or _name_of(args.url)
    wanted.append(transfers.Wanted(args.url, name, args.sha256.lower()))
  for one in wanted:
    # '.' and '..' are no names, and records and parts are not to be hit
    if not re.fullmatch(r'[\w+-][\w.+-]*', one.name) or one.name.endswith(
      ('.part', '.part.json', downloads.RECORD)
    ):
      raise errors.UserError(
        f'{one.url}: {one.name!r} is no name for a file; give one with --name'
      )
  patience = transfers.Patience(args.attempts, args.timeout)
  failed: list[Exception] = []
  with downloads.locked(args.output):
    for one in wanted:
      try:
        line = downloads.fetch(
          one, args.output, patience, args.check, args.again
        )
        print(line, flush=True)
      except (errors.UserError, errors.RetryableError) as error:
        failed.append(error)
        if len(wanted) > 1:
          print(error, file=sys.stderr, flush=True)
  if len(wanted) == 1 and failed:
    raise failed[0]
  if failed:
    text = (
      f'{len(failed)} of {len(wanted)} files were not fetched (above); the '
      'others are whole'
    )
    if all(isinstance(error, errors.RetryableError) for error in failed):
      raise errors.RetryableError(text + ': run the command again')
    raise errors.UserError(text)
  return errors.EXIT_OK


def fill(file: official.OfficialFile, template: str, release: str) -> str:
  """A template of a file with its release and genome assembly.

  Raises:
    UserError: the table knows no assembly of so old a release.
  """
  if '{assembly}' not in template:
    return template.replace('{release}', release)
  if not release.isdigit():
    raise errors.UserError(
      f'{file.key}: release {release!r} is no number, such as {file.release}'
    )
  names = [name for first, name in file.assemblies if first <= int(release)]
  if not names:
    raise errors.UserError(
      f'{file.key}: the table has no address for release {release}, before '
      f'{file.assemblies[0][0]}; fetch it with --url'
    )
  return template.replace('{release}', release).replace('{assembly}', names[-1])


def _choose(text: str, release: str) -> tuple[official.OfficialFile, str]:
  """The row of KEY[@RELEASE], and the release asked for."""
  key, at, own = text.partition('@')
  rows = {file.key: file for file in official.FILES}
  if key not in rows:
    close = [name for name in rows if key.lower() in name]
    hint = f' (there is {", ".join(close[:4])})' if close and key else ''
    raise errors.UserError(
      f'no official file is called {key!r}{hint}; genecompass prep download '
      '--list shows the keys'
    )
  file = rows[key]
  if at and not own:
    raise errors.UserError(f'{text}: name a release behind @')
  asked = own or (release if file.release else '')
  if asked and not file.release:
    raise errors.UserError(
      f'{key} has no releases, only its current state; leave out @{asked}'
    )
  if asked and not re.fullmatch(r'[\w.-]+', asked):
    raise errors.UserError(f'{key}: {asked!r} is no release')
  return file, asked or file.release


def _name_of(url: str) -> str:
  return os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path))


def _table() -> list[str]:
  """Keys, pinned releases and titles."""
  width = max(len(file.key) for file in official.FILES)
  lines = [f'{"KEY":{width}}  {"RELEASE":10}  FILE']
  lines += [
    f'{file.key:{width}}  {file.release or "current":10}  {file.title}'
    for file in official.FILES
  ]
  return [*lines, '', 'With KEYs, --list shows addresses and licences.']


def _details(chosen: list[tuple[official.OfficialFile, str]]) -> list[str]:
  lines = []
  for file, release in chosen:
    lines += [
      f'{file.key}: {file.title}',
      f'  address   {fill(file, file.url, release)}',
      f'  release   {release or "current"}',
      f'  format    {file.format}',
      f'  licence   {file.licence}',
      f'  used for  {file.used_for}',
    ]
    if file.checksums:
      checksums = fill(file, file.checksums, release)
      lines.append(f'  checked   {file.checksum_kind} in {checksums}')
    source = file.verified or 'from memory: try it before you rely on it'
    lines.append(f'  address as in: {source}')
    if file.manual:
      lines.append(f'  by hand: {file.manual}')
  return lines
