"""The `genecompass` command: help, doctor, convert."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import genecompass_jax as gc
from genecompass_jax import cli, errors

GOLDEN = pathlib.Path(__file__).parent / 'golden'
COMMANDS = ['demo', 'prep', 'embed', 'convert', 'report', 'corpus', 'doctor']


@pytest.mark.parametrize('command', [[], *([c] for c in COMMANDS)])
def test_help_ends_well(command, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main([*command, '--help'])
  assert end.value.code == 0
  assert 'usage: genecompass' in capsys.readouterr().out


def test_help_needs_no_jax():
  code = (
    'import sys; from genecompass_jax import cli\n'
    'try: cli.main(["--help"])\n'
    'except SystemExit: pass\n'
    'sys.exit("jax" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


def test_wrong_flags_are_one_line(capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(['embed', 'cells.h5ad'])
  assert end.value.code == errors.EXIT_USAGE
  assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_doctor_finds_what_is_wrong(trained, tiny_corpus, tmp_path, capsys):
  assert cli.main(['doctor', str(trained), str(tiny_corpus)]) == 0
  assert 'all is well' in capsys.readouterr().out
  broken = tmp_path / 'run'
  shutil.copytree(trained, broken)
  (broken / 'assets' / 'knowledge.npz').write_bytes(b'other')
  assert cli.main(['doctor', str(broken)]) == 1
  assert 'FAULT' in capsys.readouterr().out
  assert cli.main(['doctor', str(tmp_path)]) == 1


def test_corpus_verify_names_a_flipped_bit(tiny_corpus, tmp_path, capsys):
  broken = tmp_path / 'corpus'
  shutil.copytree(tiny_corpus, broken)
  assert cli.main(['corpus', 'verify', str(broken)]) == 0
  assert cli.main(['corpus', 'stats', str(broken)]) == 0
  capsys.readouterr()
  shard = next((broken / 'train/human/counts/c').rglob('*/*'))
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  assert cli.main(['corpus', 'verify', str(broken)]) == 1
  assert 'counts' in capsys.readouterr().out


def _tensors():
  return {
    key.removeprefix('sd/'): value
    for key, value in np.load(GOLDEN / 'original_tiny.npz').items()
    if key.startswith('sd/')
  }


def _convert(source, target, *flags):
  config = ['--config', str(GOLDEN / 'original_tiny.json')]
  return cli.main(
    ['convert', 'pytorch', str(source), '-o', str(target), *(flags or config)]
  )


@pytest.mark.parametrize('suffix', ['npz', 'safetensors'])
def test_converted_weights_load_and_travel(suffix, tmp_path):
  source = tmp_path / f'weights.{suffix}'
  if suffix == 'npz':
    np.savez(source, **_tensors())
  else:
    safetensors.numpy.save_file(
      {k: np.ascontiguousarray(v) for k, v in _tensors().items()}, source
    )
  assert _convert(source, tmp_path / 'model') == 0
  shutil.move(tmp_path / 'model', tmp_path / 'moved')
  model = gc.load(tmp_path / 'moved')
  golden = np.load(GOLDEN / 'original_tiny.npz')
  batch = gc.cell_batch(
    golden['in/input_ids'],
    golden['in/values'],
    golden['in/species'],
    lengths=golden['lengths'],
  )
  np.testing.assert_allclose(
    model.hidden_states(batch), golden['out/hidden_2'], atol=1e-5
  )
  assert _convert(source, tmp_path / 'moved') == errors.EXIT_USAGE  # not empty


@pytest.mark.parametrize(
  ('spoil', 'says'),
  [
    (lambda t: t.pop('cls.predictions.bias'), 'missing cls.predictions.bias'),
    (
      lambda t: t.update({'bert.cls_embedding.weight': np.ones((2, 3))}),
      'bert.cls_embedding.weight',
    ),
    (
      lambda t: t['bert.embeddings.LayerNorm.weight'].fill(np.nan),
      'not finite',
    ),
    (
      lambda t: t.update({'cls.predictions.decoder.bias': np.ones(200)}),
      'ties it',
    ),
    (lambda t: t.clear(), 'no tensor'),
    (
      lambda t: t.update({'x': np.array([{}], object)}),
      'cannot be read',
    ),
  ],
)
def test_spoilt_weights_are_one_line(spoil, says, tmp_path, capsys):
  tensors = _tensors()
  spoil(tensors)
  np.savez(tmp_path / 'weights.npz', **tensors)
  assert _convert(tmp_path / 'weights.npz', tmp_path / 'm') == errors.EXIT_USAGE
  said = capsys.readouterr().err.strip()
  assert len(said.splitlines()) == 1
  assert says in said
  assert not (tmp_path / 'm').exists()


def test_what_cannot_be_inferred_is_asked_for(tmp_path, capsys):
  np.savez(tmp_path / 'weights.npz', **_tensors())
  code = _convert(tmp_path / 'weights.npz', tmp_path / 'm', '--key-prefix=')
  assert code == errors.EXIT_USAGE
  assert 'num_attention_heads' in capsys.readouterr().err
  (tmp_path / 'cut.npz').write_bytes(
    (tmp_path / 'weights.npz').read_bytes()[:5000]
  )
  assert _convert(tmp_path / 'cut.npz', tmp_path / 'm') == errors.EXIT_USAGE
  assert 'fetch it again' in capsys.readouterr().err
  config = json.loads((GOLDEN / 'original_tiny.json').read_text())
  (tmp_path / 'c.json').write_text(json.dumps({**config, 'hidden_act': 'relu'}))
  flags = ['--config', str(tmp_path / 'c.json')]
  code = _convert(tmp_path / 'weights.npz', tmp_path / 'm', *flags)
  assert code == errors.EXIT_USAGE
  assert 'hidden_act' in capsys.readouterr().err
