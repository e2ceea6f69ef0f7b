"""The plans of docs/plans.md: what fits which pod, compiled, not run.

  python experiments/benchmarks/plans.py --docs=docs/plans.md [--only=WORD]

Compiles one training step a row with `genecompass plan` and puts the tables
between the marks of the page, with its date and versions. Rows are kept in a
JSON file beside the page: `--only` makes those again whose name holds the word,
`--missing` those that are not there. Takes 2 to 10 minutes a row on two cores;
needs the extras `plan` and `plan-gpu`.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

from genecompass_jax.scaling import (
  plan as plan_lib,
  plan_figure,
  plan_table,
  topologies,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
BEGIN, END = '<!-- plans: begin -->', '<!-- plans: end -->'
# Rows of 2,048 slots, one full cell, as in the prototypes.
SHORT = ('--config.encoding.max_genes=2047', '--config.data.slots=2048')
BASE = 'experiments/base.py'
SCALE = 'experiments/scale.py'
# Name -> config, machine, rows of a device, flags, GiB of the prototype: a
# plain training step with splash attention, 384 predictions a row and no
# dropout, compiled with an earlier libtpu.
ROWS = {
  'base v5e none': (BASE, 'v5e:16x16', 8, (*SHORT, '--config.model.remat=none'),
                    14.1),
  'base v5e attention': (BASE, 'v5e:16x16', 16, SHORT, 5.3),
  'base v5e full': (BASE, 'v5e:16x16', 32,
                    (*SHORT, '--config.model.remat=full'), 6.9),
  'base v4 attention': (BASE, 'v4:4x4x8', 16, SHORT, 5.3),
  'base v6e none': (BASE, 'v6e:16x16', 16,
                    (*SHORT, '--config.model.remat=none'), 27.1),
  'base v5p none': (BASE, 'v5p:4x4x8', 32,
                    (*SHORT, '--config.model.remat=none'), 51.9),
  'base h100 attention': (BASE, 'h100:8', 0, (), None),
  'base h200 none': (BASE, 'h200:8', 0, ('--config.model.remat=none',), None),
  '300m v5e': (f'{SCALE}:300m', 'v5e:16x16', 0, (), None),
  '1b v5e': (f'{SCALE}:1b', 'v5e:16x16', 0, (), None),
  '3b v5p': (f'{SCALE}:3b', 'v5p:4x4x8', 4, (), 16.9),
  '20k v5p': (f'{SCALE}:20k', 'v5p:4x4x8', 1, (), 12.1),
  'base two slices': (BASE, '2xv5e:16x16', 16, SHORT, None),
  '3b v5p tensor': (f'{SCALE}:3b', 'v5p:4x4x8', 8, ('--config.mesh.tensor=2',),
                    None),
}  # fmt: skip

INTRO = """Beside the prototypes of this project's beginning: a plain training step
of the same sizes with splash attention, 384 predictions a row where ours has
416, no dropout, an earlier libtpu; how many slots a device its 3b and 20k rows had
is not recorded. Of ours, the prior tables and the state are 1.8 GiB of every base
row:"""


def plan(name: str, time_limit: float, search: int) -> dict:
  """Runs `genecompass plan` for one row; its JSON."""
  config, machine, rows, flags, _ = ROWS[name]
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'row.json'
    command = [sys.executable, '-m', 'genecompass_jax.cli', 'plan']
    command += [f'--config={config}', *flags, f'--topology={machine}']
    command += [f'--rows={rows}', f'--time-limit={time_limit}']
    command += [f'--search={search}', f'--json={out}']
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def versions() -> str:
  """What the rows were compiled with."""
  found = [f'Python {platform.python_version()}']
  apart = os.environ.get(topologies.LIBTPU)
  places = [str(pathlib.Path(apart).parents[1])] if apart else []
  places += [p for p in (os.environ.get(topologies.CUDA),) if p]
  for package in ('jax', 'jaxlib', 'libtpu', 'jax-cuda12-plugin'):
    known = importlib.metadata.distributions(
      name=package, path=[*places, *sys.path]
    )
    found += [f'{package} {d.version}' for d in list(known)[:1]]
  return ', '.join(found)


def page(kept: dict, picture: pathlib.Path) -> str:
  """The tables, in the order of ROWS; draws the picture."""

  rows, lines = [], []
  question = None
  for name, (*_, before) in ROWS.items():
    if name not in kept:
      continue
    found = kept[name]
    values = dict(found['rows'][0])
    values['notes'] = tuple(values['notes'])
    row = plan_lib.Row(**values)
    question = plan_lib.Question(**found['question'])
    rows.append(row)
    total = row.memory.get('total')
    ours = '' if total is None else f'{total / plan_lib.GIB:.1f}'
    if before is not None:
      lines.append(
        f'| {row.config} | {row.topology} | {row.remat} | '
        f'{row.device_slots:,} | {before} | {ours} | {row.status} |'
      )
  text = plan_table.table(rows, question)
  beside = [
    '| config | machine | recomputed | slots a device | GiB, prototype | GiB, ours '
    '| |',
    '|---' * 7 + '|',
    *lines,
  ]
  dates = sorted({kept[name]['made'] for name in kept})
  made_with = dict.fromkeys(
    part for name in kept for part in kept[name]['versions'].split(', ')
  )
  made = f'Made {dates[-1]}; {", ".join(made_with)}.'
  plan_figure.draw(rows, question, str(picture))
  shown = f'![Memory and assumed times of the plans]({picture.name})'
  return '\n'.join((made, '', text, '', shown, '', INTRO, '', *beside))


def main() -> None:
  """Compiles what is asked, and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--docs', type=pathlib.Path, required=True)
  parser.add_argument('--only', default='', help='rows whose name holds this')
  parser.add_argument('--missing', action='store_true')
  parser.add_argument('--render', action='store_true', help='compile nothing')
  parser.add_argument('--time-limit', type=float, default=1800)
  parser.add_argument('--search', type=int, default=0)
  args = parser.parse_args()
  store = args.docs.with_suffix('.json')
  kept = json.loads(store.read_text()) if store.exists() else {}
  for name in ROWS:
    if args.render or args.only not in name:
      continue
    if args.missing and name in kept:
      continue
    found = plan(name, args.time_limit, args.search)
    found['made'] = datetime.date.today().isoformat()
    found['versions'] = versions()
    kept[name] = found
    store.write_text(json.dumps(kept, indent=1) + '\n')
    print(name, found['rows'][0]['status'], found['rows'][0]['memory'])
  text = args.docs.read_text()
  before, _, rest = text.partition(BEGIN)
  _, _, after = rest.partition(END)
  args.docs.write_text(
    f'{before}{BEGIN}\n{page(kept, args.docs.with_suffix(".png"))}\n{END}{after}'
  )


if __name__ == '__main__':
  main()
