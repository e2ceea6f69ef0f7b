"""Tokens of the genes that some cells were measured for, and their names."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from genecompass_jax.analysis import gene_tokens
from genecompass_jax.prepare import sources


@dataclasses.dataclass(frozen=True)
class TokenTable:
  """T tokens of genes, with their names.

  Attributes:
    token_T: int32, ascending.
    gene_ids: Ensembl id of each; of a token that several species share, that
      of the first species of the vocabulary that the cells are of.
    symbols: likewise.
  """

  token_T: np.ndarray
  gene_ids: tuple[str, ...]
  symbols: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.token_T)

  def place_V(self, size: int) -> np.ndarray:
    """int32 [V]: place of every token in the table, -1 for others."""
    place_V = np.full(size, -1, np.int32)
    place_V[self.token_T] = np.arange(len(self.token_T))
    return place_V

  @classmethod
  def of(
    cls, stream: sources.CellStream, genes: Sequence[str] = ()
  ) -> 'TokenTable':
    """Tokens that cells of a stream can hold.

    Args:
      stream: the cells.
      genes: by any identifier, the genes that are asked for; all if empty.

    Raises:
      UserError: a gene that is not known, that the model has no token for, or
        that was not measured.
    """
    vocab = stream.vocabulary
    row_of = {}
    for species in reversed(stream.species):
      rows_R = vocab.gene_rows(species)[stream.measured(species)]
      # Of the genes of one species that share a token, the first names it.
      row_of |= {int(vocab.token_G[g]): g for g in rows_R[::-1].tolist()}
    tokens = sorted(row_of)
    if genes:
      # Each in the first species of the cells that has it.
      found = (gene_tokens.by_species(name, stream, vocab) for name in genes)
      tokens = sorted({next(iter(tokens.values())) for tokens in found})
    return cls(
      np.array(tokens, np.int32),
      tuple(vocab.genes.gene_ids[row_of[t]] for t in tokens),
      tuple(vocab.genes.symbols[row_of[t]] for t in tokens),
    )
