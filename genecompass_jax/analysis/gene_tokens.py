"""Genes by the names that users give, as tokens; and tokens by their names.

Attribution, attention and perturbation all ask for genes through this, and
refuse them with the same words.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import (
  errors,
  gene_ids as gene_ids_lib,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.prepare import sources


def tokens_of(
  names: Sequence[str],
  vocab: vocabulary_lib.Vocabulary,
  species: int,
  *,
  measured_V: np.ndarray | None = None,
  source: str = '',
) -> list[int]:
  """Tokens of genes, by any identifier.

  Args:
    names: symbols, aliases, Ensembl or Entrez ids.
    vocab: of the model.
    species: code of the species that the names are of.
    measured_V: bool, tokens that the cells were measured for; None: any.
    source: name of these cells.

  Raises:
    UserError: a gene that is not known, that the model has no token for, or
      that the cells were not measured for.
  """
  table = sources.table_of(vocab)
  resolved = gene_ids_lib.resolve(names, species, table)
  tokens = []
  for name, gene_id, how in zip(names, resolved.gene_ids, resolved.how):
    if gene_id is None:
      why = 'names several genes' if how == 'ambiguous' else 'is not known'
      raise errors.UserError(
        f'gene {name!r} {why} in {vocab.species[species]}; give its Ensembl id'
      )
    token = int(vocab.tokens([gene_id])[0])
    if token < 0:
      raise errors.UserError(
        f'gene {name!r} ({gene_id}) is none that this model knows'
      )
    if measured_V is not None and not measured_V[token]:
      raise errors.UserError(
        f'gene {name!r} ({gene_id}) was not measured in {source}: nothing can '
        'be said of it; name another'
      )
    tokens.append(token)
  return tokens


def by_species(
  name: str, stream: sources.CellStream, vocab: vocabulary_lib.Vocabulary
) -> dict[int, int]:
  """Tokens of a gene in those species of some cells that know the name.

  Args:
    name: symbol, alias, Ensembl or Entrez id.
    stream: the cells.
    vocab: of the model.

  Returns:
    By species code, in the order of the codes. Orthologues may share a token,
    and genes of other species may have other names.

  Raises:
    UserError: none of the species has the gene, for the reason of the first.
  """
  found, problem = {}, None
  for species in stream.species:
    try:
      (found[species],) = tokens_of(
        [name],
        vocab,
        species,
        measured_V=measured(stream, species),
        source=stream.source.name,
      )
    except errors.UserError as error:
      problem = problem or error
  if not found and problem is not None:
    raise problem
  return found


def measured(stream: sources.CellStream, species: int) -> np.ndarray:
  """Bool [V]: tokens that the source measured in a species."""
  measured_V = np.zeros(stream.vocabulary.size, bool)
  token_R = stream.tokens(species)[stream.measured(species)]
  measured_V[token_R[token_R >= 0]] = True
  return measured_V


def symbols_of(
  vocab: vocabulary_lib.Vocabulary, species: int
) -> Mapping[int, str]:
  """Symbols of a species' tokens; of a shared token those of all members."""
  symbols = [s or g for s, g in zip(vocab.genes.symbols, vocab.genes.gene_ids)]
  return _joined(symbols, vocab, species)


def gene_ids_of(
  vocab: vocabulary_lib.Vocabulary, species: int
) -> Mapping[int, str]:
  """Ensembl ids of a species' tokens; of a shared token those of all members."""
  return _joined(vocab.genes.gene_ids, vocab, species)


def names_of(
  vocab: vocabulary_lib.Vocabulary | None,
  tokens_N: np.ndarray,
  species_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Symbols and Ensembl ids of tokens, in the words of the cell's species."""
  symbols_N = np.full(len(tokens_N), '', object)
  gene_ids_N = symbols_N.copy()
  if vocab is None:
    return symbols_N, gene_ids_N
  for species in np.unique(species_N).tolist():
    symbols_V = np.array(vocab.token_symbols(), object)
    for token, name in symbols_of(vocab, species).items():
      symbols_V[token] = name
    gene_ids_V = np.array(vocab.token_gene_ids(), object)
    rows_R = vocab.gene_rows(species)[::-1]  # of a shared token the first
    gene_ids_V[vocab.token_G[rows_R]] = [
      vocab.genes.gene_ids[r] for r in rows_R
    ]
    mine_N = species_N == species
    symbols_N[mine_N] = symbols_V[tokens_N[mine_N]]
    gene_ids_N[mine_N] = gene_ids_V[tokens_N[mine_N]]
  return symbols_N, gene_ids_N


def _joined(
  names_G: Sequence[str], vocab: vocabulary_lib.Vocabulary, species: int
) -> dict[int, str]:
  found: dict[int, list[str]] = {}
  for row in vocab.gene_rows(species).tolist():
    found.setdefault(int(vocab.token_G[row]), []).append(names_G[row])
  return {token: '/'.join(members) for token, members in found.items()}
