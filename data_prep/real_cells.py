"""Published count sets of human and mouse -> one corpus.

  python data_prep/real_cells.py --data FOLDER -o CORPUS

FOLDER holds <name>/<name>.h5ad for the sets named below (public data; what
they are and where copies stand: docs/real_data.md). Sets that are absent are
left out and named. Whole units are held out: one study (pbmc68k), donors of
Baron (human4, mouse1), one embryo library, one batch of the lung lines.
"""

import argparse
import dataclasses
import os
import sys

import anndata
import numpy as np

from genecompass_jax import errors
from genecompass_jax.prepare import pipeline, reports, sources


@dataclasses.dataclass(frozen=True)
class CellSet:
  """One file, what its columns mean, and which part of it is taken.

  Attributes:
    config: as for any source, without its path.
    split_by: obs column whose values were measured with gene lists of their
      own: each value becomes a source with the genes seen in it.
  """

  config: sources.SourceConfig
  split_by: str = ''


def _set(name: str, **fields: object) -> CellSet:
  split_by = fields.pop('split_by', '')
  return CellSet(sources.SourceConfig(name=name, **fields), split_by)


# The three Kang extracts share cells: one dataset, one unit. Panels and sets
# of selected genes are declared as such, so that their counts make no medians.
SETS = {
  'kang_pbmc_ifnb_scgen': _set(
    'kang_scgen',
    species='human',
    dataset='kang',
    total='n_counts_all_genes',
    licence='GSE96583',
  ),
  'kang_pbmc_ifnb_harmony': _set(
    'kang_harmony', species='human', dataset='kang', licence='GSE96583'
  ),
  'kang_pbmc_ifnb_muscat': _set(
    'kang_muscat',
    species='human',
    dataset='kang',
    assay='panel',
    licence='GSE96583',
  ),
  'pbmc68k_reduced_counts': _set(
    'pbmc68k', species='human', assay='panel', licence='10x, CC BY 4.0'
  ),
  'sc_mixology_lung_lines': _set(
    'lung_lines',
    species='human',
    unit='batch',
    split_by='batch',
    licence='GSE118767, MIT',
  ),
  'baron_pancreas_human_mouse': _set(
    'baron',
    species='obs:species',
    ids_of='human',
    unit='donor',
    licence='GSE84133',
  ),
  'mouse_brain_merfish': _set(
    'merfish_brain', species='mouse', assay='panel', licence='CC BY 4.0'
  ),
  'mouse_embryo_E35_E45': _set(
    'mouse_embryo',
    species='mouse',
    unit='batch',
    assay='umi',  # 4k selected genes, but counts of molecules
    licence='GSE123046',
  ),
  # Perturbed cells stay out of pretraining: controls only.
  'perturb_fish_astrocytes': _set(
    'perturb_fish_controls',
    species='human',
    assay='panel',
    controls='condition=ctrl',
    licence='Perturb-FISH, cite the paper',
  ),
}

HELD_OUT = (
  'pbmc68k',
  'baron:human4',
  'baron:mouse1',
  'mouse_embryo:Lib1-3_E3.5',
  'lung_lines:sc_celseq2_5cl_p3',
)


def main() -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', required=True, metavar='FOLDER')
  parser.add_argument('-o', '--output', required=True, metavar='CORPUS')
  parser.add_argument('--overwrite', action='store_true')
  parser.add_argument(
    '--medians', default='histogram', choices=pipeline.MEDIANS
  )
  args = parser.parse_args()
  try:
    opened = open_sources(args.data)
    units = {u for s in opened for u in _unit_names(s)}
    config = pipeline.PrepareConfig(
      vocabulary='measured',
      validation_units=tuple(u for u in HELD_OUT if u in units),
      overwrite=args.overwrite,
      medians=args.medians,
    )
    pipeline.prepare(opened, args.output, config)
  except errors.UserError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_USAGE
  print(reports.describe(reports.read(args.output)))
  return errors.EXIT_OK


def open_sources(folder: str) -> list[sources.Source]:
  """The sets that are there, opened.

  Raises:
    UserError: none is there.
  """
  opened = []
  for name, cells in SETS.items():
    path = os.path.join(folder, name, f'{name}.h5ad')
    if not os.path.exists(path):
      print(f'{path} is absent: left out', file=sys.stderr)
      continue
    if cells.split_by:
      opened += _parts(path, cells)
    else:
      opened.append(
        sources.open_h5ad(dataclasses.replace(cells.config, path=path))
      )
  if not opened:
    raise errors.UserError(f'{folder}: holds none of {", ".join(SETS)}')
  return opened


def _parts(path: str, cells: CellSet) -> list[sources.Source]:
  adata = anndata.read_h5ad(path)
  opened = []
  for value in sorted(adata.obs[cells.split_by].unique()):
    part = adata[(adata.obs[cells.split_by] == value).to_numpy()]
    # The file is a union of gene lists: a gene without any count in a batch
    # is taken as not measured there.
    part = part[:, np.asarray(part.X.sum(0)).ravel() > 0].copy()
    name = f'{cells.config.name}-{value}'
    config = dataclasses.replace(
      cells.config, path=path, name=name, dataset=cells.config.name
    )
    opened.append(sources.from_anndata(part, config))
  return opened


def _unit_names(source: sources.Source) -> set[str]:
  if not source.config.unit:
    return {source.dataset}
  _, names = source.codes(source.config.unit)
  return {f'{source.dataset}:{name}' for name in names}


if __name__ == '__main__':
  sys.exit(main())
