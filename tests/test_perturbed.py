"""Cells that something was done to stay out of a corpus, and it is said."""

import numpy as np
import pytest

from genecompass_jax import cli, errors
from genecompass_jax.prepare import perturbed, reports
from tests import test_prepare_pipeline as pipelines


def screen(values, column='perturbation'):
  adata = pipelines.make(len(values), donors=3)
  adata.obs[column] = values
  return adata


def guides(num_cells=120):
  rng = np.random.default_rng(0)
  return rng.choice(['non-targeting', 'KLF1', 'GATA1+KLF1'], num_cells)


def rows_of(built):
  return sorted(
    row
    for split in built.splits
    for row in pipelines.cells_of(built, split, 0)[0]['row']
  )


@pytest.mark.parametrize(
  'column', ['perturbation', 'sgRNA', 'guide_identity', 'Target_Gene']
)
def test_a_screen_is_known_by_its_column(tmp_path, column):
  values = guides()
  built = pipelines.prepare(
    [pipelines.source(screen(values, column))], tmp_path / 'c'
  )
  controls = np.flatnonzero(values == 'non-targeting')
  assert rows_of(built) == controls.tolist()
  report = reports.read(tmp_path / 'c')
  said = report['sources'][0]['perturbed']
  assert said['removed'] == len(values) - len(controls)
  assert f'{column} is non-targeting' in said['note']
  assert 'cells removed (kept:' in reports.describe(report)


def test_conditions_are_perturbations_where_they_are_written_as_such(tmp_path):
  rng = np.random.default_rng(1)
  written = rng.choice(['ctrl', 'KLF1+ctrl', 'GATA1+KLF1'], 90)
  built = pipelines.prepare(
    [pipelines.source(screen(written, 'condition'))], tmp_path / 'gears'
  )
  assert rows_of(built) == np.flatnonzero(written == 'ctrl').tolist()
  other = rng.choice(['ctrl', 'stim', 'CD4+ T'], 90)
  built = pipelines.prepare(
    [pipelines.source(screen(other, 'condition'))], tmp_path / 'other'
  )
  assert len(rows_of(built)) == 90
  assert not reports.read(tmp_path / 'other')['sources'][0]['perturbed']['note']


def test_the_user_has_the_last_word(tmp_path):
  values = guides()
  for controls, kept in (
    ('all', np.ones(len(values), bool)),
    ('perturbation=KLF1', values == 'KLF1'),
    ('perturbation=KLF1,GATA1+KLF1', values != 'non-targeting'),
    ('donor=d1', None),
  ):
    adata = screen(values)
    if kept is None:
      kept = (adata.obs['donor'] == 'd1').to_numpy()
    share = 0.0 if 'donor' in controls else 0.1  # of one donor none is left
    built = pipelines.prepare(
      [pipelines.source(adata, controls=controls)],
      tmp_path / controls,
      validation_share=share,
    )
    assert rows_of(built) == np.flatnonzero(kept).tolist()


def test_names_that_hold_commas(tmp_path):
  values = np.array(['none, at all', 'KLF1', 'mock'] * 30)
  for controls, kept in (
    ('perturbation="none, at all"', values == 'none, at all'),
    ('perturbation=mock,"none, at all"', values != 'KLF1'),
  ):
    built = pipelines.prepare(
      [pipelines.source(screen(values), controls=controls)],
      tmp_path / controls,
    )
    assert rows_of(built) == np.flatnonzero(kept).tolist()
  controls = 'perturbation=none, at all'
  with pytest.raises(errors.UserError, match="'none'.*double quotes"):
    pipelines.prepare(
      [pipelines.source(screen(values), controls=controls)], tmp_path / 'c'
    )
  with pytest.raises(errors.UserError, match='double quotes') as error:
    pipelines.source(screen(values), controls='perturbation="none')
  assert '\n' not in str(error.value)
  assert perturbed.names('a,,"b, c",5" d,"e ""f"""') == (
    'a', 'b, c', '5" d', 'e "f"',
  )  # fmt: skip


def test_cells_of_no_value_are_as_they_are(tmp_path):
  values = np.where(np.arange(90) % 3 == 0, 'KLF1', None)
  built = pipelines.prepare([pipelines.source(screen(values))], tmp_path / 'c')
  assert rows_of(built) == np.flatnonzero(values != 'KLF1').tolist()


def test_what_cannot_be_told_is_asked(tmp_path, capsys):
  for values, controls, word in (
    (['KLF1', 'GATA1'] * 30, '', 'give --controls perturbation=VALUE'),
    (['KLF1', 'none'] * 30, 'perturbation=NT', "no value 'NT'"),
    (['KLF1', 'none'] * 30, 'guide=NT', "no obs column 'guide'"),
  ):
    with pytest.raises(errors.UserError, match=word):
      pipelines.prepare(
        [pipelines.source(screen(values), controls=controls)], tmp_path / 'c'
      )
  path = tmp_path / 'screen.h5ad'
  screen(['KLF1', 'GATA1'] * 30).write_h5ad(path)
  argv = ['prep', str(path), '-o', str(tmp_path / 'c')]
  assert cli.main(argv) == errors.EXIT_USAGE
  assert len(capsys.readouterr().err.strip().splitlines()) == 1
  assert cli.main([*argv, '--controls', 'perturbation']) == errors.EXIT_USAGE
  assert 'COLUMN=VALUE' in capsys.readouterr().err


def test_a_file_of_perturbed_cells_alone_is_refused(tmp_path):
  adata = screen(['KLF1', 'none'] * 30)
  adata = adata[adata.obs['perturbation'] == 'KLF1'].copy()
  with pytest.raises(errors.UserError, match='--controls'):
    pipelines.prepare([pipelines.source(adata)], tmp_path / 'c')


@pytest.mark.parametrize(
  'value, is_control',
  [
    ('control', True), ('Ctrl', True), ('NT-3', True), ('non-targeting', True),
    ('non_targeting_0012', True), ('NO-TARGET', True), ('DMSO', True),
    ('Vehicle', True), ('safe-targeting', True), ('unperturbed', True),
    ('NTRK1', False), ('NTC', True), ('CTRL1', True), ('WT1', False),
    ('Negative Control 4', True), ('NT3', False), ('WT', True), ('neg', True),
    ('Control_ST', True), ('Control_NT+Control_ST', True), ('ctrl+ctrl', True),
    ('ASXL3+Control_NT', False),
    ('NEGR1', False), ('MOCK', True), ('NANOG', False), ('NONO', False),
    ('PBS', True), ('PBSN', False), ('KLF1+ctrl', False), ('NOTCH1', False),
  ],
)  # fmt: skip
def test_names_of_controls(value, is_control):
  values = [value, 'none']
  mask_C, _ = perturbed.perturbed(
    'a', 'perturbation', '', np.array([0, 1]), values
  )
  assert mask_C.tolist() == [not is_control, False]


def test_controls_of_the_handed_screen(tmp_path, real_data):
  """2,072 of 14,926 astrocytes of Perturb-FISH are controls."""
  path = real_data / 'perturb_fish_astrocytes' / 'perturb_fish_astrocytes.h5ad'
  if not path.exists():
    pytest.skip(f'{path} is absent')
  argv = ['prep', str(path), '-o', str(tmp_path / 'c'), '--no-filters']
  assert cli.main([*argv, '--validation-share', '0']) == 0
  (source,) = reports.read(tmp_path / 'c')['sources']
  assert source['cells'] - source['perturbed']['removed'] == 2072
