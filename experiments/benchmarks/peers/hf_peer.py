"""Hugging Face datasets over cells ranked and padded to 2,048 beforehand.

  HF_FORMAT=list   rows as Python lists, padded and made arrays: the release's way
  HF_FORMAT=torch  rows as tensors

Their time includes reading rows at random, collating and masking; ranking and
the log were done before, and are not in it.
"""

import os
import shutil

import collators
import datasets
import measure
import numpy as np

FORMAT = os.environ.get('HF_FORMAT', 'list')
VOCABULARY = 50_000


def prepare(cells: str, folder: str) -> None:
  """`cells` is the Arrow file that the benchmark writes."""
  os.makedirs(folder, exist_ok=True)
  shutil.copy(cells, os.path.join(folder, 'padded.arrow'))
  table = datasets.Dataset.from_file(os.path.join(folder, 'padded.arrow'))
  measure.write_num_cells(folder, len(table))


def batches(folder: str, rows: int):
  table = datasets.Dataset.from_file(os.path.join(folder, 'padded.arrow'))
  if FORMAT == 'torch':
    table = table.with_format('torch')
  rng = np.random.default_rng(0)
  order = rng.permutation(len(table))
  for first in range(0, len(order) - rows + 1, rows):
    some = table[order[first : first + rows].tolist()]
    if FORMAT == 'torch':
      ids, values = some['input_ids'].numpy(), some['values'].numpy()
      attention = np.ones_like(ids)
      ids, *_ = collators.mask(
        ids.copy(), values.copy(), attention, rng, VOCABULARY
      )
      labels = some['label'].numpy()
    else:
      listed = [dict(zip(some, row)) for row in zip(*some.values())]
      ids, *_ = collators.collate_lists(listed, rng, VOCABULARY)
      labels = np.array(some['label'])
    yield len(ids), labels, ids.size, int(np.count_nonzero(ids))


if __name__ == '__main__':
  measure.main(f'datasets {datasets.__version__}, {FORMAT}', prepare, batches)
