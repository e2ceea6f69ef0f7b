"""The `genecompass` command: help, exit codes, lines for the user."""

import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import genecompass_jax
from genecompass_jax import cli, errors
from genecompass_jax.prepare import h5ad_copy
from tests.faults import flip_a_bit

COMMANDS = ('demo', 'prep', 'embed', 'convert', 'report', 'corpus', 'doctor')


def one_line(argv, capsys):
  """The message of a command that is refused."""
  try:
    code = cli.main(argv)
  except SystemExit as stop:  # argparse
    code = stop.code
  output = capsys.readouterr()
  assert code == errors.EXIT_USAGE, output
  assert not output.out
  (line,) = output.err.strip().splitlines()
  return line


def test_help_shows_an_option_once_and_takes_its_other_spelling(capsys):
  with pytest.raises(SystemExit):
    cli.main(['prep', '--help'])
  said = capsys.readouterr().out
  assert '--no-filters' in said and '--no_filters' not in said
  assert '-o CORPUS, --output CORPUS' in said
  assert 'no such file' in one_line(
    ['prep', 'none.h5ad', '-o', 'none', '--no_filters'], capsys
  )


@pytest.mark.parametrize(
  'command',
  [
    (),
    *((name,) for name in COMMANDS),
    ('convert', 'pytorch'),
    ('prep', 'download'),
    ('prep', 'genes'),
  ],
  ids=' '.join,
)
def test_help_comes_at_once(command):
  script = (
    'import resource, sys\n'
    'from genecompass_jax import cli\n'
    f'try: cli.main({[*command, "--help"]})\n'
    'except SystemExit as stop: assert stop.code == 0\n'
    'heavy = {"jax", "numba", "anndata", "tensorstore"} & set(sys.modules)\n'
    'assert not heavy, heavy\n'
    'assert resource.getrusage(resource.RUSAGE_SELF).ru_utime < 2\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith('usage: ')
  if command:
    return
  assert all(f'  {name} ' in result.stdout for name in COMMANDS)


def test_version(capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main(['--version'])
  assert stop.value.code == 0
  assert capsys.readouterr().out.strip() == genecompass_jax.__version__


@pytest.mark.parametrize(
  'argv, message',
  [
    ([], 'COMMAND'),
    (['nope'], "invalid choice: 'nope'"),
    (['embed', 'x.h5ad'], 'required: -o/--output, --checkpoint'),
    (['embed', 'x', '-o', 'y', '--checkpoint', 'z', '--typo'], '--typo'),
    (['embed', 'x', '-o', 'y.csv', '--checkpoint', 'z'], 'ending in .h5ad'),
    (
      ['gene-embeddings', 'x', '-o', 'y.h5ad', '--checkpoint', 'z'],
      'ending in .zarr',
    ),
    (['prep', 'h5ad', '-o', 'c'], 'no files were given'),
    (['prep', 'h5ad', 'none.h5ad', '-o', 'c'], 'none.h5ad: no such file'),
    (['corpus', 'verify', 'none'], 'no corpus here'),
    (['report', 'none'], 'none'),
  ],
)
def test_mistakes_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert message in one_line(argv, capsys)
  assert not list(tmp_path.iterdir())


def test_doctor_is_content_with_what_is_whole(trained, tiny_corpus, capsys):
  assert cli.main(['doctor', str(trained), str(tiny_corpus)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1] == 'all is well'
  assert not [line for line in lines if line.startswith('FAULT')]
  text = '\n'.join(lines)
  assert 'jax ' in text
  assert 'device(s)' in text
  assert 'gene table' in text
  assert 'at step 40' in text
  assert 'checkpoint 5: every file is as written' in text
  assert 'train human' in text


def test_doctor_finds_what_is_damaged(trained, tiny_corpus, tmp_path, capsys):
  run, corpus = tmp_path / 'run', tmp_path / 'corpus'
  shutil.copytree(trained, run)
  shutil.copytree(tiny_corpus, corpus)
  flip_a_bit(run / 'checkpoints' / '10' / 'params' / 'manifest.ocdbt')
  flip_a_bit(corpus / 'vocabulary.tsv.gz')
  folders = [str(run), str(corpus), str(tmp_path), str(tmp_path / 'none')]
  assert cli.main(['doctor', *folders]) == errors.EXIT_FAILED
  faults = [
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('FAULT')
  ]
  assert 'checkpoint 10' in faults[0]
  assert 'vocabulary' in faults[1]
  assert 'neither a corpus' in faults[2]
  assert 'neither a corpus' in faults[3]
  assert len(faults) == 4


def test_corpus_verify_and_stats(tiny_corpus, tmp_path, capsys):
  assert cli.main(['corpus', 'stats', str(tiny_corpus)]) == 0
  output = capsys.readouterr().out
  assert 'train human: 4' in output
  assert 'validation mouse' in output
  assert cli.main(['corpus', 'verify', str(tiny_corpus)]) == 0
  assert 'every file is as written' in capsys.readouterr().out
  corpus = tmp_path / 'corpus'
  shutil.copytree(tiny_corpus, corpus)
  files = [f for f in (corpus / 'train').rglob('*') if f.is_file()]
  shard = max(files, key=lambda f: f.stat().st_size)
  flip_a_bit(shard)
  assert cli.main(['corpus', 'verify', str(corpus)]) == errors.EXIT_FAILED
  assert shard.name in capsys.readouterr().out


def test_errors_of_the_system_are_one_line(tiny_corpus, capsys, monkeypatch):
  from genecompass_jax import corpus

  def fail(path):
    raise OSError(28, 'No space left on device', str(path))

  monkeypatch.setattr(corpus.Corpus, 'open', fail)
  code = cli.main(['corpus', 'stats', str(tiny_corpus)])
  assert code == errors.EXIT_FAILED
  (line,) = capsys.readouterr().err.splitlines()
  assert 'No space left' in line


def test_a_reader_that_leaves_is_no_fault(tiny_corpus):
  script = (
    'import sys; from genecompass_jax import cli; '
    f'sys.exit(cli.main(["corpus", "stats", {str(tiny_corpus)!r}]))'
  )
  command = shlex.join([sys.executable, '-c', script])
  result = subprocess.run(
    ['bash', '-c', f'{command} | true; exit ${{PIPESTATUS[0]}}'],
    capture_output=True,
    text=True,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'},
  )
  assert result.returncode == 0
  assert not result.stderr


INTERRUPTED = """
import atexit, sys
import jax
from genecompass_jax import cli, doctor

def stop(*args, **kwargs):
  raise KeyboardInterrupt

atexit.register(print, 'the interpreter ended by itself')
doctor.run = stop
sys.argv = ['genecompass', 'doctor']
sys.exit(cli.main({argv}))
"""


@pytest.mark.parametrize('is_command', [True, False])
def test_ctrl_c_ends_the_command_at_once_but_not_a_caller(is_command):
  """XLA may be compiling: an interpreter that ends by itself may crash."""
  argv = '' if is_command else "['doctor']"
  result = subprocess.run(
    [sys.executable, '-c', INTERRUPTED.format(argv=argv)],
    capture_output=True,
    text=True,
  )
  assert result.returncode == errors.EXIT_INTERRUPTED, result.stderr
  assert result.stderr == 'genecompass: interrupted\n'
  assert ('ended by itself' in result.stdout) == (not is_command)


def test_ctrl_c_of_what_goes_on_says_so(monkeypatch, capsys):
  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(h5ad_copy, 'check_output', stop)
  argv = ['embed', 'x', '-o', 'y.h5ad', '--checkpoint', 'z']
  assert cli.main(argv) == errors.EXIT_INTERRUPTED
  assert capsys.readouterr().err == (
    'genecompass: interrupted; the same command goes on\n'
  )


def test_a_caller_keeps_its_own_signal_handlers(tmp_path, capsys):
  def mine(*_):
    pass

  before = signal.signal(signal.SIGTERM, mine)
  try:
    assert cli.main(['doctor']) is not None
    assert cli.main(['corpus', 'verify', str(tmp_path)]) == errors.EXIT_USAGE
    assert signal.getsignal(signal.SIGTERM) is mine
  finally:
    signal.signal(signal.SIGTERM, before)
  capsys.readouterr()
