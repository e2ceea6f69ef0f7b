"""Null models: what counting alone predicts from the batch the model sees.

Rank order gives much away. A hidden gene lies between the visible neighbours
of its position, so its value is all but known, and with it which genes it can
be. A trained model has learned something when it beats the strongest of these
predictors, per study and species:

  null_id_marginal         frequency of the gene in training cells.
  null_id_rank_bin         frequency of the gene at this relative rank (32
                           bins), among genes not visible in the cell.
  null_id_rank_bracket     frequency of the (gene, count) pairs whose scaled
                           count fits between the nearest visible neighbours,
                           among genes not visible in the cell.
  null_value_gene_mean     mean value of the gene in training cells. It is told
                           the TRUE gene, which the model is not.
  null_value_interpolation linear in rank between the nearest visible values.
  null_value_bracket_mean  mean value of the pairs in the bracket.

Those are the nulls of the mask objective `released`, in both modes. Under
`split` the ids are scored by the same three and by

  null_id_value_bracket    frequency of the (gene, count) pairs whose scaled
                           count is the value that is shown with the hidden id,
                           among genes not visible in the cell,

the rank bracket leaving that value aside, and the values, of genes whose id is
shown and whose rank is not, by

  null_value_gene_mean     as above; the model is told the gene as well.
  null_value_count_mean    in `library` mode: mean over the gene's counts in
                           training cells, at the scale of the cell.
  null_value_cell_scaled   the mean of the gene, moved along a line in the mean
                           and the lowest of the visible values, log2 of the
                           number of genes, and log2 of the scale of the cell.

Ids are scored by cross-entropy in nats over the tokens of the species, values
by squared error in log2 units.

**Not visible.** A gene that is expressed in a share p of cells and hidden with
rate r is, where it is not visible, hidden with odds r p : (1 - p). Genes are
therefore weighted by p(count) / (1 - (1 - r) p), not by p(count): a gene that
every cell expresses and this one does not show is almost surely hidden. p is
the share of the cells that measured the gene, after the cut at max_genes. r is
the rate of hidden ids: under `split` a gene without value is visible.

**Bracket.** Pairs are compared by count / divisor. The order of quotients does
not depend on the library size, so one sorted table serves `library` mode too:
the scale of a cell is read off its visible (gene, value) pairs, as the
smallest scaled count over the smallest whole number (at most 16) that makes
all scaled counts whole. Visible genes are then known by their exact counts and
ties are exact. With hash ties the bracket includes both ends; as a hidden gene
tied with a level of n positions would come outside all of them with chance
1 / (n + 1), pairs at an end carry that weight, and pairs of a level that lies
on both sides weight 1. With token ties the tokens of the neighbours bound the
bracket as well. Above the first and below the last visible gene the bracket is
open; a gene is a candidate as often as it survives the cut. Counts
above 63 are binned, 16 bins an octave, each spread over four counts. Counts
that are not whole (corrected counts) are taken to the nearest whole number, so
there the bracket is coarse.

**Value bracket.** A shown value and the scale of the cell give count / divisor
up to float32. A gene is a candidate if that times its divisor is whole; where
none is, as with corrected counts, by the density of its counts there. With
token ties the tokens of equal neighbours bound the candidates as well.

**Lines.** Slopes of a gene are least squares over its training cells (mean and
lowest value are those of the other genes), drawn towards the slopes of all
genes with a weight chosen on training cells. In a cell cut at max_genes the
lowest value is the cut, which every gene of the cell lies above.

**Shown ids.** Under the default policy a hidden position shows `<mask>`, its
true id (share k) or a random one of T tokens (share q). Given a shown id s,
P(g) is proportional to P(g | position) (k [g = s] + q / T). An id shown at one
hidden position is taken from the candidates of the others by the probability
that it is true there. Under the `released` policy a kept gene shows its value,
so it cannot be told from a gene that was not selected: its id and value are
certain (loss 0), and an id shown without a value says nothing. T is the mean
number of tokens that the training cells measured.

**Smoothing.** The marginal is (n + 1/2) / (sum n + T/2) over the tokens of
the species. Rank bin and bracket are mixed with it (renormalised over genes
not visible) by a share chosen on training cells, as are the rules by which
interpolation goes on above the first and below the last visible gene. The
count distribution of a gene is drawn towards that of genes of like mean count,
with a weight chosen on the same cells.

| file | what it holds |
|---|---|
| `models.py` | `NullModels`: fit, score, save and load |
| `counts.py` | what is counted in training cells, and the tables made of it |
| `compiled.py` | the predictors, one cell at a time |
| `split.py` | those of the objective `split` |
| `files.py` | fitted models as one file |
"""

from genecompass_jax.nulls.models import (
  ID_NAMES,
  NAMES,
  SPLIT_ID_NAMES,
  SPLIT_VALUE_NAMES,
  VALUE_NAMES,
  Choices,
  NullModels,
  TrainingCells,
)

__all__ = (
  'ID_NAMES',
  'NAMES',
  'SPLIT_ID_NAMES',
  'SPLIT_VALUE_NAMES',
  'VALUE_NAMES',
  'Choices',
  'NullModels',
  'TrainingCells',
)
