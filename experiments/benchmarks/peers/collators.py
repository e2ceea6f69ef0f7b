"""The published collator, in NumPy from its description."""

import numpy as np


def collate_lists(rows: list[dict], rng, vocabulary_size: int) -> tuple:
  """Pads lists, makes arrays of them, masks."""
  longest = max(len(row['input_ids']) for row in rows)
  padded = {'input_ids': [], 'values': [], 'attention_mask': []}
  for row in rows:
    missing = longest - len(row['input_ids'])
    padded['attention_mask'].append([1] * len(row['input_ids']) + [0] * missing)
    padded['input_ids'].append(row['input_ids'] + [0] * missing)
    padded['values'].append(row['values'] + [0.0] * missing)
  ids = np.array(padded['input_ids'], np.int64)
  values = np.array(padded['values'], np.float32)
  attention = np.array(padded['attention_mask'], np.int64)
  return mask(ids, values, attention, rng, vocabulary_size)


def mask(ids, values, attention, rng, vocabulary_size: int) -> tuple:
  """Hides 15 % of the genes: `<mask>`, a random id, or left."""
  id_labels, value_labels = ids.copy(), values.copy()
  is_picked = (rng.random(ids.shape) < 0.15) & (ids > 1)
  id_labels[~is_picked] = -100
  value_labels[~is_picked] = -100
  is_hidden = is_picked & (rng.random(ids.shape) < 0.8)
  ids[is_hidden], values[is_hidden] = 1, -1
  is_random = is_picked & ~is_hidden & (rng.random(ids.shape) < 0.5)
  ids[is_random] = rng.integers(0, vocabulary_size, int(is_random.sum()))
  values[is_random] = -1
  return ids, values, attention, id_labels, value_labels
