"""Which species the cells of a file are of, and which genes its columns.

`gene_ids` knows the names; this chooses among what a file offers.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from genecompass_jax import errors, gene_ids, gene_table
from genecompass_jax.prepare import counting

SPECIES_NAMES = {
  'human': 'human',
  'homo sapiens': 'human',
  'h. sapiens': 'human',
  'ncbitaxon:9606': 'human',
  'mouse': 'mouse',
  'mus musculus': 'mouse',
  'm. musculus': 'mouse',
  'ncbitaxon:10090': 'mouse',
}
# the 24 mitochondrial rRNA and tRNA genes of each species (Ensembl), which no
# gene table here holds, but files of counts do
_HUMAN_MITO_RNA = (
  209082, 210049, 210077, 210082, 210100, 210107, 210112, 210117,
  210127, 210135, 210140, 210144, 210151, 210154, 210156, 210164,
  210174, 210176, 210184, 210191, 210194, 210195, 210196, 211459,
)  # fmt: skip
_MOUSE_MITO_RNA = (
  64336, 64337, 64338, 64339, 64340, 64342, 64343, 64344,
  64346, 64347, 64348, 64349, 64350, 64352, 64353, 64355,
  64359, 64361, 64364, 64365, 64366, 64369, 64371, 64372,
)  # fmt: skip
MITO_RNA = frozenset(
  [f'ENSG{n:011d}' for n in _HUMAN_MITO_RNA]
  + [f'ENSMUSG{n:011d}' for n in _MOUSE_MITO_RNA]
)


def species_of_cells(
  name: str, obs: pd.DataFrame, species: str, table: gene_table.GeneTable
) -> np.ndarray:
  """int8 code of every cell; -1 where the identifiers are to decide.

  Raises:
    UserError: no species of the table, or no such obs column.
  """
  if species == 'auto':
    return np.full(len(obs), -1, np.int8)
  if species in table.species:
    return np.full(len(obs), table.species.index(species), np.int8)
  if not species.startswith('obs:'):
    raise errors.UserError(
      f'--species {species}: give {", ".join(table.species)}, auto or obs:COLUMN'
    )
  column = species.removeprefix('obs:')
  if column not in obs:
    raise errors.UserError(
      f'{name}: --species {species}, but there is no such obs column'
    )
  text, codes = _species_codes(obs[column], table)
  if codes.isna().any():
    raise errors.UserError(
      f'{name}: obs column {column!r} holds {text[codes.isna()].iloc[0]!r}, '
      f'which is none of {", ".join(table.species)}'
    )
  return codes.to_numpy(np.int8)


def contradiction(
  obs: pd.DataFrame, species_C: np.ndarray, table: gene_table.GeneTable
) -> str:
  """What an obs column says against the species that identifiers gave; ''.

  Mouse cells in the symbols of human orthologues look human.
  """
  for column in obs:
    if str(column).casefold() not in ('species', 'organism'):
      continue
    _, codes = _species_codes(obs[column], table)
    differs_C = (codes.notna() & (codes != species_C)).to_numpy()
    if differs_C.any():
      first = int(differs_C.argmax())
      said = table.species[int(codes.iloc[first])]
      return (
        f'obs[{column!r}] says that {int(differs_C.sum()):,} cells are of '
        f'another species ({said}) than their identifiers '
        f'({table.species[species_C[first]]}), which are followed; give '
        f'--species obs:{column}, and --ids-of where all genes are named alike'
      )
  return ''


def _species_codes(
  column: pd.Series, table: gene_table.GeneTable
) -> tuple[pd.Series, pd.Series]:
  """Species of cells as text, and their codes: nan for none of the table."""
  text = column.astype(str).str.strip().str.casefold()
  code_of = {species: code for code, species in enumerate(table.species)}
  codes = text.map(lambda value: code_of.get(SPECIES_NAMES.get(value, value)))
  return text, codes.astype(float)


def resolve(
  name: str,
  var: pd.DataFrame,
  ids_of: str,
  species: Sequence[int],
  table: gene_table.GeneTable,
) -> tuple[tuple[str, ...], dict[int, gene_ids.Resolution], str]:
  """Chooses the identifiers, and where they lead for each species.

  Args:
    name: of the source, for errors.
    var: its columns.
    ids_of: species of the identifiers where it is not that of the cells.
    species: codes of the cells; none where the identifiers are to decide.
    table: genes to look identifiers up in.

  Returns:
    The identifiers used, their genes for each species, and the reason.

  Raises:
    UserError: species or identifiers are in doubt.
  """
  index = [str(v) for v in var.index]
  columns = {}
  for column in var.columns:
    values = var[column]
    if values.dtype == object or isinstance(
      values.dtype, pd.CategoricalDtype | pd.StringDtype
    ):
      text = ['' if pd.isna(v) else str(v) for v in values]
      if len(set(text)) > len(text) / 2:
        columns[str(column)] = text
  asked: int | None = None
  if ids_of:
    if ids_of not in table.species:
      raise errors.UserError(
        f'--ids-of {ids_of}: give {" or ".join(table.species)}'
      )
    asked = table.species.index(ids_of)
  elif len(species) == 1:
    asked = species[0]
  resolutions, reasons, names = {}, [], ()
  try:
    if species and not ids_of:
      wanted = [(code, code) for code in species]
    else:
      choice = gene_ids.choose_identifiers(index, columns, table, asked)
      wanted = [(code, choice.species) for code in species or [choice.species]]
    for code, of in wanted:
      choice = gene_ids.choose_identifiers(index, columns, table, of)
      names = tuple(index if choice.column is None else columns[choice.column])
      resolution = gene_ids.resolve(names, code, table, of)
      # orthologues of the other species are fewer; what counts is that the
      # identifiers themselves are known
      known = resolution
      if of != code:
        known = gene_ids.resolve(names, of, table)
      gene_ids.check_share_known(known)
      resolutions[code] = resolution
      reasons.append(choice.reason)
  except errors.UserError as error:
    raise errors.UserError(f'{name}: {error}') from None
  return names, resolutions, '; '.join(dict.fromkeys(reasons))


def column_flags(
  names: Sequence[str],
  resolution: gene_ids.Resolution,
  table: gene_table.GeneTable,
) -> np.ndarray:
  """uint8 flags of a file's columns: `counting.CODING`, `counting.MITO`."""
  named_mito = [
    name.casefold().startswith('mt-') or name.partition('.')[0] in MITO_RNA
    for name in names
  ]
  flag = np.array(named_mito, np.uint8) * counting.MITO
  row_of = table.row_of
  for column, gene_id in enumerate(resolution.gene_ids):
    if gene_id is None:
      continue
    row = row_of[gene_id]
    if table.biotypes[row] in ('protein_coding', 'miRNA'):
      flag[column] |= counting.CODING
    if table.symbols[row].casefold().startswith('mt-'):
      flag[column] |= counting.MITO
  return flag
