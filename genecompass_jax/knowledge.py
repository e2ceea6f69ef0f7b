"""Prior knowledge about genes: tables of vectors, aligned to the vocabulary.

A prior (regulatory network, promoter, gene family, co-expression, or any
other) is a table with one vector a gene. Genes that share a token keep their
own rows: a mouse cell that holds the token of an orthologous pair reads the
row of the mouse gene. Tables are frozen and passed to jitted functions as an
argument, so that they are neither trained nor baked into compiled programs.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from genecompass_jax import (
  errors,
  paths,
  prior_tables,
  vocabulary as vocabulary_lib,
)

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knowledge:
  """Prior tables as the model reads them; G rows of genes.

  Attributes:
    row_SV: int32 row of the tables that a token takes in a cell of a species.
      Rows 0 and 1 are those of `<pad>` and `<mask>`: zero vectors.
    tables: name -> float32 [rows, P] vectors; zero where a gene has none.
    has_vector: name -> bool [rows]; False where a gene has no vector. Special
      tokens count as having one (zero): hidden is not the same as unknown.
  """

  row_SV: Array
  tables: dict[str, Array]
  has_vector: dict[str, Array]

  @property
  def widths(self) -> tuple[tuple[str, int], ...]:
    """(name, P) of every table, in the order of `tables`."""
    return tuple((name, t.shape[1]) for name, t in self.tables.items())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Folded:
  """What a model makes of every gene before its value is known.

  Takes the place of `Knowledge` where parameters no longer change.

  Attributes:
    table_SVD: float32 sum of the projected word vector and priors, by species
      and token.
  """

  table_SVD: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AtSlots:
  """What a model makes of the genes of one batch, slot by slot.

  Takes the place of `Knowledge` where analyses ask what the parts of a gene do:
  they may be changed before the model goes on, and gradients reach them.

  Attributes:
    sum_BLD: float32 sum of the projected word vector and priors of each slot,
      which `Folded` has by token.
  """

  sum_BLD: Array


def empty(num_species: int, vocabulary_size: int) -> Knowledge:
  """No priors at all."""
  row_SV = np.zeros((num_species, vocabulary_size), np.int32)
  return Knowledge(row_SV=row_SV, tables={}, has_vector={})


def align(
  vocabulary: vocabulary_lib.Vocabulary,
  priors: Mapping[str, tuple[Sequence[str], np.ndarray]],
) -> Knowledge:
  """Lays prior tables out in the order of a vocabulary's genes.

  Args:
    vocabulary: genes and tokens of the model.
    priors: name -> (gene ids, float [genes, P] vectors); genes outside of the
      vocabulary are ignored.

  Returns:
    Tables of NUM_SPECIAL + G rows; missing genes are marked.

  Raises:
    UserError: a vector is not finite, or a gene stands in a table twice.
  """
  special = vocabulary_lib.NUM_SPECIAL
  genes_SV = vocabulary.prior_rows_SV()
  row_SV = np.where(genes_SV >= 0, genes_SV + special, 0).astype(np.int32)
  row_SV[:, :special] = np.arange(special)
  row_of_gene = {
    gene: special + g for g, gene in enumerate(vocabulary.genes.gene_ids)
  }
  tables, has_vector = {}, {}
  for name, (gene_ids, vectors) in priors.items():
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(gene_ids):
      raise errors.UserError(
        f'prior {name!r}: {len(gene_ids)} gene ids for vectors of shape '
        f'{vectors.shape}; give one vector a gene'
      )
    if not np.isfinite(vectors).all():
      raise errors.UserError(
        f'prior {name!r} holds values that are not finite; rebuild its table'
      )
    rows = np.array([row_of_gene.get(gene, -1) for gene in gene_ids], np.int64)
    known = rows >= 0
    if len(np.unique(rows[known])) != known.sum():
      raise errors.UserError(
        f'prior {name!r} names a gene twice; keep one vector a gene'
      )
    num_rows = special + len(row_of_gene)
    table = np.zeros((num_rows, vectors.shape[1]), np.float32)
    table[rows[known]] = vectors[known]
    has = np.zeros(num_rows, bool)
    has[:special] = True
    has[rows[known]] = True
    tables[name], has_vector[name] = table, has
  return Knowledge(row_SV=row_SV, tables=tables, has_vector=has_vector)


def rounded(knowledge: Knowledge, dtype: str) -> Knowledge:
  """Tables in the precision that a model's products read them in anyway."""
  tables = {
    name: np.asarray(table).astype(jax.numpy.dtype(dtype))
    for name, table in knowledge.tables.items()
  }
  return dataclasses.replace(knowledge, tables=tables)


def read_table(path: paths.PathLike) -> tuple[tuple[str, ...], np.ndarray]:
  """Reads a prior table: a parquet file with `gene_id` and `vector` columns.

  Returns:
    Gene ids and float32 [genes, P] vectors.

  Raises:
    UserError: no such file, not parquet, other columns, ragged vectors, or
      not the table that the JSON file beside it names.
  """
  prior = prior_tables.read(path)
  return prior.gene_ids, prior.vectors_GP


def coverage(knowledge: Knowledge) -> dict[str, float]:
  """Share of gene rows that have a vector, by prior."""
  special = vocabulary_lib.NUM_SPECIAL
  return {
    name: float(np.asarray(has)[special:].mean()) if len(has) > special else 0.0
    for name, has in knowledge.has_vector.items()
  }
