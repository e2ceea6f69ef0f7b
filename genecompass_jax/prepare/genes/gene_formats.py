"""Files of genes as their sources write them -> rows.

What a file is, is told by its first lines: annotation (GTF of Ensembl or
GENCODE of any release, or a table of genes), or names (HGNC, MGI, RGD, NCBI).
"""

import contextlib
import csv
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from genecompass_jax import errors, paths, progress
from genecompass_jax.prepare import raw_files

Row = Mapping[str, str]

# Ensembl and GENCODE wrote lncRNA as these until releases 96 and 30.
_LONG_NONCODING = (
  *('3prime_overlapping_ncRNA', '3prime_overlapping_ncrna', 'antisense'),
  *('antisense_RNA', 'bidirectional_promoter_lncRNA', 'lincRNA'),
  *('bidirectional_promoter_lncrna', 'macro_lncRNA', 'non_coding'),
  *('processed_transcript', 'sense_intronic', 'sense_overlapping'),
)
_ALTERNATE = re.compile('(chr)?CHR_')
_ATTRIBUTE = re.compile(r'(\w+) "([^"]*)"')
_GTF_COLUMNS = 9
_COMMENT = re.compile(rb'(\xef\xbb\xbf)?#')
_LONG = 8e6  # bytes of a file whose reading is worth a progress bar
_HOMOLOGENE = ['HID', 'taxid', 'GeneID', 'Symbol', 'protein_gi', 'protein']


@dataclasses.dataclass(frozen=True)
class Annotation:
  """The genes of one release.

  Attributes:
    rows: gene_id, gene_name, biotype, chromosome, start, end; and entrez where
      the table has it.
    release: what the file says of itself, '' if nothing.
    alternates: rows of genes on alternative sequences (Ensembl's CHR_...):
      copies of genes, under other ids.
  """

  rows: tuple[Row, ...]
  release: str
  alternates: tuple[Row, ...] = ()


@dataclasses.dataclass(frozen=True)
class Name:
  """What a naming table says of one gene.

  Attributes:
    symbol: the official one.
    gene_id: Ensembl id; '' where the table names none.
    entrez: NCBI gene id, or ''.
    former: former official symbols.
    nicknames: other names.
    accession: of the committee, such as HGNC:5.
    on_alternate: a coding gene without a copy on a primary chromosome.
  """

  symbol: str
  gene_id: str = ''
  entrez: str = ''
  former: tuple[str, ...] = ()
  nicknames: tuple[str, ...] = ()
  accession: str = ''
  on_alternate: bool = False


def read_annotation(path: str) -> Annotation:
  """Reads a GTF, or a table of genes with a header.

  Tables have the columns gene_id, gene_name, biotype, chromosome, start, end,
  or those of annotables: ensgene, symbol, biotype, chr, start, end, entrez.

  Raises:
    UserError: the file is missing, damaged, or neither of them.
  """
  found = _read_annotation(path)
  alternate = [
    _ALTERNATE.match(row.get('chromosome', '')) for row in found.rows
  ]
  return Annotation(
    tuple(row for row, other in zip(found.rows, alternate) if not other),
    found.release,
    tuple(row for row, other in zip(found.rows, alternate) if other),
  )


def _read_annotation(path: str) -> Annotation:
  with raw_files.opened(path) as file:
    start = file.read(1 << 18).decode('utf-8-sig', 'replace')
  head = _first_line(start)
  if len(head.split('\t')) == _GTF_COLUMNS and '_id "' in head:
    return _read_gtf(path, start)
  rows = read_table(path)
  columns = set(rows[0]) if rows else set()
  if {'gene_id', 'gene_name', 'biotype'} <= columns:
    return Annotation(tuple(rows), '')
  if {'ensgene', 'symbol', 'biotype', 'chr'} <= columns:
    return Annotation(tuple(map(_of_annotables, rows)), '')
  raise errors.UserError(
    f'{path}: no GTF, and no table with the columns gene_id, gene_name and '
    'biotype; give the annotation of Ensembl or GENCODE'
  )


def _of_annotables(row: Row) -> Row:
  chromosome = row['chr'].removeprefix('chr')
  return {
    'gene_id': row['ensgene'],
    'gene_name': row['symbol'] if row['symbol'] != 'NA' else '',
    'biotype': _biotype(row['biotype']),
    'chromosome': f'chr{chromosome}',
    'start': row.get('start', ''),
    'end': row.get('end', ''),
    'entrez': row.get('entrez', ''),
  }


def read_older(path: str) -> list[Row]:
  """Genes of an older release: ensgene, symbol, entrez ('' in a GTF)."""
  with raw_files.opened(path) as file:
    start = file.read(1 << 12).decode('utf-8-sig', 'replace')
  if 'ensgene' in re.split(r'[\t,]', _first_line(start)):
    with all_columns(path):
      return [
        {name: row[name] for name in ('ensgene', 'symbol', 'entrez')}
        for row in read_table(path)
      ]
  return [
    {
      'ensgene': row['gene_id'].partition('.')[0],
      'symbol': row['gene_name'],
      'entrez': row.get('entrez', ''),
    }
    for row in _read_annotation(path).rows
  ]


def _read_gtf(path: str, head: str) -> Annotation:
  """The `gene` lines; of files without them, what exons say."""
  notes = re.findall(
    r'^#+ ?!?(?:description: |genome-version |genebuild-last-updated )(.*)$',
    head[: 1 << 12],
    re.MULTILINE,
  )
  genes: dict[str, dict[str, str]] = {}
  has_genes = '\tgene\t' in head
  for number, line in enumerate(_lines(path)):
    if has_genes and b'\tgene\t' not in line or _COMMENT.match(line):
      continue
    fields = _decoded(path, number, line).rstrip('\r\n').split('\t')
    if len(fields) != _GTF_COLUMNS:
      raise errors.UserError(
        f'{path}: line {number + 1} has {len(fields)} columns, a GTF '
        f'{_GTF_COLUMNS}; fetch it again'
      )
    chromosome, source, _, start, end, *_, last = fields
    if not (start.isdecimal() and end.isdecimal()):
      raise errors.UserError(
        f'{path}: line {number + 1} is of a gene from {start[:20]!r} to '
        f'{end[:20]!r}; fetch it again'
      )
    attributes = dict(_ATTRIBUTE.findall(last))
    gene_id = attributes.get('gene_id', '')
    # Until GENCODE 43 the copies on Y had the ids of those on X.
    if not gene_id or gene_id.endswith('_PAR_Y'):
      continue
    gene = genes.get(gene_id)
    if gene is None:
      kind = attributes.get('gene_biotype') or attributes.get('gene_type')
      genes[gene_id] = {
        'gene_id': gene_id,
        'gene_name': attributes.get('gene_name', ''),
        'biotype': _biotype(kind or source),  # before Ensembl 77: its source
        'chromosome': f'chr{chromosome.removeprefix("chr")}',
        'start': start,
        'end': end,
      }
    else:
      gene['start'] = str(min(int(gene['start']), int(start)))
      gene['end'] = str(max(int(gene['end']), int(end)))
  if not genes:
    raise errors.UserError(f'{path}: a GTF without a gene; fetch it again')
  return Annotation(tuple(genes.values()), ', '.join(notes))


def _decoded(path: str, number: int, line: bytes) -> str:
  try:
    return line.decode('utf-8-sig' if not number else 'utf-8')
  except UnicodeDecodeError:
    raise errors.UserError(
      f'{path}: line {number + 1} is no text; check the file'
    ) from None


def _biotype(name: str) -> str:
  return 'lncRNA' if name in _LONG_NONCODING else name


def read_names(path: str, symbols: set[str]) -> tuple[list[Name], str]:
  """Reads a naming table of HGNC, MGI, RGD or NCBI.

  Args:
    path: the HGNC complete set, the MGI homology report, MRK_List2 or
      MRK_ENSEMBL, RGD's GENES_*, or NCBI's gene_info.
    symbols: of the annotation; of a table of several species, the one of
      which most symbols are among them is taken.

  Returns:
    The names, and a line on the state of the table ('' if it has none).

  Raises:
    UserError: the file is missing, damaged, or none of these.
  """
  with all_columns(path):
    return _read_names(path, symbols)


@contextlib.contextmanager
def all_columns(path: str) -> Iterator[None]:
  """What asks a row for a column that its table lacks is an error in it."""
  try:
    yield
  except KeyError as error:
    raise errors.UserError(
      f'{path}: its header has no column {error.args[0]!r}; fetch it again'
    ) from None


def _read_names(path: str, symbols: set[str]) -> tuple[list[Name], str]:
  text = _text(path)
  if re.match(r'MGI:\d+\t', text):
    return list(_of_mrk_ensembl(text)), ''
  head = set(_first_line(text).lstrip('#').split('\t'))
  if 'hgnc_id' in head:
    rows = _table(path, text)
    changed = max((row.get('date_modified', '') for row in rows), default='')
    return [_of_hgnc(row) for row in rows if _is_approved(row)], (
      f'last change {changed}' if changed else ''
    )
  if {'MGI Accession ID', 'Marker Symbol'} <= head:
    rows = _plain_table(path, text)
    return [
      Name(
        row['Marker Symbol'],
        nicknames=_split(row['Marker Synonyms (pipe-separated)']),
        accession=row['MGI Accession ID'],
      )
      for row in rows
      if row['Marker Type'] in ('Gene', 'Pseudogene')
    ], ''
  if 'DB Class Key' in head:
    rows = _of_one_species(_table(path, text), 'NCBI Taxon ID', symbols)
    return [
      Name(row['Symbol'], entrez=row['EntrezGene ID']) for row in rows
    ], ''
  if {'GENE_RGD_ID', 'SYMBOL'} <= head:
    return list(_of_rgd(_plain_table(path, text))), ''
  if {'GeneID', 'Symbol', 'dbXrefs'} <= head:
    rows = _of_one_species(
      _plain_table(path, text), 'tax_id', symbols, 'Symbol'
    )
    return list(_of_gene_info(rows)), ''
  raise errors.UserError(
    f'{path}: no naming table that is known: give the HGNC complete set, '
    'MRK_List2.rpt of MGI, GENES_RAT.txt of RGD, or gene_info of NCBI'
  )


def _is_approved(row: Row) -> bool:
  return 'withdrawn' not in row.get('status', '').lower()


def _of_hgnc(row: Row) -> Name:
  return Name(
    symbol=row['symbol'],
    gene_id=row['ensembl_gene_id'],
    entrez=row['entrez_id'],
    former=_split(row['prev_symbol']),
    nicknames=_split(row['alias_symbol']),
    accession=row['hgnc_id'],
    on_alternate=row['locus_type'] == 'gene with protein product'
    and row['location'].endswith('alternate reference locus'),
  )


def _of_mrk_ensembl(text: str) -> Iterator[Name]:
  for line in text.splitlines():
    fields = line.split('\t')
    if len(fields) > 5:
      yield Name(fields[1], gene_id=fields[5], accession=fields[0])


def _of_rgd(rows: Sequence[Row]) -> Iterator[Name]:
  for row in rows:
    for gene_id in _split(row.get('ENSEMBL_ID', ''), ';') or ('',):
      yield Name(
        row['SYMBOL'],
        gene_id=gene_id,
        entrez=row.get('NCBI_GENE_ID', '').partition(';')[0],
        former=_split(row.get('OLD_SYMBOL', ''), ';'),
        accession=f'RGD:{row["GENE_RGD_ID"]}',
      )


def _of_gene_info(rows: Sequence[Row]) -> Iterator[Name]:
  for row in rows:
    # dbXrefs: MIM:138670|HGNC:HGNC:5|Ensembl:ENSG00000121410, RGD:621, ...
    links = [link.partition(':') for link in _split(row['dbXrefs'])]
    gene_ids = [value for kind, _, value in links if kind == 'Ensembl']
    named = [
      value if kind in ('HGNC', 'MGI') else f'{kind}:{value}'
      for kind, _, value in links
      if kind in ('HGNC', 'MGI', 'RGD')
    ]
    for gene_id in gene_ids or ('',):
      yield Name(
        row['Symbol'],
        gene_id=gene_id,
        entrez=row['GeneID'],
        nicknames=_split(row['Synonyms']),
        accession=named[0] if named else '',
      )


def _of_one_species(
  rows: Sequence[Row], label: str, symbols: set[str], key: str = 'Symbol'
) -> list[Row]:
  """The rows of the taxon of which most symbols are known."""
  hits: dict[str, int] = {}
  for row in rows:
    hits[row[label]] = hits.get(row[label], 0) + (row[key] in symbols)
  best = max(hits, key=hits.get) if hits else ''
  return [row for row in rows if row[label] == best]


def _split(text: str, by: str = '|') -> tuple[str, ...]:
  """Parts without blanks; `-` is NCBI's nothing."""
  parts = (part.strip() for part in text.split(by))
  return tuple(part for part in parts if part and part != '-')


def read_table(path: str) -> list[Row]:
  """Rows of a table with a header; tab-separated, or commas by its name."""
  return _table(path, _text(path))


def rows(path: str) -> Iterator[Row]:
  """Rows of a long table, one at a time.

  Tab-separated without quotes, or commas by its name; comments before the
  header are passed over. HomoloGene's file has no header and gets one.

  Raises:
    UserError: a row is shorter than the header: it was cut.
  """
  if _is_csv(path):
    yield from read_table(path)
    return
  with raw_files.opened(path) as file:
    lines = enumerate(io.TextIOWrapper(file, encoding='utf-8-sig'), 1)
    first = next((x for x in lines if not _is_comment(x[1])), (0, ''))
    head = first[1]
    names = head.rstrip('\r\n').split('\t')
    if len(names) == len(_HOMOLOGENE) and names[0].isdigit():
      names, lines = _HOMOLOGENE, itertools.chain([first], lines)
    names = [names[0].lstrip('#'), *names[1:]]
    for number, line in lines:
      if row := _row(path, number, names, line.rstrip('\r\n')):
        yield row


def _is_csv(path: str) -> bool:
  return '.csv' in re.split(r'[/\\]', str(path))[-1]


def _table(path: str, text: str) -> list[Row]:
  """Quoted where need be; a row that was cut is no row with empty values."""
  stream = io.StringIO(text, newline='')
  reader = csv.reader(stream, delimiter=',' if _is_csv(path) else '\t')
  names: list[str] = []
  rows = []
  try:
    for values in reader:
      if not any(value.strip() for value in values):
        continue
      names = names or values
      if len(values) < len(names) or any(values[len(names) :]):
        raise errors.UserError(
          f'{path}: line {reader.line_num} has {len(values)} columns, its '
          f'header {len(names)}; fetch it again'
        )
      rows.append(dict(zip(names, values)))
  except csv.Error as error:
    raise errors.UserError(
      f'{path}: line {reader.line_num}: {error}; fetch it again'
    ) from None
  return rows[1:]


def _plain_table(path: str, text: str) -> list[Row]:
  """Tab-separated without quotes, comments before the header.

  A header may itself begin with `#`, as NCBI's does.
  """
  lines = text.splitlines()
  first = _header_at(lines)
  names = lines[first].lstrip('#').split('\t') if lines else []
  found = (
    _row(path, number, names, line)
    for number, line in enumerate(lines[first + 1 :], first + 2)
  )
  return [row for row in found if row]


def _row(path: str, number: int, names: Sequence[str], line: str) -> Row:
  """Values by name; none of a blank line, or of one that is a remark."""
  values = line.split('\t')
  if len(values) == 1:
    return {}
  if len(values) < len(names):
    raise errors.UserError(
      f'{path}: line {number} has {len(values)} columns, its header '
      f'{len(names)}; fetch it again'
    )
  return dict(zip(names, values))


def _header_at(lines: Sequence[str]) -> int:
  return next((i for i, x in enumerate(lines) if not _is_comment(x)), 0)


def _is_comment(line: str) -> bool:
  """Headers may begin with # as well, as those of NCBI do."""
  return line.startswith('#') and not line.startswith(
    ('#tax_id\t', '#GeneID\t')
  )


def _first_line(text: str) -> str:
  lines = text[: 1 << 18].splitlines() or ['']
  return lines[_header_at(lines)]


def _lines(path: str) -> Iterator[bytes]:
  """The lines of a long file, with progress; a GTF unpacks to gigabytes."""
  name = re.split(r'[/\\]', str(path))[-1]
  with raw_files.opened(path) as file, contextlib.ExitStack() as stack:
    bar = None
    if paths.size(path) > _LONG:
      bar = stack.enter_context(progress.Progress(None, 'lines', name))
    for number, line in enumerate(file, 1):
      if bar is not None and number % 100_000 == 0:
        bar.update(100_000)
      yield line


def _text(path: str) -> str:
  with raw_files.opened(path) as file:
    return file.read().decode('utf-8-sig')
