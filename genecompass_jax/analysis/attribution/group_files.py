"""Files of attributions by group.

  NAME.parquet        a line a target, group and part
  NAME.units.parquet  a line a target, group, unit and part
  NAME.genes.parquet  a line a target, group, gene and part: the highest genes
  NAME.cells.parquet  a line a target and cell that was asked
  NAME.tsv, NAME.genes.tsv  the same for people, with the header on top

The header is in the metadata of the parquet files under `KEY`.
"""

import os

from genecompass_jax import errors, paths
from genecompass_jax.analysis import tables
from genecompass_jax.analysis.attribution import group_tables

KEY = 'genecompass_attribution'
_ENDING = '.parquet'


def stem(output: paths.PathLike) -> str:
  """The name of the files without their endings.

  Raises:
    UserError: `output` does not end in .parquet.
  """
  name = os.fspath(output)
  if not name.endswith(_ENDING):
    raise errors.UserError(f'-o {name}: give a name ending in {_ENDING}')
  return name.removesuffix(_ENDING)


def write(
  found: group_tables.AttributionByGroup, output: paths.PathLike
) -> None:
  """Writes all files, the first table last, each whole or not at all.

  Raises:
    UserError: the name does not end in .parquet.
  """
  name = stem(output)
  for kind in ('cells', 'genes', 'units'):
    data = tables.parquet(getattr(found, kind), found.header, KEY)
    paths.write_bytes(f'{name}.{kind}{_ENDING}', data)
  paths.write_text(f'{name}.genes.tsv', tables.text(found.genes, found.header))
  paths.write_text(f'{name}.tsv', tables.text(found.parts, found.header))
  paths.write_bytes(output, tables.parquet(found.parts, found.header, KEY))


def read(output: paths.PathLike) -> group_tables.AttributionByGroup:
  """Reads what `write` wrote.

  Raises:
    UserError: a file is not there, or no attribution.
  """
  name = stem(output)
  frames = {}
  for kind in ('', '.units', '.genes', '.cells'):
    path = f'{name}{kind}{_ENDING}'
    try:
      frames[kind], header = tables.read(path, KEY, 'an attribution')
    except FileNotFoundError as error:
      raise errors.UserError(
        f'{path} is not there; give the .parquet that an attribution wrote, '
        'and keep the others beside it'
      ) from error
  parts, units, genes, cells = frames.values()
  return group_tables.AttributionByGroup(parts, units, genes, cells, header)
