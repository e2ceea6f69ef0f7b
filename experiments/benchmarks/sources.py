"""Cells of real files in every format: the same counts, and how fast.

    python experiments/benchmarks/sources.py --data FOLDER
    python experiments/benchmarks/sources.py --cells 20000      # for memory

Converts h5ad files (the lung lines, Kang, the mouse brain of MERFISH of
FOLDER) by the official writers, reads every conversion as `prep` does, and
compares counts over the vocabulary and totals, bit for bit. Then cells/s, CPU
microseconds a cell (all threads; reading, checking and mapping to the gene
list, a text turned first) and the peak of memory, each measured in a process
of its own that begins with a warm-up on one chunk. With --cells, simulated
cells of some 1,000 genes take the place of the files; they are no evidence
about biology.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time

import anndata
import formats
import numpy as np
import pandas as pd
import scipy.sparse

from genecompass_jax import errors, gene_table, vocabulary
from genecompass_jax.prepare import sources

SETS = {
  'lung lines': ('sc_mixology_lung_lines', 'human'),
  'Kang': ('kang_pbmc_ifnb_harmony', 'human'),
  'brain, MERFISH': ('mouse_brain_merfish', 'mouse'),
}
_CELLS = 1024


def simulated(num_cells: int) -> anndata.AnnData:
  """UMI counts of 30,000 genes, some 1,000 of them in a cell."""
  rng = np.random.default_rng(0)
  table = gene_table.GeneTable.default()
  ids = [table.gene_ids[g] for g in np.flatnonzero(table.species_G == 0)]
  ids = ids[:30_000]
  share_G = np.exp(rng.normal(0, 2.4, len(ids)))
  share_G /= share_G.sum()
  parts = []
  for first in range(0, num_cells, _CELLS):
    num = min(_CELLS, num_cells - first)
    drawn = rng.choice(len(ids), (num, 2_000), p=share_G)
    rows = np.repeat(np.arange(num), 2_000)
    part = scipy.sparse.coo_matrix(
      (np.ones(rows.size, np.float32), (rows, drawn.ravel())),
      (num, len(ids)),
    )
    parts.append(part.tocsr())
  return anndata.AnnData(
    scipy.sparse.vstack(parts, 'csr'),
    pd.DataFrame(index=[f'cell{i}' for i in range(num_cells)]),
    pd.DataFrame(index=ids),
  )


def convert(
  adata: anndata.AnnData, folder: str, species: str, wanted: set[str]
) -> dict[str, dict[str, str]]:
  """Writes all formats; returns the fields of a SourceConfig for each."""
  stem = os.path.join(folder, 'cells')
  found = {}
  for kind, write in formats.WRITERS.items():
    if wanted and kind not in wanted:
      continue
    write(adata, stem)
    found[kind] = {'path': stem + formats.PATHS[kind]}
  if wanted:
    return found
  try:
    formats.write_soma(adata, f'{stem}.soma')
    found['SOMA'] = {'path': f'{stem}.soma'}
  except ImportError:
    print('tiledbsoma is not installed: no SOMA experiment')
  stable = [n.startswith('ENS') for n in adata.var_names]
  if not all(stable):
    print('identifiers are no Ensembl ids: not in the released layout')
    return found
  counts = scipy.sparse.csr_matrix(adata.X)
  if np.diff(counts.indptr).max() > formats.MAX_GENES:
    print('cells of more than 2,048 genes: released ones would be cut')
    return found
  tokens = {gene: 2 + k for k, gene in enumerate(adata.var_names)}
  medians = np.random.default_rng(0).integers(2, 12, adata.n_vars) / 2
  columns = formats.ranked_cells(
    counts,
    np.arange(2, 2 + adata.n_vars),
    medians,
    vocabulary.SPECIES.index(species),
  )
  for name, table in (
    ('tokens', tokens),
    ('medians', dict(zip(adata.var_names, medians.tolist()))),
  ):
    with open(f'{stem}.{name}.json', 'w') as file:
      json.dump(table, file)
  words = {
    'tokens': f'{stem}.tokens.json',
    'medians': f'{stem}.medians.json',
  }
  try:
    formats.save_to_disk(columns, f'{stem}.hf')
    found['Arrow, by datasets'] = {'path': f'{stem}.hf', **words}
  except ImportError:
    formats.write_arrow(columns, f'{stem}.hf')
    found['Arrow'] = {'path': f'{stem}.hf', **words}
  formats.write_arrow(columns, f'{stem}.parquet', parquet=True)
  found['Parquet'] = {'path': f'{stem}.parquet', **words}
  return found


def digest(config: sources.SourceConfig) -> str:
  """Of genes, counts and totals of all cells over the vocabulary."""
  stream = sources.open_source(config).bind(vocabulary.Vocabulary.default())
  stream = stream.by_rows()
  parts = [hashlib.sha256() for _ in range(3)]
  for first in range(0, stream.source.num_cells, _CELLS):
    for chunk in stream.read(first, first + _CELLS):
      lengths = np.diff(chunk.cells.starts_C1)
      parts[0].update(chunk.cells.gene_rows_N.tobytes() + lengths.tobytes())
      parts[1].update(chunk.cells.counts_N.tobytes())
      parts[2].update(chunk.cells.totals_C.tobytes())
  return ' '.join(part.hexdigest()[:12] for part in parts)


def measure(config: sources.SourceConfig) -> dict[str, float]:
  """Seconds to open, to turn, and to read all cells once; peak of memory."""
  vocab = vocabulary.Vocabulary.default()
  _warm_up(vocab)
  before = _peak_mb()
  start, cpu = time.perf_counter(), time.process_time()
  stream = sources.open_source(config).bind(vocab)
  opened = time.perf_counter()
  stream = stream.by_rows()
  turned = time.perf_counter()
  num_cells = stream.source.num_cells
  own = time.process_time()
  for first in range(0, num_cells, _CELLS):
    stream.read(first, first + _CELLS)
  end = time.perf_counter()
  used = time.process_time()
  peak = _peak_mb()
  return {
    'cells': num_cells,
    'open_s': opened - start,
    'turn_s': turned - opened,
    'cells_per_s': num_cells / (end - turned),
    'read_us': (used - own) / num_cells * 1e6,
    'all_us': (used - cpu) / num_cells * 1e6,
    'rss_mb': peak,
    'grown_mb': peak - before,
  }


def _peak_mb() -> float:
  """Most memory of this program so far (rusage would count its parent's)."""
  with open('/proc/self/status', encoding='utf-8') as file:
    peak = next(line for line in file if line.startswith('VmHWM'))
  return int(peak.split()[1]) / 1024


def _warm_up(vocab: vocabulary.Vocabulary) -> None:
  """Compiles and imports what every format needs."""
  ids = [vocab.genes.gene_ids[g] for g in range(0, 2000, 20)]
  adata = anndata.AnnData(
    scipy.sparse.csr_matrix(np.ones((4, len(ids)))), var=pd.DataFrame(index=ids)
  )
  list(sources.cells_of(adata, vocab).chunks())


def table(name: str, found: dict[str, dict[str, str]], species: str) -> bool:
  """Prints a row for each format; returns whether all counts are the same."""
  print(f'\n{name}')
  print(
    '| format | cells/s | CPU us a cell, reading | with opening and turning |'
    ' opening s | turning s | peak MB | grown MB | counts |'
  )
  print('|---' * 9 + '|')
  first = ''
  same = True
  for kind, fields in found.items():
    fields = {**fields, 'species': species}
    found_digest = digest(sources.SourceConfig(**fields))
    first = first or found_digest
    same &= found_digest == first
    result = subprocess.run(
      [sys.executable, __file__, '--measure', json.dumps(fields)],
      capture_output=True,
      text=True,
      check=True,
    )
    m = json.loads(result.stdout.splitlines()[-1])
    print(
      f'| {kind} | {m["cells_per_s"]:,.0f} | {m["read_us"]:.0f} | '
      f'{m["all_us"]:.0f} | {m["open_s"]:.2f} | {m["turn_s"]:.2f} | '
      f'{m["rss_mb"]:.0f} | {m["grown_mb"]:.0f} | '
      f'{"identical" if found_digest == first else "DIFFER"} |'
    )
  return same


def main() -> int:
  """The command; returns its exit code: 1 where counts differ."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', metavar='FOLDER')
  parser.add_argument('--cells', type=int, default=0)
  parser.add_argument('--formats', default='', metavar='FORMAT,...')
  parser.add_argument('--scratch', default=None, metavar='FOLDER')
  parser.add_argument('--measure', metavar='FIELDS', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    config = sources.SourceConfig(**json.loads(args.measure))
    print(json.dumps(measure(config)))
    return errors.EXIT_OK
  same = True
  wanted = set(filter(None, args.formats.split(',')))
  if args.cells:
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
      found = convert(simulated(args.cells), folder, 'human', wanted)
      same &= table(f'{args.cells:,} simulated cells', found, 'human')
  for name, (folder_name, species) in SETS.items() if args.data else ():
    path = os.path.join(args.data, folder_name, f'{folder_name}.h5ad')
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
      adata = anndata.read_h5ad(path)
      adata = anndata.AnnData(
        scipy.sparse.csr_matrix(adata.X), adata.obs, adata.var
      )
      if 'ensembl_id' in adata.var and not adata.var_names[0].startswith('ENS'):
        ids = adata.var['ensembl_id'].astype(str)
        adata = adata[:, (ids.str.startswith('ENS') & ~ids.duplicated())]
        adata = adata.copy()
        adata.var.index = adata.var['ensembl_id'].astype(str).to_numpy()
      same &= table(
        f'{name}: {adata.n_obs:,} cells x {adata.n_vars:,} genes',
        convert(adata, folder, species, wanted),
        species,
      )
  return errors.EXIT_OK if same else errors.EXIT_FAILED


if __name__ == '__main__':
  sys.exit(main())
