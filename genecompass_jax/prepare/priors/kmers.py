"""Sequences -> vectors: k-mer counts, TF-IDF and principal components.

Or any encoder of the user's own, in an environment that has it.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence

import numpy as np

from genecompass_jax import errors, kernels
from genecompass_jax.prepare.priors import (
  embedding,
  factors,
  sequences as sequences_lib,
)

MAX_K = 6
_CODE = np.full(256, 4, np.uint8)
_CODE[list(b'ACGT')] = range(4)
_CHUNK = 4096  # rows


@dataclasses.dataclass(frozen=True)
class KmerConfig:
  """How sequences become vectors.

  Attributes:
    k: lengths of the words that are counted.
    is_stranded: count a word and its reverse complement apart.
    width: of the vectors, at most.
    power: of the singular values.
    rms: root mean square of the entries of the table; 0 leaves them.
    most_n: genes with a larger share of N are left out.
  """

  k: tuple[int, ...] = (4, 5, 6)
  is_stranded: bool = False
  width: int = 256
  power: float = 0.5
  rms: float = embedding.RMS
  most_n: float = 0.5

  def __post_init__(self):
    if not self.k or not all(1 <= k <= MAX_K for k in self.k):
      raise errors.UserError(f'k={self.k}: give lengths from 1 to {MAX_K}')
    errors.check_at_least('kmers', self, width=1, power=0, rms=0, most_n=0)


def embed(
  found: sequences_lib.Sequences, config: KmerConfig
) -> embedding.Embedded:
  """Principal components of the TF-IDF of words, both species together.

  The words of all sequences of a gene are added. Each length of word has the
  same weight: its rows have length 1 before the components are taken.

  Raises:
    UserError: no sequence has enough bases.
  """
  rows, kept, facts = _enough(found, config.most_n)
  place = np.searchsorted(rows, found.row_N[kept])
  blocks = []
  for k in config.k:
    index, number = words(k, config.is_stranded)
    counts = np.zeros((len(rows), number), np.float32)
    for n, r in zip(kept, place):
      code = _CODE[np.frombuffer(found.texts[n], np.uint8)]
      _count(code, k, index, counts[r])
    blocks.append(_tf_idf(counts))
  x_NF = np.concatenate(blocks, 1)
  del blocks
  x_NF -= x_NF.mean(0, dtype=np.float64).astype(np.float32)
  vectors_NP, share = _components(x_NF, config.width, config.power)
  facts |= {'words': x_NF.shape[1], 'share_of_variance_kept': round(share, 4)}
  return embedding.Embedded(
    rows, embedding.rescaled(vectors_NP, config.rms), facts
  )


def encode(
  found: sequences_lib.Sequences,
  encoder: str,
  batch: int = 64,
  rms: float = embedding.RMS,
  most_n: float = 0.5,
) -> embedding.Embedded:
  """Vectors of an encoder; the mean over the sequences of a gene.

  Args:
    found: the sequences.
    encoder: `module:function`; the function takes a list of text and returns an
      array [len(list), P].
    batch: sequences a call.
    rms: as of `KmerConfig`.
    most_n: as of `KmerConfig`.

  Raises:
    UserError: no such function, or it returns something else.
  """
  function = _load(encoder)
  rows, kept, facts = _enough(found, most_n)
  parts = []
  for first in range(0, len(kept), batch):
    texts = [found.texts[n].decode() for n in kept[first : first + batch]]
    try:
      part = np.asarray(function(texts))
    except Exception as error:  # code of the user's
      raise errors.UserError(
        f'{encoder} failed on {len(texts)} sequences: {type(error).__name__}: '
        f'{errors.first_line(error)}'
      ) from error
    if (
      part.ndim != 2
      or len(part) != len(texts)
      or part.dtype.kind not in 'fiu'
      or not np.isfinite(part).all()
    ):
      raise errors.UserError(
        f'{encoder} returned {part.dtype} of shape {part.shape} for '
        f'{len(texts)} sequences; it must be finite numbers [{len(texts)}, P]'
      )
    parts.append(part.astype(np.float64))
  if len({part.shape[1] for part in parts}) != 1:
    raise errors.UserError(f'{encoder} returned vectors of several widths')
  place = np.searchsorted(rows, found.row_N[kept])
  total = np.zeros((len(rows), parts[0].shape[1]))
  np.add.at(total, place, np.concatenate(parts))
  total /= np.bincount(place)[:, None]
  return embedding.Embedded(rows, embedding.rescaled(total, rms), facts)


def words(k: int, is_stranded: bool) -> tuple[np.ndarray, int]:
  """Column of every word of k bases, and the number of columns."""
  codes = np.arange(4**k)
  if is_stranded:
    return codes, len(codes)
  reverse, rest = np.zeros_like(codes), codes.copy()
  for _ in range(k):
    reverse = 4 * reverse + 3 - rest % 4
    rest //= 4
  kept, index = np.unique(np.minimum(codes, reverse), return_inverse=True)
  return index, len(kept)


def _enough(found, most_n):
  """Genes with enough bases, their sequences, and what was left out."""
  bad = [t.count(b'N') > most_n * len(t) or len(t) < MAX_K for t in found.texts]
  kept = np.flatnonzero(~np.array(bad, bool))
  if not len(kept):
    raise errors.UserError('no gene has a sequence with enough known bases')
  rows = np.unique(found.row_N[kept])
  facts = {
    'sequences': len(found.texts),
    'sequences_mostly_unknown': int(len(found.texts) - len(kept)),
    'genes_with_several': int(len(kept) - len(rows)),
  }
  return rows, kept, facts


@kernels.compiled
def _count(code_L, k, index, counts):
  """Adds the words of a sequence; words with an N do not count."""
  word, known = np.int64(0), 0
  size = np.int64(4) ** k
  for code in code_L:
    if code > 3:
      known = 0
      continue
    word = (word * 4 + code) % size
    known += 1
    if known >= k:
      counts[index[word]] += np.float32(1)


def _tf_idf(counts_NF: np.ndarray) -> np.ndarray:
  """Rows of length 1, in place."""
  number = (counts_NF > 0).sum(0)
  idf_F = np.log((1 + len(counts_NF)) / (1 + number)) + 1
  counts_NF *= idf_F.astype(np.float32)
  norm_N = np.sqrt(np.square(counts_NF, dtype=np.float64).sum(1))
  counts_NF /= np.maximum(norm_N, 1e-30)[:, None].astype(np.float32)
  return counts_NF


def _components(x_NF: np.ndarray, width: int, power: float):
  """Scores of the principal components, exactly, from the smaller square."""
  if len(x_NF) < x_NF.shape[1]:
    u_NP, s_P, share = factors.svd(x_NF.astype(np.float64), width, 0)
    return u_NP * s_P**power, share
  gram_FF = np.zeros((x_NF.shape[1],) * 2)
  for first in range(0, len(x_NF), _CHUNK):
    part = x_NF[first : first + _CHUNK].astype(np.float64)
    gram_FF += part.T @ part
  square_F, vectors_FF = np.linalg.eigh(gram_FF)
  square_F = np.maximum(square_F[::-1], 0)
  rank = int((square_F > 1e-10 * square_F[0]).sum())
  number = min(width, rank)
  v_FP = vectors_FF[:, ::-1][:, :number]
  v_FP = v_FP * np.sign(v_FP[np.abs(v_FP).argmax(0), np.arange(number)])
  scale_P = np.sqrt(square_F[:number]) ** (power - 1)
  share = square_F[:number].sum() / max(square_F.sum(), 1e-300)
  return x_NF @ (v_FP * scale_P), float(share)


def _load(encoder: str) -> Callable[[Sequence[str]], np.ndarray]:
  module, found, name = encoder.partition(':')
  if not found:
    raise errors.UserError(f'--encoder {encoder}: give module:function')
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise errors.UserError(
      f'--encoder {encoder}: {errors.first_line(error)}; it must be importable '
      'from where this runs (PYTHONPATH)'
    ) from None
