"""The genes of a cell in falling order, and the logarithms of their counts.

The compiled inner part of `encoding`, which says what the order means.
"""

import numpy as np

from genecompass_jax import kernels

MAX_TOKENS = 1 << 20  # `_PLACE_BITS` of a sort word hold a place
_LOG_BITS = 7


def _log_tables() -> tuple[np.ndarray, np.ndarray]:
  centre = 1 + np.arange((1 << _LOG_BITS) + 1) / (1 << _LOG_BITS)
  return 1 / centre, np.log2(centre)


_INVERSE, _LOG2 = _log_tables()
_1_LN2 = 1 / np.log(2)


@kernels.compiled
def log2_1p(n, quotient_n, one_n, value_n):
  """value_n[:n] = float32 of log2(1 + quotient), in a tenth of log1p's time.

  1 + q = 2^e c (1 + r), c the nearest of 129 centres in [1, 2] and
  |r| <= 2^-8: the series leaves 1e-13 relative, before rounding to float32.
  """
  bits_n = one_n.view(np.int64)
  for i in range(n):
    one_n[i] = 1.0 + quotient_n[i]
  for i in range(n):
    bits = bits_n[i]
    exponent = (bits >> 52) - 1023
    fraction = bits & 0x000FFFFFFFFFFFFF
    nearest = (fraction + (1 << (51 - _LOG_BITS))) >> (52 - _LOG_BITS)
    m = 1.0 + fraction * 2.0**-52
    r = (m - (1.0 + nearest * 2.0**-_LOG_BITS)) * _INVERSE[nearest]
    if quotient_n[i] < 2.0**-10:  # 1 + q has dropped the low bits of q
      r = quotient_n[i]
    series = 1 + r * (-1 / 2 + r * (1 / 3 + r * (-1 / 4 + r * (1 / 5))))
    value_n[i] = exponent + _LOG2[nearest] + r * series * _1_LN2


@kernels.compiled
def _before(a, b, quotient_n, hash_n):
  """Whether a ranks before b: by quotient, then by hash (all distinct)."""
  if quotient_n[a] != quotient_n[b]:
    return quotient_n[a] > quotient_n[b]
  return hash_n[a] < hash_n[b]


@kernels.compiled
def _merge_sort(order_n, other_n, n, quotient_n, hash_n):
  """Sorts places by `_before` in n log n, whatever the input."""
  width = 1
  while width < n:
    for low in range(0, n, 2 * width):
      middle = min(low + width, n)
      high = min(low + 2 * width, n)
      a = low
      b = middle
      for k in range(low, high):
        if a < middle and (
          b >= high or not _before(order_n[b], order_n[a], quotient_n, hash_n)
        ):
          other_n[k] = order_n[a]
          a += 1
        else:
          other_n[k] = order_n[b]
          b += 1
    order_n[:n] = other_n[:n]
    width *= 2


DIGIT_BITS = 9  # of a digit of the quotient
HASH_BITS = 13  # at most, of the one digit of the hash
_PLACE_BITS = 20
_SAMPLE = 64


@kernels.compiled
def _sum_before(bins, size):
  """Turns counts of bins into the first place of each."""
  total = np.uint32(0)
  for b in range(size):
    count = bins[b]
    bins[b] = total
    total += count


@kernels.compiled
def rank(
  n, quotient_n, hash_n, near_n, order_n, words_n, other_n, hash_bins, bins
):  # fmt: skip
  """order_n[:n] = places by falling quotient, ties by rising hash.

  Counting passes on the top of the hash and on 18 bits of the quotient (its
  float32 bits, over the range in the cell) leave few neighbours out of order;
  an insertion pass over the exact float64 quotients and 64-bit hashes puts
  them right. The commonest quotient (half and more of a UMI cell) is set
  aside before the passes over the quotient: increments of one counter wait
  for each other.
  """
  if n == 0:
    return
  near_bits_n = near_n.view(np.int32)
  place_bits = np.uint64(_PLACE_BITS)
  place_mask = np.uint64((1 << _PLACE_BITS) - 1)
  low = np.int32(0x7FFFFFFF)
  high = np.int32(0)
  for i in range(n):
    near_n[i] = quotient_n[i]
  for i in range(n):
    low = min(low, near_bits_n[i])
    high = max(high, near_bits_n[i])
  shift = 0
  while (high - low) >> shift >= 1 << (2 * DIGIT_BITS):
    shift += 1

  sample = min(n, _SAMPLE)  # majority vote: any outcome is correct
  votes = 0
  common_bits = np.int32(0)
  for i in range(sample):
    if votes == 0:
      common_bits = near_bits_n[i]
    votes += 1 if near_bits_n[i] == common_bits else -1
  votes = 0
  for i in range(sample):
    votes += near_bits_n[i] == common_bits
  common = np.uint64((high - common_bits) >> shift)

  hash_bits = 6
  while hash_bits < HASH_BITS and (1 << hash_bits) < 2 * n:
    hash_bits += 1
  top = np.uint64(64 - hash_bits)
  hash_bins[: 1 << hash_bits] = 0
  for i in range(n):
    hash_bins[hash_n[i] >> top] += 1
  _sum_before(hash_bins, 1 << hash_bits)
  for i in range(n):
    b = hash_n[i] >> top
    to = hash_bins[b]
    hash_bins[b] = to + 1
    key = np.uint64((high - near_bits_n[i]) >> shift)
    other_n[to] = (key << place_bits) | np.uint64(i)

  num_common = 0
  num_above = n
  rest = n
  if 4 * votes < sample:  # nothing common enough to pay for the parting
    words_n, other_n = other_n, words_n
  else:
    rest = 0
    num_above = 0
    for i in range(n):
      key = other_n[i] >> place_bits
      words_n[rest] = other_n[i]
      order_n[num_common] = other_n[i] & place_mask
      num_above += key < common
      num_common += key == common
      rest += key != common

  mask = np.uint64((1 << DIGIT_BITS) - 1)
  high_digit = np.uint64(_PLACE_BITS + DIGIT_BITS)
  bins[:] = 0
  for i in range(rest):
    bins[0, (words_n[i] >> place_bits) & mask] += 1
    bins[1, words_n[i] >> high_digit] += 1
  _sum_before(bins[0], 1 << DIGIT_BITS)
  _sum_before(bins[1], 1 << DIGIT_BITS)
  for i in range(rest):
    b = (words_n[i] >> place_bits) & mask
    to = bins[0, b]
    bins[0, b] = to + 1
    other_n[to] = words_n[i]
  for i in range(num_common - 1, -1, -1):
    order_n[num_above + i] = order_n[i]
  for i in range(rest):
    b = other_n[i] >> high_digit
    to = bins[1, b]
    bins[1, b] = to + 1
    order_n[to if to < num_above else to + num_common] = other_n[i] & place_mask

  moves = 16 * n
  above_quotient = quotient_n[order_n[0]]
  above_hash = hash_n[order_n[0]]
  for i in range(1, n):
    place = order_n[i]
    quotient = quotient_n[place]
    hash_ = hash_n[place]
    if quotient < above_quotient or (
      quotient == above_quotient and hash_ > above_hash
    ):
      above_quotient = quotient
      above_hash = hash_
      continue
    j = i
    while j > 0 and _before(place, order_n[j - 1], quotient_n, hash_n):
      order_n[j] = order_n[j - 1]
      j -= 1
    order_n[j] = place
    moves -= i - j
    if moves < 0:  # many quotients that 18 bits do not tell apart
      _merge_sort(order_n, words_n, n, quotient_n, hash_n)
      return
