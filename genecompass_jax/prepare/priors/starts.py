"""Transcription starts of genes from a GTF file of Ensembl or GENCODE."""

import dataclasses
import re

import numpy as np

from genecompass_jax import errors, gene_table, paths
from genecompass_jax.prepare import raw_files
from genecompass_jax.prepare.priors import files, names

CHOICES = ('canonical', 'longest', 'upstream')
_GENE = re.compile(r'\bgene_id "([^"]+)"')
_NAME = re.compile(r'\bgene_name "([^"]+)"')
_TRANSCRIPT = re.compile(r'\btranscript_id "([^"]+)"')


@dataclasses.dataclass(frozen=True, eq=False)
class Starts:
  """Where genes of one species begin.

  Attributes:
    row_N: int32 rows of the gene table, all different.
    chromosomes: name of the sequence of each.
    position_N: int64, from 0, of the first transcribed base.
    is_reverse_N: bool; on the reverse strand.
    facts: file, sha256, licence, and what was lost.
  """

  row_N: np.ndarray
  chromosomes: tuple[str, ...]
  position_N: np.ndarray
  is_reverse_N: np.ndarray
  facts: dict


@dataclasses.dataclass
class _Transcript:
  gene: str
  chromosome: str
  start: int
  end: int
  is_reverse: bool
  rank: int  # 0 for the canonical one, then MANE, basic, any
  exons: int = 0

  @property
  def position(self) -> int:
    return self.end - 1 if self.is_reverse else self.start - 1


def read(
  path: paths.PathLike,
  species: int,
  genes: gene_table.GeneTable,
  choice: str = 'canonical',
  licence: str = '',
) -> Starts:
  """One start a gene.

  Args:
    path: GTF, plain or gzip.
    species: code of its genes.
    genes: the gene table.
    choice: 'canonical': of the transcript tagged Ensembl_canonical, else
      MANE_Select, else the longest (sum of exons) of the basic set, else of
      all; 'longest': whatever the tags; 'upstream': the transcript that begins
      first. A gene without transcripts begins where its own line says.
    licence: origin and licence, in the user's words.

  Raises:
    UserError: no such file, a line that is not GTF, or unknown genes.
  """
  if choice not in CHOICES:
    raise errors.UserError(f'TSS {choice!r}: give one of {", ".join(CHOICES)}')
  transcripts, gene_lines, symbols = _parse(path)
  best = {}
  for key, transcript in sorted(transcripts.items()):
    order = _order(transcript, choice)
    held = best.get(transcript.gene)
    if held is None or order < held[0]:
      best[transcript.gene] = order, transcript, key
  without = [gene for gene in gene_lines if gene not in best]
  chosen = {gene: held[1] for gene, held in best.items()}
  chosen |= {gene: gene_lines[gene] for gene in without}
  listed = sorted(chosen)
  row_N, report = names.rows(listed, species, genes)
  by_name, _ = names.rows([symbols.get(i, '') for i in listed], species, genes)
  # A gene id that the table does not know may have a symbol that it does.
  of_id = set(row_N[row_N >= 0].tolist())
  is_named_N = (row_N < 0) & (by_name >= 0) & ~np.isin(by_name, list(of_id))
  row_N = np.where(is_named_N, by_name, row_N)
  names.check_known(path, report, 0.05)  # most genes of a GTF are pseudogenes
  kept: dict[int, str] = {}
  for gene, row in zip(listed, row_N.tolist()):
    exact = gene.partition('.')[0] == (genes.gene_ids[row] if row >= 0 else '')
    if row >= 0 and (row not in kept or exact):
      kept[row] = gene
  rows = sorted(kept)
  found = [chosen[kept[row]] for row in rows]
  facts = files.source(path, licence) | {
    'species': gene_table.SPECIES[species],
    'tss': choice,
    'genes_in_file': len(listed),
    'genes_without_transcripts': len(without),
    'genes_by_symbol': int(is_named_N.sum()),
    'genes': report,
  }
  return Starts(
    np.array(rows, np.int32),
    tuple(t.chromosome for t in found),
    np.array([t.position for t in found], np.int64),
    np.array([t.is_reverse for t in found], bool),
    facts,
  )


def _order(transcript: _Transcript, choice: str) -> tuple:
  """Smaller is better; equal ones are ordered by their ids."""
  if choice == 'upstream':
    place = transcript.position
    return (-place if transcript.is_reverse else place,)
  rank = transcript.rank if choice == 'canonical' else 0
  length = transcript.exons or transcript.end - transcript.start + 1
  return rank, -length


def _parse(path):
  """Transcripts by id, lines of genes by id, and symbols by gene id."""
  transcripts: dict[str, _Transcript] = {}
  gene_lines: dict[str, _Transcript] = {}
  exons: dict[str, int] = {}
  symbols: dict[str, str] = {}
  number = 0
  for number, line in enumerate(raw_files.lines(path), 1):
    if not line or line[0] == '#':
      continue
    parts = line.split('\t')
    if len(parts) != 9:
      raise errors.UserError(
        f'{path} line {number}: {len(parts)} columns where GTF has nine'
      )
    chromosome, _, feature, start, end, _, strand, _, notes = parts
    if feature not in ('gene', 'transcript', 'exon'):
      continue
    gene = _GENE.search(notes)
    if not (gene and start.isdigit() and end.isdigit() and strand in '+-'):
      if gene and strand == '.':
        continue
      raise errors.UserError(
        f'{path} line {number}: not GTF (it needs gene_id "...", two positions '
        'and a strand); GFF3 is not read'
      )
    key = _TRANSCRIPT.search(notes)
    if feature == 'exon':
      if key:
        length = int(end) - int(start) + 1
        exons[key[1]] = exons.get(key[1], 0) + length
      continue
    name = _NAME.search(notes)
    if name:
      symbols[gene[1]] = name[1]
    made = _Transcript(
      gene[1], chromosome, int(start), int(end), strand == '-', _rank(notes)
    )
    if feature == 'gene':
      gene_lines.setdefault(gene[1], made)
    elif key:
      transcripts.setdefault(key[1], made)
  if not gene_lines and not transcripts:
    raise errors.UserError(
      f'{path}: no genes and no transcripts in {number:,} lines; give the GTF '
      'of Ensembl or GENCODE'
    )
  for key, length in exons.items():
    if key in transcripts:
      transcripts[key].exons = length
  return transcripts, gene_lines, symbols


def _rank(notes: str) -> int:
  for rank, tag in enumerate(('Ensembl_canonical', 'MANE_Select', '"basic"')):
    if tag in notes:
      return rank
  return 3
