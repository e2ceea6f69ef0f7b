"""What a finished run is judged by: losses by unit, and what its genes know.

Losses are those of all held-out cells under the masks of one seed, whatever
the seed of the run, so that arms and seeds are asked the same genes.
"""

import collections
import dataclasses
import functools
import json

import jax
import numpy as np

from experiments.knowledge_study import materials, settings as settings_lib
from genecompass_jax import (
  corpus as corpus_lib,
  data as data_lib,
  evaluate,
  gene_table,
  main,
  model as model_lib,
  nulls,
  paths,
  pretrained,
  prior_tables,
  train,
  workdir,
)

MASK_SEED = 0
RARE = 0.01  # of the training cells of a species


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
    'genes': what the vectors of the genes recover.
  """
  found = pretrained.load(folder)
  config = main.to_dataclass(
    train.TrainConfig, workdir.read_config(folder)['run']
  )
  opened = corpus_lib.Corpus.open(corpus_path)
  counted = nulls.NullModels.load(paths.join(folder, workdir.NULLS))
  rare_SV = rare_tokens(opened, counted.cells_V())
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
    result['genes'] = genes(found, atlas, materials.held_tfs(root))
    result['tables_alone'] = tables_alone(
      [path for _, path in config.priors], atlas, materials.held_tfs(root)
    )
  return result


@functools.partial(jax.jit, static_argnums=3)
def _slots(params, batch, knowledge, config):
  return evaluate.slot_losses(params, batch, knowledge, config)


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


def rare_tokens(opened: corpus_lib.Corpus, cells_V: np.ndarray) -> np.ndarray:
  """bool [S, V]: genes that were seen in less than 1 % of the training cells.

  Seen means among the ranks that a cell keeps: what is below the cut is never
  shown. The cells are those of the species that have the token.

  Args:
    opened: the corpus.
    cells_V: training cells that keep each token.
  """
  number_V = np.zeros(len(cells_V))
  has_SV = np.zeros((len(gene_table.SPECIES), len(cells_V)), bool)
  for s in range(len(gene_table.SPECIES)):
    has_SV[s, opened.vocabulary.species_tokens(s)] = True
    store = opened.store('train', s)
    number_V[has_SV[s]] += store.num_cells if store is not None else 0
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
    return json.loads(paths.read_text(place))
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


def genes(
  found: pretrained.PretrainedModel, atlas, held: tuple[str, ...]
) -> dict[str, float]:
  """What the fused vectors of genes recover; see `recovered`."""
  vocabulary = found.vocabulary
  vectors = {}
  for s in range(len(gene_table.SPECIES)):
    ids = atlas.genes[s].gene_ids
    tokens = vocabulary.tokens(ids)
    known = np.flatnonzero(tokens >= 0)
    fused_ND = _fused(
      found.params,
      tokens[None, known],
      np.full((1, len(known)), s, np.int32),
      found.assets.knowledge,
      found.config,
    )[0]
    table = dict(zip(np.array(ids)[known], np.asarray(fused_ND, np.float64)))
    vectors |= table
  token_of = {
    gene: int(vocabulary.tokens([gene])[0])
    for genes_ in atlas.genes
    for gene in genes_.gene_ids
  }
  return recovered(vectors, token_of, atlas, held)


@functools.partial(jax.jit, static_argnums=4)
def _fused(params, tokens_BL, species_BL, knowledge, config):
  network = model_lib.bind(config, params)
  values_BL = jax.numpy.ones(tokens_BL.shape, jax.numpy.float32)
  return network.embedding.fused(tokens_BL, values_BL, species_BL, knowledge)


def tables_alone(
  tables: list[str], atlas, held: tuple[str, ...]
) -> dict[str, float]:
  """The same of the prior tables side by side, untrained."""
  parts: dict[str, list[np.ndarray]] = {}
  widths = []
  for path in tables:
    prior = prior_tables.read(path)
    widths.append(prior.vectors_GP.shape[1])
    for gene, vector in zip(prior.gene_ids, prior.vectors_GP):
      own = parts.setdefault(gene, [])
      own += [np.zeros(w) for w in widths[len(own) : -1]]
      own.append(vector.astype(np.float64))
  vectors = {
    gene: np.concatenate([*own, *(np.zeros(w) for w in widths[len(own) :])])
    for gene, own in parts.items()
  }
  return recovered(vectors, {}, atlas, held) if vectors else {}


def recovered(
  vectors: dict[str, np.ndarray],
  token_of: dict[str, int],
  atlas,
  held: tuple[str, ...],
) -> dict[str, float]:
  """Edges of TFs that no table states, and orthologues of other tokens.

  Args:
    vectors: of genes.
    token_of: token of each gene; genes of one token are no pair.
    atlas: the truth.
    held: TFs that the table of TFs leaves out, with their relatives.

  Returns:
    'edges_auprc': mean over held-out TFs of the average precision of their
    targets by cosine; 'edges_chance': mean share of targets among the genes
    ranked (a ratio would hang on one TF of few targets); 'orthologues_auroc':
    of orthologous pairs of other tokens against pairs with a random gene of the
    same species; and how many of each.
  """
  precision, chance = [], []
  for genes_, network in zip(atlas.genes, atlas.networks):
    ids = np.array(genes_.gene_ids)
    known = np.array([g in vectors for g in ids])
    if not known.any():
      continue
    unit_ND = _unit(np.stack([vectors[g] for g in ids[known]]))
    row_of = np.cumsum(known) - 1
    for t, r in enumerate(network.tf_rows_T):
      targets = network.target_E[network.tf_E == t]
      targets = targets[known[targets] & (targets != r)]
      if ids[r] not in held or not known[r] or len(targets) < 3:
        continue
      is_target = np.zeros(len(unit_ND), bool)
      is_target[row_of[targets]] = True
      others = np.arange(len(unit_ND)) != row_of[r]
      cosine = (unit_ND @ unit_ND[row_of[r]])[others]
      is_target = is_target[others]
      precision.append(average_precision(cosine, is_target))
      chance.append(is_target.mean())
  result = {
    'edges_auprc': float(np.mean(precision)) if precision else float('nan'),
    'edges_chance': float(np.mean(chance)) if chance else float('nan'),
    'edges_tfs': len(precision),
  }
  return result | _orthologues(vectors, token_of, atlas)


def _orthologues(vectors, token_of, atlas) -> dict[str, float]:
  human, mouse = (list(g.gene_ids) for g in atlas.genes)
  pairs = [
    (human[h], mouse[r])
    for r, h in enumerate(atlas.genes[1].human_R)
    if h >= 0
    and human[h] in vectors
    and mouse[r] in vectors
    and token_of.get(human[h], -1) != token_of.get(mouse[r], -2)
  ]
  if len(pairs) < 5 or not token_of:
    return {'orthologues_auroc': float('nan'), 'orthologues_pairs': len(pairs)}
  rng = np.random.default_rng(0)
  pool = [g for g in mouse if g in vectors]

  def cosine(one, other):
    return float(_unit(vectors[one][None])[0] @ _unit(vectors[other][None])[0])

  true = [cosine(*pair) for pair in pairs]
  false = [
    cosine(one, pool[i])
    for one, _ in pairs
    for i in rng.integers(len(pool), size=20)
  ]
  above = np.searchsorted(np.sort(false), true) / len(false)
  return {
    'orthologues_auroc': float(above.mean()),
    'orthologues_pairs': len(pairs),
  }


def average_precision(score_N: np.ndarray, is_true_N: np.ndarray) -> float:
  """Mean over true items of the share of true ones down to their rank."""
  true_N = is_true_N[np.argsort(-score_N, kind='stable')]
  share_N = np.cumsum(true_N) / np.arange(1, len(true_N) + 1)
  return float(share_N[true_N].mean())


def _unit(x_ND: np.ndarray) -> np.ndarray:
  return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
