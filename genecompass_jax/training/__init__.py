"""What a run is made of: configuration, step, loop, what it tells and survives.

`genecompass_jax.train` tells it in order.
"""
