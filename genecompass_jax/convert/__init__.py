"""Weights of the released PyTorch model <-> our models, without torch.

names       the name table: an original tensor <-> a parameter of ours
original    the original's config and state dict -> a model
state_dict  a model -> the original's state dict and config
genes       the release's dictionaries -> vocabulary and medians
stablehlo   the encoder as a compiled program for any runtime
command     `genecompass convert`
"""
