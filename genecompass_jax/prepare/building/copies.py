"""Second stage: cells that stand in the sources more than once.

Fingerprints of all pieces are joined, one range of keys a task, and every pair
that a shared key suggests is compared count by count. Of the copies of a cell
one stays: that of the source which measured most genes.
"""

import collections
import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from genecompass_jax.prepare.building import fingerprints, pieces, plans

NAME = 'copies'  # of the stage
PRINTS_PER_TASK = 1 << 22
_ALL_PAIRS = 8  # cells of one key that are compared each with each


def num_tasks(num_prints: int) -> int:
  """Ranges of keys to join, each in memory: a power of two."""
  tasks = 1
  while tasks < 2**pieces.PREFIX_BITS and num_prints > tasks * PRINTS_PER_TASK:
    tasks *= 2
  return tasks


@dataclasses.dataclass(frozen=True)
class Join:
  """What the tasks share: the plan, and how many they are."""

  plan: plans.Plan
  num_tasks: int


def find(context: Join, task: int, folder: str) -> dict:
  """Joins one range of keys; leaves `pairs` [n, 2] of (source, row)."""
  plan = context.plan
  stage = plan.stage(pieces.NAME)
  each = 2**pieces.PREFIX_BITS // context.num_tasks
  parts = []
  for number in range(len(plan.pieces)):
    starts = stage.array(number, 'print_starts')
    a, b = int(starts[task * each]), int(starts[(task + 1) * each])
    if b > a:
      parts.append(np.asarray(stage.array(number, 'prints')[a:b]))
  found = np.concatenate(parts) if parts else np.zeros(0, fingerprints.PRINT)
  found = found[np.lexsort((found['row'], found['source'], found['key']))]
  pairs = sorted(_candidates(found))
  good = _confirmed(plan, pairs)
  array = np.array(good, np.int64).reshape(-1, 2, 2)
  np.save(os.path.join(folder, 'pairs.npy'), array)
  return {'candidates': len(pairs), 'pairs': len(good)}


Cell = tuple[int, int]  # source, row


def _candidates(found: np.ndarray) -> set[tuple[Cell, Cell]]:
  """Pairs of cells that share a key."""
  same = found['key'][1:] == found['key'][:-1]
  edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]])))
  pairs = set()
  for a, b in edges.reshape(-1, 2):
    cells = [(int(p['source']), int(p['row'])) for p in found[a : b + 1]]
    if len(cells) <= _ALL_PAIRS:
      pairs |= {
        (one, other) for k, one in enumerate(cells) for other in cells[k + 1 :]
      }
    else:  # with the first and the next one: copies are chained
      pairs |= {(cells[0], other) for other in cells[1:]}
      pairs |= set(zip(cells, cells[1:]))
  return pairs


def _confirmed(
  plan: plans.Plan, pairs: Sequence[tuple[Cell, Cell]]
) -> list[tuple[Cell, Cell]]:
  reader = pieces.CellReader(plan)
  measured: dict[int, np.ndarray] = {}
  good = []
  for one, other in pairs:
    species, mine = reader.read(*one)
    species_other, theirs = reader.read(*other)
    if species != species_other:
      continue
    if species not in measured:
      measured[species] = plan.load(f'measured/{species}')
    common_R = measured[species][one[0]] & measured[species][other[0]]
    if fingerprints.agree(mine, theirs, common_R):
      good.append((one, other))
  return good


def drop(
  pairs_P22: np.ndarray,
  num_genes: Sequence[int],
  keep: Sequence[np.ndarray],
) -> tuple[list[Cell], dict[tuple[int, int], int]]:
  """Which copies go.

  Args:
    pairs_P22: int64 pairs of (source, row) that are one cell.
    num_genes: measured by each source; of the copies that the filters passed
      the one of most genes stays, the first of equal ones.
    keep: for each source, bool: the cells that the filters passed.

  Returns:
    The cells that go, and the number of cells that each pair of sources (or a
    source with itself) shares, filters or not.
  """
  root: dict[Cell, Cell] = {}

  def find_root(cell: Cell) -> Cell:
    while root.setdefault(cell, cell) != cell:
      root[cell] = root[root[cell]]
      cell = root[cell]
    return cell

  for one, other in pairs_P22:
    a, b = find_root(tuple(map(int, one))), find_root(tuple(map(int, other)))
    if a != b:
      root[max(a, b)] = min(a, b)
  groups = collections.defaultdict(list)
  for cell in sorted(root):
    groups[find_root(cell)].append(cell)
  gone: list[Cell] = []
  shared: collections.Counter = collections.Counter()
  for members in groups.values():
    passed = [cell for cell in members if keep[cell[0]][cell[1]]]
    passed.sort(key=lambda cell: (-num_genes[cell[0]], cell))
    gone += passed[1:]
    of = collections.Counter(source for source, _ in members)
    for source, number in of.items():
      shared[source, source] += number - 1
      for other in of:
        if source < other:
          shared[source, other] += 1
  return gone, {pair: n for pair, n in sorted(shared.items()) if n}
