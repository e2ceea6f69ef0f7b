"""Raw cells and public tables -> corpora, gene tables, priors. Needs no JAX.

sources, readers/      cells of any format, as counts over a gene list
pipeline, building/    sources -> a corpus, in stages of tasks
merging, exports       corpora -> a corpus, or formats of others
priors/                networks, promoters, families, cells -> prior tables
fetching/, genes/      official files, and gene tables made of them
simulated, pbmc68k     cells that need no download
"""
