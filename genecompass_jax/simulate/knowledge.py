"""Knowledge tables about an atlas, in raw formats, and its truth.

The tables say what a curator would: most of it right, most of the truth
missing, famous and well-expressed genes first. How right is a pair of knobs.
"""

import collections
import gzip
import json

import numpy as np

from genecompass_jax import errors, gene_table, paths
from genecompass_jax.simulate import (
  atlas as atlas_lib,
  config as config_lib,
  genes as genes_lib,
  perturb as perturb_lib,
)

UPSTREAM, DOWNSTREAM = 500, 2000  # the promoter window of GeneCompass
SPACING = 3000  # bases from one gene to the next
GENES_PER_CHROMOSOME = 200
MOTIF = 10
BASES = np.frombuffer(b'ACGT', np.uint8)
GC = 0.45
TAXON = ('9606', '10090')
COMMON_NAME = ('human', 'mouse, laboratory')


def write_knowledge(
  atlas: atlas_lib.Atlas,
  folder: paths.PathLike,
  precision: float = 0.6,
  recall: float = 0.6,
  study_bias: float = 1.0,
  withheld: float = 0.1,
  draw: int = 0,
) -> tuple[str, ...]:
  """Writes what is said about an atlas.

  For human and for mouse (`SPECIES` in a name): `tf_target.SPECIES.tsv` as
  TRRUST gives it (TF, target, mode, PubMed id; no header),
  `genome.SPECIES.fa.gz` and `genes.SPECIES.gtf.gz` (the 2,500 bases from 500
  before to 2,000 after each transcription start carry motifs),
  `gene_groups.SPECIES.tsv` with the columns of the HGNC table; for both,
  `HOM_MouseHumanSequence.rpt` as MGI gives it, and `manifest.json`.

  Equal precision and recall p is what the knowledge study calls fidelity p:
  at 0 the tables have their usual size and no truth. It holds for the TF
  table, for motifs (as the share of planted pairs that are edges) and for
  families. Orthologues are always right.

  Args:
    atlas: to write about.
    folder: made if missing.
    precision: share of the statements that are true.
    recall: share of the truth that is stated.
    study_bias: log odds of being stated, per sd of expression and of fame.
    withheld: share of TFs that the TF table leaves out, with their paralogues
      and orthologues; the genome does not know and keeps their motifs.
    draw: another one is another choice of statements about the same truth; the
      TFs left out stay.

  Returns:
    Ensembl ids of the TFs left out, of both species.

  Raises:
    UserError: a knob is out of range, or precision is 0 with a recall.
  """
  for name, value in (
    ('precision', precision),
    ('recall', recall),
    ('withheld', withheld),
  ):
    if not 0 <= value <= 1:
      raise errors.UserError(f'{name}={value} must lie between 0 and 1')
  if (precision == 0) != (recall == 0):
    raise errors.UserError(
      f'{precision=} and {recall=}: none is 0 without the other'
    )
  held = _withheld(atlas, withheld)
  for s, species in enumerate(gene_table.SPECIES):
    for name, data in (
      (
        'tf_target.{}.tsv',
        _tf_targets(atlas, s, precision, recall, study_bias, held, draw),
      ),
      ('gene_groups.{}.tsv', _families(atlas, s, precision, recall, draw)),
      *zip(
        ('genome.{}.fa.gz', 'genes.{}.gtf.gz'),
        _genome(atlas, s, precision, recall, draw),
      ),
    ):
      _write(paths.join(folder, name.format(species)), data)
  _write(paths.join(folder, 'HOM_MouseHumanSequence.rpt'), _orthologues(atlas))
  manifest = {
    'atlas': atlas.config.sha256,
    'precision': precision,
    'recall': recall,
    'study_bias': study_bias,
    'draw': draw,
    'withheld_tfs': held,
  }
  text = json.dumps(manifest, indent=2) + '\n'
  paths.write_text(paths.join(folder, 'manifest.json'), text)
  return tuple(held)


def write_truth(atlas: atlas_lib.Atlas, folder: paths.PathLike) -> None:
  """Writes the truth of an atlas as tab-separated text.

  `genes.tsv`, `edges.tsv`, `orthologues.tsv`, `types.tsv`, `trajectories.tsv`,
  `drugs.tsv`, and `effects.tsv.gz`: log2 fold change of the mean state of each
  cell type for the knock-out of each TF, without rows where it is exactly 0.
  Half a minute.
  """
  tables = {
    'genes.tsv': _gene_rows(atlas),
    'edges.tsv': _edge_rows(atlas),
    'orthologues.tsv': _orthologue_rows(atlas),
    'types.tsv': _type_rows(atlas),
    'trajectories.tsv': _trajectory_rows(atlas),
    'drugs.tsv': _drug_rows(atlas),
    'effects.tsv.gz': _effect_rows(atlas),
  }
  for name, rows in tables.items():
    _write(paths.join(folder, name), _lines(rows))
  text = json.dumps({'atlas': atlas.config.sha256}) + '\n'
  paths.write_text(paths.join(folder, 'manifest.json'), text)


def _lines(rows) -> str:
  return ''.join('\t'.join(map(str, row)) + '\n' for row in rows)


def _write(path, text: str | bytes) -> None:
  data = text.encode() if isinstance(text, str) else text
  if str(path).endswith('.gz'):
    data = gzip.compress(data, compresslevel=6, mtime=0)
  paths.write_bytes(path, data)


def _statements(atlas, purpose, s, draw) -> np.random.Generator:
  """The stream of one draw; that of the first has no number."""
  index = (s, draw) if draw else (s,)
  return config_lib.generator(atlas.config.seed, purpose, *index)


def _withheld(atlas, share) -> list[str]:
  """TFs with their paralogues, of both species."""
  human, mouse = atlas.genes
  rng = config_lib.generator(atlas.config.seed, 'withheld')
  tfs = np.flatnonzero(human.role_R == genes_lib.TF)
  chosen: set[int] = set()
  for r in rng.permutation(tfs):
    if len(chosen) >= share * len(tfs):
      break
    family = human.family_R[r]
    same_R = (human.family_R == family) & (family >= 0)
    chosen |= {int(r), *np.flatnonzero(same_R).tolist()}
  families = {int(human.family_R[r]) for r in chosen} - {-1}
  ids = [human.gene_ids[r] for r in sorted(chosen)]
  ids += [
    mouse.gene_ids[r]
    for r in np.flatnonzero(mouse.role_R == genes_lib.TF)
    if int(mouse.human_R[r]) in chosen or int(mouse.family_R[r]) in families
  ]
  return ids


def _num_false(num_true: int, precision: float, recall: float) -> int:
  """False statements beside the stated part of `num_true` true ones."""
  if precision == 0:
    return num_true
  return round(num_true * recall * (1 - precision) / precision)


def _pairs(rng, network, tfs, score_T, score_R, precision, recall):
  """Stated (TF number, gene row, sign): true ones, then false ones.

  The higher its score, the likelier a pair is stated.
  """
  mine_E = np.flatnonzero(np.isin(network.tf_E, tfs))
  tf_E, target_E = network.tf_E[mine_E], network.target_E[mine_E]
  key_E = score_T[tf_E] + score_R[target_E] + rng.gumbel(size=len(mine_E))
  best = np.argsort(-key_E)[: round(recall * len(mine_E))]
  true = zip(
    tf_E[best], target_E[best], np.sign(network.weight_E[mine_E[best]])
  )
  key_TR = (
    score_T[:, None] + score_R + rng.gumbel(size=(len(score_T), len(score_R)))
  )
  key_TR[network.tf_E, network.target_E] = -np.inf
  key_TR[np.arange(len(score_T)), network.tf_rows_T] = -np.inf
  key_TR[np.setdiff1d(np.arange(len(score_T)), tfs)] = -np.inf
  number = _num_false(len(mine_E), precision, recall)
  flat = np.argsort(-key_TR, axis=None)[:number]
  sign = np.where(rng.random(number) < 0.3, -1, 1)
  return [*true, *zip(*np.unravel_index(flat, key_TR.shape), sign)]


def _tf_targets(atlas, s, precision, recall, study_bias, held, draw) -> str:
  genes, network = atlas.genes[s], atlas.networks[s]
  rng = _statements(atlas, 'tf_target', s, draw)
  level_R = np.where(genes.role_R == genes_lib.SILENT, np.nan, genes.baseline_R)
  level_R = (level_R - np.nanmean(level_R)) / np.nanstd(level_R)
  score_R = study_bias * (np.nan_to_num(level_R, nan=-2.0) + genes.fame_R)
  open_T = [genes.gene_ids[r] not in held for r in network.tf_rows_T]
  rows = []
  for t, r, sign in _pairs(
    rng,
    network,
    np.flatnonzero(open_T),
    study_bias * genes.fame_R[network.tf_rows_T],
    score_R,
    precision,
    recall,
  ):
    mode = 'Activation' if sign > 0 else 'Repression'
    mode = 'Unknown' if rng.random() < 0.3 else mode
    tf = genes.symbols[network.tf_rows_T[t]]
    rows.append((tf, genes.symbols[r], mode, rng.integers(10**7, 10**8)))
  return _lines(sorted(rows))


def _families(atlas, s, precision, recall, draw) -> str:
  genes = atlas.genes[s]
  rng = _statements(atlas, 'families', s, draw)
  stated = collections.defaultdict(list)
  for family in np.unique(genes.family_R[genes.family_R >= 0]):
    members = np.flatnonzero(genes.family_R == family)
    kept = members[rng.random(len(members)) < recall]
    others = rng.permutation(np.flatnonzero(genes.family_R != family))
    # Rounded by chance, so that small families are as precise as large ones.
    number = len(members)
    if precision:
      number = len(kept) * (1 - precision) / precision
      number = int(number + rng.random())
    for r in [*kept, *others[:number]]:
      stated[int(r)].append(int(family))
  rows = [
    (
      'hgnc_id',
      'symbol',
      'locus_group',
      'gene_group',
      'gene_group_id',
      'entrez_id',
      'ensembl_gene_id',
    )
  ]
  for r, gene_id in enumerate(genes.gene_ids):
    families = stated[r]
    rows.append(
      (
        f'HGNC:{9_000_000 + 10_000 * s + r}',
        genes.symbols[r],
        'protein-coding gene',
        '|'.join(f'Simulated family {f}' for f in families),
        '|'.join(str(f + 1) for f in families),
        genes.entrez[r],
        gene_id,
      )
    )
  return _lines(rows)


def _genome(atlas, s, precision, recall, draw) -> tuple[bytes, str]:
  """FASTA and GTF: genes in random places, motifs in their promoters."""
  genes, network = atlas.genes[s], atlas.networks[s]
  rng = _statements(atlas, 'genome', s, draw)
  R, T = len(genes), len(network.tf_rows_T)
  width = UPSTREAM + DOWNSTREAM
  frequency = [(1 - GC) / 2, GC / 2, GC / 2, (1 - GC) / 2]
  motif_TK = motifs(atlas, s)
  bases_RK = rng.choice(4, (R, SPACING), p=frequency)
  margin = (SPACING - width) // 2  # between the slot and the window, each side
  for t, r, _ in _pairs(
    rng, network, np.arange(T), np.zeros(T), np.zeros(R), precision, recall
  ):
    for _ in range(1 + rng.poisson(1.0)):
      site_K = motif_TK[t].copy()
      wrong_K = rng.random(MOTIF) < 0.1
      site_K[wrong_K] = rng.integers(4, size=wrong_K.sum())
      if rng.random() < 0.5:
        site_K = 3 - site_K[::-1]  # the other strand
      start = margin + rng.integers(width - MOTIF)
      bases_RK[r, start : start + MOTIF] = site_K
  reverse_R = rng.random(R) < 0.5
  bases_RK[reverse_R] = 3 - bases_RK[reverse_R, ::-1]
  order = rng.permutation(R)
  fasta, rows = [], []
  for c, first in enumerate(range(0, R, GENES_PER_CHROMOSOME)):
    here = order[first : first + GENES_PER_CHROMOSOME]
    sequence = BASES[bases_RK[here].ravel()].tobytes()
    fasta.append(b'>%d\n' % (c + 1))
    fasta += [sequence[i : i + 60] + b'\n' for i in range(0, len(sequence), 60)]
    for slot, r in enumerate(here):
      low = slot * SPACING + margin
      start, end = low + UPSTREAM + 1, low + width  # 1-based, both inside
      if reverse_R[r]:
        start, end = low + 1, low + DOWNSTREAM
      strand = '-' if reverse_R[r] else '+'
      name = (
        f'gene_id "{genes.gene_ids[r]}"; gene_name "{genes.symbols[r]}"; '
        f'gene_biotype "protein_coding";'
      )
      transcript = f' transcript_id "{genes.gene_ids[r]}.t";'
      for feature, extra in (
        ('gene', ''),
        ('transcript', transcript),
        ('exon', transcript),
      ):
        place = (c + 1, 'simulated', feature, start, end, '.', strand, '.')
        rows.append((*place, name + extra))
  return b''.join(fasta), _lines(rows)


def motifs(atlas: atlas_lib.Atlas, species: int) -> np.ndarray:
  """Consensus motif of each TF, 0..3 for ACGT, int [T, 10].

  Orthologues share theirs; paralogues differ in about two bases.
  """
  genes = atlas.genes[species]
  rows = atlas.networks[species].tf_rows_T
  motif_TK = np.zeros((len(rows), MOTIF), np.int64)
  for t, r in enumerate(rows):
    human = int(genes.human_R[r])
    key = (0, human) if human >= 0 else (1, int(r))
    rng = config_lib.generator(atlas.config.seed, 'motif', *key)
    own_K = rng.integers(4, size=MOTIF)
    change_K = rng.random(MOTIF) < 0.25
    family = int(genes.family_R[r])
    if family >= 0:
      shared = config_lib.generator(atlas.config.seed, 'family motif', family)
      own_K = np.where(change_K, own_K, shared.integers(4, size=MOTIF))
    motif_TK[t] = own_K
  return motif_TK


def _orthologue_groups(atlas) -> dict[str, list[tuple[int, int]]]:
  found = collections.defaultdict(list)
  for s, genes in enumerate(atlas.genes):
    for r, group in enumerate(genes.groups):
      if group:
        found[group].append((s, r))
  return found


def _orthologues(atlas) -> str:
  rows = [
    (
      'DB Class Key',
      'Common Organism Name',
      'NCBI Taxon ID',
      'Symbol',
      'EntrezGene ID',
      'Mouse MGI ID',
      'HGNC ID',
    )
  ]
  groups = _orthologue_groups(atlas).values()
  for key, members in enumerate(groups, 90_000_000):
    for s, r in members:
      genes = atlas.genes[s]
      ids = (
        ('', f'HGNC:{9_000_000 + r}')
        if s == 0
        else (f'MGI:{9_000_000 + r}', '')
      )
      rows.append(
        (key, COMMON_NAME[s], TAXON[s], genes.symbols[r], genes.entrez[r], *ids)
      )
  return _lines(rows)


def _gene_rows(atlas):
  yield (
    'species',
    'gene_id',
    'symbol',
    'role',
    'is_master',
    'log_baseline',
    'family',
    'sibling_of',
    'fame',
  )
  for species, genes in zip(gene_table.SPECIES, atlas.genes):
    for r, gene_id in enumerate(genes.gene_ids):
      tf = genes.sibling_of_R[r]
      yield (
        species,
        gene_id,
        genes.symbols[r],
        genes_lib.ROLES[genes.role_R[r]],
        int(genes.is_master_R[r]),
        f'{genes.baseline_R[r]:.6f}',
        genes.family_R[r] if genes.family_R[r] >= 0 else '',
        genes.gene_ids[tf] if tf >= 0 else '',
        f'{genes.fame_R[r]:.6f}',
      )


def _edge_rows(atlas):
  yield ('species', 'tf', 'target', 'weight', 'conserved')
  for species, genes, network in zip(
    gene_table.SPECIES, atlas.genes, atlas.networks
  ):
    for t, r, weight, conserved in zip(
      network.tf_E, network.target_E, network.weight_E, network.conserved_E
    ):
      tf = genes.gene_ids[network.tf_rows_T[t]]
      yield species, tf, genes.gene_ids[r], repr(float(weight)), int(conserved)


def _orthologue_rows(atlas):
  yield ('group', 'species', 'gene_id')
  for group, members in _orthologue_groups(atlas).items():
    for s, r in members:
      yield group, gene_table.SPECIES[s], atlas.genes[s].gene_ids[r]


def _type_rows(atlas):
  types, human = atlas.types, atlas.genes[0]
  yield ('type', 'parent', 'human_share', 'mouse_share', 'active_masters')
  masters = np.flatnonzero(human.is_master_R)
  for y, name in enumerate(types.names):
    parent = types.parent_Y[y]
    yield (
      name,
      types.names[parent] if parent >= 0 else '',
      *(f'{share:.6f}' for share in types.share_SY[:, y]),
      '|'.join(human.gene_ids[r] for r in masters[types.active_YM[y]]),
    )


def _trajectory_rows(atlas):
  yield ('start', 'goal')
  for start, goal in atlas.types.trajectories:
    yield atlas.types.names[start], atlas.types.names[goal]


def _drug_rows(atlas):
  yield ('drug', 'targets', 'half_dose', 'hill')
  for drug in atlas.drugs:
    yield drug.name, '|'.join(drug.gene_ids), drug.half_dose, drug.hill


def _effect_rows(atlas):
  yield (
    'species',
    'knocked_out',
    'cell_type',
    'gene_id',
    'log2_fold',
    'direct',
  )
  for s, species in enumerate(gene_table.SPECIES):
    genes = atlas.genes[s]
    for row in atlas.networks[s].tf_rows_T:
      tf = genes.gene_ids[row]
      effects = atlas.effects(perturb_lib.knock_out(tf), s)
      for name, fold_R in zip(effects.types, effects.log2_fold_YR):
        for r in np.flatnonzero(np.nan_to_num(fold_R, nan=0.0)):
          yield (
            species,
            tf,
            name,
            genes.gene_ids[r],
            f'{fold_R[r]:.6g}',
            int(effects.is_direct_R[r]),
          )
