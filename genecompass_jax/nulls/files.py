"""Fitted null models as one file: arrays and a JSON header in an npz."""

import dataclasses
import io
import json
import zipfile
import zlib
from typing import Any

import numpy as np

from genecompass_jax import (
  encoding,
  errors,
  masking,
  paths,
)
from genecompass_jax.nulls import compiled, counts as counts_lib

_FORMAT = 2
_READS = (1, 2)  # format 1 knew the objective `released` only
_DAMAGE = (
  OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile,
  zlib.error, MemoryError, RecursionError, RuntimeError, IndexError,
  AttributeError,
)  # fmt: skip


def to_bytes(models: Any) -> bytes:
  """The file of `nulls.NullModels`; of equal models the same bytes."""
  header = {
    'format': _FORMAT,
    'encoding': dataclasses.asdict(models.encoding),
    'mask': dataclasses.asdict(models.mask),
    'choices': [dataclasses.asdict(c) for c in models.choices],
    'num_cells': [c.num_cells for c in models.counts],
  }
  arrays = {'divisor_SV': models.divisor_SV}
  for s, c in enumerate(models.counts):
    gene_P, bin_P = np.nonzero(c.pairs_TN)
    arrays |= {
      f'{s}/tokens_T': c.tokens_T,
      f'{s}/measured_T': c.measured_T,
      f'{s}/gene_P': gene_P.astype(np.int32),
      f'{s}/bin_P': bin_P.astype(np.int16),
      f'{s}/cells_P': c.pairs_TN[gene_P, bin_P],
      f'{s}/ranks_TQ': c.ranks_TQ,
      f'{s}/value_sum_T': c.value_sum_T,
    }
    if models.mask.splits:
      arrays[f'{s}/moments_TM'] = models.moments[s]
  text = json.dumps(header, sort_keys=True).encode()
  arrays['header'] = np.frombuffer(text, np.uint8)
  file = io.BytesIO()
  np.savez_compressed(file, **arrays)
  return file.getvalue()


def read(path: paths.PathLike) -> dict[str, Any]:
  """Fields of the models of a file that holds `to_bytes`.

  Returns:
    The arguments of `nulls.NullModels`; `choices` as dicts, by species.

  Raises:
    UserError: the file is missing, damaged, or of another format version.
  """
  if not paths.exists(path):
    raise errors.UserError(f'{path}: no null models here; fit them again')
  try:
    with np.load(io.BytesIO(paths.read_bytes(path))) as arrays:
      header = json.loads(bytes(arrays['header']))
      if header['format'] not in _READS:
        raise errors.UserError(
          f'{path}: null models of format {header["format"]}, this version'
          f' reads {" and ".join(map(str, _READS))}; fit them again'
        )
      counts = tuple(
        _counts(arrays, s, number)
        for s, number in enumerate(header['num_cells'])
      )
      mask = masking.MaskConfig(**header['mask'])
      species = range(len(counts)) if mask.splits else ()
      return {
        'encoding': encoding.EncodingConfig(**header['encoding']),
        'mask': mask,
        'divisor_SV': arrays['divisor_SV'],
        'counts': counts,
        'choices': tuple(dict(c) for c in header['choices']),
        'moments': tuple(arrays[f'{s}/moments_TM'] for s in species),
      }
  except errors.UserError:
    raise
  except _DAMAGE as error:
    raise damaged(path, error) from error


def damaged(path: paths.PathLike, error: Exception) -> errors.UserError:
  """What to raise for a file that cannot be read."""
  return errors.UserError(
    f'{path}: not null models, or damaged ({error}); fit them again'
  )


def _counts(arrays, species: int, number: int) -> counts_lib.SpeciesCounts:
  """What was counted in the training cells of one species."""
  tokens_T = arrays[f'{species}/tokens_T']
  pairs_TN = np.zeros((len(tokens_T), compiled.NUM_BINS), np.uint32)
  pair = arrays[f'{species}/gene_P'], arrays[f'{species}/bin_P']
  pairs_TN[pair] = arrays[f'{species}/cells_P']
  rest = {
    name: arrays[f'{species}/{name}']
    for name in ('measured_T', 'ranks_TQ', 'value_sum_T')
  }
  return counts_lib.SpeciesCounts(tokens_T, number, pairs_TN=pairs_TN, **rest)
