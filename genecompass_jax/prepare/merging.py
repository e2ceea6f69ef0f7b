"""Several corpora -> one: shuffled anew, without copies, splits as they were."""

import dataclasses
import os
from collections.abc import Sequence

from genecompass_jax import (
  corpus as corpus_lib,
  errors,
  gene_table,
  paths,
  staging,
)
from genecompass_jax.prepare import pipeline, quality, sources


def merge(
  corpora: Sequence[paths.PathLike],
  output: paths.PathLike,
  config: pipeline.PrepareConfig | None = None,
) -> corpus_lib.Corpus:
  """Builds a corpus of the cells of others.

  Every source keeps its name, its labels and its measured genes. Units that
  were held out stay so, and so does whatever shares cells with them; filters
  are not applied again; medians are counted anew.

  Args:
    corpora: folders of finished corpora.
    output: folder or URL of the new one.
    config: seed, medians, engine and the like; splits, filters and vocabulary
      in it play no part. The default one where None.

  Raises:
    UserError: fewer than two corpora, one twice, one that is the output too,
      corpora of different kinds or gene tables, or a unit that is held out for
      two different splits.
  """
  if len(corpora) < 2:
    raise errors.UserError('name two corpora or more to merge')
  opened = [corpus_lib.Corpus.open(path) for path in corpora]
  for each in opened:
    if os.fspath(output) and staging.overlap(each.path, os.fspath(output)):
      raise errors.UserError(
        f'{os.fspath(output)}: the new corpus would replace {each.path}, or '
        'stand in it; name another folder'
      )
  for k, each in enumerate(opened):
    for other in opened[:k]:
      if each.manifest == other.manifest:
        raise errors.UserError(
          f'{each.path} holds the same corpus as {other.path}; give it once'
        )
  config = config or pipeline.PrepareConfig()
  held: dict[str, set[str]] = {'validation_units': set(), 'test_units': set()}
  for each in opened:
    for name, units in held.items():
      units.update(each.manifest['split'][name])
  shares = {each.manifest['split']['validation_share'] for each in opened}
  leaky = any(each.manifest['split']['leaky'] for each in opened)
  config = dataclasses.replace(
    config,
    vocabulary=_vocabulary(opened),
    filters=quality.QualityConfig.off(),
    validation_share=max(shares) if leaky else 0.0,
    validation_units=tuple(sorted(held['validation_units'])),
    test_units=tuple(sorted(held['test_units'])),
  )
  configs = [sources.SourceConfig(path=each.path) for each in opened]
  return pipeline.prepare(configs, output, config)


def _vocabulary(opened: Sequence[corpus_lib.Corpus]) -> str:
  """The vocabulary they have in common, or the genes that any of them has."""
  first = opened[0].vocabulary
  if all(each.vocabulary.sha256 == first.sha256 for each in opened):
    return paths.join(opened[0].path, corpus_lib.VOCABULARY)
  default = gene_table.GeneTable.default()
  for each in opened:
    if not default.row_of.keys() >= set(each.vocabulary.genes.gene_ids):
      raise errors.UserError(
        f'{each.path}: its genes are not all in the default table, and its '
        f'vocabulary is not that of {opened[0].path}; build both with one '
        '--vocabulary FILE'
      )
  return 'measured'
