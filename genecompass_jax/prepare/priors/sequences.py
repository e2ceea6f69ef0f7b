"""Sequences of genes: windows of a genome around the start, or ready ones."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from genecompass_jax import errors, gene_table, paths
from genecompass_jax.prepare import raw_files
from genecompass_jax.prepare.priors import (
  files,
  names,
  starts as starts_lib,
)

_LETTERS = b'ABCDGHKMNRSTUVWYabcdghkmnrstuvwyXx*-.'
_UPPER = bytes.maketrans(b'acgtuU', b'ACGTTT')
_OTHERS = bytes(c for c in range(256) if c not in b'ACGT')
_TO_N = bytes.maketrans(_OTHERS, b'N' * len(_OTHERS))
_COMPLEMENT = bytes.maketrans(b'ACGTN', b'TGCAN')
_LOWER_TO_N = bytes.maketrans(b'acgtu', b'NNNNN')


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
  """Sequences of genes; a gene may have several.

  Attributes:
    row_N: int32 rows of the gene table.
    texts: upper-case A, C, G, T and N, 5' to 3' of the gene's strand.
    facts: of the sources, and what was lost.
  """

  row_N: np.ndarray
  texts: tuple[bytes, ...]
  facts: list[dict]


def windows(
  fasta: paths.PathLike,
  starts: starts_lib.Starts,
  upstream: int = 500,
  downstream: int = 2000,
  skip_soft_masked: bool = False,
  licence: str = '',
) -> Sequences:
  """The bases around each start, from `upstream` before it.

  The genome is read sequence by sequence: memory holds the longest one.

  Args:
    fasta: the genome, plain or gzip; lower case is soft-masked.
    starts: of the genes, in the coordinates of that genome.
    upstream, downstream: bases before the start, and from it on.
    skip_soft_masked: read repeats as N.
    licence: origin and licence, in the user's words.

  Raises:
    UserError: no such file, not FASTA, or no sequence that the GTF names.
  """
  errors.check_at_least('window', _Window(upstream, downstream), upstream=0,
                        downstream=1)  # fmt: skip
  wanted: dict[str, list[int]] = {}
  for n, chromosome in enumerate(starts.chromosomes):
    wanted.setdefault(_plain(chromosome), []).append(n)
  found: dict[int, bytes] = {}
  clipped, seen = 0, []
  for name, sequence in _records(fasta):
    seen.append(name)
    for n in wanted.pop(_plain(name), ()):
      at = int(starts.position_N[n])
      low, high = at - upstream, at + downstream
      if starts.is_reverse_N[n]:
        low, high = at - downstream + 1, at + upstream + 1
      clipped += low < 0 or high > len(sequence)
      text = bytes(sequence[max(low, 0) : max(high, 0)])
      found[n] = clean(text, skip_soft_masked)
      if starts.is_reverse_N[n]:
        found[n] = found[n].translate(_COMPLEMENT)[::-1]
  if not found:
    raise errors.UserError(
      f'{fasta} has no sequence that the GTF names: it has '
      f'{", ".join(seen[:3])}, the GTF {", ".join(starts.chromosomes[:3])}; '
      'give the genome of that annotation'
    )
  facts = files.source(fasta, licence) | {
    'sequences': len(seen),
    'window': [-upstream, downstream],
    'windows_cut_at_an_end': int(clipped),
    'genes_without_sequence': sum(map(len, wanted.values())),
    'sequences_missing': sorted(wanted)[:10],
  }
  order = sorted(found)
  return Sequences(
    starts.row_N[order], tuple(found[n] for n in order), [starts.facts, facts]
  )


def ready(
  path: paths.PathLike,
  species: int,
  genes: gene_table.GeneTable,
  gene_columns: Sequence[str] = (),
  sequence_column: str = 'sequence',
  strip: str = '',
  licence: str = '',
) -> Sequences:
  """Sequences that are cut already: FASTA, or a table.

  Args:
    path: FASTA whose records begin with a gene identifier (or hold one behind
      a bar), or a table with a column of sequences.
    species: code of the genes.
    genes: the gene table.
    gene_columns: of a table; the first that leads to a gene counts. None: the
      first column.
    sequence_column: of a table.
    strip: regular expression taken off the end of identifiers, such as `_\\d+`.
    licence: origin and licence, in the user's words.

  Raises:
    UserError: no such file, other columns, or unknown genes.
  """
  if _is_fasta(path):
    records = list(_records(path))
    tried = [[name.split('|')[0] for name, _ in records]]
    if any('|' in name for name, _ in records):
      tried.append([name.split('|')[-1] for name, _ in records])
    texts = [bytes(sequence) for _, sequence in records]
  else:
    frame = files.table(path)
    chosen = tuple(gene_columns) or (frame.columns[0],)
    tried = [frame[c] for c in files.columns(path, frame, chosen)]
    (column,) = files.columns(path, frame, [sequence_column])
    texts = [text.encode('ascii', 'replace') for text in frame[column]]
  wrong = [t for t in texts if t.translate(None, _LETTERS)]
  if wrong:
    raise errors.UserError(f'{path}: {wrong[0][:20]!r} is no DNA sequence')
  row_N = np.full(len(texts), -1, np.int32)
  reports = []
  try:
    ending = re.compile(f'(?:{strip})$')
  except re.error as error:
    raise errors.UserError(
      f'--strip {strip}: no regular expression ({error})'
    ) from None
  for column in tried:
    column = [ending.sub('', t) if strip else t for t in column]
    more_N, report = names.rows(column, species, genes)
    row_N = np.where(row_N < 0, more_N, row_N)
    reports.append(report)
  names.check_known(path, max(reports, key=lambda r: r['share_mapped']))
  known = np.flatnonzero(row_N >= 0)
  facts = files.source(path, licence) | {
    'species': gene_table.SPECIES[species],
    'sequences': len(texts),
    'sequences_lost': len(texts) - len(known),
    'genes': reports,
  }
  return Sequences(row_N[known], tuple(clean(texts[n]) for n in known), [facts])


def clean(text: bytes, skip_soft_masked: bool = False) -> bytes:
  """Upper case; U is T, and what is none of A, C, G, T is N."""
  if skip_soft_masked:
    text = text.translate(_LOWER_TO_N)
  return text.translate(_UPPER).translate(_TO_N)


@dataclasses.dataclass(frozen=True)
class _Window:
  upstream: int
  downstream: int


def _plain(chromosome: str) -> str:
  """1, X, MT: however the source writes it."""
  name = chromosome.removeprefix('chr')
  return 'MT' if name == 'M' else name


def _is_fasta(path: paths.PathLike) -> bool:
  with raw_files.opened(path) as file:
    return file.read(1) == b'>'


def _records(path: paths.PathLike) -> Iterator[tuple[str, bytearray]]:
  """Name and bases of every record; one is in memory at a time."""
  name, sequence = None, bytearray()
  with raw_files.opened(path) as file:
    for number, line in enumerate(file, 1):
      if line[:1] == b'>':
        if name is not None:
          yield name, sequence
        words = line[1:].split()
        name = words[0].decode('utf-8', 'replace') if words else ''
        sequence = bytearray()
        continue
      if name is None:
        raise errors.UserError(f'{path}: not FASTA (it begins without >)')
      line = line.strip()
      if line.translate(None, _LETTERS):
        raise errors.UserError(
          f'{path} line {number}: {line[:20]!r} is no DNA sequence'
        )
      sequence += line
  if name is None:
    raise errors.UserError(f'{path}: an empty FASTA file')
  yield name, sequence
