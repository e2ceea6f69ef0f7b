"""Optimisers and learning-rate schedules."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from genecompass_jax import errors


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How parameters are updated.

  Attributes:
    name: 'adamw' (decoupled decay, as optax and torch.optim.AdamW) or
      'adamw_hf' (the release's transformers.AdamW: epsilon is added before the
      second moment is corrected, decay follows the step).
    learning_rate: peak rate. 5e-5 in the release's run of 100 M cells.
    schedule: 'linear' (warm-up, then linear decay to 0 at `total_steps`),
      'wsd' (warm-up, constant, then linear decay over the last
      `decay_share`) or 'constant' (warm-up, then constant).
    warmup_steps: steps from 0 to the peak; 10,000 in the release.
    total_steps: length of the run, in steps.
    decay_share: share of `total_steps` that 'wsd' spends decaying.
    weight_decay: 0.01 in the release; norms and biases are exempt.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    clip_norm: largest global gradient norm; 0 for no clipping.
  """

  name: str = 'adamw'
  learning_rate: float = 5e-5
  schedule: str = 'linear'
  warmup_steps: int = 10_000
  total_steps: int = 100_000
  decay_share: float = 0.2
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.999
  epsilon: float = 1e-8
  clip_norm: float = 1.0

  def __post_init__(self):
    """Refuses unknown names and empty runs."""
    if self.name not in ('adamw', 'adamw_hf'):
      raise errors.UserError(
        f'optimizer.name={self.name!r}: choose adamw or adamw_hf'
      )
    if self.schedule not in ('linear', 'wsd', 'constant'):
      raise errors.UserError(
        f'optimizer.schedule={self.schedule!r}: choose linear, wsd or constant'
      )
    if self.total_steps < 1 or self.warmup_steps < 0:
      raise errors.UserError(
        f'optimizer.total_steps={self.total_steps} must be positive and '
        f'warmup_steps={self.warmup_steps} not negative'
      )
    errors.check_at_least(
      'optimizer',
      self,
      learning_rate=0,
      weight_decay=0,
      clip_norm=0,
      epsilon=0,
    )
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise errors.UserError(
          f'optimizer.{name}={getattr(self, name)} is not in [0, 1)'
        )
    if not 0 < self.decay_share <= 1:
      raise errors.UserError(
        f'optimizer.decay_share={self.decay_share} is not in (0, 1]'
      )


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """step -> learning rate; step 0 of a warm-up has rate 0, as in torch."""
  peak, total = config.learning_rate, config.total_steps
  warmup = config.warmup_steps

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    rising = step / max(1, warmup)
    if config.schedule == 'constant':
      falling = jnp.ones_like(step)
    else:
      share = config.decay_share if config.schedule == 'wsd' else 1.0
      length = total - warmup
      if config.schedule == 'wsd':
        length = max(1, round(total * share))
      falling = jnp.clip((total - step) / max(1, length), 0.0, 1.0)
    return peak * jnp.where(step < warmup, rising, falling)

  return schedule


def is_decayed(params: Any) -> Any:
  """True for matrices and embeddings, False for biases, norms and scalars.

  The rule is the release's: no decay for LayerNorms and for whatever is
  called a bias; embeddings do decay. Vectors that stand for missing priors
  have no counterpart there and are exempt, since decay would only pull them
  back to the zero vector that they replace.
  """

  def decayed(path, _) -> bool:
    name = path[-1].key
    return not (name in ('scale', 'missing') or name.endswith('bias'))

  return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(
  config: OptimizerConfig, rate_scales: Any = None
) -> optax.GradientTransformation:
  """The gradient transformation of a configuration.

  Args:
    config: rule and schedule.
    rate_scales: factors on the rate of every parameter (decay included), a
      tree like the parameters; None where all are 1.
  """
  schedule = make_schedule(config)
  if config.name == 'adamw_hf':
    update = _adamw_hf(config, schedule)
  else:
    update = optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=is_decayed,
    )
  parts = [update]
  if config.clip_norm > 0:
    parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
  if rate_scales is not None:
    parts.append(_scale_each(rate_scales))
  return optax.chain(*parts) if len(parts) > 1 else update


def _scale_each(factors: Any) -> optax.GradientTransformation:
  """Multiplies the update of every parameter by its own factor."""
  return optax.stateless(
    lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)
  )


def _adamw_hf(
  config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """transformers.AdamW as of 4.30, from its published update rule."""

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return optax.ScaleByAdamState(
      count=jnp.zeros((), jnp.int32), mu=zeros(), nu=zeros()
    )

  def update(grads, state, params):
    b1, b2 = config.b1, config.b2
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
    rate = schedule(state.count)
    count = state.count + 1
    t = count.astype(jnp.float32)
    size = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)

    def step(param, m, v, decayed):
      change = -size * m / (jnp.sqrt(v) + config.epsilon)
      decay = rate * config.weight_decay if decayed else 0.0
      return change - decay * (param + change)

    updates = jax.tree.map(step, params, mu, nu, is_decayed(params))
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)
