"""What it takes to convert weights of the size of the release, and back.

  python experiments/benchmarks/conversion.py --folder FOLDER [--size base]

Writes a file of PyTorch's format with random weights of the released shapes,
dictionaries of as many genes, and runs each kind of `genecompass convert` in a
process of its own: wall time, CPU time, peak memory. The exported state dict is
compared with the one that was converted, bit for bit. 8 GB of disk for base.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from genecompass_jax import model_config, tensor_files  # noqa: E402
from genecompass_jax.convert import names  # noqa: E402
from tests import original_forward, torch_zips  # noqa: E402

HUMAN, MOUSE, PAIRS = 23_113, 27_443, 17_465  # as in the release
PRIOR_WIDTH = 768
_MEASURED = """
import json, resource, sys, time
from genecompass_jax import cli
start = time.time()
code = cli.main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
  'code': code, 'wall_s': round(time.time() - start),
  'cpu_s': round(used.ru_utime + used.ru_stime),
  'peak_gib': round(used.ru_maxrss / 2**20, 2)}))
"""


def write_release(folder: pathlib.Path, size: str) -> dict[str, np.ndarray]:
  """A folder as the release is, of random numbers; returns the state dict."""
  sizes = model_config.SIZES[size]
  config = {
    'vocab_size': HUMAN + MOUSE + 2,
    'hidden_size': sizes['width'],
    'num_hidden_layers': sizes['num_layers'],
    'num_attention_heads': sizes['num_heads'],
    'intermediate_size': sizes['feed_forward'],
    'max_position_embeddings': 2048,
    'layer_norm_eps': 1e-12,
    'hidden_act': 'gelu',
    'emb_warmup_steps': 10_000,
    'use_values': True,
    'use_cls_token': True,
    **{f'use_{name}': True for name in original_forward.PRIORS},
  }
  widths = dict.fromkeys(original_forward.PRIORS, PRIOR_WIDTH)
  weights = original_forward.random_weights(config, widths)
  rng = np.random.default_rng(1)
  human = rng.choice(np.arange(2, HUMAN + 2), PAIRS, replace=False)
  mouse = rng.choice(np.arange(MOUSE) + HUMAN + 2, PAIRS, replace=False)
  weights[names.HOMOLOGS] = np.arange(config['vocab_size'])
  weights[names.HOMOLOGS][human] = mouse
  weights = {key: np.asarray(value) for key, value in weights.items()}
  folder.mkdir(parents=True)
  torch_zips.write(
    folder / 'pytorch_model.bin', weights, ties=[*names.TIED.items()]
  )
  (folder / 'config.json').write_text(json.dumps(config))
  genes = [f'ENSG{n:011d}' for n in range(HUMAN)]
  genes += [f'ENSMUSG{n:011d}' for n in range(MOUSE)]
  tokens = {'<pad>': 0, '<mask>': 1} | {g: n + 2 for n, g in enumerate(genes)}
  pairs = {int(m): int(h) for m, h in zip(mouse, human, strict=True)}
  medians = {g: float(n) / 2 for g, n in zip(genes, rng.integers(1, 9, 50_556))}
  for name, content in (
    ('tokens', tokens),
    ('orthologues', pairs),
    ('medians', medians),
  ):
    (folder / f'{name}.json').write_text(json.dumps(content))
  return weights


def measured(*words: object) -> dict[str, float]:
  """Runs `genecompass convert WORDS` in another process."""
  result = subprocess.run(
    [sys.executable, '-c', _MEASURED, 'convert', *map(str, words)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  if result.returncode:
    raise RuntimeError(result.stderr)
  return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
  """Prints a line of JSON for every command."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  parser.add_argument('--size', default='base', choices=model_config.SIZES)
  args = parser.parse_args()
  release, model = args.folder / 'release', args.folder / 'model'
  weights = write_release(release, args.size)
  held = os.path.getsize(release / 'pytorch_model.bin')
  print(
    f'{args.size}: {sum(x.size for x in weights.values()):,} elements, '
    f'{held:,} bytes'
  )
  genes = []
  for name in ('tokens', 'orthologues', 'medians'):
    genes += [f'--{name}', release / f'{name}.json']
  weights_back = args.folder / 'back' / 'model.safetensors'
  program = args.folder / 'program' / 'encoder.stablehlo'
  for name, words in (
    ('pytorch', ('pytorch', release, *genes, '-o', model)),
    ('export', ('export', model, '-o', weights_back)),
    ('params', ('params', model, '-o', args.folder / 'params')),
    ('stablehlo', ('stablehlo', model, '-o', program, '--slots', 257)),
  ):
    print(name, json.dumps(measured(*words)), flush=True)
  back = tensor_files.read(weights_back)
  same = back.keys() == weights.keys() and all(
    back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes()
    for key, value in weights.items()
  )
  print(f'the exported state dict equals the converted one: {same}')


if __name__ == '__main__':
  main()
