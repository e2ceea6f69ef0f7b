"""Figures: cells in two dimensions, and what a run has learned.

Each function gives a matplotlib Figure, which a notebook shows and
`figure.savefig` writes. matplotlib and umap-learn come with the extra `demo`.
"""

import importlib
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genecompass_jax import errors

# Okabe and Ito's colours and two more, told apart by colour-blind readers;
# further classes share the grey.
PALETTE = (
  '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9', '#8C6D1F',
  '#332288', '#AA4499', '#999933',
)  # fmt: skip
GREY = '#BBBBBB'
INK = '#222222'
OTHER = 'other'
# In the order of the nulls.
NULL_COLOURS = ('#D55E00', '#009E73', '#AA4499', '#332288', '#8C6D1F')

# Null model -> how its line is labelled.
ID_NULLS = {
  'null_id_marginal': 'gene frequency',
  'null_id_rank_bin': 'frequency at this rank',
  'null_id_rank_bracket': 'frequency between\nvisible neighbours',
  'null_id_value_bracket': 'frequency at the\nvalue that is shown',
}
VALUE_NULLS = {
  'null_value_gene_mean': 'mean of the gene',
  'null_value_bracket_mean': 'mean between\nvisible neighbours',
  'null_value_interpolation': 'interpolation between\nvisible neighbours',
  'null_value_cell_scaled': 'mean of the gene,\nscaled by the cell',
  'null_value_count_mean': "mean of the gene's\ncounts, at this depth",
}
STYLE = {
  'font.family': 'DejaVu Sans',
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#666666',
  'axes.labelcolor': INK,
  'text.color': INK,
  'xtick.color': '#666666',
  'ytick.color': '#666666',
  'savefig.dpi': 200,
  'figure.dpi': 110,
}


def umap(
  features_CD: np.ndarray, *, seed: int = 0, neighbors: int = 15
) -> np.ndarray:
  """Two dimensions for the eye, float32 [C, 2]; one thread, fixed seed."""
  module = optional('umap')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # a seed means one thread: as wanted
    reducer = module.UMAP(
      n_neighbors=min(neighbors, len(features_CD) - 1),
      min_dist=0.3,
      random_state=seed,
      n_jobs=1,
    )
    return reducer.fit_transform(np.asarray(features_CD, np.float32))


def cell_map(
  places: Mapping[str, np.ndarray],
  colour_by: Sequence[Any],
  *,
  title: str,
  note: str = '',
  colour_name: str = '',
):
  """Cells in panels side by side, coloured alike.

  Args:
    places: title of the panel -> [C, 2].
    colour_by: class of each cell [C], or numbers; of classes the ten largest
      have a colour of their own and the rest share the grey.
    title: of the figure: what is shown, of which cells.
    note: small print below it.
    colour_name: what the colours mean.

  Returns:
    A matplotlib Figure.
  """
  matplotlib = optional('matplotlib')
  colour_by = np.asarray(colour_by)
  is_number = colour_by.dtype.kind in 'fiu'
  with matplotlib.rc_context(STYLE):
    figure = new_figure(4.1 * len(places) + 2.1, 4.5)
    panels = figure.subplots(1, len(places), squeeze=False)[0]
    order_C = np.random.Generator(np.random.Philox(0)).permutation(
      len(colour_by)
    )  # or the last class would lie on top
    size = float(np.clip(5000 / len(colour_by), 3, 12))
    dots = {'s': size, 'linewidths': 0.2, 'edgecolors': 'white', 'alpha': 0.9}
    if not is_number:
      names = _named_colours(colour_by)
      colours = [names.get(c, GREY) for c in colour_by[order_C]]
    for axes, (panel, xy_C2) in zip(panels, places.items()):
      xy_C2 = np.asarray(xy_C2)[order_C]
      if is_number:
        low, high = np.quantile(colour_by, [0.02, 0.98])
        drawn = axes.scatter(
          *xy_C2.T,
          c=colour_by[order_C],
          cmap='cividis',
          vmin=low,
          vmax=max(high, low + 1e-9),
          **dots,
        )
      else:
        axes.scatter(*xy_C2.T, c=colours, **dots)
      axes.set_title(panel, fontsize=10, loc='left')
      axes.set_xlabel('UMAP 1', fontsize=8)
      axes.set_ylabel('UMAP 2', fontsize=8)
      axes.set(xticks=[], yticks=[], box_aspect=1)
      axes.margins(0.04)
    if is_number:
      figure.colorbar(drawn, ax=list(panels), shrink=0.6, label=colour_name)
    else:
      _legend(figure, matplotlib, names, colour_by, colour_name)
    set_title(figure, title)
    small_print(figure, note)
  return figure


def learning_curves(
  lines: Sequence[Mapping[str, Any]],
  *,
  title: str,
  note: str = '',
  groups: Mapping[str, str] | None = None,
):
  """Training and held-out losses of a run, with the null models.

  Args:
    lines: of metrics.jsonl, from `metrics.read`.
    title: of the figure: what is shown, of which run.
    note: small print below it.
    groups: group of held-out cells ('' for all, 'dataset=NAME', ...) -> title
      of its column.

  Returns:
    A matplotlib Figure: the id loss above, the value loss below, a column a
    group. Training losses are those of all training cells in every column.

  Raises:
    UserError: the run holds no evaluation.
  """
  matplotlib = optional('matplotlib')
  groups = groups or {'': 'All held-out cells'}
  training = [line for line in lines if 'id_loss' in line]
  held_out = [line for line in lines if 'eval_id_loss' in line]
  if not held_out:
    raise errors.UserError('the run was never evaluated: nothing to draw')
  rows = (
    ('id_loss', 'Which gene was hidden\n(cross-entropy, nats)', ID_NULLS),
    (
      'value_loss',
      'How much of it there was\n(squared error of log2 values)',
      VALUE_NULLS,
    ),
  )
  with matplotlib.rc_context(STYLE):
    figure = new_figure(4.6 * len(groups) + 0.6, 6.4)
    panels = figure.subplots(2, len(groups), squeeze=False, sharex=True)
    ends = {}
    for column, (group, name) in enumerate(groups.items()):
      found = [
        (line['step'], line if not group else line['by'][group])
        for line in held_out
      ]
      for row, (key, label, null_names) in enumerate(rows):
        axes = panels[row, column]
        ends[axes] = _curves(axes, training, found, key, null_names)
        if key == 'value_loss':
          axes.set_yscale('log')
          axes.set_xlabel('training step')
        else:
          axes.set_title(name, fontsize=10, loc='left')
        if not column:
          axes.set_ylabel(label)
    for row in panels:  # one scale a row, so that columns can be compared
      low = min(axes.get_ylim()[0] for axes in row)
      high = max(axes.get_ylim()[1] for axes in row)
      for axes in row:
        axes.set_ylim(low, high)
        _label_ends(axes, ends[axes])
    set_title(figure, title)
    small_print(figure, note)
  return figure


def _curves(axes, training, found, key, null_names) -> list[tuple]:
  """One panel; returns (value, text, colour) of the labels at its right."""
  # A run that was stopped may have been trained beyond its last evaluation.
  last = max([found[-1][0], *(line['step'] for line in training[-1:])])
  ends = []
  if training:
    axes.plot(
      [line['step'] for line in training],
      [line[key] for line in training],
      color='#AAAAAA',
      linewidth=0.9,
    )
    ends.append((training[-1][key], 'training, all cells', '#777777'))
  if f'eval_{key}' in found[-1][1]:
    axes.plot(
      [step for step, _ in found],
      [values[f'eval_{key}'] for _, values in found],
      color=PALETTE[0],
      marker='o',
      markersize=4,
      linewidth=1.8,
      clip_on=False,
    )
    value = found[-1][1][f'eval_{key}']
    ends.append((value, f'held out: {value:.3g}', PALETTE[0]))
  for (name, label), colour in zip(null_names.items(), NULL_COLOURS):
    if name in found[-1][1]:
      value = found[-1][1][name]
      axes.axhline(value, color=colour, lw=1.1, ls=(0, (5, 2)))
      ends.append((value, f'{label}: {value:.3g}', colour))
  axes.set_xlim(0, max(last, 1))
  axes.xaxis.get_major_locator().set_params(integer=True)
  return ends


def _label_ends(axes, ends: list[tuple]) -> None:
  """Labels at the right of the lines, moved apart where they would overlap."""
  transform = axes.transData + axes.transAxes.inverted()
  places = sorted(
    (float(transform.transform((0, value))[1]), text, colour)
    for value, text, colour in ends
  )
  heights = [0.035 * (1 + text.count('\n')) for _, text, _ in places]
  at = [place for place, _, _ in places]
  for _ in range(100):  # pairs that are too close are pushed apart
    for i in range(len(at) - 1):
      lacking = heights[i] + heights[i + 1] - (at[i + 1] - at[i])
      if lacking > 1e-6:
        at[i] -= lacking / 2
        at[i + 1] += lacking / 2
  for y, (_, text, colour) in zip(at, places):
    axes.annotate(
      text,
      (1.02, y),
      xycoords='axes fraction',
      color=colour,
      va='center',
      fontsize=7.5,
      linespacing=0.95,
      annotation_clip=False,
    )


def _named_colours(classes_C: np.ndarray) -> dict[str, str]:
  """Colours of the largest classes, largest first."""
  names, counts = np.unique(classes_C, return_counts=True)
  order = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
  largest = [str(names[i]) for i in order[: len(PALETTE)]]
  return dict(zip(largest, PALETTE))


def _legend(figure, matplotlib, names, classes_C, title) -> None:
  counts = {name: int((classes_C == name).sum()) for name in names}
  entries = [(f'{name} ({counts[name]:,})', c) for name, c in names.items()]
  rest = len(classes_C) - sum(counts.values())
  if rest:
    kinds = len(np.unique(classes_C)) - len(names)
    entries.append((f'{kinds} {OTHER} classes ({rest:,})', GREY))
  figure.legend(
    [
      matplotlib.lines.Line2D([], [], color=c, marker='o', ls='', ms=6)
      for _, c in entries
    ],
    [text for text, _ in entries],
    loc='outside right center',
    frameon=False,
    fontsize=8.5,
    title=f'{title} (cells)' if title else None,
    alignment='left',
    handletextpad=0.2,
  )


def set_title(figure, title: str) -> None:
  """The title of a figure, at its left, broken into lines that fit."""
  width = int(figure.get_size_inches()[0] * 9.5)  # characters of this size
  title = '\n'.join(textwrap.wrap(title, width))
  # Names of groups and files are no formulas, whatever is in them.
  figure.suptitle(title, x=0.01, ha='left', fontsize=12, parse_math=False)


def small_print(figure, note: str) -> None:
  """A note below a figure."""
  if note:
    width = int(figure.get_size_inches()[0] * 17)  # characters of this size
    note = '\n'.join(textwrap.wrap(note, width))
    figure.supxlabel(
      note, x=0.01, ha='left', fontsize=7.5, color='#555555', parse_math=False
    )


def new_figure(width: float, height: float):
  """A figure of its own: no window and no state of pyplot."""
  module = optional('matplotlib.figure')
  return module.Figure((width, height), layout='constrained')


def optional(name: str):
  """A module of the extra `demo`; a UserError says how to install it."""
  try:
    module = importlib.import_module(name)
    if name == 'matplotlib':
      importlib.import_module('matplotlib.lines')
    return module
  except ImportError as error:
    raise errors.UserError(
      f'{name.partition(".")[0]} is not installed: '
      'pip install ".[demo]" in the folder of the repository'
    ) from error
