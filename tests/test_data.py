"""Batches: pure functions of their number, the same over any hosts."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest

from genecompass_jax import (
  corpus,
  corpus_writer,
  data,
  encoding,
  errors,
  masking,
  medians,
  reading,
  rows,
  tie_ranking,
  vocabulary,
)

MAX_GENES = 100
ENCODING = encoding.EncodingConfig(max_genes=MAX_GENES)
PACKED = data.DataConfig(
  rows_per_batch=16, slots=256, buckets=(32, 64, 128), seed=5
)
BUCKETS = dataclasses.replace(PACKED, layout='buckets')
SOURCES = ('atlas', 'panel', 'deep')


def ragged(rng, num_cells, num_rows, mean):
  """Cells with ties, of very different lengths, one of them with a big count."""
  lengths = np.clip(rng.lognormal(np.log(mean), 0.6, num_cells), 3, num_rows)
  lengths = lengths.astype(np.int64)
  starts = np.concatenate([[0], np.cumsum(lengths)])
  gene_rows = [np.sort(rng.choice(num_rows, n, replace=False)) for n in lengths]
  counts = rng.geometric(0.6, starts[-1]).astype(np.uint32)
  counts[7] = 70_000
  totals = np.add.reduceat(counts, starts[:-1]).astype(np.float64)
  return encoding.RaggedCells(
    np.concatenate(gene_rows).astype(np.uint16), counts, starts, totals
  )


def write_corpus(path, sizes=(1300, 700), orthologues='one2one'):
  """A corpus of two species in the real format, with a validation split."""
  rng = np.random.default_rng(1)
  table = vocabulary.Vocabulary.default().genes
  keep = np.zeros(len(table.gene_ids), bool)
  for species in range(2):
    keep[np.flatnonzero(table.species_G == species)[:400]] = True
  vocab = vocabulary.Vocabulary.from_genes(
    table.subset(keep), orthologues=orthologues
  )
  measured = {s: np.ones((len(SOURCES), 400), bool) for s in range(2)}
  for species in range(2):
    measured[species][1, 200:] = False
  with corpus_writer.CorpusWriter(
    path,
    vocab,
    sources=[{'name': name} for name in SOURCES],
    measured=measured,
    categories={'source': SOURCES, 'unit': ('u',)},
  ) as writer:
    for split, share in (('train', 1), ('validation', 4)):
      for species, size in enumerate(sizes):
        num = size // share
        cells = ragged(rng, num, 200, 50)
        writer.store(split, species).append(
          cells,
          {
            'source': rng.integers(0, len(SOURCES), num).astype(np.int32),
            'unit': np.zeros(num, np.int32),
            'source_row': np.arange(num),
          },
          [f'{split}-{species}-{i}' for i in range(num)],
        )
    for mode in encoding.MODES:
      writer.write_medians(
        medians.Medians(
          mode,
          rng.choice([1.0, 2.0], (2, vocab.size)),
          np.full((2, vocab.size), 1000, np.int64),
          vocab.is_shared_V(),
        )
      )
    writer.commit({'seed': 0})
  return corpus.Corpus.open(path)


@pytest.fixture(scope='module')
def two_species(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus') / 'c')


def leaves(host_batch):
  batch = host_batch.batch
  arrays = [
    getattr(batch.cells, f.name) for f in dataclasses.fields(batch.cells)
  ]
  arrays += [
    getattr(batch, f.name)
    for f in dataclasses.fields(batch)
    if f.name != 'cells'
  ]
  return [*arrays, host_batch.cell_index_BS]


def assert_same(a, b):
  assert (a.index, a.num_dropped_picks) == (b.index, b.num_dropped_picks)
  for x, y in zip(leaves(a), leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def cells_of(host_batch):
  """Corpus cell -> its slots, with labels, as a batch shows them."""
  batch, found = host_batch.batch, {}
  cells = batch.cells
  for row, segment in np.argwhere(host_batch.cell_index_BS >= 0):
    inside = np.flatnonzero(cells.segments_BL[row] == segment + 1)
    assert (np.diff(inside) == 1).all()
    used = (batch.id_weights_BK[row] > 0) & np.isin(
      batch.masked_slots_BK[row], inside
    )
    found[int(host_batch.cell_index_BS[row, segment])] = (
      cells.gene_ids_BL[row, inside],
      cells.values_BL[row, inside],
      cells.positions_BL[row, inside],
      cells.species_BL[row, inside],
      cells.is_cls_BL[row, inside],
      batch.masked_slots_BK[row, used] - inside[0],
      batch.id_labels_BK[row, used],
      batch.value_labels_BK[row, used],
    )
  return found


@pytest.mark.parametrize('config', [PACKED, BUCKETS], ids=lambda c: c.layout)
def test_a_batch_is_a_function_of_its_number(two_species, config):
  loader = data.Loader(two_species, ENCODING, config)
  last = loader.batches_per_epoch() + 2
  forward = {e: loader.batch(e) for e in (0, 1, 5, last)}
  fresh = data.Loader(two_species, ENCODING, config)
  for e in (last, 5, 0, 1):
    assert_same(forward[e], fresh.batch(e))
  assert loader.locate(last) == (1, 2)


@pytest.mark.parametrize('config', [PACKED, BUCKETS], ids=lambda c: c.layout)
def test_the_iterator_gives_the_batches_from_any_start(two_species, config):
  loader = data.Loader(two_species, ENCODING, config)
  start = loader.batches_per_epoch() - 3  # over the end of an epoch
  iterator = loader.iterate(start, threads=3)
  fresh = data.Loader(two_species, ENCODING, config)
  for e, batch in enumerate(itertools.islice(iterator, 8), start):
    assert_same(batch, fresh.batch(e))
  iterator.close()


@pytest.mark.parametrize('config', [PACKED, BUCKETS], ids=lambda c: c.layout)
@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_divide_the_same_global_batch(two_species, config, hosts):
  whole = data.Loader(two_species, ENCODING, config)
  parts = [
    data.Loader(two_species, ENCODING, config, rows=rows)
    for rows in np.split(np.arange(config.rows_per_batch), hosts)
  ]
  for e in (0, 3, whole.batches_per_epoch()):
    expected = whole.batch(e)
    given = [part.batch(e) for part in parts]
    for i, array in enumerate(leaves(expected)):
      np.testing.assert_array_equal(
        np.concatenate([leaves(part)[i] for part in given]), array
      )
    assert expected.num_dropped_picks == sum(p.num_dropped_picks for p in given)


@pytest.mark.parametrize('config', [PACKED, BUCKETS], ids=lambda c: c.layout)
def test_any_rows_of_a_batch_can_be_asked_for(two_species, config):
  whole = data.Loader(two_species, ENCODING, config)
  each = config.rows_per_batch // whole.streams
  some = [0, *range(each + each // 2, 3 * each), config.rows_per_batch - 1]
  part = data.Loader(two_species, ENCODING, config, rows=some)
  assert len(part._local) == len({row // each for row in some})  # reads those
  for e in (0, 3, whole.batches_per_epoch()):
    for array, expected in zip(leaves(part.batch(e)), leaves(whole.batch(e))):
      np.testing.assert_array_equal(array, expected[some])
  for wrong in ([], [1, 1], [2, 1]):
    with pytest.raises(ValueError, match='must ascend'):
      data.Loader(two_species, ENCODING, config, rows=wrong)


def test_batches_that_are_left_out_are_not_made(two_species, monkeypatch):
  loader = data.Loader(two_species, ENCODING, PACKED)
  made = []
  batch = loader._batch

  def remember(number):
    made.append(number)
    return batch(number)

  monkeypatch.setattr(loader, '_batch', remember)
  skip = [range(9, 10), range(3), range(5, 7), range(6, 8)]
  for start, expected in (
    (0, [3, 4, 8, 10, 11]),
    (2, [3, 4, 8, 10, 11]),
    (6, [8, 10, 11, 12, 13]),
    (10, [10, 11, 12, 13, 14]),
  ):
    iterator = loader.iterate(start, skip=skip)
    given = [b.index for b in itertools.islice(iterator, 5)]
    iterator.close()
    assert given == expected
  assert not {*made} & {*range(3), 5, 6, 7, 9}


@pytest.mark.parametrize('config', [PACKED, BUCKETS], ids=lambda c: c.layout)
def test_an_epoch_shows_every_cell_once(two_species, config):
  loader = data.Loader(two_species, ENCODING, config)
  seen = []
  for e in range(loader.batches_per_epoch()):
    index_BS = loader.batch(e).cell_index_BS
    seen += index_BS[index_BS >= 0].tolist()
  assert len(set(seen)) == len(seen)
  assert len(seen) > 0.9 * two_species.num_cells('train')
  assert len(set(seen) & set(range(1300, 2000))) > 600  # mouse


def test_content_and_masks_do_not_depend_on_packing(two_species):
  other = dataclasses.replace(PACKED, slots=384, rows_per_batch=8)
  pools = []
  for config in (PACKED, BUCKETS, other):
    loader = data.Loader(two_species, ENCODING, config)
    found = {}
    for e in range(min(loader.batches_per_epoch(), 60)):
      found |= cells_of(loader.batch(e))
    pools.append(found)
  common = set.intersection(*map(set, pools))
  assert len(common) > 100
  for cell in common:
    for a, b, c in zip(*(found[cell] for found in pools)):
      np.testing.assert_array_equal(a, b)
      np.testing.assert_array_equal(a, c)


def test_a_batch_holds_what_encoding_and_masking_give(two_species):
  host_batch = data.Loader(two_species, ENCODING, PACKED).batch(2)
  vocab, divisors = two_species.vocabulary, two_species.medians('released')
  checked = 0
  for cell, shown in cells_of(host_batch).items():
    species = int(cell >= 1300)
    store = two_species.store('train', species)
    number = cell - 1300 * species
    block, place = divmod(number, store.block_cells)
    (raw,) = store.read_blocks([block])
    encoder = encoding.CellEncoder(
      ENCODING,
      vocab.tokens(two_species.gene_ids(species)),
      divisors.divisor_V(species),
    )
    all_cells = encoder.encode(raw, seed=5, epoch=0)
    cut = slice(*all_cells.starts_C1[place : place + 2])
    one = encoding.EncodedCells(
      all_cells.gene_ids_N[cut],
      all_cells.values_N[cut],
      np.array([0, cut.stop - cut.start]),
      all_cells.keys_C[place : place + 1],
      all_cells.num_genes_C[place : place + 1],
    )
    source = store.obs('source')[number]
    tokens_R = vocab.tokens(two_species.gene_ids(species))
    masked = masking.mask_cells(
      one,
      np.array([cell]),
      config=PACKED.mask,
      seed=5,
      epoch=0,
      random_tokens=np.unique(tokens_R[store.measured_SrcR[source]]),
      vocabulary_size=vocab.size,
    )
    (
      ids,
      values,
      positions,
      of_species,
      is_cls,
      slots,
      id_labels,
      value_labels,
    ) = shown
    np.testing.assert_array_equal(ids, [0, *masked.gene_ids_N])
    np.testing.assert_array_equal(
      values, np.append(np.float32(0), masked.values_N)
    )
    np.testing.assert_array_equal(positions[1:], np.arange(len(ids) - 1))
    assert (of_species == species).all()
    np.testing.assert_array_equal(is_cls, np.arange(len(ids)) == 0)
    picks = np.flatnonzero(masked.is_masked_N)
    np.testing.assert_array_equal(slots, picks + 1)
    np.testing.assert_array_equal(id_labels, one.gene_ids_N[picks])
    np.testing.assert_array_equal(value_labels, one.values_N[picks])
    assert (values[slots] == masking.HIDDEN_VALUE).all()
    checked += 1
  assert checked > 20


def test_padding_slots_are_empty(two_species):
  for config in (PACKED, BUCKETS):
    batch = data.Loader(two_species, ENCODING, config).batch(0).batch
    cells = batch.cells
    is_padding = cells.segments_BL == 0
    assert is_padding.any()
    for array in (cells.gene_ids_BL, cells.values_BL, cells.species_BL,
                  cells.positions_BL, cells.is_cls_BL):  # fmt: skip
      assert not array[is_padding].any()
    is_unused = batch.id_weights_BK == 0
    for array in (batch.masked_slots_BK, batch.id_labels_BK,
                  batch.value_labels_BK, batch.value_weights_BK):  # fmt: skip
      assert not array[is_unused].any()


def test_shapes_are_static_and_few(two_species):
  for config in (PACKED, BUCKETS):
    loader = data.Loader(two_species, ENCODING, config)
    shapes = set()
    for e in range(loader.batches_per_epoch()):
      batch = loader.batch(e).batch
      shapes.add((batch.cells.gene_ids_BL.shape, batch.masked_slots_BK.shape))
    assert shapes <= {((16, s), (16, k)) for s, k in loader.shapes}
  assert len(shapes) == 3


def test_picks_beyond_k_are_given_back_and_counted(two_species, monkeypatch):
  full = data.Loader(two_species, ENCODING, PACKED).batch(0)
  monkeypatch.setattr(data.DataConfig, 'num_masked', lambda self, slots: 16)
  cut = data.Loader(two_species, ENCODING, PACKED).batch(0)
  picked = int(full.batch.id_weights_BK.sum())
  kept = int(cut.batch.id_weights_BK.sum())
  assert full.num_dropped_picks == 0
  assert cut.num_dropped_picks == picked - kept > 0
  for row in range(16):
    dropped = np.setdiff1d(
      full.batch.masked_slots_BK[row], cut.batch.masked_slots_BK[row]
    )
    labels = dict(
      zip(full.batch.masked_slots_BK[row], full.batch.id_labels_BK[row])
    )
    for slot in dropped[dropped > 0]:
      assert cut.batch.cells.gene_ids_BL[row, slot] == labels[slot]
      assert cut.batch.cells.values_BL[row, slot] > 0


def test_k_has_room_for_six_deviations():
  config = data.DataConfig()
  assert [config.num_masked(s) for s in (64, 256, 2304)] == [32, 80, 464]


def test_weights_thin_and_repeat(two_species):
  config = dataclasses.replace(
    PACKED, source_weights=(('panel', 0.25),), species_weights=(('mouse', 2.0),)
  )
  loader = data.Loader(two_species, ENCODING, config)
  source_C = np.concatenate(
    [two_species.store('train', s).obs('source') for s in range(2)]
  )
  times = np.zeros(2000, int)
  epochs = 4
  e = 0
  masks = {}
  while loader.locate(e)[0] < epochs:
    batch = loader.batch(e)
    index_BS = batch.cell_index_BS
    times += np.bincount(index_BS[index_BS >= 0], minlength=2000)
    if loader.locate(e)[0] == 0:
      for cell, shown in cells_of(batch).items():
        masks.setdefault(cell, []).append(shown)
    e += 1
  is_mouse, is_panel = np.arange(2000) >= 1300, source_C == 1
  for group, weight in (
    (~is_mouse & ~is_panel, 1.0), (~is_mouse & is_panel, 0.25),
    (is_mouse & ~is_panel, 2.0), (is_mouse & is_panel, 0.5),
  ):  # fmt: skip
    assert times[group].max() == epochs * weight
    assert times[group].mean() > 0.88 * epochs * weight
  twice = [shown for shown in masks.values() if len(shown) == 2]
  assert len(twice) > 200
  differ = [
    not np.array_equal(a[5], b[5]) or not np.array_equal(a[6], b[6])
    for a, b in twice
  ]
  assert np.mean(differ) > 0.95


@pytest.mark.parametrize('hosts', [1, 2])
def test_evaluation_shows_each_cell_once_with_fixed_masks(two_species, hosts):
  def run(config):
    parts = [
      list(data.evaluation_batches(two_species, ENCODING, config, rows=rows))
      for rows in np.split(np.arange(config.rows_per_batch), hosts)
    ]
    found, order = {}, []
    for same in zip(*parts, strict=True):
      assert len({b.batch.cells.gene_ids_BL.shape for b in same}) == 1
      for batch in same:
        found |= cells_of(batch)
        index = batch.cell_index_BS
        order += index[index >= 0].tolist()
    return found, order, parts[-1][-1]

  found, order, last = run(BUCKETS)
  assert sorted(order) == list(range(325 + 175))
  assert (last.cell_index_BS[-1] == -1).all()
  assert last.batch.id_weights_BK[-1].sum() == 0
  again, _, _ = run(dataclasses.replace(PACKED, rows_per_batch=24))
  for cell, shown in found.items():
    for a, b in zip(shown, again[cell]):
      np.testing.assert_array_equal(a, b)


def test_evaluation_on_a_spread_part(two_species):
  batches = data.evaluation_batches(
    two_species, ENCODING, BUCKETS, max_cells=50
  )
  index = np.concatenate([b.cell_index_BS.ravel() for b in batches])
  cells = np.sort(index[index >= 0])
  np.testing.assert_array_equal(cells, np.arange(50) * 10)


def test_lengths_are_counted_once_where_tokens_are_shared(
  tmp_path, caplog, monkeypatch
):
  shared = write_corpus(tmp_path / 'c', (200, 200))
  drop = shared.vocabulary.restrict(
    shared.vocabulary.genes.gene_ids[:300]
  )  # rows that are not in the vocabulary: stored lengths do not hold
  chosen = medians.Medians(
    'released',
    np.ones((2, drop.size)),
    np.full((2, drop.size), 1000, np.int64),
    drop.is_shared_V(),
  )
  config = dataclasses.replace(BUCKETS, rows_per_batch=8)
  with caplog.at_level(logging.INFO):
    first = data.Loader(
      shared, ENCODING, config, vocabulary=drop, medians=chosen
    )
    assert 'counting encoded genes' in caplog.text
    caplog.clear()
    second = data.Loader(
      shared, ENCODING, config, vocabulary=drop, medians=chosen
    )
    assert 'counting encoded genes' not in caplog.text
  assert_same(first.batch(0), second.batch(0))
  kept = list((tmp_path / 'c' / 'cache').iterdir())
  assert len(kept) == 2
  for file in kept:  # another corpus' lengths under this name
    lengths = np.load(file)
    np.save(file, np.maximum(lengths, 1) + np.uint16(1))
  third = data.Loader(shared, ENCODING, config, vocabulary=drop, medians=chosen)
  with pytest.raises(errors.UserError, match='cache'):
    third.batch(0)
  assert not shared.verify()


def test_cell_batch_rows(two_species):
  store = two_species.store('train', 0)
  (raw,) = store.read_blocks([0])
  encoder = encoding.CellEncoder(
    ENCODING,
    two_species.vocabulary.tokens(two_species.gene_ids(0)),
    two_species.medians('released').divisor_V(0),
  )
  cells = encoder.encode(raw)
  num = cells.num_cells
  batch = rows.cell_batch_rows(cells, np.zeros(num, int), 128, num + 2)
  for c in range(num):
    inside = slice(*cells.starts_C1[c : c + 2])
    n = inside.stop - inside.start
    np.testing.assert_array_equal(
      batch.gene_ids_BL[c, 1 : n + 1], cells.gene_ids_N[inside]
    )
    np.testing.assert_array_equal(batch.segments_BL[c], np.arange(128) <= n)
    assert not batch.gene_ids_BL[c, n + 1 :].any()
  assert not batch.segments_BL[num:].any()
  with pytest.raises(ValueError, match='do not fit'):
    rows.cell_batch_rows(cells, np.zeros(num, int), 32)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({'rows_per_batch': 12}, 'multiple'),
    ({'slots': 200}, '128'),
    ({'layout': 'dense'}, 'layout'),
    ({'buckets': (64, 32)}, 'ascending'),
    ({'source_weights': (('a', -1.0),)}, 'weight'),
  ],
)
def test_config_mistakes_are_one_line(change, match):
  with pytest.raises(errors.UserError, match=match) as caught:
    dataclasses.replace(PACKED, **change)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('change', 'arguments', 'match'),
  [
    ({}, {'split': 'test'}, 'split'),
    ({'rows_per_batch': 4096}, {}, 'rows_per_batch'),
    ({'source_weights': (('nobody', 0.5),)}, {}, 'nobody'),
    ({'layout': 'buckets', 'buckets': (32, 64)}, {}, 'slots'),
  ],
)
def test_corpus_mistakes_are_one_line(two_species, change, arguments, match):
  config = dataclasses.replace(PACKED, **change)
  with pytest.raises(errors.UserError, match=match) as caught:
    data.Loader(two_species, ENCODING, config, **arguments)
  assert '\n' not in str(caught.value)


def test_describe_says_what_was_planned(two_species):
  config = dataclasses.replace(PACKED, streams=16)
  small = dataclasses.replace(config, rows_per_batch=64, streams=64)
  text = data.Loader(two_species, ENCODING, config).describe()
  assert '2000 cells' in text and 'real tokens' in text and '16 streams' in text
  assert (
    '16 streams (asked 64)'
    in data.Loader(two_species, ENCODING, small).describe()
  )


def test_a_read_that_failed_is_tried_again(two_species, monkeypatch):
  expected = data.Loader(two_species, ENCODING, PACKED).batch(0)
  loader = data.Loader(two_species, ENCODING, PACKED)
  read, is_down = corpus.Store.read_blocks, [True]

  def flaky(store, blocks):
    if is_down[0]:
      raise errors.RetryableError('network')
    return read(store, blocks)

  monkeypatch.setattr(corpus.Store, 'read_blocks', flaky)
  with pytest.raises(errors.RetryableError):
    loader.batch(0)
  is_down[0] = False
  assert_same(loader.batch(0), expected)


def weighted_corpus(path, weights):
  """A corpus of two species whose manifest has weights by 'unit'."""
  built = write_corpus(path, (300, 200))
  manifest = {**built.manifest, 'weights': weights}
  return dataclasses.replace(built, manifest=manifest)


def test_weights_of_the_corpus_multiply_the_others(tmp_path):
  weights = {
    'by': ['source', 'unit'],
    'power': 0.5,
    'kinds': [
      {'values': ['atlas', 'u'], 'cells': 1, 'weight': 0.5},
      {'values': ['deep', 'u'], 'cells': 1, 'weight': 3.0},
    ],  # 'panel' is not named: as it is
  }
  built = weighted_corpus(tmp_path / 'c', weights)
  config = dataclasses.replace(
    PACKED,
    rows_per_batch=4,
    slots=128,
    streams=2,
    corpus_weights=True,
    species_weights=(('mouse', 2.0),),
  )
  loader = data.Loader(built, ENCODING, config)
  source_C = np.concatenate(
    [built.store('train', s).obs('source') for s in range(2)]
  )
  times = np.zeros(500, int)
  e = 0
  while loader.locate(e)[0] < 2:
    index_BS = loader.batch(e).cell_index_BS
    times += np.bincount(index_BS[index_BS >= 0], minlength=500)
    e += 1
  weight_C = np.array([0.5, 1.0, 3.0])[source_C] * np.repeat(
    [1.0, 2.0], [300, 200]
  )
  assert (times <= np.ceil(2 * weight_C) + 1e-9).all()
  assert times.sum() > 0.95 * 2 * weight_C.sum()
  assert data.Loader(
    built, ENCODING, config
  ).cells_per_epoch() == pytest.approx(weight_C.sum(), rel=0.05)


def test_a_corpus_without_weights_says_so(two_species):
  config = dataclasses.replace(PACKED, corpus_weights=True)
  with pytest.raises(errors.UserError, match='--weigh_by') as caught:
    data.Loader(two_species, ENCODING, config)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('mode', encoding.MODES)
@pytest.mark.parametrize('policy', masking.POLICIES)
@pytest.mark.parametrize('ties', encoding.TIES)
def test_one_pass_gives_the_bytes_of_the_steps(
  two_species, mode, policy, ties, monkeypatch
):
  config = dataclasses.replace(
    PACKED,
    mask=masking.MaskConfig(policy=policy),
    source_weights=(('deep', 2.0),),  # further copies of cells
  )
  encode = dataclasses.replace(ENCODING, mode=mode, ties=ties)
  # Of a cell beyond max_genes, of one with a huge count, and of few labels.
  encode = dataclasses.replace(encode, max_genes=60)
  monkeypatch.setattr(data.DataConfig, 'num_masked', lambda self, slots: 32)
  for layout in (config, dataclasses.replace(config, layout='buckets')):
    loader = data.Loader(two_species, encode, layout)
    at_once = [loader.batch(e) for e in range(0, 60, 3)]
    drops = any(b.num_dropped_picks for b in at_once)
    assert drops == (layout is config)
    monkeypatch.setattr(loader._split, 'batch', loader._split.batch_in_steps)
    for batch in at_once:
      assert_same(batch, loader.batch(batch.index))


def test_few_and_many_quotients_rank_alike():
  rng = np.random.default_rng(3)
  work = tie_ranking.workspace(3000)
  done = []
  for n, distinct in ((0, 1), (1, 1), (2, 1), (900, 1), (1500, 40), (2000, 127),
                      (3000, 128), (500, 129), (400, 300)):  # fmt: skip
    each_d = rng.gamma(1, 2, distinct)[:n]
    quotient_n = (
      np.r_[each_d, rng.choice(each_d, n - len(each_d))] if n else each_d
    )
    hash_n = rng.integers(0, 1 << 64, n, np.uint64)
    hash_n[: n // 3] |= np.uint64(((1 << 40) - 1) << 24)  # equal upper bits
    hash_n = rng.permutation(hash_n)
    words_n = np.zeros(n + 1, np.uint64)
    value_d = np.zeros(tie_ranking.MOST_DISTINCT, np.float32)
    fits = tie_ranking.rank(n, quotient_n, hash_n, words_n, *work, value_d)
    done.append(fits)
    assert not work[-1][:, 0].any()
    if fits:
      place_n = (words_n[:n] & tie_ranking.PLACE_MASK).astype(np.int64)
      np.testing.assert_array_equal(place_n, np.lexsort((hash_n, -quotient_n)))
      group_n = (words_n[:n] >> tie_ranking.GROUP_SHIFT).astype(np.int64)
      np.testing.assert_allclose(
        value_d[group_n], np.log2(1 + quotient_n[place_n]), rtol=1e-6
      )
  assert done == [True] * 7 + [False] * 2


def test_corrected_counts_and_unaligned_runs_are_read_alike(two_species):
  split = reading.Split(two_species, ENCODING, 'train')
  numbers = np.r_[3:40, 1301:1340, 700:760]
  whole = split.read(numbers).cells
  some = split.read(np.r_[numbers[:-2], numbers[-1]]).cells  # with a gap
  for c in range(len(numbers) - 2):
    a, b = (slice(*cells.starts_C1[c : c + 2]) for cells in (whole, some))
    np.testing.assert_array_equal(whole.gene_rows_N[a], some.gene_rows_N[b])
    np.testing.assert_array_equal(whole.counts_N[a], some.counts_N[b])
