"""Null genes: like the target in all but its identity.

What a deletion does to a state depends first on where the gene stands in the
cell, how many genes the cell has, and in how many cells it was looked at; only
what is left can be about the gene. So a target is compared with genes that are
alike in

  detection  share of the cells used that show it to the model, as a logit
  rank       its mean rank in those cells, 0 the highest
  length     mean genes of those cells
  measured   the sources that measured it: equal, not merely alike

The nearest in these three numbers, each in units of its standard deviation
among the candidates, are taken, none further off than a caliper in any of
them. Where too few are within the calipers they are not widened: the number is
reported, and a target of too few gets no z.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from genecompass_jax import encoding, errors, kernels
from genecompass_jax.analysis.perturbation import effects as effects_lib

AXES = ('detection', 'rank', 'length')


@dataclasses.dataclass(frozen=True)
class Profiles:
  """What genes are matched on, one element a gene or variant.

  Attributes:
    key_G: int64 number of a variant, or token of a gene; ascending.
    cells_G: int64 cells that show the gene to the model.
    detection_G: float64 share of the cells used.
    rank_G: float64 mean rank in these cells, from 0; NaN where there are none.
    length_G: float64 mean number of genes of these cells; NaN likewise.
    measured_G: int64, equal for genes that the same sources measured; 0 for a
      gene that none did, which is neither target nor null.
  """

  key_G: np.ndarray
  cells_G: np.ndarray
  detection_G: np.ndarray
  rank_G: np.ndarray
  length_G: np.ndarray
  measured_G: np.ndarray

  def rows(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
    """Places of keys.

    Raises:
      UserError: there is no such key.
    """
    keys = np.asarray(keys, np.int64).reshape(-1)
    places = np.searchsorted(self.key_G, keys)
    inside = np.minimum(places, len(self.key_G) - 1)
    if len(keys) and not (
      len(self.key_G) and np.all(self.key_G[inside] == keys)
    ):
      raise errors.UserError(
        'matching: a target or candidate is none of the genes that were '
        'profiled; profile all of them on the same cells'
      )
    return places


@dataclasses.dataclass(frozen=True)
class MatchingConfig:
  """How null genes are chosen.

  Attributes:
    calipers: furthest that a null may be from its target in detection, rank
      and length, in standard deviations of the candidates.
    most: nulls of a target, the nearest ones.
    fewest: with fewer nulls a target gets no z and no p.
    seed: decides between candidates that are equally near, and the draws of
      `null_sets`.
  """

  calipers: tuple[float, float, float] = (0.5, 0.5, 0.5)
  most: int = 50
  fewest: int = 10
  seed: int = 0

  def __post_init__(self):
    if len(self.calipers) != len(AXES) or not min(self.calipers) > 0:
      raise errors.UserError(
        f'calipers {self.calipers}: give three positive numbers, for '
        f'{", ".join(AXES)}'
      )
    if not 2 <= self.fewest <= self.most:
      raise errors.UserError(
        f'nulls of a target: at least {self.fewest}, at most {self.most}; give '
        'two or more, and no more at least than at most'
      )

  def describe(self) -> str:
    """One line for the header of a table."""
    within = ', '.join(
      f'{name} {caliper:g} sd' for name, caliper in zip(AXES, self.calipers)
    )
    return (
      f'the {self.most} genes nearest in detection, mean rank in the cells '
      f'used and length of these cells, within {within}; at least '
      f'{self.fewest}; seed {self.seed}'
    )


@dataclasses.dataclass(frozen=True)
class Matches:
  """Nulls of T targets.

  Attributes:
    target_T: int64 keys.
    null_TK: int64 keys of the nulls, nearest first; -1 where there are fewer.
    within_T: int64 candidates within the calipers, before the cut at `most`.
    config: how they were chosen.
  """

  target_T: np.ndarray
  null_TK: np.ndarray
  within_T: np.ndarray
  config: MatchingConfig

  @property
  def num_T(self) -> np.ndarray:
    """Nulls of each target."""
    return (self.null_TK >= 0).sum(1)

  def nulls(self) -> np.ndarray:
    """All nulls of any target, ascending: what has to be run beside them."""
    return np.unique(self.null_TK[self.null_TK >= 0])

  def renumber(self, number_of: Mapping[int, int]) -> 'Matches':
    """The same by other keys: from tokens to the numbers of their variants.

    Nulls without a number are left out.

    Raises:
      UserError: a target has none.
    """
    missing = [t for t in self.target_T.tolist() if t not in number_of]
    if missing:
      raise errors.UserError(
        f'matching: {len(missing)} targets were not perturbed, the first is '
        f'{missing[0]}'
      )
    null_TK = np.full(self.null_TK.shape, -1, np.int64)
    for t, row in enumerate(self.null_TK.tolist()):
      kept = [k for k, key in enumerate(row) if key in number_of]
      null_TK[t, : len(kept)] = [number_of[row[k]] for k in kept]
    target_T = np.array([number_of[t] for t in self.target_T.tolist()])
    return dataclasses.replace(
      self,
      target_T=target_T.astype(np.int64),
      null_TK=null_TK,
    )


def of_effects(
  effects: effects_lib.CellEffects,
  num_cells: int,
  measured: Mapping[int, int] | None = None,
) -> Profiles:
  """Profiles of variants, from what was done to which cells.

  Args:
    effects: of every variant that may be target or null.
    num_cells: cells used, whether a variant acts in them or not.
    measured: by variant, see `Profiles.measured_G`; all alike by default.

  Raises:
    UserError: more cells than were used.
  """
  key_G, place_N = np.unique(effects.variant_N, return_inverse=True)
  is_shown_N = effects.rank_N >= 0
  return _profiles(
    key_G,
    place_N[is_shown_N],
    effects.rank_N[is_shown_N],
    effects.length_N[is_shown_N],
    num_cells,
    measured,
  )


def of_cells(
  cells: encoding.EncodedCells,
  measured: Mapping[int, int] | None = None,
) -> Profiles:
  """Profiles of all genes that encoded cells show, by token.

  To choose nulls before anything is perturbed. A gene behind the cut of a
  cell is not seen by the model, and counts as not detected in it.
  """
  lengths_C = np.diff(cells.starts_C1)
  rank_N = np.arange(len(cells.gene_ids_N)) - np.repeat(
    cells.starts_C1[:-1], lengths_C
  )
  key_G, place_N = np.unique(cells.gene_ids_N, return_inverse=True)
  return _profiles(
    key_G,
    place_N,
    rank_N,
    np.repeat(lengths_C, lengths_C),
    cells.num_cells,
    measured,
  )


def _profiles(key_G, place_N, rank_N, length_N, num_cells, measured):
  number = len(key_G)
  cells_G = np.bincount(place_N, minlength=number)
  if cells_G.max(initial=0) > num_cells:
    raise errors.UserError(
      f'matching: a gene was seen in {cells_G.max()} cells, but '
      f'{num_cells} were used'
    )
  with np.errstate(invalid='ignore'):
    rank_G = np.bincount(place_N, rank_N, number) / cells_G
    length_G = np.bincount(place_N, length_N, number) / cells_G
  measured_G = np.ones(number, np.int64)
  if measured is not None:
    measured_G[:] = [measured.get(key, 0) for key in key_G.tolist()]
  return Profiles(
    key_G=key_G.astype(np.int64),
    cells_G=cells_G,
    detection_G=cells_G / max(num_cells, 1),
    rank_G=rank_G,
    length_G=length_G,
    measured_G=measured_G,
  )


def match(
  profiles: Profiles,
  targets: Sequence[int] | np.ndarray,
  candidates: Sequence[int] | np.ndarray | None = None,
  *,
  excluded: Collection[int] = (),
  also: Profiles | None = None,
  config: MatchingConfig = MatchingConfig(),
) -> Matches:
  """Null genes of every target.

  Args:
    profiles: of targets and candidates.
    targets: keys.
    candidates: keys that nulls are drawn from; all that were profiled if None.
    excluded: keys that are null of no target, such as the genes of the pathway
      that is asked about.
    also: profiles in other cells, in which detection and rank are to be alike
      too: where genes are put into cells, those that they come from and those
      that they are put into.
    config: how.

  Raises:
    UserError: a key that was not profiled.
  """
  targets = np.asarray(targets, np.int64).reshape(-1)
  row_T = profiles.rows(targets)
  row_M = (
    np.arange(len(profiles.key_G))
    if candidates is None
    else profiles.rows(np.unique(np.asarray(candidates, np.int64)))
  )
  usable = (profiles.cells_G > 0) & (profiles.measured_G != 0)
  usable &= ~np.isin(profiles.key_G, np.fromiter(excluded, np.int64))
  row_M = row_M[usable[row_M]]
  place_GA, caliper_A = _standardised(profiles, row_M), config.calipers
  if also is not None:
    other_GA = _standardised(_aligned(also, profiles.key_G), row_M)
    # The length of cells that lack a gene is nothing of the gene.
    place_GA = np.concatenate([place_GA, other_GA[:, :2]], 1)
    caliper_A = (*caliper_A, *config.calipers[:2])
  caliper_A = np.asarray(caliper_A) * (1 + 1e-12)
  tie_M = _tie_order(profiles.key_G[row_M], config.seed)
  null_TK = np.full((len(targets), config.most), -1, np.int64)
  within_T = np.zeros(len(targets), np.int64)
  for t, row in enumerate(row_T.tolist()):
    if not profiles.cells_G[row]:
      continue
    apart_MA = np.abs(place_GA[row_M] - place_GA[row])
    is_near_M = (apart_MA <= caliper_A).all(1)
    is_near_M &= profiles.measured_G[row_M] == profiles.measured_G[row]
    is_near_M &= profiles.key_G[row_M] != targets[t]
    near = np.flatnonzero(is_near_M)
    within_T[t] = len(near)
    distance = np.sqrt((apart_MA[near] ** 2).sum(1))
    order = np.lexsort((tie_M[near], distance))[: config.most]
    null_TK[t, : len(order)] = profiles.key_G[row_M[near[order]]]
  return Matches(targets, null_TK, within_T, config)


def _standardised(profiles: Profiles, row_M: np.ndarray) -> np.ndarray:
  """Logit detection, rank and length in sd of the candidates, [G, 3].

  An axis along which the candidates do not differ says nothing, and its
  numbers are left as they are.
  """
  cells_G = profiles.cells_G
  # Half a cell more on both sides: a gene that all cells show has a logit.
  logit_G = np.log((cells_G + 0.5) / (_total(profiles) - cells_G + 0.5))
  place_GA = np.stack([logit_G, profiles.rank_G, profiles.length_G], 1)
  if len(row_M) > 1:
    sd_A = place_GA[row_M].std(0, ddof=1)
    place_GA /= np.where(sd_A > 0, sd_A, 1.0)
  return place_GA


def _total(profiles: Profiles) -> float:
  """Cells used."""
  is_shown_G = profiles.cells_G > 0
  cells_G, share_G = profiles.cells_G, profiles.detection_G
  return np.max(cells_G[is_shown_G] / share_G[is_shown_G], initial=1.0)


def _aligned(profiles: Profiles, key_G: np.ndarray) -> Profiles:
  """Profiles of other keys; what no cell shows stands behind all."""
  place_G = np.searchsorted(profiles.key_G, key_G)
  place_G = np.minimum(place_G, max(len(profiles.key_G) - 1, 0))
  has_G = np.zeros(len(key_G), bool)
  if len(profiles.key_G):
    has_G = profiles.key_G[place_G] == key_G

  def taken(column_G, otherwise):
    found_G = np.full(len(key_G), otherwise, column_G.dtype)
    found_G[has_G] = column_G[place_G[has_G]]
    return found_G

  cells_G = taken(profiles.cells_G, 0)
  return Profiles(
    key_G=key_G,
    cells_G=cells_G,
    detection_G=cells_G / _total(profiles),
    rank_G=taken(profiles.rank_G, np.max(profiles.rank_G, initial=0.0)),
    length_G=taken(profiles.length_G, np.max(profiles.length_G, initial=0.0)),
    measured_G=taken(profiles.measured_G, 0),
  )


def _tie_order(key_M: np.ndarray, seed: int) -> np.ndarray:
  """An order of keys that depends on each key and the seed alone, uint64."""
  return np.array(
    [kernels.fold(seed, int(key)) for key in key_M.tolist()], np.uint64
  )


def null_sets(
  profiles: Profiles,
  members: Sequence[int],
  number: int,
  candidates: Sequence[int] | np.ndarray | None = None,
  *,
  excluded: Collection[int] = (),
  also: Profiles | None = None,
  config: MatchingConfig = MatchingConfig(),
) -> list[tuple[int, ...]]:
  """Null sets of a set of genes: for each member one of its own nulls.

  Args:
    profiles: of single genes.
    members: keys of the genes of the set.
    number: sets wanted.
    candidates: as for `match`.
    excluded: as for `match`; no member is in a null set.
    also: as for `match`.
    config: how single genes are matched.

  Returns:
    At most `number` sets, members in the order given, no gene in the same place
    of two: sets that share genes are not independent. None, where a member has
    too few nulls within the calipers.
  """
  found = match(
    profiles,
    members,
    candidates,
    excluded={*excluded, *members},
    also=also,
    config=config,
  )
  pools = [row[row >= 0] for row in found.null_TK]
  if min(map(len, pools), default=0) < config.fewest:
    return []
  rng = np.random.Generator(np.random.Philox(config.seed))
  best: list[tuple[int, ...]] = []
  for _ in range(
    20
  ):  # a gene may be null of two members: then it is drawn anew
    mixed = [rng.permutation(pool).tolist() for pool in pools]
    sets = [drawn for drawn in zip(*mixed) if len({*drawn}) == len(drawn)]
    # Two members may have drawn the same genes in another order.
    sets = list({frozenset(drawn): drawn for drawn in sets}.values())
    best = max(best, sets[:number], key=len)
    if len(best) == min(number, *map(len, pools)):
      break
  return best
