"""Models back under the original's names, and exports of runs."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import genecompass_jax as gc
from genecompass_jax import (
  assets,
  cli,
  errors,
  knowledge,
  model,
  model_config,
  paths,
  tensor_files,
  vocabulary,
)
from genecompass_jax.convert import export
from tests import original_forward
from tests.conftest import tiny_genes
from tests.test_parity import (
  HEADS,
  PRETRAINING,
  batch_of,
  recorded_weights,
  write_release,
)


def run(*words):
  return cli.main([str(word) for word in words])


def assert_same_model(one, other):
  assert one.config == other.config
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  jax.tree.map(
    np.testing.assert_array_equal, one.assets.knowledge, other.assets.knowledge
  )


def assert_same_tensors(found, wanted):
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    array = np.asarray(array)
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize('name', [*PRETRAINING, *HEADS])
def test_a_recorded_state_dict_comes_back_bit_for_bit(oracle, name, tmp_path):
  weights, _, meta = recorded_weights(oracle, name)
  write_release(tmp_path / 'release', weights, meta['config'])
  assert (
    run('convert', 'pytorch', tmp_path / 'release', '-o', tmp_path / 'm') == 0
  )
  ending = 'npz' if name == 'tiny_nocls' else 'safetensors'
  file = tmp_path / 'back' / f'model.{ending}'
  assert run('convert', 'export', tmp_path / 'm', '-o', file) == 0
  assert_same_tensors(tensor_files.read(file), weights)
  config = json.loads((tmp_path / 'back' / 'config.json').read_text())
  for key, value in meta['config'].items():
    assert config[key] == value, key
  # and once more, from what was exported
  assert run('convert', 'pytorch', file, '-o', tmp_path / 'again') == 0
  again = gc.load(tmp_path / 'again')
  assert_same_model(again, gc.load(tmp_path / 'm'))


def test_a_card_says_what_was_exported(oracle, tmp_path):
  weights, _, meta = recorded_weights(oracle, 'tiny_full')
  write_release(tmp_path / 'release', weights, meta['config'])
  assert (
    run('convert', 'pytorch', tmp_path / 'release', '-o', tmp_path / 'm') == 0
  )
  card = (tmp_path / 'm' / 'README.md').read_text()
  file = tmp_path / 'release' / 'pytorch_model.bin'
  for said in (
    '| total | 37,449 |',
    '| promoter | 24 | 19',
    'no causal estimates',
    'keep their terms',
    'gc.cell_batch(tokens',
    f'`pytorch_model.bin`, sha256 `{paths.sha256_file(file)}`',
    'not recorded here',
  ):
    assert said in card, said
  out = tmp_path / 'out.safetensors'
  (tmp_path / 'README.md').write_text('of somebody else')
  assert run('convert', 'export', tmp_path / 'm', '-o', out) == 0
  assert (tmp_path / 'README.md').read_text() == 'of somebody else'
  card = (tmp_path / 'out.README.md').read_text()
  assert paths.sha256_file(out) in card
  assert gc.load(tmp_path / 'm').provenance['weights']


_RUNNER = """
import sys
import numpy as np
from jax import export

with open(sys.argv[1], 'rb') as file:
  encoder = export.deserialize(bytearray(file.read()))
states = encoder.call(dict(np.load(sys.argv[2])))
assert not any(name.startswith('genecompass') for name in sys.modules)
assert encoder.platforms == ('cpu', 'tpu', 'cuda')
np.save(sys.argv[3], states)
"""


@pytest.mark.parametrize(
  'name',
  ['tiny_full', pytest.param('tiny_nocls', marks=pytest.mark.slow)],  # 5 s
)
def test_a_program_runs_without_the_package(oracle, name, tmp_path):
  weights, arrays, meta = recorded_weights(oracle, name)
  write_release(tmp_path / 'release', weights, meta['config'])
  assert (
    run('convert', 'pytorch', tmp_path / 'release', '-o', tmp_path / 'm') == 0
  )
  file = tmp_path / 'encoder.stablehlo'
  slots = arrays['in/input_ids'].shape[1] + 1
  words = ['convert', 'stablehlo', tmp_path / 'm', '-o', file]
  assert run(*words, '--slots', slots) == 0
  signature = json.loads((tmp_path / 'signature.json').read_text())
  restored = gc.load(tmp_path / 'm')
  batch = batch_of(arrays, np.asarray(meta['lengths']))
  cells = {name: getattr(batch, name) for name in signature['inputs']}
  for name, facts in signature['inputs'].items():
    assert cells[name].dtype == facts['dtype'] and facts['shape'][1] == slots
  np.savez(tmp_path / 'cells.npz', **cells)
  subprocess.run(
    [sys.executable, '-c', _RUNNER, file, 'cells.npz', 'states.npy'],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    check=True,
  )
  states = np.load(tmp_path / 'states.npy')
  assert list(states.shape[1:]) == signature['output']['shape'][1:]
  np.testing.assert_allclose(states, restored.hidden_states(batch), atol=1e-5)
  last = arrays[f'out/hidden_{restored.config.num_layers}']
  real = np.abs(states - last)
  assert real.max() < 2e-5
  assert 'export.deserialize' in (tmp_path / 'README.md').read_text()
  assert run(*words, '--slots', slots) == errors.EXIT_USAGE  # is there already
  words[-1] = tmp_path / 'other'
  assert run(*words, '--slots', 9000) == errors.EXIT_USAGE
  assert run(*words, '--platforms', 'cpu,abacus') == errors.EXIT_USAGE


def our_model(layout, **changes):
  """A model of ours with two priors of which genes are missing."""
  genes = tiny_genes(0, 40) + tiny_genes(1, 40)
  table = vocabulary.Vocabulary.default().restrict(genes).genes
  vocab = vocabulary.Vocabulary.from_genes(table, layout=layout)
  rng = np.random.default_rng(0)
  priors = {
    name: (genes[first::2], rng.normal(size=(len(genes[first::2]), width)))
    for name, first, width in (('grn', 0, 6), ('promoter', 1, 4))
  }
  tables = knowledge.align(vocab, priors)
  fields = {
    'vocabulary_size': vocab.size,
    'width': 16,
    'num_layers': 2,
    'num_heads': 2,
    'feed_forward': 24,
    'max_genes': 30,
    'priors': tables.widths,
  }
  config = model_config.ModelConfig(**fields | changes)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2,
    model.abstract_params(config),
  )
  return gc.PretrainedModel(config, params, assets.Assets(tables, vocab))


def test_a_model_of_ours_becomes_one_of_the_original(tmp_path):
  """Trained vectors of missing priors, and priors in another order, included."""
  ours = our_model('released')
  gc.export(ours, tmp_path / 'm')
  file = tmp_path / 'w.safetensors'
  assert run('convert', 'export', tmp_path / 'm', '-o', file) == 0
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['use_peca_grn'] and not config['use_co_exp']
  assert run('convert', 'pytorch', file, '-o', tmp_path / 'back') == 0
  back = gc.load(tmp_path / 'back')
  rng = np.random.default_rng(2)
  ids = rng.integers(2, ours.config.vocabulary_size, (4, 20))
  batch = gc.cell_batch(ids, rng.random(ids.shape), [0, 1, 0, 1])
  for mine, theirs in zip(ours.logits(batch), back.logits(batch), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
  yardstick, _ = original_forward.forward(
    tensor_files.read(file),
    config,
    ids,
    np.asarray(batch.values_BL)[:, 1:],
    np.array([0, 1, 0, 1]),
    np.full(4, 20),
  )
  states = ours.hidden_states(batch)
  np.testing.assert_allclose(states, yardstick[-1], atol=2e-5)


@pytest.mark.parametrize(
  ('layout', 'changes', 'match'),
  [
    ('compact', {}, "'compact'"),
    ('released', {'norm_order': 'pre'}, 'norms before'),
    ('released', {'hides_ranks': True}, 'hidden ranks'),
    ('released', {'base_width': 8}, 'base_width'),
    ('released', {'priors': ()}, 'no priors'),
  ],
)
def test_what_the_original_has_no_place_for(
  layout, changes, match, tmp_path, capsys
):
  gc.export(our_model(layout, **changes), tmp_path / 'm')
  out = tmp_path / 'out' / 'w.npz'
  assert run('convert', 'export', tmp_path / 'm', '-o', out) == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert match in line and 'convert params' in line
  assert not (tmp_path / 'out').exists()


def test_places_that_cannot_be_are_refused_first(tmp_path, capsys):
  """Before a model is looked at; and every export has its own files beside."""
  (tmp_path / 'file').touch()
  for kind, output, match in (
    ('export', 'http://host/x.npz', 'is read only'),
    ('params', 'http://host/x', 'is read only'),
    ('params', tmp_path / 'file', 'is a file'),
    ('pytorch', tmp_path / 'file', 'is a file'),
    ('pytorch', 'https://host/x', 'is read only'),
  ):
    words = ['convert', kind, str(tmp_path / 'none'), '-o', str(output)]
    if kind == 'export':
      with pytest.raises(errors.UserError, match=match):
        export.write(None, str(output))
      continue
    assert cli.main(words) == errors.EXIT_USAGE
    assert match in capsys.readouterr().err
  (tmp_path / 'README.md').touch()
  for name in ('one', 'two', 'one.x'):
    place = export.beside(f'{tmp_path}/{name}', 'README.md')
    assert place == f'{tmp_path}/{name.partition(".")[0]}.README.md'
