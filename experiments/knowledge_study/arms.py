"""The arms of the study, in the order of all its tables.

An arm is the prior tables that a run is given: (name in the model, file below
the priors of a corpus, without ending). `tables` are the four of the real
pipeline at the atlas' default fidelity; `fidelity_P` those of tables in which a
share P of the statements is true and a share P of the truth is stated. These
have no co-expression, which is made of the cells and has no such knob.
"""

KINDS = ('grn', 'promoter', 'family', 'coexpression')
STATED = KINDS[:3]  # what somebody wrote down
FIDELITIES = ('0', '0.25', '0.5', '1')


def _arm(folder: str, kinds=KINDS) -> tuple[tuple[str, str], ...]:
  return tuple((kind, f'{folder}/{kind}') for kind in kinds)


# Reported in this order. `permuted` and the like keep the names and widths of
# the tables they stand for, so that the models are the same in size.
MAIN = {
  'none': (),
  'all': _arm('tables'),
  'permuted': _arm('tables/shuffled'),
  'grn': _arm('tables', ('grn',)),
  'grn_rewired': _arm('tables/rewired', ('grn',)),
  'constant': _arm('tables/constant'),
  'random': _arm('tables/random'),
}
CONTROLS = {
  f'{name}_{p}': _arm(f'fidelity_{p}{folder}', STATED)
  for p in FIDELITIES
  for name, folder in (('fidelity', ''), ('permuted_fidelity', '/shuffled'))
}
ARMS = {**MAIN, **CONTROLS}
PAIR = ('all', 'permuted')
