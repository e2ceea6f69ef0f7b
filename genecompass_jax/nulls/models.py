"""The fitted null models: fit, score, save and load; see the package."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from genecompass_jax import (
  encoding,
  errors,
  kernels,
  masking,
  paths,
  schemas,
)
from genecompass_jax.nulls import compiled, counts as counts_lib, files, split

ID_NAMES = ('null_id_marginal', 'null_id_rank_bin', 'null_id_rank_bracket')
VALUE_NAMES = (
  'null_value_gene_mean',
  'null_value_interpolation',
  'null_value_bracket_mean',
)
NAMES = ID_NAMES + VALUE_NAMES
# Under the mask objective `split`; the second value null in `library` mode.
SPLIT_ID_NAMES = (*ID_NAMES, 'null_id_value_bracket')
SPLIT_VALUE_NAMES = (
  'null_value_gene_mean',
  'null_value_count_mean',
  'null_value_cell_scaled',
)

_CALIBRATION_CELLS = 256
_CALIBRATION_EVERY = 8
_MIXES = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 0.6)
_PSEUDO_CELLS = (0.0, 1.0, 10.0, 30.0)
_SLOPE_CELLS = (1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
_END_EPOCHS = 8


@dataclasses.dataclass(frozen=True)
class TrainingCells:
  """A chunk of encoded training cells of one species.

  Attributes:
    species: species code.
    cells: the cells, encoded as the model sees them.
    measured_V: float64 number of these cells that measured each token; None
      where all measured all: unmeasured is not zero.
  """

  species: int
  cells: encoding.EncodedCells
  measured_V: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Choices:
  """What is chosen on training cells, per species.

  Attributes:
    pseudo_cells: weight of the count distribution of genes of like mean
      count in that of a gene.
    mix_rank_bin: share of the marginal in the rank-bin null.
    mix_rank_bracket: share of the marginal in the rank-bracket null.
    top: how values go on above the first visible gene: 'nearest' keeps its
      value, 'linear' draws a line through it and the fifth visible gene,
      'log_rank' the same over log(position + 1).
    bottom: the same below the last visible gene.
    mix_value_bracket: share of the marginal in the value-bracket null.
    slope_cells: weight of the slopes of all genes in those of a gene.
  """

  pseudo_cells: float = 1.0
  mix_rank_bin: float = 0.01
  mix_rank_bracket: float = 0.01
  top: str = 'nearest'
  bottom: str = 'nearest'
  mix_value_bracket: float = 0.01
  slope_cells: float = 30.0


@dataclasses.dataclass(frozen=True, eq=False)
class NullModels:
  """Null models fitted on training cells; see the module.

  Attributes:
    encoding: how the cells are encoded.
    mask: how genes are hidden.
    divisor_SV: float64 divisor of counts in force, per species and token.
    counts: what was counted, per species.
    choices: what was chosen on training cells, per species.
    moments: float64 [T, M] moments of values and features of the cell, per
      species; () where the mask does not split.
  """

  encoding: encoding.EncodingConfig
  mask: masking.MaskConfig
  divisor_SV: np.ndarray
  counts: tuple[counts_lib.SpeciesCounts, ...]
  choices: tuple[Choices, ...]
  moments: tuple[np.ndarray, ...] = ()

  @property
  def id_names(self) -> tuple[str, ...]:
    """Nulls of hidden ids under this mask, in order."""
    return SPLIT_ID_NAMES if self.mask.splits else ID_NAMES

  @property
  def value_names(self) -> tuple[str, ...]:
    """Nulls of hidden values under this mask and mode, in order."""
    if not self.mask.splits:
      return VALUE_NAMES
    is_library = self.encoding.mode == encoding.LIBRARY
    return tuple(
      name
      for name in SPLIT_VALUE_NAMES
      if is_library or name != 'null_value_count_mean'
    )

  @property
  def names(self) -> tuple[str, ...]:
    """All nulls that `losses` gives."""
    return self.id_names + self.value_names

  def check(
    self,
    encoding_config: encoding.EncodingConfig,
    mask: masking.MaskConfig,
    place: paths.PathLike = 'null models',
  ) -> None:
    """Refuses to stand beside cells that are encoded or hidden otherwise.

    Raises:
      UserError: encoding or mask differ from those that were fitted.
    """
    pairs = (('encoding', self.encoding, encoding_config),)
    pairs += (('data.mask', self.mask, mask),)
    for group, own, asked in pairs:
      for field in dataclasses.fields(own):
        was, now = getattr(own, field.name), getattr(asked, field.name)
        if was != now:
          raise errors.UserError(
            f'{place}: fitted for {group}.{field.name}={was!r}, but the cells'
            f' here have {now!r}; fit the null models again (remove the file)'
          )

  @classmethod
  def fit(
    cls,
    chunks: Iterable[TrainingCells],
    *,
    encoding_config: encoding.EncodingConfig,
    mask: masking.MaskConfig,
    divisor_SV: np.ndarray,
    species_tokens: Sequence[np.ndarray],
    seed: int = 0,
  ) -> 'NullModels':
    """Counts training cells, one chunk in memory at a time.

    Up to 256 cells a species, every eighth of the first chunks, are held back
    while `Choices` are made on them, then counted too.

    Args:
      chunks: training cells, encoded by `encoding_config` with `divisor_SV`,
        in random order.
      encoding_config: mode and tie order in force.
      mask: mask policy in force.
      divisor_SV: float64 [S, V] divisors of the counts.
      species_tokens: int32 tokens that a cell of each species can hold.
      seed: of the masks of the cells held back.

    Raises:
      UserError: a cell holds a token that its species does not have.
    """
    num_species, size = divisor_SV.shape
    counts = [counts_lib.no_counts(tokens) for tokens in species_tokens]
    genes_SV = [
      counts_lib.gene_index(tokens, size) for tokens in species_tokens
    ]
    moments = ()
    if mask.splits:
      moments = tuple(split.no_moments(len(t)) for t in species_tokens)
    held = [[] for _ in range(num_species)]

    def add(species: int, cells: encoding.EncodedCells):
      c = counts[species]
      foreign = compiled.add_cells(
        kernels.read_only(cells.gene_ids_N),
        kernels.read_only(cells.values_N),
        kernels.read_only(cells.starts_C1),
        genes_SV[species],
        kernels.read_only(divisor_SV[species]),
        encoding_config.mode == encoding.LIBRARY,
        c.pairs_TN,
        c.ranks_TQ,
        c.value_sum_T,
      )
      if foreign:
        raise errors.UserError(
          f'{foreign} genes of training cells are not genes of species'
          f' {species}: the cells were encoded with another vocabulary'
        )
      if mask.splits:
        split.add_moments(
          kernels.read_only(cells.gene_ids_N),
          kernels.read_only(cells.values_N),
          kernels.read_only(cells.starts_C1),
          genes_SV[species],
          kernels.read_only(divisor_SV[species]),
          encoding_config.mode == encoding.LIBRARY,
          moments[species],
        )

    for chunk in chunks:
      s, cells = chunk.species, chunk.cells
      measured_T = cells.num_cells
      if chunk.measured_V is not None:
        measured_T = chunk.measured_V[counts[s].tokens_T]
      counts[s] = dataclasses.replace(
        counts[s],
        num_cells=counts[s].num_cells + cells.num_cells,
        measured_T=counts[s].measured_T + measured_T,
      )
      room = _CALIBRATION_CELLS - sum(part.num_cells for part in held[s])
      keep_C = np.zeros(cells.num_cells, bool)
      keep_C[np.arange(0, cells.num_cells, _CALIBRATION_EVERY)[:room]] = True
      if room > 0 and keep_C.any():
        held[s].append(_take(cells, keep_C))
        cells = _take(cells, ~keep_C)
      add(s, cells)

    draft = cls(encoding_config, mask, divisor_SV, tuple(counts), (), moments)
    choices = [draft._choose(s, held[s], seed) for s in range(num_species)]
    for s in range(num_species):
      for part in held[s]:
        add(s, part)
    return dataclasses.replace(draft, choices=tuple(choices))

  def cells_V(self) -> np.ndarray:
    """int64 [V] training cells that keep each token, of all species."""
    cells_V = np.zeros(self.divisor_SV.shape[1], np.int64)
    for counts in self.counts:
      cells_V[counts.tokens_T] += counts.ranks_TQ.sum(1).astype(np.int64)
    return cells_V

  def _choose(
    self, species: int, held: list[encoding.EncodedCells], seed: int
  ) -> Choices:
    """Mixtures and ends that are best on cells held back."""
    if not held:
      return Choices()
    parts = [
      self._masked(species, part, seed, masking.EVALUATION_EPOCH)
      for part in held
    ]

    def best(column: int, name: str, options: Sequence) -> Choices:
      trials = [dataclasses.replace(chosen, **{name: o}) for o in options]
      sums = [self._trial(species, parts, t, column) for t in trials]
      return trials[int(np.argmin(sums))]

    if self.mask.splits:
      chosen = Choices(mix_value_bracket=_MIXES[2])
      chosen = best(3, 'pseudo_cells', _PSEUDO_CELLS)
      chosen = best(3, 'mix_value_bracket', _MIXES)
      chosen = best(2, 'mix_rank_bracket', _MIXES)
      chosen = best(1, 'mix_rank_bin', _MIXES)
      return best(-1, 'slope_cells', _SLOPE_CELLS)
    chosen = Choices(mix_rank_bracket=_MIXES[2])
    chosen = best(2, 'pseudo_cells', _PSEUDO_CELLS)
    chosen = best(2, 'mix_rank_bracket', _MIXES)
    chosen = best(1, 'mix_rank_bin', _MIXES)
    top, bottom = self._best_ends(species, held, seed)
    return dataclasses.replace(chosen, top=top, bottom=bottom)

  def _trial(
    self, species: int, parts: list, choices: Choices, column: int
  ) -> float:
    """Summed loss of one id null on masked cells, or (-1) of the lines."""
    total = 0.0
    for cells, masked in parts:
      loss_IdN, value_NameN = self._score(
        species,
        choices,
        masked.gene_ids_N,
        masked.values_N,
        np.where(masked.is_masked_N, cells.gene_ids_N, -1),
        cells.starts_C1[:-1],
        cells.starts_C1[1:],
        masked.unranked_C,
        column,
      )
      if column >= 0:
        total += loss_IdN[column].sum()
      else:
        error_N = value_NameN[-1] - cells.values_N
        total += np.square(error_N[masked.hides_rank_N]).sum()
    return total

  def _best_ends(
    self, species: int, held: list[encoding.EncodedCells], seed: int
  ) -> tuple[str, str]:
    """Rules above and below the visible genes of least squared error."""
    error_SideE = np.zeros((2, len(compiled.ENDS)))
    default = self._mean_value(species)
    for cells in held:
      starts = cells.starts_C1
      guess_n = np.empty(np.diff(starts).max(initial=0))
      for epoch in range(_END_EPOCHS):
        _, masked = self._masked(species, cells, seed, epoch)
        for a, b in zip(starts, starts[1:]):
          values_n = masked.values_N[a:b]
          seen_v = np.flatnonzero(values_n >= 0)
          if not len(seen_v) or len(seen_v) == seen_v[-1] + 1 == b - a:
            continue
          for e, end in enumerate(compiled.ENDS):
            rules = self._rules(species, Choices(top=end, bottom=end))
            compiled.interpolate(values_n, rules, default, guess_n)
            error_n = (guess_n[: b - a] - cells.values_N[a:b]) ** 2
            error_SideE[0, e] += error_n[: seen_v[0]].sum()
            error_SideE[1, e] += error_n[seen_v[-1] :].sum()
    top, bottom = error_SideE.argmin(1)
    return compiled.ENDS[top], compiled.ENDS[bottom]

  def _masked(
    self, species: int, cells: encoding.EncodedCells, seed: int, epoch: int
  ) -> tuple[encoding.EncodedCells, masking.MaskedCells]:
    """Training cells, and what is seen of them with genes hidden."""
    counts = self.counts[species]
    masked = masking.mask_cells(
      cells,
      np.arange(cells.num_cells),
      config=self.mask,
      seed=seed,
      epoch=epoch,
      random_tokens=counts.tokens_T[counts.measured_T > 0],
      vocabulary_size=self.divisor_SV.shape[1],
    )
    return masking.set_apart(cells, masked)

  @functools.cached_property
  def _built(self) -> dict[tuple, compiled.Tables | split.Lines]:
    return {}

  def _tables(self, species: int, pseudo_cells: float) -> compiled.Tables:
    """Tables of a species, built when first asked for."""
    key = species, pseudo_cells
    if key not in self._built:
      self._built[key] = counts_lib.tables(
        self.counts[species],
        self.divisor_SV[species],
        pseudo_cells=pseudo_cells,
        mask_rate=self.mask.id_rate,
        library=self.encoding.mode == encoding.LIBRARY,
        mean_value=self._mean_value(species),
      )
    return self._built[key]

  def _mean_value(self, species: int) -> float:
    """Mean value of the species, or of all where it has no training cells."""
    own = [self.counts[species]]
    for group in (own, self.counts):
      expressed = sum(int(c.ranks_TQ.sum()) for c in group)
      if expressed:
        return sum(float(c.value_sum_T.sum()) for c in group) / expressed
    return 0.0

  def _rules(self, species: int, choices: Choices) -> compiled.Rules:
    c = self.counts[species]
    num_tokens = len(c.tokens_T)
    if c.num_cells:
      num_tokens = max(c.measured_T.sum() / c.num_cells, 1.0)
    keep = max(1.0 - self.mask.mask_share - self.mask.random_share, 0.0)
    random = self.mask.random_share / num_tokens
    if self.mask.splits:  # every hidden id shows `<mask>`
      keep = random = 0.0
    return compiled.Rules(
      library=self.encoding.mode == encoding.LIBRARY,
      by_token=self.encoding.ties == 'token',
      keep=0.0 if self.mask.policy == 'released' else keep,
      random=random,
      mix_rank_bin=choices.mix_rank_bin,
      mix_rank_bracket=choices.mix_rank_bracket,
      top=compiled.ENDS.index(choices.top),
      bottom=compiled.ENDS.index(choices.bottom),
    )

  def _score(
    self, species, choices, ids_N, values_N, labels_N, first_C, last_C,
    unranked_C=None, column=None,
  ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Id losses and predicted values, [name, N], of flat cells.

    With a column some of the other id losses may be left out.
    """
    if self.mask.splits:
      return self._score_split(
        species, choices, ids_N, values_N, labels_N, first_C, last_C,
        unranked_C, column,
      )  # fmt: skip
    loss_3N = np.zeros((3, len(ids_N)))
    value_3N = np.zeros((3, len(ids_N)))
    compiled.score_cells(
      kernels.read_only(ids_N),
      kernels.read_only(values_N),
      kernels.read_only(labels_N.astype(np.int32, copy=False)),
      kernels.read_only(first_C.astype(np.int64, copy=False)),
      kernels.read_only(last_C.astype(np.int64, copy=False)),
      self._tables(species, choices.pseudo_cells),
      self._rules(species, choices),
      self._mean_value(species),
      loss_3N,
      value_3N,
    )
    return loss_3N, value_3N

  def _score_split(
    self, species, choices, ids_N, values_N, labels_N, first_C, last_C,
    unranked_C, column,
  ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The same where ids and values are asked of different genes."""
    loss_4N = np.zeros((4, len(ids_N)))
    value_3N = np.zeros((3, len(ids_N)))
    rules = self._rules(species, choices)
    split.score_cells(
      kernels.read_only(ids_N),
      kernels.read_only(values_N),
      kernels.read_only(labels_N.astype(np.int32, copy=False)),
      kernels.read_only(first_C.astype(np.int64, copy=False)),
      kernels.read_only(last_C.astype(np.int64, copy=False)),
      kernels.read_only(unranked_C.astype(np.int64, copy=False)),
      kernels.read_only(
        self.divisor_SV[species][self.counts[species].tokens_T]
      ),
      self._tables(species, choices.pseudo_cells),
      rules,
      split.Rules(
        choices.mix_value_bracket,
        rules.library,
        rules.by_token,
        *(column in (None, k) for k in (1, 2, 3)),
      ),
      self._lines(species, choices.slope_cells),
      self._mean_value(species),
      loss_4N,
      value_3N,
    )
    kept = [SPLIT_VALUE_NAMES.index(name) for name in self.value_names]
    return loss_4N, value_3N[kept]

  def _lines(self, species: int, slope_cells: float) -> split.Lines:
    """Lines of a species, made when first asked for."""
    key = species, 'lines', slope_cells
    if key not in self._built:
      self._built[key] = split.lines(
        self.moments[species], slope_cells, self._mean_value(species)
      )
    return self._built[key]

  def losses(
    self, host_batch: schemas.HostBatch | schemas.PretrainingBatch
  ) -> dict[str, np.ndarray]:
    """Losses of every null at the masked slots of a batch of NumPy arrays.

    Returns:
      {name: float64 [B, K]}, names as in `names`; ids in nats, values in
      squared log2 units; 0 where the slot has no weight for the id or value.

    Raises:
      UserError: a label is not a token of its cell's species.
    """
    batch = getattr(host_batch, 'batch', host_batch)
    cells = batch.cells
    shape = cells.gene_ids_BL.shape
    ids_N, values_N = cells.gene_ids_BL.ravel(), cells.values_BL.ravel()
    species_C, first_C, last_C = _cells_of(cells)
    asked_BK = (batch.id_weights_BK > 0) | (batch.value_weights_BK > 0)
    rows, slots = np.nonzero(asked_BK)
    at = rows * shape[1] + batch.masked_slots_BK[rows, slots]
    labels_N = np.full(len(ids_N), -1, np.int32)
    labels_N[at] = batch.id_labels_BK[rows, slots]
    unranked_C = _unranked(cells, first_C, last_C)
    if unranked_C.any() and not self.mask.splits:
      raise errors.UserError(
        'ranks are hidden in these cells, as under the mask objective split,'
        ' but the null models are of the objective released; fit them again'
      )
    loss_IdN = np.zeros((len(self.id_names), len(ids_N)))
    value_NameN = np.zeros((len(self.value_names), len(ids_N)))
    for s in np.unique(species_C):
      foreign = np.setdiff1d(
        labels_N[at][cells.species_BL.ravel()[at] == s],
        self.counts[s].tokens_T,
      )
      if len(foreign):
        raise errors.UserError(
          f'token {foreign[0]} is hidden in a cell of species {s} but is not a'
          ' gene of it: the null models belong to another vocabulary'
        )
      of_s = species_C == s
      losses, values = self._score(
        s, self.choices[s], ids_N, values_N, labels_N, first_C[of_s],
        last_C[of_s], unranked_C[of_s],
      )  # fmt: skip
      loss_IdN += losses
      value_NameN += values
    out = {name: np.zeros(asked_BK.shape) for name in self.names}
    truth = batch.value_labels_BK[rows, slots]
    has_id = batch.id_weights_BK[rows, slots] > 0
    has_value = batch.value_weights_BK[rows, slots] > 0
    for k, name in enumerate(self.id_names):
      out[name][rows, slots] = loss_IdN[k, at] * has_id
    for k, name in enumerate(self.value_names):
      out[name][rows, slots] = (value_NameN[k, at] - truth) ** 2 * has_value
    return out

  @property
  def digest(self) -> str:
    """Hash of what the losses depend on, for a checkpoint to name."""
    return paths.sha256_bytes(self._bytes())

  def _bytes(self) -> bytes:
    return files.to_bytes(self)

  def save(self, path: paths.PathLike) -> None:
    """Writes one npz (arrays, and a JSON header): the same models, bytes."""
    paths.write_bytes(path, self._bytes())

  @classmethod
  def load(cls, path: paths.PathLike) -> 'NullModels':
    """Reads what `save` wrote.

    Raises:
      UserError: the file is missing, damaged, or of another format version.
    """
    fields = files.read(path)
    try:
      fields['choices'] = tuple(Choices(**c) for c in fields['choices'])
    except TypeError as error:
      raise files.damaged(path, error) from error
    return cls(**fields)


def _take(
  cells: encoding.EncodedCells, keep_C: np.ndarray
) -> encoding.EncodedCells:
  """Some of the cells."""
  lengths_C = np.diff(cells.starts_C1)
  keep_N = np.repeat(keep_C, lengths_C)
  return encoding.EncodedCells(
    cells.gene_ids_N[keep_N],
    cells.values_N[keep_N],
    np.concatenate([[0], np.cumsum(lengths_C[keep_C])]),
    cells.keys_C[keep_C],
    cells.num_genes_C[keep_C],
  )


def _cells_of(
  cells: schemas.CellBatch,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Species and genes (first, past the last) of the cells, in flat slots."""
  row_BL = np.arange(len(cells.segments_BL))[:, None]
  # Distinct over the batch, so that a cell at the end of a row ends there.
  cell_N = np.where(
    cells.segments_BL > 0, cells.segments_BL + row_BL * (1 << 20), 0
  ).ravel()
  edge = np.flatnonzero(np.diff(cell_N)) + 1
  first = np.concatenate([[0], edge])
  last = np.concatenate([edge, [len(cell_N)]])
  real = cell_N[first] > 0
  first, last = first[real], last[real]
  species_C = cells.species_BL.ravel()[first]
  return species_C, first + cells.is_cls_BL.ravel()[first], last


def _unranked(
  cells: schemas.CellBatch, first_C: np.ndarray, last_C: np.ndarray
) -> np.ndarray:
  """int64 genes without rank of every cell."""
  hides_N = np.asarray(cells.positions_BL).ravel() == masking.HIDDEN_RANK
  before_N1 = np.concatenate([[0], np.cumsum(hides_N)])
  return before_N1[last_C] - before_N1[first_C]
