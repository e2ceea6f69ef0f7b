"""What a prediction is explained by, and what stands for "not known".

A gene enters a model as a sum, before the LayerNorm of the fusion:

  bias + word + prior_1 + ... + prior_n + value

Each part is a vector of the model's width: the word vector, every prior (its
projection with the bias of it), and the value, times their block of the fusion.
All that is done to a gene can be said as "that part of the sum is another one",
and one gradient with respect to the sum serves all parts.

Baselines, that is, what a part is when nothing is known:

  value    0: no count. The rank stays.
  others   'mean': the part's mean over the genes that the vocabulary has of
           that species, read as the model reads them (genes without a vector
           of a prior included). A prior whose rows are all alike then explains
           nothing, and what every gene has in common, the bias among it, is no
           knowledge of any gene.
           'zero': a factor of 0 on the part. The model never saw a gene without
           a word vector: the LayerNorm then scales up what little is left, and
           paths need many more points.

Slots of `<mask>`, `<pad>` and CLS, and values that are hidden, name no gene and
no amount: they stay as they are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from genecompass_jax import (
  errors,
  knowledge as knowledge_lib,
  masking,
  model as model_lib,
  pretrained,
  schemas,
  vocabulary as vocabulary_lib,
)

Array = jax.Array | np.ndarray
WORD, VALUE = 'word', 'value'
PARTS, VALUES, ALL = OVER = ('parts', 'values', 'all')
MEAN, ZERO = BASELINES = ('mean', 'zero')
_TOKENS = 4096  # looked up at a time for the means


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
  """A batch, and what its parts add to the sum beyond their baselines.

  Attributes:
    batch: one cell a row.
    sum_BLD: float32 the sum without the values, as it is.
    change_KBLD: float32 part less baseline, of the K parts that are asked for;
      0 where nothing is varied.
    changes_BLD: their sum over the parts.
  """

  batch: schemas.CellBatch
  sum_BLD: Array
  change_KBLD: Array
  changes_BLD: Array


def names(config: model_lib.ModelConfig, over: str) -> tuple[str, ...]:
  """The K parts that a question is over.

  Args:
    config: of the model.
    over: 'parts': word vector and priors; 'values'; or 'all' of them.

  Raises:
    UserError: an unknown word, a model that reads no values, or a prior with
      the name of another part.
  """
  if over not in OVER:
    raise errors.UserError(f'over={over!r}: give one of {", ".join(OVER)}')
  if over == VALUES and not config.use_values:
    raise errors.UserError('over=values: this model reads no values')
  priors = tuple(name for name, _ in config.priors)
  for name in {WORD, VALUE} & set(priors):
    raise errors.UserError(
      f'a prior of this model is called {name!r}, as another part is: '
      'attributions could not be told apart'
    )
  chosen = (WORD, *priors) if over != VALUES else ()
  return chosen + ((VALUE,) if over != PARTS and config.use_values else ())


def means(model: pretrained.PretrainedModel, baseline: str) -> np.ndarray:
  """What a part is of a gene of which nothing is known.

  Args:
    model: a restored model.
    baseline: one of `BASELINES`.

  Returns:
    float32 [K, S, D] for word vector and priors; zeros for 'zero'.

  Raises:
    UserError: an unknown baseline.
  """
  if baseline not in BASELINES:
    raise errors.UserError(
      f'baseline={baseline!r}: give {" or ".join(BASELINES)}'
    )
  config = model.config
  num_species = config.num_species
  shape = 1 + len(config.priors), num_species, config.width
  mean_KSD = np.zeros(shape, np.float64)
  if baseline == ZERO:
    return mean_KSD.astype(np.float32)
  for species in range(num_species):
    tokens_R = _tokens(model, species)
    for first in range(0, len(tokens_R), _TOKENS):
      some = tokens_R[first : first + _TOKENS]
      padded = np.zeros(_TOKENS, np.int32)
      padded[: len(some)] = some
      mean_KSD[:, species] += _sums(
        model.params,
        padded,
        np.arange(_TOKENS) < len(some),
        np.int32(species),
        model.assets.knowledge,
        float32(config),
      )
    mean_KSD[:, species] /= max(len(tokens_R), 1)
  return mean_KSD.astype(np.float32)


def float32(config: model_lib.ModelConfig) -> model_lib.ModelConfig:
  """The same model, computed in float32: differences are small."""
  return dataclasses.replace(config, dtype='float32')


def _tokens(model: pretrained.PretrainedModel, species: int) -> np.ndarray:
  """Tokens of a species; of all where the model came without a vocabulary."""
  vocab = model.vocabulary
  if vocab is not None and species < len(vocab.species):
    return vocab.species_tokens(species)
  return np.arange(vocabulary_lib.NUM_SPECIAL, model.config.vocabulary_size)


@functools.partial(jax.jit, static_argnames='config')
def _sums(params, tokens_N, counts_N, species, knowledge, config) -> Array:
  embedding = model_lib.bind(config, params).embedding
  species_1N = jnp.full((1, len(tokens_N)), species)
  with model_lib.full_precision(config):
    parts = embedding.parts(
      tokens_N[None], species_1N, knowledge, np.float32(config.prior_scale)
    )
    return jnp.stack([counts_N.astype('f4') @ part[0] for part in parts])


@functools.partial(jax.jit, static_argnames=('config', 'chosen'))
def of_batch(
  params: model_lib.Params,
  batch: schemas.CellBatch,
  knowledge: knowledge_lib.Knowledge,
  mean_KSD: Array,
  config: model_lib.ModelConfig,
  chosen: tuple[str, ...],
) -> Parts:
  """The parts of a batch.

  Args:
    params: of the model.
    batch: cells, hidden genes replaced.
    knowledge: prior tables.
    mean_KSD: from `means`.
    config: of the model, in float32.
    chosen: from `names`.
  """
  embedding = model_lib.bind(config, params).embedding
  scale = np.float32(config.prior_scale)
  looked_up = batch.gene_ids_BL, batch.species_BL, knowledge, scale
  is_gene_BL = (batch.segments_BL > 0) & ~batch.is_cls_BL
  is_known_BL = is_gene_BL & (batch.gene_ids_BL >= vocabulary_lib.NUM_SPECIAL)
  has_value_BL = is_gene_BL & (batch.values_BL != masking.HIDDEN_VALUE)
  changes = []
  with model_lib.full_precision(config):
    part_KBLD = tuple(embedding.parts(*looked_up)) if WORD in chosen else ()
    sum_BLD = embedding.linear_part(*looked_up)
  for part_BLD, mean_SD in zip(part_KBLD, mean_KSD):
    change_BLD = part_BLD - mean_SD[batch.species_BL]
    changes.append(jnp.where(is_known_BL[..., None], change_BLD, 0.0))
  if VALUE in chosen:
    shown_BL = jnp.where(has_value_BL, batch.values_BL, 0.0)
    changes.append(shown_BL[..., None] * embedding.fuse_value[...])
  change_KBLD = jnp.stack(changes)
  return Parts(batch, sum_BLD, change_KBLD, change_KBLD.sum(0))
