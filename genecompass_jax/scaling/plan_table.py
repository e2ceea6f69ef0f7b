"""Plans as text: a Markdown table that can be read in a terminal."""

import math
from collections.abc import Sequence

from genecompass_jax.scaling import plan

_SHORT = {
  'all-reduce': 'reduce',
  'all-gather': 'gather',
  'reduce-scatter': 'scatter',
  'all-to-all': 'all-to-all',
  'collective-permute': 'permute',
}


def size(number: float) -> str:
  """Bytes in the unit that reads best."""
  for unit, scale in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
    if number >= scale:
      return f'{_figures(number / scale)} {unit}'
  return f'{number:.0f} B'


def _figures(number: float) -> str:
  """A number with three figures, without an exponent."""
  if number == 0:
    return '0'
  if abs(number) < 1e-3:
    return f'{number:.2g}'
  digits = max(0, 2 - math.floor(math.log10(abs(number))))
  return f'{round(number, digits):,.{min(digits, 3)}f}'


def _mesh(row: plan.Row) -> str:
  if row.status == plan.REFUSED:
    return ''
  return ' x '.join(f'{a} {n}' for a, n in row.mesh.items()) or 'one device'


def _memory(row: plan.Row) -> str:
  if not row.memory:
    return ''
  used = row.memory['total'] / plan.GIB
  used = f'{used:.1f}' if used >= 1 else _figures(used)
  if row.limit is None:
    return used
  return f'{used} of {row.limit / plan.GIB:.4g}'


def _largest(row: plan.Row) -> str:
  return '' if row.largest is None else str(row.largest or 'none')


def _traffic(row: plan.Row) -> str:
  if row.traffic is None:
    return '' if row.status != plan.FITS else 'unknown'
  parts = [
    f'{_SHORT[t["kind"]]} {size(t["bytes"])}' for t in row.traffic if t['bytes']
  ]
  return ', '.join(parts) or 'none'


def _seconds(seconds: float | None) -> str:
  return '' if seconds is None else _figures(seconds)


def _status(row: plan.Row) -> str:
  if row.status == plan.TOO_SLOW:
    return row.message
  return row.status


COLUMNS = {
  'config': lambda row: row.config,
  'machine': lambda row: row.topology,
  'mesh': _mesh,
  'recomputed': lambda row: row.remat,
  'rows a device': lambda row: _rows(row),
  'slots a device': lambda row: f'{row.device_slots:,}'
  if row.device_slots else '',
  'status': _status,
  'GiB a device': _memory,
  'most rows': _largest,
  'sent a step': _traffic,
  'PFLOP a step': lambda row: _figures(row.step_flops / 1e15)
  if row.step_flops else '',
  'compiler / hand': lambda row: '' if row.counted is None
  else f'{row.counted:.3f}',
  'network s': lambda row: _seconds(row.network_s),
  's a step *': lambda row: _seconds(row.step_s),
  'cells/s *': lambda row: _seconds(row.cells_per_s),
  'days *': lambda row: _seconds(row.days),
  'cost *': lambda row: '' if row.cost is None else f'{row.cost:,.0f}',
  'compiled in s': lambda row: '' if row.compile_s is None
  else f'{row.compile_s:.0f}',
}  # fmt: skip


def _rows(row: plan.Row) -> str:
  return f'{row.rows / row.devices:.4g}' if row.rows else ''


def table(rows: Sequence[plan.Row], question: plan.Question) -> str:
  """All rows, what was assumed, and what is to be said of some."""
  columns = {
    title: [cell(row) for row in rows] for title, cell in COLUMNS.items()
  }
  columns = {t: cells for t, cells in columns.items() if any(cells)}
  widths = {
    title: max(len(title), *map(len, cells)) for title, cells in columns.items()
  }
  lines = [
    '| ' + ' | '.join(t.ljust(w) for t, w in widths.items()) + ' |',
    '|' + '|'.join('-' * (w + 2) for w in widths.values()) + '|',
  ]
  for i in range(len(rows)):
    cells = [columns[t][i].ljust(w) for t, w in widths.items()]
    lines.append('| ' + ' | '.join(cells) + ' |')
  lines += ['', *legend(question)]
  said = [text for row in rows for text in _remarks(row)]
  return '\n'.join(lines + ([''] + said if said else []))


def legend(question: plan.Question) -> list[str]:
  """What the figures rest on, a sentence a line."""
  price = 'give --price (of a chip for an hour) for the cost'
  if question.price is not None:
    price = f'cost at {question.price:g} a chip and hour'
  return [
    f'* ASSUMED, not measured: {question.utilisation:.0%} of the peak of the '
    f'chips goes into the model; {question.mean_genes:,.0f} genes a cell; days '
    f'for {question.cells:,} cells once; {price}.',
    'GiB a device: what the compiler says (the most that is held at a time, '
    'and the program), of what a program may take. '
    'Sent a step: results of collectives on one device; network s: what that '
    'takes at the least. FLOPs by hand, nothing '
    'counted twice; compiler / hand: a model of one layer, where the compiler '
    'counts element-wise work too.',
  ]


def _remarks(row: plan.Row) -> list[str]:
  """Sentences about a row, each behind its name."""
  texts = [*row.notes]
  if row.status != plan.TOO_SLOW and row.message:
    texts.append(row.message)
  if row.advice:
    texts.append(row.advice)
  return [f'{row.config} on {row.topology}: {text}' for text in texts]
