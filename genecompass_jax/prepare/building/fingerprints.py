"""Fingerprints of cells, by which copies are found in other gene lists.

Two sources that measured different genes hold the same cell with different
counts, so a cell is hashed over the genes that both measured. One discordant
gene (a symbol that stands for two genes, say) changes a hash of all of them:
the genes are dealt over `BANDS` bands and each band is hashed apart. Cells that
agree in a band are candidates; `agree` looks at their counts.
"""

import dataclasses

import numpy as np

from genecompass_jax import encoding, kernels

MIN_GENES = 300  # measured by both sources; fewer say too little
MIN_COUNTS = 100  # of a cell in those genes
MAX_DISCORDANT = 0.02  # of the genes that either copy expresses
BANDS = 4
_MIN_IN_BAND = 8  # expressed genes: fewer are shared by chance
MAX_SETS = 64  # bits of a word
MAX_KINDS = 10  # of gene lists: 55 pairs, each with itself too
PRINT = np.dtype([('key', '<u8'), ('source', '<i4'), ('row', '<i8')])


@dataclasses.dataclass(frozen=True)
class GeneSets:
  """The sets of genes that cells of a species are hashed over.

  Attributes:
    member_R: uint64; bit s of a row is set where the gene is in set s.
    sets_Src: uint64; bit s of a source is set where it measured all of set s.
  """

  member_R: np.ndarray
  sets_Src: np.ndarray

  @classmethod
  def of(cls, measured_SrcR: np.ndarray) -> 'GeneSets':
    """Common genes of every pair of sources, each set once.

    Args:
      measured_SrcR: bool, genes that each source measured; none for a source
        without cells of the species.
    """
    panels_PR, panel_Src = np.unique(measured_SrcR, axis=0, return_inverse=True)
    panels_PR = _fewer(panels_PR)
    sets = {}
    for p in range(len(panels_PR)):
      for q in range(p, len(panels_PR)):
        common = panels_PR[p] & panels_PR[q]
        if common.sum() >= MIN_GENES:
          sets.setdefault(np.packbits(common).tobytes(), common)
    member_R = np.zeros(measured_SrcR.shape[1], np.uint64)
    sets_P = np.zeros(len(panels_PR), np.uint64)
    for bit, common in enumerate(sets.values()):
      word = np.uint64(1) << np.uint64(bit)
      member_R[common] |= word
      sets_P[~(common & ~panels_PR).any(axis=1)] |= word
    return cls(member_R, sets_P[panel_Src.ravel()])

  def unsearched(self, measured_SrcR: np.ndarray) -> np.ndarray:
    """Pairs of sources [n, 2] that have enough genes in common, but no set.

    Args:
      measured_SrcR: as of `of`.
    """
    kinds_KR, first_K, kind_Src = np.unique(
      measured_SrcR, axis=0, return_index=True, return_inverse=True
    )
    wide_KR = kinds_KR.astype(np.float32)
    sets_K = self.sets_Src[first_K]
    is_missed_KK = wide_KR @ wide_KR.T >= MIN_GENES
    is_missed_KK &= (sets_K[:, None] & sets_K[None]) == 0
    kind_Src = kind_Src.ravel()
    is_missed = is_missed_KK[kind_Src[:, None], kind_Src[None]]
    return np.argwhere(np.triu(is_missed))


def _fewer(panels_PR: np.ndarray) -> np.ndarray:
  """As many panels, of fewer kinds where their pairs would be too many.

  The two most alike are compared through what they have in common, until the
  sets of common genes fit a word. Candidates are confirmed over all genes that
  both measured, so nothing false is found; what a smaller set may miss are
  cells of few counts in it. Lists too short for any set take no place.
  """
  panels_PR = panels_PR.copy()
  kind_P = np.arange(len(panels_PR))
  is_long_P = panels_PR.sum(axis=1) >= MIN_GENES
  while len(kinds := np.unique(kind_P[is_long_P])) > MAX_KINDS:
    kept = panels_PR[kinds].astype(np.float32)
    both = kept @ kept.T
    sizes = np.diag(both)
    alike = both / np.maximum(sizes[:, None] + sizes[None] - both, 1)
    alike[np.tril_indices(len(kinds))] = -1
    p, q = np.unravel_index(alike.argmax(), alike.shape)
    joined = (kind_P == kinds[p]) | (kind_P == kinds[q])
    panels_PR[joined] = panels_PR[kinds[p]] & panels_PR[kinds[q]]
    kind_P[joined] = kinds[p]
  return panels_PR


@kernels.compiled
def _hash(rows_N, counts_N, starts_C1, member_R, wanted, base, keys_P, cells_P):
  """Fills the keys of all bands -> how many there are."""
  acc = np.zeros((64, BANDS), np.uint64)
  genes = np.zeros((64, BANDS), np.int64)
  total = np.zeros(64, np.float64)
  out = 0
  for cell in range(len(starts_C1) - 1):
    acc[:] = 0
    genes[:] = 0
    total[:] = 0
    for i in range(starts_C1[cell], starts_C1[cell + 1]):
      row = np.uint64(rows_N[i])
      word = member_R[row] & wanted
      if word == 0:
        continue
      count = counts_N[i]
      gene = kernels.mix64(row * kernels.GOLDEN + base)
      value = kernels.mix64(gene ^ (np.uint64(count) * kernels.GOLDEN))
      band = gene & np.uint64(BANDS - 1)
      s = 0
      while word:
        if word & np.uint64(1):
          acc[s, band] += value
          genes[s, band] += 1
          total[s] += count
        word >>= np.uint64(1)
        s += 1
    word = wanted
    s = 0
    while word:
      if word & np.uint64(1) and total[s] >= MIN_COUNTS:
        for band in range(BANDS):
          if genes[s, band] >= _MIN_IN_BAND:
            salt = np.uint64(s * BANDS + band) * kernels.GOLDEN
            keys_P[out] = kernels.mix64(acc[s, band] ^ salt ^ base)
            cells_P[out] = cell
            out += 1
      word >>= np.uint64(1)
      s += 1
  return out


def prints(
  cells: encoding.RaggedCells,
  sets: GeneSets,
  source: int,
  rows_C: np.ndarray,
  species: int,
) -> np.ndarray:
  """The fingerprints of some cells of a source, as `PRINT`.

  Args:
    cells: their counts; corrected ones are hashed by their whole part.
    sets: genes to hash over.
    source: number of the source.
    rows_C: their rows in the source.
    species: of the cells.
  """
  wanted = sets.sets_Src[source]
  each = int(wanted).bit_count() * BANDS
  if not each:
    return np.zeros(0, PRINT)
  rows_N, counts_N, starts_C1 = encoding.kernel_arrays(cells)
  keys_P = np.empty(each * cells.num_cells, np.uint64)
  cells_P = np.empty(len(keys_P), np.int64)
  base = kernels.fold(species, 0x66696E67)
  size = _hash(
    rows_N, counts_N, starts_C1, sets.member_R, wanted, base, keys_P, cells_P
  )
  found = np.empty(size, PRINT)
  found['key'], found['source'] = keys_P[:size], source
  found['row'] = rows_C[cells_P[:size]]
  return found


@kernels.compiled
def _compare(rows_n, counts_n, rows_m, counts_m, common_R):
  """Genes that differ, genes that either expresses, the fewer counts."""
  i = j = 0
  differ = either = 0
  total_n = total_m = 0.0
  while i < len(rows_n) or j < len(rows_m):
    a = np.int64(rows_n[i]) if i < len(rows_n) else np.int64(1 << 40)
    b = np.int64(rows_m[j]) if j < len(rows_m) else np.int64(1 << 40)
    row = min(a, b)
    one = two = 0.0
    if a == row:
      one = counts_n[i]
      i += 1
    if b == row:
      two = counts_m[j]
      j += 1
    if common_R[row]:
      either += 1
      differ += one != two
      total_n += one
      total_m += two
  return differ, either, min(total_n, total_m)


def agree(one: tuple, other: tuple, common_R: np.ndarray) -> bool:
  """Whether two cells are copies, over the genes that both sources measured.

  Args:
    one: (rows, counts) of a cell, rows ascending.
    other: of the other.
    common_R: bool, the genes.
  """
  if common_R.sum() < MIN_GENES:
    return False
  differ, either, total = _compare(*one, *other, common_R)
  return total >= MIN_COUNTS and differ <= MAX_DISCORDANT * either
