"""The folder of a training run: what is in it, and whether it may go on.

config.json     configuration of the run, hashes of corpus and assets
assets/         vocabulary, medians, encoding, prior tables
metrics.jsonl   one JSON object a line
checkpoints/    Orbax, with seals
rollbacks.json  batches that the run went back behind, if it ever did
nulls.npz       null models fitted on the training cells
profile/        traces of JAX's profiler, where profile_steps asks for them
tensorboard/    wandb/    what optional writers write
.lock           held by the process that trains here (local folders)
lease.json      of the process that trains here (stores)
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from genecompass_jax import errors, locks, paths

CONFIG = 'config.json'
ASSETS = 'assets'
CHECKPOINTS = 'checkpoints'
NULLS = 'nulls.npz'
LOCK = '.lock'
LEASE = 'lease.json'
FORMAT = 1

# Fields of a configuration that may differ when a run is resumed: the stream of
# cells stays as it is, and so do the parameters; another mesh changes only the
# order of sums, and so the last bits. Of corpus and priors, these are places;
# their content is compared by hash. The number of parts of a batch changes the
# last bits, and so does how blocks are computed, besides what attention's
# dropout draws.
MAY_CHANGE = (
  'corpus',
  'priors',
  'mesh',
  'microbatches',
  'model.attention',
  'model.remat',
  'model.unroll',
  'log_every',
  'eval_every',
  'eval_cells',
  'checkpoint_every',
  'keep_checkpoints',
  'guard',
  'skip_batches',
  'profile_steps',
  'writers',
)


def always_held(now: bool = False) -> None:
  """What `locked` yields where nobody can take the workdir over."""
  del now


@contextlib.contextmanager
def locked(workdir: paths.PathLike) -> Iterator[Callable[..., None]]:
  """Keeps other processes from training in a workdir.

  A local one is locked. In a store there is a lease, which keeps a second run
  away that comes later, and may fail for two that come at the same moment.

  Yields:
    What raises UserError when another process has taken the workdir over; its
    argument `now` says whether to look, as `locks.Lease.check` has it.

  Raises:
    UserError: one does already, or the folder is no place for a run.
  """
  folder = os.fspath(workdir)
  if paths.exists(paths.join(folder, 'manifest.json')):
    raise errors.UserError(
      f'{folder} holds a corpus; name another folder with --workdir'
    )
  busy = (
    f'{folder}: another process is training here; wait for it, or use another '
    '--workdir'
  )
  if paths.is_url(folder):
    with locks.leased(paths.join(folder, LEASE), busy) as lease:
      yield lease.check
    return
  os.makedirs(folder, exist_ok=True)
  with locks.held(os.path.join(folder, LOCK), busy):
    for place in ('', ASSETS, CHECKPOINTS):
      paths.remove_unfinished(os.path.join(folder, place))
    yield always_held


def read_config(workdir: paths.PathLike) -> dict[str, Any] | None:
  """WORKDIR/config.json, None where there is none.

  Raises:
    UserError: it is damaged, or written by another version.
  """
  path = paths.join(workdir, CONFIG)
  if not paths.exists(path):
    return None
  try:
    config = paths.read_json(path)
  except ValueError as error:
    raise errors.UserError(f'{path} is damaged ({error})') from error
  if not isinstance(config, dict):
    raise errors.UserError(f'{path} is damaged (it holds no JSON object)')
  if 'num_attention_heads' in config:
    raise errors.UserError(
      f'{path} is the config of original weights; make a model of them with '
      '`genecompass convert pytorch`'
    )
  if config.get('format') != FORMAT:
    raise errors.UserError(
      f'{path}: format {config.get("format")}, this version reads {FORMAT}'
    )
  needed = ('corpus_sha256',) if 'run' in config else ('model', 'step')
  missing = [k for k in (*needed, 'assets', 'sha256') if k not in config]
  if missing:
    raise errors.UserError(f'{path} is damaged ({", ".join(missing)} missing)')
  if config.pop('sha256') != _sha256(config):
    raise errors.UserError(
      f'{path} was changed after it was written; copy it again from where the '
      'model was trained'
    )
  return config


def _sha256(config: Mapping[str, Any]) -> str:
  text = json.dumps({**config, 'format': FORMAT}, sort_keys=True)
  return paths.sha256_bytes(text.encode())


def write_config(workdir: paths.PathLike, config: Mapping[str, Any]) -> None:
  """Writes WORKDIR/config.json whole, with a hash of its content."""
  config = json.loads(json.dumps(config))
  whole = {'format': FORMAT, **config, 'sha256': _sha256(config)}
  text = json.dumps(whole, indent=2) + '\n'
  paths.write_text(paths.join(workdir, CONFIG), text)


def check_same_run(
  workdir: paths.PathLike, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
  """Refuses to resume a run under another configuration.

  Args:
    workdir: named in the message.
    old: config.json of the workdir.
    new: what config.json would be now.

  Raises:
    UserError: a field outside `MAY_CHANGE` differs (up to three are named), or
      corpus or assets do, or there is no run.
  """
  if 'run' not in old:
    raise errors.UserError(
      f'{workdir} holds an exported model, not a run; use another --workdir'
    )
  before, now = (_flat(config['run']) for config in (old, new))
  changed = [
    f'{key} was {before.get(key)!r}, now {now.get(key)!r}'
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key) and not _may_change(key)
  ]
  if changed:
    more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
    raise errors.UserError(
      f'{workdir} holds a run of another config: '
      f'{"; ".join(changed[:3])}{more}; use the old config, or another --workdir'
    )
  for key, what in (('corpus_sha256', 'corpus'), ('assets', 'assets')):
    if old[key] != new[key]:
      raise errors.UserError(
        f'{workdir} holds a run on another {what} (vocabulary, medians, cells '
        'or priors differ); give the old one, or another --workdir'
      )


def _may_change(key: str) -> bool:
  """Whether a dotted field, or a group that it is in, is in `MAY_CHANGE`."""
  parts = key.split('.')
  return any(
    '.'.join(parts[:n]) in MAY_CHANGE for n in range(1, len(parts) + 1)
  )


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{prefix}.{key}' if prefix else str(key))
  return flat
