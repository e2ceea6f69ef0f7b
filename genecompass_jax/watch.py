"""`genecompass watch`: how runs are doing, in a terminal, while they train.

It reads metrics.jsonl and config.json, nothing else, from a folder or a URL, and
needs no JAX.
"""

import itertools
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from genecompass_jax import (
  goodput,
  metrics,
  paths,
  progress,
  tail as tail_lib,
  text_plot,
)

SECONDS_BETWEEN_FRAMES = 2.0
# A run is silent when nothing came for so many times the usual gap between
# lines, and at least so long; before the first line it may compile.
GAPS_OF_SILENCE = 10
LEAST_SILENCE_S = 60.0
SILENCE_AT_START_S = 900.0
RECENT = 20  # lines that rates and the time left are judged by
EVENTS = 4
_BEGIN = ('start', 'resume')
_NOT_FINITE = 'not_finite'

Line = Mapping[str, Any]


def watch(
  folders: Sequence[paths.PathLike], *, once: bool = False, every: float = 0.0
) -> None:
  """Shows runs until Ctrl-C; once where the output is no terminal.

  Args:
    folders: workdirs, local or URLs.
    once: print the present state and return.
    every: seconds between looks; 0 takes `SECONDS_BETWEEN_FRAMES`.

  Raises:
    UserError: a folder is not there.
    RetryableError: a store does not answer, and this is to be shown once.
  """
  tails = [tail_lib.Tail(folder) for folder in folders]
  if once or not sys.stdout.isatty():
    for tail in tails:
      tail.read(once=True)
    print('\n'.join(_frame(tails, shutil.get_terminal_size().columns)))
    return
  try:
    while True:
      for tail in tails:
        tail.read()
      size = shutil.get_terminal_size()
      lines = _frame(tails, size.columns)
      if len(lines) >= size.lines:
        hidden = len(lines) - size.lines + 2
        lines = [*lines[: size.lines - 2], f'... {hidden} lines more']
      # From the top, each line cleared behind its end: nothing flickers.
      text = '\x1b[K\n'.join(line[: size.columns] for line in lines)
      sys.stdout.write(f'\x1b[H{text}\x1b[K\n\x1b[J')
      sys.stdout.flush()
      time.sleep(every or SECONDS_BETWEEN_FRAMES)
  except KeyboardInterrupt:
    sys.stdout.write('\n')  # the last state stays


def _frame(tails: Sequence[tail_lib.Tail], width: int) -> list[str]:
  """All runs below each other."""
  height = {1: 10, 2: 6}.get(len(tails), 0)
  lines = []
  for tail in tails:
    if lines:
      lines.append('')
    lines += describe(
      tail.folder,
      tail.lines,
      tail.total,
      now=time.time(),
      width=width,
      height=height,
    )
    if tail.problem:
      lines.append(f'  not up to date: {tail.problem}')
  return lines


def describe(
  name: str,
  lines: Sequence[Line],
  total: int | None,
  *,
  now: float,
  width: int = 80,
  height: int = 10,
) -> list[str]:
  """The state of a run in lines of text.

  Args:
    name: what to call it.
    lines: of its metrics.jsonl.
    total: steps of the run, where known.
    now: Unix seconds.
    width: columns to use.
    height: rows of the loss curves; 0 for none.
  """
  if not lines:
    return [f'{name}: nothing written yet']
  training = [line for line in lines if _is_training(line)]
  held_out = [line for line in lines if 'eval_loss' in line]
  # Not the highest: after a restart, events of later steps are left.
  step = next((x['step'] for x in reversed(lines) if 'step' in x), 0)
  head = f'{name}: step {step:,}'
  if total:
    head += f' of {total:,} ({step / total:.0%})'
  text = [head, f'  {_state(lines, now)}']
  left = _time_left(lines, training, step, total)
  if left is not None:
    text[0] += f', {progress.duration(left)} left'
  if height and training:
    text += ['', *_curves(training, held_out, width, height), '']
  plots, text = text, []
  text += _losses(training, held_out)
  text += _rates(training, lines)
  account = goodput.account(lines)
  if account is not None:
    text.append(f'  goodput      {goodput.describe(account)}')
  events = [
    line for line in lines if line.get('event', goodput.EVENT) != goodput.EVENT
  ]
  for title, line in zip(
    ['events', *[''] * EVENTS], events[: -EVENTS - 1 : -1]
  ):
    text.append(f'  {title:12} {_event(line, now)}')
  wrapped = [
    textwrap.wrap(line, max(width, 40), subsequent_indent=' ' * 15)
    for line in text
  ]
  return [*plots, *itertools.chain.from_iterable(wrapped)]


def _is_training(line: Line) -> bool:
  return 'loss' in line and 'event' not in line


def _has_trained(line: Line) -> bool:
  return _is_training(line) or line.get('event') == _NOT_FINITE


def _state(lines: Sequence[Line], now: float) -> str:
  """Whether it runs, has ended, or has fallen silent."""
  told = [line for line in lines if line.get('event') != goodput.EVENT]
  last = told[-1].get('event', '') if told else ''
  times = [line['time'] for line in lines if 'time' in line]
  if not times:
    return 'written by an earlier version: lines have no time'
  age = max(now - times[-1], 0.0)
  ago = f'last line {progress.duration(age)} ago'
  ends = {
    'done': 'done',
    'stopped': 'stopped; the same command goes on',
    'hung': 'it hung and has ended itself; the same command goes on',
  }
  if last in ends:
    return f'{ends[last]}; {ago}'
  begin = max(
    (i for i, line in enumerate(lines) if line.get('event') in _BEGIN),
    default=0,
  )
  if not any(map(_has_trained, lines[begin:])):
    if age > SILENCE_AT_START_S:
      return f'SILENT since it started, {progress.duration(age)} ago'
    return f'starting: compiling, or evaluating; {ago}'
  times = [line['time'] for line in lines[begin:] if 'time' in line][-RECENT:]
  gaps = [after - before for before, after in itertools.pairwise(times)]
  usual = statistics.median(gaps) if gaps else 0.0
  if age > max(LEAST_SILENCE_S, GAPS_OF_SILENCE * usual):
    return (
      f'SILENT: nothing written for {progress.duration(age)}, where a line '
      f'came every {progress.duration(usual)}: it may be dead'
    )
  if last == _NOT_FINITE:  # the guard leaves the batch out and goes on
    return f'running, the last batch was not finite and is left out; {ago}'
  return f'running; {ago}'


def _time_left(lines, training, step: int, total: int | None) -> float | None:
  """Seconds, by the pace of the last lines, evaluations included."""
  if not total or step >= total:
    return None
  starts = [
    line['time']
    for line in lines
    if line.get('event') in _BEGIN and 'time' in line
  ]
  since = starts[-1] if starts else 0.0
  recent = [
    line for line in training[-RECENT:] if line.get('time', -1.0) >= since
  ]
  if len(recent) < 2:
    return None
  steps = recent[-1]['step'] - recent[0]['step']
  seconds = recent[-1]['time'] - recent[0]['time']
  if steps <= 0 or seconds < 0:  # the clock was put back
    return None
  return (total - step) * seconds / steps


def _curves(training, held_out, width: int, height: int) -> list[str]:
  """Id and value loss side by side."""
  keys = ['id_loss', 'value_loss']
  if all(line.get('value_loss', 0.0) == 0.0 for line in training):
    keys = ['id_loss']  # the model predicts no values
  each = max((width - 2 * len(keys)) // len(keys), 20)
  panels = []
  for key in keys:
    null = _strongest(held_out, key)
    panel = text_plot.plot(
      {
        '.': [(line['step'], line[key]) for line in training if key in line],
        'o': [
          (line['step'], line[f'eval_{key}'])
          for line in held_out
          if f'eval_{key}' in line
        ],
      },
      {} if null is None else {'-': null[1]},
      width=each,
      height=height,
      is_log=key == 'value_loss',  # squares: they fall by powers
    )
    title = key.replace('_', ' ')
    title += ' (log scale)' * (key == 'value_loss')
    panels.append(
      [f'{"":{text_plot.LABEL_WIDTH + 1}}{title}'.ljust(each), *panel]
    )
  return [('  '.join(parts)).rstrip() for parts in zip(*panels)] + [
    '        . training   o held out   - strongest null'
  ]


def _strongest(held_out, key: str) -> tuple[str, float] | None:
  if not held_out:
    return None
  return metrics.strongest_null(held_out[-1], f'null_{key.split("_")[0]}_')


def _losses(training, held_out) -> list[str]:
  """The last losses, beside what they are to be compared with."""
  found = []
  for key in ('id_loss', 'value_loss'):
    parts = []
    if training:
      parts.append(f'{training[-1].get(key, 0.0):.4f} training')
    if held_out and f'eval_{key}' in held_out[-1]:
      line = held_out[-1]
      parts.append(
        f'{line[f"eval_{key}"]:.4f} held out at step {line["step"]:,}'
      )
      null = _strongest(held_out, key)
      if null is not None:
        parts.append(f'{null[1]:.4f} strongest null ({null[0]})')
    if parts:
      found.append(f'  {key.replace("_", " "):12} {", ".join(parts)}')
  return found


def _rates(training, lines) -> list[str]:
  """Speed, utilisation, waiting, memory: medians of the last lines."""

  def recent(key: str) -> float | None:
    values = [line[key] for line in training[-RECENT:] if key in line]
    return statistics.median(values) if values else None

  starts = [line for line in lines if line.get('event') in _BEGIN]
  facts = starts[-1] if starts else {}
  text = []
  cells = recent('cells_per_s')
  if cells is not None:
    parts = [f'{amount(cells)} cells/s']
    for key, what in (('real_tokens_per_s', 'real'),
                      ('padded_tokens_per_s', 'padded')):  # fmt: skip
      if recent(key) is not None:
        parts.append(f'{amount(recent(key))} {what} tokens/s')
    text.append(f'  speed        {", ".join(parts)}')
  padded = recent('model_flops_utilisation')
  if padded is not None:
    real = recent('real_model_flops_utilisation')
    text.append(
      f'  utilisation  {padded:.1%} padded, {real:.1%} real; of '
      f'{facts.get("peak_source", "an unknown peak")}'
    )
  parts = []
  if recent('data_wait_share') is not None:
    parts.append(f'{recent("data_wait_share"):.1%} waiting for data')
  last = training[-1] if training else {}
  if 'memory_peak_bytes' in last:
    memory = last['memory_peak_bytes'] / 2**30
    parts.append(f'{memory:.2f} GiB ({facts.get("memory_source", "peak")})')
  if 'compiles' in last:
    parts.append(
      f'{last["compiles"]} programs compiled in '
      f'{progress.duration(last.get("compile_s", 0.0))}'
    )
  if parts:
    text.append(f'  machine      {", ".join(parts)}')
  return text


def _event(line: Line, now: float) -> str:
  """An event in words: how long ago, its name, what it says."""
  hidden = ('event', 'time', 'began', 'run_id', 'last_time', 'last_step')
  facts = (
    *('devices', 'processes', 'device_kind', 'peak_flops', 'peak_source'),
    'memory_source',
  )
  said = ', '.join(
    f'{key} {value}' for key, value in line.items() if key not in hidden + facts
  )
  ago = ''
  if 'time' in line:
    ago = f'{progress.duration(max(now - line["time"], 0.0))} ago: '
  return f'{ago}{line["event"]}' + (f' ({said})' if said else '')


def amount(value: float) -> str:
  """A number with three digits and a unit: 1.23 M."""
  for size, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e4, ' k')):
    if value >= size:
      return f'{value / (1e3 if unit == " k" else size):.3g}{unit}'
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
