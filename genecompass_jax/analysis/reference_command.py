"""`genecompass reference`: embeds a sample of training cells, once a model."""

import argparse
from collections.abc import Callable

from genecompass_jax import errors
from genecompass_jax.analysis import embed_command
from genecompass_jax.prepare import flags, readers


def add_arguments(
  parser: argparse.ArgumentParser,
) -> Callable[[argparse.Namespace], None]:
  """Adds the flags; returns what runs the command."""
  parser.epilog = (
    'Writes reference.npz beside the model. From then on `embed` gives every '
    'cell gc_ood: the percentile of its distance to the sample among the '
    "distances of the sample's own cells. docs/embedding.md says more."
  )
  parser.add_argument(
    'cells',
    metavar='CORPUS',
    help='the corpus of the run, of which training cells are taken; or cells '
    'of any format',
  )
  parser.add_argument(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='workdir, checkpoints/STEP folder or exported model',
  )
  parser.add_argument(
    '--cells',
    dest='num_cells',
    type=int,
    default=2048,
    help='in the sample; 100 or more',
  )
  parser.add_argument(
    '--batch-size',
    '--batch_size',
    type=int,
    default=32,
    help='cells that run together; changes the speed, not the result',
  )
  flags.add_cell_flags(parser)
  readers.add_arguments(parser)
  return _run


def _run(args: argparse.Namespace) -> None:
  import numpy as np

  from genecompass_jax import pretrained, progress
  from genecompass_jax.analysis import (
    embeddings,
    placed_model,
    reference_sample,
  )
  from genecompass_jax.training import compiles

  if args.num_cells < reference_sample.LEAST:
    raise errors.UserError(
      f'--cells {args.num_cells}: give {reference_sample.LEAST} or more'
    )
  compiles.keep_programs(small_too=True)
  model = pretrained.load(args.checkpoint)
  name, chunks, number = reference_sample.training_cells(
    args.cells, model, args.num_cells, embed_command.reading(args)
  )
  place_of = {
    index: place
    for place, index in enumerate(
      np.concatenate([chunk.index_C for chunk in chunks]).tolist()
    )
  }
  placed = placed_model.place(model)
  poolings = embeddings.POOLINGS if model.config.use_cls else ('mean',)
  samples = {}
  with progress.Progress(number * len(poolings), 'cells', 'embedding') as bar:
    for pooling in poolings:
      states = embeddings.StateConfig(pooling, batch_size=args.batch_size)
      states.check(model)
      sample_RD = np.zeros((number, model.config.width), np.float32)
      for index_B, embeddings_BD in embeddings.pooled(placed, chunks, states):
        sample_RD[[place_of[i] for i in index_B.tolist()]] = embeddings_BD
        bar.update(len(index_B))
      samples[pooling] = sample_RD
  print(f'{reference_sample.save(model, name, samples)}: {name}')
