"""The encoder as a StableHLO program that JAX runs without this package.

Parameters and prior tables are constants of the program: the linear part of
the embedding is folded into one vector a species and token, as in inference
here. The number of cells is open, the number of slots fixed.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from genecompass_jax import (
  errors,
  model as model_lib,
  model_card,
  paths,
  pretrained,
  schemas,
)
from genecompass_jax.convert import export as export_lib

PLATFORMS = ('cpu', 'tpu', 'cuda')
# Flatbuffers, which hold the program, end at 2 GiB.
_MAX_BYTES = (1 << 31) - (1 << 26)
# What a program takes: the fields of a CellBatch.
INPUTS = {
  'gene_ids_BL': np.int32,
  'values_BL': np.float32,
  'positions_BL': np.int32,
  'segments_BL': np.int32,
  'species_BL': np.int32,
  'is_cls_BL': np.bool_,
}


def program(
  model: pretrained.PretrainedModel,
  slots: int,
  platforms: Sequence[str] = PLATFORMS,
) -> bytes:
  """The encoder of a model, serialised by `jax.export`.

  What it computes is `model.hidden_states`, within rounding: a dict of the
  fields of a CellBatch [B, slots] -> float32 [B, slots, D] (one slot less
  without CLS), for any B.

  Args:
    model: a restored model.
    slots: of a row, the CLS slot included.
    platforms: that it can run on.

  Raises:
    UserError: too many slots, an unknown platform, or too many parameters.
    ImportError: flatbuffers is not installed.
  """
  # On its own devices the model chooses fused kernels; this one runs anywhere.
  config = dataclasses.replace(model.config, attention='auto')
  if not 2 <= slots <= config.max_genes + 1:
    raise errors.UserError(
      f'--slots {slots}: a row of this model has 2 to {config.max_genes + 1} '
      'slots, the species slot included'
    )
  if unknown := [name for name in platforms if name not in PLATFORMS]:
    raise errors.UserError(
      f'--platforms {unknown[0]}: choose of {", ".join(PLATFORMS)}'
    )
  knowledge = model_lib.fold(config, model.params, model.assets.knowledge)
  params, knowledge = jax.device_get((model.params, knowledge))
  used = [params['encoder'], knowledge.table_SVD]
  size = sum(x.nbytes for x in jax.tree.leaves(used))
  if size > _MAX_BYTES:
    raise errors.UserError(
      f'the parameters of the encoder are {size:,} bytes, a program holds '
      f'{_MAX_BYTES:,}; use `genecompass convert params` for a model of this '
      'size'
    )

  def hidden_states(cells: dict[str, jax.Array]) -> jax.Array:
    network = model_lib.bind(config, params)
    with model_lib.full_precision(config):
      hidden_BLD = network(schemas.CellBatch(**cells), knowledge)
    return hidden_BLD if config.use_cls else hidden_BLD[:, 1:]

  (num_cells,) = export.symbolic_shape('B')
  cells = {
    name: jax.ShapeDtypeStruct((num_cells, slots), dtype)
    for name, dtype in INPUTS.items()
  }
  exported = export.export(jax.jit(hidden_states), platforms=tuple(platforms))
  try:
    return bytes(exported(cells).serialize())
  except ImportError as error:
    raise ImportError(
      f'{error}: pip install "genecompass_jax[stablehlo]"'
    ) from error


def write(
  model: pretrained.PretrainedModel,
  output: str,
  slots: int,
  platforms: Sequence[str] = PLATFORMS,
) -> list[str]:
  """Writes the program, its signature and a model card; returns the places.

  Raises:
    UserError: the file is there already; as `program`.
  """
  paths.check_writable(output)
  if paths.exists(output):
    raise errors.UserError(f'{output} is there already; name another with -o')
  data = program(model, slots, platforms)
  signature = export_lib.beside(output, 'signature.json')
  card = export_lib.beside(output, model_card.NAME)
  paths.write_json(signature, _signature(model, slots, platforms, data))
  paths.write_text(
    card,
    model_card.text(
      model.config,
      model.assets,
      loading=_loading(output),
      step=model.step,
      provenance=model.provenance,
      hashes={os.path.basename(output): paths.sha256_bytes(data)},
    ),
  )
  paths.write_bytes(output, data)
  return [output, signature, card]


def _signature(model, slots, platforms, data: bytes) -> dict[str, Any]:
  config, assets = model.config, model.assets
  vocabulary = assets.vocabulary
  return {
    'inputs': {
      name: {'dtype': np.dtype(dtype).name, 'shape': ['B', slots]}
      for name, dtype in INPUTS.items()
    },
    'output': {
      'dtype': 'float32',
      'shape': ['B', slots if config.use_cls else slots - 1, config.width],
    },
    'platforms': list(platforms),
    'vocabulary_size': config.vocabulary_size,
    'vocabulary_sha256': None if vocabulary is None else vocabulary.sha256,
    'encoding': dataclasses.asdict(assets.encoding),
    'sha256': paths.sha256_bytes(data),
    'jax': jax.__version__,
  }


def _loading(output: str) -> str:
  return (
    'from jax import export\n\n'
    f"with open('{os.path.basename(output)}', 'rb') as file:\n"
    '  encoder = export.deserialize(bytearray(file.read()))\n'
    'states_BLD = encoder.call(cells)  # a dict of the arrays in the signature'
  )
