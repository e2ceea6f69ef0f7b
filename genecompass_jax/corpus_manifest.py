"""What the manifest of a corpus must look like, to be read without a surprise.

All other files are hashed in it, and under `sha256` stands the hash of the rest
of it. Corpora of earlier versions have none: an edited or damaged manifest of
theirs is told by its shape, and by the arrays, which must be as long as it
says.
"""

import json
from collections.abc import Mapping
from typing import Any

from genecompass_jax import errors, paths

_STORE = {
  'num_cells': int,
  'num_elements': int,
  'num_genes': int,
  'block_cells': int,
  'value_dtype': str,
  'obs': [str],
}
_NEEDED = {
  'files': {str: {'size': int, 'sha256': str}},
  'vocabulary': {'sha256': str},
  'stores': {str: {str: _STORE}},
}
_KNOWN = {  # not in all corpora
  'value_dtype': str,
  'sources': [{}],
  'split': {},
}
_SPLIT = {
  'leaky': bool,
  'validation_units': [str],
  'test_units': [str],
  'joined_units': [[str]],
}
_WORDS = {int: 'a number', str: 'text', bool: 'true or false'}


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """A manifest with the hash of its content, as it is written."""
  return {**manifest, 'sha256': _sha256(manifest)}


def unsealed(
  path: str, manifest: Mapping[str, Any], hint: str
) -> tuple[dict[str, Any], bool]:
  """A manifest as it was sealed, and whether it has been.

  Args:
    path: of the corpus.
    manifest: the content of manifest.json.
    hint: what to do about a damaged corpus.

  Raises:
    UserError: it was changed after it was written.
  """
  content = dict(manifest)
  if 'sha256' not in content:
    return content, False
  if content.pop('sha256') != _sha256(content):
    raise errors.UserError(
      f'{path}/manifest.json was changed after it was written (its content '
      f'does not have its sha256); {hint}'
    )
  return content, True


def _sha256(manifest: Mapping[str, Any]) -> str:
  """Of the content as JSON gives it back, in the order of names."""
  content = json.loads(json.dumps(manifest))
  return paths.sha256_bytes(json.dumps(content, sort_keys=True).encode())


def check(path: str, manifest: Mapping[str, Any], hint: str) -> None:
  """Refuses a manifest of another shape, or one that names files elsewhere.

  Args:
    path: of the corpus.
    manifest: the content of manifest.json.
    hint: what to do about a damaged corpus.

  Raises:
    UserError: naming the part.
  """
  wrong = _wrong(manifest, _NEEDED, '')
  wrong = wrong or _wrong(manifest, _present(manifest, _KNOWN), '')
  split = manifest.get('split', {})
  wrong = wrong or _wrong(split, _present(split, _SPLIT), '/split')
  if not wrong:
    for name in manifest['files']:
      if name.startswith('/') or '..' in name.split('/'):
        wrong = f'files/{name} is outside of the corpus'
    for split, stores in manifest['stores'].items():
      for species, facts in stores.items():
        if facts['block_cells'] < 1:
          wrong = f'stores/{split}/{species}/block_cells is below one'
  if wrong:
    raise errors.UserError(
      f'{path}/manifest.json was changed or is damaged: {wrong}; {hint}'
    )


def _present(content: Any, shape: Mapping) -> dict:
  return {name: of for name, of in shape.items() if name in content}


def _wrong(content: Any, shape: Any, place: str) -> str:
  """What is not as `shape` says; '' where all is."""
  if isinstance(shape, type):
    fits = isinstance(content, shape) and (
      shape is not int or (type(content) is int and content >= 0)
    )
    return '' if fits else f'{place[1:]} is not {_WORDS[shape]}'
  if isinstance(shape, list):
    if not isinstance(content, list):
      return f'{place[1:]} is no list'
    found = (_wrong(c, shape[0], f'{place}/{n}') for n, c in enumerate(content))
    return next(filter(None, found), '')
  if not isinstance(content, dict):
    return f'{place[1:]} holds no names'
  if str in shape:
    found = (_wrong(c, shape[str], f'{place}/{n}') for n, c in content.items())
    return next(filter(None, found), '')
  for name, of in shape.items():
    if name not in content:
      return f'{place[1:]}/{name} is missing'.lstrip('/')
    wrong = _wrong(content[name], of, f'{place}/{name}')
    if wrong:
      return wrong
  return ''
