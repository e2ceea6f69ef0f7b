"""FLOPs of the model by hand: what the equations ask for, and no more.

A multiply-add counts two; only matrix products are counted, as is usual (norms,
activations, softmax and the optimiser are below 1 % and no work of the matrix
units). What is computed twice (blocks made anew in the backward pass) is not
counted: utilisation is work done, not time spent.

The backward pass of a product is two products of its size, one for each
operand; one where an operand is a frozen table. Checked against the figures of
the original (Base at 2,048 genes: 690.9 GFLOP forward, 2,062.9 in training with
both heads at every position) and against the compiler's own count of a small
unrolled model.
"""

import dataclasses
from collections.abc import Iterable

from genecompass_jax import model as model_lib


@dataclasses.dataclass(frozen=True)
class Work:
  """How much a batch asks for.

  Attributes:
    tokens: slots that pass embedding and encoder.
    attended: sum over queries of the keys each is compared with.
    predictions: slots that pass the heads.
  """

  tokens: float
  attended: float
  predictions: float

  def __add__(self, other: 'Work') -> 'Work':
    """The work of both."""
    return Work(
      self.tokens + other.tokens,
      self.attended + other.attended,
      self.predictions + other.predictions,
    )


def padded_work(rows: int, slots: int, predictions: int) -> Work:
  """The work of a batch shape as it is computed, padding included.

  Args:
    rows: B.
    slots: L.
    predictions: K, predictions of a row.
  """
  return Work(rows * slots, rows * slots * slots, rows * predictions)


def real_work(genes: Iterable[int], predictions: float) -> Work:
  """The work that cells ask for, whatever row they lie in.

  Args:
    genes: n of every cell; it takes n + 1 slots, each looking at n + 1.
    predictions: hidden genes of all of them.
  """
  sizes = [int(n) + 1 for n in genes]
  return Work(sum(sizes), sum(size * size for size in sizes), predictions)


def forward(
  config: model_lib.ModelConfig, work: Work, *, composed: bool = True
) -> dict[str, float]:
  """FLOPs of one forward pass by part.

  Args:
    config: the model; priors count by their widths.
    work: slots, comparisons and predictions.
    composed: projection and fusion of a prior are multiplied once a pass
      (`composition`, whatever the batch), and slots see one product a prior;
      False: every slot passes both, as in the original.

  A model that hides ranks (objective `split`) predicts the ids of half of its
  predictions and the values of the others, but has all values computed.

  Returns:
    part -> FLOPs: fusion (word and last product), priors, composition, encoder
    (projections and feed-forward), attention, id_head, value_head.
  """
  D, F = config.width, config.feed_forward
  square = 2.0 * D * D
  widths = [width for _, width in config.priors]
  priors, composition = 0.0, 0.0
  for P in widths:
    priors += work.tokens * 2.0 * P * D
    if composed:
      composition += P * square
    else:
      priors += work.tokens * square
  value = 2.0 * D if config.use_values else 0.0
  layer = 4 * square + 4.0 * D * F
  parts = {
    'fusion': work.tokens * (2 * square + value),
    'priors': priors,
    'composition': composition,
    'encoder': config.num_layers * work.tokens * layer,
    'attention': config.num_layers * work.attended * 4.0 * D,
  }
  if config.head == 'pretraining':
    scores = 2.0 * D * config.vocabulary_size
    asked = 0.5 if config.hides_ranks else 1.0
    parts['id_head'] = asked * work.predictions * (square + scores)
    if config.use_values:
      parts['value_head'] = work.predictions * (square + 2.0 * D)
  return parts


def training(
  config: model_lib.ModelConfig, work: Work, *, composed: bool = True
) -> dict[str, float]:
  """FLOPs of forward and backward pass by part; see `forward`.

  Three times the forward pass; twice for products with the frozen tables of
  priors, which ask for no gradient, unless a gene without a vector reads a
  trained one (`missing_prior` 'learned'), which does.
  """
  parts = {
    name: 3.0 * flops
    for name, flops in forward(config, work, composed=composed).items()
  }
  if config.missing_prior != 'learned':
    for _, P in config.priors:
      parts['priors'] -= work.tokens * 2.0 * P * config.width
  return parts
