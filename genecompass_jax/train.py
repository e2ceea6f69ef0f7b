"""Pretraining, told in order: corpus, model, state, step, loop.

Randomness folds from (seed, batch): the n-th batch of a run is a pure function
of corpus, seed and n, and so are its masks and its dropout. A run that is
killed goes on from its last sealed checkpoint and ends in the same bits.
"""

import contextlib
import dataclasses
import functools
import logging
from typing import Any

import jax

from genecompass_jax import (
  assets as assets_lib,
  checkpoint,
  corpus as corpus_lib,
  data as data_lib,
  errors,
  knowledge as knowledge_lib,
  paths,
  processes,
  sharding,
  workdir,
)
from genecompass_jax.training import (
  compiles,
  guard,
  interruption,
  loop,
  opening,
  train_config,
  train_step,
  training_log,
  watchdog,
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
    FloatingPointError: going back to a checkpoint has not helped.
  """
  log = training_log.TrainingLog(folder)  # its clock runs
  writers.check(config.writers)
  compiles.keep_programs()

  # The corpus and what follows from it.
  corpus = corpus_lib.Corpus.open(config.corpus)
  config, assets = resolve_config(config, corpus)
  opening.check_processes(config, corpus, assets)
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
  lock = contextlib.nullcontext(workdir.always_held)
  if is_first:
    lock = workdir.locked(folder)

  with (
    # To the end: a second signal must leave what is written, and given back.
    interruption.StopSignals() as signals,
    lock as held,
    jax.set_mesh(mesh),
    log,
    log.given_up_unless(held),
  ):
    # The workdir, which is of this run or becomes its own.
    facts = processes.from_first(
      lambda: opening.open_workdir(folder, config, corpus, assets)
    )
    null_models = opening.null_models(config, corpus, folder)
    evaluator = opening.make_evaluator(step_config, corpus, null_models)
    if is_first:
      opening.log_start(config, mesh.devices.size)

    # The programs, and where the state lies.
    shapes = jax.eval_shape(lambda: train_step.init_state(config, null_models))
    places = train_step.state_sharding(config, shapes, mesh)
    init = jax.jit(
      lambda: train_step.init_state(config, null_models), out_shardings=places
    )
    step_fn = train_step.jitted(step_config, places, mesh)
    knowledge = sharding.put_everywhere(
      knowledge_lib.rounded(assets.knowledge, config.model.dtype), mesh
    )
    checkpoints = checkpoint.Checkpoints(
      paths.join(folder, workdir.CHECKPOINTS),
      keep=config.keep_checkpoints,
      check_lock=functools.partial(held, now=True),
    )

    # The loop, from the newest good checkpoint; again where it rolls back.
    watch = watchdog.Watchdog(
      config.guard.hang_after_s,
      lambda seconds: log.event('hung', silent_s=seconds),
    )

    def check(now: bool = False) -> None:
      """Raises what went wrong beside the loop."""
      checkpoints.check()
      held(now)

    signals.catch()
    with watch:
      while True:
        watch.beat(compiles=True)  # a large state takes its time to be read
        latest = checkpoints.latest()
        if latest is None:
          state, memory = init(), None
        else:
          with log.spent('restore'):
            state, memory = _restore(checkpoints, latest, shapes, places, facts)
        sharding.check_shared((state.params, state.opt_state), mesh)
        run = loop.Run(
          config=config,
          mesh=mesh,
          loader=loader,
          knowledge=knowledge,
          step_fn=step_fn,
          evaluate=evaluator,
          save=functools.partial(_save, checkpoints, facts),
          check=check,
          guard=guard.Guard(config.guard, memory),
          left_out=guard.left_out(folder, config.skip_batches),
          log=log,
          watch=watch,
          signals=signals,
        )
        check(now=True)  # lines are cut from the metrics
        log.open(config, int(state.step), is_new=latest is None)
        try:
          done, is_done = run.train(state, is_new=latest is None)
          break
        except guard.RollBack as decision:
          check(now=True)
          written = _roll_back(decision, checkpoints, config, folder)
          log.event('rollback', **written)
          log.close()
      watch.beat(compiles=True)  # nothing is said until all is written
      checkpoints.close()
      check(now=True)  # else it would be the other run that was done
      if not is_done:
        log.end('stopped', done)
        processes.barrier('stopped')  # the first to raise ends the others
        what = 'the state is saved, ' if done else 'nothing is lost, '
        raise errors.RetryableError(
          f'stopped by a signal at step {done}; {what}start the same command '
          'again to go on'
        )
      log.end('done', done)
  return done


def _save(
  checkpoints: checkpoint.Checkpoints,
  facts: dict[str, Any],
  state: train_step.TrainState,
  step: int,
  memory: dict[str, Any],
) -> None:
  training = {
    'step': state.step,
    'next_batch': state.next_batch,
    'opt_state': state.opt_state,
  }
  metadata = {
    'step': step,
    'next_batch': int(state.next_batch),
    **memory,
    **facts,
  }
  checkpoints.save(step, state.params, training, metadata)


def _restore(
  checkpoints: checkpoint.Checkpoints, step: int, shapes, places, facts
) -> tuple[train_step.TrainState, dict[str, Any]]:
  """The state of a step, and the metadata that its guard finds itself in."""
  place = paths.join(checkpoints.folder, str(step))
  metadata = checkpoint.read_metadata(place)
  if metadata['assets'] != facts['assets']:
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
  state = train_step.TrainState(params=params, **training)
  return state, metadata


def _roll_back(
  decision: guard.RollBack,
  checkpoints: checkpoint.Checkpoints,
  config: train_config.TrainConfig,
  folder: paths.PathLike,
) -> dict[str, Any]:
  """Writes down that a run goes back, before it does."""
  step = checkpoints.latest()
  first = 0
  if step is not None:
    place = paths.join(checkpoints.folder, str(step))
    first = checkpoint.read_metadata(place).get('next_batch', step)
  return processes.from_first(
    lambda: guard.commit(folder, config.guard, decision, step or 0, first)
  )
