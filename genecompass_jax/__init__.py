"""GeneCompass in JAX: pretraining and analysis of single-cell models.

  import genecompass_jax as gc

  model = gc.load(folder)
  adata.obsm['X_genecompass'] = gc.embed(adata, model)

Names are imported when they are first used, so that preparation needs no JAX.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

# Public name -> the module that holds it, and its name there if another.
_PUBLIC = {
  'load': 'pretrained',
  'export': 'pretrained',
  'PretrainedModel': 'pretrained',
  'cell_batch': 'pretrained',
  'pretraining_loss': 'pretrained',
  'embed': 'analysis.embeddings',
  'embed_cells': 'analysis.embeddings',
  'embed_file': 'analysis.embedding_files',
  'StateConfig': 'analysis.embeddings',
  'gene_embeddings': 'analysis.gene_embeddings',
  'perturb': 'analysis.perturbation.perturb',
  'perturb_file': 'analysis.perturbation.perturb',
  'perturbation_rank_plot': 'analysis.perturbation_figures:rank_plot',
  'perturbation_volcano': 'analysis.perturbation_figures:volcano',
  'attribute': 'analysis.attribution.attribute',
  'attribute_groups': 'analysis.attribution.by_group',
  'GeneId': 'analysis.attribution.targets',
  'GeneValue': 'analysis.attribution.targets',
  'CellAxis': 'analysis.attribution.targets',
  'ClassLogit': 'analysis.attribution.targets',
  'GroupAxis': 'analysis.attribution.group_axis',
  'attention_summary': 'analysis.attention_summary',
  'attention_partners': 'analysis.attention_partners',
  'Vocabulary': 'vocabulary',
  'GeneTable': 'gene_table',
  'Corpus': 'corpus',
  'UserError': 'errors',
  # The way of the demo, for notebooks.
  'blood_cells': 'prepare.pbmc68k',
  'build_corpus': 'prepare.anndatas',
  'held_out_cells': 'prepare.anndatas',
  'pretrain': 'demo.pretraining',
  'read_metrics': 'metrics:read',
  'learning_curves': 'analysis.figures',
  'probe_cell_types': 'tasks.cell_types:probe',
  'probe_table': 'tasks.cell_types:table',
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
  """Imports a public name on first use."""
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  where, _, own_name = _PUBLIC[name].partition(':')
  module = importlib.import_module(f'{__name__}.{where}')
  return getattr(module, own_name or name)


def __dir__() -> list[str]:
  """Public names, for completion in notebooks."""
  return sorted([*globals(), *_PUBLIC])
