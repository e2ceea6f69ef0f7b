import pytest

from genecompass_jax import errors, metrics, workdir
from genecompass_jax.analysis import report


def test_table_has_a_row_a_step_and_a_group(tmp_path):
  log = metrics.MetricsFile(tmp_path)
  group = {'eval_cells': 3, 'eval_loss': 2.0, 'eval_id_loss': 4.5}
  log.write(step=5, loss=1.0)
  log.write(step=5, **group, null_id_marginal=5.25, by={'species=human': group})
  log.close()
  table = report.table(tmp_path).splitlines()
  assert table[0] == '| | cells | id loss | marginal |'
  assert table[2:] == [
    '| all, step 5 | 3 | 4.5 | 5.25 |',
    '| species=human | 3 | 4.5 |  |',
  ]


def test_a_run_that_was_stopped_says_how_far_it_came(tmp_path):
  log = metrics.MetricsFile(tmp_path)
  log.write(step=0, eval_cells=3, eval_loss=2.0, eval_id_loss=4.5)
  log.write(step=1500, loss=1.0)
  log.close()
  last = report.table(tmp_path).splitlines()[-1]
  assert last == 'trained to step 1,500; last evaluated at step 0'
  workdir.write_config(
    tmp_path,
    {
      'run': {'optimizer': {'total_steps': 2000}},
      'corpus_sha256': '0',
      'assets': {},
    },
  )
  assert 'step 1,500 of 2,000;' in report.table(tmp_path)


def test_what_a_run_cost_is_two_lines(tmp_path):
  log = metrics.MetricsFile(tmp_path)
  log.write(event='start', step=0, began=1e9, peak_source='8 x TPU v4')
  log.write(step=0, eval_cells=3, eval_loss=2.0, eval_id_loss=4.5)
  for step, used in enumerate((0.01, 0.5, 0.4), 1):
    log.write(
      step=step,
      loss=1.0,
      model_flops_utilisation=used,
      real_model_flops_utilisation=used / 2,
    )
  seconds = {'start': 10.0, 'train': 30.0}
  log.write(event='goodput', step=3, seconds=seconds)
  log.close()
  assert report.table(tmp_path).splitlines()[-2:] == [
    'utilisation: 40.0% on padded positions, 20.0% on real tokens (median of 3 '
    'lines, of 8 x TPU v4)',
    'goodput: 75.0% of 40 s trained (start 25.0%)',
  ]


def test_leaky_groups_are_marked(tmp_path):
  log = metrics.MetricsFile(tmp_path)
  group = {'eval_cells': 3, 'eval_loss': 2.0, 'leaky': True}
  other = {'eval_cells': 1, 'eval_loss': 2.0}
  log.write(step=5, **group, by={'dataset=a': group, 'dataset=b': other})
  log.close()
  table = report.table(tmp_path)
  assert '| all, step 5 (leaky) | 3 |' in table
  assert '| dataset=a (leaky) | 3 |' in table
  assert '| dataset=b | 1 |' in table
  assert table.splitlines()[-1].startswith('leaky: cells were held out')


def test_a_folder_without_evaluation_is_refused_in_one_line(tmp_path):
  with pytest.raises(errors.UserError, match='no metrics.jsonl'):
    report.table(tmp_path)
  metrics.MetricsFile(tmp_path).close()
  with pytest.raises(errors.UserError, match='nothing was evaluated'):
    report.table(tmp_path)
