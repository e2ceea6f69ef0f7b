"""What each `genecompass prior` command does, from its flags to its files."""

import argparse
import dataclasses
import os

import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  errors,
  paths,
  prior_tables,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.prepare.priors import (
  assembly,
  coexpression as coexpression_lib,
  controls,
  edges,
  embedding,
  families,
  files,
  holdout,
  kmers,
  names,
  network,
  pairs as pairs_lib,
  reports,
  sequences,
  starts,
  strata,
  vectors,
)


def grn(args: argparse.Namespace) -> None:
  """TF-target tables -> a prior."""
  assembly.check_output(args.output, args.overwrite)
  vocab = assembly.load_vocabulary(args.vocabulary)
  config = _embedding(args)
  complexes = dict(edges.COMPLEXES)
  if args.complexes:
    complexes |= edges.read_complexes(args.complexes)
  given = [
    edges.EdgeTable(
      path=path,
      species=names.species_code(species),
      form=form,
      weight=weight,
      confidence=args.confidence,
      columns=tuple(args.columns.split(',')),
      header=not args.no_header,
      licence=_licence(args, path),
    )
    for species in ('human', 'mouse')
    for form, path, weight in map(_edge_flag, getattr(args, species))
  ]
  if not given:
    raise errors.UserError(
      'no edges were given: --human FORMAT=FILE or --mouse FORMAT=FILE'
    )
  held = _held_out(args, vocab)
  tables = [edges.read(source, vocab.genes, complexes) for source in given]
  found, facts = network.build(tables, vocab.genes, held, args.merge, args.lift)
  embedded = embedding.embed(found, vocab, config)
  written = assembly.write(
    args.output,
    embedded.rows_N,
    embedded.vectors_NP,
    vocab,
    'grn',
    {
      'embedding': dataclasses.asdict(config),
      'merge': args.merge,
      'lift': args.lift,
      'complexes': args.complexes and files.source(args.complexes),
    },
    facts['sources'],
    args.seed,
    found,
    edges=facts['edges'],
    embedded=embedded.facts,
    held_out=held.facts,
  )
  print(reports.describe(args.output, written))


def promoter(args: argparse.Namespace) -> None:
  """Genome and annotation, or ready sequences -> a prior."""
  assembly.check_output(args.output, args.overwrite)
  vocab = assembly.load_vocabulary(args.vocabulary)
  parts = []
  for s, species in enumerate(('human', 'mouse')):
    genome, gtf, ready = (
      getattr(args, f'{species}_{what}')
      for what in ('genome', 'genes', 'sequences')
    )
    if bool(genome) != bool(gtf) or (genome and ready):
      raise errors.UserError(
        f'{species}: give --{species}-genome and --{species}-genes together, '
        f'or --{species}-sequences alone'
      )
    if genome:
      where = starts.read(gtf, s, vocab.genes, args.tss, _licence(args, gtf))
      parts.append(
        sequences.windows(
          genome,
          where,
          args.upstream,
          args.downstream,
          args.skip_soft_masked,
          _licence(args, genome),
        )
      )
    elif ready:
      parts.append(
        sequences.ready(
          ready,
          s,
          vocab.genes,
          _names(args.gene_column),
          args.sequence_column,
          args.strip,
          _licence(args, ready),
        )
      )
  if not parts:
    raise errors.UserError(
      'no sequences were given: --human-genome with --human-genes, or '
      '--human-sequences'
    )
  found = sequences.Sequences(
    np.concatenate([part.row_N for part in parts]),
    tuple(text for part in parts for text in part.texts),
    [facts for part in parts for facts in part.facts],
  )
  if args.encoder:
    embedded = kmers.encode(found, args.encoder, args.batch, args.rms)
    parameters = {'encoder': args.encoder, 'rms': args.rms}
  else:
    try:
      lengths = tuple(int(k) for k in args.k.split(','))
    except ValueError:
      raise errors.UserError(
        f'--k {args.k}: give lengths, such as 4,5,6'
      ) from (None)
    config = kmers.KmerConfig(
      lengths, args.stranded, args.width, args.power, args.rms
    )
    embedded = kmers.embed(found, config)
    parameters = {'words': dataclasses.asdict(config)}
  parameters |= {'window': [-args.upstream, args.downstream], 'tss': args.tss}
  parameters['skip_soft_masked'] = args.skip_soft_masked
  written = assembly.write(
    args.output,
    embedded.rows_N,
    embedded.vectors_NP,
    vocab,
    'promoter',
    parameters,
    found.facts,
    args.seed,
    embedded=embedded.facts,
  )
  print(reports.describe(args.output, written))


def family(args: argparse.Namespace) -> None:
  """Groups of genes -> a prior."""
  assembly.check_output(args.output, args.overwrite)
  vocab = assembly.load_vocabulary(args.vocabulary)
  config = _embedding(args)
  several, labels, lifted, sources = [], [], [], []
  for s, given in enumerate((args.groups, args.mouse_groups)):
    for path in given:
      groups = families.read(path, s, vocab.genes, _licence(args, path))
      if not args.all_groups:
        groups = families.meaningful(groups, vocab.genes)
      facts = dict(groups.facts)
      several.append(groups)
      labels.append(facts['file'])
      lifted.append(False)
      if s == 0 and not args.mouse_groups:
        other = families.by_orthology(groups, vocab.genes)
        facts['mouse'] = other.facts
        several.append(other)
        labels.append(f'{facts["file"]} (mouse, by orthology)')
        lifted.append(True)
      sources.append(facts)
  found = families.to_pairs(several, labels, lifted)
  embedded = embedding.embed(found, vocab, config)
  written = assembly.write(
    args.output,
    embedded.rows_N,
    embedded.vectors_NP,
    vocab,
    'family',
    {'embedding': dataclasses.asdict(config), 'all_groups': args.all_groups},
    sources,
    args.seed,
    found,
    embedded=embedded.facts,
  )
  print(reports.describe(args.output, written))


def coexpression(args: argparse.Namespace) -> None:
  """Training cells of a corpus -> a prior."""
  assembly.check_output(args.output, args.overwrite)
  vocab = assembly.load_vocabulary(args.vocabulary)
  config = _embedding(args)
  rule = coexpression_lib.CoexpressionConfig(
    matrix=args.matrix,
    max_cells=args.max_cells,
    min_r=args.min_r,
    min_cells=args.min_cells,
    rule=args.rule,
    fdr=args.fdr,
    permutations=args.permutations,
    value=args.value,
    seed=args.seed,
  )
  opened = corpus_lib.Corpus.open(args.corpus)
  found, facts = coexpression_lib.from_corpus(opened, vocab.genes, rule)
  embedded = embedding.embed(found, vocab, config)
  manifest = paths.join(args.corpus, 'manifest.json')
  source = files.source(manifest, _licence(args, manifest)) | {
    'split': 'train',
    'studies': [
      {key: part.get(key, '') for key in ('name', 'licence', 'sha256')}
      for part in opened.manifest['sources']
    ],
    'held_out_units': opened.manifest['split']['validation_units']
    + opened.manifest['split']['test_units'],
    'matrices': facts['matrices'],
  }
  written = assembly.write(
    args.output,
    embedded.rows_N,
    embedded.vectors_NP,
    vocab,
    'coexpression',
    {
      'embedding': dataclasses.asdict(config),
      'rule': dataclasses.asdict(rule),
    },
    [source],
    args.seed,
    found,
    embedded=embedded.facts,
  )
  print(reports.describe(args.output, written))


def table(args: argparse.Namespace) -> None:
  """Any table of vectors -> a prior."""
  assembly.check_output(args.output, args.overwrite)
  vocab = assembly.load_vocabulary(args.vocabulary)
  found, given = vectors.read(args.file, args.gene_column)
  rows, values, facts = vectors.by_gene(
    found, given, vocab.genes, args.species, args.file
  )
  if args.lift:
    rows, values, lifted = vectors.with_orthologues(rows, values, vocab.genes)
    facts['genes_lifted'] = lifted
  if args.width and args.width < values.shape[1]:
    values = embedding.components(values, args.width)
  written = assembly.write(
    args.output,
    rows,
    embedding.rescaled(values, args.rms),
    vocab,
    'table',
    {'lift': args.lift, 'width': args.width, 'rms': args.rms},
    [files.source(args.file, _licence(args, args.file)) | facts],
    args.seed,
  )
  print(reports.describe(args.output, written))


def released(args: argparse.Namespace) -> None:
  """A pickle of the original -> a prior in a folder, and a report."""
  from genecompass_jax.prepare.priors import released as released_lib

  name = os.path.basename(args.file)
  for ending in ('.pickle', '.pkl'):
    name = name.removesuffix(ending)
  output = paths.join(args.output, f'{name}.parquet')
  assembly.check_output(output, args.overwrite)
  vocab = assembly.load_vocabulary(args.vocabulary)
  symbols, given = released_lib.read(args.file)
  species = names.species_code(args.species)
  facts = released_lib.report(symbols, given)
  rows, taken, lost = released_lib.by_gene(symbols, species, vocab.genes)
  names.check_known(args.file, lost)
  if args.drop_random:
    keep = ~released_lib.random_rows(given)[taken]
    rows, taken = rows[keep], taken[keep]
    facts['genes_dropped_as_random'] = int((~keep).sum())
  source = files.source(args.file, _licence(args, args.file))
  source |= {'species': args.species, 'identifiers': lost, 'table': facts}
  written = assembly.write(
    output,
    rows,
    given[taken],
    vocab,
    'released',
    {'drop_random': args.drop_random},
    [source],
    args.seed,
  )
  print(reports.describe(output, written))
  print(
    f'  {facts["rows"]:,} rows of {facts["width"]}, norm '
    f'{facts["norms"]["mean"]:.4g}; {facts["duplicate_vectors"]:,} duplicate '
    f'and {facts["zero_vectors"]:,} zero vectors; '
    f'{facts["rows_that_look_random"]:,} rows look random'
  )
  if facts['rows_that_look_random'] and not args.drop_random:
    print('  a missing prior is better marked as such: --drop-random')


def control(args: argparse.Namespace) -> None:
  """Priors -> their controls, under the same names, in a folder."""
  vocab = assembly.load_vocabulary(args.vocabulary)
  value_G = (
    strata.expression(args.expression, vocab) if args.expression else None
  )
  outputs = [
    paths.join(args.output, os.path.basename(path)) for path in args.priors
  ]
  if len(set(outputs)) != len(outputs):
    raise errors.UserError('two priors have one name; rename one of them')
  for path, output in zip(args.priors, outputs):
    assembly.check_output(output, args.overwrite)
    if os.path.realpath(path) == os.path.realpath(output):
      raise errors.UserError(f'{output} is the prior itself; give another -o')
    prior = prior_tables.read(path)
    rows = np.array(
      [vocab.genes.row_of.get(i, -1) for i in prior.gene_ids], np.int64
    )
    if (rows < 0).any():
      unknown = prior.gene_ids[int(np.argmin(rows))]
      raise errors.UserError(
        f'{path}: {unknown} is not in the vocabulary; give the one it was '
        'built with (--vocabulary)'
      )
    found = None
    values = prior.vectors_GP
    if not values.any():
      raise errors.UserError(
        f'{path}: every vector is zero: nothing to control'
      )
    strata_N = strata.of(rows, value_G, vocab.genes)
    if args.control == 'shuffled':
      values, facts = controls.shuffled(values, strata_N, args.seed)
    elif args.control == 'shuffled_pairs':
      values, facts = controls.shuffled_pairs(
        values,
        strata_N,
        vocab.genes.species_G[rows],
        vocab.token_G[rows],
        args.seed,
      )
    elif args.control == 'random':
      values, facts = controls.random(values, strata_N, args.seed)
    elif args.control == 'constant':
      values, facts = controls.constant(values)
    else:
      own = pairs_lib.read(path, prior.facts, vocab.genes)
      embedded, found, facts = controls.rewired(
        own, prior.facts, vocab, args.seed
      )
      rows, values = embedded.rows_N, embedded.vectors_NP
    source = {
      'file': os.path.basename(path),
      'sha256': paths.sha256_file(path),
      'licence': _licence(args, path),
      'kind': prior.facts.get('kind', ''),
    }
    expression = os.path.basename(os.path.normpath(args.expression))
    written = assembly.write(
      output,
      rows,
      values,
      vocab,
      f'control {args.control}',
      {'expression': args.expression and expression},
      [source],
      args.seed,
      found,
      control=facts,
    )
    print(reports.describe(output, written))
    if value_G is None and args.control not in ('constant', 'rewired'):
      print('  without --expression rows are permuted within species only')


def _embedding(args: argparse.Namespace) -> embedding.EmbeddingConfig:
  fields = dataclasses.fields(embedding.EmbeddingConfig)
  return embedding.EmbeddingConfig(
    **{field.name: getattr(args, field.name) for field in fields}
  )


def _held_out(
  args: argparse.Namespace, vocab: vocabulary_lib.Vocabulary
) -> holdout.HeldOut:
  if not args.hold_out:
    return holdout.none(vocab.genes)
  if not args.paralogues:
    raise errors.UserError(
      '--hold-out needs --paralogues FILE (groups of genes, as of HGNC), as '
      'paralogues share targets; --paralogues none goes without'
    )
  groups = None
  if args.paralogues != 'none':
    groups = families.read(args.paralogues, 0, vocab.genes)
  held = holdout.choose(
    files.names(args.hold_out), groups, vocab.genes, args.max_paralogues
  )
  if groups is not None:
    held.facts['paralogues_from'] = groups.facts['file']
  return held


def _edge_flag(text: str) -> tuple[str, str, float]:
  """FORMAT=FILE[@WEIGHT]."""
  form, found, rest = text.partition('=')
  path, at, weight = rest.rpartition('@')
  if not at or not weight.replace('.', '', 1).isdigit():
    path, weight = rest, '1'
  if not found or not path:
    raise errors.UserError(
      f'{text}: say the format first, as in collectri={text or "FILE"}: '
      'collectri, dorothea, trrust or table'
    )
  return form, path, float(weight)


def _licence(args: argparse.Namespace, path: str) -> str:
  """What the user says of a file: by its name, else of all files."""
  name = os.path.basename(path)
  found = ''
  for text in args.licence:
    key, equals, value = text.partition('=')
    if equals and key == name:
      return value
    if not equals:
      found = text
  return found


def _names(text: str) -> tuple[str, ...]:
  return tuple(name for name in text.split(',') if name)
