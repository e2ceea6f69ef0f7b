"""How cells were measured: molecules or reads, genome or panel.

Medians of one kind are not mixed with those of another. Reads of full-length
methods grow with the length of a gene, counts of molecules do not, and a panel
holds the genes that somebody chose.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

UMI, FULL_LENGTH, PANEL = KINDS = ('umi', 'full_length', 'panel')
CHOICES = ('auto', *KINDS)
MIXED = 'mixed'  # of a source; each cell is of one kind
COLUMN = 'assay'  # of obs, as the CELLxGENE schema names it
# Names as in the CELLxGENE Census and GEO: Smart-seq, Smart-seq2, Smart-seq v4,
# Smart-like, SMARTer, Fluidigm C1, FLASH-seq, Quartz-seq, Tang, "full length
# single cell RNA sequencing". STRT-seq and CEL-seq count molecules; so does
# Smart-seq3, of one end of each, beside its reads, and which of the two a
# matrix holds cannot be told: it is taken as reads.
_FULL_LENGTH = re.compile(
  r'smart[-_ ]?(seq|like|er)|smarter|fluidigm|\bc1\b|flash[-_ ]?seq'
  r'|quartz[-_ ]?seq|\btang\b|full[-_ ]?length',
  re.IGNORECASE,
)


def kind_of(name: str) -> str:
  """`full_length` where the name of an assay is one of reads, else `umi`."""
  return FULL_LENGTH if _FULL_LENGTH.search(name) else UMI


def kinds_of(codes_C: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """Int8 places in `KINDS`, by the assay of each cell; -1 codes are UMI."""
  kind_N = np.array([KINDS.index(kind_of(n)) for n in names] + [0], np.int8)
  return kind_N[codes_C]


def summary(kinds: Iterable[int]) -> str:
  """The kind of a source, from the places in `KINDS` of its cells."""
  found = {KINDS[kind] for kind in kinds}
  return found.pop() if len(found) == 1 else MIXED if found else UMI
