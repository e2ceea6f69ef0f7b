"""Fourth stage: runs are joined into the stores of the corpus, shard by shard.

The size of every array is known by now, so that each shard is a task of its
own: it finds the runs that lie in its range and writes them, whole.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from genecompass_jax import (
  corpus,
  corpus_writer,
  paths,
  shards,
)
from genecompass_jax.prepare.building import plans, runs

NAME = 'shards'  # of the stage


@dataclasses.dataclass(frozen=True)
class Store:
  """One store to write.

  Attributes:
    split: name of the split.
    species: species code.
    species_name: its name.
    tasks: of the stage `runs` that have cells for it, in order.
    cells: of each of these runs.
    elements: of each of these runs.
    large: counts of each of these runs that do not fit.
  """

  split: str
  species: int
  species_name: str
  tasks: tuple[int, ...]
  cells: tuple[int, ...]
  elements: tuple[int, ...]
  large: tuple[int, ...]

  @property
  def inner(self) -> str:
    """Its folder in the corpus."""
    return f'{self.split}/{self.species_name}'


@dataclasses.dataclass(frozen=True)
class Write:
  """What the tasks share.

  Attributes:
    plan: of the build.
    place: folder or URL where the corpus grows.
    stores: to write.
    labels: obs columns, in the order of their codes.
    parts: (store, what, number) of each task; see `write`.
  """

  plan: plans.Plan
  place: str
  stores: tuple[Store, ...]
  labels: tuple[str, ...]
  parts: tuple[tuple[int, str, int], ...]


def stores_of(
  species_names: Sequence[str],
  buckets: tuple[tuple[int, int], ...],
  results: list[Mapping],
) -> tuple[Store, ...]:
  """The stores that the runs make, from what their tasks returned."""
  found = []
  for split in corpus.SPLITS:
    for species, name in enumerate(species_names):
      tasks = tuple(
        k
        for k, (of_species, _) in enumerate(buckets)
        if of_species == species and results[k]['cells'].get(split)
      )
      if tasks:
        found.append(
          Store(
            split,
            species,
            name,
            tasks,
            *(
              tuple(results[k][what][split] for k in tasks)
              for what in ('cells', 'elements', 'large')
            ),
          )
        )
  return tuple(found)


def parts_of(
  stores: tuple[Store, ...], shard_elements: int
) -> tuple[list[tuple[int, str, int]], list[int]]:
  """The tasks of the stage, and the cells that each is about."""
  parts, cells = [], []
  for k, store in enumerate(stores):
    num_cells, num_elements = sum(store.cells), sum(store.elements)
    count = max(-(-num_elements // shard_elements), 1)
    for number in range(count):
      parts.append((k, 'elements', number))
      cells.append(
        num_cells * (number + 1) // count - num_cells * number // count
      )
    for number in range(-(-num_cells // corpus_writer.SHARD_CELLS)):
      parts.append((k, 'cells', number))
      cells.append(0)
    parts += [(k, 'rest', 0), (k, 'names', 0)]
    cells += [0, 0]
  return parts, cells


def create(context: Write) -> None:
  """Makes the arrays that the tasks fill."""
  for store in context.stores:
    for name, spec, size in _arrays(context, store):
      shards.create_array(
        [*spec.lead, size],
        spec.dtype,
        spec.shard,
        context.place,
        store.inner,
        *name.split('/'),
      )


def _arrays(
  context: Write, store: Store
) -> Iterator[tuple[str, corpus_writer.ArraySpec, int]]:
  """Name, form and size of the arrays that are written in shards."""
  plan = context.plan
  kind = 'float32' if plan.is_float else 'uint16'
  elements = corpus_writer.element_arrays(kind, plan.shard_elements)
  for name, spec in elements.items():
    yield name, spec, sum(store.elements)
  obs = (*context.labels, 'source_row')
  for name, spec in corpus_writer.cell_arrays(kind, obs).items():
    yield name, spec, sum(store.cells)


def write(context: Write, task: int, folder: str) -> dict:
  """Writes a part of a store.

  `elements`: a shard of the counts; `cells`: a shard of the lengths, totals and
  labels; `rest`: large counts, offsets of blocks; `names`: names of the cells.

  Returns:
    `files`: size and sha256 of each file; `rest` also the histogram of lengths.
  """
  del folder
  plan = context.plan
  number, what, shard = context.parts[task]
  store = context.stores[number]
  place = paths.join(context.place, store.inner)
  names: list[str] = []
  result: dict = {}
  if what in ('elements', 'cells'):
    for name, spec, size in _arrays(context, store):
      is_element = name in ('counts', 'values')
      if is_element != (what == 'elements') or size <= shard * spec.shard:
        continue
      stop = min(size, (shard + 1) * spec.shard)
      data = _range(context, store, name, shard * spec.shard, stop)
      file = shards.write_shard(
        data, shard, spec.shard, place, *name.split('/')
      )
      names.append(f'{name}/{file}')
  elif what == 'names':
    writer = corpus_writer.NamesWriter(paths.join(place, 'cells.tsv.gz'))
    for run in store.tasks:
      writer.add_lines(runs.load(plan, run, store.split, 'names').tobytes())
    writer.close()
    names.append('cells.tsv.gz')
  else:
    result = _write_rest(context, store, place)
  result['files'] = {
    f'{store.inner}/{name}': corpus_writer.file_facts(paths.join(place, name))
    for name in names
  }
  return result


def _range(
  context: Write, store: Store, name: str, first: int, stop: int
) -> np.ndarray:
  """Elements or cells first to stop of an array, out of the runs."""
  plan = context.plan
  sizes = store.elements if name in ('counts', 'values') else store.cells
  ends = np.cumsum(sizes)
  out: np.ndarray | None = None
  for k in range(int(np.searchsorted(ends, first, 'right')), len(sizes)):
    start = int(ends[k]) - sizes[k]
    if start >= stop:
      break
    a, b = max(first, start), min(stop, int(ends[k]))
    planes = _load(context, store, store.tasks[k], name)
    if out is None:
      lead = [len(planes)] if name == 'counts' else []
      out = np.empty([*lead, stop - first], planes[0].dtype)
    for plane, values in zip(out if name == 'counts' else [out], planes):
      plane[a - first : b - first] = values[a - start : b - start]
  if out is None:  # a store whose cells have no genes at all
    lead = [1 if plan.is_float else 2] if name == 'counts' else []
    out = np.zeros([*lead, 0], np.uint16 if name == 'counts' else np.float32)
  return out


def _load(context, store, run, name) -> list[np.ndarray]:
  """The planes of an array of a run, mapped into memory."""
  plan = context.plan
  if name == 'counts':
    kinds = ('steps',) if plan.is_float else ('steps', 'counts')
    return [runs.load(plan, run, store.split, kind) for kind in kinds]
  inner = name.removeprefix('obs/')
  if name != inner and inner != 'source_row':
    codes = runs.load(plan, run, store.split, 'codes')
    return [codes[context.labels.index(inner)]]
  return [runs.load(plan, run, store.split, inner)]


def _write_rest(context: Write, store: Store, place: str) -> dict:
  """Large counts, offsets of blocks, measured genes, names behind codes."""
  plan = context.plan
  block = corpus_writer.block_size(sum(store.cells))
  histogram = corpus_writer.length_histogram(np.zeros(0))
  starts = []
  cell = element = 0
  large = None
  if not plan.is_float:
    spec = corpus_writer.OVERFLOW
    large = shards.ArrayWriter(
      spec.lead, spec.dtype, spec.shard, place, 'overflow'
    )
  for run, elements in zip(store.tasks, store.elements):
    lengths_C = runs.load(plan, run, store.split, 'length').astype(np.int64)
    histogram += corpus_writer.length_histogram(lengths_C)
    starts_C = element + np.cumsum(lengths_C) - lengths_C
    starts.append(starts_C[-cell % block :: block])
    if large is not None:
      found = np.array(runs.load(plan, run, store.split, 'large'))
      found[0] += element
      large.append(found)
    cell += len(lengths_C)
    element += elements
  if large is not None:
    large.close()
  corpus_writer.write_small(
    place,
    np.append(np.concatenate(starts), element),
    np.asarray(plan.load(f'measured/{store.species}')),
    _categories(plan, context.labels),
  )
  return {'histogram': histogram.tolist()}


def _categories(plan: plans.Plan, labels: tuple[str, ...]) -> dict:
  found = paths.read_json(plan.file('categories.json'))
  return {name: found.get(name, []) for name in (*labels, 'source_row')}


def facts(
  context: Write, store: Store, histogram: np.ndarray, num_genes: int
) -> dict:
  """What the manifest says of a store."""
  return corpus_writer.store_facts(
    num_cells=sum(store.cells),
    num_elements=sum(store.elements),
    num_overflow=sum(store.large),
    num_genes=num_genes,
    value_dtype='float32' if context.plan.is_float else 'uint16',
    obs=(*context.labels, 'source_row'),
    histogram=histogram,
  )
