"""`genecompass prep genes -o TABLE`: a gene table of any release or species."""

import argparse
import collections
import re
from collections.abc import Sequence

from genecompass_jax import errors, gene_table
from genecompass_jax.prepare.genes import orthology


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds what `run` reads."""
  parser.description = (
    'Builds a gene table from annotation, naming and orthologue files, and '
    'says what differs from the shipped one. Formats are told by their '
    'content; genecompass prep download --list has the official files.'
  )
  parser.add_argument(
    '-o',
    '--output',
    required=True,
    metavar='GENES.tsv.gz',
    help='table to write',
  )
  for name, extra, help_text in (
    (
      'annotation',
      {'required': True},
      'GTF of Ensembl or GENCODE, or a table of genes; the first species '
      'names the tokens that orthologues share',
    ),
    ('older', {}, 'annotation of older releases, newest first: for old names'),
    ('names', {}, 'HGNC, MGI, RGD or NCBI gene_info, the most trusted first'),
  ):
    parser.add_argument(
      f'--{name}',
      nargs='+',
      action='extend',
      default=[],
      metavar='SPECIES=FILE',
      help=help_text,
      **extra,
    )
  parser.add_argument(
    '--orthologues',
    nargs='+',
    action='extend',
    default=[],
    metavar='FILE',
    help='Compara, BioMart, MGI, HomoloGene, NCBI or RGD, the most trusted '
    'first',
  )
  parser.add_argument(
    '--biotypes',
    default=','.join(gene_table.BIOTYPES),
    metavar='NAME,...',
    help='of the genes that are kept',
  )
  parser.add_argument(
    '--one-to-one',
    '--one_to_one',
    default=orthology.STRICT,
    choices=orthology.RULES,
    help='confident: only pairs that Compara calls of high confidence',
  )
  parser.add_argument(
    '--vocabulary',
    default='',
    metavar='FILE',
    help='also write the tokens of the table, for prep --vocabulary',
  )
  parser.add_argument(
    '--compare',
    default='default',
    metavar='default|none|FILE',
    help='table to compare with',
  )
  parser.add_argument(
    '--changes',
    default='',
    metavar='FILE.tsv',
    help='also write every difference, a line each',
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace files that are there'
  )


def run(args: argparse.Namespace) -> int:
  """Builds the table, writes it, and prints what is in it.

  Raises:
    UserError: one line for the user; nothing is written.
  """
  from genecompass_jax import paths, vocabulary
  from genecompass_jax.prepare.genes import gene_reports, gene_tables

  outputs = [p for p in (args.output, args.vocabulary, args.changes) if p]
  if len(set(outputs)) < len(outputs):
    raise errors.UserError('two outputs have one name')
  for path in outputs:
    if paths.exists(path) and not args.overwrite:
      raise errors.UserError(f'{path} is there; give --overwrite to replace it')
  recipe = _recipe(args)
  old = None
  if args.compare == 'default':
    old = gene_table.GeneTable.default()
  elif args.compare != 'none':
    old = gene_table.GeneTable.load(args.compare)
  table = gene_tables.build_recipe(recipe)
  table.save(args.output)
  print(f'{args.output}: {len(table):,} genes')
  print('\n'.join(gene_reports.describe(table)))
  if args.vocabulary:
    vocab = vocabulary.Vocabulary.from_genes(table)
    vocab.save(args.vocabulary)
    print(f'{args.vocabulary}: sha256 {vocab.sha256[:12]}')
  if old is not None:
    found = list(gene_reports.changes(old, table))
    print(f'against the {args.compare} table:')
    print('\n'.join(gene_reports.summarise(found, old, table)))
    if args.changes:
      rows = [('species', 'gene_id', 'change', 'before', 'after')]
      rows += [(c.species, c.gene_id, c.kind, c.before, c.after) for c in found]
      text = '\n'.join(map('\t'.join, rows))
      paths.write_text(args.changes, f'{text}\n')
      print(f'{args.changes}: {len(found):,} differences')
  return errors.EXIT_OK


def _recipe(args: argparse.Namespace):
  from genecompass_jax.prepare.genes import gene_tables

  current = _by_species('annotation', args.annotation)
  older = _by_species('older', args.older)
  names = _by_species('names', args.names)
  for species, files in current.items():
    if len(files) > 1:
      raise errors.UserError(
        f'--annotation {species} is given twice; older releases go to --older'
      )
  for option, given in (('older', older), ('names', names)):
    if unknown := given.keys() - current.keys():
      raise errors.UserError(
        f'--{option} {min(unknown)}=...: there is no --annotation of it'
      )
  if args.compare == 'none' and args.changes:
    raise errors.UserError('--changes needs a table to compare with')
  biotypes = tuple(b.strip() for b in args.biotypes.split(',') if b.strip())
  return gene_tables.Recipe(
    species=tuple(
      gene_tables.SpeciesSources(
        name, files[0], tuple(older[name]), tuple(names[name])
      )
      for name, files in current.items()
    ),
    orthologues=tuple(args.orthologues),
    biotypes=biotypes,
    one_to_one=args.one_to_one,
  )


def _by_species(
  option: str, texts: Sequence[str]
) -> collections.defaultdict[str, list[str]]:
  found = collections.defaultdict(list)
  for text in texts:
    species, equals, path = text.partition('=')
    if not (equals and path and re.fullmatch('[a-z][a-z0-9_]*', species)):
      raise errors.UserError(
        f'--{option} {text}: write SPECIES=FILE, the species in small letters'
      )
    found[species].append(path)
  return found
