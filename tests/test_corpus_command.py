"""Finished corpora merged, and converted to formats of others."""

import dataclasses
import json
import os
import shutil

import anndata
import numpy as np
import pyarrow as pa
import pytest

from genecompass_jax import cli, corpus, errors
from genecompass_jax.prepare import (
  exports,
  merging,
  pipeline,
  quality,
  sources,
  turning,
)
from tests.test_copies import counts as many_counts, source as wide_source
from tests.test_prepare_pipeline import GENES, make, prepare, source

OFF = quality.QualityConfig.off()


def contents(built):
  """{(species, name)} -> counts by gene, and labels, of all cells."""
  found = {}
  for split in built.splits:
    for species in range(len(built.vocabulary.species)):
      store = built.store(split, species)
      if store is None:
        continue
      ids = np.array(built.gene_ids(species))
      names = store.cell_names()
      labels = {
        name: np.array([*store.categories(name), None], object)[store.obs(name)]
        for name in store.obs_names
        if name != 'source_row'
      }
      done = 0
      for block in store.read_blocks(range(store.num_blocks)):
        for i in range(block.num_cells):
          a, b = block.starts_C1[i : i + 2]
          cell = dict(zip(ids[block.gene_rows_N[a:b]], block.counts_N[a:b]))
          key = labels['source'][done], names[done]
          found[key] = (
            cell,
            float(block.totals_C[i]),
            split,
            labels['unit'][done],
            labels['dataset'][done],
          )
          done += 1
  return found


@pytest.fixture
def two(tmp_path):
  first = [source(make(300, 0), 'a'), source(make(200, 1, species=1), 'b')]
  prepare(first, tmp_path / 'A', validation_units=('a:d1', 'b:d2'))
  prepare([source(make(250, 2), 'c')], tmp_path / 'B', validation_share=0.2)
  return tmp_path / 'A', tmp_path / 'B'


def test_a_merged_corpus_holds_all_cells_and_splits(two, tmp_path):
  parts = [corpus.Corpus.open(path) for path in two]
  merged = merging.merge(two, tmp_path / 'C')
  expected = contents(parts[0]) | contents(parts[1])
  assert contents(merged) == expected
  assert not merged.verify()
  assert merged.num_cells('train') == sum(p.num_cells('train') for p in parts)
  for mode in ('released', 'library'):  # medians of all training cells
    supports = [p.medians(mode).support_SV.sum() for p in parts]
    assert merged.medians(mode).support_SV.sum() == sum(supports)


def test_merging_filters_no_cell_again(tmp_path):
  few = make(60, 3)  # fewer genes a cell than prep asks for
  for name in 'AB':
    prepare([source(few, name)], tmp_path / name, validation_share=0)
    few = make(60, 4)
  merged = merging.merge(
    [tmp_path / 'A', tmp_path / 'B'],
    tmp_path / 'C',
    pipeline.PrepareConfig(filters=quality.QualityConfig(min_genes=10_000)),
  )
  assert merged.num_cells('train') == 120


def test_merging_does_not_depend_on_how_cells_were_stored(two, tmp_path):
  once = merging.merge(two, tmp_path / 'C')
  config = pipeline.PrepareConfig(jobs=2, bucket_bytes=20_000)
  again = merging.merge(two, tmp_path / 'D', config)
  assert once.manifest['files'] == again.manifest['files']


def test_copies_across_corpora_are_removed_and_held_out_together(tmp_path):
  matrix, other = many_counts(200, 0), many_counts(200, 1)
  other[:50] = matrix[:50]
  columns = np.arange(matrix.shape[1])
  config = {'vocabulary': 'measured', 'filters': OFF}
  pipeline.prepare(
    [
      wide_source(matrix, columns, 'held'),
      wide_source(many_counts(100, 7), columns, 'rest'),
    ],
    tmp_path / 'A',
    pipeline.PrepareConfig(validation_units=('held',), **config),
  )
  pipeline.prepare(
    [wide_source(other, columns[:1200], 'other')],
    tmp_path / 'B',
    pipeline.PrepareConfig(validation_share=0, **config),
  )
  merged = merging.merge([tmp_path / 'A', tmp_path / 'B'], tmp_path / 'C')
  assert merged.manifest['copies']['removed'] == 50
  assert merged.num_cells('validation') == 350
  assert merged.num_cells('train') == 100
  assert merged.manifest['split']['validation_units'] == ['held+other']


def donors_of(matrix, name, dataset, donors):
  made = wide_source(
    matrix, np.arange(matrix.shape[1]), name, unit='donor', dataset=dataset
  )
  obs = made.obs.assign(donor=np.repeat(donors, len(matrix) // len(donors)))
  return dataclasses.replace(made, obs=obs)


def test_a_unit_of_a_joined_one_is_held_out_with_it(tmp_path):
  first, other = many_counts(100, 0), many_counts(100, 1)
  other[:10] = first[:10]
  config = {'vocabulary': 'measured', 'filters': OFF}
  joined = pipeline.prepare(
    [
      donors_of(first, 'first', 'S', ['d1', 'd2']),
      donors_of(other, 'other', 'T', ['e1']),
    ],
    tmp_path / 'A',
    pipeline.PrepareConfig(validation_share=0, **config),
  )
  names = ['S:d1', 'S:d2', 'T:e1']
  assert joined.manifest['split']['joined_units'] == [names]
  # more cells of the first donor, held out from those of another
  pipeline.prepare(
    [donors_of(many_counts(100, 2), 'later', 'S', ['d1', 'x'])],
    tmp_path / 'B',
    pipeline.PrepareConfig(validation_units=('S:d1',), **config),
  )
  merged = merging.merge([tmp_path / 'A', tmp_path / 'B'], tmp_path / 'C')
  assert merged.manifest['split']['validation_units'] == ['+'.join(names)]
  assert merged.manifest['split']['joined_units'] == [names]
  assert merged.num_cells('train') == 50
  # once more, after it was merged
  pipeline.prepare(
    [donors_of(many_counts(100, 3), 'last', 'T', ['e1', 'y'])],
    tmp_path / 'D',
    pipeline.PrepareConfig(validation_share=0, **config),
  )
  again = merging.merge([tmp_path / 'D', tmp_path / 'C'], tmp_path / 'E')
  assert again.num_cells('train') == 50 + 50
  assert again.num_cells('validation') == merged.num_cells('validation') + 50


def test_a_small_source_is_gathered_in_one_pass(two, tmp_path, monkeypatch):
  (config, _) = sources.expand(sources.SourceConfig(str(two[0])))
  matrix = sources.open_source(config).matrix
  read = type(matrix).read
  passes = []

  def counted(self, first, stop):
    passes.append((first, stop))
    return read(self, first, stop)

  monkeypatch.setattr(type(matrix), 'read', counted)
  whole = matrix.by_rows(str(tmp_path / 'one'))
  assert passes == [(0, matrix.shape[0])]
  # more entries than are held at a time
  monkeypatch.setattr(turning, 'TURN_IN_MEMORY', 16 * matrix.num_entries // 3)
  parts = matrix.by_rows(str(tmp_path / 'parts'))
  assert len(passes) >= 1 + 3
  for part in ('data', 'indices', 'indptr'):
    np.testing.assert_array_equal(getattr(whole, part), getattr(parts, part))


def test_merging_says_what_it_cannot(two, tmp_path):
  with pytest.raises(errors.UserError, match='two corpora or more'):
    merging.merge(two[:1], tmp_path / 'C')
  shutil.copytree(two[0], tmp_path / 'again')
  with pytest.raises(errors.UserError, match='holds the same corpus as'):
    merging.merge([*two, tmp_path / 'again'], tmp_path / 'C')
  with pytest.raises(errors.UserError, match='no corpus here'):
    merging.merge([two[0], tmp_path], tmp_path / 'C')
  halves = make(200, 5)
  halves.X.data += 0.5
  prepare(
    [source(halves, 'f', allow_noninteger=True)],
    tmp_path / 'F',
    validation_share=0,
  )
  with pytest.raises(errors.UserError, match='corrected counts and others'):
    merging.merge([two[0], tmp_path / 'F'], tmp_path / 'C')
  assert not (tmp_path / 'C').exists()


@pytest.mark.parametrize('place', ['A', 'A/inner', '.'])
def test_no_corpus_is_merged_into_itself(two, tmp_path, place):
  before = sorted(os.listdir(tmp_path))
  with pytest.raises(errors.UserError, match='name another folder'):
    merging.merge(
      [tmp_path / 'A', two[1]],
      tmp_path / place,
      pipeline.PrepareConfig(overwrite=True),
    )
  assert sorted(os.listdir(tmp_path)) == before
  assert not corpus.Corpus.open(tmp_path / 'A').verify()
  assert not (tmp_path / 'A' / 'inner').exists()


@pytest.mark.parametrize('kind', ['h5ad', 'arrow'])
def test_a_conversion_replaces_nothing(two, tmp_path, kind, capsys):
  file = tmp_path / 'cells.h5ad'
  file.write_bytes(b'of the user')
  for place, message in (
    (str(file), 'is a file'),
    ('', 'an empty name'),
    (str(two[0]), 'a corpus stays as it is'),
    (f'{two[0]}/inner', 'a corpus stays as it is'),
  ):
    words = ['corpus', 'convert', str(two[0]), '-o', place, '--to', kind]
    assert cli.main(words) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
  assert file.read_bytes() == b'of the user'
  assert os.listdir(tmp_path).count('cells.h5ad') == 1
  assert 'inner' not in os.listdir(two[0])


def test_a_corpus_is_a_source_like_any_other(two, tmp_path):
  made = pipeline.prepare(
    [sources.SourceConfig(path=str(two[0])), source(make(100, 9), 'new')],
    tmp_path / 'C',
    pipeline.PrepareConfig(
      vocabulary='measured', filters=OFF, validation_units=('a:d1',)
    ),
  )
  names = [facts['name'] for facts in made.manifest['sources']]
  assert names == ['a', 'b', 'new']


def test_h5ad_files_of_a_corpus(two, tmp_path, capsys):
  out = tmp_path / 'H'
  assert cli.main(['corpus', 'convert', str(two[0]), '-o', str(out)]) == 0
  assert 'a.h5ad: 300 cells' in capsys.readouterr().out
  expected = contents(corpus.Corpus.open(two[0]))
  seen = 0
  for name in ('a', 'b'):
    adata = anndata.read_h5ad(out / f'{name}.h5ad')
    assert adata.n_vars == GENES
    for i, cell in enumerate(adata.obs_names):
      counts, total, split, unit, _ = expected[name, cell]
      row = adata.X[i]
      assert dict(zip(adata.var_names[row.indices], row.data)) == counts
      assert adata.obs['total'].iloc[i] == total
      assert (adata.obs['split'].iloc[i], adata.obs['unit'].iloc[i]) == (
        split,
        unit,
      )
      assert adata.obs['species'].iloc[i] == ('human', 'mouse')[name == 'b']
      seen += 1
  assert seen == len(expected)
  held = exports.to_h5ad(two[0], str(tmp_path / 'V'), 'validation')
  assert sum(cells for _, cells in held) == sum(
    split == 'validation' for _, _, split, *_ in expected.values()
  )
  with pytest.raises(errors.UserError, match='no split'):
    exports.to_h5ad(two[0], str(tmp_path / 'W'), 'tests')
  with pytest.raises(errors.UserError, match='is there already'):
    exports.to_h5ad(two[0], str(out))


def test_large_counts_are_exact_in_h5ad(tmp_path):
  cells = make(50, 0)
  cells.X = cells.X.astype(np.float64)
  cells.X.data[0] = 2**24 + 1
  prepare([source(cells, 'a')], tmp_path / 'A', validation_share=0)
  ((name, _),) = exports.to_h5ad(tmp_path / 'A', str(tmp_path / 'H'))
  assert int(anndata.read_h5ad(name).X.max()) == 2**24 + 1


def test_a_stopped_conversion_leaves_no_set_of_cells(
  two, tmp_path, monkeypatch
):
  monkeypatch.setattr(exports, '_FILE_CELLS', 180)
  write = exports._write_facts

  def stop(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(exports, '_write_facts', stop)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(KeyboardInterrupt):
    exports.to_arrow(two[0], str(tmp_path / 'R'))
  assert sorted(tmp_path.iterdir()) == before
  monkeypatch.setattr(exports, '_write_facts', write)
  (tmp_path / 'R').mkdir()  # an empty folder is taken
  assert len(exports.to_arrow(two[0], str(tmp_path / 'R'))) == 3
  assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / 'R'])


def test_released_layout_and_back(two, tmp_path, monkeypatch):
  monkeypatch.setattr(exports, '_FILE_CELLS', 180)
  out = str(tmp_path / 'R')
  written = exports.to_arrow(two[0], out)
  assert [cells for _, cells in written] == [180, 180, 140]
  with pa.memory_map(written[0][0]) as file:
    table = pa.ipc.open_stream(file).read_all()
  assert table.column_names == ['input_ids', 'values', 'length', 'species']
  values = np.array(table['values'].to_pylist())
  assert values.shape == (180, 2048)
  assert (np.diff(values, axis=1) <= 0).all()
  state = json.loads((tmp_path / 'R' / 'state.json').read_text())
  assert len(state['_data_files']) == 3
  config = sources.SourceConfig(
    path=out, tokens=f'{out}/tokens.tsv', medians=f'{out}/medians.tsv'
  )
  back = pipeline.prepare(
    [config],
    tmp_path / 'back',
    pipeline.PrepareConfig(
      vocabulary='measured', filters=OFF, validation_share=0, keep_copies=True
    ),
  )
  expected = contents(corpus.Corpus.open(two[0])).values()
  cells = [counts for counts, *_ in contents(back).values()]
  assert sorted(map(repr_of, cells)) == sorted(
    repr_of(counts) for counts, *_ in expected
  )


def repr_of(counts):
  return repr(sorted((gene, int(count)) for gene, count in counts.items()))


def test_quotients_have_medians_of_one(two, tmp_path):
  out = str(tmp_path / 'R')
  exports.to_arrow(two[0], out)
  config = sources.SourceConfig(path=out, tokens=f'{out}/tokens.tsv')
  made = pipeline.prepare(
    [config],
    tmp_path / 'Q',
    pipeline.PrepareConfig(
      vocabulary='measured', filters=OFF, validation_share=0, keep_copies=True
    ),
  )
  assert made.manifest['medians_by'] == 'source'
  assert (made.medians('released').divisor_V(0) == 1).all()
  with pytest.raises(errors.UserError, match='no medians of mode'):
    made.medians('library')


def test_the_command_has_help_for_every_action(capsys):
  for action in ('verify', 'stats', 'merge', 'convert'):
    with pytest.raises(SystemExit) as ended:
      cli.main(['corpus', action, '--help'])
    assert ended.value.code == 0
  assert 'GeneCompass released' in capsys.readouterr().out
