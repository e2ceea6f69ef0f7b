"""Nulls, units, p and q of perturbations, on effects whose truth is known."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from genecompass_jax import encoding, errors
from genecompass_jax.analysis.perturbation import (
  answers,
  effects as effects_lib,
  matching,
  null_line,
  statistics,
)

MATCHING = matching.MatchingConfig(calipers=(9.0, 9.0, 9.0), most=30)


def effects_of(
  shift_GC, rank_GC=None, length_C=None, shown_GC=None, toward_GC=None
):
  """Effects of genes x cells, where they are shown."""
  G, C = shift_GC.shape
  shown_GC = np.ones((G, C), bool) if shown_GC is None else shown_GC
  variant_N, cell_N = np.nonzero(shown_GC)
  rank_GC = np.zeros((G, C)) if rank_GC is None else rank_GC
  length_C = np.full(C, 100) if length_C is None else length_C
  toward_GC = np.full((G, C), np.nan) if toward_GC is None else toward_GC
  return effects_lib.CellEffects(
    variant_N=variant_N.astype(np.int32),
    cell_N=cell_N.astype(np.int64),
    rank_N=rank_GC[variant_N, cell_N].astype(np.int32),
    length_N=np.asarray(length_C)[cell_N].astype(np.int32),
    entered_N=np.zeros(len(cell_N), np.int32),
    shift_N=shift_GC[variant_N, cell_N],
    gene_shift_N=shift_GC[variant_N, cell_N],
    toward_N=toward_GC[variant_N, cell_N],
  )


def drawn(
  rng, genes=160, cells=60, units=3, *, of_gene=0.6, of_unit=0.5, detection=0.7
):
  """Effects with a part of the gene, of gene and unit, of cell, and noise."""
  unit_C = np.arange(cells) % units
  shift_GC = (
    of_gene * rng.normal(size=(genes, 1))
    + of_unit * rng.normal(size=(genes, units))[:, unit_C]
    + 3.0 * rng.normal(size=cells)
    + rng.normal(size=(genes, cells))
  )
  shown_GC = rng.random((genes, cells)) < detection
  return shift_GC, shown_GC, unit_C


def compared(
  shift_GC, shown_GC, unit_C, targets, nulls, matched=MATCHING, **how
):
  effects = effects_of(shift_GC, shown_GC=shown_GC)
  profiles = matching.of_effects(effects, shift_GC.shape[1])
  matches = matching.match(profiles, targets, nulls, config=matched)
  names = [f'donor{u}' for u in range(unit_C.max() + 1)]
  config = statistics.Config(**how)
  return statistics.test(effects, matches, unit_C, names, config)


# Matching.


def test_profiles_of_effects_by_hand():
  shown_GC = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
  rank_GC = np.array([[0, 4, 9, 9], [1, 2, 3, 4], [9, 9, 9, 7]])
  effects = effects_of(
    np.zeros((3, 4)), rank_GC, np.array([10, 20, 30, 40]), shown_GC
  )
  profiles = matching.of_effects(effects, 4, {0: 1, 1: 3})
  np.testing.assert_array_equal(profiles.key_G, [0, 1, 2])
  np.testing.assert_allclose(profiles.detection_G, [0.5, 1.0, 0.25])
  np.testing.assert_allclose(profiles.rank_G, [2.0, 2.5, 7.0])
  np.testing.assert_allclose(profiles.length_G, [15.0, 25.0, 40.0])
  np.testing.assert_array_equal(profiles.measured_G, [1, 3, 0])
  with pytest.raises(errors.UserError, match='4 cells, but 3 were used'):
    matching.of_effects(effects, 3)


def test_a_gene_put_into_cells_that_lack_it_has_no_rank_there():
  effects = effects_of(np.zeros((1, 4)), np.array([[-1, 5, -1, 7]]))
  profiles = matching.of_effects(effects, 4)
  assert profiles.detection_G[0] == 0.5
  assert profiles.rank_G[0] == 6.0


def test_profiles_of_cells_are_those_of_their_deletions():
  rng = np.random.default_rng(0)
  lengths = rng.integers(3, 9, 20)
  genes = [rng.choice(np.arange(4, 16), n, replace=False) for n in lengths]
  cells = encoding.EncodedCells(
    np.concatenate(genes).astype(np.int32),
    np.ones(lengths.sum(), np.float32),
    np.concatenate([[0], np.cumsum(lengths)]),
    np.zeros(20, np.uint64),
    lengths.astype(np.int32),
  )
  shown_GC, rank_GC = np.zeros((16, 20), bool), np.zeros((16, 20))
  for c, tokens in enumerate(genes):
    shown_GC[tokens, c] = True
    rank_GC[tokens, c] = np.arange(len(tokens))
  effects = effects_of(np.zeros((16, 20)), rank_GC, lengths, shown_GC)
  one, other = matching.of_cells(cells), matching.of_effects(effects, 20)
  for field in dataclasses.fields(matching.Profiles):
    np.testing.assert_allclose(
      getattr(one, field.name), getattr(other, field.name)
    )


def profiles_of(detection, rank, length, measured=None, cells=1000):
  number = len(rank)
  cells_G = np.round(np.asarray(detection) * cells).astype(np.int64)
  return matching.Profiles(
    key_G=np.arange(number),
    cells_G=cells_G,
    detection_G=cells_G / cells,
    rank_G=np.asarray(rank, float),
    length_G=np.asarray(length, float),
    measured_G=np.ones(number, np.int64) if measured is None else measured,
  )


def test_nulls_are_the_nearest_within_every_caliper():
  rng = np.random.default_rng(1)
  profiles = profiles_of(
    rng.uniform(0.05, 0.95, 400),
    rng.uniform(0, 500, 400),
    rng.uniform(200, 400, 400),
  )
  config = matching.MatchingConfig(calipers=(0.4, 0.5, 0.6), most=12)
  found = matching.match(profiles, [3, 7], config=config)
  cells = profiles.cells_G
  axes = np.stack(
    [np.log((cells + 0.5) / (1000 - cells + 0.5)), profiles.rank_G,
     profiles.length_G]
  )  # fmt: skip
  axes /= axes.std(1, ddof=1, keepdims=True)
  for t, target in enumerate((3, 7)):
    apart = np.abs(axes - axes[:, [target]])
    inside = (apart <= np.array([[0.4], [0.5], [0.6]])).all(0)
    inside[target] = False
    order = np.argsort(np.sqrt((apart**2).sum(0)) + np.where(inside, 0, np.inf))
    expected = order[: min(12, inside.sum())]
    nulls = found.null_TK[t][found.null_TK[t] >= 0]
    np.testing.assert_array_equal(nulls, expected)
    assert found.within_T[t] == inside.sum()


def test_nulls_are_neither_the_target_nor_its_set_nor_the_pathway():
  profiles = profiles_of(np.full(40, 0.5), np.arange(40), np.full(40, 300))
  measured = np.ones(40, np.int64)
  measured[20:24], measured[24:26] = 2, 0
  profiles = dataclasses.replace(profiles, measured_G=measured)
  found = matching.match(
    profiles,
    [5, 6, 21],
    excluded=[9, 10],
    config=MATCHING,
  )
  sets = [set(row[row >= 0].tolist()) for row in found.null_TK]
  everyone = set(range(20)) | set(range(26, 40))
  everyone -= {9, 10}
  assert sets[0] <= everyone - {5} and len(sets[0]) == 30
  assert sets[1] <= everyone - {6} and len(sets[1]) == 30
  assert sets[2] == {20, 22, 23}  # measured where the target was


def test_too_few_within_the_calipers_are_reported_and_not_widened():
  rank = np.concatenate([np.zeros(30), [1e4], np.full(4, 1.01e4)])
  profiles = profiles_of(np.full(35, 0.5), rank, np.full(35, 300))
  found = matching.match(profiles, [30, 0])
  np.testing.assert_array_equal(found.num_T, [4, 29])
  assert found.within_T[0] == 4


def test_matching_knows_no_order_of_genes_and_follows_its_seed():
  profiles = profiles_of(np.full(200, 0.5), np.full(200, 9), np.full(200, 300))
  config = matching.MatchingConfig(most=20, seed=1)
  one = matching.match(profiles, [4], np.arange(200), config=config)
  other = matching.match(profiles, [4], np.arange(200)[::-1], config=config)
  np.testing.assert_array_equal(one.null_TK, other.null_TK)
  config = dataclasses.replace(config, seed=2)
  third = matching.match(profiles, [4], config=config)
  assert set(one.null_TK[0]) != set(third.null_TK[0])


def test_null_sets_have_a_null_of_every_member():
  rng = np.random.default_rng(2)
  profiles = profiles_of(
    rng.uniform(0.2, 0.8, 300), rng.uniform(0, 500, 300), np.full(300, 300)
  )
  sets = matching.null_sets(profiles, [10, 20], 12, excluded=[30])
  assert len(sets) == 12
  own = matching.match(profiles, [10, 20], excluded=[10, 20, 30])
  for first, second in sets:
    assert first in own.null_TK[0] and second in own.null_TK[1]
    assert first != second and not {first, second} & {10, 20, 30}
  assert matching.null_sets(profiles, [10, 20], 40, [1, 2, 3]) == []


def test_nulls_are_alike_in_other_cells_too_where_asked():
  rng = np.random.default_rng(3)
  profiles = profiles_of(
    np.full(60, 0.5), rng.uniform(0, 50, 60), np.full(60, 300)
  )
  detection = np.repeat([0.1, 0.9], 30)
  also = profiles_of(detection[:50], np.full(50, 9), np.full(50, 200))
  loose = matching.MatchingConfig((0.5, 9.0, 9.0), 60)
  found = matching.match(profiles, [0, 40, 55], also=also, config=loose)
  of_low, of_high, of_none = (set(row[row >= 0]) for row in found.null_TK)
  assert of_low == set(range(1, 30))
  assert of_high == set(range(30, 50)) - {40}
  assert of_none == set(range(50, 60)) - {55}  # those that no other cell shows
  plain = matching.match(profiles, [0], config=loose)
  assert len(set(plain.null_TK[0])) > 50


def test_null_sets_share_no_gene_in_one_place():
  """50 pairs of 12 genes each would be one another's copies."""
  profiles = profiles_of(np.full(14, 0.5), np.arange(14), np.full(14, 300))
  config = dataclasses.replace(MATCHING, fewest=10)
  sets = matching.null_sets(profiles, [0, 1], 50, config=config)
  assert 10 <= len(sets) <= 12
  for place in (0, 1):
    assert len({drawn[place] for drawn in sets}) == len(sets)
  assert len({frozenset(drawn) for drawn in sets}) == len(sets)


def test_renumbered_nulls_are_the_variants_that_were_run():
  profiles = profiles_of(np.full(40, 0.5), np.arange(40), np.full(40, 300))
  found = matching.match(profiles, [5], config=MATCHING)
  number_of = {token: 100 + token for token in range(20)}
  other = found.renumber(number_of)
  assert other.target_T.tolist() == [105]
  kept = [k for k in found.null_TK[0].tolist() if 0 <= k < 20]
  assert other.null_TK[0, : len(kept)].tolist() == [100 + k for k in kept]
  assert (other.null_TK[0, len(kept) :] == -1).all()
  with pytest.raises(errors.UserError, match='were not perturbed'):
    found.renumber({1: 2})


# Tests.


def test_z_of_three_nulls_by_hand():
  shift_GC = np.array(
    [[9.0, 9.0, 5.0], [1.0, 2.0, 3.0], [3.0, 2.0, 3.0], [2.0, 5.0, 3.0]]
  )
  shown_GC = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
  found = compared(
    shift_GC, shown_GC, np.array([0, 0, 1]), [0], [1, 2, 3],
    matching.MatchingConfig((9, 9, 9), 3, 2), min_cells=1, p_from='normal',
  )  # fmt: skip
  # Unit 0: the nulls have means 2 and 3 in the two cells.
  target = (7 + 6) / 2
  nulls = np.array(
    [(1 - 2 + 2 - 3) / 2, (3 - 2 + 2 - 3) / 2, (2 - 2 + 5 - 3) / 2]
  )
  assert found.effect_TU[0].tolist() == [9.0, 5.0]
  # Unit 1 has no cell of the first null, which has one unit of two then: it is
  # no null, but was one of the genes in the cells.
  assert found.num_null_T[0] == 2 and found.num_units_T[0] == 2
  both = np.array([(nulls[1] + 0) / 2, (nulls[2] + 0) / 2])
  over = ((target + 2) / 2 - both.mean()) / both.std(ddof=1)
  z = (target - nulls[1:].mean()) / nulls[1:].std(ddof=1)
  assert found.z_TU[0, 0] == pytest.approx(z)
  assert found.z_T[0] == pytest.approx(over)
  assert found.effect_T[0] == 7.0
  assert (found.effect_T - found.null_mean_T) / found.null_sd_T == (
    pytest.approx(found.z_T)
  )
  p = scipy.stats.t.sf(over / np.sqrt(1.5), 1)
  assert found.p_T[0] == pytest.approx(p)


@pytest.mark.parametrize('units', [2, 3, 6, 10])
@pytest.mark.parametrize('p_from', statistics.P_FROM)
def test_p_is_uniform_where_nothing_is_the_matter(units, p_from):
  """Genes differ, and differ by unit, but targets no more than nulls."""
  found = []
  for seed in range(4):
    rng = np.random.default_rng([seed, units])
    shift_GC, shown_GC, unit_C = drawn(rng, units=units)
    # Targets: every gene once, with nulls from all others.
    found.append(
      compared(shift_GC, shown_GC, unit_C, np.arange(160), None, p_from=p_from)
    )
  p = np.concatenate([f.p_T for f in found])
  assert np.isfinite(p).all()
  share = (p < 0.05).mean()
  # 640 tests, not independent: an sd of 0.009 if they were.
  assert 0.02 < share < 0.085, share
  assert scipy.stats.kstest(p, 'uniform').statistic < 0.08


@pytest.mark.parametrize('side', statistics.ALTERNATIVES)
def test_skewed_nulls_need_the_empirical_p(side):
  rng = np.random.default_rng(5)
  shift_GC, shown_GC, unit_C = drawn(
    rng, 400, 40, 4, of_gene=0, of_unit=0, detection=0.9
  )
  shift_GC += rng.exponential(2.0, (400, 1)) ** 2
  found = compared(
    shift_GC, shown_GC, unit_C, np.arange(400), None, alternative=side
  )
  normal, empirical = (
    (p < 0.01).mean() for p in (found.p_normal_T, found.p_empirical_T)
  )
  assert normal > 0.025
  assert empirical < 0.02


def test_a_t_test_of_units_alone_would_call_any_gene():
  """Why z is measured by null genes: genes differ, in all units alike."""
  rng = np.random.default_rng(6)
  shift_GC, shown_GC, unit_C = drawn(rng, units=6, of_unit=0.1)
  found = compared(shift_GC, shown_GC, unit_C, np.arange(160), None)
  contrast_TU = found.effect_TU - found.null_mean_TU
  p = scipy.stats.ttest_1samp(contrast_TU, 0.0, axis=1).pvalue
  assert (p < 0.05).mean() > 0.4
  assert (found.p_T < 0.05).mean() < 0.1


@pytest.mark.parametrize('units', [2, 6])
def test_true_effects_are_found(units):
  rng = np.random.default_rng(7)
  shift_GC, shown_GC, unit_C = drawn(rng, units=units, of_gene=0.3)
  shift_GC[:20] += 3.0
  found = compared(
    shift_GC, shown_GC, unit_C, np.arange(40), np.arange(40, 160)
  )
  assert (found.z_T[:20] > 3).all()
  assert (found.p_T[:20] < 0.02).all()
  assert (found.q_T[:20] < 0.05).all()
  assert (found.p_T[20:] < 0.05).mean() < 0.2
  has_interval = units >= statistics.MIN_UNITS
  assert np.isfinite(found.contrast_low_T).all() == has_interval
  if has_interval:
    assert (found.contrast_low_T[:20] > 0).all()


def test_direction_of_the_test():
  rng = np.random.default_rng(8)
  shift_GC, shown_GC, unit_C = drawn(rng, of_gene=0.3)
  shift_GC[0] -= 4.0
  less = compared(shift_GC, shown_GC, unit_C, [0], np.arange(1, 160))
  assert less.z_T[0] < -3 and less.p_T[0] > 0.9  # no more than its nulls
  both = compared(
    shift_GC, shown_GC, unit_C, [0], np.arange(1, 160), alternative='two-sided'
  )
  assert both.p_T[0] < 0.05
  assert statistics.Config('toward').side == 'two-sided'
  assert statistics.Config('gene_shift').side == 'greater'


def test_what_depends_on_the_cell_changes_nothing():
  rng = np.random.default_rng(9)
  shift_GC, shown_GC, unit_C = drawn(rng)
  length_C = rng.integers(50, 500, 60)
  one = compared(shift_GC, shown_GC, unit_C, np.arange(160), None)
  other = compared(
    shift_GC + 100.0 / length_C, shown_GC, unit_C, np.arange(160), None
  )
  np.testing.assert_allclose(one.z_T, other.z_T, atol=1e-8)
  np.testing.assert_allclose(one.p_T, other.p_T, atol=1e-8)
  assert np.abs(other.effect_T - one.effect_T).min() > 0.1


def test_what_depends_on_the_rank_changes_nothing_after_matching():
  """Genes of low rank move more: unmatched that is an effect of the target."""
  rng = np.random.default_rng(10)
  genes, cells = 600, 60
  shift_GC, shown_GC, unit_C = drawn(rng, genes, cells, detection=0.9)
  rank_GC = np.repeat(np.arange(genes)[:, None], cells, 1)
  moved_GC = shift_GC + (rank_GC > 300) * 4.0
  targets = np.arange(350, 550, 10)
  sharp = matching.MatchingConfig((9.0, 0.1, 9.0), 30)
  z = {}
  for name, shift in (('as it was', shift_GC), ('moved', moved_GC)):
    effects = effects_of(shift, rank_GC, shown_GC=shown_GC)
    profiles = matching.of_effects(effects, cells)
    for matched in (sharp, MATCHING):
      nulls = np.setdiff1d(np.arange(genes), targets)
      if matched is MATCHING:  # any gene, as if rank were not known
        nulls = rng.choice(nulls, 60, replace=False)
      matches = matching.match(profiles, targets, nulls, config=matched)
      found = statistics.test(effects, matches, unit_C, ['a', 'b', 'c'])
      z[name, matched is sharp] = found.z_T
  np.testing.assert_allclose(z['moved', True], z['as it was', True], atol=1e-6)
  # A line does not hold a step.
  assert np.abs(z['moved', False] - z['as it was', False]).max() > 0.5


def test_effects_along_the_rank_are_no_effect_of_a_target():
  """Ranks differ within the calipers, and at their edge lie on one side."""
  rng = np.random.default_rng(20)
  genes, cells, units = 300, 60, 6
  shift_GC, shown_GC, unit_C = drawn(
    rng, genes, cells, units, of_unit=0.2, detection=0.8
  )
  place_G = np.arange(genes)
  rank_GC = np.argsort(
    np.argsort(place_G[:, None] + rng.normal(0, 6, (genes, cells)), 0), 0
  )
  found = {}
  for slope in (0.0, 0.5):
    effects = effects_of(shift_GC + slope * rank_GC, rank_GC, None, shown_GC)
    profiles = matching.of_effects(effects, cells)
    matches = matching.match(profiles, place_G)
    found[slope] = statistics.test(
      effects, matches, unit_C, [str(u) for u in range(units)]
    )
  np.testing.assert_allclose(found[0.5].z_T, found[0.0].z_T, atol=1e-6)
  np.testing.assert_allclose(found[0.5].p_T, found[0.0].p_T, atol=1e-6)
  np.testing.assert_allclose(
    found[0.5].p_empirical_T, found[0.0].p_empirical_T, atol=1e-6
  )
  steep = found[0.5]
  np.testing.assert_allclose(
    (steep.effect_T - steep.null_mean_T) / steep.null_sd_T, steep.z_T
  )
  edge = np.concatenate([place_G[:30], place_G[-30:]])
  assert (steep.p_normal_T[edge] < 0.05).mean() < 0.15


def test_nulls_left_out_one_by_one_are_targets_of_the_others():
  rng = np.random.default_rng(21)
  null_K, rank_K = rng.normal(size=15), rng.uniform(0, 9, 15)
  found = null_line.left_out(null_line.fit(null_K, rank_K, 0.0), 'greater')
  for k in range(15):
    rest = np.delete(np.arange(15), k)
    line = null_line.fit(null_K[rest], rank_K[rest], rank_K[k])
    t = (null_K[k] - line.at_target) / line.sd / np.sqrt(1 + 1 / 14)
    assert found[k] == pytest.approx(scipy.stats.t.sf(t, 12))


def test_a_screen_of_all_genes_finds_those_that_stand_out():
  """Targets are nulls of each other: a share of nulls is but a rank."""
  rng = np.random.default_rng(22)
  shift_GC, shown_GC, unit_C = drawn(rng, 400, 40, 6, of_unit=0.2)
  true = rng.choice(400, 12, replace=False)
  shift_GC[true] += 8.0 * 0.6
  found = compared(shift_GC, shown_GC, unit_C, np.arange(400), None)
  assert found.config.p_from == statistics.NORMAL
  called = np.flatnonzero(found.q_T < 0.05)
  assert len(np.intersect1d(called, true)) >= 9
  assert len(np.setdiff1d(called, true)) <= 2
  by_share = statistics.false_discovery_rate(found.p_empirical_T)
  assert (by_share < 0.05).sum() < len(called) / 2
  others = np.setdiff1d(np.arange(400), true)
  named = compared(shift_GC, shown_GC, unit_C, true, others)
  assert named.config.p_from == statistics.EMPIRICAL
  assert (named.q_T < 0.05).all()


def test_what_was_not_chosen_stays_in_the_family():
  """The highest ten of 600 by the same cells are no discoveries."""
  rng = np.random.default_rng(23)
  p = np.sort(rng.random(600))[:10]
  assert (statistics.false_discovery_rate(p) < 0.05).all()
  assert (statistics.false_discovery_rate(p, 590) > 0.05).all()
  np.testing.assert_allclose(
    statistics.false_discovery_rate(p, 590),
    scipy.stats.false_discovery_control(np.r_[p, np.ones(590)])[:10],
  )


def test_one_unit_gives_ranks_and_no_p():
  rng = np.random.default_rng(11)
  shift_GC, shown_GC, unit_C = drawn(rng, units=1)
  found = compared(shift_GC, shown_GC, unit_C, np.arange(160), None)
  assert np.isfinite(found.z_T).all()
  for p in (found.p_T, found.q_T, found.p_normal_T, found.p_empirical_T):
    assert np.isnan(p).all()
  np.testing.assert_allclose(found.z_T, found.z_TU[:, 0])
  # Its place among its own nulls is what is left: even, without any effect.
  above = found.num_above_T / found.num_null_T
  assert scipy.stats.kstest(above, 'uniform').statistic < 0.15


def test_units_of_few_cells_and_targets_of_few_nulls_say_so():
  rng = np.random.default_rng(12)
  shift_GC, shown_GC, unit_C = drawn(rng, units=3)
  shown_GC[0, unit_C == 1] = False
  shown_GC[0, np.flatnonzero(unit_C == 1)[:2]] = True  # of three wanted
  found = compared(shift_GC, shown_GC, unit_C, [0, 1], np.arange(2, 160))
  assert found.num_units_T.tolist() == [2, 3]
  assert found.cells_TU[0, 1] == 2 and np.isnan(found.z_TU[0, 1])
  few = compared(shift_GC, shown_GC, unit_C, [0, 1], np.arange(2, 9))
  assert few.num_null_T.tolist() == [7, 7]
  assert np.isnan(few.z_T).all() and np.isnan(few.p_T).all()
  assert np.isfinite(few.effect_T).all()
  # Without any null a target has its units still.
  none = compared(shift_GC, shown_GC, unit_C, [0], [0])
  assert (none.num_units_T[0], none.num_null_T[0]) == (2, 0)


def test_cells_of_no_unit_are_left_out():
  rng = np.random.default_rng(13)
  shift_GC, shown_GC, unit_C = drawn(rng)
  spoiled_GC = shift_GC.copy()
  spoiled_GC[:, :9] = 1e6 * rng.normal(size=(160, 9))
  out_C = unit_C.copy()
  out_C[:9] = -1
  one = compared(spoiled_GC, shown_GC, out_C, [0, 1], None)
  other = compared(shift_GC[:, 9:], shown_GC[:, 9:], unit_C[9:], [0, 1], None)
  np.testing.assert_allclose(one.effect_T, other.effect_T)
  assert one.cells_T.tolist() == other.cells_T.tolist()


def test_nothing_depends_on_the_order_of_effects():
  rng = np.random.default_rng(14)
  shift_GC, shown_GC, unit_C = drawn(rng)
  effects = effects_of(shift_GC, shown_GC=shown_GC)
  order_N = rng.permutation(len(effects.cell_N))
  mixed = effects_lib.CellEffects(
    **{
      f.name: getattr(effects, f.name)[order_N]
      for f in dataclasses.fields(effects)
    }
  )
  matches = matching.match(
    matching.of_effects(effects, 60), [0, 1, 2], config=MATCHING
  )
  names = ['a', 'b', 'c']
  one, other = (
    statistics.test(e, matches, unit_C, names) for e in (effects, mixed)
  )
  np.testing.assert_array_equal(one.z_T, other.z_T)
  twice = effects_lib.CellEffects(
    **{
      f.name: np.concatenate([getattr(effects, f.name)] * 2)
      for f in dataclasses.fields(effects)
    }
  )
  with pytest.raises(errors.UserError, match='two effects in one cell'):
    statistics.test(twice, matches, unit_C, names)


def test_false_discovery_rate_by_hand():
  p = np.array([0.01, 0.04, np.nan, 0.03, 0.005, 0.8])
  # Ranked: .005 .01 .03 .04 .8, times 5 / rank, smallest from behind.
  q = statistics.false_discovery_rate(p)
  np.testing.assert_allclose(
    q, [0.025, 0.05, np.nan, 0.05, 0.025, 0.8], equal_nan=True
  )
  assert np.isnan(statistics.false_discovery_rate(np.full(3, np.nan))).all()


def test_wrong_settings_are_refused():
  for wrong in ({'measure': 'x'}, {'alternative': 'less'}, {'p_from': 'x'}):
    with pytest.raises(errors.UserError, match='give'):
      statistics.Config(**wrong)
  with pytest.raises(errors.UserError, match='three positive'):
    matching.MatchingConfig(calipers=(1.0, 0.0, 1.0))


# Answers of other genes.


def responses_of(mean_TG, units=3, cells=20, rng=None):
  T, G = mean_TG.shape
  cells_TUG = np.full((T, units, G), cells, np.int32)
  noise = 0 if rng is None else rng.normal(size=(T, units, G))
  np.einsum('tut->tu', cells_TUG[:, :, :T])[:] = 0  # perturbed genes
  return effects_lib.Responses(
    variant_T=np.arange(T, dtype=np.int32),
    token_G=np.arange(G, dtype=np.int32),
    units_U=np.array([f'u{u}' for u in range(units)]),
    sum_TUG=((mean_TG[:, None] + 0.1 * noise) * cells_TUG).astype(np.float32),
    cells_TUG=cells_TUG,
  )


def test_answers_beyond_those_to_any_deletion():
  rng = np.random.default_rng(15)
  T, G = 60, 200
  moves_T, moves_G = 5 * rng.random(T), 5 * rng.random(G)
  true_TG = np.zeros((T, G))
  true_TG[0, 100:110] = 1.0
  responses = responses_of(true_TG + moves_T[:, None] + moves_G, rng=rng)
  profiles = profiles_of(np.full(T, 0.5), np.arange(T), np.full(T, 300))
  matches = matching.match(profiles, [0, 1], config=MATCHING)
  found = answers.score(responses, matches)
  assert set(np.argsort(-found.z_TG[0])[:11]) >= set(range(100, 110))
  assert np.isnan(found.z_TG[0, 0]) and np.isnan(found.mean_TG[1, 1])
  assert abs(np.nanmean(found.z_TG[1])) < 0.3
  assert np.nanstd(found.z_TG[1]) < 1.5
  # The raw response ranks by what moves anyway.
  assert not set(np.argsort(-found.mean_TG[0])[:8]) <= set(range(100, 110))


def test_answers_do_not_change_with_row_and_column_constants():
  rng = np.random.default_rng(16)
  mean_TG = rng.random((40, 90))
  profiles = profiles_of(np.full(40, 0.5), np.arange(40), np.full(40, 300))
  matches = matching.match(profiles, [0, 5], config=MATCHING)
  one = answers.score(responses_of(mean_TG), matches)
  other = answers.score(
    responses_of(mean_TG + 3 * rng.random((40, 1)) + 3 * rng.random(90)),
    matches,
  )
  np.testing.assert_allclose(one.z_TG, other.z_TG, atol=1e-3)


def test_answers_of_too_few_cells_or_nulls_are_missing():
  rng = np.random.default_rng(17)
  responses = responses_of(rng.random((40, 90)))
  responses.cells_TUG[0, :, 50] = 2
  responses.cells_TUG[12:, :, 60] = 0
  profiles = profiles_of(np.full(40, 0.5), np.arange(40), np.full(40, 300))
  matches = matching.match(
    profiles, [0], config=dataclasses.replace(MATCHING, fewest=15)
  )
  found = answers.score(responses, matches)
  assert np.isnan(found.z_TG[0, [0, 50, 60]]).all()
  assert found.num_null_TG[0, 60] < 15
  assert np.isfinite(found.z_TG[0, 61:]).all()
  with pytest.raises(errors.UserError, match='without responses'):
    answers.score(
      responses, dataclasses.replace(matches, target_T=np.array([77]))
    )
