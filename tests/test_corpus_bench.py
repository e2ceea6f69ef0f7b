"""What loading costs: figures of every layout, and their sense."""

import json

import numpy as np
import pytest

from genecompass_jax import cli, corpus, corpus_bench, errors, meter


def test_entropy_is_that_of_windows():
  mixed = np.tile(['a', 'b', 'c', 'd'], 256)
  assert meter.mean_entropy(mixed) == pytest.approx(2.0)
  assert meter.mean_entropy(np.sort(mixed)) == pytest.approx(0.0)
  assert np.isnan(meter.mean_entropy(mixed[:100]))


def test_a_meter_counts():
  counted = meter.Meter()
  counted.add(3, [1, 1, 2], slots=10, real=9)
  counted.add(5)
  result = counted.result({'requests': 4, 'bytes': 80})
  assert result['cells'] == 8
  assert result['real_share'] == 0.9
  assert (result['requests'], result['read_bytes']) == (512, 10)
  assert result['rate'] > 0 and result['cpu_us'] > 0 and result['peak_mib'] > 1


@pytest.mark.parametrize('layout', corpus_bench.LAYOUTS)
def test_every_layout_is_measured(tiny_corpus, layout):
  opened = corpus.Corpus.open(tiny_corpus)
  figures = corpus_bench.measure(
    opened, layout=layout, rows=8, slots=256, seconds=0.5, max_genes=100
  )
  assert figures['cells'] > 0 and figures['rate'] > 0
  assert figures['requests'] > 0 and figures['read_bytes'] > 0
  assert figures['stored_bytes'] > 10
  assert figures['entropy'] <= figures['full_entropy'] + 0.1
  if layout == corpus_bench.RAW:
    assert np.isnan(figures['real_share'])
  else:
    assert 0.3 < figures['real_share'] <= 1


def test_the_command_prints_a_table(tiny_corpus, capsys):
  few = ['--seconds', '0.2', '--rows', '8', '--slots', '256']
  few += ['--max-genes', '100']
  command = ['corpus', 'bench', str(tiny_corpus), *few]
  assert cli.main([*command, '--cold']) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0].startswith('| | cells/s |') and ', cold |' in out[2]
  assert out[0].count('|') == out[2].count('|')
  assert cli.main([*command, '--json', '--layout', 'raw']) == 0
  assert json.loads(capsys.readouterr().out)['cells'] > 0


def test_mistakes_are_one_line(tiny_corpus, tmp_path, capsys):
  assert cli.main(['corpus', 'bench', str(tiny_corpus), '--label', 'no']) == 2
  assert capsys.readouterr().err.count('\n') == 1
  for words in (
    ('--seconds', 'nan'),
    ('--seconds', 'inf'),
    ('--seconds', '-1'),
    ('--threads', '-1'),
    ('--rows', '0'),
    ('--max-genes', '70000'),
    ('--max-genes', '0'),
  ):
    assert cli.main(['corpus', 'bench', str(tiny_corpus), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words[1].removesuffix('.0') in line
  assert cli.main(['corpus', 'bench', str(tmp_path)]) == 2
  assert 'no corpus here' in capsys.readouterr().err
  with pytest.raises(errors.UserError, match='--cold'):
    corpus_bench.forget('gs://bucket/corpus')
