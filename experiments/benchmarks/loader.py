"""This loader and its peers over the same cells, in one table.

    python experiments/benchmarks/loader.py --work DIR \
        --peer scdataset=/env/bin/python --peer annbatch=/env312/bin/python \
        --peer scdl=/env/bin/python --peer soma=/env/bin/python \
        --peer hf-list=/env/bin/python --peer hf-torch=/env/bin/python

Each peer runs in a process of the interpreter that is named for it (its
packages need not agree with ours), by `peers/<name>_peer.py`, over the same
h5ad file converted to its own format; conversion is not in its time. Every run
is repeated; the one of least CPU a cell is given. DIR keeps what was built, so
that a later, quieter run is one command.

Cells: `--h5ad FILE --label COLUMN --species NAME`, or simulated: log-normal
gene means, 64 types with markers, in the order of their types, Poisson counts,
about 1,000 expressed genes; no evidence about biology. Ours reads the corpus
that `genecompass prep` makes of the file, raw counts, shuffled once; ranking,
the log, masks and packing are in its time. The published code (hf-list) starts
from cells ranked and padded to 2,048 before. CPU time is that of the process,
all threads.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse

from genecompass_jax import (
  corpus,
  corpus_bench,
  data,
  encoding,
  gene_table,
)
from genecompass_jax.prepare import pipeline, quality, sources

_MAX_GENES = 2048
_PEERS = pathlib.Path(__file__).parent / 'peers'
_LABEL = 'cell_type'
# name of a peer -> (file, environment variables)
PEERS = {
  'scdataset': ('scdataset_peer.py', {}),
  'annbatch': ('annbatch_peer.py', {}),
  'scdl': ('scdl_peer.py', {}),
  'soma': ('soma_peer.py', {}),
  'hf-list': ('hf_peer.py', {'HF_FORMAT': 'list'}),
  'hf-torch': ('hf_peer.py', {'HF_FORMAT': 'torch'}),
}
OURS = (
  ('this loader, packed, 2 threads', 'packed', 2, False),
  ('this loader, packed, 1 thread', 'packed', 1, False),
  ('this loader, packed, 2 threads, cold', 'packed', 2, True),
  ('this loader, buckets, 2 threads', 'buckets', 2, False),
  ('this loader, raw windows', 'raw', 1, False),
)


def simulated_cells(path: str, num_cells: int, num_types: int = 64) -> None:
  """Writes human cells, type by type, as atlases come."""
  rng = np.random.default_rng(0)
  table = gene_table.GeneTable.default()
  genes = [table.gene_ids[g] for g in np.flatnonzero(table.species_G == 0)]
  base_R = rng.normal(0, 2.6, len(genes))
  type_C = np.sort(rng.choice(num_types, num_cells, p=_shares(num_types, rng)))
  rows, mean_R, now = [], None, -1
  for cell in range(num_cells):
    if type_C[cell] != now:
      now = type_C[cell]
      mean_R = np.exp(base_R + rng.normal(0, 0.5, len(genes)))
      mean_R /= mean_R.sum()
    depth = np.exp(rng.normal(np.log(1750), 0.6))
    rows.append(scipy.sparse.csr_array(rng.poisson(mean_R * depth)[None]))
  counts = scipy.sparse.vstack(rows, format='csr').astype(np.float32)
  anndata.AnnData(
    scipy.sparse.csr_matrix(counts),
    pd.DataFrame(
      {_LABEL: pd.Categorical([f't{t}' for t in type_C])},
      index=[f'cell{c}' for c in range(num_cells)],
    ),
    pd.DataFrame(index=genes),
  ).write_h5ad(path)


def _shares(num_types: int, rng) -> np.ndarray:
  share = rng.gamma(2.0, 1.0, num_types)
  return share / share.sum()


def normal_form(path: str, label: str, output: str) -> None:
  """A file of the user's, with its label under the name that peers read."""
  cells = anndata.read_h5ad(path)
  counts = scipy.sparse.csr_matrix(cells.X).astype(np.float32)
  labels = pd.Categorical(cells.obs[label].astype(str))
  obs = pd.DataFrame({_LABEL: labels}, index=cells.obs_names)
  anndata.AnnData(counts, obs, pd.DataFrame(index=cells.var_names)).write_h5ad(
    output
  )


def build_corpus(cells: str, path: str, species: str) -> corpus.Corpus:
  """Runs the preparation of the package, all cells for training."""
  source = sources.SourceConfig(path=cells, species=species, obs=(_LABEL,))
  config = pipeline.PrepareConfig(
    validation_share=0.0,
    filters=quality.QualityConfig.off(),
    keep_copies=True,
    overwrite=True,
  )
  return pipeline.prepare([source], path, config)


def padded_arrow(source: corpus.Corpus, path: str, num_cells: int) -> None:
  """The cells as the published code stores them: ranked, padded to 2,048."""
  encode = encoding.EncodingConfig(max_genes=_MAX_GENES)
  config = data.DataConfig(layout='buckets', buckets=(_MAX_GENES + 1,))
  fields = [
    ('input_ids', pa.list_(pa.int64())),
    ('values', pa.list_(pa.float32())),
    ('species', pa.int64()),
    ('length', pa.int32()),
    ('label', pa.int32()),
  ]
  codes = [
    store.obs(_LABEL)
    for species in range(len(source.vocabulary.species))
    if (store := source.store('train', species)) is not None
  ]
  label_C = np.concatenate(codes)
  batches = data.evaluation_batches(
    source, encode, config, 'train', max_cells=num_cells
  )
  with pa.OSFile(path, 'wb') as file:
    with pa.ipc.new_stream(file, pa.schema(fields)) as stream:
      for batch in batches:
        cells = batch.batch.cells
        used = batch.cell_index_BS[:, 0] >= 0
        ids, values = cells.gene_ids_BL.copy(), cells.values_BL.copy()
        for row, k in np.argwhere(batch.batch.id_weights_BK > 0):
          slot = batch.batch.masked_slots_BK[row, k]
          ids[row, slot] = batch.batch.id_labels_BK[row, k]
          values[row, slot] = batch.batch.value_labels_BK[row, k]
        columns = (
          list(ids[used, 1:].astype(np.int64)),
          list(values[used, 1:]),
          cells.species_BL[used, 0].astype(np.int64),
          (ids[used, 1:] > 0).sum(1).astype(np.int32),
          label_C[batch.cell_index_BS[used, 0]],
        )
        arrays = [pa.array(c, t) for c, (_, t) in zip(columns, fields)]
        stream.write_batch(pa.record_batch(arrays, schema=pa.schema(fields)))


def _last_json(command: list[str], env: dict | None = None) -> dict:
  """Runs a process; the figures on its last line, or its last complaint."""
  env = {**os.environ, **(env or {})}
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  try:
    return json.loads(done.stdout.strip().splitlines()[-1])
  except (IndexError, json.JSONDecodeError):
    lines = done.stderr.strip().splitlines() or ['no output']
    return {'error': f'exit {done.returncode}: {lines[-1]}'}


def best(run, repeats: int) -> dict:
  """The run of least CPU a cell, with the best rate of all."""
  found = [f for f in (run() for _ in range(repeats)) if 'error' not in f]
  if not found:
    return run()
  chosen = min(found, key=lambda f: f['cpu_us'])
  return {**chosen, 'rate': max(f['rate'] for f in found)}


def run_peer(name: str, python: str, cells: str, args) -> dict:
  """Converts for a peer, once, and runs it."""
  file, env = PEERS[name]
  env = {**env, 'PYTHONPATH': str(_PEERS)}
  folder = f'{args.work}/{name}'
  if not os.path.exists(f'{folder}/done'):
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that failed
    made = subprocess.run(
      [python, str(_PEERS / file), 'prepare', cells, folder],
      capture_output=True, text=True, env={**os.environ, **env},
    )  # fmt: skip
    if made.returncode:
      return {'error': made.stderr.strip().splitlines()[-1]}
    pathlib.Path(f'{folder}/done').touch()
  command = [python, str(_PEERS / file), 'run', folder]
  command += [str(args.rows), str(args.seconds)]
  return best(lambda: _last_json(command, env), args.repeats)


def run_ours(path: str, layout: str, threads: int, cold: bool, args) -> dict:
  """`genecompass corpus bench`, in a process of its own."""
  command = [sys.executable, '-m', 'genecompass_jax.cli', 'corpus', 'bench']
  command += [path, '--layout', layout, '--threads', str(threads), '--json']
  command += ['--seconds', str(args.seconds), '--rows', str(args.rows)]
  command += ['--slots', str(args.slots), '--label', _LABEL]
  command += ['--cold'] * cold
  return best(lambda: _last_json(command), args.repeats)


def _ratios(rows: list[tuple[str, dict]]) -> str:
  """Ours over each: rate, and CPU."""
  found = dict(rows)
  ours = found[OURS[0][0]]
  lines = [
    '| packed, 2 threads, against | rate x | CPU x less |',
    '|---|---|---|',
  ]
  for name, other in rows:
    if other is not ours:
      lines.append(
        f'| {name} | {ours["rate"] / other["rate"]:.1f} |'
        f' {other["cpu_us"] / ours["cpu_us"]:.1f} |'
      )
  return '\n'.join(lines)


def main() -> None:
  """Builds what is missing, runs everything, prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--work', required=True, metavar='DIR')
  parser.add_argument(
    '--peer', action='append', default=[], metavar='NAME=PYTHON'
  )
  parser.add_argument('--h5ad')
  parser.add_argument('--label', default=_LABEL)
  parser.add_argument('--species', default='human')
  parser.add_argument('--cells', type=int, default=32_768)
  parser.add_argument('--padded_cells', type=int, default=4096)
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--slots', type=int, default=2304)
  parser.add_argument('--seconds', type=float, default=10.0)
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  os.makedirs(args.work, exist_ok=True)
  cells, built = f'{args.work}/cells.h5ad', f'{args.work}/corpus'
  padded = f'{args.work}/padded.arrow'
  if not os.path.exists(cells):
    if args.h5ad:
      normal_form(args.h5ad, args.label, cells)
    else:
      simulated_cells(cells, args.cells)
  if not os.path.exists(f'{built}/manifest.json'):
    build_corpus(cells, built, args.species)
  if not os.path.exists(padded):
    padded_arrow(corpus.Corpus.open(built), padded, args.padded_cells)
  rows, failed = [], []
  for name, layout, threads, cold in OURS:
    rows.append((name, run_ours(built, layout, threads, cold, args)))
    print(corpus_bench.table(rows[-1:]), flush=True)
  for peer in args.peer:
    name, _, python = peer.partition('=')
    if name not in PEERS:
      parser.error(f'--peer {name}: give one of {", ".join(PEERS)}')
    source = padded if name.startswith('hf') else cells
    figures = run_peer(name, python, source, args)
    if 'error' in figures:
      failed.append(f'{name}: {figures["error"]}')
      print(failed[-1], flush=True)
      continue
    rows.append((figures.get('of', name), figures))
    print(corpus_bench.table(rows[-1:]), flush=True)
  opened = corpus.Corpus.open(built)
  lengths = [
    s.length_N for k in range(2) if (s := opened.store('train', k)) is not None
  ]
  print(f'\n{corpus_bench.table(rows)}\n\n{_ratios(rows)}\n')
  print('\n'.join(f'did not run: {line}' for line in failed))
  loads = [figures['load'] for _, figures in rows]
  print(
    f'{opened.num_cells("train"):,} cells of'
    f' {np.mean(np.concatenate(lengths)):.0f} expressed genes; batches of'
    f' {args.rows} rows; least CPU of {args.repeats} runs of'
    f' {args.seconds:g} s or an epoch; load {min(loads):.1f} to'
    f' {max(loads):.1f}; {corpus_bench.machine()}'
  )


if __name__ == '__main__':
  main()
