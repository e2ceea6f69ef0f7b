"""The model of the tests on real cells, and what those tests share.

Trained on Baron's pancreas, the lung lines and pbmc68k: on no cell of the Kang
experiment and none of Perturb-FISH.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping

import anndata
import numpy as np

from experiments.knowledge_study import real_cells
from genecompass_jax import (
  corpus as corpus_lib,
  errors,
  model as model_lib,
  paths,
  pretrained,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.analysis.perturbation import matching as matching_lib
from genecompass_jax.demo import pretraining
from genecompass_jax.prepare import pipeline

PANEL = 'perturb_fish_astrocytes/perturb_fish_astrocytes.h5ad'
HERE = pathlib.Path(__file__).resolve().parent
REGISTERED = HERE / 'registered.json'
_SCRIPT = HERE.parents[1] / 'data_prep' / 'real_cells.py'


def registered() -> dict:
  """What was decided before any run."""
  return json.loads(REGISTERED.read_text())


def train(root: str, data: str) -> pretrained.PretrainedModel:
  """The registered model, trained if it is not there.

  Raises:
    UserError: a set is missing in the folder of data.
  """
  facts = registered()['model']
  corpus = os.path.join(root, 'corpus')
  if not os.path.exists(os.path.join(corpus, 'manifest.json')):
    wanted = set(facts['trained_on'])
    opened = [s for s in _open(data) if s.dataset in wanted]
    if {s.dataset for s in opened} != wanted:
      raise errors.UserError(f'{data}: holds not all of {sorted(wanted)}')
    whole = os.path.join(root, 'all_genes')
    pipeline.prepare(opened, whole, _config('measured', facts))
    chosen = os.path.join(root, 'vocabulary.tsv.gz')
    _vocabulary(corpus_lib.Corpus.open(whole), data, facts['tokens']).save(
      chosen
    )
    pipeline.prepare(opened, corpus, _config(chosen, facts))
  return pretraining.pretrain(
    corpus,
    os.path.join(root, 'run'),
    steps=facts['steps'],
    seed=facts['seed'],
  )


def _vocabulary(
  corpus: corpus_lib.Corpus, data: str, most: int
) -> vocabulary_lib.Vocabulary:
  """The most expressed tokens, and all genes that the tests ask about."""
  common = real_cells._common(corpus, most)
  panel = anndata.read_h5ad(os.path.join(data, PANEL), backed='r')
  asked = {
    *registered()['interferon']['regulators'],
    *map(str, panel.var_names),
  }
  panel.file.close()
  genes = corpus.vocabulary.genes
  human = [
    gene
    for gene, symbol, species in zip(
      genes.gene_ids, genes.symbols, genes.species_G
    )
    if symbol in asked and species == 0
  ]
  return corpus.vocabulary.restrict([*common.genes.gene_ids, *human])


def _open(data: str) -> list:
  spec = importlib.util.spec_from_file_location('real_cells', _SCRIPT)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  return script.open_sources(data)


def _config(vocabulary: str, facts: dict) -> pipeline.PrepareConfig:
  return pipeline.PrepareConfig(
    vocabulary=vocabulary,
    validation_units=tuple(facts['held_out']),
    jobs=1,
    overwrite=True,
  )


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
  """At most so many rows, evenly spaced."""
  if len(rows) <= most:
    return rows
  return rows[np.arange(most) * len(rows) // most]


def matching_config(facts: Mapping) -> matching_lib.MatchingConfig:
  """The registered matching."""
  plan = facts['matching']
  return matching_lib.MatchingConfig(
    calipers=tuple(plan['calipers']),
    most=plan['most'],
    fewest=plan['fewest'],
    seed=plan['seed'],
  )


def untrained(
  model: pretrained.PretrainedModel, facts: Mapping
) -> pretrained.PretrainedModel:
  """The same model with parameters that no cell has touched."""
  seed = facts['model']['random_seed']
  return model.replace(params=model_lib.init(model.config, seed))


def command(
  about: str,
  name: str,
  run: Callable[[str, str], dict],
  report: Callable[[dict], str],
) -> int:
  """Runs a test from the command line; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=about, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('root', metavar='ROOT')
  parser.add_argument('--data', required=True, metavar='FOLDER')
  args = parser.parse_args()
  try:
    os.makedirs(args.root, exist_ok=True)
    found = run(args.root, args.data)
  except errors.UserError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_USAGE
  except errors.RetryableError as error:
    print(error, file=sys.stderr)
    return errors.EXIT_RETRY
  paths.write_json(os.path.join(args.root, f'{name}.json'), found)
  text = report(found)
  paths.write_text(os.path.join(args.root, f'{name}.md'), text)
  print(text, end='')
  return errors.EXIT_OK
