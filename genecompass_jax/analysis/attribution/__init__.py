"""Which parts of the input a prediction came from.

`targets` says what is explained, `parts` what it is explained by and what
stands for "not known", `integrals` how the difference is shared out, and
`attribute` does it for a user's cells.
"""
