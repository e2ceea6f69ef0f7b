"""What the null models are fitted on."""

import numpy as np
import pytest

from genecompass_jax import (
  corpus,
  corpus_writer,
  data,
  encoding,
  evaluate,
  gene_table,
  medians,
  vocabulary,
)

GENES, CELLS = 40, 2100
ENCODING = encoding.EncodingConfig()


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """Sources of all genes and of ten; each third cell is of no source."""
  ids = tuple(f'ENSG{i:011d}' for i in range(GENES))
  table = gene_table.GeneTable(
    gene_ids=ids,
    symbols=ids,
    aliases=((),) * GENES,
    entrez=('',) * GENES,
    species_G=np.zeros(GENES),
    biotypes=('protein_coding',) * GENES,
    orthologue_groups=('',) * GENES,
  )
  vocab = vocabulary.Vocabulary.from_genes(table)
  measured = np.ones((2, GENES), bool)
  measured[1, 10:] = False
  counts_CR = np.random.default_rng(0).poisson(1.0, (CELLS, GENES))
  cells_c, rows_N = np.nonzero(counts_CR)
  cells = encoding.RaggedCells(
    rows_N.astype(np.uint16),
    counts_CR[cells_c, rows_N],
    np.concatenate([[0], np.cumsum((counts_CR > 0).sum(axis=1))]),
    counts_CR.sum(axis=1).astype(np.float64),
  )
  histogram = medians.MedianHistogram('released', vocab.token_G, vocab.size)
  histogram.add(cells)
  place = tmp_path_factory.mktemp('c') / 'corpus'
  with corpus_writer.CorpusWriter(
    place,
    vocab,
    sources=[{'name': 'all'}, {'name': 'ten'}],
    measured={0: measured},
    categories={'source': ['all', 'ten'], 'unit': ['u']},
  ) as writer:
    rows = np.arange(CELLS)
    obs = {'source': rows % 3 - 1, 'unit': rows * 0, 'source_row': rows}
    store = writer.store('train', 0)
    store.append(cells, obs, [str(i) for i in rows])
    writer.write_medians(medians.Medians.from_histograms(vocab, {0: histogram}))
    writer.commit({})
  return corpus.Corpus.open(place), counts_CR


def test_unmeasured_is_not_zero_and_a_cell_of_no_source_measured_all(built):
  counts = evaluate.fit_nulls(built[0], ENCODING, data.DataConfig()).counts[0]
  assert counts.num_cells == CELLS
  expected = np.where(np.arange(GENES) < 10, CELLS, CELLS - CELLS // 3)
  np.testing.assert_array_equal(counts.measured_T, expected)
  np.testing.assert_array_equal(
    counts.pairs_TN.sum(axis=1), (built[1] > 0).sum(axis=0)
  )


def test_many_cells_are_counted_in_evenly_spaced_blocks(built, monkeypatch):
  size = built[0].store('train', 0).block_cells
  monkeypatch.setattr(evaluate, 'MAX_NULL_CELLS', 4 * size)
  counts = evaluate.fit_nulls(built[0], ENCODING, data.DataConfig()).counts[0]
  blocks = [i * -(-CELLS // size) // 4 for i in range(4)]
  chosen = np.concatenate(
    [np.arange(b * size, b * size + size) for b in blocks]
  )
  assert counts.num_cells == 4 * size
  np.testing.assert_array_equal(
    counts.pairs_TN.sum(axis=1), (built[1][chosen] > 0).sum(axis=0)
  )
  missed = (chosen % 3 == 2).sum()
  assert counts.measured_T[-1] == 4 * size - missed
