"""What a finished run is judged by: losses by unit, and what its genes know.

Losses are those of all held-out cells under the masks of one seed, whatever
the seed of the run, so that arms and seeds are asked the same genes.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Sequence

import jax
import numpy as np

from experiments.knowledge_study import materials, settings as settings_lib
from genecompass_jax import (
  config_values,
  corpus as corpus_lib,
  data as data_lib,
  evaluate,
  gene_table,
  model as model_lib,
  nulls,
  paths,
  pretrained,
  prior_tables,
  scoring,
  vocabulary as vocabulary_lib,
  workdir,
)
from genecompass_jax.training import train_config

MASK_SEED = 0
RARE = 0.01  # of the training cells of a species
NON_PAIRS = 50  # of an orthologous pair


def score(folder: str, corpus_path: str, root: str, atlas=None) -> dict:
  """Scores a run.

  Args:
    folder: its workdir.
    corpus_path: its corpus.
    root: of the study; null models of a corpus are kept there.
    atlas: what the cells were drawn from; None for real cells.

  Returns:
    'units': unit -> sums and numbers of losses; 'nulls': the same of the null
    models; 'curve': [step, id loss, value loss] on the cells of the curve;
    'genes': what the vectors of the genes recover, and 'tables_alone' what the
    prior tables do, untrained.
  """
  found = pretrained.load(folder)
  config = config_values.to_dataclass(
    train_config.TrainConfig, workdir.read_config(folder)['run']
  )
  opened = corpus_lib.Corpus.open(corpus_path)
  counted = nulls.NullModels.load(paths.join(folder, workdir.NULLS))
  cells_S = [counts.num_cells for counts in counted.counts]
  rare_SV = rare_tokens(opened, counted.cells_V(), cells_S)
  units = _losses(found, config, opened, rare_SV)
  result = {
    'format': settings_lib.SCORE_FORMAT,
    'step': found.step,
    'checkpoint': found.sha256,
    'units': units,
    'nulls': _nulls(config, opened, root, rare_SV),
    'curve': _curve(folder),
  }
  if atlas is not None:
    held = materials.held_tfs(root)
    support_G = support(opened, atlas)
    result['genes'] = recovered(
      fused(found, atlas), found.vocabulary, atlas, held, support_G
    )
    tables = side_by_side([path for _, path in config.priors])
    result['tables_alone'] = recovered(
      tables, found.vocabulary, atlas, held, support_G
    )
  return result


@functools.partial(jax.jit, static_argnums=3)
def _slots(params, batch, knowledge, config):
  return scoring.slot_losses(params, batch, knowledge, config)


def _batches(config, opened):
  data = dataclasses.replace(config.data, seed=MASK_SEED)
  return data_lib.evaluation_batches(
    opened, config.encoding, data, 'validation'
  )


def _losses(found, config, opened, rare_SV) -> dict[str, dict[str, float]]:
  """Sums by unit: id and value, and ids of genes that few cells show."""
  species_C, unit_C = _labels(opened)
  sums = collections.defaultdict(lambda: collections.defaultdict(float))
  for host in _batches(config, opened):
    batch = host.batch
    id_BK, value_BK = _slots(
      found.params, batch, found.assets.knowledge, found.config
    )
    columns = _columns(
      {'id': np.asarray(id_BK), 'value': np.asarray(value_BK)},
      batch,
      rare_SV[species_C[host.cell_index_BS[:, 0]]],
    )
    _add(sums, columns, host.cell_index_BS[:, 0], unit_C)
  return {unit: dict(values) for unit, values in sorted(sums.items())}


def _columns(losses, batch, rare_BV) -> dict[str, np.ndarray]:
  """Sums of every row; a name with `_n` counts what was asked."""
  id_BK = np.asarray(batch.id_weights_BK, np.float64)
  value_BK = np.asarray(batch.value_weights_BK, np.float64)
  rare_BK = id_BK * np.take_along_axis(rare_BV, batch.id_labels_BK, 1)
  columns = {
    'id_n': id_BK.sum(1),
    'value_n': value_BK.sum(1),
    'rare_n': rare_BK.sum(1),
  }
  for name, loss_BK in losses.items():
    if 'value' in name and 'id_value' not in name:
      weights = {name: value_BK}
    else:
      weights = {name: id_BK, f'rare_{name}': rare_BK}
    for key, weight_BK in weights.items():
      kept_BK = np.where(weight_BK > 0, loss_BK, 0.0)
      columns[key] = (kept_BK * weight_BK).sum(1)
  return columns


def _add(sums, columns, cells_B, unit_C) -> None:
  for row in np.flatnonzero(cells_B >= 0):
    for name, values_B in columns.items():
      sums[unit_C[cells_B[row]]][name] += float(values_B[row])


def _labels(opened) -> tuple[np.ndarray, list[str]]:
  """Species and unit of every held-out cell."""
  species, units = [], []
  for s in range(len(gene_table.SPECIES)):
    store = opened.store('validation', s)
    if store is not None:
      names = store.categories('unit')
      units += [
        f'{gene_table.SPECIES[s]}/{names[code]}' for code in store.obs('unit')
      ]
      species += [s] * store.num_cells
  return np.array(species), units


def rare_tokens(
  opened: corpus_lib.Corpus, cells_V: np.ndarray, cells_S: Sequence[int]
) -> np.ndarray:
  """bool [S, V]: genes that were seen in less than 1 % of the training cells.

  Seen means among the ranks that a cell keeps: what is below the cut is never
  shown. The cells are those of the species that have the token.

  Args:
    opened: the corpus.
    cells_V: training cells that keep each token, of those counted.
    cells_S: cells counted of each species: of a large corpus not all are.
  """
  number_V = np.zeros(len(cells_V))
  has_SV = np.zeros((len(gene_table.SPECIES), len(cells_V)), bool)
  for s in range(len(gene_table.SPECIES)):
    has_SV[s, opened.vocabulary.species_tokens(s)] = True
    number_V[has_SV[s]] += cells_S[s]
  return has_SV & (cells_V < RARE * number_V)


def _nulls(config, opened, root, rare_SV) -> dict[str, dict[str, float]]:
  """Losses of the null models by unit; the same for all runs of a corpus."""
  name = paths.sha256_bytes(
    json.dumps(
      [
        settings_lib.SCORE_FORMAT,
        opened.manifest,
        dataclasses.asdict(config.encoding),
        dataclasses.asdict(config.data.mask),
      ],
      sort_keys=True,
    ).encode()
  )
  place = paths.join(root, 'nulls', f'{name[:16]}.json')
  if paths.exists(place):
    return paths.read_json(place)
  data = dataclasses.replace(config.data, seed=MASK_SEED)
  models: nulls.NullModels = evaluate.fit_nulls(opened, config.encoding, data)
  species_C, unit_C = _labels(opened)
  sums = collections.defaultdict(lambda: collections.defaultdict(float))
  for host in _batches(config, opened):
    cells_B = host.cell_index_BS[:, 0]
    columns = _columns(
      models.losses(host), host.batch, rare_SV[species_C[cells_B]]
    )
    _add(sums, columns, cells_B, unit_C)
  result = {unit: dict(values) for unit, values in sorted(sums.items())}
  paths.write_json(place, result)
  return result


def _curve(folder) -> list[list[float]]:
  from genecompass_jax import metrics

  return [
    [line['step'], line['eval_id_loss'], line.get('eval_value_loss')]
    for line in metrics.read(folder)
    if 'eval_id_loss' in line
  ]


def support(opened: corpus_lib.Corpus, atlas) -> dict[str, int]:
  """Training cells that express each gene of the atlas, by gene id."""
  support_SV = opened.medians('library').support_SV
  found = {}
  for s, genes in enumerate(atlas.genes):
    tokens = opened.vocabulary.tokens(genes.gene_ids)
    found |= {
      gene: int(support_SV[s, token])
      for gene, token in zip(genes.gene_ids, tokens)
      if token >= 0
    }
  return found


def fused(found: pretrained.PretrainedModel, atlas) -> dict[str, np.ndarray]:
  """The trained vector of every gene of the vocabulary, priors included."""
  vectors = {}
  for s, genes in enumerate(atlas.genes):
    tokens = found.vocabulary.tokens(genes.gene_ids)
    known = np.flatnonzero(tokens >= 0)
    fused_ND = _fused(
      found.params,
      tokens[None, known],
      np.full((1, len(known)), s, np.int32),
      found.assets.knowledge,
      found.config,
    )[0]
    ids = np.array(genes.gene_ids)[known].tolist()
    vectors |= dict(zip(ids, np.asarray(fused_ND, np.float64)))
  return vectors


@functools.partial(jax.jit, static_argnums=4)
def _fused(params, tokens_BL, species_BL, knowledge, config):
  network = model_lib.bind(config, params)
  values_BL = jax.numpy.ones(tokens_BL.shape, jax.numpy.float32)
  return network.embedding.fused(tokens_BL, values_BL, species_BL, knowledge)


def side_by_side(tables: list[str]) -> dict[str, np.ndarray]:
  """Vectors of prior tables, one after the other; zeros where one has none."""
  parts: dict[str, list[np.ndarray]] = {}
  widths = []
  for path in tables:
    prior = prior_tables.read(path)
    widths.append(prior.vectors_GP.shape[1])
    for gene, vector in zip(prior.gene_ids, prior.vectors_GP):
      own = parts.setdefault(gene, [])
      own += [np.zeros(w) for w in widths[len(own) : -1]]
      own.append(vector.astype(np.float64))
  return {
    gene: np.concatenate([*own, *(np.zeros(w) for w in widths[len(own) :])])
    for gene, own in parts.items()
  }


def recovered(
  vectors: dict[str, np.ndarray],
  vocabulary: vocabulary_lib.Vocabulary,
  atlas,
  held: tuple[str, ...],
  support_G: dict[str, int],
) -> dict[str, dict[str, float]]:
  """Edges of TFs that no table states, and orthologues of other tokens.

  Args:
    vectors: of genes. The genes ranked are those of the vocabulary, whatever
      is given: one without a vector has zeros.
    vocabulary: of the corpus.
    atlas: the truth.
    held: TFs that the table of TFs leaves out, with their relatives.
    support_G: training cells that express each gene.

  Returns:
    'edges': TF -> average precision of its targets by cosine; 'edges_chance':
    TF -> share of targets among the genes ranked (a ratio would hang on TFs of
    few targets); 'orthologues': human gene -> share of `NON_PAIRS` matched
    non-pairs that its orthologue of another token comes before. Matched: mouse
    genes of the same decile of support.
  """
  if not vectors:
    return {'edges': {}, 'edges_chance': {}, 'orthologues': {}}
  nothing = np.zeros(len(next(iter(vectors.values()))))
  known = {gene: vectors.get(gene, nothing) for gene in support_G}
  result = {'edges': {}, 'edges_chance': {}}
  for genes, network in zip(atlas.genes, atlas.networks):
    ids = np.array(genes.gene_ids)
    is_known = np.array([g in known for g in ids])
    if not is_known.any():
      continue
    unit_ND = _unit(np.stack([known[g] for g in ids[is_known]]))
    row_of = np.cumsum(is_known) - 1
    for t, r in enumerate(network.tf_rows_T):
      targets = network.target_E[network.tf_E == t]
      targets = targets[is_known[targets] & (targets != r)]
      if ids[r] not in held or not is_known[r] or len(targets) < 3:
        continue
      is_target = np.zeros(len(unit_ND), bool)
      is_target[row_of[targets]] = True
      others = np.arange(len(unit_ND)) != row_of[r]
      cosine = (unit_ND @ unit_ND[row_of[r]])[others]
      is_target = is_target[others]
      tf = str(ids[r])
      result['edges'][tf] = average_precision(cosine, is_target)
      result['edges_chance'][tf] = float(is_target.mean())
  return result | {
    'orthologues': _orthologues(known, vocabulary, atlas, support_G)
  }


def _orthologues(vectors, vocabulary, atlas, support_G) -> dict[str, float]:
  human, mouse = (list(genes.gene_ids) for genes in atlas.genes)
  pool = [gene for gene in mouse if gene in vectors]
  if not pool:
    return {}
  unit_ND = _unit(np.stack([vectors[gene] for gene in pool]))
  row_of = {gene: row for row, gene in enumerate(pool)}
  order = np.argsort([support_G[gene] for gene in pool], kind='stable')
  decile_N = np.empty(len(pool), int)
  decile_N[order] = np.arange(len(pool)) * 10 // len(pool)
  orthologues = collections.defaultdict(set)
  for mouse_gene, h in zip(mouse, atlas.genes[1].human_R):
    if h >= 0:
      orthologues[human[h]].add(mouse_gene)
  rng = np.random.default_rng(0)
  found = {}
  for gene in human:
    partners = orthologues.get(gene, set())
    token = vocabulary.tokens([gene])[0]
    chosen = [
      partner
      for partner in sorted(partners)
      if partner in vectors and vocabulary.tokens([partner])[0] != token
    ]
    if gene not in vectors or not chosen:
      continue
    own_D = _unit(vectors[gene][None])[0]
    shares = []
    for partner in chosen:
      same = np.flatnonzero(decile_N == decile_N[row_of[partner]])
      same = np.array([i for i in same if pool[i] not in partners])
      others = rng.choice(same, size=NON_PAIRS)
      true = unit_ND[row_of[partner]] @ own_D
      false_N = unit_ND[others] @ own_D
      # A tie is half a win: rows that are all the same know nothing.
      wins = (false_N < true).mean() + (false_N == true).mean() / 2
      shares.append(float(wins))
    found[gene] = float(np.mean(shares))
  return found


def average_precision(score_N: np.ndarray, is_true_N: np.ndarray) -> float:
  """Mean over true items of the share of true ones down to their score.

  Items of one score come together: of equal scores the share of true ones.
  """
  order = np.argsort(-score_N, kind='stable')
  score_N, true_N = score_N[order], is_true_N[order]
  last_N = np.searchsorted(-score_N, -score_N, 'right')
  share_N = np.cumsum(true_N)[last_N - 1] / last_N
  return float(share_N[true_N].mean())


def _unit(x_ND: np.ndarray) -> np.ndarray:
  return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
