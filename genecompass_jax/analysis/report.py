"""What a run says of itself: its held-out losses beside the null models."""

import statistics
from collections.abc import Sequence
from typing import Any

from genecompass_jax import (
  errors,
  goodput,
  metrics,
  paths,
  workdir as workdir_lib,
)

# Column title -> key of an evaluation line.
COLUMNS = {
  'cells': 'eval_cells',
  'id loss': 'eval_id_loss',
  'marginal': 'null_id_marginal',
  'rank bin': 'null_id_rank_bin',
  'rank bracket': 'null_id_rank_bracket',
  'value bracket': 'null_id_value_bracket',
  'value loss': 'eval_value_loss',
  'gene mean': 'null_value_gene_mean',
  'count mean': 'null_value_count_mean',
  'cell scaled': 'null_value_cell_scaled',
  'interpolation': 'null_value_interpolation',
  'bracket mean': 'null_value_bracket_mean',
}


def evaluations(workdir: paths.PathLike) -> list[dict[str, Any]]:
  """The evaluation lines of a run, in order of steps.

  Raises:
    UserError: the folder holds no metrics, or no evaluation yet.
  """
  if not paths.exists(paths.join(workdir, metrics.FILE)):
    raise errors.UserError(
      f'{workdir}: no {metrics.FILE} here; give the --workdir of a run'
    )
  lines = [line for line in metrics.read(workdir) if 'eval_loss' in line]
  if not lines:
    raise errors.UserError(
      f'{workdir}: nothing was evaluated yet; set eval_every, and hold units '
      'out when the corpus is prepared'
    )
  return lines


def table(workdir: paths.PathLike) -> str:
  """A Markdown table: a row a step, then the last step by group.

  Losses in nats (id) and squared log2 units (value); nulls stand beside what
  they are to be compared with. No intervals: groups are single units.
  A run that has trained on since its last evaluation is said to. Two lines
  tell of its utilisation and its goodput, where they were written.
  """
  lines = evaluations(workdir)
  whole = metrics.read(workdir)
  rows = [(f'all, step {line["step"]}', line) for line in lines]
  rows += sorted(lines[-1].get('by', {}).items())
  titles = [t for t, key in COLUMNS.items() if key in lines[-1]]
  text = [
    '| | ' + ' | '.join(titles) + ' |',
    '|---' * (len(titles) + 1) + '|',
  ]
  for name, line in rows:
    cells = [_cell(line.get(COLUMNS[title])) for title in titles]
    leaky = ' (leaky)' if line.get('leaky') else ''
    text.append(f'| {name}{leaky} | ' + ' | '.join(cells) + ' |')
  if any(line.get('leaky') for _, line in rows):
    text.append(
      '\nleaky: cells were held out one by one; others of their donor were '
      'trained on'
    )
  # Not the highest: after a restart, events of later steps are left.
  last = next(line['step'] for line in reversed(whole) if 'step' in line)
  if last > lines[-1]['step']:
    run = (workdir_lib.read_config(workdir) or {}).get('run', {})
    total = run.get('optimizer', {}).get('total_steps')
    text.append(
      f'\ntrained to step {last:,}'
      + (f' of {total:,}' if total else '')
      + f'; last evaluated at step {lines[-1]["step"]:,}'
    )
  costs = efficiency(whole)
  return '\n'.join([*text, '', *costs] if costs else text)


def efficiency(lines: Sequence[dict[str, Any]]) -> list[str]:
  """What a run made of its devices and of its time, a line each.

  Args:
    lines: of metrics.jsonl. The utilisation is the median over training lines:
      those in which a program was compiled do not tell of training.
  """
  text = []
  used = [line for line in lines if 'model_flops_utilisation' in line]
  if used:
    padded, real = (
      statistics.median(line[f'{kind}model_flops_utilisation'] for line in used)
      for kind in ('', 'real_')
    )
    starts = [line for line in lines if 'peak_source' in line]
    of = f', of {starts[-1]["peak_source"]}' if starts else ''
    text.append(
      f'utilisation: {padded:.1%} on padded positions, {real:.1%} on real '
      f'tokens (median of {len(used):,} lines{of})'
    )
  account = goodput.account(lines)
  if account is not None:
    text.append(f'goodput: {goodput.describe(account)}')
  return text


def _cell(value: float | int | None) -> str:
  if value is None:
    return ''
  return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'
