"""`genecompass doctor`: versions, devices, assets, health of folders."""

import importlib.metadata
import platform
from collections.abc import Iterator

import numpy as np

from genecompass_jax import (
  assets as assets_lib,
  checkpoint,
  corpus,
  errors,
  gene_table,
  paths,
  pretrained,
  vocabulary,
  workdir,
)

PACKAGES = (
  *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain'),
  *('tensorstore', 'anndata', 'numpy', 'numba', 'pyarrow', 'ml-collections'),
)
OPTIONAL = ('scanpy', 'scikit-learn', 'umap-learn', 'matplotlib')


def run(folders: list[str]) -> int:
  """Prints a report; returns 0 when all is well, else 1."""
  healthy = True
  checks = [_environment, _devices, _gene_table]
  checks += [lambda f=folder: _folder(f) for folder in folders]
  for check in checks:
    try:
      for line in check():
        print(line)
        healthy &= not line.startswith('FAULT')
    except errors.UserError as error:
      print(f'FAULT  {error}')
      healthy = False
  print('all is well' if healthy else 'something is wrong: see FAULT above')
  return errors.EXIT_OK if healthy else errors.EXIT_FAILED


def _environment() -> Iterator[str]:
  yield f'ok     Python {platform.python_version()}, {platform.platform()}'
  for name in PACKAGES + OPTIONAL:
    try:
      yield f'ok     {name} {importlib.metadata.version(name)}'
    except importlib.metadata.PackageNotFoundError:
      if name in OPTIONAL:
        yield f'-      {name} is not installed (demo only: pip install '
        '".[demo]" in the folder of the repository)'
      else:
        yield f'FAULT  {name} is not installed: pip install {name}'


def _devices() -> Iterator[str]:
  try:
    import jax

    devices = jax.devices()
    total = jax.numpy.ones((256, 256)).sum()
    if float(total) != 65536.0:
      yield f'FAULT  {devices[0]} adds 65,536 ones up to {total}'
    wrong = _miscompiled()
    if wrong:
      yield f'FAULT  {wrong}'
    kinds = sorted({d.device_kind for d in devices})
    yield f'ok     {len(devices)} {jax.default_backend()} device(s): ' + (
      ', '.join(kinds)
    )
  except (ImportError, RuntimeError) as error:
    line = errors.first_line(error)
    yield f'FAULT  JAX finds no device: {line}'


def _miscompiled() -> str:
  """What is wrong with compiled sums of products; '' where they are right."""
  import jax

  # github.com/jax-ml/jax/issues/39103: some rows get the sum of other rows.
  number = 32_769
  rows_N3 = np.zeros((number, 3), np.float32)
  rows_N3[:, 0] = np.arange(number)

  def squares(row_3):
    return ((jax.numpy.eye(3) @ row_3) ** 2).sum()

  found_N = np.asarray(jax.jit(jax.vmap(squares))(rows_N3))
  if np.array_equal(found_N, rows_N3[:, 0] ** 2):
    return ''
  return (
    f'jaxlib {importlib.metadata.version("jaxlib")} compiles sums of products '
    'wrongly here: import genecompass_jax before anything runs on JAX, or take '
    'another version'
  )


def _gene_table() -> Iterator[str]:
  table = gene_table.GeneTable.default()
  vocab = vocabulary.Vocabulary.default()
  human = int((table.species_G == 0).sum())
  yield (
    f'ok     gene table: {human:,} human and {len(table.gene_ids) - human:,} '
    f'mouse genes, {vocab.size:,} tokens, sha256 {vocab.sha256[:12]}'
  )


def _folder(folder: str) -> Iterator[str]:
  """A corpus or a model, whichever the folder is."""
  if paths.exists(paths.join(folder, 'manifest.json')):
    opened = corpus.Corpus.open(folder)
    problems = opened.verify()
    yield from (f'FAULT  {problem}' for problem in problems)
    if not problems:
      yield from (f'ok     {line}' for line in describe_corpus(opened))
    return
  config = workdir.read_config(folder)
  if config is None:
    raise errors.UserError(
      f'{folder}: neither a corpus (manifest.json) nor a model (config.json)'
    )
  model = pretrained.load(folder)
  size = sum(x.size for x in _leaves(model.params))
  yield (
    f'ok     {folder}: model of {size:,} parameters at step {model.step}, '
    f'sha256 {model.sha256[:12]}'
  )
  if 'run' in config:
    total = config['run']['optimizer']['total_steps']
    if model.step < total:
      yield f'-      the run is not finished: step {model.step} of {total}'
  assets_lib.load(paths.join(folder, workdir.ASSETS))
  checkpoints = paths.join(folder, workdir.CHECKPOINTS)
  for step in checkpoint.all_steps(checkpoints):
    problem = checkpoint.check_seal(paths.join(checkpoints, str(step)))
    if problem is None:
      yield f'ok     checkpoint {step}: every file is as written'
    else:
      yield f'FAULT  checkpoint {step}: {problem}'


def describe_corpus(opened: corpus.Corpus) -> list[str]:
  """What a corpus holds, a line each."""
  lines = [
    f'{opened.path}: vocabulary of {opened.vocabulary.size:,} tokens, sha256 '
    f'{opened.vocabulary.sha256[:12]}'
  ]
  for split in opened.splits:
    for store in opened.stores(split):
      length_N = store.length_N
      found = {
        kind: len(np.unique(store.obs(kind))) for kind in ('dataset', 'unit')
      }
      lines.append(
        f'{split} {store.species_name}: {store.num_cells:,} cells of {found["dataset"]} '
        f'dataset{_s(found["dataset"])} and {found["unit"]} '
        f'unit{_s(found["unit"])}, '
        f'{length_N.mean():.0f} genes a cell (most {length_N.max()})'
      )
  return lines


def _s(number: int) -> str:
  return '' if number == 1 else 's'


def _leaves(tree) -> list:
  import jax

  return jax.tree.leaves(tree)
