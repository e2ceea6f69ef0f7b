"""What is decided before the main runs, and whether it still holds."""

import dataclasses
import json
import os
import pathlib

from experiments.knowledge_study import (
  arms,
  config as config_lib,
  inference,
  materials,
  report,
  results,
  settings as settings_lib,
)
from genecompass_jax import errors, paths

REGISTERED = pathlib.Path(__file__).resolve().parent / 'registered.json'


def register(
  root: str, file: str, settings: settings_lib.Settings
) -> dict[str, object]:
  """Writes what is decided before the main runs.

  Raises:
    UserError: the pilot is not finished, or a registration is there.
  """
  if os.path.exists(file):
    raise errors.UserError(
      f'{file} is there: a study is registered once; remove it only before '
      'any main run was looked at'
    )
  pilot = [
    run
    for run in settings_lib.plan(settings, 0)
    if run.stage == settings_lib.PILOT
  ]
  found = results.load(root, pilot, settings)
  if len(found) < len(pilot):
    raise errors.UserError(
      f'{root}: {len(found)} of {len(pilot)} pilot runs are finished; start '
      'the study with --only pilot'
    )
  spread = results.spread(found, settings)
  # The first step of Holm over two endpoints.
  alpha = settings.alpha / 2
  needed = inference.seeds_needed(
    settings.detect, spread['id']['sd_relative'], settings.power, alpha
  )
  seeds = min(
    max(needed or settings.most_seeds, settings.least_seeds),
    settings.most_seeds,
  )
  facts = {
    'question': 'all four priors against the same rows permuted within '
    'species, decile of expression and has-this-prior',
    'endpoints': report.ENDPOINTS,
    'margins_relative': dict(settings.margins),
    'alpha': settings.alpha,
    'power': settings.power,
    'detect_relative': settings.detect,
    'pilot': spread,
    'seeds': {
      'needed_for_detect': needed,
      'primary': seeds,
      'others': settings.other_seeds,
      'pilot_seeds': list(settings.pilot_seeds),
    },
    'smallest_detectable_relative': {
      name: {
        'primary': inference.smallest_effect(
          values['sd_relative'], seeds, settings.power, alpha
        ),
        'others_before_holm': inference.smallest_effect(
          values['sd_relative'],
          settings.other_seeds,
          settings.power,
          settings.alpha,
        ),
      }
      for name, values in spread.items()
    },
    'frozen': frozen(settings),
    'analysis': report.ANALYSIS,
  }
  paths.write_text(file, json.dumps(facts, indent=2) + '\n')
  print(f'{file}: {seeds} seeds for the primary pair')
  return facts


def frozen(settings: settings_lib.Settings) -> dict[str, object]:
  """What must not change between registration and runs."""
  config = config_lib.get_config(f'steps={settings.steps}').to_dict()
  values = dataclasses.asdict(settings)
  del values['atlas']
  for name in ('least_seeds', 'most_seeds'):
    del values[name]  # the seeds themselves are registered
  return json.loads(
    json.dumps(
      {
        'atlas_sha256': settings.atlas.sha256,
        'settings': values,
        'config': config,
        'held_out_studies': materials.HELD_OUT_STUDIES,
        'coexpression': materials.COEXPRESSION,
        'prior_width': materials.WIDTH,
        'arms': {n: dataclasses.asdict(a) for n, a in arms.REGISTERED.items()},
      }
    )
  )


def check(file: str, settings: settings_lib.Settings) -> dict:
  """The registration, if it is of these settings.

  Raises:
    UserError: there is none, or something has changed since.
  """
  if not os.path.exists(file):
    raise errors.UserError(
      f'{file}: the study is not registered; run --only pilot, then --register'
    )
  facts, now = paths.read_json(file), frozen(settings)
  for name, value in now.items():
    if facts['frozen'].get(name) != value:
      raise errors.UserError(
        f'{file}: {name} was changed after the registration; put it back, or '
        'register a new study'
      )
  return facts
