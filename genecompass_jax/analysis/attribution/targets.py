"""What is explained: one number a cell, asked of a model.

  GeneId     how likely the model finds a gene at the slot that hides it
  GeneValue  the expression value that it predicts for a gene
  CellAxis   how far the cell's embedding lies along an axis, start -> goal
  ClassLogit the score of a class, of a model with a sequence head

For the first two the gene is hidden as pretraining hides it: under `released`
its id and value, the rank stays; under `split` the id alone where the id is
asked, and value and rank where the value is. Cells that do not hold the gene
are left out.
"""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import (
  errors,
  masking,
  model as model_lib,
  pretrained,
  schemas,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.analysis import gene_tokens
from genecompass_jax.prepare import sources

Array = jax.Array | np.ndarray
LOG_PROBABILITY, LOGIT = SCALES = ('log_probability', 'logit')
CLS, MEAN = POOLINGS = ('cls', 'mean')
# In place of a token: no gene is asked for; these cells cannot have the gene.
ANY, ABSENT = -1, -2


@dataclasses.dataclass(frozen=True)
class GeneId:
  """Log-probability or logit of a gene's id, at the slot that hides it.

  Attributes:
    gene: symbol or Ensembl id, or a token.
    scale: one of `SCALES`; log-probabilities are in nats, over all tokens.
  """

  gene: str | int
  scale: str = LOG_PROBABILITY

  def __post_init__(self):
    if self.scale not in SCALES:
      raise errors.UserError(
        f'GeneId: scale {self.scale!r}: give one of {", ".join(SCALES)}'
      )


@dataclasses.dataclass(frozen=True)
class GeneValue:
  """The predicted log2 value of a gene, whose own value is hidden.

  Attributes:
    gene: symbol or Ensembl id, or a token.
  """

  gene: str | int


@dataclasses.dataclass(frozen=True, eq=False)
class CellAxis:
  """Place of the cell's unit embedding along an axis.

  Attributes:
    axis_D: direction; its length does not matter.
    pooling: 'cls', or 'mean' over the genes.
  """

  axis_D: np.ndarray
  pooling: str = CLS

  def __post_init__(self):
    axis_D = np.asarray(self.axis_D, np.float32)
    length = np.linalg.norm(axis_D)
    if axis_D.ndim != 1 or not 0 < length < np.inf:
      raise errors.UserError(
        f'CellAxis: axis of shape {axis_D.shape} and length {length:g}; give '
        'one vector that is not zero'
      )
    if self.pooling not in POOLINGS:
      raise errors.UserError(
        f'CellAxis: pooling {self.pooling!r}: give {" or ".join(POOLINGS)}'
      )
    object.__setattr__(self, 'axis_D', axis_D / length)

  @classmethod
  def between(
    cls, start_CD: Array, goal_CD: Array, pooling: str = CLS
  ) -> 'CellAxis':
    """From the centroid of some cells' unit embeddings to that of others.

    Args:
      start_CD: embeddings, as `embed` gives them with the same pooling.
      goal_CD: likewise.
      pooling: of these embeddings.
    """
    start_D, goal_D = (
      (x_CD / np.linalg.norm(x_CD, axis=1, keepdims=True)).mean(0)
      for x_CD in (np.asarray(start_CD), np.asarray(goal_CD))
    )
    return cls(goal_D - start_D, pooling)


@dataclasses.dataclass(frozen=True)
class ClassLogit:
  """Score of a class, before the softmax.

  Attributes:
    label: number of the class.
  """

  label: int


Target = GeneId | GeneValue | CellAxis | ClassLogit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdReadout:
  """Weighted sum over K slots of what a token scores there.

  Attributes:
    slots_BK: int32 slots in the row.
    tokens_BK: int32 tokens.
    weights_BK: float32.
    scale: one of `SCALES`.
  """

  slots_BK: Array
  tokens_BK: Array
  weights_BK: Array
  scale: str = dataclasses.field(metadata={'static': True})

  def __call__(self, network, batch, hidden_BLD) -> jax.Array:
    """The number of each row, float32 [B]."""
    logits_BKV = network.id_logits(_at_slots(hidden_BLD, self.slots_BK))
    if self.scale == LOG_PROBABILITY:
      logits_BKV = jax.nn.log_softmax(logits_BKV)
    index_BK1 = jnp.asarray(self.tokens_BK)[..., None]
    found_BK = jnp.take_along_axis(logits_BKV, index_BK1, axis=-1)[..., 0]
    return jnp.sum(found_BK * self.weights_BK, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueReadout:
  """Weighted sum of the values predicted at K slots."""

  slots_BK: Array
  weights_BK: Array

  def __call__(self, network, batch, hidden_BLD) -> jax.Array:
    """The number of each row, float32 [B]."""
    values_BK = network.predicted_values(_at_slots(hidden_BLD, self.slots_BK))
    return jnp.sum(values_BK * self.weights_BK, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AxisReadout:
  """The pooled unit vector along an axis."""

  axis_D: Array
  pooling: str = dataclasses.field(metadata={'static': True})

  def __call__(self, network, batch, hidden_BLD) -> jax.Array:
    """The number of each row, float32 [B]."""
    if self.pooling == CLS:
      pooled_BD = hidden_BLD[:, 0]
    else:
      is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL
      pooled_BD = jnp.einsum('BLD,BL->BD', hidden_BLD, is_gene_BL.astype('f4'))
    # Rows of padding have no genes, and no length.
    length_B1 = jnp.sum(pooled_BD**2, axis=1, keepdims=True)
    unit_BD = pooled_BD * jax.lax.rsqrt(jnp.maximum(length_B1, 1e-30))
    return unit_BD @ jnp.asarray(self.axis_D)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassReadout:
  """The score of one class."""

  label: int = dataclasses.field(metadata={'static': True})

  def __call__(self, network, batch, hidden_BLD) -> jax.Array:
    """The number of each row, float32 [B]."""
    return network.class_logits(hidden_BLD)[:, self.label]


Readout = IdReadout | ValueReadout | AxisReadout | ClassReadout


def in_words(target: Target) -> str:
  """A target in one line."""
  if isinstance(target, CellAxis):
    return f'CellAxis({target.pooling})'
  return repr(target)


def label(target: Target) -> str:
  """A target as a column of a table names it."""
  if isinstance(target, GeneId):
    return f'id of {target.gene}'
  if isinstance(target, GeneValue):
    return f'value of {target.gene}'
  if isinstance(target, ClassLogit):
    return f'class {target.label}'
  return 'axis'


def unit(target: Target) -> str:
  """What the numbers of a target are in."""
  if isinstance(target, GeneId):
    return 'nats' if target.scale == LOG_PROBABILITY else 'logits'
  if isinstance(target, GeneValue):
    return 'log2'
  return 'cosine' if isinstance(target, CellAxis) else 'logits'


def check(target: Target, config: model_lib.ModelConfig) -> None:
  """Refuses a target that the model has no answer to.

  Raises:
    UserError: another head, no values, no CLS, or another width.
  """
  name = type(target).__name__
  if not isinstance(target, Target):
    raise errors.UserError(
      f'target {target!r}: give GeneId, GeneValue, CellAxis or ClassLogit, such '
      "as gc.GeneId('STAT1')"
    )
  if isinstance(target, ClassLogit):
    errors.check_whole(label=target.label)
  head = 'sequence' if isinstance(target, ClassLogit) else 'pretraining'
  if not isinstance(target, CellAxis) and config.head != head:
    raise errors.UserError(
      f'{name} needs a model with the {head} head; this one has {config.head!r}'
    )
  if isinstance(target, GeneValue) and not config.use_values:
    raise errors.UserError(f'{name}: this model predicts no values')
  is_class = isinstance(target, ClassLogit)
  if is_class and not 0 <= target.label < config.num_labels:
    raise errors.UserError(
      f'{name}: label {target.label} is outside of [0, {config.num_labels})'
    )
  if isinstance(target, CellAxis):
    if target.axis_D.shape != (config.width,):
      raise errors.UserError(
        f'{name}: an axis of {len(target.axis_D)} numbers for a model of width '
        f'{config.width}; make it of embeddings by this model'
      )
    if target.pooling == CLS and not config.use_cls:
      raise errors.UserError(f'{name}: no CLS slot; use pooling mean')


def token_of(
  target: Target, model: pretrained.PretrainedModel, species: int
) -> int:
  """Token of the gene that a target asks for in a species; ANY for none.

  Raises:
    UserError: a gene that is not known, or that the model has no token for.
  """
  if not isinstance(target, GeneId | GeneValue):
    return ANY
  gene, vocab = target.gene, model.vocabulary
  if not isinstance(gene, str):
    errors.check_whole(token=gene)
    token = int(gene)
    if not vocabulary_lib.NUM_SPECIAL <= token < model.config.vocabulary_size:
      raise errors.UserError(f'token {token} is none of a gene of this model')
    return token
  if vocab is None:
    raise errors.UserError(
      f'gene {gene!r}: this model came without a vocabulary; give a token'
    )
  (token,) = gene_tokens.tokens_of([gene], vocab, species)
  return token


def tokens_of_cells(
  target: Target, model: pretrained.PretrainedModel, stream: sources.CellStream
) -> np.ndarray:
  """Token that a target asks for in cells of each species, int32 [S].

  ANY where no gene is asked for; ABSENT in species that do not have the gene,
  whose cells cannot be asked.

  Raises:
    UserError: none of the species of the cells has the gene.
  """
  gene = getattr(target, 'gene', None)
  found_S = np.full(model.config.num_species, ABSENT, np.int32)
  if not isinstance(gene, str) or model.vocabulary is None:
    found_S[:] = token_of(target, model, 0)
    return found_S
  found = gene_tokens.by_species(gene, stream, model.vocabulary)
  for species in stream.species:
    found_S[species] = found.get(species, ABSENT)
    if species not in found:
      logging.warning(
        '%s: %s has no gene %r of this name that was measured and that the '
        'model knows; its cells are left out',
        *(stream.source.name, model.vocabulary.species[species], gene),
      )
  return found_S


def ask(
  target: Target,
  batch: schemas.CellBatch,
  token_B: np.ndarray,
  config: model_lib.ModelConfig,
) -> tuple[schemas.CellBatch, Readout]:
  """Hides what is asked for, and says how to read the answer.

  Args:
    target: what is explained.
    batch: NumPy arrays, one cell a row; every row with a token of 0 or more
      holds it.
    token_B: token of the gene in each row, as `token_of` gives it; rows of
      -1 ask nothing of a gene.
    config: of the model.
  """
  if isinstance(target, CellAxis):
    return batch, AxisReadout(target.axis_D, target.pooling)
  if isinstance(target, ClassLogit):
    return batch, ClassReadout(target.label)
  row = np.flatnonzero(token_B >= 0)
  at_BL = (batch.gene_ids_BL == token_B[:, None]) & (batch.segments_BL > 0)
  slot_B = at_BL.argmax(1)
  slot = slot_B[row]
  weights_B1 = (token_B >= 0).astype(np.float32)[:, None]
  slots_B1 = slot_B[:, None].astype(np.int32)
  ids_BL = batch.gene_ids_BL.copy()
  values_BL = batch.values_BL.copy()
  positions_BL = batch.positions_BL.copy()
  is_id = isinstance(target, GeneId)
  if is_id or not config.hides_ranks:
    ids_BL[row, slot] = vocabulary_lib.MASK
  if not (is_id and config.hides_ranks):
    values_BL[row, slot] = masking.HIDDEN_VALUE
  if not is_id and config.hides_ranks:
    # Ranks count the genes whose rank is shown.
    behind_BL = (
      positions_BL > positions_BL[np.arange(len(slot_B)), slot_B, None]
    )
    positions_BL -= behind_BL & (token_B >= 0)[:, None]
    positions_BL[row, slot] = masking.HIDDEN_RANK
  batch = dataclasses.replace(
    batch, gene_ids_BL=ids_BL, values_BL=values_BL, positions_BL=positions_BL
  )
  if not is_id:
    return batch, ValueReadout(slots_B1, weights_B1)
  tokens_B1 = np.maximum(token_B, 0).astype(np.int32)[:, None]
  return batch, IdReadout(slots_B1, tokens_B1, weights_B1, target.scale)


def _at_slots(hidden_BLD: jax.Array, slots_BK: Array) -> jax.Array:
  slots_BK1 = jnp.asarray(slots_BK)[..., None]
  return jnp.take_along_axis(hidden_BLD, slots_BK1, axis=1)
