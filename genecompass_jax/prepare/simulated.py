"""Simulated cells as AnnData, h5ad files, and corpora."""

import os

import anndata
import numpy as np
import pandas as pd

from genecompass_jax import errors, gene_table, paths, simulate
from genecompass_jax.prepare import h5ad_writer, pipeline, quality, sources

CHUNK_CELLS = 1 << 14


def to_anndata(cells: simulate.SimulatedCells) -> anndata.AnnData:
  """Cells with the genes that all of them had measured; counts in X.

  A gene that some study did not measure is left out rather than given as 0,
  so keep panels apart (`cells.select`).
  """
  studies = np.unique(cells.obs['study'])
  measured_R = np.all([cells.measured[s] for s in studies], axis=0)
  rows = np.flatnonzero(measured_R)
  obs = pd.DataFrame(
    {
      name: pd.Categorical(values) if values.dtype.kind == 'U' else values
      for name, values in cells.obs.items()
    },
    index=np.arange(len(cells)).astype(str),
  )
  var = pd.DataFrame(
    {'symbol': [cells.symbols[r] for r in rows]},
    index=[cells.gene_ids[r] for r in rows],
  )
  return anndata.AnnData(cells.counts[:, rows], obs=obs, var=var)


def to_anndatas(
  atlas: simulate.Atlas, num_cells: int, start: int = 0
) -> dict[str, anndata.AnnData]:
  """Cells of both species, by `SPECIES` and `SPECIES_panel`.

  Args:
    atlas: to sample.
    num_cells: of each species, panels included.
    start: index of the first.
  """
  found = {}
  for species, name in enumerate(gene_table.SPECIES):
    cells = simulate.concatenate(
      [
        atlas.sample(
          min(CHUNK_CELLS, start + num_cells - first), species, first
        )
        for first in range(start, start + num_cells, CHUNK_CELLS)
      ]
    )
    is_panel_C = cells.obs['assay'] == 'panel'
    for suffix, chosen_C in (('', ~is_panel_C), ('_panel', is_panel_C)):
      if chosen_C.any():
        found[name + suffix] = to_anndata(cells.select(chosen_C))
  return found


def write_h5ad(
  atlas: simulate.Atlas, folder: str, num_cells: int, start: int = 0
) -> tuple[str, ...]:
  """Writes `SPECIES.h5ad` and `SPECIES_panel.h5ad` with `to_anndatas`.

  Returns:
    The files. Local only, as anndata writes no URLs.
  """
  os.makedirs(folder, exist_ok=True)
  names = []
  for name, adata in to_anndatas(atlas, num_cells, start).items():
    names.append(os.path.join(folder, f'{name}.h5ad'))
    adata.uns['simulated_atlas'] = atlas.config.sha256
    adata.write_h5ad(names[-1], compression='gzip')
  return tuple(names)


def stream_h5ad(
  atlas: simulate.Atlas, name: str, species: int, start: int, num_cells: int
) -> int:
  """Writes cells of one species into an h5ad file of any size, by chunks.

  Cells of panels are left out, so that all have the same genes measured.

  Args:
    atlas: to sample.
    name: of the file.
    species: species code.
    start: index of the first cell.
    num_cells: to sample.

  Returns:
    How many cells were written.
  """

  def chunk(first: int) -> anndata.AnnData:
    size = min(CHUNK_CELLS, start + num_cells - first)
    cells = atlas.sample(size, species, first)
    adata = to_anndata(cells.select(cells.obs['assay'] != 'panel'))
    adata.obs_names = [f'{first + i}' for i in range(adata.n_obs)]
    return adata

  var = chunk(start).var
  with h5ad_writer.H5adWriter(name, var, compression=None) as writer:
    for first in range(start, start + num_cells, CHUNK_CELLS):
      adata = chunk(first)
      writer.add(adata.X, adata.obs)
  return writer.num_cells


def source_configs(names: tuple[str, ...]) -> list[sources.SourceConfig]:
  """How `prepare` is to read what `write_h5ad` wrote: donors are units."""
  return [
    _source_config(os.path.basename(name).removesuffix('.h5ad'), path=name)
    for name in names
  ]


def _source_config(name: str, path: str = '') -> sources.SourceConfig:
  return sources.SourceConfig(
    path=path,
    name=name,
    species=name.removesuffix('_panel'),
    unit='donor',
    assay='panel' if name.endswith('_panel') else 'umi',
    obs=('cell_type', 'study', 'batch', 'tissue', 'assay', 'phase'),
    licence='simulated',
  )


def corpus(
  workdir: paths.PathLike,
  num_cells: int,
  config: simulate.AtlasConfig | None = None,
) -> str:
  """A corpus of simulated cells beside a run; made once, then found again.

  Args:
    workdir: of the run; the corpus is `simulated_corpus` in it.
    num_cells: of both species together, before quality filters.
    config: of the atlas; the default if None.

  Returns:
    The path of the corpus, which holds the genes of the atlas alone.

  Raises:
    UserError: the corpus there was made of other cells.
  """
  output = paths.join(workdir, 'simulated_corpus')
  atlas = simulate.Atlas(config)
  facts = f'{atlas.config.sha256} {num_cells}\n'
  if paths.exists(paths.join(output, 'manifest.json')):
    return _same(output, facts)
  paths.write_text(_facts_path(output), facts)
  opened = [
    sources.from_anndata(adata, _source_config(name))
    for name, adata in to_anndatas(atlas, -(-num_cells // 2)).items()
  ]
  pipeline.prepare(
    opened, output, pipeline.PrepareConfig(vocabulary='measured')
  )
  return output


def independent_corpus(workdir: paths.PathLike, num_cells: int) -> str:
  """A corpus of cells of independent genes beside a run; made once.

  Args:
    workdir: of the run; the corpus is `independent_corpus` in it.
    num_cells: of `simulate.independent`; one donor of ten is held out.

  Returns:
    The path of the corpus.

  Raises:
    UserError: the corpus there was made of other cells.
  """
  output = paths.join(workdir, 'independent_corpus')
  facts = f'independent {num_cells}\n'
  if paths.exists(paths.join(output, 'manifest.json')):
    return _same(output, facts)
  paths.write_text(_facts_path(output), facts)
  source = sources.from_anndata(
    to_anndata(simulate.independent(num_cells)),
    sources.SourceConfig(
      name='independent', species='human', unit='donor', licence='simulated'
    ),
  )
  pipeline.prepare(
    [source],
    output,
    pipeline.PrepareConfig(
      vocabulary='measured', filters=quality.QualityConfig.off()
    ),
  )
  return output


def _facts_path(output: str) -> str:
  """Where it stands what a corpus is made of; written before the corpus."""
  return output + '.txt'


def _same(output: str, facts: str) -> str:
  if paths.read_text(_facts_path(output)) != facts:
    raise errors.UserError(
      f'{output} was simulated with other numbers; give another workdir'
    )
  return output
