"""Loading a corpus from a store that is far away: rate, requests, in flight.

    python experiments/benchmarks/stores.py --work DIR
    python experiments/benchmarks/stores.py --work DIR --corpus CORPUS

A store in a process of its own on this machine answers every request after a
delay; it speaks S3, Google's JSON API and plain HTTP (tests/object_store.py).
Rates are therefore those of a network without limits of bandwidth but with that
delay, on a machine that serves as well as it loads; requests and bytes are those
of any store. The cells are those of loader.py, 32,768 simulated ones, made once.

`requests` are those that the store has seen for one whole epoch of cells, once
the corpus was open; `in flight` is the most that it held at a time.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from genecompass_jax import (  # noqa: E402
  corpus as corpus_lib,
  corpus_bench,
  data,
  encoding,
  meter as meter_lib,
)
from tests import object_store  # noqa: E402

KINDS = ('http', 's3', 'gs')
_CONTROL = '/control'


def serve(folder: str) -> None:
  """Serves a folder as BUCKET/corpus until the input ends; prints its address."""
  with object_store.ObjectStore() as store:
    store.upload(pathlib.Path(folder), 'corpus')

    def control(asked):
      if asked.path != _CONTROL:
        return None
      facts = {'requests': len(store.requests) - 1, 'most': store.most_at_once}
      if asked.query.get('forget'):
        store.forget()  # what is held now was counted before
      store.put(object_store.BUCKET, 'facts', json.dumps(facts).encode())
      return 204

    store.fault = control
    print(store.url, flush=True)
    for line in sys.stdin:  # a new delay
      store.delay = float(line)
      print('ok', flush=True)


class Served:
  """The store, in a process of its own."""

  def __init__(self, folder: str):
    self._process = subprocess.Popen(
      [sys.executable, __file__, '--serve', folder],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.url = self._process.stdout.readline().strip()

  def set_delay(self, seconds: float) -> None:
    """How long every answer is held back from now on."""
    print(seconds, file=self._process.stdin, flush=True)
    self._process.stdout.readline()

  def facts(self, forget: bool = False) -> dict:
    """Requests, and the most at a time, since they were last forgotten."""
    with urllib.request.urlopen(f'{self.url}{_CONTROL}?forget={forget or ""}'):
      pass
    place = f'{self.url}/{object_store.BUCKET}/facts'
    with urllib.request.urlopen(place) as answer:
      return json.loads(answer.read())

  def close(self) -> None:
    """Ends it."""
    self._process.stdin.close()
    self._process.wait()


def measure(served, place: str, threads: int, streams: int, seconds: float):
  """Loads packed batches of whole epochs for a while."""
  began = time.perf_counter()
  opened = corpus_lib.Corpus.open(place)
  opened_s = time.perf_counter() - began
  config = data.fit_buckets(
    opened,
    encoding.EncodingConfig(),
    data.DataConfig(rows_per_batch=32, streams=streams),
  )
  loader = data.Loader(opened, encoding.EncodingConfig(), config)
  loader.batch(0)  # compiles
  requests = float('nan')
  if served:
    served.facts(forget=True)
    cells = sum(len(window.number_C) for window in loader.raw_windows(1))
    requests = (served.facts(forget=True)['requests'] - 1) / cells * 1024
  batches = loader.iterate(threads=threads)
  next(batches)  # the windows of every stream, which nothing could hide
  meter = meter_lib.Meter()
  for batch in batches:
    meter.add(int((batch.cell_index_BS >= 0).sum()))
    if meter.seconds > seconds:
      break
  result = meter.result()
  result['store_requests'] = requests
  result['most'] = served.facts()['most'] if served else None
  return {**result, 'opened_s': opened_s}


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--work', help='keeps the cells and the corpus')
  parser.add_argument('--corpus', help='a corpus that is there, local')
  parser.add_argument('--seconds', type=float, default=8.0)
  parser.add_argument('--delays', default='0,20,60,200', help='ms')
  parser.add_argument('--kinds', default=','.join(KINDS))
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--streams', type=int, default=8)
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args.serve)
    return
  if not (args.work or args.corpus):
    parser.error('--work DIR is needed, or --corpus CORPUS')
  folder = args.corpus or corpus_of(args.work)
  print(corpus_bench.machine())
  served = Served(folder)
  os.environ |= object_store.environment(served.url)
  try:
    print(
      '| | delay, ms | opened in, s | cells/s | CPU us a cell | requests / '
      '1,024 cells | most in flight |\n|---|---|---|---|---|---|---|'
    )
    local = measure(None, folder, args.threads, args.streams, args.seconds)
    print(row('local', '-', local), flush=True)
    for delay, kind in itertools.product(
      args.delays.split(','), args.kinds.split(',')
    ):
      place = {
        'http': f'{served.url}/{object_store.BUCKET}/corpus',
      }.get(kind, f'{kind}://{object_store.BUCKET}/corpus')
      served.set_delay(float(delay) / 1000)
      figures = measure(served, place, args.threads, args.streams, args.seconds)
      print(row(kind, delay, figures), flush=True)
  finally:
    served.close()


def row(name: str, delay: str, figures: dict) -> str:
  """A line of the table."""
  requests, most = figures['store_requests'], figures['most']
  return (
    f'| {name} | {delay} | {figures["opened_s"]:.1f} | {figures["rate"]:,.0f} |'
    f' {figures["cpu_us"]:.1f} |'
    f' {"-" if requests != requests else f"{requests:.2f}"} | {most or "-"} |'
  )


def corpus_of(work: str) -> str:
  """The corpus of loader.py in a folder, made where it is not there."""
  import loader

  folder = os.path.join(work, 'corpus')
  if not os.path.exists(os.path.join(folder, 'manifest.json')):
    os.makedirs(work, exist_ok=True)
    cells = os.path.join(work, 'cells.h5ad')
    if not os.path.exists(cells):
      loader.simulated_cells(cells, 32_768)
    loader.build_corpus(cells, folder, 'human')
  return folder


if __name__ == '__main__':
  main()
