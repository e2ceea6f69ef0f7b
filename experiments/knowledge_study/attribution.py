"""Which prior do models of the study use, by attribution, beside controls.

  python -m experiments.knowledge_study.attribution ROOT --cells 1024 \
      --run all=RUN --run permuted=RUN

ROOT is the folder of the study, a RUN the workdir of one of its arms (see
README.md and `config.py`). Two CPU cores: some minutes, beside 190 CPU seconds
for each run that is not there yet.

Declared before anything was computed. Asked is the mean log-probability of the
true ids over the genes of a held-out cell whose id is hidden (`split`, the masks
of the study), explained by word vector and priors against their means, with
integrated gradients. The **gain** of a part is the mean of its score: nats a
gene that it adds towards the truth. Donors are averaged; each is one value.

  trained            a run of `all`, its own tables
  given permuted     the same run, the rows of its tables permuted afterwards
  trained permuted   a run of `permuted`, its own tables
  random weights     `all` before training, means over three seeds

Attribution **loses** where the gain of all priors together is less than a
quarter of `trained`'s. Second, of single genes: ids are asked one at a time, and
genes of the cell ranked by absolute score. AUROC of those that the atlas links
with the asked gene (regulator, target, or a common regulator) against the rest,
mean over asked genes; it loses where it is nearer to 0.5 than half of
`trained`'s distance.
"""

import argparse
import dataclasses
import sys

import numpy as np

from experiments.knowledge_study import scores, settings as settings_lib
from genecompass_jax import (
  config_values,
  corpus as corpus_lib,
  data as data_lib,
  model as model_lib,
  paths,
  pretrained,
  simulate,
  workdir,
)
from genecompass_jax.analysis.attribution import integrals, parts, targets
from genecompass_jax.training import train_config

RANDOM_SEEDS = (11, 12, 13)
MAX_CELLS = 256
MAX_ASKED = 192  # single genes


def main(argv: list[str] | None = None) -> int:
  """Prints both tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('root', metavar='ROOT')
  parser.add_argument('--cells', required=True, help='of the corpus')
  parser.add_argument(
    '--run', action='append', required=True, metavar='ARM=WORKDIR'
  )
  parser.add_argument('--max-cells', type=int, default=MAX_CELLS)
  parser.add_argument('--max-asked', type=int, default=MAX_ASKED)
  args = parser.parse_args(argv)
  folders = dict(text.split('=', 1) for text in args.run)
  runs = {arm: pretrained.load(folder) for arm, folder in folders.items()}
  config = config_values.to_dataclass(
    train_config.TrainConfig, workdir.read_config(folders['all'])['run']
  )
  opened = corpus_lib.Corpus.open(paths.join(args.root, 'corpora', args.cells))
  models = arms(runs['all'], runs['permuted'])
  hosts = _hosts(config, opened, args.max_cells)
  unit_C = scores._labels(opened)[1]
  gains(models, hosts, unit_C)
  atlas = simulate.Atlas(settings_lib.ATLAS)
  links(models, hosts, atlas, args.max_asked)
  return 0


def arms(
  trained: pretrained.PretrainedModel, permuted: pretrained.PretrainedModel
) -> dict[str, list[pretrained.PretrainedModel]]:
  """The models of every line, several where they are averaged."""
  given = dataclasses.replace(
    trained.assets, knowledge=permuted.assets.knowledge
  )
  return {
    'trained': [trained],
    'given permuted': [trained.replace(assets=given)],
    'trained permuted': [permuted],
    'random weights': [
      trained.replace(params=model_lib.init(trained.config, seed))
      for seed in RANDOM_SEEDS
    ],
  }


def gains(models, hosts, unit_C) -> None:
  """Nats a gene that each part adds, by arm; the mean over donors."""
  names = parts.names(models['trained'][0].config, 'parts')
  print('\nGain, nats a hidden id (in brackets: by leaving the part out)\n')
  print('| arm | log p | all at baseline | ' + ' | '.join(names), end='')
  print(' | priors together | sum of absolute scores | error | points |')
  print('|---' * (len(names) + 7) + '|')
  for arm, several in models.items():
    found = [_gain(model, hosts, unit_C) for model in several]
    mean = {key: np.mean([f[key] for f in found], axis=0) for key in found[0]}
    cells = [f'{mean["input"]:.4f}', f'{mean["baseline"]:.4f}']
    cells += [
      f'{a:+.4f} ({b:+.4f})' for a, b in zip(mean['gain'], mean['without'])
    ]
    cells += [f'{mean["gain"][1:].sum():+.4f}', f'{mean["size"]:.4f}']
    cells += [f'{mean["error"]:.1e}', f'{mean["points"]:.0f}']
    print(f'| {arm} | ' + ' | '.join(cells) + ' |', flush=True)
    if len(several) == 1:
      together_U = found[0]['units'][:, 1:].sum(1)
      print(
        f'  {arm}: priors together by donor: '
        + ', '.join(f'{x:+.3f}' for x in together_U),
        file=sys.stderr,
      )


def _gain(model, hosts, unit_C) -> dict[str, np.ndarray]:
  mean_KSD = parts.means(model, 'mean')
  config = parts.float32(model.config)
  chosen = parts.names(config, 'parts')
  columns, units = [], []
  for host in hosts:
    batch = host.batch
    asked_BK = batch.id_weights_BK
    number_B1 = np.maximum(asked_BK.sum(1, keepdims=True), 1)
    readout = targets.IdReadout(
      batch.masked_slots_BK,
      batch.id_labels_BK,
      (asked_BK / number_B1).astype(np.float32),
      targets.LOG_PROBABILITY,
    )
    problem = _problem(model, batch.cells, readout, mean_KSD, config, chosen)
    found = integrals.integrate(*problem)
    size_B = np.abs(found.scores_BLK).sum((1, 2))
    row = np.flatnonzero((host.cell_index_BS[:, 0] >= 0) & asked_BK.any(1))
    columns.append(
      {
        'input': found.at_input_B[row],
        'baseline': found.at_baseline_B[row],
        'gain': found.scores_BLK.sum(1)[row],
        'without': integrals.leave_out_parts(*problem)[row],
        'size': size_B[row],
        'error': (np.abs(found.error_B) / size_B.clip(1e-12))[row],
        'points': found.points_B[row],
      }
    )
    units += [unit_C[c] for c in host.cell_index_BS[row, 0]]
  units_C = np.array(units)
  donors = np.unique(units_C)
  result = {}
  for key in columns[0]:
    values_C = np.concatenate([c[key] for c in columns])
    by_donor = np.array([values_C[units_C == d].mean(0) for d in donors])
    result[key] = by_donor.mean(0)
    if key == 'gain':
      result['units'] = by_donor
  return result


def links(models, hosts, atlas, max_asked: int) -> None:
  """AUROC of linked genes by absolute score of single asked genes."""
  linked_SVV = _linked(models['trained'][0].vocabulary, atlas)
  print('\nGenes that the atlas links with an asked one, by absolute score\n')
  print('| arm | AUROC | asked genes |\n|---|---|---|')
  for arm, several in models.items():
    found = [_auroc(m, hosts, linked_SVV, max_asked) for m in several]
    mean = np.mean([np.mean(aurocs) for aurocs in found])
    print(f'| {arm} | {mean:.3f} | {len(found[0])} |', flush=True)


def _linked(vocabulary, atlas) -> np.ndarray:
  """bool [S, V, V]: regulator and target, or a regulator in common."""
  linked_SVV = np.zeros((len(vocabulary.species), *2 * [vocabulary.size]), bool)
  for s, (genes, network) in enumerate(zip(atlas.genes, atlas.networks)):
    token_R = vocabulary.tokens(genes.gene_ids)
    is_edge_RR = np.zeros((len(genes), len(genes)), bool)
    regulator_E = network.tf_rows_T[network.tf_E]
    is_edge_RR[network.target_E, regulator_E] = True
    shares_RR = is_edge_RR.astype('f4') @ is_edge_RR.T.astype('f4') > 0
    linked_RR = shares_RR | is_edge_RR | is_edge_RR.T
    known = np.flatnonzero(token_R >= 0)
    at = np.ix_(token_R[known], token_R[known])
    linked_SVV[s][at] = linked_RR[np.ix_(known, known)]
  return linked_SVV


def _auroc(model, hosts, linked_SVV, max_asked: int) -> list[float]:
  """Of up to `max_asked` genes, the same for every model: one a cell."""
  mean_KSD = parts.means(model, 'mean')
  config = parts.float32(model.config)
  chosen = parts.names(config, 'parts')
  aurocs = []
  for host in hosts:
    if len(aurocs) >= max_asked:
      break
    batch, cells = host.batch, host.batch.cells
    first_B = np.asarray(batch.id_weights_BK > 0).argmax(1)
    row_B = np.arange(len(first_B))
    token_B = batch.id_labels_BK[row_B, first_B]
    readout = targets.IdReadout(
      batch.masked_slots_BK[row_B, first_B][:, None],
      token_B[:, None],
      np.ones((len(row_B), 1), np.float32),
      targets.LOG_PROBABILITY,
    )
    problem = _problem(model, cells, readout, mean_KSD, config, chosen)
    score_BL = np.abs(integrals.integrate(*problem).scores_BLK.sum(2))
    for row in row_B[host.cell_index_BS[:, 0] >= 0]:
      shown = np.flatnonzero(cells.gene_ids_BL[row] > 1)
      species = cells.species_BL[row, 0]
      is_linked = linked_SVV[
        species, token_B[row], cells.gene_ids_BL[row, shown]
      ]
      if batch.id_weights_BK[row].any() and 0 < is_linked.sum() < len(shown):
        order = score_BL[row, shown].argsort().argsort()
        hits = int(is_linked.sum())
        rank_sum = order[is_linked].sum() - hits * (hits - 1) / 2
        aurocs.append(float(rank_sum / (hits * (len(shown) - hits))))
  return aurocs[:max_asked]


def _problem(model, cells, readout, mean_KSD, config, chosen):
  """What the functions of `integrals` take."""
  found = parts.of_batch(
    model.params, cells, model.assets.knowledge, mean_KSD, config, chosen
  )
  return model.params, found, readout, config


def _hosts(config, opened, max_cells: int) -> list:
  """Held-out cells under the masks of the study."""
  data = dataclasses.replace(config.data, seed=scores.MASK_SEED)
  return list(
    data_lib.evaluation_batches(
      opened, config.encoding, data, 'validation', max_cells=max_cells
    )
  )


if __name__ == '__main__':
  sys.exit(main())
