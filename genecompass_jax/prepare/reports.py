"""What was lost on the way to a corpus, and why, for a person to read."""

from collections.abc import Mapping

from genecompass_jax import corpus, paths


def read(path: paths.PathLike) -> dict:
  """The report of a corpus."""
  return paths.read_json(paths.join(path, 'report.json'))


def describe_corpus(path: paths.PathLike) -> str:
  """The report of a corpus, and its cells by split, in plain text."""
  built = corpus.Corpus.open(path)
  cells = ', '.join(
    f'{built.num_cells(split):,} {split}' for split in built.splits
  )
  return f'{describe(read(path))}\n{built.path}: {cells} cells'


def describe(report: Mapping) -> str:
  """The report of a corpus in plain text."""
  lines = []
  for source in report['sources']:
    lines.append(
      f'{source["name"]}: {source["kept"]:,} of {source["cells"]:,} cells kept '
      f'({source["assay"]})'
    )
    lines.append(f'  counts: {source["layer"]}')
    lines.append(f'  identifiers: {source["identifiers"]}')
    screen = source.get('perturbed', {})
    if screen.get('note'):
      lines.append(
        f'  perturbed: {screen["removed"]:,} cells removed ({screen["note"]})'
      )
    for species, genes in source['genes'].items():
      lines.append(
        f'  {species} genes: {genes["genes"]:,} from {genes["inputs"]:,} '
        f'columns ({genes["alias"]:,} by an alias, {genes["duplicates"]:,} '
        f'duplicates summed), {genes["lost"]:,} lost, {genes["ambiguous"]:,} '
        f'ambiguous; {genes.get("share_umis_lost", 0):.2%} of counts lost'
      )
      if genes.get('genes_outside_vocabulary'):
        lines.append(
          f'    {genes["genes_outside_vocabulary"]:,} of these genes, '
          f'{genes["share_umis_outside_vocabulary"]:.2%} of the counts, are '
          'not in the vocabulary and left out'
        )
      if genes['examples_lost']:
        lines.append(f'    lost: {", ".join(genes["examples_lost"][:5])}')
    for species, filtered in source['quality'].items():
      for f in filtered['filters']:
        if f.get('note') == 'off':
          continue
        if f['threshold'] is None:
          lines.append(f'  {species} {_flag(f["name"])}: skipped, {f["note"]}')
        else:
          note = f' ({f["note"]})' if 'note' in f else ''
          lines.append(
            f'  {species} {_flag(f["name"])} {f["threshold"]:g}{note}: '
            f'{f["removed"]:,} cells removed'
          )
      lines += [f'  WARNING {line}' for line in filtered['warnings']]
    if source.get('copies'):
      lines.append(
        f'  {source["copies"]:,} cells removed that are in another source, or '
        'here twice'
      )
    if source['cells_without_known_genes']:
      lines.append(
        f'  {source["cells_without_known_genes"]:,} cells without a known gene '
        'left out'
      )
  split = report['split']
  held = ', '.join(split['validation_units'][:5]) or 'none'
  if len(split['validation_units']) > 5:
    held += ' ...'
  held += f' (of {split["units"]:,} unit{"" if split["units"] == 1 else "s"})'
  if split['leaky']:
    held = (
      'single cells: LEAKY'
      if held.startswith('none ')
      else (f'{held}; and single cells: LEAKY')
    )
  lines.append(f'validation: {held}')
  return '\n'.join([*lines, *report['notes']])


def _flag(name: str) -> str:
  """A filter, called like the option that sets it."""
  return '--' + name.replace('_', '-')
