"""`genecompass convert`: flags, and what they call."""

import argparse
import os
from collections.abc import Callable

from genecompass_jax import errors

Runner = Callable[[argparse.Namespace], int | None]


def add_arguments(parser: argparse.ArgumentParser) -> Runner:
  """Adds the kinds of conversion; returns what runs the chosen one."""
  kinds = parser.add_subparsers(title='kinds', metavar='KIND', required=True)
  for name, help_text, description, fill in (
    (
      'pytorch',
      'weights of the original -> a model',
      'Converts weights of the original under its own names: '
      'pytorch_model.bin, safetensors, npz, or a folder of Hugging Face.',
      _add_pytorch,
    ),
    (
      'export',
      'a model -> weights of the original',
      "Writes a model's weights under the original's names, with all that the "
      "original's state dict lists, its config and a model card beside.",
      _add_export,
    ),
    (
      'params',
      'a run -> a self-contained model',
      'Writes the parameters of a run, or of one of its steps, with all that is '
      'needed to use them; it loads on any device.',
      _add_params,
    ),
    (
      'stablehlo',
      'a model -> its encoder as a program',
      'Writes the encoder as a StableHLO program, parameters included, which '
      'jax.export runs without this package.',
      _add_stablehlo,
    ),
  ):
    kind = kinds.add_parser(name, help=help_text, description=description)
    kind.set_defaults(convert=fill(kind))
  return lambda args: args.convert(args)


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
  parser.add_argument(
    '-o', '--output', required=True, metavar=what, help=f'{what} to write'
  )


def _add_model(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'model',
    metavar='DIR',
    help='workdir, checkpoints/STEP folder or exported model',
  )


def _add_pytorch(parser: argparse.ArgumentParser) -> Runner:
  parser.add_argument(
    'source',
    metavar='WEIGHTS',
    help='pytorch_model.bin, safetensors or npz, or a folder with one of them, '
    'also in parts with an index',
  )
  _add_output(parser, 'DIR')
  parser.add_argument(
    '--config',
    metavar='CONFIG.json',
    help='configuration in the keys of the original (heads, use_*, warm-up); '
    'without it, config.json beside the weights',
  )
  parser.add_argument(
    '--key-prefix',
    '--key_prefix',
    default='',
    metavar='PREFIX',
    help='read names that begin so, and take it off',
  )
  parser.add_argument(
    '--leave-out',
    '--leave_out',
    action='append',
    default=[],
    metavar='NAME',
    help='leave tensors out whose names begin so; others that the original does '
    'not have are refused; may be given again',
  )
  parser.add_argument(
    '--tokens',
    default='',
    metavar='FILE',
    help="the release's dictionary human_mouse_tokens.pickle, or json: gene id "
    '-> token; without it the model takes tokens, not counts',
  )
  parser.add_argument(
    '--orthologues',
    default='',
    metavar='FILE',
    help="the release's homologous_hm_token.pickle, or json: mouse token -> "
    'human token',
  )
  parser.add_argument(
    '--medians',
    action='extend',
    nargs='+',
    default=[],
    metavar='FILE',
    help="the release's medians of human and of mouse genes (pickle, json, "
    'tsv), or medians.tsv of a model, medians_released.tsv.gz of a corpus',
  )
  parser.add_argument(
    '--vocabulary',
    default='',
    metavar='FILE',
    help='vocabulary.tsv.gz of a corpus or a model, in place of --tokens',
  )
  return _pytorch


def _pytorch(args: argparse.Namespace) -> None:
  from genecompass_jax import paths, pretrained, tensor_files
  from genecompass_jax.convert import genes, original

  _check_folder(args.output)
  files = genes.GeneFiles(
    vocabulary=args.vocabulary,
    tokens=args.tokens,
    orthologues=args.orthologues,
    medians=args.medians,
  )
  config, params, assets, unused = original.read_original(
    args.source, args.config, args.key_prefix, args.leave_out
  )
  assets, notes = genes.with_genes(assets, config, files)
  weights = {
    os.path.basename(file): paths.sha256_file(file)
    for file in tensor_files.files(args.source)
  }
  model = pretrained.PretrainedModel(
    config, params, assets, provenance={'weights': weights}
  )
  pretrained.export(model, args.output)
  _print_parameters(args.output, model)
  for note in notes:
    print(f'  {note}')
  if unused:
    print(f'  not part of this model, left out: {", ".join(unused)}')


def _check_folder(folder: str) -> None:
  """Refuses a folder to which no model can be written, before any work."""
  from genecompass_jax import paths

  paths.check_writable(folder)
  is_file = not paths.is_url(folder) and os.path.isfile(folder)
  if not folder or is_file or paths.listdir(folder):
    what = 'is a file' if is_file else 'is not empty'
    raise errors.UserError(f'{folder!r} {what}; give a new folder with -o')


def _print_parameters(folder: str, model) -> None:
  from genecompass_jax import model as model_lib

  counts = model_lib.count_parameters(model.config)
  print(f'{folder}: {counts.pop("total"):,} parameters')
  for group, number in counts.items():
    print(f'  {number:>12,} {group}')


def _add_export(parser: argparse.ArgumentParser) -> Runner:
  _add_model(parser)
  _add_output(parser, 'WEIGHTS')
  return _export


def _export(args: argparse.Namespace) -> None:
  from genecompass_jax import pretrained
  from genecompass_jax.convert import export

  model = pretrained.load(args.model)
  written = export.write(model, args.output)
  print(f'{written[0]}: {model.config.vocabulary_size:,} tokens')
  for name in written[1:]:
    print(f'  {os.path.basename(name)}')


def _add_params(parser: argparse.ArgumentParser) -> Runner:
  _add_model(parser)
  _add_output(parser, 'DIR')
  parser.add_argument(
    '--step',
    type=int,
    default=None,
    help='of a workdir; without it the latest that is whole',
  )
  return _params


def _params(args: argparse.Namespace) -> None:
  from genecompass_jax import paths, pretrained, workdir

  _check_folder(args.output)
  source = args.model
  if args.step is not None:
    source = paths.join(source, workdir.CHECKPOINTS, str(args.step))
  model = pretrained.load(source)
  if args.step not in (None, model.step):
    raise errors.UserError(
      f'{args.model}: an exported model, of step {model.step}; --step is of a '
      'workdir'
    )
  pretrained.export(model, args.output)
  _print_parameters(args.output, model)


def _add_stablehlo(parser: argparse.ArgumentParser) -> Runner:
  _add_model(parser)
  _add_output(parser, 'FILE')
  parser.add_argument(
    '--slots',
    type=int,
    default=0,
    help='of a row: the species slot and the genes of a cell; 0 takes the most '
    'that the model has',
  )
  parser.add_argument(
    '--platforms',
    default='cpu,tpu,cuda',
    metavar='NAMES',
    help='that the program can run on',
  )
  return _stablehlo


def _stablehlo(args: argparse.Namespace) -> None:
  from genecompass_jax import pretrained
  from genecompass_jax.convert import stablehlo

  model = pretrained.load(args.model)
  slots = args.slots or model.config.max_genes + 1
  written = stablehlo.write(
    model, args.output, slots, args.platforms.split(',')
  )
  print(f'{written[0]}: rows of {slots:,} slots, on {args.platforms}')
  for name in written[1:]:
    print(f'  {os.path.basename(name)}')
