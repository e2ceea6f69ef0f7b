"""Does `gc_ood` tell strange cells from cells like those of training?

  JAX_PLATFORMS=cpu python -m experiments.benchmarks.strange_cells \\
    --checkpoint RUN --corpus CORPUS --data FOLDER [--cells 300]

CORPUS is that of the run; FOLDER holds <name>/<name>.h5ad (docs/real_data.md).
A random half of the training cells is the reference sample; the usual cells are
of the other half. Asked for: cells of the corpus' held-out units, cells of other
sets, and usual cells that were damaged here. For each group: the median of
`gc_ood`, the share of cells at or above 95, and the AUROC against the usual cells,
by the states of the model, by those of the same model with random weights, by 50
principal components of log counts (of the sample's cells, the same distance), and
by how unusual the number of expressed genes is. An AUROC of .5 is no difference;
cells of held-out units are not strange, they ought to be near it.
"""

import argparse
import dataclasses
import os
import platform
import warnings

import anndata
import jax
import numpy as np
import scipy.sparse
import scipy.stats

import genecompass_jax as gc
from experiments.benchmarks import embed_equality
from genecompass_jax import (
  corpus as corpus_lib,
  encoding,
  model as model_lib,
  progress,
)
from genecompass_jax.analysis import (
  model_cells,
  placed_model,
  reference_sample,
)

# (set, column, value): cells of a set whose column has that value.
OTHERS = (
  ('kang_pbmc_ifnb_harmony', 'condition', 'ctrl'),
  ('kang_pbmc_ifnb_harmony', 'condition', 'stim'),
  ('perturb_fish_astrocytes', 'condition', 'ctrl'),
  ('mouse_embryo_E35_E45', '', ''),
  ('mouse_brain_merfish', '', ''),
)
COMPONENTS = 50
GENES = 2000
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Cells:
  """Cells of one species, and what a model reads of them.

  Attributes:
    chunk: encoded cells.
    tokens_R: token of each row of the gene list.
    measured_CR: bool, the genes that the source of each cell measured.
  """

  chunk: model_cells.EncodedChunk
  tokens_R: np.ndarray
  measured_CR: np.ndarray


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--corpus', required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--cells', type=int, default=300, help='of a group')
  args = parser.parse_args()
  warnings.filterwarnings('ignore')
  progress.is_shown = False
  model = gc.load(args.checkpoint)
  opened = corpus_lib.Corpus.open(args.corpus)
  rng = np.random.default_rng(0)
  sample, groups = [], {'usual': []}
  for store in opened.stores('train'):
    order = rng.permutation(store.num_cells)
    half = len(order) // 2
    sample.append(of_store(opened, store, model, order[:half]))
    # Every species by its share.
    number = round(args.cells * store.num_cells / opened.num_cells('train'))
    usual = of_store(opened, store, model, order[half:][:number])
    groups['usual'].append(usual)
  groups |= held_out(opened, model, args.cells, rng)
  groups |= other_sets(args.data, model, args.cells)
  groups |= damaged(groups['usual'], model, rng)
  random = model.replace(params=model_lib.init(model.config, seed=0))
  scores = {
    **model_scores('model', model, sample, groups),
    **model_scores('random weights', random, sample, groups),
    '50 components': component_scores(model, sample, groups),
    'number of genes': number_scores(sample, groups),
  }
  size = sum(cells.chunk.cells.num_cells for cells in sample)
  print(
    f'{platform.processor() or platform.machine()}, jax {jax.__version__}\n'
    f'{model}\n{size} cells in the reference sample\n\n'
    '| cells | number | '
    + ' | '.join(f'{name}: median, share at 95, AUROC' for name in scores)
    + ' |\n'
    + '|' + '---|' * (2 + len(scores))
  )  # fmt: skip
  for name, parts in groups.items():
    found = []
    for score in scores.values():
      x_C = score[name]
      share = (x_C >= 95).mean()
      found.append(
        f'{np.median(x_C):.0f}, {share:.2f}, {auroc(score["usual"], x_C):.2f}'
      )
    number = sum(cells.chunk.cells.num_cells for cells in parts)
    print(f'| {name} | {number} | ' + ' | '.join(found) + ' |')


def of_store(opened, store, model, rows) -> Cells:
  """Some cells of a corpus."""
  blocks = store.read_blocks(range(store.num_blocks))
  chosen = np.zeros(store.num_cells, bool)
  chosen[rows] = True
  kept, first = [], 0
  for block in blocks:
    kept.append(
      model_cells.some(block, chosen[first : first + block.num_cells])
    )
    first += block.num_cells
  sources_C = store.obs('source')[chosen]
  return encoded(
    joined(kept),
    store.species,
    opened.tokens(store.species),
    store.measured_SrcR[sources_C],
    model,
  )


def held_out(opened, model, number, rng):
  """Cells of the units that training never saw, by unit."""
  found = {}
  for store in opened.stores('validation'):
    units = store.categories('unit')
    unit_C = store.obs('unit')
    for code in np.unique(unit_C):
      rows = np.flatnonzero(unit_C == code)
      rows = rng.permutation(rows)[:number]
      name = f'held out: {units[code]}'
      found.setdefault(name, []).append(of_store(opened, store, model, rows))
  return found


def other_sets(folder, model, number):
  """Evenly spaced cells of sets that training never saw."""
  found = {}
  for name, column, value in OTHERS:
    path = os.path.join(folder, name, f'{name}.h5ad')
    if not os.path.exists(path):
      print(f'{name} is not there')
      continue
    adata = anndata.read_h5ad(path)
    if column:
      adata = adata[adata.obs[column].astype(str) == value]
    spaced = np.linspace(0, adata.n_obs - 1, min(number, adata.n_obs))
    stream = model_cells.open_cells(adata[spaced.astype(int)].copy(), model)
    label = f'{name}, {value}' if value else name
    found[label] = [
      encoded(
        chunk.cells,
        chunk.species,
        stream.tokens(chunk.species),
        np.tile(stream.measured(chunk.species), (chunk.cells.num_cells, 1)),
        model,
      )
      for chunk in stream.chunks()
    ]
  return found


def damaged(usual, model, rng):
  """Usual cells, damaged in several ways."""

  def changed(change):
    return [
      encoded(
        change(cells),
        cells.chunk.species,
        cells.tokens_R,
        cells.measured_CR,
        model,
      )
      for cells in usual
    ]

  def other_genes(share):
    """Counts go to other genes that the source measured."""

    def change(cells):
      parts = []
      for c, (rows_N, counts_N) in enumerate(of_cells(cells.chunk.counts)):
        rows_N = rows_N.astype(np.int64)
        moved_N = rng.random(len(rows_N)) < share
        free_R = cells.measured_CR[c].copy()
        free_R[rows_N] = False
        # Those of the moved genes are free too: a full cell has no others.
        free_R[rows_N[moved_N]] = True
        rows_N[moved_N] = rng.choice(
          np.flatnonzero(free_R), moved_N.sum(), replace=False
        )
        parts.append((rows_N, counts_N))
      return of_parts(parts)

    return change

  def shuffled(cells):
    """The genes stay, their counts change places."""
    return of_parts(
      [(rows, rng.permutation(x)) for rows, x in of_cells(cells.chunk.counts)]
    )

  def thinned(cells):
    """One count of ten stays; at least one of a cell."""
    parts = []
    for rows_N, counts_N in of_cells(cells.chunk.counts):
      kept_N = rng.binomial(counts_N.astype(np.int64), 0.1)
      if not kept_N.any():
        kept_N[np.argmax(counts_N)] = 1
      parts.append((rows_N[kept_N > 0], kept_N[kept_N > 0]))
    return of_parts(parts)

  def doubled(cells):
    """The counts of two cells together."""
    parts = of_cells(cells.chunk.counts)
    partner = rng.permutation(len(parts))
    # A gene of both stands twice: its counts are summed when it is encoded.
    return of_parts(
      [
        (
          np.concatenate([rows.astype(np.int64), parts[p][0]]),
          np.concatenate([x.astype(np.int64), parts[p][1]]),
        )
        for (rows, x), p in zip(parts, partner)
      ]
    )

  groups = {
    'damaged: all counts at other genes': changed(other_genes(1.0)),
    'damaged: a fifth of the genes': changed(other_genes(0.2)),
    'damaged: counts of a cell in other order': changed(shuffled),
    'damaged: one count of ten': changed(thinned),
    'damaged: two cells as one': changed(doubled),
  }
  other = [
    dataclasses.replace(
      cells,
      chunk=dataclasses.replace(cells.chunk, species=1 - cells.chunk.species),
    )
    for cells in usual
  ]
  return groups | {'damaged: called the other species': other}


def of_cells(counts):
  """(rows, counts) of every cell."""
  return [
    (counts.gene_rows_N[a:b], counts.counts_N[a:b])
    for a, b in zip(counts.starts_C1[:-1], counts.starts_C1[1:])
  ]


def of_parts(parts) -> encoding.RaggedCells:
  """The inverse of `of_cells`."""
  rows, counts = zip(*parts)
  return encoding.RaggedCells(
    np.concatenate(rows).astype(np.int32),
    np.concatenate(counts),
    np.cumsum([0, *map(len, rows)]),
    np.array([float(np.sum(x)) for x in counts]),
  )


def joined(parts) -> encoding.RaggedCells:
  """The cells of several blocks."""
  return of_parts([cell for part in parts for cell in of_cells(part)])


def encoded(counts, species, tokens_R, measured_CR, model) -> Cells:
  """Counts as the model reads them."""
  encoder = encoding.CellEncoder(
    model.assets.encoding, tokens_R, model.assets.medians.divisor_V(species)
  )
  chunk = model_cells.EncodedChunk(
    species, np.arange(counts.num_cells), counts, encoder.encode(counts)
  )
  return Cells(chunk, tokens_R, measured_CR)


def model_scores(label, model, sample, groups):
  """`gc_ood` of every group, by pooling."""
  placed = placed_model.place(model, dtype='float32')

  def states(parts):
    return np.concatenate(
      [
        embed_equality.states_of_chunks(
          [cells.chunk], cells.chunk.cells.num_cells, placed, BATCH
        )
        for cells in parts
      ],
      axis=1,
    )

  sample_PRD = states(sample)
  found = {name: states(parts) for name, parts in groups.items()}
  scores = {}
  for p, pooling in enumerate(embed_equality.poolings_of(model)):
    reference = reference_sample.ReferenceSample(
      '', reference_sample.unit(sample_PRD[p])
    )
    scores[f'{label}, {pooling}'] = {
      name: reference.percentiles(x_PCD[p]) for name, x_PCD in found.items()
    }
  return scores


def component_scores(model, sample, groups):
  """The same, of principal components of log counts in place of states."""
  size = model.config.vocabulary_size

  def logs(parts):
    matrices = []
    for cells in parts:
      counts = cells.chunk.counts
      matrix = scipy.sparse.csr_matrix(
        (
          counts.counts_N.astype(np.float64),
          cells.tokens_R[counts.gene_rows_N],
          counts.starts_C1,
        ),
        (counts.num_cells, size),
      )
      matrix.sum_duplicates()
      totals_C1 = np.maximum(matrix.sum(1), 1)
      matrices.append(matrix.multiply(1e4 / totals_C1).tocsr().log1p())
    return scipy.sparse.vstack(matrices).toarray()

  sample_RV = logs(sample)
  chosen = np.argsort(-sample_RV.var(0), kind='stable')[:GENES]
  mean_G = sample_RV[:, chosen].mean(0)
  right_NG = np.linalg.svd(sample_RV[:, chosen] - mean_G, full_matrices=False)[
    2
  ]

  def components(x_CV):
    return (x_CV[:, chosen] - mean_G) @ right_NG[:COMPONENTS].T

  reference = reference_sample.ReferenceSample(
    '', reference_sample.unit(components(sample_RV))
  )
  return {
    name: reference.percentiles(components(logs(parts)))
    for name, parts in groups.items()
  }


def number_scores(sample, groups):
  """Percentiles of the distance from the median log number of genes."""

  def logs(parts):
    return np.log1p(
      np.concatenate([cells.chunk.cells.num_genes_C for cells in parts])
    )

  sample_R = logs(sample)
  middle = np.median(sample_R)
  far_R = np.sort(np.abs(sample_R - middle))
  return {
    name: 100
    * np.searchsorted(far_R, np.abs(logs(parts) - middle))
    / len(far_R)
    for name, parts in groups.items()
  }


def auroc(usual_C, others_C) -> float:
  """The chance that one of the others scores above a usual cell; ties half."""
  rank = scipy.stats.rankdata(np.concatenate([others_C, usual_C]))
  number = len(others_C)
  above = rank[:number].sum() - number * (number + 1) / 2
  return above / (number * len(usual_C))


if __name__ == '__main__':
  main()
