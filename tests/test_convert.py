"""Original weights that are odd, damaged, or come with their genes."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import genecompass_jax as gc
from genecompass_jax import (
  cli,
  errors,
  medians,
  model as model_lib,
  vocabulary,
)
from genecompass_jax.convert import names
from tests.conftest import tiny_cells, tiny_genes

HEADS = 2


@pytest.fixture(scope='module')
def vocab():
  genes = tiny_genes(0) + tiny_genes(1)
  return vocabulary.Vocabulary.default().restrict(genes)


def random_weights(size):
  """A state dict under the original's names, of random weights."""
  config = model_lib.ModelConfig(
    vocabulary_size=size,
    width=8,
    num_layers=2,
    num_heads=HEADS,
    feed_forward=16,
    max_genes=64,
    priors=(('grn', 4),),
    missing_prior='released',
  )
  found = names.params_to_original(model_lib.init(config, 0), config)
  name = 'bert.embeddings.peca_grn_knowledge'
  found[name] = np.random.default_rng(0).normal(size=(size, 4))
  return {k: np.asarray(v, np.float32) for k, v in found.items()}


@pytest.fixture(scope='module')
def tensors(vocab):
  return random_weights(vocab.size)


@pytest.fixture
def command(tmp_path, capsys):
  """Runs `convert pytorch` -> (exit code, lines on standard error)."""

  def run(tensors, config=None, *flags, save=np.savez, name='w.npz'):
    save(tmp_path / name, **tensors)
    config = {'num_attention_heads': HEADS} if config is None else config
    (tmp_path / 'c.json').write_text(json.dumps(config))
    arguments = ['convert', 'pytorch', tmp_path / name, *flags]
    arguments += ['--config', tmp_path / 'c.json', '-o', tmp_path / 'model']
    code = cli.main([str(a) for a in arguments])
    return code, capsys.readouterr().err.strip().splitlines()

  return run


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('num_attention_heads', 'four'),
    ('num_attention_heads', None),
    ('num_attention_heads', 2.5),
    ('hidden_dropout_prob', 'x'),
    ('use_promoter', 'no'),
    ('emb_warmup_steps', '10'),
    ('layer_norm_eps', -1),
    ('num_hidden_layers', 3),
    ('hidden_act', 'relu'),
    ('is_decoder', True),
    ('emb_warmup_steps', 10**400),
    ('layer_norm_eps', 1e300),
  ],
)
def test_odd_configs_are_one_line(tensors, command, tmp_path, key, value):
  code, lines = command(tensors, {'num_attention_heads': HEADS} | {key: value})
  assert code == errors.EXIT_USAGE
  assert len(lines) == 1 and '--config' in lines[0]
  assert not (tmp_path / 'model').exists()


def test_null_is_absent_and_foreign_entries_are_left_out(tensors, command):
  odd = {'num_attention_heads': HEADS, 'emb_warmup_steps': None}
  odd |= {'use_promoter': None, 'classifier_dropout': None}
  code, _ = command(tensors | {'notes': np.array('of a friend')}, odd)
  assert code == 0


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('emb_warmup.alpha', lambda x: np.ones(2, np.float32), 'holds 2 numbers'),
    ('emb_warmup.alpha', lambda x: np.ones(0, np.float32), 'holds 0 numbers'),
    ('cls.predictions.bias', lambda x: x + 1j, 'not real numbers'),
  ],
)
def test_odd_tensors_name_the_file(tensors, command, name, change, message):
  tensors = {**tensors, name: change(tensors.get(name))}
  code, (line,) = command(tensors)
  assert code == errors.EXIT_USAGE
  assert message in line and '.npz: ' in line


def test_what_is_no_plain_file(tmp_path, capsys):
  os.mkfifo(tmp_path / 'fifo.safetensors')
  for source in (tmp_path / 'fifo.safetensors', '/dev/zero'):
    words = ['convert', 'pytorch', str(source), '-o', str(tmp_path / 'out')]
    assert cli.main(words) == errors.EXIT_USAGE
    assert 'no plain file' in capsys.readouterr().err


@pytest.mark.parametrize('suffix', ['cat_fc.weight', 'word_embeddings.weight'])
def test_weights_that_are_not_finite_are_refused(tensors, command, suffix):
  spoilt = {
    name: value * np.nan if name.endswith(suffix) else value
    for name, value in tensors.items()
  }
  code, (line,) = command(spoilt)
  assert code == errors.EXIT_USAGE
  assert f'{suffix} is not finite' in line


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_of_any_float(tensors, command, tmp_path, dtype):
  def save(path, **arrays):
    cast = {k: np.ascontiguousarray(v.astype(dtype)) for k, v in arrays.items()}
    safetensors.numpy.save_file(cast, path)

  code, _ = command(tensors, save=save, name='w.safetensors')
  assert code == 0
  loaded = gc.load(tmp_path / 'model')
  found = names.params_to_original(loaded.params, loaded.config)
  for name, value in found.items():
    expected = tensors[name].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(value, expected, err_msg=name)


def test_with_its_genes_a_converted_model_embeds_counts(
  tensors, vocab, command, tmp_path
):
  code, _ = command(tensors)
  assert code == 0
  adata = tiny_cells(12)
  with pytest.raises(errors.UserError, match='--vocabulary and --medians'):
    gc.embed(adata, gc.load(tmp_path / 'model'))

  vocab.save(tmp_path / 'vocabulary.tsv.gz')
  shape = len(vocabulary.SPECIES), vocab.size
  known = medians.Medians(
    'released', np.full(shape, 2.0), np.full(shape, 500), vocab.is_shared_V()
  )
  known.save(tmp_path / 'medians.tsv', vocab)
  (tmp_path / 'model').rename(tmp_path / 'bare')
  genes = ['--vocabulary', tmp_path / 'vocabulary.tsv.gz']
  code, (line,) = command(tensors, None, *genes)
  assert code == errors.EXIT_USAGE
  assert 'together' in line
  genes += ['--medians', tmp_path / 'medians.tsv']
  assert command(tensors, None, *genes)[0] == 0
  embedded = gc.embed(adata, gc.load(tmp_path / 'model'))
  assert embedded.shape == (12, 8) and np.isfinite(embedded).all()

  smaller = vocab.restrict(vocab.genes.gene_ids[:40])
  smaller.save(tmp_path / 'vocabulary.tsv.gz')
  (tmp_path / 'model').rename(tmp_path / 'whole')
  code, (*_, line) = command(tensors, None, *genes)
  assert code == errors.EXIT_USAGE
  assert f'{smaller.size} tokens, the weights have {vocab.size}' in line


@pytest.fixture
def model(tensors, command, tmp_path):
  command(tensors)
  return gc.load(tmp_path / 'model')


@pytest.mark.parametrize(
  ('ids', 'species', 'match'),
  [
    ([[3, 4000]], 0, 'token 4000 is outside of'),
    ([[-3, 4]], 0, 'token -3 is outside of'),
    ([[2.5, 4]], 0, 'whole numbers'),
    ([[5] * 80], 0, 'position 79 is outside of .0, 64.'),
    ([[3, 4]], 5, 'species code 5 is outside of .0, 2.'),
    ([[3, 4]], -1, 'species -1 is not known'),
    ([[3, 4]], 'rat', 'species rat is not known'),
    ([[3, 4]], [0, 1], '2 species codes for 1 cells'),
    ([[]], 0, 'no gene slots'),
  ],
)
def test_inputs_that_a_model_does_not_know(model, ids, species, match):
  ids = np.array(ids)
  for use in (model.hidden_states, model.logits):
    with pytest.raises(errors.UserError, match=match):
      use(gc.cell_batch(ids, np.ones(ids.shape), species))


def test_species_by_name_a_cell(model):
  ids, values = np.array([[5, 6, 7]] * 2), np.ones((2, 3))
  by_name = gc.cell_batch(ids, values, ['human', 'mouse'])
  by_code = gc.cell_batch(ids, values, [0, 1])
  states = model.hidden_states(by_name)
  np.testing.assert_array_equal(states, model.hidden_states(by_code))
  assert np.abs(states[0] - states[1]).max() > 1e-4


def test_labels_that_are_not_read_may_be_anything(model):
  ids = np.array([[5, 1, 7]])
  batch = gc.cell_batch(ids, np.array([[1.0, -1, 0.5]]))
  id_labels = np.array([[-100, 6, -100]])

  def loss(params, filler):
    values = np.array([[filler, 0.7, filler]])
    return gc.pretraining_loss(model, batch, id_labels, values, params=params)[
      0
    ]

  plain, grads = jax.value_and_grad(loss)(model.params, 0.0)
  odd, odd_grads = jax.value_and_grad(loss)(model.params, np.nan)
  assert plain == odd
  jax.tree.map(np.testing.assert_array_equal, grads, odd_grads)


def test_parameters_of_another_model_are_not_taken(tensors, command, tmp_path):
  """A folder of which half was copied: the seal alone fits any parameters."""
  assert command(tensors)[0] == 0
  (tmp_path / 'model').rename(tmp_path / 'one')
  word = {names.WORD: tensors[names.WORD] + 1}
  word['cls.predictions.decoder.weight'] = word[names.WORD]
  assert command(tensors | word)[0] == 0
  shutil.rmtree(tmp_path / 'one' / 'params')
  for name in ('params', 'params.sha256.json'):
    (tmp_path / 'model' / name).rename(tmp_path / 'one' / name)
  with pytest.raises(errors.UserError, match='belongs to another model'):
    gc.load(tmp_path / 'one')
