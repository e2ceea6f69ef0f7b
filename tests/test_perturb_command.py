"""`genecompass perturb`: files, exit codes, and devices that share the rows."""

import argparse
import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from genecompass_jax import cli, errors
from genecompass_jax.analysis.perturbation import (
  command,
  question,
  result_files,
)
from tests.conftest import tiny_cells

FEW = ('--min-cells', '1', '--calipers', '2', '2', '2', '--fewest-nulls', '5')


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
  path = tmp_path_factory.mktemp('cells') / 'cells.h5ad'
  tiny_cells(40, seed=11).write_h5ad(path)
  return path


def run(cells, trained, output, *rest):
  return cli.main(
    ['perturb', str(cells), '--checkpoint', str(trained), '-o', str(output)]
    + [*FEW, *rest]
  )


def test_tables_and_plots_of_every_group(cells, trained, tmp_path, capsys):
  output = tmp_path / 'found.parquet'
  names = ','.join(tiny_cells(1).var_names[:3])
  rest = '--genes', names, '--group-by', 'cell_type', '--donor-key', 'donor'
  assert run(cells, trained, output, *rest) == errors.EXIT_OK
  found = result_files.read(str(output))
  assert set(found.table['group']) == {'A', 'B'}
  kept = {p.name for p in tmp_path.iterdir()}
  assert {'found.tsv', 'found.units.parquet', 'found.A.rank.png'} <= kept
  assert not (tmp_path / 'found.unfinished').exists()
  said = capsys.readouterr().out
  assert 'found.parquet' in said and 'n_donors' in said
  assert 'not a causal estimate' in said.splitlines()[0]
  assert 'positive is more than the nulls' in said.splitlines()[1]
  # What is there is not written over.
  assert run(cells, trained, output, *rest) == errors.EXIT_USAGE
  assert '--overwrite' in capsys.readouterr().err


def test_shards_and_then_the_table(cells, trained, tmp_path, capsys):
  names = ','.join(tiny_cells(1).var_names[:3])
  whole, shared = tmp_path / 'whole.parquet', tmp_path / 'shared.parquet'
  assert run(cells, trained, whole, '--genes', names) == errors.EXIT_OK
  for shard in ('0/2', '1/2'):
    code = run(cells, trained, shared, '--genes', names, '--shard', shard)
    assert code == errors.EXIT_OK and not shared.exists()
  assert run(cells, trained, shared, '--genes', names) == errors.EXIT_OK
  a, b = (result_files.read(str(p)).table for p in (whole, shared))
  np.testing.assert_array_equal(a['shift'], b['shift'])
  capsys.readouterr()


def test_the_command_asks_what_python_asks():
  """Where a flag and a field have one name, they have one default."""
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  given = vars(parser.parse_args(['cells', '--checkpoint', 'c', '-o', 'o']))
  fields = {f.name: f.default for f in dataclasses.fields(question.Question)}
  # Lists of names are text there.
  same = {name for name in fields if fields[name] != ()} & given.keys()
  assert 'max_cells' in same and len(same) > 12
  assert {k: given[k] for k in same} == {k: fields[k] for k in same}


@pytest.mark.parametrize(
  'output, rest, message',
  [
    ('found.csv', (), 'ending in .parquet'),
    ('found.parquet', ('--shard', 'one'), 'give I/N'),
    ('found.parquet', ('--genes', 'NOSUCH'), 'is not known'),
    ('found.parquet', ('--genes', ''), 'names no gene'),
    ('found.parquet', ('--start', 'A'), 'give both'),
    ('no/such/found.parquet', (), 'no such folder'),
  ],
)
def test_mistakes_are_one_line(
  cells, trained, tmp_path, capsys, output, rest, message
):
  code = run(cells, trained, tmp_path / output, *rest)
  said = capsys.readouterr().err.strip().splitlines()
  assert code == errors.EXIT_USAGE and message in said[-1]
  assert not [p for p in tmp_path.rglob('*') if p.suffix == '.parquet']


DEVICES = textwrap.dedent("""
  import sys
  import jax, numpy as np
  import genecompass_jax as gc

  model, devices = gc.load(sys.argv[1]), jax.devices()
  options = dict(min_cells=1, calipers=(2., 2., 2.), fewest_nulls=5)
  for number in (1, 3):
    jax.local_devices = lambda: devices[:number]
    found = gc.perturb(sys.argv[2], model, **options, max_cells=9)
    table = found.table.sort_values('gene_id')
    np.save(f'{sys.argv[3]}/{number}.npy', table['shift'].to_numpy())
""")


def test_more_devices_change_nothing(cells, trained, tmp_path):
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=3 '
    '--xla_backend_optimization_level=0',
  }
  subprocess.run(
    [sys.executable, '-c', DEVICES, str(trained), str(cells), str(tmp_path)],
    check=True,
    env=environment,
  )
  one, three = (np.load(tmp_path / f'{n}.npy') for n in (1, 3))
  np.testing.assert_allclose(one, three, atol=2e-7)
  assert len(one) > 40 and np.nanmax(one) > 1e-5
