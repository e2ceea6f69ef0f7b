"""What is known without any model: expression, co-expression, a prior."""

import os

import anndata
import numpy as np

from genecompass_jax import cli, errors, prior_tables, simulate, vocabulary

WIDTH = '32'


def of_expression(
  adata: anndata.AnnData, token_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """Mean log expression and mean absolute correlation of genes, by donor.

  Args:
    adata: counts with `donor` in obs; the cells that the model is trained on.
    token_V: place of every token among the columns; -1 for none.

  Returns:
    `(mean_UV, correlation_UVV, donors)`: tokens that are not among the columns
    have 0; a gene is not correlated with itself.
  """
  counts_CR = adata.X.toarray().astype(np.float64)
  log_CR = np.log1p(counts_CR / counts_CR.sum(1, keepdims=True) * 1e4)
  log_CV = np.where(token_V >= 0, log_CR[:, token_V], 0.0)
  donors = sorted(adata.obs['donor'].unique())
  means, correlations = [], []
  for donor in donors:
    of_donor_CV = log_CV[(adata.obs['donor'] == donor).to_numpy()]
    means.append(of_donor_CV.mean(0))
    apart_CV = of_donor_CV - means[-1]
    norm_V = np.sqrt((apart_CV**2).sum(0))
    apart_CV = apart_CV / np.where(norm_V > 0, norm_V, 1.0)
    correlation_VV = apart_CV.T @ apart_CV
    np.fill_diagonal(correlation_VV, 0.0)
    correlations.append(correlation_VV)
  return np.array(means), np.array(correlations), donors


def of_prior(
  atlas: simulate.Atlas, root: str, vocab: vocabulary.Vocabulary
) -> np.ndarray:
  """Cosine of the vectors of genes in a prior, [V, V]; 0 where one has none.

  The regulatory network as the tables of the atlas state it (60 % precision and
  recall), embedded by `genecompass prior grn`.
  """
  raw, output = os.path.join(root, 'knowledge'), os.path.join(root, 'prior')
  name = os.path.join(output, 'grn.parquet')
  if not os.path.exists(name):
    simulate.write_knowledge(atlas, raw)
    code = cli.main(
      ['prior', 'grn', f'--human=trrust={raw}/tf_target.human.tsv', '-o', name]
      + ['--width', WIDTH, '--overwrite']
    )
    if code:
      raise errors.UserError(f'{raw}: no prior could be built of it')
  prior = prior_tables.read(name)
  token_N = vocab.tokens(prior.gene_ids)
  unit_VP = np.zeros((vocab.size, prior.vectors_GP.shape[1]))
  known = token_N >= 0
  unit_VP[token_N[known]] = prior.vectors_GP[known]
  norm_V = np.linalg.norm(unit_VP, axis=1, keepdims=True)
  unit_VP /= np.where(norm_V > 0, norm_V, 1.0)
  cosine_VV = unit_VP @ unit_VP.T
  np.fill_diagonal(cosine_VV, 0.0)
  return cosine_VV
