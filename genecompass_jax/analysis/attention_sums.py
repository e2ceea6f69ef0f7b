"""Sums of attention between some genes and all genes, over groups of cells.

Weights of a batch come to the host and are added up in float64, cell by cell: no
sum depends on devices, and what is held is sums, never a matrix of a cell.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from genecompass_jax import errors, model as model_lib, pretrained, progress
from genecompass_jax.analysis import (
  attention_weights,
  cell_choice,
  model_batches,
  model_cells,
  placed_model,
  token_table,
)
from genecompass_jax.prepare import sources

CLS = 'CLS'


@dataclasses.dataclass(frozen=True)
class Asked:
  """A asked genes; the first is CLS where the model has it.

  Attributes:
    token_A: int32; -1 for CLS.
    names: as they are shown.
  """

  token_A: np.ndarray
  names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.names)

  @classmethod
  def of(
    cls, stream: sources.CellStream, genes: Sequence[str], use_cls: bool
  ) -> 'Asked':
    """Genes by any identifier, behind CLS.

    Raises:
      UserError: a gene that is not known, or was not measured.
    """
    tokens, names = ([-1], [CLS]) if use_cls else ([], [])
    if genes:
      found = token_table.TokenTable.of(stream, genes)
      tokens += found.token_T.tolist()
      names += [s or g for s, g in zip(found.symbols, found.gene_ids)]
    return cls(np.array(tokens, np.int32), tuple(names))


@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums over the cells of U pairs of group and unit, to T partners.

  Attributes:
    table: the partners.
    pairs: (group, unit) of each sum, by group.
    pair_C: int32 pair of every cell, -1 for those that are not asked.
    weights_2UNAT: float64; first the asked gene gives, then it receives; N are
      layers and heads together.
    even_2UNAT: likewise, weight x slots of the cell.
    both_UAT: int64 cells that have both.
    ranks_UT: float64 ranks of the partners.
    cells_UT: int64 cells that have the partner.
  """

  table: token_table.TokenTable
  pairs: tuple[tuple[int, int], ...]
  pair_C: np.ndarray
  weights_2UNAT: np.ndarray
  even_2UNAT: np.ndarray
  both_UAT: np.ndarray
  ranks_UT: np.ndarray
  cells_UT: np.ndarray

  @classmethod
  def empty(
    cls,
    stream: sources.CellStream,
    chosen: cell_choice.ChosenCells,
    asked: Asked,
    number: int,
    memory_gib: float,
  ) -> 'Sums':
    """Sums of nothing.

    Args:
      stream: the cells.
      chosen: those that are asked.
      asked: the genes.
      number: layers and heads together.
      memory_gib: that sums may take.

    Raises:
      UserError: they take more.
    """
    table = token_table.TokenTable.of(stream)
    pair_C = np.full(stream.source.num_cells, -1, np.int32)
    everyone_C = np.ones(stream.source.num_cells, bool)
    pairs = []
    for group in chosen.codes:
      rows = chosen.rows(group, everyone_C)
      units, place = np.unique(chosen.units.code_C[rows], return_inverse=True)
      pair_C[rows] = len(pairs) + place
      pairs += [(group, unit) for unit in units.tolist()]
    shape = 2, len(pairs), number, len(asked), len(table)
    need = 8 * (2 + 1 / number) * math.prod(shape) / 2**30
    if not need <= memory_gib:  # NaN included
      raise errors.UserError(
        f'attention of {len(asked)} genes to {len(table):,}, in {len(pairs)} '
        f'groups and units, takes {need:.2g} GiB, more than the '
        f'{memory_gib:g} given: name fewer genes, groups, layers or heads, or '
        'give more memory (--memory-gib)'
      )
    return cls(
      table,
      tuple(pairs),
      pair_C,
      np.zeros(shape),
      np.zeros(shape),
      np.zeros((len(pairs), len(asked), len(table)), np.int64),
      np.zeros((len(pairs), len(table))),
      np.zeros((len(pairs), len(table)), np.int64),
    )

  def add(
    self,
    pair: int,
    place_L: np.ndarray,
    weights_2NAL: np.ndarray,
    has_A: np.ndarray,
    num_slots: int,
  ) -> None:
    """Adds one cell of L genes.

    Args:
      pair: of the cell.
      place_L: of its genes in the table, -1 for none; by falling rank.
      weights_2NAL: that asked genes give to them, and receive.
      has_A: asked genes that it has.
      num_slots: of the cell, CLS included.
    """
    known = np.flatnonzero(place_L >= 0)
    at = place_L[known]
    weights_2NAL = np.where(has_A[:, None], weights_2NAL[..., known], 0.0)
    weights_L2NA = np.moveaxis(weights_2NAL, -1, 0)
    self.weights_2UNAT[:, pair, :, :, at] += weights_L2NA
    self.even_2UNAT[:, pair, :, :, at] += weights_L2NA * num_slots
    self.both_UAT[pair][:, at] += has_A[:, None]
    self.ranks_UT[pair, at] += known
    self.cells_UT[pair, at] += 1


def run(
  sums: Sums,
  stream: sources.CellStream,
  model: pretrained.PretrainedModel,
  placed: placed_model.PlacedModel,
  asked: Asked,
  numbers: tuple[int, ...],
  heads: tuple[int, ...],
  batch_size: int,
) -> None:
  """Runs all asked cells once, and adds them up.

  Args:
    sums: of nothing.
    stream: the cells.
    model: whose medians and mode encode them.
    placed: the same on the devices, up to the last block that is asked.
    asked: the genes.
    numbers: of the blocks, from 1.
    heads: from `attention_weights.head_numbers`.
    batch_size: rows that run together over all local devices.
  """
  num_rows = placed.num_rows(batch_size)
  whole = NamedSharding(placed.sharding.mesh, PartitionSpec())
  token_A = jax.device_put(asked.token_A, whole)
  place_V = sums.table.place_V(model.config.vocabulary_size)
  wanted_C = sums.pair_C >= 0
  chunks = model_cells.encode(stream, model, wanted_C)
  use_cls = int(model.config.use_cls)
  with progress.Progress(int(wanted_C.sum()), 'cells', 'attention') as bar:
    for batch in model_batches.of_chunks(chunks, placed.buckets, num_rows):
      weights_2NBAL, has_BA = (
        np.asarray(x)
        for x in _weights(
          placed.params,
          placed.put(batch.cells),
          placed.knowledge,
          token_A,
          placed.config,
          numbers,
          heads,
        )
      )
      lengths_B = ((batch.cells.segments_BL > 0) & ~batch.cells.is_cls_BL).sum(
        1
      )
      for b, cell in enumerate(batch.index_C):
        genes = slice(1, 1 + int(lengths_B[b]))
        sums.add(
          sums.pair_C[cell],
          place_V[batch.cells.gene_ids_BL[b, genes]],
          weights_2NBAL[:, :, b, :, genes].astype(np.float64),
          has_BA[b],
          int(lengths_B[b]) + use_cls,
        )
      bar.update(len(batch.index_C))


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _weights(params, batch, knowledge, token_A, config, numbers, heads):
  """[2, N, B, A, L]: what asked genes give to all slots, and receive."""
  slot_BA, has_BA = attention_weights.slots_of(batch, token_A)
  # CLS has no token, and stands in slot 0.
  has_BA = has_BA | ((token_A < 0) & (batch.segments_BL[:, :1] > 0))
  every_BL = jnp.broadcast_to(
    jnp.arange(batch.gene_ids_BL.shape[1]), batch.gene_ids_BL.shape
  )
  found = []
  with model_lib.full_precision(config):
    for block in attention_weights.blocks(
      params, batch, knowledge, config, numbers, heads
    ):
      gives_BHAL = block.weights(slot_BA)
      receives_BHLA = block.weights(every_BL, slot_BA)
      both_2BHAL = jnp.stack([gives_BHAL, receives_BHLA.swapaxes(2, 3)])
      found.append(jnp.moveaxis(both_2BHAL, 2, 1))
  return jnp.concatenate(found, 1), has_BA
