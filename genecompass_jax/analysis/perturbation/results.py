"""Results of a perturbation: a tidy table, what it means, and an AnnData.

A table never comes without its header: what was measured by which sign, what
the nulls are, what family q is over, and which model and cells it is of.
`result_files` writes and reads them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import anndata
import numpy as np
import pandas as pd

import genecompass_jax
from genecompass_jax import (
  errors,
  pretrained,
)
from genecompass_jax.analysis import tables
from genecompass_jax.analysis.perturbation import (
  effects as effects_lib,
  interventions,
  matching,
  statistics,
)

STATEMENT = 'association learned from expression, not a causal estimate'
KEY = 'genecompass_perturbation'  # of the header in metadata and in uns
ALL_CELLS = 'all'  # the group of a table without groups
FEW_UNITS, FEW_NULL = 'few_units', 'few_null'
NO_CHANGE, UNITS_DISAGREE = 'no_change', 'units_disagree'
MORE, LESS, NOT_SHOWN = 'more', 'less', 'not shown'  # verdicts


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
  """What a perturbation found.

  Attributes:
    table: a line a target and group, by group, then falling score.
    units: a line a target, group and unit, in the same order.
    header: what the numbers mean and where they come from, in lines.
    answers: by group, targets x answering genes, where they were asked for;
      see `result_files.answers_adata`.
  """

  table: pd.DataFrame
  units: pd.DataFrame
  header: dict[str, str]
  answers: dict[str, anndata.AnnData] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    groups = list(dict.fromkeys(self.table['group']))
    return (
      f'Results({len(self.table):,} lines of {len(groups)} groups: '
      f'{", ".join(groups[:5])}{", ..." if len(groups) > 5 else ""}; '
      '.genes_df(group), .table, .units and .header give them)'
    )

  def genes_df(self, group: str | None = None) -> pd.DataFrame:
    """As `scanpy.get.rank_genes_groups_df` gives: names, scores and so on.

    Args:
      group: one group; None gives all, in a column of their own if there are
        several.

    Raises:
      UserError: there is no such group.
    """
    table = self.table
    groups = list(dict.fromkeys(table['group']))
    if group is not None:
      if group not in groups:
        raise errors.UserError(
          f'no group {group!r}; there are: {", ".join(groups)}'
        )
      table = table[table['group'] == group]
    frame = pd.DataFrame(
      {
        'names': table['symbol'],
        'scores': table['score'],
        'shift': table['shift'],
        'p': table['p'],
        'q': table['q'],
        'n_cells': table['n_cells'],
        'n_donors': table['n_units'],
      }
    )
    if table['toward'].notna().any():
      frame.insert(3, 'toward', table['toward'])
    if group is None and len(groups) > 1:
      frame.insert(0, 'group', table['group'])
    return frame.reset_index(drop=True)


def header(
  *,
  model: pretrained.PretrainedModel,
  source: str,
  matched: matching.MatchingConfig,
  tested: statistics.Config,
  unit: str,
  family: str,
  **more: object,
) -> dict[str, str]:
  """The header of a table.

  Args:
    model: that was asked.
    source: name of the cells.
    matched: how nulls were chosen.
    tested: how targets were tested.
    unit: obs column that names the units; '' where all cells are one.
    family: what q is over, in words.
    **more: further lines: group, pooling, goal, what was done, ...
  """
  rules = {
    'what': f'in-silico perturbation: {STATEMENT}',
    **{name: effects_lib.SIGNS[name] for name in effects_lib.SIGNS},
    'measure': f'{tested.measure}: null_mean, null_sd, z, p and q are of it',
    'z': 'effect less that of matched nulls in the same cells and at the same '
    'rank (by a line through them), over units, in sd of the nulls: positive is '
    'more than the nulls',
    'score': 'z; ranks are by it, 1 the highest of a group',
    'null': matched.describe(),
    'null_z_low, null_z_high': 'between them are 95 % of the z of all nulls of '
    'the group',
    'measured': 'all genes of the source count as measured in all its cells, also '
    'those of a file that was joined from sources of several panels',
    'alternative': tested.side,
    'p': 'share of all nulls as far from the other nulls of their target'
    if tested.p_from == statistics.EMPIRICAL
    else "Student's t of z among the nulls (targets are nulls of each other)",
    'q': f'Benjamini and Hochberg over the family: {family}',
    'unit': f'obs[{unit!r}]: effects are averaged within a unit of at least '
    f'{tested.min_cells} cells, then over units'
    if unit
    else 'all cells are one unit: no p and no q, ranks only',
    'few units': f'below {statistics.MIN_UNITS} units: every value and n in the '
    'table of units, no interval and no verdict',
    'entered': 'genes that came in at the cut of a cell because others left, '
    'mean over the cells; they are compared with nothing',
    'source': source,
    'model': model.source,
    'model_sha256': model.sha256,
    'model_step': str(model.step),
    'vocabulary': model.vocabulary.sha256 if model.vocabulary else '',
    'medians': model.assets.medians.sha256 if model.assets.medians else '',
    'encoding': ', '.join(
      f'{k}={v}' for k, v in dataclasses.asdict(model.assets.encoding).items()
    ),
    'genecompass_jax': genecompass_jax.__version__,
    'numpy': np.__version__,
  }
  return {**rules, **{k: tables.one_line(v) for k, v in more.items()}}


def tabulate(
  done: Sequence[interventions.Intervention],
  effects: effects_lib.CellEffects,
  tests: Mapping[str, statistics.Tests],
  unit_of: Mapping[str, np.ndarray],
  profiles: Mapping[str, matching.Profiles],
  gene_ids: Mapping[int, str],
  header: Mapping[str, str],
  num_not_chosen: int = 0,
) -> Results:
  """One table of all groups.

  Args:
    done: interventions; their places are the numbers of variants.
    effects: of all of them.
    tests: by group; `ALL_CELLS` where there are no groups.
    unit_of: by group, unit of every cell of the source, as it was tested.
    profiles: by group, of variants.
    gene_ids: Ensembl ids of tokens.
    header: see `header`.
    num_not_chosen: further members of the family of q, see
      `statistics.false_discovery_rate`.
  """
  lines, of_units = [], []
  for group, tested in tests.items():
    means = {
      measure: statistics.unit_means(
        effects, measure, unit_of[group], len(tested.units_U),
        tested.config.min_cells,
      )
      for measure in statistics.MEASURES
    }  # fmt: skip
    row_T = profiles[group].rows(tested.target_T)
    is_in_N = unit_of[group][effects.cell_N] >= 0
    entered_R, cells_R = (
      np.bincount(effects.variant_N[is_in_N], weights, len(done))
      for weights in (effects.entered_N[is_in_N], None)
    )
    for t, variant in enumerate(tested.target_T.tolist()):
      one = done[variant]
      what = {
        'group': group,
        'gene_id': '+'.join(gene_ids.get(k, '') for k in one.tokens),
        'symbol': one.name,
        'kind': one.kind,
        'amount': one.amount,
      }
      places = {m: means[m].get(variant) for m in statistics.MEASURES}
      lines.append(
        {
          **what,
          **_line_of(tested, t, places, profiles[group], int(row_T[t])),
          'entered': entered_R[variant] / max(cells_R[variant], 1),
        }
      )
      of_units += _lines_of_units(what, tested, t, places)
  table = pd.DataFrame(lines)
  table['q'] = statistics.false_discovery_rate(table['p'], num_not_chosen)
  table['verdict'] = _verdicts(table)
  order = np.lexsort(
    [
      table[name].to_numpy().astype(str)
      for name in ('amount', 'kind', 'gene_id')
    ]
    + [-table['score'].to_numpy()]
    + [table['group'].to_numpy().astype(str)]
  )  # NaN comes last
  table = table.iloc[order].reset_index(drop=True)
  table['rank'] = (
    table.groupby('group', sort=False)['score']
    .rank(method='min', ascending=False)
    .astype('Int64')
  )
  units = pd.DataFrame(of_units, columns=UNIT_COLUMNS)
  keys = ['group', 'gene_id', 'kind', 'amount']
  place = {key: i for i, key in enumerate(table[keys].itertuples(index=False))}
  units['place'] = [place[k] for k in units[keys].itertuples(index=False)]
  units = units.sort_values(['place', 'unit'], kind='stable')
  return Results(
    table=table[COLUMNS],
    units=units.drop(columns='place').reset_index(drop=True),
    header=dict(header),
  )


UNIT_COLUMNS = [
  *('group', 'gene_id', 'symbol', 'kind', 'amount', 'unit', 'n_cells'),
  *(*statistics.MEASURES, 'null_mean', 'null_sd', 'z'),
]
COLUMNS = [
  *('group', 'gene_id', 'symbol', 'kind', 'amount', 'rank', 'score'),
  *('shift', 'gene_shift', 'toward', 'null_mean', 'null_sd', 'z', 'p', 'q'),
  *('p_normal', 'p_empirical', 'ci_low', 'ci_high', 'verdict'),
  *('n_cells', 'n_units', 'n_null', 'n_null_above'),
  *('detection', 'mean_rank', 'mean_length', 'entered'),
  *('null_z_low', 'null_z_high', 'flags'),
]


def gaps(found: Results) -> list[str]:
  """Why numbers of a table are missing: a line each, for people."""
  table, lines = found.table, []
  without = int(table['flags'].str.contains(FEW_NULL).sum())
  if without:
    fewest = found.header['null'].partition('at least ')[2].partition(';')[0]
    lines.append(
      f'no z: {without:,} of {len(table):,} lines have fewer than {fewest} '
      'matched nulls (n_null), as genes have that stand highest or in a small '
      'panel; more cells or wider --calipers find more, less alike'
    )
  if table['n_units'].max() < 2:
    lines.append(
      'no p and q: all cells are one unit, so there are ranks alone; '
      '--donor-key names the column of donors'
      if found.header['unit'].startswith('all cells')
      else 'no p and q: no target has two units with enough cells (--min-cells)'
    )
  elif table['n_units'].max() < statistics.MIN_UNITS:
    lines.append(
      f'no verdict: {table["n_units"].max()} units at most, fewer than '
      f'{statistics.MIN_UNITS}; look at each of them in the table of units'
    )
  return lines


def _line_of(tested, t, places, profiles, row):
  z = float(tested.z_T[t])
  flags = []
  if tested.num_units_T[t] < statistics.MIN_UNITS:
    flags.append(FEW_UNITS)
  if not np.isfinite(z):
    flags.append(FEW_NULL)
  if tested.cells_T[t] and not np.nan_to_num(places['shift']).any():
    flags.append(NO_CHANGE)
  of_units = tested.z_TU[t][np.isfinite(tested.z_TU[t])]
  if len(set(np.sign(of_units))) > 1:
    flags.append(UNITS_DISAGREE)
  means = {
    measure: float(np.mean(values[np.isfinite(values)]))
    if values is not None and np.isfinite(values).any()
    else np.nan
    for measure, values in places.items()
  }
  return {
    'score': z,
    **means,
    'null_mean': float(tested.null_mean_T[t]),
    'null_sd': float(tested.null_sd_T[t]),
    'null_z_low': tested.null_z_low,
    'null_z_high': tested.null_z_high,
    'z': z,
    'p': float(tested.p_T[t]),
    'p_normal': float(tested.p_normal_T[t]),
    'p_empirical': float(tested.p_empirical_T[t]),
    'ci_low': float(tested.contrast_low_T[t]),
    'ci_high': float(tested.contrast_high_T[t]),
    'n_cells': int(tested.cells_T[t]),
    'n_units': int(tested.num_units_T[t]),
    'n_null': int(tested.num_null_T[t]),
    'n_null_above': int(tested.num_above_T[t]),
    'detection': float(profiles.detection_G[row]),
    'mean_rank': float(profiles.rank_G[row]),
    'mean_length': float(profiles.length_G[row]),
    'flags': ','.join(flags),
  }


def _lines_of_units(what, tested, t, places):
  lines = []
  for u, unit in enumerate(tested.units_U.tolist()):
    if not tested.cells_TU[t, u]:
      continue
    values = {
      m: np.nan if v is None else float(v[u]) for m, v in places.items()
    }
    lines.append(
      {
        **what,
        'unit': unit,
        'n_cells': int(tested.cells_TU[t, u]),
        **values,
        'null_mean': float(tested.null_mean_TU[t, u]),
        'null_sd': float(tested.null_sd_TU[t, u]),
        'z': float(tested.z_TU[t, u]),
      }
    )
  return lines


def _verdicts(table: pd.DataFrame) -> list[str]:
  """What may be said; nothing below six units or without q."""
  verdicts = []
  for line in table.itertuples():
    if line.n_units < statistics.MIN_UNITS or not np.isfinite(line.q):
      verdicts.append('')
    elif line.q < statistics.ALPHA:
      verdicts.append(MORE if line.z > 0 else LESS)
    else:
      verdicts.append(NOT_SHOWN)
  return verdicts
