"""A mapping of values -> a (nested) frozen dataclass, checked."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from genecompass_jax import errors

_TABLES = tuple[tuple[str, str], ...]  # (name, parquet table) of priors


def to_dataclass(
  cls: type, values: Mapping[str, Any], where: str = 'config'
) -> Any:
  """Builds a (nested) frozen dataclass from a mapping.

  Raises:
    UserError: a key is not a field of the dataclass, one is missing, or a
      value is of another type.
  """
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  arguments = {}
  for key, value in values.items():
    if key not in fields:
      raise errors.UserError(
        f'{where}.{key} is not known; fields are {", ".join(fields)}'
      )
    if dataclasses.is_dataclass(hints[key]):
      if not hasattr(value, 'items'):  # a ConfigDict is no Mapping
        raise errors.UserError(
          f'{where}.{key}={value!r} is a group of fields: give it one by one, '
          f'such as --{where}.{key}.FIELD=VALUE'
        )
      value = to_dataclass(hints[key], value, f'{where}.{key}')
    elif isinstance(value, list | tuple):
      value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if hints[key] == _TABLES:
      _check_priors(value, f'{where}.{key}')
    arguments[key] = _checked(hints[key], value, f'{where}.{key}')
  for name, field in fields.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and name not in arguments:
      raise errors.UserError(f'{where}.{name} is missing')
  return cls(**arguments)


def _checked(hint: Any, value: Any, where: str) -> Any:
  """The value, if it is of a type.

  Whole numbers do where broken ones do, and one value alone is a tuple of it:
  --config.skip_batches=12 needs neither brackets nor comma.
  """
  wanted = typing.get_origin(hint) or hint
  if wanted is tuple and (type(value), ...) == typing.get_args(hint):
    value = (value,)
  if wanted is float and type(value) is int:
    value = float(value)
  if type(value) is not wanted:
    raise errors.UserError(
      f'{where}={value!r} must be of type {wanted.__name__}'
    )
  return value


def _check_priors(value: Any, where: str) -> None:
  """Refuses priors that are no pairs; one pair alone often lacks its comma."""
  is_pairs = isinstance(value, tuple | list) and all(
    isinstance(pair, tuple | list) and list(map(type, pair)) == [str, str]
    for pair in value
  )
  if not is_pairs:
    raise errors.UserError(
      f'{where}={value!r}: give pairs of a name and a table, each with a comma '
      f'behind it: --{where}=\'(("grn", "grn.parquet"),)\''
    )
