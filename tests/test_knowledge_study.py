"""The study of knowledge: its statistics, its materials, and a toy of it."""

import json
import math
import pathlib
import runpy

import numpy as np
import pytest

from experiments.knowledge_study import (
  arms,
  config as config_lib,
  inference,
  materials,
  real_cells,
  registration,
  results,
  runs as runs_lib,
  scores,
  settings as settings_lib,
  study,
)
from genecompass_jax import (
  corpus,
  errors,
  metrics,
  paths,
  prior_tables,
  simulate,
)

SMOKE = settings_lib.SMOKE


def draw(rng, seeds, units, mean, by_seed, by_unit, rest):
  """Differences with a spread of their own by seed and by unit."""
  return (
    mean
    + by_seed * rng.standard_normal((seeds, 1))
    + by_unit * rng.standard_normal((1, units))
    + rest * rng.standard_normal((seeds, units))
  )


@pytest.mark.parametrize(
  'seeds, units, by_seed, by_unit, rest',
  [
    (5, 12, 1.0, 0.2, 0.5),
    (3, 12, 1.0, 1.0, 0.5),
    (12, 6, 0.2, 1.0, 0.5),
    (5, 12, 0.0, 0.0, 1.0),
  ],
)
def test_intervals_hold_what_they_say(seeds, units, by_seed, by_unit, rest):
  rng = np.random.default_rng(0)
  inside, false = 0, 0
  for _ in range(300):
    found = inference.interval(
      draw(rng, seeds, units, 0.7, by_seed, by_unit, rest), draws=300
    )
    inside += found.low <= 0.7 <= found.high
    none = inference.interval(
      draw(rng, seeds, units, 0.0, by_seed, by_unit, rest), draws=300
    )
    false += none.p < 0.05
  # 95 % +- 3 standard errors; wide where only the rest varies, as is known.
  assert inside / 300 > 0.91
  assert false / 300 < 0.09


def test_an_interval_is_centred_and_narrows_with_seeds():
  rng = np.random.default_rng(1)
  few = inference.interval(draw(rng, 4, 12, -1.0, 0.3, 0.1, 0.1))
  many = inference.interval(draw(rng, 40, 12, -1.0, 0.3, 0.1, 0.1))
  assert few.low < few.mean < few.high
  assert (few.low + few.high) / 2 == pytest.approx(few.mean)
  assert many.high - many.low < few.high - few.low
  assert many.p < 1e-6


def test_one_seed_or_few_units_give_no_verdict():
  one = inference.interval(np.full((1, 12), -1.0))
  assert math.isinf(one.low) and one.p == 1.0
  assert inference.verdict(one, 0.1) == inference.NO_VERDICT
  few = inference.interval(
    draw(np.random.default_rng(0), 9, 5, -1, 0.1, 0.1, 0.1)
  )
  assert inference.verdict(few, 0.1) == inference.NO_VERDICT


def test_a_missing_pair_is_refused():
  difference_SU = np.zeros((3, 7))
  difference_SU[1, 2] = np.nan
  with pytest.raises(ValueError, match='whole'):
    inference.interval(difference_SU)


def test_equal_runs_differ_by_nothing():
  found = inference.interval(np.zeros((3, 7)))
  assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
  assert inference.verdict(found, 0.01) == inference.EQUIVALENT


def test_holm_is_the_published_example():
  assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
    [0.03, 0.06, 0.06, 0.02]
  )
  assert inference.holm([0.9, 0.8]) == [1.0, 1.0]
  assert inference.holm([]) == []


def at(low, high, p):
  return inference.Interval((low + high) / 2, low, high, p, 5, 12)


@pytest.mark.parametrize(
  'low, high, p, expected',
  [
    (-0.05, -0.02, 0.001, inference.HELPS),
    (-0.008, -0.002, 0.001, inference.HELPS + inference.LESS),
    (0.02, 0.05, 0.001, inference.HARMS),
    (-0.004, 0.006, 0.6, inference.EQUIVALENT),
    (-0.02, 0.006, 0.2, inference.UNDERPOWERED),
    (-0.008, -0.002, 0.2, inference.EQUIVALENT),  # p after Holm
    (-0.05, -0.02, 0.06, inference.UNDERPOWERED),  # p after Holm
  ],
)
def test_no_needs_the_interval_inside_the_margin(low, high, p, expected):
  assert inference.verdict(at(low, high, p), 0.01) == expected


def test_an_effect_is_said_with_its_size_and_where_it_is():
  small, large = at(-0.008, -0.002, 0.01), at(-0.03, -0.002, 0.01)
  helps = inference.HELPS
  assert inference.verdict(small, 0.01) == helps + inference.LESS
  studies = (-0.02, -0.01, 0.001)
  assert inference.verdict(large, 0.01, clusters=studies[:2]) == helps
  assert (
    inference.verdict(large, 0.01, clusters=studies) == helps + inference.MIXED
  )
  harms = at(0.002, 0.03, 0.01)
  assert inference.verdict(harms, 0.01, clusters=(0.01,)) == inference.HARMS
  assert results.cluster('human/atlas:human_study2_donor1') == (
    'human/atlas:human_study2'
  )


def test_a_study_whose_own_controls_fail_cannot_answer():
  helps, less = at(-0.05, -0.03, 0.001), at(-0.03, -0.01, 0.01)
  little, none = at(-0.02, 0.005, 0.1), at(-0.006, 0.006, 0.9)
  good = {0.0: none, 0.25: little, 0.5: less, 1.0: helps}
  assert inference.controls(good, 0.005, 0.01)[0] is True
  for change, word in (
    ({1.0: at(-0.05, 0.01, 0.2)}, 'no effect at fidelity 1'),
    ({0.0: at(-0.014, -0.001, 0.01)}, 'an effect at fidelity 0'),
    ({0.25: at(-0.04, -0.02, 0.01)}, 'not monotone'),
  ):
    ok, why = inference.controls({**good, **change}, 0.005, 0.01)
    assert ok is False
    assert inference.CANNOT in why and word in why
  # An effect that does not matter is none.
  small = {**good, 0.0: at(-0.004, -0.001, 0.01)}
  assert inference.controls(small, 0.005, 0.01)[0] is True
  # Means that the seeds cannot tell apart may lie in either order.
  near = {**good, 0.25: at(-0.026, -0.017, 0.01), 0.5: at(-0.03, -0.009, 0.01)}
  assert inference.controls(near, 0.005, 0.01)[0] is True
  assert inference.controls(near, 0.001, 0.01)[0] is False
  ok, why = inference.controls(
    {k: v for k, v in good.items() if k != 0.5}, 0.005, 0.01
  )
  assert ok is None and '0.5' in why


def test_power_is_that_of_the_paired_t_test():
  # The textbook: an effect of one standard deviation takes 10 pairs, of half
  # a one 34 (alpha 0.05 on both sides, power 0.8).
  assert inference.seeds_needed(1.0, 1.0) == 10
  assert inference.seeds_needed(0.5, 1.0) == 34
  assert inference.seeds_needed(0.001, 1.0, most=50) is None
  effect = inference.smallest_effect(1.0, 10)
  assert inference.power(effect, 1.0, 10) == pytest.approx(0.8, abs=1e-6)
  assert inference.seeds_needed(0.01, 0.0) == 2


def test_knowledge_in_cells_is_read_off_the_curve():
  cells = [1024, 4096, 16384, 65536]
  without = [10 - math.log2(n) / 4 for n in cells]
  with_it = [10 - math.log2(2 * n) / 4 for n in cells]
  worth = inference.worth(cells, with_it, without)
  assert [x for _, x in worth[:3]] == pytest.approx([2, 2, 2], rel=1e-6)
  assert worth[3] == ('>', 1.0)  # beyond the curve
  sign, x = inference.worth(cells, [99] * 4, without)[1]
  assert sign == '<' and x == pytest.approx(0.25)
  # A curve that rises somewhere is read as its falling fit.
  bumpy = inference.worth(cells, [5, 4, 3, 2], [5, 3, 4, 2])
  assert all(np.isfinite(x) for _, x in bumpy)


def test_average_precision_by_hand():
  score = np.array([0.9, 0.8, 0.7, 0.6])
  truth = np.array([True, False, True, False])
  assert scores.average_precision(score, truth) == pytest.approx(
    (1 + 2 / 3) / 2
  )
  # Of equal scores the order of genes says nothing.
  for order in ([0, 1, 2, 3], [1, 3, 0, 2]):
    assert scores.average_precision(np.ones(4), truth[order]) == 0.5
  tied = scores.average_precision(np.array([2.0, 1, 1, 1]), truth)
  assert tied == pytest.approx((1 + 2 / 4) / 2)


def test_orthologues_are_held_against_genes_of_their_decile(corpora):
  """Vectors that hold the decile alone find no orthologue."""
  atlas = simulate.Atlas(SMOKE.atlas)
  opened = corpora[1]
  support_G = scores.support(opened, atlas)
  assert min(support_G.values()) >= 0 and max(support_G.values()) > 32
  pairs = {
    mouse: atlas.genes[0].gene_ids[h]
    for mouse, h in zip(atlas.genes[1].gene_ids, atlas.genes[1].human_R)
    if h >= 0
  }
  rng = np.random.default_rng(0)
  level = {g: np.log1p(n) for g, n in support_G.items()}
  noise = {g: rng.normal(size=8) for g in support_G}
  own = {
    g: noise[pairs.get(g, g)] for g in support_G if pairs.get(g, g) in noise
  }
  for vectors, low, high in (
    (own, 0.99, 1.0),
    (noise, 0.2, 0.8),
    ({g: np.array([1.0, level[g]]) for g in support_G}, 0.2, 0.8),
    ({g: np.ones(3) for g in support_G}, 0.5, 0.5),
  ):
    found = scores.recovered(vectors, opened.vocabulary, atlas, (), support_G)
    assert found['edges'] == {}
    wins = list(found['orthologues'].values())
    assert len(wins) >= 4
    assert low <= np.mean(wins) <= high
  for gene in found['orthologues']:
    token = opened.vocabulary.tokens([gene])[0]
    partners = [m for m, h in pairs.items() if h == gene]
    assert any(opened.vocabulary.tokens([m])[0] != token for m in partners)


@pytest.mark.slow  # the toy study takes a minute
def test_edges_are_the_gain_over_what_the_tables_hold(toy):
  run = settings_lib.Run('primary', 'all', '192', 0)
  score = results.load(toy, [run], SMOKE)['all', '192', 0]
  gains = results.by_unit(score, results.EDGES)
  assert gains and set(gains) == set(score['genes']['edges'])
  for tf, gain in gains.items():
    alone = score['tables_alone']['edges'].get(
      tf, score['genes']['edges_chance'][tf]
    )
    assert gain == score['genes']['edges'][tf] - alone
  diff, seeds, units = results.differences(
    {('all', '192', 0): score, ('permuted', '192', 0): score},
    'all', 'permuted', '192', results.EDGES,
  )  # fmt: skip
  assert seeds == [0] and units == sorted(gains) and not diff.any()


def test_arms_in_their_fixed_order_and_of_one_shape():
  assert list(arms.MAIN) == [
    'none', 'all', 'permuted', 'grn', 'grn_rewired', 'constant', 'random',
  ]  # fmt: skip
  names = [
    [name for name, _ in arms.ARMS[a].files(0)] for a in ('all', 'permuted')
  ]
  assert names[0] == names[1]
  assert all(
    'coexpression' not in arms.ARMS[arm].kinds for arm in arms.CONTROLS
  )


def test_what_is_drawn_is_drawn_anew_for_every_seed():
  """One draw for all seeds would be luck that no interval knows of."""
  for name, arm in arms.ARMS.items():
    same = arm.folder(1) == arm.folder(2)
    fixed = ('none', 'all', 'grn', 'constant', 'stated', 'coexpression')
    assert same == (name in fixed)
    assert arm.folder(1).startswith(arm.tables(1))


def test_what_is_explored_is_not_in_the_registration():
  assert arms.EXPLORATORY.keys().isdisjoint(arms.REGISTERED)
  held = registration.frozen(settings_lib.Settings())['arms']
  assert held.keys() == arms.REGISTERED.keys()
  for one, other in (
    ('stated', 'permuted_stated'),
    ('coexpression', 'permuted_coexpression'),
  ):
    # The very rows of `permuted`, whichever arm is run first.
    rows = {file for _, file in arms.ARMS[other].files(3)}
    assert rows < {file for _, file in arms.ARMS['permuted'].files(3)}
    assert arms.ARMS[other].controlled == arms.ARMS['permuted'].controlled
    assert arms.ARMS[one].kinds == arms.ARMS[other].kinds


def test_a_plan_is_of_whole_pairs_and_every_run_once():
  settings = settings_lib.Settings()
  runs = settings_lib.plan(settings, 5)
  names = [runs_lib.key(run, settings) for run in runs]
  assert len(set(names)) == len(names)
  primary = [r for r in runs if r.stage == settings_lib.PRIMARY]
  assert len(primary) == 2 * 4 * 5
  for one, other in zip(primary[::2], primary[1::2]):
    assert (one.arm, other.arm) == arms.PAIR
    assert (one.place, one.seed) == (other.place, other.seed)
  controls = [r.arm for r in runs if r.stage == settings_lib.FIDELITY]
  assert controls[:2] == ['fidelity_1', 'permuted_fidelity_1']
  assert {r.seed for r in runs if r.stage == settings_lib.PILOT}.isdisjoint(
    r.seed for r in runs if r.stage != settings_lib.PILOT
  )


def test_a_run_is_named_by_what_it_is_and_not_where():
  run = settings_lib.Run('primary', 'all', '4096', 0)
  settings = settings_lib.Settings()
  assert 'ROOT' in json.dumps(runs_lib.identity(run, settings))
  other = settings_lib.Run('primary', 'permuted', '4096', 0)
  assert runs_lib.key(run, settings) != runs_lib.key(other, settings)
  assert runs_lib.key(run, settings) != runs_lib.key(run, SMOKE)


def test_the_config_says_what_a_user_needs():
  module = runpy.run_path(config_lib.__file__)
  for word in ('Reproduces:', 'Hardware:', 'Time', 'Variants:', '--config='):
    assert word in module['__doc__'], word
  for wrong in ('no such variant', 'colour=red'):
    with pytest.raises(ValueError, match='variant'):
      module['get_config'](wrong)
  config = module['get_config']('root=R,arm=permuted,cells=1024,seed=3')
  assert config.corpus == 'R/corpora/1024'
  assert config.priors[0] == (
    'grn',
    'R/priors/1024/tables/shuffled_3/grn.parquet',
  )
  assert config.seed == config.data.seed == 3
  assert module['get_config']('smoke').simulated_cells


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  """Corpora of 64 and of 128 training cells."""
  root = str(tmp_path_factory.mktemp('corpora'))
  return [
    corpus.Corpus.open(materials.corpus(root, n, SMOKE)) for n in (64, 128)
  ]


def test_small_corpora_are_part_of_large_ones_and_share_held_out_cells(
  corpora,
):
  whole = simulate.Atlas(SMOKE.atlas)
  small = materials.draw(whole, 'training', 'human', 40)
  large = materials.draw(whole, 'training', 'human', 90)
  assert (small.counts != large.counts[:40]).nnz == 0
  held = materials.draw(whole, 'heldout', 'human', 30)
  assert not set(held.obs['study']) & set(large.obs['study'])
  assert not set(held.obs['donor']) & set(large.obs['donor'])
  assert 'panel' not in {*held.obs['assay'], *large.obs['assay']}
  for s in range(2):
    one, other = (o.store('validation', s) for o in corpora)
    assert one.num_cells == other.num_cells == SMOKE.held_out_cells
    np.testing.assert_array_equal(one.length_N, other.length_N)
    assert corpora[0].store('train', s).num_cells == 32
    assert corpora[1].store('train', s).num_cells == 64


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
  """A finished toy study."""
  root = str(tmp_path_factory.mktemp('study'))
  assert study.main([root, '--smoke']) == errors.EXIT_OK
  return root


@pytest.mark.slow  # the toy study takes a minute
def test_the_toy_runs_from_end_to_end(toy):
  runs = settings_lib.plan(SMOKE, 2)
  main = [r for r in runs if r.stage in ('pilot', 'primary')]
  found = results.load(toy, main, SMOKE)
  assert len(found) == len(main) == 8
  text = pathlib.Path(toy, 'report.md').read_text()
  assert '| pilot | 4 of 4 |' in text and '| primary | 4 of 4 |' in text
  # Without its own controls the study gives no verdict.
  assert 'no verdict' in text and inference.HELPS not in text.split('##')[3]
  registered = paths.read_json(f'{toy}/registered.json')
  assert registered['frozen']['atlas_sha256'] == SMOKE.atlas.sha256
  assert registered['margins_relative'] == {'id': 0.01, 'value': 0.02}


@pytest.mark.slow  # the toy study takes a minute
def test_scores_are_those_of_the_evaluation(toy):
  """Seed 0 has the masks of the scores: both must give the same loss."""
  run = settings_lib.Run('primary', 'all', '192', 0)
  score = results.load(toy, [run], SMOKE)['all', '192', 0]
  last = [
    line
    for line in metrics.read(runs_lib.folder_of(toy, score['run']))
    if 'eval_id_loss' in line
  ][-1]
  assert last['eval_cells'] == 2 * SMOKE.held_out_cells
  for name, total, number in (
    ('eval_id_loss', 'id', 'id_n'),
    ('eval_value_loss', 'value', 'value_n'),
  ):
    units = score['units'].values()
    mean = sum(u[total] for u in units) / sum(u[number] for u in units)
    assert mean == pytest.approx(last[name], rel=1e-5)
  nulls = score['nulls'].values()
  mean = sum(u[results.ID_NULL] for u in nulls) / sum(u['id_n'] for u in nulls)
  assert mean == pytest.approx(last[results.ID_NULL], rel=1e-6)
  assert len(score['units']) == 12


@pytest.mark.slow  # the toy study takes a minute
def test_arms_differ_in_their_tables_alone(toy):
  atlas = f'{toy}/priors/192'
  for name in ('permuted', 'random', 'constant'):
    arm = arms.MAIN[name]
    if name != 'permuted':  # the toy runs the pair alone
      materials.priors(toy, 192, SMOKE, arm, 1)
    for kind in arm.kinds:
      own = prior_tables.read(f'{atlas}/tables/{kind}.parquet')
      other = prior_tables.read(f'{atlas}/{arm.folder(1)}/{kind}.parquet')
      assert other.gene_ids == own.gene_ids
      assert other.vectors_GP.shape == own.vectors_GP.shape
      if len(own.gene_ids) > 1:  # of co-expression a toy may have none
        assert not np.array_equal(other.vectors_GP, own.vectors_GP)
  one, two = (
    prior_tables.read(f'{atlas}/tables/shuffled_{seed}/grn.parquet')
    for seed in (0, 1)
  )
  assert not np.array_equal(one.vectors_GP, two.vectors_GP)
  materials.priors(toy, 192, SMOKE, arms.MAIN['grn_rewired'], 0)
  assert pathlib.Path(f'{atlas}/tables/rewired_0/grn.parquet').exists()
  # The statements of a fidelity are another draw for every seed.
  for seed in (0, 1):
    materials.priors(toy, 192, SMOKE, arms.ARMS['fidelity_0.5'], seed)
  texts = [
    pathlib.Path(f'{toy}/knowledge/0.5/{seed}/tf_target.human.tsv').read_text()
    for seed in (0, 1)
  ]
  assert texts[0] != texts[1]
  withheld = [
    json.loads(pathlib.Path(f'{toy}/knowledge/{d}/manifest.json').read_text())
    for d in ('0.5/0', '0.5/1', 'default')
  ]
  assert len({tuple(w['withheld_tfs']) for w in withheld}) == 1


@pytest.mark.slow  # the toy study takes a minute
def test_a_finished_study_trains_nothing_again(toy, monkeypatch, capsys):
  def refused(*_):
    raise AssertionError('a run was started')

  monkeypatch.setattr(study, '_start', refused)
  monkeypatch.setattr(study, '_smoke', study._study)
  argv = [toy, '--smoke', '--only', 'pilot', '--only', 'primary']
  assert study.main(argv) == errors.EXIT_OK
  assert '4 of 4' in capsys.readouterr().out


@pytest.mark.slow  # the toy study takes a minute
def test_registration_is_asked_for_and_held_to(tmp_path, toy, capsys):
  argv = [str(tmp_path), '--smoke', '--only', 'primary']
  assert study.main(argv) == errors.EXIT_USAGE
  assert 'not registered' in capsys.readouterr().err
  assert study.main([toy, '--smoke', '--register']) == errors.EXIT_USAGE
  assert 'registered once' in capsys.readouterr().err
  changed = paths.read_json(f'{toy}/registered.json')
  changed['frozen']['settings']['steps'] += 1
  file = tmp_path / 'registered.json'
  file.write_text(json.dumps(changed))
  with pytest.raises(errors.UserError, match='settings was changed'):
    registration.check(str(file), SMOKE)
  assert study.main([str(tmp_path), '--smoke', '--register']) == 2


@pytest.mark.slow  # the toy study takes a minute
def test_real_cells_need_their_folder(tmp_path, toy, capsys):
  argv = [toy, '--smoke', '--only', 'real']
  assert study.main(argv) == errors.EXIT_USAGE
  assert '--data' in capsys.readouterr().err


def test_the_registration_is_of_the_code_that_is_here():
  if not registration.REGISTERED.exists():
    pytest.skip('the study is not registered yet')
  registration.check(str(registration.REGISTERED), settings_lib.Settings())


def test_rare_genes_are_those_that_few_cells_keep(corpora):
  opened = corpora[1]
  vocabulary = opened.vocabulary
  cells_V = np.full(vocabulary.size, 1)
  rare_SV = scores.rare_tokens(opened, cells_V, (64, 64))
  shared_V = vocabulary.is_shared_V()
  assert shared_V.any()
  assert rare_SV[:, shared_V].all()  # 1 of 128
  for s in range(2):
    own = np.setdiff1d(vocabulary.species_tokens(s), np.flatnonzero(shared_V))
    assert len(own) and not rare_SV[s, own].any()  # 1 of 64
    assert not rare_SV[1 - s, own].any()
  assert not scores.rare_tokens(opened, 2 * cells_V, (64, 64)).any()
  # Of a large corpus some are counted; those of the corpus would be too many.
  few_SV = scores.rare_tokens(opened, cells_V, (8, 8))
  assert opened.num_cells('train') == 128 and not few_SV.any()


def labels(store, name):
  """Those that some cell has; the categories are those of the corpus."""
  return {store.categories(name)[code] for code in np.unique(store.obs(name))}


@pytest.mark.slow
def test_real_studies_are_held_out_whole(tmp_path, real_data):
  """On a panel-free part of the handed sets, without training."""
  assert set(settings_lib.Settings().folds) <= {
    cells.config.dataset or cells.config.name for cells in real_sets().values()
  }
  settings = settings_lib.Settings(real_genes=500)
  place = real_cells.corpus(str(tmp_path), str(real_data), 'baron', settings)
  opened = corpus.Corpus.open(place)
  assert 450 < opened.vocabulary.size <= 502
  for s in range(2):
    held = opened.store('validation', s)
    train = opened.store('train', s)
    assert all(u.startswith('baron:') for u in labels(held, 'unit'))
    assert not any(u.startswith('baron:') for u in labels(train, 'unit'))
    assert 'baron' not in labels(train, 'dataset')
  assert len(opened.manifest['split']['validation_units']) == 6
  with pytest.raises(errors.UserError, match='nothing to hold out'):
    real_cells.corpus(str(tmp_path), str(real_data), 'no_study', settings)


def real_sets():
  return real_cells._script('real_cells').SETS
