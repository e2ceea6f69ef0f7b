"""How far a cell is from those that the model was trained on: `gc_ood`.

A reference sample is a few thousand training cells, embedded by the model, in
`reference.npz` beside its config.json. The distance of a cell is that to its
10th nearest neighbour in the sample, between vectors of unit length (the
detector of Sun et al., ICML 2022). `gc_ood` is the percentile of that distance
among the distances of the sample's own cells, each to the others: 50 is as far
as the median training cell, 100 farther than all of them. It says how unusual
a cell is to the model, not why: another tissue, another protocol, few counts.

States belong to one step of one model. A sample of another step is not used.
"""

import dataclasses
import functools
import io
import zipfile
from collections.abc import Iterator

import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  encoding,
  errors,
  paths,
  pretrained,
)
from genecompass_jax.analysis import model_cells
from genecompass_jax.prepare import sources

FILE = 'reference.npz'
NEIGHBOUR = 10
LEAST = 100  # cells; with fewer, a percentile says nothing
CELLS = 2048
_ROWS = 1024  # cells compared at a time


@dataclasses.dataclass(frozen=True)
class ReferenceSample:
  """R embedded training cells.

  Attributes:
    name: where the cells come from.
    unit_RD: float32 embeddings, of unit length.
  """

  name: str
  unit_RD: np.ndarray

  @functools.cached_property
  def distance_R(self) -> np.ndarray:
    """Ascending distances of the sample's cells, each to the others."""
    return np.sort(self._distances(self.unit_RD, NEIGHBOUR + 1))

  def percentiles(self, embeddings_BD: np.ndarray) -> np.ndarray:
    """float32 [B] from 0 to 100; see the module."""
    distance_B = self._distances(unit(embeddings_BD), NEIGHBOUR)
    below_B = np.searchsorted(self.distance_R, distance_B)
    return (100.0 * below_B / len(self.distance_R)).astype(np.float32)

  def _distances(self, unit_BD: np.ndarray, neighbour: int) -> np.ndarray:
    """Distance to the n-th nearest cell of the sample, itself included."""
    found = []
    for first in range(0, len(unit_BD), _ROWS):
      # Of unit vectors: |a - b|^2 = 2 - 2 a b. In float64, for near ones.
      cosine_BR = unit_BD[first : first + _ROWS].astype(np.float64) @ (
        self.unit_RD.T.astype(np.float64)
      )
      nth_B = np.partition(-cosine_BR, neighbour - 1, axis=1)[:, neighbour - 1]
      found.append(np.sqrt(np.maximum(2 + 2 * nth_B, 0)))
    return np.concatenate([np.zeros(0), *found])


def unit(embeddings_BD: np.ndarray) -> np.ndarray:
  """Embeddings of unit length."""
  norm_B1 = np.linalg.norm(embeddings_BD, axis=1, keepdims=True)
  return (embeddings_BD / np.maximum(norm_B1, 1e-30)).astype(np.float32)


def find(
  model: pretrained.PretrainedModel, pooling: str, is_last: bool
) -> tuple[ReferenceSample | None, str]:
  """The reference sample of a model, or why there is none, in a few words.

  Args:
    model: as `pretrained.load` gives it.
    pooling: of the embeddings.
    is_last: whether they are of the last block, the one a sample is made of.

  Raises:
    UserError: the file is damaged.
  """
  if not model.source or not model.sha256:
    return None, 'the model came from no folder'
  path = paths.join(model.source, FILE)
  if not paths.exists(path):
    return None, 'no reference sample (genecompass reference)'
  if not is_last:
    return None, 'the reference sample is of the last block'
  try:
    data = paths.read_bytes(path)
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
      checkpoint, name = str(file['checkpoint']), str(file['name'])
      unit_RD = file.get(pooling)
  except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise errors.UserError(
      f'{path} is damaged ({errors.first_line(error)}); make it again with '
      'genecompass reference'
    ) from error
  if checkpoint != model.sha256 or unit_RD is None:
    return None, 'the reference sample is of another step or model'
  name += f' (sha256 {paths.sha256_bytes(data)[:12]})'
  return ReferenceSample(name, unit_RD), name


def save(
  model: pretrained.PretrainedModel, name: str, samples: dict[str, np.ndarray]
) -> str:
  """Writes the embeddings of a sample beside the model; returns the path.

  Args:
    model: that made them.
    name: where the cells come from.
    samples: pooling -> embeddings [R, D].
  """
  buffer = io.BytesIO()
  np.savez(
    buffer,
    allow_pickle=False,
    checkpoint=np.array(model.sha256),
    name=np.array(name),
    **{pooling: unit(x_RD) for pooling, x_RD in samples.items()},
  )
  path = paths.join(model.source, FILE)
  paths.write_bytes(path, buffer.getvalue())
  return path


def training_cells(
  data: paths.PathLike,
  model: pretrained.PretrainedModel,
  num_cells: int,
  reading: sources.SourceConfig = sources.SourceConfig(),
) -> tuple[str, list[model_cells.EncodedChunk], int]:
  """A random sample of cells: of a corpus, its training cells.

  Args:
    data: a corpus over the vocabulary of the model, or cells of any format.
    model: whose medians and mode encode the cells.
    num_cells: wanted; fewer where there are fewer.
    reading: species, layer and the like, of cells that are no corpus.

  Returns:
    Where they come from, the cells, and how many they are.

  Raises:
    UserError: fewer than `LEAST` cells, a corpus of another vocabulary, or
      cells that cannot be read.
  """
  if paths.exists(paths.join(data, 'manifest.json')):
    found = corpus_lib.Corpus.open(data)
    if (
      model.vocabulary is None
      or model.vocabulary.sha256 != found.vocabulary.sha256
    ):
      raise errors.UserError(
        f'{data}: the corpus has another vocabulary than {model.source}; give '
        'the one that the model was trained on, or a file of cells'
      )
    total = found.num_cells('train') if 'train' in found.splits else 0
    name = f'{min(num_cells, total)} training cells of {data}'
    chunks = list(_of_corpus(found, model, num_cells))
  else:
    stream = model_cells.open_cells(data, model, reading)
    total = stream.source.num_cells
    wanted_C = np.zeros(total, bool)
    order = np.random.default_rng(0).permutation(total)
    wanted_C[order[:num_cells]] = True
    name = f'{min(num_cells, total)} cells of {stream.source.name}'
    chunks = list(model_cells.encode(stream, model, wanted_C))
  if total < LEAST:
    raise errors.UserError(
      f'{data}: {total} cells; a reference sample takes {LEAST} or more'
    )
  return name, chunks, min(num_cells, total)


def _of_corpus(
  found: corpus_lib.Corpus, model: pretrained.PretrainedModel, num_cells: int
) -> Iterator[model_cells.EncodedChunk]:
  """The first training cells of every species: they are stored shuffled."""
  stores = found.stores('train') if 'train' in found.splits else []
  totals = np.array([store.num_cells for store in stores])
  # Species by their shares, to the last cell.
  stops = np.cumsum(totals) * min(1.0, num_cells / max(totals.sum(), 1))
  numbers = np.diff(np.round(stops).astype(int), prepend=0).tolist()
  index = 0
  for store, number in zip(stores, numbers):
    encoder = encoding.CellEncoder(
      model.assets.encoding,
      found.tokens(store.species),
      model.assets.medians.divisor_V(store.species),
    )
    for block in range(-(-number // store.block_cells)):
      (cells,) = store.read_blocks([block])
      keep_C = np.arange(cells.num_cells) + block * store.block_cells < number
      cells = model_cells.some(cells, keep_C)
      index_C = index + np.arange(cells.num_cells)
      index += cells.num_cells
      encoded = encoder.encode(cells)
      yield model_cells.EncodedChunk(store.species, index_C, cells, encoded)
