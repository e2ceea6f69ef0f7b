"""In-silico perturbation: what a model does to a cell when a gene changes.

Every result is an association learned from expression, not a causal estimate.

  interventions  what is done to which genes, and what that means in counts
  variants       a cell and an intervention -> the cell as it is encoded then
  effects        both run through the model, and compared
  screen         all genes of many cells: batches, parts, resuming
  first_order    one backward pass scores every gene of a cell
  matching       null genes like the target in all but its identity
  statistics     units, z, p and FDR
  answers        which genes answer, beyond what answers any
  results        the tidy table and its header
  result_files   both on disk, and answers as an AnnData
"""
