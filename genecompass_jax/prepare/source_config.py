"""What to read from one place: the one argument of all readers."""

import dataclasses
import os
import re

from genecompass_jax import errors
from genecompass_jax.prepare import assays, perturbed

FORMATS = ('h5ad', 'zarr', '10x', 'mtx', 'soma', 'census', 'hf', 'corpus')
_ENDING = re.compile(
  r'\.(h5ad|zarr\.zip|zarr|h5|mtx\.gz|mtx|arrow|parquet)$', re.IGNORECASE
)
# Cell Ranger gives all files these names; what tells them apart is above them
_NO_NAME = re.compile(
  r'(^|[._-])(matrix|(sample_)?(raw|filtered)_(feature|gene)_bc_matri(x|ces)'
  r'(_h5)?)$'
)
_NO_NAMES = ('', 'outs', 'count', 'GRCh38', 'hg19', 'mm10', 'GRCm39')


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """What to read from one place, and what its columns mean.

  Attributes:
    path: a file or folder of cells, or `census:YYYY-MM-DD`, a release of the
      CELLxGENE Census; of an AnnData in memory the file it came from, for the
      manifest, or ''.
    name: of the source, in the manifest; the file's stem where ''.
    species: of the gene table, such as `human` or `mouse`; `auto`, or
      `obs:COLUMN`.
    ids_of: a species, where cells of another species carry its
      identifiers; their genes become the one-to-one orthologues.
    layer: `X`, `raw` or `layers/NAME`; '' takes the one that looks like counts.
    unit: obs column that must not be split (donor, study); '' makes the whole
      source one unit; `cell` makes every cell one, and the split leaky.
    sample: obs column of samples for the filters; `unit` where ''.
    total: obs column with the library size over all genes, for a file whose
      genes were selected; '' takes the sum of its columns.
    assay: `umi`, `full_length`, `panel`, or `auto`: `panel` below 5,000
      measured genes, else by the obs column `assay` of each cell, else `umi`.
      Medians of assays are not mixed.
    controls: which cells nothing was done to, the only ones to be taken: see
      `perturbed.py`.
    dataset: label of the study; units of equal name and dataset are one.
      `name` where ''.
    obs: obs columns to carry into the corpus.
    allow_noninteger: take corrected counts as they are.
    licence: of the data, for the manifest.
    format: one of `FORMATS`; '' finds it from the file.
    obs_table: csv or tsv with more obs columns; its first column names cells.
    genome: the one to read where a 10x file holds several, such as `GRCh38`.
    obs_filter: of a SOMA experiment: a condition on obs, in its own words.
    tokens: of released cells: their dictionary of tokens, a file.
    medians: of released cells: the medians that their counts were divided by,
      a file, or several joined by commas; '' keeps the quotients.
    member: of a corpus: the source whose cells are meant; its units keep
      their names.
  """

  path: str = ''
  name: str = ''
  species: str = 'auto'
  ids_of: str = ''
  layer: str = ''
  unit: str = ''
  sample: str = ''
  total: str = ''
  assay: str = 'auto'
  controls: str = ''
  dataset: str = ''
  obs: tuple[str, ...] = ()
  allow_noninteger: bool = False
  licence: str = ''
  format: str = ''
  obs_table: str = ''
  genome: str = ''
  obs_filter: str = ''
  tokens: str = ''
  medians: str = ''
  member: str = ''

  def __post_init__(self):
    if self.assay not in assays.CHOICES:
      raise errors.UserError(
        f'--assay {self.assay}: give one of {", ".join(assays.CHOICES)}'
      )
    perturbed.check(self.controls)
    if self.format and self.format not in FORMATS:
      raise errors.UserError(
        f'format {self.format}: give one of {", ".join(FORMATS)}'
      )

  @property
  def label(self) -> str:
    """Name of the source."""
    if self.name or not self.path:
      return self.name or 'cells'
    for part in reversed(self.path.split('/')):
      stem = _NO_NAME.sub('', _ENDING.sub('', part))
      if stem not in _NO_NAMES:
        return stem
    return os.path.basename(self.path.rstrip('/')) or 'cells'
