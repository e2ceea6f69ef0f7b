"""A restored model: what analysts hold in their hands.

`load` takes what training or conversion left: a workdir (its latest good
step), one step folder of it, or a self-contained export

  config.json      {"format", "model", "step", "assets", "provenance"}
  assets/          as in a workdir
  params/          parameters alone, sealed by params.sha256.json
  README.md        a model card, for people

Nothing in them names a place, so moving a folder changes nothing.
`PretrainedModel` joins parameters, configuration and assets. Below it are the
lower-level calls on arrays that are already encoded: `cell_batch`,
`PretrainedModel.hidden_states`, `PretrainedModel.logits`, `pretraining_loss`.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import (
  assets as assets_lib,
  checkpoint,
  errors,
  losses,
  model as model_lib,
  model_card,
  paths,
  schemas,
  vocabulary as vocabulary_lib,
  workdir,
)

Array = jax.Array | np.ndarray
# What a model card says about loading, and about use by what the model knows.
_LOADING = """import genecompass_jax as gc

model = gc.load('FOLDER OF THIS PAGE')
"""
_OF_COUNTS = "adata.obsm['X_genecompass'] = gc.embed(adata, model)"
_OF_TOKENS = (
  'states = model.hidden_states(gc.cell_batch(tokens, values, species))'
)
IGNORED_LABEL = -100  # torch's convention for slots without a label


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
  """Parameters with all that is needed to use them.

  Attributes:
    config: architecture.
    params: nested dict of arrays; differentiate with respect to them through
      `model.replace(params=...)`.
    assets: vocabulary, medians, encoding and prior tables.
    source: folder it came from.
    step: training step of the parameters; -1 where unknown.
    sha256: hash that names the parameters in results; '' where unknown.
    provenance: what is recorded of their origin; see `model_card.text`.
  """

  config: model_lib.ModelConfig
  params: model_lib.Params
  assets: assets_lib.Assets
  source: str = ''
  step: int = -1
  sha256: str = ''
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    size = model_lib.count_parameters(self.config)['total']
    return (
      f'PretrainedModel({self.source!r}, step {self.step}: {size:,} parameters, '
      f'{self.config.num_layers} layers of {self.config.width}, '
      f'{self.config.vocabulary_size:,} tokens, up to {self.config.max_genes:,} '
      f'genes a cell, priors {", ".join(n for n, _ in self.config.priors) or "none"})'
    )

  @property
  def vocabulary(self) -> vocabulary_lib.Vocabulary | None:
    """Genes and tokens; None for converted weights that came without."""
    return self.assets.vocabulary

  @functools.cached_property
  def fingerprint(self) -> str:
    """Digest of all that numbers depend on, also of a model in memory.

    `sha256` names the parameters of a checkpoint; another checkpoint may hold
    the same with other prior tables or medians.
    """
    digest = hashlib.sha256()
    knowledge = self.assets.knowledge
    parts = {
      'params': self.params,
      'rows': knowledge.row_SV,
      'tables': dict(knowledge.tables),
      'has_vector': dict(knowledge.has_vector),
    }
    for path, x in jax.tree_util.tree_leaves_with_path(parts):
      array = np.asarray(x)
      name = jax.tree_util.keystr(path)
      digest.update(f'{name} {array.dtype} {array.shape} '.encode())
      digest.update(array.tobytes())
    vocabulary, medians = self.assets.vocabulary, self.assets.medians
    facts = (
      self.config,
      self.assets.encoding,
      '' if vocabulary is None else vocabulary.sha256,
      '' if medians is None else medians.sha256,
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()

  def replace(self, **changes: Any) -> 'PretrainedModel':
    """A copy with some fields changed.

    With other parameters, configuration or assets it is no longer the model of
    its checkpoint: `sha256` becomes '', and with other parameters `step` -1.
    """
    if 'params' in changes:
      changes = {'step': -1, **changes}
    if changes.keys() & {'config', 'params', 'assets'}:
      changes = {'sha256': '', **changes}
    return dataclasses.replace(self, **changes)

  def hidden_states(
    self, batch: schemas.CellBatch, *, every_layer: bool = False
  ) -> jax.Array:
    """States of the last block, CLS first: float32 [B, L, D].

    Args:
      batch: cells, as `cell_batch` makes them.
      every_layer: also the embedding and every block: [N + 1, B, L, D].

    Returns:
      Genes follow in the order given. A model without CLS gives genes only.

    Raises:
      UserError: tokens, positions or species that this model does not have.
    """
    check_inside(batch, self.config)
    hidden = _hidden(
      self.params, batch, self.assets.knowledge, self.config, every_layer
    )
    return hidden if self.config.use_cls else hidden[..., 1:, :]

  def logits(
    self, batch: schemas.CellBatch
  ) -> tuple[jax.Array, jax.Array | None] | jax.Array:
    """Outputs of the head, one cell a row.

    Returns:
      'pretraining': (id logits [B, S, V], values [B, S] or None) at the S gene
      slots; 'sequence': [B, labels]; 'token': [B, L, labels], CLS slot first.

    Raises:
      UserError: tokens, positions or species that this model does not have.
    """
    check_inside(batch, self.config)
    return _logits(self.params, batch, self.assets.knowledge, self.config)


def load(folder: paths.PathLike) -> PretrainedModel:
  """Restores a model onto the default device.

  Args:
    folder: workdir (latest good step), step folder, or export; local or URL.

  Raises:
    UserError: nothing to load there, or files are damaged or of two models.
  """
  name = os.fspath(folder).rstrip('/')
  step = None
  above, _, number = name.rpartition('/')
  if above.rpartition('/')[2] == workdir.CHECKPOINTS:
    if not number.isdecimal():
      raise errors.UserError(
        f'{name}: no step; give the workdir, or checkpoints/NUMBER of it'
      )
    step, name = int(number), above.rpartition('/')[0] or '.'
  config = workdir.read_config(name)
  if config is None:
    raise errors.UserError(
      f'{name}: no model here (no config.json); give the --workdir of a run, '
      'one of its checkpoints/STEP folders, or an exported model'
    )
  if 'run' in config:
    run = config['run']
    model_config = _model_config(run['model'], name)
    provenance = {
      'corpus_sha256': config['corpus_sha256'],
      'seed': run['seed'],
      'total_steps': run['optimizer']['total_steps'],
    }
    checkpoints = paths.join(name, workdir.CHECKPOINTS)
    if step is None:
      step = checkpoint.latest_step(checkpoints)
    if step is None:
      raise errors.UserError(
        f'{name}: the run has no finished checkpoint yet; wait for '
        'checkpoint_every steps, or start it again'
      )
    place = paths.join(checkpoints, str(step))
    seal = place
  else:
    model_config = _model_config(config['model'], name)
    step, place = config['step'], name
    provenance = config.get('provenance', {})
    seal = paths.join(name, checkpoint.PARAMS)
  problem = checkpoint.check_seal(seal)
  if problem is not None:
    raise errors.UserError(
      f'{seal} cannot be used: {problem}; copy it again, or load another step'
    )
  folder_assets = paths.join(name, workdir.ASSETS)
  sealed = checkpoint.seal_sha256(seal)
  if config.get('params_sha256', sealed) != sealed:
    raise errors.UserError(
      f'{name}: params/ belongs to another model than config.json; copy the '
      'folder again as a whole'
    )
  hashes = assets_lib.file_hashes(folder_assets)
  if hashes != config['assets']:
    raise errors.UserError(
      f'{name}: assets/ belongs to another model than config.json (vocabulary, '
      'medians or priors differ); copy the folder again as a whole'
    )
  if 'run' in config:
    written = checkpoint.read_metadata(place)
    if written['assets'] != hashes:
      raise errors.UserError(
        f'{place} was written with other assets than {name}/assets '
        '(vocabulary, medians or priors differ); copy the workdir again as a '
        'whole'
      )
    if written['run']['model'] != config['run']['model']:
      raise errors.UserError(
        f'{place} holds another model than {name}/config.json says; copy the '
        'workdir again as a whole'
      )
  assets = assets_lib.load(folder_assets)
  one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one_device),
    model_lib.abstract_params(model_config),
  )
  return PretrainedModel(
    config=model_config,
    params=checkpoint.restore_params(place, shapes),
    assets=assets,
    source=name,
    step=step,
    sha256=sealed,
    provenance=provenance,
  )


def export(model: PretrainedModel, folder: paths.PathLike) -> None:
  """Writes a self-contained model that `load` reads, and a card about it.

  config.json comes last.

  Raises:
    UserError: the folder is not empty.
  """
  if paths.listdir(folder):
    raise errors.UserError(f'{folder} is not empty; give a new folder')
  hashes = assets_lib.save(paths.join(folder, workdir.ASSETS), model.assets)
  checkpoint.save_params(folder, model.params)
  params = paths.join(folder, checkpoint.PARAMS)
  card = model_card.text(
    model.config,
    model.assets,
    loading=_LOADING
    + (_OF_TOKENS if model.assets.medians is None else _OF_COUNTS),
    step=model.step,
    provenance=model.provenance,
    hashes={
      'params.sha256.json': checkpoint.seal_sha256(params),
      **{f'{workdir.ASSETS}/{name}': x for name, x in sorted(hashes.items())},
    },
  )
  paths.write_text(paths.join(folder, model_card.NAME), card)
  workdir.write_config(
    folder,
    {
      'model': dataclasses.asdict(model.config),
      'step': model.step,
      'assets': hashes,
      'params_sha256': checkpoint.seal_sha256(params),
      'provenance': dict(model.provenance),
    },
  )


def _model_config(values: dict[str, Any], name: str) -> model_lib.ModelConfig:
  """A model configuration read back from JSON.

  How the run computed attention says nothing about the devices that are here.
  """
  here = {'attention': 'auto', 'remat': 'none'}
  try:
    priors = tuple((prior, width) for prior, width in values['priors'])
    return model_lib.ModelConfig(**{**values, **here, 'priors': priors})
  except (TypeError, KeyError, ValueError) as error:
    raise errors.UserError(
      f'{name}/config.json is of another version of the model ({error})'
    ) from error


def cell_batch(
  gene_ids: Array,
  values: Array,
  species: Array | int | str | None = None,
  *,
  lengths: Array | None = None,
) -> schemas.CellBatch:
  """Makes a batch of padded arrays, one cell a row.

  Args:
    gene_ids: int [B, S] tokens by falling rank, 0 after the cell's end.
    values: float [B, S] log2 values, -1 where hidden.
    species: species codes or names, one for all or one a cell ([B] or [B, 1]);
      None is human.
    lengths: int [B] genes of each cell; by default up to the last token that
      is not 0. Give it where a gene's token may itself be 0.

  Returns:
    A batch of S + 1 slots a row, CLS first.

  Raises:
    UserError: shapes disagree, tokens are no whole numbers, or a species is
      not known.
  """
  gene_ids_BS = np.asarray(gene_ids)
  if gene_ids_BS.size and gene_ids_BS.dtype.kind not in 'iu':
    raise errors.UserError(
      f'gene_ids are tokens, whole numbers, not {gene_ids_BS.dtype}'
    )
  values_BS = np.asarray(values, np.float32)
  if gene_ids_BS.ndim != 2 or gene_ids_BS.shape != values_BS.shape:
    raise errors.UserError(
      f'gene_ids {gene_ids_BS.shape} and values {values_BS.shape} must be two '
      'arrays of one shape [cells, genes]'
    )
  B, S = gene_ids_BS.shape
  if not S:
    raise errors.UserError('cells of no gene slots; give at least one')
  if lengths is None:
    used_BS = gene_ids_BS != vocabulary_lib.PAD
    lengths = np.where(used_BS.any(1), S - used_BS[:, ::-1].argmax(1), 0)
  lengths_B = np.asarray(lengths).reshape(B)
  species_B = _species_codes(species, B)
  is_gene_BS = np.arange(S) < lengths_B[:, None]

  def with_cls(array_BS, cls):
    cls_B1 = np.broadcast_to(np.asarray(cls, array_BS.dtype), (B,))[:, None]
    return np.concatenate([cls_B1, array_BS], axis=1)

  zeros_BS = np.zeros((B, S), np.int32)
  gene_ids_BS = np.where(is_gene_BS, gene_ids_BS, vocabulary_lib.PAD)
  segments_BL = with_cls(is_gene_BS.astype(np.int32), 1)
  return schemas.CellBatch(
    gene_ids_BL=with_cls(gene_ids_BS.astype(np.int32), vocabulary_lib.PAD),
    values_BL=with_cls(np.where(is_gene_BS, values_BS, 0), 0),
    # Positions and species of padding are as in the release, whose recorded
    # states go on into the padding.
    positions_BL=with_cls(zeros_BS + np.arange(S, dtype=np.int32), 0),
    segments_BL=segments_BL,
    species_BL=np.broadcast_to(species_B[:, None], segments_BL.shape),
    is_cls_BL=with_cls(zeros_BS, 1).astype(bool),
  )


def pretraining_loss(
  model: PretrainedModel,
  batch: schemas.CellBatch,
  id_labels: Array,
  value_labels: Array,
  *,
  params: model_lib.Params | None = None,
  config: losses.LossConfig = losses.LossConfig(),
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The pretraining loss on given labels.

  Args:
    model: a model with the pretraining head.
    batch: hidden cells, one a row, of S gene slots.
    id_labels: int [B, S] true tokens, -100 where nothing is predicted.
    value_labels: float [B, S] true log2 values, read where ids are labelled.
    params: differentiate with respect to these instead of `model.params`.
    config: weights of the terms.

  Returns:
    (total, id, value): mean cross-entropy in nats and mean squared error over
    labelled slots, and their sum by the weights of `config`; 0 where nothing is
    labelled. A model without values has the id loss as its total, and value
    loss 0.

  Raises:
    UserError: the model has another head, or the batch does not fit it.
  """
  if model.config.head != 'pretraining':
    raise errors.UserError(
      f'this model has a {model.config.head!r} head; the pretraining loss '
      'needs a model with the pretraining head'
    )
  check_inside(batch, model.config)
  params = model.params if params is None else params
  logits_BSV, values_BS = _logits(
    params, batch, model.assets.knowledge, model.config
  )
  id_labels_BS = jnp.asarray(id_labels)
  labelled_BS = id_labels_BS != IGNORED_LABEL
  weights_BS = labelled_BS.astype(jnp.float32)
  id_BS = losses.id_losses(logits_BSV, jnp.where(labelled_BS, id_labels_BS, 0))
  value_BS = None
  if values_BS is not None:
    # What is not labelled may be anything, NaN included.
    labels_BS = jnp.where(labelled_BS, jnp.asarray(value_labels), 0.0)
    value_BS = losses.value_losses(values_BS, labels_BS)
  sums = losses.loss_sums(id_BS, weights_BS, value_BS, weights_BS)
  total, id_loss, value_loss = sums.means(config)
  return (id_loss if values_BS is None else total), id_loss, value_loss


@functools.partial(jax.jit, static_argnums=(3, 4))
def _hidden(params, batch, knowledge, config, every_layer):
  with model_lib.full_precision(config):
    network = model_lib.bind(config, params)
    return network(batch, knowledge, every_layer=every_layer)


@functools.partial(jax.jit, static_argnums=3)
def _logits(params, batch, knowledge, config):
  with model_lib.full_precision(config):
    network = model_lib.bind(config, params)
    hidden_BLD = network(batch, knowledge)
    if config.head != 'pretraining':
      logits = network.class_logits(hidden_BLD)
      is_token = config.head == 'token'
      return logits[:, 1:] if is_token and not config.use_cls else logits
    genes_BSD = hidden_BLD[:, 1:]
    return network.id_logits(genes_BSD), network.predicted_values(genes_BSD)


def _species_codes(species, num_cells: int) -> np.ndarray:
  names = vocabulary_lib.SPECIES
  given = np.asarray(0 if species is None else species).reshape(-1)
  if given.dtype.kind in 'UO':
    codes = np.array([names.index(n) if n in names else -1 for n in given])
  else:
    codes = given.astype(np.int32)
    codes = np.where(codes == given, codes, -1)
  if (codes < 0).any():
    raise errors.UserError(
      f'species {given[np.argmin(codes)]!s} is not known; choose one of '
      f'{", ".join(names)}, or their codes 0 and 1'
    )
  if len(codes) not in (1, num_cells):
    raise errors.UserError(
      f'{len(codes)} species codes for {num_cells} cells; give one a cell'
    )
  return np.broadcast_to(codes.astype(np.int32), (num_cells,))


def check_inside(
  batch: schemas.CellBatch, config: model_lib.ModelConfig
) -> None:
  """Refuses what a look-up would turn into NaN or another gene's row."""
  lowest = -1 if config.hides_ranks else 0  # -1: a hidden rank
  for name, values, first, size in (
    ('token', batch.gene_ids_BL, 0, config.vocabulary_size),
    ('position', batch.positions_BL, lowest, config.max_genes),
    ('species code', batch.species_BL, 0, config.num_species),
  ):
    if isinstance(values, jax.core.Tracer) or not values.size:
      continue
    values = np.asarray(values)
    low, high = int(values.min()), int(values.max())
    if low < first or high >= size:
      raise errors.UserError(
        f'{name} {low if low < first else high} is outside of [{first}, {size}),'
        ' what this model knows'
      )
