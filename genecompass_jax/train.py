"""Pretraining, told in order: corpus, model, state, step, loop.

Randomness folds from (seed, batch): the n-th batch of a run is a pure function
of corpus, seed and n, and so are its masks and its dropout. A run that is
killed goes on from its last sealed checkpoint and ends in the same bits.
"""

import contextlib
import dataclasses
import functools
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genecompass_jax import (
  assets as assets_lib,
  checkpoint,
  corpus as corpus_lib,
  data as data_lib,
  encoding as encoding_lib,
  errors,
  evaluate,
  interruption,
  knowledge as knowledge_lib,
  losses,
  metrics,
  model as model_lib,
  nulls,
  optimizer as optimizer_lib,
  paths,
  progress,
  schemas,
  sharding,
  training_log,
  workdir,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A pretraining run.

  Attributes:
    corpus: folder or URL of the corpus.
    model: architecture; its vocabulary size and prior widths are taken from
      the corpus and the tables, and whether it hides ranks from the objective
      of `data.mask`, whatever stands here.
    optimizer: updates and schedule; `total_steps` is the length of the run.
    data: batches.
    encoding: how counts become ranks and values.
    loss: weights of the two terms.
    mesh: how devices share the work.
    priors: (name, parquet table) of each knowledge prior, in order.
    seed: of initial parameters and dropout; `data.seed` is that of the cells.
    id_bias: what the bias of the id head starts from: 'zeros', as in the
      release, or 'frequency': the log of how often each token is among the
      ranks that training cells keep, counted with the null models. A short
      run need not spend itself on learning it.
    prior_warmup_steps: steps over which priors fade in; 0 for none (the
      release's warm-up has no effect).
    log_every: steps between training lines.
    eval_every: steps between evaluations; 0 for none.
    eval_cells: held-out cells of an evaluation, evenly spaced; 0 for all.
    checkpoint_every: steps between checkpoints; the last step has one always.
    keep_checkpoints: newest checkpoints kept.
  """

  corpus: str
  model: model_lib.ModelConfig
  optimizer: optimizer_lib.OptimizerConfig
  data: data_lib.DataConfig
  encoding: encoding_lib.EncodingConfig = encoding_lib.EncodingConfig()
  loss: losses.LossConfig = losses.LossConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  priors: tuple[tuple[str, str], ...] = ()
  seed: int = 0
  id_bias: str = 'zeros'
  prior_warmup_steps: int = 0
  log_every: int = 10
  eval_every: int = 0
  eval_cells: int = 0
  checkpoint_every: int = 1000
  keep_checkpoints: int = 3

  def __post_init__(self):
    """Refuses an unknown choice."""
    errors.check_at_least(
      'config',
      self,
      prior_warmup_steps=0,
      log_every=1,
      eval_every=0,
      eval_cells=0,
      checkpoint_every=0,
      keep_checkpoints=1,
    )
    if self.id_bias not in ('zeros', 'frequency'):
      raise errors.UserError(
        f'id_bias={self.id_bias!r}: choose zeros or frequency'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that changes in training.

  Attributes:
    step: int32 updates done; the schedule folds from it.
    next_batch: int32 batch to train on next; masks, dropout and order fold
      from it.
    params: float32 parameters.
    opt_state: state of the optimiser.
  """

  step: jax.Array
  next_batch: jax.Array
  params: model_lib.Params
  opt_state: Any


def train_step(
  state: TrainState,
  batch: schemas.PretrainingBatch,
  knowledge: knowledge_lib.Knowledge,
  config: TrainConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Each term is a sum over the global batch, divided by the number of genes in
  the global batch that it was asked of: it does not depend on how rows lie on
  devices. A term that was asked of none is 0.
  """
  key = jax.random.key(config.seed)
  dropout_key = jax.random.fold_in(key, state.next_batch)
  prior_scale = None
  if config.prior_warmup_steps:
    share = (state.step + 1) / config.prior_warmup_steps
    prior_scale = jnp.minimum(share, 1.0).astype(jnp.float32)

  def loss(params):
    id_BK, value_BK = evaluate.slot_losses(
      params,
      batch,
      knowledge,
      config.model,
      prior_scale=prior_scale,
      dropout_key=dropout_key,
    )
    sums = losses.loss_sums(
      id_BK, batch.id_weights_BK, value_BK, batch.value_weights_BK
    )
    total, id_loss, value_loss = sums.means(config.loss)
    if not config.model.use_values:
      total = id_loss
    return total, {
      'loss': total,
      'id_loss': id_loss,
      'value_loss': value_loss,
      'masked': jnp.sum(
        jnp.maximum(batch.id_weights_BK, batch.value_weights_BK)
      ),
    }

  grads, values = jax.grad(loss, has_aux=True)(state.params)
  transform = optimizer_lib.make_optimizer(config.optimizer)
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  values['grad_norm'] = optax.tree.norm(grads)
  values['learning_rate'] = optimizer_lib.make_schedule(config.optimizer)(
    state.step
  )
  state = TrainState(
    step=state.step + 1,
    next_batch=state.next_batch + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  return state, values


def init_state(
  config: TrainConfig, null_models: nulls.NullModels | None = None
) -> TrainState:
  """The state before the first update; `id_bias` 'frequency' needs counts."""
  params = model_lib.init(config.model, config.seed)
  if config.id_bias == 'frequency':
    cells_V = null_models.cells_V() + 1.0  # one is added: no log of zero
    params['id_head']['bias'] = jnp.asarray(
      np.log(cells_V / cells_V.sum()), jnp.float32
    )
  transform = optimizer_lib.make_optimizer(config.optimizer)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, zero, params, transform.init(params))


def state_sharding(
  config: TrainConfig, shapes: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
  """Where every array of the state lies; moments lie as their parameters."""
  whole = sharding.replicated(mesh)
  params = sharding.parameter_sharding(
    model_lib.logical_axes(config.model), shapes.params, mesh
  )
  transform = optimizer_lib.make_optimizer(config.optimizer)
  opt_state = optax.tree.map_params(
    transform,
    lambda _, place: place,
    shapes.opt_state,
    params,
    transform_non_params=lambda _: whole,
  )
  return TrainState(whole, whole, params, opt_state)


def resolve_config(
  config: TrainConfig, corpus: corpus_lib.Corpus
) -> tuple[TrainConfig, assets_lib.Assets]:
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
      data=data_lib.fit_buckets(corpus, config.encoding, config.data),
    ),
    assets,
  )


def train_and_evaluate(config: TrainConfig, folder: paths.PathLike) -> int:
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
  # The corpus and what follows from it.
  corpus = corpus_lib.Corpus.open(config.corpus)
  config, assets = resolve_config(config, corpus)
  mesh = sharding.make_mesh(config.mesh)
  rows, devices = config.data.rows_per_batch, mesh.devices.size
  if rows % devices:
    raise errors.UserError(
      f'data.rows_per_batch={rows} must be divisible by {devices} devices'
    )
  loader = data_lib.Loader(
    corpus,
    config.encoding,
    config.data,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
  )
  is_first = jax.process_index() == 0
  lock = workdir.locked(folder) if is_first else contextlib.nullcontext()

  with lock, jax.set_mesh(mesh):
    # The workdir, which is of this run or becomes its own.
    facts = _open_workdir(folder, config, corpus, assets)
    null_models = _null_models(config, corpus, folder)
    evaluator = _make_evaluator(config, corpus, null_models)
    if is_first:
      _log_start(config, devices)

    # The state, restored where there is a good checkpoint.
    shapes = jax.eval_shape(lambda: init_state(config, null_models))
    places = state_sharding(config, shapes, mesh)
    checkpoints = checkpoint.Checkpoints(
      paths.join(folder, workdir.CHECKPOINTS), keep=config.keep_checkpoints
    )
    latest = checkpoints.latest()
    if latest is None:
      init = jax.jit(
        lambda: init_state(config, null_models), out_shardings=places
      )
      state, first_step, first_batch = init(), 0, 0
    else:
      state = _restore(checkpoints, latest, shapes, places, facts)
      first_step, first_batch = int(state.step), int(state.next_batch)
    knowledge = jax.device_put(assets.knowledge, sharding.replicated(mesh))
    step_fn = jax.jit(
      functools.partial(train_step, config=config),
      donate_argnums=0,
      out_shardings=(places, sharding.replicated(mesh)),
    )
    if is_first:
      # A run without a checkpoint starts again, with its evaluation at step 0.
      metrics.cut_after(folder, -1 if latest is None else first_step)

    # The loop.
    log = training_log.TrainingLog(
      folder, first_step, config.optimizer.total_steps, config.log_every
    )
    log.event('start' if latest is None else 'resume', step=first_step)
    total = config.optimizer.total_steps
    if evaluator is not None and latest is None:
      log.evaluation(0, evaluator(state.params, knowledge, mesh))
    with interruption.StopSignals() as signals, log.progress():
      batches = log.batches(loader.iterate(first_batch))
      for step in range(first_step + 1, total + 1):
        host_batch = next(batches)
        batch = sharding.put_batch(host_batch.batch, mesh)
        state, values = step_fn(state, batch, knowledge)
        log.step(step, host_batch, values)
        if evaluator is not None and (
          step == total or progress.is_due(step, config.eval_every)
        ):
          log.catch_up()
          line = evaluator(state.params, knowledge, mesh)
          log.evaluation(step, line)
        stops = signals.asked_to_stop  # read once: what stops is saved
        if (
          step == total
          or stops
          or progress.is_due(step, config.checkpoint_every)
        ):
          # What a checkpoint claims is in the metrics, and is finite.
          log.catch_up()
          _save(checkpoints, state, step, facts)
        if stops and step < total:
          checkpoints.close()
          log.event('stopped', step=step)
          log.close()
          raise errors.RetryableError(
            f'stopped by a signal at step {step}; the state is saved, start '
            'the same command again to go on'
          )
    checkpoints.close()
    log.event('done', step=total)
    log.close()
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
    staging = paths.join(folder, f'{workdir.ASSETS}.check')
    try:
      new['assets'] = assets_lib.save(staging, assets)
    finally:
      paths.path(staging).rmtree(missing_ok=True)
    workdir.check_same_run(folder, old, new)
    assets_lib.load(folder_assets)  # whole, and as they were written
    return new
  if old is not None and 'run' not in old:
    workdir.check_same_run(folder, old, new)  # raises: it is no run
  if jax.process_index() == 0:
    # Nothing was trained here yet: a run that was refused or failed at once
    # leaves its place to the next one, whatever its config.
    paths.path(paths.join(folder, workdir.NULLS)).unlink(missing_ok=True)
    new['assets'] = assets_lib.save(folder_assets, assets)
    workdir.write_config(folder, new)
  return new


def _manifest_sha256(corpus: corpus_lib.Corpus) -> str:
  text = json.dumps(corpus.manifest, sort_keys=True)
  return paths.sha256_bytes(text.encode())


def _evaluates(config: TrainConfig, corpus: corpus_lib.Corpus) -> bool:
  return config.eval_every > 0 and 'validation' in corpus.splits


def _null_models(config, corpus, folder) -> nulls.NullModels | None:
  """Null models, fitted once and kept in the workdir; None if not needed."""
  if not _evaluates(config, corpus) and config.id_bias != 'frequency':
    return None
  path = paths.join(folder, workdir.NULLS)
  if paths.exists(path):
    null_models = nulls.NullModels.load(path)
    null_models.check(config.encoding, config.data.mask, path)
    return null_models
  null_models = evaluate.fit_nulls(corpus, config.encoding, config.data)
  if jax.process_index() == 0:
    null_models.save(path)
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
  state: TrainState,
  step: int,
  facts: dict[str, Any],
) -> None:
  training = {
    'step': state.step,
    'next_batch': state.next_batch,
    'opt_state': state.opt_state,
  }
  checkpoints.save(step, state.params, training, {'step': step, **facts})


def _restore(checkpoints, step: int, shapes, places, facts) -> TrainState:
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
  return TrainState(params=params, **training)


def _log_start(config: TrainConfig, devices: int) -> None:
  counts = model_lib.count_parameters(config.model)
  groups = ', '.join(f'{n:,} {g}' for g, n in counts.items() if g != 'total')
  logging.info(
    '%d device%s; %s parameters (%s)',
    devices,
    '' if devices == 1 else 's',
    f'{counts["total"]:,}',
    groups,
  )
