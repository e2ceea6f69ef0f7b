"""Which cells are good enough: the five filters of the published corpus.

The filters act in this order, and a cell counts for the first that removes it:

1. `min_genes`: expressed genes of the cell. Below 5,000 measured genes the
   rule becomes a share of the panel: 200 of about 20,000 genes is 1 %, so the
   threshold is ceil(min_genes * measured / 20,000). As it stands it would drop
   92 % of a MERFISH panel of 1,122 genes; scaled it drops under 1 %.
2. `min_coding`: expressed protein-coding or miRNA genes.
3. `max_mito`: share of mitochondrial counts; skipped where no mitochondrial
   gene is measured.
4. `max_sd`: number of expressed genes further than this many standard
   deviations from the mean of its sample, both over the cells left so far.
5. `min_cells`: cells left in the sample.

Numbers: GENECOMPASS paper, Methods (200 genes, 7 coding or miRNA genes, 15 %,
3 SD, 4 cells). They are taken over all columns of a source, before any
vocabulary.
"""

import dataclasses
import math

import numpy as np

from genecompass_jax import errors

PANEL_GENES = 5_000  # fewer measured genes are a panel or a selection
REFERENCE_GENES = 20_000  # what 200 expressed genes are 1 % of
WARN_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class QualityConfig:
  """Thresholds; each filter has a value that switches it off.

  Attributes:
    min_genes: expressed genes of a cell; 0 switches it off.
    min_coding: expressed protein-coding or miRNA genes; 0 switches it off.
    max_mito: largest share of mitochondrial counts; 1 switches it off.
    max_sd: standard deviations from the mean of the sample; 0 switches it off.
    min_cells: cells of a sample; 0 switches it off.
  """

  min_genes: int = 200
  min_coding: int = 7
  max_mito: float = 0.15
  max_sd: float = 3.0
  min_cells: int = 4

  def __post_init__(self):
    if min(self.min_genes, self.min_coding, self.min_cells) < 0:
      raise errors.UserError('a quality threshold is negative; 0 switches off')
    if not 0 <= self.max_mito <= 1:
      raise errors.UserError(
        f'--max_mito {self.max_mito:g} must be a share between 0 and 1'
      )
    if self.max_sd < 0:
      raise errors.UserError('--max_sd is negative; 0 switches it off')

  @classmethod
  def off(cls) -> 'QualityConfig':
    """Every cell passes."""
    return cls(0, 0, 1.0, 0.0, 0)


@dataclasses.dataclass(frozen=True)
class CellStatistics:
  """What the filters look at, for C cells, over all columns of the source.

  Attributes:
    genes_C: expressed genes.
    coding_C: expressed protein-coding or miRNA genes.
    mito_C: counts in mitochondrial genes.
    total_C: counts.
  """

  genes_C: np.ndarray
  coding_C: np.ndarray
  mito_C: np.ndarray
  total_C: np.ndarray

  @classmethod
  def concatenate(cls, parts: list['CellStatistics']) -> 'CellStatistics':
    """The cells of all parts, in order."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(
      *(np.concatenate([getattr(p, name) for p in parts]) for name in names)
    )


def min_genes(config: QualityConfig, measured: int) -> int:
  """Expressed genes that a cell of a source needs; see the module's text."""
  if measured >= PANEL_GENES:
    return config.min_genes
  return math.ceil(config.min_genes * measured / REFERENCE_GENES)


def keep_cells(
  statistics: CellStatistics,
  sample_C: np.ndarray,
  config: QualityConfig,
  *,
  measured: int,
  has_coding: bool,
  has_mito: bool,
) -> tuple[np.ndarray, dict]:
  """Applies the filters to the cells of one source.

  Args:
    statistics: of its cells.
    sample_C: integer code >= 0 of the sample of each cell.
    config: thresholds.
    measured: genes that the source measured.
    has_coding: whether any of them is known to be protein-coding or miRNA.
    has_mito: whether any of them is mitochondrial.

  Returns:
    Bool [C], True for cells to keep; and a report: `cells`, `kept`, and for
    each filter its `name`, `threshold` (None where it was off or skipped),
    cells `removed` and, where there is something to say, a `note`; `warnings`
    as lines.
  """
  keep_C = np.ones(len(sample_C), bool)
  filters = []

  def apply(name, threshold, good_C, note=''):
    removed = int((keep_C & ~good_C).sum())
    keep_C[:] &= good_C
    entry = {'name': name, 'threshold': threshold, 'removed': removed}
    filters.append(entry | ({'note': note} if note else {}))

  def skip(name, note):
    entry = {'name': name, 'threshold': None, 'removed': 0, 'note': note}
    filters.append(entry)

  needed = min_genes(config, measured)
  if not needed:
    skip('min_genes', 'off')
  else:
    note = ''
    if needed != config.min_genes:
      note = f'{config.min_genes} scaled to {measured} measured genes'
    apply('min_genes', needed, statistics.genes_C >= needed, note)
  if not config.min_coding:
    skip('min_coding', 'off')
  elif not has_coding:
    skip('min_coding', 'no gene is known to be protein-coding or miRNA')
  else:
    apply(
      'min_coding', config.min_coding, statistics.coding_C >= config.min_coding
    )
  if config.max_mito >= 1:
    skip('max_mito', 'off')
  elif not has_mito:
    skip('max_mito', 'no mitochondrial gene is measured')
  else:
    limit_C = config.max_mito * statistics.total_C
    note = ''
    if measured < PANEL_GENES:  # what was selected may be rich in them
      note = f'of the {measured} measured genes; --max-mito 1 keeps all'
    apply('max_mito', config.max_mito, statistics.mito_C <= limit_C, note)
  if not config.max_sd:
    skip('max_sd', 'off')
  else:
    near_C = _near_mean(statistics.genes_C, sample_C, keep_C, config.max_sd)
    apply('max_sd', config.max_sd, near_C)
  if not config.min_cells:
    skip('min_cells', 'off')
  else:
    cells = np.bincount(sample_C[keep_C], minlength=sample_C.max(initial=0) + 1)
    apply('min_cells', config.min_cells, cells[sample_C] >= config.min_cells)
  report = {
    'cells': len(keep_C),
    'kept': int(keep_C.sum()),
    'filters': filters,
    'warnings': [
      f'filter {f["name"]} removed {f["removed"]} of {len(keep_C)} cells'
      for f in filters
      if f['removed'] > WARN_SHARE * len(keep_C)
    ],
  }
  return keep_C, report


def _near_mean(
  genes_C: np.ndarray, sample_C: np.ndarray, keep_C: np.ndarray, max_sd: float
) -> np.ndarray:
  """Whether genes_C lies within max_sd of the mean of the sample's kept."""
  num = sample_C.max(initial=0) + 1
  genes_C = genes_C.astype(np.float64)
  kept = sample_C[keep_C]
  cells = np.maximum(np.bincount(kept, minlength=num), 1)
  mean = np.bincount(kept, genes_C[keep_C], minlength=num) / cells
  squares_C = (genes_C - mean[sample_C]) ** 2
  variance = np.bincount(kept, squares_C[keep_C], minlength=num) / cells
  # the slack keeps equal cells (variance 0) whatever the rounding of the mean
  return squares_C <= max_sd**2 * variance[sample_C] + 1e-9
