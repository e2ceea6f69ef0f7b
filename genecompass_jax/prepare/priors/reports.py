"""What a person reads of priors: one after the build, all after a check."""

import argparse
import os
import re
from collections.abc import Mapping

import numpy as np

from genecompass_jax import (
  errors,
  gene_table,
  paths,
  prior_tables,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.prepare.priors import (
  assembly,
  edges,
  names,
  pairs as pairs_lib,
  strata,
  validation,
)

_TRUTH = re.compile(r'(human|mouse):([^:=]+)(?::([^=]+))?=(.+)')
_MOST = 200  # genes of a set whose pairs count for the overlap


def describe(path: str, facts: Mapping) -> str:
  """A prior in a few lines: coverage, norms, and what was lost."""
  shares = ', '.join(
    f'{name} {found["with_vector"]:,} of {found["genes"]:,} genes '
    f'({found["share"]:.1%})'
    for name, found in facts['coverage'].items()
  )
  norm = facts['norms']
  lines = [
    f'{path}: {facts["kind"]}, {facts["width"]} wide; {shares}',
    f'  norm {norm["mean"]:.4g} (sd {norm["sd"]:.3g}, {norm["q0"]:.3g} to '
    f'{norm["q100"]:.3g})',
  ]
  if 'pairs' in facts:
    lines.append(f'  {facts["pairs"]["number"]:,} pairs of genes')
  for source in facts['sources']:
    lines += [f'  {line}' for line in _source(source)]
  kept = facts.get('embedded', {})
  if 'share_of_squares_kept' in kept:
    lines.append(
      f'  the width holds {kept["share_of_squares_kept"]:.0%} of the network; '
      f'{kept["genes_kept_below_a_tenth"]:,} genes are hardly in it'
    )
  if 'share_of_variance_kept' in kept:
    lines.append(
      f'  the width holds {kept["share_of_variance_kept"]:.0%} of the variance '
      f'of {kept["words"]:,} words'
    )
  if 'held_out' in facts:
    genes = facts['held_out']['genes']
    why = {w: sum(g['why'] == w for g in genes) for w in
           ('named', 'paralogue', 'orthologue')}  # fmt: skip
    lines.append(
      f'  held out: {why["named"]:,} genes, {why["paralogue"]:,} paralogues '
      f'and {why["orthologue"]:,} orthologues'
    )
    for key, text in (
      ('without_known_paralogues', 'no paralogues are known of'),
      ('groups_too_large_for_paralogues', 'too large to be paralogues:'),
    ):
      if facts['held_out'][key]:
        lines.append(f'    {text} {", ".join(facts["held_out"][key][:5])}')
  return '\n'.join(lines)


def _source(source: Mapping) -> list[str]:
  lost = []
  for key in ('regulators', 'targets', 'members', 'genes', 'identifiers'):
    found = source.get(key, [])
    for report in found if isinstance(found, list) else [found]:
      if isinstance(report, Mapping) and report.get('inputs'):
        examples = report['examples_lost'] + report['examples_ambiguous']
        text = f'{report["lost"] + report["ambiguous"]:,} of '
        text += f'{report["inputs"]:,} {key} lost'
        lost.append(
          text + (f' ({", ".join(examples[:3])})' if examples else '')
        )
  numbers = [
    f'{value:,} {key.replace("_", " ")}'
    for key, value in source.items()
    if isinstance(value, int) and not isinstance(value, bool)
  ]
  lines = [f'{source["file"]}: ' + ('; '.join(lost) or 'nothing lost')]
  if numbers:
    lines.append('  ' + ', '.join(numbers))
  lines += [
    f'  {matrix["species"]} {matrix["matrix"]}: {matrix["cells"]:,} cells, '
    f'{matrix["genes"]:,} genes, {matrix["pairs_kept"]:,} of '
    f'{matrix["pairs_above_r"]:,} pairs kept'
    for matrix in source.get('matrices', ())
  ]
  return lines


def check(args: argparse.Namespace) -> None:
  """Prints coverage, validation and overlap of priors.

  Raises:
    UserError: a prior or a truth cannot be read.
  """
  if os.path.isdir(args.output):
    raise errors.UserError(f'{args.output} is a folder; name a file with -o')
  vocab = assembly.load_vocabulary(args.vocabulary)
  genes = vocab.genes
  value_G = (
    strata.expression(args.expression, vocab) if args.expression else None
  )
  truths = [_sets(text, vocab) for text in args.sets]
  truths += [_edges(text, vocab) for text in args.edges]
  coverage, scores, own = [], [], {}
  labels = _labels(args.priors)
  for path in args.priors:
    prior, name = prior_tables.read(path), labels[path]
    row_N = np.array([genes.row_of.get(i, -1) for i in prior.gene_ids])
    known = row_N >= 0
    rows_N, vectors_NP = row_N[known], prior.vectors_GP[known]
    if not len(rows_N):
      raise errors.UserError(f'{path}: no gene of it is in the vocabulary')
    coverage += _coverage(name, rows_N, vectors_NP, prior.facts, vocab)
    found = pairs_lib.read(path, prior.facts, genes)
    keys = validation.keys_by_source(found) if found is not None else {}
    label = {k: f'{name}: {k}' if k else name for k in keys}
    if len(keys) == 2:
      keys.pop(next(k for k in keys if k))  # one source: the prior itself
    own |= {label[k]: value for k, value in keys.items()}
    for truth in truths:
      scores += _score(
        name, truth, rows_N, vectors_NP, value_G, genes, keys.get(''), args
      )
  overlaps = [_overlap(truth, own) for truth in truths] if own else []
  print('Coverage\n')
  print(validation.table(coverage, list(coverage[0])))
  if scores:
    print(
      '\nSets of genes against rows permuted within species'
      + (', expression' if value_G is not None else '')
      + f' and has-this-prior ({args.permutations} permutations)\n'
    )
    columns = dict.fromkeys(key for row in scores for key in row)
    columns.pop('zero_vectors', None)
    print(validation.table(scores, list(columns)))
  if overlaps:
    print('\nShare of the pairs of each truth that a source states\n')
    columns = dict.fromkeys(key for row in overlaps for key in row)
    print(validation.table(overlaps, list(columns)))
  if args.output:
    report = {
      'coverage': coverage,
      'validation': scores,
      'overlap': overlaps,
      'truths': {f'{t.name} {t.species}': t.facts for t in truths},
      'expression': bool(args.expression),
      'permutations': args.permutations,
      'seed': args.seed,
    }
    paths.write_json(args.output, report)
    print(f'\n{args.output}: all figures')


def _labels(given: list[str]) -> dict[str, str]:
  """Names of priors; with their folder where two have one name."""
  found: dict[str, str] = {}
  for path in given:
    name = assembly.name_of(path)
    if name in found.values():
      name = f'{os.path.basename(os.path.dirname(path))}/{name}'
    found[path] = name
  return found


def _coverage(name, rows_N, vectors_NP, facts, vocab) -> list[dict]:
  rows = []
  for species, found in assembly.coverage(rows_N, vocab).items():
    mine = vocab.genes.species_G[rows_N] == names.species_code(species)
    norms = assembly.norms(vectors_NP[mine]) if mine.any() else {}
    rows.append(
      {
        'prior': name,
        'species': species,
        'genes': found['genes'],
        'with vector': found['with_vector'],
        'share': f'{found["share"]:.1%}',
        'share of coding': f'{found["coding_with_vector"] / max(found["coding"], 1):.1%}',
        'width': vectors_NP.shape[1],
        'norm': norms.get('mean'),
        'norm sd': norms.get('sd'),
        'norm 5 %': norms.get('q5'),
        'norm 95 %': norms.get('q95'),
        'kind': facts.get('kind', ''),
      }
    )
  return rows


def _score(name, truth, rows_N, vectors_NP, value_G, genes, known, args):
  variants = [(truth, '')]
  if known is not None and (truth.regulator_K >= 0).any():
    variants.append((validation.without_known(truth, known), ' (new edges)'))
  rows = []
  for variant, label in variants:
    found = validation.score(
      variant, rows_N, vectors_NP, value_G, genes, args.permutations,
      args.seed, known,
    )  # fmt: skip
    if found is not None:
      rows.append(
        {
          'prior': name,
          'truth': truth.name + label,
          'species': gene_table.SPECIES[truth.species],
          **found,
        }
      )
  return rows


def _overlap(truth, own) -> dict:
  keys = truth.pair_keys(_MOST)
  return {
    'truth': truth.name,
    'species': gene_table.SPECIES[truth.species],
    'pairs': len(keys),
    **validation.overlap(keys, own),
  }


def _sets(text: str, vocab: vocabulary_lib.Vocabulary) -> validation.Truth:
  match = _TRUTH.fullmatch(text)
  if not match or match[3]:
    raise errors.UserError(f'--sets {text}: give SPECIES:NAME=FILE.gmt')
  species = names.species_code(match[1])
  return validation.read_sets(match[2], match[4], species, vocab.genes)


def _edges(text: str, vocab: vocabulary_lib.Vocabulary) -> validation.Truth:
  match = _TRUTH.fullmatch(text)
  if not match or not match[3]:
    raise errors.UserError(f'--edges {text}: give SPECIES:NAME:FORMAT=FILE')
  species = names.species_code(match[1])
  form, _, columns = match[3].partition('(')
  more = {'columns': tuple(columns.rstrip(')').split(','))} if columns else {}
  source = edges.EdgeTable(match[4], species, form, **more)
  found = edges.read(source, vocab.genes)
  return validation.from_edges(
    match[2], species, found.tf_N, found.target_N, found.facts
  )
