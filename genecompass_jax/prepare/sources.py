"""Cells of any format, as counts over a gene list.

A source is opened (which matrix holds counts, which species, which genes its
columns are) and then streamed in chunks of cells, never loaded whole.
"""

import dataclasses
import logging
import os

import anndata

from genecompass_jax import errors, gene_table, paths, vocabulary
from genecompass_jax.prepare import (
  cell_stream,
  damage,
  identifiers,
  layers as layers_lib,
  matrices,
  obs_tables,
  source_config,
)
from genecompass_jax.prepare.readers import formats, h5ad, opened as opened_lib

CELL = 'cell'  # the unit that makes a split leak
SourceConfig = source_config.SourceConfig
Chunk = cell_stream.Chunk
Source = cell_stream.Source
CellStream = cell_stream.CellStream


def open_source(
  config: SourceConfig, table: gene_table.GeneTable | None = None
) -> Source:
  """Opens cells of any format: labels are read, counts stay where they are.

  The same configuration gives the same source again, in any process.

  Args:
    config: names the file or folder and what is in it.
    table: genes to look identifiers up in; the default table where None.

  Raises:
    UserError: no format that is known, damaged, empty, no layer that looks
      like counts, identifiers or species in doubt, a column that is not there.
  """
  with damage.anywhere(config.path):
    return _source(config, formats.read(config), table, can_reopen=True)


def expand(config: SourceConfig) -> list[SourceConfig]:
  """One configuration for each source of a place; see `formats.expand`."""
  with damage.anywhere(config.path):
    return formats.expand(config)


def named_files(config: SourceConfig) -> list[str]:
  """Files and folders that the cells of a configuration depend on."""
  return formats.named_files(config)


def open_h5ad(
  config: SourceConfig, table: gene_table.GeneTable | None = None
) -> Source:
  """Opens an h5ad file, and no other format; see `open_source`."""
  with damage.anywhere(config.path):
    return _source(config, h5ad.read(config), table, can_reopen=True)


def from_anndata(
  adata: anndata.AnnData,
  config: SourceConfig | None = None,
  table: gene_table.GeneTable | None = None,
) -> Source:
  """The cells of an AnnData, in memory or backed, as `open_h5ad` gives them."""
  layers = {}
  if adata.X is not None:
    layers['X'] = matrices.wrapped(adata.X), adata.var
  if adata.raw is not None:
    layers['raw'] = matrices.wrapped(adata.raw.X), adata.raw.var
  for name in adata.layers:
    layers[f'layers/{name}'] = matrices.wrapped(adata.layers[name]), adata.var
  config = config or SourceConfig()
  found = opened_lib.Opened(adata.obs, layers)
  return _source(config, found, table, can_reopen=False)


def table_of(vocab: vocabulary.Vocabulary | None) -> gene_table.GeneTable:
  """Genes to look identifiers up in, for cells over a vocabulary.

  The default table, where it holds the genes of the vocabulary: among a few
  genes only, a symbol of another gene could pass for an alias of one of them.
  """
  table = gene_table.GeneTable.default()
  if vocab is None or table.row_of.keys() >= set(vocab.genes.gene_ids):
    return table
  return vocab.genes


def cells_of(
  data: anndata.AnnData | paths.PathLike,
  vocab: vocabulary.Vocabulary,
  config: SourceConfig | None = None,
) -> CellStream:
  """Cells of an AnnData or of a file over a vocabulary's gene lists.

  No cell is left out: `embed` and the tasks read through this, `prepare` adds
  filters. Identifiers are looked up in `table_of` the vocabulary.

  Args:
    data: AnnData (in memory or backed), or the name of a file or folder.
    vocab: gene lists and tokens.
    config: species, layer and the like; its path is not read.

  Raises:
    UserError: as `open_source`.
  """
  config = config or SourceConfig()
  table = table_of(vocab)
  if isinstance(data, anndata.AnnData):
    return from_anndata(data, config, table).bind(vocab)
  if not isinstance(data, str | os.PathLike):
    raise errors.UserError(
      f'cells are an AnnData, or the name of a file, not {type(data).__name__}'
    )
  config = dataclasses.replace(config, path=os.fspath(data))
  return open_source(config, table).bind(vocab)


def _source(
  config: SourceConfig,
  found: opened_lib.Opened,
  table: gene_table.GeneTable | None,
  *,
  can_reopen: bool,
) -> Source:
  table = table or gene_table.GeneTable.default()
  name = config.label
  obs, layers = found.obs, found.layers
  if not len(obs):
    raise errors.UserError(f'{name}: no cells')
  if config.obs_table:
    obs = obs_tables.joined(obs, config.obs_table)
  if found.layer is not None:
    layer, reason, is_float = found.layer
  else:
    with damage.in_one_line(config.path or name, 'a matrix'):
      layer, reason, is_float = layers_lib.choose_layer(
        name, layers, config.layer, config.allow_noninteger
      )
  matrix, var = layers[layer]
  if not len(var):
    raise errors.UserError(f'{name}: no genes')
  if tuple(matrix.shape) != (len(obs), len(var)):
    raise errors.UserError(
      f'{name}: {layer} is {matrix.shape}, but there are {len(obs)} cells and '
      f'{len(var)} genes: the file is damaged'
    )
  species_C = found.species_C
  if species_C is None:
    species_C = identifiers.species_of_cells(name, obs, config.species, table)
  if found.identify is not None:
    names, resolutions, id_reason = found.identify(table)
  else:
    names, resolutions, id_reason = identifiers.resolve(
      name, var, config.ids_of, sorted(set(species_C.tolist()) - {-1}), table
    )
  if (species_C < 0).any():  # auto: the identifiers have decided
    species_C[:] = next(iter(resolutions))
    said = identifiers.contradiction(obs, species_C, table)
    if said:
      logging.warning('%s: %s', name, said)
  return Source(
    config,
    name,
    obs,
    layer,
    '; '.join((reason, *found.notes)),
    species_C,
    resolutions,
    id_reason,
    names,
    table,
    is_float,
    matrix,
    files=found.files or None,
    digest=found.digest,
    can_reopen=can_reopen,
    is_divided=found.is_divided,
    unit_members=found.unit_members,
  )
