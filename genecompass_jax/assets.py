"""What a checkpoint needs besides parameters: vocabulary, medians, priors.

Assets are written once, before the first training step, and never change;
checkpoints name their hashes. A folder of assets holds

  assets.json          encoding, sha256 of every other file; written last
  vocabulary.tsv.gz    genes and tokens
  medians.tsv          non-zero medians of the training cells
  knowledge.npz        prior tables and masks (no pickled objects)
  original.npz         of converted weights: what has no other place
"""

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from genecompass_jax import (
  encoding as encoding_lib,
  errors,
  knowledge as knowledge_lib,
  medians as medians_lib,
  paths,
  vocabulary as vocabulary_lib,
)

MANIFEST = 'assets.json'
_VOCABULARY = 'vocabulary.tsv.gz'
_MEDIANS = 'medians.tsv'
_KNOWLEDGE = 'knowledge.npz'
_ORIGINAL = 'original.npz'


@dataclasses.dataclass(frozen=True)
class Original:
  """What a converted model does not use, kept to write the original again.

  Attributes:
    config: the original's configuration, in its own keys.
    tensors: those that are no parameters of the model, under their names.
  """

  config: Mapping[str, Any]
  tensors: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Assets:
  """The frozen companions of a model's parameters.

  Attributes:
    knowledge: prior tables; empty for a model without priors.
    vocabulary: genes and tokens; None for converted weights that came without.
    medians: divisors of the encoding; None likewise.
    encoding: how counts become ranked values.
    original: of converted weights; None for others.
  """

  knowledge: knowledge_lib.Knowledge
  vocabulary: vocabulary_lib.Vocabulary | None = None
  medians: medians_lib.Medians | None = None
  encoding: encoding_lib.EncodingConfig = encoding_lib.EncodingConfig()
  original: Original | None = None


def save(folder: paths.PathLike, assets: Assets) -> dict[str, str]:
  """Writes a folder of assets, its manifest last; returns the file hashes."""
  files = []
  if assets.vocabulary is not None:
    assets.vocabulary.save(paths.join(folder, _VOCABULARY))
    files.append(_VOCABULARY)
  if assets.medians is not None:
    assets.medians.save(paths.join(folder, _MEDIANS), assets.vocabulary)
    files.append(_MEDIANS)
  paths.write_bytes(
    paths.join(folder, _KNOWLEDGE), _knowledge_bytes(assets.knowledge)
  )
  files.append(_KNOWLEDGE)
  if assets.original is not None:
    paths.write_bytes(
      paths.join(folder, _ORIGINAL), _original_bytes(assets.original)
    )
    files.append(_ORIGINAL)
  hashes = {f: paths.sha256_file(paths.join(folder, f)) for f in files}
  manifest = {
    'encoding': dataclasses.asdict(assets.encoding),
    'priors': list(assets.knowledge.tables),
    'sha256': hashes,
  }
  paths.write_json(paths.join(folder, MANIFEST), manifest)
  return file_hashes(folder)


def knowledge_sha256(knowledge: knowledge_lib.Knowledge) -> str:
  """One hash of all prior tables, the same wherever they were read."""
  return paths.sha256_bytes(_knowledge_bytes(knowledge))


def file_hashes(folder: paths.PathLike) -> dict[str, str]:
  """Hashes of the files of a folder, by its manifest, and of the manifest."""
  hashes = read_manifest(folder)['sha256']
  return {**hashes, MANIFEST: paths.sha256_file(paths.join(folder, MANIFEST))}


def load(folder: paths.PathLike) -> Assets:
  """Reads a folder of assets and checks every hash.

  Raises:
    UserError: the folder is incomplete, or a file changed since it was made.
  """
  manifest = read_manifest(folder)
  for name, sha256 in manifest['sha256'].items():
    path = paths.join(folder, name)
    if not paths.exists(path) or paths.sha256_file(path) != sha256:
      raise errors.UserError(
        f'{path} is missing or was changed after it was written; copy it '
        'again from where the model was trained'
      )
  vocabulary = table = None
  if _VOCABULARY in manifest['sha256']:
    vocabulary = vocabulary_lib.Vocabulary.load(paths.join(folder, _VOCABULARY))
  if _MEDIANS in manifest['sha256']:
    table = medians_lib.Medians.load(paths.join(folder, _MEDIANS), vocabulary)
  original = None
  if _ORIGINAL in manifest['sha256']:
    original = _read_original(paths.read_bytes(paths.join(folder, _ORIGINAL)))
  return Assets(
    knowledge=_read_knowledge(
      paths.read_bytes(paths.join(folder, _KNOWLEDGE)), manifest['priors']
    ),
    vocabulary=vocabulary,
    medians=table,
    encoding=encoding_lib.EncodingConfig(**manifest['encoding']),
    original=original,
  )


def read_manifest(folder: paths.PathLike) -> dict:
  """The manifest of an assets folder: encoding, priors and hashes.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = paths.join(folder, MANIFEST)
  try:
    manifest = paths.read_json(path)
    if manifest.keys() >= {'encoding', 'priors', 'sha256'}:
      return manifest
  except (OSError, ValueError, AttributeError):
    pass
  raise errors.UserError(
    f'{path} cannot be read; a model folder holds assets/, config.json and '
    'checkpoints/ or params/: check the path'
  )


def _knowledge_bytes(tables: knowledge_lib.Knowledge) -> bytes:
  arrays = {'row_SV': np.asarray(tables.row_SV)}
  for name in tables.tables:
    arrays[f'table/{name}'] = np.asarray(tables.tables[name])
    arrays[f'has/{name}'] = np.asarray(tables.has_vector[name])
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  return buffer.getvalue()


def _read_knowledge(data: bytes, names: list[str]) -> knowledge_lib.Knowledge:
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    return knowledge_lib.Knowledge(
      row_SV=arrays['row_SV'],
      tables={name: arrays[f'table/{name}'] for name in names},
      has_vector={name: arrays[f'has/{name}'] for name in names},
    )


def _original_bytes(original: Original) -> bytes:
  arrays = {f'tensor/{n}': np.asarray(t) for n, t in original.tensors.items()}
  arrays['config'] = np.array(json.dumps(dict(original.config), sort_keys=True))
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  return buffer.getvalue()


def _read_original(data: bytes) -> Original:
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    return Original(
      config=json.loads(arrays['config'].item()),
      tensors={
        name.removeprefix('tensor/'): arrays[name]
        for name in arrays.files
        if name != 'config'
      },
    )
