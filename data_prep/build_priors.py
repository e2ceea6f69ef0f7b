"""All priors, their controls and their check, as one command.

  python data_prep/build_priors.py --data FOLDER --corpus CORPUS -o PRIORS

FOLDER holds the public tables named in `FILES` (docs/real_data.md says where
they are from); kinds whose files are absent are left out and named. CORPUS gives
co-expression (training cells only) and the expression that controls are matched
on. Started again, steps are skipped whose command, input files and code are what
they were:

  PRIORS/NAME.parquet              grn, promoter, family, coexpression
  PRIORS/CONTROL/NAME.parquet      shuffled, random, constant, rewired
  PRIORS/check.json, check.txt     coverage, validation, overlap
  PRIORS/steps.json                what was run

Seven minutes of CPU. For a full promoter prior give --human-genome,
--human-genes and the same for mouse; the promoters named in `FILES` are of 60
bases and human only.
"""

import argparse
import contextlib
import io
import os
import pathlib
import sys

from genecompass_jax import cli, errors, paths
from genecompass_jax.prepare import priors
from genecompass_jax.prepare.priors import files

FILES = {
  'collectri': 'grn_collectri/collectri_human.csv.gz',
  'dorothea_human': 'grn_dorothea/dorothea_hs.tsv.gz',
  'dorothea_mouse': 'grn_dorothea/dorothea_mm.tsv.gz',
  'trrust': 'grn_trrust_v2_human/trrust_rawdata.human.tsv',
  'genelink': 'grn_beeline_genelink/edges.tsv.gz',
  'hgnc': 'hgnc_genes_and_groups/hgnc_group_members.tsv.gz',
  'promoters': 'promoter_sequences_epd60/promoters_human_epd_60bp.tsv.gz',
  'go_human': 'gene_sets_msigdb_v2025/human_go_mf.gmt.gz',
  'reactome_human': 'gene_sets_msigdb_v2025/human_reactome.gmt.gz',
  'reactome_mouse': 'gene_sets_msigdb_v2025/mouse_reactome.gmt.gz',
  'hallmark_human': 'gene_sets_msigdb_v2025/human_hallmark.gmt.gz',
  'hallmark_mouse': 'gene_sets_msigdb_v2025/mouse_hallmark.gmt.gz',
}
LICENCES = {
  'collectri': 'CollecTRI (Mueller-Dott 2023); terms of its sources',
  'dorothea_human': 'DoRothEA (Garcia-Alonso 2019); GPL-3, parts academic only',
  'dorothea_mouse': 'DoRothEA (Garcia-Alonso 2019); GPL-3, parts academic only',
  'hgnc': 'HGNC; CC0 1.0',
  'promoters': 'EPDnew promoters as tabulated by HUPTA; no licence stated',
}
# Cell-type ChIP-seq of BEELINE: the truth that no curated table is made of.
CHIP = {
  'hesc_chip': ('human', 'specific|hESC|TFs1000'),
  'mesc_chip': ('mouse', 'specific|mESC|TFs1000'),
  'mdc_chip': ('mouse', 'specific|mDC|TFs1000'),
}
CONTROLS = ('shuffled', 'random', 'constant', 'rewired')


def main() -> int:
  """Runs what is not up to date."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', required=True, metavar='FOLDER')
  parser.add_argument('--corpus', default='', metavar='CORPUS')
  parser.add_argument('-o', '--output', required=True, metavar='PRIORS')
  parser.add_argument('--hold-out', default='', metavar='TF,...|FILE')
  parser.add_argument('--width', default='256')
  parser.add_argument('--permutations', default='200')
  parser.add_argument('--seed', default='0')
  for species in ('human', 'mouse'):
    parser.add_argument(f'--{species}-genome', default='', metavar='FASTA')
    parser.add_argument(f'--{species}-genes', default='', metavar='GTF')
  args = parser.parse_args()
  have = {
    name: os.path.join(args.data, file)
    for name, file in FILES.items()
    if os.path.exists(os.path.join(args.data, file))
  }
  for name in FILES.keys() - have.keys():
    print(f'{FILES[name]} is absent: left out', file=sys.stderr)
  if args.hold_out and 'hgnc' not in have:
    # targets of a paralogue would tell those of the TF
    print('--hold-out needs the groups of HGNC for paralogues', file=sys.stderr)
    return errors.EXIT_USAGE
  recorded = os.path.join(args.output, 'steps.json')
  done = _read(recorded)
  built = []
  for name, argv in _builds(args, have):
    output = os.path.join(args.output, f'{name}.parquet')
    common = ['-o', output, '--overwrite', '--seed', args.seed]
    common += [
      f'--licence={os.path.basename(have[key])}={text}'
      for key, text in LICENCES.items()
      if key in have
    ]
    code = _step(name, ['prior', *argv, *common], [output], done, recorded)
    if code:
      return code
    built.append(output)
  expression = ['--expression', args.corpus] if args.corpus else []
  for control in CONTROLS:
    chosen = [
      p for p in built if control != 'rewired' or p.endswith('/grn.parquet')
    ]
    if not chosen:
      continue
    folder = os.path.join(args.output, control)
    argv = ['prior', 'control', control, *chosen, '-o', folder, *expression]
    argv += ['--overwrite', '--seed', args.seed]
    outputs = [os.path.join(folder, os.path.basename(p)) for p in chosen]
    code = _step(control, argv, outputs, done, recorded)
    if code:
      return code
  rewired = os.path.join(args.output, 'rewired', 'grn.parquet')
  checked = [*built]
  if os.path.exists(rewired):
    # Under a name of its own beside the prior it is compared with.
    checked.append(rewired)
  argv = ['prior', 'check', *checked, *expression, *_truths(have, args.output)]
  report = os.path.join(args.output, 'check.json')
  argv += ['-o', report, '--permutations', args.permutations]
  return _step('check', argv, [report], done, recorded)


def _builds(args, have):
  """(name, arguments of `genecompass prior`) of every prior."""
  grn = ['grn', '--lift', 'both', '--width', args.width]
  for key, flag in (
    ('collectri', '--human=collectri'),
    ('dorothea_human', '--human=dorothea'),
    ('dorothea_mouse', '--mouse=dorothea'),
  ):
    grn += [f'{flag}={have[key]}'] if key in have else []
  if len(grn) > 5 and args.hold_out:
    grn += ['--hold-out', args.hold_out, '--paralogues', have['hgnc']]
  if len(grn) > 5:
    yield 'grn', grn
  promoter = ['promoter', '--width', args.width]
  genomes = [
    (f'--{s}-{what}', getattr(args, f'{s}_{what}'))
    for s in ('human', 'mouse')
    for what in ('genome', 'genes')
    if getattr(args, f'{s}_{what}')
  ]
  if genomes:
    yield 'promoter', promoter + [part for pair in genomes for part in pair]
  elif 'promoters' in have:
    promoter += ['--human-sequences', have['promoters']]
    promoter += ['--gene-column', 'ensembl_id,promoter', '--strip', '_[0-9]+']
    yield 'promoter', promoter
  if 'hgnc' in have:
    yield 'family', ['family', '--groups', have['hgnc'], '--width', args.width]
  if args.corpus:
    yield 'coexpression', ['coexpression', args.corpus, '--width', args.width]


def _truths(have, output):
  sets = [
    f'--sets={species}:{name}={have[f"{name}_{species}"]}'
    for name in ('reactome', 'hallmark', 'go')
    for species in ('human', 'mouse')
    if f'{name}_{species}' in have
  ]
  if 'trrust' in have:
    sets.append(f'--edges=human:trrust:trrust={have["trrust"]}')
  if 'genelink' in have:
    frame = files.table(have['genelink'])
    for name, (species, which) in CHIP.items():
      path = os.path.join(output, 'truths', f'{name}.tsv')
      chosen = frame[frame['set'] == which][['TF', 'Target']]
      paths.write_text(path, chosen.to_csv(sep='\t', index=False))
      sets.append(f'--edges={species}:{name}:table(TF,Target)={path}')
  return sets


def _step(name, argv, outputs, done, recorded) -> int:
  """Runs a command unless it was run on the same content."""
  key = _key(argv)
  if done.get(name) == key and all(map(os.path.exists, outputs)):
    print(f'{name}: up to date')
    return 0
  print(f'genecompass {" ".join(argv)}', flush=True)
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    code = cli.main(argv)
  print(text.getvalue(), flush=True)
  if code:
    return code
  if name == 'check':
    paths.write_text(outputs[0].removesuffix('.json') + '.txt', text.getvalue())
  done[name] = key
  paths.write_json(recorded, done)
  return 0


def _key(argv) -> str:
  """Digest of a command, of the files it names, and of the code."""
  parts = []
  for text in argv:
    file = text.rsplit('=', 1)[-1] if not os.path.exists(text) else text
    if os.path.isdir(file):
      manifest = os.path.join(file, 'manifest.json')
      file = manifest if os.path.exists(manifest) else ''
    parts.append(text)
    if file and os.path.isfile(file) and parts[-2:-1] != ['-o']:
      parts.append(paths.sha256_file(file))
  code = sorted(pathlib.Path(priors.__path__[0]).glob('*.py'))
  parts += map(paths.sha256_file, code)
  return paths.sha256_bytes('\n'.join(parts).encode())


def _read(path) -> dict:
  return paths.read_json(path) if os.path.exists(path) else {}


if __name__ == '__main__':
  sys.exit(main())
