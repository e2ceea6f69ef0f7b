"""Values of a configuration become dataclasses, or a line that says why not."""

import dataclasses

import pytest

from genecompass_jax import config_values, errors


@dataclasses.dataclass(frozen=True)
class Group:
  share: float = 0.0
  names: tuple[str, ...] = ()
  steps: tuple[int, ...] = ()
  priors: tuple[tuple[str, str], ...] = ()


def of(**values):
  return config_values.to_dataclass(Group, values)


def test_one_value_alone_is_a_tuple_of_it():
  assert of(names='wandb').names == ('wandb',)
  assert of(steps=12).steps == of(steps=[12]).steps == (12,)
  assert of(share=1).share == 1.0


@pytest.mark.parametrize(
  'values, message',
  [
    ({'steps': '12'}, "config.steps='12' must be of type tuple"),
    ({'names': 3}, 'config.names=3 must be of type tuple'),
    ({'names': True}, 'config.names=True must be of type tuple'),
    ({'steps': True}, 'config.steps=True must be of type tuple'),
    ({'priors': 'grn.parquet'}, 'give pairs'),
    ({'share': 'x'}, 'must be of type float'),
  ],
)
def test_what_is_of_another_type_is_one_line(values, message):
  with pytest.raises(errors.UserError, match=message) as error:
    of(**values)
  assert '\n' not in str(error.value)
