"""In-silico perturbation: what a model does to a cell when a gene changes.

Every result is an association learned from expression, not a causal estimate.

  question       what is asked: genes, cells, units, nulls
  design         a question and cells -> targets, their nulls, interventions
  perturb        all of it: from a question to a table
  command        the same on the command line

  cell_set       the cells in memory, counted by token
  interventions  what is done to which genes, and what that means in counts
  variants       a cell and an intervention -> the cell as it is encoded then
  comparison     both run through the model, and compared
  effects        what is measured, and by which sign
  axes           from a start to a goal
  screen         all interventions on all cells: groups and batches
  runs           a screen in a folder: continued, shared, estimated
  stages         what is worked out before it, in the same folder
  array_files    arrays in files that are whole or not there
  first_order    a few backward passes score every gene of a cell
  response_sums  effects on other genes, added up

  matching       null genes like the target in all but its identity
  contrasts      effects less those of the nulls in the same cells, by unit
  null_line      what nulls say at the rank of their target
  statistics     units, z, p and FDR
  answers        which genes answer, beyond what answers any
  results        the tidy table and its header
  result_files   both on disk, and answers as an AnnData
"""
