"""One run: all that decides what it is, its name, and where it lies."""

import json
import os

from experiments.knowledge_study import (
  config as config_lib,
  materials,
  settings as settings_lib,
)
from genecompass_jax import paths


def identity(
  run: settings_lib.Run, settings: settings_lib.Settings
) -> dict[str, object]:
  """All that decides what a run is, as JSON; places are left out."""
  config = config_lib.get_config(variant('ROOT', run, settings)).to_dict()
  return json.loads(
    json.dumps(
      {
        'config': config,
        'atlas': settings.atlas.sha256,
        'held_out_cells': settings.held_out_cells,
        'coexpression': materials.COEXPRESSION,
        'width': materials.WIDTH,
      }
    )
  )


def key(run: settings_lib.Run, settings: settings_lib.Settings) -> str:
  """Name of the workdir of a run: its hash."""
  text = json.dumps(identity(run, settings), sort_keys=True)
  return paths.sha256_bytes(text.encode())[:16]


def variant(root, run, settings) -> str:
  place = 'cells' if run.place.isdecimal() else 'fold'
  return (
    f'root={root},arm={run.arm},{place}={run.place},seed={run.seed},'
    f'steps={settings.steps},objective={settings.objective}'
  )


def folder_of(root: str, name: str) -> str:
  """Workdir of a run."""
  return os.path.join(root, 'runs', name)
