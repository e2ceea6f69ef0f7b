"""Errors of libraries, told in one line."""

from genecompass_jax import errors


def test_a_line_that_tells_all_the_bytes_is_cut():
  assert errors.first_line(OSError(' no room\nleft ')) == 'no room'
  assert errors.first_line(KeyError()) == 'KeyError'
  said = errors.first_line(ValueError('x' * 30_000))
  assert said.endswith('x ...') and len(said) < 2100
