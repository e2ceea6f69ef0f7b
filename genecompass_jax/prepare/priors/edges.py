"""Tables of transcription factors and their targets, as they are published."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from genecompass_jax import errors, gene_table, paths
from genecompass_jax.prepare.priors import files, names

FORMATS = ('collectri', 'dorothea', 'trrust', 'table')
# What CollecTRI and others name as one regulator.
COMPLEXES = {
  'NFKB': ('NFKB1', 'NFKB2', 'REL', 'RELA', 'RELB'),
  'AP1': ('FOS', 'FOSB', 'FOSL1', 'FOSL2', 'JUN', 'JUNB', 'JUND'),
}
_ALIASES = {'NFKAPPAB': 'NFKB', 'NF-KB': 'NFKB', 'AP-1': 'AP1'}
_JOINED = re.compile(
  r'(?:COMPLEX:)?([A-Za-z][\w.-]*(?:(?:::|[_+:/])[A-Za-z][\w.-]*)+)'
)


@dataclasses.dataclass(frozen=True)
class EdgeTable:
  """One file of edges.

  Attributes:
    path: the file.
    species: code of its genes.
    form: one of `FORMATS`.
    weight: of its edges, a factor where the table has weights of its own.
    confidence: of DoRothEA, the letters that are kept.
    columns: of `table`: regulator, target and, if there is one, weight; by
      name, or by number from 1.
    header: of `table`: the first line names the columns.
    licence: origin and licence, in the user's words.
  """

  path: str
  species: int
  form: str
  weight: float = 1.0
  confidence: str = 'ABC'
  columns: tuple[str, ...] = ('1', '2')
  header: bool = True
  licence: str = ''

  def __post_init__(self):
    if self.form not in FORMATS:
      raise errors.UserError(
        f'{self.form!r} is no format of edges: give {", ".join(FORMATS)}'
      )
    if not 0 < self.weight < float('inf'):
      raise errors.UserError(f'{self.path}: {self.weight} is no weight')
    if len(self.columns) not in (2, 3):
      raise errors.UserError(
        f'{self.path}: give two or three columns: regulator,target[,weight]'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
  """N statements, regulator -> target, of one file; repeats are possible.

  Attributes:
    tf_N, target_N: int32 rows of the gene table.
    weight_N: float64, positive; signs of the source are dropped.
    species: code of the genes.
    facts: file, sha256, licence, and what was lost.
  """

  tf_N: np.ndarray
  target_N: np.ndarray
  weight_N: np.ndarray
  species: int
  facts: dict


def read(
  source: EdgeTable,
  genes: gene_table.GeneTable,
  complexes: Mapping[str, Sequence[str]] = COMPLEXES,
) -> Edges:
  """Reads a table; complexes become edges of each of their parts.

  Raises:
    UserError: no such file, other columns, or names of another species.
  """
  frame = _frame(source)
  facts = files.source(source.path, source.licence)
  facts |= {'format': source.form, 'edges_in_file': len(frame)}
  if source.form == 'dorothea':
    frame = frame[frame['confidence'].isin(list(source.confidence))]
    facts['confidence'] = source.confidence
    if not len(frame):
      raise errors.UserError(
        f'{source.path}: no edge of confidence {source.confidence}'
      )
  frame = _expand(_expand(frame, 'tf', complexes), 'target', complexes)
  weight_N = _weights(source, frame) * source.weight
  tf_N, of_tfs = names.rows(frame['tf'], source.species, genes)
  target_N, of_targets = names.rows(frame['target'], source.species, genes)
  names.check_known(source.path, of_tfs)
  names.check_known(source.path, of_targets)
  known_N = (tf_N >= 0) & (target_N >= 0) & (weight_N > 0)
  facts |= {
    'species': gene_table.SPECIES[source.species],
    'weight': source.weight,
    'edges_after_complexes': len(frame),
    'edges_kept': int(known_N.sum()),
    'regulators': of_tfs,
    'targets': of_targets,
  }
  return Edges(
    tf_N[known_N], target_N[known_N], weight_N[known_N], source.species, facts
  )


def read_complexes(path: paths.PathLike) -> dict[str, tuple[str, ...]]:
  """Complexes of a table: name, then a part, one row a part."""
  frame = files.table(path, header=False)
  if frame.shape[1] < 2:
    raise errors.UserError(f'{path}: give two columns, complex and part')
  found: dict[str, list[str]] = {}
  for name, part in zip(frame.iloc[:, 0], frame.iloc[:, 1]):
    found.setdefault(name, []).append(part)
  return {name: tuple(parts) for name, parts in found.items()}


def _frame(source: EdgeTable) -> pd.DataFrame:
  """The columns tf and target; confidence or weight where there are such."""
  header = source.form != 'trrust' and source.header
  frame = files.table(source.path, header)
  wanted = {
    'collectri': ('source', 'target', 'weight'),
    'dorothea': ('tf', 'target', 'mor', 'confidence'),
    'trrust': ('1', '2'),
    'table': source.columns,
  }[source.form]
  found = files.columns(source.path, frame, wanted)
  frame = frame[found].copy()
  frame.columns = ('tf', 'target', 'weight', 'confidence')[: len(found)]
  return frame[(frame['tf'] != '') & (frame['target'] != '')]


def _weights(source: EdgeTable, frame: pd.DataFrame) -> np.ndarray:
  if 'weight' not in frame:
    return np.ones(len(frame))
  weight_N = pd.to_numeric(frame['weight'], errors='coerce').abs().to_numpy()
  if not np.isfinite(weight_N).all():
    text = frame['weight'].iloc[int(np.argmin(np.isfinite(weight_N)))]
    raise errors.UserError(f'{source.path}: the weight {text!r} is no number')
  return weight_N


def _expand(
  frame: pd.DataFrame, column: str, complexes: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
  """Rows of a complex once for each part: NFKB, JUN_FOS, COMPLEX:JUN_FOS."""

  def parts(name: str) -> Sequence[str]:
    upper = name.upper()
    known = complexes.get(_ALIASES.get(upper, upper)) or complexes.get(name)
    if known:
      return known
    match = _JOINED.fullmatch(name)
    if match and (name.startswith('COMPLEX:') or '::' in name or '+' in name):
      return re.split(r'::|[_+:/]', match[1])
    return (name,)

  distinct = {name: parts(name) for name in frame[column].unique()}
  if all(len(found) == 1 for found in distinct.values()):
    return frame
  frame = frame.assign(**{column: frame[column].map(distinct)})
  return frame.explode(column, ignore_index=True)
