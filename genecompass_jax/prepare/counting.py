"""Compiled passes over chunks of a source's matrix.

One checks values and counts what the filters ask for, one sums columns into
the rows of a gene list.
"""

import numpy as np

from genecompass_jax import kernels

CODING, MITO = 1, 2  # flags of a column
_LEAST = 2.0**-126  # corrected counts below are 0 as a float32, or nearly so
FINE, _NEGATIVE, _NOT_FINITE, _NOT_INTEGER, _TOO_LARGE, _TOO_MANY = range(6)
WRONG = {
  _NEGATIVE: 'a negative value',
  _NOT_FINITE: 'a value that is not finite',
  _NOT_INTEGER: 'a value that is not an integer (corrected counts are taken '
  'with --allow_noninteger, never rounded)',
  _TOO_LARGE: 'a count above 4,294,967,295',
  _TOO_MANY: 'more than 4,294,967,295 counts',
}


@kernels.compiled
def measure(
  columns_N, values_N, starts_C1, index_C, flags, integers, genes_C, coding_C,
  mito_C, total_C, column_sums,
):  # fmt: skip
  """Checks the values of the cells index_C and counts what the filters ask."""
  for c in range(len(index_C)):
    for i in range(starts_C1[index_C[c]], starts_C1[index_C[c] + 1]):
      value = values_N[i]
      if value == 0.0:
        continue
      if value - value != 0.0:
        return _NOT_FINITE, c
      if value < 0.0:
        return _NEGATIVE, c
      if integers:
        if value != np.floor(value):
          return _NOT_INTEGER, c
        if value > 4294967295.0:
          return _TOO_LARGE, c
      elif value > 3.4e38:  # more than a float32 holds
        return _NOT_FINITE, c
      elif value < _LEAST:
        continue
      column = columns_N[i]
      flag = flags[column]
      genes_C[c] += 1
      coding_C[c] += flag & CODING
      if flag & MITO:
        mito_C[c] += value
      total_C[c] += value
      column_sums[column] += value
    if integers and total_C[c] > 4294967295.0:
      return _TOO_MANY, c
  return FINE, 0


# place of the only set bit, by a de Bruijn sequence
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_PLACE = np.zeros(64, np.int64)
for _i in range(64):
  _PLACE[((1 << _i) * int(_DE_BRUIJN) & (1 << 64) - 1) >> 58] = _i


@kernels.compiled
def gather(
  columns_N, values_N, starts_C1, index_C, row_of_column, num_rows, rows_N,
  counts_N, out_C1,
):  # fmt: skip
  """Sums columns into rows; a bitmap of the rows gives them in order."""
  sum_R = np.zeros(num_rows, np.float64)
  words = np.zeros((num_rows + 63) // 64, np.uint64)
  out = 0
  for c in range(len(index_C)):
    for i in range(starts_C1[index_C[c]], starts_C1[index_C[c] + 1]):
      row = row_of_column[columns_N[i]]
      if row >= 0 and values_N[i] >= _LEAST:
        sum_R[row] += values_N[i]
        words[row >> 6] |= np.uint64(1) << np.uint64(row & 63)
    for w in range(len(words)):
      word = words[w]
      while word:
        bit = word & (~word + np.uint64(1))
        row = (w << 6) + _PLACE[(bit * _DE_BRUIJN) >> np.uint64(58)]
        rows_N[out] = row
        counts_N[out] = sum_R[row]
        sum_R[row] = 0.0
        out += 1
        word ^= bit
      words[w] = 0
    out_C1[c + 1] = out
