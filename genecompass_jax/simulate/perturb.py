"""Perturbations: what is done to cells, and what it truly does to a type."""

import dataclasses

import numpy as np

from genecompass_jax import errors


@dataclasses.dataclass(frozen=True)
class Perturbation:
  """A change of the expression or the activity of some genes.

  Attributes:
    name: as `obs['perturbation']` gives it.
    gene_ids: the genes; those of the other species are passed over, so one
      drug can name its targets in both.
    scale: by gene, what is left of its own expression (0 for a knock-out).
    added: by gene, expression from elsewhere, in units of its baseline.
    kept_activity: by gene, what is left of the activity of the product.
    dose: as `obs['dose']` gives it.
  """

  name: str
  gene_ids: tuple[str, ...]
  scale: tuple[float, ...]
  added: tuple[float, ...]
  kept_activity: tuple[float, ...]
  dose: float = 1.0


def knock_out(*gene_ids: str) -> Perturbation:
  """No expression and no activity of these genes."""
  return _each('knock_out', gene_ids, scale=0.0)


def knock_down(*gene_ids: str, remaining: float = 0.25) -> Perturbation:
  """Expression falls to the share `remaining`."""
  return _each('knock_down', gene_ids, scale=remaining)


def over_express(*gene_ids: str, added: float = 4.0) -> Perturbation:
  """Adds expression, in units of the baseline, whatever the cell makes."""
  return _each('over_express', gene_ids, added=added)


def combine(*perturbations: Perturbation) -> Perturbation:
  """All of them at once, on different genes.

  Raises:
    UserError: a gene stands in two of them.
  """

  def joined(name):
    return tuple(v for p in perturbations for v in getattr(p, name))

  gene_ids = joined('gene_ids')
  if len(set(gene_ids)) != len(gene_ids):
    raise errors.UserError('combine: a gene stands in two perturbations')
  return Perturbation(
    '+'.join(p.name for p in perturbations),
    gene_ids,
    joined('scale'),
    joined('added'),
    joined('kept_activity'),
    max(p.dose for p in perturbations),
  )


def _each(kind, gene_ids, scale=1.0, added=0.0) -> Perturbation:
  if not gene_ids or len(set(gene_ids)) != len(gene_ids):
    raise errors.UserError(f'{kind}: name at least one gene, each once')
  number = len(gene_ids)
  return Perturbation(
    f'{kind}:{"+".join(gene_ids)}',
    gene_ids,
    (scale,) * number,
    (added,) * number,
    (1.0,) * number,
  )


@dataclasses.dataclass(frozen=True)
class Drug:
  """Inhibits the products of one to three TFs, in both species.

  Attributes:
    name: of the drug.
    gene_ids: its targets, human and mouse.
    half_dose: dose that halves their activity.
    hill: steepness.
  """

  name: str
  gene_ids: tuple[str, ...]
  half_dose: float
  hill: float

  def at(self, dose: float) -> Perturbation:
    """The perturbation by a dose.

    Raises:
      UserError: the dose is negative.
    """
    if dose < 0:
      raise errors.UserError(f'{self.name}: {dose=} must not be negative')
    kept = 1 / (1 + (dose / self.half_dose) ** self.hill)
    number = len(self.gene_ids)
    return Perturbation(
      self.name,
      self.gene_ids,
      (1.0,) * number,
      (0.0,) * number,
      (kept,) * number,
      dose,
    )


class Edit:
  """A perturbation in the rows of one species.

  Raises:
    UserError: it names no gene of the species.
  """

  def __init__(self, perturbation: Perturbation, gene_ids, tf_rows_T, dtype):
    row_of = {gene_id: r for r, gene_id in enumerate(gene_ids)}
    number_of = {int(r): t for t, r in enumerate(tf_rows_T)}
    values = zip(
      perturbation.gene_ids,
      perturbation.scale,
      perturbation.added,
      perturbation.kept_activity,
    )
    found = [(row_of[g], *rest) for g, *rest in values if g in row_of]
    if not found:
      raise errors.UserError(
        f'{perturbation.name}: none of its genes is in this species of the '
        'atlas; see genes.tsv of the truth'
      )
    self.rows = np.array([f[0] for f in found])
    self.scale, self.added, kept = np.array([f[1:] for f in found], dtype).T[
      :, :, None
    ]
    numbers = np.array([number_of.get(int(r), -1) for r in self.rows])
    # Only what changes passes through exp and log, which round.
    changed = (self.scale[:, 0] != 1) | (self.added[:, 0] != 0)
    changed &= numbers >= 0
    self._changed_tfs = (
      numbers[changed],
      self.scale[changed],
      self.added[changed],
    )
    self._tfs, self._kept = numbers[numbers >= 0], kept[numbers >= 0]

  def expression(self, d_TC: np.ndarray) -> np.ndarray:
    """Deviations of TFs, changed; -inf where there is no expression."""
    d_TC = d_TC.copy()
    tfs, scale, added = self._changed_tfs
    with np.errstate(divide='ignore'):
      d_TC[tfs] = np.log(np.exp(d_TC[tfs]) * scale + added)
    return d_TC

  def activity(self, a_TC: np.ndarray) -> np.ndarray:
    """Activities of TFs, changed."""
    a_TC = a_TC.copy()
    a_TC[self._tfs] *= self._kept
    return a_TC


@dataclasses.dataclass(frozen=True, eq=False)
class Effects:
  """What a perturbation does to the mean state of each of Y cell types.

  Attributes:
    gene_ids: R genes.
    types: names of the Y types.
    log2_fold_YR: change of expression; -inf for a gene knocked out; exactly 0
      where the gene is not downstream, and nan for silent genes.
    is_perturbed_R: the genes of the perturbation.
    is_direct_R: targets of one of its TFs.
    is_descendant_R: downstream of one, over any number of edges.
    is_sibling_R: shares all regulators with one and is not downstream of any:
      correlated, not caused.
    is_null_R: the rest; exactly no effect.
  """

  gene_ids: tuple[str, ...]
  types: tuple[str, ...]
  log2_fold_YR: np.ndarray
  is_perturbed_R: np.ndarray
  is_direct_R: np.ndarray
  is_descendant_R: np.ndarray
  is_sibling_R: np.ndarray
  is_null_R: np.ndarray
