"""Large matrices -> few columns: truncated SVD and random projection.

Everything is float64 and seeded. On one machine the same matrix gives the
same bytes. Between machines, BLAS libraries and thread counts sums are rounded
differently: vectors then agree to about 1e-5, except inside groups of equal
singular values, where any rotation is right.
"""

import numpy as np
from scipy import sparse

Matrix = np.ndarray | sparse.sparray

_EXACT = 1200  # rows or columns up to which the SVD is a dense one
_EXTRA = 16  # columns of a block beyond those wanted
_ROUNDS = 3  # of block Krylov; the test states the accuracy
_NOISE = 1e-9  # of the largest singular value: what is below is rounding


def svd(
  matrix_NM: Matrix, width: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
  """Left singular vectors and singular values, largest first.

  Small matrices are decomposed exactly. Large ones by a block Krylov space
  (Musco and Musco 2015) from a seeded start, which unlike Lanczos finds equal
  singular values too; in the flat part of a spectrum they are up to 1 % low.
  The entry of largest size in each vector is positive.

  Args:
    matrix_NM: dense or sparse.
    width: how many, at most; no more than the matrix has.
    seed: of the start.

  Returns:
    u_NP, s_P, and the share of the squares of the matrix that they hold.
  """
  total = float((matrix_NM.multiply(matrix_NM)).sum()) if sparse.issparse(
    matrix_NM
  ) else float(np.square(matrix_NM, dtype=np.float64).sum())  # fmt: skip
  if min(matrix_NM.shape) <= _EXACT:
    u_NP, s_P = _exact(matrix_NM)
  else:
    u_NP, s_P = _krylov(matrix_NM, width, seed)
  rank = int((s_P > _NOISE * max(s_P.max(initial=0), 1e-300)).sum())
  number = min(width, rank)
  u_NP, s_P = u_NP[:, :number], s_P[:number]
  largest_P = np.abs(u_NP).argmax(0)
  u_NP = u_NP * np.sign(u_NP[largest_P, np.arange(number)])
  return u_NP, s_P, float(np.square(s_P).sum() / total) if total else 0.0


def project(matrix_NM: Matrix, width: int, seed: int) -> np.ndarray:
  """Rows times a seeded Gaussian matrix: [N, width].

  Inner products are kept to a standard error of 1/sqrt(width) of the product
  of the norms, however many dimensions the rows have (Johnson-Lindenstrauss).
  """
  rng = np.random.default_rng([seed, 1])
  return (
    matrix_NM @ rng.normal(size=(matrix_NM.shape[1], width)) / np.sqrt(width)
  )


def _exact(matrix_NM: Matrix) -> tuple[np.ndarray, np.ndarray]:
  """From the eigenvectors of the smaller of the two Gram matrices."""
  is_wide = matrix_NM.shape[0] <= matrix_NM.shape[1]
  gram = matrix_NM @ matrix_NM.T if is_wide else matrix_NM.T @ matrix_NM
  gram = gram.toarray() if sparse.issparse(gram) else gram
  square_P, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
  # Squares lose half of the digits: what is below is not told from zero.
  square_P = np.where(square_P > 1e-14 * square_P[-1], square_P, 0)[::-1]
  vectors = vectors[:, ::-1]
  s_P = np.sqrt(square_P)
  if is_wide:
    return vectors, s_P
  keep = s_P > 0
  return matrix_NM @ vectors[:, keep] / s_P[keep], s_P[keep]


def _krylov(matrix_NM, width, seed) -> tuple[np.ndarray, np.ndarray]:
  block = min(width + _EXTRA, *matrix_NM.shape)
  rng = np.random.default_rng([seed, 0])
  y_NB, _ = np.linalg.qr(
    matrix_NM @ rng.normal(size=(matrix_NM.shape[1], block))
  )
  blocks = [y_NB]
  for _ in range(_ROUNDS):
    y_NB, _ = np.linalg.qr(matrix_NM @ (matrix_NM.T @ y_NB))
    blocks.append(y_NB)
  basis_NK, _ = np.linalg.qr(np.concatenate(blocks, 1))
  small_MK = matrix_NM.T @ basis_NK
  square_K, vectors_KK = np.linalg.eigh(small_MK.T @ small_MK)
  order = np.argsort(-square_K, kind='stable')[:width]
  s_P = np.sqrt(np.maximum(square_K[order], 0))
  return basis_NK @ vectors_KK[:, order], s_P
