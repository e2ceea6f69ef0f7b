"""Cells that something was done to, which stay out of pretraining.

A corpus is of cells as they are; a screen of knock-outs and drugs is what a model
is tested on. `controls` of a source says which cells nothing was done to:

  'COLUMN=VALUE,...'  those with one of these values in an obs column; one that
                      holds a comma stands in double quotes
  ''                  found: where obs has a column that screens name their
                      perturbations in, those whose value is a usual name for
                      none
  'all'               every cell is taken, whatever was done to it
"""

import csv
import re
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import errors

ALL = 'all'
# Columns of scPerturb, CROP-seq and Perturb-seq releases and Cell Ranger, in
# lower case. `condition`, `treatment` and the like name many things; where the
# values are those of GEARS (`X+ctrl`) `condition` is one of them.
COLUMNS = (
  'perturbation',
  'perturbation_name',
  'perturbed_gene',
  'gene_perturbed',
  'target_gene',
  'guide_identity',
  'guide_ids',
  'guide_id',
  'guides',
  'guide',
  'sgrna',
  'grna',
)
_GEARS = 'condition'
# Names of none: `NT-3`, `non-targeting_0012`, `Control_ST`, `CTRL1`, `DMSO`, ...
_NONE = re.compile(
  r'(none|nan|na|no|unperturbed|untreated|unstimulated|mock|vehicle|dmso|pbs'
  r'|wt|wild[-_ ]?type|nt|ntc|neg|scrambled?|safe[-_ ]?targeting'
  r'|((neg|negative|non[-_ ]?targeting|scrambled?)[-_ ])?(ctrl|control)s?'
  r'(\d+|[-_ ][a-z]{1,2})?'
  r'|non?[-_ ]?(targeting|target|perturbed)([-_ ](guide|sgrna))?)?'
  r'([-_ ]\d+)?',
  re.IGNORECASE,
)


def is_none(value: str) -> bool:
  """Whether every part of a value (`A+B`) is a usual name for nothing done."""
  return all(_NONE.fullmatch(part.strip()) for part in value.split('+'))


def names(text: str) -> tuple[str, ...]:
  """Names between commas; one that holds a comma stands in double quotes.

  Raises:
    UserError: quotes that do not end, or are no quotes of a name.
  """
  try:
    (row,) = csv.reader([text], strict=True) if text else ((),)
  except (csv.Error, ValueError) as error:
    raise errors.UserError(
      f'{text!r}: no names between commas ({error}); write one that holds a '
      'comma in double quotes, and its own quotes twice'
    ) from None
  return tuple(name for name in row if name)


def check(controls: str) -> None:
  """Refuses what is neither of the three forms.

  Raises:
    UserError: it is not.
  """
  column, equals, values = controls.partition('=')
  if controls not in ('', ALL) and not (column and equals and values):
    raise errors.UserError(
      f'--controls {controls}: give COLUMN=VALUE,... of obs, or {ALL}'
    )
  names(values)


def column_of(
  controls: str, values_of: Mapping[str, Sequence[str]] | Sequence[str]
) -> str:
  """The obs column that `controls` names, or the first one known; '' of none."""
  if controls == ALL:
    return ''
  if controls:
    return controls.partition('=')[0]
  by_name = {str(name).lower(): str(name) for name in values_of}
  return next(
    (by_name[name] for name in (*COLUMNS, _GEARS) if name in by_name), ''
  )


def perturbed(
  name: str,
  column: str,
  controls: str,
  codes_C: np.ndarray,
  values: Sequence[str],
) -> tuple[np.ndarray, str]:
  """Which cells something was done to.

  Args:
    name: of the source.
    column: of obs.
    controls: see the module.
    codes_C: place in `values` of each cell, -1 for none.
    values: of the column.

  Returns:
    bool [C], and a line that says which cells were kept.

  Raises:
    UserError: no value is that of a control.
  """
  if controls:
    wanted = names(controls.partition('=')[2])
    absent = [value for value in wanted if value not in values]
    if absent:
      commas = any(',' in value for value in values)
      raise errors.UserError(
        f'{name}: --controls {controls}: obs column {column} has no value '
        f'{absent[0]!r}; there are: {_some(values)}'
        + '; those with commas in double quotes'
        * commas
      )
    is_control = np.array([value in wanted for value in values] + [False])
  else:
    if column.lower() == _GEARS and not _is_gears(values):
      return np.zeros(len(codes_C), bool), ''
    is_control = np.array([is_none(v) for v in values] + [True])
    if not is_control[codes_C].any():
      raise errors.UserError(
        f'{name}: obs column {column} names what was done to the cells, and no '
        f'value is known as that of controls ({_some(values)}): give '
        f'--controls {column}=VALUE, or --controls {ALL} to take every cell'
      )
  kept = [value for value, keep in zip(values, is_control) if keep]
  return ~is_control[codes_C], f'kept: {column} is {_some(kept) or "empty"}'


def _is_gears(values: Sequence[str]) -> bool:
  """Whether conditions are written as GEARS does: `ctrl`, `X+ctrl`, `X+Y`."""
  return 'ctrl' in values and any(
    'ctrl' in value.split('+') for value in values if '+' in value
  )


def _some(values: Sequence[str]) -> str:
  return ', '.join(values[:5]) + (' ...' if len(values) > 5 else '')
