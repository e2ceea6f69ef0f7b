"""The order of genes where few scaled counts are distinct, as in UMI cells.

A cell of 1,200 expressed genes has some 40 distinct quotients of small counts
and medians. They are found with a small table and sorted alone; a gene's place
in its group of equals is then known, nearly, from its hash, which is uniform.
So one counting pass and a few neighbours put right give the order that
`ranking.rank` gives with four, and one logarithm serves a group.
"""

import numpy as np

from genecompass_jax import kernels, ranking

MOST_DISTINCT = 128
# A word: 7 bits of the group, 37 of the hash, 20 of the place.
GROUP_SHIFT = np.uint64(57)
PLACE_MASK = np.uint64((1 << 20) - 1)
_PLACE_BITS = np.uint64(20)
_TABLE_BITS = 10
_TABLE_SHIFT = np.uint64(64 - _TABLE_BITS)
_TABLE_MASK = np.uint64((1 << _TABLE_BITS) - 1)
_HALF = np.uint64(32)


def workspace(longest_cell: int) -> tuple[np.ndarray, ...]:
  """What `rank` works in: group and bin of genes, bins, groups, the table."""
  return (
    np.empty((2, longest_cell + 1), np.uint32),
    np.empty(2 * longest_cell + 2, np.uint32),
    np.zeros((8, MOST_DISTINCT), np.uint64),
    np.zeros((1 << _TABLE_BITS, 2), np.uint64),
  )


@kernels.compiled
def _group(n, quotient_n, group_n, table, slot_d, bits_d, size_4d):
  """Numbers distinct quotients as they come -> how many, or -1 if too many.

  Sizes of groups are kept in four parts: increments of one counter wait for
  each other, and one group may be most of the cell.
  """
  quotient_bits_n = quotient_n.view(np.uint64)
  num = 0
  fits = True
  for i in range(n):
    bits = quotient_bits_n[i]
    slot = (bits * kernels.GOLDEN) >> _TABLE_SHIFT
    while table[slot, 0] != bits:
      if table[slot, 0] != 0:
        slot = (slot + np.uint64(1)) & _TABLE_MASK
        continue
      if num == MOST_DISTINCT or bits == 0:  # 0 marks an empty slot
        fits = False
        break
      table[slot, 0] = bits
      table[slot, 1] = num
      slot_d[num] = slot
      bits_d[num] = bits
      size_4d[0, num] = 0
      size_4d[1, num] = 0
      size_4d[2, num] = 0
      size_4d[3, num] = 0
      num += 1
    if not fits:
      break
    group = table[slot, 1]
    group_n[i] = group
    size_4d[i & 3, group] += np.uint64(1)
  for d in range(num):
    table[slot_d[d], 0] = 0
  return num if fits else -1


@kernels.compiled
def rank(n, quotient_n, hash_n, words_n, genes, bins_b, groups, table, value_d):
  """Words of genes by falling quotient, ties by rising hash.

  Args:
    n: genes; quotients are not negative.
    quotient_n: float64 scaled counts.
    hash_n: uint64, uniform over 64 bits, all distinct.
    words_n: written to; of each word in order, `PLACE_MASK` gives the place of
      the gene and `GROUP_SHIFT` its group.
    genes: scratch, as the next three: see `workspace`.
    bins_b: scratch.
    groups: scratch.
    table: scratch, zero between calls.
    value_d: float32; log2(1 + quotient) of the groups, by falling quotient.

  Returns:
    Whether it was done: False where too many quotients are distinct, and
    nothing of use is written.
  """
  group_n = genes[0]
  bin_n = genes[1]
  first_d = groups[0]
  bits_d = groups[1]
  order_d = groups[2]
  word_d = groups[3]
  size_4d = groups[4:]
  num = _group(n, quotient_n, group_n, table, first_d, bits_d, size_4d)
  if num < 0:
    return False
  size_d = size_4d[0]
  for d in range(num):
    # Two bins a gene; positive floats sort as their bits.
    size_d[d] = 2 * (
      size_4d[0, d] + size_4d[1, d] + size_4d[2, d] + size_4d[3, d]
    )
    e = d
    while e > 0 and bits_d[order_d[e - 1]] < bits_d[d]:
      order_d[e] = order_d[e - 1]
      e -= 1
    order_d[e] = d
  sorted_d = size_4d[1]
  before = np.uint64(0)
  for e in range(num):
    d = order_d[e]
    sorted_d[e] = bits_d[d]
    word_d[d] = np.uint64(e) << GROUP_SHIFT
    first_d[d] = before
    before += size_d[d]
  ranking.log2_1p(
    num, sorted_d.view(np.float64), bits_d.view(np.float64), value_d
  )
  bins_b[: 2 * n] = 0
  for i in range(n):
    d = group_n[i]
    bin_n[i] = first_d[d] + (((hash_n[i] >> _HALF) * size_d[d]) >> _HALF)
  for i in range(n):
    bins_b[bin_n[i]] += np.uint32(1)
  total = np.uint32(0)
  for b in range(2 * n):
    count = bins_b[b]
    bins_b[b] = total
    total += count
  for i in range(n):
    b = bin_n[i]
    to = bins_b[b]
    bins_b[b] = to + np.uint32(1)
    hash_ = (hash_n[i] >> np.uint64(27)) << _PLACE_BITS
    words_n[to] = word_d[group_n[i]] | hash_ | np.uint64(i)
  above = np.uint64(0)
  for i in range(n):
    word = words_n[i]
    if (word >> _PLACE_BITS) <= (above >> _PLACE_BITS) and i > 0:
      hash_ = hash_n[word & PLACE_MASK]
      j = i
      while j > 0 and (
        (words_n[j - 1] >> _PLACE_BITS) > (word >> _PLACE_BITS)
        or (
          (words_n[j - 1] >> _PLACE_BITS) == (word >> _PLACE_BITS)
          and hash_n[words_n[j - 1] & PLACE_MASK] > hash_
        )
      ):
        words_n[j] = words_n[j - 1]
        j -= 1
      words_n[j] = word
      word = words_n[i]
    above = word
  return True
