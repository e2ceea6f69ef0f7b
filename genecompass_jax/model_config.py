"""Size and parts of a model, and sizes by name."""

import dataclasses
from typing import Any

from genecompass_jax import attention, errors, layers

REMAT = ('none', 'attention', 'full')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Size and parts of a model.

  Attributes:
    vocabulary_size: V, tokens including `<pad>` and `<mask>`; 0 until it is
      taken from a corpus.
    width: D. Released base 768, small 256.
    num_layers: encoder blocks. Base 12, small 6.
    num_heads: attention heads; must divide `width`.
    feed_forward: F. Base 3,072, small 512.
    max_genes: positions, the most genes of a cell (2,048 in the release).
    num_species: rows of the species (CLS) table.
    priors: (name, P) of every knowledge table, in the order of fusion.
    missing_prior: 'learned': a gene without a vector reads a trained vector of
      the prior's width; 'released': it reads zeros.
    use_values: whether expression values enter, and are predicted.
    use_cls: whether a species vector stands before the genes.
    hides_ranks: whether a trained vector stands for the position of genes whose
      rank is hidden; taken from the mask objective in training ('split').
    hidden_dropout: rate after embedding, attention and feed-forward.
    attention_dropout: rate on attention probabilities; without effect where a
      fused kernel computes attention (see `attention`).
    prior_scale: factor on projected priors, bias included (the release's
      embedding warm-up; 1 there, because that warm-up has no effect).
    norm_epsilon: of every LayerNorm but the fusion block's (BERT's 1e-12).
    norm_order: 'post': norms follow the residual sums, as in the release and
      BERT; 'pre': they stand before attention and feed-forward, with one more
      at the end, which trains deep models without care.
    base_width: for carrying rates from one width to another: 0, or the width
      that the rates were chosen at. Hidden matrices then start smaller and
      learn more slowly by base_width / width, logits are scaled likewise, and
      embeddings keep their rate (the rules for Adam of Tensor Programs V, Yang
      et al. 2022, table 8). At width == base_width nothing changes.
    head: 'pretraining' (tied id head and value head), 'sequence' (pooled
      class scores) or 'token' (class scores a slot).
    num_labels: classes of a 'sequence' or 'token' head.
    dtype: 'float32' or 'bfloat16': the precision of matrix products and of
      states between them. Parameters, norms, softmax and losses are float32
      throughout.
    gradient_dtype: the precision in which gradients of the weights of products
      leave them, and so cross the network, where `dtype` is 'bfloat16'. They
      are summed over parts and steps in float32, and with parts cross the data
      axis so. Float32 whatever it says: gradients of tables that are looked up
      (words, positions, species), of biases and norms, and of the words by the
      id head where its logits are made in pieces.
    attention: how attention is computed, of `attention.KINDS`; 'auto' is the
      fastest that fits the devices. All are equal but for rounding, and but for
      `attention_dropout`.
    remat: what the backward pass computes again: 'none' of the products;
      'attention': all of a block but its attention; 'full': all of it. Trades
      time for memory.
    unroll: blocks that the compiler sees at once, of `num_layers`; 1 compiles
      fastest.
  """

  vocabulary_size: int = 0
  width: int = 768
  num_layers: int = 12
  num_heads: int = 12
  feed_forward: int = 3072
  max_genes: int = 2048
  num_species: int = 2
  priors: tuple[tuple[str, int], ...] = ()
  missing_prior: str = 'learned'
  use_values: bool = True
  use_cls: bool = True
  hides_ranks: bool = False
  hidden_dropout: float = 0.02
  attention_dropout: float = 0.02
  prior_scale: float = 1.0
  norm_epsilon: float = 1e-12
  norm_order: str = 'post'
  base_width: int = 0
  head: str = 'pretraining'
  num_labels: int = 0
  dtype: str = 'float32'
  gradient_dtype: str = 'float32'
  attention: str = 'auto'
  remat: str = 'none'
  unroll: int = 1

  def __post_init__(self):
    """Refuses sizes and names that cannot work."""
    errors.check_at_least(
      'model',
      self,
      width=1,
      num_layers=1,
      feed_forward=1,
      max_genes=1,
      num_species=1,
      vocabulary_size=0,
      norm_epsilon=0,
      base_width=0,
      unroll=1,
    )
    if self.num_heads < 1 or self.width % self.num_heads:
      raise errors.UserError(
        f'width={self.width} must be divisible by num_heads={self.num_heads}'
      )
    floats = ('float32', 'bfloat16')
    check_choice('missing_prior', self.missing_prior, ('learned', 'released'))
    check_choice('head', self.head, ('pretraining', 'sequence', 'token'))
    check_choice('dtype', self.dtype, floats)
    check_choice('gradient_dtype', self.gradient_dtype, floats)
    check_choice('norm_order', self.norm_order, ('post', 'pre'))
    check_choice('attention', self.attention, attention.KINDS)
    check_choice('remat', self.remat, REMAT)
    for name in ('hidden_dropout', 'attention_dropout'):
      if not 0 <= getattr(self, name) < 1:
        raise errors.UserError(f'{name}={getattr(self, name)} is not in [0, 1)')
    if self.head != 'pretraining' and self.num_labels < 1:
      raise errors.UserError(f'head={self.head!r} needs num_labels >= 1')

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.width // self.num_heads

  @property
  def precision(self) -> layers.Precision:
    """Of products."""
    return layers.Precision(self.dtype, self.gradient_dtype)

  @property
  def hidden_scale(self) -> float:
    """base_width / width: the factor on the rate of hidden matrices."""
    return self.base_width / self.width if self.base_width else 1.0

  @property
  def hidden_std(self) -> float:
    """Deviation of hidden matrices at the start."""
    return layers.INIT_STD * self.hidden_scale**0.5


# Sizes by name. Base and small are the release's; small's head count is not
# documented, 4 heads of 64 are our reading. Larger ones keep heads of 64-128.
SIZES: dict[str, dict[str, int]] = {
  'tiny': {
    'width': 64,
    'num_layers': 2,
    'num_heads': 4,
    'feed_forward': 128,
  },
  'small': {
    'width': 256,
    'num_layers': 6,
    'num_heads': 4,
    'feed_forward': 512,
  },
  'base': {
    'width': 768,
    'num_layers': 12,
    'num_heads': 12,
    'feed_forward': 3072,
  },
  'large': {
    'width': 1024,
    'num_layers': 24,
    'num_heads': 16,
    'feed_forward': 4096,
  },
  '1b': {
    'width': 2048,
    'num_layers': 20,
    'num_heads': 16,
    'feed_forward': 8192,
  },
  '3b': {
    'width': 2560,
    'num_layers': 40,
    'num_heads': 20,
    'feed_forward': 10240,
  },
}


def named_config(size: str, **changes: Any) -> ModelConfig:
  """The configuration of a named size with some fields changed.

  Args:
    size: a key of `SIZES`.
    **changes: fields of `ModelConfig`; `vocabulary_size` must be among them.
  """
  check_choice('size', size, tuple(SIZES))
  return ModelConfig(**{**SIZES[size], **changes})


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Refuses a word that is none of the choices.

  Raises:
    UserError: and names them.
  """
  if value not in choices:
    raise errors.UserError(
      f'{name}={value!r} is not known; choose one of {", ".join(choices)}'
    )
