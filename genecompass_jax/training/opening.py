"""What a run needs before its first step: its workdir, null models, evaluator."""

import dataclasses
import json
import logging
import tempfile
from typing import Any

from genecompass_jax import (
  assets as assets_lib,
  checkpoint,
  corpus as corpus_lib,
  errors,
  evaluate,
  model as model_lib,
  nulls,
  paths,
  processes,
  workdir,
)
from genecompass_jax.training import (
  guard,
  train_config,
)


def open_workdir(
  folder: paths.PathLike,
  config: train_config.TrainConfig,
  corpus: corpus_lib.Corpus,
  assets: assets_lib.Assets,
) -> dict[str, Any]:
  """Starts a workdir, or checks that this is the run it holds.

  Returns:
    Configuration and hashes of corpus and assets, for checkpoints to name.
  """
  folder_assets = paths.join(folder, workdir.ASSETS)
  old = workdir.read_config(folder)
  new = {
    'run': json.loads(json.dumps(dataclasses.asdict(config))),
    'corpus_sha256': _manifest_sha256(corpus),
  }
  checkpoints = paths.join(folder, workdir.CHECKPOINTS)
  if old is None and checkpoint.all_steps(checkpoints):
    raise errors.UserError(
      f'{folder} holds checkpoints but no config.json: it is not known what '
      'run they are of; use another --workdir'
    )
  if old is not None and checkpoint.all_steps(checkpoints):
    # Hash the assets as they would be written, without touching the old ones.
    with tempfile.TemporaryDirectory() as scratch:
      new['assets'] = assets_lib.save(scratch, assets)
    workdir.check_same_run(folder, old, new)
    assets_lib.load(folder_assets)  # whole, and as they were written
    return new
  if old is not None and 'run' not in old:
    workdir.check_same_run(folder, old, new)  # raises: it is no run
  # Nothing is saved here yet: a run that was refused or failed at once leaves
  # its place to the next one, whatever its config.
  if old is None or old['run'] != new['run']:
    paths.remove(paths.join(folder, guard.FILE))
  paths.remove(paths.join(folder, workdir.NULLS))
  new['assets'] = assets_lib.save(folder_assets, assets)
  workdir.write_config(folder, new)
  return new


def check_processes(
  config: train_config.TrainConfig,
  corpus: corpus_lib.Corpus,
  assets: assets_lib.Assets,
) -> None:
  """Refuses processes that train on different things."""
  if processes.count() == 1:
    return
  values = dataclasses.asdict(config)
  for place in ('corpus', 'priors'):  # may be mounted elsewhere
    del values[place]
  processes.check_equal('the configuration', values)
  processes.check_equal('the corpus', _manifest_sha256(corpus))
  # Every process puts its own tables on its devices: they must not differ.
  tables = assets_lib.knowledge_sha256(assets.knowledge)
  processes.check_equal('what the prior tables hold', tables)


def _manifest_sha256(corpus: corpus_lib.Corpus) -> str:
  text = json.dumps(corpus.manifest, sort_keys=True)
  return paths.sha256_bytes(text.encode())


def _evaluates(
  config: train_config.TrainConfig, corpus: corpus_lib.Corpus
) -> bool:
  return config.eval_every > 0 and 'validation' in corpus.splits


def null_models(
  config: train_config.TrainConfig,
  corpus: corpus_lib.Corpus,
  folder: paths.PathLike,
) -> nulls.NullModels | None:
  """Null models, fitted once and kept in the workdir; None if not needed."""
  if not _evaluates(config, corpus) and config.id_bias != 'frequency':
    return None
  path = paths.join(folder, workdir.NULLS)

  def fit() -> None:
    if not paths.exists(path):
      evaluate.fit_nulls(corpus, config.encoding, config.data).save(path)

  processes.from_first(fit)
  found = nulls.NullModels.load(path)
  found.check(config.encoding, config.data.mask, path)
  return found


def make_evaluator(
  config: train_config.TrainConfig,
  corpus: corpus_lib.Corpus,
  null_models: nulls.NullModels | None,
) -> evaluate.Evaluator | None:
  """The evaluator; None where nothing is to be evaluated."""
  if not _evaluates(config, corpus):
    if config.eval_every > 0:
      logging.warning(
        '%s holds no validation cells: nothing is evaluated', config.corpus
      )
    return None
  return evaluate.Evaluator(
    corpus,
    config.model,
    config.encoding,
    config.data,
    config.loss,
    null_models,
    max_cells=config.eval_cells or None,
  )


def log_start(config: train_config.TrainConfig, devices: int) -> None:
  """Says how many devices train how many parameters."""
  counts = model_lib.count_parameters(config.model)
  groups = ', '.join(f'{n:,} {g}' for g, n in counts.items() if g != 'total')
  logging.info(
    '%d device%s; %s parameters (%s)',
    devices,
    '' if devices == 1 else 's',
    f'{counts["total"]:,}',
    groups,
  )
