"""`genecompass plan`: does a run fit a machine, and what will it cost?"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from genecompass_jax import errors, paths

# Reads '--config=FILE.py[:variant]' and its overrides.
ConfigReader = Callable[[list[str]], dict[str, Any]]
RELEASED_TOKENS = 50_558  # of the published vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of the command."""
  parser.add_argument(
    '--config',
    action='append',
    required=True,
    metavar='FILE.py[:variant]',
    help='configuration of a run; several times for several. '
    '--config.KEY=VALUE changes a field of all, as in a run',
  )
  parser.add_argument(
    '--topology',
    action='append',
    required=True,
    metavar='CHIP:SHAPE[,...]',
    help='machines: v5e:16x16, v4:4x4x8, 2xv5p:4x4x4 (two slices), h100:8, '
    'here; several by commas',
  )
  parser.add_argument(
    '--set', action='append', default=[], help=argparse.SUPPRESS
  )
  parser.add_argument(
    '--rows',
    type=int,
    default=0,
    help='rows of a device (of a group that shares rows); 0: as the '
    'configuration says',
  )
  parser.add_argument(
    '--cells',
    type=float,
    default=100e6,
    help='cells of the corpus, for the days of one pass',
  )
  parser.add_argument(
    '--mean-genes',
    type=float,
    default=1200,
    help='genes of an average cell: how many cells a packed row holds',
  )
  parser.add_argument(
    '--utilisation',
    type=float,
    default=0.4,
    help='share of the peak that goes into the model: an assumption',
  )
  parser.add_argument(
    '--price', type=float, help='of a chip for an hour, in any currency'
  )
  parser.add_argument(
    '--time-limit',
    type=float,
    default=600,
    metavar='SECONDS',
    help='of one compilation',
  )
  parser.add_argument(
    '--search',
    type=int,
    default=3,
    metavar='N',
    help='compilations to find the largest batch with; 0: none',
  )
  parser.add_argument(
    '--vocabulary-size',
    type=int,
    default=RELEASED_TOKENS,
    help='tokens, where the configuration names no corpus',
  )
  parser.add_argument(
    '--num-priors',
    type=int,
    default=4,
    help='prior tables, where the configuration names none',
  )
  parser.add_argument(
    '--prior-width', type=int, default=768, help='their columns'
  )
  parser.add_argument('--json', metavar='FILE', help='also write all figures')
  parser.add_argument(
    '-o', '--output', metavar='FILE.png', help='also draw a picture'
  )


def run(args: argparse.Namespace, read_config: ConfigReader) -> int:
  """Plans every configuration on every machine, and prints a table.

  Args:
    args: of `add_arguments`.
    read_config: see `ConfigReader`.

  Returns:
    0, also where a row does not fit: that is what was asked.

  Raises:
    UserError: an option or a configuration is wrong.
  """
  _check(args)
  import jax

  # This process only does arithmetic; devices belong to the workers.
  jax.config.update('jax_platforms', 'cpu')
  from genecompass_jax.scaling import plan, plan_table, topologies

  texts = [t for texts in args.topology for t in texts.split(',') if t.strip()]
  machines = [topologies.parse(text) for text in texts]
  if any(machine.is_tpu for machine in machines):
    topologies.check_libtpu()
  if any(machine.is_described_gpu for machine in machines):
    topologies.has_cuda()
  question = plan.Question(
    cells=int(args.cells),
    mean_genes=args.mean_genes,
    utilisation=args.utilisation,
    price=args.price,
    time_limit=args.time_limit,
    search=args.search,
    rows=args.rows,
  )
  configs = []
  for text in args.config:
    values = read_config([f'--config={text}', *args.set])
    configs.append((_name(text), *resolve(values, args, question)))
  rows = []
  for name, config, asked, _ in configs:
    for machine in machines:
      try:
        row = plan.make_row(name, config, machine, asked, _tell)
      except errors.UserError as error:
        if not rows and len(machines) * len(configs) == 1:
          raise
        row = plan.Row(
          config=name,
          topology=machine.text,
          status=plan.REFUSED,
          message=str(error),
        )
      rows.append(row)
  print(plan_table.table(rows, question))
  for name, _, _, told in configs:
    print(f'{name}: {told}')
  if args.json:
    paths.write_text(args.json, json.dumps(as_json(rows, question), indent=1))
  if args.output:
    from genecompass_jax.scaling import plan_figure

    plan_figure.draw(rows, question, args.output)
  return errors.EXIT_OK


def as_json(rows, question) -> dict[str, Any]:
  """Rows and question as plain values."""
  import jax

  return {
    'question': dataclasses.asdict(question),
    'jax': jax.__version__,
    'rows': [dataclasses.asdict(row) for row in rows],
  }


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _check(args: argparse.Namespace) -> None:
  for name, (low, high) in _RANGES.items():
    if not low <= getattr(args, name) <= high:
      flag = name.replace('_', '-')
      bound = f'at least {low}'
      if getattr(args, name) > high:
        bound = f'at most {high:,.0f}'
      raise errors.UserError(f'--{flag}={getattr(args, name)} must be {bound}')
  if not 0 < args.utilisation <= 1:
    raise errors.UserError(
      f'--utilisation={args.utilisation} is a share: give one above 0, up to 1'
    )
  if args.price is not None and not 0 <= args.price < math.inf:
    raise errors.UserError(f'--price={args.price} must be a number from 0 on')
  # Before hours of compiling, not behind them.
  if not any(text.strip(' ,') for text in args.topology):
    raise errors.UserError('--topology is empty; give such as v5e:16x16')
  for flag, place in (('--json', args.json), ('-o', args.output)):
    if place is not None:
      _check_place(flag, place)


def _check_place(flag: str, place: str) -> None:
  """Refuses a file that cannot be written; makes the folder for it."""
  is_picture = flag == '-o'
  paths.check_writable(place)
  if paths.is_url(place) and not is_picture:
    return
  if is_picture and paths.is_url(place):
    raise errors.UserError(f'-o {place}: give a file of this machine')
  if not place or os.path.isdir(place):
    raise errors.UserError(
      f'{flag} {place!r} is no name of a file; give such as '
      f'{os.path.join(place, "plan.png" if is_picture else "plan.json")}'
    )
  ending = os.path.splitext(place)[1]
  if is_picture and ending not in ('.png', '.svg', '.pdf'):
    raise errors.UserError(
      f'-o {place}: give a name ending in .png, .svg or .pdf'
    )
  folder = os.path.dirname(os.path.abspath(place))
  os.makedirs(folder, exist_ok=True)
  if not os.access(folder, os.W_OK):
    raise errors.UserError(f'{flag} {place}: {folder} cannot be written')


# Least and largest of the options that are numbers. The largest are beyond any
# machine; what is larger still overflows, or takes a day to count.
_RANGES = {
  'cells': (1, 1e15),
  'mean_genes': (1, 1e9),
  'time_limit': (1, 1e7),
  'search': (0, 100),
  'rows': (0, 10**9),
  'num_priors': (0, 100),
  'prior_width': (1, 10**7),
  'vocabulary_size': (3, 10**9),
}


def _name(text: str) -> str:
  """FILE:variant without folders and ending."""
  file, _, variant = text.partition(':')
  stem = os.path.basename(file).removesuffix('.py')
  return f'{stem}:{variant}' if variant else stem


def resolve(values: Mapping[str, Any], args: argparse.Namespace, question):
  """A configuration with what a corpus would decide, and where that is from.

  Args:
    values: as a configuration file gives them.
    args: of the command.
    question: what is asked.

  Returns:
    The TrainConfig, the question (with the rows of its prior tables), and a
    sentence that says where vocabulary and priors are from.
  """
  from genecompass_jax import (
    config_values,
    corpus as corpus_lib,
    data,
    train,
  )
  from genecompass_jax.training import train_config

  values = dict(values)
  values.pop('simulated_cells', None)
  corpus = values.get('corpus') or ''
  known = corpus not in ('', 'simulated', 'independent')
  if not known:
    values['corpus'] = 'none'
  config = config_values.to_dataclass(train_config.TrainConfig, values)
  if known:
    config, assets = train.resolve_config(
      config, corpus_lib.Corpus.open(corpus)
    )
    rows = len(assets.vocabulary.genes.gene_ids) + 2
    question = dataclasses.replace(question, prior_rows=rows)
    widths = [f'{name} ({width})' for name, width in config.model.priors]
    told = (
      f'{config.model.vocabulary_size:,} tokens of {corpus}, priors: '
      f'{", ".join(widths) or "none"}'
    )
    return config, question, told
  names = [name for name, _ in config.priors] or [
    f'prior{i + 1}' for i in range(args.num_priors)
  ]
  model = dataclasses.replace(
    config.model,
    vocabulary_size=args.vocabulary_size,
    priors=tuple((name, args.prior_width) for name in names),
    hides_ranks=config.data.mask.splits,
  )
  batches = config.data
  if not batches.buckets:
    default = data.DataConfig().buckets
    longest = -(-(config.encoding.max_genes + 1) // 128) * 128
    fitting = tuple(b for b in default if b < longest)
    batches = dataclasses.replace(batches, buckets=(*fitting[:5], longest))
  config = dataclasses.replace(config, model=model, data=batches, priors=())
  told = (
    f'no corpus: {args.vocabulary_size:,} tokens, {len(names)} priors of '
    f'{args.prior_width} columns (--vocabulary-size, --num-priors, '
    '--prior-width)'
  )
  return config, question, told
