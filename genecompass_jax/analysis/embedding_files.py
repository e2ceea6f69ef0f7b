"""Embeddings from file to file: larger than memory, and resumable.

Finished cells lie beside the output (`unfinished`) until all are there; then a
copy of the file gets them, block by block, and takes the name of the output. In
memory are labels, chunks of cells and the batches in flight.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from genecompass_jax import paths, pretrained, progress
from genecompass_jax.analysis import (
  cell_columns,
  embeddings,
  model_cells,
  placed_model,
  unfinished,
)
from genecompass_jax.prepare import h5ad_copy, sources
from genecompass_jax.prepare.readers import formats

_EMBEDDING = 'embedding'
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Written:
  """What `embed_file` wrote.

  Attributes:
    path: of the file.
    num_cells: in it.
    width: of their embeddings.
    num_before: cells that an earlier, interrupted call had finished.
    has_ood: whether there is a column gc_ood; uns says why not.
    uns: where the numbers come from, as in the file.
  """

  path: str
  num_cells: int
  width: int
  num_before: int
  has_ood: bool
  uns: dict[str, Any]


def embed_file(
  cells: paths.PathLike,
  output: paths.PathLike,
  model: pretrained.PretrainedModel,
  *,
  states: embeddings.StateConfig | None = None,
  reading: sources.SourceConfig = sources.SourceConfig(),
  limit: int = 0,
  overwrite: bool = False,
) -> Written:
  """Embeds a file of cells into a copy of it; interrupted, it goes on.

  The output appears when it is whole. Until then, and after an interruption
  of any kind, finished cells are in OUTPUT.unfinished; the same call goes on
  with them.

  Args:
    cells: file or folder of any format.
    output: h5ad file to write: a copy of an h5ad file, or for other formats,
      and with `limit`, a new one with labels and embeddings, without counts.
    model: a restored model.
    states: which states, and how they are computed.
    reading: species, layer and what else a format needs.
    limit: embed the first so many cells only; 0: all.
    overwrite: replace the output, and finished cells of other settings.

  Raises:
    UserError: as `embeddings.embed_cells`; the output cannot be written; there
      are finished cells of another file, model or option; or another process
      writes the output.
  """
  cells, output = os.fspath(cells), os.fspath(output)
  h5ad_copy.check_output(output, overwrite)
  states = states or embeddings.StateConfig()
  states.check(model)
  placed = placed_model.place(model, dtype=states.dtype, block=states.block)
  stream = model_cells.open_cells(cells, model, reading)
  num_cells = stream.source.num_cells
  if limit > 0:
    num_cells = min(limit, num_cells)
  reference, why = embeddings.reference_of(model, states)
  columns = cell_columns.empty(stream, reference is not None)
  numbers = [n for n in columns if n != cell_columns.SPECIES]
  dtype = np.dtype(
    [(_EMBEDDING, '<f4', (model.config.width,))]
    + [(name, columns[name].dtype) for name in numbers]
  )
  uns = embeddings.provenance(model, stream, states)
  uns[embeddings.REFERENCE] = why
  target = os.path.realpath(output)  # a link stays, and leads to the result
  settings = _settings(stream, reading, num_cells, uns)
  settings['model'] = model.fingerprint
  with unfinished.records(
    target, settings, num_cells, dtype, anew=overwrite
  ) as records:
    wanted_C = np.zeros(stream.source.num_cells, bool)
    for first, found_B, is_done_B in records.pieces():
      piece = slice(first, first + len(found_B))
      wanted_C[piece] = ~is_done_B
      for name in numbers:
        columns[name][piece] = found_B[name]
    num_left = int(wanted_C.sum())
    if num_left < num_cells:
      logging.warning(
        '%s: going on, %d of %d cells are finished',
        *(output, num_cells - num_left, num_cells),
      )
    chunks = embeddings.with_columns(
      model_cells.encode(stream, model, wanted_C), model, columns
    )
    with progress.Progress(num_cells, 'cells', 'embedding') as bar:
      bar.skip(num_cells - num_left)
      for index_B, embeddings_BD in embeddings.pooled(placed, chunks, states):
        records_B = np.zeros(len(index_B), dtype)
        records_B[_EMBEDDING] = embeddings_BD
        if reference is not None:
          ood_B = reference.percentiles(embeddings_BD)
          columns[cell_columns.OOD][index_B] = ood_B
        for name in numbers:
          records_B[name] = columns[name][index_B]
        records.write(index_B, records_B)
        bar.update(len(index_B))
    obs = {name: column[:num_cells] for name, column in columns.items()}
    max_genes = model.assets.encoding.max_genes
    cell_columns.warn(stream.source.name, obs, max_genes)
    whole = h5ad_copy.Blocks(
      (num_cells, model.config.width),
      np.dtype(np.float32),
      lambda: _blocks(records),
    )
    config = dataclasses.replace(reading, path=cells)
    is_copy = formats.find_format(config) == 'h5ad' and not limit
    h5ad_copy.write(
      target,
      copy_of=cells if is_copy else '',
      labels=None if is_copy else stream.source.obs.iloc[:num_cells],
      obsm={embeddings.KEY: whole},
      obs=obs,
      uns={'genecompass': uns},
      staging=unfinished.staging(target),
    )
  return Written(
    path=output,
    num_cells=num_cells,
    width=model.config.width,
    num_before=num_cells - num_left,
    has_ood=reference is not None,
    uns=uns,
  )


def _blocks(records: unfinished.Records) -> Iterator[np.ndarray]:
  for first, found_B, is_done_B in records.pieces():
    if not is_done_B.all():
      raise OSError(
        f'the record of cell {first + int(np.argmin(is_done_B))} was damaged '
        'after it was written; the same command makes it anew'
      )
    yield found_B[_EMBEDDING]


def _settings(
  stream: sources.CellStream,
  reading: sources.SourceConfig,
  num_cells: int,
  uns: dict[str, Any],
) -> dict[str, Any]:
  """What finished cells depend on; names are those that a message shows."""
  species = paths.sha256_bytes(stream.source.species_C.tobytes())
  options = {**dataclasses.asdict(reading), 'path': '', 'species': species}
  return {
    'format': _FORMAT,
    'cells': stream.source.sha256,
    'number of cells': num_cells,
    **uns,
    **options,
  }
