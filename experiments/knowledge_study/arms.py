"""The arms of the study, in the order of all its tables.

An arm is the prior tables that a run is given. `tables` are the four of the real
pipeline at the atlas' default fidelity. `fidelity_P` are those of statements of
which a share P is true, and of a share P of the truth. They have no
co-expression, which is made of the cells and has no such knob.

What is drawn at random is drawn anew for every seed: the permutation of rows, the
rewired network, random rows, and the statements of a fidelity. One draw for all
seeds would be one throw of the dice, and no interval over seeds would know of it.

`EXPLORATORY` arms were thought of after the registered runs were seen: they may
explain a result, and cannot be one.
"""

import dataclasses

KINDS = ('grn', 'promoter', 'family', 'coexpression')
STATED = KINDS[:3]  # what somebody wrote down
FIDELITIES = ('0', '0.25', '0.5', '1')


@dataclasses.dataclass(frozen=True)
class Arm:
  """What a run is given.

  Attributes:
    kinds: prior tables; the names in the model.
    fidelity: of the statements; '' for those of the atlas, the same in all runs.
    control: of `genecompass prior control`, in place of the tables; ''.
  """

  kinds: tuple[str, ...] = KINDS
  fidelity: str = ''
  control: str = ''

  def tables(self, seed: int) -> str:
    """Folder of the tables, or of those that the control is made of."""
    return f'fidelity_{self.fidelity}/{seed}' if self.fidelity else 'tables'

  def folder(self, seed: int) -> str:
    """Folder of what the run is given, below the priors of its corpus."""
    folder = self.tables(seed)
    if self.control == 'constant':
      return f'{folder}/constant'  # nothing is drawn
    return f'{folder}/{self.control}_{seed}' if self.control else folder

  @property
  def controlled(self) -> tuple[str, ...]:
    """Kinds that the folder of its control has, for every arm that uses it."""
    if self.control == 'rewired':
      return self.kinds  # a network alone can be rewired
    return STATED if self.fidelity else KINDS

  def files(self, seed: int) -> tuple[tuple[str, str], ...]:
    """(name in the model, file without ending) of every table."""
    return tuple((kind, f'{self.folder(seed)}/{kind}') for kind in self.kinds)


# Reported in this order. Controls keep the names and widths of the tables they
# stand for, so that the models are the same in size.
MAIN = {
  'none': Arm(()),
  'all': Arm(),
  'permuted': Arm(control='shuffled'),
  'grn': Arm(('grn',)),
  'grn_rewired': Arm(('grn',), control='rewired'),
  'constant': Arm(control='constant'),
  'random': Arm(control='random'),
}
CONTROLS = {
  f'{name}_{p}': Arm(STATED, p, control)
  for p in FIDELITIES
  for name, control in (('fidelity', ''), ('permuted_fidelity', 'shuffled'))
}
REGISTERED = {**MAIN, **CONTROLS}
# With and without what is counted from the cells themselves; and a permutation
# that leaves orthologues as alike as they are.
EXPLORATORY = {
  'stated': Arm(STATED),
  'permuted_stated': Arm(STATED, control='shuffled'),
  'coexpression': Arm(('coexpression',)),
  'permuted_coexpression': Arm(('coexpression',), control='shuffled'),
  'permuted_pairs': Arm(control='shuffled_pairs'),
}
ARMS = {**REGISTERED, **EXPLORATORY}
PAIR = ('all', 'permuted')
