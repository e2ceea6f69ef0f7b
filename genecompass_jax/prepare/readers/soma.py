"""SOMA experiments on disk, and releases of the CELLxGENE Census.

Of a census only primary data are read (a cell that several collections hold is
primary in one), raw counts, and of every dataset only the genes that it
measured: its presence matrix says which. Datasets become sources of their own,
because their genes differ. A plain SOMA experiment, as `tiledbsoma.io` writes
it, is one source.
"""

import dataclasses
import functools
import hashlib
import os
import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse

from genecompass_jax import errors, vocabulary
from genecompass_jax.prepare import (
  damage,
  source_config,
  sparse,
)
from genecompass_jax.prepare.readers import opened, zarr_anndata

SCHEME = 'census:'
ORGANISMS = ('homo_sapiens', 'mus_musculus')  # by species code
DATASET, PRIMARY, ID = 'dataset_id', 'is_primary_data', 'soma_joinid'
_RELEASE = re.compile(r'\d{4}-\d{2}-\d{2}')
_NAMES = {'data': 'X', 'raw': 'raw'}  # of layers; others are layers/NAME
_GENE_COLUMNS = ('feature_id', 'feature_name', 'gene_id', 'gene_name')
# of the cells: what is not text of its own has to be asked for
_LABEL_COLUMNS = ('cell_type', 'tissue', 'tissue_general', 'assay', 'donor_id')


def read(config: source_config.SourceConfig) -> opened.Opened:
  """Opens an experiment: labels are read in ranges, counts stay there.

  Raises:
    UserError: no experiment, no such cells, or cells of several datasets.
  """
  path = config.path
  with damage.in_one_line(path, 'the SOMA experiment'):
    place = _open(config)
    census, experiments = _experiments(place)
    species = _species(config, experiments)
    experiment = experiments[species]
    obs = _obs(config, experiment, census)
    names = list(experiment.ms)
    if 'RNA' not in names and len(names) != 1:
      raise errors.UserError(f'{path}: measurements {names}, none is RNA')
    rna = experiment.ms['RNA' if 'RNA' in names else names[0]]
    var = rna.var.read().concat().to_pandas()
  digest = ''
  files: tuple[str, ...] = ()
  if os.path.isdir(path):
    files = zarr_anndata.files_below(path)
  if census or not files:
    digest = _digest(config, obs)
  notes = []
  if census:
    datasets = obs[DATASET].astype(str).unique()
    if len(datasets) != 1:
      raise errors.UserError(
        f'{path}: cells of {len(datasets)} datasets, which measured different '
        'genes; read them one by one, with --obs-filter "dataset_id == \'...\'"'
      )
    with damage.in_one_line(path, 'the genes of a dataset'):
      measured = _measured(place, rna, datasets[0], var[ID].to_numpy())
    notes.append(f'{measured.sum():,} of {len(var):,} genes were measured')
    var = var[measured]
  ids = var.pop(ID).to_numpy(np.int64)
  rows = obs.pop(ID).to_numpy(np.int64)
  obs.index = _cell_names(obs, rows)
  for name in _GENE_COLUMNS:
    if name in var:
      var = var.set_index(name, drop=False)
      break
  else:
    text = [c for c in var if pd.api.types.is_string_dtype(var[c])]
    if text:  # tiledbsoma.io keeps the index as a column, obs_id or var_id
      var = var.set_index('var_id' if 'var_id' in text else text[0])
  var.index = var.index.astype(str)
  layers = {}
  with damage.in_one_line(path, 'the matrices'):
    for name in ['raw'] if census else list(rna.X):
      if not hasattr(rna.X[name], 'nnz'):
        continue  # dense: of scaled values, not of counts
      matrix = Soma(rna.X[name], rows, ids, place, path)
      layers[_NAMES.get(name, f'layers/{name}')] = matrix, var
  return opened.Opened(obs, layers, files, digest, tuple(notes))


def expand(
  config: source_config.SourceConfig,
) -> list[source_config.SourceConfig]:
  """One configuration for each dataset of a census; a plain one stays as it is.

  Args:
    config: with `species` auto, human and mouse datasets both.

  Raises:
    UserError: as `read`.
  """
  with damage.in_one_line(config.path, 'the census'):
    census, experiments = _experiments(_open(config))
    if not census:
      return [config]
    chosen = range(len(ORGANISMS))
    if config.species != 'auto':
      chosen = [_species(config, experiments)]
    parts = []
    for species in chosen:
      experiment = experiments.get(species)
      if experiment is None:
        continue
      found: dict[str, None] = {}
      query = experiment.obs.read(
        value_filter=_filter(config, census), column_names=[DATASET]
      )
      for table in query:
        found |= dict.fromkeys(table[DATASET].unique().to_pylist())
      for dataset in sorted(map(str, found)):
        condition = f'{DATASET} == {dataset!r}'
        if config.obs_filter:
          condition += f' and ({config.obs_filter})'
        parts.append(
          dataclasses.replace(
            config,
            name=config.name and f'{config.name}-{dataset}' or dataset,
            species=vocabulary.SPECIES[species],
            dataset=dataset,
            obs_filter=condition,
          )
        )
  if not parts:
    raise errors.UserError(
      f'{config.path}: no cell is primary ({PRIMARY}) and matches '
      + (config.obs_filter or f'species {config.species}')
    )
  return parts


def _library(path: str) -> Any:
  try:
    import tiledbsoma
  except ImportError:
    raise errors.UserError(
      f'{path}: SOMA experiments need tiledbsoma: pip install '
      '".[census]" in the folder of the repository'
    ) from None
  return tiledbsoma


def _open(config: source_config.SourceConfig) -> Any:
  """The experiment or the collection of a census."""
  path = config.path
  if os.path.isdir(path):
    return _library(path).open(path)
  release = path.removeprefix(SCHEME)
  if not _RELEASE.fullmatch(release):
    raise errors.UserError(
      f'{path}: name a release by its date, as in census:2025-01-30: stable '
      'and latest change, and with them the corpus'
    )
  _library(path)
  try:
    import cellxgene_census
  except ImportError:
    raise errors.UserError(
      f'{path}: releases of the Census need cellxgene-census: pip install '
      '".[census]" in the folder of the repository'
    ) from None
  try:
    return cellxgene_census.open_soma(census_version=release)
  except OSError as error:
    raise errors.RetryableError(
      f'{path}: the Census does not answer ({errors.first_line(error)}); run '
      'the same command again'
    ) from None


def _experiments(place: Any) -> tuple[bool, dict[int, Any]]:
  """Whether it is a census, and the experiment of each species code."""
  if place.soma_type == 'SOMAExperiment':
    return False, {-1: place}
  if 'census_data' not in place:
    raise errors.UserError(
      f'a {place.soma_type}, neither an experiment nor a census'
    )
  data = place['census_data']
  return True, {
    species: data[name]
    for species, name in enumerate(ORGANISMS)
    if name in data
  }


def _species(
  config: source_config.SourceConfig, experiments: dict[int, Any]
) -> int:
  if len(experiments) == 1 and (config.species == 'auto' or -1 in experiments):
    return next(iter(experiments))
  if config.species not in vocabulary.SPECIES:
    raise errors.UserError(
      f'{config.path}: holds human and mouse cells; give --species human or '
      '--species mouse'
    )
  species = vocabulary.SPECIES.index(config.species)
  if species not in experiments:
    raise errors.UserError(f'{config.path}: holds no {config.species} cells')
  return species


def _filter(config: source_config.SourceConfig, census: bool) -> str | None:
  parts = [f'{PRIMARY} == True'] if census else []
  if config.obs_filter:
    parts.append(f'({config.obs_filter})')
  return ' and '.join(parts) or None


def _obs(
  config: source_config.SourceConfig, experiment: Any, census: bool
) -> pd.DataFrame:
  """Labels of the cells, by ascending joinid; of a census those asked for."""
  known = list(experiment.obs.keys())
  columns = None
  if census:
    wanted = {ID, DATASET, *config.obs, config.unit, config.sample}
    wanted |= {config.total, config.species.removeprefix('obs:')}
    wanted |= set(_LABEL_COLUMNS)
    columns = [name for name in known if name in wanted]
  tables = experiment.obs.read(
    column_names=columns, value_filter=_filter(config, census)
  )
  parts = [table.to_pandas() for table in tables]
  if not sum(map(len, parts)):
    raise errors.UserError(
      f'{config.path}: no cells match {_filter(config, census)}'
      if census or config.obs_filter
      else f'{config.path}: no cells'
    )
  obs = pd.concat(parts, ignore_index=True)
  return obs.sort_values(ID, ignore_index=True)


def _cell_names(obs: pd.DataFrame, rows: np.ndarray) -> pd.Index:
  for name in ('obs_id', 'observation_joinid'):
    if name in obs:
      return pd.Index(obs[name].astype(str), name=None)
  return pd.Index(rows.astype(str), dtype=object)


def _measured(
  place: Any, rna: Any, dataset: str, ids: np.ndarray
) -> np.ndarray:
  """Which genes a dataset of a census measured."""
  table = (
    place['census_info']['datasets'].read(column_names=[ID, DATASET]).concat()
  )
  rows = {
    d: j for d, j in zip(table[DATASET].to_pylist(), table[ID].to_pylist())
  }
  if dataset not in rows:
    raise errors.UserError(f'dataset {dataset} is not in the list of datasets')
  name = 'feature_dataset_presence_matrix'
  present = rna[name].read((rows[dataset],)).tables().concat()
  kept = present['soma_dim_1'].to_numpy()[present['soma_data'].to_numpy() != 0]
  measured = np.isin(ids, kept)
  if not measured.any():
    raise errors.UserError(f'dataset {dataset} measured no gene')
  return measured


def _digest(config: source_config.SourceConfig, obs: pd.DataFrame) -> str:
  """Of a release, which does not change, and of the cells taken from it."""
  release = os.path.basename(config.path.rstrip('/'))
  digest = hashlib.sha256(f'{release}\n{config.species}\n'.encode())
  digest.update(obs[ID].to_numpy('<i8').tobytes())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Soma:
  """Cells x genes in a sparse SOMA array, by their joinids.

  Attributes:
    array: the sparse array.
    rows: ascending joinids of the cells.
    columns: joinids of the genes.
    place: what the array was opened through; it closes the array as it goes.
    where: path, for errors.
  """

  array: Any
  rows: np.ndarray
  columns: np.ndarray
  place: Any
  where: str

  @property
  def shape(self) -> tuple[int, int]:
    """Cells and genes."""
    return len(self.rows), len(self.columns)

  @functools.cached_property
  def dtype(self) -> np.dtype:
    """Of the values."""
    return np.dtype(self.array.schema.field('soma_data').type.to_pandas_dtype())

  @functools.cached_property
  def num_entries(self) -> int:
    """A guess: cells are all alike."""
    share = len(self.rows) / max(self.array.shape[0], 1)
    return int(self.array.nnz * share)

  @functools.cached_property
  def _place_of(self) -> np.ndarray:
    place_of = np.full(max(self.columns.max(initial=0), 0) + 2, -1, np.int64)
    place_of[self.columns] = np.arange(len(self.columns))
    return place_of

  def read(self, first: int, stop: int) -> scipy.sparse.csr_matrix:
    """Rows of the matrix.

    Raises:
      UserError: counts of genes that are not among the columns.
    """
    wanted = self.rows[first:stop]
    if not len(wanted):
      return scipy.sparse.csr_matrix((0, self.shape[1]), dtype=self.dtype)
    rows: Any = pa.array(wanted)
    if wanted[-1] - wanted[0] < 2 * len(wanted):  # a range is read faster
      rows = slice(int(wanted[0]), int(wanted[-1]))
    parts = list(self.array.read((rows, slice(None))).tables())
    row, column, value = (
      np.concatenate([part[name].to_numpy() for part in parts])
      if parts
      else np.zeros(0, np.int64)
      for name in ('soma_dim_0', 'soma_dim_1', 'soma_data')
    )
    place = np.searchsorted(wanted, row)
    place[place == len(wanted)] = 0
    column = self._place_of[np.minimum(column, len(self._place_of) - 1)]
    is_wanted = wanted[place] == row
    if (value[is_wanted & (column < 0)] != 0).any():
      raise errors.UserError(
        f'{self.where}: cells {wanted[0]:,} to {wanted[-1]:,} have counts of '
        'genes that its lists of genes lack; write it anew, or name another '
        'release'
      )
    keep = is_wanted & (column >= 0)
    shape = len(wanted), len(self.columns)
    return sparse.csr(
      place[keep], column[keep], value[keep].astype(self.dtype), shape
    )

  def sample(self) -> np.ndarray:
    """Values of a few cells in several places."""
    firsts = np.unique(
      np.linspace(0, max(len(self.rows) - 4, 0), 8).astype(int)
    )
    parts = [self.read(a, min(a + 4, len(self.rows))).data for a in firsts]
    return np.concatenate(parts).astype(np.float64)

  def by_rows(self, folder: str | None = None) -> 'Soma':
    """As it is."""
    del folder
    return self
