"""Held-out loss of a pretraining model, beside null models.

The null models see the same batches as the network: the same cells, the same
hidden genes, the same visible ranks and values. Everything is summed by slot
and divided once, over all held-out cells, by species, by dataset and by unit.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from genecompass_jax import (
  corpus as corpus_lib,
  data,
  encoding,
  knowledge as knowledge_lib,
  losses,
  model as model_lib,
  nulls,
  processes,
  progress,
  reading,
  schemas,
  scoring,
  sharding,
)

Sums = dict[str, dict[str, float]]  # group -> what was summed

# A corpus of many units would fill metrics.jsonl; past these the line holds
# the totals, the species and the datasets only.
MAX_UNITS = 40
_READ_BLOCKS = 8
# Of a species, for the null models: more would not change what they count,
# a gene in one of a thousand cells is still met two hundred times.
MAX_NULL_CELLS = 200_000


@functools.partial(jax.jit, static_argnums=(3, 4))
def _slot_losses(params, batch, knowledge, config, place):
  found = scoring.slot_losses(params, batch, knowledge, config)
  return jax.lax.with_sharding_constraint(found, place)


class Evaluator:
  """Evaluates parameters on the held-out cells of a corpus.

  The cells, their masks and the losses of the null models are the same at
  every call, so the null models are scored once.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    config: model_lib.ModelConfig,
    encoding_config: encoding.EncodingConfig,
    data_config: data.DataConfig,
    loss_config: losses.LossConfig,
    null_models: nulls.NullModels | None,
    *,
    split: str = 'validation',
    max_cells: int | None = None,
  ):
    """Evaluates on at most `max_cells` evenly spaced cells of a split.

    Raises:
      UserError: the null models are of another encoding or mask.
    """
    if null_models is not None:
      null_models.check(encoding_config, data_config.mask)
    self._corpus, self._config, self._split = corpus, config, split
    self._loss_config, self._nulls = loss_config, null_models
    self._num_rows = data_config.rows_per_batch
    self._batches = functools.partial(
      data.evaluation_batches,
      corpus,
      encoding_config,
      data_config,
      split,
      max_cells=max_cells,
    )
    self._groups = _cell_groups(corpus, split)
    self._leaky = _leaky_groups(corpus)
    self._null_sums: Sums | None = None

  def __call__(
    self,
    params: model_lib.Params,
    knowledge: knowledge_lib.Knowledge,
    mesh: jax.sharding.Mesh,
    on_batch: Callable[[tuple[int, ...]], None] = lambda shape: None,
  ) -> dict[str, Any]:
    """Scores parameters; in several processes all call it, and all are told.

    Args:
      params: of the model.
      knowledge: tables on the devices.
      mesh: of the devices.
      on_batch: called before every batch with the shape of its slots; a new one
        is compiled for.

    Returns:
      `eval_loss`, `eval_id_loss`, `eval_value_loss`, `null_*`, `eval_cells`,
      `eval_masked`, and the same by group under `by`: {'species=human': ...,
      'dataset=...': ..., 'unit=...': ...}. `leaky` is true where cells were
      held out one by one, so that others of their donor were trained on.
    """
    sums: Sums = collections.defaultdict(lambda: collections.defaultdict(float))
    score_nulls = self._nulls is not None and self._null_sums is None
    held_B = sharding.process_rows(mesh, self._num_rows)
    owned_B = sharding.owned_rows(mesh, self._num_rows)
    place = sharding.batch_sharding(mesh)
    for host_batch in self._batches(rows=held_B):
      on_batch(host_batch.batch.cells.segments_BL.shape)
      batch = sharding.put_batch(host_batch.batch, mesh, self._num_rows)
      id_BK, value_BK = _slot_losses(
        params, batch, knowledge, self._config, place
      )
      if len(owned_B):
        mine = _some_rows(host_batch, np.searchsorted(held_B, owned_B))
        slots = {'id': _local_rows(id_BK, owned_B)}
        if value_BK is not None:
          slots['value'] = _local_rows(value_BK, owned_B)
        if score_nulls:
          slots |= self._nulls.losses(mine)
        self._add(sums, mine, slots)
      jax.block_until_ready(id_BK)
    merged = processes.gather(sums, _added)
    if score_nulls:
      self._null_sums = {
        group: {k: v for k, v in values.items() if k.startswith('null_')}
        for group, values in merged.items()
      }
    elif self._null_sums is not None:
      for group, values in self._null_sums.items():
        merged[group] |= values
    results = {g: self._means(values) for g, values in merged.items()}
    for group in self._leaky & results.keys():
      results[group]['leaky'] = True
    return {**results.pop('all'), 'by': results}

  def _add(self, sums, host_batch, slots: dict[str, np.ndarray]) -> None:
    """Adds the slots of a batch to the sums of all groups they belong to."""
    batch = host_batch.batch
    cells_B = host_batch.cell_index_BS[:, 0]  # one cell a row in evaluation
    rows = np.flatnonzero(cells_B >= 0)
    id_weights_BK = np.asarray(batch.id_weights_BK)
    value_weights_BK = np.asarray(batch.value_weights_BK)
    columns = {
      'id_weight': id_weights_BK,
      'value_weight': value_weights_BK,
      'masked': np.maximum(id_weights_BK, value_weights_BK),
    }
    for name, values_BK in slots.items():
      is_value = name == 'value' or name.startswith('null_value')
      weights_BK = value_weights_BK if is_value else id_weights_BK
      columns[name] = np.where(weights_BK > 0, values_BK, 0.0) * weights_BK
    columns_B = {
      name: array.sum(1, dtype=np.float64)[rows]
      for name, array in columns.items()
    }
    columns_B['cells'] = np.ones(len(rows))
    for name, values in columns_B.items():
      sums['all'][name] += float(values.sum())
    for kind, (codes_C, names) in self._groups.items():
      codes = codes_C[cells_B[rows]]
      for code in np.unique(codes):
        group = sums[f'{kind}={names[code]}']
        for name, values in columns_B.items():
          group[name] += float(values[codes == code].sum())

  def _means(self, values: dict[str, float]) -> dict[str, float]:
    """Sums of a group -> the numbers of an evaluation line."""
    num_ids = max(values.pop('id_weight'), 1.0)
    num_values = max(values.pop('value_weight'), 1.0)
    line = {
      'eval_cells': int(values.pop('cells')),
      'eval_masked': int(max(values.pop('masked'), 1.0)),
      'eval_id_loss': values.pop('id') / num_ids,
    }
    line['eval_loss'] = line['eval_id_loss']
    if 'value' in values:
      line['eval_value_loss'] = values.pop('value') / num_values
      line['eval_loss'] = losses.combine(
        line['eval_id_loss'], line['eval_value_loss'], self._loss_config
      )
    for name, value in values.items():
      is_value = name.startswith('null_value')
      line[name] = value / (num_values if is_value else num_ids)
    return line


def fit_nulls(
  corpus: corpus_lib.Corpus,
  encoding_config: encoding.EncodingConfig,
  data_config: data.DataConfig,
  *,
  split: str = 'train',
) -> nulls.NullModels:
  """Fits the null models on training cells of a corpus, in one pass.

  All cells are counted where a species has up to `MAX_NULL_CELLS` of them, else
  evenly spaced blocks that hold about so many.
  """
  medians = corpus.medians(encoding_config.mode)
  num_species = len(corpus.vocabulary.species)
  return nulls.NullModels.fit(
    _training_cells(corpus, encoding_config, split),
    encoding_config=encoding_config,
    mask=data_config.mask,
    divisor_SV=np.stack([medians.divisor_V(s) for s in range(num_species)]),
    species_tokens=[
      corpus.vocabulary.species_tokens(s) for s in range(num_species)
    ],
    seed=data_config.seed,
  )


def _training_cells(
  corpus: corpus_lib.Corpus,
  encoding_config: encoding.EncodingConfig,
  split: str,
) -> Iterator[nulls.TrainingCells]:
  """Encoded cells of a split, a few blocks at a time."""
  medians = corpus.medians(encoding_config.mode)
  stores = corpus.stores(split)
  total = sum(min(store.num_cells, MAX_NULL_CELLS) for store in stores)
  with progress.Progress(total, 'cells', 'null models') as bar:
    for store in stores:
      token_R = corpus.tokens(store.species)
      encoder = encoding.CellEncoder(
        encoding_config, token_R, medians.divisor_V(store.species)
      )
      measured = reading.measured_tokens(store, token_R)
      panel_C = store.panels[1][store.obs('source')]
      chosen = _spaced_blocks(store)
      for start in range(0, len(chosen), _READ_BLOCKS):
        blocks = chosen[start : start + _READ_BLOCKS]
        for block, cells in zip(blocks, store.read_blocks(blocks)):
          first = block * store.block_cells
          panel_c = panel_C[first : first + cells.num_cells]
          measured_V = np.zeros(corpus.vocabulary.size)
          for panel, number in zip(*np.unique(panel_c, return_counts=True)):
            measured_V[measured[panel]] += number
          yield nulls.TrainingCells(
            store.species, encoder.encode(cells), measured_V
          )
          bar.update(cells.num_cells)


def _spaced_blocks(store: corpus_lib.Store) -> list[int]:
  """Evenly spaced blocks of `MAX_NULL_CELLS` cells, or all blocks."""
  number = -(-MAX_NULL_CELLS // store.block_cells)
  number = min(number, store.num_blocks)
  return [i * store.num_blocks // number for i in range(number)]


def _cell_groups(
  corpus: corpus_lib.Corpus, split: str
) -> dict[str, tuple[np.ndarray, list[str]]]:
  """Groupings of the split's cells: kind -> (code of each cell, names)."""
  stores = corpus.stores(split)
  groups = {
    'species': (
      np.concatenate([np.full(s.num_cells, s.species) for s in stores]),
      list(corpus.vocabulary.species),
    )
  }
  for kind in ('dataset', 'unit'):
    names: dict[str, int] = {}
    parts = []
    for store in stores:
      own = [names.setdefault(n, len(names)) for n in store.categories(kind)]
      parts.append(np.asarray(own, np.int64)[store.obs(kind)])
    codes_C = np.concatenate(parts)
    if kind == 'dataset' or len(np.unique(codes_C)) <= MAX_UNITS:
      groups[kind] = codes_C, list(names)
  return groups


def _leaky_groups(corpus: corpus_lib.Corpus) -> set[str]:
  """Groups with cells that were held out one by one."""
  sources = corpus.manifest['sources']
  leaky = [source for source in sources if source.get('unit') == 'cell']
  groups = {f'dataset={source["dataset"]}' for source in leaky}
  groups |= {f'unit={source["dataset"]}' for source in leaky}
  groups |= {f'species={name}' for s in leaky for name in s['species']}
  return groups | {'all'} if leaky else groups


def _some_rows(
  host_batch: schemas.HostBatch, rows: np.ndarray
) -> schemas.HostBatch:
  """A batch of some of its rows."""
  if len(rows) == len(host_batch.cell_index_BS):
    return host_batch
  return dataclasses.replace(
    host_batch,
    batch=jax.tree.map(lambda x: np.asarray(x)[rows], host_batch.batch),
    cell_index_BS=host_batch.cell_index_BS[rows],
  )


def _local_rows(array: jax.Array, rows: np.ndarray) -> np.ndarray:
  """Global rows, that this process holds, of an array split by rows."""
  if jax.process_count() == 1:
    return np.asarray(array)[rows]
  found = {}
  for shard in array.addressable_shards:
    first = shard.index[0].start or 0
    found |= {first + i: row for i, row in enumerate(np.asarray(shard.data))}
  return np.stack([found[row] for row in rows.tolist()])


def _added(parts: list[Sums]) -> Sums:
  """Sums of all processes, added in their order."""
  total: Sums = {}
  for part in parts:
    for group, values in part.items():
      mine = total.setdefault(group, {})
      for name, value in values.items():
        mine[name] = mine.get(name, 0.0) + value
  return total
