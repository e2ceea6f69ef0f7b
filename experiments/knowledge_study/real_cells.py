"""Corpora and priors of the real cells: one study held out at a time.

Sets of fewer than 2,000 measured genes are left out; the three Kang sets, which
share cells, are one unit. The vocabulary holds the tokens that most training
cells express.
"""

import importlib.util
import os
import pathlib

import numpy as np

from experiments.knowledge_study import (
  arms,
  materials,
  settings as settings_lib,
)
from genecompass_jax import corpus as corpus_lib, errors, paths
from genecompass_jax.prepare import pipeline

LEAST_GENES = 2000
_SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / 'data_prep'


def corpus(
  root: str, data: str, fold: str, settings: settings_lib.Settings
) -> str:
  """ROOT/corpora/FOLD: all other studies to train on, this one held out.

  Raises:
    UserError: the study is not among the sets of the folder.
  """
  output = paths.join(root, 'corpora', fold)
  if materials.is_whole(output):
    return output
  script = _script('real_cells')
  opened = [s for s in script.open_sources(data) if _is_wide(s)]
  units = [(s, u) for s in opened for u in sorted(script._unit_names(s))]
  held = tuple(dict.fromkeys(u for s, u in units if s.dataset == fold))
  if not held or len(held) == len({u for _, u in units}):
    raise errors.UserError(
      f'{data}: nothing to hold out for {fold}, or nothing to train on'
    )
  whole = f'{output}.all_genes'
  if not materials.is_whole(whole):
    pipeline.prepare(opened, whole, _config('measured', held))
  chosen = f'{output}.vocabulary.tsv.gz'
  _common(corpus_lib.Corpus.open(whole), settings.real_genes).save(chosen)
  pipeline.prepare(opened, output, _config(chosen, held))
  return output


def _config(vocabulary: str, held: tuple[str, ...]) -> pipeline.PrepareConfig:
  return pipeline.PrepareConfig(
    vocabulary=vocabulary, validation_units=held, jobs=1, overwrite=True
  )


def _is_wide(source) -> bool:
  """Whether its columns are at least `LEAST_GENES` genes."""
  return source.matrix.shape[1] >= LEAST_GENES


def _common(opened: corpus_lib.Corpus, most: int):
  """The vocabulary of the tokens with the most training cells."""
  support_V = opened.medians('library').support_SV.sum(0)
  kept_V = np.zeros(len(support_V), bool)
  kept_V[np.argsort(-support_V, kind='stable')[:most]] = True
  kept_V &= support_V > 0
  vocab = opened.vocabulary
  ids = [
    gene
    for gene, token in zip(vocab.genes.gene_ids, vocab.token_G)
    if kept_V[token]
  ]
  return vocab.restrict(ids)


def priors(
  root: str,
  data: str,
  fold: str,
  settings: settings_lib.Settings,
  arm: arms.Arm,
  seed: int,
) -> None:
  """The prior tables of a run, as data_prep/build_priors.py makes them."""
  if not arm.kinds:
    return
  cells = corpus(root, data, fold, settings)
  folder = paths.join(root, 'priors', fold)
  output = paths.join(folder, arm.tables(seed))
  if not materials.is_whole(output):
    materials.build(output, _stated(data) | {'coexpression': [cells]})
  if arm.control:
    place = paths.join(folder, arm.folder(seed))
    materials.control(output, arm, place, cells, seed)


def _stated(data: str) -> dict[str, list[str]]:
  """Arguments of `genecompass prior` for the handed tables."""
  script = _script('build_priors')
  have = {
    name: os.path.join(data, file)
    for name, file in script.FILES.items()
    if os.path.exists(os.path.join(data, file))
  }
  kinds = {
    'grn': ['--lift', 'both'],
    'promoter': ['--human-sequences', have['promoters']]
    + ['--gene-column', 'ensembl_id,promoter', '--strip', '_[0-9]+'],
    'family': ['--groups', have['hgnc']],
  }
  for key, flag in (
    ('collectri', '--human=collectri'),
    ('dorothea_human', '--human=dorothea'),
    ('dorothea_mouse', '--mouse=dorothea'),
  ):
    kinds['grn'] += [f'{flag}={have[key]}']
  return kinds


def _script(name: str):
  spec = importlib.util.spec_from_file_location(name, _SCRIPTS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
