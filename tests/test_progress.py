import io

from genecompass_jax import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_log_gets_plain_lines(monkeypatch):
  monkeypatch.setattr(progress, 'SECONDS_BETWEEN_LINES', 0.0)
  stream = io.StringIO()
  with progress.Progress(10, 'cells', 'reading', stream) as bar:
    bar.update(4, 'loss 1.5')
    bar.update(6)
  first, last = stream.getvalue().splitlines()  # the end is told once
  assert first.startswith('reading   40% of 10 cells')
  assert ' left' in first
  assert '100% of 10 cells' in last
  assert last.endswith('loss 1.5')
  assert '\r' not in stream.getvalue()


def test_a_terminal_gets_one_line_that_is_overwritten(monkeypatch):
  monkeypatch.setattr(progress, 'SECONDS_BETWEEN_FRAMES', 0.0)
  stream = Terminal()
  with progress.Progress(2, stream=stream) as bar:
    bar.update()
  assert stream.getvalue().count('\n') == 1
  assert '[############............]' in stream.getvalue()


def test_few_prints_and_unknown_totals(capsys):
  assert list(progress.track(iter(range(10_000)), label='x')) == list(
    range(10_000)
  )
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('x  10,000 items')
  assert 'left' not in line


def test_nothing_done_has_no_estimate():
  assert '? left' in progress.Progress(5, stream=io.StringIO()).line()


def test_compiling_is_no_rate(stop_clock):
  now = stop_clock(progress)
  bar = progress.Progress(5000, 'steps', 'training', io.StringIO())
  for _ in range(5):  # five shapes are compiled, one after the other
    now[0] += 23.0
    bar.update()
    assert bar.line() == 'training    0% of 5,000 steps  ? left'
  for _ in range(2000):
    now[0] += 0.1
    bar.update()
  # The last minute counts, and not the two that compiling took.
  assert '10 steps/s  5 min 00 s left' in bar.line()


def test_what_was_done_before_has_no_rate(stop_clock):
  now = stop_clock(progress)
  with progress.Progress(100, stream=io.StringIO()) as bar:
    bar.skip(50)
    for _ in range(3):
      now[0] += 1.0
      bar.update()
    assert '1 cells/s  47 s left' in bar.line()
    now[0] += 47.0
    bar.update(47)
    assert '1 cells/s  in 50 s' in bar.line()


def test_shares_of_a_unit():
  with progress.Progress(1.5, 'MB', stream=io.StringIO()) as bar:
    bar.update(0.25)
    bar.update(0.3333)
    assert '39% of 1.5 MB' in bar.line()
  with progress.Progress(None, 'MB', stream=io.StringIO()) as bar:
    bar.update(0.3333)
    assert bar.line().startswith('0.3 MB')
