"""GeneCompass in JAX: pretraining and analysis of single-cell models.

  import genecompass_jax as gc

  model = gc.load(folder)
  adata.obsm['X_genecompass'] = gc.embed(adata, model)

Names are imported when they are first used, so that preparation needs no JAX.
"""

import importlib
import importlib.metadata
import os
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


def _leave_out_a_fault() -> None:
  """Turns off what makes jaxlib 0.10.2 compute wrongly on CPUs.

  It hands chains of products and sums to a library, and some come back wrong
  without a word (github.com/jax-ml/jax/issues/39103): derivatives of the
  first-order estimate by 30 %. Products alone are right. Read by XLA when it
  compiles first, so this has to be imported before that; `genecompass doctor`
  tries it.
  """
  flag = '--xla_cpu_experimental_ynn_fusion_type'
  try:
    version = importlib.metadata.version('jaxlib')
  except importlib.metadata.PackageNotFoundError:
    return
  given = os.environ.get('XLA_FLAGS', '')
  if version == '0.10.2' and flag not in given:
    value = f'{flag}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'
    os.environ['XLA_FLAGS'] = f'{given} {value}'.strip()


_leave_out_a_fault()


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
