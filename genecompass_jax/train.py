"""Pretraining, told in order: corpus, model, state, step, loop.

Randomness folds from (seed, batch): the n-th batch of a run is a pure function
of corpus, seed and n, and so are its masks and its dropout. A run that is
killed goes on from its last sealed checkpoint and ends in the same bits.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from typing import Any

import jax

from genecompass_jax import (
  assets as assets_lib,
  checkpoint,
  compiles,
  corpus as corpus_lib,
  data as data_lib,
  errors,
  evaluate,
  interruption,
  knowledge as knowledge_lib,
  model as model_lib,
  nulls,
  paths,
  processes,
  progress,
  sharding,
  train_config,
  train_step,
  training_log,
  workdir,
  writers,
)


def resolve_config(
  config: train_config.TrainConfig, corpus: corpus_lib.Corpus
) -> tuple[train_config.TrainConfig, assets_lib.Assets]:
  """Fills in what the corpus and the prior tables decide.

  Raises:
    UserError: a prior table cannot be read, or the cells do not fit the model.
  """
  tables = {
    name: knowledge_lib.read_table(path) for name, path in config.priors
  }
  if tables:
    knowledge = knowledge_lib.align(corpus.vocabulary, tables)
  else:
    knowledge = knowledge_lib.empty(
      len(corpus.vocabulary.species), corpus.vocabulary.size
    )
  model_config = dataclasses.replace(
    config.model,
    vocabulary_size=corpus.vocabulary.size,
    priors=knowledge.widths,
    hides_ranks=config.data.mask.splits,
  )
  if config.data.mask.splits and not model_config.use_values:
    raise errors.UserError(
      'the mask objective split asks for values, but model.use_values is false:'
      ' set it to true, or mask.objective to released'
    )
  found = {
    name for stores in corpus.manifest['stores'].values() for name in stores
  }
  names = corpus.vocabulary.species
  codes = [s for s, name in enumerate(names) if name in found]
  if max(codes) >= model_config.num_species:
    raise errors.UserError(
      f'model.num_species={model_config.num_species}, but the corpus holds '
      f'{" and ".join(sorted(found))} cells; set it to {max(codes) + 1}'
    )
  if config.encoding.max_genes > model_config.max_genes:
    raise errors.UserError(
      f'encoding.max_genes={config.encoding.max_genes} is more than the '
      f'positions of the model (model.max_genes={model_config.max_genes})'
    )
  if config.encoding.ties == 'token':
    logging.warning(
      'ties=token tells the model the hidden gene; use it to measure the leak'
    )
  assets = assets_lib.Assets(
    knowledge=knowledge,
    vocabulary=corpus.vocabulary,
    medians=corpus.medians(config.encoding.mode),
    encoding=config.encoding,
  )
  return (
    dataclasses.replace(
      config,
      model=model_config,
      data=data_lib.fit_buckets(
        corpus,
        config.encoding,
        config.data,
        # bfloat16 is for accelerators, whose kernels take whole blocks.
        128 if config.model.dtype == 'bfloat16' else 64,
      ),
    ),
    assets,
  )


def train_and_evaluate(
  config: train_config.TrainConfig, folder: paths.PathLike
) -> int:
  """Trains, or resumes, until `optimizer.total_steps`.

  Args:
    config: the run.
    folder: workdir, local or a URL.

  Returns:
    The number of updates done.

  Raises:
    UserError: corpus, config or workdir do not fit together.
    RetryableError: SIGTERM came; the state is saved and a restart goes on.
    FloatingPointError: the loss is no longer finite.
  """
  log = training_log.TrainingLog(folder)  # its clock runs
  writers.check(config.writers)
  compiles.keep_programs()

  # The corpus and what follows from it.
  corpus = corpus_lib.Corpus.open(config.corpus)
  config, assets = resolve_config(config, corpus)
  _check_processes(config, corpus)
  mesh = sharding.make_mesh(config.mesh)
  train_step.check_mesh(config, mesh)
  step_config = train_step.for_devices(config, mesh)
  loader = data_lib.Loader(
    corpus,
    config.encoding,
    config.data,
    rows=sharding.process_rows(mesh, config.data.rows_per_batch),
  )
  is_first = processes.is_first()
  lock = workdir.locked(folder) if is_first else contextlib.nullcontext()

  with lock, jax.set_mesh(mesh), log:
    # The workdir, which is of this run or becomes its own.
    facts = processes.from_first(
      lambda: _open_workdir(folder, config, corpus, assets)
    )
    null_models = _null_models(config, corpus, folder)
    evaluator = _make_evaluator(step_config, corpus, null_models)
    if is_first:
      _log_start(config, mesh.devices.size)

    # The state, restored where there is a good checkpoint.
    shapes = jax.eval_shape(lambda: train_step.init_state(config, null_models))
    places = train_step.state_sharding(config, shapes, mesh)
    checkpoints = checkpoint.Checkpoints(
      paths.join(folder, workdir.CHECKPOINTS), keep=config.keep_checkpoints
    )
    latest = checkpoints.latest()
    if latest is None:
      init = jax.jit(
        lambda: train_step.init_state(config, null_models), out_shardings=places
      )
      state, first_step, first_batch = init(), 0, 0
    else:
      with log.spent('restore'):
        state = _restore(checkpoints, latest, shapes, places, facts)
      first_step, first_batch = int(state.step), int(state.next_batch)
    sharding.check_shared((state.params, state.opt_state), mesh)
    knowledge = sharding.put_everywhere(
      knowledge_lib.rounded(assets.knowledge, config.model.dtype), mesh
    )
    step_fn = train_step.jitted(step_config, places, mesh)

    # The loop.
    log.open(config, first_step, is_new=latest is None)
    total = config.optimizer.total_steps
    if evaluator is not None and latest is None:
      with log.spent('evaluate'):
        line = evaluator(state.params, knowledge, mesh)
      log.evaluation(0, line)
    with interruption.StopSignals() as signals, log.progress():
      batches = log.batches(loader.iterate(first_batch))
      for step in range(first_step + 1, total + 1):
        host_batch = next(batches)
        batch = sharding.put_batch(
          host_batch.batch, mesh, config.data.rows_per_batch
        )
        state, values = step_fn(state, batch, knowledge)
        log.step(step, host_batch, values)
        if evaluator is not None and (
          step == total or progress.is_due(step, config.eval_every)
        ):
          log.catch_up()
          with log.spent('evaluate'):
            line = evaluator(state.params, knowledge, mesh)
          log.evaluation(step, line)
        # Read once: what stops is saved. All processes stop at this step.
        stops = signals.reached_stop(step - first_step)
        if (
          step == total
          or stops
          or progress.is_due(step, config.checkpoint_every)
        ):
          # What a checkpoint claims is in the metrics, and is finite.
          with log.checkpoint(step):
            _save(checkpoints, state, step, facts)
        checkpoints.check()
        if stops and step < total:
          checkpoints.close()
          log.end('stopped', step)
          processes.barrier('stopped')  # the first to raise ends the others
          raise errors.RetryableError(
            f'stopped by a signal at step {step}; the state is saved, start '
            'the same command again to go on'
          )
    checkpoints.close()
    log.end('done', total)
  return total


def _open_workdir(folder, config, corpus, assets) -> dict[str, Any]:
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
  # Nothing was trained here yet: a run that was refused or failed at once
  # leaves its place to the next one, whatever its config.
  paths.remove(paths.join(folder, workdir.NULLS))
  new['assets'] = assets_lib.save(folder_assets, assets)
  workdir.write_config(folder, new)
  return new


def _check_processes(config, corpus) -> None:
  """Refuses processes that train on different things."""
  values = dataclasses.asdict(config)
  for place in ('corpus', 'priors'):  # may be mounted elsewhere
    del values[place]
  processes.check_equal('the configuration', values)
  processes.check_equal('the corpus', _manifest_sha256(corpus))


def _manifest_sha256(corpus: corpus_lib.Corpus) -> str:
  text = json.dumps(corpus.manifest, sort_keys=True)
  return paths.sha256_bytes(text.encode())


def _evaluates(
  config: train_config.TrainConfig, corpus: corpus_lib.Corpus
) -> bool:
  return config.eval_every > 0 and 'validation' in corpus.splits


def _null_models(config, corpus, folder) -> nulls.NullModels | None:
  """Null models, fitted once and kept in the workdir; None if not needed."""
  if not _evaluates(config, corpus) and config.id_bias != 'frequency':
    return None
  path = paths.join(folder, workdir.NULLS)

  def fit() -> None:
    if not paths.exists(path):
      evaluate.fit_nulls(corpus, config.encoding, config.data).save(path)

  processes.from_first(fit)
  null_models = nulls.NullModels.load(path)
  null_models.check(config.encoding, config.data.mask, path)
  return null_models


def _make_evaluator(config, corpus, null_models) -> evaluate.Evaluator | None:
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


def _save(
  checkpoints: checkpoint.Checkpoints,
  state: train_step.TrainState,
  step: int,
  facts: dict[str, Any],
) -> None:
  training = {
    'step': state.step,
    'next_batch': state.next_batch,
    'opt_state': state.opt_state,
  }
  checkpoints.save(step, state.params, training, {'step': step, **facts})


def _restore(
  checkpoints, step: int, shapes, places, facts
) -> train_step.TrainState:
  place = paths.join(checkpoints.folder, str(step))
  if checkpoint.read_metadata(place)['assets'] != facts['assets']:
    raise errors.UserError(
      f'{place} was written with other assets (vocabulary, medians or priors) '
      'than this run has; remove it, or use another workdir'
    )
  target = jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
    shapes,
    places,
  )
  training = {
    'step': target.step,
    'next_batch': target.next_batch,
    'opt_state': target.opt_state,
  }
  params, training = checkpoints.restore(step, target.params, training)
  return train_step.TrainState(params=params, **training)


def _log_start(config: train_config.TrainConfig, devices: int) -> None:
  counts = model_lib.count_parameters(config.model)
  groups = ', '.join(f'{n:,} {g}' for g, n in counts.items() if g != 'total')
  logging.info(
    '%d device%s; %s parameters (%s)',
    devices,
    '' if devices == 1 else 's',
    f'{counts["total"]:,}',
    groups,
  )
