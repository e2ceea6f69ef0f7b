"""Files of results, and their answers as an AnnData.

  NAME.parquet        a line a target and group
  NAME.units.parquet  a line a target, group and unit
  NAME.tsv            the first again, for people, with the header on top
  NAME.answers.h5ad   targets x answering genes, where they were asked for; of
                      several groups NAME.GROUP.answers.h5ad

The header is in the metadata of the parquet files, in the first lines of the
.tsv, and in `uns` of the AnnData.
"""

import os
import re
from collections.abc import Mapping, Sequence

import anndata
import numpy as np
import pandas as pd

from genecompass_jax import errors, paths, scratch
from genecompass_jax.analysis import tables
from genecompass_jax.analysis.perturbation import (
  answers as answers_lib,
  interventions,
  results as results_lib,
)

_LONGEST = 60  # characters of a group in the name of a file
_UNITS, _TEXT, _ANSWERS = '.units.parquet', '.tsv', '.answers.h5ad'


def answers_adata(
  results: results_lib.Results,
  group: str,
  done: Sequence[interventions.Intervention],
  answers: answers_lib.Answers,
  symbols: Mapping[int, str],
  gene_ids: Mapping[int, str],
) -> anndata.AnnData:
  """Targets x answering genes, for scanpy.

  X is z; the layers are `response`, its mean over units, and `cells`, how many
  have the gene. NaN where a gene was perturbed itself, or seen too rarely.

  Args:
    results: with a line for every target in this group.
    group: that the answers are of.
    done: interventions; their places are the numbers of variants.
    answers: of the group.
    symbols: names of tokens.
    gene_ids: Ensembl ids of tokens.
  """
  ids = [
    '+'.join(gene_ids.get(k, '') for k in done[v].tokens)
    for v in answers.target_T.tolist()
  ]
  wanted = pd.DataFrame(
    {
      'gene_id': ids,
      'kind': [done[v].kind for v in answers.target_T.tolist()],
      'amount': [done[v].amount for v in answers.target_T.tolist()],
      't': np.arange(len(ids)),
    }
  )
  table = results.table[results.table['group'] == group]
  obs = table.merge(wanted, on=['gene_id', 'kind', 'amount'], sort=False)
  t = obs.pop('t').to_numpy()
  obs['rank'] = obs['rank'].astype(float)  # h5ad has no missing integers
  names = obs['symbol'].tolist()
  if len(set(names)) < len(names):
    names = [
      ' '.join(filter(None, line))
      for line in zip(names, obs['kind'], obs['amount'])
    ]
  obs.index = _unique(names, obs['gene_id'])
  tokens = answers.token_G.tolist()
  var = pd.DataFrame(
    {
      'gene_ids': [gene_ids.get(k, '') for k in tokens],
      'symbol': [symbols.get(k, '') for k in tokens],
      'token': np.asarray(tokens, np.int64),
    }
  )
  var.index = _unique(var['symbol'], var['gene_ids'])
  return anndata.AnnData(
    X=answers.z_TG[t].astype(np.float32),
    obs=obs,
    var=var,
    layers={
      'response': answers.mean_TG[t].astype(np.float32),
      'cells': answers.cells_TG[t],
    },
    uns={results_lib.KEY: dict(results.header)},
  )


def _unique(names: Sequence[str], ids: Sequence[str]) -> pd.Index:
  """Names, with the id behind those that several have."""
  counts = pd.Series(list(names)).value_counts()
  return pd.Index(
    [
      str(n) if n and counts[n] == 1 else f'{n} {i}'.strip()
      for n, i in zip(names, ids)
    ]
  )


def write(
  results: results_lib.Results,
  output: paths.PathLike,
) -> None:
  """Writes all files of a result, the table last, each whole or not at all.

  Args:
    results: what was found.
    output: NAME.parquet.

  Raises:
    UserError: the name ends otherwise.
  """
  stem = stem_of(output)
  folder = scratch.new_folder('answers')
  try:
    tails = tails_of([*results.answers])
    for group, answers in results.answers.items():
      name = f'{stem}{tails[group]}{_ANSWERS}'
      local = os.path.join(folder, 'answers.h5ad')
      answers.write_h5ad(local)
      paths.write_bytes(name, paths.read_bytes(local))
  finally:
    scratch.remove(folder)
  paths.write_bytes(f'{stem}{_UNITS}', _parquet(results.units, results))
  paths.write_text(f'{stem}{_TEXT}', text(results))
  paths.write_bytes(output, _parquet(results.table, results))


def tails_of(
  groups: Sequence[str], unsafe: str = r'[^A-Za-z0-9_+-]+'
) -> dict[str, str]:
  """What tells the files of several groups apart, by group.

  Args:
    groups: their names.
    unsafe: what becomes _; groups that differ in that alone get a number.
  """
  if len(groups) == 1:
    return {groups[0]: ''}
  tails: dict[str, str] = {}
  taken: set[str] = set()
  for group in groups:
    tail = name = '.' + re.sub(unsafe, '_', group)[:_LONGEST]
    number = 1
    while tail.lower() in taken:  # some disks know no upper case
      number += 1
      tail = f'{name}.{number}'
    taken.add(tail.lower())
    tails[group] = tail
  return tails


def text(results: results_lib.Results) -> str:
  """The header in lines that begin with #, then the table, tab-separated."""
  return tables.text(results.table, results.header)


def read(output: paths.PathLike) -> results_lib.Results:
  """Reads NAME.parquet and NAME.units.parquet back.

  Raises:
    UserError: there are none, or they are no results of a perturbation.
  """
  stem = stem_of(output)
  frames, headers = [], []
  for name in (os.fspath(output), f'{stem}{_UNITS}'):
    try:
      frame, header = tables.read(name, results_lib.KEY, 'a perturbation')
    except FileNotFoundError as error:
      raise errors.UserError(
        f'{name} is not there; give the .parquet that a perturbation wrote, '
        'and keep its .units.parquet beside it'
      ) from error
    frames.append(frame)
    headers.append(header)
  if headers[0] != headers[1]:
    raise errors.UserError(
      f'{os.fspath(output)} and {stem}{_UNITS} are of two perturbations; copy '
      'both again'
    )
  return results_lib.Results(frames[0], frames[1], headers[0])


def stem_of(output: paths.PathLike) -> str:
  """NAME of NAME.parquet; UserError where it ends otherwise."""
  name = os.fspath(output)
  if not name.endswith('.parquet') or name.endswith(_UNITS):
    raise errors.UserError(f'{name}: results have a name that ends in .parquet')
  return name.removesuffix('.parquet')


def _parquet(frame: pd.DataFrame, results: results_lib.Results) -> bytes:
  return tables.parquet(frame, results.header, results_lib.KEY)
