"""Who may import whom: the levels of the architecture, kept by machine."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'genecompass_jax'

# A module imports modules of earlier lines only; a package (nulls, simulate, prepare,
# training, tasks, analysis, scaling) counts as one module. The number of a line is the
# level of the architecture.
LEVELS = (
  (0, 'errors schemas progress kernels meter chips'),
  (0, 'goodput text_plot config_values'),
  (0, 'web stores coordination'),
  (0, 'paths processes'),
  (0, 'locks children pickled_arrays'),
  (0, 'scratch'),
  (0, 'uploads checkpoint_copies'),
  (0, 'gene_table metrics sharding workdir ranking pickled prior_tables'),
  (0, 'layers'),
  (0, 'chunked_attention'),
  (0, 'attention'),
  (0, 'vocabulary encoding'),
  (1, 'gene_ids medians masking knowledge losses optimizer simulate'),
  (1, 'packing rows tie_ranking'),
  (1, 'filling'),
  (1, 'shards staging assets corpus_manifest'),
  (1, 'corpus'),
  (1, 'corpus_writer'),
  (1, 'model_config'),
  (1, 'embedding'),
  (2, 'torch_files'),
  (2, 'reading model checkpoint prepare tensor_files'),
  (2, 'flops model_card'),
  (2, 'data'),
  (3, 'nulls pretrained'),
  (3, 'convert'),
  (3, 'scoring'),
  (3, 'evaluate'),
  (4, 'training'),
  (4, 'train'),
  (5, 'tasks analysis scaling'),
  (6, 'doctor demo corpus_bench'),
  (6, 'tail'),
  (6, 'watch launch'),
  (6, 'main'),
  (6, 'cli'),
)
RANK = {
  name: rank for rank, (_, names) in enumerate(LEVELS) for name in names.split()
}
# One owner a library, so that a change of its interface touches one file.
OWNERS = {
  'tensorstore': ('shards',),
  'fsspec': ('stores',),
  'grain': ('data',),
  'orbax': ('checkpoint',),
  'anndata': ('prepare', 'analysis', 'tasks', 'demo'),
  'h5py': ('prepare',),
  'zarr': ('prepare',),
  'tiledbsoma': ('prepare',),
  'cellxgene_census': ('prepare',),
  'flax': ('layers', 'embedding', 'model'),
  'optax': ('optimizer', 'training', 'tasks', 'scaling'),
  'ml_collections': ('main',),
  'gensim': ('prepare',),
  'tensorboardX': ('training',),
  'wandb': ('training',),
}
FORBIDDEN = ('torch', 'tensorflow', 'pickle', 'cloudpickle', 'dill', 'joblib')
NO_JAX = (
  *(
    'errors',
    'web',
    'stores',
    'paths',
    'progress',
    'metrics',
    'workdir',
    'gene_table',
  ),
  *('vocabulary', 'gene_ids', 'encoding', 'medians', 'masking', 'packing'),
  *('shards', 'staging', 'corpus', 'corpus_writer', 'simulate', 'prepare'),
  *('kernels', 'ranking', 'tie_ranking', 'cli', 'main', 'pickled'),
  *('prior_tables', 'goodput', 'writers', 'text_plot', 'watch', 'tail'),
  *('config_values', 'chips', 'processes', 'launch', 'children', 'scratch'),
  'coordination',
)


def modules():
  """Every module of the package: dotted name below it -> source."""
  found = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    parts = parts[:-1] if parts[-1] == '__init__' else parts
    found['.'.join(parts)] = path
  return found


@functools.cache
def imports(path):
  """Absolute dotted names that a file imports, wherever they stand."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def own_imports(path):
  """Modules of the package that a file imports."""
  known = modules()
  found = set()
  for name in imports(path):
    first, _, rest = name.partition('.')
    if first != 'genecompass_jax' or not rest:
      continue
    while rest not in known:  # from a module, not the module itself
      rest = rest.rpartition('.')[0]
    found.add(rest)
  return found - {''}


def test_every_module_has_a_level():
  missing = {name.split('.')[0] for name in modules() if name} - set(RANK)
  assert not missing, f'{missing}: give it a level in tests/test_imports.py'


def test_a_module_imports_lower_levels_only():
  wrong = []
  for name, path in modules().items():
    top = name.split('.')[0]
    for other in own_imports(path) if name else ():
      below = other.split('.')[0]
      inside = below == top and '.' in name + other
      if not inside and RANK[below] >= RANK[top]:
        wrong.append(f'{name} imports {other}')
  assert not wrong


def test_no_circles_inside_a_package():
  graph = {name: own_imports(path) for name, path in modules().items() if name}
  order = {}

  def visit(name, above):
    assert name not in above, f'a circle: {" -> ".join((*above, name))}'
    if name not in order:
      for other in graph[name]:
        visit(other, (*above, name))
      order[name] = True

  for name in graph:
    visit(name, ())


def test_every_library_has_one_owner():
  wrong = []
  for name, path in modules().items():
    top = name.split('.')[0]
    for library in {i.split('.')[0] for i in imports(path)}:
      if library in FORBIDDEN:
        wrong.append(f'{name} imports {library}')
      if top not in OWNERS.get(library, (top,)):
        wrong.append(f'{name} imports {library}, which {OWNERS[library]} owns')
  assert not wrong


def test_no_torch_and_no_pickles_anywhere():
  for folder in ('tests', 'experiments', 'data_prep', 'colabs'):
    for path in (ROOT / folder).rglob('*.py'):
      libraries = {i.split('.')[0] for i in imports(path)}
      allowed = ('pickle',) if folder == 'tests' else ()
      assert not (libraries & set(FORBIDDEN)) - set(allowed), path
  for path in PACKAGE.rglob('*.py'):
    text = path.read_text()
    assert 'allow_pickle=True' not in text, path


def test_preparation_needs_no_jax():
  names = [
    f'genecompass_jax.{name}'
    for name in modules()
    if name.split('.')[0] in NO_JAX
  ]
  assert len(names) > len(NO_JAX)
  script = '\n'.join(
    ['import importlib, sys']
    + [f'importlib.import_module({name!r})' for name in names]
    + [
      'loaded = {name.split(".")[0] for name in sys.modules}',
      'print(*sorted(loaded & {"jax", "jaxlib", "flax", "optax", "torch"}))',
    ]
  )
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == ''


def committed():
  """Text files under version control."""
  try:
    listed = subprocess.run(
      ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('this copy is not under version control')
  for name in listed.stdout.decode().split('\0'):
    path = ROOT / name
    if name and path.is_file():
      data = path.read_bytes()
      if b'\0' not in data[:4096]:
        yield name, data.decode('utf-8')


def test_no_committed_file_names_a_place_of_one_machine():
  places = [f'/{name}/' for name in ('work', 'root', 'home')] + ['/tmp' + '/gc']
  wrong = [
    f'{name}: {place}'
    for name, text in committed()
    for place in places
    if place in text
  ]
  assert not wrong
