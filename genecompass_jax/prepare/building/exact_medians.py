"""Medians from the values themselves: one more pass for each mode, on request.

The histograms tell between which values the middle of each gene lies. The pass
counts how many values are below and keeps those between, a few in a hundred;
the middle of all is then picked among them.
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from genecompass_jax import corpus, encoding, kernels, medians
from genecompass_jax.prepare.building import builds, engines, pieces, runs

_COLLECTED = 1 << 26  # values that are put in order at a time


@dataclasses.dataclass(frozen=True)
class Refine:
  """What the tasks share: how runs are read, and the mode of the medians."""

  sort: runs.Sort
  mode: str


@kernels.compiled
def _collect(
  rows_N, counts_N, starts_C1, totals_C, token_R, merges, library, target_sum,
  brackets_V2, below_V, tokens_N, values_N,
):  # fmt: skip
  """Fills the values between the brackets -> how many, or -1 on bad cells."""
  longest = 0
  for cell in range(len(starts_C1) - 1):
    longest = max(longest, starts_C1[cell + 1] - starts_C1[cell])
  tokens_n = np.empty(longest + 1, np.int32)
  sums_n = np.empty(longest + 1, np.float64)
  lo_n = np.empty(longest + 1, np.float64)
  slot_V = np.full(len(below_V), -1, np.int32)
  out = 0
  for cell in range(len(starts_C1) - 1):
    n, status = encoding.merge_cell(
      rows_N, counts_N, starts_C1[cell], starts_C1[cell + 1], token_R, merges,
      slot_V, tokens_n, sums_n, lo_n,
    )  # fmt: skip
    if status != encoding.FINE:
      return -1
    for i in range(n):
      value = sums_n[i]
      if library:
        value = value / totals_C[cell] * target_sum
      token = tokens_n[i]
      if value < brackets_V2[token, 0]:
        below_V[token] += 1
      elif value <= brackets_V2[token, 1]:
        tokens_N[out] = token
        values_N[out] = value
        out += 1
  return out


def collect(context: Refine, task: int, folder: str) -> dict:
  """Values between the brackets of a bucket's training cells, by token."""
  plan = context.sort.plan
  species, bucket = context.sort.buckets[task]
  some = pieces.read_bucket(plan, species, bucket)
  if some is None:
    return {'cells': 0}
  split_C = runs.splits_of(context.sort, some)
  run = some.take(np.flatnonzero(split_C == corpus.SPLITS.index('train')))
  ragged = runs.median_cells(context.sort, species, run)
  vocab = plan.vocabulary()
  token_R = vocab.token_G[vocab.gene_rows(species)].astype(np.int32)
  rows_N, counts_N, starts_C1 = encoding.kernel_arrays(ragged)
  below_V = np.zeros(vocab.size, np.int64)
  tokens_N = np.empty(len(rows_N), np.int32)
  values_N = np.empty(len(rows_N), np.float64)
  size = _collect(
    rows_N,
    counts_N,
    starts_C1,
    kernels.read_only(np.asarray(ragged.totals_C, np.float64)),
    kernels.read_only(token_R),
    encoding.shares_tokens(token_R),
    context.mode == encoding.LIBRARY,
    1e4,
    np.array(plan.load(f'brackets/{context.mode}-{species}')),
    below_V,
    tokens_N,
    values_N,
  )
  if size < 0:
    raise ValueError('a run holds rows that its gene list does not have')
  order = np.argsort(tokens_N[:size], kind='stable')
  for name, array in (
    ('tokens', tokens_N[:size][order]),
    ('values', values_N[:size][order]),
    ('below', below_V),
  ):
    np.save(os.path.join(folder, f'{name}.npy'), array)
  return {'cells': ragged.num_cells}


def refine(
  engine: engines.Engine,
  sort: runs.Sort,
  values: medians.Medians,
  histograms: Mapping[int, medians.MedianHistogram],
) -> medians.Medians:
  """Exact medians in place of those of the histograms.

  Args:
    engine: who collects the values.
    sort: how the runs are read.
    values: from the histograms; its supports stand.
    histograms: of each species, in the mode of the medians.
  """
  plan = sort.plan
  for species, histogram in histograms.items():
    plan.save(f'brackets/{values.mode}-{species}', histogram.brackets_V2())
  stage = plan.stage(f'middles-{values.mode}')
  buckets = tuple(b for b in sort.buckets if b[0] in histograms)
  context = Refine(dataclasses.replace(sort, buckets=buckets), values.mode)
  builds.run_stage(
    engine, stage, collect, context, [0] * len(buckets), 'exact medians'
  )
  median_SV = values.median_SV.copy()
  for species in histograms:
    tasks = [k for k, (of, _) in enumerate(buckets) if of == species]
    tasks = [k for k in tasks if stage.result(k)['cells']]
    if tasks:
      _pick(stage, tasks, values.support_SV[species], median_SV[species])
  return dataclasses.replace(values, median_SV=median_SV)


def _pick(stage, tasks, support_V, median_V) -> None:
  """Puts the middle of each token's values in its place."""
  below_V = sum(np.asarray(stage.array(k, 'below')) for k in tasks)
  tokens = [stage.array(k, 'tokens') for k in tasks]
  values = [stage.array(k, 'values') for k in tasks]
  held_V = sum(np.bincount(t, minlength=len(median_V)) for t in tokens)
  upto_V = np.cumsum(held_V)
  first = 0
  while first < len(median_V):  # tokens whose values fit in memory
    before = upto_V[first - 1] if first else 0
    stop = int(np.searchsorted(upto_V, before + _COLLECTED, 'right'))
    stop = max(stop, first + 1)
    spans = [np.searchsorted(t, (first, stop)) for t in tokens]
    token_N = np.concatenate([t[a:b] for t, (a, b) in zip(tokens, spans)])
    value_N = np.concatenate([v[a:b] for v, (a, b) in zip(values, spans)])
    order = np.lexsort((value_N, token_N))
    value_N = value_N[order]
    starts_V = np.concatenate([[0], np.cumsum(held_V[first:stop])])
    for token in np.flatnonzero(held_V[first:stop]) + first:
      a = int(starts_V[token - first])
      middles = [
        value_N[a + (support_V[token] - 1 + side) // 2 - below_V[token]]
        for side in range(2)
      ]
      median_V[token] = np.mean(middles)
    first = stop
