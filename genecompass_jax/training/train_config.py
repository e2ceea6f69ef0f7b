"""The configuration of a pretraining run."""

import dataclasses

from genecompass_jax import (
  data as data_lib,
  encoding as encoding_lib,
  errors,
  losses,
  model as model_lib,
  optimizer as optimizer_lib,
  sharding,
)
from genecompass_jax.training import (
  guard as guard_lib,
  profiling,
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
    microbatches: parts that a batch is worked on in, one after the other, when
      its rows do not fit the devices at once. Gradients are summed in float32,
      and losses, dropout and updates are those of the whole batch, within
      rounding.
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
    guard: what is done about losses that are not finite, spikes and hangs.
    skip_batches: numbers of batches that are left out, as metrics.jsonl names
      them.
    profile_steps: first and last step of a window that JAX profiles into
      WORKDIR/profile, or one step; empty for none.
    writers: what is told the lines of metrics.jsonl too: 'tensorboard',
      'wandb'; each needs the extra of its name.
  """

  corpus: str
  model: model_lib.ModelConfig
  optimizer: optimizer_lib.OptimizerConfig
  data: data_lib.DataConfig
  encoding: encoding_lib.EncodingConfig = encoding_lib.EncodingConfig()
  loss: losses.LossConfig = losses.LossConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  microbatches: int = 1
  priors: tuple[tuple[str, str], ...] = ()
  seed: int = 0
  id_bias: str = 'zeros'
  prior_warmup_steps: int = 0
  log_every: int = 10
  eval_every: int = 0
  eval_cells: int = 0
  checkpoint_every: int = 1000
  keep_checkpoints: int = 3
  guard: guard_lib.GuardConfig = guard_lib.GuardConfig()
  skip_batches: tuple[int, ...] = ()
  profile_steps: tuple[int, ...] = ()
  writers: tuple[str, ...] = ()

  def __post_init__(self):
    """Refuses an unknown choice."""
    errors.check_at_least(
      'config',
      self,
      microbatches=1,
      prior_warmup_steps=0,
      log_every=1,
      eval_every=0,
      eval_cells=0,
      checkpoint_every=0,
      keep_checkpoints=1,
    )
    if not -(2**63) <= self.seed < 2**63:
      raise errors.UserError(f'config.seed={self.seed} must fit 64 bits')
    if self.id_bias not in ('zeros', 'frequency'):
      raise errors.UserError(
        f'id_bias={self.id_bias!r}: choose zeros or frequency'
      )
    profiling.check_steps(self.profile_steps)
    if not all(type(b) is int and b >= 0 for b in self.skip_batches):
      raise errors.UserError(
        f'skip_batches={self.skip_batches}: give whole numbers from 0, such as '
        "'(7, 12)'"
      )
