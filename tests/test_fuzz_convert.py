"""Damaged files of the release: the right model, or one line."""

import json
import random

import jax
import numpy as np
import pytest

from genecompass_jax import errors
from genecompass_jax.convert import genes, original
from tests.test_convert_genes import Release
from tests.test_parity import write_release

FILES = (
  'pytorch_model.bin',
  'config.json',
  *(f'{n}.pickle' for n in range(0, 8, 2)),
)


def read(folder):
  """What the command reads before it writes."""
  config, params, assets, _ = original.read_original(folder)
  files = genes.GeneFiles(
    tokens=str(folder / '0.pickle'),
    orthologues=str(folder / '2.pickle'),
    medians=[str(folder / '4.pickle'), str(folder / '6.pickle')],
  )
  return config, params, genes.with_genes(assets, config, files)[0]


@pytest.fixture(scope='module')
def release(tmp_path_factory):
  folder = tmp_path_factory.mktemp('release')
  files = Release(folder)
  files.write()
  write_release(folder / 'model', files.weights, {'num_attention_heads': 2})
  for name in FILES[:2]:
    (folder / 'model' / name).rename(folder / name)
  return folder


def damaged(data, rng):
  """A file that was cut, spliced or flipped."""
  bad = bytearray(data)
  kind = rng.randrange(4)
  if kind == 0:
    return bytes(bad[: rng.randrange(len(bad))])
  if kind == 1:
    at, length = rng.randrange(len(bad)), rng.randrange(1, 40)
    bad[at : at + length] = rng.randbytes(rng.randrange(40))
    return bytes(bad)
  if kind == 2:
    at, to = rng.randrange(len(bad)), rng.randrange(len(bad))
    bad[at : at + 30] = bad[to : to + 30]
    return bytes(bad)
  for _ in range(rng.randrange(1, 5)):
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
  return bytes(bad)


@pytest.mark.parametrize(
  'trials',
  [150, pytest.param(4000, marks=pytest.mark.slow)],  # two minutes
)
def test_damage_is_one_line_or_harmless(release, trials):
  config, params, assets = read(release)
  rng = random.Random(trials)
  kept = {name: (release / name).read_bytes() for name in FILES}
  refused = dict.fromkeys(FILES, 0)
  for trial in range(trials):
    name = FILES[trial % len(FILES)]
    (release / name).write_bytes(damaged(kept[name], rng))
    try:
      found = read(release)
    except errors.UserError as error:
      assert '\n' not in str(error)
      refused[name] += 1
    else:
      if name == 'pytorch_model.bin':
        assert found[0] == config
        jax.tree.map(np.testing.assert_array_equal, found[1], params)
        jax.tree.map(
          np.testing.assert_array_equal, found[2].knowledge, assets.knowledge
        )
    (release / name).write_bytes(kept[name])
  # most of a zip has a checksum; of a pickled number any bit may be another
  assert refused['pytorch_model.bin'] > 0.8 * trials / len(FILES)
  assert all(refused.values())


@pytest.mark.parametrize(
  'value', [None, [], {}, 'x', -1, 0, 1.5, 10**30, float('inf'), True]
)
@pytest.mark.parametrize(
  'key', ['num_attention_heads', 'hidden_size', 'use_values', 'vocab_size',
          'layer_norm_eps', 'num_labels', 'emb_warmup_steps', 'id2label'],
)  # fmt: skip
def test_configs_of_anything(release, key, value):
  text = (release / 'config.json').read_text()
  changed = json.loads(text) | {key: value}
  (release / 'config.json').write_text(json.dumps(changed))
  try:
    config, _, _ = read(release)
    assert config.num_heads in (1, 2)
  except errors.UserError as error:
    assert '\n' not in str(error)
  finally:
    (release / 'config.json').write_text(text)
